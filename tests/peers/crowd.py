"""A crowd against `homeroom serve` for a minute: 200 clients who stream, wait for whole answers, leave in the middle, read slowly or not at
all, or send what is wrong, with several keys and people.

Each question was asked alone before. In the crowd it is answered with the same words, or refused with status 503 or 429 and with when to come
back. At the end no place is held by a client that is gone, and memory has not grown beyond a bound.

Run: python crowd.py --homeroom target/release/homeroom [--model DIR] [--clients 200] [--seconds 60]      (needs no package)
"""

import argparse
import asyncio
import json
import os
import random
import re
import socket
import subprocess
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import machine
from serving import check, serve_process, verdict

ROOT = Path(__file__).resolve().parents[2]
POCKET = ROOT / "runtime/pocket/model"
#: Most that the server's memory may grow over what it is after each question was asked once, in bytes: kept prefixes may take 256 MiB, and each of
#: some hundred threads keeps what it freed for a while.
GROWTH_MAX = 1 << 30
#: And most that its peak in the last third of the time may be, beside the one before.
LATE_MAX = 1.15
#: How long after the last client has gone a place may still be taken, in seconds.
SETTLES = 10
WORDS = "water iron gold moon rain tree bee salt glass ice wind fire sand milk bread fish".split()
SCHEMA = {"type": "object", "properties": {"is_good": {"type": "boolean"}, "count": {"type": "integer", "minimum": 1, "maximum": 9}},
          "required": ["is_good", "count"], "additionalProperties": False}  # fmt: skip
#: Of ten clients so many; the others ask and read as is usual.
LEAVE, SLOW, MUTE, BAD = 2, 1, 1, 1


# --- HTTP, as far as it is needed -----------------------------------------------------------


class Broken(Exception):
    """The connection ended before the answer did."""


class Connection:
    """One connection of one client. With `narrow`, the system takes little for it that is not read."""

    def __init__(self, address, narrow: bool = False):
        self.address, self.narrow = address, narrow

    async def __aenter__(self):
        if self.narrow:
            plain = socket.socket()
            plain.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            plain.setblocking(False)
            await asyncio.get_running_loop().sock_connect(plain, self.address)
            self.reader, self.writer = await asyncio.open_connection(sock=plain, limit=1 << 14)
        else:
            self.reader, self.writer = await asyncio.open_connection(*self.address)
        return self

    async def __aexit__(self, *_):
        self.writer.close()

    def leave(self) -> None:
        """Is gone at once, without a word."""
        self.writer.transport.abort()

    async def send(self, path: str, body: bytes, headers: dict, method: str = "POST") -> None:
        lines = {"host": "localhost", "content-type": "application/json", "content-length": str(len(body))} | headers
        head = f"{method} {path} HTTP/1.1\r\n" + "".join(f"{name}: {value}\r\n" for name, value in lines.items())
        self.writer.write(head.encode() + b"\r\n" + body)
        await self.writer.drain()

    async def head(self) -> tuple[int, dict]:
        """Status and headers."""
        try:
            lines = (await self.reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        except (asyncio.IncompleteReadError, ConnectionError) as error:
            raise Broken("no answer") from error
        pairs = (line.split(": ", 1) for line in lines[1:] if line)
        self.headers = {name.lower(): value for name, value in pairs}
        return int(lines[0].split()[1]), self.headers

    async def pieces(self):
        """The pieces of a body, as they were sent."""
        try:
            if "content-length" in self.headers:
                yield await self.reader.readexactly(int(self.headers["content-length"]))
                return
            while size := int(await self.reader.readuntil(b"\r\n"), 16):
                yield (await self.reader.readexactly(size + 2))[:-2]
            await self.reader.readexactly(2)
        except (asyncio.IncompleteReadError, ConnectionError) as error:
            raise Broken("the answer breaks off") from error

    async def body(self) -> bytes:
        return b"".join([piece async for piece in self.pieces()])


# --- questions ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Question:
    """What is asked, and how: the answer to it is always the same."""

    form: str
    number: int

    def request(self, model: str, stream: bool, eos: list[int]) -> tuple[str, dict]:
        word, other = WORDS[self.number % len(WORDS)], WORDS[self.number * 5 % len(WORDS)]
        wording = (f"Spell {word}.", f"What is the first letter of {word}?", f"Join {word} and {other}.")[self.number % 3]
        messages = [{"role": "user", "content": wording}]
        if self.form == "ollama":
            return "/api/chat", {"model": model, "messages": messages, "stream": stream, "options": {"temperature": 0, "num_predict": 40}}
        more = {
            "short": {"temperature": 0, "max_tokens": 40},
            # Without an end, so that there is a middle to leave in.
            "long": {"temperature": 0, "max_tokens": 150, "logit_bias": {str(token): -100 for token in eos}},
            "drawn": {"temperature": 1, "top_p": 1, "seed": self.number, "max_tokens": 60},
            "several": {"temperature": 1, "seed": self.number, "max_tokens": 30, "n": 3},
            "schema": {"temperature": 0, "max_tokens": 60, "response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA}}},
        }[self.form]
        usage = {"stream_options": {"include_usage": True}} if stream else {}
        return "/v1/chat/completions", {"model": model, "messages": messages, "stream": stream} | more | usage


FORMS = ("short", "long", "drawn", "several", "schema", "ollama")
#: Texts and reasons of all choices, and tokens.
Answer = tuple[tuple, int]


class Gathered:
    """An answer from its pieces, by either API, streamed or not."""

    def __init__(self):
        self.texts: dict[int, str] = {}
        self.ends: dict[int, str] = {}
        self.tokens, self.rest, self.error, self.is_over = -1, b"", None, False
        self.first: float | None = None

    def take(self, path: str, stream: bool, piece: bytes) -> None:
        self.rest += piece
        separator = b"\n" if path.startswith("/api") else b"\n\n"
        while stream and separator in self.rest:
            line, self.rest = self.rest.split(separator, 1)
            if line == b"data: [DONE]":
                self.is_over = True
            elif line and not line.startswith(b":"):
                self.event(json.loads(line.removeprefix(b"data: ")))

    def end(self, stream: bool) -> None:
        if not stream:
            self.event(json.loads(self.rest))
            self.is_over = True

    def event(self, event: dict) -> None:
        if "error" in event:
            self.error = event["error"]
            return
        if "choices" not in event:
            self.said(0, event["message"]["content"], event.get("done_reason"))
            if event.get("done"):
                self.tokens, self.is_over = event["eval_count"], True
            return
        for choice in event["choices"]:
            said = choice.get("message") or choice["delta"]
            self.said(choice["index"], said.get("content") or "", choice["finish_reason"])
        if event.get("usage"):
            self.tokens = event["usage"]["completion_tokens"]

    def said(self, choice: int, text: str, end: str | None) -> None:
        if text and self.first is None:
            self.first = time.perf_counter()
        self.texts[choice] = self.texts.get(choice, "") + text
        if end:
            self.ends[choice] = end

    def answer(self) -> Answer:
        return tuple((text, self.ends.get(choice)) for choice, text in sorted(self.texts.items())), self.tokens


# --- the crowd ------------------------------------------------------------------------------


@dataclass
class Crowd:
    address: tuple
    model: str
    eos: list[int]
    keys: dict[str, str]
    right: dict[Question, Answer] = field(default_factory=dict)
    until: float = 0
    counts: Counter = field(default_factory=Counter)
    firsts: list[float] = field(default_factory=list)
    wholes: list[float] = field(default_factory=list)
    wrong: list = field(default_factory=list)

    def headers(self, number: int) -> dict:
        """Keys and people: a third shares a key, half is people behind a program's key, and the others share one with a limit."""
        if number % 6 < 2:
            return {"authorization": f"Bearer {self.keys['class']}"}
        if number % 6 < 5:
            return {"x-api-key": self.keys["moodle"], "x-openwebui-user-id": f"person-{number}"}
        return {"api-key": self.keys["guest"]}

    def failed(self, what: str, *seen) -> None:
        self.counts["wrong"] += 1
        self.wrong.append((what, *seen))

    async def ask(self, connection: Connection, question: Question, stream: bool, headers: dict, pause: float = 0) -> Gathered | None:
        """The answer; nothing if it was refused as it may be, after which the client waits a little."""
        path, fields = question.request(self.model, stream, self.eos)
        await connection.send(path, json.dumps(fields).encode(), headers)
        status, head = await connection.head()
        if status in (429, 503):
            body = await connection.body()
            after = head.get("retry-after", "")
            if not after.isdigit() or not 1 <= int(after) <= 120 or not json.loads(body).get("error"):
                self.failed(f"{status} without when to come back", head, body)
            self.counts[str(status)] += 1
            # Some come back too early.
            await asyncio.sleep(random.uniform(0.1, min(int(after or 1), 2)))
            return None
        gathered = Gathered()
        if status != 200:
            self.failed(f"status {status}", question, await connection.body())
            return None
        async for piece in connection.pieces():
            gathered.take(path, stream, piece)
            if pause:
                await asyncio.sleep(pause)
        gathered.end(stream)
        return gathered

    def judge(self, question: Question, gathered: Gathered, stream: bool) -> None:
        if gathered.error or not gathered.is_over or gathered.answer() != self.right[question]:
            self.failed("another answer", question, stream, gathered.error, gathered.answer(), self.right[question])
        else:
            self.counts["right"] += 1

    async def asks(self, number: int, draw: random.Random, slow: bool) -> None:
        """Asks again and again, on one connection."""
        async with Connection(self.address, narrow=slow) as connection:
            while time.perf_counter() < self.until:
                question, stream = draw.choice(list(self.right)), slow or draw.random() < 0.65
                begun = time.perf_counter()
                gathered = await self.ask(connection, question, stream, self.headers(number), pause=0.02 if slow else 0)
                if gathered is None:
                    continue
                self.judge(question, gathered, stream)
                if not slow:
                    self.wholes.append(time.perf_counter() - begun)
                    if stream and gathered.first:
                        self.firsts.append(gathered.first - begun)

    async def leaves(self, number: int, draw: random.Random) -> None:
        """Leaves while it waits, before the first word, or after some."""
        while time.perf_counter() < self.until:
            async with Connection(self.address) as connection:
                question, stream = Question(draw.choice(("long", "several")), draw.randrange(12)), draw.random() < 0.7
                path, fields = question.request(self.model, stream, self.eos)
                body = json.dumps(fields).encode()
                whole = draw.random() < 0.9
                await connection.send(path, body if whole else body[: draw.randrange(len(body))], self.headers(number) | {"content-length": str(len(body))})
                try:
                    await asyncio.wait_for(connection.reader.read(draw.randrange(1, 4000)), draw.uniform(0, 1.5))
                except (asyncio.TimeoutError, ConnectionError):
                    pass
                connection.leave() if draw.random() < 0.5 else connection.writer.close()
            self.counts["left"] += 1
            await asyncio.sleep(draw.uniform(0, 0.2))

    async def mute(self, number: int, draw: random.Random) -> None:
        """Asks, and reads nothing until it goes."""
        while time.perf_counter() < self.until:
            async with Connection(self.address, narrow=True) as connection:
                connection.reader._transport.pause_reading()
                path, fields = Question("long", draw.randrange(12)).request(self.model, True, self.eos)
                await connection.send(path, json.dumps(fields | {"n": 4}).encode(), self.headers(number))
                await asyncio.sleep(min(draw.uniform(5, 40), max(0, self.until - time.perf_counter())))
                connection.leave()
            self.counts["unread"] += 1

    async def bad(self, number: int, draw: random.Random) -> None:
        """Sends what is wrong; it is refused as what it is."""
        path, good = Question("short", 1).request(self.model, False, self.eos)
        key = {"authorization": f"Bearer {self.keys['class']}"}
        deep = b'{"model": ' + b"[" * 10_000 + b"]" * 10_000 + b"}"
        requests = [
            (401, path, good, {}), (401, path, good, {"authorization": "Bearer hr-0"}), (403, path, good, key | {"host": "evil.example"}),
            (403, path, good, key | {"origin": "https://evil.example"}), (404, path, good | {"model": "none"}, key),
            (400, path, good | {"n": 1_000_000_000}, key), (400, path, good | {"temperture": 1}, key), (400, path, deep, key),
            (400, path, b"{", key), (400, path, good | {"max_tokens": -(1 << 63)}, key), (415, path, good, key | {"content-type": "text/plain"}),
            (400, path, good | {"messages": [{"role": "user", "content": "x" * 5000}]}, key), (404, "/v1/none", good, key),
            (413, path, good | {"messages": [{"role": "user", "content": "x" * (5 << 20)}]}, key),
        ]  # fmt: skip
        while time.perf_counter() < self.until:
            wanted, where, body, headers = draw.choice(requests)
            async with Connection(self.address) as connection:
                body = body if isinstance(body, bytes) else json.dumps(body).encode()
                try:
                    await connection.send(where, body, headers)
                except ConnectionError:
                    pass  # It was told before all was sent.
                status, _ = await connection.head()
                said = await connection.body()
            # What only a model can tell waits for its turn, as everybody does.
            is_full = status == 503 and where == path and b"overloaded" in said
            if (status == wanted or is_full) and b"error" in said:
                self.counts["refused"] += 1
            else:
                self.failed(f"{wanted} was due", status, said[:300], where, body[:100])
            await asyncio.sleep(draw.uniform(0, 0.5))

    async def client(self, number: int) -> None:
        draw = random.Random(number)
        kinds = [self.leaves] * LEAVE + [self.mute] * MUTE + [self.bad] * BAD
        place = number % 10
        try:
            if place < len(kinds):
                await kinds[place](number, draw)
            else:
                await self.asks(number, draw, slow=place < len(kinds) + SLOW)
        except Exception as error:
            self.failed("a client ended", number, repr(error))


def resident(process: int) -> int:
    """Bytes of memory that a process has."""
    status = Path(f"/proc/{process}/status").read_text()
    return int(re.search(r"VmRSS:\s+(\d+)", status)[1]) << 10


async def metrics(crowd: Crowd) -> dict[str, float]:
    async with Connection(crowd.address) as connection:
        await connection.send("/metrics", b"", {"authorization": f"Bearer {crowd.keys['class']}"}, "GET")
        await connection.head()
        lines = (await connection.body()).decode().splitlines()
    return {line.rsplit(" ", 1)[0]: float(line.rsplit(" ", 1)[1]) for line in lines if not line.startswith("#")}


def tokens(seen: dict[str, float]) -> float:
    return sum(count for name, count in seen.items() if name.startswith("homeroom_completion_tokens_total"))


def percentiles(times: list[float]) -> str:
    ordered = sorted(times) or [float("nan")]
    return " / ".join(f"{ordered[min(len(ordered) - 1, int(share * len(ordered)))]:.2f}" for share in (0.5, 0.95, 0.99))


async def run(crowd: Crowd, process: int, clients: int, seconds: float) -> None:
    for form in FORMS:
        for number in range(12):
            question = Question(form, number)
            for stream in (False, True):
                async with Connection(crowd.address) as connection:
                    gathered = await crowd.ask(connection, question, stream, {"authorization": f"Bearer {crowd.keys['class']}"})
                crowd.judge(question, gathered, stream) if stream else crowd.right.update({question: gathered.answer()})
    check("alone, each question has one answer, streamed and not", not crowd.wrong, crowd.wrong[:3])
    same = sum(crowd.right[Question("ollama", number)] == crowd.right[Question("short", number)] for number in range(12))
    check("and the same by both APIs", same == 12, same)
    crowd.counts.clear()
    start, memory = resident(process), []
    before, begun = await metrics(crowd), time.perf_counter()
    crowd.until = begun + seconds

    async def watch() -> None:
        while True:
            memory.append(resident(process))
            await asyncio.sleep(0.2)

    watching = asyncio.create_task(watch())
    _, open_still = await asyncio.wait([asyncio.create_task(crowd.client(number)) for number in range(clients)], timeout=seconds + 60)
    took = time.perf_counter() - begun
    check("every client has come to an end", not open_still, len(open_still))
    [task.cancel() for task in open_still]
    after = await metrics(crowd)
    held = ("homeroom_answers_running", "homeroom_answers_waiting")
    until, now = time.perf_counter() + SETTLES, after
    # The request for the figures is one itself.
    while (any(now[name] for name in held) or now["homeroom_requests_in_flight"] > 1) and time.perf_counter() < until:
        await asyncio.sleep(0.1)
        now = await metrics(crowd)
    settled = time.perf_counter() - until + SETTLES
    watching.cancel()
    end = resident(process)
    counts = crowd.counts
    for wrong in crowd.wrong[:5]:
        print("       ", *wrong)
    check("every answer is the one that was given alone, or says when to come back", counts["wrong"] == 0, counts["wrong"])
    check("some of each happened", all(counts[what] for what in ("right", "503", "429", "left", "unread", "refused")), counts)
    check(f"no place is held by the dead ({settled:.1f} s after the last has gone)", not any(now[name] for name in held), {name: now[name] for name in held})
    check("  and no request", now["homeroom_requests_in_flight"] <= 1, now["homeroom_requests_in_flight"])
    earlier, late = memory[: 2 * len(memory) // 3], memory[2 * len(memory) // 3 :]
    check("memory is bounded", max(memory) - start <= GROWTH_MAX, (start, max(memory)))
    check("  and grows no more at the end", max(late) <= LATE_MAX * max(earlier), (max(earlier), max(late)))
    async with Connection(crowd.address) as connection:
        question = Question("short", 0)
        gathered = await crowd.ask(connection, question, True, {"authorization": f"Bearer {crowd.keys['class']}"})
        check("it answers still", gathered is not None and gathered.answer() == crowd.right[question], gathered and gathered.answer())
    print(f"       {machine.processor()[0]}, {os.cpu_count()} cores; {clients} clients, {took:.0f} s")
    print(f"       {counts['right']} right answers, {counts['503']} times 503, {counts['429']} times 429, {counts['left']} left, "
          f"{counts['unread']} did not read, {counts['refused']} bad requests were refused")
    print(f"       first token p50 / p95 / p99 {percentiles(crowd.firsts)} s; whole answer {percentiles(crowd.wholes)} s; "
          f"{(tokens(after) - tokens(before)) / took:.0f} tokens/s")
    print(f"       memory: {start / 1e6:.1f} MB at the start, {max(memory) / 1e6:.1f} at its peak, {end / 1e6:.1f} at the end")


def key(homeroom: str, name: str, *limits: str) -> str:
    return subprocess.run([homeroom, "keys", "add", name, *limits], check=True, capture_output=True, text=True).stdout.strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--homeroom", required=True, help="the binary")
    parser.add_argument("--model", type=Path, default=POCKET, help="model directory; the pocket model unless it is said")
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=60)
    args = parser.parse_args()
    eos = json.loads((args.model / "config.json").read_text())["eos_token_id"]
    with tempfile.TemporaryDirectory() as home:
        os.environ["HOMEROOM_HOME"] = home
        keys = {
            "class": key(args.homeroom, "class"),
            "moodle": key(args.homeroom, "moodle", "--trust-forwarded", "--requests-per-minute", "600"),
            "guest": key(args.homeroom, "guest", "--requests-per-minute", "120"),
        }
        with serve_process(args.homeroom, "--model-dir", args.model) as (server, url, [model], said):
            address = ("127.0.0.1", int(url.split(":")[2].split("/")[0]))
            crowd = Crowd(address, model, eos if isinstance(eos, list) else [eos], keys)
            asyncio.run(run(crowd, server.pid, args.clients, args.seconds))
        check("it says nothing of a panic", not any("panic" in line for line in said), said[:5])
    verdict()


if __name__ == "__main__":
    main()
