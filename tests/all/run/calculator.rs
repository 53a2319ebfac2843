//! The calculator example: its component on every calculation and answer of GSM8K, and the run that comes with it.

use cosmos_plugin::{Action, Capabilities, ChatMessage, Environment, EpisodeStart, Grant, Limits, PluginHost, Turn};
use cosmos_testkit::{read_jsonl, repo_root, shared_data};

use super::{host, metrics, succeed};

fn environment() -> Environment {
    let host = PluginHost::new(None).unwrap();
    let path = repo_root().join("plugins/dist/calculator.wasm");
    // The component reads tables too; a conversation does not.
    let plugin = host.load(&path, &[Grant::Table], Limits::default(), Capabilities::default()).unwrap();
    assert_eq!(plugin.info().environments, ["calculator"]);
    plugin.environment("calculator", "").unwrap()
}

fn start(question: &str, reference: &str) -> EpisodeStart {
    let messages = vec![ChatMessage { role: "user".into(), content: question.into() }];
    EpisodeStart { messages, reference: Some(serde_json::Value::from(reference).to_string()), metadata: Vec::new() }
}

fn says(state: &[u8], completion: String) -> Action {
    Action { state: state.to_vec(), completion, turn: 0, complete: true }
}

fn call(expression: &str) -> String {
    let call = serde_json::json!({"name": "calculator", "arguments": {"expression": expression}});
    format!("Let me compute that.\n<tool_call>\n{call}\n</tool_call>")
}

fn steps(environment: &mut Environment, actions: &[Action]) -> Vec<Turn> {
    environment.step(actions).unwrap().into_iter().map(|turn| turn.unwrap()).collect()
}

#[test]
fn the_tool_agrees_with_every_calculation_of_gsm8k() {
    let Some(path) = shared_data("gsm8k_test.jsonl") else { return };
    let rows = read_jsonl(&path);
    let mut environment = environment();
    let text = |row: &serde_json::Value, key: &str| row[key].as_str().unwrap().to_string();
    let number = |row: &serde_json::Value| text(row, "answer").rsplit_once("#### ").unwrap().1.to_string();
    let starts: Vec<EpisodeStart> = rows.iter().map(|row| start(&text(row, "question"), &number(row))).collect();
    let opened: Vec<_> = environment.reset(&starts).unwrap().into_iter().map(|o| o.unwrap()).collect();
    assert!(opened.iter().all(|o| o.messages.len() == 2 && o.tools.is_some()));

    // The solution as it stands is a right answer; the number one higher is not.
    let solutions: Vec<Action> = rows.iter().zip(&opened).map(|(row, o)| says(&o.state, text(row, "answer"))).collect();
    let turns = steps(&mut environment, &solutions);
    assert!(turns.iter().all(|t| t.done && t.reward == 1.0));
    let wrong: Vec<Action> =
        rows.iter().zip(&opened).map(|(row, o)| says(&o.state, format!("{}1", text(row, "answer")))).collect();
    assert!(steps(&mut environment, &wrong).iter().all(|t| t.done && t.reward == 0.0));

    // Its annotations `<<48/2=24>>`, as tool calls.
    let mut wanted = Vec::new();
    for row in &rows {
        let answer = text(row, "answer");
        for note in answer.split("<<").skip(1).filter_map(|rest| rest.split(">>").next()) {
            if let Some((expression, result)) = note.rsplit_once('=') {
                wanted.push((expression.to_string(), result.to_string()));
            }
        }
    }
    assert!(wanted.len() > 4000, "{}", wanted.len());
    let calls: Vec<Action> = wanted.iter().map(|(expression, _)| says(&opened[0].state, call(expression))).collect();
    let mut odd = Vec::new();
    for (turn, (expression, result)) in steps(&mut environment, &calls).iter().zip(&wanted) {
        assert!(!turn.done && turn.messages.len() == 1 && turn.messages[0].role == "tool");
        let said = &turn.messages[0].content;
        let value = said.split_once("(about ").map_or(said.as_str(), |(_, about)| about.trim_end_matches(')'));
        let near = |a: f64, b: f64| (a - b).abs() <= 0.01 * b.abs().max(1.0);
        match (value.parse::<f64>(), result.parse::<f64>()) {
            (Ok(value), Ok(result)) if near(value, result) => {}
            _ => odd.push(format!("{expression} = {result}: {said}")),
        }
    }
    println!("{} of {} annotations differ: {odd:#?}", odd.len(), wanted.len());
    assert!(odd.len() * 100 < wanted.len(), "{odd:#?}");
}

#[test]
fn the_example_runs_on_a_laptop() {
    let dir = tempfile::tempdir().unwrap();
    let run = dir.path().join("run");
    let mut command = host();
    command.args(["run", "--config", "examples/plugins/calculator/run.toml"]);
    command.args(["--plugin", "plugins/dist/calculator.wasm", "--output-dir"]).arg(&run);
    for set in [
        "train.timestamp=1",
        "train.max_num_steps=2",
        "train.train_batch_per_replica=8",
        "rollout.max_response_length=48",
    ] {
        command.args(["--set", set]);
    }
    succeed(&mut command);
    let metrics = metrics(&run);
    for name in ["reward/calculator/calculator", "reward/calculator/turns", "rollout/turns_mean", "train/reward_mean"] {
        assert!(metrics[0][name].is_number(), "{name}: {:#}", metrics[0]);
    }
    let samples = std::fs::read_to_string(run.join("samples.jsonl")).unwrap();
    let sample: serde_json::Value = serde_json::from_str(samples.lines().next().unwrap()).unwrap();
    let prompt = sample["prompt"].as_str().unwrap();
    assert!(prompt.contains("\"calculator\"") && prompt.contains("<|im_start|>user"), "{prompt}");
    assert_eq!(sample["conversation"][0]["role"], "assistant");
}
