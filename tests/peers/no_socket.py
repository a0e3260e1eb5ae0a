"""What the program opens to the network: every command on models of a cache is run under strace, and no socket may lead anywhere but to
this machine. `pull` of a name that is not there opens one to the hub, which shows that such a socket would be seen.

    python no_socket.py --model tests/fixtures/models/llama --homeroom target/release/homeroom     # Linux; apt install strace
"""

import argparse
import json
import os
import re
import signal
import subprocess
import tempfile
import time
import urllib.request
from pathlib import Path

from serving import check, fill, verdict

NAME, COMMIT = "Org-7/tiny_Llama.v2", "1a2b3c4d5e6f708192a3b4c5d6e7f8091a2b3c4d"
#: An address of a network for documentation: nothing answers there.
HUB = "http://192.0.2.7:9"

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", type=Path, required=True, help="base model, a directory")
parser.add_argument("--homeroom", required=True, help="the binary")
args = parser.parse_args()
work = tempfile.TemporaryDirectory()
root = Path(work.name)
# Not offline: whatever opens no connection opens none by itself.
environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HOMEROOM_", "TRANSFORMERS_"))}
environment |= {"HF_HOME": str(root / "hf"), "HF_ENDPOINT": HUB, "HOMEROOM_HOME": str(root / "home")}


def traced(arguments) -> tuple[list[str], Path]:
    log = root / f"{len(list(root.glob('trace*')))}.trace"
    calls = "trace=socket,connect,bind,sendto,sendmsg,sendmmsg"
    return ["strace", "-f", "-qq", "-s", "200", "-e", calls, "-o", str(log), args.homeroom, *map(str, arguments)], log


def far(log: Path) -> list[str]:
    """Calls with an address that is not this machine's. A path is one, too: of a socket of a name service, say."""
    found = []
    for line in log.read_text(errors="replace").splitlines():
        if not re.search(r"sa_family=|socket\(AF_", line):
            continue
        if "socket(AF_INET" in line or re.search(r'inet_addr\("127\.|inet_pton\(AF_INET6, "::1"', line):
            continue
        found.append(line)
    return found


def opens_none(what: str, *arguments, code=0) -> str:
    command, log = traced(arguments)
    ran = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True)
    check(f"{what}: it ends with {code}", ran.returncode == code, ran.stderr[-600:])
    calls = log.read_text(errors="replace")
    sockets = len(re.findall(r"\bsocket\(", calls))
    check(f"{what}: no socket", sockets == 0, calls[:600])
    return ran.stdout


def end(strace: subprocess.Popen, how: signal.Signals) -> None:
    """Ends what strace runs, and strace with it."""
    for child in subprocess.run(["pgrep", "-P", str(strace.pid)], capture_output=True, text=True).stdout.split():
        os.kill(int(child), how)


fill(root / "hf/hub", NAME, COMMIT, args.model)
rows = [{"messages": [{"role": "user", "content": f"times seven: {n}"}, {"role": "assistant", "content": f"it is {7 * n}"}]} for n in range(4)]
(root / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
(root / "s.lua").write_text(
    'local data = homeroom.prepare_dataset { path = "rows.jsonl" }\n'
    "local model = homeroom.load_model { name = params.model, r = 2 }\n"
    "local tuned = homeroom.fine_tune { model = model, dataset = data.train, max_steps = 1 }\n"
    'pcall(homeroom.evaluate, { model = "thief/" .. #data.train, dataset = data.train })\n'
    'local saved = homeroom.save_model { model = tuned, name = "by-script" }\n'
    'return homeroom.create_handler { name = "tutor", model = saved }\n'
)
(root / "c.toml").write_text(f'[pipeline]\nscript = "s.lua"\n[pipeline.params]\nmodel = {{ type = "model", default = "{NAME}" }}\n')

opens_none("fine-tune", "fine-tune", "--model-name", NAME, "--training-file", "rows.jsonl", "--max-steps", 1, "--name", "tutor-1")
opens_none("eval of a base", "eval", "--model-dir", NAME, "--file", "rows.jsonl")
opens_none("eval of an adapter", "eval", "--model-dir", "tutor-1", "--file", "rows.jsonl")
opens_none("chat", "chat", "--model-dir", "tutor-1", "--prompt", "hi", "--max-tokens", 2)
opens_none("export-model", "export-model", "--model-dir", "tutor-1", "--output-dir", "merged")
opens_none("bench", "bench", "decode", "--model-dir", NAME, "--prompt", 3, "--tokens", 2)
opens_none("run --check", "run", "c.toml", "--check")
opens_none("run --dry-run", "run", "c.toml", "--dry-run")
opens_none("run", "run", "c.toml")
opens_none("list-models", "list-models")
opens_none("show", "show", "tutor-1")
opens_none("cp", "cp", "tutor-1", "tutor-2")
opens_none("rm", "rm", "tutor-2")
opens_none("pull of a commit that is there", "pull", f"{NAME}@{COMMIT}")
opens_none("plugins list", "plugins", "list")
opens_none("chat by a handler", "chat", "--handler", "tutor", "--prompt", "hi", "--max-tokens", 2)
opens_none("--offline", "--offline", "eval", "--model-dir", "no/where", "--file", "rows.jsonl", code=1)
opens_none("a dry run of a name that is not there", "run", "c.toml", "--dry-run", "--set", "model=no/where", code=1)

# A server, with a client, and a file of handlers that comes to name what is not there.
handlers = root / "handlers.toml"
handlers.write_text(f'[handlers.tutor]\nkind = "local"\nmodel = "{NAME}"\n')
command, log = traced(["serve", "--port", "0", "--config", handlers])
server = subprocess.Popen(command, env=environment, cwd=root, stderr=subprocess.PIPE, text=True)
url = next(match[1] for line in server.stderr if (match := re.match(r"serving\s+(\S+)", line)))


def asks(model: str) -> int:
    body = json.dumps({"model": model, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}).encode()
    request = urllib.request.Request(f"{url}/chat/completions", body, {"content-type": "application/json"})
    try:
        return urllib.request.urlopen(request).status
    except urllib.error.HTTPError as error:
        return error.code


check("serve: it answers", asks("tutor") == 200)
check("serve: a name that is not there is refused", asks("no/where") == 404)
handlers.write_text('[handlers.tutor]\nkind = "local"\nmodel = "no/where"\n')
until = time.monotonic() + 30
check("serve: so is an edit that names one", any("refused" in line for line in server.stderr if time.monotonic() < until))
check("serve: and it goes on", asks("tutor") == 200)
end(server, signal.SIGINT)
server.wait(60)
check("serve: no socket but this machine's", far(log) == [] and "socket(AF_INET" in log.read_text(), far(log)[:5])

# Of what is not there one command goes out, and it is seen.
command, log = traced(["pull", "no/where"])
pull = subprocess.Popen(command, env=environment, cwd=root, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
until = time.monotonic() + 20
while time.monotonic() < until and not (log.exists() and "192.0.2.7" in log.read_text(errors="replace")):
    time.sleep(0.2)
end(pull, signal.SIGKILL)
pull.wait(60)
check("pull: it asks the hub, and that is seen", any("192.0.2.7" in line for line in far(log)), log.read_text()[:300])
verdict()
