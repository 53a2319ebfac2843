#!/usr/bin/env python3
"""Measures the rewards of the example plugins, each in turns with the same reward in CPython (rewards.py).

    cargo build --release -p cosmos-host
    for p in examples/plugins/*/; do target/release/cosmos-host plugin build $p; done
    python3 benchmarks/plugins.py [--seconds 3] [--cold] [--only NAME] [--write]

Every completion has 4 KB of text. What is not built is left out and named. `--write` puts the table under today's date
into README.md, in place of an earlier one of today.
"""

import argparse
import datetime
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import tomllib

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parent
TEXT_BYTES = 4096
# The reward that is measured, where a plugin has several.
REWARD = {"gsm8k": "validation", "format-length": "format-ok"}
# What the project holds itself to: scores a second on one core (at least), milliseconds of a cached start (at most).
TARGETS = {"rust": (100_000, 5.0), "python": (None, 100.0)}


def examples(only):
    for manifest in sorted((ROOT / "examples" / "plugins").glob("*/plugin.toml")):
        text = tomllib.loads(manifest.read_text())
        if "reward" in text["exports"] and only in (None, text["name"]):
            yield manifest.parent, text["name"], text["language"]


def long_format_cases(folder):
    """Completions in the right form and nearly so: text before them, as for the others, would only spoil the form."""
    path = pathlib.Path(folder) / "format.jsonl"
    thought = "First I add what is given, 17 + 25 = 42, and check it against the question.\n"
    with path.open("w") as out:
        for number in range(64):
            text = (thought * (TEXT_BYTES // len(thought) + 1))[: TEXT_BYTES - 60 - number]
            middle = "" if number % 4 else "or"
            completion = f"<think>{text}</think>{middle}<answer>{number}</answer>"
            out.write(json.dumps({"completion": completion, "score": 1.0 if number % 4 else 0.0}) + "\n")
    return path


def bench(host, folder, name, seconds, cold, temporary):
    command = [host, "plugin", "bench", folder, "--seconds", str(seconds), "--format", "json"]
    command += ["--cold"] if cold else []
    if name == "format-length":
        command += ["--cases", long_format_cases(temporary)]
    else:
        command += ["--text-bytes", str(TEXT_BYTES)]
    if name in REWARD:
        command += ["--reward", REWARD[name]]
    known = re.search(r"^REWARDS = .*$", (HERE / "rewards.py").read_text(), re.M).group()
    if f'"{name}"' in known:
        command += ["--against", f"{sys.executable} {HERE / 'rewards.py'} {name}"]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    if done.returncode != 0:
        return None, done.stderr.strip()
    return json.loads(done.stdout), None


def time_text(us):
    for limit, factor, unit in ((1e3, 1, "µs"), (1e6, 1e3, "ms"), (float("inf"), 1e6, "s")):
        if us < limit:
            return f"{us / factor:.3g} {unit}"


def row(name, language, report):
    speed = {(s["samples_per_call"], s["workers"] > 1): s for s in report["speed"]}
    full, single = speed[1024, False], speed[1, False]
    many = speed.get((1024, True), full)
    against = report["against"] or {}
    computed = against.get("computed_ratio")
    cells = [
        f"{name} ({language})",
        f"{report['component_bytes'] / 1024:,.0f} KiB",
        time_text(report["start"]["cold_ms"] * 1e3) if report["start"]["cold_ms"] else "–",
        time_text(report["start"]["cached"]["min_ms"] * 1e3) + " / " + time_text(report["start"]["cached"]["median_ms"] * 1e3),
        f"{full['scores_per_second']:,.0f}",
        f"{many['scores_per_second']:,.0f}",
        f"{1e6 / full['computed_us_per_score']:,.0f}" if full["computed_us_per_score"] else "–",
        f"{time_text(single['call_us_p50'])} / {time_text(single['call_us_p99'])}",
        f"{report['memory']['instance_bytes'] / 2**20:.1f} MiB",
        f"{against['program_scores_per_second']:,.0f}" if against else "–",
        f"{against['ratio']:.2f}" if against else "–",
        f"{computed:.2f}" if computed else "–",
    ]
    return "| " + " | ".join(cells) + " |"


HEADER = """| plugin | size | compile | cached start: best / median | scores/s, one core | all cores | scores a processor second | one a call: p50 / p99 | memory | CPython scores/s | ratio | by processor time |
|---|---|---|---|---|---|---|---|---|---|---|---|"""


def verdicts(rows):
    """The aims. What is met on a busy machine is met; what is not, cannot be judged there but by processor time."""
    for name, language, report in rows:
        rate_min, start_max = TARGETS.get(language, (None, None))
        full, start = report["speed"][0], report["start"]["cached"]["median_ms"]
        idle = (report["machine"]["load"] or 0.0) <= report["machine"]["cores"] / 2
        rate, what = full["scores_per_second"], "scores a second on one core"
        if rate_min:
            if rate < rate_min and not idle and full["computed_us_per_score"]:
                rate, what = 1e6 / full["computed_us_per_score"], "scores a processor second"
            yield f"{name}: {rate:,.0f} {what}; aim {rate_min:,}: {'met' if rate >= rate_min else 'missed'}"
        if start_max:
            verdict = "met" if start < start_max else "missed" if idle else "cannot be judged on a busy machine"
            yield f"{name}: cached start {start:.2f} ms; aim below {start_max:g}: {verdict}"


def section(rows, skipped, given):
    machine = rows[0][2]["machine"]
    load = max(report["machine"]["load"] or 0.0 for _, _, report in rows)
    busy = " The machine was busy with other work: only what is by processor time can be\nrelied on; run it again on an idle one." if load > machine["cores"] / 2 else ""
    lines = [
        f"## {datetime.date.today():%F}, plugins",
        f"{machine['processor']}, {machine['cores']} cores, load up to {load:.1f}.{busy}",
        f"Python {sys.version.split()[0]}; 4 KB of text a completion; medians of five rounds, plugin and CPython in turns; both give",
        "the same scores. Ratio: plugin by CPython, above 1 the sandboxed plugin is faster. CPython's time is that of the scoring",
        "alone, without reading JSON.",
        "",
        "```sh",
        f"python3 benchmarks/plugins.py --seconds {given.seconds:g}" + (" --cold" if given.cold else ""),
        "```",
        "",
        HEADER,
        *(row(*each) for each in rows),
        "",
        *(f"- {line}" for line in verdicts(rows)),
        *(f"- {name} ({language}): not measured, {why}" for name, language, why in skipped),
    ]
    return "\n".join(lines) + "\n"


def write(text):
    path = HERE / "README.md"
    page = path.read_text()
    heading = text.splitlines()[0]
    old = re.compile(re.escape(heading) + r"\n.*?(?=^## |\Z)", re.S | re.M)
    if old.search(page):
        page = old.sub(lambda _: text + "\n", page)
    else:
        page = page.rstrip("\n") + "\n\n" + text
    new = path.with_name(".README.md.new")
    new.write_text(page.rstrip("\n") + "\n")
    new.rename(path)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--host", default=ROOT / "target" / "release" / "cosmos-host", help="the program")
    parser.add_argument("--seconds", type=float, default=3.0, help="of each measurement")
    parser.add_argument("--only", help="one plugin by name")
    parser.add_argument("--cold", action="store_true", help="measure compiling too (Python: a minute)")
    parser.add_argument("--json", help="file for the reports as they are")
    parser.add_argument("--write", action="store_true", help="put the table into README.md")
    given = parser.parse_args()
    rows, skipped = [], []
    with tempfile.TemporaryDirectory() as temporary:
        for folder, name, language in examples(given.only):
            print(f"measuring {name} …", file=sys.stderr)
            report, why = bench(given.host, os.path.relpath(folder), name, given.seconds, given.cold, temporary)
            if report:
                rows.append((name, language, report))
            else:
                skipped.append((name, language, why.splitlines()[0].removeprefix("error: ")))
    for name, _, why in skipped:
        print(f"skipped {name}: {why}", file=sys.stderr)
    if not rows:
        sys.exit("error: there is nothing to measure\nhint: build an example: cosmos-host plugin build examples/plugins/countdown")
    if given.json:
        pathlib.Path(given.json).write_text(json.dumps([report for _, _, report in rows], indent=1) + "\n")
    text = section(rows, skipped, given)
    print(text)
    if given.write:
        write(text)


if __name__ == "__main__":
    main()
