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

# Slurm's own daemons, for which this must be root on a machine that has them; with neither it is left out by name.
if [[ "slurm" == *"$filter"* ]]; then
    if ((EUID != 0)) || ! command -v slurmctld slurmd munged >/dev/null; then
        echo "left out: slurm (needs root, and apt-get install slurm-wlm munge)"
    else
        started=$SECONDS result=passed
        printf '== slurm\n'
        bash tests/slurm/run.sh "${CARGO_TARGET_DIR:-target}/release/cosmos-host" >"$logs/slurm.log" 2>&1 || result=FAILED
        [[ $result == passed ]] || grep -A 20 '^FAILED' "$logs/slurm.log" | head -30
        names+=("slurm") results+=("$result") counts+=("$(grep -c '^  ok' "$logs/slurm.log")") seconds+=($((SECONDS - started)))
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
