//! A placement as people read it.

use std::fmt;

use super::Placement;

impl fmt::Display for Placement {
    /// A line for each process, node by node, and a sum.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut rows = vec![["NODE", "PROCESS", "RANKS", "DEVICES", "CORES", "PORT", "RENDEZVOUS"].map(String::from)];
        for node in 0..self.nodes {
            if node == 0 {
                let port = self.ports.controller.to_string();
                rows.push(["0", "controller", "-", "-", "-", &port, "-"].map(String::from));
            }
            for (replica, part) in self.on_node(node) {
                let ranks = match part.ranks {
                    1 => part.first_rank.to_string(),
                    _ => format!("{}-{}", part.first_rank, part.first_rank + part.ranks - 1),
                };
                let devices = match part.devices.as_slice() {
                    [] => "-".into(),
                    all => all.iter().map(usize::to_string).collect::<Vec<_>>().join(","),
                };
                let cores = if part.cores == 0 { "-".into() } else { part.cores.to_string() };
                let meeting = match replica.ranks {
                    1 => "-".into(),
                    _ => format!("node {}:{}", replica.rendezvous.node, replica.rendezvous.port),
                };
                let name = replica.process_name(part);
                rows.push([node.to_string(), name, ranks, devices, cores, part.port.to_string(), meeting]);
            }
        }
        let width = |column: usize| rows.iter().map(|row| row[column].len()).max().unwrap_or(0);
        let widths: Vec<usize> = (0..7).map(width).collect();
        for row in &rows {
            let line: Vec<String> = row.iter().zip(&widths).map(|(cell, width)| format!("{cell:width$}")).collect();
            writeln!(f, "{}", line.join("  ").trim_end())?;
        }
        let nodes = if self.nodes == 1 { "node" } else { "nodes" };
        match self.gpus_per_node {
            0 => writeln!(f, "{} {nodes}, no GPUs", self.nodes),
            gpus => writeln!(f, "{} {nodes} of {gpus} GPUs, {} idle", self.nodes, self.idle_devices()),
        }
    }
}
