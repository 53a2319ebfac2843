#!/usr/bin/env bash
# The kernels' tests compiled for arm64 and run with NEON: by QEMU on a machine of another kind.
#
#   tests/arm64.sh [FILTER]     only the tests whose names contain FILTER
#
# Needs the Rust target aarch64-unknown-linux-gnu and, elsewhere than on arm64,
# apt-get install qemu-user-static gcc-aarch64-linux-gnu libc6-dev-arm64-cross
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

case "${1:-}" in
    -h | --help) sed -n '2,7s/^# \{0,1\}//p' "$0"; exit 0 ;;
esac
target=aarch64-unknown-linux-gnu
if [[ "$(uname -m)" != aarch64 ]]; then
    for program in qemu-aarch64-static aarch64-linux-gnu-gcc; do
        command -v "$program" >/dev/null || { echo "error: \`$program\` is missing; \`$0 --help\` names its package" >&2; exit 2; }
    done
    export CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_LINKER=aarch64-linux-gnu-gcc
    export CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_RUNNER="qemu-aarch64-static -L /usr/aarch64-linux-gnu"
fi
[[ -d "$(rustc --print sysroot)/lib/rustlib/$target/lib" ]] \
    || { echo "error: Rust has no $target here: rustup target add $target" >&2; exit 2; }
exec cargo test --release --locked -p cosmos-kernels --target "$target" -- ${1+"$1"}
