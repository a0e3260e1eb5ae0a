"""Runs `homeroom bench prefill` and `bench decode` beside llama.cpp and mistral.rs on the same GGUF files and threads.

Each measurement is a process of its own; variants take turns, and figures are medians over the rounds.

- Homeroom and llama.cpp read and draw without sampling: a prompt of 512 random tokens in one batch, logits of the last alone; then
  64 tokens, one at a time, after a prompt of 32. What is timed in llama.cpp is `llama_decode`, with the parameters that it has by
  default. `decode-4` draws for four chats at once.
- mistral.rs is timed by itself (`Usage`), which counts its scheduling and its greedy sampling too. Its prompts are random words that
  are a token each. It reads once a round, since it takes long, and is left out of `decode-4`.

With `--no-extra-buffers` llama.cpp multiplies weights as they lie in the file: where its own AMX path ends by an illegal instruction, that
is what runs. With `--isa avx2` Homeroom is held to AVX2, and llama.cpp is to be built for it. No table is printed of a machine that was disturbed.

Run: python bench_generate.py --model FILE.gguf ... [--homeroom BIN] [--only prefill,decode] [--peers llama.cpp] [--json FILE]
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import common
import machine

TOKENS, PROMPT, DRAWN, RUNS, CHATS = 512, 32, 64, 5, 4
READ = ["prefill", "--tokens", TOKENS, "--runs", RUNS]
DRAW = ["decode", "--prompt", PROMPT, "--tokens", DRAWN]
# What is measured: options of `homeroom bench` for each variant of ours.
MEASURES = {
    "prefill": {"auto": READ, "f32": [*READ, "--compute", "f32"]},
    "decode": {"auto": DRAW},
    "decode-4": {"auto": [*DRAW, "--chats", CHATS]},
}
PEERS = {"llama.cpp": "llama_cpp_python", "mistral.rs": "mistralrs"}


def peak_memory_bytes() -> int:
    with open("/proc/self/status", encoding="utf-8") as file:
        [line] = [line for line in file if line.startswith("VmHWM:")]
    return int(line.split()[1]) * 1024


# --- the peers, each in a process of its own --------------------------------------------------


def llama_cpp(args) -> dict:
    import llama_cpp as api

    api.llama_backend_init()
    how = api.llama_model_default_params()
    how.use_extra_bufts = not args.no_extra_buffers
    model = api.llama_model_load_from_file(str(args.model[0]).encode(), how)
    if not model:
        raise SystemExit(f"error: {args.model[0]}: llama.cpp does not load it")
    chats = CHATS if args.only == "decode-4" else 1
    options = api.llama_context_default_params()
    options.n_ctx, options.n_seq_max = 2 * TOKENS * chats, chats
    options.n_batch = options.n_ubatch = TOKENS
    options.n_threads = options.n_threads_batch = args.threads
    context = api.llama_init_from_model(model, options)
    vocabulary = api.llama_vocab_n_tokens(api.llama_model_get_vocab(model))
    draw = random.Random(42)
    batch = api.llama_batch_init(TOKENS, 0, 1)

    def run(places: list[tuple[int, int]], wanted: int) -> float:
        """Seconds for a random token at each (chat, position), with logits of the last `wanted`."""
        batch.n_tokens = len(places)
        for i, (chat, position) in enumerate(places):
            batch.token[i], batch.pos[i] = draw.randrange(vocabulary), position
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, chat
            batch.logits[i] = i >= len(places) - wanted
        start = time.perf_counter()
        code = api.llama_decode(context, batch)
        api.llama_synchronize(context)
        seconds = time.perf_counter() - start
        if code:
            raise SystemExit(f"error: llama_decode ended with {code}")
        return seconds

    seconds = []
    if args.only == "prefill":
        for _ in range(RUNS + 1):
            api.llama_memory_clear(api.llama_get_memory(context), True)
            seconds.append(run([(0, position) for position in range(TOKENS)], 1))
        tokens = TOKENS
    else:
        for chat in range(chats):
            run([(chat, position) for position in range(PROMPT)], 1)
        for position in range(PROMPT, PROMPT + DRAWN + 1):
            seconds.append(run([(chat, position) for chat in range(chats)], chats))
        tokens = chats
    return {
        "tokens_per_second": tokens / statistics.median(seconds[1:]),
        "seconds": seconds[1:],
        "peak_memory_bytes": peak_memory_bytes(),
        "system": api.llama_print_system_info().decode(),
    }


def mistral_rs(args) -> dict:
    import gguf
    import mistralrs

    path = args.model[0]
    tokens = gguf.GGUFReader(path).fields["tokenizer.ggml.tokens"].contents()
    words = [token[1:] for token in tokens if token[:1] in ("Ġ", "▁") and token[1:].isascii() and token[1:].islower()]
    words = [word for word in words if word.isalpha()]
    draw = random.Random(42)
    which = mistralrs.Which.GGUF(quantized_model_id=str(path.parent), quantized_filename=path.name)
    runner = mistralrs.Runner(which=which, max_seqs=1, prefix_cache_n=0, token_source="none")

    def usage(prompt: int, answer: int):
        text = "".join(" " + draw.choice(words) for _ in range(prompt))
        request = mistralrs.CompletionRequest(prompt=text, model="default", max_tokens=answer, temperature=0.0, ignore_eos=True)
        return runner.send_completion_request(request).usage

    usage(PROMPT, 8)
    if args.only == "prefill":
        runs = [usage(TOKENS, 1)]
        rates = [run.prompt_tokens / run.total_prompt_time_sec for run in runs]
    else:  # the first token comes with the prompt
        runs = [usage(PROMPT, DRAWN + 1) for _ in range(3)]
        rates = [(run.completion_tokens - 1) / run.total_completion_time_sec for run in runs]
    return {
        "tokens_per_second": statistics.median(rates),
        "tokens": [(run.prompt_tokens, run.completion_tokens) for run in runs],
        "peak_memory_bytes": peak_memory_bytes(),
    }


# --- rounds -----------------------------------------------------------------------------------


def figures(command: list) -> dict:
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        told = [line for line in done.stderr.strip().splitlines() if "rror" in line] or done.stderr.strip().splitlines()
        raise RuntimeError((told or [f"ended with {done.returncode}"])[-1])
    return common.last_json(done.stdout)


def rounds(args, model: Path, measure: str, broken: list[str]) -> dict[str, list[dict]]:
    """Runs of each variant by its name; one that fails is told and left out."""
    commands = {}
    for variant, options in MEASURES[measure].items():
        commands[variant] = [args.homeroom, "bench", *options, "--model-dir", model, "--json", *args.homeroom_args]
    for peer in args.peers:
        if (measure, peer) != ("decode-4", "mistral.rs"):
            command = [sys.executable, __file__, "--peer", peer, "--model", model, "--only", measure]
            command += ["--no-extra-buffers"] if args.no_extra_buffers else []
            commands[peer] = [*command, "--threads", args.threads]
    runs = {name: [] for name in commands}
    for _ in range(args.rounds):
        for name in list(runs):
            try:
                runs[name].append(figures(commands[name]))
            except RuntimeError as error:
                broken.append(f"{model.name}: {measure}, {name}: {error}")
                del runs[name]
                continue
            speed = runs[name][-1]["tokens_per_second"]
            print(f"{model.name:36} {measure:9} {name:10} {speed:8.1f} tokens/s", file=sys.stderr, flush=True)
    return runs


def row(args, model: Path, measure: str, variant: str, runs: dict[str, list[dict]]) -> str:
    speeds = {name: [run["tokens_per_second"] for run in found] for name, found in runs.items()}
    what = measure if variant == "auto" else f"{measure}, {variant}"
    mine = speeds.get(variant)
    cells = [model.name.removesuffix(".gguf"), what, f"{statistics.median(mine):.1f}" if mine else "–"]
    for peer in args.peers:
        theirs = speeds.get(peer)
        cells.append(f"{statistics.median(theirs):.1f}" if theirs else "–")
        if mine and theirs:
            each = [a / b for a, b in zip(mine, theirs)]
            ratio = statistics.median(mine) / statistics.median(theirs)
            cells.append(f"{ratio:.2f} ({min(each):.2f} to {max(each):.2f})")
        else:
            cells.append("–")
    return "| " + " | ".join(cells) + " |"


def names(text: str, known, parser, what: str) -> list[str]:
    found = text.split(",") if text else []
    if unknown := set(found) - set(known):
        parser.error(f"unknown {what}: {', '.join(sorted(unknown))}; known are {', '.join(known)}")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, nargs="+", required=True, help="GGUF files, see gguf_files.py")
    parser.add_argument("--homeroom", default="target/release/homeroom", help="the binary")
    parser.add_argument("--only", default=",".join(MEASURES), help="measures, separated by commas: " + ", ".join(MEASURES))
    parser.add_argument("--peers", default=",".join(PEERS), help="peers, separated by commas: " + ", ".join(PEERS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2, help="threads of every side")
    machine.add_options(parser)
    parser.add_argument("--json", type=Path, help="file for all figures")
    parser.add_argument("--no-extra-buffers", action="store_true", help="llama.cpp repacks no weights")
    parser.add_argument("--peer", choices=PEERS, help=argparse.SUPPRESS)
    parser.add_argument("homeroom_args", nargs="*", help="after `--`: further options for Homeroom")
    args = parser.parse_args()
    machine.hold(args.isa)
    os.environ["RAYON_NUM_THREADS"] = str(args.threads)  # Homeroom's threads and mistral.rs's
    if args.peer:
        print(json.dumps(llama_cpp(args) if args.peer == "llama.cpp" else mistral_rs(args)))
        return
    args.peers = names(args.peers, PEERS, parser, "peers")
    measures = names(args.only, MEASURES, parser, "measures")
    record, rows, broken, noise = {}, [], [], []
    for model in args.model:
        for measure in measures:
            runs = rounds(args, model, measure, broken)
            noise += [f"{model.name}, {measure}: {why}" for why in map(machine.disturbed, runs.values()) if why]
            systems = {run["system"] for found in runs.values() for run in found if "system" in run}
            broken += [why for why in (machine.foreign(system, args.isa) for system in systems) if why and why not in broken]
            record.setdefault(model.name, {})[measure] = runs
            rows += [row(args, model, measure, variant, runs) for variant in MEASURES[measure]]
            if args.json:
                args.json.write_text(json.dumps(record), encoding="utf-8")
    heads = [f"{peer} ({PEERS[peer]} {version(PEERS[peer])}) | ratio" for peer in args.peers]
    machine.refuse(noise)
    print(machine.heading(args.threads, args.rounds, args.isa))
    print("tokens/s; ratio: Homeroom to the peer (least to most of a round)\n")
    print("| " + " | ".join(["file", "measure", "Homeroom", *heads]) + " |")
    print("|---|---|" + "--:|" * (1 + 2 * len(args.peers)))
    print("\n".join(rows))
    for line in broken:
        print("BROKEN", line)
    sys.exit(1 if broken else 0)


if __name__ == "__main__":
    main()
