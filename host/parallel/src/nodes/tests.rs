//! Meshes over several processes, which are threads here, against the same meshes in one.

use std::time::Instant;

use super::*;
use crate::{Axis, ParallelDims, RankFailure, ThreadWorld};

const WAIT_MS: u64 = 30_000;

fn mesh([pp, dp_replicate, dp_shard, cp, tp]: [i64; 5]) -> Mesh {
    let dims = ParallelDims { pp, dp_replicate, dp_shard, cp, tp };
    Mesh::new(dims, (pp * dp_replicate * dp_shard * cp * tp) as usize).unwrap()
}

fn options(node: usize, nodes: usize) -> NodeOptions {
    NodeOptions { node, nodes, token: vec![7; 32], connect_ms_max: WAIT_MS, wait_ms_max: WAIT_MS }
}

/// Runs `work` as every rank of `mesh`, over `nodes` worlds; the results by rank.
fn over<T: Send>(
    nodes: usize,
    mesh: Mesh,
    work: impl Fn(&NodeWorld, RankGroups) -> Result<T> + Sync,
) -> Vec<Result<T>> {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let mut listener = Some(listener);
    std::thread::scope(|scope| {
        let process = |node: usize| {
            let rendezvous = match listener.take() {
                Some(listener) => Rendezvous::Listen(listener),
                None => Rendezvous::Connect(address.clone()),
            };
            let work = &work;
            scope.spawn(move || {
                let world = NodeWorld::meet(rendezvous, options(node, nodes)).unwrap();
                let ranks = world.ranks(mesh).unwrap();
                let world = &world;
                std::thread::scope(|scope| {
                    let threads: Vec<_> =
                        ranks.into_iter().map(|groups| scope.spawn(move || work(world, groups))).collect();
                    let results = threads.into_iter().map(|thread| thread.join().unwrap()).collect::<Vec<_>>();
                    // Whoever leaves early is lost. After a failure the others may have left already.
                    let _ = world.exchange(&[], 0);
                    results
                })
            })
        };
        let processes: Vec<_> = (0..nodes).map(process).collect();
        processes.into_iter().flat_map(|process| process.join().unwrap()).collect()
    })
}

fn number(rank: usize, at: usize) -> f32 {
    // Sums of these depend on their order.
    ((rank * 7919 + at * 104_729) % 1_000_003) as f32 / 977.0 - 400.0
}

/// Every operation in every group, as bits.
fn everything(groups: &RankGroups) -> Result<Vec<u32>> {
    let mut seen: Vec<f32> = Vec::new();
    let rank = groups.rank();
    let values = |len: usize| (0..len).map(|at| number(rank, at)).collect::<Vec<f32>>();
    for sub in SubMesh::ALL {
        let group = groups.group(sub);
        let (world, me) = (group.world(), group.rank());
        assert_eq!(groups.mesh().group(rank, sub)?[me], rank);
        // Short, long, and longer than all parts that may be on their way.
        let lens: &[usize] = if sub == SubMesh::World { &[0, 5, 5000, 300_000] } else { &[5, 5000] };
        for &len in lens {
            let mut sum = values(len);
            group.all_reduce_sum(&mut sum)?;
            let mut most = values(len);
            group.all_reduce_max(&mut most)?;
            let mut all = vec![0.0; len * world];
            group.all_gather(&values(len), &mut all)?;
            let mut part = vec![0.0; len];
            group.reduce_scatter_sum(&values(len * world), &mut part)?;
            let mut swapped = vec![0.0; len * world];
            group.all_to_all(&values(len * world), &mut swapped)?;
            let mut told = values(len);
            group.broadcast(world - 1, &mut told)?;
            seen.extend([sum, most, all, part, swapped, told].concat());
        }
        group.barrier()?;
        let bytes = group.all_gather_bytes(&vec![rank as u8; rank], 64)?;
        seen.extend(bytes.concat().into_iter().map(f32::from));
        // Round about, and across.
        for step in 1..world {
            group.send((me + step) % world, &values(step * 3))?;
        }
        for step in 1..world {
            let mut came = vec![0.0; step * 3];
            group.recv((me + world - step) % world, &mut came)?;
            seen.extend(came);
        }
    }
    Ok(seen.into_iter().map(f32::to_bits).collect())
}

#[test]
fn several_processes_have_the_bits_of_one() {
    for (sizes, nodes) in [
        ([1, 1, 2, 1, 2], 2),
        ([1, 1, 2, 1, 2], 4),
        ([2, 1, 1, 1, 2], 2),
        // Groups with two ranks in one process and one in another.
        ([1, 1, 3, 1, 2], 2),
        ([1, 2, 1, 3, 1], 3),
    ] {
        let mesh = mesh(sizes);
        let one = ThreadWorld::run(mesh, WAIT_MS, |groups| everything(&groups)).unwrap();
        let several = over(nodes, mesh, |_, groups| everything(&groups));
        for (rank, (own, whole)) in several.into_iter().zip(one).enumerate() {
            assert!(own.unwrap() == whole, "rank {rank} of {mesh} over {nodes} processes");
        }
    }
}

#[test]
fn a_rank_that_fails_frees_those_of_other_processes() {
    let begun = Instant::now();
    let waited = Arc::new(AtomicBool::new(false));
    // Rank 3 fails while the others wait in groups that it is not in, and one outside of any.
    let results = over(2, mesh([1, 1, 2, 1, 2]), |world, groups| -> Result<()> {
        match groups.rank() {
            3 => {
                std::thread::sleep(Duration::from_millis(100));
                groups.fail("disk full");
                Err(ParallelError::Failed { rank: 3, reason: "disk full".into() })
            }
            0 | 2 => groups.group(SubMesh::Along(Axis::Tp)).barrier(),
            _ => {
                world.set_when_lost(&waited);
                while !waited.load(Ordering::Acquire) && begun.elapsed() < Duration::from_secs(20) {
                    std::thread::sleep(Duration::from_millis(5));
                }
                groups.group(SubMesh::Along(Axis::DpShard)).barrier()
            }
        }
    });
    for result in results {
        let error = result.unwrap_err().to_string();
        assert!(error.contains("rank 3 failed: disk full"), "{error}");
    }
    assert!(begun.elapsed() < Duration::from_secs(20));
}

#[test]
fn a_process_that_goes_is_named() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let other = std::thread::spawn(move || {
        let world = NodeWorld::meet(Rendezvous::Connect(address), options(1, 2)).unwrap();
        drop(world.ranks(mesh([1, 1, 2, 1, 2])).unwrap());
    });
    let world = NodeWorld::meet(Rendezvous::Listen(listener), options(0, 2)).unwrap();
    let ranks = world.ranks(mesh([1, 1, 2, 1, 2])).unwrap();
    other.join().unwrap();
    let error = ranks[0].group(SubMesh::World).barrier().map(drop);
    let by_watching = loop {
        if let Some(lost) = world.lost() {
            break lost.to_string();
        }
        std::thread::sleep(Duration::from_millis(5));
    };
    assert!(by_watching.contains("lost process 1 of this replica (ranks 2 to 3) at 127.0.0.1:"), "{by_watching}");
    assert!(error.unwrap_err().to_string().contains("process 1 of this replica"));
}

#[test]
fn a_process_that_does_not_come_is_named() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let quick = NodeOptions { connect_ms_max: 50, ..options(0, 3) };
    let error = NodeWorld::meet(Rendezvous::Listen(listener), quick).err().unwrap();
    assert_eq!(error.to_string(), "`connect`: waited 50 ms for process 1, process 2");
    let uneven = over(2, mesh([1, 1, 2, 1, 1]), |world, _| world.ranks(mesh([1, 1, 3, 1, 1])).map(drop));
    assert!(uneven[0].as_ref().unwrap_err().to_string().contains("3 ranks cannot be dealt out evenly to 2 processes"));
}

#[test]
fn thread_worlds_know_who_is_local() {
    let counted: std::result::Result<Vec<usize>, RankFailure<ParallelError>> =
        ThreadWorld::run(mesh([1, 1, 2, 1, 2]), WAIT_MS, |groups| Ok(groups.local().world()));
    assert_eq!(counted.unwrap(), [4; 4]);
    let counted = over(2, mesh([1, 1, 2, 1, 2]), |_, groups| Ok((groups.local().world(), groups.local().rank())));
    let counted: Vec<(usize, usize)> = counted.into_iter().map(|c| c.unwrap()).collect();
    assert_eq!(counted, [(2, 0), (2, 1), (2, 0), (2, 1)]);
}
