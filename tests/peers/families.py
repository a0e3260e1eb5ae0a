"""Holds what Homeroom writes of every decoder family to transformers and PEFT.

Each model of tests/fixtures/models that has a config.json, and each of its GGUF files, is trained by LoRA for some steps and
exported, and is written by a run of strategy `full` that changes nothing. transformers must load both with no tensor missing or
left over and no warning; what nothing changed must answer as the base; and PEFT must load the adapter alike and answer as the export.

Run: python families.py --homeroom target/release/homeroom [NAME ...]      (torch, transformers, peft, safetensors)
"""

import argparse
import logging
import os
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

BOUND = 1e-4
FIXTURES = Path(__file__).resolve().parents[1] / "fixtures"
# transformers says these of files as their makers publish them, too.
USUAL = ("we recommend the use of this field over", "is_gradient_checkpointing")


class Heard(logging.Handler):
    def __init__(self):
        super().__init__(logging.WARNING)
        self.words = []

    def emit(self, record):
        self.words.append(record.getMessage())


def quiet(heard, warned):
    """What was said, without what is said of any model."""
    words = heard.words + [str(warning.message) for warning in warned]
    return [word for word in words if not any(usual in word for usual in USUAL)]


def load(directory):
    """A model of transformers, and problems with its files."""
    heard = Heard()
    logger = transformers_logging.get_logger("transformers")
    logger.addHandler(heard)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        model, said = AutoModelForCausalLM.from_pretrained(
            directory, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
        )
    logger.removeHandler(heard)
    return model.eval(), [f"{key}: {names}" for key, names in said.items() if names] + quiet(heard, warned)


def unchanged(model, answers):
    """How far a model's logits are from those of a file."""
    expected = load_file(answers)
    ids = [name for name in expected if name.startswith("ids_")]
    with torch.no_grad():
        return max(apart(model(expected[name][None]).logits[0], expected[name.replace("ids", "logits")]) for name in ids)


def apart(a, b):
    return (a - b).abs().max().item()


def check(homeroom, base, original, answers, home):
    """Problems with what is written of the model `base`; `original`: whether that is a directory of transformers."""

    def run(*words):
        env = {"HOMEROOM_HOME": home, "HOMEROOM_PLUGINS": homeroom.parent, "HOMEROOM_PLUGIN_POLICY": "dev"}
        env = os.environ | {key: str(value) for key, value in env.items()}
        ran = subprocess.run([homeroom, *words], env=env, capture_output=True, text=True)
        if ran.returncode:
            raise RuntimeError(ran.stderr.strip())

    rows = FIXTURES / "rows/colours.jsonl"
    training = ["--model-name", base, "--training-file", rows, "--warmup-ratio", "0", "--max-seq-len", "48"]
    training += ["--on-long-row", "truncate"]
    adapter, merged, whole = home / "adapter", home / "merged", home / "whole"
    run("fine-tune", *training, "--output-dir", adapter, "--learning-rate", "2e-2", "--max-steps", "3")
    run("export-model", "--format", "merged", "--dtype", "f32", "--model-dir", adapter, "--output-dir", merged)
    run("fine-tune", *training, "--output-dir", whole, "--strategy", "full", "--learning-rate", "1e-30", "--max-steps", "1")

    exported, problems = load(merged)
    same, more = load(whole)
    problems += more
    if answers and (distance := unchanged(same, answers)) > BOUND:
        problems.append(f"strategy `full` wrote a model {distance:.1e} from the base")
    if original:
        ids = torch.arange(3, 3 + 40)[None]
        plain, _ = load(original)
        heard = Heard()
        with torch.no_grad(), warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            before = plain(ids).logits
            adapted = PeftModel.from_pretrained(plain, adapter).eval()(ids).logits
            distance, learned = apart(adapted, exported(ids).logits), apart(adapted, before)
        problems += quiet(heard, warned)
        if distance > BOUND:
            problems.append(f"adapter and export are {distance:.1e} apart")
        if learned < 1e-2:
            problems.append(f"PEFT's adapted model is {learned:.1e} from the base")
    return problems


def answers_of(base):
    """transformers' answers for a directory or GGUF file of the fixtures."""
    directory = base if base.is_dir() else base.parent
    names = ["expected.safetensors"]
    if base.suffix == ".gguf":
        names = [f"expected-{base.stem.removeprefix('model-')}.safetensors", "expected-gguf.safetensors", *names]
    return next((directory / name for name in names if (directory / name).exists()), None)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--homeroom", required=True, type=Path)
    parser.add_argument("names", nargs="*")
    arguments = parser.parse_args()
    wrong = 0
    for directory in sorted((FIXTURES / "models").iterdir()):
        if not (directory / "config.json").exists() or arguments.names and directory.name not in arguments.names:
            continue
        forms = [(directory, directory)] if any(directory.glob("model*.safetensors")) else []
        forms += [(file, None) for file in sorted(directory.glob("*.gguf"))]
        for base, original in forms:
            with tempfile.TemporaryDirectory() as home:
                try:
                    problems = check(arguments.homeroom.resolve(), base, original, answers_of(base), Path(home))
                except Exception as error:
                    problems = [str(error)]
            wrong += bool(problems)
            print(f"{base.relative_to(FIXTURES / 'models')}: {'; '.join(problems) or 'as here'}", flush=True)
    sys.exit(wrong > 0)


if __name__ == "__main__":
    main()
