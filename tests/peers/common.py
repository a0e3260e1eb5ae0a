"""What the peer scripts share: rows, the loss mask, models, the Homeroom side, and the verdict.

Paths come from options; nothing is downloaded (see fetch_smollm2.py for the one download).
"""

import json
import os
import subprocess
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


# --- options --------------------------------------------------------------------------------


def add_options(parser, homeroom: bool = True) -> None:
    parser.add_argument("--model", type=Path, required=True, help="base model, a directory")
    parser.add_argument("--threads", type=int, default=2, help="torch's threads")
    if homeroom:
        parser.add_argument("--homeroom", help="the binary; without it only torch runs")
        parser.add_argument(
            "homeroom_args", nargs="*", help="after `--`: further options for Homeroom"
        )


def torch_ready(threads: int) -> None:
    import torch
    from transformers.utils import logging

    torch.set_num_threads(threads)
    logging.disable_progress_bar()


# --- rows -----------------------------------------------------------------------------------


def read_rows(path: Path) -> list[dict]:
    with open(path, encoding="utf-8") as file:
        return [json.loads(line) for line in file if line.strip()]


def encode(tokenizer, messages: list[dict]) -> tuple[list[int], list[bool]]:
    """Ids of a chat, and whether each is a target: True at t means predicted from t - 1.

    The span of an assistant turn is what rendering up to and including it adds to rendering the
    messages before it with the generation prompt. The chat is tokenised once, without further
    special tokens; spans are looked up by character, never by token id.
    """

    def render(count: int, prompt: bool) -> str:
        if count == 0 and not prompt:
            return ""
        return tokenizer.apply_chat_template(
            messages[:count], tokenize=False, add_generation_prompt=prompt
        )

    text = render(len(messages), False)
    spans = []
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before, upto = render(i, True), render(i + 1, False)
        if not (upto.startswith(before) and text.startswith(upto)):
            raise ValueError(f"message {i}: the shorter rendering is not a prefix of the longer")
        spans.append((len(before), len(upto)))
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    trained = []
    for start, end in encoding["offset_mapping"]:
        inside = [s for s in spans if start < s[1] and end > s[0]]
        for span in inside:
            if start < span[0] or end > span[1]:
                raise ValueError(f"a token at characters {start}..{end} crosses the span {span}")
        trained.append(bool(inside))
    if trained and trained[0]:
        raise ValueError("the first token is trained, but nothing precedes it")
    return encoding["input_ids"], trained


# --- models ---------------------------------------------------------------------------------


def load_tokenizer(folder: Path):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def load_base(folder: Path, storage: str = "f32"):
    """The base in f32; with `nf4` or `int8` its linear layers as bitsandbytes stores them."""
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    coded = {
        "nf4": dict(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.float32,
        ),
        "int8": dict(load_in_8bit=True),
    }.get(storage)
    more = dict(quantization_config=BitsAndBytesConfig(**coded), device_map="cpu") if coded else {}
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", **more
    ).eval()


def load_adapter(base, folder: Path, strict: bool = True, trainable: bool = False):
    """The base with the adapter, by PEFT; with `strict`, any warning is an error."""
    import warnings

    from peft import PeftModel

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = PeftModel.from_pretrained(base, folder, is_trainable=trainable)
    # PEFT asks transformers for a property by its old name, whatever the adapter.
    caught = [w for w in caught if "is_gradient_checkpointing" not in str(w.message)]
    if strict and caught:
        for warning in caught:
            print(f"warning: {warning.category.__name__}: {warning.message}")
        sys.exit(f"error: {folder}: PEFT loads it with {len(caught)} warnings")
    return model.train(trainable)


def token_losses(model, rows: list[tuple[list[int], list[bool]]]):
    """(sum of the losses, number of right guesses) over the trained tokens of padded rows."""
    import torch
    import torch.nn.functional as F

    length = max(len(ids) for ids, _ in rows)
    ids = torch.zeros(len(rows), length, dtype=torch.long)
    attention = torch.zeros(len(rows), length, dtype=torch.long)
    labels = torch.full((len(rows), length), -100)
    for i, (row, trained) in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row)
        attention[i, : len(row)] = 1
        labels[i, : len(row)] = torch.where(torch.tensor(trained), ids[i, : len(row)], -100)
    logits = model(input_ids=ids, attention_mask=attention).logits[:, :-1].flatten(0, 1)
    labels = labels[:, 1:].flatten()
    loss = F.cross_entropy(logits, labels, ignore_index=-100, reduction="sum")
    return loss, int((logits.argmax(-1) == labels).sum())


# --- Homeroom -------------------------------------------------------------------------------


def option_text(value) -> str:
    """A value for `--set-option k=v`: texts as they are, everything else as JSON."""
    return value if isinstance(value, str) else json.dumps(value)


def run(command: list, cwd: Path | None = None) -> str:
    """Runs a command and returns its stdout; its stderr goes to ours."""
    command = [str(part) for part in command]
    print("run:", " ".join(command), file=sys.stderr)
    done = subprocess.run(command, cwd=cwd, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(f"error: {command[0]} ended with {done.returncode}\n{done.stdout}")
    return done.stdout


def last_json(text: str) -> dict:
    """The result of a command with `--json`: its whole stdout, or the last line of it."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return json.loads(text.strip().splitlines()[-1])


# --- verdict --------------------------------------------------------------------------------


def relative(ours: float, theirs: float) -> float:
    return abs(ours - theirs) / max(abs(theirs), 1e-12)


def verdict(what: str, worst: float, bound: float) -> None:
    """Ends the script: 0 within the bound, 1 beyond it (also for NaN)."""
    good = worst <= bound
    print(f"{'ok' if good else 'FAILED'}: {what} {worst:.2e}, bound {bound:.0e}")
    sys.exit(0 if good else 1)
