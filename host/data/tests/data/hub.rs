//! A hub of our own: listing, download, cache, tokens, refusals, broken connections.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use cosmos_data::{DataError, DatasetSpec, HubOptions, Table};
use serde_json::json;
use sha2::{Digest, Sha256};
use tempfile::tempdir;
use tiny_http::{Header, Response, Server, StatusCode};

use super::{batch, numbers, parquet_bytes, spec};

const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

/// How the server behaves.
#[derive(Default)]
struct Manner {
    /// Without this token it answers 401.
    token: Option<&'static str>,
    /// It hangs up after this many bytes of a file, as often as `cuts` says.
    cut_bytes: usize,
    cuts: AtomicUsize,
    /// It does not know ranges.
    no_ranges: bool,
    /// It sends other bytes than it lists.
    corrupt: bool,
    /// It says nothing about sizes and hashes.
    terse: bool,
}

struct Hub {
    server: Arc<Server>,
    address: String,
    requests: Arc<Mutex<Vec<String>>>,
    manner: Arc<Manner>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Hub {
    fn start(files: &[(&str, Vec<u8>)], manner: Manner) -> Self {
        let server = Arc::new(Server::http("127.0.0.1:0").unwrap());
        let address = format!("http://{}", server.server_addr().to_ip().unwrap());
        let files: BTreeMap<String, Vec<u8>> =
            files.iter().map(|(name, bytes)| ((*name).into(), bytes.clone())).collect();
        let requests = Arc::new(Mutex::new(Vec::new()));
        let manner = Arc::new(manner);
        let (to_serve, log, ways) = (server.clone(), requests.clone(), manner.clone());
        let thread = std::thread::spawn(move || {
            for request in to_serve.incoming_requests() {
                answer(request, &files, &log, &ways);
            }
        });
        Self { server, address, requests, manner, thread: Some(thread) }
    }

    fn options(&self, cache: &Path) -> HubOptions {
        let mut options = HubOptions::from_vars(|_| None);
        options.endpoint = self.address.clone();
        options.cache_dir = cache.into();
        options.silence_ms_max = 1_000;
        options
    }

    fn requests(&self) -> Vec<String> {
        std::mem::take(&mut self.requests.lock().unwrap())
    }
}

impl Drop for Hub {
    fn drop(&mut self) {
        self.server.unblock();
        self.thread.take().unwrap().join().unwrap();
    }
}

fn header(name: &str, value: &str) -> Header {
    Header::from_bytes(name, value).unwrap()
}

fn answer(request: tiny_http::Request, files: &BTreeMap<String, Vec<u8>>, log: &Mutex<Vec<String>>, manner: &Manner) {
    let headers: HashMap<String, String> =
        request.headers().iter().map(|h| (h.field.to_string().to_ascii_lowercase(), h.value.to_string())).collect();
    let url = request.url().to_owned();
    log.lock().unwrap().push(format!("{url} {}", headers.get("range").map_or("", String::as_str)).trim().to_owned());
    let status = |code: u16| Response::empty(StatusCode(code)).boxed();
    if manner.token.is_some_and(|token| headers.get("authorization") != Some(&format!("Bearer {token}"))) {
        return request.respond(status(401)).unwrap();
    }
    if let Some(revision) =
        url.strip_prefix("/api/datasets/owner/set/revision/").and_then(|r| r.strip_suffix("?blobs=true"))
    {
        if !["main", "refs%2Fconvert%2Fparquet"].contains(&revision) {
            return request.respond(status(404)).unwrap();
        }
        let sibling = |(name, bytes): (&String, &Vec<u8>)| {
            let hash: String = Sha256::digest(bytes).iter().map(|b| format!("{b:02x}")).collect();
            match (manner.terse, name.ends_with(".md")) {
                (true, _) => json!({"rfilename": name}),
                (_, true) => json!({"rfilename": name, "size": bytes.len(), "blobId": hash[..40]}),
                _ => {
                    json!({"rfilename": name, "size": bytes.len(), "blobId": hash[..40], "lfs": {"sha256": hash, "size": bytes.len()}})
                }
            }
        };
        let mut siblings: Vec<_> = files.iter().map(sibling).collect();
        siblings.push(json!({"rfilename": "../../outside.parquet", "size": 1}));
        return request
            .respond(Response::from_string(json!({"sha": COMMIT, "siblings": siblings}).to_string()))
            .unwrap();
    }
    let Some(mut bytes) =
        url.strip_prefix(&format!("/datasets/owner/set/resolve/{COMMIT}/")).and_then(|name| files.get(name)).cloned()
    else {
        return request.respond(status(404)).unwrap();
    };
    if manner.corrupt {
        *bytes.last_mut().unwrap() ^= 1;
    }
    let range = headers.get("range").and_then(|r| r.strip_prefix("bytes=")?.strip_suffix('-')?.parse::<usize>().ok());
    let from = range.filter(|_| !manner.no_ranges).unwrap_or(0);
    let whole = bytes.len();
    bytes.drain(..from);
    let cut = manner.cut_bytes > 0
        && manner.cut_bytes < bytes.len()
        && manner.cuts.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |n| n.checked_sub(1)).is_ok();
    if cut {
        // The head promises everything; the connection ends early.
        let mut stream = request.into_writer();
        let head = format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\nConnection: close\r\n\r\n", bytes.len());
        let head = match from {
            0 => head,
            _ => head
                .replace("200 OK", "206 Partial Content")
                .replace("Connection", &format!("Content-Range: bytes {from}-{}/{whole}\r\nConnection", whole - 1)),
        };
        stream.write_all(head.as_bytes()).unwrap();
        stream.write_all(&bytes[..manner.cut_bytes]).unwrap();
        return stream.flush().unwrap();
    }
    let response = match range {
        Some(from) if !manner.no_ranges => Response::from_data(bytes)
            .with_status_code(206)
            .with_header(header("Content-Range", &format!("bytes {from}-{}/{whole}", whole - 1))),
        _ => Response::from_data(bytes),
    };
    // The other side may hang up when it has seen enough.
    let _ = request.respond(response);
}

fn dataset() -> Vec<(&'static str, Vec<u8>)> {
    let card = "---\nconfigs:\n- config_name: main\n  default: true\n  data_files:\n  - split: train\n    path: main/train-*\n  - split: test\n    path: main/test-*\n- config_name: other\n  data_files: other/*.parquet\n---\n";
    vec![
        ("README.md", card.into()),
        ("main/train-00000-of-00002.parquet", parquet_bytes(&batch(0, 3000), 1000)),
        ("main/train-00001-of-00002.parquet", parquet_bytes(&batch(3000, 3010), 1000)),
        ("main/test-00000-of-00001.parquet", parquet_bytes(&batch(9000, 9005), 1000)),
        ("other/a.parquet", parquet_bytes(&batch(7, 8), 1000)),
    ]
}

fn remote(subset: &str, splits: &[&str]) -> DatasetSpec {
    spec("owner/set", subset, splits)
}

#[test]
fn download_then_cache_then_offline() {
    let cache = tempdir().unwrap();
    let hub = Hub::start(&dataset(), Manner::default());
    let mut options = hub.options(cache.path());
    options.offline = true;
    let error = Table::open(&remote("", &["train"]), &options).unwrap_err();
    assert!(
        matches!(error, DataError::Offline { file: None, .. }) && error.hint().unwrap().contains("HF_HUB_OFFLINE"),
        "{error}"
    );
    assert_eq!(hub.requests(), Vec::<String>::new());

    options.offline = false;
    let table = Table::open(&remote("", &["train"]), &options).unwrap();
    assert_eq!(numbers(&table), (0..3010).collect::<Vec<_>>());
    let asked = hub.requests();
    assert_eq!(asked.len(), 4, "{asked:?}");
    assert!(!asked.iter().any(|url| url.contains("test-") || url.contains("other/")), "{asked:?}");

    // The layout of the Python libraries: a link in the snapshot to a blob named by its hash, and a reference.
    let folder = cache.path().join("datasets--owner--set");
    assert_eq!(std::fs::read_to_string(folder.join("refs/main")).unwrap(), COMMIT);
    let place = folder.join("snapshots").join(COMMIT).join("main/train-00001-of-00002.parquet");
    let target = std::fs::read_link(&place).unwrap();
    assert!(target.starts_with("../../../blobs") && std::fs::read(&place).unwrap() == dataset()[2].1);
    assert!(!std::fs::read_dir(folder.join("blobs")).unwrap().any(|e| e.unwrap().path().extension().is_some()));

    // Again: only the listing is asked for.
    Table::open(&remote("main", &["train"]), &options).unwrap();
    assert_eq!(hub.requests().len(), 1);

    options.offline = true;
    assert_eq!(Table::open(&remote("", &["train"]), &options).unwrap().len(), 3010);
    let error = Table::open(&remote("", &["test"]), &options).unwrap_err();
    assert!(matches!(&error, DataError::MissingSplit { known, .. } if known == &["train"]), "{error}");
    assert_eq!(hub.requests(), Vec::<String>::new());

    // A hub that is away is as good as offline mode, for what is in the cache.
    options.offline = false;
    options.endpoint = "http://127.0.0.1:1".into();
    assert_eq!(Table::open(&remote("", &["train"]), &options).unwrap().len(), 3010);
    options.cache_dir = cache.path().join("other");
    let error = Table::open(&remote("", &["train"]), &options).unwrap_err();
    assert!(matches!(error, DataError::Hub { .. }) && error.hint().unwrap().contains("HF_ENDPOINT"), "{error}");
}

#[test]
fn tokens_and_refusals() {
    let cache = tempdir().unwrap();
    let hub = Hub::start(&dataset(), Manner { token: Some("hf_secret"), ..Manner::default() });
    let mut options = hub.options(cache.path());
    let error = Table::open(&remote("", &["test"]), &options).unwrap_err();
    assert!(matches!(error, DataError::HubStatus { status: 401, with_token: false, .. }), "{error}");
    assert!(error.hint().unwrap().contains("set `HF_TOKEN`"));
    options.token = Some("hf_wrong".into());
    let error = Table::open(&remote("", &["test"]), &options).unwrap_err();
    assert!(
        error.hint().unwrap().contains("may not read it") && !format!("{error} {error:?}").contains("hf_wrong"),
        "{error}"
    );
    options.token = Some("hf_secret".into());
    assert_eq!(Table::open(&remote("", &["test"]), &options).unwrap().len(), 5);

    let missing = DatasetSpec { name: "owner/nothing".into(), ..DatasetSpec::default() };
    let error = Table::open(&missing, &options).unwrap_err();
    assert!(error.to_string().contains("answered 404") && error.hint().unwrap().contains("`dataset.name`"), "{error}");
    let revision = DatasetSpec { revision: "v9".into(), ..remote("", &["test"]) };
    assert!(matches!(Table::open(&revision, &options), Err(DataError::HubStatus { status: 404, .. })));
    let converted = DatasetSpec { revision: "refs/convert/parquet".into(), ..remote("", &["test"]) };
    assert_eq!(Table::open(&converted, &options).unwrap().len(), 5);
    let error = Table::open(&remote("mian", &["test"]), &options).unwrap_err();
    assert_eq!(error.to_string(), "`owner/set` (subset `mian`) has no subset `mian`; it has `main`, `other`");
}

#[test]
fn broken_downloads_go_on() {
    for (no_ranges, terse) in [(false, false), (true, false), (false, true), (true, true)] {
        let cache = tempdir().unwrap();
        let manner = Manner { cut_bytes: 5_000, cuts: AtomicUsize::new(2), no_ranges, terse, ..Manner::default() };
        let hub = Hub::start(&dataset(), manner);
        let table = Table::open(&remote("", &["train"]), &hub.options(cache.path())).unwrap();
        assert_eq!(numbers(&table), (0..3010).collect::<Vec<_>>());
        assert_eq!(hub.manner.cuts.load(Ordering::SeqCst), 0);
        let asked = hub.requests();
        assert!(asked.iter().any(|url| url.ends_with("bytes=5000-")), "{asked:?}");
    }
}

#[test]
fn an_interrupted_run_leaves_its_part_for_the_next() {
    let cache = tempdir().unwrap();
    let hub = Hub::start(&dataset(), Manner::default());
    let bytes = &dataset()[1].1;
    let hash: String = Sha256::digest(bytes).iter().map(|b| format!("{b:02x}")).collect();
    let blobs = cache.path().join("datasets--owner--set/blobs");
    super::write(blobs.join(format!("{hash}.incomplete")), &bytes[..1234]);
    assert_eq!(Table::open(&remote("", &["train"]), &hub.options(cache.path())).unwrap().len(), 3010);
    assert!(hub.requests().iter().any(|url| url.ends_with("bytes=1234-")));
}

#[test]
fn what_never_ends_well() {
    let cache = tempdir().unwrap();
    let hub = Hub::start(&dataset(), Manner { corrupt: true, ..Manner::default() });
    let mut options = hub.options(cache.path());
    let error = Table::open(&remote("", &["train"]), &options).unwrap_err();
    assert!(error.to_string().contains("does not have the SHA-256"), "{error}");
    assert!(!cache.path().join("datasets--owner--set/snapshots").join(COMMIT).join("main").exists());

    let hub = Hub::start(&dataset(), Manner::default());
    options.endpoint = hub.address.clone();
    options.cache_dir = cache.path().join("small");
    options.download_bytes_max = 2_000;
    let error = Table::open(&remote("", &["train"]), &options).unwrap_err();
    assert!(matches!(error, DataError::TooLarge { .. }), "{error}");
    assert_eq!(hub.requests().iter().filter(|url| url.contains("train-")).count(), 0);

    let hub = Hub::start(&dataset(), Manner { terse: true, ..Manner::default() });
    options.endpoint = hub.address.clone();
    options.cache_dir = cache.path().join("terse");
    assert!(matches!(Table::open(&remote("", &["train"]), &options), Err(DataError::TooLarge { .. })));

    options.download_bytes_max = u64::MAX;
    options.files_max = 1;
    assert!(matches!(Table::open(&remote("", &["train"]), &options), Err(DataError::TooLarge { .. })));
}
