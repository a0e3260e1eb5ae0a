"""Writes one model as GGUF files of several types, all by llama.cpp's own quantiser, for bench_generate.py.

The F32 file holds the dequantised weights of --gguf with its metadata and tokenizer; the other files are quantised from it. With
--random the weights are those of an untrained Llama (186 M parameters) of hidden size 1024 instead: K quants take rows of 256 numbers,
and where a row is no multiple of that, as SmolLM2-135M's 576, llama.cpp stores another type.

Run: python gguf_files.py --gguf SmolLM2-135M-Instruct.Q4_1.gguf --out DIR [--types F32,BF16,Q8_0,Q4_0,Q4_1,Q4_K_M] [--random]
"""

import argparse
import ctypes
from collections import Counter
from pathlib import Path

import gguf
import llama_cpp
import numpy as np

TYPES = {
    "BF16": llama_cpp.LLAMA_FTYPE_MOSTLY_BF16,
    "Q8_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0,
    "Q4_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0,
    "Q4_1": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_1,
    "Q4_K_M": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_K_M,
}
HIDDEN, INTERMEDIATE, LAYERS, HEADS, KV_HEADS = 1024, 2816, 12, 16, 4
SHAPES = {
    "llama.embedding_length": HIDDEN,
    "llama.feed_forward_length": INTERMEDIATE,
    "llama.block_count": LAYERS,
    "llama.attention.head_count": HEADS,
    "llama.attention.head_count_kv": KV_HEADS,
    "llama.rope.dimension_count": HIDDEN // HEADS,
    "general.name": "random",
}


def dequantised(reader):
    for tensor in reader.tensors:
        value = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        yield tensor.name, value.reshape([int(n) for n in reversed(tensor.shape)])


def untrained(vocabulary: int):
    random = np.random.default_rng(1)

    def normal(rows: int, columns: int) -> np.ndarray:
        return random.standard_normal((rows, columns), dtype=np.float32) * np.float32(0.02)

    kv = HIDDEN // HEADS * KV_HEADS
    yield "token_embd.weight", normal(vocabulary, HIDDEN)
    yield "output_norm.weight", np.ones(HIDDEN, np.float32)
    for layer in range(LAYERS):
        name = f"blk.{layer}."
        yield name + "attn_norm.weight", np.ones(HIDDEN, np.float32)
        yield name + "attn_q.weight", normal(HIDDEN, HIDDEN)
        yield name + "attn_k.weight", normal(kv, HIDDEN)
        yield name + "attn_v.weight", normal(kv, HIDDEN)
        yield name + "attn_output.weight", normal(HIDDEN, HIDDEN)
        yield name + "ffn_norm.weight", np.ones(HIDDEN, np.float32)
        yield name + "ffn_gate.weight", normal(INTERMEDIATE, HIDDEN)
        yield name + "ffn_up.weight", normal(INTERMEDIATE, HIDDEN)
        yield name + "ffn_down.weight", normal(HIDDEN, INTERMEDIATE)


def write_f32(reader, path: Path, shapes: dict, tensors) -> None:
    writer = gguf.GGUFWriter(path, reader.fields["general.architecture"].contents())
    for key, field in reader.fields.items():
        if key.startswith("GGUF.") or key in ("general.architecture", "general.quantization_version"):
            continue
        value = shapes.get(key, field.contents())
        if key == "general.file_type":
            value = int(gguf.LlamaFileType.ALL_F32)
        item = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(key, value, field.types[0], item)
    for name, value in tensors:
        writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gguf", type=Path, required=True, help="the model, or where the tokenizer of --random is from")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--types", default=",".join(["F32", *TYPES]))
    parser.add_argument("--random", action="store_true", help="untrained weights")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    types = args.types.split(",")
    if unknown := set(types) - {"F32", *TYPES}:
        parser.error(f"unknown types: {', '.join(sorted(unknown))}")
    reader = gguf.GGUFReader(args.gguf)
    args.out.mkdir(parents=True, exist_ok=True)
    name = "random-186M" if args.random else args.gguf.name.split(".")[0]
    path = args.out / f"{name}.F32.gguf"
    tensors = untrained(len(reader.fields["tokenizer.ggml.tokens"].contents())) if args.random else dequantised(reader)
    write_f32(reader, path, SHAPES if args.random else {}, tensors)
    llama_cpp.llama_backend_init()
    files = [path]
    for kind in types:
        if kind == "F32":
            continue
        options = llama_cpp.llama_model_quantize_default_params()
        options.ftype, options.nthread = TYPES[kind], args.threads
        files.append(args.out / f"{name}.{kind}.gguf")
        code = llama_cpp.llama_model_quantize(str(path).encode(), str(files[-1]).encode(), ctypes.byref(options))
        if code:
            raise SystemExit(f"error: {files[-1]}: llama.cpp's quantiser ended with {code}")
    for file in files:
        stored = Counter(tensor.tensor_type.name for tensor in gguf.GGUFReader(file).tensors)
        words = ", ".join(f"{count} {kind}" for kind, count in stored.most_common())
        print(f"{file}   {file.stat().st_size / 1e6:.1f} MB   {words}")
    if "F32" not in types:
        path.unlink()


if __name__ == "__main__":
    main()
