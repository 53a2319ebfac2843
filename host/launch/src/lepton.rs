//! A job for NVIDIA DGX Cloud Lepton: its specification as JSON, and its submission.

mod submit;
#[cfg(test)]
mod tests;

use serde_json::{Map, Value, json};

use crate::error::{LaunchError, Result};
use crate::multi_node::{NodeCommand, check_runnable};
use crate::placement::Placement;
use crate::slurm::quoted;

pub use submit::{TOKEN_VARIABLE, URL_VARIABLE, Workspace, submit};

/// Ends the config in the job's command; no line of a config is this.
const END_OF_CONFIG: &str = "COSMOS_CONFIG_END";
/// Where the command writes the config inside the job.
pub const CONFIG_INSIDE: &str = "/tmp/cosmos-config.toml";
/// What a name of a job may have at most.
const NAME_CHARS_MAX: usize = 36;
/// Priority classes by their number from 1.
const PRIORITIES: [&str; 9] =
    ["low-1000", "low-2000", "low-3000", "mid-4000", "mid-5000", "mid-6000", "high-7000", "high-8000", "high-9000"];
/// Of the priority where only preemption is set, as Lepton's own tool has it.
const PRIORITY_DEFAULT: u8 = 4;

/// What a job is made of. Fields that are none stay as the reference job has them, or away.
#[derive(Debug, Clone, Default)]
pub struct Options {
    /// Name and id.
    pub job_name: String,
    /// Image that has the program.
    pub container_image: Option<String>,
    /// Ports, as `PORT[:PROTOCOL]`.
    pub container_ports: Vec<String>,
    /// Shape of a worker, as `gpu.8xh100-80gb`.
    pub resource_shape: Option<String>,
    /// Ids of dedicated node groups.
    pub node_groups: Vec<String>,
    /// Ids of nodes in them.
    pub node_ids: Vec<String>,
    /// Restarts of one worker.
    pub max_failure_retry: Option<u32>,
    /// Restarts of the whole job.
    pub max_job_failure_retry: Option<u32>,
    /// `NAME=VALUE`.
    pub envs: Vec<String>,
    /// `NAME=SECRET` or just `NAME`: the variable gets the workspace's secret of that name.
    pub secrets: Vec<String>,
    /// `STORAGE_PATH:MOUNT_PATH:VOLUME`.
    pub mounts: Vec<String>,
    /// Names of secrets for the image's registry.
    pub image_pull_secrets: Vec<String>,
    /// Whether workers reach each other; always, with several.
    pub intra_job_communication: Option<bool>,
    /// Privileged container.
    pub privileged: bool,
    /// Seconds that a finished job stays.
    pub ttl_seconds_after_finished: Option<u32>,
    /// Whether logs are kept.
    pub log_collection: Option<bool>,
    /// 1 to 9.
    pub queue_priority: Option<u8>,
    /// Whether others may take its place.
    pub can_be_preempted: Option<bool>,
    /// Whether it may take the place of others.
    pub can_preempt: Option<bool>,
    /// `public` or `private`.
    pub visibility: Option<String>,
    /// MiB of shared memory.
    pub shared_memory_size: Option<u32>,
    /// A reservation's id.
    pub with_reservation: Option<String>,
}

/// Devices of a shape, by its name: `gpu.8xh100-80gb` has 8, `gpu.a10` one, `cpu.small` none; none if it tells nothing.
pub fn gpus_of_shape(shape: &str) -> Option<usize> {
    match shape.split_once('.')? {
        ("cpu", _) => Some(0),
        ("gpu", kind) => {
            let digits: String = kind.chars().take_while(char::is_ascii_digit).collect();
            match kind[digits.len()..].starts_with('x') {
                true if !digits.is_empty() => digits.parse().ok().filter(|n| (1..=64).contains(n)),
                _ => Some(1),
            }
        }
        _ => None,
    }
}

/// The specification, laid over a reference job. Secrets stand in it by name only.
pub fn specification(
    options: &Options,
    placement: &Placement,
    command: &NodeCommand,
    config_toml: &str,
    reference: Option<&Value>,
) -> Result<Value> {
    check_name(&options.job_name)?;
    if !command.one_process {
        check_runnable(placement)?;
    }
    let mut job = match reference {
        None => Map::new(),
        Some(Value::Object(map)) => map.clone(),
        Some(_) => {
            return Err(LaunchError::usage(
                "the reference job is no JSON object",
                "give what `lep job get` or this program printed",
            ));
        }
    };
    // What belongs to the reference job itself and not to a copy of it.
    job.remove("status");
    let mut metadata = Map::new();
    metadata.insert("id".into(), options.job_name.clone().into());
    metadata.insert("name".into(), options.job_name.clone().into());
    let kept = job.get("metadata").and_then(|m| m.get("visibility")).cloned();
    if let Some(visibility) = options.visibility.clone().map(Value::from).or(kept) {
        metadata.insert("visibility".into(), visibility);
    }
    job.insert("metadata".into(), metadata.into());
    let mut spec = match job.remove("spec") {
        Some(Value::Object(map)) => map,
        None => Map::new(),
        Some(_) => return Err(LaunchError::usage("`spec` of the reference job is no JSON object", "")),
    };
    fill(&mut spec, options, placement, command, config_toml)?;
    job.insert("spec".into(), spec.into());
    Ok(job.into())
}

fn fill(
    spec: &mut Map<String, Value>,
    options: &Options,
    placement: &Placement,
    command: &NodeCommand,
    config_toml: &str,
) -> Result<()> {
    let workers = placement.nodes;
    spec.insert("completions".into(), workers.into());
    spec.insert("parallelism".into(), workers.into());
    spec.insert(
        "intra_job_communication".into(),
        (options.intra_job_communication.unwrap_or(true) || workers > 1).into(),
    );
    set(spec, "resource_shape", options.resource_shape.clone());
    if text_at(spec, "resource_shape").is_none() {
        return Err(LaunchError::usage(
            "the job has no resource shape",
            "give `--lepton-resource-shape`, such as `gpu.8xh100-80gb`",
        ));
    }
    set(spec, "shared_memory_size", options.shared_memory_size);
    set(spec, "max_failure_retry", options.max_failure_retry);
    set(spec, "max_job_failure_retry", options.max_job_failure_retry);
    set(spec, "ttl_seconds_after_finished", options.ttl_seconds_after_finished);
    let container = table(spec, "container")?;
    set(container, "image", options.container_image.clone());
    if text_at(container, "image").is_none() {
        return Err(LaunchError::usage(
            "the job has no image",
            "give `--lepton-container-image`: an image with `cosmos-host` in it",
        ));
    }
    container.insert("command".into(), json!(["/bin/sh", "-c", shell(command, config_toml)?]));
    if !options.container_ports.is_empty() {
        let ports: Vec<Value> =
            options.container_ports.iter().map(|port| container_port(port)).collect::<Result<_>>()?;
        container.insert("ports".into(), ports.into());
    }
    add_environment(spec, options)?;
    let has_token = spec
        .get("envs")
        .and_then(Value::as_array)
        .is_some_and(|envs| envs.iter().any(|env| env["name"] == cosmos_control::TOKEN_VARIABLE));
    if workers > 1 && !command.one_process && !has_token {
        return Err(LaunchError::usage(
            format!("the {workers} workers of the job share no token"),
            format!(
                "make a secret of 64 random characters in the workspace (`openssl rand -hex 32`) and give `--lepton-secret {}=ITS_NAME`",
                cosmos_control::TOKEN_VARIABLE
            ),
        ));
    }
    if !options.mounts.is_empty() {
        let mounts: Vec<Value> = options.mounts.iter().map(|mount| storage(mount)).collect::<Result<_>>()?;
        spec.insert("mounts".into(), mounts.into());
    }
    if !options.image_pull_secrets.is_empty() {
        spec.insert("image_pull_secrets".into(), json!(options.image_pull_secrets));
    }
    if options.privileged {
        table(spec, "user_security_context")?.insert("privileged".into(), true.into());
    }
    if let Some(collect) = options.log_collection {
        table(spec, "log")?.insert("enable_collection".into(), collect.into());
    }
    fill_queue(spec, options)
}

/// Node groups, and what only a job in one may ask for.
fn fill_queue(spec: &mut Map<String, Value>, options: &Options) -> Result<()> {
    if !options.node_groups.is_empty() {
        table(spec, "affinity")?.insert("allowed_dedicated_node_groups".into(), json!(options.node_groups));
    }
    let in_group = spec
        .get("affinity")
        .and_then(|a| a.get("allowed_dedicated_node_groups"))
        .and_then(Value::as_array)
        .is_some_and(|groups| !groups.is_empty());
    let asks = [
        ("--lepton-node-id", !options.node_ids.is_empty()),
        ("--lepton-queue-priority", options.queue_priority.is_some()),
        ("--lepton-can-be-preempted", options.can_be_preempted.is_some()),
        ("--lepton-can-preempt", options.can_preempt.is_some()),
        ("--lepton-with-reservation", options.with_reservation.is_some()),
    ];
    if let Some((flag, _)) = asks.iter().find(|(_, asked)| *asked && !in_group) {
        return Err(LaunchError::usage(
            format!("`{flag}` needs a dedicated node group"),
            "give `--lepton-node-group ID`",
        ));
    }
    if !options.node_ids.is_empty() {
        table(spec, "affinity")?.insert("allowed_nodes_in_node_group".into(), json!(options.node_ids));
    }
    if options.queue_priority.is_some() || options.can_be_preempted.is_some() || options.can_preempt.is_some() {
        let queue = table(spec, "queue_config")?;
        if options.queue_priority.is_some() || !queue.contains_key("priority_class") {
            let number = options.queue_priority.unwrap_or(PRIORITY_DEFAULT);
            let class = usize::from(number).checked_sub(1).and_then(|i| PRIORITIES.get(i)).ok_or_else(|| {
                LaunchError::usage(format!("`--lepton-queue-priority` is {number}, and not 1 to 9"), "1 is lowest")
            })?;
            queue.insert("priority_class".into(), (*class).into());
        }
        set(queue, "can_be_preempted", options.can_be_preempted);
        set(queue, "can_preempt", options.can_preempt);
    }
    if let Some(reservation) = &options.with_reservation {
        table(spec, "reservation_config")?.insert("reservation_id".into(), reservation.clone().into());
    }
    Ok(())
}

/// The command of a worker: writes the config, then becomes `launch node`.
fn shell(command: &NodeCommand, config_toml: &str) -> Result<String> {
    if config_toml.lines().any(|line| line == END_OF_CONFIG) {
        return Err(LaunchError::usage(format!("the config has a line `{END_OF_CONFIG}`"), "change that line"));
    }
    let arguments: Vec<String> = command.arguments().iter().map(|a| quoted(a)).collect();
    Ok(format!(
        "set -e\ncat > {CONFIG_INSIDE} <<'{END_OF_CONFIG}'\n{}\n{END_OF_CONFIG}\nexec cosmos-host {} --resume --echo\n",
        config_toml.trim_end(),
        arguments.join(" ")
    ))
}

/// Adds to the reference job's variables; the same name again replaces it.
fn add_environment(spec: &mut Map<String, Value>, options: &Options) -> Result<()> {
    let mut envs = match spec.remove("envs") {
        Some(Value::Array(envs)) => envs,
        None | Some(Value::Null) => Vec::new(),
        Some(_) => return Err(LaunchError::usage("`spec.envs` of the reference job is no list", "")),
    };
    let plain = options.envs.iter().map(|text| {
        let (name, value) = text.split_once('=').ok_or_else(|| {
            LaunchError::usage(format!("`--lepton-env {text}` has no value"), "as in `--lepton-env NAME=VALUE`")
        })?;
        Ok(json!({"name": name, "value": value}))
    });
    let secret = options.secrets.iter().map(|text| {
        let (name, secret) = text.split_once('=').unwrap_or((text, text));
        Ok(json!({"name": name, "value_from": {"secret_name_ref": secret}}))
    });
    for env in plain.chain(secret).collect::<Result<Vec<_>>>()? {
        let name = env["name"].as_str().unwrap_or_default();
        let good = !name.is_empty()
            && !name.starts_with(|c: char| c.is_ascii_digit())
            && name.chars().all(|c| c.is_ascii_alphanumeric() || "._-".contains(c));
        if !good {
            return Err(LaunchError::usage(
                format!("`{name}` is no name of an environment variable"),
                "use letters, digits and `_`",
            ));
        }
        if name == cosmos_control::TOKEN_VARIABLE && env.get("value").is_some() {
            return Err(LaunchError::usage(
                format!("`{name}` would stand in the job where everybody in the workspace reads it"),
                format!("make a secret of it and give `--lepton-secret {name}=ITS_NAME`"),
            ));
        }
        envs.retain(|old| old["name"] != env["name"]);
        envs.push(env);
    }
    spec.insert("envs".into(), envs.into());
    Ok(())
}

fn container_port(text: &str) -> Result<Value> {
    let (port, protocol) = text.split_once(':').unwrap_or((text, "tcp"));
    let number = port.parse::<u16>().ok().filter(|port| *port > 0);
    match (number, protocol.to_ascii_lowercase().as_str()) {
        (Some(port), "tcp" | "udp" | "sctp") => {
            Ok(json!({"container_port": port, "protocol": protocol.to_ascii_uppercase()}))
        }
        _ => Err(LaunchError::usage(
            format!("`--lepton-container-port {text}` is no port"),
            "as in `8082` or `8082:tcp`",
        )),
    }
}

fn storage(text: &str) -> Result<Value> {
    let mut parts = text.splitn(3, ':').map(str::trim);
    match (parts.next(), parts.next(), parts.next()) {
        (Some(path), Some(at), Some(from))
            if !path.is_empty() && at.starts_with('/') && at.len() > 1 && !from.is_empty() =>
        {
            Ok(json!({"path": path, "mount_path": at, "from": from}))
        }
        _ => Err(LaunchError::usage(
            format!("`--lepton-mount {text}` is no mount"),
            "as in `STORAGE_PATH:MOUNT_PATH:VOLUME`, such as `/runs:/mnt/runs:node-nfs:my-nfs`",
        )),
    }
}

fn check_name(name: &str) -> Result<()> {
    let good = name.len() <= NAME_CHARS_MAX
        && name.starts_with(|c: char| c.is_ascii_lowercase())
        && name.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-')
        && !name.ends_with('-');
    if good {
        return Ok(());
    }
    Err(LaunchError::usage(
        format!("`{}` is no name of a Lepton job", name.escape_debug()),
        format!("up to {NAME_CHARS_MAX} lower-case letters, digits and dashes, beginning with a letter"),
    ))
}

fn set(map: &mut Map<String, Value>, name: &str, value: Option<impl Into<Value>>) {
    if let Some(value) = value {
        map.insert(name.into(), value.into());
    }
}

fn text_at<'a>(map: &'a Map<String, Value>, name: &str) -> Option<&'a str> {
    map.get(name).and_then(Value::as_str).filter(|text| !text.is_empty())
}

/// The table of that name, made if it is not there.
fn table<'a>(map: &'a mut Map<String, Value>, name: &str) -> Result<&'a mut Map<String, Value>> {
    let entry = map.entry(name).or_insert(Value::Null);
    if entry.is_null() {
        *entry = Value::Object(Map::new());
    }
    entry
        .as_object_mut()
        .ok_or_else(|| LaunchError::usage(format!("`spec.{name}` of the reference job is no JSON object"), ""))
}
