//! Against real servers, each test with its own.

use std::net::TcpListener;
use std::path::Path;

use super::*;

mod broker;
mod connect;
mod faults;
mod interop;
mod store;

/// A port that was free a moment ago.
pub(super) fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

/// Whether the test can have a server; says so when it cannot.
pub(super) fn has_redis() -> bool {
    let found = std::process::Command::new("redis-server").arg("--version").output().is_ok_and(|o| o.status.success());
    if !found {
        eprintln!("skipped: there is no `redis-server`");
    }
    found
}

/// A server in `dir`, on the port of a former one when it is to take its place.
pub(super) fn server(
    dir: &Path,
    port: Option<u16>,
    password: Option<&str>,
    maxmemory_bytes: Option<u64>,
) -> RedisServer {
    let options = ServerOptions { maxmemory_bytes, next_ports: port.is_none(), ..ServerOptions::default() };
    RedisServer::start(dir, port.unwrap_or_else(free_port), password, &options).unwrap_or_else(|e| panic!("{e}"))
}

/// Limits that let a test of a lasting trouble end soon.
pub(super) fn soon() -> RedisLimits {
    RedisLimits { connect_ms_max: 5000, reply_ms_max: 20_000, away_ms_max: 20_000, full_ms_max: 200 }
}
