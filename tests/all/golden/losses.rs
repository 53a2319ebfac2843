//! The original's surrogate with distillation, and TRL's generalised Jensen–Shannon divergence.

use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use cosmos_engine::model::{HeadLoss, LogitsSource, VocabShard};
use cosmos_engine::objective::{
    DistillKind, DistillSpec, LossType, Mass, Normaliser, ObjectiveSpec, PolicyLoss, Report, Sample, TeacherView,
};
use cosmos_parallel::ThreadGroup;
use cosmos_testkit::{golden, read_json};
use safetensors::SafeTensors;
use safetensors::tensor::Dtype;
use serde_json::Value;

const TOLERANCE: f64 = 1e-5;
/// Of a gradient over a cut vocabulary, relative to the tensor's largest, where log-ratios of close models are rounded to f32.
const CUT_TOLERANCE: f64 = 1e-5;
/// Rows per chunk: odd, so that chunks and samples never line up.
const CHUNK: usize = 5;

/// The tensors of a case.
struct Tensors<'a> {
    file: SafeTensors<'a>,
    case: &'a str,
}

impl Tensors<'_> {
    fn bytes(&self, name: &str, dtype: Dtype) -> (Vec<usize>, Vec<u8>) {
        let name = format!("{}.{name}", self.case);
        let view = self.file.tensor(&name).unwrap_or_else(|e| panic!("`{name}`: {e}"));
        assert_eq!(view.dtype(), dtype, "`{name}`");
        (view.shape().to_vec(), view.data().to_vec())
    }

    fn f32(&self, name: &str) -> Vec<f32> {
        self.bytes(name, Dtype::F32).1.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect()
    }

    fn i64(&self, name: &str) -> Vec<i64> {
        self.bytes(name, Dtype::I64).1.chunks_exact(8).map(|b| i64::from_le_bytes(b.try_into().unwrap())).collect()
    }

    fn u8(&self, name: &str) -> Vec<u8> {
        self.bytes(name, Dtype::U8).1
    }

    fn shape(&self, name: &str, dtype: Dtype) -> Vec<usize> {
        self.bytes(name, dtype).0
    }
}

/// Log-softmax of a row in double precision, with temperature.
fn log_softmax(z_v: &[f32], temperature: f64) -> Vec<f64> {
    let max = z_v.iter().fold(f64::MIN, |m, &z| m.max(f64::from(z) / temperature));
    let sum: f64 = z_v.iter().map(|&z| (f64::from(z) / temperature - max).exp()).sum();
    z_v.iter().map(|&z| f64::from(z) / temperature - max - sum.ln()).collect()
}

fn number(case: &Value, key: &str) -> f64 {
    case[key].as_f64().unwrap_or_else(|| panic!("`{key}` of {case}"))
}

/// 1e-5 of the value, or of what it is a difference of.
fn assert_near(what: &str, got: f64, expected: f64, scale: f64) {
    assert!(
        (got - expected).abs() <= TOLERANCE * expected.abs().max(scale),
        "{what}: {got} where {expected} is expected"
    );
}

fn assert_all_near(what: &str, got: &[f32], expected: &[f32]) {
    assert_eq!(got.len(), expected.len(), "{what}");
    let largest = expected.iter().fold(0.0f32, |m, e| m.max(e.abs()));
    for (index, (got, expected)) in got.iter().zip(expected).enumerate() {
        assert_near(&format!("{what} at {index}"), f64::from(*got), f64::from(*expected), f64::from(largest));
    }
}

/// Runs a loss as a model would, in chunks, and gives the gradient.
fn run(loss: &mut PolicyLoss<'_>, mut logits_rv: Vec<f32>, vocab: usize) -> Vec<f32> {
    let ranges: Vec<Range<usize>> = (0..loss.rows()).step_by(CHUNK).map(|s| s..loss.rows().min(s + CHUNK)).collect();
    if loss.needs_first_pass() {
        for rows in &ranges {
            loss.observe(rows.clone(), &logits_rv[rows.start * vocab..rows.end * vocab]).expect("first pass");
        }
    }
    for rows in &ranges {
        loss.gradient(rows.clone(), &mut logits_rv[rows.start * vocab..rows.end * vocab]).expect("gradient");
    }
    logits_rv
}

/// The same loss with the vocabulary cut over 2, 3, 4 and 8 ranks, each with its part of the logits: total and gradient
/// must be those of the whole, the total within 1e-6 of itself or of the `sums` that it is a difference of, the gradient within
/// `apart_max` of the tensor's largest.
/// Where the vocabulary does not divide the parts differ in length.
fn check_cut(
    name: &str,
    spec: &ObjectiveSpec,
    samples: &[Sample],
    [student_rv, teacher_rv]: [&[f32]; 2],
    vocab: usize,
    (total, sums): (f64, f64),
    apart_max: f64,
    gradient_rv: &[f32],
) {
    let largest = gradient_rv.iter().fold(0.0f64, |m, g| m.max(f64::from(g.abs())));
    for ranks in [2, 3, 4, 8] {
        let part = |shard: &VocabShard, rows_v: &[f32]| -> Vec<f32> {
            rows_v.chunks(vocab).flat_map(|row| row[shard.ids()].to_vec()).collect()
        };
        let one = |shard: VocabShard| {
            let mut source = Kept { rows_v: part(&shard, teacher_rv), vocab: shard.len };
            let normaliser = Normaliser::of(spec, samples, 1.0);
            let mut loss = PolicyLoss::new(spec, samples, normaliser, Some(&mut source)).expect("a loss");
            loss.set_vocab_shard(&shard).expect("a part of the vocabulary");
            let own_rv = run(&mut loss, part(&shard, student_rv), shard.len);
            let got = loss.report().total;
            assert!(
                (got - total).abs() <= 1e-6 * total.abs().max(sums),
                "{name} over {ranks} ranks: {got} where the whole gives {total}"
            );
            let own: Vec<f32> = gradient_rv.chunks(vocab).flat_map(|row| row[shard.ids()].to_vec()).collect();
            for (index, (got, expected)) in own_rv.iter().zip(own).enumerate() {
                assert!(
                    f64::from((got - expected).abs()) <= apart_max * largest,
                    "{name} over {ranks} ranks, gradient {index} of {shard:?}: {got} where the whole gives {expected}"
                );
            }
        };
        std::thread::scope(|scope| {
            for (rank, handle) in ThreadGroup::of(ranks, 60_000).into_iter().enumerate() {
                let first = vocab * rank / ranks;
                let len = vocab * (rank + 1) / ranks - first;
                let shard = VocabShard { first, len, vocab, collective: Arc::new(handle) };
                let one = &one;
                scope.spawn(move || one(shard));
            }
        });
    }
}

fn spec(case: &Value) -> ObjectiveSpec {
    let top_k = number(case, "top_k");
    ObjectiveSpec {
        loss: match case["loss_type"].as_str() {
            Some("token-mean") => LossType::TokenMean,
            Some("seq-mean-token-sum") => LossType::SeqMeanTokenSum,
            Some("seq-mean-token-mean") => LossType::SeqMeanTokenMean,
            Some("token-sum") => LossType::TokenSum,
            other => panic!("loss type {other:?}"),
        },
        epsilon_low: number(case, "epsilon_low"),
        epsilon_high: number(case, "epsilon_high"),
        lower_bound_ratio: number(case, "lower_bound_ratio"),
        temperature: number(case, "temperature") as f32,
        kl_beta: number(case, "kl_beta"),
        distill: Some(DistillSpec {
            kind: if top_k > 0.0 { DistillKind::CosmosGjsd } else { DistillKind::Sampled },
            beta: number(case, "jsd_beta"),
            coef: number(case, "kl_penalty_coef"),
            discount: number(case, "kl_discount_factor"),
            kl_clip: None,
            include_prompt: false,
        }),
        ..ObjectiveSpec::default()
    }
}

/// The samples of a case, the student's rows, and where in `[b, l]` each row lies. `detached`: the old policy is the
/// current one without gradient, which the loss can also find by itself.
fn samples(case: &Value, tensors: &Tensors<'_>, detached: bool) -> (Vec<Sample>, Vec<f32>, Vec<usize>) {
    let [b, l, v] = tensors.shape("student_logits", Dtype::F32)[..] else { panic!("student logits are [b, l, v]") };
    let (student, teacher) = (tensors.f32("student_logits"), tensors.f32("teacher_logits"));
    let (old, reference) = (tensors.f32("old_logits"), tensors.f32("ref_logits"));
    let (ids, mask, advantage) = (tensors.i64("token_ids"), tensors.u8("mask"), tensors.f32("reward_advantage"));
    let k = number(case, "top_k") as usize;
    let top_k = if k > 0 { tensors.i64("topk_ids") } else { Vec::new() };
    let temperature = number(case, "temperature");
    let (mut made, mut rows_v, mut places) = (Vec::new(), Vec::new(), Vec::new());
    for i in 0..b {
        let scored: Vec<usize> = (0..l).filter(|t| mask[i * l + t] != 0).collect();
        let (first, last) = (scored[0], scored[scored.len() - 1]);
        assert_eq!(scored.len(), last - first + 1, "a mask without gaps");
        let own_ids: Vec<u32> = ids[i * (l + 1)..][..=last + 1].iter().map(|&id| id as u32).collect();
        let of = |z: &[f32], t: usize| log_softmax(&z[(i * l + t) * v..][..v], temperature);
        let sampled =
            |z: &[f32]| -> Vec<f32> { scored.iter().map(|&t| of(z, t)[own_ids[t + 1] as usize] as f32).collect() };
        let teacher_view = if k == 0 {
            TeacherView::Sampled(sampled(&teacher))
        } else {
            let own: Vec<u32> =
                scored.iter().flat_map(|t| &top_k[(i * l + t) * k..][..k]).map(|&id| id as u32).collect();
            let logprobs =
                own.iter().enumerate().map(|(j, &id)| of(&teacher, scored[j / k])[id as usize] as f32).collect();
            TeacherView::TopK { ids: own, logprobs }
        };
        made.push(Sample {
            old: (!detached).then(|| sampled(&old)),
            reference: Some(sampled(&reference)),
            prompt_len: first + 1,
            advantage: advantage[i],
            teacher: teacher_view,
            ids: own_ids,
            ..Sample::default()
        });
        for &t in &scored {
            rows_v.extend_from_slice(&student[(i * l + t) * v..][..v]);
            places.push(i * l + t);
        }
    }
    (made, rows_v, places)
}

fn mean(values: &[f32]) -> f64 {
    values.iter().map(|&v| f64::from(v)).sum::<f64>() / values.len() as f64
}

fn check_surrogate(name: &str, case: &Value, tensors: &Tensors<'_>, detached: bool) {
    let spec = spec(case);
    let [_, _, v] = tensors.shape("student_logits", Dtype::F32)[..] else { panic!("student logits are [b, l, v]") };
    let (samples, rows_v, places) = samples(case, tensors, detached);
    let mut loss = PolicyLoss::new(&spec, &samples, Normaliser::of(&spec, &samples, 1.0), None).expect("a loss");
    let gradient_rv = run(&mut loss, rows_v.clone(), v);
    let report: Report = loss.into_report();
    // A sum of tokens that cancel is no more exact than its largest part.
    let expected_advantages = tensors.f32("advantages");
    let part = expected_advantages.iter().fold(0.0f32, |m, a| m.max(a.abs())) as f64 / places.len() as f64;
    let sums = if case["loss_type"] == "token-sum" || case["loss_type"] == "seq-mean-token-sum" {
        part * places.len() as f64
    } else {
        part
    };
    check_cut(name, &spec, &samples, [&rows_v, &[]], v, (report.total, sums), 1e-6, &gradient_rv);
    assert_near(&format!("{name} total"), report.total, number(case, "total"), sums);
    assert_near(&format!("{name} policy_loss"), report.policy_loss, number(case, "policy_loss"), sums);
    if spec.kl_beta != 0.0 {
        assert_near(&format!("{name} kl_loss"), report.kl_loss, number(case, "kl_loss"), 0.0);
    }
    for (key, expected) in case["metrics"].as_object().expect("metrics") {
        let got = match key.as_str() {
            "teacher_kl_advantages" => mean(&report.kl_advantages),
            "teacher_kl_advantages_discounted" => mean(&report.kl_advantages_discounted),
            kl if kl == "teacher_kl_reversed" || kl.starts_with("teacher_kl_jsd_top") => mean(&report.kl),
            other => panic!("metric `{other}`"),
        };
        assert_near(&format!("{name} {key}"), got, expected.as_f64().expect("a number"), part);
    }
    assert_all_near(&format!("{name} advantages"), &report.advantages, &expected_advantages);
    let expected = tensors.f32("grad_student_logits");
    let mut gradient = vec![0.0f32; expected.len()];
    for (row, place) in places.iter().enumerate() {
        gradient[place * v..(place + 1) * v].copy_from_slice(&gradient_rv[row * v..(row + 1) * v]);
    }
    assert_all_near(&format!("{name} gradient"), &gradient, &expected);
}

fn each_case(part: &str, check: &dyn Fn(&str, &Value, &Tensors<'_>)) {
    let (Some(json), Some(data)) =
        (golden(&format!("losses/{part}.json")), golden(&format!("losses/{part}.safetensors")))
    else {
        return;
    };
    let cases = read_json(&json);
    let bytes = std::fs::read(Path::new(&data)).expect("tensors");
    let cases = cases.as_object().expect("cases by name");
    assert!(!cases.is_empty());
    for (name, case) in cases {
        let file = SafeTensors::deserialize(&bytes).expect("a safetensors file");
        check(name, case, &Tensors { file, case: name });
    }
}

#[test]
fn golden_surrogate() {
    each_case("surrogate", &|name, case, tensors| {
        check_surrogate(name, case, tensors, false);
        if tensors.f32("old_logits") == tensors.f32("student_logits") {
            check_surrogate(name, case, tensors, true);
        }
    });
}

/// Logits that are already there.
struct Kept {
    rows_v: Vec<f32>,
    vocab: usize,
}

impl LogitsSource for Kept {
    fn logits_rv(&mut self, rows: Range<usize>, out: &mut Vec<f32>) -> cosmos_engine::Result<()> {
        out.clear();
        out.extend_from_slice(&self.rows_v[rows.start * self.vocab..rows.end * self.vocab]);
        Ok(())
    }
}

/// Both ways to the whole vocabulary: logits of the teacher, and every id as a candidate.
#[test]
fn golden_full_vocab_gjsd() {
    each_case("full_vocab_gjsd", &|name, case, tensors| {
        let [b, l, v] = tensors.shape("student_logits", Dtype::F32)[..] else { panic!("student logits are [b, l, v]") };
        let (student, teacher, labels) =
            (tensors.f32("student_logits"), tensors.f32("teacher_logits"), tensors.i64("labels"));
        let temperature = number(case, "temperature");
        let distill = |kind| DistillSpec {
            kind,
            beta: number(case, "beta"),
            coef: 1.0,
            discount: 0.0,
            kl_clip: None,
            include_prompt: false,
        };
        for kind in [
            DistillKind::FullVocab,
            DistillKind::Gjsd { mass: Mass::Tail },
            DistillKind::Gjsd { mass: Mass::Renormalize },
            DistillKind::Gjsd { mass: Mass::Raw },
        ] {
            let spec = ObjectiveSpec {
                temperature: temperature as f32,
                distill: Some(distill(kind)),
                ..ObjectiveSpec::default()
            };
            let (mut samples, mut places) = (Vec::new(), Vec::new());
            for i in 0..b {
                let scored: Vec<usize> = (0..l).filter(|t| labels[i * l + t] != -100).collect();
                let view = if kind == DistillKind::FullVocab {
                    TeacherView::Full
                } else {
                    let logprobs =
                        scored.iter().flat_map(|t| log_softmax(&teacher[(i * l + t) * v..][..v], temperature));
                    TeacherView::TopK {
                        logprobs: logprobs.map(|t| t as f32).collect(),
                        ids: (0..v as u32).cycle().take(v * scored.len()).collect(),
                    }
                };
                let ids = std::iter::once(0).chain(scored.iter().map(|t| labels[i * l + t] as u32)).collect();
                samples.push(Sample { ids, prompt_len: 1, teacher: view, ..Sample::default() });
                places.extend(scored.iter().map(|t| i * l + t));
            }
            let rows = |z: &[f32]| -> Vec<f32> {
                places.iter().flat_map(|place| &z[place * v..(place + 1) * v]).copied().collect()
            };
            let mut source = Kept { rows_v: rows(&teacher), vocab: v };
            let normaliser = Normaliser::of(&spec, &samples, 1.0);
            let mut loss = PolicyLoss::new(&spec, &samples, normaliser, Some(&mut source)).expect("a loss");
            let gradient_rv = run(&mut loss, rows(&student), v);
            let total = loss.report().total;
            let logits = [&rows(&student)[..], &rows(&teacher)];
            check_cut(
                &format!("{name} {kind:?}"),
                &spec,
                &samples,
                logits,
                v,
                (total, 0.0),
                CUT_TOLERANCE,
                &gradient_rv,
            );
            assert_near(&format!("{name} {kind:?} loss"), total, number(case, "loss"), 0.0);
            let expected = rows(&tensors.f32("grad_student_logits"));
            assert_all_near(&format!("{name} {kind:?} gradient"), &gradient_rv, &expected);
        }
    });
}
