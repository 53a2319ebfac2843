//! Runs one kernel once, alone on its thread, for a count of its instructions: what `benchmarks/instructions.sh` calls
//! under callgrind.
//!
//! `instructions --list` prints the kernels' names, `instructions NAME` runs one.

#[allow(dead_code)] // roofline has use for their flops and bytes
mod cases;

use std::process::ExitCode;

use cosmos_kernels::{Isa, threads};

/// More work takes callgrind too long and tells nothing new.
const FLOPS_MAX: f64 = 1.8e8;
/// Larger inputs too: they have to be made and packed under callgrind, though that is not counted.
const BYTES_MAX: f64 = 2e7;

/// Callgrind counts what happens inside this function alone.
#[inline(never)]
fn measured(work: &mut dyn FnMut()) {
    work();
}

fn main() -> ExitCode {
    let Some(wanted) = std::env::args().nth(1) else {
        eprintln!("usage: instructions --list | instructions NAME");
        return ExitCode::from(2);
    };
    let mut cases = cases::all();
    cases.retain(|case| case.flops <= FLOPS_MAX && case.bytes <= BYTES_MAX);
    if wanted == "--list" {
        println!("# {}", Isa::best().name());
        cases.iter().for_each(|case| println!("{}", case.name));
        return ExitCode::SUCCESS;
    }
    let Some(case) = cases.iter().find(|case| case.name == wanted) else {
        eprintln!("no kernel `{wanted}`: `--list` prints them");
        return ExitCode::from(2);
    };
    threads::serial(|| {
        let mut work = (case.prepare)(Isa::best());
        // Scratch that a thread keeps is made by the first call.
        work();
        measured(&mut work);
    });
    ExitCode::SUCCESS
}
