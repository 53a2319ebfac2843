//! Models against PyTorch and transformers: logits, loss, every gradient, an optimizer step, greedy decoding, export.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::{Path, PathBuf};

use cosmos_engine::Result;
use cosmos_engine::batch::{Position, TokenBatch};
use cosmos_engine::model::{self, GenerationConfig, HeadLoss, Model, Prefill};
use cosmos_engine::optim::{Adam, AdamConfig};
use cosmos_engine::weights::{ExportOptions, export};
use safetensors::SafeTensors;

/// The devices under test: one by name, or every engine that each machine has.
fn devices() -> Vec<String> {
    let asked = std::env::var("COSMOS_TEST_DEVICE").ok();
    asked.map_or_else(|| vec!["cpu".into(), "burn:flex".into()], |name| vec![name])
}

fn load(folder: &Path, device: &str) -> Box<dyn Model> {
    model::load(folder, device).unwrap_or_else(|e| panic!("{}: {e}", folder.display()))
}

/// Runs `check` on every folder of `models/`, on every device.
fn each_case(check: fn(&Path, &Expected, &str)) {
    let Some(root) = cosmos_testkit::golden("models") else { return };
    let mut folders: Vec<PathBuf> =
        std::fs::read_dir(&root).expect("the golden folder is readable").flatten().map(|e| e.path()).collect();
    folders.retain(|folder| folder.join("config.json").is_file());
    folders.sort();
    assert!(!folders.is_empty(), "no model in {}", root.display());
    for folder in folders {
        for device in devices() {
            println!("{} on {device}", folder.display());
            check(&folder, &Expected::read(&folder), &device);
        }
    }
}

/// The tensors of `expect.safetensors`.
struct Expected {
    tensors: BTreeMap<String, (Vec<usize>, Vec<f64>)>,
}

impl Expected {
    fn read(folder: &Path) -> Self {
        let bytes = std::fs::read(folder.join("expect.safetensors")).expect("expect.safetensors is readable");
        let file = SafeTensors::deserialize(&bytes).expect("expect.safetensors is one");
        let numbers = |view: &safetensors::tensor::TensorView<'_>| -> Vec<f64> {
            match view.dtype() {
                safetensors::Dtype::F32 => {
                    view.data().as_chunks().0.iter().map(|b| f32::from_le_bytes(*b).into()).collect()
                }
                safetensors::Dtype::I64 => {
                    view.data().as_chunks().0.iter().map(|b| i64::from_le_bytes(*b) as f64).collect()
                }
                other => panic!("dtype {other:?}"),
            }
        };
        Self {
            tensors: file
                .tensors()
                .into_iter()
                .map(|(name, view)| (name, (view.shape().to_vec(), numbers(&view))))
                .collect(),
        }
    }

    fn values(&self, name: &str) -> &[f64] {
        &self.tensors.get(name).unwrap_or_else(|| panic!("`{name}` is not in expect.safetensors")).1
    }

    /// The right-padded batch, and the number of columns.
    fn batch(&self) -> TokenBatch {
        let shape = &self.tensors["input_ids"].0;
        let (ids, mask) = (self.values("input_ids"), self.values("attention_mask"));
        let sequences: Vec<Vec<u32>> = (0..shape[0])
            .map(|row| {
                let cells = row * shape[1]..(row + 1) * shape[1];
                let kept = cells.filter(|cell| mask[*cell] == 1.0);
                kept.map(|cell| ids[cell] as u32).collect()
            })
            .collect();
        let slices: Vec<&[u32]> = sequences.iter().map(Vec::as_slice).collect();
        let batch = TokenBatch::new(&slices).expect("a batch");
        assert!(batch.t <= shape[1]);
        batch
    }

    fn columns(&self) -> usize {
        self.tensors["input_ids"].0[1]
    }
}

/// Every real position.
fn all_positions(batch: &TokenBatch) -> Vec<Position> {
    batch.lens_b.iter().enumerate().flat_map(|(b, len)| (0..*len).map(move |t| Position { b, t })).collect()
}

/// Mean negative log-likelihood of the given targets.
struct MeanNll {
    targets: Vec<u32>,
    vocab: usize,
    sum: f64,
}

impl MeanNll {
    /// Positions that have a real next token, and the loss over them.
    fn of(batch: &TokenBatch, vocab: usize) -> (Vec<Position>, Self) {
        let positions: Vec<Position> =
            all_positions(batch).into_iter().filter(|p| p.t + 1 < batch.lens_b[p.b]).collect();
        let targets = positions.iter().map(|p| batch.ids_bt[p.b * batch.t + p.t + 1]).collect();
        (positions, Self { targets, vocab, sum: 0.0 })
    }

    fn nll(&self) -> f64 {
        self.sum / self.targets.len() as f64
    }
}

impl HeadLoss for MeanNll {
    fn needs_first_pass(&self) -> bool {
        false
    }

    fn observe(&mut self, _rows: Range<usize>, _logits_rv: &[f32]) -> Result<()> {
        Ok(())
    }

    fn gradient(&mut self, rows: Range<usize>, logits_rv: &mut [f32]) -> Result<()> {
        let count = self.targets.len() as f64;
        for (row, logits) in rows.zip(logits_rv.chunks_exact_mut(self.vocab)) {
            let target = self.targets[row] as usize;
            let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max) as f64;
            let total: f64 = logits.iter().map(|l| (*l as f64 - max).exp()).sum();
            self.sum += max + total.ln() - logits[target] as f64;
            for (id, logit) in logits.iter_mut().enumerate() {
                let probability = (*logit as f64 - max).exp() / total;
                *logit = ((probability - f64::from(u8::from(id == target))) / count) as f32;
            }
        }
        Ok(())
    }
}

fn largest(values: &[f64]) -> f64 {
    values.iter().fold(0.0, |max: f64, v| max.max(v.abs()))
}

/// Asserts that all values lie within `tolerance` of the expected tensor's largest magnitude.
fn close(name: &str, found: &[f32], expected: &[f64], tolerance: f64) {
    assert_eq!(found.len(), expected.len(), "{name}");
    let scale = largest(expected);
    for (index, (f, e)) in found.iter().zip(expected).enumerate() {
        let off = (f64::from(*f) - e).abs();
        assert!(
            off <= tolerance * scale,
            "{name}[{index}]: {f} instead of {e}, off by {:.2e} of the largest",
            off / scale
        );
    }
}

#[test]
fn golden_models_logits() {
    each_case(|folder, expected, device| {
        let mut model = load(folder, device);
        let (vocab, batch) = (model.config().vocab_size, expected.batch());
        let positions = all_positions(&batch);
        let hidden_rh = model.hidden_rh(&batch, &positions).expect("hidden states");
        let mut logits = Vec::new();
        model.head_logits_rv(&hidden_rh, &mut logits).expect("logits");
        let all = expected.values("logits");
        let kept: Vec<f64> =
            positions.iter().flat_map(|p| &all[(p.b * expected.columns() + p.t) * vocab..][..vocab]).copied().collect();
        close("logits", &logits, &kept, 2e-4);
    });
}

#[test]
fn golden_models_gradients_and_step() {
    each_case(|folder, expected, device| {
        let mut model = load(folder, device);
        let batch = expected.batch();
        let (positions, mut loss) = MeanNll::of(&batch, model.config().vocab_size);
        model.forward_backward(&batch, &positions, &mut loss).expect("a gradient");
        let nll = expected.values("nll")[0];
        assert!((loss.nll() - nll).abs() <= 1e-5 * nll.abs().max(1.0), "nll {} instead of {nll}", loss.nll());
        let names: Vec<String> = model.params().iter().map(|spec| spec.name.clone()).collect();
        let wanted = expected.tensors.keys().filter(|key| key.starts_with("grad.")).count();
        assert_eq!(names.len(), wanted, "parameters with a gradient");
        for (index, name) in names.iter().enumerate() {
            close(name, &model.read_grad(index), expected.values(&format!("grad.{name}")), 2e-4);
        }

        let config = AdamConfig { decoupled_weight_decay: true, beta1: 0.9, beta2: 0.95, eps: 1e-8, weight_decay: 0.1 };
        // With our own gradient. A first Adam step divides a gradient by its own size, so that for one near `eps` the
        // rounding of the tensor's largest (in either program) decides: only clear ones can be compared.
        let stats = Adam::new(config.clone(), model.params()).step(&mut *model, 1e-2, Some(1.0)).expect("a step");
        let norm = expected.values("grad_norm")[0];
        assert!((stats.grad_norm - norm).abs() <= 2e-4 * norm, "gradient norm {} instead of {norm}", stats.grad_norm);
        after_step(&*model, expected, 1e-4);

        // With the expected gradient, the clipping and the step alone.
        let mut model = load(folder, device);
        let gradients: Vec<&[f64]> = names.iter().map(|name| expected.values(&format!("grad.{name}"))).collect();
        let fill = &mut |index: usize, _: &mut [f32], gradient: &mut [f32]| {
            for (to, from) in gradient.iter_mut().zip(gradients[index]) {
                *to = *from as f32;
            }
        };
        model.update_params(fill).expect("gradients are taken over");
        Adam::new(config, model.params()).step(&mut *model, 1e-2, Some(1.0)).expect("a step");
        after_step(&*model, expected, 1e-6);
    });
}

/// Parameters after the step, where the gradient is larger than `least` of the tensor's largest.
fn after_step(model: &dyn Model, expected: &Expected, least: f64) {
    for (index, spec) in model.params().iter().enumerate() {
        let name = &spec.name;
        let (gradient, after) =
            (expected.values(&format!("grad.{name}")), expected.values(&format!("after_adamw.{name}")));
        let least = least * largest(gradient);
        for (element, found) in model.read_param(index).iter().enumerate() {
            let off = (f64::from(*found) - after[element]).abs();
            assert!(
                gradient[element].abs() <= least || off <= 1e-5,
                "{name}[{element}] after the step: off by {off:.2e}"
            );
        }
    }
}

#[test]
fn golden_models_greedy() {
    each_case(|folder, _, device| {
        let mut model = load(folder, device);
        let config = model.config().clone();
        let stops = GenerationConfig::from_folder(folder, &config).expect("a generation config").eos_token_ids;
        let file = cosmos_testkit::read_json(&folder.join("greedy.json"));
        let cases = file.as_object().expect("an object of cases");
        let ids = |value: &serde_json::Value| -> Vec<u32> { serde_json::from_value(value.clone()).expect("ids") };
        let prompts: Vec<Vec<u32>> = cases.values().map(|case| ids(&case["prompt"])).collect();
        let wanted: Vec<Vec<u32>> = cases.values().map(|case| ids(&case["greedy"])).collect();
        let steps = wanted.iter().map(Vec::len).max().unwrap_or(0) + 1;
        let capacity = prompts.iter().map(Vec::len).max().unwrap_or(0) + steps;
        let mut decoder = model.decoder(prompts.len(), capacity).expect("a decoder");
        let entries: Vec<Prefill<'_>> =
            prompts.iter().enumerate().map(|(slot, prompt)| Prefill { slots: vec![slot], prompt }).collect();
        let mut logits = decoder.prefill(&entries).expect("a prefill");
        let mut live: Vec<usize> = (0..prompts.len()).collect();
        let mut found: Vec<Vec<u32>> = vec![Vec::new(); prompts.len()];
        for _ in 0..steps {
            let mut next = Vec::new();
            for (slot, row) in live.iter().zip(logits.chunks_exact(config.vocab_size)) {
                let best = (0..row.len())
                    .max_by(|a, b| row[*a].total_cmp(&row[*b]).then(b.cmp(a)))
                    .expect("a vocabulary") as u32;
                found[*slot].push(best);
                if !stops.contains(&best) {
                    next.push((*slot, best));
                }
            }
            live = next.iter().map(|(slot, _)| *slot).collect();
            logits = decoder.step(&next).expect("a step");
        }
        for (index, (found, wanted)) in found.iter().zip(&wanted).enumerate() {
            assert_eq!(&found[..wanted.len()], wanted, "case {index} of {}", folder.display());
            // A list that is shorter than the others ends because of a stop id, listed or not.
            let stopped = wanted.last().is_some_and(|id| stops.contains(id)) || stops.contains(&found[wanted.len()]);
            assert!(
                stopped || wanted.len() + 1 == steps,
                "case {index} of {} goes on after {:?}",
                folder.display(),
                wanted.last()
            );
        }
    });
}

#[test]
fn golden_models_export() {
    each_case(|folder, expected, device| {
        let mut model = load(folder, device);
        let dir = std::env::temp_dir().join(format!("cosmos-golden-export-{}", std::process::id()));
        for shard_bytes_max in [u64::MAX, 50_000] {
            export(
                &*model,
                &dir,
                &ExportOptions { shard_bytes_max, source: Some(folder.into()), ..ExportOptions::default() },
            )
            .expect("an export");
            let mut back = load(&dir, device);
            assert_eq!(back.config(), model.config());
            for index in 0..model.params().len() {
                assert_eq!(back.read_param(index), model.read_param(index), "{}", model.params()[index].name);
            }
            let batch = expected.batch();
            let positions = all_positions(&batch);
            assert_eq!(
                back.hidden_rh(&batch, &positions).expect("hidden"),
                model.hidden_rh(&batch, &positions).expect("hidden")
            );
        }
        std::fs::remove_dir_all(&dir).expect("the export can be removed");
    });
}
