#!/usr/bin/env bash
# Steps and processor time to the teacher's level on the quickstart's game, from the same student: on-policy distillation,
# SFT on the teacher's samples, and GRPO on the reward alone. Draws docs/comparison-{light,dark}.svg and writes
# benchmarks/comparison-DATE.json.
#
#   benchmarks/comparison.sh           everything: about five minutes on two idle cores after the build
#   benchmarks/comparison.sh PART...   only these, in the order given: distillation, sample, sft, grpo, draw
set -euo pipefail
cd "$(dirname "$0")/.."
runs=outputs/comparison
plugin=plugins/dist/countdown.wasm
host=${CARGO_TARGET_DIR:-target}/release/cosmos-host
drawer=${CARGO_TARGET_DIR:-target}/release/examples/comparison
cargo build --quiet --release -p cosmos-host
cargo build --quiet --release -p cosmos-report --example comparison
mkdir -p "$runs"

train() { # NAME CONFIG
  rm -rf "${runs:?}/$1"
  "$drawer" watch "$runs/$1" "$host" run --config "$2" --plugin "$plugin" --output-dir "$runs/$1" \
    --set train.timestamp=1 --set train.ckpt.enable_checkpoint=false --set validation.freq=25 2> "$runs/$1.log"
}

distillation() { train distillation configs/quickstart/countdown.toml; }
grpo() { train grpo benchmarks/comparison/grpo.toml; }
sft() { train sft benchmarks/comparison/sft.toml; }

# The teacher's answers to every training problem, at the temperature that the student samples with; the right ones are
# kept.
sample() {
  local TIMEFORMAT='%U %S'
  {
    time "$host" eval --model configs/quickstart/teacher --plugin "$plugin" --config configs/quickstart/countdown.toml \
      --dataset countdown/train --n 4 --temperature 1 --max-tokens 20 --format json \
      > "$runs/eval.json" 2> "$runs/eval.log"
  } 2> "$runs/sampling.processor"
  "$drawer" keep "$runs/eval.json" "$runs/teacher-samples.jsonl"
}

draw() {
  local model
  model=$(sed -n 's/^model name[^:]*: //p' /proc/cpuinfo 2> /dev/null | head -n 1)
  "$drawer" draw "$runs" "$runs/comparison" \
    "${model:-$(uname -m)}, $(getconf _NPROCESSORS_ONLN) cores; cosmos-host $("$host" --version | cut -d ' ' -f 2); $(date -u +%F)"
  mv "$runs/comparison.json" "benchmarks/comparison-$(date -u +%F).json"
  mv "$runs/comparison-light.svg" "$runs/comparison-dark.svg" docs/
}

for part in "${@:-all}"; do
  case "$part" in
    all) distillation; sample; sft; grpo; draw ;;
    distillation | sample | sft | grpo | draw) "$part" ;;
    *) echo "no part \`$part\`: distillation, sample, sft, grpo, draw" >&2; exit 2 ;;
  esac
done
