"""Holds Homeroom's block formats to ggml's: the same bytes for real weights and odd rows, and how fast both are.

ggml is the library that llama-cpp-python brings; its reference functions run on one thread, and so does this here (RAYON_NUM_THREADS=1).
Times are taken by turns.

Run: python quantize.py --example target/release/examples/quantize [--gguf MODEL.gguf | --safetensors model.safetensors] [--passes 3]
     (needs llama_cpp, gguf, numpy)
"""

import argparse
import ctypes
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import gguf
import llama_cpp
import numpy as np
from gguf import GGMLQuantizationType as Q

TYPES = [Q.BF16, Q.F16, Q.Q8_0, Q.Q4_0, Q.Q4_1, Q.Q5_0, Q.Q5_1, Q.Q4_K, Q.Q5_K, Q.Q6_K]


def ggml():
    library = ctypes.CDLL(str(next((Path(llama_cpp.__file__).parent / "lib").glob("libggml-base.so"))))
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    library.ggml_quantize_chunk.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, *[ctypes.c_int64] * 3, ctypes.c_void_p]
    return library


def quantized(library, kind, values):
    """Bytes of a matrix, and the seconds that they took."""
    out = np.empty(gguf.quant_shape_to_byte_shape(values.shape, kind), np.uint8)
    rows, cols = values.shape
    start = time.perf_counter()
    written = library.ggml_quantize_chunk(int(kind), values.ctypes.data, out.ctypes.data, 0, rows, cols, None)
    seconds = time.perf_counter() - start
    assert written == out.nbytes
    return out.reshape(-1), seconds


def odd_rows():
    """Rows of 512 values that are unlike weights."""
    random = np.random.default_rng(7)
    normal = lambda scale: random.standard_normal(512).astype(np.float32) * np.float32(scale)
    one = lambda value: np.eye(1, 512, 300, dtype=np.float32)[0] * np.float32(value) + normal(1e-3)
    rows = [
        np.zeros(512), -np.zeros(512), normal(0.02), -np.abs(normal(0.02)), np.abs(normal(0.02)), one(6e4), one(-6e4), one(1.0),
        normal(1e-40), normal(1e-44), np.full(512, 1e-45), normal(1e-38), normal(1e-20), normal(1e-7), normal(1e-5), normal(1e3),
        np.full(512, 0.37), np.full(512, -0.37), np.where(np.arange(512) % 2, 0.5, -0.5), np.arange(512) - 255.5,
        np.where(np.arange(512) % 37 == 0, 1.0, 0.0), np.where(np.arange(512) < 300, normal(0.1), 0.0),
        np.round(normal(4.0)) / 8, np.round(normal(40.0)) / 127, normal(0.02) ** 3, np.exp(normal(6.0)).clip(0, 6e4), -np.exp(normal(6.0)).clip(0, 6e4),
    ]
    return np.ascontiguousarray(np.stack(rows).astype(np.float32))


def weights(arguments):
    """Real matrices whose rows are whole blocks of 32, by name."""
    if arguments.gguf:
        for tensor in gguf.GGUFReader(arguments.gguf).tensors:
            if len(tensor.shape) == 2:
                values = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
                yield tensor.name, values.reshape([int(n) for n in reversed(tensor.shape)])
    if arguments.safetensors:
        import json

        data = np.memmap(arguments.safetensors, np.uint8, "r")
        size = int(data[:8].view(np.uint64)[0])
        for name, entry in json.loads(bytes(data[8 : 8 + size])).items():
            if name != "__metadata__" and len(entry["shape"]) == 2:
                start, end = entry["data_offsets"]
                raw = np.ascontiguousarray(data[8 + size + start : 8 + size + end])
                assert entry["dtype"] in ("BF16", "F32"), entry["dtype"]
                bits = raw.view(np.uint16).astype(np.uint32) << 16 if entry["dtype"] == "BF16" else raw.view(np.uint32)
                yield name, bits.view(np.float32).reshape(entry["shape"])


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--example", type=Path, required=True)
    parser.add_argument("--gguf", type=Path)
    parser.add_argument("--safetensors", type=Path)
    parser.add_argument("--passes", type=int, default=3)
    arguments = parser.parse_args()
    library = ggml()
    matrices = [("odd rows", odd_rows())]
    real = list(weights(arguments))
    if real:
        # All of them as rows of 256 values, so that every format takes them.
        flat = np.concatenate([values.reshape(-1)[: values.size // 256 * 256] for _, values in real])
        matrices.append(("weights", np.ascontiguousarray(flat.reshape(-1, 256))))
    wrong = 0
    with tempfile.TemporaryDirectory() as folder:
        source, result = Path(folder) / "values", Path(folder) / "bytes"
        for name, values in matrices:
            values.tofile(source)
            for kind in TYPES:
                ours, theirs = [], []
                for _ in range(arguments.passes):
                    command = [arguments.example, kind.name.lower(), str(values.shape[1]), source, result]
                    ran = subprocess.run(command, env=os.environ | {"RAYON_NUM_THREADS": "1"}, capture_output=True, text=True)
                    if ran.returncode:
                        sys.exit(f"{kind.name}: {ran.stderr}")
                    ours.append(float(ran.stdout))
                    want, seconds = quantized(library, kind, values)
                    theirs.append(seconds)
                got = np.fromfile(result, np.uint8)
                differ = np.flatnonzero((got != want).reshape(values.shape[0], -1).any(1))
                wrong += len(differ)
                speed = values.size / min(ours) / 1e6, values.size / min(theirs) / 1e6
                print(
                    f"{name:9} {values.size / 1e6:7.2f} M values  {kind.name:5} {len(differ)} rows differ {differ[:8].tolist() or ''}"
                    f"  {speed[0]:7.1f} M values a second, ggml {speed[1]:7.1f}: {speed[0] / speed[1]:.2f} times",
                    flush=True,
                )
    sys.exit(wrong > 0)


if __name__ == "__main__":
    main()
