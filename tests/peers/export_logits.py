"""Compares a directory that Homeroom wrote of a GGUF file with what transformers answers for the original.

A run that changes nothing makes the directory:
  homeroom fine-tune --model-name tests/fixtures/models/llama3-gguf/model.gguf --strategy full --learning-rate 1e-30 \\
    --max-steps 1 --training-file ROWS --output-dir OUT
  python export_logits.py --model OUT --expected tests/fixtures/models/llama3-gguf/expected.safetensors
"""

import argparse
import sys

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

BOUND = 1e-3

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--model", required=True)
parser.add_argument("--expected", required=True)
arguments = parser.parse_args()

model, said = AutoModelForCausalLM.from_pretrained(
    arguments.model, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
)
problems = {key: names for key, names in said.items() if names}
expected = load_file(arguments.expected)
worst = 0.0
with torch.no_grad():
    for name, ids in expected.items():
        if name.startswith("ids_"):
            apart = model.eval()(ids[None]).logits[0] - expected[name.replace("ids", "logits")]
            worst = max(worst, apart.abs().max().item())
print(f"logits differ by at most {worst:.1e}, the bound is {BOUND:.0e}; tensors that are missing or left over: {problems or 'none'}")
sys.exit(worst > BOUND or bool(problems))
