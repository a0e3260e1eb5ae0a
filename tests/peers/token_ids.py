"""Compares Homeroom's token ids with those of other tokenizers, on 1,000 rows of each kind.

Run by hand, from the repository root:
    python tests/peers/token_ids.py --gguf SmolLM2-135M-Instruct.Q4_1.gguf
    (needs gguf, tokenizers, transformers, sentencepiece; --ids COMMAND replaces the cargo run)

1. The byte-level GGUF file, against SmolLM2's tokenizer as its tokenizer.json defines it: the file's
   pieces and merges behind Digits and ByteLevel, built with the `tokenizers` package and run by
   transformers. This must agree on every row.
2. The same rows by transformers' own conversion of the GGUF file. Reported only: transformers 5.23
   does not know the pre-tokenizer "smollm" and leaves out the splitting of digits.
3. A SentencePiece model with byte fallback, trained here, against the sentencepiece package on rows
   without special tokens, and against Llama 2's pipeline with transformers' merges on all rows. Both
   must agree on every row.
4. The same rows by transformers' own conversion. Reported only: it puts the prefix space elsewhere.
"""

import argparse
import json
import random
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

import gguf
import sentencepiece
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.tokenization_utils_base import generate_merges

CARGO = "cargo run --release -q -p homeroom-engine --example token_ids --"
N_ROWS = 1000

WORDS = (
    "the of and to in a is that for it as was with be by on not he his but at are this have from or had an they "
    "which one you were her all she there would their we him been has when who will more no if out so said what up "
    "its about into than them can only other new some could time these two may then do first any my now such like "
    "fraction equation variable solve numerator polynomial photosynthesis mitochondria parliament hypothesis "
    "don't we'll I'm they've he'd you're it's DON'T O'Neil rock'n'roll camelCase HTTPServer snake_case "
    "café naïve Zürich Ångström Dvořák cafe\u0301 Ελλάδα Москва ёлка Київ שלום مرحبا हिन्दी ไทย 日本語 中文 한국어 "
    "ﬁn ＡＢＣ ½ ² Ⅷ ١٢٣ ४५६ 😀 👩‍👩‍👧‍👦 🏳️‍🌈 👍🏽 ∑ ∀x∈ℝ ≤ → € £ © ™ … — ‘quoted’ “said” def class return lambda {} [] () "
    "=> != == <= // /* */ <b> </p> &amp; \\frac{1}{2} $x^2$ http://example.com/a?b=1&c=2 a@b.cd #tag @user"
).split()
SPACES = [" "] * 30 + ["  ", "   ", "\n", "\n\n", "\t", " \n ", "\r\n", "", "\u00a0", "\u3000", "\u2028", "\u0085", "\u200b"]


def varied_rows(control: list[str]) -> list[str]:
    rng = random.Random(2024)
    any_char = lambda: chr(rng.choice([rng.randint(1, 0x2FF), rng.randint(0x300, 0xD7FF), rng.randint(0xE000, 0x1FAFF)]))
    rows = ["", " ", "  ", "\n", "\t ", " a", "a ", "x" * 3000, "ab " * 1000, " " * 300]
    while len(rows) < N_ROWS:
        kind = rng.random()
        if kind < 0.55:
            row = "".join(rng.choice(WORDS) + rng.choice(SPACES) for _ in range(rng.randint(1, 60)))
        elif kind < 0.7:
            row = "".join(rng.choice("0123456789.,+-*/=() xX\n") for _ in range(rng.randint(1, 60)))
        elif kind < 0.85:
            row = "".join(any_char() for _ in range(rng.randint(1, 40)))
        else:
            parts = [rng.choice([*control, *control, *WORDS, "\n", " ", control[-1][:-1]]) for _ in range(rng.randint(2, 20))]
            row = rng.choice(["", " "]).join(parts)
        rows.append(row)
    return rows


def homeroom(command: str, model: Path, rows: list[str]) -> list[list[int]]:
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    done = subprocess.run([*shlex.split(command), str(model)], input=lines, capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"{command}: failed\n{done.stderr}")
    return [json.loads(line) for line in done.stdout.splitlines()]


def compare(name: str, rows: list[str], ours: list[list[int]], theirs: list[list[int]]) -> int:
    assert len(rows) == len(ours) == len(theirs)
    different = [i for i in range(len(rows)) if ours[i] != theirs[i]]
    print(f"{name:<58} {len(rows) - len(different):>5} of {len(rows)} rows equal")
    for i in different[:3]:
        at = next((k for k, (a, b) in enumerate(zip(ours[i], theirs[i])) if a != b), 0)
        print(f"    {rows[i][:60]!r}\n      homeroom {ours[i][at:at + 8]}\n      other    {theirs[i][at:at + 8]}")
    return len(different)


def field(reader: gguf.GGUFReader, key: str):
    return reader.fields[f"tokenizer.ggml.{key}"].contents()


def byte_level(path: Path, command: str) -> int:
    reader = gguf.GGUFReader(path)
    tokens, types = field(reader, "tokens"), field(reader, "token_type")
    assert field(reader, "model") == "gpt2" and field(reader, "pre") == "smollm", "expected SmolLM2's GGUF file"
    control = [token for token, kind in zip(tokens, types) if kind == 3]
    merges = [tuple(merge.split(" ")) for merge in field(reader, "merges")]
    genuine = Tokenizer(models.BPE({token: idx for idx, token in enumerate(tokens)}, merges))
    genuine.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    genuine.decoder = decoders.ByteLevel()
    genuine.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    fast = PreTrainedTokenizerFast(tokenizer_object=genuine, bos_token="<|im_start|>", eos_token="<|im_end|>")

    rows = varied_rows(["<|im_start|>", "<|endoftext|>", "<|im_end|>"])
    ours = homeroom(command, path, rows)
    n_wrong = compare("byte-level GGUF and SmolLM2 as defined", rows, ours, [fast.encode(r, add_special_tokens=False) for r in rows])
    theirs = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    compare("  for information: transformers' conversion", rows, ours, [theirs.encode(r, add_special_tokens=False) for r in rows])
    return n_wrong


def sentencepiece_bpe(command: str, folder: Path) -> int:
    rng = random.Random(5)
    syllables = [c + v for c in "bcdfghjklmnprstvwz" for v in ("a", "e", "i", "o", "u", "ai", "ou", "é")]
    made_up = ["".join(rng.choices(syllables, k=rng.randint(1, 5))) for _ in range(4000)]
    lines = [" ".join(rng.choices(WORDS + made_up, k=rng.randint(4, 16))) for _ in range(20000)]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_prefix=str(folder / "spm"), model_type="bpe", vocab_size=8000,
        byte_fallback=True, character_coverage=0.9995, normalization_rule_name="identity",
        remove_extra_whitespaces=False, split_digits=True, allow_whitespace_only_pieces=True,
        control_symbols=["<|user|>", "<|end|>"], minloglevel=2,
    )
    spm = sentencepiece.SentencePieceProcessor(model_file=str(folder / "spm.model"))
    tokens = [spm.id_to_piece(i) for i in range(spm.get_piece_size())]
    scores = [spm.get_score(i) for i in range(len(tokens))]
    types = [2 if spm.is_unknown(i) else 3 if spm.is_control(i) else 6 if spm.is_byte(i) else 1 for i in range(len(tokens))]
    path = folder / "spm.gguf"
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores(scores)
    writer.add_token_types(types)
    writer.add_bos_token_id(spm.bos_id())
    writer.add_eos_token_id(spm.eos_id())
    writer.add_unk_token_id(spm.unk_id())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()

    vocab = {token: idx for idx, token in enumerate(tokens)}
    model = models.BPE(vocab, generate_merges(vocab, dict(zip(tokens, scores))), unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    llama2 = Tokenizer(model)
    llama2.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    special = [token for token, kind in zip(tokens, types) if kind in (2, 3)]
    llama2.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    fast = PreTrainedTokenizerFast(tokenizer_object=llama2, bos_token="<s>", eos_token="</s>", unk_token="<unk>")

    rows = varied_rows(["<s>", "</s>", "<|end|>", "<|user|>"])
    ours = homeroom(command, path, rows)
    n_wrong = compare("SentencePiece GGUF and Llama 2's pipeline", rows, ours, [fast.encode(r, add_special_tokens=False) for r in rows])
    plain = [i for i, row in enumerate(rows) if row and not any(token in row for token in special)]
    n_wrong += compare(
        "SentencePiece GGUF and sentencepiece, plain rows",
        [rows[i] for i in plain], [ours[i] for i in plain], [spm.encode(rows[i]) for i in plain],
    )
    theirs = PreTrainedTokenizerFast(gguf_file=str(path), name_or_path=str(folder), bos_token="<s>", eos_token="</s>")
    compare("  for information: transformers' conversion", rows, ours, [theirs.encode(r, add_special_tokens=False) for r in rows])
    return n_wrong


def main() -> None:
    parser = argparse.ArgumentParser(description="compare Homeroom's token ids with other tokenizers'")
    parser.add_argument("--gguf", type=Path, required=True, help="SmolLM2's GGUF file")
    parser.add_argument("--ids", default=CARGO, help="command that prints ids; the model's path is added")
    args = parser.parse_args()
    n_wrong = byte_level(args.gguf, args.ids)
    with tempfile.TemporaryDirectory() as folder:
        n_wrong += sentencepiece_bpe(args.ids, Path(folder))
    sys.exit(1 if n_wrong else 0)


if __name__ == "__main__":
    main()
