use std::collections::BTreeSet;

use proptest::prelude::*;

use super::*;

fn space(gpus_per_node: usize) -> Space {
    Space { gpus_per_node, cores_per_node: 64, ranks_per_node: 0, nodes: None, ports: Ports::default() }
}

fn demand(policy: (usize, usize), rollout: (usize, usize), teacher: (usize, usize)) -> Vec<Demand> {
    [(Role::Policy, policy), (Role::Rollout, rollout), (Role::Teacher, teacher)]
        .map(|(role, (replicas, ranks))| Demand::new(role, replicas, ranks))
        .to_vec()
}

#[test]
fn the_deepmath_preset_needs_one_node_where_the_original_reserves_three() {
    let placement = place(&demand((1, 2), (1, 4), (1, 2)), &space(8)).unwrap();
    assert_eq!((placement.nodes, placement.idle_devices()), (1, 0));
    let shown = placement.to_string();
    assert!(shown.contains("rollout-0"), "{shown}");
    assert!(shown.ends_with("1 node of 8 GPUs, 0 idle\n"), "{shown}");
}

#[test]
fn a_small_policy_before_a_large_rollout_does_not_overlap_it() {
    let placement = place(&demand((1, 2), (1, 16), (1, 2)), &space(8)).unwrap();
    assert_eq!(placement.nodes, 3);
    assert_eq!(placement.replicas[0].parts[0].node, 0);
    assert_eq!(placement.replicas[1].parts.iter().map(|p| p.node).collect::<Vec<_>>(), [1, 2]);
    assert_eq!(placement.replicas[2].parts[0].node, 0);
    assert_eq!(placement.replicas[2].parts[0].devices, [2, 3]);
}

#[test]
fn what_does_not_fit_is_refused_with_the_numbers() {
    let refused = |demands: &[Demand], space: &Space| place(demands, space).unwrap_err().to_string();
    let one = Space { nodes: Some(1), ..space(8) };
    assert_eq!(
        refused(&demand((1, 8), (2, 4), (0, 1)), &one),
        "1 × policy of 8 GPUs, 2 × rollout of 4 GPUs need 16 GPUs on 2 nodes of 8, and there are 1 nodes with 8 GPUs"
    );
    assert!(refused(&demand((1, 9), (0, 1), (0, 1)), &space(8)).contains("9 GPUs needs 2 nodes of 8"));
    assert!(refused(&demand((5000, 1), (0, 1), (0, 1)), &space(8)).contains("5000 replicas"));
    assert!(refused(&demand((0, 1), (0, 1), (0, 1)), &space(8)).contains("no replica"));
    let ports = Ports { controller: 29346, ..Ports::default() };
    assert!(refused(&demand((2, 1), (1, 1), (0, 1)), &Space { ports, ..space(8) }).contains("ports overlap"));
    let ports = Ports { first: 65535, ..Ports::default() };
    assert!(refused(&demand((2, 1), (1, 1), (0, 1)), &Space { ports, ..space(8) }).contains("run out"));
}

#[test]
fn on_cpus_the_cores_are_divided() {
    let cpu = Space { cores_per_node: 8, ..space(0) };
    let placement = place(&demand((1, 1), (2, 1), (1, 1)), &cpu).unwrap();
    assert_eq!(placement.nodes, 1);
    assert!(placement.replicas.iter().all(|r| r.parts[0].cores == 2 && r.parts[0].devices.is_empty()));
    let two = place(&demand((1, 1), (2, 1), (1, 1)), &Space { nodes: Some(2), ..cpu }).unwrap();
    assert_eq!(two.nodes, 2);
    assert!(two.replicas.iter().all(|r| r.parts[0].cores == 4));
}

#[test]
fn large_replicas_on_cpus_have_processes_on_several_nodes() {
    let cpu = Space { cores_per_node: 8, ranks_per_node: 2, nodes: Some(2), ..space(0) };
    let placement = place(&demand((1, 4), (1, 4), (1, 2)), &cpu).unwrap();
    assert_eq!(placement.nodes, 2);
    let parts = |replica: usize| -> Vec<(usize, usize, usize)> {
        placement.replicas[replica].parts.iter().map(|p| (p.node, p.first_rank, p.ranks)).collect()
    };
    assert_eq!(parts(0), [(0, 0, 2), (1, 2, 2)]);
    assert_eq!((parts(1).len(), parts(2).len()), (1, 1));
    // On one node they are processes beside each other.
    let local = place(&demand((1, 4), (1, 1), (1, 1)), &Space { nodes: Some(1), ..cpu.clone() }).unwrap();
    assert_eq!((local.nodes, local.replicas[0].parts.len()), (1, 2));
    let uneven = place(&demand((1, 3), (1, 1), (0, 1)), &cpu).unwrap_err().to_string();
    assert!(uneven.contains("policy of 3 ranks needs 2 processes of at most 2"), "{uneven}");
}

#[test]
fn sizes_come_from_the_config() {
    let text = "[train]\n[policy.parallelism]\nn_init_replicas = 2\ntp_size = 2\npp_size = 2\ndp_shard_size = -1\n\
                [rollout.parallelism]\ntp_size = 4\n";
    let resolved = cosmos_config::ConfigFile::parse("run.toml", text).unwrap().resolve("now").unwrap();
    let all = demands(&resolved.config, &Counts { rollout: Some(3), ..Counts::default() }).unwrap();
    assert_eq!(all[0], Demand::new(Role::Policy, 2, 4));
    assert_eq!(all[1], Demand::new(Role::Rollout, 3, 4));
    assert_eq!(all.len(), 2, "no teacher without distillation");
    assert!(demands(&resolved.config, &Counts { policy: Some(0), ..Counts::default() }).is_err());
    assert!(uses_gpus("cuda:0") && uses_gpus("burn:cuda") && !uses_gpus("cpu") && !uses_gpus("burn:flex"));
}

#[test]
fn several_teachers_are_placed_by_name() {
    let text = "[train]\n[distillation]\nenable = true\n[distillation.parallelism]\nn_init_replicas = 2\ntp_size = 1\n\
                [[distillation.teachers]]\nname = \"math\"\nmodel_name_or_path = \"m\"\n\
                [[distillation.teachers]]\nname = \"code\"\nmodel_name_or_path = \"c\"\n\
                [distillation.teachers.parallelism]\nn_init_replicas = 1\ntp_size = 4\n";
    let resolved = cosmos_config::ConfigFile::parse("run.toml", text).unwrap().resolve("now").unwrap();
    let named = |counts: &Counts| -> Vec<(String, usize, Vec<usize>)> {
        let placement = place(&demands(&resolved.config, counts).unwrap(), &space(8)).unwrap();
        let teachers = placement.replicas.into_iter().filter(|r| r.role == Role::Teacher);
        teachers.map(|r| (r.name, r.ranks, r.parts[0].devices.clone())).collect()
    };
    let row = |name: &str, devices: &[usize]| (name.to_owned(), devices.len(), devices.to_vec());
    let all = named(&Counts::default());
    assert_eq!(
        all.iter().map(|(name, ranks, _)| (name.as_str(), *ranks)).collect::<Vec<_>>(),
        [("teacher-math-0", 1), ("teacher-math-1", 1), ("teacher-code-0", 4)]
    );
    // The large one first, then the policy and the rollout.
    assert_eq!(all[2], row("teacher-code-0", &[0, 1, 2, 3]));
    let fewer = named(&Counts { teacher: Some(1), ..Counts::default() });
    assert_eq!(fewer.len(), 2, "the count is that of teachers without one of their own: {fewer:?}");
    let mut own = resolved.config.clone();
    own.distillation.teachers[0].parallelism = Some(own.distillation.parallelism.clone());
    assert!(demands(&own, &Counts { teacher: Some(1), ..Counts::default() }).is_err());
}

fn any_demand() -> impl Strategy<Value = Vec<Demand>> {
    let size = || prop_oneof![1usize..=8, prop::sample::select(vec![1usize, 2, 4, 8, 16, 32])];
    ((1usize..6, size()), (0usize..9, size()), (0usize..6, size())).prop_map(|(p, r, t)| demand(p, r, t))
}

proptest! {
    #[test]
    fn every_replica_is_complete_and_no_device_is_given_twice(demands in any_demand(), gpus in 1usize..=8) {
        let placement = match place(&demands, &space(gpus)) {
            Ok(placement) => placement,
            Err(error) => {
                // Only what cannot be spread evenly over whole nodes may be refused.
                let uneven = demands.iter().any(|d| d.replicas > 0 && d.ranks > gpus && d.ranks % d.ranks.div_ceil(gpus) != 0);
                prop_assert!(uneven, "{error}");
                return Ok(());
            }
        };
        let mut devices = BTreeSet::new();
        let mut ports = BTreeSet::from([placement.ports.controller, placement.ports.redis]);
        for demand in &demands {
            let own: Vec<_> = placement.replicas.iter().filter(|r| r.role == demand.role).collect();
            prop_assert_eq!(own.len(), demand.replicas);
            for (index, replica) in own.iter().enumerate() {
                prop_assert_eq!((replica.index, replica.ranks), (index, demand.ranks));
                let mut next = 0;
                for part in &replica.parts {
                    prop_assert_eq!(part.first_rank, next);
                    prop_assert_eq!(part.devices.len(), part.ranks);
                    next += part.ranks;
                    prop_assert!(part.node < placement.nodes);
                    prop_assert!(ports.insert(part.port));
                    for device in &part.devices {
                        prop_assert!(*device < gpus);
                        prop_assert!(devices.insert((part.node, *device)), "device {} of node {} twice", device, part.node);
                    }
                }
                prop_assert_eq!(next, demand.ranks);
                if demand.ranks >= gpus {
                    prop_assert_eq!(replica.parts.len(), demand.ranks.div_ceil(gpus));
                    for part in &replica.parts {
                        prop_assert_eq!(placement.on_node(part.node).count(), 1, "a whole node is shared");
                    }
                    let nodes: Vec<_> = replica.parts.iter().map(|p| p.node).collect();
                    prop_assert!(nodes.windows(2).all(|w| w[1] == w[0] + 1), "{:?}", nodes);
                }
            }
        }
        for node in 0..placement.nodes {
            prop_assert!(placement.on_node(node).next().is_some(), "node {} is empty", node);
        }
        prop_assert_eq!(placement.replicas[0].parts[0].node, 0);
    }

    #[test]
    fn never_more_nodes_than_needed(demands in any_demand(), gpus in prop::sample::select(vec![1usize, 2, 4, 8])) {
        let Ok(placement) = place(&demands, &space(gpus)) else { return Ok(()) };
        let large: usize = demands.iter().filter(|d| d.ranks >= gpus).map(|d| d.replicas * d.ranks.div_ceil(gpus)).sum();
        let small: Vec<_> = demands.iter().filter(|d| d.ranks < gpus && d.replicas > 0).collect();
        let needed: usize = small.iter().map(|d| d.replicas * d.ranks).sum::<usize>().div_ceil(gpus);
        // The original: each role on nodes of its own.
        let apart: usize = small.iter().map(|d| d.replicas.div_ceil(gpus / d.ranks)).sum();
        prop_assert!(placement.nodes - large <= apart);
        prop_assert!(placement.nodes - large <= 2 * needed);
        if small.iter().all(|d| d.ranks.is_power_of_two()) {
            prop_assert_eq!(placement.nodes - large, needed);
        }
    }

    #[test]
    fn the_same_everywhere(demands in any_demand(), gpus in 0usize..=8, nodes in prop::option::of(1usize..5)) {
        let space = Space { nodes, ..space(gpus) };
        let (first, second) = (place(&demands, &space), place(&demands, &space));
        match (first, second) {
            (Ok(a), Ok(b)) => {
                prop_assert!(nodes.is_none_or(|limit| a.nodes <= limit));
                let text = serde_json::to_string(&a).unwrap();
                prop_assert_eq!(&serde_json::from_str::<Placement>(&text).unwrap(), &a);
                prop_assert_eq!(a, b);
            }
            (Err(a), Err(b)) => prop_assert_eq!(a.to_string(), b.to_string()),
            _ => prop_assert!(false, "one fits, the other does not"),
        }
    }
}
