"""A class beside llama.cpp's server: how long pupils wait, and tokens a second, for 1, 4, 16 and 30 who ask at once.

Both sides serve the same GGUF file over OpenAI's API on the same threads, by turns, and draw 48 tokens an answer without sampling, of
questions that all differ. Homeroom does so three ways: the base alone, as llama.cpp does, and with three tutors, adapters of that base, of
which each pupil asks one. llama.cpp has as many slots as pupils; its server is the one of `xllamacpp`, in a process of its own.

Run: python class_beside.py --homeroom BIN --model FILE.gguf [--clients 1,4,16,30] [--rounds 2] [--threads 2]   (pip install xllamacpp)
"""

import argparse
import http.client
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import machine
from serving import serve

TOKENS = 48
TOPICS = "water iron gold the moon rain trees bees salt glass ice wind fire sand milk bread".split(" ")
TUTORS = ("geo", "bio", "chem")


def question(pupil: int, round_: int) -> str:
    return f"I am pupil {pupil} of round {round_}. Please tell me, in some sentences for a child, how {TOPICS[pupil % len(TOPICS)]} and {TOPICS[(pupil * 7 + round_) % len(TOPICS)]} belong together."


def ask(url: str, model: str, text: str) -> tuple[float, float, int]:
    """Seconds to the first token and to the end, and tokens."""
    host = url.split("/")[2]
    connection = http.client.HTTPConnection(host, timeout=600)
    body = {
        "model": model, "messages": [{"role": "user", "content": text}], "max_tokens": TOKENS, "temperature": 0,
        "stream": True, "stream_options": {"include_usage": True},
    }  # fmt: skip
    start = time.perf_counter()
    connection.request("POST", "/v1/chat/completions", json.dumps(body), {"content-type": "application/json"})
    reply = connection.getresponse()
    if reply.status != 200:
        raise SystemExit(f"error: {url}: {reply.status}: {reply.read()[:300]!r}")
    first, tokens = None, 0
    for line in reply:
        if not line.startswith(b"data: {"):
            continue
        event = json.loads(line[6:])
        if first is None and any(choice["delta"].get("content") for choice in event.get("choices", [])):
            first = time.perf_counter() - start
        if event.get("usage"):
            tokens = event["usage"]["completion_tokens"]
    end = time.perf_counter() - start
    return first if first is not None else end, end, tokens


def class_of(url: str, models: list[str], pupils: int, round_: int) -> dict:
    answers: list = [None] * pupils

    def pupil(i: int) -> None:
        answers[i] = ask(url, models[i % len(models)], question(i, round_))

    threads = [threading.Thread(target=pupil, args=[i]) for i in range(pupils)]
    start = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seconds = time.perf_counter() - start
    if None in answers:
        raise SystemExit("error: a pupil got no answer")
    first, whole, tokens = zip(*answers)
    return {"first": list(first), "whole": list(whole), "rate": sum(tokens) / seconds}


def llama_server(model: str, slots: int, threads: int) -> None:
    """The side of llama.cpp: prints its address and serves until its input ends."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = model
    params.n_parallel = slots
    params.n_ctx = 512 * slots
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    params.port = 0
    server = xllamacpp.Server(params)
    print(server.listening_address, flush=True)
    sys.stdin.read()
    os._exit(0)


class Llama:
    def __init__(self, args, slots: int):
        command = [sys.executable, __file__, "--side", str(slots), "--model", args.model, "--threads", str(args.threads)]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        self.url = self.process.stdout.readline().strip()
        if not self.url:
            raise SystemExit("error: llama.cpp's server did not start")

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def percentile(values: list[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def trained(homeroom: str, model: str, home: Path) -> None:
    """Three adapters of the base, of a few steps each."""
    rows = home / "rows.jsonl"
    for at, tutor in enumerate(TUTORS):
        with open(rows, "w", encoding="utf-8") as file:
            for i in range(16):
                row = {"prompt": f"{tutor} {i}?", "completion": f"As a tutor of {tutor}, I say {TOPICS[(i + at) % 16]}."}
                file.write(json.dumps(row) + "\n")
        command = [homeroom, "fine-tune", "--model-name", model, "--training-file", rows, "--name", tutor, "--max-steps", "3"]
        subprocess.run(command, check=True, stderr=subprocess.DEVNULL, env={**os.environ, "HOMEROOM_HOME": str(home)})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--homeroom")
    parser.add_argument("--model", required=True)
    parser.add_argument("--clients", default="1,4,16,30")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--side", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        return llama_server(args.model, args.side, args.threads)
    os.environ["RAYON_NUM_THREADS"] = str(args.threads)
    counts = [int(count) for count in args.clients.split(",")]
    results: dict = {}
    with tempfile.TemporaryDirectory() as home:
        trained(args.homeroom, args.model, Path(home))
        os.environ["HOMEROOM_HOME"] = home
        config = Path(home, "handlers.toml")
        lines = [f'[handlers.{name}]\nkind = "local"\nmodel = "{name}"\n' for name in TUTORS]
        lines.append(f'[handlers.base]\nkind = "local"\nmodel = "{Path(args.model).resolve()}"\n')
        config.write_text("\n".join(lines))
        with serve(args.homeroom, "--config", config) as (url, _):
            for pupils in counts:
                sides = {"Homeroom": (url, ["base"]), "three tutors": (url, list(TUTORS))}
                llama = Llama(args, pupils)
                sides["llama.cpp"] = (llama.url, ["m"])
                for side, (address, models) in sides.items():
                    ask(address, models[0], "Hello")
                for round_ in range(args.rounds):
                    for side, (address, models) in sides.items():
                        got = class_of(address, models, pupils, round_ * 100 + pupils)
                        mine = results.setdefault((pupils, side), {"first": [], "whole": [], "rate": []})
                        mine["first"] += got["first"]
                        mine["whole"] += got["whole"]
                        mine["rate"].append(got["rate"])
                llama.close()
    print(machine.heading(args.threads, args.rounds, None))
    print("pupils  side           tokens/s  ratio   first token p50/p95/p99      whole answer p50/p95/p99")
    for (pupils, side), got in results.items():
        rate = statistics.median(got["rate"])
        ratio = rate / statistics.median(results[pupils, "llama.cpp"]["rate"])
        times = ["/".join(f"{percentile(got[what], share):.2f}" for share in (0.5, 0.95, 0.99)) for what in ("first", "whole")]
        print(f"{pupils:6}  {side:13} {rate:9.1f}  {ratio:5.2f}   {times[0]:>20} s   {times[1]:>22} s")


if __name__ == "__main__":
    main()
