"""Makes a Hugging Face directory (f32 safetensors) of a Llama GGUF with a GPT-2 style tokenizer.

The weights are the dequantised ones, so that transformers and Homeroom can start from exactly the
same numbers, from the GGUF file or from the directory.

Run: python smollm2_hf.py --gguf SmolLM2-135M-Instruct.Q4_1.gguf --out DIR
"""

import argparse
import json
from pathlib import Path

import common

import gguf
import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, PreTrainedTokenizerFast

MODULES = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
TOP = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}


def hf_name(name: str) -> str:
    if name in TOP:
        return TOP[name]
    _, layer, module, kind = name.split(".")
    return f"model.layers.{layer}.{MODULES[module]}.{kind}"


def halves(value: np.ndarray, heads: int) -> np.ndarray:
    """Rows of q or k from llama.cpp's order (pairs 2i, 2i + 1 rotate) to transformers' (halves)."""
    out = []
    for head in np.split(value, heads):  # (head_dim, d_in)
        out += [head[0::2], head[1::2]]
    return np.concatenate(out)


def make_tokenizer(read) -> PreTrainedTokenizerFast:
    tokens, kinds = read("tokenizer.ggml.tokens"), read("tokenizer.ggml.token_type")
    assert read("tokenizer.ggml.model") == "gpt2"
    vocab = {token: i for i, token in enumerate(tokens)}
    merges = [tuple(merge.split(" ")) for merge in read("tokenizer.ggml.merges")]
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    gpt2 = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    match read("tokenizer.ggml.pre"):
        case "smollm":  # each digit is a token of its own
            digits = pre_tokenizers.Digits(individual_digits=True)
            tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, gpt2])
        case "gpt-2":
            tokenizer.pre_tokenizer = gpt2
        case other:
            raise SystemExit(f"error: tokenizer.ggml.pre is {other}, known are smollm and gpt-2")
    tokenizer.decoder = decoders.ByteLevel()
    control = [t for t, kind in zip(tokens, kinds) if kind == gguf.TokenType.CONTROL]
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in control])
    assert tokenizer.get_vocab_size() == len(tokens)
    special = {}
    for key, name in [("bos", "bos"), ("eos", "eos"), ("unknown", "unk"), ("padding", "pad")]:
        special[f"{name}_token"] = tokens[read(f"tokenizer.ggml.{key}_token_id")]
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        clean_up_tokenization_spaces=False,
        model_max_length=read("llama.context_length"),
        chat_template=read("tokenizer.chat_template"),
        **special,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gguf", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--check", action="store_true", help="against transformers' reader too")
    args = parser.parse_args()
    common.torch_ready(1)
    reader = gguf.GGUFReader(args.gguf)

    def read(key: str):
        return reader.fields[key].contents()

    assert read("general.architecture") == "llama"
    heads, kv_heads = read("llama.attention.head_count"), read("llama.attention.head_count_kv")
    weights = {}
    for tensor in reader.tensors:
        value = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        value = value.reshape([int(n) for n in reversed(tensor.shape)])
        if tensor.name.endswith("attn_q.weight"):
            value = halves(value, heads)
        elif tensor.name.endswith("attn_k.weight"):
            value = halves(value, kv_heads)
        weights[hf_name(tensor.name)] = torch.from_numpy(np.ascontiguousarray(value))

    config = LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=len(read("tokenizer.ggml.tokens")),
        hidden_size=read("llama.embedding_length"),
        intermediate_size=read("llama.feed_forward_length"),
        num_hidden_layers=read("llama.block_count"),
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=read("llama.context_length"),
        # GGUF holds an f32; config.json has the decimal number it came from.
        rms_norm_eps=float(f"{read('llama.attention.layer_norm_rms_epsilon'):.6g}"),
        rope_parameters={"rope_type": "default", "rope_theta": read("llama.rope.freq_base")},
        tie_word_embeddings="lm_head.weight" not in weights,
        bos_token_id=read("tokenizer.ggml.bos_token_id"),
        eos_token_id=read("tokenizer.ggml.eos_token_id"),
        pad_token_id=read("tokenizer.ggml.padding_token_id"),
        dtype="float32",
    )
    args.out.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(args.out)
    ends = {k: getattr(config, k) for k in ("bos_token_id", "eos_token_id", "pad_token_id")}
    (args.out / "generation_config.json").write_text(json.dumps(ends, indent=2) + "\n")
    make_tokenizer(read).save_pretrained(args.out)
    save_file(weights, args.out / "model.safetensors", metadata={"format": "pt"})
    (args.out / "model.safetensors").chmod(0o644)
    total = sum(v.numel() for v in weights.values())
    print(f"{args.out}   {len(weights)} tensors, {total / 1e6:.1f} M parameters")

    tokenizer, model = common.load_tokenizer(args.out), common.load_base(args.out)
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    ids = torch.tensor([tokenizer.encode(text, add_special_tokens=False)])
    answer = model.generate(ids, max_new_tokens=32, do_sample=False)[0, ids.shape[1] :]
    print(f"{messages[0]['content']} {tokenizer.decode(answer)}")

    if args.check:
        from transformers import AutoModelForCausalLM

        theirs = AutoModelForCausalLM.from_pretrained(
            args.gguf.parent,
            gguf_file=args.gguf.name,
            dtype=torch.float32,
            attn_implementation="eager",
        ).eval()
        with torch.no_grad():
            apart = (model(ids).logits - theirs(ids).logits).abs().max().item()
        common.verdict("logits against transformers' GGUF reader differ by", apart, 1e-3)


if __name__ == "__main__":
    main()
