#!/usr/bin/env bash
# Counts the instructions of each kernel of the CPU engine under callgrind and compares them with the counts that are kept
# in benchmarks/instructions.tsv. Unlike times, they do not depend on what else the machine does.
#
#   benchmarks/instructions.sh           exits with 1 when a kernel needs over 5 % more than it did, or has no count yet
#   benchmarks/instructions.sh TEXT      the same of the kernels whose names hold TEXT
#   benchmarks/instructions.sh --write   keeps the counts of now
#
# Needs valgrind. Valgrind knows no AVX-512, so the counts are those of the AVX2 kernels (of NEON on arm64); a row whose
# kernel only AVX-512 changes does not move. Another compiler gives other counts: the file names the one it was made with.
set -euo pipefail
cd "$(dirname "$0")/.."
kept=benchmarks/instructions.tsv
over_percent=5
wanted=${1-}
case "$wanted" in
  --write) wanted= ;;
  -*) echo "usage: benchmarks/instructions.sh [--write | TEXT]" >&2; exit 2 ;;
esac
command -v valgrind > /dev/null || { echo "valgrind is missing: apt-get install valgrind" >&2; exit 2; }

cargo build --quiet --release -p cosmos-kernels --example instructions
program=${CARGO_TARGET_DIR:-target}/release/examples/instructions
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export RAYON_NUM_THREADS=1
case "$(uname -m)" in
  x86_64) export COSMOS_ISA=avx2 ;;
esac

"$program" --list > "$work/list"
grep -v '^#' "$work/list" | grep -F -- "$wanted" > "$work/kernels" \
  || { echo "no kernel's name holds \`$wanted\`" >&2; exit 2; }
{
  echo "# isa	$(sed -n 's/^# //p' "$work/list")"
  echo "# rustc	$(rustc --version | cut -d ' ' -f 2)"
  echo "# date	$(date -u +%F)"
} > "$work/now"
while IFS= read -r kernel; do
  if ! valgrind --tool=callgrind --callgrind-out-file="$work/out" --toggle-collect='instructions::measured*' \
      "$program" "$kernel" > "$work/log" 2>&1 < /dev/null; then
    cat "$work/log" >&2
    echo "callgrind failed on \`$kernel\`" >&2
    exit 1
  fi
  count=$(sed -n 's/^\(totals\|summary\): *\([0-9]*\).*/\2/p' "$work/out" | head -n 1)
  if [ "${count:-0}" -lt 1000 ]; then
    echo "callgrind counted \`${count:-nothing}\` in \`$kernel\`: is \`measured\` still a function of its own?" >&2
    exit 1
  fi
  printf '%s\t%s\n' "$kernel" "$count" >> "$work/now"
done < "$work/kernels"

if [ "${1-}" = --write ]; then
  cp "$work/now" "$kept.new"
  mv "$kept.new" "$kept"
  echo "kept $(grep -vc '^#' "$kept") counts in $kept"
  exit 0
fi
[ -f "$kept" ] || { echo "there is no $kept to compare with: run with --write first" >&2; exit 2; }

awk -F '\t' -v over="$over_percent" -v part="$wanted" '
  NR == FNR && /^#/ { was[$1] = $2; next }
  NR == FNR         { before[$1] = $2; next }
  /^# (isa|rustc)/ && was[$1] != $2 {
    print "note: kept with " substr($1, 3) " " was[$1] ", this is " $2
  }
  /^# isa/ && was[$1] != $2 { other = 1 }
  /^#/ { next }
  {
    seen[$1] = 1
    if (!($1 in before)) { printf "%12d      new  %s\n", $2, $1; bad++; next }
    change = 100 * ($2 / before[$1] - 1)
    word = change > over ? ": WORSE" : change < -over ? ": better" : ""
    if (change > over) bad++
    printf "%12d %+6.2f %%  %s%s\n", $2, change, $1, word
  }
  END {
    for (kernel in before) if (!(kernel in seen) && index(kernel, part)) { printf "%12s     gone  %s\n", "-", kernel; bad++ }
    if (other) { print "counts of another instruction set cannot be compared"; exit 2 }
    if (bad) { printf "%d kernel(s) are over %d %% worse, new or gone; if that is meant: benchmarks/instructions.sh --write\n", bad, over; exit 1 }
    print "no kernel is over " over " % worse"
  }' "$kept" "$work/now"
