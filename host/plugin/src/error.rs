//! Everything that can go wrong with a plugin before or beside its samples.

use std::path::PathBuf;

/// Why a plugin could not be read, loaded, opened or built. A failed sample is a [`crate::SampleFailure`], not this.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PluginError {
    /// The file could not be read.
    #[error("cannot read the plugin `{}`: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// The file could not be written.
    #[error("cannot write `{}`: {source}", path.display())]
    Write {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// The bytes do not start as WebAssembly does.
    #[error("`{}` is not WebAssembly: {found}", path.display())]
    NotWasm {
        /// The file.
        path: PathBuf,
        /// What it looks like instead.
        found: String,
    },
    /// A core module where a component is needed.
    #[error("`{}` is a core WebAssembly module, not a component", path.display())]
    CoreModule {
        /// The file.
        path: PathBuf,
    },
    /// WebAssembly that does not parse or validate.
    #[error("`{}` is not a valid component: {detail}", path.display())]
    Malformed {
        /// The file.
        path: PathBuf,
        /// The parser's words.
        detail: String,
    },
    /// The file is above the limit.
    #[error("`{}` has {bytes} bytes, above the limit of {bytes_max}", path.display())]
    TooLarge {
        /// The file.
        path: PathBuf,
        /// Its size.
        bytes: u64,
        /// The limit.
        bytes_max: u64,
    },
    /// The exports are those of no known world.
    #[error("`{}` implements no world of `cosmos:plugin`: {detail}", path.display())]
    WrongWorld {
        /// The file.
        path: PathBuf,
        /// What it exports, and what is missing.
        detail: String,
    },
    /// Built against another version of the WIT package.
    #[error("`{}` was built against `cosmos:plugin@{found}`, this host serves {supported}", path.display())]
    WrongVersion {
        /// The file.
        path: PathBuf,
        /// Version in the component.
        found: String,
        /// Versions of this host.
        supported: String,
        /// The component's is above the host's.
        newer: bool,
    },
    /// An exported interface lacks a function, or one has another type.
    #[error("`{}` exports an interface that differs from `cosmos:plugin`: {detail}", path.display())]
    WrongInterface {
        /// The file.
        path: PathBuf,
        /// The difference.
        detail: String,
    },
    /// Imports that the configuration does not grant.
    #[error("plugin `{plugin}` imports {imports}, which the configuration does not grant")]
    NotGranted {
        /// The plugin's name.
        plugin: String,
        /// The imports, quoted.
        imports: String,
        /// The configuration that would grant them.
        line: String,
    },
    /// Imports that no grant can give.
    #[error("plugin `{plugin}` imports {imports}, which this host never provides")]
    UnknownImport {
        /// The plugin's name.
        plugin: String,
        /// The imports, quoted.
        imports: String,
    },
    /// A grant that cannot be read.
    #[error("`{text}` is not a grant: {detail}")]
    BadGrant {
        /// What was written.
        text: String,
        /// What is wrong with it.
        detail: String,
    },
    /// A granted directory that cannot be opened.
    #[error("plugin `{plugin}` is granted the directory `{}`, which cannot be opened: {detail}", path.display())]
    GrantedDir {
        /// The plugin's name.
        plugin: String,
        /// The directory.
        path: PathBuf,
        /// What the system said.
        detail: String,
    },
    /// The compiler refused the component.
    #[error("cannot compile `{}`: {detail}", path.display())]
    Compile {
        /// The file.
        path: PathBuf,
        /// The compiler's words.
        detail: String,
    },
    /// The compiler took too long.
    #[error("compiling `{}` took longer than {ms_max} ms", path.display())]
    CompileTimeout {
        /// The file.
        path: PathBuf,
        /// The limit.
        ms_max: u64,
    },
    /// The compiler took too much memory.
    #[error("compiling `{}` took more than {bytes_max} bytes of memory", path.display())]
    CompileMemory {
        /// The file.
        path: PathBuf,
        /// The limit.
        bytes_max: u64,
    },
    /// A component built like no compiler builds one: its structure alone would cost more than a plugin may.
    #[error("`{}` is refused before it is compiled: {detail}", path.display())]
    TooComplex {
        /// The file.
        path: PathBuf,
        /// What there is too much of.
        detail: String,
    },
    /// The cache folder cannot be used safely.
    #[error("the plugin cache `{}` cannot be used: {detail}", path.display())]
    CacheFolder {
        /// The folder.
        path: PathBuf,
        /// Why not.
        detail: String,
    },
    /// A limit that makes no sense.
    #[error("limit `{key}` is {value}: {detail}")]
    BadLimit {
        /// The limit's name.
        key: &'static str,
        /// Its value.
        value: u64,
        /// What is wrong with it.
        detail: &'static str,
    },
    /// The plugin failed before it could be asked for samples.
    #[error("plugin `{plugin}` failed in {function}: {reason}")]
    Call {
        /// The plugin's name.
        plugin: String,
        /// The function and for what, quoted: "`reward.init` of `countdown`".
        function: String,
        /// The plugin's own message, the trap or the limit that it broke.
        reason: String,
    },
    /// `metadata.describe` returned something unusable.
    #[error("plugin `{plugin}` describes itself wrongly: {detail}")]
    BadDescription {
        /// The plugin's name.
        plugin: String,
        /// What is wrong.
        detail: String,
    },
    /// The plugin offers nothing of this name.
    #[error("plugin `{plugin}` offers no {kind} `{name}`")]
    UnknownOffer {
        /// The plugin's name.
        plugin: String,
        /// `dataset`, `reward` or `environment`.
        kind: &'static str,
        /// The name asked for.
        name: String,
        /// The names that it does offer, quoted.
        offered: String,
    },
    /// The settings are not JSON, or too large.
    #[error("the settings of plugin `{plugin}` cannot be used: {detail}")]
    BadSettings {
        /// The plugin's name.
        plugin: String,
        /// What is wrong.
        detail: String,
    },
    /// A core module could not be made a component.
    #[error("cannot make a component of {module}: {detail}")]
    Componentize {
        /// The module's file, or `the core module`.
        module: String,
        /// What is wrong.
        detail: String,
    },
    /// The host itself failed: no thread, no memory.
    #[error("the plugin host failed: {detail}")]
    Host {
        /// What failed.
        detail: String,
    },
}

impl PluginError {
    /// What to do about it, when that is known.
    pub fn hint(&self) -> Option<String> {
        let text = match self {
            Self::Read { .. } => "check the path".into(),
            Self::NotWasm { .. } => {
                "give the built component (`*.wasm`), which `cosmos-host plugin build` makes".into()
            }
            Self::CoreModule { .. } => "turn it into a component with `cosmos-host plugin build`".into(),
            Self::Malformed { .. } => {
                "the file may be truncated or damaged: build or download it again, then run `cosmos-host plugin check`"
                    .into()
            }
            Self::TooLarge { .. } => "strip debug information, or raise the limit `component_bytes_max`".into(),
            Self::WrongWorld { .. } => {
                "export `metadata` and at least one of `dataset`, `reward` and `environment` of `wit/since-v0.2.0`"
                    .into()
            }
            Self::WrongVersion { newer: true, .. } => {
                "update the host, or rebuild the plugin against `wit/since-v0.2.0`".into()
            }
            Self::WrongVersion { newer: false, .. } => "rebuild the plugin against `wit/since-v0.2.0`".into(),
            Self::WrongInterface { .. } => {
                "rebuild the plugin against the unchanged WIT package, `wit/since-v0.2.0` or `wit/since-v0.1.0`".into()
            }
            Self::NotGranted { line, .. } => format!("grant it in the configuration: {line}"),
            Self::UnknownImport { .. } => {
                "build for `wasm32-unknown-unknown` or `wasm32-wasip2`, without sockets, HTTP or other host interfaces"
                    .into()
            }
            Self::BadGrant { .. } => "use \"log\", \"table\", \"chat-template\" or \"dir:/absolute/path:ro\"".into(),
            Self::CompileTimeout { .. } => {
                "raise the limit `compile_ms_max`; with a cache folder the component is compiled only once".into()
            }
            Self::CompileMemory { .. } => {
                "build without debug information and with `opt-level = \"s\"`, or raise the limit `compile_bytes_max`"
                    .into()
            }
            Self::TooComplex { .. } => {
                "build one component with the usual tools, without plugins nested in it; a large interpreter needs \
                 `memory_bytes_max` = 536870912"
                    .into()
            }
            Self::CacheFolder { path, .. } => {
                format!("make it a folder of your own: `mkdir -p -m 700 {0} && chmod 700 {0}`", path.display())
            }
            Self::UnknownOffer { offered, .. } => format!("it offers {offered}"),
            Self::Componentize { .. } => {
                "build a core module for `wasm32-unknown-unknown` or `wasm32-wasip1` with wit-bindgen's metadata in it"
                    .into()
            }
            _ => return None,
        };
        Some(text)
    }
}
