"""Grades every reference answer of the real data against itself and against a changed number, in the component.

    python3 check_data.py [COMPONENT]

The data is `gsm8k_train.jsonl` and `gsm8k_test.jsonl` in $COSMOS_DATA_DIR (without it, `shared/data` beside the
checkout); the program is $COSMOS_HOST, or cosmos-host in PATH. Ends with 0 and a message when there is no data.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
CHECKOUT = HERE.parents[2]
FILES = ("gsm8k_train.jsonl", "gsm8k_test.jsonl")


def changed(final: str) -> str:
    """Another number than `final`: one more."""
    return str(int(final.replace(",", "")) + 1)


def cases(folder: Path) -> Iterator[dict[str, Any]]:
    yield {"reward": "validation"}
    for name in FILES:
        with open(folder / name, encoding="utf-8") as lines:
            for at, line in enumerate(lines, 1):
                row = json.loads(line)
                final = row["answer"].rsplit("####", 1)[1].strip()
                for kind, reference, score in (("itself", final, 1.0), ("changed", changed(final), 0.0)):
                    yield {
                        "id": f"{name}:{at} against {kind}",
                        "prompt": row["question"],
                        "completion": row["answer"],
                        "reference": reference,
                        "score": score,
                    }


def main() -> int:
    folder = Path(os.environ.get("COSMOS_DATA_DIR") or CHECKOUT.parent / "shared" / "data")
    missing = [name for name in FILES if not (folder / name).is_file()]
    if missing:
        print(f"skipped: {', '.join(missing)} not in {folder} (set COSMOS_DATA_DIR)")
        return 0
    component = sys.argv[1] if len(sys.argv) > 1 else str(HERE / "build" / "gsm8k.wasm")
    program = os.environ.get("COSMOS_HOST", "cosmos-host")
    with tempfile.NamedTemporaryFile("w", suffix=".jsonl", encoding="utf-8") as file:
        count = 0
        for case in cases(folder):
            file.write(json.dumps(case) + "\n")
            count += "id" in case
        file.flush()
        command = [program, "plugin", "test", component, "--cases", file.name, "--format", "jsonl"]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    verdicts = [json.loads(line) for line in done.stdout.splitlines()]
    wrong = [one for one in verdicts if one.get("score") != one["expected"]]
    for one in wrong[:10]:
        print(f"{one['id']}: {one.get('score')}, not {one['expected']} {one.get('error', '')}", file=sys.stderr)
    print(f"{count} cases, {len(verdicts)} scored, {len(wrong)} differ")
    return done.returncode or int(bool(wrong) or len(verdicts) != count)


if __name__ == "__main__":
    sys.exit(main())
