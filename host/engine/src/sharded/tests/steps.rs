//! Optimizer steps, checkpoints, roundings, scoring, memory and failures of ranks.

use std::time::{Duration, Instant};

use super::*;
use crate::model::ParamSpec;
use crate::optim::{Adam, AdamConfig, Moments, MomentsView};
use crate::score::{ScoreOptions, ScoreRequest, score};

const MESHES: [Sizes; 4] = [[1, 2, 3, 1, 1], [1, 1, 1, 1, 8], [1, 1, 2, 2, 2], [2, 1, 2, 1, 2]];

fn gather_all(model: &dyn Model) -> Result<Vec<Vec<f32>>> {
    (0..model.params().len()).map(|index| model.gather(index, &model.read_param(index))).collect()
}

fn bits(values: &[Vec<f32>]) -> Vec<Vec<u32>> {
    values.iter().map(|values| values.iter().map(|v| v.to_bits()).collect()).collect()
}

/// A model whose gradients are `grads`.
fn with_grads(folder: &Path, grads: &[Vec<f32>]) -> Box<dyn Model> {
    let mut model = crate::model::load(folder, "cpu").unwrap();
    model.update_params(&mut |index, _, gradient| gradient.copy_from_slice(&grads[index])).unwrap();
    model
}

#[test]
fn a_step_of_the_optimizer_is_that_of_one_rank() {
    let own = tempfile::tempdir().unwrap();
    let folder = deep(true, own.path());
    for sizes in MESHES {
        for clip in [None, Some(0.5)] {
            let found = on_mesh(sizes, |groups| {
                let mut model = load(&folder, "cpu", &groups, &ShardOptions::default())?;
                let grads = run(&mut *model, dp(&groups))?.grads;
                let mut adam = Adam::new(AdamConfig::default(), model.params());
                let stats = adam.step(&mut *model, 0.01, clip)?;
                let params = gather_all(&*model)?;
                for (index, whole) in params.iter().enumerate() {
                    // Also on the ranks whose piece another one has too.
                    assert_eq!(model.cut(index, whole)?, model.read_param(index), "{:?}", model.params()[index]);
                }
                Ok((grads, params, stats))
            });
            let (grads, params, stats) = found.unwrap().swap_remove(0);
            let mut one = with_grads(&folder, &grads);
            let expected = Adam::new(AdamConfig::default(), one.params()).step(&mut *one, 0.01, clip).unwrap();
            assert_eq!(stats.clipped, expected.clipped);
            assert!((stats.grad_norm / expected.grad_norm - 1.0).abs() < 1e-12, "{sizes:?} {stats:?} {expected:?}");
            let expected: Vec<Vec<f32>> = (0..params.len()).map(|index| one.read_param(index)).collect();
            if clip.is_none() {
                assert_eq!(bits(&params), bits(&expected), "{sizes:?}");
            }
            let worst = params.iter().zip(&expected).map(|(a, b)| difference(a, b)).fold(0.0, f32::max);
            assert!(worst < 1e-6, "{sizes:?}: {worst}");
        }
    }
}

#[test]
fn a_run_repeats_bit_for_bit() {
    let own = tempfile::tempdir().unwrap();
    let folder = deep(true, own.path());
    let twice = || {
        on_mesh([2, 1, 2, 1, 2], |groups| {
            let mut model = load(&folder, "cpu", &groups, &ShardOptions::default())?;
            let mut adam = Adam::new(AdamConfig::default(), model.params());
            for _ in 0..3 {
                model.zero_grads();
                run(&mut *model, dp(&groups))?;
                adam.step(&mut *model, 0.01, Some(1.0))?;
            }
            Ok(bits(&gather_all(&*model)?))
        })
        .unwrap()
    };
    assert!(twice() == twice());
}

#[test]
fn calls_add_up_whatever_their_number() {
    let own = tempfile::tempdir().unwrap();
    let folder = deep(true, own.path());
    let options = ShardOptions { layers_per_stage: Some(4), ..ShardOptions::default() };
    for sizes in [[1, 2, 2, 1, 1], [2, 1, 1, 1, 2], [2, 1, 2, 1, 1]] {
        let found = on_mesh(sizes, |groups| {
            let mut model = load(&folder, "cpu", &groups, &options)?;
            let (rank, of) = dp(&groups);
            let together = run(&mut *model, (rank, of))?.grads;
            model.zero_grads();
            for micro in samples(61) {
                let (micro, rows) = part(&micro, rank, of, 61);
                let mut losses = AllLosses { rows: vec![rows], vocab: 61, log_probs: Vec::new() };
                losses.with(0, &mut |loss| model.forward_backward(&micro.batch, &micro.positions, loss))?;
            }
            let grads = (0..together.len()).map(|index| model.gather(index, &model.read_grad(index)));
            Ok((together, grads.collect::<Result<Vec<_>>>()?))
        });
        for (together, apart) in found.unwrap() {
            let worst = apart.iter().zip(&together).map(|(a, b)| difference(a, b)).fold(0.0, f32::max);
            assert!(worst <= CLOSE, "{sizes:?}: {worst}");
        }
    }
}

/// Parameters and moments by name.
type Saved = (Vec<Vec<f32>>, u64, Vec<Moments>);

fn save(model: &dyn Model, adam: &Adam) -> Result<Saved> {
    let moments: Vec<MomentsView<'_>> = adam.state().map(|(_, moments)| moments).collect();
    let gather = |(index, moments): (usize, &MomentsView<'_>)| {
        Ok(Moments { m: model.gather(index, moments.m)?, v: model.gather(index, moments.v)? })
    };
    Ok((gather_all(model)?, adam.steps(), moments.iter().enumerate().map(gather).collect::<Result<_>>()?))
}

#[test]
fn a_checkpoint_goes_from_one_mesh_to_another() {
    let own = tempfile::tempdir().unwrap();
    let folder = deep(true, own.path());
    let saved = on_mesh([2, 1, 2, 1, 2], |groups| {
        let mut model = load(&folder, "cpu", &groups, &ShardOptions::default())?;
        let mut adam = Adam::new(AdamConfig::default(), model.params());
        run(&mut *model, dp(&groups))?;
        adam.step(&mut *model, 0.01, None)?;
        // A zero with a sign must keep it.
        let with_zero = model.gather(3, &model.read_param(3))?;
        let with_zero: Vec<f32> =
            with_zero.iter().enumerate().map(|(i, v)| if i % 5 == 0 { -0.0 } else { *v }).collect();
        model.write_param(3, &model.cut(3, &with_zero)?)?;
        let export = own.path().join("exported");
        weights::export(&*model, &export, &weights::ExportOptions { shard_bytes_max: 40_000, ..Default::default() })?;
        save(&*model, &adam)
    });
    let (params, steps, moments) = saved.unwrap().swap_remove(0);
    assert!(params[3].iter().step_by(5).all(|v| v.to_bits() == (-0.0f32).to_bits()));
    let exported = crate::model::load(&own.path().join("exported"), "cpu").unwrap();
    let exported: Vec<Vec<f32>> = (0..params.len()).map(|index| exported.read_param(index)).collect();
    assert_eq!(bits(&exported), bits(&params));
    for sizes in [[1, 1, 3, 1, 1], [1, 1, 1, 2, 4], [4, 1, 2, 1, 1], [1, 2, 1, 1, 2]] {
        let names: Vec<String> =
            ModelConfig::from_folder(&folder).unwrap().params().into_iter().map(|p| p.name).collect();
        let loaded = on_mesh(sizes, |groups| {
            let mut model = load(&folder, "cpu", &groups, &ShardOptions::default())?;
            let mut adam = Adam::new(AdamConfig::default(), model.params());
            for (index, values) in params.iter().enumerate() {
                let piece = model.cut(index, values)?;
                model.write_param(index, &piece)?;
            }
            adam.load_state(steps, &mut |name| {
                let index = names.iter().position(|other| other == name)?;
                let cut = |values| model.cut(index, values).ok();
                Some(Moments { m: cut(&moments[index].m)?, v: cut(&moments[index].v)? })
            })?;
            save(&*model, &adam)
        });
        for (found, found_steps, found_moments) in loaded.unwrap() {
            assert_eq!((bits(&found), found_steps), (bits(&params), steps), "{sizes:?}");
            assert!(found_moments == moments, "{sizes:?}");
        }
    }
}

#[test]
fn fresh_weights_are_those_of_one_rank() {
    let own = tempfile::tempdir().unwrap();
    let config = ModelConfig::from_folder(&deep(false, own.path())).unwrap();
    let one = crate::model::random(&config, "cpu", 9).unwrap();
    let expected: Vec<Vec<f32>> = (0..one.params().len()).map(|index| one.read_param(index)).collect();
    for sizes in MESHES {
        let found =
            on_mesh(sizes, |groups| gather_all(&*random(&config, "cpu", 9, &groups, &ShardOptions::default())?));
        assert!(found.unwrap().iter().all(|found| *found == expected), "{sizes:?}");
    }
}

/// The model in `folder` with every parameter rounded.
fn rounded(folder: &Path, rounding: Rounding) -> Box<dyn Model> {
    let mut model = crate::model::load(folder, "cpu").unwrap();
    for index in 0..model.params().len() {
        let mut values = model.read_param(index);
        rounding.apply(&mut values);
        model.write_param(index, &values).unwrap();
    }
    model
}

#[test]
fn roundings_are_where_they_belong() {
    let own = tempfile::tempdir().unwrap();
    let folder = deep(false, own.path());
    for rounding in [Rounding::Bf16, Rounding::F16] {
        let mut one = rounded(&folder, rounding);
        let expected = run(&mut *one, (0, 1)).unwrap();
        let worst = |options: &ShardOptions, one: &mut dyn Model, expected: &Found| {
            let found =
                on_mesh([1, 1, 2, 1, 2], |groups| run(&mut *load(&folder, "cpu", &groups, options)?, dp(&groups)));
            one.zero_grads();
            compare(&found.unwrap(), one, expected)
        };
        // Computing with rounded parameters is computing with those of a rounded model.
        for options in [
            ShardOptions { param_dtype: rounding, ..ShardOptions::default() },
            ShardOptions { master_dtype: rounding, ..ShardOptions::default() },
        ] {
            let found = worst(&options, &mut *one, &expected);
            assert!(found.iter().all(|worst| *worst <= CLOSE), "{options:?} {found:?}");
        }
        // Rounded gradients differ by about the type's precision, and nothing else does.
        let mut one = crate::model::load(&folder, "cpu").unwrap();
        let expected = run(&mut *one, (0, 1)).unwrap();
        let options = ShardOptions { reduce_dtype: rounding, ..ShardOptions::default() };
        let [grads, hidden, log_probs] = worst(&options, &mut *one, &expected);
        assert!(hidden <= CLOSE && log_probs <= CLOSE && grads > CLOSE && grads < 0.01, "{grads} {hidden} {log_probs}");
    }
}

#[test]
fn masters_are_rounded_after_an_update() {
    let own = tempfile::tempdir().unwrap();
    let folder = deep(false, own.path());
    let options = ShardOptions { master_dtype: Rounding::Bf16, offload: true, ..ShardOptions::default() };
    let found = on_mesh([1, 1, 2, 1, 1], |groups| {
        let mut model = load(&folder, "cpu", &groups, &options)?;
        run(&mut *model, dp(&groups))?;
        Adam::new(AdamConfig::default(), model.params()).step(&mut *model, 0.01, None)?;
        gather_all(&*model)
    });
    for values in found.unwrap().swap_remove(0) {
        let mut again = values.clone();
        Rounding::Bf16.apply(&mut again);
        assert_eq!(values, again);
    }
}

#[test]
fn burn_shards_over_data_and_stages_only() {
    let own = tempfile::tempdir().unwrap();
    let folder = deep(true, own.path());
    for sizes in [[1, 2, 1, 1, 1], [2, 1, 2, 1, 1]] {
        check(&folder, "burn:flex", sizes, &ShardOptions::default()).unwrap();
    }
    for sizes in [[1, 1, 1, 1, 2], [1, 1, 1, 2, 1]] {
        let failure = on_mesh(sizes, |groups| load(&folder, "burn:flex", &groups, &ShardOptions::default()).map(drop));
        let text = failure.unwrap_err().to_string();
        assert!(text.contains("device `burn:flex`: cannot cut a block over tp"), "{text}");
    }
}

#[test]
fn scores_are_those_of_one_rank() {
    let own = tempfile::tempdir().unwrap();
    let folder = deep(true, own.path());
    let sequences = &samples(61)[1];
    let candidates: Vec<Vec<u32>> =
        sequences.iter().map(|ids| (1..ids.len()).flat_map(|t| [t as u32, 60 - t as u32]).collect()).collect();
    let request = |(ids, own)| ScoreRequest { ids, first: 1, candidates: Some(own) };
    let pairs = sequences.iter().map(Vec::as_slice).zip(candidates.iter().map(Vec::as_slice));
    let requests: Vec<ScoreRequest<'_>> = pairs.map(request).collect();
    let options = ScoreOptions { top_k: 3, mini_batch: 3, ..ScoreOptions::default() };
    let mut one = crate::model::load(&folder, "cpu").unwrap();
    let expected = score(&mut *one, &requests, &options).unwrap();
    for reshard in [Reshard::Always, Reshard::Never] {
        for sizes in [[1, 1, 2, 1, 1], [2, 1, 1, 1, 1], [1, 1, 1, 2, 2], [2, 1, 2, 1, 2]] {
            let shard_options = ShardOptions { reshard, ..ShardOptions::default() };
            let found = on_mesh(sizes, |groups| {
                let mut model = load(&folder, "cpu", &groups, &shard_options)?;
                Ok((model.has_head(), score(&mut *model, &requests, &options)?))
            });
            let (heads, found): (Vec<_>, Vec<_>) = found.unwrap().into_iter().unzip();
            assert_eq!(heads.iter().filter(|head| **head).count(), sizes[2] * sizes[3] * sizes[4]);
            for (_, found) in heads.iter().zip(found).filter(|(head, _)| **head) {
                for (found, expected) in found.iter().zip(&expected) {
                    assert_eq!(found.top_ids, expected.top_ids);
                    assert_eq!(found.top1, expected.top1);
                    assert!(difference(&found.logprobs, &expected.logprobs) <= CLOSE);
                    assert!(difference(&found.candidate_logprobs, &expected.candidate_logprobs) <= CLOSE);
                    assert!(difference(&found.entropy, &expected.entropy) <= CLOSE);
                }
            }
        }
    }
}

#[test]
fn what_cannot_be_cut_or_done_is_refused() {
    let own = tempfile::tempdir().unwrap();
    let folder = deep(false, own.path());
    let message = |sizes: Sizes, options: &ShardOptions| {
        on_mesh(sizes, |groups| load(&folder, "cpu", &groups, options).map(drop)).unwrap_err().to_string()
    };
    let plain = ShardOptions::default();
    let text = message([1, 1, 1, 2, 8], &plain);
    assert!(text.contains("8 heads with 4 key-value heads cannot be cut over tp 8 × cp 2 ranks"), "{text}");
    let text = message([9, 1, 1, 1, 1], &plain);
    assert!(text.contains("8 layers cannot be cut into 9 stages"), "{text}");
    let text = message([2, 1, 1, 1, 1], &ShardOptions { layers_per_stage: Some(3), ..plain.clone() });
    assert!(text.contains("2 stages of 3 layers are not the model's 8 layers"), "{text}");
    on_mesh([1, 1, 2, 1, 1], |groups| {
        let mut model = load(&folder, "cpu", &groups, &plain)?;
        assert!(model.decoder(1, 8).err().unwrap().to_string().contains("does not decode"));
        assert!(model.write_param(0, &[0.0]).unwrap_err().to_string().contains("this rank's piece of"));
        assert!(model.cut(0, &[0.0]).is_err() && model.gather(0, &[0.0]).is_err());
        let text = model.head_logits_rv(&[0.0; 32], &mut Vec::new()).unwrap_err().to_string();
        assert!(text.contains("not put together"), "{text}");
        model.prepare_head()?;
        model.head_logits_rv(&[0.0; 32], &mut Vec::new())
    })
    .unwrap();
    // A loss that wants the whole vocabulary says so.
    let failure = on_mesh([1, 1, 1, 1, 2], |groups| {
        struct Whole;
        impl HeadLoss for Whole {
            fn needs_first_pass(&self) -> bool {
                false
            }
            fn observe(&mut self, _: Range<usize>, _: &[f32]) -> Result<()> {
                Ok(())
            }
            fn gradient(&mut self, _: Range<usize>, _: &mut [f32]) -> Result<()> {
                Ok(())
            }
        }
        let (micro, _) = part(&samples(61)[0], 0, 1, 61);
        load(&folder, "cpu", &groups, &plain)?.forward_backward(&micro.batch, &micro.positions, &mut Whole)
    });
    let text = failure.unwrap_err().to_string();
    assert!(text.contains("needs the whole vocabulary"), "{text}");
}

/// A loss at which one rank ends.
struct Doomed {
    inner: AllLosses,
    panics: Option<bool>,
}

impl Losses for Doomed {
    fn with(&mut self, index: usize, run: &mut dyn FnMut(&mut dyn HeadLoss) -> Result<()>) -> Result<()> {
        match self.panics {
            Some(true) if index == 1 => panic!("out of luck"),
            Some(false) if index == 1 => Err(EngineError::invalid("the disk is full", "")),
            _ => self.inner.with(index, run),
        }
    }
}

#[test]
fn a_rank_that_fails_ends_the_others() {
    let own = tempfile::tempdir().unwrap();
    let folder = deep(true, own.path());
    for sizes in [[1, 1, 2, 1, 2], [2, 1, 2, 1, 1], [1, 1, 1, 2, 2]] {
        for panics in [false, true] {
            let begun = Instant::now();
            // The last rank is at the pipeline's last stage.
            let doomed = mesh(sizes).world() - 1;
            let failure = on_mesh(sizes, |groups| {
                let mut model = load(&folder, "cpu", &groups, &ShardOptions::default())?;
                let (rank, of) = dp(&groups);
                let (micro, rows): (Vec<_>, Vec<_>) = samples(61).iter().map(|micro| part(micro, rank, of, 61)).unzip();
                let inner = AllLosses { rows, vocab: 61, log_probs: Vec::new() };
                let mut losses = Doomed { inner, panics: (groups.rank() == doomed).then_some(panics) };
                model.forward_backward_each(&micro, &mut losses)
            });
            let text = failure.unwrap_err().to_string();
            let expected = if panics { "panicked: out of luck" } else { "failed: the disk is full" };
            assert_eq!(text, format!("rank {doomed} {expected}"));
            assert!(begun.elapsed() < Duration::from_millis(PATIENT_MS), "the others waited");
        }
    }
}

#[test]
fn memory_falls_with_the_number_of_ranks() {
    let own = tempfile::tempdir().unwrap();
    let folder = deep(false, own.path());
    let config = ModelConfig::from_folder(&folder).unwrap();
    let count = |specs: Vec<ParamSpec>| 4 * specs.iter().map(ParamSpec::len).sum::<usize>();
    let whole = count(config.params());
    let block = count(config.block_params(0));
    println!("bytes a rank, most of any; one rank would have {whole} of parameters");
    println!("{:24} {:>9} {:>9} {:>9} {:>9} {:>9} {:>9}", "mesh", "params", "1/N", "grads", "Adam", "gathered", "sums");
    for (sizes, reshard) in [
        ([1, 1, 2, 1, 1], Reshard::Always),
        ([1, 1, 4, 1, 1], Reshard::Always),
        ([1, 1, 8, 1, 1], Reshard::Always),
        ([1, 1, 8, 1, 1], Reshard::Default),
        ([1, 1, 8, 1, 1], Reshard::Never),
        ([1, 1, 1, 8, 1], Reshard::Always),
        ([1, 1, 1, 1, 2], Reshard::Always),
        ([1, 1, 1, 1, 4], Reshard::Always),
        ([2, 1, 1, 1, 1], Reshard::Always),
        ([4, 1, 1, 1, 1], Reshard::Always),
        ([2, 1, 2, 1, 2], Reshard::Always),
        ([1, 1, 2, 2, 2], Reshard::Always),
        ([1, 2, 4, 1, 1], Reshard::Always),
    ] {
        let options = ShardOptions { reshard, ..ShardOptions::default() };
        let found = on_mesh(sizes, |groups| {
            let mut model = load(&folder, "cpu", &groups, &options)?;
            let memory = run(&mut *model, dp(&groups))?.memory.unwrap();
            let mut adam = Adam::new(AdamConfig::default(), model.params());
            adam.step(&mut *model, 0.01, None)?;
            let state = adam.bytes();
            Ok((memory, state))
        });
        let found = found.unwrap();
        let most = |value: fn(&(RankMemory, usize)) -> usize| found.iter().map(value).max().unwrap();
        let (params, grads, state) = (most(|f| f.0.params), most(|f| f.0.grads), most(|f| f.1));
        let (gathered, sums) = (most(|f| f.0.gathered_peak), most(|f| f.0.whole_grads_peak));
        let [pp, replicate, shard, cp, tp] = sizes;
        let expected = whole / (pp * shard * cp * tp);
        let mesh = format!("pp{pp} r{replicate} s{shard} cp{cp} tp{tp} {reshard:?}");
        println!("{mesh:24} {params:>9} {expected:>9} {grads:>9} {state:>9} {gathered:>9} {sums:>9}");
        // Norms and some biases are on every tensor parallel rank, the embedding or the head is one stage's more.
        let slack = if tp > 1 || pp > 1 { 1.25 } else { 1.01 };
        assert!(params as f64 <= slack * expected as f64, "{mesh}: {params} of {expected}");
        let copies = if replicate > 1 { 2 } else { 1 };
        assert!(grads <= copies * params && state <= 2 * params, "{mesh}: {grads} {state}");
        if shard * cp > 1 && reshard == Reshard::Always {
            // A block's values, once as they are and once as the kernels read them (panels are padded).
            assert!(gathered <= 4 * block / tp, "{mesh}: {gathered}");
        }
        if reshard == Reshard::Never && shard > 1 {
            assert!(gathered > 8 * block / tp, "{mesh}: {gathered}");
        }
    }
}
