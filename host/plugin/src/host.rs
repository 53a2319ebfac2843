//! Loads components: engines, the ticker behind the deadlines, the compiler and its cache.

use std::collections::BTreeMap;
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use serde::Serialize;
use wasmtime::component::Component;
use wasmtime::{Config, Engine, EngineWeak, WasmBacktraceDetails};

use crate::cache::{self, Cache};
use crate::clock::TICK;
use crate::compiler;
use crate::component_file::{ComponentFile, Kind, World};
use crate::grant::{Need, check_imports, check_unknown};
use crate::guest::{self, Indices};
use crate::seat::Blueprint;
use crate::{Capabilities, Grant, Limits, Plugin, PluginError, PluginInfo};

/// Stack for host functions, which run on the guest's stack: a chat template or a parquet page needs far more than
/// a guest.
const HOST_STACK_BYTES: usize = 4 << 20;

/// Frames of a trap that are looked at; a panic's machinery takes some.
const BACKTRACE_FRAMES_MAX: usize = 16;

/// Where the time of [`PluginHost::load`] went, in milliseconds.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize)]
pub struct LoadTimes {
    /// Reading, hashing and judging the component's file.
    pub read_ms: f64,
    /// Reading the compiled code from the cache; none when it was not there.
    pub cached_ms: Option<f64>,
    /// Compiling, with writing to the cache; none when the cache had it.
    pub compile_ms: Option<f64>,
    /// Making an instance, without `init`.
    pub instantiate_ms: f64,
    /// Linking and `metadata.describe`, on a thread of its own.
    pub describe_ms: f64,
}

/// Loads plugins. One host serves a whole process.
pub struct PluginHost {
    cache: Option<Cache>,
    /// One engine per stack limit, which is the only limit that an engine fixes.
    engines: Mutex<BTreeMap<u64, Engine>>,
    ticker: Arc<Ticker>,
}

/// Advances the epochs of all engines, as long as there are any: what was opened from a plugin may outlive the plugin
/// and the host that loaded it, and must not outlive its deadlines.
pub(crate) struct Ticker(Arc<Mutex<Vec<EngineWeak>>>);

impl Ticker {
    fn start() -> Result<Arc<Self>, PluginError> {
        let engines = Arc::new(Mutex::new(Vec::<EngineWeak>::new()));
        let ticker = Arc::new(Self(engines.clone()));
        let run = move || {
            loop {
                // The other owner is the host or one of its plugins, which may add engines.
                let mut needed = Arc::strong_count(&engines) > 1;
                for engine in engines.lock().unwrap_or_else(PoisonError::into_inner).iter() {
                    if let Some(engine) = engine.upgrade() {
                        engine.increment_epoch();
                        needed = true;
                    }
                }
                if !needed {
                    return;
                }
                std::thread::sleep(TICK);
            }
        };
        std::thread::Builder::new()
            .name("plugin-ticker".into())
            .spawn(run)
            .map_err(|error| PluginError::Host { detail: format!("no thread for the deadlines: {error}") })?;
        Ok(ticker)
    }
}

/// What a component is, as `plugin inspect` shows it.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Inspection {
    /// The file.
    pub path: PathBuf,
    /// Its size.
    pub bytes: u64,
    /// Its SHA-256, hexadecimal.
    pub sha256: String,
    /// The world it implements.
    pub world: World,
    /// The version of `cosmos:plugin` that it exports.
    pub api_version: String,
    /// Names of its imports.
    pub imports: Vec<String>,
    /// Names of its exports.
    pub exports: Vec<String>,
    /// Grants without which it cannot be loaded.
    pub needs: Vec<String>,
    /// It imports WASI, which is sandboxed.
    pub wasi: bool,
    /// Imports that this host never provides; with any, it cannot be loaded.
    pub unknown_imports: Vec<String>,
    /// What it says about itself, with the settings schema and the grants it wants.
    pub description: Option<PluginInfo>,
    /// Why it could not be asked.
    pub description_error: Option<String>,
}

impl PluginHost {
    /// Starts a host that keeps compiled components in `cache_dir`, made with mode 0700 when it is missing. Without
    /// one every start compiles anew.
    ///
    /// # Errors
    /// [`PluginError::CacheFolder`] when the folder cannot be made or others can write to it.
    pub fn new(cache_dir: Option<PathBuf>) -> Result<Self, PluginError> {
        let cache = cache_dir.map(Cache::open).transpose()?;
        Ok(Self { cache, engines: Mutex::default(), ticker: Ticker::start()? })
    }

    /// The usual cache folder: `$XDG_CACHE_HOME/cosmos-host/plugins`, else `~/.cache/cosmos-host/plugins`, else none.
    pub fn default_cache_dir() -> Option<PathBuf> {
        let absolute = |name| std::env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute());
        let base = absolute("XDG_CACHE_HOME").or_else(|| absolute("HOME").map(|home| home.join(".cache")))?;
        Some(base.join("cosmos-host").join("plugins"))
    }

    /// Loads the component at `path`: checks its world, version and imports, compiles it or takes it from the cache,
    /// and asks it to describe itself.
    ///
    /// # Errors
    /// Each kind of unusable file, a missing grant, and a component that fails to start have their own variant.
    pub fn load(
        &self,
        path: &Path,
        grants: &[Grant],
        limits: Limits,
        caps: Capabilities,
    ) -> Result<Plugin, PluginError> {
        limits.check()?;
        let started = Instant::now();
        let file = ComponentFile::read(path, limits.component_bytes_max)?;
        let kind = file.kind()?;
        check_imports(&file.stem(), &file.imports, grants)?;
        let times = LoadTimes { read_ms: ms_since(started), ..LoadTimes::default() };
        self.build(file, kind, grants, limits, caps, times)
    }

    /// Looks at the component at `path` without granting it anything. Only `describe` runs, and its imports lend
    /// it nothing.
    ///
    /// # Errors
    /// As [`PluginHost::load`], without the grants; a component that cannot describe itself is no error here.
    pub fn inspect(&self, path: &Path) -> Result<Inspection, PluginError> {
        let limits = Limits::interpreter();
        let file = ComponentFile::read(path, limits.component_bytes_max)?;
        let kind = file.kind()?;
        let needs: Vec<Need> = file.imports.iter().map(|name| Need::of(name)).collect();
        let mut granted: Vec<String> = needs
            .iter()
            .filter_map(|need| match need {
                Need::Grant(grant) => Some(grant.to_string()),
                _ => None,
            })
            .collect();
        granted.sort();
        granted.dedup();
        let unknown = file.imports.iter().zip(&needs).filter(|(_, need)| **need == Need::Unknown);
        let mut inspection = Inspection {
            path: path.into(),
            bytes: file.bytes.len() as u64,
            sha256: file.sha256.clone(),
            world: World::of(kind.offers),
            api_version: kind.version.clone(),
            imports: file.imports.clone(),
            exports: file.exports.clone(),
            needs: granted,
            wasi: needs.contains(&Need::Wasi),
            unknown_imports: unknown.map(|(name, _)| name.clone()).collect(),
            description: None,
            description_error: None,
        };
        if let Err(error) = check_unknown(&file.stem(), &file.imports) {
            inspection.description_error = Some(error.to_string());
            return Ok(inspection);
        }
        // Without a grant the host's side of an import is there, though it lends nothing.
        match self.build(file, kind, &[], limits, Capabilities::default(), LoadTimes::default()) {
            Ok(plugin) => inspection.description = Some(plugin.info().clone()),
            Err(error @ (PluginError::Call { .. } | PluginError::BadDescription { .. })) => {
                inspection.description_error = Some(error.to_string());
            }
            Err(error) => return Err(error),
        }
        Ok(inspection)
    }

    fn build(
        &self,
        file: ComponentFile,
        kind: Kind,
        grants: &[Grant],
        limits: Limits,
        capabilities: Capabilities,
        mut times: LoadTimes,
    ) -> Result<Plugin, PluginError> {
        let limits = limits.decide(file.bytes.len() as u64);
        let engine = self.engine(limits.stack_bytes_max)?;
        let component = self.compile(&engine, &file, &limits, &mut times)?;
        let unlike = |error: wasmtime::Error| PluginError::WrongInterface {
            path: file.path.clone(),
            detail: crate::voice::one_line(&format!("{error:#}"), 1024),
        };
        let linker = guest::link(&engine, &file.imports).map_err(unlike)?;
        let pre = linker.instantiate_pre(&component).map_err(unlike)?;
        let indices = Indices::find(&pre, kind.api, kind.offers).map_err(unlike)?;
        let blueprint = Blueprint {
            plugin: file.stem(),
            pre,
            indices,
            grants: grants.to_vec(),
            limits: Arc::new(limits),
            capabilities,
            _ticker: self.ticker.clone(),
        };
        Plugin::describe(blueprint, &file.path, &file.sha256, times)
    }

    fn engine(&self, stack_bytes_max: u64) -> Result<Engine, PluginError> {
        let mut engines = self.engines.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(engine) = engines.get(&stack_bytes_max) {
            return Ok(engine.clone());
        }
        // The limits were checked, so the stack fits any `usize` of a machine that runs this.
        let stack_bytes = stack_bytes_max as usize;
        let mut config = Config::new();
        config
            .epoch_interruption(true)
            // Names come from the name section; the environment must not turn on the parsing of debug information.
            .wasm_backtrace_details(WasmBacktraceDetails::Disable)
            .wasm_backtrace_max_frames(NonZeroUsize::new(BACKTRACE_FRAMES_MAX))
            .max_wasm_stack(stack_bytes)
            .async_stack_size(stack_bytes + HOST_STACK_BYTES)
            // The same bits on every machine.
            .cranelift_nan_canonicalization(true)
            .relaxed_simd_deterministic(true);
        let engine = Engine::new(&config)
            .map_err(|error| PluginError::Host { detail: format!("no WebAssembly engine: {error:#}") })?;
        self.ticker.0.lock().unwrap_or_else(PoisonError::into_inner).push(engine.weak());
        engines.insert(stack_bytes_max, engine.clone());
        Ok(engine)
    }

    fn compile(
        &self,
        engine: &Engine,
        file: &ComponentFile,
        limits: &Limits,
        times: &mut LoadTimes,
    ) -> Result<Component, PluginError> {
        let started = Instant::now();
        let key = cache::key(&file.sha256, engine);
        if let Some(entry) = self.cache.as_ref().and_then(|cache| cache.read(&key)) {
            match deserialize(engine, &entry) {
                Ok(component) => {
                    times.cached_ms = Some(ms_since(started));
                    return Ok(component);
                }
                Err(error) => tracing::warn!("compiling `{}` again: {error:#}", file.path.display()),
            }
        }
        let started = Instant::now();
        let component = compiler::compile(engine, file, limits)?;
        if let Some(cache) = &self.cache {
            match component.serialize() {
                Ok(code) => cache.write(&key, &code),
                Err(error) => tracing::warn!("cannot cache `{}`: {error:#}", file.path.display()),
            }
        }
        times.compile_ms = Some(ms_since(started));
        Ok(component)
    }
}

fn ms_since(started: Instant) -> f64 {
    started.elapsed().as_secs_f64() * 1e3
}

#[allow(unsafe_code)]
fn deserialize(engine: &Engine, entry: &cache::Entry) -> wasmtime::Result<Component> {
    // SAFETY: the file must hold what `Component::serialize` gave, and must not change while it is mapped.
    // `Cache::read` only gives what this user wrote to a folder and file that nobody else can write to, and whose
    // checksum matches; this host replaces entries by rename and never writes to one. The path leads to the very file
    // that was checked. wasmtime itself checks its version and settings.
    unsafe { Component::deserialize_file(engine, entry.path()) }
}
