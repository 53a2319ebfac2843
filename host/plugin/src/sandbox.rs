//! What one instance stands on: its memory meter, its WASI without a world behind it, and what it was granted.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{SeedableRng, TryRng};
use wasmtime::ResourceLimiter;
use wasmtime::component::ResourceTable;
use wasmtime_wasi::{FsPerms, HostMonotonicClock, HostWallClock, WasiCtx, WasiCtxView, WasiView};

use crate::clock::CallClock;
use crate::voice::{GuestStream, Level, SharedVoice, Voice, lock};
use crate::{Capabilities, Grant, Limits, PluginError};

/// Open handles of one instance: tables, streams, files.
const HANDLES_MAX: usize = 4096;
/// Random bytes of one call.
const RANDOM_BYTES_MAX: u64 = 1 << 20;
/// 2026-01-01T00:00:00Z: every guest lives at this moment, so that a reward replays bit for bit.
const WALL_CLOCK: Duration = Duration::from_secs(1_767_225_600);
const RANDOM_SEED: u64 = 0x636f_736d_6f73;

/// The data of one instance's store.
pub(crate) struct GuestState {
    wasi: WasiCtx,
    random: GuestRandom,
    pub(crate) handles: ResourceTable,
    pub(crate) capabilities: Capabilities,
    pub(crate) limits: Arc<Limits>,
    pub(crate) clock: Arc<CallClock>,
    pub(crate) voice: SharedVoice,
    pub(crate) meter: Meter,
}

impl GuestState {
    pub(crate) fn new(
        plugin: &str,
        grants: &[Grant],
        capabilities: Capabilities,
        limits: Arc<Limits>,
        clock: Arc<CallClock>,
    ) -> Result<Self, PluginError> {
        let voice = Arc::new(Mutex::new(Voice::new(plugin, grants.contains(&Grant::Log), &limits)));
        let random = GuestRandom::default();
        let mut wasi = WasiCtx::builder();
        wasi.stdout(GuestStream::new(voice.clone(), Level::Info))
            .stderr(GuestStream::new(voice.clone(), Level::Error))
            .wall_clock(StoppedClock)
            .monotonic_clock(StoppedClock)
            .secure_random(random.clone())
            .insecure_random(random.clone())
            .insecure_random_seed(RANDOM_SEED.into())
            .max_random_size(RANDOM_BYTES_MAX)
            .allow_tcp(false)
            .allow_udp(false)
            .allow_ip_name_lookup(false);
        for grant in grants {
            if let Grant::Dir { path } = grant {
                wasi.preopened_dir(path, path.to_string_lossy(), FsPerms::ReadOnly).map_err(|e| {
                    PluginError::GrantedDir { plugin: plugin.into(), path: path.clone(), detail: format!("{e:#}") }
                })?;
            }
        }
        let mut handles = ResourceTable::new();
        handles.set_max_capacity(HANDLES_MAX);
        let meter = Meter::new(&limits);
        Ok(Self { wasi: wasi.build(), random, handles, capabilities, limits, clock, voice, meter })
    }

    /// Forgets what the last call left behind: its denied memory, its last words, its place in the random stream.
    pub(crate) fn begin_call(&mut self) {
        self.meter.denied = None;
        self.random.restart();
        lock(&self.voice).forget_last_words();
    }
}

impl WasiView for GuestState {
    fn ctx(&mut self) -> WasiCtxView<'_> {
        WasiCtxView { ctx: &mut self.wasi, table: &mut self.handles }
    }
}

/// Counts memory over all of an instance's memories, elements over all its tables, and remembers what it refused.
pub(crate) struct Meter {
    bytes: u64,
    bytes_max: u64,
    table_elements: u64,
    table_elements_max: u64,
    tables_max: usize,
    memories_max: usize,
    instances_max: usize,
    /// Why the last growth was refused.
    pub(crate) denied: Option<String>,
}

impl Meter {
    fn new(limits: &Limits) -> Self {
        Self {
            bytes: 0,
            bytes_max: limits.memory_bytes_max,
            table_elements: 0,
            table_elements_max: limits.table_elements_max,
            tables_max: limits.tables_max,
            memories_max: limits.memories_max,
            instances_max: limits.instances_max,
            denied: None,
        }
    }

    /// Memory in use, in bytes.
    pub(crate) fn bytes(&self) -> u64 {
        self.bytes
    }
}

impl ResourceLimiter for Meter {
    // A refusal is an answer, not a trap: Python raises MemoryError and may go on.
    fn memory_growing(&mut self, current: usize, desired: usize, _: Option<usize>) -> wasmtime::Result<bool> {
        let total = self.bytes.saturating_sub(current as u64).saturating_add(desired as u64);
        if total > self.bytes_max {
            self.denied = Some(format!(
                "out of memory: {total} bytes wanted, above `memory_bytes_max` = {} (Python and JavaScript need {})",
                self.bytes_max,
                Limits::interpreter().memory_bytes_max
            ));
            return Ok(false);
        }
        self.bytes = total;
        Ok(true)
    }

    fn table_growing(&mut self, current: usize, desired: usize, _: Option<usize>) -> wasmtime::Result<bool> {
        let total = self.table_elements.saturating_sub(current as u64).saturating_add(desired as u64);
        if total > self.table_elements_max {
            self.denied = Some(format!(
                "{total} table elements wanted, above `table_elements_max` = {}",
                self.table_elements_max
            ));
            return Ok(false);
        }
        self.table_elements = total;
        Ok(true)
    }

    fn instances(&self) -> usize {
        self.instances_max
    }

    fn tables(&self) -> usize {
        self.tables_max
    }

    fn memories(&self) -> usize {
        self.memories_max
    }
}

/// A clock that never moves.
struct StoppedClock;

impl HostWallClock for StoppedClock {
    fn resolution(&self) -> Duration {
        Duration::from_secs(1)
    }

    fn now(&self) -> Duration {
        WALL_CLOCK
    }
}

impl HostMonotonicClock for StoppedClock {
    fn resolution(&self) -> u64 {
        1
    }

    fn now(&self) -> u64 {
        0
    }
}

/// The same numbers in every call, whatever was drawn before.
#[derive(Clone)]
struct GuestRandom(Arc<Mutex<ChaCha8Rng>>);

impl Default for GuestRandom {
    fn default() -> Self {
        Self(Arc::new(Mutex::new(ChaCha8Rng::seed_from_u64(RANDOM_SEED))))
    }
}

impl GuestRandom {
    fn generator(&self) -> std::sync::MutexGuard<'_, ChaCha8Rng> {
        self.0.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    fn restart(&self) {
        *self.generator() = ChaCha8Rng::seed_from_u64(RANDOM_SEED);
    }
}

impl TryRng for GuestRandom {
    type Error = std::convert::Infallible;

    fn try_next_u32(&mut self) -> Result<u32, Self::Error> {
        self.generator().try_next_u32()
    }

    fn try_next_u64(&mut self) -> Result<u64, Self::Error> {
        self.generator().try_next_u64()
    }

    fn try_fill_bytes(&mut self, bytes: &mut [u8]) -> Result<(), Self::Error> {
        self.generator().try_fill_bytes(bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_counted_over_all_memories() {
        let mut meter = Meter::new(&Limits { memory_bytes_max: 100, ..Limits::default() });
        assert!(meter.memory_growing(0, 60, None).unwrap());
        assert!(!meter.memory_growing(0, 60, None).unwrap());
        assert!(meter.denied.as_ref().unwrap().contains("120 bytes wanted"));
        assert!(meter.memory_growing(60, 100, None).unwrap());
        assert_eq!(meter.bytes(), 100);
        assert!(meter.table_growing(0, 150_000, None).unwrap());
        assert!(!meter.table_growing(0, 150_000, None).unwrap());
        assert!(meter.table_growing(150_000, 200_000, None).unwrap());
        assert!(!meter.table_growing(0, 1 << 30, None).unwrap());
        assert!(meter.denied.as_ref().unwrap().contains("table_elements_max"));
    }

    #[test]
    fn randomness_replays() {
        let mut random = GuestRandom::default();
        let first = [random.try_next_u64().unwrap(), random.try_next_u64().unwrap()];
        assert_ne!(first[0], first[1]);
        random.restart();
        assert_eq!(first, [random.try_next_u64().unwrap(), random.try_next_u64().unwrap()]);
    }
}
