"""Runs `homeroom bench train` and `homeroom fine-tune` beside PEFT, PEFT with bitsandbytes, and TRL: speed and peak memory.

Each variant is a process of its own, so that its peak memory is its own; variants take turns, and figures are medians over the
rounds. Training is LoRA of rank 16, alpha 32, on all linear layers, AdamW, clipping at 1. The synthetic rows are random tokens,
all trained; the chat rows are those of rows.py, of which only the answers are trained, on both sides the same tokens, from the
same adapter and in the same order.

With `--isa avx2` every side is held to AVX2: only f32 is compared then, since neither side multiplies bf16 with it. No table is printed
of a machine that was disturbed.

Run: python bench_train.py --model D (bf16) --rows DIR --homeroom BIN [--only lora-bf16,nf4] [--rounds 3] [--isa avx2] [--json FILE]
"""

import argparse
import json
import math
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import common
import machine

BATCH, LENGTH, WARM_UP, STEPS = 4, 256, 2, 5
PEERS = {
    "peft-f32": "PEFT, f32, eager",
    "peft-bf16": "PEFT, bf16 model, f32 adapters as PEFT makes them, eager",
    "peft-bf16-narrow": "the same with bf16 adapters, which PEFT does not do by itself",
    "peft-bf16-compiled": "that under torch.compile",
    "peft-nf4": "PEFT + bitsandbytes NF4, double quantisation, f32 model and compute",
    "peft-nf4-bf16": "the same with a bf16 model and compute, the faster one",
    "peft-int8": "PEFT + bitsandbytes 8-bit, f32 model",
    "peft-int8-bf16": "the same with a bf16 model, the faster one",
}
# Ours, options of `bench train`, the peer it is held to, and that ratio's bounds: speed at least, memory at most.
PAIRS = {
    "lora-bf16": (["--compute", "bf16"], "peft-bf16", 1.8, 1 / 4),
    "lora-f32": (["--compute", "f32"], "peft-f32", None, None),
    "narrow": (["--compute", "bf16"], "peft-bf16-narrow", None, None),
    "compiled": (["--compute", "bf16"], "peft-bf16-compiled", None, None),
    "nf4": (["--strategy", "qlora"], "peft-nf4", 3.0, 1 / 8),
    "nf4-bf16": (["--strategy", "qlora"], "peft-nf4-bf16", 3.0, 1 / 8),
    "int8": (["--strategy", "int8"], "peft-int8", 2.2, 1 / 6),
    "int8-bf16": (["--strategy", "int8"], "peft-int8-bf16", 2.2, 1 / 6),
}


def peak_memory_bytes() -> int:
    with open("/proc/self/status", encoding="utf-8") as file:
        [line] = [line for line in file if line.startswith("VmHWM:")]
    return int(line.split()[1]) * 1024


# --- the side of Python, each in a process of its own -----------------------------------------


def peer(args) -> dict:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    torch.manual_seed(1)
    kind, options = args.peer, {}
    dtype = torch.bfloat16 if "bf16" in kind else torch.float32
    if kind.startswith("peft-nf4"):
        config = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
        options = {"quantization_config": config, "device_map": {"": "cpu"}}
    if kind.startswith("peft-int8"):
        config = BitsAndBytesConfig(load_in_8bit=True)
        options = {"quantization_config": config, "device_map": {"": "cpu"}}
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype, **options)
    lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(model, lora, autocast_adapter_dtype="narrow" not in kind and "compiled" not in kind)
    model.config.use_cache = False
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=2e-4)
    run = torch.compile(model) if kind.endswith("compiled") else model
    seconds = []
    for _ in range(WARM_UP + args.steps):
        ids = torch.randint(0, model.config.vocab_size, (BATCH, LENGTH))
        start = time.perf_counter()
        loss = run(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - start)
    rate = BATCH * LENGTH / statistics.median(seconds[WARM_UP:])
    return {"tokens_per_second": rate, "peak_memory_bytes": peak_memory_bytes(), "loss": loss.item()}


def adapter(args) -> dict:
    """A fresh adapter in OUT, from which both sides start."""
    import torch
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(42)
    lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(common.load_base(args.model), lora)
    model.peft_config["default"].base_model_name_or_path = str(args.model.resolve())
    model.save_pretrained(args.out, save_embedding_layers=False)
    return {}


def trl(args) -> dict:
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM
    from trl import SFTConfig, SFTTrainer

    tokenizer = common.load_tokenizer(args.model)
    rows = common.read_rows(args.train)
    # Prompt and completion as conversations: TRL trains on the completion, which ends with the end of the turn.
    data = [{"prompt": row["messages"][:-1], "completion": row["messages"][-1:]} for row in rows]
    dtype = torch.float32 if args.peer == "trl-f32" else torch.bfloat16
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype)
    config = SFTConfig(
        output_dir=args.out,
        per_device_train_batch_size=8,
        num_train_epochs=1,
        learning_rate=2e-4,
        lr_scheduler_type="cosine",
        warmup_steps=math.ceil(0.03 * math.ceil(len(rows) / 8)),
        weight_decay=0.0,
        bf16=False,
        gradient_checkpointing=False,
        completion_only_loss=True,
        logging_steps=1,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        seed=42,
        train_sampling_strategy="sequential",
        dataloader_num_workers=0,
    )
    model = common.load_adapter(model, args.init, strict=False, trainable=True)
    trainer = SFTTrainer(model=model, args=config, train_dataset=Dataset.from_list(data), processing_class=tokenizer)
    first = next(iter(trainer.get_train_dataloader()))
    print("trained tokens of TRL's first batch:", int((first["labels"] != -100).sum()), file=sys.stderr)
    start = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - start
    trainer.model.save_pretrained(args.out)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {"rows_per_second": len(rows) / seconds, "peak_memory_bytes": peak_memory_bytes(), "losses": losses}


def in_a_process(args, kind: str, extra: list) -> dict:
    command = [sys.executable, __file__, "--peer", kind, "--model", args.model, "--threads", args.threads]
    command += ["--steps", args.steps, *extra]
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise RuntimeError(f"{kind}: {last}")
    return common.last_json(done.stdout)


# --- comparisons ------------------------------------------------------------------------------


def ours(args, options: list) -> dict:
    command = [args.homeroom, "bench", "train", "--model-name", args.model, "--lora-r", 16, "--batch-size", BATCH]
    command += ["--seq-len", LENGTH, "--steps", args.steps, "--warmup", WARM_UP, "--json", *options]
    return common.last_json(common.run(command))


def medians(runs: list[dict]) -> dict:
    keys = [key for key, value in runs[0].items() if isinstance(value, (int, float)) and not isinstance(value, bool)]
    return {key: statistics.median(run[key] for run in runs) for key in keys}


def synthetic(args, names: list[str], record: dict, broken: list[str]) -> list[str]:
    """Lines of the table."""
    lines, noise = [], []
    for name in names:
        options, kind, speed_bound, memory_bound = PAIRS[name]
        mine, theirs = [], []
        try:
            for _ in range(args.rounds):
                mine.append(ours(args, options))
                theirs.append(in_a_process(args, kind, []))
        except RuntimeError as error:
            print(f"{name:10} failed: {error}")
            broken.append(f"{name}: {kind} did not run")
            continue
        record[name] = {"homeroom": mine, kind: theirs}
        a, b = medians(mine), medians(theirs)
        speed, memory = a["tokens_per_second"] / b["tokens_per_second"], a["peak_memory_bytes"] / b["peak_memory_bytes"]
        noise += [f"{name}: {why}" for why in [machine.disturbed(mine)] if why]
        lines.append(
            f"{name:10} Homeroom {a['tokens_per_second']:6.0f} tokens/s {a['peak_memory_bytes'] / 1e9:5.2f} GB"
            f"   {100 * a['share_of_register_loop']:3.0f} % of {a['register_loop_gflops']:.0f} GFLOP/s"
            f"   {kind} {b['tokens_per_second']:6.0f} tokens/s {b['peak_memory_bytes'] / 1e9:5.2f} GB"
            f"   ratio {speed:5.2f}, memory 1/{1 / memory:.1f}"
        )
        print(lines[-1], file=sys.stderr, flush=True)
        if speed_bound and speed < speed_bound:
            broken.append(f"{name}: {speed:.2f} times {kind}'s speed, wanted {speed_bound}")
        if memory_bound and memory > memory_bound:
            broken.append(f"{name}: 1/{1 / memory:.1f} of {kind}'s memory, wanted 1/{1 / memory_bound:.0f}")
        # Tiles make so much that what lies between products counts for more.
        share = {"lora-bf16": None if "amx" in mine[0]["cpu"] else 0.75, "lora-f32": 0.70}.get(name)
        if name == "lora-bf16" and a["peak_memory_bytes"] > 0.9e9:
            broken.append(f"{name}: {a['peak_memory_bytes'] / 1e9:.2f} GB, wanted 0.9")
        if share and a["share_of_register_loop"] < share:
            broken.append(f"{name}: {a['share_of_register_loop']:.2f} of the register loop, wanted {share}")
    if args.json:
        args.json.write_text(json.dumps(record), encoding="utf-8")
    machine.refuse(noise)
    return lines


def adapter_loss(args, folder: Path, rows: list) -> float:
    import torch

    model = common.load_adapter(common.load_base(args.model), folder)
    with torch.no_grad():
        parts = [common.token_losses(model, rows[i : i + 8])[0].item() for i in range(0, len(rows), 8)]
    return sum(parts) / sum(sum(trained) for _, trained in rows)


def chat(args, record: dict, broken: list[str]) -> None:
    tokenizer = common.load_tokenizer(args.model)
    with tempfile.TemporaryDirectory() as place:
        place = Path(place)
        train = place / "train.jsonl"
        rows = common.read_rows(args.rows / "train.jsonl")[: args.chat_rows]
        train.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        encoded = [common.encode(tokenizer, row["messages"]) for row in rows]
        tokens, trained = sum(len(ids) for ids, _ in encoded), sum(sum(mask) for _, mask in encoded)
        print(f"chat       {len(rows)} rows of {tokens / len(rows):.0f} tokens, {trained / len(rows):.0f} of them trained")
        # One start and one order for both, so that what differs is the training.
        in_a_process(args, "adapter", ["--out", place / "init"])
        mine, theirs = [], []
        for _ in range(args.rounds):
            for folder in ("ours", "theirs"):
                shutil.rmtree(place / folder, ignore_errors=True)
            command = [args.homeroom, "fine-tune", "--model-name", args.model, "--training-file", train, "--json"]
            command += ["--output-dir", place / "ours", "--learning-rate", "2e-4", "--no-shuffle"]
            command += ["--init-from", place / "init", "--lora-r", 16, "--lora-alpha", 32]
            command += ["--target-modules", "all-linear", *args.homeroom_args]
            summary = common.last_json(common.run(command))
            summary["rows_per_second"] = len(rows) / (tokens / summary["tokens_per_second"])
            mine.append(summary)
            extra = ["--train", train, "--init", place / "init", "--out", place / "theirs"]
            theirs.append(in_a_process(args, "trl", extra))
        # On a bf16 model TRL learns less than on the same in f32, so what it learns in f32 is the measure.
        exact = in_a_process(args, "trl-f32", ["--train", train, "--init", place / "init", "--out", place / "exact"])
        held_out = [common.encode(tokenizer, row["messages"]) for row in common.read_rows(args.rows / "eval.jsonl")]
        folders = ("ours", "theirs", "exact")
        losses = [adapter_loss(args, place / folder, held_out) for folder in folders]
    record["chat"] = {"homeroom": mine, "trl": theirs, "trl-f32": exact, "losses": losses}
    a, b = medians(mine), medians(theirs)
    speed, apart = a["rows_per_second"] / b["rows_per_second"], common.relative(losses[0], losses[2])
    print(
        f"           Homeroom {a['rows_per_second']:6.2f} rows/s {a['peak_memory_bytes'] / 1e9:5.2f} GB"
        f"   TRL {b['rows_per_second']:6.2f} rows/s {b['peak_memory_bytes'] / 1e9:5.2f} GB   ratio {speed:5.2f}\n"
        f"           held-out loss after an epoch, evaluated in f32: Homeroom {losses[0]:.4f}, TRL {losses[1]:.4f},"
        f" TRL in f32 {losses[2]:.4f}: {100 * apart:.2f} % apart"
    )
    if speed < 3.5:
        broken.append(f"chat: {speed:.2f} times TRL's speed, wanted 3.5")
    if apart > 0.01:
        broken.append(f"chat: the held-out loss is {losses[0]:.4f}, TRL's in f32 {losses[2]:.4f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    common.add_options(parser)
    parser.add_argument("--rows", type=Path, help="folder of rows.py, for chat rows")
    parser.add_argument("--only", help="comparisons, separated by commas: " + ", ".join([*PAIRS, "chat"]))
    parser.add_argument("--rounds", type=int, default=3)
    machine.add_options(parser)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--chat-rows", type=int, default=240)
    parser.add_argument("--json", type=Path, help="file for all figures")
    parser.add_argument("--peer", choices=[*PEERS, "adapter", "trl", "trl-f32"], help=argparse.SUPPRESS)
    parser.add_argument("--train", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--init", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    machine.hold(args.isa)
    common.torch_ready(args.threads)
    if args.peer:
        print(json.dumps({"trl": trl, "trl-f32": trl, "adapter": adapter}.get(args.peer, peer)(args)))
        return
    if not args.homeroom:
        parser.error("--homeroom BIN is needed")
    names = args.only.split(",") if args.only else ["lora-f32"] if args.isa else [*PAIRS, "chat"]
    if unknown := set(names) - {*PAIRS, "chat"}:
        parser.error(f"unknown comparisons: {', '.join(sorted(unknown))}")
    record, broken = {}, []
    lines = synthetic(args, [name for name in names if name in PAIRS], record, broken)
    print("\n".join([machine.heading(args.threads, args.rounds, args.isa), *lines]), flush=True)
    if "chat" in names:
        if not args.rows:
            parser.error("--rows DIR is needed for chat rows")
        chat(args, record, broken)
    if args.json:
        args.json.write_text(json.dumps(record), encoding="utf-8")
    for line in broken:
        print("BROKEN", line)
    sys.exit(1 if broken else 0)


if __name__ == "__main__":
    main()
