//! What a run of many GPUs asks of Redis and of the controller: `cargo run --release -p cosmos-controller --example scaling`.
//!
//! The controller's part is measured here: a run of that size is driven through the real state machine, its events and orders
//! are serialized, counted and timed. The rest follows from the sizes of the frames and from assumptions, each a flag
//! (`--name value`); `docs/scaling.md` explains them.

mod frames;

use std::collections::VecDeque;
use std::time::Instant;

use cosmos_controller::{Controller, Dispatch, Event, Order, Outcome, Plan, Role};

/// Assumptions, with their flags.
struct Inputs(Vec<(&'static str, f64, &'static str)>);

impl Inputs {
    fn from_arguments() -> Result<Self, String> {
        let mut inputs = Self(vec![
            ("gpus-per-policy", 8.0, "GPUs of a policy replica"),
            ("gpus-per-rollout", 1.0, "GPUs of a rollout replica"),
            ("gpus-per-teacher", 4.0, "GPUs of a teacher replica"),
            ("decode-tokens", 3000.0, "tokens a second that a GPU writes"),
            ("train-tokens", 6000.0, "tokens a second that a GPU trains on"),
            ("score-tokens", 10_000.0, "tokens a second that a GPU scores"),
            ("prompt-tokens", 200.0, "tokens of a prompt"),
            ("completion-tokens", 2000.0, "tokens of a completion"),
            ("n-generation", 8.0, "completions of a prompt"),
            ("train-batch", 128.0, "completions of a policy replica and step"),
            ("prompts-per-order", 16.0, "prompts of an order at most"),
            ("ahead", 1.0, "steps the rollouts work ahead"),
            ("id-bits", 18.0, "bits of a packed token id"),
            ("hidden", 5120.0, "width of the teacher"),
            ("redis-ops", 100_000.0, "commands a second of one Redis server"),
            ("redis-bytes", 1.0e9, "bytes a second of one Redis server, in and out"),
            ("fsync-us", 1000.0, "microseconds to make a ledger entry durable"),
            ("http-us", 50.0, "microseconds of one request beside the controller's own work"),
            ("heartbeat-s", 10.0, "seconds between two heartbeats of a replica"),
        ]);
        let mut arguments = std::env::args().skip(1);
        while let Some(flag) = arguments.next() {
            let known = inputs.0.iter_mut().find(|(name, ..)| flag.strip_prefix("--") == Some(name));
            let (_, value, _) = known.ok_or_else(|| format!("`{flag}` is no flag; see the list of assumptions"))?;
            let given = arguments.next().and_then(|text| text.parse().ok());
            *value = given.filter(|v: &f64| *v > 0.0).ok_or_else(|| format!("`{flag}` needs a positive number"))?;
        }
        Ok(inputs)
    }

    fn get(&self, name: &str) -> f64 {
        self.0.iter().find(|(known, ..)| *known == name).map_or(f64::NAN, |(_, value, _)| *value)
    }
}

/// How many replicas of each role a number of GPUs makes, so that no role waits for another for long.
struct Fleet {
    policies: u64,
    rollouts: u64,
    teachers: u64,
}

impl Fleet {
    fn of(gpus: f64, inputs: &Inputs) -> Self {
        let tokens = inputs.get("prompt-tokens") + inputs.get("completion-tokens");
        let seconds = [
            tokens / inputs.get("train-tokens"),
            inputs.get("completion-tokens") / inputs.get("decode-tokens"),
            tokens / inputs.get("score-tokens"),
        ];
        let count = |role: usize, name: &str| {
            let share = gpus * seconds[role] / seconds.iter().sum::<f64>();
            (share / inputs.get(name)).floor().max(1.0) as u64
        };
        Self {
            policies: count(0, "gpus-per-policy"),
            rollouts: count(1, "gpus-per-rollout"),
            teachers: count(2, "gpus-per-teacher"),
        }
    }
}

/// What was measured over a run of the state machine.
#[derive(Default)]
struct Control {
    steps: f64,
    messages: f64,
    bytes: f64,
    ledger: f64,
    apply_us: f64,
}

const STEPS: u64 = 20;

fn measure(fleet: &Fleet, inputs: &Inputs) -> Result<Control, String> {
    let n = inputs.get("n-generation") as u64;
    let group = inputs.get("train-batch") as u64 * fleet.policies;
    let ahead = inputs.get("ahead") as u64;
    let plan = Plan {
        dataset_len: (STEPS + 2) * group.div_ceil(n),
        epochs: 1,
        n_generation: n,
        train_batch: inputs.get("train-batch") as u64,
        policy_replicas: fleet.policies,
        steps_max: Some(STEPS),
        allowed_outdated_steps: ahead,
        steps_ahead_max: ahead,
        sync_weight_interval: 1,
        prompts_per_order_max: inputs.get("prompts-per-order") as u64,
        validation_freq: 10,
        validate_before: true,
        save_freq: 10,
        save_last: true,
    };
    let mut controller = Controller::new(plan);
    let mut control = Control { steps: STEPS as f64, ..Control::default() };
    let mut events = VecDeque::new();
    let roles = [(Role::Policy, fleet.policies), (Role::Rollout, fleet.rollouts), (Role::Teacher, fleet.teachers)];
    for (role, count) in roles {
        let address = (role == Role::Policy).then(|| "10.100.200.100:29500".to_string());
        let join = |i| Event::Joined { replica: format!("{role}-{i:04}"), role, holds: None, address: address.clone() };
        events.extend((0..count).map(join));
    }
    let mut seconds = 0.0;
    while let Some(event) = events.pop_front() {
        let started = Instant::now();
        let line = serde_json::to_string(&event).map_err(|e| e.to_string())?;
        let dispatches = controller.apply(event).map_err(|e| e.to_string())?;
        let answers: Result<Vec<String>, _> = dispatches.iter().map(serde_json::to_string).collect();
        seconds += started.elapsed().as_secs_f64();
        let answers = answers.map_err(|e| e.to_string())?;
        control.messages += 1.0 + answers.len() as f64;
        control.bytes += (line.len() + answers.iter().map(String::len).sum::<usize>()) as f64;
        control.ledger += 1.0;
        for Dispatch { replica, id, order } in dispatches {
            let outcome = match order {
                Order::Generate { prompts, .. } => {
                    Outcome::Generated { samples: prompts.iter().flat_map(|p| p * n..p * n + n).collect() }
                }
                Order::Train { .. } => Outcome::Trained,
                Order::Load { .. } => Outcome::Loaded,
                Order::Save { .. } => Outcome::Saved,
                Order::Validate { .. } => Outcome::Validated,
                Order::Leave | Order::Finish => {
                    events.push_back(Event::Removed { replica });
                    continue;
                }
            };
            events.push_back(Event::Done { replica, order: id, outcome });
        }
    }
    if controller.step() != STEPS {
        return Err(format!("the run made {} steps of {STEPS}", controller.step()));
    }
    control.apply_us = seconds * 1e6 / control.ledger;
    Ok(control)
}

/// Commands a second and bytes a second through Redis.
fn redis(samples_a_second: f64, mode: Mode, inputs: &Inputs) -> (f64, f64) {
    let (prompt, completion) = (inputs.get("prompt-tokens"), inputs.get("completion-tokens"));
    let id = inputs.get("id-bits") / 8.0;
    // A completion: ids and a log-prob each. A request: ids, and the candidates of each position. A result: log-probs of
    // them, or hidden states. Each sample has a request of its own, with its prompt.
    let stored = prompt * id + completion * (id + 2.0);
    let bits = inputs.get("id-bits");
    let (top_k, hidden) = match mode {
        Mode::Sampled => (0.0, 0.0),
        Mode::TopK(k) => (k, 0.0),
        Mode::Hidden => (0.0, inputs.get("hidden")),
    };
    let asked = prompt * id + completion * frames::request(bits, top_k);
    let answered = completion * frames::result(bits, top_k, hidden);
    let candidates = if let Mode::TopK(k) = mode { completion * k * (id + 2.0) } else { 0.0 };
    // Everything goes in once and out once.
    let bytes = 2.0 * (stored + candidates + asked + answered);
    // A completion and a result: put, get, remove. A request: add, read, acknowledge and delete.
    let commands = 10.0;
    (samples_a_second * commands, samples_a_second * bytes)
}

#[derive(Clone, Copy)]
enum Mode {
    Sampled,
    TopK(f64),
    Hidden,
}

fn main() -> Result<(), String> {
    let inputs = Inputs::from_arguments()?;
    println!("assumptions");
    inputs.0.iter().for_each(|(name, value, what)| println!("  --{name:<18} {value:>12}  {what}"));
    println!("\ncontroller (measured on this machine: state machine and JSON; assumed: fsync and HTTP)");
    println!(
        "| GPUs | policies | rollouts | teachers | samples/s | messages/s | bytes/message | kB/s | µs/event measured | busy | full at GPUs |"
    );
    println!("|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|");
    let sizes = [8.0, 64.0, 512.0, 4096.0];
    let mut rates = Vec::new();
    for gpus in sizes {
        let fleet = Fleet::of(gpus, &inputs);
        let control = measure(&fleet, &inputs)?;
        let rollout_gpus = fleet.rollouts as f64 * inputs.get("gpus-per-rollout");
        let samples_a_second = rollout_gpus * inputs.get("decode-tokens") / inputs.get("completion-tokens");
        let steps_a_second = samples_a_second / (inputs.get("train-batch") * fleet.policies as f64);
        let replicas = (fleet.policies + fleet.rollouts + fleet.teachers) as f64;
        let beats = replicas / inputs.get("heartbeat-s");
        let messages = control.messages / control.steps * steps_a_second + beats;
        let events = control.ledger / control.steps * steps_a_second;
        let bytes = control.bytes / control.steps * steps_a_second;
        let busy =
            events * (control.apply_us + inputs.get("fsync-us")) * 1e-6 + messages * inputs.get("http-us") * 1e-6;
        println!(
            "| {gpus} | {} | {} | {} | {samples_a_second:.1} | {messages:.2} | {:.0} | {:.1} | {:.1} | {:.2} % | {:.0} |",
            fleet.policies,
            fleet.rollouts,
            fleet.teachers,
            control.bytes / control.messages,
            bytes / 1e3,
            control.apply_us,
            100.0 * busy,
            gpus / busy,
        );
        rates.push((gpus, samples_a_second));
    }
    println!("\nRedis (frame sizes times rates)");
    println!("| GPUs | objective | commands/s | MB/s | servers wanted | full at GPUs, by |");
    println!("|--:|:--|--:|--:|--:|:--|");
    let modes = [("top_k = 0", Mode::Sampled), ("top_k = 64", Mode::TopK(64.0)), ("full vocabulary", Mode::Hidden)];
    for (gpus, samples_a_second) in rates {
        for (name, mode) in modes {
            let (commands, bytes) = redis(samples_a_second, mode, &inputs);
            let (by_commands, by_bytes) = (commands / inputs.get("redis-ops"), bytes / inputs.get("redis-bytes"));
            let load = by_commands.max(by_bytes);
            let by = if by_bytes > by_commands { "bytes" } else { "commands" };
            println!(
                "| {gpus} | {name} | {commands:.0} | {:.1} | {:.0} | {:.0}, {by} |",
                bytes / 1e6,
                load.ceil(),
                gpus / load
            );
        }
    }
    Ok(())
}
