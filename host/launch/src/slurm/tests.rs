use std::path::Path;
use std::process::Command;

use super::*;
use crate::placement::{Demand, Ports, Role, Space, place};

fn job(folder: &Path) -> Job {
    let program = folder.join("cosmos-host-program");
    std::fs::write(&program, "#!/bin/sh\n").unwrap();
    let plugin = folder.join("countdown.wasm");
    std::fs::write(&plugin, "plugin").unwrap();
    let demands =
        [(Role::Policy, 2), (Role::Rollout, 4), (Role::Teacher, 2)].map(|(role, ranks)| Demand::new(role, 1, ranks));
    let space = Space { gpus_per_node: 8, cores_per_node: 0, ranks_per_node: 0, nodes: None, ports: Ports::default() };
    Job {
        name: "cosmos_job".into(),
        folder: folder.join("it's a job"),
        program,
        config_toml: "[train]\n".into(),
        plugins: vec![plugin],
        work_folder: folder.into(),
        one_process: false,
        placement: place(&demands, &space).unwrap(),
        cores_per_node: 0,
        ranks_per_node: 0,
        partition: Some("pool0".into()),
        account: None,
        time: "04:00:00".into(),
        pre_timeout_s: 1200,
        retries: 3,
        autoresume: true,
        extra_sbatch: vec!["qos=high".into()],
        container: None,
    }
}

#[test]
fn the_script_is_a_shell_script_with_the_jobs_values() {
    let folder = tempfile::tempdir().unwrap();
    let mut job = job(folder.path());
    assert!(script_of(&job).unwrap_err().to_string().contains("#SBATCH line"), "a quote in a path must be refused");
    job.folder = folder.path().join("job");
    let script = script_of(&job).unwrap();
    for line in [
        "#SBATCH --nodes=1",
        "#SBATCH --gres=gpu:8",
        "#SBATCH --signal=B:USR1@1200",
        "#SBATCH --qos=high",
        "#SBATCH --partition=pool0",
    ] {
        assert!(script.lines().any(|l| l == line), "{line} is missing in {script}");
    }
    assert!(!script.contains("[[D") && !script.contains("[[RUN") && !script.contains("--account"), "{script}");
    let path = write(&job).unwrap();
    let checked = Command::new("bash").arg("-n").arg(&path).output().unwrap();
    assert!(checked.status.success(), "{}", String::from_utf8_lossy(&checked.stderr));
    for file in [
        "launch/plan.json",
        "launch/plan.txt",
        "launch/node-0.txt",
        "launch/token",
        "config/config.toml",
        "plugins/countdown.wasm",
        "bin/cosmos-host",
        "STATE",
    ] {
        assert!(job.folder.join(file).is_file(), "{file}");
    }
    let mode = std::fs::metadata(job.folder.join("launch/token")).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    assert!(write(&job).unwrap_err().to_string().contains("is there already"));
}

#[test]
fn a_container_is_mounted_and_a_missing_one_refused() {
    let folder = tempfile::tempdir().unwrap();
    let image = folder.path().join("image.sqsh");
    let mut job = job(folder.path());
    job.folder = folder.path().join("job");
    job.container = Some(Container { image: image.display().to_string(), mounts: vec!["/tmp:/data".into()] });
    assert!(script_of(&job).unwrap_err().to_string().contains("image.sqsh` is not there"));
    std::fs::write(&image, "").unwrap();
    let script = script_of(&job).unwrap();
    assert!(script.contains("--container-image=") && script.contains("--container-mounts=/tmp:/data,"), "{script}");
    job.container = Some(Container { image: "nvcr.io/nvidia/cuda:13".into(), mounts: vec!["lustre".into()] });
    assert!(script_of(&job).unwrap_err().to_string().contains("cannot be mounted"));
}

#[test]
fn what_cannot_work_is_refused_before_it_is_queued() {
    let folder = tempfile::tempdir().unwrap();
    let base = Job { folder: folder.path().join("job"), ..job(folder.path()) };
    let refused = |job: Job| script_of(&job).unwrap_err().to_string();
    assert!(refused(Job { time: "00:20:00".into(), ..base.clone() }).contains("leaves no time"));
    assert!(refused(Job { plugins: vec!["/no/such.wasm".into()], ..base.clone() }).contains("/no/such.wasm"));
    assert!(refused(Job { name: "a\n#SBATCH --uid=0".into(), ..base.clone() }).contains("#SBATCH line"));
    assert!(refused(Job { extra_sbatch: vec!["a\nb".into()], ..base.clone() }).contains("no option of sbatch"));
    let twice = vec![base.plugins[0].clone(), base.plugins[0].clone()];
    assert!(refused(Job { plugins: twice, ..base.clone() }).contains("two plugins"));
    // A policy over two nodes is two processes; a rollout cannot be.
    let demands = [Demand::new(Role::Policy, 1, 16), Demand::new(Role::Rollout, 1, 16)];
    let space = Space { gpus_per_node: 8, cores_per_node: 0, ranks_per_node: 0, nodes: None, ports: Ports::default() };
    let placement = place(&demands, &space).unwrap();
    assert!(refused(Job { placement, ..base.clone() }).contains("`rollout-0` has 16 ranks on 2 nodes"));
    let placement = place(&demands[..1], &space).unwrap();
    assert!(script_of(&Job { placement, ..base }).unwrap().contains("#SBATCH --nodes=2"));
}

#[test]
fn times_are_slurms() {
    assert_eq!(hours(4.0).unwrap(), "04:00:00");
    assert_eq!(hours(0.51).unwrap(), "00:31:00");
    assert_eq!(hours(30.0).unwrap(), "30:00:00");
    for bad in [0.0, -1.0, f64::NAN, 1e9] {
        assert!(hours(bad).is_err());
    }
    for (text, seconds) in
        [("90", 5400), ("2:30", 150), ("04:00:00", 14400), ("1-12", 129_600), ("1-00:01", 86_460), ("1-0:0:1", 86_401)]
    {
        assert_eq!(seconds_of(text).unwrap(), seconds, "{text}");
    }
    for bad in ["", "0", "x", "1:2:3:4", "-1", "1-", "99999999999", "1:2:3:"] {
        assert!(seconds_of(bad).is_err(), "{bad}");
    }
}

proptest::proptest! {
    #[test]
    fn no_time_and_no_address_list_panics(text in ".{0,40}", digits in "[0-9:;, -]{0,20}") {
        for text in [&text, &digits] {
            if let Ok(seconds) = seconds_of(text) {
                proptest::prop_assert!(seconds > 0);
            }
            proptest::prop_assert!(crate::multi_node::addresses(text).iter().all(|a| !a.is_empty() && !a.contains(';')));
        }
    }

    #[test]
    fn a_quoted_word_is_one_word_to_the_shell(text in "[ -~]{0,30}") {
        let output = Command::new("/bin/sh").arg("-c").arg(format!("printf '%s' {}", quoted(&text))).output().unwrap();
        proptest::prop_assert_eq!(String::from_utf8(output.stdout).unwrap(), text);
    }
}
