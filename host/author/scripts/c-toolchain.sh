#!/usr/bin/env bash
# c-toolchain.sh FOLDER: Debian's clang, linker and C library for wasm32-wasi, unpacked into FOLDER/root and installed
# nowhere else (40 MB to fetch). Run by `cosmos-host plugin toolchain c --install`, which carries this file.
# FOLDER/complete is written last.
set -euo pipefail

folder=$1

die() { echo "error: $1" >&2; [ $# -lt 2 ] || echo "hint: $2" >&2; exit 1; }

command -v apt-get >/dev/null && command -v dpkg >/dev/null ||
  die "no apt-get to fetch Debian's compiler with" "get https://github.com/WebAssembly/wasi-sdk and set WASI_SDK_PATH to it"

depends() { apt-cache depends --no-recommends --no-suggests --no-conflicts --no-breaks --no-replaces --no-enhances "$@"; }

# The package without a number names the distribution's usual version.
version=$(depends clang 2>/dev/null | sed -n 's/.*Depends: clang-\([0-9]*\)$/\1/p' | head -n1)
[ -n "$version" ] || die "apt knows no package clang" "apt-get update, then try again"
packages=("clang-$version" "lld-$version" "libclang-common-$version-dev" "libclang-rt-$version-dev-wasm32" wasi-libc)
# The libraries that they load, as far as this machine lacks them.
libraries=$(depends --recurse "clang-$version" "lld-$version" | grep -E '^lib' | grep -vE -- '-dev|^libc6|^libc-|^libgcc|^libcrypt|:' | sort -u)
for library in $libraries; do
  if [ "$(dpkg-query -W -f '${Status}' "$library" 2>/dev/null)" != "install ok installed" ]; then packages+=("$library"); fi
done
rm -rf "$folder" && mkdir -p "$folder/debs"
echo "fetching ${packages[*]}" >&2
(cd "$folder/debs" && apt-get download -q "${packages[@]}" >&2) || die "apt-get download failed" "apt-get update, then try again"
for deb in "$folder"/debs/*.deb; do dpkg -x "$deb" "$folder/root"; done
rm -rf "$folder/debs"
bin=$folder/root/usr/lib/llvm-$version/bin
[ -x "$bin/clang" ] && [ -x "$bin/wasm-ld" ] || die "the packages hold no clang and wasm-ld in $bin"
ln -s "root/usr/lib/llvm-$version/bin" "$folder/bin"
date -u +%Y-%m-%d >"$folder/complete"
