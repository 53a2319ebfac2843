//! Controllers in processes of their own, killed and started again.

use std::path::PathBuf;
use std::process::{Child, Command, Stdio};

use cosmos_controller::Outcome;
use serde_json::json;

use super::*;
use crate::{ControlError, End};

const FOLDER: &str = "COSMOS_TEST_CONTROLLER_FOLDER";
const ABORT_AT: &str = "COSMOS_TEST_CONTROLLER_ABORT_AT";
const TOTAL: u64 = 6;

/// Not a test by itself: the process that the tests below start, a controller that writes what it was told to `records`.
#[test]
fn controller_process() {
    let Ok(folder) = std::env::var(FOLDER) else { return };
    let folder = PathBuf::from(folder);
    let abort_at: Option<u64> = std::env::var(ABORT_AT).ok().map(|text| text.parse().unwrap());
    let (endpoint, reports) = Endpoint::start_with(options(&folder), Rounds::new(TOTAL), |supervisor| {
        supervisor.after_append = Some(Box::new(move |seq| {
            if Some(seq) == abort_at {
                std::process::abort();
            }
        }));
    })
    .unwrap();
    while endpoint.end().is_none() {
        if let Ok(report) = reports.recv_timeout(Duration::from_millis(20)) {
            let mut text = std::fs::read_to_string(folder.join("records")).unwrap_or_default();
            // As an owner does it: what has been recorded under this number is not recorded again.
            if !text.lines().any(|line| line.starts_with(&format!("{} ", report.seq))) {
                text.push_str(&format!("{} {}\n", report.seq, report.payload["prompt"]));
                // By rename: the process may be aborted between two lines of another thread.
                std::fs::write(folder.join("records.new"), text).unwrap();
                std::fs::rename(folder.join("records.new"), folder.join("records")).unwrap();
            }
            endpoint.recorded(report.seq);
        }
    }
    assert_eq!(endpoint.end(), Some(End::Done));
    endpoint.stop();
}

struct Controller(Child);

impl Controller {
    fn spawn(folder: &Path, abort_at: Option<u64>) -> Self {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args(["--exact", "tests::faults::controller_process"]).env(FOLDER, folder);
        if let Some(seq) = abort_at {
            command.env(ABORT_AT, seq.to_string());
        }
        Self(command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap())
    }

    fn has_ended(&mut self) -> bool {
        self.0.try_wait().unwrap().is_some()
    }
}

impl Drop for Controller {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Carries out everything that one rollout gets until the run is over.
fn work(folder: PathBuf) -> std::thread::JoinHandle<crate::Result<()>> {
    std::thread::spawn(move || {
        let rollout = client(&folder, "a");
        rollout.join(None, None, &identity())?;
        loop {
            match rollout.next(500)? {
                Turn::Order(id, Order::Generate { prompts, .. }) => {
                    rollout.done(id, Outcome::Generated { samples: vec![] }, json!({"prompt": prompts[0]}))?;
                }
                Turn::Order(_, _) => return rollout.leave(),
                Turn::Idle => {}
                Turn::Rejoin => drop(rollout.join(None, None, &identity())?),
            }
        }
    })
}

fn records(folder: &Path) -> Vec<String> {
    let text = std::fs::read_to_string(folder.join("records")).unwrap_or_default();
    text.lines().filter_map(|line| line.split_once(' ').map(|(_, prompt)| prompt.to_owned())).collect()
}

/// Pass: whichever event's answer the controller dies before, the run ends, and every prompt is recorded exactly once.
#[test]
fn killed_between_append_and_answer_at_every_event() {
    // One join, the prompts, one leave.
    for abort_at in 1..=TOTAL + 2 {
        let folder = tempfile::tempdir().unwrap();
        let mut first = Controller::spawn(folder.path(), Some(abort_at));
        let role = work(folder.path().into());
        until("the controller's death", || first.has_ended());
        let mut second = Controller::spawn(folder.path(), None);
        role.join().unwrap().unwrap();
        until("the end", || second.has_ended());
        assert_eq!(second.0.wait().unwrap().code(), Some(0), "event {abort_at}");
        let mut prompts = records(folder.path());
        prompts.sort();
        assert_eq!(prompts, ["0", "1", "2", "3", "4", "5"], "event {abort_at}");
    }
}

/// Pass: kill -9 at any moment, five times in a run, loses and doubles nothing.
#[test]
fn killed_at_arbitrary_moments() {
    let folder = tempfile::tempdir().unwrap();
    let rounds: Vec<_> = (0..5).collect();
    let mut controller = Controller::spawn(folder.path(), None);
    let role = work(folder.path().into());
    for round in rounds {
        std::thread::sleep(Duration::from_millis(7 + 13 * round));
        drop(controller);
        controller = Controller::spawn(folder.path(), None);
    }
    role.join().unwrap().unwrap();
    until("the end", || controller.has_ended());
    let mut prompts = records(folder.path());
    prompts.sort();
    assert_eq!(prompts, ["0", "1", "2", "3", "4", "5"]);
}

#[test]
fn a_role_does_not_wait_for_ever_and_says_for_whom() {
    let folder = tempfile::tempdir().unwrap();
    let target = Target::Run(folder.path().into());
    let options =
        ClientOptions { target, replica: "rollout-3".into(), role: cosmos_controller::Role::Rollout, wait_ms_max: 300 };
    let nobody = Client::new(options.clone()).unwrap();
    let error = nobody.join(None, None, &identity()).unwrap_err();
    assert!(matches!(error, ControlError::Unreachable { .. }));
    let text = error.to_string();
    assert!(text.contains("`rollout-3`") && text.contains("control.json"), "{text}");
    let (endpoint, _reports) = start(folder.path(), 1);
    let url = endpoint.url().to_owned();
    let target = Target::At { url: url.clone(), token: endpoint.token().clone() };
    let orphan = Client::new(ClientOptions { target, ..options }).unwrap();
    orphan.join(None, None, &identity()).unwrap();
    endpoint.stop();
    let text = orphan.next(0).unwrap_err().to_string();
    assert!(text.contains(&url) && text.contains("`rollout-3`") && text.contains("`next`"), "{text}");
}

/// Pass: a role that never sees the answer to its report reports again, and it counts once.
#[test]
fn an_answer_that_is_lost_is_asked_for_again() {
    use std::io::{Read, Write};
    use std::net::{TcpListener, TcpStream};

    let folder = tempfile::tempdir().unwrap();
    let (endpoint, reports) = start(folder.path(), 2);
    // A line that delivers every request, and drops two answers out of three.
    let line = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}", line.local_addr().unwrap());
    let behind = endpoint.url().trim_start_matches("http://").to_owned();
    std::thread::spawn(move || {
        for (count, stream) in line.incoming().enumerate() {
            let Ok(mut client) = stream else { return };
            let Ok(mut server) = TcpStream::connect(&behind) else { return };
            let (mut from, mut to) = (client.try_clone().unwrap(), server.try_clone().unwrap());
            std::thread::spawn(move || std::io::copy(&mut from, &mut to));
            let mut answer = Vec::new();
            let _ = server.read_to_end(&mut answer);
            if count % 3 == 2 {
                let _ = client.write_all(&answer);
            }
            let _ = client.shutdown(std::net::Shutdown::Both);
        }
    });
    let target = Target::At { url, token: endpoint.token().clone() };
    let options =
        ClientOptions { target, replica: "a".into(), role: cosmos_controller::Role::Rollout, wait_ms_max: 20_000 };
    let rollout = Client::new(options).unwrap();
    rollout.join(None, None, &identity()).unwrap();
    assert_eq!(endpoint.status().unwrap()["events"], 1, "joining again after a lost answer is the same join");
    for prompt in 0..2 {
        let (id, given) = order(&rollout);
        assert_eq!(prompt_of(&given), prompt);
        rollout.done(id, Outcome::Generated { samples: vec![] }, json!({"prompt": prompt})).unwrap();
    }
    let prompts: Vec<_> = reports.try_iter().map(|r| r.payload["prompt"].as_u64().unwrap()).collect();
    assert_eq!(prompts, [0, 1]);
}
