"""Feedback to a better tutor, end to end: answers of a running server are rated, `feedback export` writes rows, `improve` trains and promotes, and
the same server answers with the new model. Needs: pip install openai.

Run: python class_feedback.py --homeroom target/release/homeroom
"""

import argparse
import json
import os
import subprocess
import tempfile
import time
from pathlib import Path

import openai

from serving import check, serve, verdict

ROOT = Path(__file__).resolve().parents[2]
POCKET = ROOT / "runtime/pocket"
RATED = 40


def rows(name: str) -> list[tuple[str, str]]:
    lines = (POCKET / f"quickstart/{name}.jsonl").read_text().splitlines()
    return [(row["messages"][0]["content"], row["messages"][1]["content"]) for row in map(json.loads, lines)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--homeroom", required=True)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        home, out = Path(place) / "home", Path(place) / "rows.jsonl"
        home.mkdir(mode=0o700)
        os.environ["HOMEROOM_HOME"] = str(home)
        (home / "handlers.toml").write_text(
            f'[handlers.pig-latin]\nkind = "local"\nmodel = "{POCKET}/model"\n\n[memory]\ncontent = "redacted"\nretention_days = 90\n'
        )

        def command(*arguments) -> str:
            done = subprocess.run([options.homeroom, *map(str, arguments)], capture_output=True, text=True, cwd=ROOT)
            check(f"homeroom {' '.join(map(str, arguments))}", done.returncode == 0, done.stderr)
            return done.stdout

        with serve(options.homeroom) as (url, _):
            client = openai.OpenAI(base_url=url, api_key="any")

            def ask(question: str):
                return client.chat.completions.create(model="pig-latin", messages=[{"role": "user", "content": question}], temperature=0, max_tokens=24)

            def right() -> int:
                return sum(ask(question).choices[0].message.content == answer for question, answer in rows("eval")[:20])

            def rate(lessons: list[tuple[str, str]]) -> None:
                for question, answer in lessons:
                    said = ask(question)
                    good = said.choices[0].message.content == answer
                    thought = {"rating": "up"} if good else {"rating": "down", "correction": answer}
                    rated = client.post("/feedback", cast_to=object, body={"response_id": said.id} | thought)
                    if "correction" not in rated["kept"]:
                        check("feedback is kept", False, rated)

            lessons, seen = rows("train"), [right()]
            for number in (1, 2):
                rate(lessons[RATED * (number - 1) : RATED * number])
                command("feedback", "export", "--out", out)
                written = [json.loads(line) for line in out.read_text().splitlines()]
                check(f"round {number}: {RATED} answers are rated, each is a row, and each correction", sum(row["label"] for row in written) == RATED * number, len(written))
                result = json.loads(command("run", "configs/improve.toml", "--json", "--set", f"ratings={out}", "--set", "epochs=20", "--set", "max_kl=3"))
                check("  the new model is better, and takes the place of the old one", result["promoted"], result)
                until = time.monotonic() + 15
                while (now := right()) <= seen[-1] and time.monotonic() < until:
                    time.sleep(0.5)
                seen.append(now)
                check("  the running server answers with it", now > seen[-2], seen)
                print(f"         held-out loss {result['eval_loss_before']:.3f} before, {result['eval_loss']:.3f} now; right answers of 20: {seen}")
            command("feedback", "verify")
    verdict()


main()
