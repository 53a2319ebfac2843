#!/usr/bin/env bash
# plugins/sdk/c/test.sh: the C SDK's own tests, natively and with the sanitizers. It needs any C compiler (CC).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT
exports=(-DCOSMOS_EXPORT_REWARD -DCOSMOS_EXPORT_DATASET -DCOSMOS_EXPORT_ENVIRONMENT)
# The attributes are for WebAssembly only.
"${CC:-cc}" -std=c11 -g -fsanitize=address,undefined -Wall -Wextra -Werror -Wno-attributes "${exports[@]}" \
  -c cosmos_plugin.c -o "$out/cosmos_plugin.o"
"${CC:-cc}" -std=c11 -g -fsanitize=address,undefined -w "${exports[@]}" test.c bindings.c "$out/cosmos_plugin.o" -lm -o "$out/test"
"$out/test"
