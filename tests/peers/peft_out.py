"""Holds adapters exported for PEFT to PEFT: each loads without a warning and answers as the merged export does in transformers.

Every model of tests/fixtures/models that has a config.json is trained by LoRA, by rsLoRA with DoRA and by QLoRA for some steps, and
exported as `peft` and as `merged`.

Run: python peft_out.py --homeroom target/release/homeroom [NAME ...]      (torch, transformers, peft, safetensors)
"""

import argparse
import os
import subprocess
import tempfile
import warnings
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from families import BOUND, FIXTURES, Heard, apart, load, quiet
from peft import PeftModel
from transformers.utils import logging as transformers_logging

STRATEGIES = {
    "lora": ["--strategy", "lora", "--set-option", "r=3"],
    "rslora, DoRA": ["--strategy", "lora", "--set-option", "use_rslora=true", "--set-option", "use_dora=true", "--set-option", "r=5"],
}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--homeroom", required=True, type=lambda path: Path(path).resolve())
    parser.add_argument("names", nargs="*")
    args = parser.parse_args()
    bad = 0
    for config in sorted((FIXTURES / "models").glob("*/config.json")):
        base = config.parent
        if args.names and base.name not in args.names or not (base / "model.safetensors").exists():
            continue
        for strategy, words in STRATEGIES.items():
            with tempfile.TemporaryDirectory() as place:
                home = Path(place)
                env = {"HOMEROOM_HOME": home, "HOMEROOM_PLUGINS": args.homeroom.parent, "HOMEROOM_PLUGIN_POLICY": "dev"}
                env = os.environ | {key: str(value) for key, value in env.items()}

                def run(*words):
                    ran = subprocess.run([args.homeroom, *map(str, words)], env=env, capture_output=True, text=True)
                    if ran.returncode:
                        raise RuntimeError(ran.stderr.strip())

                run(
                    "fine-tune", "--model-name", base, "--training-file", FIXTURES / "rows/colours.jsonl", "--warmup-ratio", "0",
                    "--max-seq-len", "48", "--on-long-row", "truncate", "--learning-rate", "2e-2", "--max-steps", "3",
                    "--name", "tuned", *words,
                )  # fmt: skip
                run("export-model", "--model-dir", "tuned", "--format", "peft", "--output-dir", home / "peft")
                run("export-model", "--model-dir", "tuned", "--format", "merged", "--dtype", "f32", "--output-dir", home / "merged")
                merged, problems = load(home / "merged")
                plain, _ = load(base)
                heard, ids = Heard(), torch.arange(3, 3 + 40)[None]
                logger = transformers_logging.get_logger("transformers")
                logger.addHandler(heard)
                with torch.no_grad(), warnings.catch_warnings(record=True) as warned:
                    warnings.simplefilter("always")
                    before = plain(ids).logits
                    adapted = PeftModel.from_pretrained(plain, home / "peft").eval()(ids).logits
                    distance, learned = apart(adapted, merged(ids).logits), apart(adapted, before)
                logger.removeHandler(heard)
                problems += quiet(heard, warned)
                if distance > BOUND:
                    problems.append(f"adapter and merged model are {distance:.1e} apart")
                if learned < 1e-2:
                    problems.append(f"it learned nothing ({learned:.1e})")
            print(f"{base.name:20} {strategy:14} {distance:.1e}   {'; '.join(problems) or 'no warning'}", flush=True)
            bad += bool(problems)
    raise SystemExit(1 if bad else 0)


if __name__ == "__main__":
    main()
