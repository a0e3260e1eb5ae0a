"""Files and fine-tuning jobs by the official `openai` package, unchanged but for the base URL, to the end: upload, train, poll, ask the result.
Needs: pip install openai.

Run: python openai_jobs.py --homeroom target/release/homeroom
"""

import argparse
import json
import os
import stat
import tempfile
import time
from pathlib import Path

import openai

from serving import check, serve, verdict

ROOT = Path(__file__).resolve().parents[2]
POCKET = ROOT / "runtime/pocket"
LESSONS = POCKET / "quickstart/train.jsonl"
EXAM = POCKET / "quickstart/eval.jsonl"


def refuses(what: str, kind: type, words: str, run) -> None:
    try:
        seen = run()
    except openai.APIStatusError as error:
        check(what, type(error) is kind and words in str(error), error)
        return
    check(what, False, seen)


def ended(client: openai.OpenAI, job: str, within: float = 300):
    until = time.monotonic() + within
    while (now := client.fine_tuning.jobs.retrieve(job)).status not in ("succeeded", "failed", "cancelled"):
        if time.monotonic() > until:
            check(f"{job} ends within {within} s", False, now)
            break
        time.sleep(0.3)
    return now


def files(client: openai.OpenAI, home: Path) -> tuple[str, str]:
    lessons = client.files.create(file=open(LESSONS, "rb"), purpose="fine-tune")
    check("a file is taken", lessons.status == "processed" and lessons.bytes == LESSONS.stat().st_size and lessons.filename == "train.jsonl", lessons)
    exam = client.files.create(file=("exam.jsonl", EXAM.read_bytes()), purpose="fine-tune", expires_after={"anchor": "created_at", "seconds": 3600})
    check("one that expires is taken", exam.expires_at == exam.created_at + 3600, exam)
    check("files are listed, the newest first", {file.id for file in client.files.list(purpose="fine-tune")} == {lessons.id, exam.id})
    check("page by page", [len(client.files.list(limit=1).data), client.files.list(limit=1).has_next_page()] == [1, True])
    check("a file is told of", client.files.retrieve(lessons.id) == lessons)
    check("its bytes come back", client.files.content(lessons.id).read() == LESSONS.read_bytes())
    modes = {stat.S_IMODE(path.stat().st_mode) for path in (home / "files").rglob("*") if path.is_file()}
    check("nobody else can read it", modes == {0o600}, modes)
    other = client.files.create(file=("x.jsonl", b"{}\n"), purpose="fine-tune")
    check("a file is deleted", client.files.delete(other.id).deleted)
    refuses("and is gone", openai.NotFoundError, "there is no file", lambda: client.files.retrieve(other.id))
    refuses("other purposes are refused", openai.BadRequestError, "fine-tune alone", lambda: client.files.create(file=("x.jsonl", b"{}\n"), purpose="batch"))
    return lessons.id, exam.id


def jobs(client: openai.OpenAI, lessons: str, exam: str) -> None:
    create = client.fine_tuning.jobs.create
    refuses("a model that is not allowed is refused", openai.BadRequestError, "is not trained here", lambda: create(model="gpt-4o-mini", training_file=lessons))
    refuses("a file that is not there is refused", openai.BadRequestError, "there is no file", lambda: create(model="model", training_file="file-0"))
    refuses("a field that is not known is refused", openai.BadRequestError, "`n_epoch`", lambda: create(model="model", training_file=lessons, extra_body={"n_epoch": 3}))

    job = create(
        model="model",
        training_file=lessons,
        validation_file=exam,
        suffix="Pig Latin",
        seed=7,
        method={"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 8, "batch_size": 16, "learning_rate_multiplier": 25}}},
        metadata={"class": "7b"},
    )
    check("a job is taken", job.status in ("queued", "running") and job.fine_tuned_model is None and job.seed == 7 and job.method.supervised.hyperparameters.n_epochs == 8, job)
    behind = create(model="model", training_file=lessons, hyperparameters={"n_epochs": 50})
    check("another waits behind it", client.fine_tuning.jobs.retrieve(behind.id).status == "queued")
    check("jobs are listed", [one.id for one in client.fine_tuning.jobs.list()] == [behind.id, job.id])
    check("and found by what is written on them", [one.id for one in client.fine_tuning.jobs.list(metadata={"class": "7b"})] == [job.id])
    check("one that waits is cancelled", client.fine_tuning.jobs.cancel(behind.id).status == "cancelled")
    refuses("a file that is needed is not deleted", openai.ConflictError, job.id, lambda: client.with_options(max_retries=0).files.delete(lessons))

    done = ended(client, job.id)
    check("the job succeeds", done.status == "succeeded" and done.error is None and done.finished_at and done.trained_tokens > 10_000, done)
    events = list(client.fine_tuning.jobs.list_events(job.id, limit=50))
    messages = [event.message for event in events]
    check("its events are told, the newest first", messages[-1].startswith("Created") and "completed" in messages[0], messages)
    steps = [event.data for event in events if event.type == "metrics"]
    check("with the losses of all steps", len(steps) == 144 and steps[0]["train_loss"] < steps[-1]["train_loss"], (len(steps), steps[:1]))
    valid = [step["valid_loss"] for step in steps if step["valid_loss"] is not None]
    check("and those on held-out rows after each epoch", len(valid) == 8 and valid[0] < valid[-1], valid)
    check("no event is told twice", len({event.id for event in events}) == len(events))
    kept = client.fine_tuning.jobs.checkpoints.list(job.id).data
    best = next(one for one in kept if one.fine_tuned_model_checkpoint == done.fine_tuned_model)
    check("its checkpoints are told, the result among them", 1 < len(kept) <= 4 and best.metrics.full_valid_loss == min(valid), kept)
    check("  in order", [one.step_number for one in kept] == sorted((one.step_number for one in kept), reverse=True), kept)
    table = client.files.content(done.result_files[0]).text.splitlines()
    check("the losses are a file", table[0].startswith("step,train_loss") and len(table) == 145, table[:2])

    check("the model is listed", done.fine_tuned_model in [model.id for model in client.models.list()])
    rows = [json.loads(line)["messages"] for line in EXAM.read_text().splitlines()][:20]
    ask = lambda model, row: client.chat.completions.create(model=model, messages=row[:1], temperature=0, max_tokens=24).choices[0].message.content
    right = sum(ask(done.fine_tuned_model, row) == row[1]["content"] for row in rows)
    before = sum(ask("model", row) == row[1]["content"] for row in rows)
    check("and has learned what its base cannot", right >= 10 > before, (right, before))

    earlier = next(one for one in kept if one.fine_tuned_model_checkpoint != done.fine_tuned_model).fine_tuned_model_checkpoint
    check("an earlier checkpoint answers, too", bool(ask(earlier, rows[0])) and earlier.startswith(f"{done.fine_tuned_model}:ckpt-step-"), earlier)

    further = create(model=done.fine_tuned_model, training_file=lessons, hyperparameters={"n_epochs": 1})
    check("it is trained further", ended(client, further.id).status == "succeeded")
    bad = client.files.create(file=("bad.jsonl", b'{"messages": [{"role": "user"}]}\n'), purpose="fine-tune")
    failed = ended(client, create(model="model", training_file=bad.id).id)
    check("rows that cannot be learned fail the job in words", failed.status == "failed" and failed.error.code == "invalid_training_file" and "bad.jsonl" in failed.error.message and "line 1" in failed.error.message, failed.error)
    pairs = [{"input": {"messages": row[:1]}, "preferred_output": [row[1]], "non_preferred_output": [{"role": "assistant", "content": "no"}]} for row in rows]
    pairs = client.files.create(file=("pairs.jsonl", "\n".join(map(json.dumps, pairs)).encode()), purpose="fine-tune")
    dpo = create(model="model", training_file=pairs.id, method={"type": "dpo", "dpo": {"hyperparameters": {"n_epochs": 1, "beta": 0.1}}})
    check("preferences are trained", ended(client, dpo.id).status == "succeeded", client.fine_tuning.jobs.retrieve(dpo.id).error)

    long = create(model="model", training_file=lessons, hyperparameters={"n_epochs": 500})
    until = time.monotonic() + 60
    while len(client.fine_tuning.jobs.list_events(long.id).data) < 8 and time.monotonic() < until:
        time.sleep(0.2)
    check("one that trains is halted", client.fine_tuning.jobs.pause(long.id).status == "paused")
    steps = lambda: max((event.data["step"] for event in client.fine_tuning.jobs.list_events(long.id).data if event.type == "metrics"), default=0)
    halted = steps()
    check("goes on", client.fine_tuning.jobs.resume(long.id).status in ("queued", "running"))
    while steps() <= halted and time.monotonic() < until:
        time.sleep(0.2)
    check("from where it was", steps() > halted > 0, (halted, steps()))
    check("and is cancelled", client.fine_tuning.jobs.cancel(long.id).status == "cancelled")
    refuses("once", openai.BadRequestError, "cancelled already", lambda: client.fine_tuning.jobs.cancel(long.id))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--homeroom", required=True)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        home = Path(place) / "home"
        home.mkdir(mode=0o700)
        os.environ["HOMEROOM_HOME"] = str(home)
        handlers = home / "handlers.toml"
        handlers.write_text(f'[handlers.model]\nkind = "local"\nmodel = "{POCKET}/model"\n\n[fine_tuning]\nbases = ["{POCKET}/model"]\n')
        with serve(options.homeroom) as (url, _):
            client = openai.OpenAI(base_url=url, api_key="any")
            lessons, exam = files(client, home)
            jobs(client, lessons, exam)
        with serve(options.homeroom) as (url, _):
            client = openai.OpenAI(base_url=url, api_key="any")
            models = [model.id for model in client.models.list()]
            done = [job for job in client.fine_tuning.jobs.list() if job.status == "succeeded"]
            check("all is there after a restart", len(done) == 3 and all(job.fine_tuned_model in models for job in done), models)
            answer = client.chat.completions.create(model=done[-1].fine_tuned_model, messages=[{"role": "user", "content": "Say plum in Pig Latin."}], temperature=0)
            check("and answers", bool(answer.choices[0].message.content), answer)
    verdict()


main()
