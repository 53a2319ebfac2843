#!/usr/bin/env python3
"""Writes the committed bindings of the Rust and the C SDK from wit/since-v0.2.0 with wit-bindgen's command line.

    cargo install wit-bindgen-cli --version 0.61.1 --no-default-features --features rust,c
    plugins/sdk/generate.py            # writes rust/src/bindings.rs, c/bindings.h and c/bindings.c
    plugins/sdk/generate.py --check    # exit 1 when they differ from what is committed

What is changed in wit-bindgen's output: an author exports single interfaces, not the whole world, so that each
interface has its own macro arm (Rust) or preprocessor guard (C).
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
WIT = HERE.parent.parent / "wit" / "since-v0.2.0" / "plugin.wit"
VERSION = "0.61.1"
INTERFACES = ["metadata", "dataset", "reward", "environment"]


def main():
    tool = os.environ.get("WIT_BINDGEN") or shutil.which("wit-bindgen")
    if not tool:
        sys.exit("error: wit-bindgen is not in PATH\nhint: " + __doc__.split("\n")[2].strip())
    said = subprocess.run([tool, "--version"], capture_output=True, text=True, check=True).stdout
    if VERSION not in said:
        sys.exit(f"error: {tool} is {said.strip()}, not {VERSION}")
    with tempfile.TemporaryDirectory() as folder:
        wit = Path(folder) / "wit"
        (wit / "deps").mkdir(parents=True)
        shutil.copy(WIT, wit)
        shutil.copy(HERE / "wit" / "worlds.wit", wit)
        shutil.copy(HERE / "wit" / "wasi.wit", wit / "deps")
        made = {HERE / "rust" / "src" / "bindings.rs": rust(tool, wit), **c(tool, wit)}
    stale = [path for path, text in made.items() if not path.exists() or path.read_text() != text]
    if "--check" in sys.argv[1:]:
        for path in stale:
            print(f"error: {path} is not what the WIT gives", file=sys.stderr)
        sys.exit(1 if stale else 0)
    for path in stale:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(made[path])
        print(path)


def generated(tool, language, wit, world, *options):
    """The files that wit-bindgen makes of a world, by their suffix."""
    with tempfile.TemporaryDirectory() as out:
        command = [tool, language, str(wit), "--world", world, "--out-dir", out, *options]
        subprocess.run(command, check=True, capture_output=True)
        return {p.suffix: p.read_text() for p in Path(out).iterdir() if p.suffix != ".o"}


def rust(tool, wit):
    text = generated(
        tool, "rust", wit, "everything-and-stderr", "--format", "--generate-all", "--generate-unused-types",
        "--pub-export-macro", "-d", "Clone", "-d", "PartialEq", "--additional-derive-ignore", "stream-error",
    )[".rs"]
    # The macro that exports the whole world gives way to one arm an interface.
    start = text.index("/// Generates `#[unsafe(no_mangle)]` functions")
    export = re.compile(r"pub use __export_\w+_impl as export;\n")
    end = export.search(text, start).end()
    arms = "".join(arm(tool, wit, interface) for interface in INTERFACES)
    macro = (
        "/// Exports one interface: the canonical functions, and the section from which the component's world is made.\n"
        "#[doc(hidden)]\n#[macro_export]\nmacro_rules! __export_interface {\n" + arms + "}\n"
    )
    text = text[:start] + macro + text[end:]
    return text.replace("wit_bindgen::", "::wit_bindgen::")


def arm(tool, wit, interface):
    only = generated(tool, "rust", wit, f"only-{interface}")[".rs"]
    static = re.search(r'pub static __WIT_BINDGEN_COMPONENT_TYPE: (\[u8; \d+\]) = \*b"\\\n(.*?)";', only, re.S)
    section = re.search(r'link_section = "([^"]+)"', only).group(1)
    path = f"$crate::bindings::exports::cosmos::plugin::{interface}"
    return (
        f"    ({interface} $ty:ident) => {{\n"
        f"        {path}::__export_cosmos_plugin_{interface}_0_2_0_cabi!($ty with_types_in {path});\n"
        f"        const _: () = {{\n"
        f'            #[unsafe(link_section = "{section}")]\n'
        f"            #[allow(clippy::octal_escapes)]\n"
        f'            pub static COMPONENT_TYPE: {static.group(1)} = *b"\\\n{static.group(2)}";\n'
        f"        }};\n    }};\n"
    )


def c(tool, wit):
    files = generated(tool, "c", wit, "everything", "--rename-world", "cosmos", "--no-object-file")
    header = re.sub(r"__BINDINGS_\w+_H", "COSMOS_BINDINGS_H", files[".h"])
    source = re.sub(r'#include "\w+\.h"', '#include "bindings.h"', files[".c"])
    # The host writes the world into the module itself, from the project's plugin.toml.
    source = source[: source.index("// Ensure that the *_component_type.o object is linked in")].rstrip() + "\n"
    return {HERE / "c" / "bindings.h": header, HERE / "c" / "bindings.c": guarded(source)}


def guarded(source):
    """Puts what exports an interface between #ifdef COSMOS_EXPORT_… and #endif."""
    parts = re.split(r"(?m)^(?=// \S)|^(?=__attribute__\(\((?:__weak__, )?__export_name__)", source)
    out, open_guard = [], None
    for part in parts:
        named = re.match(r'__attribute__\(\((?:__weak__, )?__export_name__\("(?:cabi_post_)?cosmos:plugin/(\w+)@', part)
        guard = named.group(1).upper() if named and named.group(1) != "metadata" else None
        if guard != open_guard:
            out.append(f"#endif // COSMOS_EXPORT_{open_guard}\n\n" if open_guard else "")
            out.append(f"#ifdef COSMOS_EXPORT_{guard}\n" if guard else "")
            open_guard = guard
        out.append(part)
    return "".join(out) + (f"\n#endif // COSMOS_EXPORT_{open_guard}\n" if open_guard else "")


main()
