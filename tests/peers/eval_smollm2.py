"""Compares the loss on held-out rows: transformers + PEFT against `homeroom eval`.

The mean is over trained tokens, not over rows.

Run: python eval_smollm2.py --model D --rows eval.jsonl [--adapter OUT/homeroom] --homeroom BIN
"""

import argparse
import math
from pathlib import Path

import common


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    common.add_options(parser)
    parser.add_argument("--rows", type=Path, required=True, help="rows of rows.py")
    parser.add_argument("--adapter", type=Path, help="without it: the base model")
    parser.add_argument("--bound", type=float, default=1e-3, help="absolute, on the loss")
    args = parser.parse_args()
    common.torch_ready(args.threads)
    import torch

    tokenizer = common.load_tokenizer(args.model)
    rows = [common.encode(tokenizer, row["messages"]) for row in common.read_rows(args.rows)]
    folder = args.adapter or args.model
    if (folder / "adapter_config.json").exists():
        model = common.load_adapter(common.load_base(args.model), folder)
    else:
        model = common.load_base(folder)
    loss, right = 0.0, 0
    with torch.no_grad():
        for i in range(0, len(rows), 8):
            part = common.token_losses(model, rows[i : i + 8])
            loss, right = loss + part[0].item(), right + part[1]
    tokens = sum(sum(trained) for _, trained in rows)
    loss /= tokens
    theirs = {"loss": loss, "perplexity": math.exp(loss), "token_accuracy": right / tokens}
    print(f"{folder}   {len(rows)} rows, {tokens} trained tokens")
    ours = {}
    if args.homeroom:
        command = [args.homeroom, "eval", "--model-dir", folder, "--file", args.rows, "--json"]
        ours = common.last_json(common.run(command + args.homeroom_args))
    print("                        PEFT     Homeroom")
    for key, value in theirs.items():
        print(f"{key:14} {value:13.6f} {ours.get(key, math.nan):12.6f}")
    if not args.homeroom:
        print("no --homeroom: only the side of PEFT was run")
        return
    common.verdict("the losses differ by", abs(ours["loss"] - loss), args.bound)


if __name__ == "__main__":
    main()
