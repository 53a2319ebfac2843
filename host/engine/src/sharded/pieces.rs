//! Where the pieces of a parameter lie on all ranks of a mesh, and the whole from them.

use std::ops::Range;

use cosmos_parallel::{Axis, Coordinates, FlatLayout, Mesh};

use super::cut::{GroupPlan, TpPart, group_plans};
use super::stage_layers;
use super::store::part_of;
use crate::Result;
use crate::model::ModelConfig;

/// Which groups a pipeline stage has.
#[derive(Debug, Clone)]
pub(super) struct Stage {
    pub layers: Range<usize>,
    pub first: bool,
    pub last: bool,
    all_layers: usize,
    tied: bool,
}

impl Stage {
    pub fn of(config: &ModelConfig, stages: usize, stage: usize, per_stage: Option<usize>) -> Result<Self> {
        Ok(Self {
            layers: stage_layers(config.num_hidden_layers, stages, stage, per_stage)?,
            first: stage == 0,
            last: stage + 1 == stages,
            all_layers: config.num_hidden_layers,
            tied: config.tie_word_embeddings,
        })
    }

    /// Whether the stage holds group `group`: the embedding, each block, the norm, the head.
    pub fn holds(&self, group: usize) -> bool {
        match group {
            0 => self.first || (self.last && self.tied),
            group if group <= self.all_layers => self.layers.contains(&(group - 1)),
            _ => self.last,
        }
    }
}

/// How all ranks hold the model.
pub(super) struct Map {
    mesh: Mesh,
    stages: Vec<Stage>,
    /// By tensor parallel rank.
    plans: Vec<Vec<GroupPlan>>,
    /// Group and place of each parameter.
    index: Vec<(usize, usize)>,
}

impl Map {
    pub fn new(config: &ModelConfig, mesh: Mesh, per_stage: Option<usize>) -> Result<Self> {
        let (pp, tp, cp) = (mesh.size(Axis::Pp), mesh.size(Axis::Tp), mesh.size(Axis::Cp));
        let stages = (0..pp).map(|stage| Stage::of(config, pp, stage, per_stage)).collect::<Result<_>>()?;
        let plan = |rank| Ok(group_plans(config, &TpPart::of(config, rank, tp, cp)?));
        let plans: Vec<Vec<GroupPlan>> = (0..tp).map(plan).collect::<Result<_>>()?;
        let groups = plans[0].iter().enumerate();
        let index = groups.flat_map(|(group, plan)| (0..plan.places.len()).map(move |place| (group, place))).collect();
        Ok(Self { mesh, stages, plans, index })
    }

    /// Group and place of parameter `param`.
    pub fn place(&self, param: usize) -> (usize, usize) {
        self.index[param]
    }

    /// The runs (first, length) of parameter `param` that a rank holds, in the order in which it holds them.
    pub fn runs(&self, param: usize, at: &Coordinates) -> Vec<(usize, usize)> {
        let (group, place) = self.index[param];
        if !self.stages[at.pp].holds(group) {
            return Vec::new();
        }
        let (shards, cp) = (self.mesh.size(Axis::DpShard), self.mesh.size(Axis::Cp));
        let plan = &self.plans[at.tp][group];
        let Some(layout) = FlatLayout::new(plan.len, shards * cp) else { return Vec::new() };
        let own = layout.range(at.dp_shard * cp + at.cp);
        let place = &plan.places[place];
        place.region.runs(part_of(&place.range, &own))
    }

    /// As [`Map::runs`] for every rank of the mesh; only the first copy of the weights counts.
    pub fn all_runs(&self, param: usize) -> Result<Vec<Vec<(usize, usize)>>> {
        (0..self.mesh.world())
            .map(|rank| {
                let at = self.mesh.coordinates(rank)?;
                Ok(if at.dp_replicate == 0 { self.runs(param, &at) } else { Vec::new() })
            })
            .collect()
    }

    /// Whether the rank there is the one whose piece of `param` counts where several hold the same.
    pub fn counts(&self, param: usize, at: &Coordinates) -> bool {
        let (group, place) = self.index[param];
        let first_stage = self.stages.iter().position(|stage| stage.holds(group));
        at.dp_replicate == 0 && first_stage == Some(at.pp) && self.plans[at.tp][group].places[place].first_holder
    }
}

/// Number of values in runs.
pub(super) fn count(runs: &[(usize, usize)]) -> usize {
    runs.iter().map(|(_, len)| len).sum()
}
