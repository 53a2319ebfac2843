//! Datasets on a Hugging Face hub, kept in the cache layout that the Python libraries use as well.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::Deserialize;
use sha2::{Digest, Sha256};

use super::{files, locate};
use crate::error::DataError;

/// Bytes of the answer that lists a repository's files.
const LISTING_BYTES_MAX: u64 = 64 << 20;
/// How often a broken download is taken up again before it fails.
const RETRIES: u32 = 4;
/// The wait before the first of those, doubled each time.
const RETRY_WAIT: Duration = Duration::from_millis(250);

/// Where the hub and its cache are.
#[derive(Clone, PartialEq, Eq)]
pub struct HubOptions {
    /// The hub's address, without a slash at its end.
    pub endpoint: String,
    /// The access token for private and gated datasets.
    pub token: Option<String>,
    /// The folder that has `datasets--owner--name` folders.
    pub cache_dir: PathBuf,
    /// Use what is in the cache and nothing else.
    pub offline: bool,
    /// How long the hub may be silent, milliseconds.
    pub silence_ms_max: u64,
    /// Bytes that opening one dataset may download.
    pub download_bytes_max: u64,
    /// Files that one dataset may consist of.
    pub files_max: usize,
}

impl std::fmt::Debug for HubOptions {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("HubOptions")
            .field("endpoint", &self.endpoint)
            .field("token", &self.token.as_ref().map(|_| "(hidden)"))
            .field("cache_dir", &self.cache_dir)
            .field("offline", &self.offline)
            .field("silence_ms_max", &self.silence_ms_max)
            .field("download_bytes_max", &self.download_bytes_max)
            .field("files_max", &self.files_max)
            .finish()
    }
}

impl HubOptions {
    /// From the environment, by the rules of the Python libraries: `HF_ENDPOINT`; `HF_TOKEN`, else the file
    /// `HF_TOKEN_PATH` or `$HF_HOME/token`; `HF_HUB_CACHE`, else `$HF_HOME/hub`; `HF_HOME`, else
    /// `$XDG_CACHE_HOME/huggingface`, else `~/.cache/huggingface`; `HF_HUB_OFFLINE` = `1`, `true`, `yes` or `on`.
    pub fn from_env() -> Self {
        Self::from_vars(|name| std::env::var(name).ok())
    }

    /// As [`HubOptions::from_env`], with the variables looked up by `var`.
    pub fn from_vars(var: impl Fn(&str) -> Option<String>) -> Self {
        let var = |name: &str| var(name).filter(|value| !value.trim().is_empty());
        let home = var("HF_HOME").map(PathBuf::from).unwrap_or_else(|| {
            let user_cache = var("XDG_CACHE_HOME").map(PathBuf::from);
            let user_cache = user_cache.or_else(|| var("HOME").map(|home| Path::new(&home).join(".cache")));
            user_cache.unwrap_or_else(|| ".cache".into()).join("huggingface")
        });
        let token_path = var("HF_TOKEN_PATH").map(PathBuf::from).unwrap_or_else(|| home.join("token"));
        let token = var("HF_TOKEN").or_else(|| std::fs::read_to_string(token_path).ok());
        let offline = var("HF_HUB_OFFLINE").unwrap_or_default().to_ascii_lowercase();
        Self {
            endpoint: var("HF_ENDPOINT")
                .unwrap_or_else(|| "https://huggingface.co".into())
                .trim_end_matches('/')
                .into(),
            token: token.map(|token| token.trim().to_owned()).filter(|token| !token.is_empty()),
            cache_dir: var("HF_HUB_CACHE").map(PathBuf::from).unwrap_or_else(|| home.join("hub")),
            offline: matches!(offline.as_str(), "1" | "true" | "yes" | "on"),
            silence_ms_max: 30_000,
            download_bytes_max: 200 << 30,
            files_max: 20_000,
        }
    }
}

/// `name` or `owner/name`, as the hub allows them.
pub(crate) fn is_hub_id(name: &str) -> bool {
    let part = |part: &str| {
        !part.is_empty()
            && part.len() <= 96
            && part.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.'))
            && !part.starts_with(['.', '-'])
            && !part.contains("..")
            && !part.contains("--")
    };
    match name.split_once('/') {
        Some((owner, name)) => part(owner) && part(name),
        None => part(name),
    }
}

/// A dataset at one commit: files that the hub lists or that the cache has.
pub(super) struct Repository<'a> {
    name: &'a str,
    options: &'a HubOptions,
    /// `datasets--owner--name` in the cache.
    folder: PathBuf,
    commit: String,
    files: Vec<RemoteFile>,
    /// `None` when only the cache is used.
    agent: Option<ureq::Agent>,
    downloaded_bytes: u64,
}

#[derive(Debug, Clone, Deserialize)]
struct RemoteFile {
    #[serde(rename = "rfilename")]
    path: String,
    #[serde(default)]
    size: Option<u64>,
    #[serde(default, rename = "blobId")]
    blob_id: Option<String>,
    #[serde(default)]
    lfs: Option<LargeFile>,
}

#[derive(Debug, Clone, Deserialize)]
struct LargeFile {
    sha256: String,
}

#[derive(Debug, Deserialize)]
struct Listing {
    sha: String,
    siblings: Vec<RemoteFile>,
}

impl<'a> Repository<'a> {
    /// Asks the hub what there is. When it cannot be reached, what the cache has is used, with a warning.
    pub fn open(name: &'a str, revision: &str, options: &'a HubOptions) -> Result<Self, DataError> {
        let revision = if revision.is_empty() { "main" } else { revision };
        let folder = options.cache_dir.join(format!("datasets--{}", name.replace('/', "--")));
        let empty =
            Self { name, options, folder, commit: String::new(), files: Vec::new(), agent: None, downloaded_bytes: 0 };
        if options.offline {
            return empty.cached(revision);
        }
        let agent = agent(options);
        match list(&agent, name, revision, options) {
            Ok(listing) => {
                let found = Self { commit: listing.sha, files: listing.siblings, agent: Some(agent), ..empty };
                found.keep_reference(revision)?;
                Ok(found)
            }
            Err(error) if unreachable(&error) => match empty.cached(revision) {
                Ok(cached) => {
                    tracing::warn!("{error}; using the copy of `{name}` in the cache");
                    Ok(cached)
                }
                Err(_) => Err(error),
            },
            Err(error) => Err(error),
        }
    }

    fn cached(mut self, revision: &str) -> Result<Self, DataError> {
        let missing =
            || DataError::Offline { name: self.name.to_owned(), file: None, cache: self.options.cache_dir.clone() };
        if !files::is_inside(revision) {
            return Err(missing());
        }
        let reference = std::fs::read_to_string(self.folder.join("refs").join(revision)).ok();
        let commit = reference.map_or_else(|| revision.to_owned(), |commit| commit.trim().to_owned());
        let snapshot = self.folder.join("snapshots").join(&commit);
        if !is_plain(&commit) || !snapshot.is_dir() {
            return Err(missing());
        }
        let mut paths = Vec::new();
        locate::walk(&snapshot, "", &mut paths)?;
        paths.retain(|path| snapshot.join(path).is_file());
        if paths.is_empty() {
            return Err(missing());
        }
        self.files = paths.into_iter().map(|path| RemoteFile { path, size: None, blob_id: None, lfs: None }).collect();
        self.commit = commit;
        Ok(self)
    }

    /// All files, as paths within the repository.
    pub fn files(&self) -> Vec<String> {
        self.files.iter().map(|file| file.path.clone()).collect()
    }

    /// The dataset card, when there is one.
    pub fn card(&mut self) -> Result<Option<String>, DataError> {
        let card = "README.md".to_owned();
        if !self.files.iter().any(|file| file.path == card) {
            return Ok(None);
        }
        let paths = self.fetch(&[card])?;
        paths.first().map(|path| locate::read_description(path)).transpose()
    }

    /// The places of `wanted` on disk, downloaded where they are not in the cache.
    pub fn fetch(&mut self, wanted: &[String]) -> Result<Vec<PathBuf>, DataError> {
        let too_large = |what: &str, size: String, limit: String| DataError::TooLarge {
            what: format!("{what} of dataset `{}`", self.name),
            size,
            limit,
        };
        if wanted.len() > self.options.files_max {
            return Err(too_large("the number of files", wanted.len().to_string(), self.options.files_max.to_string()));
        }
        let snapshot = self.folder.join("snapshots").join(&self.commit);
        let absent: Vec<&String> = wanted.iter().filter(|path| !snapshot.join(path).is_file()).collect();
        let listed = |path: &String| self.files.iter().find(|file| file.path == *path);
        let sizes = absent.iter().filter_map(|path| listed(path)?.size);
        let total = sizes.fold(self.downloaded_bytes, u64::saturating_add);
        if total > self.options.download_bytes_max {
            return Err(too_large(
                "the download",
                format!("{total} bytes"),
                format!("{} bytes", self.options.download_bytes_max),
            ));
        }
        let absent: Vec<RemoteFile> = absent.into_iter().filter_map(|path| listed(path).cloned()).collect();
        for (i, file) in absent.iter().enumerate() {
            tracing::info!("downloading `{}` of `{}` ({} of {})", file.path, self.name, i + 1, absent.len());
            self.download(file, &snapshot)?;
        }
        Ok(wanted.iter().map(|path| snapshot.join(path)).collect())
    }

    /// Gets one file into `blobs/` and puts a link to it into the snapshot.
    fn download(&mut self, file: &RemoteFile, snapshot: &Path) -> Result<(), DataError> {
        let Some(agent) = self.agent.clone() else {
            return Err(DataError::Offline {
                name: self.name.to_owned(),
                file: Some(file.path.clone()),
                cache: self.options.cache_dir.clone(),
            });
        };
        let url =
            format!("{}/datasets/{}/resolve/{}/{}", self.options.endpoint, self.name, self.commit, escaped(&file.path));
        let blobs = self.folder.join("blobs");
        std::fs::create_dir_all(&blobs).map_err(DataError::io("write", &blobs))?;
        let sha256 = file.lfs.as_ref().map(|lfs| lfs.sha256.as_str()).filter(|hash| is_hash(hash));
        let known_name = sha256.or(file.blob_id.as_deref().filter(|id| is_hash(id)));
        let partial_name =
            known_name.map_or_else(|| hex(&Sha256::digest(format!("{}/{}", self.commit, file.path))), str::to_owned);
        let partial = blobs.join(format!("{partial_name}.incomplete"));
        let io = |action| DataError::io(action, &partial);
        let mut options = File::options();
        let mut out =
            options.read(true).write(true).create(true).truncate(false).open(&partial).map_err(io("write"))?;
        // Another process may be at the same file; the lock goes with the handle.
        out.lock().map_err(io("write"))?;
        let mut blob = known_name.map(|name| blobs.join(name));
        if !blob.as_ref().is_some_and(|blob| blob.is_file()) {
            let budget = self.options.download_bytes_max - self.downloaded_bytes.min(self.options.download_bytes_max);
            let request = Request { agent: &agent, url: &url, options: self.options, size: file.size, budget };
            self.downloaded_bytes = self.downloaded_bytes.saturating_add(request.run(&mut out, &partial)?);
            if known_name.is_none() || sha256.is_some() {
                let hash = hash_of(&mut out).map_err(io("read"))?;
                if sha256.is_some_and(|expected| !expected.eq_ignore_ascii_case(&hash)) {
                    out.set_len(0).map_err(io("write"))?;
                    return Err(DataError::Hub {
                        url,
                        detail: "what came does not have the SHA-256 that the hub lists".into(),
                    });
                }
                blob.get_or_insert_with(|| blobs.join(hash));
            }
            out.sync_all().map_err(io("write"))?;
            if let Some(blob) = &blob {
                std::fs::rename(&partial, blob).map_err(io("write"))?;
            }
        } else {
            let _ = std::fs::remove_file(&partial);
        }
        let blob = blob.ok_or_else(|| DataError::broken(&partial, "it has no name"))?;
        link(&blob, snapshot, &file.path)
    }

    /// Remembers which commit a branch or tag stood for, for offline use.
    fn keep_reference(&self, revision: &str) -> Result<(), DataError> {
        if revision == self.commit || !files::is_inside(revision) {
            return Ok(());
        }
        let path = self.folder.join("refs").join(revision);
        if std::fs::read_to_string(&path).is_ok_and(|known| known.trim() == self.commit) {
            return Ok(());
        }
        let folder = path.parent().unwrap_or(&self.folder);
        std::fs::create_dir_all(folder).map_err(DataError::io("write", folder))?;
        let new = folder.join(format!(".{}.new", std::process::id()));
        std::fs::write(&new, &self.commit).map_err(DataError::io("write", &new))?;
        std::fs::rename(&new, &path).map_err(DataError::io("write", &path))
    }
}

fn agent(options: &HubOptions) -> ureq::Agent {
    let silence = Some(Duration::from_millis(options.silence_ms_max.max(1)));
    ureq::Agent::config_builder()
        .timeout_resolve(silence)
        .timeout_connect(silence)
        .timeout_recv_response(silence)
        .timeout_per_read(silence)
        .user_agent(concat!("cosmos-host/", env!("CARGO_PKG_VERSION")))
        .build()
        .into()
}

fn get(agent: &ureq::Agent, url: &str, options: &HubOptions) -> ureq::RequestBuilder<ureq::typestate::WithoutBody> {
    let request = agent.get(url);
    match &options.token {
        Some(token) => request.header("Authorization", format!("Bearer {token}")),
        None => request,
    }
}

fn list(agent: &ureq::Agent, name: &str, revision: &str, options: &HubOptions) -> Result<Listing, DataError> {
    let revision = escaped(revision).replace('/', "%2F");
    let url = format!("{}/api/datasets/{name}/revision/{revision}?blobs=true", options.endpoint);
    let failed = |error| hub_error(error, &url, options);
    let mut tries = 0;
    let mut response = loop {
        match get(agent, &url, options).call() {
            Ok(response) => break response,
            Err(error) if tries < 1 && worth_a_retry(&error) => {
                tries += 1;
                std::thread::sleep(RETRY_WAIT);
            }
            Err(error) => return Err(failed(error)),
        }
    };
    let body = response.body_mut().with_config().limit(LISTING_BYTES_MAX).read_to_vec().map_err(failed)?;
    let wrong = |detail: String| DataError::Hub { url: url.clone(), detail };
    let mut listing: Listing =
        serde_json::from_slice(&body).map_err(|e| wrong(format!("the answer is not a list of files: {e}")))?;
    if !is_plain(&listing.sha) {
        return Err(wrong("the answer names no commit".into()));
    }
    listing.siblings.retain(|file| files::is_inside(&file.path));
    Ok(listing)
}

/// One file to be downloaded.
struct Request<'a> {
    agent: &'a ureq::Agent,
    url: &'a str,
    options: &'a HubOptions,
    /// Bytes, when the hub said so.
    size: Option<u64>,
    /// Bytes that may come at most.
    budget: u64,
}

impl Request<'_> {
    /// Downloads into `out`, going on from what is there; returns how many bytes came.
    fn run(&self, out: &mut File, partial: &Path) -> Result<u64, DataError> {
        let mut came = 0;
        let mut tries = 0;
        loop {
            let before = came;
            match self.attempt(out, partial, &mut came) {
                Ok(()) => return Ok(came),
                Err(Failure::Final(error)) => return Err(error),
                Err(Failure::Again(error)) => {
                    // A connection that breaks again and again but brings something each time is going on.
                    tries = if came > before { 1 } else { tries + 1 };
                    if tries > RETRIES {
                        return Err(error);
                    }
                    tracing::warn!("{error}; trying again");
                    std::thread::sleep(RETRY_WAIT * 2_u32.pow(tries - 1));
                }
            }
        }
    }

    fn attempt(&self, out: &mut File, partial: &Path, came: &mut u64) -> Result<(), Failure> {
        let io = |error| Failure::Final(DataError::io("write", partial)(error));
        let broken_off = |detail: String| Failure::Again(DataError::Hub { url: self.url.to_owned(), detail });
        let mut have = out.metadata().map_err(io)?.len();
        if self.size.is_some_and(|size| have > size) {
            have = 0;
        }
        if self.size == Some(have) {
            return Ok(());
        }
        let mut request = get(self.agent, self.url, self.options);
        if have > 0 {
            request = request.header("Range", format!("bytes={have}-"));
        }
        let response = match request.call() {
            Ok(response) => response,
            Err(ureq::Error::StatusCode(416)) => {
                out.set_len(0).map_err(io)?;
                return Err(broken_off("the hub has no such range of it".into()));
            }
            Err(error) => {
                let again = worth_a_retry(&error);
                let error = hub_error(error, self.url, self.options);
                return Err(if again { Failure::Again(error) } else { Failure::Final(error) });
            }
        };
        // A server that does not know ranges sends the file from its start.
        let start = response
            .headers()
            .get("content-range")
            .and_then(|range| range.to_str().ok()?.strip_prefix("bytes ")?.split('-').next()?.parse().ok());
        if response.status().as_u16() != 206 || start != Some(have) {
            have = 0;
        }
        if response.status().as_u16() == 206 && start != Some(have) {
            out.set_len(0).map_err(io)?;
            return Err(broken_off("the hub sent another range than was asked for".into()));
        }
        out.set_len(have).map_err(io)?;
        out.seek(SeekFrom::End(0)).map_err(io)?;
        let mut body = response.into_body().into_reader();
        let mut buffer = vec![0; 1 << 18];
        loop {
            let read = body.read(&mut buffer).map_err(|error| broken_off(error.to_string()))?;
            if read == 0 {
                break;
            }
            *came += read as u64;
            have += read as u64;
            if *came > self.budget || self.size.is_some_and(|size| have > size) {
                let limit = self.size.unwrap_or(self.budget).min(self.budget);
                return Err(Failure::Final(DataError::TooLarge {
                    what: format!("`{}`", self.url),
                    size: format!("over {limit} bytes"),
                    limit: format!("{limit} bytes"),
                }));
            }
            out.write_all(&buffer[..read]).map_err(io)?;
        }
        match self.size {
            Some(size) if size != have => Err(broken_off(format!("it broke off after {have} of {size} bytes"))),
            _ => Ok(()),
        }
    }
}

enum Failure {
    Again(DataError),
    Final(DataError),
}

fn hub_error(error: ureq::Error, url: &str, options: &HubOptions) -> DataError {
    match error {
        ureq::Error::StatusCode(status) => {
            DataError::HubStatus { status, url: url.to_owned(), with_token: options.token.is_some() }
        }
        error => DataError::Hub { url: url.to_owned(), detail: error.to_string() },
    }
}

fn worth_a_retry(error: &ureq::Error) -> bool {
    match error {
        ureq::Error::StatusCode(status) => *status == 429 || *status >= 500,
        ureq::Error::HostNotFound | ureq::Error::ConnectionFailed | ureq::Error::Timeout(_) => true,
        ureq::Error::Io(_) => true,
        _ => false,
    }
}

/// Whether the hub is down or away, as opposed to having said no.
fn unreachable(error: &DataError) -> bool {
    match error {
        DataError::Hub { .. } => true,
        DataError::HubStatus { status, .. } => *status == 429 || *status >= 500,
        _ => false,
    }
}

/// Puts `blob` into the snapshot as a relative link, so that the cache can be moved.
fn link(blob: &Path, snapshot: &Path, file: &str) -> Result<(), DataError> {
    let place = snapshot.join(file);
    let folder = place.parent().unwrap_or(snapshot);
    std::fs::create_dir_all(folder).map_err(DataError::io("write", folder))?;
    let up = "../".repeat(2 + file.matches('/').count());
    let target = PathBuf::from(format!("{up}blobs/{}", blob.file_name().unwrap_or_default().to_string_lossy()));
    #[cfg(unix)]
    let made = std::os::unix::fs::symlink(&target, &place);
    #[cfg(not(unix))]
    let made = std::fs::copy(blob, &place).map(|_| ());
    match made {
        // A link that leads nowhere is put right.
        Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists && !place.is_file() => {
            std::fs::remove_file(&place).map_err(DataError::io("write", &place))?;
            link(blob, snapshot, file)
        }
        Err(error) if error.kind() != std::io::ErrorKind::AlreadyExists => Err(DataError::io("write", &place)(error)),
        _ if place.is_file() => Ok(()),
        _ => Err(DataError::broken(place, format!("the cache has no `{}`", target.display()))),
    }
}

fn hash_of(file: &mut File) -> std::io::Result<String> {
    file.seek(SeekFrom::Start(0))?;
    let mut hash = Sha256::new();
    let mut buffer = vec![0; 1 << 20];
    loop {
        match file.read(&mut buffer)? {
            0 => return Ok(hex(&hash.finalize())),
            read => hash.update(&buffer[..read]),
        }
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn is_hash(text: &str) -> bool {
    (32..=128).contains(&text.len()) && text.bytes().all(|b| b.is_ascii_hexdigit())
}

/// A commit's name, which becomes the name of a folder.
fn is_plain(name: &str) -> bool {
    (1..=128).contains(&name.len()) && name.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_'))
}

/// A path as it stands in an address.
fn escaped(path: &str) -> String {
    let byte = |b: u8| match b {
        b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' | b'-' | b'_' | b'.' | b'~' | b'/' => (b as char).to_string(),
        b => format!("%{b:02X}"),
    };
    path.bytes().map(byte).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn environment() {
        let options = |vars: &[(&str, &str)]| {
            HubOptions::from_vars(|name| {
                vars.iter().find(|(known, _)| *known == name).map(|(_, value)| (*value).to_owned())
            })
        };
        let plain = options(&[("HOME", "/home/x")]);
        assert_eq!(plain.cache_dir, Path::new("/home/x/.cache/huggingface/hub"));
        assert_eq!((plain.endpoint.as_str(), plain.token, plain.offline), ("https://huggingface.co", None, false));
        let set =
            options(&[("HF_HOME", "/h"), ("HF_ENDPOINT", "http://m/"), ("HF_TOKEN", " t\n"), ("HF_HUB_OFFLINE", "ON")]);
        assert_eq!(
            (set.cache_dir.as_path(), set.endpoint.as_str(), set.offline),
            (Path::new("/h/hub"), "http://m", true)
        );
        assert!(!format!("{set:?}").contains("Some(\"t\")"));
        assert_eq!(set.token.as_deref(), Some("t"));
        assert_eq!(options(&[("HF_HUB_CACHE", "/c"), ("HF_HOME", "/h")]).cache_dir, Path::new("/c"));
    }

    #[test]
    fn ids() {
        for id in ["gsm8k", "openai/gsm8k", "a-b/c_d.e"] {
            assert!(is_hub_id(id), "{id}");
        }
        for id in ["", "/x", "a/b/c", "../x", "a/..", "~/x", ".hidden", "a b", "x\n"] {
            assert!(!is_hub_id(id), "{id}");
        }
    }
}
