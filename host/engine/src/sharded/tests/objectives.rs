//! The objectives themselves, at the heads of models that are cut over ranks.

use super::*;
use crate::model::LogitsSource;
use crate::objective::{
    DistillKind, DistillSpec, Mass, Normaliser, ObjectiveSpec, PolicyLoss, Sample, TeacherView, Variant,
};

const VOCAB: usize = 61;

/// Smooth numbers in ±1.
fn noise(seed: usize, count: usize) -> Vec<f32> {
    (0..count).map(|i| (((i * 73 + seed * 151) % 197) as f32 * 0.7).sin()).collect()
}

fn specs() -> Vec<ObjectiveSpec> {
    let distill = |kind, discount| {
        Some(DistillSpec { kind, beta: 0.5, coef: 0.8, discount, kl_clip: None, include_prompt: false })
    };
    let spec = |distill| ObjectiveSpec { distill, entropy_coeff: 0.01, temperature: 0.9, ..ObjectiveSpec::default() };
    vec![
        ObjectiveSpec { variant: Variant::Gspo, ..spec(None) },
        spec(distill(DistillKind::Sampled, 0.9)),
        spec(distill(DistillKind::Gjsd { mass: Mass::Tail }, 0.0)),
        spec(distill(DistillKind::CosmosGjsd, 0.5)),
        spec(distill(DistillKind::FullVocab, 0.0)),
    ]
}

/// Samples of ragged lengths; the second has no teacher.
fn made(spec: &ObjectiveSpec) -> Vec<Sample> {
    let sample = |(index, (prompt_len, completion)): (usize, &(usize, usize))| {
        let len = prompt_len + completion;
        let around = |seed: usize, base: f32| noise(seed + index, *completion).iter().map(|v| base + 0.3 * v).collect();
        let teacher = match spec.distill.as_ref().map(|distill| distill.kind) {
            None => TeacherView::NotDistilled,
            Some(_) if index == 1 => TeacherView::Missing,
            Some(DistillKind::FullVocab) => TeacherView::Full,
            Some(DistillKind::Sampled) => TeacherView::Sampled(around(3, -3.5)),
            Some(_) => TeacherView::TopK {
                ids: (0..*completion).flat_map(|t| [(t * 5 + index) as u32 % 30, 31 + (t as u32 * 7) % 30]).collect(),
                logprobs: (0..*completion).flat_map(|t| [-1.2 - 0.05 * t as f32, -2.0]).collect(),
            },
        };
        Sample {
            ids: (0..len).map(|t| ((index * 17 + t * 7 + t * t * 3) % VOCAB) as u32).collect(),
            prompt_len: *prompt_len,
            advantage: noise(index, 1)[0],
            old: Some(around(1, -4.1)),
            rollout: Some(around(2, -4.1)),
            teacher,
            ..Sample::default()
        }
    };
    [(2, 5), (3, 4), (1, 9), (4, 2), (2, 7)].iter().enumerate().map(sample).collect()
}

/// A teacher whose logits follow from the sample and the row, the ids of one rank.
struct Teacher {
    /// Numbers of the rows' samples and tokens.
    seeds: Vec<usize>,
    ids: Range<usize>,
}

impl LogitsSource for Teacher {
    fn logits_rv(&mut self, rows: Range<usize>, out: &mut Vec<f32>) -> Result<()> {
        out.clear();
        for seed in &self.seeds[rows] {
            out.extend_from_slice(&noise(*seed, VOCAB)[self.ids.clone()]);
        }
        Ok(())
    }
}

/// Gradients of all samples, two micro-batches, and this rank's part of the loss.
fn train(model: &mut dyn Model, spec: &ObjectiveSpec, dp: (usize, usize)) -> Result<(Vec<Vec<f32>>, f64, bool)> {
    let all = made(spec);
    let normaliser = Normaliser::of(spec, &all, 1.0);
    let own = |half: usize| {
        let mine = |index: &usize| index % 2 == half && (index / 2) % dp.1 == dp.0;
        let indices: Vec<usize> = (0..all.len()).filter(mine).collect();
        let samples: Vec<Sample> = indices.iter().map(|index| all[*index].clone()).collect();
        let seeds = |index: &usize| (0..all[*index].scored(spec)).map(|token| *index * 100 + token).collect::<Vec<_>>();
        (samples, indices.iter().flat_map(seeds).collect::<Vec<usize>>())
    };
    struct Policy<'a> {
        spec: &'a ObjectiveSpec,
        parts: Vec<(Vec<Sample>, Vec<usize>)>,
        normaliser: Normaliser,
        ids: Range<usize>,
        total: f64,
    }
    impl Losses for Policy<'_> {
        fn with(&mut self, index: usize, run: &mut dyn FnMut(&mut dyn HeadLoss) -> Result<()>) -> Result<()> {
            let (samples, seeds) = &self.parts[index];
            let mut teacher = Teacher { seeds: seeds.clone(), ids: self.ids.clone() };
            let mut loss = PolicyLoss::new(self.spec, samples, self.normaliser, Some(&mut teacher))?;
            run(&mut loss)?;
            self.total += loss.into_report().total;
            Ok(())
        }
    }
    let parts = vec![own(0), own(1)];
    let micro = |(samples, _): &(Vec<Sample>, Vec<usize>)| {
        let loss =
            PolicyLoss::new(spec, samples, normaliser, Some(&mut Teacher { seeds: Vec::new(), ids: 0..1 }))?.batch();
        // A rank without samples of its own comes along with a token that has no loss.
        let (batch, positions) = match loss {
            Ok(found) => found,
            Err(_) => (TokenBatch::new(&[&[0]])?, Vec::new()),
        };
        Ok(MicroBatch { batch, positions })
    };
    let micro = parts.iter().map(micro).collect::<Result<Vec<_>>>()?;
    let mut losses = Policy { spec, parts, normaliser, ids: model.vocab_shard().ids(), total: 0.0 };
    model.forward_backward_each(&micro, &mut losses)?;
    let grads = (0..model.params().len()).map(|index| model.gather(index, &model.read_grad(index)));
    Ok((grads.collect::<Result<_>>()?, losses.total, model.has_head()))
}

#[test]
fn objectives_give_the_gradients_of_one_rank() {
    let own = tempfile::tempdir().unwrap();
    let folder = deep(true, own.path());
    for spec in specs() {
        let mut one = crate::model::load(&folder, "cpu").unwrap();
        let (expected, total, _) = train(&mut *one, &spec, (0, 1)).unwrap();
        assert!(total.is_finite() && expected.iter().any(|grads| largest(grads) > 1e-4));
        for sizes in [[1, 1, 2, 1, 2], [1, 1, 1, 2, 2], [2, 1, 1, 1, 4], [1, 3, 1, 1, 1], [2, 1, 2, 2, 1]] {
            let found = on_mesh(sizes, |groups| {
                let mut model = load(&folder, "cpu", &groups, &ShardOptions::default())?;
                let (grads, total, has_head) = train(&mut *model, &spec, dp(&groups))?;
                Ok((dp(&groups).0, grads, total, has_head))
            });
            let mut totals = std::collections::BTreeMap::new();
            for (dp, grads, total, has_head) in found.unwrap() {
                let worst = grads.iter().zip(&expected).map(|(a, b)| difference(a, b)).fold(0.0, f32::max);
                assert!(worst <= CLOSE, "{:?} {sizes:?}: {worst}", spec.distill);
                if has_head {
                    // Those that share the samples agree to the bit.
                    assert_eq!(*totals.entry(dp).or_insert(total), total);
                }
            }
            let sum: f64 = totals.values().sum();
            assert!((sum - total).abs() <= 1e-5 * total.abs().max(0.1), "{:?} {sizes:?}: {sum} {total}", spec.distill);
        }
    }
}
