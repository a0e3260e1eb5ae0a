"""Share of questions that `homeroom chat` answers exactly, at temperature 0, per kind where the rows name one.

    python3 accuracy.py MODEL_DIR ROWS.jsonl [--homeroom PATH] [--at-most N] [--show]

Each row is asked its first user message; its last message is the answer. Python's standard library only.
"""

import argparse
import json
import subprocess
from collections import defaultdict


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("rows")
    parser.add_argument("--homeroom", default="target/release/homeroom")
    parser.add_argument("--at-most", type=int, help="ask so many questions a kind")
    parser.add_argument("--show", action="store_true", help="print wrong answers")
    arguments = parser.parse_args()
    right, asked = defaultdict(int), defaultdict(int)
    with open(arguments.rows, encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    for row in rows:
        kind = row.get("kind", "all")
        if arguments.at_most and asked[kind] == arguments.at_most:
            continue
        question = next(message["content"] for message in row["messages"] if message["role"] == "user")
        expected = row["messages"][-1]["content"]
        command = [arguments.homeroom, "chat", "--model-dir", arguments.model, "--prompt", question, "--temperature", "0",
                   "--max-tokens", "64"]
        answer = subprocess.run(command, check=True, capture_output=True, text=True).stdout.rstrip("\n")
        asked[kind] += 1
        right[kind] += answer == expected
        if arguments.show and answer != expected:
            print(f"  {question!r} -> {answer!r}, not {expected!r}")
    for kind in asked:
        if len(asked) > 1:
            print(f"{kind:22} {right[kind]:4} of {asked[kind]:4}   {100 * right[kind] / asked[kind]:5.1f} %")
    total, questions = sum(right.values()), sum(asked.values())
    print(f"{'total':22} {total:4} of {questions:4}   {100 * total / questions:5.1f} %")


if __name__ == "__main__":
    main()
