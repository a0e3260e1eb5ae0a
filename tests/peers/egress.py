"""A class server without a way out: `egress = "deny"` through start, chat, failure, reload and end, in a network of its own.

The program runs in a network namespace in which every address of the world leads into a trap: all packets that are not for this machine's
own loopback addresses are seen, name look-ups and refused ones as well. At the end something is sent out on purpose, which shows that the
trap sees it.

    python egress.py --model tests/fixtures/models/llama --homeroom target/release/homeroom        # Linux; needs `ip` and `unshare`
"""

import argparse
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

from serving import check, verdict

INSIDE = "HOMEROOM_INSIDE_THE_TRAP"

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", type=Path, required=True, help="a small model, a directory")
parser.add_argument("--homeroom", type=Path, required=True, help="the binary")
args = parser.parse_args()

args.homeroom = args.homeroom.resolve()

if INSIDE not in os.environ:
    os.execvpe("unshare", ["unshare", "--user", "--map-root-user", "--net", sys.executable, *sys.argv], os.environ | {INSIDE: "1"})

# A pair of interfaces: what leaves by the one comes out of the other, where it is seen. The gateway has an address on the link, so that
# packets are sent and not held back for want of one.
for command in [
    "ip link set lo up",
    "ip link add out type veth peer name trap",
    "ip addr add 10.99.0.2/24 dev out",
    "ip link set out up",
    "ip link set trap up",
    "ip neigh add 10.99.0.1 lladdr 02:00:00:00:00:01 dev out",
    "ip route add default via 10.99.0.1",
    "ip -6 addr add fd99::2/64 dev out nodad",
    "ip -6 neigh add fd99::1 lladdr 02:00:00:00:00:01 dev out",
    "ip -6 route add default via fd99::1",
]:
    subprocess.run(command.split(), check=True)

trap = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))
trap.bind(("trap", 0))
caught: list[str] = []
#: What the kernel says by itself to whoever is on a link: router solicitations, multicast listener reports, ARP.
ALONE = ("ff02::", "224.0.0.")


def watch() -> None:
    while True:
        packet = trap.recv(65535)
        kind, rest = packet[12:14], packet[14:]
        if kind == b"\x08\x00":
            to = socket.inet_ntop(socket.AF_INET, rest[16:20])
            what = {1: "icmp", 6: "tcp", 17: "udp"}.get(rest[9], str(rest[9]))
        elif kind == b"\x86\xdd":
            to = socket.inet_ntop(socket.AF_INET6, rest[24:40])
            what = {6: "tcp", 17: "udp", 58: "icmp6"}.get(rest[6], str(rest[6]))
        else:
            continue
        if not to.startswith(ALONE):
            caught.append(f"{what} to {to}")


threading.Thread(target=watch, daemon=True).start()


def left() -> list[str]:
    time.sleep(0.3)
    seen, caught[:] = list(caught), []
    return seen


work = tempfile.TemporaryDirectory()
root = Path(work.name)
environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HOMEROOM_"))}
# A proxy of the environment leads away, too.
environment |= {"HOMEROOM_HOME": str(root / "home"), "HF_HOME": str(root / "hf"), "HTTPS_PROXY": "http://10.1.2.3:8080", "HTTP_PROXY": "http://10.1.2.3:8080", "ALL_PROXY": "http://10.1.2.3:8080"}
config = root / "handlers.toml"
NEAR = f'[handlers.near]\nkind = "local"\nmodel = "{args.model.resolve()}"\n'
# Nobody listens on this machine's port 9, so that it fails and the next one is asked.
BROKEN = '[handlers.broken]\nkind = "openai"\nbase_url = "http://localhost:9/v1"\nmodel = "m"\nretry = { max = 1, base_s = 0.01 }\n'
FAR = '[handlers.far]\nkind = "openai"\nbase_url = "https://api.example.com/v1"\nmodel = "m"\n'
ROUTE = '[routes.tutor]\nhandlers = ["broken", "near"]\negress = "deny"\n'
ALONE_ROUTE = '[routes.alone]\nhandlers = ["broken"]\n'

try:
    socket.create_connection(("192.0.2.1", 80), timeout=0.5)
except OSError:
    pass
seen = left()
check("the trap sees a connection", any("tcp to 192.0.2.1" in packet for packet in seen), seen)
try:
    socket.getaddrinfo("trap.example.com", 80)
except OSError:
    pass
resolvers = left()
print(f"       a name look-up is seen as {resolvers[:2] or 'nothing: this machine has no name server to ask'}")

config.write_text(NEAR + BROKEN + ROUTE + ALONE_ROUTE)
server = subprocess.Popen([args.homeroom, "serve", "--port", "0", "--config", config], env=environment, cwd=root, stderr=subprocess.PIPE, text=True)
story: list[str] = []
url = ""
for line in server.stderr:
    story.append(line)
    if found := re.match(r"serving\s+(\S+)", line):
        url = found[1]
        break
threading.Thread(target=lambda: story.extend(server.stderr), daemon=True).start()
check("it starts", url != "", story)
check("start: nothing leaves", (seen := left()) == [], seen)


def ask(model: str, stream=False) -> tuple[int, str]:
    body = {"model": model, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 3, "stream": stream}
    request = urllib.request.Request(f"{url}/chat/completions", json.dumps(body).encode(), {"content-type": "application/json"})
    try:
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=60) as reply:
            return reply.status, reply.headers.get("x-homeroom-handler", "")
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


for stream in [False, True]:
    check(f"chat, stream {stream}: the one that is here answers", ask("tutor", stream) == (200, "near"))
check("chat and fallback: nothing leaves", (seen := left()) == [], seen)
status, words = ask("alone")
check("failure: who asked is told what to do", status == 503 and "try again later" in words and "127.0.0.1" not in words, (status, words))
until = time.monotonic() + 10
while time.monotonic() < until and not any("no server listens" in line for line in story):
    time.sleep(0.1)
check("failure: the server's messages say why", any("no server listens" in line for line in story), story[-8:])
check("failure: nothing leaves", (seen := left()) == [], seen)

# An edit that would have conversations leave is refused, and what was served is served on.
config.write_text(NEAR + BROKEN + FAR + ROUTE.replace('"near"', '"far"'))
until = time.monotonic() + 30
while time.monotonic() < until and not any('egress is "deny"' in line for line in story):
    time.sleep(0.1)
check("reload: an edit that lets conversations out is refused", any('egress is "deny"' in line for line in story), story[-8:])
check("reload: the old file goes on", ask("tutor") == (200, "near"))
config.write_text(NEAR + BROKEN + FAR + ROUTE + '[routes.other]\nhandlers = ["near"]\n')
until = time.monotonic() + 30
while time.monotonic() < until and not any(line.startswith("reload") and "other" in line for line in story):
    time.sleep(0.1)
check("reload: another edit counts", ask("other") == (200, "near"), story[-8:])
check("reload: nothing leaves", (seen := left()) == [], seen)

checked = subprocess.run([args.homeroom, "handlers", "check", "--config", config], env=environment, cwd=root, capture_output=True, text=True)
check("handlers check: it says that nothing leaves", "conversations stay on this machine" in checked.stdout, checked.stdout + checked.stderr)
talk = subprocess.run(
    [args.homeroom, "chat", "--config", config, "--handler", "tutor", "--prompt", "hi", "--max-tokens", "2"], env=environment, cwd=root, capture_output=True, text=True
)
check("chat on a terminal: it answers", talk.returncode == 0, talk.stderr)
check("commands: nothing leaves", (seen := left()) == [], seen)

server.send_signal(signal.SIGINT)
check("it ends", server.wait(60) == 0)
check("end: nothing leaves", (seen := left()) == [], seen)

# The same server with a route that may: it is seen at once.
config.write_text(FAR.replace("https://api.example.com", "http://192.0.2.7") + '[routes.away]\nhandlers = ["far"]\negress = "allow"\n')
plain = {name: value for name, value in environment.items() if not name.endswith("PROXY")}
away = subprocess.Popen([args.homeroom, "chat", "--config", config, "--handler", "away", "--prompt", "hi"], env=plain, cwd=root, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
time.sleep(2)
away.kill()
away.wait()
seen = left()
check("a route that may leave: that is seen", any("tcp to 192.0.2.7" in packet for packet in seen), seen)
verdict()
