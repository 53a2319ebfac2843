//! Crews of small shell programs.

use std::fs;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::Command;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use cosmos_config::{ConfigFile, Host};

use crate::placement::Counts;
use crate::process::{Show, Spec, in_words};
use crate::stop::StopFlag;
use crate::supervise::Crew;
use crate::{LaunchError, Machine, Outcome, local_plan};

/// Ends orderly, with this exit code, when its standard input ends.
const WAITS: &str = "cat > /dev/null; exit 75";

fn spec(name: &str, script: &str) -> Spec {
    Spec {
        name: name.into(),
        program: "/bin/sh".into(),
        arguments: vec!["-c".into(), script.into()],
        variables: vec![("FOLDER".into(), String::new())],
        shown: name == "controller",
    }
}

struct Seen(Arc<Mutex<Vec<String>>>);

impl Seen {
    fn new() -> (Self, Show) {
        let lines = Arc::new(Mutex::new(Vec::new()));
        let all = Arc::clone(&lines);
        (Self(lines), Arc::new(move |line: &str| all.lock().unwrap().push(line.to_owned())))
    }

    fn has(&self, line: &str) -> bool {
        self.0.lock().unwrap().iter().any(|l| l == line)
    }
}

fn crew(folder: &Path, specs: Vec<Spec>, host: &Host) -> (Crew, Seen) {
    let (seen, show) = Seen::new();
    let specs = specs.into_iter().map(|mut spec| {
        spec.variables[0].1 = folder.display().to_string();
        spec
    });
    (Crew::start(specs.collect(), folder, host, show).unwrap(), seen)
}

fn alive(id: u32) -> bool {
    fs::read_to_string(format!("/proc/{id}/stat")).is_ok_and(|stat| !stat.contains(") Z "))
}

#[test]
fn a_run_ends_when_its_controller_does_and_its_roles_have_left() {
    let folder = tempfile::tempdir().unwrap();
    let specs = vec![
        spec("controller", "echo step 1; sleep 0.3; exit 0"),
        spec("rollout-0", "echo 'quiet'; echo '2026-01-01T00:00:00Z  WARN loud' >&2; sleep 0.1; exit 0"),
        spec("teacher-0", "sleep 0.5; exit 0"),
    ];
    let (mut crew, seen) = crew(folder.path(), specs, &Host::default());
    assert_eq!(crew.watch(&StopFlag::default()).unwrap(), Outcome::Done);
    assert!(seen.has("step 1"));
    assert!(seen.has("[rollout-0] 2026-01-01T00:00:00Z  WARN loud"));
    assert!(!seen.0.lock().unwrap().iter().any(|l| l.contains("quiet")));
    let log = fs::read_to_string(folder.path().join("rollout-0.log")).unwrap();
    assert!(log.contains("quiet\n") && log.contains("loud\n"), "{log}");
}

#[test]
fn what_dies_is_started_again() {
    let folder = tempfile::tempdir().unwrap();
    // The first life ends by SIGKILL, the second by a panic's exit code, the third well.
    let script = "echo x >> $FOLDER/$NAME; n=$(wc -l < $FOLDER/$NAME); \
                  [ $n = 1 ] && kill -9 $$; [ $n = 2 ] && exit $SECOND; \
                  touch $FOLDER/$NAME.well; while [ $(ls $FOLDER/*.well | wc -l) -lt 2 ]; do sleep 0.05; done; exit 0";
    let specs = [("controller", "134"), ("rollout-0", "1")].map(|(name, second)| {
        let mut spec = spec(name, script);
        spec.variables.push(("NAME".into(), name.into()));
        spec.variables.push(("SECOND".into(), second.into()));
        spec
    });
    let (mut crew, _) = crew(folder.path(), specs.into(), &Host::default());
    assert_eq!(crew.watch(&StopFlag::default()).unwrap(), Outcome::Done);
    for name in ["controller", "rollout-0"] {
        assert_eq!(fs::read_to_string(folder.path().join(name)).unwrap(), "x\nx\nx\n", "{name}");
    }
}

#[test]
fn what_dies_too_often_ends_the_run_with_its_last_words() {
    let folder = tempfile::tempdir().unwrap();
    let specs = vec![spec("controller", WAITS), spec("teacher-0", "echo 'error: no weights' >&2; exit 7")];
    let host = Host { restarts_max: 1, ..Host::default() };
    let (mut crew, seen) = crew(folder.path(), specs, &host);
    let controller = crew.id_of("controller").unwrap();
    let error = crew.watch(&StopFlag::default()).unwrap_err();
    let text = error.to_string();
    assert!(text.starts_with("`teacher-0` ended with exit code 7 after 1 restarts; the end of "), "{text}");
    assert!(text.ends_with("teacher-0.log:\n  error: no weights"), "{text}");
    assert!(!error.is_usage() && error.hint().unwrap().contains("host.restarts_max"));
    assert!(seen.has("[teacher-0] error: no weights"));
    assert!(!alive(controller));
}

#[test]
fn wrong_input_and_a_run_that_failed_are_not_tried_again() {
    for (controller, role, usage, name) in
        [(WAITS, "exit 2", true, "rollout-0"), ("echo 'error: no teacher' >&2; exit 1", WAITS, false, "controller")]
    {
        let folder = tempfile::tempdir().unwrap();
        let specs = vec![spec("controller", controller), spec("rollout-0", role)];
        let (mut crew, _) = crew(folder.path(), specs, &Host::default());
        let error = crew.watch(&StopFlag::default()).unwrap_err();
        assert!(error.to_string().starts_with(&format!("`{name}` ended with exit code")), "{error}");
        assert_eq!(error.is_usage(), usage);
    }
}

#[test]
fn a_stop_asks_the_controller_first_and_kills_who_does_not_end() {
    let folder = tempfile::tempdir().unwrap();
    // The role ends by itself once the controller has saved, as by an order to leave.
    let specs = vec![
        spec("controller", "cat > /dev/null; touch $FOLDER/saved; exit 75"),
        spec("policy-0", "while [ ! -e $FOLDER/saved ]; do sleep 0.02; done; exit 75"),
    ];
    let (mut crew_, _) = crew(folder.path(), specs, &Host::default());
    let stop = StopFlag::default();
    stop.set();
    assert_eq!(crew_.watch(&stop).unwrap(), Outcome::Saved);

    let specs = vec![spec("controller", "trap '' TERM; while true; do sleep 0.05; done"), spec("policy-0", WAITS)];
    let (mut crew_, _) = crew(folder.path(), specs, &Host { stop_ms_max: 100, ..Host::default() });
    let stuck = crew_.id_of("controller").unwrap();
    let error = crew_.watch(&stop).unwrap_err();
    assert!(error.to_string().contains("was not saved within 100 ms"), "{error}");
    assert!(!alive(stuck));
}

#[test]
fn a_controller_that_dies_while_stopping_is_asked_again() {
    let folder = tempfile::tempdir().unwrap();
    let script = "cat > /dev/null; [ -e $FOLDER/second ] && exit 75; touch $FOLDER/second; kill -9 $$";
    let (mut crew, _) = crew(folder.path(), vec![spec("controller", script)], &Host::default());
    let stop = StopFlag::default();
    stop.set();
    assert_eq!(crew.watch(&stop).unwrap(), Outcome::Saved);
}

#[test]
fn nothing_outlives_the_crew() {
    let folder = tempfile::tempdir().unwrap();
    let specs = vec![spec("controller", WAITS), spec("rollout-0", "while true; do sleep 0.05; done")];
    let (crew, _) = crew(folder.path(), specs, &Host::default());
    let ids: Vec<u32> = ["controller", "rollout-0"].iter().map(|n| crew.id_of(n).unwrap()).collect();
    assert!(ids.iter().all(|id| alive(*id)));
    drop(crew);
    let started = Instant::now();
    while ids.iter().any(|id| alive(*id)) {
        assert!(started.elapsed() < Duration::from_secs(30));
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn config(text: &str) -> cosmos_config::Resolved {
    ConfigFile::parse("a.toml", text).unwrap().resolve("20260101000000").unwrap()
}

fn cpus(cores: usize) -> Machine {
    Machine { cores, ..Machine::default() }
}

#[test]
fn the_placement_follows_the_config_and_the_flags() {
    let resolved = config(
        "[distillation]\nenable = true\n[distillation.parallelism]\ntp_size = 1\nn_init_replicas = 2\n\
         [policy.parallelism]\ntp_size = 2\ndp_shard_size = 2\n[rollout.parallelism]\ntp_size = 1\n\
         [train.train_policy]\ntype = \"grpo\"\n",
    );
    let rows = |counts, cores| -> Vec<(String, usize, Option<usize>)> {
        let plan = local_plan(&resolved.config, counts, &cpus(cores)).unwrap();
        plan.processes.into_iter().map(|p| (p.name, p.ranks, p.cores)).collect()
    };
    let row = |name: &str, ranks, cores| (name.to_owned(), ranks, cores);
    assert_eq!(
        rows(Counts::default(), 10),
        [
            row("redis", 1, None),
            row("controller", 1, None),
            row("policy-0", 4, Some(3)),
            row("rollout-0", 1, Some(3)),
            row("teacher-0", 1, Some(2)),
            row("teacher-1", 1, Some(2)),
        ]
    );
    let counts = Counts { rollout: Some(3), teacher: Some(1), ..Counts::default() };
    assert_eq!(
        rows(counts, 2).iter().filter(|(name, _, cores)| name.starts_with("rollout-") && *cores == Some(1)).count(),
        3
    );
    for (counts, text) in [
        (Counts { policy: Some(0), ..Counts::default() }, "1 to 256 policies, and not 0"),
        (Counts { rollout: Some(999), ..Counts::default() }, "1 to 256 rollouts, and not 999"),
    ] {
        let error = local_plan(&resolved.config, counts, &cpus(4)).unwrap_err();
        assert!(error.to_string().contains(text) && error.is_usage(), "{error}");
    }
    let grpo = config("[train.train_policy]\ntype = \"grpo\"\n");
    let error = local_plan(&grpo.config, Counts { teacher: Some(1), ..Counts::default() }, &cpus(4)).unwrap_err();
    assert!(error.to_string().contains("no distillation"), "{error}");
    assert!(
        local_plan(&grpo.config, Counts::default(), &cpus(4)).unwrap().processes.iter().all(|p| p.role != "teacher")
    );
    let sft = config("[train.train_policy]\ntype = \"sft\"\n");
    assert!(matches!(local_plan(&sft.config, Counts::default(), &cpus(4)), Err(LaunchError::Config { .. })));
    let url = config("redis = \"rediss://user:pw@far:6379\"\n[train.train_policy]\ntype = \"grpo\"\n");
    assert!(local_plan(&url.config, Counts::default(), &cpus(4)).unwrap().processes.iter().all(|p| p.name != "redis"));
}

#[test]
fn on_gpus_every_role_sees_its_own() {
    let text = "[distillation]\nenable = true\n[distillation.parallelism]\ntp_size = 1\n\
                [[distillation.teachers]]\nname = \"math\"\nmodel_name_or_path = \"m\"\n\
                [[distillation.teachers]]\nname = \"code\"\nmodel_name_or_path = \"c\"\n\
                [policy.parallelism]\ntp_size = 2\n[rollout.parallelism]\ntp_size = 1\n\
                [train.train_policy]\ntype = \"grpo\"\n[host]\ndevice = \"burn:cuda\"\n";
    let resolved = config(text);
    let placed = |machine: &Machine| local_plan(&resolved.config, Counts::default(), machine);
    let machine = Machine { cores: 10, ..Machine::this(Some("4, 5,6,GPU-7,8")) };
    let rows: Vec<(String, String, Option<usize>)> =
        placed(&machine).unwrap().processes.into_iter().map(|p| (p.name, p.devices.join(","), p.cores)).collect();
    let row = |name: &str, devices: &str, cores| (name.to_owned(), devices.to_owned(), cores);
    assert_eq!(
        rows,
        [
            row("redis", "", None),
            row("controller", "", None),
            row("policy-0", "4,5", Some(4)),
            row("rollout-0", "6", Some(2)),
            row("teacher-math-0", "GPU-7", Some(2)),
            row("teacher-code-0", "8", Some(2)),
        ]
    );
    let four = Machine { cores: 10, ..Machine::this(Some("0,1,2,3")) };
    let error = placed(&four).unwrap_err();
    assert!(error.to_string().contains("takes 5 GPUs (1 × policy of 2, ") && error.is_usage(), "{error}");
    assert!(error.hint().unwrap().contains("--share-gpus"));
    let shared = placed(&Machine { share_gpus: true, ..four }).unwrap();
    let devices: Vec<String> = shared.processes.iter().skip(2).map(|p| p.devices.join(",")).collect();
    assert_eq!(devices, ["0,1", "2", "3", "0"]);
    for (visible, words) in [("", "no GPU of this machine can be seen"), ("0", "a policy takes 2 GPUs")] {
        let machine = Machine { share_gpus: true, ..Machine::this(Some(visible)) };
        let error = placed(&machine).unwrap_err();
        assert!(error.to_string().contains(words) && error.is_usage(), "{error}");
    }
}

#[test]
fn statuses_are_put_in_words() {
    let status = Command::new("/bin/sh").args(["-c", "exit 3"]).status().unwrap();
    assert_eq!(in_words(status), "exit code 3");
    assert_eq!(in_words(std::process::ExitStatus::from_raw(9)), "signal 9");
}
