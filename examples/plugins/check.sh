#!/usr/bin/env bash
# examples/plugins/check.sh [--all]: runs the unit tests of the Rust plugins and the C SDK, builds every example here
# and new projects from the templates, and runs `plugin test` on each. A language whose toolchain is missing and cannot
# be got is left out by name:
#
#   skipped: unit-test: clang, wasm-ld and wasi-libc is missing
#
# COSMOS_HOST names the cosmos-host to use (default: it is built). COSMOS_CHECK_INSTALL=0 fetches no toolchain.
# --all makes projects of every kind also in Python and JavaScript, whose components take a minute each to compile.
# The last line counts; the exit code is 1 when anything failed.
set -uo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(cd "$here/../.." && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
declare -A why
passed=0 skipped=0 failed=0

host=${COSMOS_HOST:-}
if [ -z "$host" ]; then
  (cd "$root" && cargo build --release --locked -q -p cosmos-host) || exit 1
  host=${CARGO_TARGET_DIR:-$root/target}/release/cosmos-host
fi

skip() { echo "skipped: $1: $2"; skipped=$((skipped + 1)); }

# check NAME FOLDER: builds and tests the project in FOLDER.
check() {
  local log=$work/log
  if "$host" plugin build "$2" >"$log" 2>&1 && "$host" plugin test "$2" >>"$log" 2>&1; then
    echo "ok: $1"
    passed=$((passed + 1))
  else
    echo "failed: $1"
    sed 's/^/    /' "$log"
    failed=$((failed + 1))
  fi
}

# Says why a language is left out, or nothing.
for lang in rust python js c; do
  why[$lang]=''
  "$host" plugin toolchain $lang >/dev/null 2>&1 && continue
  if [ "${COSMOS_CHECK_INSTALL:-1}" != 0 ]; then
    "$host" plugin toolchain $lang --install >"$work/install" 2>&1 && continue
    why[$lang]="$(grep -m1 '^error: ' "$work/install" | cut -c8-)"
  fi
  [ -n "${why[$lang]}" ] || why[$lang]="$("$host" plugin toolchain $lang 2>/dev/null | sed -n 's/^[a-z]* *\(.*[^ ]\)  *missing$/\1 is missing/p' | head -n1)"
  [ -n "${why[$lang]}" ] || why[$lang]="its toolchain is missing"
done

# The Rust SDK, examples and shipped plugins on this machine itself.
if CARGO_TARGET_DIR=$root/target/guests-native cargo test -q --release --locked --manifest-path "$root/plugins/Cargo.toml" >"$work/native" 2>&1; then
  echo "ok: unit tests of the Rust plugins and their SDK"
  passed=$((passed + 1))
else
  echo "failed: unit tests of the Rust plugins and their SDK"
  sed 's/^/    /' "$work/native"
  failed=$((failed + 1))
fi

if ! command -v "${CC:-cc}" >/dev/null; then
  skip "unit tests of the C SDK" "${CC:-cc} is missing"
elif "$root/plugins/sdk/c/test.sh" >"$work/native" 2>&1; then
  echo "ok: unit tests of the C SDK"
  passed=$((passed + 1))
else
  echo "failed: unit tests of the C SDK"
  sed 's/^/    /' "$work/native"
  failed=$((failed + 1))
fi

for manifest in "$here"/*/plugin.toml; do
  folder=$(dirname "$manifest")
  name=$(basename "$folder")
  lang=$(sed -n 's/^language *= *"\([a-z]*\)".*/\1/p' "$manifest")
  if [ -n "${why[$lang]:-}" ]; then
    skip "$name" "${why[$lang]}"
  else
    check "$name" "$folder"
  fi
done

# run NAME COMMAND…: what it prints is shown when it fails, and when it says that it was skipped.
run() {
  local name=$1 log=$work/log
  shift
  if ! "$@" >"$log" 2>&1; then
    echo "failed: $name"
    sed 's/^/    /' "$log"
    failed=$((failed + 1))
  elif grep -q '^skipped: ' "$log"; then
    skip "$name" "$(sed -n 's/^skipped: //p' "$log")"
  else
    echo "ok: $name"
    passed=$((passed + 1))
  fi
}

if command -v python3 >/dev/null; then
  run sdk-python env -C "$root/plugins/sdk/python" PYTHONDONTWRITEBYTECODE=1 python3 -m unittest discover -s tests
else
  skip sdk-python "python3 is missing"
fi
if command -v node >/dev/null; then
  run sdk-javascript env -C "$root/plugins/sdk/javascript" node --test tests
else
  skip sdk-javascript "node is missing"
fi
if [ -n "${why[python]}" ]; then
  skip gsm8k-data "${why[python]}"
else
  run gsm8k-data env COSMOS_HOST="$host" python3 "$here/gsm8k/check_data.py"
fi

for lang in rust python js c; do
  kinds='reward dataset both environment'
  case $lang in python | js) [ "${1:-}" = --all ] || kinds='both environment' ;; esac
  for kind in $kinds; do
    name="new-$lang-$kind"
    if [ -n "${why[$lang]}" ]; then
      skip "$name" "${why[$lang]}"
    elif "$host" plugin new --lang $lang --kind $kind "$name" --dir "$work/$lang-$kind" >/dev/null; then
      # What the last one compiled of other people's crates serves this one, too.
      if [ -d "$work/$lang-build" ]; then mv "$work/$lang-build" "$work/$lang-$kind/build"; fi
      check "$name" "$work/$lang-$kind"
      if [ $lang = rust ] && [ -d "$work/$lang-$kind/build" ]; then mv "$work/$lang-$kind/build" "$work/$lang-build"; fi
    else
      failed=$((failed + 1))
    fi
  done
done

echo "examples and templates: $passed passed, $failed failed, $skipped skipped"
[ $failed = 0 ]
