"""Holds `homeroom plan` to what training takes: thirty-five combinations of model, strategy, batch, length, checkpointing and threads.

Of each the prediction is written down first, to a file, and only then it is trained: `homeroom bench train` on random tokens, in a
process of its own, which reports its highest resident memory and the seconds of its steps. The table has predicted, measured and
their ratio for both. Memory is held to 10 %, the time of the shortest step to 25 %; on a machine that others use `--memory-alone`
holds the time to nothing.

Models are random: from 17 on the shapes of SmolLM2-135M, Qwen2.5 and Llama 2 that sizes.py writes, each removed when its last
combination is done (7B wants 16 GB of disk); before that Gemma 3 270M and Qwen3-0.6B as shapes.py makes them, SmolLM2-135M in 4 bits,
and one of odd widths, whose layers bf16 does not take, so that they run plain. It ends with 1 where a bound is broken.

Run: python plan.py --dir DIR --homeroom BIN --only 17-34 [--lock FILE]                                        (no packages)
     python plan.py --dir DIR --smollm2 FILE.gguf --homeroom BIN [--only 1,4] [--predictions FILE] [--measured FILE]
     (torch, transformers, gguf, where models are made)
"""

import argparse
import contextlib
import fcntl
import json
import os
import shutil
import sys
from pathlib import Path

import common
import machine
import sizes

CKPT = "--gradient-checkpointing"
# Number: model, strategy, options of both commands, rows of a step, tokens of a row, threads where they are not those of --threads.
COMBINATIONS = {
    1: ("qwen3-0.6b/directory", "lora", [], 4, 256),
    2: ("gemma3-270m/directory", "qlora", [], 2, 512),
    3: ("smollm2", "lora", [CKPT], 8, 128),
    4: ("smollm2", "full", [], 1, 256),
    5: ("qwen3-0.6b/Q8_0/model.gguf", "lora", ["--lora-r", 64, CKPT], 1, 1024),
    6: ("gemma3-270m/directory", "int8", [], 8, 64),
    7: ("odd", "lora", [], 4, 128),
    8: ("gemma3-270m/directory", "full", [CKPT], 4, 128),
    9: ("qwen3-0.6b/directory", "qlora", [CKPT], 2, 512),
    10: ("gemma3-270m/directory", "lora", [], 1, 1024),
    11: ("smollm2", "lora", [], 4, 128),
    12: ("smollm2", "qlora", ["--lora-dropout", 0.1], 8, 64),
    13: ("qwen3-0.6b/directory", "int8", [], 1, 256),
    14: ("odd", "full", [], 2, 256),
    15: ("gemma3-270m/directory", "full", [], 1, 256),
    16: ("smollm2", "full", [CKPT], 2, 128),
    17: ("135M", "lora", [], 8, 128),
    18: ("135M", "lora", [CKPT], 4, 512, 1),
    19: ("135M", "lora", [], 2, 1024),
    20: ("135M", "full", [], 4, 128),
    21: ("135M", "full", [CKPT], 2, 512),
    22: ("135M", "qlora", [], 4, 512, 1),
    23: ("135M", "int8", [CKPT], 8, 128),
    24: ("0.5B", "lora", [], 4, 128),
    25: ("0.5B", "lora", [CKPT], 2, 512),
    26: ("0.5B", "qlora", [], 1, 1024),
    27: ("0.5B", "qlora", [CKPT], 4, 128, 1),
    28: ("0.5B", "int8", [], 2, 512),
    29: ("1.5B", "lora", [], 4, 128),
    30: ("1.5B", "qlora", [], 2, 512),
    31: ("1.5B", "qlora", [CKPT], 1, 1024),
    32: ("1.5B", "int8", [CKPT], 4, 128),
    33: ("7B", "qlora", [], 4, 128),
    34: ("7B", "qlora", [CKPT], 1, 512),
    35: ("7B", "lora", [CKPT], 1, 128),
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
MEMORY, TIME = 0.10, 0.25


def make_odd(folder: Path) -> None:
    if folder.exists():
        return
    import shapes

    sys.path.insert(0, str(shapes.FIXTURES))
    import make_families

    make_families.write_model(folder, make_families.Family(**ODD), make_families.make_tokenizer())


def path_of(args, name: str) -> Path:
    return args.smollm2 if name == "smollm2" else args.dir / name


def threads_of(args, number: int) -> int:
    return (*COMBINATIONS[number], args.threads)[5]


def step_of(number: int) -> tuple:
    name, strategy, options, rows, tokens = COMBINATIONS[number][:5]
    return name, strategy, options, rows, tokens


def run(args, number: int, command: list) -> dict:
    os.environ["RAYON_NUM_THREADS"] = str(threads_of(args, number))
    return common.last_json(common.run([args.homeroom, *command, "--json"]))


def predict(args, number: int) -> dict:
    name, strategy, options, rows, tokens = step_of(number)
    command = ["plan", "--model-name", path_of(args, name), "--strategy", strategy, "--batch-size", rows]
    return run(args, number, [*command, "--max-seq-len", tokens, "--rows", rows * (1 + args.steps), *options])


def measure(args, number: int) -> dict:
    name, strategy, options, rows, tokens = step_of(number)
    command = ["bench", "train", "--model-name", path_of(args, name), "--strategy", strategy, "--batch-size", rows]
    return run(args, number, [*command, "--seq-len", tokens, *options, "--steps", args.steps, "--warmup", 1])


def make(args, names: set) -> None:
    for name in names & set(sizes.SHAPES):
        sizes.write_config(sizes.SHAPES[name], args.dir / name)
    older = names & {"qwen3-0.6b", "gemma3-270m"}
    for name in older:
        import shapes

        (args.dir / name).mkdir(parents=True, exist_ok=True)
        shapes.make(name, args.dir / name)
    if "odd" in names:
        make_odd(args.dir / "odd")


@contextlib.contextmanager
def held(path: Path | None):
    """Holds the lock of a machine that several use."""
    if path is None:
        yield
        return
    with open(path, "w", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def numbers_of(text: str) -> list[int]:
    found = []
    for part in filter(None, text.split(",")):
        first, _, last = part.partition("-")
        found += range(int(first), int(last or first) + 1)
    return found or list(COMBINATIONS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dir", type=Path, required=True, help="where the models are, or are made")
    parser.add_argument("--smollm2", type=Path, help="SmolLM2-135M in a GGUF file, see fetch_smollm2.py")
    parser.add_argument("--homeroom", required=True, help="the binary, its strategies beside it")
    parser.add_argument("--only", default="", help="numbers of some combinations, such as 1,17-32")
    parser.add_argument("--steps", type=int, default=3, help="steps that are timed, after one that is not")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--memory-alone", action="store_true", help="hold the time to nothing")
    parser.add_argument("--lock", type=Path, help="a file that is locked while something is measured")
    parser.add_argument("--predictions", type=Path, default=Path("predictions.json"), help="written before what it predicts is trained")
    parser.add_argument("--measured", type=Path, help="figures of an earlier run, which are added to")
    args = parser.parse_args()
    numbers = numbers_of(args.only)
    os.environ["HOMEROOM_ENCODED"] = "off"
    make(args, {step_of(number)[0].split("/")[0] for number in numbers})
    predicted, measured = {}, {}
    if args.measured and args.measured.exists():
        measured = {int(number): found for number, found in json.loads(args.measured.read_text(encoding="utf-8")).items()}
    for at, number in enumerate(numbers):
        name = step_of(number)[0]
        is_ours = name in sizes.SHAPES
        if number not in measured and is_ours and not (args.dir / name / "model.safetensors").exists():
            sizes.write_model(sizes.SHAPES[name], args.dir / name)
        with held(args.lock):
            predicted[number] = predict(args, number)
            args.predictions.write_text(json.dumps(predicted, indent=1), encoding="utf-8")
            if number not in measured:
                measured[number] = measure(args, number)
        print(f"{number} {measured[number]['peak_memory_bytes'] / 1e6:.0f} MB", file=sys.stderr, flush=True)
        if args.measured:
            args.measured.write_text(json.dumps(measured), encoding="utf-8")
        if is_ours and all(step_of(later)[0] != name for later in numbers[at + 1 :]):
            shutil.rmtree(args.dir / name)
    print(f"{machine.processor()[0]}, load {os.getloadavg()[0]:.1f}\n")
    heads = ["", "model", "training", "threads", "memory: plan", "measured", "ratio", "a step: plan", "measured", "ratio"]
    print("| " + " | ".join(heads) + " |\n|--:|---|---|" + "--:|" * 7)
    broken = []
    for number in numbers:
        name, strategy, options, rows, tokens = step_of(number)
        plan, found = predicted[number], measured[number]
        memory = plan["peak_memory_bytes"] / found["peak_memory_bytes"]
        seconds = min(found["seconds_per_step"])
        time = plan["seconds_per_step"] / seconds
        training = " ".join(map(str, [strategy, f"{rows} x {tokens}", *options]))
        cells = [number, name, training, threads_of(args, number)]
        cells += [f"{plan['peak_memory_bytes'] / 1e6:.0f} MB", f"{found['peak_memory_bytes'] / 1e6:.0f} MB", f"{memory:.3f}"]
        cells += [f"{plan['seconds_per_step']:.2f} s", f"{seconds:.2f} s", f"{time:.2f}"]
        print("| " + " | ".join(map(str, cells)) + " |")
        if abs(memory - 1) > MEMORY:
            broken.append(f"{number}: memory is {memory:.3f} of what was measured")
        if abs(time - 1) > TIME and not args.memory_alone:
            broken.append(f"{number}: the time is {time:.2f} of what was measured")
    for line in broken:
        print("BROKEN", line)
    sys.exit(1 if broken else 0)


if __name__ == "__main__":
    main()
