"""Vectors and speed of an embedding model, against sentence-transformers on the same machine.

Run: cargo build --release -p homeroom-engine --example embedding_speed
     python tests/peers/embeddings.py --model DIR [--threads 2] [--repeats 5]

DIR is a directory of sentence-transformers, such as all-MiniLM-L6-v2. Both sides are given the same texts, of several languages and
of lengths from nothing to beyond what the model reads. Both take the same number of threads, and turns: ours, theirs, ours, theirs.
Fails if a vector is further than 1e-4 from theirs, in any channel.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SENTENCES = [
    "The cell is the smallest unit of life.",
    "Photosynthesis turns light, water and carbon dioxide into sugar and oxygen.",
    "Was ist eine Ableitung, und wozu braucht man sie?",
    "La Révolution française commence en 1789.",
    "細胞は生命の最小単位です。",
    "Кто написал роман «Война и мир»?",
    "¿Cuál es la capital de Australia? Canberra, no Sídney.",
    "def f(x): return x ** 2  # a square",
    "x = (-b ± √(b² - 4ac)) / 2a",
    "🦊 the quick brown fox [SEP] jumps over the lazy dog",
]


def corpus(seed):
    """Short questions and chunks of a book, as a school's index holds them."""
    draw = random.Random(seed)
    short = [*SENTENCES, "", "a", " \t\n "] + [draw.choice(SENTENCES) + f" ({n})" for n in range(110)]
    long = [" ".join(draw.choices(SENTENCES, k=draw.randint(2, 20))) for _ in range(120)]
    return short, long


def ours(model, texts, repeats, threads):
    program = ROOT / "target/release/examples/embedding_speed"
    with tempfile.TemporaryDirectory() as directory:
        given, got = Path(directory) / "texts.json", Path(directory) / "vectors.json"
        given.write_text(json.dumps(texts))
        # As the program sets it: candle's own threads only disturb those that share the passes.
        environment = os.environ | {"RAYON_NUM_THREADS": str(threads), "CANDLE_NUM_THREADS": "1"}
        command = [program, model, given, str(repeats), got]
        ran = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
        return [float(line) for line in ran.stdout.split()], json.loads(got.read_text())


def theirs(model, texts, repeats):
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        vectors = model.encode(texts, batch_size=32, show_progress_bar=False)
        times.append(time.perf_counter() - start)
    return times, vectors.tolist()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"

    import sentence_transformers
    import torch

    torch.set_num_threads(arguments.threads)
    model = sentence_transformers.SentenceTransformer(arguments.model, device="cpu")
    processor = next((line for line in open("/proc/cpuinfo") if line.startswith("model name")), ": unknown").split(": ")[1]
    versions = f"sentence-transformers {sentence_transformers.__version__}, torch {torch.__version__}"
    print(f"processor {processor.strip()}, {arguments.threads} threads; {versions}")

    failed = False
    for kind, texts in zip(("short", "long"), corpus(5)):
        best = {"ours": [], "theirs": []}
        theirs(model, texts[:8], 1)  # The first call of torch takes longer.
        for _ in range(arguments.repeats):
            times, vectors = ours(arguments.model, texts, 2, arguments.threads)
            best["ours"].append(min(times))
            times, expected = theirs(model, texts, 1)
            best["theirs"].append(min(times))
        far = max(abs(a - b) for x, y in zip(vectors, expected, strict=True) for a, b in zip(x, y, strict=True))
        failed |= not far < 1e-4
        rate = {side: len(texts) / sorted(times)[len(times) // 2] for side, times in best.items()}
        print(
            f"{kind:6} {len(texts)} texts   furthest channel {far:.1e}   "
            f"ours {rate['ours']:.1f} texts/s   theirs {rate['theirs']:.1f} texts/s   ratio {rate['ours'] / rate['theirs']:.2f}"
        )
    sys.exit(failed)


if __name__ == "__main__":
    main()
