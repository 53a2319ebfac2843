//! Runs under a virtual clock and a network that loses, doubles, delays and reorders, with every role and the controller
//! killed and restarted, from a seed. `COSMOS_SIM_SEEDS=100000` runs longer, `COSMOS_SIM_SEED=17` one seed with its trace.

mod chance;
mod hostile;
mod mishaps;
mod process;
mod teachers;
mod world;

use chance::Chance;
use cosmos_controller::Plan;
use world::{Faults, Setup, World};

fn plan(chance: &mut Chance) -> Plan {
    let train_batch = 1 + chance.below(8);
    let allowed = [0, 0, 1, 2, 4][chance.below(5) as usize];
    Plan {
        dataset_len: 1 + chance.below(24),
        epochs: 1 + chance.below(3),
        n_generation: 1 + chance.below(10),
        train_batch,
        policy_replicas: 1 + chance.below(3),
        steps_max: chance.one_in(4).then(|| 1 + chance.below(8)),
        allowed_outdated_steps: allowed,
        steps_ahead_max: chance.below(allowed + 1),
        sync_weight_interval: if allowed == 0 { 1 } else { 1 + chance.below(allowed + 3) },
        prompts_per_order_max: 1 + chance.below(6),
        validation_freq: chance.below(4),
        validate_before: chance.one_in(2),
        save_freq: chance.below(5),
        save_last: chance.one_in(2),
    }
}

fn setup(seed: u64) -> Setup {
    let mut chance = Chance::new(seed);
    Setup {
        seed,
        plan: plan(&mut chance),
        rollouts: 1 + chance.below(4),
        teachers: chance.below(3),
        filtered_in: [0, 0, 3, 8][chance.below(4) as usize],
    }
}

/// One seed: the undisturbed run, then the disturbed one; both are checked, and compared where they must agree.
fn run(seed: u64, trace: bool) -> (Result<(), String>, Vec<String>) {
    let setup = setup(seed);
    let mut calm = World::new(setup.clone(), Faults::none(), trace);
    if let Err(error) = calm.run() {
        return (Err(format!("undisturbed: {error}")), calm.trace);
    }
    let mut wild = World::new(setup.clone(), Faults::some(&mut Chance::new(seed ^ 0xfa17)), trace);
    let result = wild.run().and_then(|()| {
        let same_group = !wild.group_changed;
        // Off-policy the weights depend on who was faster; but not where the rollouts wait for every step's weights and no
        // completion had to be written again with later ones.
        let in_turn = setup.plan.steps_ahead_max == 0 && setup.plan.sync_weight_interval == 1;
        let written_once = wild.store_kept && wild.rollbacks() == 0 && !wild.resumed;
        let must_agree = setup.plan.allowed_outdated_steps == 0 || (in_turn && written_once);
        if must_agree && same_group && calm.outcome != wild.outcome {
            return Err(format!("the weights differ: {:?} undisturbed, {:?} here", calm.outcome, wild.outcome));
        }
        wild.check_liveness(&calm)
    });
    (result, wild.trace)
}

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok()?.parse().ok()
}

#[test]
fn runs_survive_what_is_thrown_at_them() {
    let seeds = match number("COSMOS_SIM_SEED") {
        Some(seed) => seed..seed + 1,
        None => 0..number("COSMOS_SIM_SEEDS").unwrap_or(600),
    };
    for seed in seeds {
        if let (Err(error), _) = run(seed, false) {
            let (_, trace) = run(seed, true);
            trace.iter().for_each(|line| println!("{line}"));
            panic!("seed {seed}: {error}\n{:#?}", setup(seed));
        }
    }
}
