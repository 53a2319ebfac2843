//! Addresses, servers that are refused, TLS.

use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use super::*;
use crate::BrokerError;

/// A server with a configuration of the test's own, which ends with the test.
struct Foreign(Child);

impl Drop for Foreign {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn foreign(dir: &Path, arguments: &[&str]) -> Foreign {
    let child = Command::new("redis-server")
        .args(["--save", "", "--dir"])
        .arg(dir)
        .args(arguments)
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    Foreign(child)
}

/// The first outcome that is not "there is nobody yet".
fn connected(url: &str) -> crate::Result<std::sync::Arc<RedisLink>> {
    RedisLink::connect(&RedisAddress::parse(url).unwrap(), soon())
}

#[test]
fn a_private_server_wants_its_password_and_shows_it_to_nobody() {
    if !has_redis() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let server = server(dir.path(), None, None, Some(64 << 20));
    let port = server.address().port();
    RedisLink::connect(server.address(), soon()).unwrap();
    let password = server.address().secret_url().split(['@', ':']).nth(2).unwrap().to_owned();
    assert_eq!(password.len(), 64);
    let command = std::fs::read_to_string(format!("/proc/{}/cmdline", server.process_id())).unwrap();
    assert!(!command.contains(&password), "{command}");
    for file in ["redis.conf", "redis.url"] {
        let mode =
            std::os::unix::fs::PermissionsExt::mode(&std::fs::metadata(dir.path().join(file)).unwrap().permissions());
        assert_eq!(mode & 0o777, 0o600, "{file}");
    }
    for url in [format!("redis://127.0.0.1:{port}"), format!("redis://:wrong@127.0.0.1:{port}")] {
        let error = connected(&url).err().unwrap();
        assert!(matches!(error, BrokerError::Refused { .. }), "{error}");
        assert!(!error.to_string().contains("wrong@"), "{error}");
    }
    // A role of the same run finds it by the folder.
    let (address, second) = open_or_start(&port.to_string(), dir.path(), &ServerOptions::default()).unwrap();
    assert!(second.is_none());
    assert_eq!(&address, server.address());
    // Somebody else's folder: the port is taken, so the next is.
    let other = tempfile::tempdir().unwrap();
    let (_, started) = open_or_start(&port.to_string(), other.path(), &ServerOptions::default()).unwrap();
    assert!(started.unwrap().address().port() > port);
    let taken = ServerOptions { next_ports: false, ..ServerOptions::default() };
    let error = RedisServer::start(other.path(), port, None, &taken).unwrap_err();
    assert!(error.to_string().contains("in use"), "{error}");
}

#[test]
fn a_server_whose_starter_has_died_is_taken_over_and_ended() {
    if !has_redis() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let server = server(dir.path(), None, None, None);
    let port = server.address().port().to_string();
    let error = RedisServer::start(dir.path(), free_port(), None, &ServerOptions::default()).unwrap_err();
    assert!(error.to_string().contains("another process has a server in that folder"), "{error}");
    assert!(RedisServer::take_over(dir.path()).unwrap().is_none(), "its starter lives");
    server.let_go();
    let (address, second) = open_or_start(&port, dir.path(), &ServerOptions::default()).unwrap();
    let second = second.unwrap();
    assert_eq!((&address, second.process_id()), (server.address(), server.process_id()));
    drop(second);
    assert!(connected(&address.secret_url()).is_err(), "it ends with its new owner");
}

#[test]
fn a_server_that_was_left_behind_ends_before_another_is_started() {
    if !has_redis() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    // What has a meaning in the server's configuration has none in a folder's name.
    let dir = dir.path().join("a \"b\" \\c\nport 1");
    let dir = dir.as_path();
    let old = server(dir, None, None, None);
    old.let_go();
    let new = server(dir, None, None, None);
    assert_ne!(new.process_id(), old.process_id());
    assert!(connected(&old.address().secret_url()).is_err(), "two would write the same files");
    connected(&new.address().secret_url()).unwrap();
}

#[test]
fn a_missing_program_says_how_to_install_it() {
    let dir = tempfile::tempdir().unwrap();
    let options = ServerOptions { binary: "redis-server-that-is-not-there".into(), ..ServerOptions::default() };
    let error = RedisServer::start(dir.path(), free_port(), None, &options).unwrap_err();
    assert!(error.hint().unwrap().contains("apt-get install redis-server"), "{error}");
}

#[test]
fn nobody_there_is_an_error_with_the_address_at_the_deadline() {
    let port = free_port();
    let limits = RedisLimits { connect_ms_max: 300, ..soon() };
    let begun = Instant::now();
    let error = RedisLink::connect(&RedisAddress::parse(&port.to_string()).unwrap(), limits).err().unwrap();
    assert!(begun.elapsed() < Duration::from_secs(10));
    assert!(error.to_string().starts_with(&format!("redis `127.0.0.1:{port}` did not answer")), "{error}");
}

#[test]
fn a_server_that_evicts_or_is_open_to_all_is_refused() {
    if !has_redis() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let cases: [(&[&str], &str, &str); 2] = [
        (&["--maxmemory-policy", "allkeys-lfu"], "`maxmemory-policy` is `allkeys-lfu`", "noeviction"),
        (&["--bind", "0.0.0.0", "--protected-mode", "no"], "listens beyond this machine", "requirepass"),
    ];
    for (arguments, reason, fix) in cases {
        let port = free_port().to_string();
        let _server = foreign(dir.path(), &[&["--port", &port], arguments].concat());
        let error = connected(&port).err().unwrap();
        assert!(error.to_string().contains(reason) && error.hint().unwrap().contains(fix), "{error}");
        assert!(matches!(error, BrokerError::Unfit { .. }));
    }
    // Upstream's port without a password on this machine only is joined.
    let port = free_port().to_string();
    let _server = foreign(dir.path(), &["--port", &port, "--bind", "127.0.0.1"]);
    connected(&port).unwrap();
    let (_, started) = open_or_start(&port, dir.path(), &ServerOptions::default()).unwrap();
    assert!(started.is_none());
    let far = RedisAddress::parse("redis://192.0.2.1:1").unwrap();
    assert!(!far.is_loopback() && !far.has_password());
}

#[test]
fn tls_with_a_private_authority() {
    if !has_redis() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let openssl = |arguments: &str| {
        let run = Command::new("openssl").args(arguments.split(' ')).current_dir(dir.path()).output();
        run.is_ok_and(|done| done.status.success())
    };
    std::fs::write(
        dir.path().join("leaf.ext"),
        "subjectAltName=IP:127.0.0.1,DNS:localhost\nbasicConstraints=CA:FALSE\n",
    )
    .unwrap();
    let made = openssl("req -x509 -newkey rsa:2048 -nodes -keyout ca.key -out ca.pem -days 2 -subj /CN=ours")
        && openssl("req -newkey rsa:2048 -nodes -keyout leaf.key -out leaf.csr -subj /CN=localhost")
        && openssl(
            "x509 -req -in leaf.csr -CA ca.pem -CAkey ca.key -CAcreateserial -out leaf.pem -days 2 -extfile leaf.ext",
        );
    if !made {
        eprintln!("skipped: there is no `openssl` to make certificates");
        return;
    }
    let port = free_port().to_string();
    let arguments = "--port 0 --tls-cert-file leaf.pem --tls-key-file leaf.key --tls-ca-cert-file ca.pem --tls-auth-clients no \
                     --requirepass secret --bind 127.0.0.1 --tls-port";
    let arguments: Vec<&str> = arguments.split_whitespace().chain([port.as_str()]).collect();
    let mut server = foreign(dir.path(), &arguments);
    std::thread::sleep(Duration::from_millis(300));
    if server.0.try_wait().unwrap().is_some() {
        eprintln!("skipped: this `redis-server` was built without TLS");
        return;
    }
    let ca = dir.path().join("ca.pem").display().to_string();
    connected(&format!("rediss://:secret@127.0.0.1:{port}/0?ca={ca}")).unwrap();
    connected(&format!("rediss://:secret@localhost:{port}/0?ca={ca}")).unwrap();
    // Nobody else vouches for it.
    let limits = RedisLimits { connect_ms_max: 500, ..soon() };
    let address = RedisAddress::parse(&format!("rediss://:secret@127.0.0.1:{port}/0")).unwrap();
    let error = RedisLink::connect(&address, limits).err().unwrap().to_string();
    assert!(error.contains("ertificate"), "{error}");
    let error = connected(&format!("rediss://:secret@127.0.0.1:{port}/0?ca=/not/there.pem")).err().unwrap().to_string();
    assert!(error.contains("`ca`: cannot read `/not/there.pem`"), "{error}");
}
