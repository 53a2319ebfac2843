//! The command that every scheduler starts on every node.

use std::path::PathBuf;

use crate::placement::Ports;

/// What `launch node` is told, the same on every node. Which node it is, it finds out there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NodeCommand {
    /// The config, as the node sees it.
    pub config: PathBuf,
    /// Plugins, as the node sees them.
    pub plugins: Vec<PathBuf>,
    /// The run folder, as the node sees it.
    pub run: PathBuf,
    /// Nodes of the run.
    pub nodes: usize,
    /// Devices of one node.
    pub gpus_per_node: usize,
    /// Cores of one node; 0: the node's own number, where it matters.
    pub cores_per_node: usize,
    /// On CPUs: ranks of one replica on a node at most; 0: no limit.
    pub ranks_per_node: usize,
    /// TCP ports.
    pub ports: Ports,
    /// Seconds from a signal to the end.
    pub save_wait_s: u64,
    /// Everything in one process.
    pub one_process: bool,
}

impl NodeCommand {
    /// Arguments behind the program's name.
    pub fn arguments(&self) -> Vec<String> {
        let mut all: Vec<String> = vec!["launch".into(), "node".into()];
        let mut option = |name: &str, value: String| all.extend([name.to_owned(), value]);
        option("--run", self.run.display().to_string());
        option("--config", self.config.display().to_string());
        for plugin in &self.plugins {
            option("--plugin", plugin.display().to_string());
        }
        option("--nodes", self.nodes.to_string());
        option("--gpus-per-node", self.gpus_per_node.to_string());
        option("--cores-per-node", self.cores_per_node.to_string());
        if self.ranks_per_node > 0 {
            option("--ranks-per-node", self.ranks_per_node.to_string());
        }
        option("--port", self.ports.controller.to_string());
        option("--redis-port", self.ports.redis.to_string());
        option("--rdzv-port", self.ports.first.to_string());
        option("--save-wait", self.save_wait_s.to_string());
        if self.one_process {
            all.push("--one-process".into());
        }
        all
    }
}
