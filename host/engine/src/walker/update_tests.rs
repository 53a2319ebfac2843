//! Updates within the backward against those after it: the same bits on every family, head and loss.

use super::tests::{batch, configs, positions, random, sequences};
use super::*;
use crate::cpu_engine::CpuEngine;
use crate::model::LogitsSource;
use crate::objective::{
    DistillKind, DistillSpec, Mass, Normaliser, ObjectiveSpec, PolicyLoss, Sample, SftLoss, SftSample, TeacherView,
};
use crate::optim::{Adam, AdamConfig, StepStats};

/// A teacher that says the same about every row.
struct Steady(usize);

impl LogitsSource for Steady {
    fn logits_rv(&mut self, rows: Range<usize>, out: &mut Vec<f32>) -> Result<()> {
        out.clear();
        out.extend(rows.flat_map(|row| (0..self.0).map(move |id| ((row * 3 + id * 5) % 13) as f32 * 0.2 - 1.0)));
        Ok(())
    }
}

/// The losses of the tests.
#[derive(Clone, Copy, Debug)]
enum Kind {
    Likelihood,
    /// Reverse KL of the sampled tokens with a bonus for entropy, at a temperature, discounted: two passes.
    Sampled,
    /// A divergence over candidates.
    Candidates,
    /// One over the whole vocabulary, whose gradient cannot be made again in parts.
    Whole,
}

const KINDS: [Kind; 4] = [Kind::Likelihood, Kind::Sampled, Kind::Candidates, Kind::Whole];

/// Something that makes one step from a batch and its loss.
type Make<'a> = &'a mut dyn FnMut(&TokenBatch, &[Position], &mut dyn HeadLoss) -> StepStats;

/// One step on `rows`; the loss.
fn step(kind: Kind, rows: &[Vec<u32>], vocab: usize, make: Make<'_>) -> (f64, StepStats) {
    if let Kind::Likelihood = kind {
        let samples: Vec<SftSample> = rows.iter().map(|ids| SftSample::response(ids.clone(), 1)).collect();
        let mut loss = SftLoss::new(&samples, 0.02).unwrap();
        let (batch, positions) = loss.batch().unwrap();
        let stats = make(&batch, &positions, &mut loss);
        return (loss.total(), stats);
    }
    let (kind, discount, mass) = match kind {
        Kind::Sampled => (DistillKind::Sampled, 0.9, 0),
        Kind::Whole => (DistillKind::FullVocab, 0.0, 0),
        _ => (DistillKind::Gjsd { mass: Mass::Tail }, 0.0, 3),
    };
    let distill = DistillSpec { kind, beta: 0.5, coef: 1.0, discount, kl_clip: None, include_prompt: false };
    let spec =
        ObjectiveSpec { distill: Some(distill), entropy_coeff: 0.01, temperature: 0.7, ..ObjectiveSpec::default() };
    let view = |scored: usize| match kind {
        DistillKind::Sampled => TeacherView::Sampled((0..scored).map(|t| -1.0 - 0.1 * t as f32).collect()),
        DistillKind::FullVocab => TeacherView::Full,
        _ => TeacherView::TopK {
            ids: (0..scored * mass).map(|i| ((i * 11) % vocab) as u32).collect(),
            logprobs: (0..scored * mass).map(|i| -1.5 - 0.3 * (i % mass) as f32).collect(),
        },
    };
    let sample = |ids: &Vec<u32>| Sample {
        ids: ids.clone(),
        prompt_len: 2,
        advantage: 0.3,
        teacher: view(ids.len() - 2),
        ..Sample::default()
    };
    let samples: Vec<Sample> = rows.iter().map(sample).collect();
    let mut source = Steady(vocab);
    let teacher = matches!(kind, DistillKind::FullVocab).then_some(&mut source as &mut dyn LogitsSource);
    let mut loss = PolicyLoss::new(&spec, &samples, Normaliser::of(&spec, &samples, 1.0), teacher).unwrap();
    let (batch, positions) = loss.batch().unwrap();
    let stats = make(&batch, &positions, &mut loss);
    (loss.report().total, stats)
}

/// Losses, norms and all weights after a few steps.
fn trained(
    model: &mut dyn Model,
    kind: Kind,
    rows: &[Vec<u32>],
    in_backward: bool,
) -> (Vec<u64>, Vec<f64>, Vec<Vec<u32>>) {
    let mut adam = Adam::new(AdamConfig { weight_decay: 0.1, ..AdamConfig::default() }, model.params());
    let (mut losses, mut norms) = (Vec::new(), Vec::new());
    let vocab = model.config().vocab_size;
    for _ in 0..4 {
        let (loss, stats) = step(kind, rows, vocab, &mut |batch, positions, loss| {
            if in_backward {
                return adam.step_in_backward(model, 0.01, batch, positions, loss).unwrap();
            }
            model.forward_backward(batch, positions, loss).unwrap();
            let stats = adam.step(model, 0.01, None).unwrap();
            model.zero_grads();
            stats
        });
        assert!(stats.finite && loss.is_finite());
        losses.push(loss.to_bits());
        norms.push(stats.grad_norm);
    }
    assert_eq!(adam.steps(), 4);
    let weights = (0..model.params().len()).map(|index| model.read_param(index).iter().map(|w| w.to_bits()).collect());
    (losses, norms, weights.collect())
}

fn compare(mut after: Box<dyn Model>, mut within: Box<dyn Model>, kind: Kind, rows: &[Vec<u32>], what: &str) {
    let (losses, norms, weights) = trained(&mut *after, kind, rows, false);
    let found = trained(&mut *within, kind, rows, true);
    assert_eq!(losses, found.0, "{what}, {kind:?}");
    for (a, b) in norms.iter().zip(&found.1) {
        assert!((a / b - 1.0).abs() < 1e-12, "{what}, {kind:?}: {a} and {b}");
    }
    for ((spec, a), b) in after.params().iter().zip(&weights).zip(&found.2) {
        assert!(a == b, "{what}, {kind:?}: `{}`", spec.name);
    }
    assert!(losses[0] != losses[3], "{what}, {kind:?}: nothing was learnt");
}

#[test]
fn updates_within_the_backward_have_the_bits_of_those_after_it() {
    for device in ["cpu", "burn:flex"] {
        for (config, kind) in configs().iter().flat_map(|config| KINDS.map(|kind| (config, kind))) {
            let rows = sequences(&[40, 9, 17, 33], config.vocab_size);
            let what = format!("{device}, {:?}", config.family);
            compare(random(device, config, 5), random(device, config, 5), kind, &rows, &what);
        }
    }
}

/// A vocabulary of several chunks of rows and several parts.
fn wide(tied: bool) -> ModelConfig {
    ModelConfig { vocab_size: 30_011, hidden_size: 8, tie_word_embeddings: tied, ..configs()[0].clone() }
}

fn in_parts(config: &ModelConfig, frugal_bytes: usize) -> Box<dyn Model> {
    let engine = CpuEngine::new(config.clone()).with_head_parts(4 * 256);
    let mut model = Transformer::new(engine, crate::weights::random(config, 7)).unwrap();
    model.frugal_bytes = frugal_bytes;
    Box::new(model)
}

#[test]
fn parts_of_the_head_and_tiles_one_by_one_change_no_bit() {
    for (tied, frugal_bytes) in [(true, 0), (false, 0), (true, usize::MAX)] {
        let config = wide(tied);
        let rows = sequences(&[120, 90, 127, 64, 3], config.vocab_size);
        for kind in [Kind::Likelihood, Kind::Sampled, Kind::Candidates] {
            let after = model_of(&config);
            compare(after, in_parts(&config, frugal_bytes), kind, &rows, &format!("tied: {tied}, {frugal_bytes}"));
        }
    }
}

#[test]
fn parts_of_a_block_change_no_bit() {
    // Parts of two sizes; several tiles; enough blocks that the last of them keep no attention.
    for config in configs() {
        let config = ModelConfig {
            hidden_size: 176,
            head_dim: 44,
            intermediate_size: 1280,
            num_hidden_layers: 5,
            initializer_range: 0.05,
            ..config
        };
        let rows = sequences(&[105; 5], config.vocab_size);
        let engine = CpuEngine::new(config.clone());
        assert!(engine.updates_block_in_parts(5 * 104) && !engine.updates_block_in_parts(5 * 500));
        let after = random("cpu", &config, 7);
        let values = (0..after.params().len()).map(|index| after.read_param(index)).collect();
        let mut within = Transformer::new(engine, values).unwrap();
        within.frugal_bytes = 0;
        compare(after, Box::new(within), Kind::Likelihood, &rows, &format!("{:?}", config.family));
    }
}

fn model_of(config: &ModelConfig) -> Box<dyn Model> {
    let engine = CpuEngine::new(config.clone());
    Box::new(Transformer::new(engine, crate::weights::random(config, 7)).unwrap())
}

#[test]
fn what_is_not_finite_at_the_head_leaves_the_step_out() {
    let names = ["model.embed_tokens.weight", "model.norm.weight", "model.layers.1.mlp.down_proj.weight"];
    for (config, name) in configs().iter().flat_map(|config| names.map(|name| (config, name))) {
        for kind in [Kind::Likelihood, Kind::Whole] {
            let mut model = random("cpu", config, 5);
            let index = model.params().iter().position(|spec| spec.name == name).unwrap();
            let mut values = model.read_param(index);
            *values.last_mut().unwrap() = f32::NAN;
            model.write_param(index, &values).unwrap();
            let bits = |model: &dyn Model| -> Vec<u32> {
                (0..model.params().len()).flat_map(|index| model.read_param(index)).map(f32::to_bits).collect()
            };
            let before = bits(&*model);
            let mut adam = Adam::new(AdamConfig::default(), model.params());
            // The last id of the vocabulary, whose embedding is not a number, is read by a token.
            let rows = [vec![1, 2, config.vocab_size as u32 - 1, 3, 4]];
            let (_, stats) = step(kind, &rows, config.vocab_size, &mut |batch, positions, loss| {
                adam.step_in_backward(&mut *model, 0.01, batch, positions, loss).unwrap()
            });
            assert!(!stats.finite && adam.steps() == 0, "{name}, {kind:?}");
            assert!(before == bits(&*model), "{name}, {kind:?}");
        }
    }
}

/// A gradient near the largest number at one logit.
struct Steep;

impl HeadLoss for Steep {
    fn needs_first_pass(&self) -> bool {
        false
    }
    fn observe(&mut self, _: Range<usize>, _: &[f32]) -> Result<()> {
        Ok(())
    }
    fn gradient(&mut self, _: Range<usize>, logits_rv: &mut [f32]) -> Result<()> {
        logits_rv.fill(0.0);
        logits_rv[0] = 2e37;
        Ok(())
    }
}

#[test]
fn a_gradient_that_overflows_on_its_way_back_is_an_error_that_names_it() {
    let config = &configs()[1];
    let mut model = random("cpu", config, 5);
    let mut adam = Adam::new(AdamConfig::default(), model.params());
    let batch = batch(&sequences(&[9], config.vocab_size));
    let wanted = [Position { b: 0, t: 8 }];
    // The last norm makes a small stream large, and with it the gradient on its way back.
    for index in 0..model.params().len() {
        if ["embed_tokens", "o_proj", "down_proj"].iter().any(|part| model.params()[index].name.contains(part)) {
            let values: Vec<f32> = model.read_param(index).iter().map(|w| w * 1e-4).collect();
            model.write_param(index, &values).unwrap();
        }
    }
    let error = adam.step_in_backward(&mut *model, 0.01, &batch, &wanted, &mut Steep).unwrap_err();
    assert!(
        matches!(&error, EngineError::NotFinite { tensor, half: true } if tensor.starts_with("model.layers.")),
        "{error}"
    );
    assert_eq!(adam.steps(), 0);
}

#[test]
fn gradients_that_wait_are_not_thrown_away() {
    let config = &configs()[0];
    let mut model = random("cpu", config, 5);
    let mut adam = Adam::new(AdamConfig::default(), model.params());
    let batch = batch(&sequences(&[9], config.vocab_size));
    let wanted = positions(&batch);
    model.forward_backward(&batch, &wanted, &mut Steep).unwrap();
    let error = adam.step_in_backward(&mut *model, 0.01, &batch, &wanted, &mut Steep).unwrap_err();
    assert!(error.hint().is_some_and(|hint| hint.contains("zero_grads")), "{error}");
    model.zero_grads();
    assert!(!matches!(
        adam.step_in_backward(&mut *model, 0.01, &batch, &wanted, &mut Steep),
        Err(EngineError::Invalid { .. })
    ));
}
