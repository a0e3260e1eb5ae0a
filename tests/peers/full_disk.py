"""A disk that is full loses nothing: runs find no room from a random write on, for a while or for good, and are taken up again once there is;
the result has the bytes of an undisturbed run. A training that only cannot save goes on, and says so once.

    python full_disk.py --homeroom target/release/homeroom [--times 60] [--case qlora]     # Linux; needs cc

Calls of the C library that would take room fail by full_disk.c beside this; what else is needed is in kills.py.
"""

import argparse
import random
import shutil
import subprocess
import tempfile
from collections import Counter
from pathlib import Path

from kills import CASES, Place, prepare, undisturbed
from serving import check, verdict

#: What a training that goes on says.
SAID = ("warning: no checkpoint at step", "its record has gaps")


def counted(case, folder: Path, given) -> int:
    """Calls that take room in a whole run that saves."""
    place = Place(case, folder, given)
    place.start(*case.saving, told=folder / "told").wait()
    return int((folder / "told").read_text())


def disturbed(case, folder: Path, given, calls: int, expected: dict) -> str:
    place = Place(case, folder, given)
    start, length = random.randrange(calls), random.choice([1, 2, random.randrange(1, calls), 1 << 40])
    resume = ["--resume"] if case.is_training and not case.is_test else []
    code = place.start(*case.saving, *resume, full=(start, length)).wait()
    text = (place.path / "log").read_text()
    saved = max(place.checkpoints(), default=0)
    said = [text.count(words) for words in SAID]
    ended = "" if code == 0 else next((line for line in text.splitlines() if line.startswith("error: ")), "no error was told")
    lasts = "for good" if length > calls else f"for {length} calls"
    print(f"    full from call {start:4} of {calls} {lasts:14}  {'ended with ' + str(code) if code else 'went on':14} saved {saved:3}  {ended[:150]}", flush=True)
    # Of a test binary that failed, the code is its harness's.
    ended = (0, 101) if case.is_test else (0, 1)
    check(f"{case.name}: it says so at most once", code in ended and "panicked" not in text and (max(said) <= 1 or length <= calls), text[-2000:])
    second = place.start(*case.saving, *resume) if code else None
    if second:
        again = second.wait()
        check(f"{case.name}: it goes on once there is room", again == 0, (place.path / "log").read_text()[-2000:])
    results = place.results()
    unequal = [name for name in expected if results.get(name) != expected[name]]
    check(f"{case.name}: the bytes of an undisturbed run", not unequal and len(results) == len(expected), (start, length, unequal))
    shutil.rmtree(place.path)
    return "ended it" if code else "it went on"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--homeroom", type=Path, required=True, help="the binary")
    parser.add_argument("--tests", type=Path, help="the test binary `all`, for the case of a swapped plugin")
    parser.add_argument("--times", type=int, default=60, help="over all cases")
    parser.add_argument("--case", action="append")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    random.seed(given.seed)
    cases = [case for case in CASES if (given.case is None or case.name in given.case) and (given.tests or not case.is_test)]
    came = Counter()
    with tempfile.TemporaryDirectory(prefix="homeroom-full-") as folder:
        folder = Path(folder)
        prepare(given, folder)
        given.shim = folder / "full_disk.so"
        subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", given.shim, Path(__file__).with_name("full_disk.c"), "-ldl"], check=True)
        for number, case in enumerate(cases):
            times = given.times * (number + 1) // len(cases) - given.times * number // len(cases)
            _, expected = undisturbed(case, folder / f"{number}-undisturbed", given)
            calls = counted(case, folder / f"{number}-counted", given)
            print(f"{case.name}: {calls} calls take room, {times} times full", flush=True)
            for time in range(times):
                came[disturbed(case, folder / f"{number}-{time}", given, calls, expected)] += 1
    print(f"{sum(came.values())} times full: " + ", ".join(f"{count} {what}" for what, count in came.items()))
    verdict()


if __name__ == "__main__":
    main()
