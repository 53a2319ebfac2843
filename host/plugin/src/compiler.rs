//! Compiles a component within bounds on time and memory.
//!
//! A few hundred bytes can ask for more instances than there are atoms, and a few megabytes of tiny functions for
//! gigabytes of compiler memory. What can be counted is refused by counting, before anything is compiled; the rest is
//! watched.

use std::sync::mpsc;
use std::time::{Duration, Instant};

use wasmparser::{ComponentInstance, ComponentTypeRef, Encoding, Instance, Parser, Payload};
use wasmtime::Engine;
use wasmtime::component::Component;

use crate::component_file::ComponentFile;
use crate::voice::one_line;
use crate::{Limits, PluginError};

/// Components within components, this deep. Toolchains need two.
const DEPTH_MAX: usize = 16;
/// Instances that the component and those nested in it ask for. The largest known guests need fewer than a hundred.
const INSTANTIATIONS_MAX: u64 = 2_000;
/// What a global costs in an instance.
const GLOBAL_BYTES: u64 = 16;
/// What a function costs in an instance that lets it be called from elsewhere.
const FUNCTION_BYTES: u64 = 32;
/// How often the compiler's memory is looked at.
const LOOK: Duration = Duration::from_millis(10);

/// Compiles `file`.
pub(crate) fn compile(engine: &Engine, file: &ComponentFile, limits: &Limits) -> Result<Component, PluginError> {
    check_bulk(file, limits)?;
    let (done, waiting) = mpsc::sync_channel(1);
    let (engine, bytes) = (engine.clone(), file.bytes.clone());
    let (started, resident_before) = (Instant::now(), resident_bytes());
    std::thread::Builder::new()
        .name("plugin-compiler".into())
        .spawn(move || {
            // Nobody listens any more when a bound was reached.
            let _ = done.send(Component::from_binary(&engine, &bytes));
        })
        .map_err(|error| PluginError::Host { detail: format!("no thread for the compiler: {error}") })?;
    let path = || file.path.clone();
    // The compiler cannot be stopped: past a bound its thread goes on until this process ends, which is what a
    // command does that cannot load its plugin.
    loop {
        match waiting.recv_timeout(LOOK) {
            Ok(Ok(component)) => return Ok(component),
            Ok(Err(error)) => return Err(refusal(file, &error)),
            Err(mpsc::RecvTimeoutError::Disconnected) => {
                return Err(PluginError::Compile { path: path(), detail: "the compiler panicked".into() });
            }
            Err(mpsc::RecvTimeoutError::Timeout) => {}
        }
        if started.elapsed() >= Duration::from_millis(limits.compile_ms_max) {
            return Err(PluginError::CompileTimeout { path: path(), ms_max: limits.compile_ms_max });
        }
        if resident_bytes().saturating_sub(resident_before) > limits.compile_bytes_max {
            return Err(PluginError::CompileMemory { path: path(), bytes_max: limits.compile_bytes_max });
        }
    }
}

fn refusal(file: &ComponentFile, error: &wasmtime::Error) -> PluginError {
    let (path, detail) = (file.path.clone(), one_line(&format!("{error:#}"), 1024));
    // An offset in the file tells the parser's complaints from the compiler's.
    if error.is::<wasmparser::BinaryReaderError>() || detail.contains("(at offset 0x") {
        return PluginError::Malformed { path, detail };
    }
    PluginError::Compile { path, detail }
}

/// Physical memory of this process; 0 where the system does not tell.
fn resident_bytes() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let kib = line.and_then(|rest| rest.trim().strip_suffix("kB")?.trim().parse::<u64>().ok());
    kib.unwrap_or(0).saturating_mul(1024)
}

/// One component or module that is being read.
#[derive(Default)]
struct Scope {
    is_module: bool,
    /// Instances that instantiating it makes.
    instances: u64,
    /// Instances of core modules among them.
    core_instances: u64,
    /// Memory that an instance of it takes beside its linear memories and tables.
    state_bytes: u64,
}

/// Refuses what is small to write down and enormous to compile or to instantiate.
fn check_bulk(file: &ComponentFile, limits: &Limits) -> Result<(), PluginError> {
    let malformed = |error: wasmparser::BinaryReaderError| PluginError::Malformed {
        path: file.path.clone(),
        detail: one_line(&error.to_string(), 500),
    };
    let complex = |detail: String| PluginError::TooComplex { path: file.path.clone(), detail };
    let mut open: Vec<Scope> = Vec::new();
    // Which component an index means is not followed: each counts as the costliest read so far.
    let (mut costliest, mut costliest_core, mut largest_state) = (0, 0, 0u64);
    for payload in Parser::new(0).parse_all(&file.bytes) {
        let payload = payload.map_err(malformed)?;
        if let Payload::Version { encoding, .. } = payload {
            if open.len() > DEPTH_MAX {
                return Err(complex(format!("its components are nested more than {DEPTH_MAX} deep")));
            }
            open.push(Scope { is_module: encoding == Encoding::Module, ..Scope::default() });
            continue;
        }
        let Some(scope) = open.last_mut() else { continue };
        match payload {
            Payload::GlobalSection(globals) => scope.state_bytes += u64::from(globals.count()) * GLOBAL_BYTES,
            Payload::FunctionSection(functions) => scope.state_bytes += u64::from(functions.count()) * FUNCTION_BYTES,
            Payload::ImportSection(imports) => scope.state_bytes += u64::from(imports.count()) * FUNCTION_BYTES,
            Payload::InstanceSection(instances) => {
                for instance in instances {
                    if let Instance::Instantiate { .. } = instance.map_err(malformed)? {
                        scope.instances += 1;
                        scope.core_instances += 1;
                    }
                }
            }
            Payload::ComponentInstanceSection(instances) => {
                for instance in instances {
                    if let ComponentInstance::Instantiate { .. } = instance.map_err(malformed)? {
                        scope.instances = scope.instances.saturating_add(1).saturating_add(costliest);
                        scope.core_instances = scope.core_instances.saturating_add(costliest_core);
                    }
                }
            }
            Payload::ComponentImportSection(imports) => {
                for import in imports {
                    if let ComponentTypeRef::Component(_) | ComponentTypeRef::Module(_) = import.map_err(malformed)?.ty
                    {
                        return Err(complex("it imports code, which is instantiated who knows how often".into()));
                    }
                }
            }
            Payload::End(_) => {
                let Some(scope) = open.pop() else { continue };
                if scope.is_module {
                    largest_state = scope.state_bytes.max(largest_state);
                }
                costliest = scope.instances.max(costliest);
                costliest_core = scope.core_instances.max(costliest_core);
                if costliest > INSTANTIATIONS_MAX {
                    return Err(complex(format!("it asks for more than {INSTANTIATIONS_MAX} instances")));
                }
            }
            _ => {}
        }
    }
    // Beyond `instances_max` none is made.
    let state_bytes = largest_state.saturating_mul(costliest_core.min(limits.instances_max as u64));
    if state_bytes > limits.memory_bytes_max {
        return Err(complex(format!(
            "the functions and globals of its instances take {state_bytes} bytes, above `memory_bytes_max` = {}",
            limits.memory_bytes_max
        )));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(text: &str) -> Result<(), String> {
        let bytes = wat::parse_str(text).unwrap();
        let file = ComponentFile {
            path: "p.wasm".into(),
            bytes,
            sha256: String::new(),
            imports: Vec::new(),
            exports: Vec::new(),
        };
        check_bulk(&file, &Limits { memory_bytes_max: 64 << 20, ..Limits::default() }).map_err(|error| {
            assert!(error.hint().is_some());
            error.to_string()
        })
    }

    #[test]
    fn instances_are_counted_through_all_levels() {
        let laughs = |levels: usize| {
            let mut text = "(component $c0 (core module $m) (core instance (instantiate $m)))".to_string();
            for level in 1..=levels {
                let ten = format!("(instance (instantiate $c{}))", level - 1).repeat(10);
                text = format!("(component $c{level} {text} {ten})");
            }
            text
        };
        check(&laughs(2)).unwrap();
        assert!(check(&laughs(4)).unwrap_err().contains("more than 2000 instances"));
        assert!(check(&laughs(14)).unwrap_err().contains("more than 2000 instances"));
    }

    #[test]
    fn depth_state_and_imported_code_are_bounded() {
        let deep = |levels: usize| format!("{}{}", "(component ".repeat(levels), ")".repeat(levels));
        check(&deep(10)).unwrap();
        assert!(check(&deep(18)).unwrap_err().contains("nested more than 16 deep"));
        let globals = "(global i32 (i32.const 0))".repeat(50_000);
        let state = |instances: usize| {
            let instances = "(core instance (instantiate $m))".repeat(instances);
            format!("(component (core module $m {globals}) {instances})")
        };
        check(&state(50)).unwrap();
        assert!(check(&state(100)).unwrap_err().contains("80000000 bytes, above `memory_bytes_max`"));
        let imports = "(component (import \"c\" (component $c)) (instance (instantiate $c)))";
        assert!(check(imports).unwrap_err().contains("imports code"));
    }

    #[test]
    fn the_memory_of_this_process_is_known_where_it_matters() {
        if cfg!(target_os = "linux") {
            let before = resident_bytes();
            let block = std::hint::black_box(vec![1u8; 64 << 20]);
            assert!(resident_bytes() >= before + (32 << 20), "{before} {}", block.len());
        }
    }
}
