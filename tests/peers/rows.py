"""Makes question and answer rows from Debian's `dict-elements` and `dict-freedict-eng-spa`.

Answers have one short form that a base model does not use, `Symbol: Fe. (element 26)`, so that a
fine-tuning on them shows. Questions are held out, not elements: each element and each form of
question is seen in train.jsonl, that element with that form only in eval.jsonl.

Run: python rows.py --out DIR [--source elements|spanish]
"""

import argparse
import gzip
import json
import random
import re
from pathlib import Path

DIGITS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"


def number(text: str) -> int:
    """dictd writes offsets and lengths in base 64, most significant digit first."""
    value = 0
    for char in text:
        value = value * 64 + DIGITS.index(char)
    return value


def entries(stem: Path) -> list[tuple[str, str]]:
    """(headword, text) of a dictd dictionary, in the order of the file."""
    with gzip.open(stem.with_suffix(".dict.dz")) as file:
        text = file.read()
    places = set()
    for line in stem.with_suffix(".index").read_text(encoding="utf-8").splitlines():
        headword, offset, length = line.split("\t")[:3]
        if not headword.startswith("00"):
            places.add((number(offset), number(length)))
    out = []
    for offset, length in sorted(places):
        entry = text[offset : offset + length]
        try:
            entry = entry.decode("utf-8")
        except UnicodeDecodeError:  # a few umlauts of elements.dict are Latin-1
            entry = entry.decode("latin-1")
        head, _, body = entry.partition("\n")
        out.append((head.strip(), body.strip()))
    return out


def row(question: str, answer: str) -> dict:
    return {
        "messages": [
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer},
        ]
    }


def element_rows(folder: Path) -> dict[tuple[str, str], dict]:
    """Rows by (element, form of question)."""
    rows = {}
    for name, body in entries(folder / "elements"):
        fields = dict(re.findall(r"^(Symbol|Atomic number|At[a-z]+ weight): *(\S+)$", body, re.M))
        symbol, n = fields.get("Symbol"), fields.get("Atomic number")
        weight = next((v for k, v in fields.items() if k.endswith("weight")), None)
        # Former names (symbols of three letters) and particles are left out.
        if not symbol or not n or not n.isdigit() or not re.fullmatch("[A-Z][a-z]?", symbol):
            continue
        end = f"(element {n})"
        forms = {
            "symbol": (f"What is the chemical symbol of {name}?", f"Symbol: {symbol}."),
            "number": (f"What is the atomic number of {name}?", f"Number: {n}."),
            "of-symbol": (f"Which element has the symbol {symbol}?", f"Name: {name}."),
            "of-number": (f"Which element has the atomic number {n}?", f"Name: {name}."),
        }
        if weight and re.fullmatch(r"[0-9.]+", weight):
            forms["weight"] = (f"What is the atomic weight of {name}?", f"Weight: {weight}.")
        found = re.search(
            r"\b([Dd]iscover|[Ii]solat|[Rr]eport)ed\b[^.]*?\bin\s+(1[5-9]\d\d)\b", body
        )
        if found:
            forms["year"] = (f"When was {name} discovered?", f"Year: {found[2]}.")
        # Some elements stand twice, under two names; the first entry is kept.
        if any(key[0] == symbol for key in rows):
            continue
        for form, (question, answer) in forms.items():
            rows[symbol, form] = row(question, f"{answer} {end}")
    return rows


def spanish_rows(folder: Path) -> dict[tuple[str, str], dict]:
    """Rows by (English word, form); words of one entry with one translation."""
    rows, seen = {}, {}
    for head, body in entries(folder / "freedict-eng-spa"):
        english = re.sub(r"\s*/.*/\s*", "", head).strip()
        seen.setdefault(english, []).append(body)
    for english, bodies in seen.items():
        if len(bodies) > 1 or not re.fullmatch(r"[a-z]{3,12}", english):
            continue
        spanish = bodies[0]
        if not re.fullmatch(r"[a-záéíóúüñ]{2,12}", spanish):
            continue
        rows[english, "to"] = row(f"What is '{english}' in Spanish?", f"Spanish: {spanish}.")
        question = f"What does the Spanish word '{spanish}' mean?"
        rows[english, "from"] = row(question, f"English: {english}.")
    return rows


def split(rows: dict, fraction: float, rng: random.Random) -> tuple[list, list]:
    """Holds questions out, one a thing at most, so that every thing stays in the training rows."""
    by_thing = {}
    for key in rows:
        by_thing.setdefault(key[0], []).append(key)
    things = [thing for thing, keys in by_thing.items() if len(keys) > 1]
    count = min(len(things), round(len(rows) * fraction))
    held = {rng.choice(by_thing[thing]) for thing in rng.sample(things, count)}
    order = list(rows)
    rng.shuffle(order)
    return [rows[k] for k in order if k not in held], [rows[k] for k in order if k in held]


def write(path: Path, rows: list[dict]) -> None:
    with open(path, "w", encoding="utf-8") as file:
        for item in rows:
            file.write(json.dumps(item, ensure_ascii=False) + "\n")
    print(f"{path}   {len(rows)} rows")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--source", choices=["elements", "spanish"], default="elements")
    parser.add_argument("--dictd", type=Path, default=Path("/usr/share/dictd"))
    parser.add_argument("--rows", type=int, help="at most so many rows, things drawn by --seed")
    parser.add_argument("--eval", type=float, default=0.15, help="share of questions held out")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    rows = (element_rows if args.source == "elements" else spanish_rows)(args.dictd)
    rng = random.Random(args.seed)
    if args.rows and args.rows < len(rows):
        things = sorted({key[0] for key in rows})
        rng.shuffle(things)
        kept, few = [], {}
        for thing in things:
            more = {key: value for key, value in rows.items() if key[0] == thing}
            if len(few) + len(more) > args.rows:
                break
            few.update(more)
        rows = few
    train, held_out = split(rows, args.eval, rng)
    args.out.mkdir(parents=True, exist_ok=True)
    write(args.out / "rows.jsonl", list(rows.values()))
    write(args.out / "train.jsonl", train)
    write(args.out / "eval.jsonl", held_out)
    for item in train[:8]:
        print("  " + " -> ".join(m["content"] for m in item["messages"]))


if __name__ == "__main__":
    main()
