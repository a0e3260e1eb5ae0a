"""Measures Homeroom beside PEFT and llama.cpp on random models in the shapes of Gemma 3 270M, Qwen3-0.6B and Qwen3-1.7B.

What such a small model with a large vocabulary costs, an older shape does not show: its head is most of it. The models are random,
since neither speed nor memory depends on what the weights say; they are written once, as a directory in bf16 and as GGUF files.

- Training: `homeroom bench train` and PEFT's loop as in bench_train.py: LoRA of rank 16 on all linear layers, 4 rows of 256 tokens.
  QLoRA has no peer here.
- Answers: `homeroom bench prefill` (512 tokens) and `bench decode` (64 tokens), and the same of llama.cpp by its server, in one
  process with it. It times itself, and draws each token as the likeliest, which Homeroom's figures leave out. The directory is
  compared with llama.cpp's reading of the BF16 file.
- Published figures, if `published` is named: `homeroom bench train` on the shape and with the settings that QVAC Fabric, a llama.cpp that
  trains, publishes its figures for. Theirs are on graphics processors, and are printed as they stand, marked as theirs.

Qwen3-1.7B is measured only where it is named: it takes 7 GB of disk for `published`, 10 GB for all, and 12 GB of memory while it is made.
Each measurement is a process of its own (llama.cpp's prefill and decode share one, and its peak is of both); variants take turns, and
figures are medians over the rounds. It ends with 1 where a bound is broken.

Run: python shapes.py --dir DIR --homeroom BIN --llama-cpp PYTHON [--only gemma3-270m,train] [--rounds 3] [--json FILE]
     python shapes.py --dir DIR --homeroom BIN --only published
     (torch, transformers, peft, gguf; PYTHON is an interpreter that has xllamacpp)
"""

import argparse
import contextlib
import fcntl
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

import bench_train
import common
import machine

FIXTURES = Path(__file__).resolve().parents[1] / "fixtures"
def qwen3(hidden_size: int) -> dict:
    return dict(
        config="Qwen3Config",
        model="Qwen3ForCausalLM",
        gguf="qwen3",
        published=dict(layer_types=None),
        sizes=dict(
            hidden_size=hidden_size,
            intermediate_size=3 * hidden_size,
            num_hidden_layers=28,
            num_attention_heads=16,
            num_key_value_heads=8,
            head_dim=128,
            vocab_size=151936,
            max_position_embeddings=40960,
            rope_parameters={"rope_type": "default", "rope_theta": 1e6},
            tie_word_embeddings=True,
        ),
    )


# Sizes as in `config.json` of google/gemma-3-270m, Qwen/Qwen3-0.6B and Qwen/Qwen3-1.7B.
SHAPES = {
    "gemma3-270m": dict(
        config="Gemma3TextConfig",
        model="Gemma3ForCausalLM",
        gguf="gemma3",
        published=dict(layer_types=None, _sliding_window_pattern=None, sliding_window_pattern=6),
        sizes=dict(
            hidden_size=640,
            intermediate_size=2048,
            num_hidden_layers=18,
            num_attention_heads=4,
            num_key_value_heads=1,
            head_dim=256,
            query_pre_attn_scalar=256,
            sliding_window=512,
            vocab_size=262144,
            max_position_embeddings=32768,
            rope_parameters={
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
                "full_attention": {"rope_type": "default", "rope_theta": 1e6},
            },
        ),
    ),
    "qwen3-0.6b": qwen3(1024),
    "qwen3-1.7b": qwen3(2048),
}
# Tokens/s of LoRA by QVAC Fabric on graphics processors, and the type of the file: 128 tokens by the seconds of a step.
# Source: docs/BENCHMARKS.md of <https://github.com/tetherto/qvac-rnd-fabric-llm-finetune>, "Fine-tuning Completion Time".
PUBLISHED = {
    "qwen3-1.7b": {
        "NVIDIA RTX 4090": {"Q8_0": 116.36, "Q4_0": 8},
        "AMD RX 7900 XTX": {"Q8_0": 47.4, "Q4_0": 9.84},
        "Intel Arc A770": {"Q8_0": 29.76, "Q4_0": 18.82},
        "Apple M3 Pro": {"Q8_0": 17.53, "Q4_0": 3.121},
        "Qualcomm Adreno 830": {"Q8_0": 6.09, "Q4_0": 6.73},
        "ARM Mali G715": {"Q8_0": 1.28, "Q4_0": 0.22},
    },
}
# Their settings: `-c 128 -b 128 -ub 128` is one row of 128 tokens a step; rank and alpha are their defaults, on all seven linear modules.
# They count the loss of answers alone, `bench train` that of every token.
PUBLISHED_SETTINGS = ["--lora-r", 8, "--set-option", "lora_alpha=16", "--batch-size", 1, "--seq-len", 128]
PUBLISHED_FILES = ("directory", "Q8_0", "Q4_0")
PARTS = ("train", "answer", "published")
# Options of `bench train`, and the variant of bench_train.py beside it.
TRAINING = {
    "bf16": (["--compute", "bf16"], "peft-bf16"),
    "f32": (["--compute", "f32"], "peft-f32"),
    "qlora": (["--strategy", "qlora"], None),
}
# The model's files by their type, and the type of the file that llama.cpp reads beside them.
FILES = {"directory": "BF16", "BF16": "BF16", "Q8_0": "Q8_0", "Q4_0": "Q4_0"}
MEASURES = {"prefill": ["prefill", "--tokens", 512, "--runs", 3], "decode": ["decode", "--prompt", 32, "--tokens", 64]}
KEYS = ("tokens_per_second", "peak_memory_bytes")
# Bounds: Homeroom in its faster format to PEFT in its faster one; Homeroom to llama.cpp on the same weights.
TRAINING_SPEED, TRAINING_MEMORY, DECODE_SPEED = 1.5, 1 / 2, 0.9

# Runs in an interpreter of its own: reads a job and writes what its server tells of itself.
ASK_LLAMA_CPP = """
import json, random, sys
import xllamacpp as xllama
job = json.load(sys.stdin)
params = xllama.CommonParams()
params.model.path = job["path"]
params.n_ctx = 1024
params.n_batch = params.n_ubatch = 512
params.n_parallel = 1
params.n_gpu_layers = 0
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = job["threads"]
server = xllama.Server(params)
draw, told = random.Random(42), []
def ask(prompt, answer):
    return server.handle_completions({
        "prompt": [draw.randrange(3, 300) for _ in range(prompt)], "n_predict": answer, "temperature": 0.0, "top_k": 1,
        "samplers": ["top_k"], "ignore_eos": True, "cache_prompt": False, "timings_per_token": True,
    })["timings"]
ask(32, 4)
prefill = [ask(512, 1) for _ in range(3)]
decode = [ask(32, 65)]
with open("/proc/self/status") as file:
    [peak] = [int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM:")]
print("ANSWER" + json.dumps({"prefill": prefill, "decode": decode, "peak": peak, "system": xllama.get_system_info()}))
"""


# --- models -----------------------------------------------------------------------------------


def make(name: str, place: Path, kinds: set[str]) -> None:
    """Writes those of the directory and the GGUF files that are not there yet."""
    folder = place / "directory"
    missing = [kind for kind in FILES if kind in kinds and not (place / kind).exists()]
    if not missing:
        return
    sys.path.insert(0, str(FIXTURES))
    import make_families
    import torch
    from gguf import GGMLQuantizationType

    tokenizer = make_families.make_tokenizer()
    family = make_families.Family(**SHAPES[name], dtype=torch.bfloat16)
    if "directory" in missing:
        print(f"making {name} in {place}", file=sys.stderr)
        make_families.write_model(folder, family, tokenizer)
    for kind in missing:
        if kind == "directory":
            continue
        # Norms stay f32, as llama.cpp's converter leaves them.
        types = {"norm": GGMLQuantizationType.F32, "": GGMLQuantizationType[kind]}
        draft = place / "draft.gguf"
        make_families.write_gguf(draft, folder, family, tokenizer, types, is_held=False)
        (place / kind).mkdir()
        draft.rename(place / kind / "model.gguf")


def path_of(place: Path, kind: str) -> Path:
    return place / kind if kind == "directory" else place / kind / "model.gguf"


# --- one measurement --------------------------------------------------------------------------


def figure(found: dict) -> dict:
    return {key: found[key] for key in KEYS}


def train(args, place: Path, kind: str) -> dict[str, dict]:
    options, peer = TRAINING[kind]
    args.model = place / "directory"
    out = {"Homeroom": figure(bench_train.ours(args, options))}
    if peer:
        out["PEFT"] = figure(bench_train.in_a_process(args, peer, []))
    return out


def train_as_published(args, path: Path) -> dict:
    command = [args.homeroom, "bench", "train", "--model-name", path, *PUBLISHED_SETTINGS, "--steps", args.steps, "--json"]
    return figure(common.last_json(common.run(command)))


def answer(args, path: Path) -> dict[str, dict]:
    out = {}
    for measure, options in MEASURES.items():
        command = [args.homeroom, "bench", *options, "--model-dir", path, "--json", *args.homeroom_args]
        out[measure] = figure(common.last_json(common.run(command)))
    return out


def answer_llama_cpp(args, path: Path) -> dict[str, dict]:
    job = json.dumps({"path": str(path), "threads": args.threads})
    done = subprocess.run([args.llama_cpp, "-c", ASK_LLAMA_CPP], input=job, capture_output=True, text=True, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith("ANSWER")]
    if not lines:
        raise RuntimeError(f"llama.cpp does not answer with {path}: {done.stderr[-2000:]}")
    told = json.loads(lines[0].removeprefix("ANSWER"))
    rates = {
        "prefill": [1e3 * run["prompt_n"] / run["prompt_ms"] for run in told["prefill"]],
        # The first token comes with the prompt.
        "decode": [1e3 * (run["predicted_n"] - 1) / run["predicted_ms"] for run in told["decode"]],
    }
    args.system = told["system"]
    return {
        measure: {"tokens_per_second": statistics.median(found), "peak_memory_bytes": told["peak"]}
        for measure, found in rates.items()
    }


@contextlib.contextmanager
def held(lock: Path | None):
    """The machine for a round, from others that take the same lock."""
    if lock is None:
        yield
        return
    with open(lock, "a", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


# --- rounds -----------------------------------------------------------------------------------


def rounds(args, what: list[str], measure) -> dict[str, dict[str, list[dict]]]:
    """Runs of each side of each variant; variants take turns."""
    runs = {}
    for _ in range(args.rounds):
        for variant in what:
            with held(args.lock):
                load = os.getloadavg()[0]
                for side, found in measure(variant).items():
                    runs.setdefault(variant, {}).setdefault(side, []).append(found | {"load": load})
                    speed, peak = found["tokens_per_second"], found["peak_memory_bytes"] / 1e9
                    print(f"{variant} {side} {speed:.1f} tokens/s {peak:.2f} GB, load {load:.1f}", file=sys.stderr, flush=True)
    return runs


def middle(runs: list[dict]) -> tuple[float, float]:
    return tuple(statistics.median(run[key] for run in runs) for key in KEYS)


def cells(mine: list[dict], theirs: list[dict] | None) -> list[str]:
    speed, peak = middle(mine)
    out = [f"{speed:.1f}", f"{peak / 1e9:.2f} GB"]
    if not theirs:
        return [*out, "–", "–", "–", "–"]
    other_speed, other_peak = middle(theirs)
    each = [a["tokens_per_second"] / b["tokens_per_second"] for a, b in zip(mine, theirs)]
    ratio = f"{speed / other_speed:.2f} ({min(each):.2f} to {max(each):.2f})"
    return [*out, f"{other_speed:.1f}", f"{other_peak / 1e9:.2f} GB", ratio, f"1/{other_peak / peak:.1f}"]


def training(args, name: str, record: dict, rows: list, broken: list[str]) -> None:
    runs = rounds(args, [kind for kind in TRAINING if kind in args.training], lambda kind: train(args, args.dir / name, kind))
    record["train"] = runs
    for kind, sides in runs.items():
        rows.append([name, f"train, {kind}", "PEFT" if "PEFT" in sides else "–", *cells(sides["Homeroom"], sides.get("PEFT"))])
    if not any("PEFT" in sides for sides in runs.values()):
        return
    mine = max(middle(sides["Homeroom"]) for sides in runs.values() if "PEFT" in sides)
    theirs = max(middle(sides["PEFT"]) for sides in runs.values() if "PEFT" in sides)
    speed, memory = mine[0] / theirs[0], mine[1] / theirs[1]
    rows.append([name, "train, the faster of each", "PEFT", *cells([dict(zip(KEYS, mine))], [dict(zip(KEYS, theirs))])])
    if speed < TRAINING_SPEED:
        broken.append(f"{name}: trains {speed:.2f} times as fast as PEFT, wanted {TRAINING_SPEED}")
    if memory > TRAINING_MEMORY:
        broken.append(f"{name}: trains in {memory:.2f} of PEFT's memory, wanted {TRAINING_MEMORY}")


def answers(args, name: str, record: dict, rows: list, broken: list[str]) -> None:
    place = args.dir / name

    def measure(kind: str) -> dict[str, dict]:
        sides = {f"Homeroom {measure}": found for measure, found in answer(args, path_of(place, kind)).items()}
        found = answer_llama_cpp(args, path_of(place, FILES[kind]))
        return sides | {f"llama.cpp {measure}": found for measure, found in found.items()}

    runs = rounds(args, [kind for kind in FILES if kind in args.files], measure)
    record["answer"] = runs
    for kind, sides in runs.items():
        for measure in MEASURES:
            mine, theirs = sides[f"Homeroom {measure}"], sides[f"llama.cpp {measure}"]
            rows.append([name, f"{measure}, {kind}", "llama.cpp", *cells(mine, theirs)])
            ratio = middle(mine)[0] / middle(theirs)[0]
            if measure == "decode" and ratio < DECODE_SPEED:
                broken.append(f"{name}: decodes {kind} {ratio:.2f} times as fast as llama.cpp, wanted {DECODE_SPEED}")


def published(args, name: str, record: dict, rows: list, broken: list[str]) -> None:
    """A table of its own: what others publish of the shape, and ours."""

    def measure(kind: str) -> dict[str, dict]:
        return {"Homeroom": train_as_published(args, path_of(args.dir / name, kind))}

    runs = rounds(args, list(PUBLISHED_FILES), measure)
    record["published"] = runs

    def line(who: str, where: str, found: dict[str, str]) -> str:
        return f"| {who} | {where} | " + " | ".join(found.get(kind, "–") for kind in PUBLISHED_FILES) + " |"

    def mine(kind: str) -> str:
        speed, peak = middle(runs[kind]["Homeroom"])
        return f"{speed:.1f}, {peak / 1e9:.2f} GB"

    where = f"{machine.processor()[0]}, {args.threads} threads"
    told = [line("Homeroom", where, {kind: mine(kind) for kind in PUBLISHED_FILES})]
    for device, found in PUBLISHED[name].items():
        told.append(line("QVAC Fabric, by its own word", device, {kind: f"{speed:g}" for kind, speed in found.items()}))
    heads = ["bf16" if kind == "directory" else kind for kind in PUBLISHED_FILES]
    head = [f"{name}, LoRA of rank 8, a row of 128 tokens a step: tokens/s", "", "| program | on | " + " | ".join(heads) + " |"]
    args.beside += ["", *head, "|---|---|" + "--:|" * len(heads), *told]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dir", type=Path, required=True, help="where the models are, or are made")
    parser.add_argument("--homeroom", required=True, help="the binary, its strategies beside it")
    parser.add_argument("--llama-cpp", metavar="PYTHON", help="an interpreter that has xllamacpp; needed for `answer`")
    parser.add_argument("--only", default="", help=f"some of {', '.join([*SHAPES, *PARTS])}")
    parser.add_argument("--training", default=",".join(TRAINING), help="how it is trained")
    parser.add_argument("--files", default=",".join(FILES), help="files that are answered from")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=3, help="steps that are timed, after two that are not")
    parser.add_argument("--threads", type=int, default=2, help="threads of every side")
    parser.add_argument("--lock", type=Path, help="a file whose lock is held while a variant is measured")
    parser.add_argument("--json", type=Path, help="file for all figures")
    parser.add_argument("homeroom_args", nargs="*", help="after `--`: further options of `bench prefill` and `bench decode`")
    args = parser.parse_args()
    only = set(filter(None, args.only.split(",")))
    args.files, args.training = args.files.split(","), args.training.split(",")
    unknown = (only - {*SHAPES, *PARTS}) | (set(args.files) - set(FILES)) | (set(args.training) - set(TRAINING))
    if unknown:
        parser.error(f"unknown: {', '.join(sorted(unknown))}")
    parts = [part for part in PARTS if part in only] or ["train", "answer"]
    shapes = [name for name in SHAPES if name in only]
    shapes = shapes or [name for name in SHAPES if (name in PUBLISHED) == (parts == ["published"])]
    if "published" in parts and (without := set(shapes) - set(PUBLISHED)):
        parser.error(f"nothing is published of {', '.join(sorted(without))}")
    if "answer" in parts and not args.llama_cpp:
        parser.error("--llama-cpp PYTHON is needed for answers")
    os.environ["RAYON_NUM_THREADS"] = str(args.threads)
    args.system, args.beside = "", []
    kinds = {"directory"}
    if "answer" in parts:
        kinds |= {file for kind in args.files for file in (kind, FILES[kind])}
    if "published" in parts:
        kinds |= set(PUBLISHED_FILES)
    for name in shapes:
        (args.dir / name).mkdir(parents=True, exist_ok=True)
        make(name, args.dir / name, kinds)
    record, rows, broken = {}, [], []
    for name in shapes:
        for part in parts:
            try:
                measured = {"train": training, "answer": answers, "published": published}[part]
                measured(args, name, record.setdefault(name, {}), rows, broken)
            except RuntimeError as error:
                broken.append(f"{name}: {part}: {error}")
            if args.json:
                args.json.write_text(json.dumps(record), encoding="utf-8")
    print(f"{machine.heading(args.threads, args.rounds, None)}; tokens/s and peak memory")
    if args.system and (why := machine.foreign(args.system, None)):
        print(why)
    heads = ["shape", "measure", "peer", "Homeroom", "memory", "peer's", "memory", "ratio (least to most of a round)", "memory"]
    if rows:
        print("\n| " + " | ".join(heads) + " |\n|---|---|---|" + "--:|" * 6)
    for row in rows:
        print("| " + " | ".join(row) + " |")
    for line in args.beside:
        print(line)
    for line in broken:
        print("BROKEN", line)
    sys.exit(1 if broken else 0)


if __name__ == "__main__":
    main()
