"""Holds directories exported for mlx-lm to Homeroom: 64 greedy tokens, and logits.

Each model of tests/fixtures/models that mlx-lm knows, and every directory named, is exported in f32 and read by mlx-lm on the processor.
Logits of the fixtures are compared with transformers' that lie beside them; greedy tokens with `homeroom chat`.

Run: python mlx_out.py --homeroom target/release/homeroom [--model DIR ...]      (pip install "mlx[cpu]" mlx-lm safetensors)
"""

import argparse
import json
import os
import subprocess
import tempfile
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import mlx.core as mx
import numpy as np
from mlx_lm import load
from mlx_lm.models.cache import make_prompt_cache
from safetensors.numpy import load_file

mx.set_default_device(mx.cpu)
FIXTURES = Path(__file__).resolve().parents[1] / "fixtures/models"
PROMPT = "What is the capital of France, and why did it become the capital?"
# mlx-lm rounds the scale of Gemma 3's embeddings to bf16, as the published models are stored; those of the fixtures are f32.
BOUND, ROUNDED = 1e-4, 5e-2
TOKENS = 64


def greedy(model, tokenizer):
    """The answer to the prompt, the likeliest token each time."""
    ids = tokenizer.apply_chat_template([{"role": "user", "content": PROMPT}], add_generation_prompt=True)
    cache, x, answer = make_prompt_cache(model), mx.array([ids]), []
    for _ in range(TOKENS):
        token = int(mx.argmax(model(x, cache=cache)[0, -1].astype(mx.float32)))
        if token in tokenizer.eos_token_ids:
            break
        answer.append(token)
        x = mx.array([[token]])
    return tokenizer.decode(answer)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--homeroom", required=True, type=Path)
    parser.add_argument("--model", nargs="*", default=[], type=Path)
    parser.add_argument("--only", nargs="*", default=[])
    args = parser.parse_args()
    bad = 0

    def run(*words):
        ran = subprocess.run([args.homeroom, *map(str, words)], capture_output=True, text=True)
        return ran.returncode, ran.stdout, ran.stderr

    fixtures = [path.parent for path in sorted(FIXTURES.glob("*/config.json"))]
    fixtures = [path for path in fixtures if not args.only or path.name in args.only]
    for path in ([] if args.model and not args.only else fixtures) + args.model:
        with tempfile.TemporaryDirectory() as place:
            out = Path(place) / "mlx"
            code, _, said = run("export-model", "--format", "mlx", "--dtype", "f32", "--model-dir", path, "--output-dir", out)
            if code:
                print(f"{path.name:20} refused: {said.strip().splitlines()[-1]}")
                continue
            notes = [line for line in said.splitlines() if line.startswith("note ")]
            model, tokenizer = load(str(out))
            words, within = [], None
            for line in notes:
                within = int(line.split(" tokens on")[0].split()[-1])
            expected = path / "expected.safetensors"
            if expected.exists():
                stored = load_file(expected)
                apart = 0.0
                for name in (name for name in stored if name.startswith("ids")):
                    # Beyond a window that mlx-lm does not have it says that it differs.
                    ids = stored[name][: within or None].tolist()
                    logits = np.array(model(mx.array([ids]))[0].astype(mx.float32))
                    apart = max(apart, np.abs(logits - stored[name.replace("ids", "logits")][: len(ids)]).max())
                words.append(f"logits {apart:.1e}")
                bad += apart > (ROUNDED if "gemma3" in path.name else BOUND)
            if within is None and (path / "tokenizer.json").exists():
                _, ours, _ = run("chat", "--model-dir", path, "--prompt", PROMPT, "--temperature", "0", "--max-tokens", TOKENS, "--compute", "f32")
                same = ours.removesuffix("\n") == greedy(model, tokenizer).removesuffix("\n")
                words.append("greedy tokens equal" if same else "GREEDY TOKENS DIFFER")
                bad += not same
            print(f"{path.name:20} {'   '.join(words)}   {'; '.join(note[10:] for note in notes)}")
    raise SystemExit(1 if bad else 0)


if __name__ == "__main__":
    main()
