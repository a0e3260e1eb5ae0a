"""How training, prompts and answers grow from one thread to two (or more), beside the limit that binds them.

The limit of training and prompts is the register loop, which touches no memory; that of further tokens is the speed at which memory
is read. What work grows by is divided by what the limit of the same processes grows by, since cores of a virtual machine may share
one of the host's, and one core alone may come near to the bandwidth of all. Each measurement is a process of its own; thread counts
take turns, and figures are medians over the rounds. No table is printed of a machine that was disturbed. Bound: 0.95.

Run: python scaling.py --model D --homeroom BIN [--threads 2] [--rounds 3] [--isa avx2] [--json FILE]   (needs no package)
"""

import argparse
import json
import os
import statistics
import sys
from pathlib import Path

import common
import machine

SCALING = 0.95
READ = "read_gigabytes_per_second"
TRAIN = ["train", "--lora-r", 16, "--batch-size", 4, "--seq-len", 256, "--steps", 5, "--warmup", 2]
# What `homeroom bench` is called with, and the limit that it prints beside the speed.
MEASURES = {
    "train, lora": (TRAIN, machine.PROBE),
    "train, lora in f32": ([*TRAIN, "--compute", "f32"], machine.PROBE),
    "train, int8": ([*TRAIN, "--strategy", "int8"], machine.PROBE),
    "prompt of 512": (["prefill", "--tokens", 512, "--runs", 3], machine.PROBE),
    "further tokens": (["decode", "--prompt", 32, "--tokens", 64], READ),
}


def measure(args, options: list, threads: int) -> dict:
    where = "--model-name" if options[0] == "train" else "--model-dir"
    command = [args.homeroom, "bench", *options, where, args.model, "--json"]
    os.environ["RAYON_NUM_THREADS"] = str(threads)
    return common.last_json(common.run(command))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, help="a model directory or a GGUF file")
    parser.add_argument("--homeroom", default="target/release/homeroom", help="the binary")
    parser.add_argument("--threads", type=int, default=2, help="the larger number of threads")
    parser.add_argument("--rounds", type=int, default=3)
    machine.add_options(parser)
    parser.add_argument("--json", type=Path, help="file for all figures")
    args = parser.parse_args()
    machine.hold(args.isa)
    record, rows, broken, noise = {}, [], [], []
    for name, (options, limit) in MEASURES.items():
        runs = {1: [], args.threads: []}
        for _ in range(args.rounds):
            for threads, found in runs.items():
                found.append(measure(args, options, threads))
        noise += [f"{name}, {threads} threads: {why}" for threads, found in runs.items() if (why := machine.disturbed(found))]
        speed, bound = ([statistics.median(run[key] for run in found) for found in runs.values()] for key in ("tokens_per_second", limit))
        work, loop = speed[1] / speed[0], bound[1] / bound[0]
        what = "register loop" if limit == machine.PROBE else "reading memory"
        rows.append(f"| {name} | {speed[0]:.1f} | {speed[1]:.1f} | {work:.2f} | {what}, {loop:.2f} | {work / loop:.2f} |")
        print(rows[-1], file=sys.stderr, flush=True)
        if work / loop < SCALING:
            broken.append(f"{name}: {work / loop:.2f} of what its limit grows by, wanted {SCALING}")
        record[name] = runs
        if args.json:
            args.json.write_text(json.dumps(record), encoding="utf-8")
    machine.refuse(noise)
    print(machine.heading(args.threads, args.rounds, args.isa))
    print(f"\n| work | tokens/s, 1 thread | {args.threads} threads | grows by | its limit, and what that grows by | ratio |")
    print("|---|--:|--:|--:|--:|--:|")
    print("\n".join(rows))
    for line in broken:
        print("BROKEN", line)
    sys.exit(1 if broken else 0)


if __name__ == "__main__":
    main()
