"""Holds `homeroom plan` to what training takes: sixteen combinations of model, strategy, batch, length and checkpointing.

All predictions are written down first, to a file, and only then anything is trained: `homeroom bench train` on random tokens, each
in a process of its own, which reports its highest resident memory and the seconds of its steps. The table has predicted, measured and
their ratio for both. Memory is held to 10 %; time is printed, the shortest step, and not held to anything, since the machine may be
busy.

Models are random, in the shapes of Gemma 3 270M and Qwen3-0.6B as shapes.py makes them, SmolLM2-135M in 4 bits, and one of odd widths,
whose layers bf16 does not take, so that they run plain. It ends with 1 where the bound is broken.

Run: python plan.py --dir DIR --smollm2 FILE.gguf --homeroom BIN [--only 1,4] [--predictions FILE] [--measured FILE]
     (torch, transformers, gguf, where models are made)
"""

import argparse
import json
import os
import sys
from pathlib import Path

import common
import machine
import shapes

# Number: model, strategy, options of both commands, rows of a step, tokens of a row.
COMBINATIONS = {
    1: ("qwen3-0.6b/directory", "lora", [], 4, 256),
    2: ("gemma3-270m/directory", "qlora", [], 2, 512),
    3: ("smollm2", "lora", ["--gradient-checkpointing"], 8, 128),
    4: ("smollm2", "full", [], 1, 256),
    5: ("qwen3-0.6b/Q8_0/model.gguf", "lora", ["--lora-r", 64, "--gradient-checkpointing"], 1, 1024),
    6: ("gemma3-270m/directory", "int8", [], 8, 64),
    7: ("odd", "lora", [], 4, 128),
    8: ("gemma3-270m/directory", "full", ["--gradient-checkpointing"], 4, 128),
    9: ("qwen3-0.6b/directory", "qlora", ["--gradient-checkpointing"], 2, 512),
    10: ("gemma3-270m/directory", "lora", [], 1, 1024),
    11: ("smollm2", "lora", [], 4, 128),
    12: ("smollm2", "qlora", ["--lora-dropout", 0.1], 8, 64),
    13: ("qwen3-0.6b/directory", "int8", [], 1, 256),
    14: ("odd", "full", [], 2, 256),
    15: ("gemma3-270m/directory", "full", [], 1, 256),
    16: ("smollm2", "full", ["--gradient-checkpointing"], 2, 128),
}
# Odd: of g and u, which a layer in bf16 takes in pairs of values; and of the vocabulary.
ODD = dict(
    config="LlamaConfig",
    model="LlamaForCausalLM",
    sizes=dict(
        hidden_size=320,
        intermediate_size=1001,
        num_hidden_layers=6,
        num_attention_heads=5,
        num_key_value_heads=5,
        vocab_size=5003,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
    ),
)
BOUND = 0.10


def make_odd(folder: Path) -> None:
    if folder.exists():
        return
    sys.path.insert(0, str(shapes.FIXTURES))
    import make_families

    make_families.write_model(folder, make_families.Family(**ODD), make_families.make_tokenizer())


def path_of(args, name: str) -> Path:
    return args.smollm2 if name == "smollm2" else args.dir / name


def predict(args, number: int) -> dict:
    name, strategy, options, rows, tokens = COMBINATIONS[number]
    command = [args.homeroom, "plan", "--model-name", path_of(args, name), "--strategy", strategy, "--batch-size", rows]
    return common.last_json(common.run([*command, "--max-seq-len", tokens, "--rows", rows * (1 + args.steps), *options, "--json"]))


def measure(args, number: int) -> dict:
    name, strategy, options, rows, tokens = COMBINATIONS[number]
    command = [args.homeroom, "bench", "train", "--model-name", path_of(args, name), "--strategy", strategy]
    command += ["--batch-size", rows, "--seq-len", tokens, *options]
    return common.last_json(common.run([*command, "--steps", args.steps, "--warmup", 1, "--json"]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dir", type=Path, required=True, help="where the models are, or are made")
    parser.add_argument("--smollm2", type=Path, required=True, help="SmolLM2-135M in a GGUF file, see fetch_smollm2.py")
    parser.add_argument("--homeroom", required=True, help="the binary, its strategies beside it")
    parser.add_argument("--only", default="", help="numbers of some combinations")
    parser.add_argument("--steps", type=int, default=3, help="steps that are timed, after one that is not")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--predictions", type=Path, default=Path("predictions.json"), help="written before anything is trained")
    parser.add_argument("--measured", type=Path, help="figures of an earlier run, which are added to")
    args = parser.parse_args()
    numbers = [int(number) for number in args.only.split(",") if number] or list(COMBINATIONS)
    os.environ["RAYON_NUM_THREADS"] = str(args.threads)
    names = {COMBINATIONS[number][0].split("/")[0] for number in numbers}
    for name in names & set(shapes.SHAPES):
        (args.dir / name).mkdir(parents=True, exist_ok=True)
        shapes.make(name, args.dir / name)
    if "odd" in names:
        make_odd(args.dir / "odd")
    predicted = {number: predict(args, number) for number in numbers}
    args.predictions.write_text(json.dumps(predicted, indent=1), encoding="utf-8")
    print(f"predictions are in {args.predictions}", file=sys.stderr)
    measured = {}
    if args.measured and args.measured.exists():
        measured = {int(number): found for number, found in json.loads(args.measured.read_text(encoding="utf-8")).items()}
    for number in numbers:
        if number not in measured:
            measured[number] = measure(args, number)
            print(f"{number} {measured[number]['peak_memory_bytes'] / 1e6:.0f} MB", file=sys.stderr, flush=True)
            if args.measured:
                args.measured.write_text(json.dumps(measured), encoding="utf-8")
    print(f"{machine.processor()[0]}, {args.threads} threads, load {os.getloadavg()[0]:.1f}\n")
    heads = ["", "model", "training", "memory: plan", "measured", "ratio", "a step: plan", "measured", "ratio"]
    print("| " + " | ".join(heads) + " |\n|--:|---|---|" + "--:|" * 6)
    broken = []
    for number in numbers:
        name, strategy, options, rows, tokens = COMBINATIONS[number]
        plan, found = predicted[number], measured[number]
        memory = plan["peak_memory_bytes"] / found["peak_memory_bytes"]
        seconds = min(found["seconds_per_step"])
        training = " ".join(map(str, [strategy, f"{rows} x {tokens}", *options]))
        cells = [number, name, training, f"{plan['peak_memory_bytes'] / 1e6:.0f} MB", f"{found['peak_memory_bytes'] / 1e6:.0f} MB"]
        cells += [f"{memory:.3f}", f"{plan['seconds_per_step']:.2f} s", f"{seconds:.2f} s", f"{plan['seconds_per_step'] / seconds:.2f}"]
        print("| " + " | ".join(map(str, cells)) + " |")
        if abs(memory - 1) > BOUND:
            broken.append(f"{number}: memory is {memory:.3f} of what was measured")
    for line in broken:
        print("BROKEN", line)
    sys.exit(1 if broken else 0)


if __name__ == "__main__":
    main()
