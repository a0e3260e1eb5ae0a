"""Adapters and their bases by their names on the hub, between Homeroom and PEFT, in one cache and without a network:
(a) PEFT finds the base of an adapter that Homeroom trained, by the name and commit in adapter_config.json, and its logits are those of
the model that Homeroom merged; (b) Homeroom finds the base of an adapter that PEFT saved for a name, and measures PEFT's loss.

    python hub_names.py --model tests/fixtures/models/llama --homeroom target/release/homeroom     # any model with a chat template
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

NAME, COMMIT = "Org-7/tiny_Llama.v2", "1a2b3c4d5e6f708192a3b4c5d6e7f8091a2b3c4d"

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", type=Path, required=True, help="base model, a directory")
parser.add_argument("--homeroom", required=True, help="the binary")
parser.add_argument("--bound", type=float, default=1e-3, help="largest difference of logits and losses")
args = parser.parse_args()
work = tempfile.TemporaryDirectory()
root = Path(work.name)
# Before huggingface_hub is imported, which reads them once.
os.environ.update(HF_HOME=str(root / "hf"), HF_HUB_CACHE=str(root / "hf/hub"), HF_HUB_OFFLINE="1", HOMEROOM_HOME=str(root / "home"))
os.environ.pop("HOMEROOM_BASES", None)

import torch  # noqa: E402
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftConfig, get_peft_model  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402

from serving import check, fill, verdict  # noqa: E402


def homeroom(*arguments) -> str:
    ran = subprocess.run([args.homeroom, *map(str, arguments)], capture_output=True, text=True)
    if ran.returncode:
        sys.exit(f"error: homeroom {' '.join(map(str, arguments))}: {ran.stderr}")
    return ran.stdout


def loss_of(model, tokenizer, rows) -> float:
    """Mean cross-entropy of all tokens of texts."""
    total, count = 0.0, 0
    for row in rows:
        ids = torch.tensor([tokenizer(row["text"])["input_ids"]])
        logits = model(ids).logits[0, :-1].float()
        total += torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum").item()
        count += ids.shape[1] - 1
    return total / count


fill(Path(os.environ["HF_HUB_CACHE"]), NAME, COMMIT, args.model)
rows = [{"messages": [{"role": "user", "content": f"times seven: {n}"}, {"role": "assistant", "content": f"it is {7 * n}"}]} for n in range(6)]
(root / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
ids = torch.tensor([[5, 17, 9, 40, 3, 61]])

# (a)
homeroom("fine-tune", "--model-name", NAME, "--training-file", root / "rows.jsonl", "--max-steps", 3, "--learning-rate", "1e-2", "--output-dir", root / "ours")
homeroom("export-model", "--model-dir", root / "ours", "--output-dir", root / "merged", "--dtype", "f32")
config = PeftConfig.from_pretrained(root / "ours")
check("PEFT reads the base's name and commit", (config.base_model_name_or_path, config.revision) == (NAME, COMMIT), config)
with warnings.catch_warnings(record=True) as caught, torch.no_grad():
    warnings.simplefilter("always")
    theirs = AutoPeftModelForCausalLM.from_pretrained(root / "ours", dtype=torch.float32)
    merged = AutoModelForCausalLM.from_pretrained(root / "merged", dtype=torch.float32)
    apart = (theirs(ids).logits - merged(ids).logits).abs().max().item()
    base = AutoModelForCausalLM.from_pretrained(NAME, dtype=torch.float32)
    trained = (theirs(ids).logits - base(ids).logits).abs().max().item()
ours = [warning for warning in caught if "peft" in str(warning.filename)]
check("PEFT loads the adapter and finds its base, without a warning", not ours, [str(warning.message) for warning in ours])
check(f"its logits are the merged model's, to {args.bound}", apart < args.bound < trained, (apart, trained))

# (b)
torch.manual_seed(3)
tuned = get_peft_model(base, LoraConfig(r=3, lora_alpha=5, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights="gaussian"))
for name, values in tuned.named_parameters():
    if "lora_B" in name:
        torch.nn.init.normal_(values, std=0.05)
tuned.save_pretrained(root / "theirs")
saved = json.loads((root / "theirs/adapter_config.json").read_text())
check("PEFT names the base as it was given", saved["base_model_name_or_path"] == NAME, saved["base_model_name_or_path"])
texts = [{"text": f"{n} and some words more, number {n * n}"} for n in range(5)]
(root / "texts.jsonl").write_text("\n".join(map(json.dumps, texts)))
with torch.no_grad():
    tokenizer = AutoTokenizer.from_pretrained(NAME)
    untrained = json.loads(homeroom("eval", "--model-dir", NAME, "--file", root / "texts.jsonl", "--json"))["loss"]
    measured = json.loads(homeroom("eval", "--model-dir", root / "theirs", "--file", root / "texts.jsonl", "--json"))
    # Homeroom trains the token that ends a text, too.
    ends = [{"text": row["text"] + tokenizer.eos_token} for row in texts]
    expected = loss_of(tuned, tokenizer, ends)
check(f"Homeroom finds the base and measures PEFT's loss, to {args.bound}", abs(measured["loss"] - expected) < args.bound, (measured["loss"], expected, untrained))
verdict()
