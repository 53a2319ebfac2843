//! The sandbox against guests that misbehave, files that are no plugins, and the plugins that are shipped.

mod files;
mod guests;
mod hostile;
mod lent;
mod shipped;
mod wasi;
