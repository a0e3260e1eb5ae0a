"""Holds the chat formats for Ollama to the chat templates that models are published with, by Go's own text/template and by transformers.

For each template of tests/fixtures/templates/published: the formats whose Go template writes, of five conversations (a system message,
several turns, odd characters), what transformers makes of the model's template. Homeroom's choice, by its own reading of Go's language,
must be among them; `--homeroom` asks it, by the Modelfile that it writes of a tiny model with that template.

Run: python ollama_templates.py [--homeroom target/release/homeroom]      (transformers, jinja2; Go)
"""

import argparse
import datetime
import json
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

from transformers.utils import chat_template_utils

HERE = Path(__file__).resolve().parent
FIXTURES = HERE.parent / "fixtures"
FORMATS = HERE.parents[1] / "runtime/engine/src/export/ollama/formats"
ODD = "{{ .System }} \"quoted\" 'once' `tick` \\n <b>&amp;</b>\n\n- ein Maß, 数, 🙂\tend"
CONVERSATIONS = [
    [("user", "Who are you?")],
    [("system", "Be brief: one word."), ("user", "Why?")],
    [("user", "1"), ("assistant", "a"), ("user", "2"), ("assistant", "b"), ("user", "3")],
    [("system", "Two\n\nparagraphs {x} %s"), ("user", ODD), ("assistant", "```\ncode {{ y }}\n```"), ("user", "and?")],
    [("user", ODD)],
]
# Templates that no format here writes.
EXPECTED_NONE = {"cohere2", "gptoss", "jamba", "muse_glimmer", "command_a", "command_a_rag", "command_a_tool_use"}
EXPECTED_NONE |= {"glm4moe", "idefics3", "llava_next", "nemotron_3_nano", "qwen3_8", "smolvlm"}


def by_jinja(source, family, adds_bos=True):
    """What transformers makes of the conversations; None where the template refuses one. Ollama puts BOS before a prompt if `adds_bos`."""
    template = chat_template_utils._compile_jinja_template(source)
    texts = []
    for conversation in CONVERSATIONS:
        messages = [{"role": role, "content": content} for role, content in conversation]
        try:
            tokens = {"bos_token": family["bos"] or "", "eos_token": family["eos"] or ""}
            texts.append(template.render(messages=messages, add_generation_prompt=True, **tokens))
        except Exception:
            texts.append(None)
    bos = family["bos"]
    if adds_bos and bos and texts[0] and texts[0].startswith(bos):
        texts = [text and text.removeprefix(bos) for text in texts]
    return texts


def default_system(source, family):
    """What stands for a system message where there is none."""
    template = chat_template_utils._compile_jinja_template(source)
    tokens = {"bos_token": family["bos"] or "", "eos_token": family["eos"] or ""}
    user = {"role": "user", "content": "Who are you?"}
    try:
        marked = template.render(messages=[{"role": "system", "content": "«s»"}, user], add_generation_prompt=True, **tokens)
        plain = template.render(messages=[user], add_generation_prompt=True, **tokens)
    except Exception:
        return ""
    before, mark, after = marked.partition("«s»")
    long_enough = len(plain) >= len(before) + len(after)
    return plain[len(before) : len(plain) - len(after)] if mark and long_enough and plain.startswith(before) and plain.endswith(after) else ""


def given(conversation, system):
    """What Ollama gives a template."""
    messages = list(conversation)
    if system and messages[0][0] != "system":
        messages.insert(0, ("system", system))
    systems = "\n\n".join(content for role, content in messages if role == "system")
    return {"System": systems, "Messages": [{"Role": role, "Content": content} for role, content in messages]}


def by_go(jobs):
    lines = "\n".join(json.dumps(job, ensure_ascii=False) for job in jobs) + "\n"
    ran = subprocess.run(["go", "run", HERE / "go_template.go"], input=lines, capture_output=True, text=True, check=True)
    return [json.loads(line) for line in ran.stdout.splitlines()]


def sources(family):
    """Each format with its placeholders filled, by name; of a dated one a source for each way to write a day."""
    today = datetime.datetime.now()
    days = ["26 Jul 2024", *(today.strftime(form) for form in ("%d %b %Y", "%d %B %Y", "%B %d, %Y"))]
    for path in sorted(FORMATS.glob("*.tmpl")):
        text = path.read_text().removesuffix("\n")
        text = text.replace("@BOS@", family["bos"] or "").replace("@EOS@", family["eos"] or "")
        for day in days if "@DATE@" in text else [""]:
            yield path.stem, text.replace("@DATE@", day)


def by_homeroom(homeroom, source, family):
    """The format, template and system message of the Modelfile that Homeroom writes of a tiny model with this template."""
    with tempfile.TemporaryDirectory() as place:
        model, out = Path(place) / "model", Path(place) / "out"
        shutil.copytree(FIXTURES / "models/llama", model)
        (model / "chat_template.jinja").write_text(source)
        config = json.loads((model / "tokenizer_config.json").read_text())
        config.pop("chat_template", None)
        (model / "tokenizer_config.json").write_text(json.dumps(config))
        ran = subprocess.run(
            [homeroom, "export-model", "--format", "ollama", "--model-dir", model, "--output-dir", out], capture_output=True, text=True
        )
        if ran.returncode:
            return None, ran.stderr.strip().splitlines()[0], None
        text = (out / "Modelfile").read_text()
        template = re.search(r'TEMPLATE """(.*?)"""', text, re.S)[1]
        system = re.search(r'SYSTEM """(.*?)"""', text, re.S)
        return re.search(r"format `(.*?)`", text)[1], template, system[1] if system else ""


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--homeroom", type=Path)
    args = parser.parse_args()
    families = json.loads((FIXTURES / "templates/published.json").read_text())["families"]
    bad = 0
    for name, family in families.items():
        source = (FIXTURES / f"templates/published/{name}.jinja").read_text()
        wanted, system = by_jinja(source, family), default_system(source, family)
        if sum(text is not None for text in wanted) < 2:
            continue
        candidates = list(sources(family))
        conversations = [given(conversation, system) for conversation in CONVERSATIONS]
        written = by_go([{"Template": text, "Conversations": conversations} for _, text in candidates])
        fits = lambda texts: all(want is None or want == text for want, text in zip(wanted, texts))
        fitting = list(dict.fromkeys(format for (format, _), texts in zip(candidates, written) if fits(texts)))
        line = f"{name:24} {', '.join(fitting) or '-'}"
        if args.homeroom:
            # Its tokens are those of the tiny model.
            config = json.loads((FIXTURES / "models/llama/tokenizer_config.json").read_text())
            tokens = {"bos": config.get("bos_token"), "eos": config.get("eos_token")}
            format, template, system = by_homeroom(args.homeroom, source, tokens)
            if format is None:
                line += f"   refused: {template}"
                bad += bool(fitting) and "none of the formats" in template
            else:
                # Its tokenizer adds no BOS.
                wanted = by_jinja(source, tokens, adds_bos=False)
                conversations = [given(conversation, system) for conversation in CONVERSATIONS]
                same = fits(by_go([{"Template": template, "Conversations": conversations}])[0])
                line += f"   Homeroom: {format}{'' if same else ', WHOSE PROMPT DIFFERS'}"
                bad += not same
        bad += not fitting and name not in EXPECTED_NONE
        print(line, flush=True)
    raise SystemExit(1 if bad else 0)


if __name__ == "__main__":
    main()
