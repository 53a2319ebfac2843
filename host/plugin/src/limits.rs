//! What a plugin may use. Every limit is on by default.

use serde::{Deserialize, Serialize};

use crate::PluginError;

const MIB: u64 = 1 << 20;

/// Limits of one plugin. A guest that breaks one loses the sample it was working on, nothing else.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Limits {
    /// Linear memory of one instance, all its memories together. 0: 512 MiB for a component above 1 MiB, which carries
    /// the interpreter of Python or JavaScript, and 64 MiB for any other.
    pub memory_bytes_max: u64,
    /// Time of one batch call, waiting included.
    pub call_ms_max: u64,
    /// Time of one item when a failed batch is retried item by item.
    pub item_ms_max: u64,
    /// Time to instantiate and to run `init` or `describe`.
    pub init_ms_max: u64,
    /// Time of all `table.open` of one call, which may have to download; it does not count as the guest's own.
    pub table_open_ms_max: u64,
    /// Size of the component's file.
    pub component_bytes_max: u64,
    /// Time to compile the component when the cache lacks it.
    pub compile_ms_max: u64,
    /// Memory that compiling may take.
    pub compile_bytes_max: u64,
    /// Elements of one instance's tables, all together.
    pub table_elements_max: u64,
    /// Tables of one instance's store.
    pub tables_max: usize,
    /// Linear memories of one instance's store.
    pub memories_max: usize,
    /// Core instances of one instance's store.
    pub instances_max: usize,
    /// Call stack of the guest.
    pub stack_bytes_max: u64,
    /// One log line; the rest is left out.
    pub log_line_bytes_max: usize,
    /// Log lines a second; the rest is counted and left out.
    pub log_lines_per_second_max: u32,
    /// Items of one call; the contract allows 64.
    pub batch_items_max: usize,
    /// Text of one call, host to guest.
    pub batch_bytes_max: usize,
    /// Data of one call, guest to host, and of one `rows.read`, host to guest.
    pub result_bytes_max: usize,
    /// Settings as JSON text.
    pub settings_bytes_max: usize,
    /// Largest magnitude of a score or metric.
    pub score_abs_max: f64,
    /// Named metrics of one score.
    pub metrics_max: usize,
    /// Calls after which an instance is replaced, so that a leak cannot grow for ever.
    pub calls_per_instance_max: u32,
    /// Threads of an open reward or environment, each with an instance of its own. 0: as many as there are cores.
    pub workers: usize,
    /// State that an environment's conversation carries from step to step.
    pub state_bytes_max: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            memory_bytes_max: 0,
            call_ms_max: 10_000,
            item_ms_max: 2_000,
            init_ms_max: 30_000,
            table_open_ms_max: 1_800_000,
            component_bytes_max: 64 * MIB,
            compile_ms_max: 180_000,
            compile_bytes_max: 2048 * MIB,
            table_elements_max: 200_000,
            tables_max: 64,
            memories_max: 64,
            instances_max: 256,
            stack_bytes_max: MIB,
            log_line_bytes_max: 4096,
            log_lines_per_second_max: 100,
            batch_items_max: BATCH_ITEMS_MAX,
            batch_bytes_max: MIB as usize,
            result_bytes_max: 16 * MIB as usize,
            settings_bytes_max: MIB as usize,
            score_abs_max: 1e6,
            metrics_max: 64,
            calls_per_instance_max: 10_000,
            workers: 0,
            state_bytes_max: 64 << 10,
        }
    }
}

/// Memory of Rust and C guests.
const COMPILED_BYTES: u64 = 64 * MIB;
/// Memory of guests that bring an interpreter.
const INTERPRETER_BYTES: u64 = 512 * MIB;
/// Components above this bring an interpreter: Rust and C ones have some 100 KB, QuickJS 1.6 MB, Python 18 MB.
const INTERPRETER_COMPONENT_BYTES_MIN: u64 = MIB;
/// Threads beyond this help no machine.
const WORKERS_MAX: usize = 1024;
/// The contract's own bound on the state of a conversation.
const STATE_BYTES_MAX: usize = 64 << 10;

/// The contract's own bound on the items of a call.
pub(crate) const BATCH_ITEMS_MAX: usize = 64;

impl Limits {
    /// The defaults for Python and JavaScript, whose interpreters need more memory.
    pub fn interpreter() -> Self {
        Self { memory_bytes_max: INTERPRETER_BYTES, ..Self::default() }
    }

    /// Decides what is automatic for a component of this size.
    pub(crate) fn decide(mut self, component_bytes: u64) -> Self {
        if self.memory_bytes_max == 0 {
            let brings_interpreter = component_bytes > INTERPRETER_COMPONENT_BYTES_MIN;
            self.memory_bytes_max = if brings_interpreter { INTERPRETER_BYTES } else { COMPILED_BYTES };
        }
        self
    }

    /// Threads of an open reward or environment on this machine.
    pub(crate) fn workers(&self) -> usize {
        match self.workers {
            0 => std::thread::available_parallelism().map_or(1, |cores| cores.get().min(WORKERS_MAX)),
            workers => workers,
        }
    }

    /// # Errors
    /// [`PluginError::BadLimit`] names the first limit that no plugin could run under.
    pub(crate) fn check(&self) -> Result<(), PluginError> {
        let bad = |key, value, detail| Err(PluginError::BadLimit { key, value, detail });
        let positive = [
            ("call_ms_max", self.call_ms_max),
            ("item_ms_max", self.item_ms_max),
            ("init_ms_max", self.init_ms_max),
            ("table_open_ms_max", self.table_open_ms_max),
            ("component_bytes_max", self.component_bytes_max),
            ("compile_ms_max", self.compile_ms_max),
            ("compile_bytes_max", self.compile_bytes_max),
            ("batch_bytes_max", self.batch_bytes_max as u64),
            ("result_bytes_max", self.result_bytes_max as u64),
            ("log_line_bytes_max", self.log_line_bytes_max as u64),
            ("calls_per_instance_max", self.calls_per_instance_max.into()),
        ];
        if let Some((key, value)) = positive.into_iter().find(|(_, value)| *value == 0) {
            return bad(key, value, "it must be above zero");
        }
        if !(1..=BATCH_ITEMS_MAX).contains(&self.batch_items_max) {
            return bad("batch_items_max", self.batch_items_max as u64, "the contract allows 1 to 64");
        }
        if self.workers > WORKERS_MAX {
            return bad("workers", self.workers as u64, "at most 1024 are allowed");
        }
        if self.state_bytes_max > STATE_BYTES_MAX {
            return bad("state_bytes_max", self.state_bytes_max as u64, "the contract allows 65536");
        }
        if !(64 << 10..=64 * MIB).contains(&self.stack_bytes_max) {
            return bad("stack_bytes_max", self.stack_bytes_max, "it must be from 64 KiB to 64 MiB");
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn defaults_pass_and_nonsense_is_named() {
        Limits::default().check().unwrap();
        Limits::interpreter().check().unwrap();
        let message = |limits: Limits| limits.check().unwrap_err().to_string();
        assert!(message(Limits { call_ms_max: 0, ..Limits::default() }).contains("`call_ms_max`"));
        assert!(message(Limits { batch_items_max: 65, ..Limits::default() }).contains("`batch_items_max`"));
        assert!(message(Limits { workers: 9999, ..Limits::default() }).contains("`workers`"));
        assert!(message(Limits { state_bytes_max: 65_537, ..Limits::default() }).contains("`state_bytes_max`"));
        assert!(message(Limits { stack_bytes_max: 1, ..Limits::default() }).contains("`stack_bytes_max`"));
    }

    #[test]
    fn memory_and_workers_are_decided_by_the_component_and_the_machine() {
        let bytes = |limits: Limits, component| limits.decide(component).memory_bytes_max;
        assert_eq!(bytes(Limits::default(), 100_000), 64 << 20);
        assert_eq!(bytes(Limits::default(), 18 << 20), 512 << 20);
        assert_eq!(bytes(Limits { memory_bytes_max: 1 << 20, ..Limits::default() }, 18 << 20), 1 << 20);
        assert!(Limits::default().workers() >= 1);
        assert_eq!(Limits { workers: 3, ..Limits::default() }.workers(), 3);
    }
}
