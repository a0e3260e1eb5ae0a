"""Adapters of one base that are swapped a thousand times while `homeroom serve` answers with them: no request is lost, none is answered by a
mixture, and memory does not grow.

Two small adapters are trained. The name `tutor` is given to the one and to the other by turns, by `homeroom cp --overwrite`, while clients ask
`tutor`, a name that stays, and the base. Each answer has to be, whole, one that an adapter gave alone, with the fingerprint of that adapter; and the
newer one's, if the question came after the swap.

Run: python adapter_swaps.py --homeroom target/release/homeroom [--model DIR] [--swaps 1000] [--clients 8]      (needs no package)
"""

import argparse
import http.client
import json
import os
import random
import re
import subprocess
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

import machine
from serving import check, serve_process, verdict

ROOT = Path(__file__).resolve().parents[2]
POCKET = ROOT / "runtime/pocket/model"
#: After so many swaps memory is looked at first, with nobody asking for so many seconds: a thread that has nothing to do ends after ten, and gives back
#: what it freed.
WARM, REST = 100, 13
#: Most that it may be larger after the last one.
GROWTH_MAX = 0.02
WORDS = "water iron gold moon rain tree bee salt glass ice wind fire".split()


def trained(homeroom: str, model: Path, home: Path, name: str, ending: str) -> None:
    """An adapter that answers in its own way."""
    rows = home / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": f"Spell {word}.", "completion": f"{word}{ending}"}) + "\n" for word in WORDS * 4))
    command = [homeroom, "fine-tune", "--model-name", model, "--training-file", rows, "--name", name, "--max-steps", "20", "--learning-rate", "5e-3"]
    subprocess.run(command, check=True, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)


class Asked:
    """What is served, asked by a connection a question."""

    def __init__(self, address: tuple, eos: list[int]):
        self.address, self.eos = address, eos

    def ask(self, model: str, word: str, long: bool) -> tuple[str, str, str]:
        """Text, reason and fingerprint. A long answer has no end, so that it is under way when a name is given away."""
        body = {"model": model, "messages": [{"role": "user", "content": f"Spell {word}."}], "temperature": 0, "stream": long}
        body |= {"max_tokens": 120, "logit_bias": {str(token): -100 for token in self.eos}} if long else {"max_tokens": 24}
        connection = http.client.HTTPConnection(*self.address, timeout=300)
        connection.request("POST", "/v1/chat/completions", json.dumps(body), {"content-type": "application/json", "connection": "close"})
        reply = connection.getresponse()
        text = reply.read().decode()
        connection.close()
        if reply.status != 200:
            raise ValueError(f"{reply.status}: {text}")
        if not long:
            answer = json.loads(text)
            choice = answer["choices"][0]
            return choice["message"]["content"], choice["finish_reason"], answer["system_fingerprint"]
        events = text.split("\n\n")
        if "data: [DONE]" not in events[-2:]:
            raise ValueError(f"a stream breaks off: {events[-2:]}")
        chunks = [json.loads(event[6:]) for event in events if event.startswith("data: {")]
        text = "".join(choice["delta"].get("content") or "" for chunk in chunks for choice in chunk["choices"])
        [fingerprint] = {chunk["system_fingerprint"] for chunk in chunks}
        return text, chunks[-1]["choices"][0]["finish_reason"], fingerprint


def resident(process: int) -> int:
    """Bytes of memory that a process has."""
    return int(re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{process}/status").read_text())[1]) << 10


class Swapping:
    """Names that are given to one adapter and the other, and clients who ask meanwhile."""

    def __init__(self, asked: Asked, swap):
        self.asked, self.swap = asked, swap
        self.alone: dict[tuple, tuple] = {}
        self.counts, self.wrong = Counter(), []
        #: How many swaps have begun and ended.
        self.begun = self.ended = 0
        self.ends = False
        self.goes = threading.Event()
        self.goes.set()

    def meant(self, number: int) -> str:
        return "ab"[number % 2]

    def client(self, number: int) -> None:
        draw = random.Random(number)
        while self.goes.wait() and not self.ends:
            model, word, long = draw.choice(("tutor", "tutor", "tutor", "stays", "base")), draw.choice(WORDS), draw.random() < 0.6
            before = self.ended
            try:
                seen = self.asked.ask(model, word, long)
            except Exception as error:
                self.wrong.append(("lost", model, repr(error)))
                continue
            after = self.begun
            if model == "tutor":
                may = {self.meant(swap) for swap in range(before, after + 1)}
                self.counts["in flight"] += after > before
            else:
                may = {"a" if model == "stays" else "base"}
            if seen not in [self.alone[one, word, long] for one in may]:
                others = [one for one in ("a", "b", "base") if self.alone[one, word, long] == seen]
                self.wrong.append(("by " + (others or ["nobody"])[0], model, word, long, before, after, seen))
            self.counts[model] += 1

    def run(self, clients: int, swaps: int, process: int) -> tuple[dict[int, int], list[int]]:
        """Swaps; memory after some of them, and at rest after the first of them and the last."""
        threads = [threading.Thread(target=self.client, args=(number,), daemon=True) for number in range(clients)]
        [thread.start() for thread in threads]
        memory, rested = {}, []
        for number in range(1, swaps + 1):
            self.begun = number
            self.swap(self.meant(number))
            self.ended = number
            # The next question is answered by the new one.
            word = WORDS[number % len(WORDS)]
            seen = self.asked.ask("tutor", word, False)
            if seen != self.alone[self.meant(number), word, False]:
                self.wrong.append(("not the new one", number, word, seen))
            if number in (1, WARM) or number % 100 == 0 or number == swaps:
                memory[number] = resident(process)
            if number in (min(WARM, swaps), swaps):
                self.goes.clear()
                time.sleep(REST)
                rested.append(resident(process))
                self.goes.set()
        self.ends = True
        [thread.join() for thread in threads]
        return memory, rested


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--homeroom", required=True, help="the binary")
    parser.add_argument("--model", type=Path, default=POCKET, help="model directory; the pocket model unless it is said")
    parser.add_argument("--swaps", type=int, default=1000)
    parser.add_argument("--clients", type=int, default=8)
    args = parser.parse_args()
    eos = json.loads((args.model / "config.json").read_text())["eos_token_id"]
    with tempfile.TemporaryDirectory() as place:
        home = Path(place, "home")
        home.mkdir(mode=0o700)
        os.environ["HOMEROOM_HOME"] = str(home)
        command = lambda *words: subprocess.run([args.homeroom, *words], check=True, capture_output=True, text=True)
        trained(args.homeroom, args.model, home, "a", " is done")
        trained(args.homeroom, args.model, home, "b", " was read")
        for name in ("tutor", "stays"):
            command("cp", "a", name)
        handlers = [("tutor", "tutor"), ("stays", "stays"), ("a", "a"), ("b", "b"), ("base", args.model.resolve())]
        (home / "handlers.toml").write_text("".join(f'[handlers.{name}]\nkind = "local"\nmodel = "{model}"\n' for name, model in handlers))
        with serve_process(args.homeroom) as (server, url, _, said):
            asked = Asked(("127.0.0.1", int(url.split(":")[2].split("/")[0])), eos if isinstance(eos, list) else [eos])
            swapping = Swapping(asked, lambda adapter: command("cp", adapter, "tutor", "--overwrite"))
            for word in WORDS:
                for long in (False, True):
                    for model in ("a", "b", "base"):
                        swapping.alone[model, word, long] = asked.ask(model, word, long)
            texts = [len({swapping.alone[model, word, long][0] for model in ("a", "b", "base")}) for word in WORDS for long in (False, True)]
            check("each adapter has its own answers, and the base", min(texts) == 3, texts)
            begun = time.perf_counter()
            memory, rested = swapping.run(args.clients, args.swaps, server.pid)
            took = time.perf_counter() - begun
        counts = swapping.counts
        for wrong in swapping.wrong[:5]:
            print("       ", *wrong)
        check("no answer is lost, or anything but that of one adapter, whole", not swapping.wrong, len(swapping.wrong))
        check("answers were under way when the name was given away", counts["in flight"] > args.swaps / 10, counts)
        told = sum("its files have changed; the new ones answer" in line for line in said)
        check("each swap was seen once", told == args.swaps, told)
        check("it says nothing of a panic", not any("panic" in line for line in said), said[-5:])
        warm, end = rested[0], rested[-1]
        check(f"memory after {args.swaps} swaps is that after {WARM}", end <= warm * (1 + GROWTH_MAX), rested)
    print(f"       {machine.processor()[0]}, {os.cpu_count()} cores; {args.swaps} swaps in {took:.0f} s, {args.clients} clients")
    print(f"       {counts['tutor']} answers by the swapped name, {counts['in flight']} of them over a swap; {counts['stays']} by one that stays, {counts['base']} by the base")
    print(f"       memory at rest: {warm / 1e6:.1f} MB after {WARM}, {end / 1e6:.1f} MB after {args.swaps}, {100 * (end / warm - 1):+.1f} %")
    print("       under way: " + ", ".join(f"{number}: {bytes / 1e6:.1f} MB" for number, bytes in memory.items()))
    verdict()


if __name__ == "__main__":
    main()
