#!/usr/bin/env bash
# rust-toolchain.sh FOLDER: Debian's Rust compiler with the target wasm32-unknown-unknown, unpacked into FOLDER/root and
# installed nowhere else. For machines whose own rustc cannot get the target. Run by `cosmos-host plugin toolchain rust
# --install` (which carries this file) and by plugins/build.sh. FOLDER/complete is written last.
set -euo pipefail

target=wasm32-unknown-unknown
folder=$1

die() { echo "error: $1" >&2; [ $# -lt 2 ] || echo "hint: $2" >&2; exit 1; }
say() { echo "rust-toolchain.sh: $*" >&2; }

# Debian's compiler, its LLVM and linker, each package unpacked.
fetch() {
  command -v apt-get >/dev/null && command -v dpkg >/dev/null ||
    die "no apt-get to fetch Debian's compiler with" "rustup target add $target"
  say "fetching Debian's wasm toolchain into $folder (once)"
  # In its last place from the start: where std's sources lie goes into its symbol names.
  rm -rf "$folder" && mkdir -p "$folder/debs"
  # The runtime library carries rustc's version in its package name.
  local runtime packages deb
  runtime=$(apt-cache depends libstd-rust-web-dev 2>/dev/null | sed -n 's/.*Depends: \(libstd-rust-web-[0-9.]*\)$/\1/p' | head -n1)
  [ -n "$runtime" ] || die "apt knows no package libstd-rust-web-dev" "apt-get update, or rustup target add $target"
  packages=(rustc-web libstd-rust-web-dev "$runtime" rust-web-src lld-22 libllvm22 rust-web-llvm wasi-libc)
  (cd "$folder/debs" && apt-get download -q "${packages[@]}" >&2) || die "apt-get download failed" "apt-get update, then try again"
  for deb in "$folder"/debs/*.deb; do dpkg -x "$deb" "$folder/root"; done
  rm -rf "$folder/debs"
}

# Builds std for the target with that very compiler: a compiler can only build the library of its own version.
build_std() {
  local prefix=$1 work lib
  work=$(mktemp -d)
  mkdir "$work/src"
  printf '[package]\nname = "empty"\nversion = "0.0.0"\nedition = "2021"\n' >"$work/Cargo.toml"
  echo '#![no_std]' >"$work/src/lib.rs"
  say "building std for $target"
  (
    cd "$work"
    export RUSTC=$prefix/usr/bin/rustc PATH=$prefix/usr/bin:$PATH
    export LD_LIBRARY_PATH=$prefix/usr/lib/x86_64-linux-gnu:$prefix/usr/lib/llvm-22/lib${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}
    # A rustup `cargo` would otherwise hand its own toolchain's wrappers down.
    unset RUSTUP_TOOLCHAIN RUSTC_WRAPPER RUSTC_WORKSPACE_WRAPPER CARGO_ENCODED_RUSTFLAGS
    export RUSTC_BOOTSTRAP=1 CARGO_TARGET_DIR=$work/target
    export RUSTFLAGS="-Cembed-bitcode=yes -Zforce-unstable-if-unmarked --remap-path-prefix=$prefix/usr/lib/rustlib/src/rust=/rust $(crate_remaps)"
    cargo build -q --release --target "$target" -Z build-std=std,panic_abort >&2
  ) || die "std for $target does not build"
  lib=$prefix/usr/lib/rustlib/$target/lib
  mkdir -p "$lib"
  cp "$work/target/$target"/release/deps/lib*.rlib "$lib/"
  rm -f "$lib"/libempty*
  rm -rf "$work"
}

crate_remaps() {
  local crates
  for crates in "${CARGO_HOME:-$HOME/.cargo}"/registry/src/*; do printf ' --remap-path-prefix=%s=/crates' "$crates"; done
}

fetch
build_std "$folder/root"
date -u +%Y-%m-%d >"$folder/complete"
