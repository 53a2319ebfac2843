//! The same behaviour from both stores, and what only Redis can do to us.

use super::*;
use crate::{BrokerError, MemoryStore, Store, StoreLimits};

fn limits() -> StoreLimits {
    StoreLimits { blob_bytes_max: 1 << 20, total_bytes_max: 1 << 21, part_bytes_max: 1000, key_bytes_max: 64 }
}

fn bytes(count: usize, seed: u8) -> Vec<u8> {
    (0..count).map(|i| (i as u8).wrapping_mul(31).wrapping_add(seed)).collect()
}

fn keys(names: &[&str]) -> Vec<String> {
    names.iter().map(|name| (*name).to_owned()).collect()
}

fn behaves(store: &dyn Store) {
    let blobs = [("empty", 0), ("small", 10), ("part", 1000), ("parts", 1001), ("large", 54_321)];
    for (key, count) in blobs {
        store.put(key, &bytes(count, 1), 60_000).unwrap();
        store.put(key, &bytes(count, 1), 60_000).unwrap();
    }
    let names = keys(&["large", "none", "empty", "small", "parts", "part", "small"]);
    let got = store.get_many(&names).unwrap();
    let expected = [Some(54_321), None, Some(0), Some(10), Some(1001), Some(1000), Some(10)];
    for ((name, blob), count) in names.iter().zip(&got).zip(expected) {
        assert_eq!(blob, &count.map(|count| bytes(count, 1)), "{name}");
    }
    // A blob of the same key takes the place of the former one, whatever their sizes.
    for (count, seed) in [(3000, 2), (3000, 3), (5, 4), (2500, 5)] {
        store.put("large", &bytes(count, seed), 60_000).unwrap();
        assert_eq!(store.get_many(&keys(&["large"])).unwrap(), [Some(bytes(count, seed))]);
    }
    store.put("soon", &bytes(1500, 1), 1).unwrap();
    std::thread::sleep(std::time::Duration::from_millis(20));
    assert_eq!(store.get_many(&keys(&["soon"])).unwrap(), [None]);
    store.remove(&names).unwrap();
    store.remove(&names).unwrap();
    assert!(store.get_many(&names).unwrap().iter().all(Option::is_none));
    let error = store.put("big", &bytes((1 << 20) + 1, 0), 1000).unwrap_err();
    assert_eq!(error.to_string(), "`big` has 1048577 bytes, more than 1048576");
    assert!(matches!(store.put(&"k".repeat(65), b"", 1000), Err(BrokerError::TooLarge { .. })));
    assert_eq!(store.rejected(), 0);
}

#[test]
fn both_stores_behave() {
    behaves(&MemoryStore::new(limits()));
    if !has_redis() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let server = server(dir.path(), None, None, None);
    let link = RedisLink::connect(server.address(), soon()).unwrap();
    behaves(&RedisStore::new(link.clone(), "run", limits()));
    let left: Vec<String> = link.run("test", |c| redis::cmd("KEYS").arg("*").query(c)).unwrap();
    assert!(left.is_empty(), "parts without a blob: {left:?}");
}

#[test]
fn a_full_memory_store_says_so() {
    let store = MemoryStore::new(StoreLimits { total_bytes_max: 10, ..limits() });
    store.put("a", &bytes(8, 0), 60_000).unwrap();
    store.put("a", &bytes(10, 0), 60_000).unwrap();
    let error = store.put("b", &bytes(1, 0), 60_000).unwrap_err();
    assert_eq!(error.to_string(), "queue `blobs (bytes)` is full: 10 of 10 after waiting 0 ms");
    store.remove(&keys(&["a"])).unwrap();
    store.put("b", &bytes(1, 0), 60_000).unwrap();
}

#[test]
fn a_blob_with_a_part_missing_or_damaged_is_none() {
    if !has_redis() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let server = server(dir.path(), None, None, None);
    let link = RedisLink::connect(server.address(), soon()).unwrap();
    let store = RedisStore::new(link.clone(), "run", limits());
    let part = |index: usize| format!("run:part:blob:{:x}-{:08x}:{index}", 5000, crc32c::crc32c(&bytes(5000, 1)));
    let set = |key: String, value: &[u8]| link.run("test", |c| redis::cmd("SET").arg(&key).arg(value).exec(c)).unwrap();
    let get = || store.get_many(&keys(&["blob"])).unwrap().pop().unwrap();
    let put = || store.put("blob", &bytes(5000, 1), 60_000).unwrap();
    put();
    let second: Vec<u8> = link.run("test", |c| redis::cmd("GET").arg(part(2)).query(c)).unwrap();
    assert!(!second.is_empty());
    link.run("test", |c| redis::cmd("DEL").arg(part(2)).exec(c)).unwrap();
    assert_eq!((get(), store.rejected()), (None, 0));
    let mut flipped = second.clone();
    flipped[700] ^= 4;
    for (bad, rejected) in [(&flipped[..], 1), (&second[..500], 2), (b"foreign".as_slice(), 3), (&vec![7; 1 << 20], 4)]
    {
        set(part(2), bad);
        assert_eq!((get(), store.rejected()), (None, rejected));
    }
    // A whole and sound part in the wrong place.
    set(part(2), &second);
    set(part(3), &second);
    assert_eq!((get(), store.rejected()), (None, 5));
    put();
    assert_eq!(get(), Some(bytes(5000, 1)));
    set("run:blob:blob".into(), b"foreign");
    assert_eq!((get(), store.rejected()), (None, 6));
    store.remove(&keys(&["blob"])).unwrap();
}

#[test]
fn a_full_server_is_waited_for_and_then_named() {
    if !has_redis() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let server = server(dir.path(), None, None, Some(8 << 20));
    let link = RedisLink::connect(server.address(), soon()).unwrap();
    let store = RedisStore::new(link, "run", StoreLimits { part_bytes_max: 1 << 20, ..StoreLimits::default() });
    let mut stored = 0;
    let error = loop {
        match store.put(&format!("blob{stored}"), &bytes(1 << 20, 0), 600_000) {
            Ok(()) => stored += 1,
            Err(error) => break error,
        }
        assert!(stored < 20, "`maxmemory` is 8 MiB");
    };
    let text = error.to_string();
    assert!(text.starts_with(&format!("redis `{}` is full, still after waiting", server.address())), "{text}");
    assert!(error.hint().unwrap().contains("maxmemory"));
    assert!(matches!(error, BrokerError::ServerFull { waited_ms, .. } if waited_ms >= 200));
    // What is inside is still there, and what is taken out makes room.
    assert_eq!(store.get_many(&keys(&["blob0"])).unwrap(), [Some(bytes(1 << 20, 0))]);
    store.remove(&keys(&["blob0", "blob1"])).unwrap();
    store.put("again", &bytes(1 << 20, 0), 600_000).unwrap();
}
