//! What a server and the network do to a queue. Criterion of each: nothing lost without a word, nothing stored twice, no hang.

use std::path::PathBuf;
use std::sync::Arc;

use super::*;
use crate::behaviour::{answer, id, request};
use crate::{Broker, BrokerError, BrokerLimits, Completion, Fetched, TeacherRequest};

const PASSWORD: &str = "testpassword";

struct Fixture {
    dir: tempfile::TempDir,
    server: Option<RedisServer>,
    port: u16,
    maxmemory_bytes: Option<u64>,
}

impl Fixture {
    fn start(maxmemory_bytes: Option<u64>) -> Option<Fixture> {
        if !has_redis() {
            return None;
        }
        let dir = tempfile::tempdir().unwrap();
        let server = server(dir.path(), None, Some(PASSWORD), maxmemory_bytes);
        let port = server.address().port();
        Some(Fixture { dir, server: Some(server), port, maxmemory_bytes })
    }

    /// `kill -9`.
    fn kill(&mut self) {
        self.server = None;
    }

    fn restart(&mut self) {
        self.server = Some(server(self.dir.path(), Some(self.port), Some(PASSWORD), self.maxmemory_bytes));
    }

    fn lose_data(&self) {
        std::fs::remove_dir_all(self.data()).unwrap();
    }

    fn data(&self) -> PathBuf {
        self.dir.path().join("appendonlydir")
    }

    fn link(&self) -> Arc<RedisLink> {
        RedisLink::connect(self.server.as_ref().unwrap().address(), soon()).unwrap()
    }

    fn broker(&self) -> RedisBroker {
        let limits = BrokerLimits { deliveries_max: 3, ..BrokerLimits::default() };
        RedisBroker::new(self.link(), QueueOptions { limits, ..QueueOptions::new("run", "teacher") })
    }
}

/// Takes and answers whatever waits.
fn serve(broker: &dyn Broker) -> usize {
    let mut served = 0;
    loop {
        let taken = broker.take("alive", 100, 0).unwrap();
        if taken.is_empty() {
            return served;
        }
        for delivery in taken {
            assert_eq!(broker.complete(&delivery, answer(&delivery)), Ok(Completion::Stored));
            served += 1;
        }
    }
}

fn fetched(broker: &dyn Broker, prompts: std::ops::Range<u64>) -> Fetched {
    broker.fetch(&prompts.map(id).collect::<Vec<_>>(), 0).unwrap()
}

/// The server dies and forgets everything. A result that was on its way is dropped (its request is unknown), publishing again
/// what is missing brings every sample back, once; a consumer and a publisher that were waiting go on by themselves.
#[test]
fn a_server_restarted_empty_is_healed_by_publishing_again() {
    let Some(mut fixture) = Fixture::start(None) else { return };
    let broker = fixture.broker();
    for prompt in 0..5 {
        broker.publish(request(prompt), 0).unwrap();
    }
    let held = broker.take("t", 2, 0).unwrap();
    fixture.kill();
    fixture.lose_data();
    let waiting = fixture.port;
    std::thread::scope(|scope| {
        let broker = &broker;
        let taker = scope.spawn(move || {
            loop {
                // Begun while there is no server at all; the group is gone with the stream.
                let taken = broker.take("waiting", 1, 20_000).unwrap();
                if let Some(delivery) = taken.into_iter().next() {
                    return delivery;
                }
            }
        });
        std::thread::sleep(std::time::Duration::from_millis(100));
        fixture.restart();
        assert_eq!(fixture.port, waiting);
        assert_eq!(broker.complete(&held[0], answer(&held[0])), Ok(Completion::Duplicate));
        assert_eq!(fetched(broker, 0..5).missing.len(), 5);
        for prompt in 0..5 {
            broker.publish(request(prompt), 20_000).unwrap();
        }
        let delivery = taker.join().unwrap();
        assert_eq!(broker.complete(&delivery, answer(&delivery)), Ok(Completion::Stored));
    });
    assert_eq!(broker.complete(&held[1], answer(&held[1])), Ok(Completion::Duplicate));
    assert_eq!(serve(&broker), 4);
    assert_eq!(fetched(&broker, 0..5).results.len(), 5);
    assert_eq!(broker.stats().unwrap().completed, 5);
}

/// The server dies and comes back with its append-only file: who held what is as before, nothing is published again.
#[test]
fn a_server_restarted_with_its_file_has_lost_nothing() {
    let Some(mut fixture) = Fixture::start(None) else { return };
    let broker = fixture.broker();
    for prompt in 0..3 {
        broker.publish(request(prompt), 0).unwrap();
    }
    let held = broker.take("t", 2, 0).unwrap();
    broker.complete(&held[0], answer(&held[0])).unwrap();
    fixture.kill();
    fixture.restart();
    let stats = broker.stats().unwrap();
    assert_eq!((stats.waiting, stats.delivered, stats.results, stats.published), (1, 1, 1, 3));
    assert_eq!(broker.complete(&held[1], answer(&held[1])), Ok(Completion::Stored));
    assert_eq!(serve(&broker), 1);
    assert_eq!(fetched(&broker, 0..3).results.len(), 3);
}

/// A server that does not come back is an error with its address, at the deadline.
#[test]
fn a_server_that_stays_away_is_named() {
    let Some(mut fixture) = Fixture::start(None) else { return };
    let limits = RedisLimits { away_ms_max: 300, ..soon() };
    let link = RedisLink::connect(fixture.server.as_ref().unwrap().address(), limits).unwrap();
    let broker = RedisBroker::new(link, QueueOptions::new("run", "teacher"));
    fixture.kill();
    let error = broker.publish(request(1), 0).unwrap_err();
    let text = error.to_string();
    assert!(text.contains(&format!("`127.0.0.1:{}`", fixture.port)) && text.contains("publishing a request"), "{text}");
    assert!(!text.contains(PASSWORD) && error.hint().is_some(), "{text}");
}

/// At `maxmemory` publishing waits and then names the server; teachers can still answer, which makes room.
#[test]
fn a_full_server_holds_publishers_back_until_teachers_make_room() {
    let Some(fixture) = Fixture::start(Some(12 << 20)) else { return };
    let broker = fixture.broker();
    let big = |prompt| TeacherRequest { prompt_ids: vec![u32::MAX; 64 << 10], ..request(prompt) };
    let small =
        |delivery: &crate::Delivery| crate::TeacherResult { token_logprobs_s: vec![-1.0; 2], ..answer(delivery) };
    let mut published = 0;
    let error = loop {
        match broker.publish(big(published), 100) {
            Ok(()) => published += 1,
            Err(error) => break error,
        }
        assert!(published < 100, "`maxmemory` is 12 MiB");
    };
    assert!(matches!(error, BrokerError::ServerFull { .. }), "{error}");
    assert!(error.hint().unwrap().contains("maxmemory"));
    assert!(published > 3);
    std::thread::scope(|scope| {
        // Somebody who may wait longer gets through as soon as there is room.
        scope.spawn(|| broker.publish(big(published), 20_000).unwrap());
        let mut stored = 0;
        while stored <= published {
            for delivery in broker.take("t", 1, 20_000).unwrap() {
                assert_eq!(broker.complete(&delivery, small(&delivery)), Ok(Completion::Stored));
                stored += 1;
            }
        }
    });
    assert_eq!(fetched(&broker, 0..published + 1).results.len() as u64, published + 1);
}

/// A teacher dies after it read: another process takes its request over, and a late answer of the first is no second result.
#[test]
fn another_process_takes_over_from_a_dead_one() {
    let Some(fixture) = Fixture::start(None) else { return };
    let (first, second) = (fixture.broker(), fixture.broker());
    first.publish(request(1), 0).unwrap();
    let dead = first.take("dead", 1, 0).unwrap();
    assert_eq!(second.reclaim(600_000).unwrap(), 0);
    assert_eq!(second.reclaim(0).unwrap(), 1);
    let taken = second.take("alive", 1, 0).unwrap();
    assert_eq!(taken[0].attempt, 2);
    assert_eq!(second.complete(&taken[0], answer(&taken[0])), Ok(Completion::Stored));
    assert_eq!(first.complete(&dead[0], answer(&dead[0])), Ok(Completion::Duplicate));
    assert_eq!(fetched(&first, 1..2).results.len(), 1);
    assert_eq!(fetched(&second, 1..2).missing, [id(1)]);
}

/// Consumers race for the same requests while others take them away from them: each is stored once, and all are.
#[test]
fn racing_consumers_store_each_result_once() {
    let Some(fixture) = Fixture::start(None) else { return };
    let limits = BrokerLimits { deliveries_max: 1_000_000, ..BrokerLimits::default() };
    let broker = || RedisBroker::new(fixture.link(), QueueOptions { limits, ..QueueOptions::new("run", "race") });
    let publisher = broker();
    let stored = std::sync::atomic::AtomicUsize::new(0);
    std::thread::scope(|scope| {
        for consumer in 0..4 {
            let (broker, stored) = (broker(), &stored);
            scope.spawn(move || {
                let name = format!("c{consumer}");
                while let Ok(taken) = broker.take(&name, 5, 20_000) {
                    if consumer == 0 {
                        broker.reclaim(0).unwrap();
                    }
                    for delivery in taken {
                        if broker.complete(&delivery, answer(&delivery)).unwrap() == Completion::Stored {
                            stored.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
                        }
                    }
                }
            });
        }
        for prompt in 0..200 {
            publisher.publish(request(prompt), 20_000).unwrap();
            publisher.publish(request(prompt), 20_000).unwrap();
        }
        let ids: Vec<_> = (0..200).map(id).collect();
        let fetched = publisher.fetch(&ids, 60_000).unwrap();
        publisher.close().unwrap();
        assert_eq!(fetched.results.len(), 200);
    });
    let stats = publisher.stats().unwrap();
    assert_eq!((stored.into_inner(), stats.completed, stats.waiting, stats.delivered), (200, 200, 0, 0));
}

/// Entries that are no requests of ours are moved away and counted; what is between them goes through; a damaged request is
/// healed by publishing it again.
#[test]
fn damaged_and_foreign_messages_are_moved_away() {
    let Some(fixture) = Fixture::start(None) else { return };
    let (broker, link) = (fixture.broker(), fixture.link());
    let stream = "run:teacher:teacher:requests";
    let add = |fields: &[(&str, &[u8])]| {
        link.run("test", |c| {
            let mut command = redis::cmd("XADD");
            command.arg(stream).arg("*");
            fields.iter().for_each(|(name, value)| {
                command.arg(*name).arg(*value);
            });
            command.exec(c)
        })
        .unwrap();
    };
    broker.publish(request(1), 0).unwrap();
    let frame = crate::wire::native::encode_request(&request(1));
    let uuid = id(1).to_uuid();
    let mut newer = frame.clone();
    newer[4] = 2;
    let mut flipped = frame.clone();
    flipped[25] ^= 1;
    // A copy, another sample's, a newer version, a flipped bit, a cut one, the original's message, no field at all.
    add(&[("s", uuid.as_bytes()), ("f", &frame)]);
    add(&[("s", id(2).to_uuid().as_bytes()), ("f", &frame)]);
    add(&[("s", uuid.as_bytes()), ("f", &newer)]);
    add(&[("s", uuid.as_bytes()), ("f", &flipped)]);
    add(&[("f", &frame[..frame.len() - 2]), ("s", uuid.as_bytes())]);
    add(&[("teacher_request", b"\x81\xa6is_end\xc3"), ("timestamp", b"now")]);
    add(&[("s", b"not a uuid"), ("f", b"")]);
    broker.publish(request(3), 0).unwrap();
    let taken = broker.take("t", 100, 0).unwrap();
    assert_eq!(taken.iter().map(|d| d.request.sample).collect::<Vec<_>>(), [id(1), id(3)]);
    let reasons: Vec<String> = broker.rejected().unwrap().into_iter().map(|r| r.reason).collect();
    let wanted = ["is a copy", "holds sample", "version 2", "damaged", "length", "is foreign", "is foreign"];
    assert_eq!(reasons.len(), wanted.len(), "{reasons:#?}");
    for (reason, wanted) in reasons.iter().zip(wanted) {
        assert!(reason.contains(wanted), "{reason}");
    }
    let stats = broker.stats().unwrap();
    assert_eq!((stats.rejected, stats.waiting, stats.delivered), (7, 0, 2));
    for delivery in &taken {
        assert_eq!(broker.complete(delivery, answer(delivery)), Ok(Completion::Stored));
    }
    // The stored bytes of a result go bad: no result, no loop, and the sample can be scored again.
    let set = |sample, bytes: &[u8]| {
        let key = format!("run:teacher:teacher:s:{}", crate::SampleId::to_uuid(sample));
        link.run("test", |c| redis::cmd("HSET").arg(&key).arg("r").arg(bytes).exec(c)).unwrap();
    };
    set(id(1), b"nonsense");
    set(id(3), &crate::wire::native::encode_result(&answer(&taken[0]), Default::default()));
    let got = fetched(&broker, 0..4);
    assert_eq!((got.results.len(), got.failed.len(), got.missing.len()), (0, 0, 4));
    assert_eq!(broker.stats().unwrap().rejected, 9);
    for prompt in [1, 3] {
        broker.publish(request(prompt), 0).unwrap();
    }
    assert_eq!(serve(&broker), 2);
    assert_eq!(fetched(&broker, 0..4).results.len(), 2);
    // The list of what was rejected is bounded.
    for _ in 0..120 {
        add(&[("x", b"y")]);
    }
    assert!(broker.take("t", 1000, 0).unwrap().is_empty());
    assert_eq!((broker.rejected().unwrap().len(), broker.stats().unwrap().rejected), (100, 129));
}

/// A damaged entry of a sample that is under way is dropped with its sample, so that publishing again is not taken for a copy.
#[test]
fn a_request_that_goes_bad_in_the_server_is_healed_by_publishing_again() {
    let Some(fixture) = Fixture::start(None) else { return };
    let (broker, link) = (fixture.broker(), fixture.link());
    broker.publish(request(1), 0).unwrap();
    let stream = "run:teacher:teacher:requests";
    let key = format!("run:teacher:teacher:s:{}", id(1).to_uuid());
    link.run("test", |c| {
        redis::cmd("DEL").arg(stream).exec(c)?;
        let entry: String =
            redis::cmd("XADD").arg(stream).arg("*").arg("s").arg(id(1).to_uuid()).arg("f").arg("bad").query(c)?;
        redis::cmd("HSET").arg(&key).arg("e").arg(entry).exec(c)
    })
    .unwrap();
    assert!(broker.take("t", 10, 0).unwrap().is_empty());
    assert_eq!(broker.stats().unwrap().rejected, 1);
    broker.publish(request(1), 0).unwrap();
    assert_eq!(serve(&broker), 1);
    // A stream that was cut by hand loses the entry, not the sample.
    broker.forget(&[id(1)]).unwrap();
    broker.publish(request(2), 0).unwrap();
    link.run("test", |c| redis::cmd("XTRIM").arg(stream).arg("MAXLEN").arg(0).exec(c)).unwrap();
    broker.publish(request(2), 0).unwrap();
    assert_eq!(serve(&broker), 1);
}
