#!/usr/bin/env bash
# What is too long for every change: the ignored tests of the workspace, and the controller's simulator for many seeds.
# Prints a table of what passed and what failed, and ends with 1 if anything failed.
#
#   tests/nightly.sh [FILTER]     FILTER runs only the parts whose name contains it
#   COSMOS_SIM_SEEDS=N            seeds of the simulator (default 20000)
#   COSMOS_NIGHTLY_LOGS=DIR       where the output of each part goes (default: target/nightly)
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

case "${1:-}" in
    -h | --help) sed -n '2,7s/^# \{0,1\}//p' "$0"; exit 0 ;;
esac
filter="${1:-}"
seeds="${COSMOS_SIM_SEEDS:-20000}"
logs="${COSMOS_NIGHTLY_LOGS:-${CARGO_TARGET_DIR:-target}/nightly}"
mkdir -p "$logs"
export CARGO_TERM_COLOR=never INSTA_UPDATE=no

command -v redis-server >/dev/null || { echo "error: \`redis-server\` is missing; the faults of processes need it" >&2; exit 2; }

names=() results=() seconds=() counts=()

# part NAME COMMAND…: it passes if the command ends well and has run at least one test.
part() {
    local name="$1" started=$SECONDS log result=passed
    shift
    [[ "$name" == *"$filter"* ]] || return 0
    log="$logs/${name//[^a-z0-9]/-}.log"
    printf '== %s\n' "$name"
    if ! "$@" >"$log" 2>&1; then
        result=FAILED
        grep -E '^(test .*FAILED|error|failures:)|panicked at' "$log" | head -20
    fi
    local passed
    passed="$(awk '/^test result:/ { n += $4 } END { print n + 0 }' "$log")"
    if [[ $result == passed && $passed == 0 ]]; then result="FAILED (no test ran)"; fi
    names+=("$name") results+=("$result") counts+=("$passed") seconds+=($((SECONDS - started)))
}

test=(cargo test --release --locked)
part "build" "${test[@]}" --workspace --no-run
# Building runs no test.
if ((${#results[@]})) && [[ ${results[0]} == "FAILED (no test ran)" ]]; then results[0]=passed; fi
part "faults of processes" "${test[@]}" -p cosmos-host --test all faults_processes -- --include-ignored --test-threads 1
part "every sharding combination" "${test[@]}" -p cosmos-engine sharded -- --include-ignored
part "simulator, $seeds seeds" env COSMOS_SIM_SEEDS="$seeds" "${test[@]}" -p cosmos-controller --test simulator
# Those that are children of other tests are run by them, and not here. No part builds the documentation's tests.
part "other ignored tests" "${test[@]}" --workspace --tests --exclude cosmos-plugin --exclude cosmos-parallel \
    --exclude cosmos-engine -- --ignored --skip faults_processes

# script NAME OK NEEDS COMMAND…: a part that is no cargo test. It passes if the command ends well and prints at least one
# line that matches OK. Where a program of NEEDS is missing it is left out by name.
script() {
    local name="$1" ok="$2" needs="$3" started=$SECONDS log result=passed program
    shift 3
    [[ "$name" == *"$filter"* ]] || return 0
    for program in $needs; do
        command -v "$program" >/dev/null || { echo "left out: $name (\`$program\` is missing)"; return 0; }
    done
    log="$logs/${name//[^a-z0-9]/-}.log"
    printf '== %s\n' "$name"
    if ! "$@" >"$log" 2>&1; then
        result=FAILED
        grep -E -A 20 '^(FAILED|error)|WORSE|panicked at|^test .*FAILED' "$log" | head -30
    fi
    local passed
    passed="$(grep -c -E "$ok" "$log")"
    if [[ $result == passed && $passed == 0 ]]; then result="FAILED (no test ran)"; fi
    names+=("$name") results+=("$result") counts+=("$passed") seconds+=($((SECONDS - started)))
}

# Slurm's own daemons, which want root.
if ((EUID == 0)); then
    script "slurm" '^  ok' "slurmctld slurmd munged" bash tests/slurm/run.sh "${CARGO_TARGET_DIR:-target}/release/cosmos-host"
elif [[ slurm == *"$filter"* ]]; then
    echo "left out: slurm (must be root)"
fi
script "kernels on arm64" '^test .* ok$' "qemu-aarch64-static aarch64-linux-gnu-gcc" bash tests/arm64.sh
script "instructions of each kernel" ' %  ' valgrind bash benchmarks/instructions.sh

# Both images, for which this needs docker, or buildah as root; with neither they are left out by name.
if [[ "images" == *"$filter"* ]]; then
    started=$SECONDS status=0
    printf '== images\n'
    bash tests/images.sh >"$logs/images.log" 2>&1 || status=$?
    if ((status == 77)); then
        echo "left out: images (needs docker, or buildah as root)"
    else
        result=passed
        ((status == 0)) || { result=FAILED; grep -A 20 '^FAILED' "$logs/images.log" | head -30; }
        names+=("images") results+=("$result") counts+=("$(grep -c '^  ok' "$logs/images.log")") seconds+=($((SECONDS - started)))
    fi
fi

failed=0
printf '\n%-32s %-22s %6s %8s\n' part result tests seconds
for i in "${!names[@]}"; do
    printf '%-32s %-22s %6s %8s\n' "${names[i]}" "${results[i]}" "${counts[i]}" "${seconds[i]}"
    [[ ${results[i]} == passed ]] || failed=1
done
printf 'output of each part: %s\n' "$logs"
exit $failed
