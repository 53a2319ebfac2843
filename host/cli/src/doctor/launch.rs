//! What a launch would stumble over: asked for by the options of `doctor`, so it may look at the network.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream, ToSocketAddrs};
use std::path::PathBuf;
use std::time::Duration;

use cosmos_broker::RedisAddress;
use cosmos_config::{Config, Resolved};
use cosmos_launch::Machine;
use cosmos_launch::placement::Placement;

use super::accelerator::lacks_device;
use super::files::program;
use super::{Finding, Status};
use crate::failure::Failure;

const CONNECT_WAIT_MAX: Duration = Duration::from_secs(3);

/// What is to be launched.
#[derive(Debug, Default)]
pub struct Launch {
    /// The config, if one was given.
    pub resolved: Option<Resolved>,
    /// Plugins.
    pub plugins: Vec<PathBuf>,
    /// A container's image.
    pub container: Option<String>,
    /// Where its processes go, or why they go nowhere.
    pub placement: Option<Result<Placement, Refusal>>,
    /// Everything in one process.
    pub one_process: bool,
    /// Which of the run's nodes this machine will be.
    pub node: usize,
}

/// Why a run cannot be placed, and the fix.
pub type Refusal = (String, String);

/// A failure to place a run, in a line.
pub fn why(failure: Failure) -> Refusal {
    let notice = failure.notices().first();
    let message = notice.map(|notice| notice.message.clone()).unwrap_or_default();
    let hint = notice.and_then(|notice| notice.hint.clone());
    (message, hint.unwrap_or_else(|| "`cosmos-host launch plan` with the same options".to_owned()))
}

/// Looks at it; nothing for a launch of nothing.
pub fn checks(launch: &Launch) -> Vec<Finding> {
    let mut found = Vec::new();
    if !launch.plugins.is_empty() {
        found.push(plugins(&launch.plugins, launch.resolved.as_ref()));
    }
    if let Some(image) = &launch.container {
        found.push(container(image));
    }
    if let Some(resolved) = &launch.resolved {
        if let Some((message, fix)) = lacks_device(&resolved.config.host.device) {
            found.push(Finding::new("device", "the launch of this run", Status::Problem, message).fix(fix));
        }
        if !launch.one_process {
            found.push(broker(&resolved.config.redis));
        }
        if let Some(placement) = &launch.placement {
            found.push(placed(launch, placement));
        }
        if let Some(Ok(placement)) = &launch.placement {
            found.push(ports(launch, &resolved.config, placement));
        }
    }
    found
}

/// `srun` beside `sbatch`: a script could be submitted without it, and would fail on the node.
pub fn srun() -> Finding {
    match (program("sbatch"), program("srun")) {
        (_, Some(path)) => Finding::new("srun", "jobs on a cluster", Status::Ok, path.display().to_string()),
        (Some(_), None) => {
            Finding::new("srun", "jobs on a cluster", Status::Problem, "sbatch is there, and srun is not")
                .fix("apt-get install slurm-client, or load the cluster's module for Slurm")
        }
        (None, None) => Finding::new("srun", "jobs on a cluster", Status::Missing, "srun is not in PATH")
            .fix("on a cluster's login node; on one machine: apt-get install slurm-wlm munge"),
    }
}

fn plugins(files: &[PathBuf], resolved: Option<&Resolved>) -> Finding {
    let needed_for = "the launch of this run";
    let missing: Vec<String> = files.iter().filter(|f| !f.is_file()).map(|f| f.display().to_string()).collect();
    let finding = if !missing.is_empty() {
        Finding::new("plugin_files", needed_for, Status::Problem, format!("not on this node: {}", missing.join(", ")))
            .fix("copy them to the same path on every node, or put them on a shared file system")
    } else if let Some(error) = resolved.and_then(|resolved| cosmos_run::prepare::check_plugins(resolved, files).err())
    {
        let fix = error.hint().unwrap_or_else(|| "`cosmos-host plugin inspect FILE` shows what it is".into());
        Finding::new("plugin_files", needed_for, Status::Problem, error.to_string()).fix(fix)
    } else {
        Finding::new("plugin_files", needed_for, Status::Ok, format!("{} there", files.len()))
    };
    finding.detail("missing", missing)
}

fn container(image: &str) -> Finding {
    let needed_for = "the launch of this run";
    let finding = match cosmos_launch::slurm::check_image(image) {
        Ok(()) => Finding::new("container", needed_for, Status::Ok, image.to_owned()),
        Err(error) => {
            let fix = error.hint().unwrap_or_default();
            Finding::new("container", needed_for, Status::Problem, error.to_string()).fix(fix)
        }
    };
    finding.detail("image", image)
}

fn broker(redis: &str) -> Finding {
    let needed_for = "the launch of this run in several processes";
    if !redis.contains("://") {
        return match program("redis-server") {
            Some(path) => {
                Finding::new("broker", needed_for, Status::Ok, format!("the launcher starts {}", path.display()))
            }
            None => Finding::new("broker", needed_for, Status::Problem, "no `redis` URL in the config, and no redis-server in PATH")
                .fix("apt-get install redis-server on the first node, set `redis = \"redis://…\"`, or launch with `--one-process`"),
        };
    }
    let address = match RedisAddress::parse(redis) {
        Ok(address) => address,
        Err(error) => {
            let fix =
                error.hint().map_or_else(|| "as in `redis://:password@host:6379/0`".to_owned(), |h| h.to_string());
            return Finding::new("broker", needed_for, Status::Problem, error.to_string()).fix(fix);
        }
    };
    // Shown without user and password.
    let shown = address.to_string();
    let reached = shown
        .to_socket_addrs()
        .map_err(|e| e.to_string())
        .and_then(|mut all| all.next().ok_or_else(|| "no address".to_owned()))
        .and_then(|at| TcpStream::connect_timeout(&at, CONNECT_WAIT_MAX).map_err(|e| e.to_string()))
        // Behind TLS it is not asked.
        .map(|stream| redis.starts_with("rediss") || answers_as_redis(stream).unwrap_or(false));
    match reached {
        Ok(false) => {
            let found = format!("{shown} takes connections, and does not answer as a Redis server does");
            Finding::new("broker", needed_for, Status::Problem, found)
                .fix("correct host and port of `redis` in the config, or leave it away: then the launcher starts one")
        }
        Ok(true) => Finding::new("broker", needed_for, Status::Ok, format!("{shown} answers")),
        Err(reason) => {
            Finding::new("broker", needed_for, Status::Problem, format!("{shown} cannot be reached: {reason}"))
                .fix("start that server, correct `redis` in the config, or leave it away: then the launcher starts one")
        }
    }
    .detail("address", shown)
}

/// Whether a run can be placed, and whether this node has the GPUs that it is given.
fn placed(launch: &Launch, placement: &Result<Placement, Refusal>) -> Finding {
    let needed_for = "the launch of this run";
    let placement = match placement {
        Ok(placement) => placement,
        Err((message, hint)) => {
            return Finding::new("placement", needed_for, Status::Problem, message.clone()).fix(hint.clone());
        }
    };
    let wanted: usize = placement.on_node(launch.node).map(|(_, part)| part.devices.len()).sum();
    let visible = std::env::var("CUDA_VISIBLE_DEVICES").ok();
    let there = Machine::this(visible.as_deref()).gpus.len();
    let nodes = if placement.nodes == 1 { "node" } else { "nodes" };
    let finding = if launch.node >= placement.nodes {
        let found = format!("node {} does not exist: the run has {} {nodes}", launch.node, placement.nodes);
        Finding::new("placement", needed_for, Status::Problem, found)
            .fix("correct `--worker-idx` or `--nodes`; `cosmos-host launch plan` shows the nodes")
    } else if wanted > there {
        let found = format!("node {} needs {wanted} GPUs, and this machine has {there}", launch.node);
        Finding::new("placement", needed_for, Status::Missing, found).fix(
            "look again on a node of the job; or give `--gpus-per-node`, or lower the sizes in the parallelism tables",
        )
    } else {
        let found = format!(
            "{} {nodes}, {} processes on node {}",
            placement.nodes,
            placement.on_node(launch.node).count(),
            launch.node
        );
        Finding::new("placement", needed_for, Status::Ok, found)
    };
    finding.detail("nodes", placement.nodes).detail("gpus_wanted", wanted).detail("gpus", there)
}

/// A port that the launch will listen on here, and where its number comes from.
struct Port {
    number: u16,
    from: String,
    /// Whether a Redis server that is there already is joined.
    joins: bool,
}

/// The ports of this node, as the placement and the config say.
fn wanted_ports(launch: &Launch, config: &Config, placement: &Placement) -> Vec<Port> {
    let mut wanted = Vec::new();
    let mut want = |number: u16, from: &str, joins: bool| {
        if number != 0 && wanted.iter().all(|port: &Port| port.number != number) {
            wanted.push(Port { number, from: from.to_owned(), joins });
        }
    };
    if launch.node == 0 && !launch.one_process {
        want(placement.ports.controller, "--port", false);
        let own = config.host.control_address.rsplit_once(':').and_then(|(_, port)| port.parse().ok());
        want(own.unwrap_or(0), "host.control_address", false);
        if !config.redis.contains("://") {
            want(placement.ports.redis, "--redis-port", false);
            want(config.redis.parse().unwrap_or(0), "redis", true);
        }
    }
    for (replica, part) in placement.on_node(launch.node) {
        if replica.parts.len() > 1 && replica.place_of(part) == 0 {
            want(replica.rendezvous.port, &format!("--rdzv-port, for {}", replica.name), false);
        }
    }
    wanted
}

fn ports(launch: &Launch, config: &Config, placement: &Placement) -> Finding {
    let needed_for = "this node of a launched run";
    let wanted = wanted_ports(launch, config, placement);
    let is_free = |port: &Port| TcpListener::bind((Ipv4Addr::UNSPECIFIED, port.number)).is_ok();
    let taken = wanted.iter().filter(|port| !is_free(port) && (!port.joins || !is_redis(port.number)));
    let taken: Vec<String> = taken.map(|port| format!("{} ({})", port.number, port.from)).collect();
    let numbers: Vec<u16> = wanted.iter().map(|port| port.number).collect();
    let finding = if taken.is_empty() {
        let shown: Vec<String> = numbers.iter().map(u16::to_string).collect();
        let found = if shown.is_empty() { "none needed".to_owned() } else { format!("{} free", shown.join(", ")) };
        Finding::new("ports", needed_for, Status::Ok, found)
    } else {
        Finding::new("ports", needed_for, Status::Problem, format!("in use: {}", taken.join(", ")))
            .fix("choose others by these options or keys, or end what uses them: ss -ltnp")
    };
    finding.detail("ports", numbers)
}

/// Whether a Redis server listens on a port of this machine.
fn is_redis(port: u16) -> bool {
    let address = (Ipv4Addr::LOCALHOST, port).into();
    TcpStream::connect_timeout(&address, CONNECT_WAIT_MAX).and_then(answers_as_redis).unwrap_or(false)
}

/// Whether a Redis server is at the other end.
fn answers_as_redis(mut stream: TcpStream) -> std::io::Result<bool> {
    stream.set_read_timeout(Some(CONNECT_WAIT_MAX))?;
    stream.set_write_timeout(Some(CONNECT_WAIT_MAX))?;
    stream.write_all(b"PING\r\n")?;
    let mut answer = [0; 5];
    stream.read_exact(&mut answer)?;
    // One with a password says so.
    Ok(answer == *b"+PONG" || answer == *b"-NOAU")
}

#[cfg(test)]
mod tests {
    use cosmos_launch::placement::{Demand, Ports, Role, Space, place};

    use super::*;

    fn finding(launch: &Launch, id: &str) -> Finding {
        checks(launch).into_iter().find(|f| f.id == id).expect("the check was made")
    }

    fn config(redis: &str) -> Option<Resolved> {
        let text = format!("redis = \"{redis}\"\n[train]\n");
        Some(cosmos_config::ConfigFile::parse("run.toml", &text).unwrap().resolve("now").unwrap())
    }

    #[test]
    fn what_is_not_there_is_named_with_its_fix() {
        let launch = Launch {
            plugins: vec!["/no/such.wasm".into()],
            container: Some("/no/such.sqsh".into()),
            // Port 1 of this machine: nothing listens there.
            resolved: config("redis://user:hidden@127.0.0.1:1/0"),
            ..Launch::default()
        };
        for (id, needle) in
            [("plugin_files", "/no/such.wasm"), ("container", "/no/such.sqsh"), ("broker", "127.0.0.1:1 cannot")]
        {
            let found = finding(&launch, id);
            assert!(
                found.status == Status::Problem && found.fix.is_some() && found.found.contains(needle),
                "{found:?}"
            );
            assert!(!format!("{found:?}").contains("hidden"));
        }
        assert!(checks(&Launch::default()).is_empty());
    }

    #[test]
    fn a_port_in_use_is_seen() {
        let listening = || TcpListener::bind((Ipv4Addr::UNSPECIFIED, 0)).unwrap();
        let (controller, redis, meeting) = (listening(), listening(), listening());
        let number = |listener: &TcpListener| listener.local_addr().unwrap().port();
        let ports = Ports { controller: number(&controller), redis: number(&redis), first: number(&meeting) };
        let space = Space { gpus_per_node: 0, cores_per_node: 0, ranks_per_node: 2, nodes: Some(2), ports };
        let placement = |space: &Space| {
            place(&[Demand::new(Role::Policy, 1, 4)], space).map_err(|e| (e.to_string(), String::new()))
        };
        let launch =
            |node| Launch { resolved: config(""), placement: Some(placement(&space)), node, ..Launch::default() };
        let found = finding(&launch(0), "ports");
        let expected = format!(
            "in use: {} (--port), {} (--redis-port), {} (--rdzv-port, for policy-0)",
            ports.controller, ports.redis, ports.first
        );
        assert_eq!((found.status, found.found), (Status::Problem, expected));
        // The second node listens on none of them.
        assert_eq!(finding(&launch(1), "ports").found, "none needed");
        assert_eq!(finding(&launch(1), "placement").found, "2 nodes, 1 processes on node 1");
        assert!(finding(&launch(2), "placement").found.contains("node 2 does not exist"));
        let refused = placement(&Space { ranks_per_node: 3, ports: Ports { first: 65535, ..ports }, ..space });
        let launch = Launch { resolved: config(""), placement: Some(refused), ..Launch::default() };
        assert_eq!(finding(&launch, "placement").status, Status::Problem);
    }

    #[test]
    fn a_server_that_answers_is_reached() {
        for (answer, status) in [("+PONG\r\n", Status::Ok), ("-NOAUTH", Status::Ok), ("HTTP/1.1 400", Status::Problem)]
        {
            let server = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
            let url = format!("redis://127.0.0.1:{}/0", server.local_addr().unwrap().port());
            let answering = std::thread::spawn(move || {
                let mut stream = server.accept().unwrap().0;
                stream.read_exact(&mut [0; 6]).and_then(|()| stream.write_all(answer.as_bytes()))
            });
            let launch = Launch { resolved: config(&url), ..Launch::default() };
            let found = finding(&launch, "broker");
            assert_eq!(found.status, status, "{found:?}");
            answering.join().unwrap().unwrap();
        }
    }
}
