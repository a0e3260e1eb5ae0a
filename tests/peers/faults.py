"""The official `openai` package before a route whose provider fails: the package asks twice again by itself, and the provider still gets no
more requests than the file of handlers allows; a stream that breaks off raises, and is never a short answer.

Needs: pip install openai. Run: python faults.py --homeroom target/release/homeroom
"""

import argparse
import tempfile
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import openai

from serving import check, serve, verdict

HALF = b'data: {"choices":[{"index":0,"delta":{"content":"half"}}]}\n\n'
CONFIG = """\
[handlers.far]
kind = "openai"
base_url = "{url}"
model = "m"
first_token_timeout_s = 0.5
idle_timeout_s = 0.5
retry = {{ max = 1, base_s = 0.01, cap_s = 0.1 }}

[handlers.spare]
kind = "replay"
file = "spare.jsonl"
match = "user"

[routes.alone]
handlers = ["far"]

[routes.both]
handlers = ["far", "spare"]
"""


class Provider(BaseHTTPRequestHandler):
    """Fails as `fault` says, and counts."""

    fault, asked = "", 0

    def do_POST(self):
        Provider.asked += 1
        self.rfile.read(int(self.headers["content-length"]))
        if Provider.fault.isdigit():
            self.send_response(int(Provider.fault))
            self.end_headers()
            return
        if Provider.fault == "silent":
            time.sleep(3)
            return
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.end_headers()
        if Provider.fault != "cut at once":
            self.wfile.write(HALF)
        if Provider.fault == "stuck":
            self.wfile.flush()
            time.sleep(3)

    def log_message(self, *_):
        pass


parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--homeroom", required=True, help="the binary")
arguments = parser.parse_args()
provider = ThreadingHTTPServer(("127.0.0.1", 0), Provider)
threading.Thread(target=provider.serve_forever, daemon=True).start()
ASK = [{"role": "user", "content": "hi"}]

with tempfile.TemporaryDirectory() as folder:
    Path(folder, "spare.jsonl").write_text('{"user": "hi", "answer": "the spare one"}\n')
    config = Path(folder, "handlers.toml")
    config.write_text(CONFIG.format(url=f"http://127.0.0.1:{provider.server_port}/v1"))
    with serve(arguments.homeroom, "--config", config) as (url, _):
        client = openai.OpenAI(base_url=url, api_key="none")

        def run(fault: str, model: str, stream: bool) -> tuple[str, str, int]:
            Provider.fault, Provider.asked, text = fault, 0, ""
            try:
                answer = client.chat.completions.create(model=model, messages=ASK, stream=stream)
                if not stream:
                    return answer.choices[0].message.content, "", Provider.asked
                for chunk in answer:
                    text += chunk.choices[0].delta.content or "" if chunk.choices else ""
                return text, "", Provider.asked
            except openai.OpenAIError as error:
                return text, type(error).__name__, Provider.asked

        for stream in [False, True]:
            for fault, calls in [("500", 2), ("529", 2), ("429", 2), ("cut at once", 2)]:
                text, error, asked = run(fault, "alone", stream)
                check(f"{fault}, stream {stream}: an error after {calls} requests", error != "" and text == "" and asked == calls, (text, error, asked))
                seen = run(fault, "both", stream)
                check(f"{fault}, stream {stream}: the next handler answers", seen == ("the spare one", "", calls), seen)
            seen = run("silent", "both", stream)
            check(f"silence, stream {stream}: the next handler answers", seen == ("the spare one", "", 1), seen)
        for fault in ["cut", "stuck"]:
            text, error, asked = run(fault, "both", True)
            check(f"{fault} in a stream: what was said, and an error", text == "half" and error == "APIError" and asked == 1, (text, error, asked))
            seen = run(fault, "both", False)
            check(f"{fault} in an answer that is not streamed: the next handler answers", seen == ("the spare one", "", 1), seen)
verdict()
