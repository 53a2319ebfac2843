"""What the benchmarks ask of the machine that they run on."""

import os
import platform
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def processor():
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor()


def bench_binary(asked):
    if asked:
        return asked
    target = Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target"))
    binary = target / "release" / "examples" / "bench"
    if not binary.exists():
        sys.exit(f"error: {binary} is not there\nhint: cargo build --release -p cosmos-host --example bench")
    return binary
