//! What a run reads besides weights: Hugging Face datasets, tokenizers and chat templates, and the order in which samples are taken.
//!
//! Nothing here knows of plugins or models. Rows leave this crate as JSON objects, prompts as text and token ids.
//!
//! - [`dataset`]: a table of rows from a hub dataset, a `save_to_disk` folder, or parquet, Arrow and JSON files.
//! - [`split_test`]: which rows are held out for validation.
//! - [`order`]: the reproducible, resumable order of samples.
//! - [`tokenizer`]: text to token ids and back, and whether two tokenizers are the same.
//! - [`chat`]: messages to prompt text by a model's own template.

pub mod chat;
pub mod dataset;
mod error;
mod guard;
pub mod order;
mod python_json;
pub mod tokenizer;

pub use chat::{ChatTemplate, Message};
pub use dataset::{ColumnInfo, DatasetSpec, HubOptions, Row, Table, TestSize, TestSplit, split_test};
pub use error::DataError;
pub use order::{Batch, Cursor, Order, Sampler};
pub use tokenizer::{TextStream, Tokenizer};
