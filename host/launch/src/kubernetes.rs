//! A manifest for Kubernetes: an Indexed Job, the headless service by which its pods find each other, and the config.

use serde_json::{Value, json};

use crate::error::{LaunchError, Result};
use crate::multi_node::{NodeCommand, SERVICE_VARIABLE, check_runnable};
use crate::placement::Placement;
use crate::yaml;

/// Where the config is mounted.
pub const CONFIG_INSIDE: &str = "/etc/cosmos-host/config.toml";
/// Where the run's volume is mounted.
pub const RUNS_INSIDE: &str = "/runs";
/// Group of the user in our `Dockerfile`.
const IMAGE_USER: u32 = 1000;
const NAME_CHARS_MAX: usize = 50;
const CONFIG_BYTES_MAX: usize = 900 << 10;
/// Seconds on top of those for saving, for the container to end.
const GRACE_MARGIN_S: u64 = 30;

/// What a manifest is made of.
#[derive(Debug, Clone)]
pub struct Options {
    /// Name of job, service and config.
    pub name: String,
    /// Namespace; none: that of whoever applies it.
    pub namespace: Option<String>,
    /// Image that has the program and the plugins.
    pub image: String,
    /// Claim of a volume that all pods can write, for checkpoints; none: nothing outlives a pod, and nothing is resumed.
    pub volume_claim: Option<String>,
    /// Name of the secret that has the run's token under `token`.
    pub token_secret: String,
    /// `NAME=VALUE`.
    pub envs: Vec<String>,
    /// How often pods that failed are replaced, all together.
    pub retries: u32,
    /// GiB of shared memory.
    pub shared_memory_gib: u32,
}

/// The manifest: three documents of YAML.
pub fn manifest(options: &Options, placement: &Placement, command: &NodeCommand, config_toml: &str) -> Result<String> {
    check(options, config_toml)?;
    if !command.one_process {
        check_runnable(placement)?;
    }
    let documents = [service(options), config(options, config_toml), job(options, placement, command)?];
    let texts: Vec<String> = documents.iter().map(yaml::document).collect();
    Ok(texts.join("---\n"))
}

fn check(options: &Options, config_toml: &str) -> Result<()> {
    for (what, name) in [
        ("name", Some(&options.name)),
        ("namespace", options.namespace.as_ref()),
        ("token secret", Some(&options.token_secret)),
    ] {
        let Some(name) = name else { continue };
        let good = (1..=NAME_CHARS_MAX).contains(&name.len())
            && name.starts_with(|c: char| c.is_ascii_lowercase())
            && name.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-')
            && !name.ends_with('-');
        if !good {
            return Err(LaunchError::usage(
                format!("`{}` is no {what} for Kubernetes", name.escape_debug()),
                format!("up to {NAME_CHARS_MAX} lower-case letters, digits and dashes, beginning with a letter"),
            ));
        }
    }
    if options.image.trim().is_empty() {
        return Err(LaunchError::usage("`--image` is empty", "as in `--image registry.example.com/cosmos-host:0.1.0`"));
    }
    if config_toml.len() > CONFIG_BYTES_MAX {
        return Err(LaunchError::usage(
            format!("the config has {} bytes, and a ConfigMap holds {CONFIG_BYTES_MAX}", config_toml.len()),
            "put long values into files of the image",
        ));
    }
    Ok(())
}

fn metadata(options: &Options, name: &str) -> Value {
    let mut metadata = json!({"name": name, "labels": {"app": options.name}});
    if let Some(namespace) = &options.namespace {
        metadata["namespace"] = namespace.clone().into();
    }
    metadata
}

/// Gives every pod a name, from the moment that it has an address: they look for each other before they are ready.
fn service(options: &Options) -> Value {
    json!({
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": metadata(options, &options.name),
        "spec": {
            "clusterIP": "None",
            "publishNotReadyAddresses": true,
            "selector": {"job-name": options.name},
        },
    })
}

fn config(options: &Options, config_toml: &str) -> Value {
    let text = format!("{}\n", config_toml.trim_end());
    json!({
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": metadata(options, &format!("{}-config", options.name)),
        "data": {"config.toml": text},
    })
}

fn job(options: &Options, placement: &Placement, command: &NodeCommand) -> Result<Value> {
    let pods = placement.nodes;
    let container_name = "cosmos-host";
    Ok(json!({
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": metadata(options, &options.name),
        "spec": {
            "completionMode": "Indexed",
            "completions": pods,
            "parallelism": pods,
            "backoffLimit": options.retries,
            "podFailurePolicy": {
                "rules": [
                    // Saved, and asking to be started again: no failure.
                    {"action": "Ignore", "onExitCodes": {"containerName": container_name, "operator": "In", "values": [75]}},
                    // A wrong config stays wrong.
                    {"action": "FailJob", "onExitCodes": {"containerName": container_name, "operator": "In", "values": [2]}},
                    // Evicted or preempted.
                    {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
                ],
            },
            "template": {
                "metadata": {"labels": {"app": options.name}},
                "spec": pod(options, placement, command, container_name)?,
            },
        },
    }))
}

fn pod(options: &Options, placement: &Placement, command: &NodeCommand, container_name: &str) -> Result<Value> {
    let mut envs = vec![json!({"name": SERVICE_VARIABLE, "value": format!("{0}-{{}}.{0}", options.name)})];
    if !command.one_process {
        envs.push(json!({
            "name": cosmos_control::TOKEN_VARIABLE,
            "valueFrom": {"secretKeyRef": {"name": options.token_secret, "key": "token"}},
        }));
    }
    for env in &options.envs {
        let (name, value) = env
            .split_once('=')
            .filter(|(name, _)| !name.is_empty())
            .ok_or_else(|| LaunchError::usage(format!("`--env {env}` has no value"), "as in `--env NAME=VALUE`"))?;
        envs.push(json!({"name": name, "value": value}));
    }
    let mut program = vec!["cosmos-host".to_owned()];
    program.extend(command.arguments());
    program.extend(["--resume".into(), "--echo".into()]);
    let mut ports = vec![json!({"name": "controller", "containerPort": placement.ports.controller})];
    if !command.one_process {
        ports.push(json!({"name": "redis", "containerPort": placement.ports.redis}));
    }
    let mut container = json!({
        "name": container_name,
        "image": options.image,
        "command": program,
        "env": envs,
        "ports": ports,
        "volumeMounts": [
            {"name": "config", "mountPath": "/etc/cosmos-host", "readOnly": true},
            {"name": "shm", "mountPath": "/dev/shm"},
            {"name": "runs", "mountPath": RUNS_INSIDE},
        ],
    });
    if placement.gpus_per_node > 0 {
        container["resources"] = json!({"limits": {"nvidia.com/gpu": placement.gpus_per_node}});
    }
    let runs = match &options.volume_claim {
        Some(claim) => json!({"name": "runs", "persistentVolumeClaim": {"claimName": claim}}),
        None => json!({"name": "runs", "emptyDir": {}}),
    };
    Ok(json!({
        "subdomain": options.name,
        "restartPolicy": "Never",
        // Our image runs as this user, who must be able to write the volume. It changes nothing for one that runs as root.
        "securityContext": {"fsGroup": IMAGE_USER, "fsGroupChangePolicy": "OnRootMismatch"},
        "terminationGracePeriodSeconds": command.save_wait_s + GRACE_MARGIN_S,
        "containers": [container],
        "volumes": [
            {"name": "config", "configMap": {"name": format!("{}-config", options.name)}},
            {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": format!("{}Gi", options.shared_memory_gib)}},
            runs,
        ],
    }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::placement::{Demand, Ports, Role, Space, place};

    fn options() -> Options {
        Options {
            name: "distil".into(),
            namespace: None,
            image: "registry/cosmos-host:1".into(),
            volume_claim: Some("runs".into()),
            token_secret: "distil-token".into(),
            envs: vec!["HF_HUB_OFFLINE=1".into()],
            retries: 3,
            shared_memory_gib: 16,
        }
    }

    fn made(options: &Options, ranks: usize) -> std::result::Result<String, String> {
        let space =
            Space { gpus_per_node: 8, cores_per_node: 0, ranks_per_node: 0, nodes: None, ports: Ports::default() };
        let placement = place(&[Demand::new(Role::Policy, 2, ranks)], &space).unwrap();
        let command = NodeCommand {
            config: CONFIG_INSIDE.into(),
            plugins: vec!["/plugins/countdown.wasm".into()],
            run: "/runs/distil".into(),
            nodes: placement.nodes,
            gpus_per_node: 8,
            cores_per_node: 0,
            ranks_per_node: 0,
            ports: Ports::default(),
            save_wait_s: 300,
            one_process: false,
        };
        manifest(options, &placement, &command, "[train]\nseed = 0\n").map_err(|e| e.to_string())
    }

    #[test]
    fn pods_find_each_other_and_exit_75_is_no_failure() {
        let text = made(&options(), 8).unwrap();
        for needle in [
            "clusterIP: None",
            "config.toml: |\n    [train]\n    seed = 0\n",
            "completions: 2",
            "value: \"distil-{}.distil\"",
            "- 75",
            "nvidia.com/gpu: 8",
            "terminationGracePeriodSeconds: 330",
            "claimName: runs",
            "fsGroup: 1000",
        ] {
            assert!(text.contains(needle), "{needle} is missing in\n{text}");
        }
        assert_eq!(text.matches("---\n").count(), 2);
    }

    #[test]
    fn what_kubernetes_would_refuse_is_refused_here() {
        assert!(made(&Options { name: "Distil".into(), ..options() }, 8).unwrap_err().contains("no name"));
        assert!(made(&Options { image: " ".into(), ..options() }, 8).unwrap_err().contains("`--image` is empty"));
        assert!(made(&Options { envs: vec!["A".into()], ..options() }, 8).unwrap_err().contains("has no value"));
        // A policy over two nodes is two processes, one in each pod.
        assert!(made(&options(), 16).unwrap().contains("completions: 4"));
    }
}
