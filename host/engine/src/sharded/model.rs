//! A rank as a [`Model`].

use std::sync::Arc;

use cosmos_parallel::{Axis, Collective, Coordinates, RankGroups, SubMesh};

use super::cut::{TpPart, even, group_plans};
use super::memory::{Held, Meter};
use super::pieces::{Map, Stage, count};
use super::store::{Shard, Whole};
use super::{ShardOptions, Source};
use crate::batch::{Position, TokenBatch};
use crate::block::BlockEngine;
use crate::model::{Decoder, HeadLoss, Losses, MicroBatch, Model, ModelConfig, ParamSpec, RankMemory, VocabShard};
use crate::{EngineError, Result};

/// Most bytes that a rank brings to a sum of squares.
const SQUARES_BYTES: usize = 8;

/// A group of parameters put together, and as the engine reads it.
pub(super) struct Ready<D> {
    /// None where it was not asked for.
    pub whole: Option<Whole>,
    pub device: D,
    pub _held: Held,
}

/// One rank of a model that is cut over several. See [`crate::sharded`].
pub struct RankModel<E: BlockEngine> {
    pub(super) engine: E,
    pub(super) options: ShardOptions,
    pub(super) stage: Stage,
    pub(super) at: Coordinates,
    pub(super) cp: Arc<dyn Collective>,
    pub(super) pp: Arc<dyn Collective>,
    pub(super) replicas: Arc<dyn Collective>,
    /// The ranks that divide the vocabulary.
    pub(super) vocabulary: Arc<dyn Collective>,
    world: Arc<dyn Collective>,
    /// Whether a group is held as shards, so that it must be put together.
    pub(super) sharded: bool,
    map: Map,
    whole_specs: Vec<ParamSpec>,
    local_specs: Vec<ParamSpec>,
    /// By group; none where another stage has it.
    pub(super) shards: Vec<Option<Shard>>,
    /// Ids of this rank, within the tensor parallel rank's rows and within the vocabulary.
    pub(super) head_rows: std::ops::Range<usize>,
    first_id: usize,
    /// Blocks that stay put together, by layer.
    pub(super) blocks: Vec<Option<Ready<E::Block>>>,
    pub(super) embed: Option<Ready<E::Table>>,
    pub(super) norm: Option<Ready<E::Norm>>,
    pub(super) head: Option<Ready<E::Table>>,
    pub(super) logits_rv: Vec<f32>,
    pub(super) gathered: Arc<Meter>,
    pub(super) whole_grads: Arc<Meter>,
}

impl<E: BlockEngine> RankModel<E> {
    /// A rank whose engine works on this rank's part of every block. `source` gives the values of its pieces.
    pub(super) fn new(
        engine: E,
        part: TpPart,
        groups: &RankGroups,
        mut options: ShardOptions,
        source: &mut Source<'_>,
    ) -> Result<Self> {
        let (mesh, at) = (groups.mesh(), groups.coordinates());
        options.kept_bytes_max /= mesh.world();
        let config = engine.config();
        let per_stage = options.layers_per_stage;
        let stage = Stage::of(config, mesh.size(Axis::Pp), at.pp, per_stage)?;
        let map = Map::new(config, *mesh, per_stage)?;
        let group = |sub| groups.group(sub).clone();
        let fsdp = group(SubMesh::DpShardCp);
        let mut shards = Vec::new();
        for (index, plan) in group_plans(config, &part).into_iter().enumerate() {
            let shard = || Shard::new(plan, fsdp.clone(), options.master_dtype, source);
            shards.push(stage.holds(index).then(shard).transpose()?);
        }
        let whole_specs = config.params();
        let local = |(index, spec): (usize, &ParamSpec)| ParamSpec {
            name: spec.name.clone(),
            shape: vec![count(&map.runs(index, &at))],
        };
        let local_specs = whole_specs.iter().enumerate().map(local).collect();
        let head_rows = even(part.vocab.len(), mesh.size(Axis::Cp), at.cp);
        let layers = config.num_hidden_layers;
        Ok(Self {
            sharded: fsdp.world() > 1 || options.param_dtype != super::Rounding::F32,
            cp: group(SubMesh::Along(Axis::Cp)),
            pp: group(SubMesh::Along(Axis::Pp)),
            replicas: group(SubMesh::Along(Axis::DpReplicate)),
            vocabulary: group(SubMesh::CpTp),
            world: group(SubMesh::World),
            first_id: part.vocab.start + head_rows.start,
            head_rows,
            blocks: (0..layers).map(|_| None).collect(),
            embed: None,
            norm: None,
            head: None,
            logits_rv: Vec::new(),
            gathered: Arc::default(),
            whole_grads: Arc::default(),
            engine,
            options,
            stage,
            at,
            map,
            whole_specs,
            local_specs,
            shards,
        })
    }

    pub(super) fn layers(&self) -> usize {
        self.engine.config().num_hidden_layers
    }

    /// The head's group: the embedding's when tied.
    pub(super) fn head_group(&self) -> usize {
        if self.engine.config().tie_word_embeddings { 0 } else { 2 + self.layers() }
    }

    /// A group that this stage has.
    pub(super) fn shard(&self, group: usize) -> Result<&Shard> {
        self.shards[group].as_ref().ok_or_else(|| elsewhere(group))
    }

    pub(super) fn shard_mut(&mut self, group: usize) -> Result<&mut Shard> {
        self.shards[group].as_mut().ok_or_else(|| elsewhere(group))
    }

    /// The piece of parameter `index` in its shard; none where another stage has it.
    fn piece(&self, index: usize) -> Option<(&Shard, std::ops::Range<usize>)> {
        let (group, place) = self.map.place(index);
        self.shards[group].as_ref().map(|shard| (shard, shard.piece(place)))
    }

    /// Forgets what was put together.
    fn forget(&mut self) {
        self.blocks.iter_mut().for_each(|block| *block = None);
        (self.embed, self.norm, self.head) = (None, None, None);
    }

    /// The model's gradient sums go through further ranks when a call ends.
    pub(super) fn settles_later(&self, group: usize) -> bool {
        self.replicas.world() > 1 || self.other_end(group).is_some()
    }

    /// The stage that has the other copy of a tied embedding.
    pub(super) fn other_end(&self, group: usize) -> Option<usize> {
        let stages = self.pp.world();
        if stages == 1 || group != 0 || !self.engine.config().tie_word_embeddings {
            return None;
        }
        if self.stage.first { Some(stages - 1) } else { self.stage.last.then_some(0) }
    }
}

fn elsewhere(group: usize) -> EngineError {
    EngineError::invalid(format!("another stage of the pipeline has parameter group {group}"), "")
}

impl<E: BlockEngine> Model for RankModel<E> {
    fn config(&self) -> &ModelConfig {
        self.engine.config()
    }

    fn params(&self) -> &[ParamSpec] {
        &self.local_specs
    }

    fn read_param(&self, index: usize) -> Vec<f32> {
        self.piece(index).map_or_else(Vec::new, |(shard, range)| shard.values[range].to_vec())
    }

    fn write_param(&mut self, index: usize, values: &[f32]) -> Result<()> {
        let count = self.local_specs.len();
        let spec = self
            .local_specs
            .get(index)
            .ok_or_else(|| EngineError::invalid(format!("parameter {index} of {count}"), ""))?;
        if spec.len() != values.len() {
            return Err(EngineError::invalid(
                format!("this rank's piece of `{}` has {} values, {} were given", spec.name, spec.len(), values.len()),
                "",
            ));
        }
        let (group, place) = self.map.place(index);
        if let Some(shard) = &mut self.shards[group] {
            let range = shard.piece(place);
            shard.values[range.clone()].copy_from_slice(values);
            self.options.master_dtype.apply(&mut shard.values[range]);
        }
        self.forget();
        Ok(())
    }

    fn rank(&self) -> Option<(usize, usize)> {
        Some((self.world.rank(), self.world.world()))
    }

    fn whole_params(&self) -> &[ParamSpec] {
        &self.whole_specs
    }

    fn gather(&self, index: usize, local: &[f32]) -> Result<Vec<f32>> {
        let runs = self.map.all_runs(index)?;
        let own = self.local_specs[index].len();
        if local.len() != own {
            return Err(EngineError::invalid(
                format!("a piece of `{}` has {own} values, {} were given", self.local_specs[index].name, local.len()),
                "",
            ));
        }
        let most = runs.iter().map(|runs| count(runs)).max().unwrap_or(0);
        let mut mine = vec![0.0; most];
        if self.at.dp_replicate == 0 {
            mine[..own].copy_from_slice(local);
        }
        let mut all = vec![0.0; most * self.world.world()];
        self.world.all_gather(&mine, &mut all)?;
        let mut whole = vec![0.0; self.whole_specs[index].len()];
        for (runs, values) in runs.iter().zip(all.chunks(most.max(1))) {
            let mut at = 0;
            for (first, len) in runs {
                whole[*first..first + len].copy_from_slice(&values[at..at + len]);
                at += len;
            }
        }
        Ok(whole)
    }

    fn cut(&self, index: usize, whole: &[f32]) -> Result<Vec<f32>> {
        let spec = &self.whole_specs[index];
        if spec.len() != whole.len() {
            return Err(EngineError::invalid(
                format!("`{}` has shape {:?}, {} values were given", spec.name, spec.shape, whole.len()),
                "",
            ));
        }
        let runs = self.map.runs(index, &self.at);
        Ok(runs.into_iter().flat_map(|(first, len)| &whole[first..first + len]).copied().collect())
    }

    fn hidden_rh(&mut self, batch: &TokenBatch, positions: &[Position]) -> Result<Vec<f32>> {
        self.forward_only(batch, positions)
    }

    fn has_head(&self) -> bool {
        self.stage.last
    }

    fn vocab_shard(&self) -> VocabShard {
        VocabShard {
            first: self.first_id,
            len: self.head_rows.len(),
            vocab: self.engine.config().vocab_size,
            collective: self.vocabulary.clone(),
        }
    }

    fn prepare_head(&mut self) -> Result<()> {
        if self.stage.last && self.head.is_none() {
            self.head = Some(self.ready_head()?);
        }
        Ok(())
    }

    fn head_logits_rv(&mut self, hidden_rh: &[f32], out: &mut Vec<f32>) -> Result<()> {
        let hidden = self.engine.config().hidden_size;
        if !hidden_rh.len().is_multiple_of(hidden) {
            return Err(EngineError::invalid(format!("{} hidden values are no rows of {hidden}", hidden_rh.len()), ""));
        }
        if !self.stage.last {
            return Err(EngineError::invalid("this rank's stage of the pipeline has no head", "ask the last stage"));
        }
        if self.head.is_none() && !self.sharded {
            self.prepare_head()?;
        }
        let Some(head) = &self.head else {
            return Err(EngineError::invalid(
                "the head is not put together",
                "call `prepare_head` on every rank first",
            ));
        };
        if hidden_rh.is_empty() {
            out.clear();
            return Ok(());
        }
        self.engine.head(&head.device, hidden_rh, out)
    }

    fn head_chunk_rows(&self) -> usize {
        // As many logits as one rank would hold.
        self.engine.head_chunk_rows() * self.vocabulary.world()
    }

    fn forward_backward(&mut self, batch: &TokenBatch, positions: &[Position], loss: &mut dyn HeadLoss) -> Result<()> {
        struct One<'a>(&'a mut dyn HeadLoss);
        impl Losses for One<'_> {
            fn with(&mut self, _: usize, run: &mut dyn FnMut(&mut dyn HeadLoss) -> Result<()>) -> Result<()> {
                run(self.0)
            }
        }
        self.pipeline(&[(batch, positions)], &mut One(loss))
    }

    fn forward_backward_each(&mut self, micro: &[MicroBatch], losses: &mut dyn Losses) -> Result<()> {
        let micro: Vec<_> = micro.iter().map(|part| (&part.batch, part.positions.as_slice())).collect();
        self.pipeline(&micro, losses)
    }

    fn read_grad(&self, index: usize) -> Vec<f32> {
        let Some((shard, range)) = self.piece(index) else { return Vec::new() };
        match shard.grads.get(range.clone()) {
            Some(grads) => grads.to_vec(),
            None => vec![0.0; range.len()],
        }
    }

    fn visit_grads(&self, visit: &mut dyn FnMut(usize, &[f32])) {
        for index in 0..self.local_specs.len() {
            if let Some((shard, range)) = self.piece(index)
                && let Some(grads) = shard.grads.get(range)
            {
                visit(index, grads);
            }
        }
    }

    fn sum_of_squares(&self, square: &dyn Fn(&[f32]) -> f64) -> Result<f64> {
        let mut own = 0.0;
        self.visit_grads(&mut |index, grads| {
            if self.map.counts(index, &self.at) {
                own += square(grads);
            }
        });
        // In f64, rank after rank, so that all have the same.
        let all = self.world.all_gather_bytes(&own.to_le_bytes(), SQUARES_BYTES)?;
        let mut sum = 0.0;
        for bytes in all {
            let bytes = <[u8; SQUARES_BYTES]>::try_from(bytes.as_slice())
                .map_err(|_| EngineError::invalid("a rank sent no number", ""))?;
            sum += f64::from_le_bytes(bytes);
        }
        Ok(sum)
    }

    fn zero_grads(&mut self) {
        for shard in self.shards.iter_mut().flatten() {
            shard.grads.fill(0.0);
        }
    }

    fn update_params(&mut self, update: &mut dyn FnMut(usize, &mut [f32], &mut [f32])) -> Result<()> {
        for index in 0..self.local_specs.len() {
            let (group, place) = self.map.place(index);
            match &mut self.shards[group] {
                Some(shard) => {
                    let range = shard.piece(place);
                    shard.grads_mut();
                    update(index, &mut shard.values[range.clone()], &mut shard.grads[range]);
                }
                None => update(index, &mut [], &mut []),
            }
        }
        for shard in self.shards.iter_mut().flatten() {
            self.options.master_dtype.apply(&mut shard.values);
        }
        self.forget();
        Ok(())
    }

    fn decoder(&mut self, _slots: usize, _capacity: usize) -> Result<Box<dyn Decoder + '_>> {
        Err(EngineError::invalid(
            "a rank of a sharded model does not decode",
            "let rollouts run unsharded, from the weights that the policy publishes",
        ))
    }

    fn memory(&self) -> Option<RankMemory> {
        let (params, grads) = self
            .shards
            .iter()
            .flatten()
            .map(Shard::bytes)
            .fold((0, 0), |sum, bytes| (sum.0 + bytes.0, sum.1 + bytes.1));
        Some(RankMemory {
            params,
            grads,
            gathered_peak: self.gathered.peak(),
            whole_grads_peak: self.whole_grads.peak(),
        })
    }
}
