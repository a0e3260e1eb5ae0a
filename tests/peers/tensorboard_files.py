"""Reads the event files of a training with TensorBoard's own reader and holds them to events.jsonl of the run.

Of a step that was trained again after a resume or a rewind the last line counts, and steps after the one that was gone back to do not.

  python tests/peers/tensorboard_files.py $HOMEROOM_HOME/runs/NAME-1      (tensorboard)
"""

import argparse
import json
import math
import struct
import sys
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

TAGS = {
    "train/loss": ("step", "loss"),
    "train/grad_norm": ("step", "grad_norm"),
    "train/learning_rate": ("step", "learning_rate"),
    "eval/loss": ("eval", "eval_loss"),
    "eval/perplexity": ("eval", "perplexity"),
    "eval/token_accuracy": ("eval", "token_accuracy"),
}


def lines(run):
    for line in (run / "events.jsonl").read_text().splitlines():
        try:
            yield json.loads(line)
        except json.JSONDecodeError:
            pass


def expected(run, training):
    """By tag, the value of each step that counts."""
    values = {tag: {} for tag in TAGS}
    for event in lines(run):
        if event.get("training", 1) != training:
            continue
        kind, step = event["event"], event.get("step", 0)
        back_to = {"resumed": step, "rewound": event.get("to")}.get(kind)
        if back_to is not None:
            for steps in values.values():
                for later in [step for step in steps if step > back_to]:
                    del steps[later]
        for tag, (of, key) in TAGS.items():
            if kind == of and event.get(key) is not None:
                values[tag][step] = struct.unpack("f", struct.pack("f", event[key]))[0]
    return values


parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("run", type=Path)
run = parser.parse_args().run
problems = count = 0
for training in sorted(run.glob("trainings/*")):
    accumulator = EventAccumulator(str(training), size_guidance={"scalars": 0})
    accumulator.Reload()
    known = set(accumulator.Tags()["scalars"])
    for tag, steps in expected(run, int(training.name)).items():
        read = {event.step: event.value for event in accumulator.Scalars(tag)} if tag in known else {}
        same = read.keys() == steps.keys() and all(
            read[step] == value or math.isnan(read[step]) and math.isnan(value) for step, value in steps.items()
        )
        count += len(steps)
        if not same:
            problems += 1
            print(f"training {training.name}, {tag}: TensorBoard reads {read}, events.jsonl says {steps}")
    print(f"training {training.name}: {len(list(training.glob('events.out.tfevents.*')))} files, {sorted(known)}")
print(f"{count} values, {problems} tags differ")
sys.exit(problems > 0 or count == 0)
