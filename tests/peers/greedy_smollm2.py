"""Compares greedy answers of the base model: transformers against `homeroom chat`.

Run: python greedy_smollm2.py --model D --homeroom BIN
"""

import argparse
import os

import common

PROMPTS = [
    "What is the capital of France?",
    "Write two sentences about the sea.",
    "What is 7 times 8?",
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    common.add_options(parser)
    parser.add_argument("--prompt", action="append", help="default: three of them")
    parser.add_argument("--tokens", type=int, default=64)
    args = parser.parse_args()
    common.torch_ready(args.threads)
    import torch

    tokenizer, model = common.load_tokenizer(args.model), common.load_base(args.model)
    different = 0
    for prompt in args.prompt or PROMPTS:
        messages = [{"role": "user", "content": prompt}]
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        ids, margin = tokenizer.encode(text, add_special_tokens=False), float("inf")
        start, past, given = len(ids), None, ids
        with torch.no_grad():
            for _ in range(args.tokens):
                out = model(torch.tensor([given]), past_key_values=past, use_cache=True)
                top, past = out.logits[0, -1].topk(2), out.past_key_values
                margin = min(margin, (top.values[0] - top.values[1]).item())
                given = [top.indices[0].item()]
                if given[0] == tokenizer.eos_token_id:
                    break
                ids += given
        theirs = tokenizer.decode(ids[start:], skip_special_tokens=True).strip()
        print(f"prompt        {prompt}")
        print(f"transformers  {theirs!r}")
        print(f"              {len(ids) - start} tokens, smallest margin of logits {margin:.4f}")
        if args.homeroom:
            command = [args.homeroom, "chat", "--model-dir", args.model, "--prompt", prompt]
            command += ["--temperature", 0, "--max-tokens", args.tokens]
            ours = common.run(command + args.homeroom_args).strip()
            same = len(os.path.commonprefix([ours, theirs]))
            print(f"homeroom      {ours!r}")
            if ours != theirs:
                different += 1
                print(f"              differs from character {same} on")
    if not args.homeroom:
        print("no --homeroom: only transformers was run")
        return
    common.verdict("answers that differ:", different, 0)


if __name__ == "__main__":
    main()
