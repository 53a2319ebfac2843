//! The ledger: restored, torn, damaged, full, replaced.

use std::fs;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use cosmos_controller::{Event, Order, Outcome};
use proptest::prelude::*;
use serde_json::json;

use super::*;
use crate::ControlError;
use crate::ledger::{Disk, Ledger, Record};

fn generated() -> Outcome {
    Outcome::Generated { samples: vec![] }
}

fn path(folder: &Path) -> PathBuf {
    folder.join("ledger.log")
}

fn event(seq: u64) -> Record {
    Record::Event { seq, at_ms: 0, event: Event::Lost { replica: format!("r{seq}") }, payload: Value::Null }
}

fn write(folder: &Path, count: u64) -> Ledger {
    let mut ledger = Ledger::open(&path(folder), &identity(), None, |_| Ok(())).unwrap();
    (1..=count).for_each(|seq| ledger.append(&event(seq)).unwrap());
    ledger
}

fn read(folder: &Path) -> crate::Result<Vec<u64>> {
    let mut seqs = Vec::new();
    Ledger::open(&path(folder), &identity(), None, |record| {
        if let Record::Event { seq, .. } = record {
            seqs.push(seq);
        }
        Ok(())
    })?;
    Ok(seqs)
}

#[test]
fn another_controller_goes_on_where_the_last_one_stopped() {
    let folder = tempfile::tempdir().unwrap();
    let (endpoint, reports) = start(folder.path(), 3);
    let rollout = client(folder.path(), "a");
    rollout.join(None, None, &identity()).unwrap();
    let (first, _) = order(&rollout);
    rollout.done(first, generated(), json!({"n": 0})).unwrap();
    let (second, given) = order(&rollout);
    let seq = reports.recv().unwrap().seq;
    endpoint.stop();

    // Nothing was recorded: the report comes again, and the order is still under way.
    let (endpoint, reports) = start(folder.path(), 3);
    let again = reports.recv().unwrap();
    assert_eq!((again.seq, again.id, &again.payload), (seq, first, &json!({"n": 0})));
    endpoint.recorded(seq);
    assert_eq!(order(&rollout), (second, given));
    assert!(!rollout.done(first, generated(), json!({"n": 0})).unwrap());
    assert!(rollout.done(second, generated(), json!({"n": 1})).unwrap());
    endpoint.stop();

    let (_endpoint, reports) = start(folder.path(), 3);
    assert_eq!(reports.recv().unwrap().payload, json!({"n": 1}), "what was recorded does not come again");
    assert!(reports.try_recv().is_err());
    assert_eq!(prompt_of(&order(&rollout).1), 2);
}

#[test]
fn a_compacted_ledger_gives_the_same_state() {
    let folder = tempfile::tempdir().unwrap();
    let (endpoint, reports) = start(folder.path(), 40);
    let rollout = client(folder.path(), "a");
    rollout.join(None, None, &identity()).unwrap();
    for n in 0..20 {
        let (id, _) = order(&rollout);
        rollout.done(id, generated(), json!({"n": n})).unwrap();
    }
    let got: Vec<Report> = reports.try_iter().collect();
    endpoint.recorded(got[17].seq);
    let before = fs::metadata(path(folder.path())).unwrap().len();
    assert!(endpoint.compact().unwrap());
    assert!(fs::metadata(path(folder.path())).unwrap().len() < before);
    let (id, _) = order(&rollout);
    rollout.done(id, generated(), json!({"n": 20})).unwrap();
    let (under_way, _) = order(&rollout);
    let status = endpoint.status().unwrap();
    endpoint.stop();

    let (endpoint, reports) = start(folder.path(), 40);
    assert_eq!(endpoint.status().unwrap()["events"], status["events"]);
    assert_eq!(endpoint.status().unwrap()["run"], json!({"done": 21, "total": 40}));
    let tail: Vec<_> = reports.try_iter().map(|r| r.payload["n"].as_u64().unwrap()).collect();
    assert_eq!(tail, [18, 19, 20]);
    assert_eq!(order(&rollout).0, under_way);
}

#[test]
fn a_torn_end_is_cut_off_wherever_it_is_torn() {
    let folder = tempfile::tempdir().unwrap();
    drop(write(folder.path(), 4));
    let whole = fs::read(path(folder.path())).unwrap();
    let last = whole[..whole.len() - 1].iter().rposition(|b| *b == b'\n').unwrap() + 1;
    for end in last + 1..whole.len() {
        fs::write(path(folder.path()), &whole[..end]).unwrap();
        assert_eq!(read(folder.path()).unwrap(), [1, 2, 3], "torn at {end}");
        assert_eq!(fs::read(path(folder.path())).unwrap(), &whole[..last]);
    }
    // A sector that never arrived.
    let mut holed = whole.clone();
    holed[last + 22..].fill(0);
    fs::write(path(folder.path()), &holed).unwrap();
    assert_eq!(read(folder.path()).unwrap(), [1, 2, 3]);
    // And it can be written on.
    let mut ledger = Ledger::open(&path(folder.path()), &identity(), None, |_| Ok(())).unwrap();
    ledger.append(&event(4)).unwrap();
    assert_eq!(fs::read(path(folder.path())).unwrap(), whole);
}

#[test]
fn damage_before_the_end_is_an_error_that_names_the_byte() {
    let folder = tempfile::tempdir().unwrap();
    drop(write(folder.path(), 4));
    let whole = fs::read(path(folder.path())).unwrap();
    let starts: Vec<usize> =
        std::iter::once(0).chain((0..whole.len() - 1).filter(|at| whole[*at] == b'\n').map(|at| at + 1)).collect();
    for (index, start) in starts.iter().take(starts.len() - 1).enumerate() {
        let mut bad = whole.clone();
        bad[start + 30] ^= 1;
        fs::write(path(folder.path()), &bad).unwrap();
        match read(folder.path()) {
            Err(ControlError::Damaged { byte, .. }) => assert_eq!(byte as usize, *start, "record {index}"),
            other => panic!("record {index}: {other:?}"),
        }
        assert_eq!(fs::read(path(folder.path())).unwrap(), bad, "nothing is cut");
    }
    // A record that is missing.
    let gap = [&whole[..starts[2]], &whole[starts[3]..]].concat();
    fs::write(path(folder.path()), gap).unwrap();
    match Endpoint::start(options(folder.path()), Rounds::new(1)) {
        Err(error @ ControlError::Damaged { .. }) => {
            assert!(error.to_string().contains("event 3 follows event 1"), "{error}");
            assert!(error.hint().is_some());
        }
        other => panic!("{:?}", other.err()),
    }
}

#[test]
fn the_ledger_of_another_run_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    drop(write(folder.path(), 1));
    let other = Identity { version: "2".into(), ..identity() };
    let error = Ledger::open(&path(folder.path()), &other, None, |_| Ok(())).err().unwrap();
    assert!(error.to_string().contains("it belongs to another run: program `1`, and not `2`"), "{error}");
    assert!(error.is_usage());
    // As written by a version whose header had something else in it.
    let header = json!({"record": "header", "format": 1, "identity": {"config": "hash"}}).to_string();
    let line = format!("{:08x} {:08x} {header}\n", crc32c::crc32c(header.as_bytes()), header.len());
    fs::write(path(folder.path()), line).unwrap();
    let error = read(folder.path()).err().unwrap();
    assert!(error.to_string().contains("format 1, and not 2"), "{error}");
    fs::write(path(folder.path()), "not a ledger\n").unwrap();
    assert!(matches!(read(folder.path()), Err(ControlError::Damaged { byte: 0, .. })));
}

#[test]
fn what_the_controller_refuses_changes_nothing_and_does_not_disturb_a_restart() {
    let folder = tempfile::tempdir().unwrap();
    let (endpoint, _reports) = start(folder.path(), 2);
    let rollout = client(folder.path(), "a");
    rollout.join(None, None, &identity()).unwrap();
    let (id, _) = order(&rollout);
    let no_such =
        Event::Failed { replica: "a".into(), order: cosmos_controller::OrderId(u64::MAX), reason: "x".into() };
    let error = endpoint.inject(no_such).unwrap_err();
    assert!(error.to_string().contains("there is no such order"), "{error}");
    assert_eq!(order(&rollout).0, id);
    endpoint.stop();
    let (_endpoint, _reports) = start(folder.path(), 2);
    assert_eq!(order(&rollout).0, id);
}

#[test]
fn two_controllers_do_not_share_a_ledger() {
    let folder = tempfile::tempdir().unwrap();
    let (_endpoint, _reports) = start(folder.path(), 1);
    let error = Endpoint::start(options(folder.path()), Rounds::new(1)).err().unwrap();
    assert!(matches!(error, ControlError::Taken { .. }) && error.is_usage(), "{error}");
}

/// A disk that can be full: it then takes half of what it is given. Writes through to a file.
struct Filling {
    file: fs::File,
    full: Arc<AtomicBool>,
    uncuttable: Arc<AtomicBool>,
}

impl Disk for Filling {
    fn append(&mut self, bytes: &[u8]) -> io::Result<()> {
        if self.full.load(Ordering::SeqCst) {
            self.file.append(&bytes[..bytes.len() / 2])?;
            return Err(io::ErrorKind::StorageFull.into());
        }
        self.file.append(bytes)
    }

    fn sync(&mut self) -> io::Result<()> {
        self.file.sync()
    }

    fn cut(&mut self, len: u64) -> io::Result<()> {
        if self.uncuttable.load(Ordering::SeqCst) {
            return Err(io::ErrorKind::StorageFull.into());
        }
        self.file.cut(len)
    }
}

#[test]
fn with_a_full_disk_nothing_is_applied_and_everything_goes_on_when_there_is_space() {
    for stuck in [false, true] {
        let folder = tempfile::tempdir().unwrap();
        let (full, uncuttable) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicBool::new(stuck)));
        let (disk_full, disk_uncuttable, file) = (Arc::clone(&full), Arc::clone(&uncuttable), path(folder.path()));
        let (endpoint, _reports) = Endpoint::start_with(options(folder.path()), Rounds::new(2), move |supervisor| {
            let file = fs::OpenOptions::new().append(true).open(file).unwrap();
            let disk = Filling { file, full: disk_full, uncuttable: disk_uncuttable };
            supervisor.ledger.as_mut().unwrap().swap_disk(Box::new(disk));
        })
        .unwrap();
        let rollout = client(folder.path(), "a");
        rollout.join(None, None, &identity()).unwrap();
        let (id, _) = order(&rollout);
        full.store(true, Ordering::SeqCst);
        let error = endpoint.inject(Event::StopRequested).unwrap_err();
        assert!(matches!(error, ControlError::LedgerFull { .. }), "{error}");
        assert!(error.hint().unwrap().contains("free space"));
        let before = endpoint.status().unwrap();
        let waiting = {
            let rollout = rollout.clone();
            std::thread::spawn(move || rollout.done(id, generated(), json!(null)))
        };
        std::thread::sleep(Duration::from_millis(200));
        let after = endpoint.status().unwrap();
        assert_eq!((&after["events"], &after["run"]), (&before["events"], &before["run"]));
        // There is space again: the role, which has gone on asking, is answered.
        uncuttable.store(false, Ordering::SeqCst);
        full.store(false, Ordering::SeqCst);
        assert!(waiting.join().unwrap().unwrap());
        assert_eq!(prompt_of(&order(&rollout).1), 1, "the refused stop was not applied");
        endpoint.stop();
        let (endpoint, _reports) = start(folder.path(), 2);
        assert_eq!(
            endpoint.status().unwrap()["run"],
            json!({"done": 1, "total": 2}),
            "the file holds what was applied"
        );
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    #[test]
    fn no_bytes_make_it_panic_or_apply_what_was_not_written(at in 0usize..2000, bytes in proptest::collection::vec(any::<u8>(), 0..40)) {
        let folder = tempfile::tempdir().unwrap();
        drop(write(folder.path(), 6));
        let mut text = fs::read(path(folder.path())).unwrap();
        let at = at % text.len();
        let end = (at + bytes.len()).min(text.len());
        text.splice(at..end, bytes);
        fs::write(path(folder.path()), &text).unwrap();
        if let Ok(seqs) = read(folder.path()) {
            prop_assert!(seqs.len() >= 5 || seqs.is_empty() && text.is_empty(), "{seqs:?}");
            prop_assert!(seqs.iter().zip(1..).all(|(seq, expected)| *seq == expected));
        }
    }

    #[test]
    fn the_machine_is_the_same_after_any_restarts(script in proptest::collection::vec(0u8..6, 1..60)) {
        // The same script on a desk that is never restarted and on one that is restored from its snapshots and events.
        let mut whole = crate::desk::Desk::new(Rounds::new(12));
        let mut restored = crate::desk::Desk::new(Rounds::new(12));
        for (seq, what) in (1..).zip(script) {
            let replica = format!("r{}", what % 2);
            let current = whole.machine.order_of(&replica);
            let event = match (what, current) {
                (0 | 1, _) => Event::Joined { replica, role: Role::Rollout, holds: None, address: None },
                (2 | 3, Some((order, Order::Generate { .. }))) => {
                    Event::Done { replica, order, outcome: Outcome::Generated { samples: vec![] } }
                }
                (4, Some((order, Order::Generate { .. }))) => Event::Failed { replica, order, reason: "no".into() },
                _ => Event::Lost { replica },
            };
            whole.apply(seq, event.clone(), Value::Null).unwrap();
            restored.apply(seq, event, Value::Null).unwrap();
            if what == 5 {
                let snapshot = restored.snapshot().unwrap();
                restored = crate::desk::Desk::new(Rounds::new(12));
                restored.restore(seq, snapshot).unwrap();
            }
            prop_assert_eq!(&whole.machine, &restored.machine);
        }
    }
}
