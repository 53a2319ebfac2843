//! The launcher's files in a run folder.

use std::fs::{self, File, OpenOptions};
use std::io::{Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use crate::error::{LaunchError, Result};

/// The run's token, readable by its owner alone.
pub const TOKEN_FILE: &str = "token";
const TOKEN_BYTES_MAX: u64 = 4096;

/// The launcher's folder in a run folder.
pub fn launch_folder(run_folder: &Path) -> PathBuf {
    run_folder.join("launch")
}

/// Logs and end states of one start of the job.
pub fn attempt_folder(run_folder: &Path, attempt: u32) -> PathBuf {
    launch_folder(run_folder).join(format!("attempt-{attempt}"))
}

/// The token that all nodes find in the run folder, if it is there.
pub fn read_token(run_folder: &Path) -> Result<Option<String>> {
    let path = launch_folder(run_folder).join(TOKEN_FILE);
    let mut text = String::new();
    match File::open(&path).and_then(|file| file.take(TOKEN_BYTES_MAX).read_to_string(&mut text)) {
        Ok(_) => Ok(Some(text.trim().to_owned())),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(LaunchError::io("read", path)(error)),
    }
}

/// Makes a random token and puts it where the other nodes find it.
pub fn write_token(run_folder: &Path) -> Result<String> {
    let token = random_hex()?;
    let folder = launch_folder(run_folder);
    fs::create_dir_all(&folder).map_err(LaunchError::io("create", &folder))?;
    write_whole(&folder.join(TOKEN_FILE), format!("{token}\n").as_bytes(), 0o600)?;
    Ok(token)
}

/// 32 random bytes in hexadecimal.
pub(super) fn random_hex() -> Result<String> {
    let path = Path::new("/dev/urandom");
    let mut bytes = [0u8; 32];
    File::open(path).and_then(|mut file| file.read_exact(&mut bytes)).map_err(LaunchError::io("read", path))?;
    Ok(bytes.iter().map(|b| format!("{b:02x}")).collect())
}

/// Replaces a file by a finished one.
pub(crate) fn write_whole(path: &Path, bytes: &[u8], mode: u32) -> Result<()> {
    let mut name = path.file_name().unwrap_or_default().to_os_string();
    name.push(format!(".{}.part", std::process::id()));
    let part = path.with_file_name(name);
    let written = (|| {
        let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(mode).open(&part)?;
        file.write_all(bytes)?;
        file.sync_all()?;
        fs::rename(&part, path)
    })();
    if written.is_err() {
        // The error says why; the leftover must not stay.
        let _ = fs::remove_file(&part);
    }
    written.map_err(LaunchError::io("write", path))
}
