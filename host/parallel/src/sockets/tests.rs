use std::io::Write;
use std::net::TcpStream;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::Instant;

use super::*;
use crate::ThreadGroup;

const TOKEN: &[u8] = b"a token of the tests";

fn options(rank: usize, world: usize) -> SocketOptions {
    let (connect_ms_max, wait_ms_max) = (30_000, 60_000);
    SocketOptions { rank, world, token: TOKEN.into(), attempt: 3, connect_ms_max, wait_ms_max, stop: None }
}

fn listener() -> (TcpListener, String) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    (listener, address)
}

/// A rank's own numbers, of sizes that make the order of a sum visible.
fn numbers(rank: usize, len: usize) -> Vec<f32> {
    (0..len)
        .map(|i| {
            let mixed = ((rank as u32 + 1).wrapping_mul(0x9e37_79b9) ^ i as u32).wrapping_mul(0x85eb_ca6b);
            (mixed >> 8) as f32 * 10_f32.powi((mixed % 9) as i32 - 8) * if mixed & 1 == 0 { 1.0 } else { -1.0 }
        })
        .collect()
}

/// All operations, with buffers of many sizes; all that came out, as bits.
fn everything(group: &dyn Collective) -> Result<Vec<u32>> {
    let (rank, world) = (group.rank(), group.world());
    let mut out = Vec::new();
    // Nothing, a few, some that do not divide, more than a chunk per rank.
    for len in [0, 1, 5, 4097, 9_000, world * 300_001] {
        let mut sum = numbers(rank, len);
        group.all_reduce_sum(&mut sum)?;
        let mut most = numbers(rank, len);
        group.all_reduce_max(&mut most)?;
        let mut all = vec![0.0; len * world];
        group.all_gather(&numbers(rank, len), &mut all)?;
        let mut mine = vec![0.0; len];
        group.reduce_scatter_sum(&numbers(rank, len * world), &mut mine)?;
        let mut swapped = vec![0.0; len * world];
        group.all_to_all(&numbers(rank, len * world), &mut swapped)?;
        let mut from_last = numbers(rank, len);
        group.broadcast(world - 1, &mut from_last)?;
        let mut from_left = vec![0.0; len];
        if world > 1 {
            group.send((rank + 1) % world, &sum[..len.min(9_000)])?;
            group.recv((rank + world - 1) % world, &mut from_left[..len.min(9_000)])?;
        }
        let bytes = group.all_gather_bytes(&vec![rank as u8; len % 1000 + rank], 2_000)?;
        let at_root = group.gather_bytes(0, &[rank as u8], 1)?;
        group.barrier()?;
        let values = [sum, most, all, mine, swapped, from_last, from_left].concat();
        out.extend(values.iter().map(|v| v.to_bits()));
        out.extend(bytes.concat().into_iter().chain(at_root.concat()).map(u32::from));
    }
    Ok(out)
}

fn with_threads(world: usize) -> Vec<Vec<u32>> {
    let ranks = ThreadGroup::of(world, 60_000);
    thread::scope(|scope| {
        let threads: Vec<_> = ranks.into_iter().map(|rank| scope.spawn(move || everything(&rank).unwrap())).collect();
        threads.into_iter().map(|t| t.join().unwrap()).collect()
    })
}

#[test]
fn sockets_give_the_bits_that_threads_give() {
    for world in [1, 2, 4] {
        let (listener, address) = listener();
        let got: Vec<Vec<u32>> = thread::scope(|scope| {
            let address = &address;
            let others: Vec<_> = (1..world)
                .map(|rank| {
                    scope.spawn(move || {
                        everything(&SocketGroup::connect(address, &options(rank, world)).unwrap()).unwrap()
                    })
                })
                .collect();
            let first = everything(&SocketGroup::listen(listener, &options(0, world)).unwrap()).unwrap();
            std::iter::once(first).chain(others.into_iter().map(|t| t.join().unwrap())).collect()
        });
        let expected = with_threads(world);
        for (rank, (got, expected)) in got.iter().zip(&expected).enumerate() {
            assert!(got == expected, "rank {rank} of {world}");
        }
    }
}

/// Runs this test binary again as another rank.
fn child(rank: usize, world: usize, address: &str, task: &str) -> Child {
    Command::new(std::env::current_exe().unwrap())
        .args(["sockets::tests::another_process", "--exact", "--ignored", "--nocapture"])
        .env("COSMOS_TEST_GROUP", format!("{rank} {world} {address} {task}"))
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap()
}

/// Not a test of its own: what [`child`] runs.
#[test]
#[ignore = "run by other tests as a process of its own"]
fn another_process() {
    let Ok(given) = std::env::var("COSMOS_TEST_GROUP") else { return };
    let [rank, world, address, task] = given.split(' ').collect::<Vec<_>>()[..] else { panic!("{given}") };
    let group = SocketGroup::connect(address, &options(rank.parse().unwrap(), world.parse().unwrap())).unwrap();
    group.barrier().unwrap();
    match task {
        "everything" => {
            let bits = everything(&group).unwrap();
            let bytes: Vec<u8> = bits.into_iter().flat_map(u32::to_le_bytes).collect();
            group.gather_bytes(0, super::hmac::hmac_sha256(b"", &[&bytes]).as_slice(), 32).unwrap();
        }
        "sum" => loop {
            let mut values = vec![1.0; 3_000_000];
            if let Err(error) = group.all_reduce_sum(&mut values) {
                // Seen by the test as the exit code: the dead rank is named here too.
                std::process::exit(if error.to_string().contains("rank 2") { 7 } else { 8 });
            }
        },
        "sleep" => thread::sleep(Duration::from_secs(600)),
        other => panic!("{other}"),
    }
}

#[test]
fn processes_give_the_bits_that_threads_give() {
    let (listener, address) = listener();
    let mut children: Vec<Child> = (1..3).map(|rank| child(rank, 3, &address, "everything")).collect();
    let group = SocketGroup::listen(listener, &options(0, 3)).unwrap();
    group.barrier().unwrap();
    let mine = everything(&group).unwrap();
    let code = |bits: &[u32]| {
        let bytes: Vec<u8> = bits.iter().flat_map(|b| b.to_le_bytes()).collect();
        super::hmac::hmac_sha256(b"", &[&bytes]).to_vec()
    };
    let codes = group.gather_bytes(0, &code(&mine), 32).unwrap();
    assert_eq!(codes, with_threads(3).iter().map(|bits| code(bits)).collect::<Vec<_>>());
    drop(group);
    assert!(children.iter_mut().all(|child| child.wait().unwrap().success()));
}

#[test]
fn a_killed_process_ends_the_others_operation_at_once() {
    // Killed while it moves bytes, and killed while the others wait for it.
    for task in ["sum", "sleep"] {
        let (listener, address) = listener();
        let mut survivor = child(1, 3, &address, "sum");
        let mut victim = child(2, 3, &address, task);
        let group = SocketGroup::listen(listener, &options(0, 3)).unwrap();
        group.barrier().unwrap();
        let killer = thread::spawn(move || {
            thread::sleep(Duration::from_millis(200));
            victim.kill().unwrap();
            victim.wait().unwrap();
        });
        let begun = Instant::now();
        let error = loop {
            if let Err(error) = group.all_reduce_sum(&mut vec![1.0; 3_000_000]) {
                break error;
            }
        };
        killer.join().unwrap();
        // Long before the 60 s that a rank may be late.
        assert!(begun.elapsed() < Duration::from_secs(30));
        let text = error.to_string();
        assert!(text.contains("rank 2") && error.hint().is_some(), "{text}");
        assert!(matches!(error, ParallelError::Lost { .. } | ParallelError::Broken { .. }), "{text}");
        assert!(group.barrier().is_err());
        assert_eq!(survivor.wait().unwrap().code(), Some(7));
    }
}

#[test]
fn strangers_and_latecomers_are_refused_and_do_no_harm() {
    let (listener, address) = listener();
    let member = thread::spawn({
        let address = address.clone();
        move || {
            let wrong = SocketOptions { token: b"another token of the same kind".into(), ..options(1, 2) };
            let error = SocketGroup::connect(&address, &wrong).err().unwrap();
            assert_eq!(error.to_string(), format!("rank 0 at {address} refuses this rank: it has another token"));
            assert!(error.hint().is_some());
            let late = SocketOptions { attempt: 2, ..options(1, 2) };
            let text = SocketGroup::connect(&address, &late).err().unwrap().to_string();
            assert!(text.ends_with("the group is at attempt 3, this rank at attempt 2"), "{text}");
            let text = SocketGroup::connect(&address, &options(1, 3)).err().unwrap().to_string();
            assert!(text.ends_with("the group has 2 ranks, not 3"), "{text}");
            // Garbage of more and of fewer bytes than an answer has, and a connection that says nothing.
            let silent = TcpStream::connect(&address).unwrap();
            TcpStream::connect(&address).unwrap().write_all(&[0xff; 500]).unwrap();
            TcpStream::connect(&address).unwrap().write_all(b"GET / HTTP/1.1\r\n").unwrap();
            let group = SocketGroup::connect(&address, &options(1, 2)).unwrap();
            group.barrier().unwrap();
            drop(silent);
        }
    });
    let group = SocketGroup::listen(listener, &options(0, 2)).unwrap();
    group.barrier().unwrap();
    member.join().unwrap();
}

#[test]
fn one_without_the_token_is_not_believed_when_it_plays_rank_0() {
    use std::io::Read;
    let (listener, address) = listener();
    let impostor = thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        stream.write_all(&[&b"CSMGRP01"[..], &[5; handshake::CHALLENGE_BYTES - 8]].concat()).unwrap();
        let _ = stream.read(&mut [0; 1000]).unwrap();
        stream.write_all(&[0; handshake::VERDICT_BYTES]).unwrap();
        let _ = stream.read(&mut [0; 1]);
    });
    let error = SocketGroup::connect(&address, &options(1, 2)).err().unwrap();
    assert!(error.to_string().ends_with("it does not know the token"), "{error}");
    impostor.join().unwrap();
}

#[test]
fn nonsense_from_a_member_is_named() {
    let header = |len: u32, operation: u8, total: u64| {
        let mut bytes = b"CPG1".to_vec();
        bytes.extend_from_slice(&[operation, 0, 0, 0]);
        bytes.extend_from_slice(&u32::MAX.to_le_bytes());
        bytes.extend_from_slice(&1_u64.to_le_bytes());
        bytes.extend_from_slice(&total.to_le_bytes());
        bytes.extend_from_slice(&len.to_le_bytes());
        bytes
    };
    let cases = [
        (vec![0x5a; 64], "it sent what is no frame of a group"),
        (header(u32::MAX, 0, 4), "it announced a frame of 4294967295 bytes"),
        (header(4, 99, 4), "it sent a frame of unknown kind 99"),
        // Well-formed, but not what is due: another length, another operation.
        (header(8, 0, 8), "rank 1 called `all_reduce_sum` of 8 bytes (number 1, 8 bytes)"),
        (header(4, 1, 4), "rank 1 called `all_reduce_max` of 4 bytes"),
        (header(4, 0, 4), "the connection was closed"),
    ];
    for (mut bytes, expected) in cases {
        let (listener, address) = listener();
        let member = thread::spawn(move || {
            let mut stream = handshake::raw_member(&address, &options(1, 2));
            if !expected.contains("closed") {
                bytes.extend_from_slice(&[0; 8]);
            }
            stream.write_all(&bytes).unwrap();
            // Of a member that has gone that is said, whatever it had sent before.
            if !expected.contains("called") {
                stream.shutdown(std::net::Shutdown::Write).unwrap();
            }
            stream
        });
        let group = SocketGroup::listen(listener, &options(0, 2)).unwrap();
        let _open = member.join().unwrap();
        let error = group.all_reduce_sum(&mut [1.0]).unwrap_err();
        let text = error.to_string();
        assert!(text.contains("rank 1") && text.contains(expected), "{text}");
    }
}

#[test]
fn those_who_do_not_come_are_named_with_their_address() {
    let (bound, address) = listener();
    let short = |rank, world| SocketOptions { connect_ms_max: 100, wait_ms_max: 100, ..options(rank, world) };
    let error = SocketGroup::listen(bound, &short(0, 3)).err().unwrap();
    assert_eq!(error.to_string(), "`connect`: waited 100 ms for rank 1, rank 2");
    let error = SocketGroup::connect(&address, &short(1, 2)).err().unwrap();
    let text = error.to_string();
    assert!(text.starts_with(&format!("`connect`: waited 100 ms for rank 0 at {address} (")), "{text}");

    let (listener, address) = listener();
    let other = thread::spawn(move || SocketGroup::connect(&address, &options(1, 2)).unwrap());
    let late = SocketOptions { wait_ms_max: 100, ..options(0, 2) };
    let group = SocketGroup::listen(listener, &late).unwrap();
    let other = other.join().unwrap();
    let error = group.barrier().unwrap_err();
    let at = group.address_of(1).unwrap();
    assert_eq!(error.to_string(), format!("`barrier`: waited 100 ms for rank 1 at {at}"));
    // The one that was late learns why the group is no more.
    let error = other.barrier().and_then(|()| other.barrier()).unwrap_err();
    assert!(error.to_string().contains("waited 100 ms for rank 1"), "{error}");
    let error = other.all_gather_bytes(&[0; 3], 2).unwrap_err();
    assert!(error.to_string().contains("rank"), "{error}");
}

#[test]
fn options_that_make_no_sense_are_refused() {
    let bad = |options: SocketOptions| SocketGroup::listen(listener().0, &options).err().unwrap().to_string();
    let short = SocketOptions { token: b"short".into(), ..options(0, 2) };
    assert_eq!(bad(short), "cannot make the group: a token of 5 bytes; expected at least 16");
    assert_eq!(bad(options(0, 0)), "cannot make the group: 0 ranks; expected 1 to 1024");
    assert_eq!(bad(options(1, 2)), "cannot make the group: rank 1 connects; only rank 0 listens");
    assert_eq!(bad(options(2, 2)), "rank 2 is not in a world of 2");
    let text = format!("{:?}", options(1, 2));
    assert!(!text.contains("token of the tests"), "{text}");
}

#[test]
fn a_wait_that_is_not_wanted_any_more_ends() {
    let stop = Arc::new(AtomicBool::new(false));
    let told = |rank, world| SocketOptions { stop: Some(Arc::clone(&stop)), ..options(rank, world) };
    // Rank 2 never comes.
    let (listener, address) = listener();
    let (first, second) = (told(0, 3), told(1, 3));
    let waiting = [
        thread::spawn(move || SocketGroup::listen(listener, &first).err()),
        thread::spawn(move || SocketGroup::connect(&address, &second).err()),
    ];
    thread::sleep(Duration::from_millis(300));
    assert!(waiting.iter().all(|rank| !rank.is_finished()));
    stop.store(true, Ordering::Relaxed);
    // Rank 1 may hear of the end from rank 0 before it looks at the flag; both ways it is not waiting for its deadline.
    for ended in waiting.map(|rank| rank.join().unwrap().unwrap()) {
        assert_eq!(ended, ParallelError::Stopped { operation: "connect" });
    }
    // In a sum that the other does not come to: the one that stops tells the other.
    stop.store(false, Ordering::Relaxed);
    let (listener, address) = self::listener();
    let (first, second) = (told(0, 2), options(1, 2));
    let joined = thread::spawn(move || SocketGroup::connect(&address, &second).unwrap());
    let group = SocketGroup::listen(listener, &first).unwrap();
    let other = joined.join().unwrap();
    let waiting = thread::spawn(move || group.all_reduce_sum(&mut [1.0]).unwrap_err());
    thread::sleep(Duration::from_millis(200));
    assert!(!waiting.is_finished());
    stop.store(true, Ordering::Relaxed);
    assert_eq!(waiting.join().unwrap(), ParallelError::Stopped { operation: "all_reduce_sum" });
    while other.lost().is_none() {
        thread::sleep(Duration::from_millis(5));
    }
    let error = other.barrier().unwrap_err();
    assert!(matches!(&error, ParallelError::Broken { rank: 0, .. } | ParallelError::Lost { rank: 0, .. }), "{error}");
}
