//! What a plugin author uses: templates, builds in four languages, recorded cases, measurements.
//!
//! A project is a folder with a `plugin.toml` ([`manifest::Manifest`]). [`new::new`] makes one, [`build::build`] turns
//! it into a component with the tools that [`toolchain`] finds on this machine. [`cases`] are what it is tried with, and
//! [`bench`] measures it.

pub mod bench;
pub mod build;
pub mod cases;
pub mod error;
pub mod folder_tables;
pub mod manifest;
pub mod new;
pub mod project;
pub mod target;
pub mod toolchain;
pub mod wit;

pub use error::{AuthorError, Result};
pub use project::Project;
