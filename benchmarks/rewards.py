#!/usr/bin/env python3
"""The rewards of the example plugins in plain CPython, for `cosmos-host plugin bench --against`.

    python3 benchmarks/rewards.py NAME <cases.jsonl

Reads all cases first, scores them, and prints a score a line. The last line is the time of the scoring alone: reading
JSON and starting the interpreter are no part of a reward. No sandbox, no limits: this is what a trainer runs that grades
in its own process.
"""

import json
import pathlib
import re
import sys
import time

EXAMPLES = pathlib.Path(__file__).resolve().parent.parent / "examples" / "plugins"

ANSWER = re.compile(r"<answer>(.*?)</answer>", re.S)
NUMBER = re.compile(r"\d+")
ARITHMETIC = re.compile(r"[\d+\-*/().\s]+")


def countdown(case):
    """1 for an equation that uses each given number once and reaches the target."""
    found = ANSWER.search(case["completion"])
    answer = (found.group(1) if found else case["completion"]).strip()
    sides = answer.split("=")
    if len(sides) != 2:
        return 0.0
    left, right = (side.strip() for side in sides)
    reference = case["reference"]
    if sorted(int(n) for n in NUMBER.findall(left)) != sorted(reference["nums"]):
        return 0.0
    target = NUMBER.search(right)
    if target is None or int(target.group()) != reference["target"]:
        return 0.0
    if not (ARITHMETIC.fullmatch(left) and ARITHMETIC.fullmatch(right)):
        return 0.0
    try:
        # What graders commonly do; the plugin reads the text by a grammar of its own.
        return 1.0 if abs(eval(left, {}) - eval(right, {})) < 1e-9 else 0.0
    except Exception:
        return 0.0


def gsm8k():
    """The plugin's own code: its grader imports nothing of the host."""
    sys.path.insert(0, str(EXAMPLES / "gsm8k"))
    from numbers_after_hashes import final_answer, number

    def score(case):
        right = number(str(case["reference"]))
        if right is None:
            return None
        return 1.0 if final_answer(case["completion"]) == right else 0.0

    return score


def format_ok(case):
    """1 for `<think>…</think><answer>…</answer>`: a thought and an answer, each tag once, and nothing else around."""
    text = case["completion"].strip()
    if not (text.startswith("<think>") and text.endswith("</answer>")):
        return 0.0
    text = text[len("<think>") :]
    if "<think>" in text or text.count("</think>") != 1:
        return 0.0
    thought, rest = text.split("</think>")
    rest = rest.lstrip()
    if not thought.strip() or not rest.startswith("<answer>"):
        return 0.0
    if rest.count("<answer>") != 1 or rest.count("</answer>") != 1:
        return 0.0
    return 1.0 if rest[len("<answer>") : rest.find("</answer>")].strip() else 0.0


def unit_test():
    from unit_test_reward import score

    # 1,000 levels of the little language are several thousand of Python.
    sys.setrecursionlimit(20_000)
    return score


REWARDS = {"countdown": lambda: countdown, "gsm8k": gsm8k, "format-length": lambda: format_ok, "unit-test": unit_test}


def main():
    reward = REWARDS[sys.argv[1]]()
    cases = [json.loads(line) for line in sys.stdin]
    start, computed = time.perf_counter(), time.process_time()
    scores = [reward(case) for case in cases]
    seconds, computed = time.perf_counter() - start, time.process_time() - computed
    sys.stdout.write("".join(f"{json.dumps(score)}\n" for score in scores))
    print(json.dumps({"seconds": seconds, "computed_seconds": computed}))


if __name__ == "__main__":
    main()
