//! A model cut over ranks against the same model on one: gradients, hidden states, log-probs, optimizer steps and
//! checkpoints, for every mesh of at most eight ranks that the models allow.

use std::ops::Range;
use std::path::{Path, PathBuf};

use cosmos_parallel::{Mesh, ParallelDims, RankFailure, RankGroups, ThreadWorld};

use super::*;
use crate::batch::{Position, TokenBatch};
use crate::model::{HeadLoss, Losses, MicroBatch, RankMemory, VocabShard};

mod objectives;
mod steps;

const PATIENT_MS: u64 = 60_000;
/// Largest difference from one rank, of a tensor's largest value.
const CLOSE: f32 = 1e-5;

/// pp, dp_replicate, dp_shard, cp, tp.
type Sizes = [usize; 5];

fn mesh([pp, dp_replicate, dp_shard, cp, tp]: Sizes) -> Mesh {
    let dims = ParallelDims {
        pp: pp as i64,
        dp_replicate: dp_replicate as i64,
        dp_shard: dp_shard as i64,
        cp: cp as i64,
        tp: tp as i64,
    };
    Mesh::new(dims, pp * dp_replicate * dp_shard * cp * tp).unwrap()
}

/// The golden models' folders.
fn models() -> Vec<PathBuf> {
    ["llama", "qwen2-tied", "qwen2-untied", "qwen3", "qwen3-tied"]
        .iter()
        .filter_map(|name| cosmos_testkit::golden(&format!("models/{name}")))
        .collect()
}

/// A model of eight layers with every bias, tied or not, that can be cut along every axis.
fn deep(tied: bool, folder: &Path) -> PathBuf {
    let text = format!(
        r#"{{"model_type": "llama", "vocab_size": 61, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 8,
        "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 8, "max_position_embeddings": 64,
        "initializer_range": 0.2, "attention_bias": true, "mlp_bias": true, "tie_word_embeddings": {tied}}}"#
    );
    let config = ModelConfig::from_json(&text, Path::new("config.json")).unwrap();
    let mut model = crate::model::random(&config, "cpu", 4).unwrap();
    for index in 0..model.params().len() {
        // Fresh norms and biases are constants, which would hide mistakes.
        let mut values = model.read_param(index);
        values.iter_mut().enumerate().for_each(|(i, v)| *v += ((i * 7 + index) % 13) as f32 * 0.02 - 0.12);
        model.write_param(index, &values).unwrap();
    }
    let folder = folder.join(if tied { "deep-tied" } else { "deep" });
    weights::export(&*model, &folder, &weights::ExportOptions::default()).unwrap();
    folder
}

fn name(folder: &Path) -> String {
    folder.file_name().unwrap_or_default().to_string_lossy().into_owned()
}

/// Sequences of ragged lengths, by micro-batch.
fn samples(vocab: usize) -> Vec<Vec<Vec<u32>>> {
    let lens = [vec![7, 12, 5, 9, 3], vec![11, 2, 8, 6, 10, 4, 13, 9], vec![1, 15]];
    let sequence =
        |seed: usize, len: usize| (0..len).map(|t| ((seed * 31 + t * 7 + t * t * 3) % vocab) as u32).collect();
    let micro = |(index, lens): (usize, &Vec<usize>)| {
        lens.iter().enumerate().map(|(row, len)| sequence(index * 10 + row, *len)).collect()
    };
    lens.iter().enumerate().map(micro).collect()
}

/// The part of a micro-batch that data parallel rank `rank` of `ranks` gets, and for each row of the loss its target and
/// weight.
fn part(micro: &[Vec<u32>], rank: usize, ranks: usize, vocab: usize) -> (MicroBatch, Vec<(u32, f32)>) {
    let own: Vec<(usize, &[u32])> = micro
        .iter()
        .enumerate()
        .filter(|(row, _)| row % ranks == rank)
        .map(|(row, ids)| (row, ids.as_slice()))
        .collect();
    if own.is_empty() {
        // Others have samples; this rank only keeps them company.
        return (MicroBatch { batch: TokenBatch::new(&[&[0]]).unwrap(), positions: Vec::new() }, Vec::new());
    }
    let batch = TokenBatch::new(&own.iter().map(|(_, ids)| *ids).collect::<Vec<_>>()).unwrap();
    let (mut positions, mut rows) = (Vec::new(), Vec::new());
    for (b, (row, ids)) in own.iter().enumerate() {
        // Not every position is wanted.
        for t in (0..ids.len()).filter(|t| t % 3 != 1) {
            positions.push(Position { b, t });
            rows.push(((row * 13 + t * 5) as u32 % vocab as u32, 0.3 + ((row + t) % 5) as f32 * 0.2));
        }
    }
    (MicroBatch { batch, positions }, rows)
}

/// Weighted negative log-probs of the targets, over a vocabulary that may be cut over ranks.
struct CrossEntropy {
    rows: Vec<(u32, f32)>,
    shard: VocabShard,
    first_pass: bool,
    observed: Vec<(f32, f32)>,
    log_probs: Vec<f32>,
}

impl CrossEntropy {
    /// Largest logit and the log of the sum.
    fn sums(&self, logits_rv: &[f32]) -> Result<Vec<(f32, f32)>> {
        let rows = logits_rv.chunks_exact(self.shard.len);
        let mut largest: Vec<f32> = rows.clone().map(|row| row.iter().copied().fold(f32::MIN, f32::max)).collect();
        self.shard.collective.all_reduce_max(&mut largest)?;
        let mut sums: Vec<f32> =
            rows.zip(&largest).map(|(row, max)| row.iter().map(|z| (z - max).exp()).sum()).collect();
        self.shard.collective.all_reduce_sum(&mut sums)?;
        Ok(largest.into_iter().zip(sums).map(|(max, sum)| (max, max + sum.ln())).collect())
    }
}

impl HeadLoss for CrossEntropy {
    fn set_vocab_shard(&mut self, shard: &VocabShard) -> Result<()> {
        self.shard = shard.clone();
        Ok(())
    }

    fn needs_first_pass(&self) -> bool {
        self.first_pass
    }

    fn observe(&mut self, rows: Range<usize>, logits_rv: &[f32]) -> Result<()> {
        assert_eq!(rows.start, self.observed.len());
        let found = self.sums(logits_rv)?;
        self.observed.extend(found);
        Ok(())
    }

    fn gradient(&mut self, rows: Range<usize>, logits_rv: &mut [f32]) -> Result<()> {
        let sums = if self.first_pass { self.observed[rows.clone()].to_vec() } else { self.sums(logits_rv)? };
        let mut own = vec![0.0; rows.len()];
        for (index, row) in logits_rv.chunks_exact_mut(self.shard.len).enumerate() {
            let (target, weight) = self.rows[rows.start + index];
            let log_sum = sums[index].1;
            let place = (target as usize).checked_sub(self.shard.first).filter(|place| *place < self.shard.len);
            if let Some(place) = place {
                own[index] = row[place] - log_sum;
            }
            row.iter_mut().for_each(|z| *z = weight * (*z - log_sum).exp());
            if let Some(place) = place {
                row[place] -= weight;
            }
        }
        self.shard.collective.all_reduce_sum(&mut own)?;
        self.log_probs.extend(own);
        Ok(())
    }
}

/// The losses of all micro-batches of a rank, and what they saw.
struct AllLosses {
    rows: Vec<Vec<(u32, f32)>>,
    vocab: usize,
    log_probs: Vec<Vec<f32>>,
}

impl Losses for AllLosses {
    fn with(&mut self, index: usize, run: &mut dyn FnMut(&mut dyn HeadLoss) -> Result<()>) -> Result<()> {
        let mut loss = CrossEntropy {
            rows: self.rows[index].clone(),
            shard: VocabShard::whole(self.vocab),
            first_pass: index == 1,
            observed: Vec::new(),
            log_probs: Vec::new(),
        };
        run(&mut loss)?;
        assert_eq!(self.log_probs.len(), index);
        self.log_probs.push(loss.log_probs);
        Ok(())
    }
}

/// What a rank found.
#[derive(PartialEq)]
struct Found {
    /// Data parallel rank, of how many.
    dp: (usize, usize),
    has_head: bool,
    /// By parameter, gathered.
    grads: Vec<Vec<f32>>,
    /// By micro-batch, of this rank's rows.
    log_probs: Vec<Vec<f32>>,
    /// Of the first micro-batch.
    hidden_rh: Vec<f32>,
    memory: Option<RankMemory>,
}

fn dp(groups: &RankGroups) -> (usize, usize) {
    let (at, mesh) = (groups.coordinates(), groups.mesh());
    let (copies, shards) = (mesh.size(Axis::DpReplicate), mesh.size(Axis::DpShard));
    (at.dp_replicate * shards + at.dp_shard, copies * shards)
}

/// Forward only, then forward and backward of all micro-batches.
fn run(model: &mut dyn Model, dp: (usize, usize)) -> Result<Found> {
    let vocab = model.config().vocab_size;
    let (micro, rows): (Vec<_>, Vec<_>) = samples(vocab).iter().map(|micro| part(micro, dp.0, dp.1, vocab)).unzip();
    let hidden_rh = model.hidden_rh(&micro[0].batch, &micro[0].positions)?;
    let mut losses = AllLosses { rows, vocab, log_probs: Vec::new() };
    model.forward_backward_each(&micro, &mut losses)?;
    let grads = (0..model.params().len()).map(|index| model.gather(index, &model.read_grad(index)));
    Ok(Found {
        dp,
        has_head: model.has_head(),
        grads: grads.collect::<Result<_>>()?,
        log_probs: losses.log_probs,
        hidden_rh,
        memory: model.memory(),
    })
}

fn on_mesh<T: Send>(
    sizes: Sizes,
    work: impl Fn(RankGroups) -> Result<T> + Sync,
) -> std::result::Result<Vec<T>, RankFailure<EngineError>> {
    ThreadWorld::run(mesh(sizes), PATIENT_MS, work)
}

fn largest(values: &[f32]) -> f32 {
    values.iter().fold(0.0, |max, v| max.max(v.abs()))
}

/// The largest difference, of the largest expected value.
fn difference(found: &[f32], expected: &[f32]) -> f32 {
    assert_eq!(found.len(), expected.len());
    let apart = found.iter().zip(expected).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    if apart == 0.0 { 0.0 } else { apart / largest(expected) }
}

/// Differences of gradients, hidden states and log-probs from those of one rank.
fn compare(found: &[Found], one: &mut dyn Model, expected: &Found) -> [f32; 3] {
    let mut worst = [0.0f32; 3];
    // The same samples on one rank, by data parallel rank.
    let mut alone: std::collections::BTreeMap<(usize, usize), Found> = std::collections::BTreeMap::new();
    for rank in found {
        for (index, (found, expected)) in rank.grads.iter().zip(&expected.grads).enumerate() {
            let apart = difference(found, expected);
            if apart > CLOSE {
                println!("`{}`: {apart:.1e} of {:.1e}", one.params()[index].name, largest(expected));
            }
            worst[0] = worst[0].max(apart);
        }
        assert!(rank.grads == found[0].grads, "ranks gather different gradients");
        if !rank.has_head {
            assert!(rank.hidden_rh.is_empty() && rank.log_probs.is_empty());
            continue;
        }
        let own = alone.entry(rank.dp).or_insert_with(|| run(one, rank.dp).unwrap());
        worst[1] = worst[1].max(difference(&rank.hidden_rh, &own.hidden_rh));
        for (found, expected) in rank.log_probs.iter().zip(&own.log_probs) {
            worst[2] = worst[2].max(difference(found, expected));
        }
    }
    one.zero_grads();
    worst
}

fn check(folder: &Path, device: &str, sizes: Sizes, options: &ShardOptions) -> Option<([f32; 3], Vec<RankMemory>)> {
    let result = on_mesh(sizes, |groups| {
        let mut model = load(folder, device, &groups, options)?;
        run(&mut *model, dp(&groups))
    });
    let found = match result {
        Ok(found) => found,
        Err(RankFailure::Failed { error: EngineError::Invalid { message, .. }, .. })
            if message.contains("cannot be cut") =>
        {
            return None;
        }
        Err(failure) => panic!("{} {sizes:?}: {failure}", name(folder)),
    };
    let mut one = crate::model::load(folder, device).unwrap();
    let expected = run(&mut *one, (0, 1)).unwrap();
    one.zero_grads();
    let worst = compare(&found, &mut *one, &expected);
    assert!(worst.iter().all(|worst| *worst <= CLOSE), "{} {sizes:?} {options:?}: {worst:?}", name(folder));
    Some((worst, found.into_iter().filter_map(|found| found.memory).collect()))
}

fn all_meshes() -> Vec<Sizes> {
    let mut all = Vec::new();
    for pp in 1..=8 {
        for replicate in 1..=8 / pp {
            for shard in 1..=8 / (pp * replicate) {
                for cp in 1..=8 / (pp * replicate * shard) {
                    for tp in 1..=8 / (pp * replicate * shard * cp) {
                        if pp == 1 || replicate == 1 {
                            all.push([pp, replicate, shard, cp, tp]);
                        }
                    }
                }
            }
        }
    }
    all
}

#[test]
#[ignore = "minutes: every mesh of at most eight ranks on every model"]
fn every_mesh_gives_the_gradients_of_one_rank() {
    let begun = std::time::Instant::now();
    let own = tempfile::tempdir().unwrap();
    for folder in models().into_iter().chain([deep(false, own.path()), deep(true, own.path())]) {
        let (mut worst, mut done, mut refused) = ([0.0f32; 3], 0, Vec::new());
        for sizes in all_meshes() {
            match check(&folder, "cpu", sizes, &ShardOptions::default()) {
                Some((found, _)) => {
                    done += 1;
                    worst.iter_mut().zip(found).for_each(|(worst, found)| *worst = worst.max(found));
                }
                None => refused.push(sizes),
            }
        }
        let [grads, hidden, log_probs] = worst;
        println!(
            "{}: {done} meshes, largest differences: gradients {grads:.1e}, hidden {hidden:.1e}, log-probs {log_probs:.1e}; \
             {} cannot be cut ({:.0?})",
            name(&folder),
            refused.len(),
            begun.elapsed()
        );
        assert!(done > 30);
        let config = ModelConfig::from_folder(&folder).unwrap();
        for [pp, _, _, cp, tp] in refused {
            let heads = config.num_attention_heads;
            // Where ranks share key-value heads unevenly, a rank may lack a head for each context parallel rank.
            let uneven = tp > 1 && cp > 1 && !config.num_key_value_heads.is_multiple_of(tp);
            assert!(cp * tp > heads || pp > config.num_hidden_layers || uneven, "{pp} {cp} {tp}");
        }
    }
}

/// One mesh for each axis and for pairs and triples of them.
const CHOSEN: [Sizes; 12] = [
    [1, 2, 1, 1, 1],
    [1, 1, 3, 1, 1],
    [1, 2, 2, 1, 1],
    [1, 1, 1, 1, 2],
    [1, 1, 1, 1, 4],
    [1, 1, 1, 2, 1],
    [1, 1, 1, 3, 1],
    [2, 1, 1, 1, 1],
    [1, 1, 2, 2, 2],
    [2, 1, 2, 1, 2],
    [2, 1, 1, 2, 2],
    [2, 1, 2, 2, 1],
];

#[test]
fn chosen_meshes_give_the_gradients_of_one_rank() {
    let own = tempfile::tempdir().unwrap();
    let deep = deep(true, own.path());
    for sizes in [[4, 1, 1, 1, 2], [4, 1, 2, 1, 1], [1, 1, 1, 2, 4], [8, 1, 1, 1, 1]] {
        check(&deep, "cpu", sizes, &ShardOptions::default()).unwrap();
    }
    for folder in models() {
        for sizes in CHOSEN {
            if check(&folder, "cpu", sizes, &ShardOptions::default()).is_none() {
                println!("{} {sizes:?}: cannot be cut", name(&folder));
            }
        }
    }
}

#[test]
fn every_way_of_resharding_gives_the_same() {
    let own = tempfile::tempdir().unwrap();
    let folder = deep(true, own.path());
    for reshard in [Reshard::Always, Reshard::Never, Reshard::Default] {
        for kept_bytes_max in [0, usize::MAX] {
            let options = ShardOptions { reshard, kept_bytes_max, ..ShardOptions::default() };
            for sizes in [[1, 1, 2, 1, 1], [1, 1, 2, 1, 2], [2, 1, 2, 1, 1], [1, 1, 1, 2, 2]] {
                check(&folder, "cpu", sizes, &options).unwrap();
            }
        }
    }
}
