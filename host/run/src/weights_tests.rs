use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};

use proptest::prelude::*;

use super::*;
use crate::shelf::FolderShelf;

/// A shelf in memory that can be full and counts what is read.
#[derive(Default)]
struct Memory {
    files: Mutex<BTreeMap<String, Vec<u8>>>,
    full: AtomicBool,
    read: AtomicU64,
}

impl Shelf for Memory {
    fn put(&self, name: &str, bytes: &[u8]) -> Result<()> {
        if self.full.load(Ordering::SeqCst) {
            let source = std::io::ErrorKind::StorageFull.into();
            return Err(RunError::Io { path: name.into(), source });
        }
        self.files.lock().unwrap().insert(name.to_string(), bytes.to_vec());
        Ok(())
    }

    fn get(&self, name: &str, bytes_max: u64) -> Result<Option<Vec<u8>>> {
        let found = self.files.lock().unwrap().get(name).cloned();
        let bytes = found.as_ref().map_or(0, Vec::len) as u64;
        self.read.fetch_add(bytes, Ordering::SeqCst);
        if bytes > bytes_max {
            return Err(crate::shelf::too_long(self.place(), name, bytes, bytes_max));
        }
        Ok(found)
    }

    fn remove(&self, name: &str) -> Result<()> {
        self.files.lock().unwrap().remove(name);
        Ok(())
    }

    fn place(&self) -> String {
        "memory".into()
    }
}

const SHAPES: [(&str, &[usize]); 3] = [("a.weight", &[2, 3]), ("b.weight", &[4]), ("c.bias", &[5])];

fn specs() -> Vec<ParamSpec> {
    SHAPES.iter().map(|(name, shape)| ParamSpec { name: name.to_string(), shape: shape.to_vec() }).collect()
}

/// Tensors whose values tell of a number.
fn tensors(of: [f32; 3]) -> Vec<HostTensor> {
    let tensor = |(spec, of): (ParamSpec, f32)| {
        let values = (0..spec.len()).map(|i| of + (i as f32).sin() * 1e-3).collect();
        HostTensor { name: spec.name, shape: spec.shape, values }
    };
    specs().into_iter().zip(of).map(tensor).collect()
}

fn publisher(shelf: &Arc<impl Shelf + 'static>, dtype: Dtype, keep: usize) -> WeightPublisher {
    WeightPublisher::open(shelf.clone(), dtype, keep).unwrap()
}

fn reader(shelf: &Arc<impl Shelf + 'static>) -> WeightReader {
    WeightReader::new(shelf.clone(), "policy-0")
}

/// What a reader would have after an update.
fn take(reader: &mut WeightReader, held: &mut BTreeMap<String, HostTensor>, update: WeightUpdate) {
    held.extend(update.tensors.into_iter().map(|t| (t.name.clone(), t)));
    reader.held = update.hashes;
    reader.version = Some(update.version);
}

fn error(result: Result<WeightUpdate>) -> String {
    result.unwrap_err().to_string()
}

#[test]
fn only_what_changed_travels() {
    let shelf = Arc::new(Memory::default());
    let mut publisher = publisher(&shelf, Dtype::Float32, 3);
    let published = publisher.publish(0, tensors([1.0, 2.0, 3.0]).into_iter()).unwrap();
    assert_eq!(published, Published { tensors: 3, bytes: 60 });
    let published = publisher.publish(1, tensors([1.0, 2.5, 3.0]).into_iter()).unwrap();
    assert_eq!(published, Published { tensors: 1, bytes: 16 });
    assert_eq!(publisher.publish(2, tensors([1.0, 2.5, 3.0]).into_iter()).unwrap(), Published::default());
    let mut late = reader(&shelf);
    let mut held = BTreeMap::new();
    let update = late.fetch(0, &specs(), 0).unwrap();
    assert_eq!(update.tensors.len(), 3);
    take(&mut late, &mut held, update);
    let before = shelf.read.load(Ordering::SeqCst);
    let update = late.fetch(2, &specs(), 0).unwrap();
    assert_eq!(update.tensors, [tensors([1.0, 2.5, 3.0]).remove(1)]);
    assert!(shelf.read.load(Ordering::SeqCst) - before < 1600, "files without a change are not read");
    take(&mut late, &mut held, update);
    assert_eq!(held.into_values().collect::<Vec<_>>(), tensors([1.0, 2.5, 3.0]));
    assert_eq!((late.version(), late.newest().unwrap(), publisher.newest()), (Some(2), Some(2), Some(2)));
}

#[test]
fn what_is_published_again_relies_on_nothing_that_lies_there() {
    let shelf = Arc::new(Memory::default());
    let mut publisher = publisher(&shelf, Dtype::Float32, 3);
    publisher.publish(0, tensors([1.0, 2.0, 3.0]).into_iter()).unwrap();
    publisher.publish(1, tensors([1.0, 2.5, 3.0]).into_iter()).unwrap();
    let old: Vec<String> =
        shelf.files.lock().unwrap().keys().filter(|n| n.starts_with("v00000000-")).cloned().collect();
    shelf.files.lock().unwrap().get_mut(&old[0]).unwrap().truncate(40);
    // Two of the three tensors of version 1 are in the file of version 0.
    assert!(reader(&shelf).fetch(1, &specs(), 0).is_err());
    let published = publisher.publish(1, tensors([1.0, 2.5, 3.0]).into_iter()).unwrap();
    assert_eq!(published.tensors, 3);
    assert_eq!(reader(&shelf).fetch(1, &specs(), 0).unwrap().tensors, tensors([1.0, 2.5, 3.0]));
}

#[test]
fn versions_beyond_keep_are_pruned_with_what_only_they_name() {
    let shelf = Arc::new(Memory::default());
    let mut publisher = publisher(&shelf, Dtype::Float32, 2);
    for version in 0..6 {
        publisher.publish(version, tensors([1.0, version as f32, 3.0]).into_iter()).unwrap();
    }
    let names: Vec<String> = shelf.files.lock().unwrap().keys().cloned().collect();
    let of = |prefix: &str| names.iter().filter(|n| n.starts_with(prefix)).count();
    // Version 0 holds what never changed.
    assert_eq!((of("v00000000-"), of("v00000001"), of("v00000003"), of("v00000004"), of("v00000005")), (1, 0, 0, 2, 2));
    assert_eq!(names.len(), 6, "{names:?}");
    let error = error(reader(&shelf).fetch(2, &specs(), 60_000));
    assert!(error.contains("weights 2 are no longer kept: the shelf has 4 to 5"), "{error}");
}

#[test]
fn a_wait_ends_at_its_deadline_and_names_the_policy() {
    let shelf = Arc::new(Memory::default());
    let missing = reader(&shelf).fetch(3, &specs(), 30).unwrap_err();
    let text = missing.to_string();
    assert!(text.contains("waited 30 ms for weights 3 of policy-0: they are not published"), "{text}");
    assert!(missing.hint().unwrap().contains("policy-0"));
}

#[test]
fn what_is_damaged_is_never_loaded_and_asked_for_again() {
    let shelf = Arc::new(Memory::default());
    publisher(&shelf, Dtype::Float32, 2).publish(7, tensors([1.0, 2.0, 3.0]).into_iter()).unwrap();
    let good = shelf.files.lock().unwrap().clone();
    let reader = reader(&shelf);
    for (name, bytes) in good.iter().filter(|(name, _)| *name != VERSIONS) {
        for at in (0..bytes.len()).step_by(3) {
            for cut in [false, true] {
                let mut bad = bytes.clone();
                if cut {
                    bad.truncate(at)
                } else {
                    bad[at] ^= 0x10
                }
                shelf.files.lock().unwrap().insert(name.clone(), bad);
                match reader.fetch(7, &specs(), 0) {
                    // Names and shapes may be padded: a changed blank changes nothing.
                    Ok(update) => assert_eq!(update.tensors, tensors([1.0, 2.0, 3.0]), "{name} {at}"),
                    Err(error) => assert!(error.to_string().contains("v00000007"), "{error}"),
                }
            }
        }
        shelf.files.lock().unwrap().insert(name.clone(), bytes.clone());
    }
    // A torn file that is whole a little later is waited for.
    let (name, bytes) = good.iter().find(|(name, _)| name.ends_with("safetensors")).unwrap();
    shelf.files.lock().unwrap().insert(name.clone(), bytes[..bytes.len() / 2].to_vec());
    std::thread::scope(|scope| {
        scope.spawn(|| {
            std::thread::sleep(Duration::from_millis(60));
            shelf.files.lock().unwrap().insert(name.clone(), bytes.clone());
        });
        assert_eq!(reader.fetch(7, &specs(), 60_000).unwrap().tensors, tensors([1.0, 2.0, 3.0]));
    });
}

#[test]
fn a_full_disk_leaves_the_older_version() {
    let shelf = Arc::new(Memory::default());
    let mut publisher = publisher(&shelf, Dtype::Float32, 1);
    publisher.publish(0, tensors([1.0, 2.0, 3.0]).into_iter()).unwrap();
    shelf.full.store(true, Ordering::SeqCst);
    let full = publisher.publish(1, tensors([4.0, 5.0, 6.0]).into_iter()).unwrap_err();
    assert!(full.hint().unwrap().contains("free space"), "{full}");
    assert_eq!(reader(&shelf).fetch(0, &specs(), 0).unwrap().tensors, tensors([1.0, 2.0, 3.0]));
    shelf.full.store(false, Ordering::SeqCst);
    publisher.publish(1, tensors([4.0, 5.0, 6.0]).into_iter()).unwrap();
    assert_eq!(reader(&shelf).fetch(1, &specs(), 0).unwrap().tensors, tensors([4.0, 5.0, 6.0]));
}

#[test]
fn a_version_published_again_after_a_rollback_replaces_the_first() {
    let shelf = Arc::new(Memory::default());
    let mut first = publisher(&shelf, Dtype::Float32, 4);
    for version in 0..4 {
        first.publish(version, tensors([1.0, version as f32, 3.0]).into_iter()).unwrap();
    }
    let mut reader = reader(&shelf);
    let mut held = BTreeMap::new();
    let update = reader.fetch(3, &specs(), 0).unwrap();
    take(&mut reader, &mut held, update);
    // Another process, which knows nothing but the shelf.
    let mut second = publisher(&shelf, Dtype::Float32, 4);
    assert_eq!(second.newest(), Some(3));
    // All of them: what lies there is not relied on.
    assert_eq!(second.publish(2, tensors([1.0, 20.0, 3.0]).into_iter()).unwrap().tensors, 3);
    assert!(error(reader.fetch(3, &specs(), 0)).contains("not published"));
    second.publish(3, tensors([1.0, 30.0, 3.0]).into_iter()).unwrap();
    let update = reader.fetch(3, &specs(), 0).unwrap();
    assert_eq!(update.tensors.len(), 1, "the same number, other weights");
    take(&mut reader, &mut held, update);
    assert_eq!(held.into_values().collect::<Vec<_>>(), tensors([1.0, 30.0, 3.0]));
}

#[test]
fn weights_of_another_model_are_refused() {
    let shelf = Arc::new(Memory::default());
    publisher(&shelf, Dtype::Float32, 2).publish(0, tensors([1.0, 2.0, 3.0]).into_iter()).unwrap();
    let mut other = specs();
    other[1].shape = vec![2, 2];
    assert!(error(reader(&shelf).fetch(0, &other, 0)).contains("tensor `b.weight`"));
    other[1].name = "z".into();
    assert!(error(reader(&shelf).fetch(0, &other, 0)).contains("tensor `z`"));
    assert!(error(reader(&shelf).fetch(0, &specs()[..2], 0)).contains("another number"));
}

#[test]
fn a_model_gets_the_bits_of_another() {
    let json = r#"{"model_type": "qwen3", "vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 64}"#;
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("config.json"), json).unwrap();
    let config = cosmos_engine::model::ModelConfig::from_folder(dir.path()).unwrap();
    let model = |seed| cosmos_engine::model::random(&config, "cpu", seed).unwrap();
    let (mut from, mut to) = (model(1), model(2));
    let shelf = Arc::new(FolderShelf::open(&dir.path().join("weights")).unwrap());
    for dtype in [Dtype::Float32, Dtype::Bfloat16, Dtype::Float16] {
        let mut publisher = publisher(&shelf, dtype, 1);
        let version = publisher.newest().map_or(0, |v| v + 1);
        let mut values = from.read_param(3);
        values.iter_mut().for_each(|v| *v += 0.1);
        from.write_param(3, &values).unwrap();
        publisher.publish_model(version, from.as_ref()).unwrap();
        let mut reader = reader(&shelf);
        let all = reader.load(version, to.as_mut(), 0).unwrap();
        assert_eq!((all, reader.load(version, to.as_mut(), 0).unwrap()), (from.params().len(), 0));
        for index in 0..from.params().len() {
            let rounded = decode(&encode(&from.read_param(index), dtype), dtype);
            assert_eq!(to.read_param(index), rounded);
            assert!(dtype != Dtype::Float32 || rounded == from.read_param(index));
        }
    }
}

#[test]
fn two_readers_follow_a_writer_that_prunes() {
    let dir = tempfile::tempdir().unwrap();
    let shelf = Arc::new(FolderShelf::open(dir.path()).unwrap());
    let of = |version: u64| [(version / 3) as f32, version as f32, (version % 2) as f32];
    let newest = AtomicU64::new(0);
    let read = AtomicUsize::new(0);
    publisher(&shelf, Dtype::Float32, 2).publish(0, tensors(of(0)).into_iter()).unwrap();
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                let (mut reader, mut held) = (reader(&shelf), BTreeMap::new());
                while reader.version() != Some(40) {
                    let version = newest.load(Ordering::SeqCst);
                    match reader.fetch(version, &specs(), 60_000) {
                        Ok(update) => {
                            take(&mut reader, &mut held, update);
                            assert_eq!(held.values().cloned().collect::<Vec<_>>(), tensors(of(version)));
                            read.fetch_add(1, Ordering::SeqCst);
                        }
                        // The writer was two versions ahead meanwhile.
                        Err(error) => assert!(error.to_string().contains("no longer kept"), "{error}"),
                    }
                }
            });
        }
        let mut publisher = publisher(&shelf, Dtype::Float32, 2);
        for version in 1..=40 {
            publisher.publish(version, tensors(of(version)).into_iter()).unwrap();
            newest.store(version, Ordering::SeqCst);
        }
    });
    assert!(read.load(Ordering::SeqCst) >= 2);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

    /// Whatever changes between versions, whichever of them a reader takes and however often the publisher is restarted, the
    /// reader ends with the bits of that version.
    #[test]
    fn any_reader_ends_with_the_versions_bits(
        steps in proptest::collection::vec((any::<[bool; 3]>(), any::<bool>(), any::<bool>()), 1..12),
        keep in 1usize..4,
        half in any::<bool>(),
    ) {
        let dtype = if half { Dtype::Bfloat16 } else { Dtype::Float32 };
        let shelf = Arc::new(Memory::default());
        let mut publisher = publisher(&shelf, dtype, keep);
        let (mut reader, mut held) = (reader(&shelf), BTreeMap::new());
        let mut of = [1.0f32, 2.0, 3.0];
        for (version, (changes, restarts, reads)) in steps.into_iter().enumerate() {
            for (value, changed) in of.iter_mut().zip(changes) {
                *value += if changed { 0.5 } else { 0.0 };
            }
            if restarts {
                publisher = WeightPublisher::open(shelf.clone(), dtype, keep).unwrap();
            }
            publisher.publish(version as u64, tensors(of).into_iter()).unwrap();
            if reads {
                let update = reader.fetch(version as u64, &specs(), 0).unwrap();
                take(&mut reader, &mut held, update);
                for tensor in tensors(of) {
                    let bits = |values: &[f32]| values.iter().map(|v| v.to_bits()).collect::<Vec<_>>();
                    let expected = decode(&encode(&tensor.values, dtype), dtype);
                    prop_assert_eq!(bits(&held[&tensor.name].values), bits(&expected));
                }
            }
        }
        let manifests = shelf.files.lock().unwrap().keys().filter(|n| n.ends_with(".json")).count();
        prop_assert!(manifests <= keep + 1);
    }

    #[test]
    fn no_bytes_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
        let _ = unsealed::<Manifest>(&bytes);
        let _ = checked(&bytes, &[], Dtype::Float32);
    }
}
