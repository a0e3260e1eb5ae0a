"""Measures what exporting models of common sizes takes: peak memory and time of `homeroom export-model`.

The models have the shapes of Qwen2.5 (`sizes.py`) in bf16, the adapters rank 16 on all linear layers. Values of the first layers are
random; those of the others are zeros, which take no room on the disk, and which cost what any cost. What is exported takes all of its
room for a while: 15 GB of the largest in bf16. Peak memory counts mapped pages of files, too. It ends with 1 above the bound.

Run: python export_memory.py --homeroom BIN [--only 0.5B,7B] [--formats merged,gguf:q4_k_m,peft] [--dir DIR] [--bound GB]
"""

import argparse
import json
import os
import resource
import shutil
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import machine
import sizes

REAL = 2_000_000_000
RANK = 16


def write_tensors(path: Path, tensors: dict[str, list[int]], dtype: str, width: int, real: int) -> None:
    header, at = {}, 0
    for name, dims in tensors.items():
        size = width * dims[0] * (dims[1] if len(dims) > 1 else 1)
        header[name] = {"dtype": dtype, "shape": dims, "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    block = sizes.random_bf16()
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        left = min(at, real)
        while left > 0:
            file.write(block[: min(left, len(block))])
            left -= len(block)
        file.truncate(8 + len(text) + at)


def write_adapter(base: Path, shape, directory: Path) -> None:
    """An adapter as PEFT writes it: A and B of every linear layer. As f32, pairs of bf16 are small numbers of either sign."""
    directory.mkdir()
    tensors = {}
    for name, dims in sizes.tensors(shape).items():
        if name.endswith("_proj.weight"):
            stem = "base_model.model." + name.removesuffix(".weight")
            tensors[f"{stem}.lora_A.weight"] = [RANK, dims[1]]
            tensors[f"{stem}.lora_B.weight"] = [dims[0], RANK]
    write_tensors(directory / "adapter_model.safetensors", tensors, "F32", 4, 1 << 40)
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": 0.01, "target_modules": names}
    config |= {"base_model_name_or_path": str(base), "bias": "none", "fan_in_fan_out": False}
    (directory / "adapter_config.json").write_text(json.dumps(config))


def measured(command: list[str]) -> tuple[float, float, str]:
    """Peak memory in GB, seconds, and what was said. The child is this script, so that its children are none but the program."""
    ran = subprocess.run([sys.executable, __file__, "--measure", *command], capture_output=True, text=True)
    if ran.returncode:
        raise SystemExit(ran.stderr)
    peak, seconds = map(float, ran.stdout.split()[-2:])
    return peak, seconds, ran.stderr


def main() -> None:
    if sys.argv[1:2] == ["--measure"]:
        start = time.monotonic()
        ran = subprocess.run(sys.argv[2:], stdout=subprocess.DEVNULL)
        print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1e6, time.monotonic() - start)
        raise SystemExit(ran.returncode)
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--homeroom", required=True)
    parser.add_argument("--only", default="0.5B,7B")
    parser.add_argument("--formats", default="merged:bf16,gguf:q8_0,peft")
    parser.add_argument("--dir", type=Path)
    parser.add_argument("--bound", type=float, default=3.0)
    args = parser.parse_args()
    print(machine.processor()[0])
    bad = False
    for size in args.only.split(","):
        with tempfile.TemporaryDirectory(dir=args.dir) as scratch:
            model, adapter, out = (Path(scratch) / name for name in ("model", "adapter", "out"))
            shape = sizes.SHAPES[size]
            # The tokenizer and the configuration are those of `sizes.py`; its weights are replaced.
            block, sizes.BLOCK = sizes.BLOCK, 1 << 20
            sizes.write_model((8, 0, 1, 1, 8, 8, True), model)
            sizes.BLOCK = block
            hidden, layers, heads, kv_heads, width, vocab, tied = shape
            config = json.loads((model / "config.json").read_text())
            config |= {"hidden_size": hidden, "intermediate_size": width, "num_hidden_layers": layers, "vocab_size": vocab}
            config |= {"num_attention_heads": heads, "num_key_value_heads": kv_heads, "tie_word_embeddings": tied}
            (model / "config.json").write_text(json.dumps(config))
            write_tensors(model / "model.safetensors", sizes.tensors(shape), "BF16", 2, REAL)
            write_adapter(model, shape, adapter)
            for format in args.formats.split(","):
                name, _, dtype = format.partition(":")
                command = [args.homeroom, "export-model", "--model-dir", str(adapter), "--format", name, "--output-dir", str(out)]
                command += ["--dtype", dtype] if dtype else []
                peak, seconds, said = measured(command)
                check = next((line for line in said.splitlines() if line.startswith("check")), "")
                print(f"{size:>5}  {format:<14} {peak:5.2f} GB  {seconds:6.0f} s   {check}", flush=True)
                bad |= peak > args.bound
                shutil.rmtree(out)
    raise SystemExit(bad)


if __name__ == "__main__":
    main()
