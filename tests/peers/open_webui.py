"""Open WebUI itself before `homeroom serve`, in a network of its own that leads nowhere: sign-up, models, chats by its API and by its page, by OpenAI's
API and by Ollama's, and what it asks by itself (titles, tags, follow-ups), which is answered and waits behind people.

What it sends passes through a recorder, whose fields are printed. Open WebUI marks its own requests only where the connection says so: its
setting of headers is `{"X-OpenWebUI-Task": "{{TASK}}"}`, which is an empty header in a person's request.

Run: python open_webui.py --homeroom target/release/homeroom --model DIR --open-webui VENV/bin/open-webui [--picture page.png]
Needs: Linux, `unshare`, `ip`; pip install open-webui in an environment of its own (5 GB); for the page chromium, and pip install playwright.
"""

import argparse
import http.client
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections import defaultdict
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from serving import check, serve_process, verdict

INSIDE = "HOMEROOM_INSIDE_OPEN_WEBUI"
TASK = "x-openwebui-task"
#: What stands before the names of the connection by Ollama's API.
OLLAMA = "by-ollama"
QUESTION = "Name three colours."
#: Longest time for its start, and for all that follows a chat, in seconds.
STARTS, ASKS = 600, 600


class Recorder(BaseHTTPRequestHandler):
    """Passes requests on, and keeps what they say."""

    to: tuple = ()
    seen: list[dict] = []
    protocol_version = "HTTP/1.1"

    def pass_on(self) -> None:
        body = self.rfile.read(int(self.headers.get("content-length") or 0))
        record = {"method": self.command, "path": self.path, "headers": {name.lower(): value for name, value in self.headers.items()}}
        record["body"] = json.loads(body) if body else None
        Recorder.seen.append(record)
        far = http.client.HTTPConnection(*Recorder.to, timeout=600)
        headers = {name: value for name, value in self.headers.items() if name.lower() not in ("host", "content-length")}
        far.request(self.command, self.path, body or None, headers | {"host": "localhost"})
        reply = far.getresponse()
        record["status"] = reply.status
        self.send_response(reply.status)
        for name, value in reply.getheaders():
            if name.lower() not in ("transfer-encoding", "content-length", "connection"):
                self.send_header(name, value)
        self.send_header("connection", "close")
        self.end_headers()
        record["answer"] = b""
        try:
            while piece := reply.read1(65536):
                record["answer"] += piece
                self.wfile.write(piece)
                self.wfile.flush()
        except OSError:
            record["left"] = True
        far.close()
        self.close_connection = True

    do_GET = do_POST = do_DELETE = pass_on

    def log_message(self, *_):
        pass


def asks(record: dict) -> bool:
    return record["path"].endswith(("/chat/completions", "/api/chat"))


class OpenWebUi:
    def __init__(self, port: int):
        self.url, self.token = f"http://127.0.0.1:{port}", ""

    def call(self, path: str, body=None, raw: bool = False):
        headers = {"content-type": "application/json"} | ({"authorization": f"Bearer {self.token}"} if self.token else {})
        request = urllib.request.Request(self.url + path, None if body is None else json.dumps(body).encode(), headers)
        try:
            with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=ASKS) as reply:
                text = reply.read().decode()
        except urllib.error.HTTPError as error:
            raise RuntimeError(f"{path}: {error.code}: {error.read().decode()[:500]}") from error
        return text if raw else json.loads(text)


@contextmanager
def open_webui(command: str, place: Path, far: str, key: str):
    """The program, with a connection of each kind to `far`, and a directory of its own."""
    config = {"enable": True, "key": key, "headers": {"X-OpenWebUI-Task": "{{TASK}}"}}
    # Both connections list the same names; that of Ollama's API gets a word before them.
    openai, ollama = json.dumps({"0": config}), json.dumps({"0": config | {"prefix_id": OLLAMA}})
    port = 8099
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HOMEROOM_", "OPENAI", "OLLAMA"))}
    environment |= {
        "DATA_DIR": str(place), "WEBUI_SECRET_KEY": "secret", "ENABLE_FORWARD_USER_INFO_HEADERS": "true", "OFFLINE_MODE": "true", "HF_HUB_OFFLINE": "1",
        "ENABLE_VERSION_UPDATE_CHECK": "false", "ANONYMIZED_TELEMETRY": "false", "DO_NOT_TRACK": "true", "RAG_EMBEDDING_ENGINE": "openai",
        "OPENAI_API_BASE_URLS": f"{far}/v1", "OPENAI_API_KEYS": key, "OPENAI_API_CONFIGS": openai,
        "OLLAMA_BASE_URLS": far, "OLLAMA_API_CONFIGS": ollama, "ENABLE_OLLAMA_API": "true",
    }  # fmt: skip
    log = open(place / "log", "wb")
    process = subprocess.Popen([command, "serve", "--host", "127.0.0.1", "--port", str(port)], cwd=place, env=environment, stdout=log, stderr=log)
    program, until = OpenWebUi(port), time.monotonic() + STARTS
    try:
        while True:
            try:
                program.call("/health", raw=True)
                break
            except (OSError, RuntimeError):
                if process.poll() is not None or time.monotonic() > until:
                    sys.exit("error: Open WebUI does not start\n" + (place / "log").read_text(errors="replace")[-3000:])
                time.sleep(0.5)
        yield program
    finally:
        process.terminate()
        process.wait(30)


def by_api(program: OpenWebUi, model: str) -> None:
    signed = program.call("/api/v1/auths/signup", {"name": "Anna Bäcker", "email": "anna@school.example", "password": "correct horse 7"})
    program.token = signed["token"]
    check("the first who signs up is let in", signed["role"] == "admin" and program.token, signed)
    names = {one["id"]: one.get("owned_by") for one in program.call("/api/models")["data"]}
    check("the model is listed by both connections", names.get(model) == "openai" and names.get(f"{OLLAMA}.{model}") == "ollama", names)
    # It passes a temperature on to Ollama among the options alone.
    for name, cold in ((model, {"temperature": 0}), (f"{OLLAMA}.{model}", {"options": {"temperature": 0}})):
        body = {"model": name, "messages": [{"role": "user", "content": QUESTION}], "max_tokens": 24} | cold
        whole = program.call("/api/chat/completions", body | {"stream": False})
        text = whole["choices"][0]["message"]["content"]
        check(f"{name} answers by its API", text, whole)
        stream = program.call("/api/chat/completions", body | {"stream": True}, raw=True)
        chunks = [json.loads(line[6:]) for line in stream.splitlines() if line.startswith("data: {")]
        streamed = "".join(choice["delta"].get("content") or "" for chunk in chunks for choice in chunk.get("choices", []))
        check("  and says the same as a stream", streamed == text, (streamed, text))


def tasks_by_api(program: OpenWebUi, model: str) -> None:
    """What its page asks after a chat."""
    talk = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": "Red, green and blue."}]
    for task in ("title", "tags", "follow_up"):
        body = {"model": model, "messages": talk, "chat_id": "c-1"}
        answer = program.call(f"/api/v1/tasks/{task}/completions", body)
        check(f"its request for {task} is answered", answer.get("choices") and "content" in answer["choices"][0]["message"], answer)


def by_page(program: OpenWebUi, chromium: str, picture: Path, model: str) -> None:
    from playwright.sync_api import TimeoutError, sync_playwright

    before = len(Recorder.seen)
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page(viewport={"width": 1280, "height": 860})
        page.add_init_script(f"localStorage.setItem('token', {json.dumps(program.token)})")
        page.goto(f"{program.url}/?models={model}")
        box = page.locator("#chat-input")
        box.wait_for(timeout=ASKS * 1000)
        # What is new in it, which it tells an administrator first.
        greeting = page.get_by_role("button", name="Let's Go")
        with suppress(TimeoutError):
            greeting.click(timeout=10_000)
            greeting.wait_for(state="hidden", timeout=10_000)
        box.click()
        page.keyboard.type(QUESTION)
        page.keyboard.press("Enter")
        until = time.monotonic() + ASKS
        own = lambda: {record["headers"].get(TASK) for record in Recorder.seen[before:] if asks(record) and "answer" in record}
        while not {"title_generation", "tags_generation", "follow_up_generation"} <= own() and time.monotonic() < until:
            page.wait_for_timeout(500)
        page.wait_for_timeout(3000)
        page.screenshot(path=picture)
        shown = page.locator(".chat-assistant").all_inner_texts()
        check("the page shows an answer", shown and shown[-1].strip(), shown)
        browser.close()
    people = [record for record in Recorder.seen[before:] if asks(record) and not record["headers"].get(TASK)]
    said = [json.loads(line[6:]) for line in (people[0]["answer"].decode().splitlines() if people else []) if line.startswith("data: {")]
    text = "".join(choice["delta"].get("content") or "" for chunk in said for choice in chunk["choices"])
    # It is shown as Markdown, where numbers of a list are no text.
    flat = lambda words: "".join(letter for letter in words if letter.isalpha())
    check("  the one that was given", shown and text and flat(text)[:40] in flat(shown[-1]), (text, shown))
    own = sorted(record["headers"][TASK] for record in Recorder.seen[before:] if asks(record) and record["headers"].get(TASK))
    check("  and asks for title, tags and follow-ups by itself", {"title_generation", "tags_generation", "follow_up_generation"} <= set(own), own)


def told(said: list[str]) -> list[dict]:
    """Lines of the server's log."""
    return [json.loads(line) for line in said if line.startswith("{")]


def print_fields() -> None:
    """What it sends, by path and kind: the fields of bodies, and headers that are its own."""
    fields = defaultdict(set)
    for record in Recorder.seen:
        kind = f"{record['method']} {record['path']}"
        if asks(record):
            kind += " stream" if record["body"].get("stream") else " whole"
            kind += f", {record['headers'].get(TASK) or 'a person'}"
        fields[kind] |= {f"body.{name}" for name in record["body"] or {}}
        fields[kind] |= {name for name in record["headers"] if name.startswith("x-") or name == "authorization"}
        options = (record["body"] or {}).get("options") or {}
        fields[kind] |= {f"body.options.{name}" for name in options}
    for kind, names in sorted(fields.items()):
        print(f"       {kind}: {', '.join(sorted(names))}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--homeroom", required=True, help="the binary")
    parser.add_argument("--model", required=True, help="model directory, of 2,048 tokens at least")
    parser.add_argument("--open-webui", required=True, help="the program `open-webui`")
    parser.add_argument("--chromium", default="/usr/bin/chromium")
    parser.add_argument("--picture", type=Path, help="look at the page as well, and save a picture of it there")
    parser.add_argument("--fields", type=Path, help="save all that it sent there, as JSON lines")
    args = parser.parse_args()
    if INSIDE not in os.environ:
        os.execvpe("unshare", ["unshare", "--user", "--map-root-user", "--net", sys.executable, *sys.argv], os.environ | {INSIDE: "1"})
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    with tempfile.TemporaryDirectory() as place:
        home, data = Path(place, "home"), Path(place, "data")
        home.mkdir(mode=0o700)
        data.mkdir()
        os.environ["HOMEROOM_HOME"] = str(home)
        added = subprocess.run([args.homeroom, "keys", "add", "webui", "--trust-forwarded"], check=True, capture_output=True, text=True)
        # Small models find no end of tags and follow-ups, which come without a limit.
        model = json.dumps(str(Path(args.model).resolve()))
        handlers = f'[handlers.here]\nkind = "local"\nmodel = {model}\n[routes.tutor]\nhandlers = ["here"]\nmax_tokens = 100\n'
        (home / "handlers.toml").write_text(handlers)
        with serve_process(args.homeroom, "--log", "json") as (_, url, [model], said):
            Recorder.to = ("127.0.0.1", int(url.split(":")[2].split("/")[0]))
            recorder = ThreadingHTTPServer(("127.0.0.1", 0), Recorder)
            recorder.daemon_threads = True
            threading.Thread(target=recorder.serve_forever, daemon=True).start()
            with open_webui(args.open_webui, data, f"http://127.0.0.1:{recorder.server_port}", added.stdout.strip()) as program:
                by_api(program, model)
                tasks_by_api(program, model)
                tasks_by_api(program, f"{OLLAMA}.{model}")
                if args.picture:
                    by_page(program, args.chromium, args.picture, model)
            time.sleep(1)
            bad = [(record["path"], record.get("status"), record["answer"][:300]) for record in Recorder.seen if record.get("status") != 200]
            check("nothing that it sent was refused", not bad, bad[:3])
            asked = [record for record in Recorder.seen if asks(record)]
            check("each of its requests names a person", all(record["headers"].get("x-openwebui-user-id") for record in asked))
            lines = [line for line in told(said) if line["route"] in ("/v1/chat/completions", "/api/chat")]
            check("the log has a person for each", len(lines) >= len(asked) and all(line.get("user") for line in lines), lines[:1])
            own = sum(bool(record["headers"].get(TASK)) for record in asked)
            behind = sum(bool(line.get("background")) for line in lines)
            check(f"its {own} own requests, and no other, were work in the background", own == behind > 0, (own, behind, len(lines)))
        print_fields()
        if args.fields:
            args.fields.write_text("".join(json.dumps(record | {"answer": record["answer"].decode(errors="replace")}) + "\n" for record in Recorder.seen))
    verdict()


if __name__ == "__main__":
    main()
