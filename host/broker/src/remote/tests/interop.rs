//! The original's processes, played by `tests/python/cosmos_rl_peer.py`, against ours.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::*;
use crate::{
    Broker, BrokerError, BrokerLimits, Completion, CosmosRlBroker, CosmosRlOptions, Delivery, Rows, SampleId,
    TeacherRequest, TeacherResult,
};

/// A Python that has redis-py and msgpack: the system's, or one that is set up beside the test binary.
fn python() -> Option<PathBuf> {
    let has_both = |python: &Path| {
        let run = Command::new(python).args(["-c", "import redis, msgpack"]).stderr(Stdio::null()).status();
        run.is_ok_and(|status| status.success())
    };
    if has_both(Path::new("python3")) {
        return Some("python3".into());
    }
    let venv = std::env::current_exe().unwrap().with_file_name("cosmos-rl-peer-venv");
    let python = venv.join("bin/python");
    let run = |program: &Path, arguments: &[&str]| {
        let quiet = Command::new(program).args(arguments).stdout(Stdio::null()).stderr(Stdio::null()).status();
        quiet.is_ok_and(|status| status.success())
    };
    let made = has_both(&python)
        || (run(Path::new("python3"), &["-m", "venv", &venv.display().to_string()])
            && run(
                &python,
                &["-m", "pip", "install", "--quiet", "--timeout", "15", "--retries", "1", "redis", "msgpack"],
            )
            && has_both(&python));
    if !made {
        eprintln!("skipped: there is no Python with `redis` and `msgpack`, and none could be installed");
    }
    made.then_some(python)
}

/// What the tests of one server need; the venv is made once.
struct Fixture {
    python: PathBuf,
    server: RedisServer,
    _dir: tempfile::TempDir,
}

fn fixture() -> Option<Fixture> {
    if !has_redis() {
        return None;
    }
    static PYTHON: std::sync::OnceLock<Option<PathBuf>> = std::sync::OnceLock::new();
    let python = PYTHON.get_or_init(python).clone()?;
    let dir = tempfile::tempdir().unwrap();
    let server = server(dir.path(), None, None, None);
    Some(Fixture { python, server, _dir: dir })
}

impl Fixture {
    fn peer(&self, role: &str, top_k: i32) -> Child {
        Command::new(&self.python)
            .arg(cosmos_testkit::repo_root().join("tests/python/cosmos_rl_peer.py"))
            .args([role, "--top-k", &top_k.to_string()])
            .env("PEER_REDIS_URL", self.server.address().secret_url())
            .spawn()
            .unwrap()
    }

    fn broker(&self, top_k: i32) -> CosmosRlBroker {
        self.broker_of(top_k, SampleId::default())
    }

    fn broker_of(&self, top_k: i32, salt: SampleId) -> CosmosRlBroker {
        let link = RedisLink::connect(self.server.address(), soon()).unwrap();
        let options = CosmosRlOptions {
            name: "ours".into(),
            limits: BrokerLimits::default(),
            wire: Default::default(),
            top_k,
            token_ids_back: true,
            prompt_of: Arc::new(|row| match u32::try_from(row) {
                Ok(row) if row < 50 => Ok(vec![100 + row, 5, 6]),
                _ => Err("not in the dataset".into()),
            }),
            row_of: Arc::new(|sample| sample.prompt as i64),
            heeds_end: true,
            salt,
        };
        CosmosRlBroker::new(link, options).unwrap()
    }
}

fn ended_well(mut child: Child) {
    let begun = Instant::now();
    loop {
        if let Some(status) = child.try_wait().unwrap() {
            assert!(status.success(), "the peer ended with {status}");
            return;
        }
        if begun.elapsed() > Duration::from_secs(60) {
            let _ = child.kill();
            let _ = child.wait();
            panic!("the peer does not end");
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// The number that stands for a log-prob on both sides of these tests.
fn logprob(token: u32) -> f32 {
    -(token as f32) / 1024.0
}

fn score(delivery: &Delivery) -> TeacherResult {
    let request = &delivery.request;
    let tokens = request.prompt_ids[1..].iter().chain(&request.completion_ids);
    let of_rows =
        |rows: &Rows<u32>| rows.iter().map(|row| row.iter().map(|id| logprob(*id)).collect::<Vec<_>>()).collect();
    TeacherResult {
        sample: request.sample,
        weight_version: request.weight_version,
        token_logprobs_s: tokens.map(|token| logprob(*token)).collect(),
        candidate_logprobs: request.candidate_ids.as_ref().map(of_rows),
        ..TeacherResult::default()
    }
}

/// The original's rollout publishes, our teacher answers, the original's trainer takes the results, and its end ends us.
#[test]
fn our_teacher_serves_the_originals_client() {
    let Some(fixture) = fixture() else { return };
    for top_k in [0, 4] {
        let broker = fixture.broker(top_k);
        let peer = fixture.peer("trainer", top_k);
        let mut attempts = Vec::new();
        loop {
            match broker.take("ours", 3, 30_000) {
                Ok(taken) if taken.is_empty() => panic!("the peer sent nothing for 30 s"),
                Ok(taken) => {
                    assert!(taken.len() <= 3);
                    for delivery in taken {
                        attempts.push(delivery.attempt);
                        let result = score(&delivery);
                        assert_eq!(broker.complete(&delivery, result.clone()), Ok(Completion::Stored));
                        assert_eq!(broker.complete(&delivery, result), Ok(Completion::Duplicate));
                    }
                }
                Err(BrokerError::Closed { .. }) => break,
                Err(error) => panic!("{error}"),
            }
        }
        ended_well(peer);
        // 8 prompts of 3 completions; a prompt that is not in the dataset and a message that is none were moved away.
        assert_eq!(attempts, [1; 24]);
        let stats = broker.stats().unwrap();
        assert_eq!((stats.waiting, stats.delivered), (0, 0), "all is acknowledged");
    }
    let stats = fixture.broker(0).stats().unwrap();
    assert_eq!((stats.completed, stats.rejected), (48, 4));
}

/// Our rollout publishes, the original's teacher answers, our trainer takes the results, and our end ends it.
#[test]
fn our_trainer_takes_the_originals_results() {
    let Some(fixture) = fixture() else { return };
    for top_k in [0, 4] {
        let broker = fixture.broker(top_k);
        let peer = fixture.peer("teacher", top_k);
        let requests: Vec<TeacherRequest> = (0..6_u32)
            .map(|i| {
                let mut request = TeacherRequest {
                    sample: SampleId { epoch: 1 + top_k as u32, prompt: u64::from(i), generation: 2 },
                    weight_version: 11,
                    prompt_ids: vec![100 + i, 5, 6],
                    completion_ids: (0..=i).map(|t| 300 + t).collect(),
                    include_prompt: i % 2 == 1,
                    top_k,
                    candidate_ids: None,
                };
                // The sampled token is a candidate at every other position, in any place.
                let row = |s: usize, token: u32| {
                    if s.is_multiple_of(2) { vec![40, token, 41, 42] } else { vec![43, 44, 45, 46] }
                };
                let from = if request.include_prompt { 1 } else { 3 };
                let tokens: Vec<u32> =
                    request.prompt_ids.iter().chain(&request.completion_ids).copied().skip(from).collect();
                request.candidate_ids =
                    (top_k > 0).then(|| tokens.iter().enumerate().map(|(s, t)| row(s, *t)).collect());
                request
            })
            .collect();
        for request in &requests {
            broker.publish(request.clone(), 10_000).unwrap();
            broker.publish(request.clone(), 10_000).unwrap();
        }
        let again = TeacherRequest { weight_version: 12, ..requests[0].clone() };
        assert!(matches!(broker.publish(again, 0), Err(BrokerError::SampleInUse { .. })));
        let ids: Vec<SampleId> = requests.iter().map(|r| r.sample).collect();
        let fetched = broker.fetch(&ids, 30_000).unwrap();
        assert_eq!(fetched.missing, []);
        for (request, result) in requests.iter().zip(&fetched.results) {
            assert_eq!((result.sample, result.weight_version, result.teacher.as_str()), (request.sample, 11, "peer"));
            result.check(request).unwrap();
            if top_k == 0 {
                let from = if request.include_prompt { 1 } else { 3 };
                let tokens = request.prompt_ids.iter().chain(&request.completion_ids).skip(from);
                assert_eq!(result.token_logprobs_s, tokens.map(|t| logprob(*t)).collect::<Vec<_>>());
                continue;
            }
            let (ids, logprobs) = (result.candidate_ids.as_ref().unwrap(), result.candidate_logprobs.as_ref().unwrap());
            assert_eq!((ids.len(), ids.width()), (request.scored_positions(), Some(4)));
            for ((got, asked), values) in
                ids.iter().zip(request.candidate_ids.as_ref().unwrap().iter()).zip(logprobs.iter())
            {
                let sorted = |row: &[u32]| {
                    let mut row = row.to_vec();
                    row.sort_unstable();
                    row
                };
                assert_eq!(sorted(got), sorted(asked));
                assert_eq!(values, got.iter().map(|id| logprob(*id)).collect::<Vec<_>>());
            }
        }
        assert_eq!(broker.fetch(&ids, 0).unwrap().missing, ids);
        broker.close().unwrap();
        assert!(matches!(broker.publish(requests[0].clone(), 0), Err(BrokerError::Closed { .. })));
        ended_well(peer);
    }
}

/// Our teacher dies with a prompt half done: another of ours scores all of it, and what was stored is not stored again.
#[test]
fn a_prompt_half_done_is_taken_over() {
    if !has_redis() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let fixture = Fixture { python: PathBuf::new(), server: server(dir.path(), None, None, None), _dir: dir };
    let (first, second) = (fixture.broker(0), fixture.broker(0));
    let uuids: Vec<String> = (0..2).map(|g| SampleId { generation: g, ..SampleId::default() }.to_uuid()).collect();
    let message = crate::wire::cosmos_rl::encode_request(&crate::wire::cosmos_rl::Request {
        completion_token_ids: vec![[[7]].into_iter().collect(), [[8], [9]].into_iter().collect()],
        teacher_result_uuid: uuids.clone(),
        ..Default::default()
    });
    let link = RedisLink::connect(fixture.server.address(), soon()).unwrap();
    link.run("test", |c| {
        redis::cmd("XADD").arg("teacher_request_stream").arg("*").arg("teacher_request").arg(&message).exec(c)
    })
    .unwrap();
    let dead = first.take("dead", 5, 0).unwrap();
    assert_eq!(dead.len(), 2);
    assert_eq!(first.complete(&dead[0], score(&dead[0])), Ok(Completion::Stored));
    assert_eq!(second.reclaim(0).unwrap(), 1);
    let taken = second.take("alive", 5, 0).unwrap();
    assert_eq!(taken.iter().map(|d| d.attempt).collect::<Vec<_>>(), [2, 2]);
    assert_eq!(second.complete(&taken[0], score(&taken[0])), Ok(Completion::Duplicate));
    assert_eq!(second.complete(&taken[1], score(&taken[1])), Ok(Completion::Stored));
    assert_eq!(first.complete(&dead[1], score(&dead[1])), Ok(Completion::Duplicate));
    let ids: Vec<SampleId> = taken.iter().map(|d| d.request.sample).collect();
    let ttl: i64 = link.run("test", |c| redis::cmd("PTTL").arg(&uuids[0]).query(c)).unwrap();
    assert!(ttl > 0, "results expire");
    assert_eq!(second.fetch(&ids, 0).unwrap().results.len(), 2);
    assert_eq!((second.stats().unwrap().waiting, second.stats().unwrap().delivered), (0, 0));
}
