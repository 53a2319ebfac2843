//! NCCL's functions, loaded when they are first needed.
//!
//! cudarc's own loader knows `libnccl.so` only and panics without it, while NVIDIA's wheels and most packages bring
//! `libnccl.so.2`; so the functions are looked up here.
#![allow(unsafe_code)]

use std::ffi::{CStr, c_char, c_int, c_void};
use std::sync::OnceLock;

use libloading::Library;

use super::ID_BYTES;
use crate::{ParallelError, Result};

/// Names a file or folder to load NCCL from, before all others.
const PATH_VARIABLE: &str = "COSMOS_NCCL";
const NAMES: [&str; 2] = ["libnccl.so.2", "libnccl.so"];

pub(super) const SUCCESS: c_int = 0;
pub(super) const IN_PROGRESS: c_int = 7;

/// An unset number of a [`Config`].
const UNSET: c_int = c_int::MIN;

#[repr(C)]
#[derive(Clone, Copy)]
pub(super) struct UniqueId(pub [u8; ID_BYTES]);

/// `ncclConfig_t` as of NCCL 2.17; later versions take it by its size and version.
#[repr(C)]
pub(super) struct Config {
    size: usize,
    magic: u32,
    version: u32,
    blocking: c_int,
    cga_cluster_size: c_int,
    min_ctas: c_int,
    max_ctas: c_int,
    net_name: *const c_char,
    split_share: c_int,
}

impl Config {
    /// Calls return at once; whether they are done is asked for, so that a deadline can be kept.
    pub(super) fn non_blocking() -> Config {
        Config {
            size: size_of::<Config>(),
            magic: 0xcafe_beef,
            version: 21_700,
            blocking: 0,
            cga_cluster_size: UNSET,
            min_ctas: UNSET,
            max_ctas: UNSET,
            net_name: std::ptr::null(),
            split_share: UNSET,
        }
    }
}

pub(super) type Comm = *mut c_void;
pub(super) type Stream = *mut c_void;

/// The functions that are used.
pub(super) struct Functions {
    pub get_version: unsafe extern "C" fn(*mut c_int) -> c_int,
    pub get_unique_id: unsafe extern "C" fn(*mut UniqueId) -> c_int,
    pub comm_init_rank_config: unsafe extern "C" fn(*mut Comm, c_int, UniqueId, c_int, *mut Config) -> c_int,
    pub comm_abort: unsafe extern "C" fn(Comm) -> c_int,
    pub comm_get_async_error: unsafe extern "C" fn(Comm, *mut c_int) -> c_int,
    pub get_error_string: unsafe extern "C" fn(c_int) -> *const c_char,
    pub group_start: unsafe extern "C" fn() -> c_int,
    pub group_end: unsafe extern "C" fn() -> c_int,
    pub all_reduce: unsafe extern "C" fn(*const c_void, *mut c_void, usize, c_int, c_int, Comm, Stream) -> c_int,
    pub all_gather: unsafe extern "C" fn(*const c_void, *mut c_void, usize, c_int, Comm, Stream) -> c_int,
    pub reduce_scatter: unsafe extern "C" fn(*const c_void, *mut c_void, usize, c_int, c_int, Comm, Stream) -> c_int,
    pub broadcast: unsafe extern "C" fn(*const c_void, *mut c_void, usize, c_int, c_int, Comm, Stream) -> c_int,
    pub send: unsafe extern "C" fn(*const c_void, usize, c_int, c_int, Comm, Stream) -> c_int,
    pub recv: unsafe extern "C" fn(*mut c_void, usize, c_int, c_int, Comm, Stream) -> c_int,
    /// Keeps the functions in memory.
    _library: Library,
}

/// What the loader says; the error itself only says that it failed.
fn cause(error: &libloading::Error) -> String {
    std::error::Error::source(error).map_or_else(|| error.to_string(), |source| source.to_string())
}

impl Functions {
    fn of(library: Library) -> std::result::Result<Functions, String> {
        macro_rules! function {
            ($name:literal) => {
                // SAFETY: the name is that of NCCL's C function, whose signature since 2.14 is the field's type; the
                // pointer lives as long as the library, which the struct keeps.
                *unsafe { library.get($name) }.map_err(|error| format!("no `{}` in it: {}", $name, cause(&error)))?
            };
        }
        Ok(Functions {
            get_version: function!("ncclGetVersion"),
            get_unique_id: function!("ncclGetUniqueId"),
            comm_init_rank_config: function!("ncclCommInitRankConfig"),
            comm_abort: function!("ncclCommAbort"),
            comm_get_async_error: function!("ncclCommGetAsyncError"),
            get_error_string: function!("ncclGetErrorString"),
            group_start: function!("ncclGroupStart"),
            group_end: function!("ncclGroupEnd"),
            all_reduce: function!("ncclAllReduce"),
            all_gather: function!("ncclAllGather"),
            reduce_scatter: function!("ncclReduceScatter"),
            broadcast: function!("ncclBroadcast"),
            send: function!("ncclSend"),
            recv: function!("ncclRecv"),
            _library: library,
        })
    }

    /// What a result code means.
    pub(super) fn told(&self, code: c_int) -> String {
        // SAFETY: takes any code and gives a string of the library's own, which is never freed.
        let text = unsafe {
            let text = (self.get_error_string)(code);
            if text.is_null() { None } else { Some(CStr::from_ptr(text).to_string_lossy().into_owned()) }
        };
        format!("{} (NCCL result {code})", text.unwrap_or_else(|| "an error without a name".into()))
    }
}

/// The library, loaded once.
///
/// # Errors
/// [`ParallelError::NoLibrary`] with what was tried.
pub(super) fn functions() -> Result<&'static Functions> {
    static LOADED: OnceLock<std::result::Result<Functions, Vec<String>>> = OnceLock::new();
    let given = || std::env::var(PATH_VARIABLE).ok().filter(|path| !path.is_empty());
    let loaded = LOADED.get_or_init(|| load(given().as_deref()));
    loaded.as_ref().map_err(|tried| ParallelError::NoLibrary { library: "NCCL", tried: tried.clone() })
}

/// Loads from `given`, a file or a folder, or else by the usual names; what was tried and why it failed.
fn load(given: Option<&str>) -> std::result::Result<Functions, Vec<String>> {
    let candidates: Vec<String> = match given {
        Some(path) if std::path::Path::new(path).is_dir() => NAMES.map(|name| format!("{path}/{name}")).into(),
        Some(path) => vec![path.to_owned()],
        None => NAMES.map(str::to_owned).into(),
    };
    let mut tried = Vec::new();
    for candidate in candidates {
        // SAFETY: NCCL's initialisers run, as in any program that links it; the user names the file or the system finds it.
        let opened = unsafe { Library::new(candidate.as_str()) };
        match opened.map_err(|error| cause(&error)).and_then(Functions::of) {
            Ok(functions) => return Ok(functions),
            Err(reason) => tried.push(format!("{candidate} ({reason})")),
        }
    }
    Err(tried)
}

/// The version of the NCCL that is on this machine, such as 22703 for 2.27.3.
///
/// # Errors
/// [`ParallelError::NoLibrary`].
pub fn library_version() -> Result<i32> {
    version_of(functions()?)
}

fn version_of(functions: &Functions) -> Result<i32> {
    let mut version = 0;
    // SAFETY: writes one int.
    let code = unsafe { (functions.get_version)(&mut version) };
    if code == SUCCESS {
        return Ok(version);
    }
    Err(ParallelError::Nccl { operation: "version", rank: 0, reason: functions.told(code) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_library_is_an_error_with_what_was_tried() {
        let tried = load(Some("/nonexistent/libnccl.so.2")).err().unwrap();
        let error = ParallelError::NoLibrary { library: "NCCL", tried };
        assert!(error.to_string().starts_with("NCCL cannot be loaded: /nonexistent/libnccl.so.2 ("), "{error}");
        assert!(error.hint().unwrap().contains("COSMOS_NCCL"));
        // A folder without it, and a library that is another.
        assert_eq!(load(Some("/")).err().unwrap().len(), 2);
        if let Err(tried) = load(Some("libc.so.6")) {
            assert!(tried[0].contains("nccl"), "{tried:?}");
        } else {
            panic!("libc has no NCCL");
        }
    }

    /// Where a real library is (the wheel's will do, and needs no GPU), its functions are found.
    #[test]
    fn a_library_that_is_there_tells_its_version() {
        match library_version() {
            Ok(version) => assert!(version >= 21_400, "{version}"),
            Err(error) => eprintln!("skipped: {error}"),
        }
    }
}
