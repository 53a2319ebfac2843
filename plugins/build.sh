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
components=(countdown=countdown countdown-hf=countdown:hf deepmath=deepmath calculator=calculator)

die() { echo "error: $1" >&2; [ $# -lt 2 ] || echo "hint: $2" >&2; exit 1; }
say() { echo "build.sh: $*" >&2; }

# ---- the compiler -----------------------------------------------------------------------------------------------

own_rustc_has_target() {
  local lib
  lib=$(rustc --print target-libdir --target "$target" 2>/dev/null) && compgen -G "$lib/libstd-*.rlib" >/dev/null
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
  # The script that the host carries, too (`plugin toolchain rust --install`).
  [ -f "$cache/complete" ] || bash "$root/host/author/scripts/rust-toolchain.sh" "$cache"
  use_prefix "$cache/root"
}

# ---- building ---------------------------------------------------------------------------------------------------

# Everything a component is made of, in an order that does not depend on the machine.
sources_hash() {
  (cd "$root" && find plugins/Cargo.toml plugins/Cargo.lock plugins/sdk/rust plugins/deepmath examples/plugins/countdown examples/plugins/calculator wit -type f \
    -not -path '*/build/*' \
    \( -name '*.rs' -o -name '*.toml' -o -name '*.json' -o -name '*.wit' -o -name Cargo.lock \) -print0 |
    LC_ALL=C sort -z | xargs -0 sha256sum | sha256sum | cut -d' ' -f1)
}

std_hash() {
  local lib
  lib=$("${RUSTC:-rustc}" --print target-libdir --target "$target")
  (cd "$lib" && sha256sum libstd-*.rlib libcore-*.rlib liballoc-*.rlib libcompiler_builtins-*.rlib | sha256sum | cut -d' ' -f1)
}

# stage FOLDER: the sources as one workspace whose members are all below its root. Cargo hashes the absolute path of a
# member outside of it into symbol names, and a component would then depend on where the checkout lies.
stage() {
  rm -rf "$1"
  mkdir -p "$1/plugins/sdk" "$1/examples/plugins"
  cp -a "$root/wit" "$1/wit"
  cp -a "$plugins/sdk/rust" "$1/plugins/sdk/rust"
  cp -a "$plugins/deepmath" "$1/plugins/deepmath"
  cp -a "$root/examples/plugins/countdown" "$root/examples/plugins/calculator" "$1/examples/plugins/"
  rm -rf "$1"/examples/plugins/*/build "$1"/examples/plugins/*/target
  sed -i '/^workspace = "/d' "$1"/examples/plugins/*/Cargo.toml
  sed -e 's#"sdk/rust"#"plugins/sdk/rust"#g; s#"deepmath"#"plugins/deepmath"#; s#"\.\./examples#"examples#g' "$plugins/Cargo.toml" >"$1/Cargo.toml"
  cp -a "$plugins/Cargo.lock" "$1/Cargo.lock"
}

# build_all OUT: every component into OUT, and OUT/BUILT_WITH.
build_all() {
  local out=$1 modules entry name package features staged_sources=$root/target/guests/sources
  mkdir -p "$out"
  modules=$(mktemp -d)
  (
    choose_compiler
    local sysroot
    sysroot=$("${RUSTC:-rustc}" --print sysroot)
    # No path of this machine goes into a component, and no setting of this shell. Where cargo unpacks crates depends
    # on the registry it fetched them from.
    stage "$staged_sources"
    cargo fetch -q --locked --manifest-path "$staged_sources/Cargo.toml" --target "$target"
    RUSTFLAGS="--remap-path-prefix=$staged_sources=/cosmos-host --remap-path-prefix=$sysroot=/rust $(crate_remaps)"
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
      cargo build -q --release --locked --manifest-path "$staged_sources/Cargo.toml" --target "$target" -p "$package" --features "$features"
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
  if [ -n "${COSMOS_HOST:-}" ]; then
    "$COSMOS_HOST" plugin build "$1" --out "$2" >/dev/null
  else
    cargo run -q --release --manifest-path "$root/Cargo.toml" -p cosmos-host -- plugin build "$1" --out "$2" >/dev/null
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
