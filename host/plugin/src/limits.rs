//! What a plugin may use. Every limit is on by default.

use serde::{Deserialize, Serialize};

use crate::PluginError;

const MIB: u64 = 1 << 20;

/// Limits of one plugin. A guest that breaks one loses the sample it was working on, nothing else.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Limits {
    /// Linear memory of one instance, all its memories together. Python and JavaScript need 512 MiB.
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
    /// Elements of one table.
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
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            memory_bytes_max: 64 * MIB,
            call_ms_max: 10_000,
            item_ms_max: 2_000,
            init_ms_max: 30_000,
            table_open_ms_max: 1_800_000,
            component_bytes_max: 64 * MIB,
            compile_ms_max: 180_000,
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
        }
    }
}

/// The contract's own bound on the items of a call.
pub(crate) const BATCH_ITEMS_MAX: usize = 64;

impl Limits {
    /// The defaults for Python and JavaScript, whose interpreters need more memory.
    pub fn interpreter() -> Self {
        Self { memory_bytes_max: 512 * MIB, ..Self::default() }
    }

    /// # Errors
    /// [`PluginError::BadLimit`] names the first limit that no plugin could run under.
    pub(crate) fn check(&self) -> Result<(), PluginError> {
        let bad = |key, value, detail| Err(PluginError::BadLimit { key, value, detail });
        let positive = [
            ("memory_bytes_max", self.memory_bytes_max),
            ("call_ms_max", self.call_ms_max),
            ("item_ms_max", self.item_ms_max),
            ("init_ms_max", self.init_ms_max),
            ("table_open_ms_max", self.table_open_ms_max),
            ("component_bytes_max", self.component_bytes_max),
            ("compile_ms_max", self.compile_ms_max),
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
        assert!(message(Limits { stack_bytes_max: 1, ..Limits::default() }).contains("`stack_bytes_max`"));
    }
}
