use super::*;
use crate::placement::{Demand, Ports, Role, Space, place};

fn placement(replicas: usize) -> Placement {
    let space = Space { gpus_per_node: 8, cores_per_node: 0, ranks_per_node: 0, nodes: None, ports: Ports::default() };
    place(&[Demand::new(Role::Policy, replicas, 8)], &space).unwrap()
}

fn command(nodes: usize) -> NodeCommand {
    NodeCommand {
        config: CONFIG_INSIDE.into(),
        plugins: vec!["/opt/my plugin.wasm".into()],
        run: "/mnt/runs/a".into(),
        nodes,
        gpus_per_node: 8,
        cores_per_node: 0,
        ranks_per_node: 0,
        ports: Ports::default(),
        save_wait_s: 300,
        one_process: false,
    }
}

fn options() -> Options {
    Options {
        job_name: "distil".into(),
        container_image: Some("registry/image:1".into()),
        resource_shape: Some("gpu.8xh100-80gb".into()),
        secrets: vec!["COSMOS_CONTROL_TOKEN=run-token".into()],
        ..Options::default()
    }
}

fn made(options: &Options, reference: Option<&Value>) -> std::result::Result<Value, String> {
    specification(options, &placement(2), &command(2), "[train]\nx = 'a'\n", reference).map_err(|e| e.to_string())
}

#[test]
fn secrets_stand_by_name_and_the_command_carries_the_config() {
    let options = Options {
        envs: vec!["A=b=c".into()],
        mounts: vec!["/runs:/mnt/runs:node-nfs:nfs".into()],
        node_groups: vec!["ng-1".into()],
        queue_priority: Some(9),
        container_ports: vec!["8082".into()],
        ..options()
    };
    let job = made(&options, None).unwrap();
    let spec = &job["spec"];
    assert_eq!((&spec["completions"], &spec["parallelism"]), (&json!(2), &json!(2)));
    assert_eq!(spec["envs"][0], json!({"name": "A", "value": "b=c"}));
    assert_eq!(spec["envs"][1]["value_from"]["secret_name_ref"], "run-token");
    assert_eq!(spec["mounts"][0], json!({"path": "/runs", "mount_path": "/mnt/runs", "from": "node-nfs:nfs"}));
    assert_eq!(spec["queue_config"]["priority_class"], "high-9000");
    let script = spec["container"]["command"][2].as_str().unwrap();
    assert!(
        script.contains("[train]\nx = 'a'\nCOSMOS_CONFIG_END\nexec cosmos-host launch node --run /mnt/runs/a"),
        "{script}"
    );
    assert!(script.contains("--plugin '/opt/my plugin.wasm'"), "{script}");
}

#[test]
fn a_reference_job_gives_what_the_arguments_leave_open() {
    let reference = json!({
        "metadata": {"id": "old", "created_at": 1, "visibility": "private"},
        "spec": {"resource_shape": "gpu.a10", "shared_memory_size": 100, "envs": [{"name": "KEEP", "value": "1"}, {"name": "A", "value": "old"}]},
        "status": {"state": "Running"}
    });
    let options = Options { envs: vec!["A=new".into()], ..options() };
    let job = made(&options, Some(&reference)).unwrap();
    assert!(job.get("status").is_none() && job["metadata"].get("created_at").is_none());
    assert_eq!((&job["metadata"]["id"], &job["metadata"]["visibility"]), (&json!("distil"), &json!("private")));
    assert_eq!(
        (&job["spec"]["resource_shape"], &job["spec"]["shared_memory_size"]),
        (&json!("gpu.8xh100-80gb"), &json!(100))
    );
    assert_eq!(job["spec"]["envs"][0]["name"], "KEEP");
    assert_eq!(job["spec"]["envs"][1], json!({"name": "A", "value": "new"}));
}

#[test]
fn what_lepton_would_refuse_is_refused_here() {
    for (options, needle) in [
        (Options { job_name: "Distil_1".into(), ..options() }, "no name of a Lepton job"),
        (Options { secrets: vec![], ..options() }, "share no token"),
        (Options { envs: vec!["COSMOS_CONTROL_TOKEN=x".into()], ..options() }, "everybody in the workspace"),
        (Options { envs: vec!["A".into()], ..options() }, "has no value"),
        (Options { queue_priority: Some(3), ..options() }, "needs a dedicated node group"),
        (Options { queue_priority: Some(10), node_groups: vec!["x".into()], ..options() }, "not 1 to 9"),
        (Options { mounts: vec!["/a:b".into()], ..options() }, "is no mount"),
        (Options { container_ports: vec!["0".into()], ..options() }, "is no port"),
        (Options { container_image: None, ..options() }, "has no image"),
        (Options { resource_shape: None, ..options() }, "no resource shape"),
    ] {
        let error = made(&options, None).unwrap_err();
        assert!(error.contains(needle), "{error}");
    }
    assert!(made(&options(), Some(&json!([]))).unwrap_err().contains("no JSON object"));
    assert!(made(&options(), Some(&json!({"spec": {"container": 1}}))).unwrap_err().contains("spec.container"));
}

#[test]
fn shapes_tell_their_devices() {
    for (shape, gpus) in [
        ("gpu.8xh100-80gb", Some(8)),
        ("gpu.a10", Some(1)),
        ("cpu.small", Some(0)),
        ("big", None),
        ("gpu.99xh100", None),
    ] {
        assert_eq!(gpus_of_shape(shape), gpus, "{shape}");
    }
}

fn answered(status: u16, body: &'static str) -> (Result<String>, String) {
    let server = tiny_http::Server::http("127.0.0.1:0").unwrap();
    let url = format!("http://{}/api/v2/workspaces/w", server.server_addr());
    let listener = std::thread::spawn(move || {
        let mut request = server.recv().unwrap();
        let mut sent = format!("{} {}\n", request.method(), request.url());
        for header in request.headers() {
            sent.push_str(&format!("{}: {}\n", header.field.as_str().as_str().to_ascii_lowercase(), header.value));
        }
        request.as_reader().read_to_string(&mut sent).unwrap();
        request.respond(tiny_http::Response::from_string(body).with_status_code(status)).unwrap();
        sent
    });
    let environment = |name: &str| match name {
        URL_VARIABLE => Some(url.clone()),
        TOKEN_VARIABLE => Some("secret-of-the-user".into()),
        _ => None,
    };
    let workspace = Workspace::from_environment(&environment).unwrap();
    assert!(!format!("{workspace:?}").contains("secret-of-the-user"));
    let answer = submit(&workspace, &json!({"metadata": {"id": "distil"}}));
    (answer, listener.join().unwrap())
}

#[test]
fn a_job_is_posted_with_the_token() {
    let (id, sent) = answered(200, r#"{"metadata": {"id": "distil-1"}}"#);
    assert_eq!(id.unwrap(), "distil-1");
    assert!(sent.starts_with("POST /api/v2/workspaces/w/jobs\n"), "{sent}");
    assert!(
        sent.contains("authorization: Bearer secret-of-the-user\n")
            && sent.ends_with(r#"{"metadata":{"id":"distil"}}"#),
        "{sent}"
    );
}

#[test]
fn a_refusal_is_told_with_its_fix_and_without_the_token() {
    let (answer, _) = answered(401, "who are you");
    let error = answer.unwrap_err();
    assert!(
        error.to_string().contains("status 401: who are you") && error.hint().unwrap().contains(TOKEN_VARIABLE),
        "{error}"
    );
    assert!(!error.to_string().contains("secret-of-the-user"));
    assert!(answered(200, "<html>").0.unwrap_err().to_string().contains("no JSON"));
    assert!(answered(200, "{}").0.unwrap_err().to_string().contains("no id"));
    let plain = |name: &str| Some(if name == URL_VARIABLE { "http://example.org".into() } else { "t".to_owned() });
    assert!(Workspace::from_environment(&plain).unwrap_err().to_string().contains("https only"));
    assert!(Workspace::from_environment(&|_| None).unwrap_err().to_string().contains("is not set"));
}
