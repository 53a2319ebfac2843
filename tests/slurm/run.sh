#!/bin/bash
# `launch slurm` against a real Slurm (cluster.sh) on this machine.
#     tests/slurm/run.sh BINARY [SCENARIO…]        default: all; exit 77 without Slurm
# Each scenario submits jobs as a user would and looks at what they leave: end state, steps, who was restarted.
set -eu
binary=$(realpath "$1")
shift
root=$(cd "$(dirname "$0")/../.." && pwd)
here=$root/tests/slurm
work=$(mktemp -d /tmp/cosmos-slurm-XXXXXX)
chmod 755 "$work"
# KEEP=1 keeps the run folders.
trap '"$here/cluster.sh" stop "$work/cluster" || true' EXIT
"$here/cluster.sh" start "$work/cluster" > "$work/environment"
. "$work/environment"
cd "$root"

fail() {
    echo "FAILED $scenario: $*" >&2
    for file in "$run"/STATE "$run"/slurm-*.log "$run"/launch/attempt-*/logs/*.log; do
        [ -e "$file" ] && echo "--- $file" && tail -n 25 "$file"
    done >&2
    exit 1
}

state() { head -n 1 "$run/STATE"; }

# Waits until the run's state is $1, at most $2 seconds.
wait_state() {
    local until=$((SECONDS + ${2:-240})) now
    while now=$(state) && [ "$now" != "$1" ]; do
        case $now in done | failed | cancelled | saved) fail "ended as $now, not $1" ;; esac
        [ $SECONDS -lt $until ] || fail "state is $now, not $1, after ${2:-240} s"
        sleep 0.5
    done
}

# Waits until file $1 has $2 lines.
wait_lines() {
    local until=$((SECONDS + 300))
    until [ -e "$1" ] && [ "$(wc -l < "$1")" -ge "$2" ]; do
        case $(state) in done | failed | cancelled | saved) fail "ended as $(state) before $1 had $2 lines" ;; esac
        [ $SECONDS -lt $until ] || fail "no $2 lines in $1"
        sleep 0.2
    done
}

# Steps that the run in $1 has written down, each once; a resumed run must not make one twice.
steps_of() { grep -o '"step": *[0-9]*' "$1" | grep -o '[0-9]*$' | sort -n | uniq; }

submit() {
    local answer
    answer=$("$binary" launch slurm --config-path configs/quickstart/countdown.toml --plugin plugins/dist/countdown.wasm \
        --output-root-path "$work/runs" --job-name "$scenario" "$@")
    job=$(echo "$answer" | sed -n 's/^job \([0-9]*\): .*/\1/p')
    run=$(echo "$answer" | sed -n 's/^job [0-9]*: //p')
    [ -n "$job" ] && [ -d "$run" ] || { echo "$answer"; exit 1; }
}

# With roles that stand_in.sh plays.
submit_stand_in() {
    export STAND_IN=$work/stand-in-$scenario COSMOS_LAUNCH_PROGRAM=$here/stand_in.sh STEPS=$1
    shift
    mkdir -p "$STAND_IN"
    for file in ${MISHAPS-}; do touch "$STAND_IN/$file"; done
    submit --pre-timeout-signal 60 --port $((31000 + RANDOM % 5000)) --redis-port $((36000 + RANDOM % 5000)) --rdzv-port $((41000 + RANDOM % 5000)) "$@"
    unset COSMOS_LAUNCH_PROGRAM
}

# One process, the real thing: its time is up before it is done, it saves, goes on in the queue, and finishes. So that this
# does not depend on how fast it is, it is stopped after a few steps until Slurm has warned it.
whole_run_times_out_and_resumes() {
    local steps=20 metrics= process until=$((SECONDS + 300))
    submit --one-process --slurm-job-time 2 --pre-timeout-signal 60 --set train.max_num_steps=$steps \
        --set train.ckpt.save_freq=1000 --set validation.enable=false
    until [ -n "$metrics" ]; do
        [ $SECONDS -lt $until ] || fail "no metrics"
        metrics=$(find "$run/outputs" -name metrics.jsonl 2> /dev/null | head -n 1)
        sleep 0.2
    done
    wait_lines "$metrics" 2
    process=$(pgrep -f "cosmos-host run .*$run/" | head -n 1)
    kill -STOP "$process"
    until grep -q "the time is nearly up" "$run"/slurm-*.log; do
        [ $SECONDS -lt $until ] || fail "Slurm did not warn it"
        sleep 0.2
    done
    kill -CONT "$process"
    wait_state done 900
    grep -q "requeued: saved in start 1" "$run"/slurm-*.log || fail "it was not saved and requeued"
    [ "$(steps_of "$metrics" | wc -l)" = $steps ] || fail "not $steps different steps"
    [ "$(grep -c '"step"' "$metrics")" = $steps ] || fail "some step was made twice"
}

# Roles on two nodes: the warning comes, the controller saves, all leave, the job goes on at the same step.
roles_on_two_nodes_save_and_resume() {
    submit_stand_in 40 --nodes 2 --n-rollout-replicas 2 --slurm-job-time 10
    wait_lines "$STAND_IN/history" 1
    sleep 3
    scancel --signal=USR1 --batch "$job"
    wait_state requeued 240
    wait_state done 600
    grep -q "saved in start 1" "$run"/slurm-*.log || fail "it was not saved"
    [ "$(sort -n "$STAND_IN/history" | uniq -d)" = "" ] || fail "steps made twice"
    [ "$(wc -l < "$STAND_IN/history")" = 40 ] || fail "not 40 steps"
    [ "$(cat "$STAND_IN/broker-says")" = PONG ] || fail "no Redis: $(cat "$STAND_IN/broker-says")"
    grep -q "^1$" <(ls "$run/launch/attempt-1" | grep -c node-1.end) || fail "the second node left no end state"
    [ "$(cat "$run/launch/retries-left")" = 3 ] || fail "saving cost a retry"
    # Whoever submits a finished run again gets nothing.
    scontrol show job "$job" > /dev/null
    again=$(sbatch --parsable --wait "$run/job.sbatch") || fail "submitting a finished run again failed"
    grep -q "nothing to do" "$run/slurm-$again.log" || fail "a finished run was started again"
}

# A teacher that is killed is started again; the job does not notice.
a_teacher_dies() {
    MISHAPS=kill-teacher-0 submit_stand_in 20 --slurm-job-time 10
    wait_state done 600
    grep -q "teacher-0 ended: killed by signal 9" "$run"/slurm-*.log || fail "nobody saw the teacher die"
    [ "$(cat "$run/launch/attempt")" = 1 ] || fail "the whole job was started again"
}

# One that keeps dying ends the job, which is put back while retries last, and then says who it was.
a_teacher_keeps_dying() {
    MISHAPS=doom-teacher-0 submit_stand_in 1000 --slurm-job-time 10 --retries 1
    wait_state failed 240
    grep -q "teacher-0 ended: exit code 1, started 4 times" "$run/STATE" || fail "the reason does not name the teacher"
    [ "$(cat "$run/launch/attempt")" = 2 ] || fail "$(cat "$run/launch/attempt") starts, not 2"
}

# A wrong config is not tried twice.
a_wrong_config_is_not_retried() {
    MISHAPS=wrong submit_stand_in 10 --slurm-job-time 10
    wait_state failed 240
    grep -q "cannot help" "$run/STATE" || fail "no word that retrying is no use"
    [ "$(cat "$run/launch/attempt")" = 1 ] || fail "it was tried again"
}

# Cancelled: nothing is left running, nothing comes back.
cancelled_by_the_user() {
    submit_stand_in 1000 --slurm-job-time 10
    wait_lines "$STAND_IN/history" 1
    scancel "$job"
    wait_state cancelled 240
    local until=$((SECONDS + 120))
    while pgrep -f "$run/launch|$STAND_IN|redis-server.*:$(sed -n 's/.*"redis": \([0-9]*\).*/\1/p' "$run/launch/plan.json")" > /dev/null; do
        [ $SECONDS -lt $until ] || fail "processes are left"
        sleep 0.5
    done
}

# The real roles over a real Redis, and a teacher that is killed.
real_roles_and_a_teacher_dies() {
    local steps=20
    submit --slurm-job-time 20 --pre-timeout-signal 60 --set train.max_num_steps=$steps --set validation.enable=false \
        --port $((31000 + RANDOM % 5000)) --redis-port $((36000 + RANDOM % 5000)) --rdzv-port $((41000 + RANDOM % 5000))
    wait_lines "$run/metrics.jsonl" 1
    local teacher
    teacher=$(pgrep -f "cosmos-host teacher .*$run/" | head -n 1)
    kill -9 "$teacher"
    wait_state done 900
    grep -q "teacher-0 ended: killed by signal 9" "$run"/slurm-*.log || fail "nobody saw the teacher die"
    [ "$(steps_of "$run/metrics.jsonl" | tail -n 1)" = $steps ] || fail "not $steps steps"
}

# The real roles on two nodes: warned in the middle, they save, go on in the queue at the same step, and finish.
real_roles_save_and_resume() {
    local steps=16
    submit --nodes 2 --n-rollout-replicas 2 --slurm-job-time 20 --pre-timeout-signal 300 \
        --set train.max_num_steps=$steps --set validation.enable=false --set train.ckpt.save_freq=1000 \
        --port $((31000 + RANDOM % 5000)) --redis-port $((36000 + RANDOM % 5000)) --rdzv-port $((41000 + RANDOM % 5000))
    wait_lines "$run/metrics.jsonl" 3
    scancel --signal=USR1 --batch "$job"
    wait_state done 900
    grep -q "requeued: saved in start 1" "$run"/slurm-*.log || fail "it was not saved and requeued"
    [ "$(cat "$run/launch/attempt")" = 2 ] || fail "$(cat "$run/launch/attempt") starts, not 2"
    [ "$(steps_of "$run/metrics.jsonl" | wc -l)" = $steps ] || fail "not $steps different steps"
    [ "$(grep -c '"step"' "$run/metrics.jsonl")" = $steps ] || fail "some step was made twice"
    [ "$(cat "$run/launch/retries-left")" = 3 ] || fail "saving cost a retry"
}

# A policy of four ranks over two nodes, whose second process is killed: both are started again, and the run ends with the
# weights of a run that nobody disturbs.
a_replica_over_two_nodes() {
    local steps=8 second hash
    sharded() {
        submit --nodes 2 --ranks-per-node 2 --slurm-job-time 20 --pre-timeout-signal 60 --set train.max_num_steps=$steps \
            --set validation.enable=false --set train.ckpt.save_freq=4 --set policy.parallelism.tp_size=2 \
            --set policy.parallelism.dp_shard_size=2 --set train.timestamp=1 \
            --port $((31000 + RANDOM % 5000)) --redis-port $((36000 + RANDOM % 5000)) --rdzv-port $((41000 + RANDOM % 5000))
    }
    weights() { cat "$run"/checkpoints/step_0000000$steps/model*.safetensors | sha256sum; }
    sharded
    wait_state done 600
    hash=$(weights)
    sharded
    wait_lines "$run/metrics.jsonl" 5
    second=$(pgrep -f "cosmos-host policy .*$run/.*--node-rank 1" | head -n 1)
    kill -9 "$second"
    wait_state done 600
    grep -q "policy-0.1 ended: killed by signal 9" "$run"/slurm-*.log || fail "nobody saw the second process die"
    grep -q "lost process 1 of this replica" "$run"/launch/attempt-1/logs/policy-0.log || fail "the first did not name it"
    [ "$(cat "$run/launch/attempt")" = 1 ] || fail "the whole job was started again"
    [ "$(weights)" = "$hash" ] || fail "other weights than those of the undisturbed run"
}

scenarios=${*:-a_replica_over_two_nodes a_teacher_dies a_wrong_config_is_not_retried cancelled_by_the_user whole_run_times_out_and_resumes real_roles_save_and_resume real_roles_and_a_teacher_dies roles_on_two_nodes_save_and_resume a_teacher_keeps_dying}
for scenario in $scenarios; do
    echo "$scenario"
    run=$work
    $scenario
    echo "  ok ($SECONDS s)"
done
[ -n "${KEEP-}" ] || rm -rf "$work/runs"
