"""What programs here share: a `homeroom serve` of their own, a cache that is filled, and checks that are counted."""

import hashlib
import re
import shutil
import subprocess
import sys
import threading
from contextlib import contextmanager
from pathlib import Path

failed = []


def check(what: str, good: bool, seen="") -> None:
    print(f"{'ok    ' if good else 'FAILED'} {what}{'' if good else f': {seen!r}'}")
    if not good:
        failed.append(what)


def verdict() -> None:
    sys.exit(f"{len(failed)} checks failed" if failed else 0)


def fill(hub: Path, name: str, commit: str, directory: Path) -> None:
    """Puts a model into a cache as huggingface_hub does: blobs by their digests, links, and `main`."""
    folder = hub / f"models--{name.replace('/', '--')}"
    snapshot = folder / "snapshots" / commit
    for part in [folder / "blobs", folder / "refs", snapshot]:
        part.mkdir(parents=True)
    for file in directory.iterdir():
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
        shutil.copy(file, folder / "blobs" / digest)
        (snapshot / file.name).symlink_to(f"../../blobs/{digest}")
    (folder / "refs/main").write_text(commit)


@contextmanager
def serve(homeroom: str, *arguments):
    """A server on a free port: its base URL and the names of its models. Ends it by Ctrl-C's signal."""
    with serve_process(homeroom, *arguments) as (_, url, models, _):
        yield url, models


@contextmanager
def serve_process(homeroom: str, *arguments):
    """The same, with its process before them and the lines that it says while it serves behind them, which grow."""
    command = [homeroom, "serve", "--port", "0", *map(str, arguments)]
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    models = []
    for line in server.stderr:
        if line.startswith("model"):
            models.append(line.split()[1])
        elif found := re.match(r"serving\s+(\S+)", line):
            break
        else:
            print(line, end="", file=sys.stderr)
    else:
        sys.exit(f"error: {' '.join(command)} ended with {server.wait()}")
    # What it says later is passed on, so that its pipe never fills.
    said: list[str] = []

    def pass_on() -> None:
        for line in server.stderr:
            said.append(line)
            print(line, end="", file=sys.stderr)

    threading.Thread(target=pass_on, daemon=True).start()
    try:
        yield server, found[1], models, said
    finally:
        server.send_signal(2)
        check("the server ends by itself when asked", server.wait(40) == 0, server.returncode)
