"""One cache for Homeroom and for Python's huggingface_hub, from one server: (a) what Python downloaded is read by Homeroom without a
network, (b) what Homeroom pulled is read by Python with local_files_only=True, (c) both lie in the same layout: blobs, relative links,
refs, locks, and (d) a download that Python has begun is waited for.

The server is that of Homeroom's tests, with the tiny models of the fixtures:
    cargo test --release -p homeroom --test all --no-run      # prints the path of the test program
    python hub_cache.py --tests target/release/deps/all-… --homeroom target/release/homeroom
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--tests", required=True, help="the test program")
parser.add_argument("--homeroom", required=True, help="the program")
args = parser.parse_args()

MODELS = ["school/llama", "school/qwen2", "school/mistral"]
failures = 0


def report(what, ok, detail=""):
    global failures
    failures += not ok
    print(f"{'ok  ' if ok else 'FAIL'}  {what}{'   ' + str(detail) if detail != '' else ''}")


def tree(cache, files=None):
    """Every path of a cache with where its link leads; of blobs the names alone. What only one side downloads is left out."""
    found = {}
    for path in sorted(Path(cache).rglob("*")):
        name = str(path.relative_to(cache))
        if path.is_symlink():
            found[name] = os.readlink(path)
        elif path.is_file() and "/blobs/" in name:
            found[name] = path.stat().st_size
        elif path.is_file() and "/refs/" in name:
            found[name] = path.read_text()
    return found


def python(code, hub_home, **more):
    """Runs Python with a home of its own: huggingface_hub reads its variables once."""
    environment = {**os.environ, "HF_HOME": str(hub_home), "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", **more}
    ran = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    if ran.returncode:
        print(ran.stderr[-3000:])
    return ran


def homeroom(arguments, hub_home, endpoint, **more):
    environment = {**os.environ, "HF_HOME": str(hub_home), "HF_ENDPOINT": endpoint, "HOMEROOM_HOME": str(hub_home / "homeroom"), **more}
    return subprocess.run([args.homeroom, *arguments], env=environment, capture_output=True, text=True)


server = subprocess.Popen(
    [args.tests, "--ignored", "--exact", "--nocapture", "hub::serve_for_python"],
    stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
)
endpoint = next(match[1] for line in server.stderr if (match := re.search(r"serving (http://\S+)", line)))
work = tempfile.TemporaryDirectory()
root = Path(work.name)
ours, theirs, shared = root / "ours", root / "theirs", root / "shared"
try:
    for model in MODELS:
        # (a) Python fills a cache; Homeroom reads it, and asks nobody.
        code = f"from huggingface_hub import snapshot_download; print(snapshot_download({model!r}))"
        ran = python(code, theirs, HF_ENDPOINT=endpoint)
        report(f"{model}: huggingface_hub downloads", ran.returncode == 0)
        snapshot = ran.stdout.strip().splitlines()[-1] if ran.stdout.strip() else ""
        commit = Path(snapshot).name
        read = homeroom(["pull", f"{model}@{commit}"], theirs, "http://127.0.0.1:9", HF_HUB_OFFLINE="1")
        report(f"{model}: Homeroom finds what Python downloaded", read.stdout.strip() == snapshot, read.stderr.strip()[-200:] if read.returncode else "")

        # (b) Homeroom fills a cache; Python reads it, and asks nobody.
        pulled = homeroom(["pull", model], ours, endpoint)
        report(f"{model}: Homeroom pulls", pulled.returncode == 0, pulled.stderr if pulled.returncode else "")
        code = (
            "from huggingface_hub import snapshot_download\n"
            f"print(snapshot_download({model!r}, local_files_only=True))"
        )
        ran = python(code, ours, HF_ENDPOINT="http://127.0.0.1:9", HF_HUB_OFFLINE="1")
        report(f"{model}: snapshot_download(local_files_only=True)", ran.stdout.strip() == pulled.stdout.strip())
        code = (
            "import json\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n"
            f"tokenizer = AutoTokenizer.from_pretrained({model!r}, local_files_only=True)\n"
            f"model = AutoModelForCausalLM.from_pretrained({model!r}, local_files_only=True)\n"
            "ids = tokenizer('times seven: 6', return_tensors='pt').input_ids\n"
            "print(json.dumps([ids.tolist(), model(ids).logits.double().sum().item()]))"
        )
        loaded = [python(code, home, HF_HUB_OFFLINE="1") for home in (ours, theirs)]
        values = [json.loads(ran.stdout.strip().splitlines()[-1]) if ran.returncode == 0 else None for ran in loaded]
        report(f"{model}: transformers loads both, with the same logits", values[0] is not None and values[0] == values[1], values[0])

    # (c) Every link, blob and ref of ours is as theirs; they have more files.
    mine, other = tree(ours / "hub"), tree(theirs / "hub")
    differing = {name: (value, other.get(name)) for name, value in mine.items() if other.get(name) != value}
    report(f"layout: {len(mine)} links, blobs and refs are as Python makes them", bool(mine) and not differing, differing or "")
    locks = [{path.name for path in (home / "hub/.locks").rglob("*.lock")} for home in (ours, theirs)]
    report("locks have the same names", locks[0] <= locks[1] or not locks[1], f"{len(locks[0])} and {len(locks[1])}")

    # One cache, filled by both in turn: nothing comes twice.
    model = MODELS[0]
    homeroom(["pull", model], shared, endpoint)
    before = {name: os.lstat(shared / "hub" / name).st_ino for name in tree(shared / "hub") if "/blobs/" in name}
    ran = python(f"from huggingface_hub import snapshot_download; snapshot_download({model!r})", shared, HF_ENDPOINT=endpoint)
    after = {name: os.lstat(shared / "hub" / name).st_ino for name in before}
    report("Python adds its files to our snapshot and takes our blobs", ran.returncode == 0 and before == after)
    again = homeroom(["pull", model], shared, endpoint)
    report("Homeroom finds all there afterwards", "all of it was here" in again.stderr, again.stderr if again.returncode else "")

    # (d) The lock that Python's filelock takes is one that Homeroom waits for.
    model = MODELS[1]
    weights = next(value for name, value in mine.items() if "qwen2" in name and name.endswith("model.safetensors")).split("/")[-1]
    lock = shared / "hub/.locks" / f"models--{model.replace('/', '--')}" / f"{weights}.lock"
    code = (
        "import sys\nfrom pathlib import Path\nfrom huggingface_hub.utils import WeakFileLock\n"
        f"lock = Path({str(lock)!r})\nlock.parent.mkdir(parents=True, exist_ok=True)\n"
        "with WeakFileLock(lock):\n    print('held', flush=True)\n    sys.stdin.read()"
    )
    holder = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    holder.stdout.readline()
    environment = {**os.environ, "HF_HOME": str(shared), "HF_ENDPOINT": endpoint, "HOMEROOM_HOME": str(shared / "homeroom")}
    waiting = subprocess.Popen([args.homeroom, "pull", model], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    told = []
    for line in waiting.stderr:
        told.append(line)
        if "waiting for another process" in line:
            holder.stdin.close()
            break
    out, rest = waiting.communicate(timeout=60)
    report("Homeroom waits for a lock of Python's", any("waiting for another process" in line for line in told) and waiting.returncode == 0)
    holder.wait()
finally:
    server.stdin.close()
    server.wait(timeout=30)
    work.cleanup()

print("all equal" if failures == 0 else f"{failures} differences")
sys.exit(1 if failures else 0)
