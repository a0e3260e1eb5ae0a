"""What openai_sdk.py and swap.py share: a `homeroom serve` of their own, and checks that are counted."""

import re
import subprocess
import sys
import threading
from contextlib import contextmanager

failed = []


def check(what: str, good: bool, seen="") -> None:
    print(f"{'ok    ' if good else 'FAILED'} {what}{'' if good else f': {seen!r}'}")
    if not good:
        failed.append(what)


def verdict() -> None:
    sys.exit(f"{len(failed)} checks failed" if failed else 0)


@contextmanager
def serve(homeroom: str, *arguments):
    """A server on a free port: its base URL and the names of its models. Ends it by Ctrl-C's signal."""
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
    threading.Thread(target=lambda: [print(line, end="", file=sys.stderr) for line in server.stderr], daemon=True).start()
    try:
        yield found[1], models
    finally:
        server.send_signal(2)
        check("the server ends by itself when asked", server.wait(40) == 0, server.returncode)
