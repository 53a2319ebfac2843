//! The sandbox against guests that misbehave, files that are no plugins, and the plugins that are shipped.

mod crews;
mod environment;
mod files;
mod frozen;
mod guests;
mod hostile;
mod lent;
mod measured;
mod mutated;
mod outside;
mod shipped;
mod wasi;
