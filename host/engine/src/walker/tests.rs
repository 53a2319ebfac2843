//! The numbers of the walk, on every engine of this machine: gradients against finite differences, and independence of how a
//! batch is cut, what is decoded beside a sequence, and how many threads there are.

use std::ops::Range;
use std::path::Path;

use proptest::prelude::*;

use super::*;
use crate::batch::{Position, TokenBatch};
use crate::cpu_engine::CpuEngine;
use crate::model::{self, Decoder, HeadLoss, Model, ModelConfig, Prefill};
use crate::{EngineError, Result};

/// Small configs that together use every switch.
pub(super) fn configs() -> Vec<ModelConfig> {
    let base = r#""vocab_size": 19, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4,
        "max_position_embeddings": 128, "initializer_range": 0.3"#;
    let parse = |more: &str| ModelConfig::from_json(&format!("{{{base}, {more}}}"), Path::new("config.json")).unwrap();
    vec![
        parse(r#""model_type": "qwen2", "num_key_value_heads": 2, "tie_word_embeddings": true"#),
        parse(r#""model_type": "qwen3", "num_key_value_heads": 1, "head_dim": 10"#),
        parse(r#""model_type": "llama", "num_key_value_heads": 4, "attention_bias": true, "mlp_bias": true"#),
    ]
}

pub(super) fn random(device: &str, config: &ModelConfig, seed: u64) -> Box<dyn Model> {
    let mut model = model::random(config, device, seed).unwrap();
    // Fresh norms and biases are constants; other values make mistakes in their gradients visible.
    let values = crate::weights::random(&ModelConfig { initializer_range: 0.2, ..config.clone() }, seed + 1).concat();
    let mut next = values.iter().filter(|v| **v != 0.0 && **v != 1.0).cycle();
    for index in 0..model.params().len() {
        let name = &model.params()[index].name;
        let center = f32::from(u8::from(name.ends_with("norm.weight")));
        if center == 1.0 || name.ends_with(".bias") {
            let fresh: Vec<f32> = model.read_param(index).iter().map(|_| center + next.next().unwrap()).collect();
            model.write_param(index, &fresh).unwrap();
        }
    }
    model
}

/// Token sequences of the given lengths.
pub(super) fn sequences(lens: &[usize], vocab: usize) -> Vec<Vec<u32>> {
    lens.iter()
        .enumerate()
        .map(|(row, len)| (0..*len).map(|t| ((row * 31 + t * 7 + t * t) % vocab) as u32).collect())
        .collect()
}

pub(super) fn batch(sequences: &[Vec<u32>]) -> TokenBatch {
    TokenBatch::new(&sequences.iter().map(Vec::as_slice).collect::<Vec<_>>()).unwrap()
}

pub(super) fn positions(batch: &TokenBatch) -> Vec<Position> {
    batch.lens_b.iter().enumerate().flat_map(|(b, len)| (0..*len).map(move |t| Position { b, t })).collect()
}

/// A smooth loss that weighs every logit differently: the sum of `w · sin(logit)`.
struct Wave {
    vocab: usize,
    sum: f64,
    passes: bool,
    observed: Vec<f32>,
}

impl Wave {
    fn new(vocab: usize, passes: bool) -> Self {
        Self { vocab, sum: 0.0, passes, observed: Vec::new() }
    }

    fn weight(row: usize, id: usize) -> f32 {
        ((row * 5 + id * 3) % 11) as f32 / 11.0 - 0.4
    }
}

impl HeadLoss for Wave {
    fn needs_first_pass(&self) -> bool {
        self.passes
    }

    fn observe(&mut self, rows: Range<usize>, logits_rv: &[f32]) -> Result<()> {
        assert_eq!(rows.start * self.vocab, self.observed.len());
        self.observed.extend_from_slice(logits_rv);
        Ok(())
    }

    fn gradient(&mut self, rows: Range<usize>, logits_rv: &mut [f32]) -> Result<()> {
        if self.passes {
            assert_eq!(logits_rv, &self.observed[rows.start * self.vocab..rows.end * self.vocab]);
        }
        for (row, logits) in rows.zip(logits_rv.chunks_exact_mut(self.vocab)) {
            for (id, logit) in logits.iter_mut().enumerate() {
                let weight = Self::weight(row, id);
                self.sum += f64::from(weight) * f64::from(*logit).sin();
                *logit = weight * logit.cos();
            }
        }
        Ok(())
    }
}

fn loss(model: &mut dyn Model, batch: &TokenBatch) -> f64 {
    let vocab = model.config().vocab_size;
    let hidden = model.hidden_rh(batch, &positions(batch)).unwrap();
    let mut logits = Vec::new();
    model.head_logits_rv(&hidden, &mut logits).unwrap();
    let rows = logits.chunks_exact(vocab).enumerate();
    rows.flat_map(|(row, logits)| {
        logits.iter().enumerate().map(move |(id, l)| f64::from(Wave::weight(row, id)) * f64::from(*l).sin())
    })
    .sum()
}

fn grads(model: &mut dyn Model, batch: &TokenBatch, wanted: &[Position]) -> Vec<Vec<f32>> {
    model.zero_grads();
    let mut wave = Wave::new(model.config().vocab_size, false);
    model.forward_backward(batch, wanted, &mut wave).unwrap();
    (0..model.params().len()).map(|index| model.read_grad(index)).collect()
}

fn gradients_agree_with_finite_differences(device: &str) {
    for config in configs() {
        let mut model = random(device, &config, 11);
        let batch = batch(&sequences(&[5, 3, 6], config.vocab_size));
        let found = grads(&mut *model, &batch, &positions(&batch));
        for (index, found) in found.iter().enumerate() {
            let name = model.params()[index].name.clone();
            let values = model.read_param(index);
            // Along the gradient itself the difference is largest and rounding matters least.
            let norm = found.iter().map(|g| f64::from(*g).powi(2)).sum::<f64>().sqrt();
            assert!(norm > 1e-3, "{name}: the gradient vanishes");
            let step = 2e-3 / norm;
            let mut at = |sign: f64| {
                let moved: Vec<f32> = values
                    .iter()
                    .zip(found)
                    .map(|(v, g)| (f64::from(*v) + sign * step * f64::from(*g)) as f32)
                    .collect();
                model.write_param(index, &moved).unwrap();
                loss(&mut *model, &batch)
            };
            let slope = (at(1.0) - at(-1.0)) / (2.0 * step * norm);
            assert!((slope - norm).abs() <= 0.02 * norm, "{name}: slope {slope}, gradient {norm}");
            model.write_param(index, &values).unwrap();
        }
    }
}

fn a_batch_and_its_rows_give_the_same_gradient(device: &str) {
    let config = &configs()[1];
    let mut model = random(device, config, 5);
    // More tokens than one tile holds, and rows of many lengths.
    let lens: Vec<usize> = (0..40).map(|row| 20 + row * 13 % 60).collect();
    let rows = sequences(&lens, config.vocab_size);
    let whole = batch(&rows);
    let wanted = positions(&whole);
    let together = grads(&mut *model, &whole, &wanted);
    assert_eq!(together, grads(&mut *model, &whole, &wanted), "the same call gives the same bits");

    model.zero_grads();
    let mut first = 0;
    for row in &rows {
        // The weights of the loss go by the row of logits, so each part starts where it stands in the whole.
        struct From(Wave, usize);
        impl HeadLoss for From {
            fn needs_first_pass(&self) -> bool {
                false
            }
            fn observe(&mut self, _: Range<usize>, _: &[f32]) -> Result<()> {
                Ok(())
            }
            fn gradient(&mut self, rows: Range<usize>, logits: &mut [f32]) -> Result<()> {
                self.0.gradient(rows.start + self.1..rows.end + self.1, logits)
            }
        }
        let part = batch(std::slice::from_ref(row));
        model
            .forward_backward(&part, &positions(&part), &mut From(Wave::new(config.vocab_size, false), first))
            .unwrap();
        first += row.len();
    }
    for (index, expected) in together.iter().enumerate() {
        let scale = expected.iter().fold(0.0f32, |max, g| max.max(g.abs()));
        for (found, expected) in model.read_grad(index).iter().zip(expected) {
            assert!((found - expected).abs() <= 1e-4 * scale, "{}: {found} and {expected}", model.params()[index].name);
        }
    }
}

fn positions_may_come_in_any_order_and_rows_without_one_cost_nothing(device: &str) {
    let config = &configs()[0];
    let mut model = random(device, config, 5);
    let batch = batch(&sequences(&[4, 9, 7], config.vocab_size));
    let all = model.hidden_rh(&batch, &positions(&batch)).unwrap();
    let wanted = [Position { b: 2, t: 5 }, Position { b: 0, t: 3 }, Position { b: 2, t: 0 }];
    let found = model.hidden_rh(&batch, &wanted).unwrap();
    let h = config.hidden_size;
    for (found, place) in found.chunks_exact(h).zip([4 + 9 + 5, 3, 4 + 9]) {
        for (a, b) in found.iter().zip(&all[place * h..]) {
            assert!((a - b).abs() <= 1e-4, "{a} and {b}");
        }
    }
}

fn the_first_pass_sees_what_the_second_does(device: &str) {
    let config = &configs()[0];
    let mut model = random(device, config, 5);
    let batch = batch(&sequences(&[4, 9], config.vocab_size));
    let wanted = positions(&batch);
    let mut wave = Wave::new(config.vocab_size, true);
    model.forward_backward(&batch, &wanted, &mut wave).unwrap();
    assert_eq!(wave.observed.len(), wanted.len() * config.vocab_size);
}

/// Logits after each token of `sequence`, decoded in `slot` of `decoder`.
fn decode(decoder: &mut dyn Decoder, slot: usize, sequence: &[u32], prompt: usize) -> Vec<Vec<f32>> {
    let mut found = vec![decoder.prefill(&[Prefill { slots: vec![slot], prompt: &sequence[..prompt] }]).unwrap()];
    for id in &sequence[prompt..] {
        found.push(decoder.step(&[(slot, *id)]).unwrap());
    }
    found
}

fn decoding_agrees_with_the_whole_sequence(device: &str) {
    for config in configs() {
        let mut model = random(device, &config, 3);
        let sequence = sequences(&[40], config.vocab_size).remove(0);
        let found = decode(&mut *model.decoder(3, 64).unwrap(), 1, &sequence, 9).concat();
        let batch = batch(&[sequence]);
        let hidden = model.hidden_rh(&batch, &positions(&batch)).unwrap();
        let mut expected = Vec::new();
        model.head_logits_rv(&hidden, &mut expected).unwrap();
        for (a, b) in found.iter().zip(&expected[8 * config.vocab_size..]) {
            assert!((a - b).abs() <= 2e-4 * b.abs().max(1.0), "{a} and {b}");
        }
    }
}

fn a_sequence_decodes_to_the_same_bits_alone_and_among_others(device: &str) {
    for config in configs() {
        let mut model = random(device, &config, 3);
        let count = 150;
        let lens: Vec<usize> = (0..count).map(|row| 24 + row * 7 % 30).collect();
        let rows = sequences(&lens, config.vocab_size);
        let prompts: Vec<usize> = (0..count).map(|row| 1 + row * 5 % 23).collect();
        let vocab = config.vocab_size;

        // All together; each leaves when its sequence ends.
        let mut together: Vec<Vec<f32>> = vec![Vec::new(); count];
        let mut decoder = model.decoder(count, 64).unwrap();
        let entries: Vec<Prefill<'_>> =
            (0..count).map(|row| Prefill { slots: vec![row], prompt: &rows[row][..prompts[row]] }).collect();
        for (row, logits) in decoder.prefill(&entries).unwrap().chunks_exact(vocab).enumerate() {
            together[row].extend_from_slice(logits);
        }
        for step in 0.. {
            let live: Vec<(usize, u32)> =
                (0..count).rev().filter_map(|row| rows[row].get(prompts[row] + step).map(|id| (row, *id))).collect();
            if live.is_empty() {
                break;
            }
            for ((row, _), logits) in live.iter().zip(decoder.step(&live).unwrap().chunks_exact(vocab)) {
                together[*row].extend_from_slice(logits);
            }
        }
        drop(decoder);

        let mut decoder = model.decoder(1, 64).unwrap();
        for row in (0..count).step_by(7) {
            assert_eq!(decode(&mut *decoder, 0, &rows[row], prompts[row]).concat(), together[row], "row {row}");
            decoder.release(0);
        }
    }
}

fn a_prompt_for_many_slots_is_in_each(device: &str) {
    let config = &configs()[1];
    let mut model = random(device, config, 3);
    let mut decoder = model.decoder(4, 32).unwrap();
    let prompt = [3, 1, 4, 1, 5];
    let first = decoder.prefill(&[Prefill { slots: vec![2, 0, 3], prompt: &prompt }]).unwrap();
    assert_eq!(first.len(), config.vocab_size);
    let next = decoder.step(&[(0, 9), (2, 9), (3, 9)]).unwrap();
    let (a, rest) = next.split_at(config.vocab_size);
    assert_eq!([a, a].concat(), rest);
}

fn a_long_prompt_is_cut_without_a_trace(device: &str) {
    let config = ModelConfig { max_position_embeddings: 4096, ..configs()[0].clone() };
    let mut model = random(device, &config, 3);
    let sequence = sequences(&[2500], config.vocab_size).remove(0);
    let mut decoder = model.decoder(2, 4000).unwrap();
    let short = [1, 2, 3];
    let found = decoder
        .prefill(&[Prefill { slots: vec![1], prompt: &sequence }, Prefill { slots: vec![0], prompt: &short }])
        .unwrap();
    drop(decoder);
    let batch = batch(&[sequence, short.to_vec()]);
    let hidden = model.hidden_rh(&batch, &[Position { b: 0, t: 2499 }, Position { b: 1, t: 2 }]).unwrap();
    let mut expected = Vec::new();
    model.head_logits_rv(&hidden, &mut expected).unwrap();
    for (a, b) in found.iter().zip(&expected) {
        assert!((a - b).abs() <= 1e-3 * b.abs().max(1.0), "{a} and {b}");
    }
}

fn misuse_is_an_error(device: &str) {
    let config = &configs()[0];
    let mut model = random(device, config, 3);
    let message =
        |result: Result<Vec<f32>>| result.map_err(|e: EngineError| e.to_string()).expect_err("misuse is refused");
    let batch = batch(&sequences(&[4], config.vocab_size));
    assert!(message(model.hidden_rh(&batch, &[Position { b: 0, t: 4 }])).contains("outside the batch"));
    let wrong = TokenBatch::new(&[&[1, 19]]).unwrap();
    assert!(message(model.hidden_rh(&wrong, &[Position { b: 0, t: 0 }])).contains("token id 19"));
    let long = TokenBatch::new(&[&[1; 129]]).unwrap();
    assert!(message(model.hidden_rh(&long, &[])).contains("context is 128"));
    assert!(model.write_param(0, &[0.0]).is_err() && model.write_param(999, &[0.0]).is_err());
    assert!(model.decoder(1, 129).is_err() && model.decoder(0, 8).is_err());
    let mut decoder = model.decoder(2, 4).unwrap();
    assert!(message(decoder.step(&[(0, 1)])).contains("holds no prompt"));
    assert!(message(decoder.prefill(&[Prefill { slots: vec![2], prompt: &[1] }])).contains("slot 2 of 2"));
    assert!(message(decoder.prefill(&[Prefill { slots: vec![0], prompt: &[1; 5] }])).contains("does not fit"));
    assert!(message(decoder.prefill(&[Prefill { slots: vec![0, 0], prompt: &[1] }])).contains("not free"));
    decoder.prefill(&[Prefill { slots: vec![0], prompt: &[1, 2, 3] }]).unwrap();
    assert!(message(decoder.step(&[(0, 1), (0, 2)])).contains("twice"));
    decoder.step(&[(0, 1)]).unwrap();
    assert!(message(decoder.step(&[(0, 1)])).contains("full"));
    decoder.release(0);
    decoder.prefill(&[Prefill { slots: vec![0], prompt: &[1] }]).unwrap();
}

fn rollout_and_training_give_the_same_log_probs(device: &str) {
    for config in configs() {
        let mut model = random(device, &config, 3);
        let (_, mismatch) = super::format_tests::mismatch(&mut *model);
        assert_eq!(mismatch.count, 9 * 60);
        assert!(mismatch.max < 1e-4 && mismatch.max > 0.0, "{mismatch:?}");
    }
}

fn a_frozen_model_holds_no_gradients(device: &str) {
    let mut model = random(device, &configs()[0], 3);
    assert!(model.read_grad(0).iter().all(|g| *g == 0.0));
    model.zero_grads();
    assert!(model.decoder(1, 8).is_ok());
}

#[test]
fn scoring_needs_no_second_form_of_the_weights() {
    for config in configs() {
        let rows = sequences(&[37, 5, 20], config.vocab_size);
        let (batch, mut said) = (batch(&rows), Vec::new());
        for second_form_bytes_max in [SECOND_FORM_BYTES_MAX, 0] {
            let from = random("cpu", &config, 9);
            let values = (0..from.params().len()).map(|index| from.read_param(index)).collect();
            let mut model = Transformer::new(CpuEngine::new(config.clone()), values).unwrap();
            model.second_form_bytes_max = second_form_bytes_max;
            for round in 0..2 {
                let (hidden_rh, mut logits_rv) = (model.hidden_rh(&batch, &positions(&batch)).unwrap(), Vec::new());
                model.head_logits_rv(&hidden_rh, &mut logits_rv).unwrap();
                assert_eq!(model.device_bytes() > 0, second_form_bytes_max > 0, "round {round}");
                said.push((hidden_rh, logits_rv));
                // Decoding has it, and leaves it.
                drop(model.decoder(1, 8).unwrap());
                assert!(model.device_bytes() > 0);
            }
        }
        assert!(said.iter().all(|other| *other == said[0]), "{config:?}");
    }
}

#[test]
fn what_scoring_holds_is_known_before() {
    for (tie, second_form_bytes_max) in [(true, SECOND_FORM_BYTES_MAX), (false, SECOND_FORM_BYTES_MAX), (false, 0)] {
        let text = format!(
            r#"{{"model_type": "qwen3", "vocab_size": 512, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "max_position_embeddings": 128,
            "tie_word_embeddings": {tie}}}"#
        );
        let config = ModelConfig::from_json(&text, Path::new("config.json")).unwrap();
        let rows = sequences(&[37, 5], config.vocab_size);
        let batch = batch(&rows);
        let formats = [false, true].map(|head| WeightFormat::Int8 { head });
        for format in [WeightFormat::F32, WeightFormat::Bf16].into_iter().chain(formats) {
            let engine = CpuEngine::new(config.clone()).in_format(format).unwrap();
            let mut model = Transformer::from_source(engine, &mut |_, _, to| {
                to.fill(0.01);
                Ok(())
            })
            .unwrap();
            model.second_form_bytes_max = second_form_bytes_max;
            let hidden_rh = model.hidden_rh(&batch, &positions(&batch)).unwrap();
            model.head_logits_rv(&hidden_rh, &mut Vec::new()).unwrap();
            let held = (model.params_bytes() + model.device_bytes()) as f64;
            let said = footprint::scoring_bytes_with(&config, format, second_form_bytes_max) as f64;
            // Norms are held as they are, beside their place in what is said.
            assert!((held / said - 1.0).abs() < 0.01, "{format}, tied {tie}: {said} said, {held} held");
        }
    }
}

#[test]
fn devices_are_refused_with_a_way_out() {
    for (device, needle) in
        [("cuda:0", "not there yet"), ("burn:tpu", "no such device"), ("burn:cuda:x", "no such device")]
    {
        let error = model::random(&configs()[0], device, 1).err().expect("refused");
        assert!(error.to_string().contains(needle) && error.hint().is_some_and(|h| h.contains("burn:flex")), "{error}");
    }
}

/// Every test above on every engine of this machine.
macro_rules! on_each_device {
    ($($name:ident),* $(,)?) => {
        mod flex {
            $(#[test] fn $name() { super::$name("burn:flex"); })*
        }
        mod cpu {
            $(#[test] fn $name() { super::$name("cpu"); })*
        }
    };
}

on_each_device!(
    gradients_agree_with_finite_differences,
    a_batch_and_its_rows_give_the_same_gradient,
    positions_may_come_in_any_order_and_rows_without_one_cost_nothing,
    the_first_pass_sees_what_the_second_does,
    decoding_agrees_with_the_whole_sequence,
    a_sequence_decodes_to_the_same_bits_alone_and_among_others,
    a_prompt_for_many_slots_is_in_each,
    a_long_prompt_is_cut_without_a_trace,
    misuse_is_an_error,
    rollout_and_training_give_the_same_log_probs,
    a_frozen_model_holds_no_gradients,
);

/// A config of random sizes that fit together.
fn any_config() -> impl Strategy<Value = ModelConfig> {
    let sizes = (1usize..4, 1usize..4, 1usize..20, 8usize..60, 1usize..70, 1usize..4, 5usize..90);
    (0usize..3, any::<bool>(), sizes).prop_map(|(family, tied, (kv, group, half, hidden, inner, layers, vocab))| {
        let family = ["qwen2", "qwen3", "llama"][family];
        let heads = kv * group;
        let text = format!(
            r#"{{"model_type": "{family}", "vocab_size": {vocab}, "hidden_size": {hidden}, "intermediate_size": {inner},
            "num_hidden_layers": {layers}, "num_attention_heads": {heads}, "num_key_value_heads": {kv}, "head_dim": {},
            "max_position_embeddings": 256, "tie_word_embeddings": {tied}, "attention_bias": {tied}, "mlp_bias": {tied},
            "initializer_range": 0.2}}"#,
            2 * half
        );
        ModelConfig::from_json(&text, Path::new("config.json")).unwrap()
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 40, failure_persistence: None, ..ProptestConfig::default() })]
    #[test]
    fn engines_agree_on_random_shapes(config in any_config(), lens in prop::collection::vec(1usize..120, 1..7)) {
        let rows = sequences(&lens, config.vocab_size);
        let batch = batch(&rows);
        let wanted = positions(&batch);
        let mut found = Vec::new();
        for device in ["burn:flex", "cpu"] {
            let mut model = random(device, &config, 9);
            let hidden = model.hidden_rh(&batch, &wanted).unwrap();
            let mut logits = Vec::new();
            model.head_logits_rv(&hidden, &mut logits).unwrap();
            let mut all = grads(&mut *model, &batch, &wanted);
            all.push(logits);
            found.push(all);
        }
        for (index, (reference, cpu)) in found[0].iter().zip(&found[1]).enumerate() {
            let scale = reference.iter().fold(1e-3f32, |max, x| max.max(x.abs()));
            for (r, c) in reference.iter().zip(cpu) {
                prop_assert!((r - c).abs() <= 2e-4 * scale, "tensor {index} of {config:?}: {r} and {c}, scale {scale}");
            }
        }
    }
}
