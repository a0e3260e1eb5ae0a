"""Holds the GGUF files that Homeroom writes to llama.cpp: its answers, its tokens and its quantiser.

For each model of tests/fixtures/models (or those named by --model), as it is and trained by LoRA for a few steps:
1. `--format gguf --dtype f32` in llama.cpp: logits beside ours, and whether 64 greedy tokens of llama.cpp are ours.
2. Each other --dtype: the KL divergence of llama.cpp's answers from those of the model that was trained.
3. The same types made by llama.cpp's own quantiser of our f32 file: the same storages and bytes; also of random models whose rows are
   whole blocks, as deep as a 70B.
4. Odd texts become the same tokens.
5. A model with each kind of tokenizer that is known: the same tokens of some hundred texts.
6. `--format gguf-lora` over the base as f32, and over the very file that was trained on: logits beside ours, and beside the base alone.

Run: python gguf_out.py --homeroom target/release/homeroom --examples target/release/examples [--model DIR_OR_GGUF ...] [NAME ...]
     (llama_cpp, gguf, numpy; the examples `logits` and `token_ids` of homeroom-engine)
"""

import argparse
import ctypes
import json
import os
import shutil
import struct
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import gguf
import llama_cpp
import numpy as np

FIXTURES = Path(__file__).resolve().parents[1] / "fixtures"
TYPES = {
    "f16": llama_cpp.LLAMA_FTYPE_MOSTLY_F16,
    "bf16": llama_cpp.LLAMA_FTYPE_MOSTLY_BF16,
    "q8_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0,
    "q4_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0,
    "q5_k_m": llama_cpp.LLAMA_FTYPE_MOSTLY_Q5_K_M,
    "q4_k_m": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_K_M,
    "q6_k": llama_cpp.LLAMA_FTYPE_MOSTLY_Q6_K,
}
GREEDY = 64
TEXTS = [
    "", " ", "  ", "\n", "\t\n \n", "a", " a", "a ", "Hello, world!", "  two  spaces   three", "don't I'll WE'VE it's 'tis", "1234567 3.14 1,000",
    "x = y**2 + 3*z  # comment\n\treturn x\n", "def f(a, b=[1, 2]):\n    return {a: b}", "CamelCase snake_case HTTPServer2", "Grüße, naïve café, Ærø",
    "日本語のテキスト。中文，한국어", "Привет, мир! Ωμέγα", "😀 👩‍👩‍👧‍👦 🏳️‍🌈", "e\u0301 ﬁ ½ ²", "a\u00a0b\u200bc\u3000d", "http://example.com/a?b=1&c=%20",
    "<b>bold</b> &amp;", "\r\nwindows\r\n", "...!!!???---===", "tab\tand  end  ", "photosynthesis mitochondria", "<|im_start|>user\nhi<|im_end|>\n",
]


def tensors(path):
    """Tensors of f32 of a safetensors file."""
    data = Path(path).read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    for name, entry in json.loads(data[8 : 8 + size]).items():
        if name != "__metadata__":
            start, end = entry["data_offsets"]
            yield name, np.frombuffer(data[8 + size + start : 8 + size + end], np.float32).reshape(entry["shape"])


class Ours:
    def __init__(self, arguments, home):
        self.program, self.examples, self.home = arguments.homeroom.resolve(), arguments.examples.resolve(), home
        env = {"HOMEROOM_HOME": home, "HOMEROOM_PLUGINS": self.program.parent, "HOMEROOM_PLUGIN_POLICY": "dev"}
        self.env = os.environ | {key: str(value) for key, value in env.items()}

    def run(self, *words, stdin=None):
        ran = subprocess.run([str(word) for word in words], env=self.env, capture_output=True, text=True, input=stdin)
        if ran.returncode:
            raise RuntimeError(ran.stderr.strip()[-600:])
        return ran.stdout

    def export(self, model, kind, dtype=None):
        out = self.home / f"exported-{len(list(self.home.iterdir()))}-{kind}-{dtype}"
        words = [self.program, "export-model", "--model-dir", model, "--format", kind, "--output-dir", out, "--json"]
        said = json.loads(self.run(*words, *(["--dtype", dtype] if dtype else [])))
        return out / said["file"], said

    def train(self, base, strategy, options=()):
        out = self.home / f"trained-{strategy}"
        shutil.rmtree(out, ignore_errors=True)
        rows = FIXTURES / "rows/colours.jsonl"
        words = [self.program, "fine-tune", "--model-name", base, "--training-file", rows, "--output-dir", out, "--strategy", strategy]
        words += ["--warmup-ratio", "0", "--max-seq-len", "48", "--on-long-row", "truncate", "--learning-rate", "2e-2", "--max-steps", "3"]
        self.run(*words, *options)
        return out

    def logits(self, model, sequences, base=None):
        ids, out = self.home / "ids.json", self.home / "logits.safetensors"
        ids.write_text(json.dumps(sequences))
        self.run(self.examples / "logits", model, ids, out, *([base] if base else []))
        found = dict(tensors(out))
        return [found[f"logits_{n}"] for n in range(len(sequences))]

    def tokens(self, model, texts):
        lines = self.run(self.examples / "token_ids", model, stdin="".join(json.dumps(text) + "\n" for text in texts))
        return [json.loads(line) for line in lines.splitlines()]


class LlamaCpp:
    def __init__(self, path, adapter=None):
        options = dict(n_ctx=256, logits_all=True, verbose=True, n_threads=2, type_k=0, type_v=0, flash_attn=False, n_gpu_layers=0)
        self.model = llama_cpp.Llama(str(path), lora_path=str(adapter) if adapter else None, **options)

    def logits(self, ids):
        self.model.reset()
        self.model.eval(ids)
        return np.array(self.model.scores[: len(ids)])

    def greedy(self, prompt):
        ids = list(prompt)
        self.model.reset()
        self.model.eval(ids)
        for _ in range(GREEDY):
            ids.append(int(np.argmax(self.model.scores[self.model.n_tokens - 1])))
            self.model.eval(ids[-1:])
        return ids

    def tokens(self, text):
        return self.model.tokenize(text.encode(), add_bos=False, special=True)


def log_softmax(x):
    x = x.astype(np.float64)
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def divergence(p, q):
    """Mean KL divergence of q from p over positions, and the largest difference of a logit."""
    p, q = log_softmax(p), log_softmax(q)
    return float((np.exp(p) * (p - q)).sum(-1).mean()), float(np.abs(p - q).max())


def quantized_by_llama_cpp(source, target, kind):
    options = llama_cpp.llama_model_quantize_default_params()
    options.ftype, options.nthread = TYPES[kind], 2
    return llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(options)) == 0


def differing(ours, theirs):
    """Tensors of two files that are stored otherwise or hold other bytes."""
    read = lambda path: {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    a, b = read(ours), read(theirs)
    names = [f"{name} is in one alone" for name in a.keys() ^ b.keys()]
    for name in a.keys() & b.keys():
        if a[name].tensor_type != b[name].tensor_type:
            names.append(f"{name}: {a[name].tensor_type.name}, llama.cpp {b[name].tensor_type.name}")
        elif not np.array_equal(a[name].data, b[name].data):
            names.append(f"{name}: bytes differ ({a[name].tensor_type.name})")
    return sorted(names), len(a)


def words_of(problem):
    return str(problem).replace("\n", " ")[-260:]


def check(ours, base, quick, prompt_length):
    prompt = [1, *(3 + (7 * n) % 300 for n in range(prompt_length - 1))]
    [question] = ours.tokens(base, ["Question: Why is the sky blue, and why is it red in the evening?\nAnswer:"])
    if len(question) < 30:
        # It knows words.
        prompt = question
    # 1, of the base as it is.
    whole, said = ours.export(base, "gguf", "f32")
    theirs = LlamaCpp(whole)
    greedy = theirs.greedy(prompt)
    [logits] = ours.logits(base, [greedy])
    kl, apart = divergence(logits, theirs.logits(greedy))
    same = int((logits[len(prompt) - 1 : -1].argmax(-1) == np.array(greedy[len(prompt) :])).sum())
    print(f"  base f32: read back by us KL {said['kl']:.1e}; llama.cpp KL {kl:.1e}, a log probability {apart:.1e} apart; {same} of {GREEDY} greedy tokens", flush=True)
    # 4
    wrong = [text for text, ids in zip(TEXTS, ours.tokens(base, TEXTS)) if theirs.tokens(text) != ids]
    print(f"  tokens: {len(TEXTS) - len(wrong)} of {len(TEXTS)} texts alike {wrong[:4] or ''}")
    del theirs
    # 1 and 2, of what was trained.
    adapter = ours.train(base, "lora", ["--lora-r", "3"])
    merged, said = ours.export(adapter, "gguf", "f32")
    [trained] = ours.logits(adapter, [greedy])
    kl, apart = divergence(trained, LlamaCpp(merged).logits(greedy))
    moved, _ = divergence(trained, logits)
    print(f"  trained f32: KL {kl:.1e}, {apart:.1e} apart (training moved it by KL {moved:.1e})")
    for kind in ["q8_0"] if quick else TYPES:
        try:
            path, said = ours.export(adapter, "gguf", kind)
            kl, _ = divergence(trained, LlamaCpp(path).logits(greedy))
            other = ours.home / f"theirs-{kind}.gguf"
            if quantized_by_llama_cpp(merged, other, kind):
                wrong, count = differing(path, other)
                beside = f"{count - len(wrong)} of {count} tensors as llama.cpp's quantiser makes them {wrong[:3] or ''}"
            else:
                beside = "llama.cpp's quantiser refuses this shape"
            other.unlink(missing_ok=True)
            print(f"  {kind}: KL in llama.cpp {kl:.1e}, read back {said['kl']:.1e}; {beside}", flush=True)
            path.unlink()
        except Exception as problem:
            print(f"  {kind}: {words_of(problem)}")
    # 6
    patterns = ["use_rslora=true", 'rank_pattern={"o_proj": 2}', 'alpha_pattern={"down_proj": 5}']
    for words, options in [("", None), (", rsLoRA and patterns", patterns), (", embedding and head", ["target_modules=[\"embed_tokens\", \"lm_head\", \"q_proj\"]"])]:
        try:
            if options:
                settings = [word for option in options for word in ("--set-option", option)]
                adapter = ours.train(base, "lora", ["--lora-r", "4", *settings])
                [trained] = ours.logits(adapter, [greedy])
                moved, _ = divergence(trained, logits)
            if "embedding" in words:
                # A head that was the embedding is a matrix of its own now.
                kl, apart = divergence(trained, LlamaCpp(ours.export(adapter, "gguf", "f32")[0]).logits(greedy))
                print(f"  trained f32{words}: KL {kl:.1e}, {apart:.1e} apart", flush=True)
            lora, _ = ours.export(adapter, "gguf-lora")
            over = LlamaCpp(whole, lora).logits(greedy)
            kl, apart = divergence(trained, over)
            print(f"  gguf-lora over f32{words}: KL {kl:.1e}, {apart:.1e} apart; the base alone is KL {moved:.1e} away")
            if base.is_file():
                kl, apart = divergence(trained, LlamaCpp(base, lora).logits(greedy))
                alone, _ = divergence(logits, LlamaCpp(base).logits(greedy))
                print(f"  gguf-lora over the very base{words}: KL {kl:.1e}, {apart:.1e} apart; llama.cpp's own base is KL {alone:.1e} from ours", flush=True)
        except Exception as problem:
            print(f"  gguf-lora{words}: {words_of(problem)}", flush=True)


LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
CASED = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+%s|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*%s|"
REST = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SHORT = "(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
# What cuts a text into words, and whether words that are pieces are taken whole: GPT-2, SmolLM, Qwen2, Llama 3, Phi-4, Mistral Nemo, Phi-4-mini.
WORDS = {
    "gpt-2": (None, False),
    "smollm": ("digits", False),
    "qwen2": (LLAMA3.replace("{1,3}", ""), False),
    "llama-bpe": (LLAMA3, True),
    "dbrx": (LLAMA3, False),
    "tekken": (CASED % ("", "") + r"\p{N}" + REST, True),
    "gpt-4o": (CASED % (SHORT, SHORT) + r"\p{N}{1,3}" + REST, False),
}


def byte_level(words, ignore_merges):
    """tokenizer.json of tests/fixtures/tokenizers/byte_level with other words."""
    json_file = json.loads((FIXTURES / "tokenizers/byte_level/tokenizer.json").read_text())
    bytes_of = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": words in (None, "digits")}
    steps = [bytes_of]
    if words == "digits":
        steps = [{"type": "Digits", "individual_digits": True}, bytes_of]
    elif words:
        # Those of OpenAI's vocabularies are mostly published in the second way.
        kept = dict(behavior="Isolated", invert=False) if ignore_merges else dict(behavior="Removed", invert=True)
        steps = [{"type": "Split", "pattern": {"Regex": words}, **kept}, bytes_of]
    json_file["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": steps}
    json_file["model"]["ignore_merges"] = ignore_merges
    json_file["post_processor"] = json_file["normalizer"] = None
    return json_file, {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}


def sentencepiece(prefix):
    """tokenizer.json of tests/fixtures/tokenizers/sentencepiece.gguf, as transformers makes Llama 2's."""
    fields = gguf.GGUFReader(FIXTURES / "tokenizers/sentencepiece.gguf").fields
    tokens, scores, types = (fields[f"tokenizer.ggml.{key}"].contents() for key in ("tokens", "scores", "token_type"))
    vocab = {token: id for id, token in enumerate(tokens)}
    made = {token for token, kind in zip(tokens, types) if kind not in (2, 3, 6)}
    merges = []
    for token in made:
        pairs = [(token[:n], token[n:]) for n in range(1, len(token)) if token[:n] in made and token[n:] in made]
        pairs.sort(key=lambda pair: (vocab[pair[0]], vocab[pair[1]]))
        merges += [(scores[vocab[token]], pair) for pair in pairs]
    merges.sort(key=lambda merge: (-merge[0], -len(merge[1][0]), -len(merge[1][1])))
    steps = [{"type": "Prepend", "prepend": "▁"}] if prefix else []
    steps.append({"type": "Replace", "pattern": {"String": " "}, "content": "▁"})
    flags = dict(single_word=False, lstrip=False, rstrip=False, normalized=False)
    added = [dict(id=id, content=token, special=types[id] != 4, **flags) for id, token in enumerate(tokens) if types[id] in (2, 3, 4)]
    decoders = [{"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"}, {"type": "Fuse"}]
    model = dict(type="BPE", dropout=None, unk_token="<unk>", continuing_subword_prefix=None, end_of_word_suffix=None, fuse_unk=True, byte_fallback=True)
    model |= dict(ignore_merges=False, vocab=vocab, merges=[" ".join(pair) for _, pair in merges])
    json_file = dict(version="1.0", truncation=None, padding=None, added_tokens=added, normalizer={"type": "Sequence", "normalizers": steps})
    json_file |= dict(pre_tokenizer=None, post_processor=None, decoder={"type": "Sequence", "decoders": decoders}, model=model)
    return json_file, {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


def check_tokenizer(ours, name, tokenizer, named):
    """A model of random numbers with a tokenizer, whose texts are tokens in llama.cpp as here."""
    directory, source = ours.home / "model", FIXTURES / "models/llama"
    directory.mkdir()
    config = json.loads((source / "config.json").read_text())
    config["vocab_size"] = max(*tokenizer["model"]["vocab"].values(), *(token["id"] for token in tokenizer["added_tokens"])) + 4
    header, blobs, at = {}, [], 0
    for tensor, values in tensors(source / "model.safetensors"):
        if tensor in ("model.embed_tokens.weight", "lm_head.weight"):
            values = np.random.default_rng(5).standard_normal((config["vocab_size"], values.shape[1]), dtype=np.float32)
        header[tensor] = dict(dtype="F32", shape=list(values.shape), data_offsets=[at, at + values.nbytes])
        blobs.append(values.tobytes())
        at += values.nbytes
    text = json.dumps(header).encode()
    (directory / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + b"".join(blobs))
    for file, content in {"config.json": config, "tokenizer.json": tokenizer, "tokenizer_config.json": named}.items():
        (directory / file).write_text(json.dumps(content))
    path, _ = ours.export(directory, "gguf", "f32")
    theirs = LlamaCpp(path)
    texts = TEXTS + json.loads((FIXTURES / "tokenizers/expected.json").read_text())["rows"]
    own = ours.tokens(directory, texts)
    wrong = [text for text, ids in zip(texts, own) if theirs.tokens(text) != ids]
    try:
        back = f"{sum(a == b for a, b in zip(ours.tokens(path, texts), own))} read back by us"
    except RuntimeError as problem:
        back = f"not read by us: {words_of(problem)}"
    said = gguf.GGUFReader(path).fields["tokenizer.ggml.pre"].contents()
    print(f"tokenizer {name}, written as {said}: {len(texts) - len(wrong)} of {len(texts)} texts alike {wrong[:6] or ''}, {back}", flush=True)


def check_mix(ours, source, layers, tied):
    """A model of random numbers whose rows are whole blocks of 256: all types as llama.cpp's quantiser makes them."""
    directory, random = ours.home / "model", np.random.default_rng(9)
    shutil.copytree(source, directory)
    config = json.loads((directory / "config.json").read_text())
    hidden, inner, heads, kv_heads, head_dim = 256, 512, 8, 2, 32
    config |= dict(hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=kv_heads)
    config |= dict(head_dim=head_dim, tie_word_embeddings=tied)
    config["layer_types"] = None
    (directory / "config.json").write_text(json.dumps(config))
    shapes = {"model.embed_tokens.weight": (config["vocab_size"], hidden), "model.norm.weight": (hidden,)}
    if not tied:
        shapes["lm_head.weight"] = (config["vocab_size"], hidden)
    q, kv = heads * head_dim, kv_heads * head_dim
    split = {"q_proj": (q, hidden), "k_proj": (kv, hidden), "v_proj": (kv, hidden)}
    attention = {"qkv_proj": (q + 2 * kv, hidden)} if config["model_type"] == "phi3" else split
    mlp = {"gate_up_proj": (2 * inner, hidden)} if config["model_type"] == "phi3" else {"gate_proj": (inner, hidden), "up_proj": (inner, hidden)}
    for layer in range(layers):
        place = f"model.layers.{layer}."
        shapes |= {f"{place}self_attn.{name}.weight": shape for name, shape in {**attention, "o_proj": (hidden, q)}.items()}
        if config["model_type"] == "qwen2":
            shapes |= {f"{place}self_attn.{name}.bias": shape[:1] for name, shape in split.items()}
        shapes |= {f"{place}mlp.{name}.weight": shape for name, shape in {**mlp, "down_proj": (hidden, inner)}.items()}
        shapes |= {f"{place}{name}.weight": (hidden,) for name in ("input_layernorm", "post_attention_layernorm")}
    header, at = {}, 0
    for name, shape in shapes.items():
        header[name] = dict(dtype="F32", shape=list(shape), data_offsets=[at, at + 4 * int(np.prod(shape))])
        at += 4 * int(np.prod(shape))
    text = json.dumps(header).encode()
    with open(directory / "model.safetensors", "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name, shape in shapes.items():
            file.write((random.standard_normal(shape, dtype=np.float32) * np.float32(0.05) + ("norm" in name)).astype(np.float32).tobytes())
    whole, _ = ours.export(directory, "gguf", "f32")
    print(f"{layers} layers of {config['model_type']}{', tied' if tied else ''}, {at >> 20} MiB", flush=True)
    for kind in TYPES:
        path, _ = ours.export(directory, "gguf", kind)
        other = ours.home / f"theirs-{kind}.gguf"
        start = time.perf_counter()
        assert quantized_by_llama_cpp(whole, other, kind)
        seconds = time.perf_counter() - start
        wrong, count = differing(path, other)
        stored = Counter(tensor.tensor_type.name for tensor in gguf.GGUFReader(path).tensors if len(tensor.shape) > 1)
        print(f"  {kind}: {count - len(wrong)} of {count} tensors as llama.cpp's quantiser makes them {wrong[:3] or ''} ({dict(stored)}; theirs took {seconds:.1f} s)", flush=True)
        path.unlink(), other.unlink()


def without(directory, copy):
    """A copy of a model without what llama.cpp leaves out of account or computes otherwise: windows of Mistral and Phi, and by what a Gemma
    scales its scores where that is not the width of its heads; None where it has none."""
    config = json.loads((directory / "config.json").read_text())
    changed = {"sliding_window": None} if config["model_type"] in ("mistral", "phi3") else {}
    part = config.get("text_config", config)
    if "query_pre_attn_scalar" in part:
        changed["query_pre_attn_scalar"] = part["head_dim"]
    if all(part.get(key) == value for key, value in changed.items()):
        return None
    copy.mkdir()
    for file in directory.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    part.update(changed)
    (copy / "config.json").write_text(json.dumps(config))
    return copy, changed


parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--homeroom", required=True, type=Path)
parser.add_argument("--examples", required=True, type=Path)
parser.add_argument("--model", type=Path, action="append", default=[])
parser.add_argument("--quick", action="store_true", help="of the types q8_0 alone")
parser.add_argument("names", nargs="*")
arguments = parser.parse_args()
# Kept, as llama.cpp calls it for as long as it runs.
SILENT = llama_cpp.llama_log_callback(lambda *_: None)
llama_cpp.llama_log_set(SILENT, None)
bases = list(arguments.model)
if not bases:
    for directory in sorted((FIXTURES / "models").iterdir()):
        if not arguments.names or directory.name in arguments.names:
            bases += [directory] if any(directory.glob("model*.safetensors")) else []
            bases += [file for file in sorted(directory.glob("*.gguf")) if "-of-" not in file.name]
failed = 0
if not arguments.names and not arguments.model or arguments.names == ["tokenizers"]:
    kinds = {name: byte_level(*words) for name, words in WORDS.items()}
    kinds |= {"SentencePiece": sentencepiece(True), "SentencePiece without a space before": sentencepiece(False)}
    for name, (tokenizer, named) in kinds.items():
        with tempfile.TemporaryDirectory() as home:
            try:
                check_tokenizer(Ours(arguments, Path(home)), name, tokenizer, named)
            except Exception as problem:
                failed += 1
                print(f"tokenizer {name}: {words_of(problem)}", flush=True)
MIXES = [("llama", 80, False), ("qwen2", 80, False), ("phi3", 10, False), ("llama", 13, True)]
if not arguments.names and not arguments.model or arguments.names == ["mixes"]:
    for name, layers, tied in MIXES:
        with tempfile.TemporaryDirectory() as home:
            check_mix(Ours(arguments, Path(home)), FIXTURES / "models" / name, layers, tied)
for base in bases:
    print(f"{base.parent.name}/{base.name}", flush=True)
    with tempfile.TemporaryDirectory() as home, tempfile.TemporaryDirectory() as other:
        other = without(base, Path(other) / "model") if (base / "config.json").exists() else None
        for model, changed in [(base, None), *([other] if other else [])]:
            if changed:
                print(f"{base.parent.name}/{base.name} with {changed}", flush=True)
            try:
                check(Ours(arguments, Path(home)), model.resolve(), arguments.quick, 27)
            except Exception as problem:
                failed += 1
                print(f"  {words_of(problem)}", flush=True)
sys.exit(failed > 0)
