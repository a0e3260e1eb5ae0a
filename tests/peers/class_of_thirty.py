"""A class against `homeroom serve`, by the official `openai` package without retries. Needs: pip install openai.

Thirty pupils ask at once, one question each: how long is each one's first token. Then 16 callers of a slow provider leave, 16 do not
read, and a provider does not end: how long does a model here take to answer after each.

Run: python class_of_thirty.py --homeroom target/release/homeroom --model MODEL
"""

import argparse
import json
import resource
import socket
import statistics
import tempfile
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import openai

from serving import check, serve, verdict

TOPICS = "water iron gold the moon rain trees bees salt glass ice wind fire sand milk bread".split()


class Endless(BaseHTTPRequestHandler):
    """A provider that takes every request and does not end: comments only, or words."""

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.end_headers()
        word = {"id": "i", "model": "m", "choices": [{"delta": {"content": "word " * 200}}]}
        piece = b": still here\n\n" if body["model"] == "silent" else f"data: {json.dumps(word)}\n\n".encode()
        try:
            while True:
                self.wfile.write(piece)
                time.sleep(0.05 if body["model"] == "silent" else 0)
        except OSError:
            pass

    def log_message(self, *_):
        pass


def together(count: int, ask) -> list:
    """What `ask(number)` gives, for all numbers at once; an exception where it raised one."""
    results = [None] * count
    barrier = threading.Barrier(count)

    def run(number):
        barrier.wait()
        try:
            results[number] = ask(number)
        except Exception as error:
            results[number] = error

    threads = [threading.Thread(target=run, args=(number,)) for number in range(count)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    return results


def pupils(client: openai.OpenAI, model: str, count: int) -> None:
    def ask(number):
        question = f"Pupil {number} asks: what is {TOPICS[number % len(TOPICS)]}?"
        messages = [{"role": "user", "content": question}]
        begun, first, text = time.monotonic(), None, ""
        for chunk in client.chat.completions.create(model=model, messages=messages, max_tokens=64, temperature=0, stream=True):
            piece = chunk.choices[0].delta.content if chunk.choices else None
            if piece:
                first = first or time.monotonic() - begun
                text += piece
        return first, time.monotonic() - begun, text

    begun = time.monotonic()
    answers = together(count, ask)
    wall = time.monotonic() - begun
    whole = [answer for answer in answers if isinstance(answer, tuple) and answer[2]]
    check(f"{count} pupils, {count} answers", len(whole) == count, [answer for answer in answers if answer not in whole])
    firsts, ends = sorted(answer[0] for answer in whole), sorted(answer[1] for answer in whole)
    at = lambda times, share: times[min(len(times) - 1, int(share * len(times)))]
    print(f"       first token p50 {statistics.median(firsts):.2f} s, p95 {at(firsts, 0.95):.2f} s; "
          f"whole answer p50 {statistics.median(ends):.2f} s, p95 {at(ends, 0.95):.2f} s; all in {wall:.1f} s")


def raw(address, model: str, stream: bool) -> socket.socket:
    body = json.dumps({"model": model, "messages": [{"role": "user", "content": "hi"}], "stream": stream})
    client = socket.create_connection(address)
    head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: {len(body)}"
    client.sendall(f"{head}\r\n\r\n{body}".encode())
    return client


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--homeroom", required=True)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--pupils", type=int, default=30)
    args = parser.parse_args()
    provider = ThreadingHTTPServer(("127.0.0.1", 0), Endless)
    provider.daemon_threads = True
    threading.Thread(target=provider.serve_forever, daemon=True).start()
    far = f"http://127.0.0.1:{provider.server_port}/v1"
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder, "handlers.toml")
        config.write_text(f"""
[handlers.here]
kind = "local"
model = {json.dumps(str(args.model.resolve()))}
[handlers.silent]
kind = "openai"
base_url = "{far}"
model = "silent"
[handlers.endless]
kind = "openai"
base_url = "{far}"
model = "endless"
[routes.tutor]
handlers = ["here"]
[routes.slow]
handlers = ["silent"]
[routes.flood]
handlers = ["endless"]
""")
        with serve(args.homeroom, "--config", config) as (url, _):
            client = openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=300)
            address = ("127.0.0.1", int(url.split(":")[2].split("/")[0]))

            def local(what: str) -> None:
                begun = time.monotonic()
                answer = client.chat.completions.with_raw_response.create(
                    model="tutor", messages=[{"role": "user", "content": "hi"}], max_tokens=1, temperature=0)
                took = time.monotonic() - begun
                check(f"{what}: a model here answers within a second ({took:.2f} s)",
                      took < 1 and answer.headers["x-homeroom-handler"] == "here", took)

            local("at first")
            pupils(client, "tutor", args.pupils)
            pupils(client, "tutor", args.pupils)

            for stream in (True, False):
                left = [raw(address, "slow", stream) for _ in range(16)]
                time.sleep(1)
                local("while 16 wait for a silent provider")
                [one.close() for one in left]
                local("after 16 left it")
            unread = [raw(address, "flood", True) for _ in range(16)]
            time.sleep(1)
            local("while 16 do not read a provider without end")
            [one.close() for one in unread]
            local("after they left")
            unread = [raw(address, "tutor", True) for _ in range(16)]
            time.sleep(3)
            local("while 16 do not read a model here")
            [one.close() for one in unread]
            try:
                client.chat.completions.create(model="flood", messages=[{"role": "user", "content": "hi"}])
                check("an unstreamed answer without end is refused", False)
            except openai.InternalServerError as error:
                check("an unstreamed answer without end is refused", "MiB" in str(error), error)
            local("after an answer without end")
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1e6
        print(f"       the server's memory at its highest: {peak:.2f} GB")
    verdict()


if __name__ == "__main__":
    main()
