"""Measures what models of common sizes take: memory and speed of `homeroom bench train`.

The models have the shapes of SmolLM2-135M, Qwen2.5 and Llama 2 and random weights in bf16, since neither memory nor speed depends on
what the weights say. That of 7B wants 16 GB of disk for a while, that of 13B 26 GB; with `--layers` a model has only its first layers,
and what all of them take is the plan's. `--rows` and `--tokens` say what a step is.

Run: python sizes.py --homeroom BIN [--only 0.5B,1.5B] [--dir DIR]                                          (no packages)
     python sizes.py --homeroom BIN --only 13B,70B --strategies qlora --layers 4 --gradient-checkpointing
"""

import argparse
import json
import os
import shutil
import struct
import subprocess
import tempfile
from pathlib import Path

TOKENIZER = Path(__file__).parents[1] / "fixtures" / "models" / "qwen2"
# Hidden size, layers, query heads, key heads, MLP width, vocabulary, tied head: `config.json` of HuggingFaceTB/SmolLM2-135M,
# Qwen/Qwen2.5-* and meta-llama/Llama-2-*.
SHAPES = {
    "135M": (576, 30, 9, 3, 1536, 49152, True),
    "0.5B": (896, 24, 14, 2, 4864, 151936, True),
    "1.5B": (1536, 28, 12, 2, 8960, 151936, True),
    "3B": (2048, 36, 16, 2, 11008, 151936, True),
    "7B": (3584, 28, 28, 4, 18944, 152064, False),
    "Llama-7B": (4096, 32, 32, 32, 11008, 32000, False),
    "13B": (5120, 40, 40, 40, 13824, 32000, False),
    "70B": (8192, 80, 64, 8, 28672, 32000, False),
}
# Those that no flag asks for.
USUAL = ("0.5B", "1.5B", "3B", "7B")
BLOCK = 1 << 26


def tensors(shape) -> dict[str, list[int]]:
    hidden, layers, heads, kv_heads, width, vocab, tied = shape
    kv = hidden // heads * kv_heads
    found = {"model.embed_tokens.weight": [vocab, hidden], "model.norm.weight": [hidden]}
    if not tied:
        found["lm_head.weight"] = [vocab, hidden]
    for layer in range(layers):
        at = f"model.layers.{layer}."
        for name, rows in (("q", hidden), ("k", kv), ("v", kv)):
            found[f"{at}self_attn.{name}_proj.weight"] = [rows, hidden]
            found[f"{at}self_attn.{name}_proj.bias"] = [rows]
        found[f"{at}self_attn.o_proj.weight"] = [hidden, hidden]
        found[f"{at}mlp.gate_proj.weight"] = [width, hidden]
        found[f"{at}mlp.up_proj.weight"] = [width, hidden]
        found[f"{at}mlp.down_proj.weight"] = [hidden, width]
        for norm in ("input_layernorm", "post_attention_layernorm"):
            found[f"{at}{norm}.weight"] = [hidden]
    return found


def random_bf16() -> bytes:
    """Values of either sign from 2^-6 to 2^-5, about the size of a trained model's."""
    bits = int.from_bytes(os.urandom(BLOCK), "little")
    keep = int.from_bytes(b"\x7f\x80" * (BLOCK // 2), "little")
    exponent = int.from_bytes(b"\x80\x3c" * (BLOCK // 2), "little")
    return (bits & keep | exponent).to_bytes(BLOCK, "little")


def write_config(shape, directory: Path) -> None:
    """All of a model but its weights: what `homeroom plan` reads."""
    hidden, layers, heads, kv_heads, width, vocab, tied = shape
    directory.mkdir(parents=True, exist_ok=True)
    for file in TOKENIZER.iterdir():
        if file.name.startswith("tokenizer") or file.name == "chat_template.jinja":
            shutil.copy(file, directory)
    config = {
        "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_size": hidden, "intermediate_size": width,
        "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": kv_heads, "vocab_size": vocab,
        "max_position_embeddings": 32768, "rope_theta": 1000000.0, "rms_norm_eps": 1e-6, "tie_word_embeddings": tied,
        "hidden_act": "silu", "torch_dtype": "bfloat16", "use_sliding_window": False, "bos_token_id": 0, "eos_token_id": 1,
    }  # fmt: skip
    (directory / "config.json").write_text(json.dumps(config))


def write_model(shape, directory: Path) -> None:
    write_config(shape, directory)
    header, at = {}, 0
    for name, dims in tensors(shape).items():
        size = 2 * dims[0] * (dims[1] if len(dims) > 1 else 1)
        header[name] = {"dtype": "BF16", "shape": dims, "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    block = random_bf16()
    with open(directory / "model.safetensors", "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        while at > 0:
            file.write(block[: min(at, BLOCK)])
            at -= BLOCK


def run(homeroom: str, *arguments: str) -> dict:
    done = subprocess.run([homeroom, *arguments, "--json"], check=True, capture_output=True, text=True)
    return json.loads(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--homeroom", required=True)
    parser.add_argument("--only", default=",".join(USUAL))
    parser.add_argument("--strategies", default="lora,qlora")
    parser.add_argument("--rows", default="4", help="of a step")
    parser.add_argument("--tokens", default="256", help="of a row")
    parser.add_argument("--gradient-checkpointing", action="store_true")
    parser.add_argument("--layers", type=int, help="of a model, the first ones alone")
    parser.add_argument("--dir", type=Path, help="where the models are written")
    args = parser.parse_args()
    # What is kept of an encoding would be as large as the model.
    os.environ["HOMEROOM_ENCODED"] = "off"
    of_step = ["--batch-size", args.rows] + ["--gradient-checkpointing"] * args.gradient_checkpointing
    for size in args.only.split(","):
        shape = SHAPES[size]
        cut = (shape[0], min(args.layers or shape[1], shape[1]), *shape[2:])
        with tempfile.TemporaryDirectory(dir=args.dir) as scratch:
            whole, model = Path(scratch) / "whole", Path(scratch) / "model"
            write_config(shape, whole)
            write_model(cut, model)
            for strategy in args.strategies.split(","):
                of_plan = ["--strategy", strategy, *of_step, "--max-seq-len", args.tokens]
                plans = [run(args.homeroom, "plan", "--model-name", str(path), *of_plan) for path in (whole, model)]
                row = run(
                    args.homeroom, "bench", "train", "--model-name", str(model), "--strategy", strategy, *of_step,
                    "--seq-len", args.tokens, "--warmup", "1", "--steps", "1",
                )  # fmt: skip
                tokens, peak = row["tokens_per_second"], row["peak_memory_bytes"] / 1e9
                told = f"{size:>5}  {strategy:<6} {cut[1]:3} layers  {tokens:7.1f} tokens/s  {peak:6.2f} GB"
                told += f"   plan {plans[1]['peak_memory_bytes'] / 1e9:6.2f} GB"
                if cut[1] < shape[1]:
                    told += f", of all {shape[1]} layers {plans[0]['peak_memory_bytes'] / 1e9:6.2f} GB"
                print(f"{told}   {row['cpu']}", flush=True)


if __name__ == "__main__":
    main()
