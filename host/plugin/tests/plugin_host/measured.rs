//! The memory of a host that runs the worst guests, measured in a process of its own for each: this very program, asked
//! for the test `child` alone.

use std::fs;
use std::process::Command;
use std::time::{Duration, Instant};

use cosmos_plugin::{Capabilities, Grant, Limits, PluginHost};

use crate::guests::{Bench, outcomes, reward_component, samples};

const MIB: u64 = 1 << 20;
/// What a case takes beside its limits: compiling a small guest, its stack, the allocator's habits.
const SLACK_BYTES: u64 = 24 * MIB;
/// Names the case to the child.
const CASE: &str = "COSMOS_HOSTILE_CASE";

/// One case: its name, the memory that its limits allow, and what runs.
type Case = (&'static str, u64, fn());

const CASES: [Case; 11] = [
    ("memory", 64 * MIB, || fails_with("memory_touch", &[], roomy(), "out of memory")),
    ("less memory", 8 * MIB, || {
        fails_with("memory_touch", &[], Limits { memory_bytes_max: 8 * MIB, ..roomy() }, "`memory_bytes_max` = 8388608")
    }),
    // Sixteen bytes an element.
    ("tables", 4 * MIB, || fails_with("many_tables", &[], roomy(), "`table_elements_max` = 200000")),
    ("a flood of log lines", 4 * MIB, || {
        let mut reward = Bench::new().load_with("log_flood", &[Grant::Log], roomy()).unwrap().reward("r", "").unwrap();
        (0..50).for_each(|_| assert_eq!(outcomes(&mut reward, &["x"]), [Ok(1.0)]));
    }),
    ("huge log lines", 4 * MIB, || {
        let mut reward = Bench::new().load_with("log_huge", &[Grant::Log], roomy()).unwrap().reward("r", "").unwrap();
        (0..50).for_each(|_| assert_eq!(outcomes(&mut reward, &["x"]), [Ok(1.0)]));
    }),
    // The guest's own megabyte and what the host takes of its result.
    ("a huge text as result", 17 * MIB, || fails_with("amplifier", &[], roomy(), "`result_bytes_max` = 16777216")),
    ("a huge list as result", (64 + 16) * MIB, || {
        fails_with("metrics_bomb", &[], roomy(), "`result_bytes_max` = 16777216");
    }),
    ("two hundred megabytes", 0, || {
        refused(&|path| sparse(path, &reward_component("well_behaved"), 200 * MIB), "209715200")
    }),
    ("a zip of zeros", 0, || refused(&|path| sparse(path, b"PK\x03\x04", 60 * MIB), "not WebAssembly")),
    ("instances without number", 4 * MIB, || refused(&|path| fs::write(path, laughs(12)).unwrap(), "instances")),
    ("components nested without end", 32 * MIB, || {
        refused(&|path| fs::write(path, deep(3_000)).unwrap(), "nested");
    }),
];

/// Time is not what is measured here, and the machine may be busy.
fn roomy() -> Limits {
    Limits { call_ms_max: 60_000, item_ms_max: 60_000, init_ms_max: 60_000, ..Limits::default() }
}

fn fails_with(guest: &str, grants: &[Grant], limits: Limits, reason: &str) {
    let mut reward = Bench::new().load_with(guest, grants, limits).unwrap().reward("r", "").unwrap();
    for _ in 0..3 {
        let results = outcomes(&mut reward, &["a", "!bad", "ccc"]);
        assert!(results[1].as_ref().unwrap_err().contains(reason), "{results:?}");
        assert_eq!((&results[0], &results[2]), (&Ok(1.0), &Ok(3.0)));
    }
}

fn refused(make: &dyn Fn(&std::path::Path), reason: &str) {
    let bench = Bench::new();
    let path = bench.folder.path().join("p.wasm");
    make(&path);
    let error = bench.host.load(&path, &[], roomy(), Capabilities::default()).unwrap_err();
    assert!(error.to_string().contains(reason), "{error}");
    assert!(error.hint().is_some(), "{error}");
}

/// A file of `bytes` bytes that takes no room on the disk.
fn sparse(path: &std::path::Path, start: &[u8], bytes: u64) {
    fs::write(path, start).unwrap();
    fs::OpenOptions::new().write(true).open(path).unwrap().set_len(bytes).unwrap();
}

fn leb(mut value: usize) -> Vec<u8> {
    let mut bytes = Vec::new();
    while value > 0x7f {
        bytes.push((value & 0x7f) as u8 | 0x80);
        value >>= 7;
    }
    bytes.push(value as u8);
    bytes
}

fn section(id: u8, body: &[u8]) -> Vec<u8> {
    [vec![id], leb(body.len()), body.to_vec()].concat()
}

const COMPONENT: &[u8] = b"\0asm\x0d\0\x01\0";
const MODULE: &[u8] = b"\0asm\x01\0\0\0";

/// `inside` behind a good plugin's own sections.
fn with(inside: &[Vec<u8>]) -> Vec<u8> {
    [reward_component("well_behaved"), inside.concat()].concat()
}

/// Each level instantiates the one inside it ten times.
fn laughs(levels: usize) -> Vec<u8> {
    let ten = |id| section(id, &[vec![10], b"\0\0\0".repeat(10)].concat());
    let mut inside = [COMPONENT, &section(1, MODULE), &ten(2)].concat();
    for _ in 1..levels {
        inside = [COMPONENT, &section(4, &inside), &ten(5)].concat();
    }
    with(&[section(4, &inside)])
}

fn deep(levels: usize) -> Vec<u8> {
    let mut inside = COMPONENT.to_vec();
    for _ in 1..levels {
        inside = [COMPONENT, &section(4, &inside)].concat();
    }
    with(&[section(4, &inside)])
}

/// A module of many small functions, each of which costs the compiler kilobytes.
fn many_functions(count: usize) -> Vec<u8> {
    let types = section(1, &[1, 0x60, 0, 0]);
    let functions = section(3, &[leb(count), vec![0; count]].concat());
    let code = section(10, &[leb(count), b"\x02\0\x0b".repeat(count)].concat());
    with(&[section(1, &[MODULE, &types, &functions, &code].concat())])
}

/// A function of many loops over many variables: the compiler takes much more than linear time for it.
fn tangled(bytes: usize) -> Vec<u8> {
    const LOCALS: usize = 1000;
    const LOOPS: usize = 200;
    let mut code = [&leb(1)[..], &leb(LOCALS), b"\x7f", &b"\x03\x40".repeat(LOOPS)].concat();
    let mut i = 0usize;
    while code.len() < bytes {
        let local = |at: usize| leb(at % LOCALS);
        let adds = [b"\x20", &local(i)[..], b"\x20", &local(i * 7919 + 1), b"\x6a\x21", &local(i * 31 + 7)].concat();
        code.extend([&adds[..], b"\x20", &local(i * 17), b"\x0d", &leb(i % LOOPS)].concat());
        i += 1;
    }
    code.extend(b"\x0b".repeat(LOOPS + 1));
    let body = [leb(code.len()), code].concat();
    let parts = [section(1, &[1, 0x60, 0, 0]), section(3, &[1, 0]), section(10, &[vec![1], body].concat())];
    with(&[section(1, &[MODULE.to_vec(), parts.concat()].concat())])
}

/// A module with so many globals that each of its instances takes megabytes, many times over.
fn many_globals() -> Vec<u8> {
    let globals = section(6, &[leb(300_000), b"\x7f\0\x41\0\x0b".repeat(300_000)].concat());
    // The good plugin brings modules of its own; this one comes after them.
    let index = u8::try_from(modules(&reward_component("well_behaved"))).unwrap();
    let instances = [leb(200), [0, index, 0].repeat(200)].concat();
    with(&[section(1, &[MODULE.to_vec(), globals].concat()), section(2, &instances)])
}

fn many_instances() -> Vec<u8> {
    let index = u8::try_from(modules(&reward_component("well_behaved"))).unwrap();
    with(&[section(1, MODULE), section(2, &[leb(300), [0, index, 0].repeat(300)].concat())])
}

/// Core modules at the component's top level.
fn modules(component: &[u8]) -> usize {
    wasmparser::Parser::new(0)
        .parse_all(component)
        .filter(|payload| matches!(payload, Ok(wasmparser::Payload::ModuleSection { .. })))
        .count()
}

fn status_bytes(key: &str) -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix(key)).unwrap();
    line.trim().trim_start_matches(':').trim().strip_suffix("kB").unwrap().trim().parse::<u64>().unwrap() * 1024
}

/// Runs one case; `guests_fail_within_their_memory` starts it as a process.
#[test]
#[ignore = "a child of the other tests here"]
fn child() {
    let name = std::env::var(CASE).expect("the parent names a case");
    let run = CASES.iter().find(|case| case.0 == name).map(|case| case.2);
    // What every case needs, engine and code of the standard guest, is there before the measurement.
    let mut reward = Bench::new().reward("well_behaved", roomy());
    assert_eq!(reward.score(&samples(&["a"])).unwrap()[0].as_ref().unwrap().value, 1.0);
    // Starts the peak anew; where the kernel refuses, the older peak is part of what is measured.
    let _ = fs::write("/proc/self/clear_refs", "5");
    let before = status_bytes("VmRSS");
    match run {
        Some(run) => run(),
        None => compile_bomb(&name),
    }
    println!("\ngrowth {} bytes", status_bytes("VmHWM").saturating_sub(before));
}

/// What the child running `case` needed, and for how long.
fn measured(case: &str) -> (u64, Duration) {
    let started = Instant::now();
    let output = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "measured::child", "--ignored", "--nocapture", "--test-threads", "1"])
        .env(CASE, case)
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{case}: {said}\n{errors}");
    let growth = said.lines().find_map(|line| line.strip_prefix("growth ")?.strip_suffix(" bytes"));
    let growth = growth.unwrap_or_else(|| panic!("{case}: {said}\n{errors}")).parse().unwrap();
    (growth, started.elapsed())
}

#[test]
fn guests_fail_within_their_memory() {
    if !cfg!(target_os = "linux") {
        eprintln!("skipped: the memory of a process is read from /proc");
        return;
    }
    for (case, bytes_max, _) in CASES {
        let (growth, elapsed) = measured(case);
        println!("{case}: {} KiB above the start, {elapsed:?}", growth / 1024);
        assert!(growth <= bytes_max + bytes_max / 10 + SLACK_BYTES, "{case}: {growth} bytes, limit {bytes_max}");
    }
}

const COMPILE_BYTES_MAX: u64 = 200 * MIB;
const COMPILE_MS_MAX: u64 = 3000;

fn compile_bomb(name: &str) {
    let (bytes, expected): (_, &[&str]) = match name {
        "compile: functions" => (many_functions(600_000), &["more than 209715200 bytes of memory"]),
        // Which bound it meets first depends on the machine's speed.
        "compile: tangled" => (tangled(60_000), &["took longer than 3000 ms", "more than 209715200 bytes of memory"]),
        other => panic!("no case `{other}`"),
    };
    let bench = Bench::new();
    let path = bench.file("bomb", &bytes);
    let limits = Limits {
        compile_ms_max: if name.ends_with("functions") { 120_000 } else { COMPILE_MS_MAX },
        compile_bytes_max: COMPILE_BYTES_MAX,
        // The functions' own state is not what this is about.
        memory_bytes_max: 512 * MIB,
        ..roomy()
    };
    let error = bench.host.load(&path, &[], limits, Capabilities::default()).unwrap_err();
    assert!(expected.iter().any(|text| error.to_string().contains(text)), "{error}");
    assert!(error.hint().unwrap().contains("compile_"), "{error}");
}

#[test]
fn compile_bombs_are_refused_within_their_limits() {
    if !cfg!(target_os = "linux") {
        eprintln!("skipped: the memory of a process is read from /proc");
        return;
    }
    for case in ["compile: functions", "compile: tangled"] {
        let (growth, elapsed) = measured(case);
        println!("{case}: {} KiB above the start, {elapsed:?}", growth / 1024);
        assert!(growth <= COMPILE_BYTES_MAX + COMPILE_BYTES_MAX / 10 + 2 * SLACK_BYTES, "{case}: {growth} bytes");
        if case.ends_with("tangled") {
            assert!(elapsed < Duration::from_millis(COMPILE_MS_MAX + COMPILE_MS_MAX / 10) + Duration::from_secs(60));
        }
    }
}

#[test]
fn instances_and_their_state_are_counted() {
    let bench = Bench::new();
    let load = |bytes: &[u8]| {
        let error = bench.host.load(&bench.file("p", bytes), &[], roomy(), Capabilities::default()).unwrap_err();
        error.to_string()
    };
    let error = load(&many_instances());
    assert!(error.contains("instance count too high"), "{error}");
    let error = load(&many_globals());
    assert!(error.contains("functions and globals of its instances take"), "{error}");
    // The same without the excess is a good plugin.
    let path = bench.file("good", &with(&[section(1, MODULE), section(4, COMPONENT)]));
    PluginHost::new(None).unwrap().load(&path, &[], roomy(), Capabilities::default()).unwrap();
}
