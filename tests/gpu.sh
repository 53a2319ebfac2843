#!/usr/bin/env bash
# Checks the CUDA feature. With a GPU: golden tests on `burn:cuda` and a dated measurement in benchmarks/.
# Without one: only that it compiles, and says so.
#
#   tests/gpu.sh [--out FILE]     FILE takes the measurement as JSON (default: benchmarks/gpu-<date>.json)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

out="benchmarks/gpu-$(date -u +%Y-%m-%d).json"
while (($#)); do
    case "$1" in
        --out) out="${2:?--out needs a file}"; shift 2 ;;
        -h | --help) sed -n '2,6s/^# \{0,1\}//p' "$0"; exit 0 ;;
        *) echo "error: unknown argument \`$1\`" >&2; exit 2 ;;
    esac
done

has_gpu() { [[ -e /proc/driver/nvidia/version ]] && compgen -G '/dev/nvidia[0-9]*' >/dev/null; }

if ! has_gpu; then
    echo "no GPU here: only checking that the CUDA feature compiles"
    cargo check --release --locked -p cosmos-host --features burn-cuda --all-targets
    cargo check --release --locked -p cosmos-parallel --features nccl --all-targets
    echo "compiled; golden tests and measurements on \`burn:cuda\` were NOT run"
    exit 0
fi

# NVRTC compiles the kernels at run time; the wheel has it where no toolkit is installed.
if ! ldconfig -p | grep -q libnvrtc.so && [[ -z "${CUDA_PATH:-}" ]]; then
    echo "hint: NVRTC is not in the loader's path; set CUDA_PATH or LD_LIBRARY_PATH when the kernels do not compile" >&2
fi

# Collectives between all GPUs of this machine, or of one with itself. `COSMOS_NCCL` names NCCL's file or folder where the
# loader does not find it.
if ! ldconfig -p | grep -q libnccl.so && [[ -z "${COSMOS_NCCL:-}" ]]; then
    echo "hint: NCCL is not in the loader's path; set COSMOS_NCCL to its file or folder when it cannot be loaded" >&2
fi

nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader || true
cargo build --release --locked -p cosmos-host --features burn-cuda --example bench
cargo test --release --locked -p cosmos-parallel --features nccl --lib nccl -- --include-ignored --nocapture
COSMOS_TEST_DEVICE=burn:cuda cargo test --release --locked -p cosmos-host --features burn-cuda --test all golden -- --nocapture --test-threads 1
cargo run --release --locked -q -p cosmos-host --features burn-cuda --example bench -- \
    --device burn:cuda --suite device --json "$out"
echo "measured: $out"
