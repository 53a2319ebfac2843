//! Files and the network, as guests with WASI's imports try to reach them.

use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use cosmos_plugin::{Capabilities, Grant, Reward};

use crate::guests::{Bench, outcomes, quick, sockets_component};

/// Errors of WASI preview 1.
const BAD_FILE: f64 = 8.0;

/// A granted folder with `inside.txt` and a folder, and beside it `secret.txt`, to which links in the folder lead.
fn place() -> (tempfile::TempDir, PathBuf) {
    let outer = tempfile::tempdir().unwrap();
    let granted = outer.path().join("granted");
    std::fs::create_dir_all(granted.join("sub")).unwrap();
    std::fs::write(granted.join("inside.txt"), "12345").unwrap();
    std::fs::write(outer.path().join("secret.txt"), "secret").unwrap();
    symlink("../secret.txt", granted.join("relative_link")).unwrap();
    symlink(outer.path().join("secret.txt"), granted.join("absolute_link")).unwrap();
    symlink("..", granted.join("folder_link")).unwrap();
    symlink("inside.txt", granted.join("good_link")).unwrap();
    (outer, granted)
}

fn read_only(path: &Path) -> Grant {
    format!("dir:{}:ro", path.display()).parse().unwrap()
}

fn reward(grants: &[Grant]) -> Reward {
    Bench::new().load_with("folder", grants, quick()).unwrap().reward("r", "").unwrap()
}

fn one(reward: &mut Reward, completion: &str) -> f64 {
    outcomes(reward, &[completion])[0].clone().unwrap_or_else(|reason| panic!("{completion}: {reason}"))
}

#[test]
fn nothing_is_there_without_a_grant() {
    let mut reward = reward(&[]);
    for path in ["inside.txt", "/etc/passwd", "../../../../../../etc/passwd", ".", "/", "", "/proc/self/environ"] {
        for what in ["r", "w", "u", "m"] {
            assert_eq!(one(&mut reward, &format!("{what}{path}")), BAD_FILE, "{what} {path}");
        }
    }
}

#[test]
fn a_granted_folder_has_no_way_out() {
    let (outer, granted) = place();
    let mut reward = reward(&[read_only(&granted)]);
    assert_eq!(one(&mut reward, "rinside.txt"), 1005.0);
    assert_eq!(one(&mut reward, "rgood_link"), 1005.0);
    assert_eq!(one(&mut reward, "rsub/../inside.txt"), 1005.0);
    let absolute = outer.path().join("secret.txt");
    for path in [
        "../secret.txt",
        "sub/../../secret.txt",
        "./../secret.txt",
        "relative_link",
        "absolute_link",
        "folder_link/secret.txt",
        "sub/../folder_link/secret.txt",
        "/etc/passwd",
        absolute.to_str().unwrap(),
        "..",
        "../granted/../secret.txt",
        "..\\secret.txt",
        "relative_link\0",
        "/proc/self/environ",
    ] {
        let score = one(&mut reward, &format!("r{path}"));
        assert!(score < 1000.0, "`{path}` was read: {score}");
    }
}

#[test]
fn a_granted_folder_cannot_be_changed() {
    let (outer, granted) = place();
    let mut reward = reward(&[read_only(&granted)]);
    for change in [
        "winside.txt",
        "wnew.txt",
        "w../new.txt",
        "wrelative_link",
        "uinside.txt",
        "u../secret.txt",
        "mnew",
        "m../new",
        "lnew_link",
        "dinside.txt",
    ] {
        let score = one(&mut reward, change);
        assert!(score < 1000.0, "`{change}` worked: {score}");
    }
    let names = |folder: &Path| {
        let mut names: Vec<_> =
            std::fs::read_dir(folder).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    };
    assert_eq!(names(outer.path()), ["granted", "secret.txt"]);
    assert_eq!(names(&granted), ["absolute_link", "folder_link", "good_link", "inside.txt", "relative_link", "sub"]);
    assert_eq!(std::fs::read_to_string(granted.join("inside.txt")).unwrap(), "12345");
    assert_eq!(std::fs::read_to_string(outer.path().join("secret.txt")).unwrap(), "secret");
}

/// A listener whose port can be written as two bytes of text.
fn listener() -> TcpListener {
    let ports = (0x20..0x7f).flat_map(|high: u16| (0x20..0x7f).map(move |low| high << 8 | low));
    let free = ports.rev().find_map(|port| TcpListener::bind(SocketAddr::from((Ipv4Addr::LOCALHOST, port))).ok());
    free.expect("a free port")
}

#[test]
fn no_socket_is_opened_and_no_name_is_looked_up() {
    let bench = Bench::new();
    let path = bench.file("sockets", &sockets_component());
    let grants = [Grant::Log, Grant::Table, Grant::ChatTemplate, read_only(bench.folder.path())];
    // Nothing that can be granted helps.
    for grants in [&[][..], &grants] {
        let plugin = bench.host.load(&path, grants, quick(), Capabilities::default()).unwrap();
        let mut reward = plugin.reward("r", "").unwrap();
        let listener = listener();
        listener.set_nonblocking(true).unwrap();
        let port = listener.local_addr().unwrap().port().to_le_bytes();
        let connect = format!("c{}{}", char::from(port[0]), char::from(port[1]));
        for (what, completion) in [("connect", connect.as_str()), ("bind", "b  "), ("udp", "u  "), ("name", "n  ")] {
            let score = one(&mut reward, completion);
            // `access-denied`, when the socket is made or when it is used; `permanent-resolver-failure` for the name.
            let denied = if what == "name" { [220.0, 201.0] } else { [101.0, 201.0] };
            assert!(denied.contains(&score), "{what}: {score}");
        }
        assert!(listener.accept().is_err(), "a guest has connected");
    }
}
