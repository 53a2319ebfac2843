//! Weights in fewer bits: what decodes and what is only read, held against f32 models of the same numbers.

use std::ops::ControlFlow;

use super::tests::{batch, configs, positions, random, sequences};
use crate::generate::{GenerateOptions, GenerateRequest, Generated, SamplingParams, generate};
use crate::model::{self, Model, ModelConfig, Prefill, WeightFormat};
use crate::objective::{Normaliser, ObjectiveSpec, PolicyLoss, Sample, Spread};
use crate::score::{ScoreOptions, ScoreRequest, score};

const BF16: WeightFormat = WeightFormat::Bf16;
const INT8: WeightFormat = WeightFormat::Int8 { head: false };
const FORMATS: [WeightFormat; 3] = [BF16, INT8, WeightFormat::Int8 { head: true }];

/// A model that holds the weights of `of` in `format` and is not trained.
fn frozen(of: &dyn Model, format: WeightFormat) -> Box<dyn Model> {
    let mut model = model::random_frozen(of.config(), "cpu", format, 77).unwrap();
    copy(of, model.as_mut());
    model
}

fn copy(from: &dyn Model, to: &mut dyn Model) {
    for index in 0..from.params().len() {
        to.write_param(index, &from.read_param(index)).unwrap();
    }
}

/// What a model says about sequences: hidden states and logits of whole ones, logits of single steps.
fn said(model: &mut dyn Model) -> (Vec<f32>, Vec<f32>, Vec<f32>) {
    let sequences = sequences(&[7, 12, 30], model.config().vocab_size);
    let batch = batch(&sequences);
    let hidden = model.hidden_rh(&batch, &positions(&batch)).unwrap();
    let mut logits = Vec::new();
    model.head_logits_rv(&hidden, &mut logits).unwrap();
    (hidden, logits, stepped(model))
}

fn stepped(model: &mut dyn Model) -> Vec<f32> {
    let sequences = sequences(&[7, 12, 30], model.config().vocab_size);
    let mut decoder = model.decoder(3, 64).unwrap();
    let entries: Vec<Prefill<'_>> =
        sequences.iter().enumerate().map(|(slot, s)| Prefill { slots: vec![slot], prompt: s }).collect();
    let mut steps = decoder.prefill(&entries).unwrap();
    for t in 0..5 {
        steps.extend(decoder.step(&[(0, t), (1, t + 1), (2, t + 2)]).unwrap());
    }
    steps
}

#[test]
fn bf16_is_the_f32_model_of_rounded_weights_bit_for_bit() {
    for config in configs() {
        let trained = random("cpu", &config, 3);
        let mut rounded = random("cpu", &config, 4);
        for index in 0..trained.params().len() {
            let mut values = trained.read_param(index);
            values.iter_mut().for_each(|v| *v = half::bf16::from_f32(*v).to_f32());
            rounded.write_param(index, &values).unwrap();
        }
        let mut read_only = frozen(trained.as_ref(), BF16);
        for index in 0..trained.params().len() {
            let name = &trained.params()[index].name;
            // The last norm is small enough to be kept as it was given; what reads it rounds it.
            if name != "model.norm.weight" {
                assert_eq!(read_only.read_param(index), rounded.read_param(index), "{name}");
            }
        }
        let expected = said(rounded.as_mut());
        assert_eq!(said(read_only.as_mut()), expected);
        // A model in training decodes with the same numbers, and still trains with its own.
        let mut trained = trained;
        let before = said(trained.as_mut());
        trained.decode_in(BF16).unwrap();
        let after = said(trained.as_mut());
        assert_eq!((&after.0, &after.1, &after.2), (&before.0, &before.1, &expected.2));
        trained.decode_in(WeightFormat::F32).unwrap();
        assert_eq!(said(trained.as_mut()), before);
    }
}

#[test]
fn a_training_model_decodes_as_a_rollout_of_its_own_would_after_every_update() {
    for config in configs() {
        for format in FORMATS {
            let mut trained = random("cpu", &config, 3);
            trained.decode_in(format).unwrap();
            let mut rollout = frozen(trained.as_ref(), format);
            assert_eq!(stepped(trained.as_mut()), stepped(rollout.as_mut()), "{format}");
            let moved = &mut |index: usize, values: &mut [f32], _: &mut [f32]| {
                values.iter_mut().enumerate().for_each(|(i, v)| *v += ((index + i) % 7) as f32 * 1e-3);
            };
            trained.update_params(moved).unwrap();
            assert_ne!(stepped(trained.as_mut()), stepped(rollout.as_mut()), "{format}");
            copy(trained.as_ref(), rollout.as_mut());
            assert_eq!(stepped(trained.as_mut()), stepped(rollout.as_mut()), "{format}");
            // A single parameter, too.
            let index = trained.params().iter().position(|p| p.name.ends_with("1.self_attn.k_proj.weight")).unwrap();
            let halved: Vec<f32> = trained.read_param(index).iter().map(|v| v / 2.0).collect();
            trained.write_param(index, &halved).unwrap();
            rollout.write_param(index, &halved).unwrap();
            assert_eq!(stepped(trained.as_mut()), stepped(rollout.as_mut()), "{format}");
        }
    }
}

#[test]
fn a_model_that_is_only_read_comes_from_a_folder_and_is_not_trained() {
    let config = &configs()[1];
    let trained = random("cpu", config, 3);
    let dir = tempfile::tempdir().unwrap();
    crate::weights::export(&*trained, dir.path(), &crate::weights::ExportOptions::default()).unwrap();
    for format in FORMATS {
        let mut read_only = model::load_frozen(dir.path(), "cpu", format).unwrap();
        assert_eq!(said(read_only.as_mut()), said(frozen(trained.as_ref(), format).as_mut()), "{format}");
        let error = read_only.update_params(&mut |_, _, _| ()).unwrap_err();
        assert!(error.to_string().contains("cannot be trained") && error.hint().is_some(), "{error}");
        assert!(read_only.decode_in(BF16).is_err());
        let error = model::load_frozen(dir.path(), "burn:flex", format).err().unwrap();
        assert!(error.to_string().contains("burn:flex") && error.hint().is_some_and(|h| h.contains("cpu")), "{error}");
        let error = random("burn:flex", config, 3).decode_in(format).unwrap_err();
        assert!(error.to_string().contains(&format.to_string()) && error.hint().is_some(), "{error}");
    }
}

/// Completions with the log-probs that were recorded, and the mismatch that training reports of them.
pub(super) fn mismatch(model: &mut dyn Model) -> (Vec<Sample>, Spread) {
    let requests: Vec<GenerateRequest> = sequences(&[5, 9, 3], model.config().vocab_size)
        .into_iter()
        .zip(0..)
        .map(|(prompt, id)| GenerateRequest { id, prompt, n: 3, max_new_tokens: 60, ..GenerateRequest::default() })
        .collect();
    let options = GenerateOptions { logprobs: true, slots: 4, ..GenerateOptions::default() };
    let mut samples = Vec::new();
    generate(model, &requests, &SamplingParams::default(), &options, &mut |done: Generated| {
        let prompt = &requests[done.id as usize].prompt;
        samples.push(Sample {
            ids: [prompt.as_slice(), &done.tokens].concat(),
            prompt_len: prompt.len(),
            advantage: 1.0,
            recorded: Some(done.logprobs),
            ..Sample::default()
        });
        ControlFlow::Continue(())
    })
    .unwrap();
    let spec = ObjectiveSpec { distill: None, ..ObjectiveSpec::default() };
    let mut loss = PolicyLoss::new(&spec, &samples, Normaliser::of(&spec, &samples, 1.0), None).unwrap();
    let (batch, positions) = loss.batch().unwrap();
    model.forward_backward(&batch, &positions, &mut loss).unwrap();
    let found = loss.into_report().mismatch;
    (samples, found)
}

fn logprobs(model: &mut dyn Model, samples: &[Sample]) -> Vec<f32> {
    let requests: Vec<ScoreRequest<'_>> =
        samples.iter().map(|s| ScoreRequest { ids: &s.ids, first: s.prompt_len, candidates: None }).collect();
    score(model, &requests, &ScoreOptions::default()).unwrap().into_iter().flat_map(|s| s.logprobs).collect()
}

#[test]
fn the_mismatch_is_that_of_the_rounded_weights() {
    let config = ModelConfig { initializer_range: 0.1, ..configs().swap_remove(1) };
    for format in FORMATS {
        let mut trained = random("cpu", &config, 3);
        let (_, plain) = mismatch(trained.as_mut());
        assert!(plain.max < 1e-4, "{plain:?}");
        trained.decode_in(format).unwrap();
        let (samples, found) = mismatch(trained.as_mut());
        // Both kinds of weights over whole sequences, where decoding has no part in it.
        let mut rollout = frozen(trained.as_ref(), format);
        let (own, rounded) = (logprobs(trained.as_mut(), &samples), logprobs(rollout.as_mut(), &samples));
        let differences = || own.iter().zip(&rounded).map(|(a, b)| f64::from((a - b).abs()));
        let (mean, max) = (differences().sum::<f64>() / own.len() as f64, differences().fold(0.0, f64::max));
        assert!((found.mean().unwrap() - mean).abs() < 1e-5, "{format}: {found:?}, {mean}");
        assert!((found.max - max).abs() < 1e-4, "{format}: {found:?}, {max}");
        assert!(mean > 10.0 * plain.mean().unwrap() && max < 0.3, "{format}: {mean} {max}");
    }
}
