//! Replicas whose processes are threads.

use std::time::Instant;

use cosmos_parallel::{Axis, ParallelDims, SubMesh};

use super::*;

/// Runs `work` as each of `nodes` processes of a replica; what they give, by process.
pub fn over_processes<T: Send>(nodes: usize, work: impl Fn(Arc<Party>) -> T + Sync) -> Vec<T> {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let mut listener = Some(listener);
    std::thread::scope(|scope| {
        let process = |node: usize| {
            let rendezvous = listener.take().map_or(Rendezvous::Connect(address.clone()), Rendezvous::Listen);
            let options = NodeOptions { node, nodes, token: vec![1; 32], connect_ms_max: 30_000, wait_ms_max: 30_000 };
            let work = &work;
            scope.spawn(move || work(Party::of("policy-0".into(), NodeWorld::meet(rendezvous, options).unwrap())))
        };
        let processes: Vec<_> = (0..nodes).map(process).collect();
        processes.into_iter().map(|process| process.join().unwrap()).collect()
    })
}

struct Rank {
    groups: Arc<RankGroups>,
    total: f32,
}

#[derive(Serialize, Deserialize)]
enum Add {
    /// Adds the sum of what each rank makes of it.
    Number(f32),
    /// One rank fails before the others can be done.
    FailAt(usize),
}

impl Job for Add {
    type Rank = Rank;
    type Done = (usize, f32);

    fn groups(rank: &Rank) -> &Arc<RankGroups> {
        &rank.groups
    }

    fn perform(&self, rank: &mut Rank) -> Result<(usize, f32)> {
        let number = rank.groups.rank();
        let mut sum = match self {
            Add::Number(value) => [value * (number + 1) as f32],
            Add::FailAt(place) if *place == number => return Err(RunError::shared("rank", "its disk is full", "")),
            Add::FailAt(_) => [0.0],
        };
        rank.groups.group(SubMesh::World).all_reduce_sum(&mut sum)?;
        rank.total += sum[0];
        Ok((number, rank.total))
    }
}

fn mesh() -> Mesh {
    Mesh::new(ParallelDims { dp_shard: 2, tp: 2, ..ParallelDims::default() }, 4).unwrap()
}

fn replica(party: Option<Arc<Party>>) -> Result<Replica<Add>> {
    Replica::new(mesh(), "policy.parallelism", party, |groups| Ok(Rank { groups: Arc::new(groups), total: 0.0 }))
}

#[test]
fn every_rank_of_every_process_does_the_job() {
    let expected = [vec![(0, 10.0), (1, 10.0), (2, 10.0), (3, 10.0)], vec![(0, 15.0), (1, 15.0), (2, 15.0), (3, 15.0)]];
    let mut whole = replica(None).unwrap();
    assert_eq!([1.0, 0.5].map(|value| whole.all(Add::Number(value)).unwrap()), expected);
    let asked = StopFlag::default();
    asked.set();
    let outcomes = over_processes(2, |party| {
        let mut replica = replica(Some(Arc::clone(&party))).unwrap();
        if party.node() > 0 {
            return replica.follow(&asked, |_| Ok(())).unwrap();
        }
        assert_eq!([1.0, 0.5].map(|value| replica.all(Add::Number(value)).unwrap()), expected);
        // Longer than it takes to hear of each other once more.
        let begun = Instant::now();
        while !party.is_asked() && begun.elapsed() < Duration::from_secs(20) {
            std::thread::sleep(Duration::from_millis(10));
        }
        assert!(party.is_asked());
        party.go_home(&RoleOutcome::Saved).unwrap();
        RoleOutcome::Saved
    });
    assert_eq!(outcomes, [RoleOutcome::Saved, RoleOutcome::Saved]);
}

#[test]
fn a_rank_that_fails_ends_all_processes_with_its_reason() {
    for place in [1, 2] {
        let errors = over_processes(2, |party| {
            let mut replica = replica(Some(Arc::clone(&party))).unwrap();
            if party.node() > 0 {
                return replica.follow(&StopFlag::default(), |_| Ok(())).unwrap_err().to_string();
            }
            let error = replica.all(Add::FailAt(place)).unwrap_err();
            assert!(matches!(error, RunError::Replica { .. }) && replica.all(Add::Number(1.0)).is_err());
            error.to_string()
        });
        for error in errors {
            assert!(
                error.starts_with("the processes of `policy-0` cannot go on") && error.contains("disk is full"),
                "{error}"
            );
        }
    }
}

#[test]
fn a_process_that_is_gone_is_missed_while_there_is_nothing_to_do() {
    over_processes(2, |party| {
        let replica = replica(Some(Arc::clone(&party))).unwrap();
        if party.node() > 0 {
            return;
        }
        let begun = Instant::now();
        while party.check().is_ok() && begun.elapsed() < Duration::from_secs(20) {
            std::thread::sleep(Duration::from_millis(10));
        }
        let error = party.check().unwrap_err().to_string();
        assert!(error.contains("lost process 1 of this replica"), "{error}");
        drop(replica);
    });
}

#[test]
fn ranks_that_cannot_be_dealt_out_are_refused() {
    let errors = over_processes(3, |party| replica(Some(party)).err().unwrap());
    for error in errors {
        assert!(error.is_usage() && error.hint().is_some());
        assert!(error.to_string().contains("`policy.parallelism`: 4 ranks (pp 1"), "{error}");
    }
    assert_eq!(mesh().size(Axis::Tp), 2);
}
