//! A job for Slurm: a run folder that people can read, and the batch script in it.
//!
//! The script starts `launch node` once on every node and decides, from what these leave in the run folder, whether the
//! job is done, is put back into the queue, or has failed.

mod container;
mod script;
#[cfg(test)]
mod tests;
mod time;

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::error::{LaunchError, Result};
use crate::multi_node::{check_runnable, launch_folder, write_token};
use crate::placement::Placement;

pub use container::{Container, check_image};
pub(crate) use script::quoted;
pub use time::{hours, seconds_of};

/// State of the job in its run folder: a word in the first line, the reason in the second.
pub const STATE_FILE: &str = "STATE";

/// What a job is made of.
#[derive(Debug, Clone)]
pub struct Job {
    /// Name in the queue.
    pub name: String,
    /// Folder of the job, made anew.
    pub folder: PathBuf,
    /// This program; copied, so that a new build cannot change a job in the queue.
    pub program: PathBuf,
    /// The resolved config, as TOML.
    pub config_toml: String,
    /// Plugins; copied.
    pub plugins: Vec<PathBuf>,
    /// Where relative paths in the config start.
    pub work_folder: PathBuf,
    /// Everything in one process.
    pub one_process: bool,
    /// Who runs where.
    pub placement: Placement,
    /// Cores of a node as placement was told; 0: unknown.
    pub cores_per_node: usize,
    /// On CPUs: ranks of one replica on a node at most; 0: no limit.
    pub ranks_per_node: usize,
    /// Partition; none: the cluster's default.
    pub partition: Option<String>,
    /// Account; none: the user's default.
    pub account: Option<String>,
    /// Time limit, as Slurm reads it.
    pub time: String,
    /// Seconds before the time limit at which the run is told to save.
    pub pre_timeout_s: u64,
    /// How often a job that failed is put back into the queue.
    pub retries: u32,
    /// Whether the job puts itself back into the queue at all.
    pub autoresume: bool,
    /// Further options of `sbatch`.
    pub extra_sbatch: Vec<String>,
    /// What the processes run in; none: the node's own system.
    pub container: Option<Container>,
}

/// Checks a job and writes its folder, token included. Gives the path of the batch script.
pub fn write(job: &Job) -> Result<PathBuf> {
    let script = script_of(job)?;
    if job.folder.exists() {
        return Err(LaunchError::usage(
            format!("`{}` is there already", job.folder.display()),
            "start a job again by `sbatch FOLDER/job.sbatch`; for a new one choose another `--job-name` or `--output-root-path`",
        ));
    }
    let launch = launch_folder(&job.folder);
    for folder in
        [&job.folder, &launch, &job.folder.join("config"), &job.folder.join("plugins"), &job.folder.join("bin")]
    {
        fs::create_dir_all(folder).map_err(LaunchError::io("create", folder.as_path()))?;
    }
    for (path, text) in files_of(job)? {
        fs::write(&path, text).map_err(LaunchError::io("write", &path))?;
    }
    copy(&job.program, &program_in(&job.folder))?;
    for (from, to) in job.plugins.iter().zip(plugins_in(job)?) {
        copy(from, &to)?;
    }
    if !job.one_process {
        write_token(&job.folder)?;
    }
    let path = job.folder.join("job.sbatch");
    fs::write(&path, script).map_err(LaunchError::io("write", &path))?;
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).map_err(LaunchError::io("change", &path))?;
    write_state(&job.folder, "written", "not submitted yet")?;
    Ok(path)
}

/// The batch script, after everything was checked that can be checked before anything is queued.
pub fn script_of(job: &Job) -> Result<String> {
    if job.name.contains('/') {
        return Err(LaunchError::usage(
            format!("`--job-name {}` is no name: the run folder is called after it", job.name.escape_debug()),
            "use letters, digits, dots and dashes; `--output-root-path` says where the run folder goes",
        ));
    }
    if !job.one_process {
        check_runnable(&job.placement)?;
    }
    let limit_s = seconds_of(&job.time)?;
    if job.pre_timeout_s + 60 > limit_s {
        return Err(LaunchError::usage(
            format!(
                "the warning {} s before the end leaves no time to compute: the job lasts {limit_s} s",
                job.pre_timeout_s
            ),
            "raise `--duration` or lower `--pre-timeout-signal`",
        ));
    }
    for plugin in job.plugins.iter().chain([&job.program]) {
        if !plugin.is_file() {
            return Err(LaunchError::usage(format!("`{}` is not there", plugin.display()), "check the path"));
        }
    }
    if let Some(container) = &job.container {
        container.check()?;
    }
    plugins_in(job)?;
    script::render(job)
}

/// Puts the script into the queue. Gives the job's number.
pub fn submit(script: &Path) -> Result<String> {
    let hint =
        "Slurm's programs must be in PATH: on a cluster's login node they are; `cosmos-host doctor` looks for them";
    let output = Command::new("sbatch")
        .arg("--parsable")
        .arg(script)
        .output()
        .map_err(|source| LaunchError::Start { program: "sbatch".into(), source, hint: hint.into() })?;
    let answer = |bytes: &[u8]| String::from_utf8_lossy(bytes).trim().chars().take(2000).collect::<String>();
    if !output.status.success() {
        return Err(LaunchError::Refused {
            who: "sbatch".into(),
            answer: answer(&output.stderr),
            hint: format!("see `{}`; partition, account, time and GPUs are in its first lines", script.display()),
        });
    }
    // `--parsable` prints the number, then the cluster's name where there are several.
    let number = answer(&output.stdout).split(';').next().unwrap_or_default().to_owned();
    if let Some(folder) = script.parent() {
        // The job may have begun: its own word is newer.
        if fs::read_to_string(folder.join(STATE_FILE)).is_ok_and(|text| text.starts_with("written")) {
            write_state(folder, "queued", &format!("as job {number}"))?;
        }
    }
    Ok(number)
}

fn write_state(folder: &Path, word: &str, reason: &str) -> Result<()> {
    crate::multi_node::write_whole(&folder.join(STATE_FILE), format!("{word}\n{reason}\n").as_bytes(), 0o644)
}

fn program_in(folder: &Path) -> PathBuf {
    folder.join("bin/cosmos-host")
}

fn config_in(folder: &Path) -> PathBuf {
    folder.join("config/config.toml")
}

/// Where the plugins' copies go; their names must differ.
fn plugins_in(job: &Job) -> Result<Vec<PathBuf>> {
    let mut all: Vec<PathBuf> = Vec::new();
    for plugin in &job.plugins {
        let name =
            plugin.file_name().ok_or_else(|| LaunchError::usage(format!("`{}` is no file", plugin.display()), ""))?;
        let copy = job.folder.join("plugins").join(name);
        if all.contains(&copy) {
            return Err(LaunchError::usage(
                format!("two plugins are called `{}`", name.to_string_lossy()),
                "rename one of the files",
            ));
        }
        all.push(copy);
    }
    Ok(all)
}

/// The readable files of the launcher: the plan as table and JSON, the processes of each node, the counters.
fn files_of(job: &Job) -> Result<Vec<(PathBuf, String)>> {
    let launch = launch_folder(&job.folder);
    let plan = serde_json::to_string_pretty(&job.placement)
        .map_err(|e| LaunchError::io("write", launch.join("plan.json"))(e.into()))?;
    let mut files = vec![
        (config_in(&job.folder), job.config_toml.clone()),
        (launch.join("plan.json"), plan + "\n"),
        (launch.join("plan.txt"), job.placement.to_string()),
        (launch.join("attempt"), "0\n".into()),
        (launch.join("retries-left"), format!("{}\n", job.retries)),
    ];
    for node in 0..job.placement.nodes {
        let mut text =
            format!("# Processes of node {node}, for reading: `launch node` works them out from the config again.\n");
        match (job.one_process, node) {
            (true, _) => text.push_str("run: everything in one process\n"),
            (false, 0) => text.push_str(&format!("controller: port {}\n", job.placement.ports.controller)),
            _ => {}
        }
        if !job.one_process {
            for (replica, part) in job.placement.on_node(node) {
                let devices: Vec<String> = part.devices.iter().map(usize::to_string).collect();
                let devices =
                    if devices.is_empty() { "no devices".into() } else { format!("devices {}", devices.join(",")) };
                text.push_str(&format!("{}: {devices}, port {}\n", replica.name, part.port));
            }
        }
        files.push((launch.join(format!("node-{node}.txt")), text));
    }
    Ok(files)
}

fn copy(from: &Path, to: &Path) -> Result<()> {
    fs::copy(from, to).map(|_| ()).map_err(LaunchError::io("copy", from))
}
