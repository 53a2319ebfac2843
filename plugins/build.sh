#!/usr/bin/env bash
# Builds the shipped plugins to components in plugins/dist.
#
#   plugins/build.sh           build them all and replace plugins/dist
#   plugins/build.sh --check   rebuild into a temporary folder; exit 1 when plugins/dist does not match the sources
#
# The compiler: your own `rustc` where it has the target wasm32-unknown-unknown (`rustup target add wasm32-unknown-unknown`),
# else Debian's, fetched once into ${XDG_CACHE_HOME:-~/.cache}/cosmos-host/wasm-toolchain (1 GB, some minutes).
# COSMOS_WASM_TOOLCHAIN=own|debian forces one of them.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
plugins=$root/plugins
dist=$plugins/dist
target=wasm32-unknown-unknown
cache=${XDG_CACHE_HOME:-$HOME/.cache}/cosmos-host/wasm-toolchain
# component=package[:features]
components=(countdown=countdown countdown-hf=countdown:hf deepmath=deepmath)

die() { echo "error: $1" >&2; [ $# -lt 2 ] || echo "hint: $2" >&2; exit 1; }
say() { echo "build.sh: $*" >&2; }

# ---- the compiler -----------------------------------------------------------------------------------------------

own_rustc_has_target() {
  local lib
  lib=$(rustc --print target-libdir --target "$target" 2>/dev/null) && compgen -G "$lib/libstd-*.rlib" >/dev/null
}

# Unpacks Debian's rustc, its LLVM and linker, and builds std for the target with that very compiler: a compiler can
# only build the library of its own version.
install_debian_toolchain() {
  command -v apt-get >/dev/null || die "no rustc with the target $target, and no apt-get to fetch Debian's" "rustup target add $target"
  say "fetching Debian's wasm toolchain into $cache (once)"
  # In its last place from the start: where std's sources lie goes into its symbol names. The file `complete` comes last.
  rm -rf "$cache" && mkdir -p "$cache/debs"
  # The runtime library carries rustc's version in its package name.
  local runtime packages
  runtime=$(apt-cache depends libstd-rust-web-dev 2>/dev/null | sed -n 's/.*Depends: \(libstd-rust-web-[0-9.]*\)$/\1/p' | head -n1)
  [ -n "$runtime" ] || die "apt knows no package libstd-rust-web-dev" "apt-get update, or rustup target add $target"
  packages=(rustc-web libstd-rust-web-dev "$runtime" rust-web-src lld-22 libllvm22 rust-web-llvm wasi-libc)
  (cd "$cache/debs" && apt-get download -q "${packages[@]}" >&2) || die "apt-get download failed" "apt-get update, then try again"
  local deb
  for deb in "$cache"/debs/*.deb; do dpkg -x "$deb" "$cache/root"; done
  rm -rf "$cache/debs"
  build_std "$cache/root"
  date -u +%Y-%m-%d >"$cache/complete"
}

build_std() {
  local prefix=$1 work
  work=$(mktemp -d)
  mkdir "$work/src"
  printf '[package]\nname = "empty"\nversion = "0.0.0"\nedition = "2021"\n' >"$work/Cargo.toml"
  echo '#![no_std]' >"$work/src/lib.rs"
  say "building std for $target"
  (
    cd "$work"
    use_prefix "$prefix"
    export RUSTC_BOOTSTRAP=1 CARGO_TARGET_DIR=$work/target
    export RUSTFLAGS="-Cembed-bitcode=yes -Zforce-unstable-if-unmarked --remap-path-prefix=$prefix/usr/lib/rustlib/src/rust=/rust $(crate_remaps)"
    cargo build -q --release --target "$target" -Z build-std=std,panic_abort >&2
  ) || die "std for $target does not build"
  local lib=$prefix/usr/lib/rustlib/$target/lib
  mkdir -p "$lib"
  cp "$work/target/$target"/release/deps/lib*.rlib "$lib/"
  rm -f "$lib"/libempty*
  rm -rf "$work"
}

crate_remaps() {
  local crates
  for crates in "${CARGO_HOME:-$HOME/.cargo}"/registry/src/*; do printf ' --remap-path-prefix=%s=/crates' "$crates"; done
}

# Makes an unpacked Debian prefix the compiler of this shell.
use_prefix() {
  export RUSTC=$1/usr/bin/rustc PATH=$1/usr/bin:$PATH
  export LD_LIBRARY_PATH=$1/usr/lib/x86_64-linux-gnu:$1/usr/lib/llvm-22/lib${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}
  # A rustup `cargo` would otherwise hand its own toolchain's wrappers down.
  unset RUSTUP_TOOLCHAIN RUSTC_WRAPPER RUSTC_WORKSPACE_WRAPPER CARGO_ENCODED_RUSTFLAGS
}

choose_compiler() {
  case ${COSMOS_WASM_TOOLCHAIN:-auto} in
    own) own_rustc_has_target || die "this rustc lacks the target $target" "rustup target add $target"; return ;;
    auto) if own_rustc_has_target; then return; fi ;;
    debian) ;;
    *) die "COSMOS_WASM_TOOLCHAIN is \`$COSMOS_WASM_TOOLCHAIN\`" "use own or debian" ;;
  esac
  [ -f "$cache/complete" ] || install_debian_toolchain
  use_prefix "$cache/root"
}

# ---- building ---------------------------------------------------------------------------------------------------

# Everything a component is made of, in an order that does not depend on the machine.
sources_hash() {
  (cd "$root" && find plugins/Cargo.toml plugins/Cargo.lock plugins/sdk plugins/countdown plugins/deepmath wit -type f \
    \( -name '*.rs' -o -name '*.toml' -o -name '*.json' -o -name '*.wit' -o -name Cargo.lock \) -print0 |
    LC_ALL=C sort -z | xargs -0 sha256sum | sha256sum | cut -d' ' -f1)
}

std_hash() {
  local lib
  lib=$("${RUSTC:-rustc}" --print target-libdir --target "$target")
  (cd "$lib" && sha256sum libstd-*.rlib libcore-*.rlib liballoc-*.rlib libcompiler_builtins-*.rlib | sha256sum | cut -d' ' -f1)
}

# build_all OUT: every component into OUT, and OUT/BUILT_WITH.
build_all() {
  local out=$1 modules entry name package features
  mkdir -p "$out"
  modules=$(mktemp -d)
  (
    choose_compiler
    local sysroot
    sysroot=$("${RUSTC:-rustc}" --print sysroot)
    # No path of this machine goes into a component, and no setting of this shell. Where cargo unpacks crates depends
    # on the registry it fetched them from.
    cargo fetch -q --locked --manifest-path "$plugins/Cargo.toml" --target "$target"
    RUSTFLAGS="--remap-path-prefix=$root=/cosmos-host --remap-path-prefix=$sysroot=/rust $(crate_remaps)"
    export RUSTFLAGS
    # Cargo does not see when std itself was replaced: one folder for each std.
    CARGO_TARGET_DIR=$root/target/guests/$(std_hash | head -c 12)
    export CARGO_TARGET_DIR CARGO_INCREMENTAL=0
    unset CARGO_PROFILE_RELEASE_INCREMENTAL CARGO_PROFILE_RELEASE_LTO CARGO_PROFILE_RELEASE_CODEGEN_UNITS CARGO_PROFILE_RELEASE_OPT_LEVEL
    unset CARGO_RESOLVER_FEATURE_UNIFICATION CARGO_UNSTABLE_FEATURE_UNIFICATION __CARGO_TEST_CHANNEL_OVERRIDE_DO_NOT_USE_THIS
    for entry in "${components[@]}"; do
      name=${entry%%=*} package=${entry#*=} features=''
      case $package in *:*) features=${package#*:} package=${package%%:*} ;; esac
      say "compiling $name"
      cargo build -q --release --locked --manifest-path "$plugins/Cargo.toml" --target "$target" -p "$package" --features "$features"
      cp "$CARGO_TARGET_DIR/$target/release/$package.wasm" "$modules/$name.wasm"
    done
    {
      echo "rustc: $("${RUSTC:-rustc}" --version)"
      echo "std: $(std_hash)"
      echo "target: $target"
      echo "flags: --remap-path-prefix; profile release of plugins/Cargo.toml"
      echo "sources: $(sources_hash)"
    } >"$out/BUILT_WITH"
  )
  for entry in "${components[@]}"; do
    name=${entry%%=*}
    componentize "$modules/$name.wasm" "$out/$name.wasm"
    echo "$name.wasm: $(sha256sum "$out/$name.wasm" | cut -d' ' -f1)" >>"$out/BUILT_WITH"
  done
  rm -rf "$modules"
}

# Core module to component, by the host's own code.
componentize() {
  if [ -n "${COSMOS_COMPONENTIZE:-}" ]; then
    "$COSMOS_COMPONENTIZE" "$1" "$2"
  else
    cargo run -q --release --manifest-path "$root/Cargo.toml" -p cosmos-plugin --example componentize -- "$1" "$2"
  fi
}

# ---- checking ---------------------------------------------------------------------------------------------------

field() { sed -n "s/^$2: //p" "$1"; }

check() {
  local entry name failed=0
  [ -f "$dist/BUILT_WITH" ] || die "plugins/dist/BUILT_WITH is missing" "run plugins/build.sh"
  [ "$(field "$dist/BUILT_WITH" sources)" = "$(sources_hash)" ] ||
    die "the sources of the plugins changed after plugins/dist was built" "run plugins/build.sh and commit plugins/dist"
  for entry in "${components[@]}"; do
    name=${entry%%=*}.wasm
    [ -f "$dist/$name" ] || die "plugins/dist/$name is missing" "run plugins/build.sh"
    [ "$(field "$dist/BUILT_WITH" "$name")" = "$(sha256sum "$dist/$name" | cut -d' ' -f1)" ] ||
      die "plugins/dist/$name is not the file that BUILT_WITH records" "run plugins/build.sh and commit plugins/dist"
  done
  fresh=$(mktemp -d)
  trap 'rm -rf "$fresh"' EXIT
  build_all "$fresh"
  if [ "$(head -n3 "$fresh/BUILT_WITH")" = "$(head -n3 "$dist/BUILT_WITH")" ]; then
    for entry in "${components[@]}"; do
      name=${entry%%=*}.wasm
      cmp -s "$fresh/$name" "$dist/$name" || { echo "error: plugins/dist/$name differs from what its sources give" >&2; failed=1; }
    done
    [ $failed = 0 ] || die "plugins/dist has drifted from its sources" "run plugins/build.sh and commit plugins/dist"
    say "plugins/dist is byte for byte what its sources give"
  else
    # Another compiler makes other bytes; the fresh components must behave like the shipped ones.
    say "built with another compiler ($(field "$fresh/BUILT_WITH" rustc)): comparing behaviour"
    (cd "$root" && COSMOS_PLUGIN_DIST_FRESH=$fresh cargo test -q --release golden::graders) ||
      die "freshly built components behave unlike plugins/dist"
    say "plugins/dist behaves like its sources"
  fi
}

# Read to the end before anything runs, so that an edit meanwhile does no harm.
main() {
  case ${1:-} in
    '')
      staged=$(mktemp -d)
      trap 'rm -rf "$staged"' EXIT
      build_all "$staged"
      mkdir -p "$dist"
      for file in "$staged"/*; do cp "$file" "$dist/.$(basename "$file").new" && mv "$dist/.$(basename "$file").new" "$dist/$(basename "$file")"; done
      cat "$dist/BUILT_WITH"
      ls -l "$dist" >&2
      ;;
    --check) check ;;
    *) die "unknown argument \`$1\`" "plugins/build.sh [--check]" ;;
  esac
}

main "$@"
