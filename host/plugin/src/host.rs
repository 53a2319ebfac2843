//! Loads components: engines, the ticker behind the deadlines, the compiler and its cache.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::time::Duration;

use serde::Serialize;
use wasmtime::component::{Component, InstancePre};
use wasmtime::{Config, Engine, EngineWeak};

use crate::cache::{self, Cache};
use crate::clock::TICK;
use crate::component_file::{ComponentFile, World};
use crate::grant::{Need, check_imports, check_unknown};
use crate::sandbox::GuestState;
use crate::since_v0_1_0::{self as wit, dataset, metadata, reward};
use crate::worker::Blueprint;
use crate::{Capabilities, Grant, Limits, Plugin, PluginError, PluginInfo};

/// Stack for host functions, which run on the guest's stack: a chat template or a parquet page needs far more than
/// a guest.
const HOST_STACK_BYTES: usize = 4 << 20;

/// Loads plugins. One host serves a whole process.
pub struct PluginHost {
    cache: Option<Cache>,
    /// One engine per stack limit, which is the only limit that an engine fixes.
    engines: Mutex<BTreeMap<u64, Engine>>,
    ticker: Arc<Ticker>,
}

/// Advances the epochs of all engines until it is dropped.
pub(crate) struct Ticker(Mutex<Vec<EngineWeak>>);

impl Ticker {
    fn start() -> Result<Arc<Self>, PluginError> {
        let ticker = Arc::new(Self(Mutex::new(Vec::new())));
        let weak = Arc::downgrade(&ticker);
        let run = move || {
            while let Some(ticker) = weak.upgrade() {
                for engine in ticker.0.lock().unwrap_or_else(PoisonError::into_inner).iter() {
                    if let Some(engine) = engine.upgrade() {
                        engine.increment_epoch();
                    }
                }
                drop(ticker);
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
        let file = ComponentFile::read(path, limits.component_bytes_max)?;
        let (world, _) = file.world()?;
        check_imports(&file.stem(), &file.imports, grants)?;
        self.build(file, world, grants, limits, caps)
    }

    /// Looks at the component at `path` without granting it anything. Only `describe` runs, and its imports lend
    /// it nothing.
    ///
    /// # Errors
    /// As [`PluginHost::load`], without the grants; a component that cannot describe itself is no error here.
    pub fn inspect(&self, path: &Path) -> Result<Inspection, PluginError> {
        let limits = Limits::interpreter();
        let file = ComponentFile::read(path, limits.component_bytes_max)?;
        let (world, api_version) = file.world()?;
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
            world,
            api_version,
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
        match self.build(file, world, &[], limits, Capabilities::default()) {
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
        world: World,
        grants: &[Grant],
        limits: Limits,
        capabilities: Capabilities,
    ) -> Result<Plugin, PluginError> {
        let engine = self.engine(limits.stack_bytes_max)?;
        let component = self.compile(&engine, &file, limits.compile_ms_max)?;
        let unlike = |error: wasmtime::Error| PluginError::WrongInterface {
            path: file.path.clone(),
            detail: crate::voice::one_line(&format!("{error:#}"), 1024),
        };
        let linker = wit::link(&engine, &file.imports).map_err(unlike)?;
        let pre = linker.instantiate_pre(&component).map_err(unlike)?;
        let (metadata, dataset, reward) = indices(&pre, world).map_err(unlike)?;
        let plugin = file.stem();
        let grants = grants.to_vec();
        let limits = Arc::new(limits);
        let blueprint = Blueprint { plugin, pre, metadata, dataset, reward, grants, limits, capabilities };
        Plugin::describe(blueprint, &file.path, &file.sha256, self.ticker.clone())
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

    fn compile(&self, engine: &Engine, file: &ComponentFile, ms_max: u64) -> Result<Component, PluginError> {
        let key = cache::key(&file.sha256, engine);
        if let Some(code) = self.cache.as_ref().and_then(|cache| cache.read(&key)) {
            match deserialize(engine, &code) {
                Ok(component) => return Ok(component),
                Err(error) => tracing::warn!("compiling `{}` again: {error:#}", file.path.display()),
            }
        }
        let component = compile_within(engine, file, ms_max)?;
        if let Some(cache) = &self.cache {
            match component.serialize() {
                Ok(code) => cache.write(&key, &code),
                Err(error) => tracing::warn!("cannot cache `{}`: {error:#}", file.path.display()),
            }
        }
        Ok(component)
    }
}

type Indices = (metadata::GuestIndices, Option<dataset::GuestIndices>, Option<reward::GuestIndices>);

/// Finds the exports that the world promises.
fn indices(pre: &InstancePre<GuestState>, world: World) -> wasmtime::Result<Indices> {
    let with_dataset = world != World::RewardPlugin;
    let with_reward = world != World::DatasetPlugin;
    Ok((
        metadata::GuestIndices::new(pre)?,
        with_dataset.then(|| dataset::GuestIndices::new(pre)).transpose()?,
        with_reward.then(|| reward::GuestIndices::new(pre)).transpose()?,
    ))
}

/// The compiler cannot be stopped: past its time its thread goes on alone, bounded by the size of the component.
fn compile_within(engine: &Engine, file: &ComponentFile, ms_max: u64) -> Result<Component, PluginError> {
    let (done, waiting) = mpsc::sync_channel(1);
    let (engine, bytes) = (engine.clone(), file.bytes.clone());
    std::thread::Builder::new()
        .name("plugin-compiler".into())
        .spawn(move || {
            // Nobody listens any more when the time was up.
            let _ = done.send(Component::from_binary(&engine, &bytes));
        })
        .map_err(|error| PluginError::Host { detail: format!("no thread for the compiler: {error}") })?;
    let path = || file.path.clone();
    match waiting.recv_timeout(Duration::from_millis(ms_max)) {
        Ok(Ok(component)) => Ok(component),
        Ok(Err(error)) => {
            let detail = crate::voice::one_line(&format!("{error:#}"), 1024);
            // An offset in the file tells the parser's complaints from the compiler's.
            if error.is::<wasmparser::BinaryReaderError>() || detail.contains("(at offset 0x") {
                return Err(PluginError::Malformed { path: path(), detail });
            }
            Err(PluginError::Compile { path: path(), detail })
        }
        Err(mpsc::RecvTimeoutError::Timeout) => Err(PluginError::CompileTimeout { path: path(), ms_max }),
        Err(mpsc::RecvTimeoutError::Disconnected) => {
            Err(PluginError::Compile { path: path(), detail: "the compiler panicked".into() })
        }
    }
}

#[allow(unsafe_code)]
fn deserialize(engine: &Engine, code: &[u8]) -> wasmtime::Result<Component> {
    // SAFETY: the bytes must come from `Component::serialize` unchanged. `Cache::read` only gives what this user
    // wrote to a folder and file that nobody else can write to, whose checksum over key and code matches; wasmtime
    // itself checks its version and settings.
    unsafe { Component::deserialize(engine, code) }
}
