//! Which node this is, and where the others are.

use std::net::ToSocketAddrs;
use std::time::{Duration, Instant};

use crate::error::{LaunchError, Result};

/// Set by our Kubernetes manifests: the names of the pods, with `{}` for the index.
pub const SERVICE_VARIABLE: &str = "COSMOS_NODE_NAMES";

/// This node among the nodes of the run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Whereabouts {
    /// This node, from 0.
    pub index: usize,
    /// A host name or IP address of every node, in order.
    pub addresses: Vec<String>,
}

/// Splits `--node-ip-list`: addresses separated by `;` (as in the original), commas or blanks.
pub fn addresses(list: &str) -> Vec<String> {
    list.split([';', ',', ' ', '\n']).map(str::trim).filter(|part| !part.is_empty()).map(str::to_owned).collect()
}

impl Whereabouts {
    /// From the arguments, else from what Slurm, Lepton or Kubernetes put into the environment; a run on one node needs
    /// neither.
    pub fn find(
        nodes: usize,
        worker_idx: Option<usize>,
        node_ip_list: Option<&str>,
        environment: &dyn Fn(&str) -> Option<String>,
    ) -> Result<Self> {
        let set = |name: &str| environment(name).filter(|value| !value.is_empty());
        let number = |name: &str| -> Result<Option<usize>> {
            let Some(text) = set(name) else { return Ok(None) };
            text.parse()
                .map(Some)
                .map_err(|_| LaunchError::usage(format!("{name} is `{text}`, which is no number"), ""))
        };
        let (from, found, names) = if let Some(index) = number("LEPTON_JOB_WORKER_INDEX")? {
            ("LEPTON_JOB_WORKER_INDEX", Some(index), lepton_names(nodes, &set))
        } else if let (Some(index), Some(pattern)) = (number("JOB_COMPLETION_INDEX")?, set(SERVICE_VARIABLE)) {
            let names = (0..nodes).map(|node| pattern.replace("{}", &node.to_string())).collect();
            ("JOB_COMPLETION_INDEX", Some(index), Some(names))
        } else {
            ("SLURM_NODEID", number("SLURM_NODEID")?, None)
        };
        let given = node_ip_list.map(addresses);
        let addresses = match given.or(names) {
            Some(addresses) => addresses,
            None if nodes == 1 => vec!["127.0.0.1".into()],
            None => {
                return Err(LaunchError::usage(
                    format!("the run has {nodes} nodes, and nothing says where they are"),
                    "give `--node-ip-list \"ADDRESS;ADDRESS…\"` and `--worker-idx N` on every node, or start it by `launch slurm`, `lepton` or `kubernetes`",
                ));
            }
        };
        if addresses.len() != nodes {
            return Err(LaunchError::usage(
                format!("{} node addresses are given, and the run has {nodes} nodes", addresses.len()),
                "`cosmos-host launch plan` shows the nodes; give as many addresses",
            ));
        }
        for (index, address) in addresses.iter().enumerate() {
            if addresses[..index].contains(address) && nodes > 1 {
                return Err(LaunchError::usage(format!("the node address `{address}` is given twice"), ""));
            }
        }
        let index = worker_idx.or(found).or((nodes == 1).then_some(0)).ok_or_else(|| {
            LaunchError::usage(
                format!("the run has {nodes} nodes, and nothing says which this is"),
                "give `--worker-idx N`, 0 for the first address",
            )
        })?;
        if index >= nodes {
            let source = if worker_idx.is_some() { "--worker-idx" } else { from };
            return Err(LaunchError::usage(
                format!("{source} is {index}, and the run has nodes 0 to {}", nodes - 1),
                "start as many workers as `cosmos-host launch plan` says",
            ));
        }
        Ok(Self { index, addresses })
    }

    /// Waits until every node's name can be resolved; in a scheduler they appear as their workers start.
    pub fn wait_for_names(&self, patience: Duration) -> Result<()> {
        let until = Instant::now() + patience;
        let mut missing: Vec<usize> = (0..self.addresses.len()).collect();
        loop {
            // The port plays no role; resolving needs one.
            missing.retain(|node| (self.addresses[*node].as_str(), 1u16).to_socket_addrs().is_err());
            if missing.is_empty() {
                return Ok(());
            }
            if Instant::now() >= until {
                let names: Vec<String> =
                    missing.iter().map(|node| format!("worker {node} (`{}`)", self.addresses[*node])).collect();
                return Err(LaunchError::Waited {
                    whom: format!("{} to have an address", names.join(", ")),
                    waited_s: patience.as_secs(),
                    hint: "see whether these workers were started, and whether the job allows them to reach each other"
                        .into(),
                });
            }
            std::thread::sleep(Duration::from_millis(500).min(until.saturating_duration_since(Instant::now())));
        }
    }

    /// The first node's address, as it stands in a URL.
    pub fn first_host(&self) -> String {
        self.host_of(0)
    }

    /// A node's address, as it stands before a port.
    pub fn host_of(&self, node: usize) -> String {
        let host = self.addresses.get(node).map(String::as_str).unwrap_or("127.0.0.1");
        // A bare IPv6 address is full of colons.
        if host.contains(':') && !host.starts_with('[') { format!("[{host}]") } else { host.into() }
    }
}

/// `<prefix>-<index>.<subdomain>`, as Lepton names the workers of a job.
fn lepton_names(nodes: usize, set: &dyn Fn(&str) -> Option<String>) -> Option<Vec<String>> {
    let prefix = set("LEPTON_JOB_SERVICE_PREFIX").or_else(|| set("LEPTON_JOB_NAME"))?;
    let subdomain = set("LEPTON_SUBDOMAIN")?;
    Some((0..nodes).map(|node| format!("{prefix}-{node}.{subdomain}")).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn find(
        nodes: usize,
        idx: Option<usize>,
        list: Option<&str>,
        env: &[(&str, &str)],
    ) -> std::result::Result<Whereabouts, String> {
        let lookup = |name: &str| env.iter().find(|(n, _)| *n == name).map(|(_, v)| (*v).to_owned());
        Whereabouts::find(nodes, idx, list, &lookup).map_err(|e| e.to_string())
    }

    #[test]
    fn arguments_win_over_the_environment() {
        let found = find(2, Some(1), Some("10.0.0.1;10.0.0.2"), &[("SLURM_NODEID", "0")]).unwrap();
        assert_eq!(found, Whereabouts { index: 1, addresses: vec!["10.0.0.1".into(), "10.0.0.2".into()] });
        assert_eq!(find(1, None, None, &[]).unwrap().addresses, ["127.0.0.1"]);
        assert_eq!(find(2, None, Some("a b"), &[("SLURM_NODEID", "1")]).unwrap().index, 1);
    }

    #[test]
    fn lepton_and_kubernetes_tell_their_workers() {
        let lepton = [("LEPTON_JOB_WORKER_INDEX", "1"), ("LEPTON_JOB_NAME", "job"), ("LEPTON_SUBDOMAIN", "sub.ns")];
        let found = find(2, None, None, &lepton).unwrap();
        assert_eq!((found.index, found.addresses[0].as_str()), (1, "job-0.sub.ns"));
        let prefixed = [lepton[0], lepton[1], lepton[2], ("LEPTON_JOB_SERVICE_PREFIX", "svc")];
        assert_eq!(find(2, None, None, &prefixed).unwrap().addresses[1], "svc-1.sub.ns");
        let pods = [("JOB_COMPLETION_INDEX", "0"), (SERVICE_VARIABLE, "job-{}.job")];
        assert_eq!(find(3, None, None, &pods).unwrap().addresses[2], "job-2.job");
    }

    #[test]
    fn what_does_not_add_up_is_refused() {
        assert!(find(2, None, None, &[]).unwrap_err().contains("nothing says where"));
        assert!(find(2, None, Some("a;b"), &[]).unwrap_err().contains("which this is"));
        assert!(find(2, Some(0), Some("a;b;c"), &[]).unwrap_err().contains("3 node addresses"));
        assert!(find(2, Some(2), Some("a;b"), &[]).unwrap_err().contains("--worker-idx is 2"));
        assert!(find(2, Some(0), Some("a;a"), &[]).unwrap_err().contains("twice"));
        assert!(find(2, None, Some("a;b"), &[("SLURM_NODEID", "x")]).unwrap_err().contains("no number"));
    }

    #[test]
    fn whoever_does_not_appear_is_named() {
        let whereabouts =
            Whereabouts { index: 0, addresses: vec!["127.0.0.1".into(), "no-such-worker.invalid".into()] };
        let error = whereabouts.wait_for_names(Duration::from_millis(1)).unwrap_err().to_string();
        assert!(error.contains("worker 1 (`no-such-worker.invalid`)") && !error.contains("worker 0"), "{error}");
    }
}
