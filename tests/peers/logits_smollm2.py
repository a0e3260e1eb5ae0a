"""Compares the logits of a model or adapter directory in PEFT with Homeroom's, in f32.

Give it both ways round: an adapter that Homeroom trained (it must load in PEFT without a single
warning), and one that PEFT trained. Without --adapter the base model itself is compared.

Run: python logits_smollm2.py --model D --rows eval.jsonl --adapter OUT/homeroom --adapter OUT/peft
"""

import argparse
import json
import math
import shlex
import tempfile
from pathlib import Path

import common

WORKSPACE = Path(__file__).resolve().parents[2]
EXAMPLE = "cargo run --release -q -p homeroom-engine --example logits --"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    common.add_options(parser, homeroom=False)
    parser.add_argument("--rows", type=Path, required=True, help="rows of rows.py")
    parser.add_argument("--adapter", type=Path, action="append", default=[])
    parser.add_argument("--count", type=int, default=3, help="sequences compared")
    parser.add_argument("--example", default=EXAMPLE, help="what writes Homeroom's logits")
    parser.add_argument("--torch-only", action="store_true", help="load and run, compare nothing")
    parser.add_argument("--bound", type=float, default=1e-3, help="absolute, on each logit")
    args = parser.parse_args()
    common.torch_ready(args.threads)
    import torch
    from safetensors.torch import load_file

    tokenizer = common.load_tokenizer(args.model)
    rows = common.read_rows(args.rows)[: args.count]
    batch = [common.encode(tokenizer, row["messages"])[0] for row in rows]
    worst = 0.0
    print("directory                        sequence  tokens  largest logit  largest difference")
    ours = {}
    for folder in args.adapter or [args.model]:
        if (folder / "adapter_config.json").exists():
            model = common.load_adapter(common.load_base(args.model), folder)
        else:
            model = common.load_base(folder)
        with torch.no_grad():
            theirs = [model(input_ids=torch.tensor([ids])).logits[0] for ids in batch]
        del model
        if not args.torch_only:
            with tempfile.TemporaryDirectory() as scratch:
                ids, out = Path(scratch, "ids.json"), Path(scratch, "out.safetensors")
                ids.write_text(json.dumps(batch))
                command = [*shlex.split(args.example), folder.resolve(), ids, out]
                common.run(command, cwd=WORKSPACE)
                ours = load_file(out)
        for i, value in enumerate(theirs):
            apart = math.nan
            if not args.torch_only:
                apart = (ours[f"logits_{i}"].float() - value).abs().max().item()
            worst = apart if not apart <= worst else worst  # max() would pass over NaN
            top = value.abs().max()
            print(f"{str(folder)[-32:]:32} {i:8} {len(value):7} {top:14.3f}  {apart:.2e}")
    if args.torch_only:
        print("--torch-only: nothing was compared")
        return
    common.verdict("largest difference of a logit is", worst, args.bound)


if __name__ == "__main__":
    main()
