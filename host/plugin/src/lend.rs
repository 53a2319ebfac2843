//! The host's side of the imports `log`, `table` and `chat-template`, in words of no particular API version. The
//! adapters translate.

use std::time::Duration;

use wasmtime::component::Resource;

use crate::sandbox::GuestState;
use crate::voice::{Level, lock};
use crate::{ChatMessage, TableRequest, TableRows};

/// Rows that a guest holds a handle to.
pub struct OpenRows(Box<dyn TableRows>);

/// Bytes of one row beyond its text, so that a million empty rows are not free.
const ROW_BYTES: usize = 16;

impl GuestState {
    pub(crate) fn write_log(&self, level: Level, message: &str) {
        lock(&self.voice).say(level, message);
    }

    pub(crate) fn open_table(
        &mut self,
        request: &TableRequest,
    ) -> wasmtime::Result<Result<Resource<OpenRows>, String>> {
        let Some(tables) = self.capabilities.table.clone() else {
            return Ok(Err("this command lends no dataset reader".into()));
        };
        let open_max = Duration::from_millis(self.limits.table_open_ms_max);
        match self.clock.excuse(open_max, || tables.open(request)) {
            Ok(rows) => Ok(Ok(self.handles.push(OpenRows(rows))?)),
            Err(message) => Ok(Err(message)),
        }
    }

    pub(crate) fn rows_len(&self, rows: &Resource<OpenRows>) -> wasmtime::Result<u64> {
        Ok(self.handles.get(rows)?.0.len())
    }

    pub(crate) fn rows_columns(&self, rows: &Resource<OpenRows>) -> wasmtime::Result<Vec<String>> {
        Ok(self.handles.get(rows)?.0.columns())
    }

    pub(crate) fn read_rows(
        &self,
        rows: &Resource<OpenRows>,
        start: u64,
        count: u32,
        columns: &[String],
    ) -> wasmtime::Result<Result<Vec<String>, String>> {
        let rows = &self.handles.get(rows)?.0;
        let count_max = crate::limits::BATCH_ITEMS_MAX;
        if count as usize > count_max {
            return Ok(Err(format!("{count} rows asked for in one call, at most {count_max} are allowed")));
        }
        let len = rows.len();
        if start.checked_add(count.into()).is_none_or(|end| end > len) {
            return Ok(Err(format!("{count} rows from {start} reach beyond the table's {len}")));
        }
        let read = match rows.read(start, count, columns) {
            Ok(read) => read,
            Err(message) => return Ok(Err(message)),
        };
        let bytes = read.iter().map(|row| row.len() + ROW_BYTES).sum::<usize>();
        if bytes > self.limits.result_bytes_max {
            let bytes_max = self.limits.result_bytes_max;
            return Ok(Err(format!(
                "{count} rows have {bytes} bytes, above `result_bytes_max` = {bytes_max}: read fewer rows or columns"
            )));
        }
        Ok(Ok(read))
    }

    pub(crate) fn close_rows(&mut self, rows: Resource<OpenRows>) -> wasmtime::Result<()> {
        self.handles.delete(rows)?;
        Ok(())
    }

    pub(crate) fn render_chat(
        &self,
        messages: &[ChatMessage],
        add_generation_prompt: bool,
        options: &str,
    ) -> Result<String, String> {
        match &self.capabilities.chat {
            Some(chat) => chat.render(messages, add_generation_prompt, options),
            None => Err("this command lends no chat template".into()),
        }
    }
}
