use std::thread;

use proptest::prelude::*;

use super::*;
use crate::{Axis, ParallelDims, Single};

const PATIENT_MS: u64 = 30_000;

/// Runs `work` on every rank, each in its thread; the results by rank.
fn on_every<T: Send>(ranks: Vec<ThreadRank>, work: impl Fn(&ThreadRank) -> T + Sync) -> Vec<T> {
    thread::scope(|scope| {
        let threads: Vec<_> = ranks
            .into_iter()
            .map(|rank| {
                let work = &work;
                scope.spawn(move || work(&rank))
            })
            .collect();
        threads.into_iter().map(|t| t.join().unwrap()).collect()
    })
}

/// A rank's own numbers, of sizes that make the order of a sum visible.
fn numbers(rank: usize, len: usize, seed: u32) -> Vec<f32> {
    (0..len)
        .map(|i| {
            let mixed =
                (seed ^ (rank as u32).wrapping_mul(0x9e37_79b9)).wrapping_add(i as u32).wrapping_mul(0x85eb_ca6b);
            (mixed >> 8) as f32 * 10_f32.powi((mixed % 9) as i32 - 8) * if mixed & 1 == 0 { 1.0 } else { -1.0 }
        })
        .collect()
}

/// What one thread computes, in the order of the ranks.
fn reduced(all: &[Vec<f32>], join: fn(f32, f32) -> f32) -> Vec<f32> {
    let first = all[0].clone();
    all[1..].iter().fold(first, |total, values| total.iter().zip(values).map(|(a, b)| join(*a, *b)).collect())
}

/// Long buffers take another way, which must not show; lengths that do not divide among the ranks too.
#[test]
fn long_sums_have_the_same_bits() {
    for (world, len) in [(2, SMALL_VALUES_MAX + 1), (3, 10_000), (7, 5 * SMALL_VALUES_MAX + 3)] {
        let all: Vec<Vec<f32>> = (0..world).map(|rank| numbers(rank, len, 7)).collect();
        let (total, largest) = (reduced(&all, |a, b| a + b), reduced(&all, f32::max));
        on_every(ThreadGroup::of(world, PATIENT_MS), |rank| {
            let (mut sum, mut max) = (all[rank.rank()].clone(), all[rank.rank()].clone());
            rank.all_reduce_sum(&mut sum).unwrap();
            rank.all_reduce_max(&mut max).unwrap();
            assert_eq!((sum, max), (total.clone(), largest.clone()));
        });
    }
}

#[test]
fn nan_is_not_hidden_by_a_maximum() {
    let most = on_every(ThreadGroup::of(3, PATIENT_MS), |rank| {
        let mut values = [1.0, 1.0, 1.0];
        values[rank.rank()] = f32::NAN;
        values[(rank.rank() + 1) % 3] = 2.0;
        rank.all_reduce_max(&mut values).unwrap();
        values.map(f32::is_nan)
    });
    assert_eq!(most, [[true; 3]; 3]);
}

#[test]
fn messages_between_two_ranks_keep_their_order_and_length() {
    let ranks = ThreadGroup::of(2, PATIENT_MS);
    for i in 0..MAIL_MAX {
        ranks[0].send(1, &[i as f32]).unwrap();
    }
    let mut got = [0.0];
    for i in 0..MAIL_MAX {
        ranks[1].recv(0, &mut got).unwrap();
        assert_eq!(got, [i as f32]);
    }
    assert_eq!(ranks[0].send(0, &got), Err(ParallelError::NoSuchRank { rank: 0, world: 2 }));
    ranks[0].send(1, &[1.0, 2.0]).unwrap();
    let error = ranks[1].recv(0, &mut got).unwrap_err();
    assert_eq!(error, ParallelError::BadLength { operation: "recv", given: 1, expected: 2 });
    assert!(matches!(ranks[0].barrier().unwrap_err(), ParallelError::Broken { rank: 1, .. }));

    let ranks = ThreadGroup::of(2, 30);
    let error = ranks[1].recv(0, &mut got).unwrap_err();
    assert_eq!(error, ParallelError::TimedOut { operation: "recv", missing: vec![0], waited_ms: 30 });
    let mut ranks = ThreadGroup::of(2, PATIENT_MS);
    ranks[0].send(1, &[4.0]).unwrap();
    let (second, first) = (ranks.pop().unwrap(), ranks.pop().unwrap());
    drop(first);
    // What was sent before the sender left still arrives.
    second.recv(0, &mut got).unwrap();
    assert_eq!(got, [4.0]);
    let error = second.recv(0, &mut got).unwrap_err();
    assert_eq!(error, ParallelError::PeerGone { operation: "recv", rank: 0, panicked: false });
}

#[test]
fn too_many_bytes_fail_at_every_rank() {
    let errors = on_every(ThreadGroup::of(2, PATIENT_MS), |rank| {
        rank.all_gather_bytes(&vec![0; 3 * rank.rank()], 2).unwrap_err().to_string()
    });
    assert!(errors[1] == "`all_gather_bytes`: rank 1 brings 3 bytes; at most 2 are allowed", "{errors:?}");
    assert!(errors[0].contains("rank 1 brings 3 bytes"), "{errors:?}");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]

    /// Many rounds of all operations, ranks coming in any order: every rank has, bit for bit, what one thread computes.
    #[test]
    fn every_rank_has_what_one_thread_computes(world in 1..5_usize, part in 0..7_usize, seed: u32, root in 0..5_usize) {
        let root = root % world;
        let all: Vec<Vec<f32>> = (0..world).map(|rank| numbers(rank, part * world, seed)).collect();
        let total = reduced(&all, |a, b| a + b);
        let largest = reduced(&all, f32::max);
        let gathered = all.concat();
        let done = on_every(ThreadGroup::of(world, PATIENT_MS), |rank| {
            for round in 0..5 {
                if (seed as usize + round + rank.rank()).is_multiple_of(3) {
                    thread::yield_now();
                }
                let mut reduced = all[rank.rank()].clone();
                rank.all_reduce_sum(&mut reduced).unwrap();
                assert_eq!(reduced, total);
                let mut mine = vec![0.0; part];
                rank.reduce_scatter_sum(&all[rank.rank()], &mut mine).unwrap();
                let mut whole = vec![0.0; part * world];
                rank.all_gather(&mine, &mut whole).unwrap();
                assert_eq!(whole, total);
                let mut everything = vec![0.0; part * world * world];
                rank.all_gather(&all[rank.rank()], &mut everything).unwrap();
                assert_eq!(everything, gathered);
                let mut from_root = all[rank.rank()].clone();
                rank.broadcast(root, &mut from_root).unwrap();
                assert_eq!(from_root, all[root]);
                let mut most = all[rank.rank()].clone();
                rank.all_reduce_max(&mut most).unwrap();
                assert_eq!(most, largest);
                let mut received = vec![0.0; part * world];
                rank.all_to_all(&all[rank.rank()], &mut received).unwrap();
                let expected: Vec<f32> =
                    all.iter().flat_map(|from| from[rank.rank() * part..][..part].to_vec()).collect();
                assert_eq!(received, expected);
                // Round the ring, to the right and then to the left.
                let (right, left) = ((rank.rank() + 1) % world, (rank.rank() + world - 1) % world);
                if world > 1 {
                    rank.send(right, &all[rank.rank()]).unwrap();
                    rank.recv(left, &mut received).unwrap();
                    assert_eq!(received, all[left]);
                    rank.send(left, &received[..part]).unwrap();
                    rank.recv(right, &mut received[..part]).unwrap();
                    assert_eq!(received[..part], all[rank.rank()][..part]);
                }
                let name = "n".repeat(rank.rank() + round);
                let names = rank.all_gather_bytes(name.as_bytes(), 16).unwrap();
                assert!(names.len() == world && names.iter().enumerate().all(|(r, n)| n.len() == r + round));
                let at_root = rank.gather_bytes(root, name.as_bytes(), 16).unwrap();
                assert_eq!(at_root, if rank.rank() == root { names } else { Vec::new() });
                rank.barrier().unwrap();
            }
            rank.rank()
        });
        prop_assert_eq!(done, (0..world).collect::<Vec<_>>());
    }
}

#[test]
fn a_rank_that_leaves_is_named() {
    let mut ranks = ThreadGroup::of(3, PATIENT_MS);
    drop(ranks.pop());
    let errors = on_every(ranks, |rank| rank.all_reduce_sum(&mut [1.0]).unwrap_err());
    let gone = ParallelError::PeerGone { operation: "all_reduce_sum", rank: 2, panicked: false };
    assert!(errors.contains(&gone), "{errors:?}");
    for error in errors {
        assert!(error.to_string().contains("rank 2 has left the group"), "{error}");
        assert!(error.hint().is_some());
    }
}

#[test]
fn a_rank_that_panics_is_named() {
    let mut ranks = ThreadGroup::of(2, PATIENT_MS);
    let doomed = ranks.pop().unwrap();
    let panicked = thread::spawn(move || {
        doomed.barrier().unwrap();
        panic!("of rank {}", doomed.rank());
    });
    ranks[0].barrier().unwrap();
    let error = ranks[0].barrier().unwrap_err();
    assert_eq!(error, ParallelError::PeerGone { operation: "barrier", rank: 1, panicked: true });
    assert!(panicked.join().is_err());
}

#[test]
fn a_rank_that_left_after_its_last_round_does_no_harm() {
    let done = on_every(ThreadGroup::of(4, PATIENT_MS), |rank| {
        let mut values = [rank.rank() as f32];
        rank.all_reduce_sum(&mut values).map(|()| values[0])
    });
    assert_eq!(done, [Ok(6.0), Ok(6.0), Ok(6.0), Ok(6.0)]);
}

#[test]
fn a_rank_that_does_not_come_is_named_and_the_others_do_not_hang() {
    let mut ranks = ThreadGroup::of(3, 50);
    let late = ranks.pop().unwrap();
    let errors = on_every(ranks, |rank| rank.barrier().unwrap_err());
    let timed_out = ParallelError::TimedOut { operation: "barrier", missing: vec![2], waited_ms: 50 };
    assert!(errors.contains(&timed_out), "{errors:?}");
    assert!(errors.iter().all(|e| e.to_string().contains("rank 2 did not come within 50 ms")), "{errors:?}");
    // The group stays failed: the late one must not wait for a round that nobody will come to.
    let begun = Instant::now();
    let error = late.barrier().unwrap_err();
    assert!(matches!(error, ParallelError::Broken { rank: 0 | 1, .. }), "{error}");
    assert!(begun.elapsed() < Duration::from_secs(5));
}

#[test]
fn ranks_that_disagree_are_named() {
    let errors = on_every(ThreadGroup::of(2, PATIENT_MS), |rank| match rank.rank() {
        0 => rank.all_reduce_sum(&mut [1.0, 2.0]).unwrap_err(),
        _ => rank.broadcast(0, &mut [1.0]).unwrap_err(),
    });
    for error in errors {
        let text = error.to_string();
        assert!(text.contains("called `all_reduce_sum` of 2 values"), "{text}");
        assert!(text.contains("called `broadcast` of 1 values from place 0"), "{text}");
    }
    let errors =
        on_every(ThreadGroup::of(2, PATIENT_MS), |rank| rank.all_reduce_sum(&mut vec![0.0; rank.rank()]).unwrap_err());
    assert!(errors.iter().any(|e| matches!(e, ParallelError::Disagreement { .. })), "{errors:?}");
}

#[test]
fn wrong_buffers_fail_before_anybody_waits() {
    let ranks = ThreadGroup::of(2, PATIENT_MS);
    let error = ranks[0].all_gather(&[1.0], &mut [0.0; 3]).unwrap_err();
    assert_eq!(error, ParallelError::BadLength { operation: "all_gather", given: 3, expected: 2 });
    let error = ranks[0].reduce_scatter_sum(&[1.0; 3], &mut [0.0]).unwrap_err();
    assert_eq!(error, ParallelError::BadLength { operation: "reduce_scatter_sum", given: 3, expected: 2 });
    let error = ranks[0].all_to_all(&[1.0; 3], &mut [0.0; 3]).unwrap_err();
    assert_eq!(error, ParallelError::BadLength { operation: "all_to_all", given: 3, expected: 4 });
    assert_eq!(ranks[1].broadcast(2, &mut [0.0]), Err(ParallelError::NoSuchRank { rank: 2, world: 2 }));
}

#[test]
fn a_mesh_has_its_groups() {
    let mesh = Mesh::new(ParallelDims { dp_shard: 2, tp: 2, ..ParallelDims::default() }, 4).unwrap();
    let sums = on_every(ThreadGroup::for_mesh(&mesh, SubMesh::Along(Axis::DpShard), PATIENT_MS), |handle| {
        // Only a rank's number in its group is known here; which group it is follows from the sum.
        let mut values = [handle.shared.names[handle.rank()] as f32, 1.0];
        handle.all_reduce_sum(&mut values).unwrap();
        values
    });
    assert_eq!(sums, [[2.0, 2.0], [4.0, 2.0], [2.0, 2.0], [4.0, 2.0]]);
    let mut lonely = ThreadGroup::for_mesh(&mesh, SubMesh::Along(Axis::DpShard), 20);
    lonely.truncate(2);
    let error = lonely[1].barrier().unwrap_err();
    assert_eq!(error, ParallelError::PeerGone { operation: "barrier", rank: 3, panicked: false });
}

#[test]
fn one_thread_is_as_good_as_none() {
    let rank = ThreadGroup::of(1, 0).pop().unwrap();
    let handles: [&dyn Collective; 2] = [&rank, &Single];
    for handle in handles {
        let mut values = [3.0, 4.0];
        handle.all_reduce_sum(&mut values).unwrap();
        handle.broadcast(0, &mut values).unwrap();
        assert_eq!((values, handle.rank(), handle.world()), ([3.0, 4.0], 0, 1));
    }
}
