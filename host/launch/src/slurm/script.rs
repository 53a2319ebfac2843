//! The batch script: a template with the job's values put in, quoted for the shell.

use std::path::Path;

use super::{Job, config_in, plugins_in, program_in};
use crate::error::{LaunchError, Result};
use crate::multi_node::NodeCommand;

const TEMPLATE: &str = include_str!("job.sbatch");
/// What saving may not use of the time before the limit: Slurm needs it to end the job in order.
const MARGIN_S: u64 = 20;

/// A word for the shell.
pub(crate) fn quoted(text: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_./=:,+@%".contains(c);
    if !text.is_empty() && text.chars().all(plain) { text.into() } else { format!("'{}'", text.replace('\'', "'\\''")) }
}

fn shown(path: &Path) -> String {
    quoted(&path.display().to_string())
}

/// A `#SBATCH` line. Slurm reads it up to the end of the line, without a shell.
fn directive(option: &str) -> Result<String> {
    let option = option.trim();
    if option.is_empty() || option.contains(['\n', '\r']) {
        return Err(LaunchError::usage(
            format!("`{}` is no option of sbatch", option.escape_debug()),
            "one option each",
        ));
    }
    let dashes = if option.starts_with('-') { "" } else { "--" };
    Ok(format!("#SBATCH {dashes}{option}\n"))
}

/// A value in a `#SBATCH` line.
fn value(name: &str, text: &str) -> Result<String> {
    if text.is_empty() || text.contains(['\n', '\r', '"', '\'', '\\', ' ']) {
        return Err(LaunchError::usage(
            format!("`{}` cannot stand in an #SBATCH line for `{name}`", text.escape_debug()),
            "use letters, digits, dots, dashes and slashes",
        ));
    }
    Ok(format!("{name}={text}"))
}

/// The whole script.
pub(super) fn render(job: &Job) -> Result<String> {
    let nodes = job.placement.nodes;
    let mut options = vec![
        value("job-name", &job.name)?,
        format!("nodes={nodes}"),
        format!("ntasks={nodes}"),
        "ntasks-per-node=1".into(),
        value("time", &job.time)?,
        value("output", &job.folder.join("slurm-%j.log").display().to_string())?,
        "open-mode=append".into(),
        format!("signal=B:USR1@{}", job.pre_timeout_s),
        "requeue".into(),
        "exclusive".into(),
        value("chdir", &job.work_folder.display().to_string())?,
    ];
    if job.placement.gpus_per_node > 0 {
        options.push(format!("gres=gpu:{}", job.placement.gpus_per_node));
    }
    if let Some(partition) = &job.partition {
        options.push(value("partition", partition)?);
    }
    if let Some(account) = &job.account {
        options.push(value("account", account)?);
    }
    options.extend(job.extra_sbatch.iter().cloned());
    let directives: String = options.iter().map(|o| directive(o)).collect::<Result<_>>()?;

    let home = std::env::var_os("HOME").map(std::path::PathBuf::from);
    let srun: Vec<String> = match &job.container {
        Some(container) => container.options(job, home.as_deref()).iter().map(|o| quoted(o)).collect(),
        None => Vec::new(),
    };
    let node = NodeCommand {
        config: config_in(&job.folder),
        plugins: plugins_in(job)?,
        run: job.folder.clone(),
        nodes,
        gpus_per_node: job.placement.gpus_per_node,
        cores_per_node: job.cores_per_node,
        ranks_per_node: job.ranks_per_node,
        ports: job.placement.ports,
        save_wait_s: job.pre_timeout_s.saturating_sub(MARGIN_S).max(1),
        one_process: job.one_process,
    };
    let node: Vec<String> = node.arguments().iter().map(|a| quoted(a)).collect();
    let values = [
        ("DIRECTIVES", directives.trim_end().to_owned()),
        ("RUN", shown(&job.folder)),
        ("PROGRAM", shown(&program_in(&job.folder))),
        ("AUTORESUME", u8::from(job.autoresume).to_string()),
        ("NODES", nodes.to_string()),
        ("SRUN_OPTIONS", srun.join(" ")),
        ("NODE_ARGUMENTS", node.join(" ")),
    ];
    Ok(fill(TEMPLATE, &values))
}

/// Puts values into the places `[[NAME]]`, once, so that a value that looks like a place stays as it is.
fn fill(template: &str, values: &[(&str, String)]) -> String {
    let mut out = String::with_capacity(template.len() * 2);
    let mut rest = template;
    while let Some((before, after)) = rest.split_once("[[") {
        out.push_str(before);
        let found = after
            .split_once("]]")
            .and_then(|(name, tail)| values.iter().find(|(n, _)| *n == name).map(|(_, value)| (value, tail)));
        match found {
            Some((value, tail)) => {
                out.push_str(value);
                rest = tail;
            }
            None => {
                out.push_str("[[");
                rest = after;
            }
        }
    }
    out.push_str(rest);
    out
}
