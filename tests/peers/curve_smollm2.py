"""Compares a training by Homeroom with the same training by PEFT, step by step, in f32.

Both start from the same adapter, which this script makes and PEFT saves, and take the rows in the
order of the file. 20 steps of 2 x 2 rows; AdamW without weight decay, gradients clipped at 1,
cosine schedule without warm-up. The loss of a step is normalised by the trained tokens of the
whole step.

Leaves OUT/init (start), OUT/peft (trained here), OUT/peft.json (the curve) and OUT/homeroom.

Run: python curve_smollm2.py --model D --rows train.jsonl --out OUT --homeroom BIN
         [--strategy lora|rslora|dora|qlora|int8|full|ia3|vera] [--eval-rows eval.jsonl]
         [--plugin-dir DIR] [-- more options]

With qlora and int8 the other side is PEFT over bitsandbytes. Its 8-bit products round activations
too, so that there the losses agree to some parts in a hundred only.
"""

import argparse
import json
import math
import time
from pathlib import Path

import common

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

# strategy here: (strategy in Homeroom, learning rate, options; both sides take PEFT's names).
# Few trained values need a high rate: at 2e-4 ia3 and vera hardly move, and any two curves agree.
STRATEGIES = {
    "lora": ("lora", 2e-4, dict(r=8, lora_alpha=16, target_modules=TARGETS)),
    "rslora": (
        "lora",
        2e-4,
        dict(r=8, lora_alpha=4, use_rslora=True, target_modules=["q_proj", "v_proj"]),
    ),
    "dora": (
        "lora",
        2e-4,
        dict(r=8, lora_alpha=16, use_dora=True, target_modules=["q_proj", "v_proj"]),
    ),
    "qlora": ("qlora", 2e-4, dict(r=8, lora_alpha=16, target_modules=TARGETS)),
    "int8": ("int8", 2e-4, dict(r=8, lora_alpha=16, target_modules=TARGETS)),
    "full": ("full", 2e-5, {}),
    "ia3": (
        "ia3",
        1e-2,
        dict(
            target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]
        ),
    ),
    "vera": ("vera", 2e-2, dict(r=64, d_initial=0.1, target_modules=["q_proj", "v_proj"])),
}

# Without warm-up: Homeroom's begins above zero, transformers' at zero.
FIXED = ["--lr-scheduler-type", "cosine", "--warmup-ratio", 0]
FIXED += ["--max-grad-norm", 1.0, "--weight-decay", 0.0]


def make_adapter(base, strategy: str):
    import torch
    from peft import IA3Config, LoraConfig, VeraConfig, get_peft_model

    kinds = {"ia3": IA3Config, "vera": VeraConfig}
    options = json.loads(json.dumps(STRATEGIES[strategy][2]))
    if strategy == "vera":
        options["save_projection"] = True
    torch.manual_seed(1)
    return get_peft_model(base, kinds.get(strategy, LoraConfig)(task_type="CAUSAL_LM", **options))


def held_out_loss(model, tokenizer, path: Path) -> float:
    """Mean loss of the trained tokens of a file of rows."""
    import torch

    rows = [common.encode(tokenizer, row["messages"]) for row in common.read_rows(path)]
    model.eval()
    with torch.no_grad():
        total = sum(common.token_losses(model, rows[i : i + 8])[0].item() for i in range(0, len(rows), 8))
    return total / sum(sum(trained) for _, trained in rows)


def train(model, steps: list, learning_rate: float) -> list[dict]:
    import torch
    from transformers import get_cosine_schedule_with_warmup

    model.train()
    # transformers gives the padding token's row no gradient, though <|im_end|>, which pads here,
    # stands in every row. Homeroom trains it as any other token.
    model.get_input_embeddings().padding_idx = None
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=learning_rate, weight_decay=0.0)
    schedule = get_cosine_schedule_with_warmup(optimizer, 0, len(steps))
    records = []
    for i, micro_batches in enumerate(steps):
        total = sum(sum(trained) for rows in micro_batches for _, trained in rows)
        loss, began = 0.0, time.time()
        for rows in micro_batches:
            part = common.token_losses(model, rows)[0] / total
            part.backward()
            loss += part.item()
        # As clip_grad_norm_, but added up in f64: over 28 M values f32 loses the fifth digit.
        squares = [p.grad.double().square().sum().item() for p in trainable]
        grad_norm = math.sqrt(sum(squares))
        for p in trainable:
            p.grad.mul_(min(1.0, 1.0 / (grad_norm + 1e-6)))
        used = schedule.get_last_lr()[0]
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        records.append({"step": i + 1, "loss": loss, "grad_norm": grad_norm, "learning_rate": used})
        print(
            f"peft step {i + 1:3}/{len(steps)}   loss {loss:.6f}   norm {grad_norm:.5f}   "
            f"lr {used:.3e}   {total} tokens   {time.time() - began:.1f} s",
            flush=True,
        )
    return records


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    common.add_options(parser)
    parser.add_argument("--rows", type=Path, required=True, help="rows of rows.py")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--strategy", choices=list(STRATEGIES), default="lora")
    parser.add_argument("--plugin-dir", type=Path)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--accumulation", type=int, default=2)
    parser.add_argument("--learning-rate", type=float, help="default: the strategy's, see above")
    parser.add_argument("--eval-rows", type=Path, help="held-out rows: both losses at the end")
    parser.add_argument("--reuse", action="store_true", help="take OUT/peft.json from a run before")
    parser.add_argument("--bound", type=float, default=1e-4, help="relative, on each step")
    args = parser.parse_args()
    args.learning_rate = args.learning_rate or STRATEGIES[args.strategy][1]
    common.torch_ready(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    curve = args.out / "peft.json"
    full = args.strategy == "full"

    if not (args.reuse and curve.exists()):
        tokenizer = common.load_tokenizer(args.model)
        rows = [common.encode(tokenizer, row["messages"]) for row in common.read_rows(args.rows)]
        size, each = args.batch_size, args.batch_size * args.accumulation
        if len(rows) < args.steps * each:
            parser.error(f"{args.rows} has {len(rows)} rows, {args.steps * each} are needed")
        steps = [
            [rows[i : i + size] for i in range(step * each, (step + 1) * each, size)]
            for step in range(args.steps)
        ]
        model = common.load_base(args.model, {"qlora": "nf4"}.get(args.strategy, args.strategy))
        if not full:
            model = make_adapter(model, args.strategy)
            model.peft_config["default"].base_model_name_or_path = str(args.model.resolve())
            model.save_pretrained(args.out / "init", save_embedding_layers=False)
        records = train(model, steps, args.learning_rate)
        if args.eval_rows:
            records[-1]["eval_loss"] = held_out_loss(model, tokenizer, args.eval_rows)
        curve.write_text(json.dumps(records, indent=1) + "\n")
        if full:
            model.save_pretrained(args.out / "peft")
            tokenizer.save_pretrained(args.out / "peft")
        else:
            model.save_pretrained(args.out / "peft", save_embedding_layers=False)
        del model
    theirs = json.loads(curve.read_text())

    if not args.homeroom:
        print("no --homeroom: only the side of PEFT was run")
        return
    strategy, _, options = STRATEGIES[args.strategy]
    output = args.out / "homeroom"
    command = [args.homeroom, "fine-tune", "--model-name", args.model, "--training-file", args.rows]
    command += ["--output-dir", output, "--strategy", strategy]
    command += [] if full else ["--init-from", args.out / "init"]
    command += ["--plugin-dir", args.plugin_dir] if args.plugin_dir else []
    for key, value in options.items():
        command += ["--set-option", f"{key}={common.option_text(value)}"]
    command += ["--max-steps", args.steps, "--batch-size", args.batch_size]
    command += ["--gradient-accumulation-steps", args.accumulation]
    command += ["--learning-rate", args.learning_rate, "--no-shuffle", "--overwrite", "--json"]
    command += FIXED + args.homeroom_args
    # An older state must not pass for this run's.
    (output / "trainer_state.json").unlink(missing_ok=True)
    common.run(command)

    state = json.loads((output / "trainer_state.json").read_text())
    ours = [row for row in state["log_history"] if "loss" in row]
    print("step      loss: PEFT     Homeroom  rel      grad norm: PEFT  Homeroom  rel      lr rel")
    worst = 0.0 if len(ours) == len(theirs) else math.inf
    for a, b in zip(ours, theirs):
        apart = [common.relative(a[k], b[k]) for k in ("loss", "grad_norm")]
        rate = abs(a["learning_rate"] - b["learning_rate"]) / args.learning_rate
        print(
            f"{b['step']:4}   {b['loss']:12.6f} {a['loss']:12.6f}  {apart[0]:.1e}   "
            f"{b['grad_norm']:12.5f} {a['grad_norm']:9.5f}  {apart[1]:.1e}   {rate:.1e}"
        )
        # max() would pass over NaN.
        for value in (*apart, rate):
            worst = value if not value <= worst else worst
    if args.eval_rows:
        command = [args.homeroom, "eval", "--model-dir", output, "--file", args.eval_rows, "--json"]
        ours_held = common.last_json(common.run(command))["loss"]
        held = theirs[-1]["eval_loss"]
        print(f"held out: PEFT {held:.5f}   Homeroom {ours_held:.5f}   rel {ours_held / held - 1:+.2e}")
    if len(ours) != len(theirs):
        print(f"Homeroom logged {len(ours)} steps, PEFT made {len(theirs)}")
    common.verdict("largest relative difference of a step is", worst, args.bound)


if __name__ == "__main__":
    main()
