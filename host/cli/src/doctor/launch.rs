//! What a launch would stumble over: asked for by the options of `doctor`, so it may look at the network.

use std::net::{Ipv4Addr, TcpListener, TcpStream, ToSocketAddrs};
use std::path::PathBuf;
use std::time::Duration;

use cosmos_broker::RedisAddress;
use cosmos_config::Resolved;
use cosmos_launch::placement::Ports;

use super::files::program;
use super::{Finding, Status};

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
}

/// Looks at it; nothing for a launch of nothing.
pub fn checks(launch: &Launch) -> Vec<Finding> {
    let mut found = Vec::new();
    if !launch.plugins.is_empty() {
        found.push(plugins(&launch.plugins));
    }
    if let Some(image) = &launch.container {
        found.push(container(image));
    }
    if let Some(resolved) = &launch.resolved {
        found.push(broker(&resolved.config.redis));
        found.push(ports(&resolved.config.redis));
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

fn plugins(files: &[PathBuf]) -> Finding {
    let needed_for = "the launch of this run";
    let missing: Vec<String> = files.iter().filter(|f| !f.is_file()).map(|f| f.display().to_string()).collect();
    let finding = if missing.is_empty() {
        Finding::new("plugin_files", needed_for, Status::Ok, format!("{} there", files.len()))
    } else {
        Finding::new("plugin_files", needed_for, Status::Problem, format!("not on this node: {}", missing.join(", ")))
            .fix("copy them to the same path on every node, or put them on a shared file system")
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
        .and_then(|at| TcpStream::connect_timeout(&at, CONNECT_WAIT_MAX).map_err(|e| e.to_string()));
    match reached {
        Ok(_) => Finding::new("broker", needed_for, Status::Ok, format!("{shown} answers")),
        Err(reason) => {
            Finding::new("broker", needed_for, Status::Problem, format!("{shown} cannot be reached: {reason}"))
                .fix("start that server, correct `redis` in the config, or leave it away: then the launcher starts one")
        }
    }
    .detail("address", shown)
}

fn ports(redis: &str) -> Finding {
    let needed_for = "the first node of a launched run";
    let Ports { controller, redis: own, .. } = Ports::default();
    let mut wanted = vec![("--port", controller)];
    if !redis.contains("://") {
        wanted.push(("--redis-port", redis.parse().unwrap_or(own)));
    }
    let taken: Vec<String> = wanted
        .iter()
        .filter(|(_, port)| TcpListener::bind((Ipv4Addr::UNSPECIFIED, *port)).is_err())
        .map(|(flag, port)| format!("{port} ({flag})"))
        .collect();
    let numbers: Vec<u16> = wanted.iter().map(|(_, port)| *port).collect();
    let finding = if taken.is_empty() {
        let shown: Vec<String> = numbers.iter().map(u16::to_string).collect();
        Finding::new("ports", needed_for, Status::Ok, format!("{} free", shown.join(" and ")))
    } else {
        Finding::new("ports", needed_for, Status::Problem, format!("in use: {}", taken.join(", ")))
            .fix("choose others by these options, or end what uses them: ss -ltnp")
    };
    finding.detail("ports", numbers)
}

#[cfg(test)]
mod tests {
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
        let taken = TcpListener::bind((Ipv4Addr::UNSPECIFIED, 0)).unwrap();
        let port = taken.local_addr().unwrap().port();
        let launch = Launch { resolved: config(&port.to_string()), ..Launch::default() };
        let found = finding(&launch, "ports");
        assert!(found.status == Status::Problem && found.found.contains(&port.to_string()), "{found:?}");
    }

    #[test]
    fn a_server_that_answers_is_reached() {
        let server = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let url = format!("redis://127.0.0.1:{}/0", server.local_addr().unwrap().port());
        let launch = Launch { resolved: config(&url), ..Launch::default() };
        assert_eq!(finding(&launch, "broker").status, Status::Ok);
    }
}
