"""Nothing that was computed is lost: runs are killed at random instants and taken up again, and the result has the same bytes as that of a
run that nobody disturbed and nothing saved.

    python kills.py --homeroom target/release/homeroom                         # a hundred kills over all cases, some ten minutes
    python kills.py --homeroom target/release/homeroom --kills 20 --case qlora --case full
    python kills.py --homeroom target/release/homeroom --tests target/release/deps/all-1234567890abcdef   # and a swapped plugin

Strategies lie beside the binary. An instant is drawn evenly over what the run has still to do, by the length of the undisturbed one;
each kill is printed with the step and the phase that it fell in. Needs nothing but Python; everything is below a temporary directory.
"""

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from serving import check, verdict

ROOT = Path(__file__).resolve().parents[2]
MODEL, ROWS = ROOT / "runtime/pocket/model", ROOT / "runtime/pocket/quickstart"
#: Files that two runs of the same work write alike; the others have dates and times.
COMPARED = ("adapter_model.safetensors", "adapter_config.json", "model.safetensors", "config.json", "tokenizer.json")


@dataclass
class Case:
    """A run, by what is typed after the name of the program."""

    name: str
    arguments: list[str]
    saving: list[str] = field(default_factory=lambda: ["--save-every", "7"])
    #: Threads that a process gets, one of these.
    threads: tuple = (1,)
    #: Its strategies are gone after the first kill that leaves a checkpoint.
    loses_plugin: bool = False
    #: The result's directory, below the run's own place.
    results: tuple = ("out",)
    #: `fine-tune`, else a pipeline.
    is_training: bool = True
    #: The program is the test binary.
    is_test: bool = False

    #: Steps of a training, where no option says them.
    steps: int = 40

    @property
    def planned(self) -> int:
        return int(self.arguments[self.arguments.index("--max-steps") + 1]) if "--max-steps" in self.arguments else self.steps


def tune(name: str, *arguments, rows=ROWS / "train.jsonl", **more) -> Case:
    fixed = ["fine-tune", "--model-name", MODEL, "--training-file", rows, "--output-dir", "out"]
    return Case(name, [str(argument) for argument in [*fixed, *arguments]], **more)


def set_all(**values) -> list[str]:
    return [word for name, value in values.items() for word in ("--set", f"{name}={value}")]


HELD_OUT = ["--eval-file", ROWS / "eval.jsonl"]
CASES = [
    tune("lora f32", "--compute", "f32", "--max-steps", 150, "--batch-size", 4, "--lora-dropout", 0.1, *HELD_OUT, "--eval-every", 10),
    # A rate so high that the held-out loss soon rises: it stops, and keeps what was best.
    tune("lora bf16, stops early", "--compute", "bf16", "--max-steps", 400, "--batch-size", 4, "--lora-dropout", 0.05, "--learning-rate", "8e-3",
         *HELD_OUT, "--eval-every", 10, "--early-stopping-patience", 6, saving=["--save-every", "13"]),
    tune("qlora", "--strategy", "qlora", "--max-steps", 150, "--batch-size", 4, "--lora-dropout", 0.1, saving=["--save-every", "11"]),
    tune("full", "--strategy", "full", "--max-steps", 100, "--batch-size", 4, *HELD_OUT, "--eval-every", 15),
    tune("int8", "--strategy", "int8", "--compute", "int8", "--max-steps", 150, "--batch-size", 4),
    # Rows of some length, so that a step is several passes.
    tune("accumulated", "--no-packing", "--batch-size", 2, "--gradient-accumulation-steps", 5, "--max-steps", 100, "--lora-dropout", 0.1,
         saving=["--save-every", "3"]),
    tune("other threads", "--max-steps", 150, "--batch-size", 5, "--lora-dropout", 0.1, threads=(1, 2, 3)),
    tune("without its plugin", "--max-steps", 150, "--batch-size", 4, "--lora-dropout", 0.1, loses_plugin=True),
    # tests/killed.rs says what it does: the strategy is swapped after step 11, and after step 23 for one that is taken back.
    Case("a swapped plugin", ["--exact", "--ignored", "--nocapture", "killed::alone"], saving=[], is_test=True),
    tune("dpo", "--objective", "dpo", "--max-steps", 60, "--batch-size", 2, "--lora-dropout", 0.1, rows="preferences.jsonl"),
    # Three trainings, each from the result of the one before; a script of its own, as the shipped one saves by time alone.
    Case("a pipeline", ["run", "curriculum.toml", *set_all(model=MODEL, dataset=ROWS / "train.jsonl", max_steps=40, eval_steps=9, name="taught")],
         saving=[], results=("home/models/taught",), is_training=False, steps=40),
    tune("by time", "--max-steps", 150, "--batch-size", 4, "--lora-dropout", 0.1, saving=["--save-minutes", "0.005"]),
]


class Place:
    """A directory for a run of a case, and how a process of it is started."""

    def __init__(self, case: Case, path: Path, arguments: argparse.Namespace):
        self.case, self.path, self.given = case, path, arguments
        self.home = path / "home"
        self.home.mkdir(parents=True, mode=0o700)
        self.with_plugin = True
        if "preferences.jsonl" in case.arguments:
            rows = [json.loads(line)["messages"] for line in (ROWS / "train.jsonl").read_text().splitlines()]
            pairs = [{"prompt": row[:-1], "chosen": row[-1:], "rejected": other[-1:]} for row, other in zip(rows, rows[1:])]
            (path / "preferences.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
        if "curriculum.toml" in case.arguments:
            (path / "curriculum.toml").write_text((ROOT / "configs/curriculum.toml").read_text().replace("../scripts/", ""))
            script = (ROOT / "scripts/curriculum.lua").read_text()
            (path / "curriculum.lua").write_text(script.replace("eval_steps = params.eval_steps,", "eval_steps = params.eval_steps, save_steps = 5,"))

    def start(self, *more: str, resume: str | None = None, full: tuple | None = None, told: Path | None = None) -> subprocess.Popen:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("HOMEROOM")}
        environment |= {"HOMEROOM_HOME": str(self.home), "HF_HUB_OFFLINE": "1", "HOMEROOM_PLUGIN_POLICY": "dev"}
        plugins = self.given.plugins if self.with_plugin else self.given.nothing
        environment |= {"HOMEROOM_PLUGINS": str(plugins), "RAYON_NUM_THREADS": str(random.choice(self.case.threads))}
        environment["TMPDIR"] = str(self.given.temporary)
        if full or told:
            environment |= {"LD_PRELOAD": str(self.given.shim), "FULL_BELOW": str(self.path)}
            environment |= {"FULL_FROM": str(full[0]), "FULL_COUNT": str(full[1])} if full else {"FULL_TOLD": str(told)}
        if self.case.is_test:
            self.variants()
            environment["HOMEROOM_KILLED"] = str(self.path)
            command = [self.given.tests, *self.case.arguments]
        else:
            command = [self.given.binary, *(["resume", resume] if resume else [*self.case.arguments, *more])]
        log = open(self.path / "log", "ab")
        return subprocess.Popen(command, cwd=self.path, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log)

    def variants(self) -> None:
        """The test strategy as its marked bytes have it be."""
        mark, whole = b"HOMEROOM_VARIANT", (self.given.plugins / "libreloading.so").read_bytes()
        at = whole.index(mark) + len(mark)
        for name in ("plain", "more", "worse"):
            file = self.path / name / "libreloading.so"
            if not file.exists():
                file.parent.mkdir()
                file.write_bytes(whole[:at] + name.ljust(16, ".").encode() + whole[at + 16 :])

    def run(self) -> Path | None:
        """The directory of its run, if it has one."""
        runs = sorted((self.home / "runs").glob("*"), key=lambda run: int(run.name.rsplit("-", 1)[1]))
        runs = [run for run in runs if (run / "run.json").exists()]
        return runs[-1] if runs else None

    def events(self) -> list[dict]:
        file = (self.run() or self.path) / "events.jsonl"
        lines = file.read_bytes().split(b"\n")[:-1] if file.exists() else []
        return [json.loads(line) for line in lines]

    def checkpoints(self) -> list[int]:
        return sorted(int(path.name[5:]) for path in (self.run() or self.path).glob("trainings/*/checkpoints/step-*"))

    def results(self) -> dict[str, bytes]:
        found = {}
        for result in self.case.results:
            for directory in sorted(self.path.glob(result)):
                files = sorted(file for file in directory.iterdir() if file.name in COMPARED)
                found |= {f"{directory.name}/{file.name}": file.read_bytes() for file in files}
        return found

    def traces(self) -> set[str]:
        """What is being written, or was when an earlier process was killed: directories in the making, and checkpoints of which nothing was said."""
        run = self.run() or self.path
        said = {event["step"] for event in self.events() if event["event"] == "checkpoint"}
        making = [*run.glob("trainings/*/checkpoints/.homeroom-*"), *self.path.glob(".homeroom-*"), *run.glob(".homeroom-*")]
        return {str(path) for path in making} | {str(step) for step in set(self.checkpoints()) - said}

    def phase(self, new: list[dict], before: set[str]) -> tuple[str, str]:
        """The last step, and what was being done, of a process with these events and with these traces before it."""
        steps = [event for event in new if event["event"] == "step"]
        step = f"step {steps[-1]['step']}" if steps else ""
        if steps and steps[-1].get("training", 1) > 1:
            step = f"{steps[-1]['training']}, {step}"
        traces = self.traces() - before
        is_done = steps and steps[-1]["step"] == self.case.planned
        if is_done and not self.case.is_training and steps[-1]["training"] < 3:
            return step, "between verbs"
        if is_done or (self.path / "out").exists() or any(Path(trace).parent == self.path for trace in traces):
            return step, "finishing"
        if traces:
            return step, "saving"
        return step, "training" if {"step", "checkpoint", "eval"} & {event["event"] for event in new} else "preparing"


def prepare(given: argparse.Namespace, folder: Path) -> None:
    """Takes the binary without what lies beside it, so that strategies can be taken away."""
    given.binary, given.plugins, given.nothing = folder / "bin/homeroom", given.homeroom.resolve().parent, folder / "nothing"
    given.temporary = folder / "temporary"
    for directory in (given.binary.parent, given.nothing, given.temporary):
        directory.mkdir()
    shutil.copy(given.homeroom, given.binary)


def wait(process: subprocess.Popen, place: Place) -> None:
    if process.wait() != 0:
        sys.exit(f"error: {place.case.name}: it ended with {process.returncode}:\n{(place.path / 'log').read_text()[-3000:]}")


def undisturbed(case: Case, folder: Path, given: argparse.Namespace) -> tuple[float, dict[str, bytes]]:
    """Seconds and result of a run that saves nothing."""
    place = Place(case, folder, given)
    start = time.monotonic()
    wait(place.start(*(["--save-minutes", "0"] if case.is_training else [])), place)
    return time.monotonic() - start, place.results()


def killed(case: Case, kills: int, folder: Path, given: argparse.Namespace, seconds: float, expected: dict) -> Counter:
    """Kills runs of a case until so many kills have fallen; returns how many fell in which phase."""
    fallen = Counter()
    attempt = 0
    while sum(fallen.values()) < kills:
        attempt += 1
        place = Place(case, folder / str(attempt), given)
        share_left, first = 1.0, True
        while True:
            over = sum(fallen.values()) >= kills
            seen, traces = len(place.events()), place.traces()
            run = place.run()
            # The same command again, or by the run's name.
            by_name = run is not None and case.is_training and not case.is_test and random.random() < 0.5
            resume = [] if case.is_test or not case.is_training else ["--resume"]
            started = time.monotonic()
            process = place.start(*case.saving, *resume, resume=run.name if by_name else None)
            instant = random.uniform(0, 0.15 * seconds + 0.9 * share_left * seconds)
            try:
                process.wait(None if over else instant)
                wait(process, place)
                break
            except subprocess.TimeoutExpired:
                pass
            alive = process.poll() is None
            process.kill()
            alive = process.wait() == -9 and alive
            if not alive:
                wait(process, place)
                break
            after = time.monotonic() - started
            step, phase = place.phase(place.events()[seen:], traces)
            saved = max(place.checkpoints(), default=0)
            fallen[phase] += 1
            print(f"    kill {sum(fallen.values()):3}   {after:6.2f} s   {phase:12} {step:10} saved {saved}", flush=True)
            trainings = len(list((place.run() or place.path).glob("trainings/*"))) if not case.is_training else 1
            done = (max(0, trainings - 1) + saved / case.planned) / (1 if case.is_training else 3)
            share_left = max(0.1, 1 - done)
            if case.loses_plugin and place.checkpoints():
                place.with_plugin = False
        results = place.results()
        unequal = [name for name in expected if results.get(name) != expected[name]]
        check(f"{case.name}: run {attempt} has the bytes of the undisturbed one", bool(expected) and not unequal and len(results) == len(expected), unequal)
        left = [str(path) for path in [*place.path.glob(".homeroom-*"), *place.path.glob("home/runs/*/trainings/*/checkpoints")]]
        check(f"{case.name}: run {attempt} leaves nothing behind", not left, left)
        shutil.rmtree(place.path)
    return fallen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--homeroom", type=Path, required=True, help="the binary")
    parser.add_argument("--tests", type=Path, help="the test binary `all`, for the case of a swapped plugin")
    parser.add_argument("--kills", type=int, default=100, help="over all cases")
    parser.add_argument("--case", action="append", help="one of these alone: " + ", ".join(case.name for case in CASES))
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    random.seed(given.seed)
    cases = [case for case in CASES if given.case is None or case.name in given.case]
    cases = [case for case in cases if given.tests or not case.is_test]
    fallen = Counter()
    with tempfile.TemporaryDirectory(prefix="homeroom-kills-") as folder:
        folder = Path(folder)
        prepare(given, folder)
        for number, case in enumerate(cases):
            kills = given.kills * (number + 1) // len(cases) - given.kills * number // len(cases)
            seconds, expected = undisturbed(case, folder / f"{number}-undisturbed", given)
            print(f"{case.name}: {seconds:.1f} s undisturbed, {kills} kills", flush=True)
            fallen += killed(case, kills, folder / f"{number}", given, seconds, expected)
    every = sum(fallen.values())
    print(f"{every} kills fell in a live run: " + ", ".join(f"{count} {phase}" for phase, count in fallen.most_common()))
    check("enough of them fell into a training", every >= given.kills and fallen["preparing"] <= 0.2 * every, fallen)
    verdict()


if __name__ == "__main__":
    main()
