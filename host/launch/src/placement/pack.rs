//! Devices to replicas: whole nodes to large ones, the rest packed.

use super::{Demand, Slot};
use crate::error::{LaunchError, Result};

/// Gives every replica its devices. Node numbers are provisional.
pub(super) fn pack(demands: &[Demand], gpus: usize) -> Result<Vec<Slot>> {
    let mut slots = Vec::new();
    let mut nodes = 0;
    let mut small = Vec::new();
    for (ordinal, demand) in demands.iter().enumerate() {
        for index in 0..demand.replicas {
            if demand.ranks < gpus {
                small.push((ordinal, index, demand.ranks));
            } else {
                spread((ordinal, demand), index, gpus, &mut nodes, &mut slots)?;
            }
        }
    }
    // Largest first needs the fewest nodes nearly always; a role at a time is never worse than the original.
    let mut together = small.clone();
    together.sort_by_key(|(ordinal, index, ranks)| (std::cmp::Reverse(*ranks), *ordinal, *index));
    let (mut best, mut fewest) = first_fit(&together, gpus);
    let mut apart = Vec::new();
    let mut count = 0;
    for demand in 0..demands.len() {
        let own: Vec<_> = small.iter().filter(|(ordinal, ..)| *ordinal == demand).copied().collect();
        let (mut placed, used) = first_fit(&own, gpus);
        placed.iter_mut().for_each(|slot| slot.node += count);
        apart.append(&mut placed);
        count += used;
    }
    if count < fewest {
        (best, fewest) = (apart, count);
    }
    best.iter_mut().for_each(|slot| slot.node += nodes);
    debug_assert!(best.iter().all(|slot| slot.node < nodes + fewest));
    slots.append(&mut best);
    Ok(slots)
}

/// A replica that fills a node or more: whole nodes, the same number of ranks on each.
fn spread(
    (ordinal, demand): (usize, &Demand),
    index: usize,
    gpus: usize,
    nodes: &mut usize,
    slots: &mut Vec<Slot>,
) -> Result<()> {
    let wanted = demand.ranks.div_ceil(gpus);
    if demand.ranks % wanted != 0 {
        let fits = demand.ranks.next_multiple_of(wanted);
        return Err(LaunchError::usage(
            format!(
                "a {} of {} GPUs needs {wanted} nodes of {gpus}, and its ranks cannot be spread evenly over them",
                demand.name, demand.ranks
            ),
            format!("make it {} or {fits} GPUs by the sizes in its parallelism table", wanted * gpus),
        ));
    }
    let each = demand.ranks / wanted;
    for part in 0..wanted {
        let node = *nodes;
        *nodes += 1;
        slots.push(Slot { demand: ordinal, index, node, first_rank: part * each, ranks: each, device: 0 });
    }
    Ok(())
}

/// Each replica on the first node with room. Gives the nodes used too.
fn first_fit(replicas: &[(usize, usize, usize)], gpus: usize) -> (Vec<Slot>, usize) {
    let mut used: Vec<usize> = Vec::new();
    let mut slots = Vec::new();
    for &(demand, index, ranks) in replicas {
        let node = used.iter().position(|taken| taken + ranks <= gpus).unwrap_or_else(|| {
            used.push(0);
            used.len() - 1
        });
        slots.push(Slot { demand, index, node, first_rank: 0, ranks, device: used[node] });
        used[node] += ranks;
    }
    let nodes = used.len();
    (slots, nodes)
}
