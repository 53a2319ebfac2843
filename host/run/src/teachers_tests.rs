use cosmos_config::ConfigFile;
use cosmos_engine::model::{HeadLoss, LogitsSource};
use cosmos_engine::objective::{DistillKind, DistillSpec, Normaliser, ObjectiveSpec, PolicyLoss, Sample, TeacherView};
use cosmos_engine::score::ABSENT;
use proptest::prelude::*;

use super::*;

fn answer(p: &[f64], tokens: &[usize], candidates: &[u32]) -> Answer {
    let log = |id: usize| p[id].ln() as f32;
    Answer {
        logprobs: tokens.iter().map(|t| log(*t)).collect(),
        entropy: vec![1.0; tokens.len()],
        top1: vec![p.iter().enumerate().max_by(|a, b| a.1.total_cmp(b.1)).unwrap().0 as u32; tokens.len()],
        candidate_ids: candidates.to_vec(),
        candidate_logprobs: candidates
            .iter()
            .map(|id| if *id == ABSENT { f32::NEG_INFINITY } else { log(*id as usize) })
            .collect(),
        hidden: Vec::new(),
    }
}

proptest! {
    /// Log-probs of a mixture against the distributions themselves, in 64 bits.
    #[test]
    fn mixed_log_probs_are_those_of_the_mixture(
        raw in proptest::collection::vec(proptest::collection::vec(1e-6f64..1.0, 6), 2..4),
        weights in proptest::collection::vec(0.01f64..10.0, 4),
    ) {
        let teachers: Vec<Vec<f64>> = raw
            .iter()
            .map(|p| { let sum: f64 = p.iter().sum(); p.iter().map(|p| p / sum).collect() })
            .collect();
        let total: f64 = weights[..teachers.len()].iter().sum();
        let mixture = |id: usize| -> f64 { teachers.iter().zip(&weights).map(|(p, w)| w / total * p[id]).sum() };
        let (tokens, candidates) = ([2, 0, 5], [1, 2, ABSENT, 3, 0, 4]);
        let parts = teachers.iter().zip(&weights).enumerate();
        let parts = parts.map(|(t, (p, w))| (t, *w, answer(p, &tokens, &candidates))).collect();
        let mixed = Answer::mix(parts).unwrap();
        for (got, id) in mixed.logprobs.iter().zip(tokens) {
            prop_assert!((f64::from(*got) - mixture(id).ln()).abs() < 1e-5);
        }
        for (got, id) in mixed.candidate_logprobs.iter().zip(candidates) {
            match id {
                ABSENT => prop_assert_eq!(*got, f32::NEG_INFINITY),
                id => prop_assert!((f64::from(*got) - mixture(id as usize).ln()).abs() < 1e-5),
            }
        }
        prop_assert_eq!(mixed.candidate_ids, candidates);
        prop_assert!(mixed.entropy.is_empty());
        // Where all name one token, it is the mixture's most likely one.
        if let Some(top) = mixed.top1.first() {
            let most = (0..6).max_by(|a, b| mixture(*a).total_cmp(&mixture(*b))).unwrap();
            prop_assert_eq!(*top as usize, most);
        }
    }
}

#[test]
fn one_alone_keeps_its_bits_and_others_must_fit() {
    let p = [0.1, 0.2, 0.7];
    let one = Answer { hidden: vec![TeacherHidden::default()], ..answer(&p, &[1, 2], &[0, 1]) };
    let mixed = Answer::mix(vec![(2, 0.5, one.clone())]).unwrap();
    assert_eq!(mixed.logprobs, one.logprobs);
    assert_eq!((mixed.entropy, mixed.top1), (one.entropy.clone(), one.top1.clone()));
    assert_eq!((mixed.hidden[0].teacher, mixed.hidden[0].weight), (2, 0.5));
    let refused = |other: Answer| Answer::mix(vec![(0, 1.0, one.clone()), (1, 1.0, other)]).unwrap_err();
    assert!(refused(answer(&p, &[1], &[0, 1])).contains("2 and 1 log-probs"));
    assert!(refused(answer(&p, &[1, 2], &[0, 2])).contains("different candidates"));
    let bad = Answer { logprobs: vec![f32::NAN, -1.0], ..one.clone() };
    let mixed = Answer::mix(vec![(0, 1.0, one), (1, 1.0, bad)]).unwrap();
    assert!(mixed.logprobs[0].is_nan() && mixed.logprobs[1].is_finite());
}

#[test]
fn a_sample_counts_when_all_of_its_teachers_have_answered() {
    let completion = |sample, teachers: &[u32]| {
        let json = serde_json::json!({"sample": sample, "version": 0, "prompt": "", "prompt_ids": [1], "tokens": [1, 2], "text": "",
            "stopped": true, "logprobs": [], "candidate_ids": [], "advantage": 0, "teachers": teachers});
        serde_json::from_value::<Completion>(json).unwrap()
    };
    let completions = [completion(0, &[0]), completion(1, &[1]), completion(2, &[]), completion(3, &[0, 1])];
    assert_eq!(completions[0].version_runs(), [(0, 2)]);
    let say = |samples: &[u64], p: [f64; 2]| -> HashMap<u64, Answer> {
        samples.iter().map(|s| (*s, answer(&p, &[0, 1], &[]))).collect()
    };
    let said = vec![say(&[0, 2, 3], [0.5, 0.5]), say(&[1, 2], [0.25, 0.75])];
    let mixed = mix(&completions, said, &[1.0, 3.0]).unwrap();
    let mut samples: Vec<u64> = mixed.keys().copied().collect();
    samples.sort_unstable();
    assert_eq!(samples, [0, 1, 2], "sample 3 lacks its second teacher");
    assert!((mixed[&2].logprobs[0] - (0.25f32 * 0.5 + 0.75 * 0.25).ln()).abs() < 1e-6);
}

/// Logits of the mixture as somebody else would write them.
struct Given {
    logits_rv: Vec<f32>,
    vocab: usize,
}

impl LogitsSource for Given {
    fn logits_rv(&mut self, rows: std::ops::Range<usize>, out: &mut Vec<f32>) -> cosmos_engine::Result<()> {
        out.clear();
        out.extend_from_slice(&self.logits_rv[rows.start * self.vocab..rows.end * self.vocab]);
        Ok(())
    }
}

/// Loss and gradient of the full-vocabulary objective at given student logits.
fn loss(spec: &ObjectiveSpec, source: &mut dyn LogitsSource, logits_rv: &[f32], vocab: usize) -> (f64, Vec<f32>) {
    let sample = Sample { ids: vec![1, 2, 3, 4], prompt_len: 1, teacher: TeacherView::Full, ..Sample::default() };
    let samples = [sample];
    let normaliser = Normaliser::of(spec, &samples, 1.0);
    let mut loss = PolicyLoss::new(spec, &samples, normaliser, Some(source)).unwrap();
    let rows = loss.rows();
    assert_eq!(logits_rv.len(), rows * vocab);
    let mut grad = logits_rv.to_vec();
    if loss.needs_first_pass() {
        loss.observe(0..rows, logits_rv).unwrap();
    }
    loss.gradient(0..rows, &mut grad).unwrap();
    (loss.into_report().total, grad)
}

#[test]
fn gradients_to_a_mixture_are_those_to_its_distribution_and_to_finite_differences() {
    use cosmos_engine::head::{self, MixedLogits, Part};
    let (vocab, hidden, rows) = (11, 4, 3);
    let noise = |seed: usize, n: usize| -> Vec<f32> {
        (0..n).map(|i| ((i * 7919 + seed * 104_729) as f32 * 0.613).sin() * 1.5).collect()
    };
    let values = [noise(1, vocab * hidden), noise(2, vocab * hidden)];
    let hiddens = [noise(3, rows * hidden), noise(4, rows * hidden)];
    let weights = [1.0, 2.5];
    for (temperature, beta) in [(1.0f32, 0.0), (0.8, 1.0), (1.3, 0.5)] {
        let spec = ObjectiveSpec {
            temperature,
            distill: Some(DistillSpec {
                kind: DistillKind::FullVocab,
                beta,
                coef: 1.0,
                discount: 0.0,
                kl_clip: None,
                include_prompt: false,
            }),
            ..ObjectiveSpec::default()
        };
        // The mixture from plain sums of products, in 64 bits.
        let mut given = vec![0.0f32; rows * vocab];
        for r in 0..rows {
            let mut p = vec![0.0f64; vocab];
            for t in 0..2 {
                let z: Vec<f64> = (0..vocab)
                    .map(|v| {
                        (0..hidden)
                            .map(|h| f64::from(values[t][v * hidden + h]) * f64::from(hiddens[t][r * hidden + h]))
                            .sum()
                    })
                    .collect();
                let sum: f64 = z.iter().map(|z: &f64| (z / f64::from(temperature)).exp()).sum();
                for v in 0..vocab {
                    p[v] += weights[t] / 3.5 * (z[v] / f64::from(temperature)).exp() / sum;
                }
            }
            (0..vocab).for_each(|v| given[r * vocab + v] = (p[v].ln() * f64::from(temperature)) as f32);
        }
        let mut given = Given { logits_rv: given, vocab };
        let student = noise(5, rows * vocab);
        let mut heads: Vec<_> = values.iter().map(|v| head::load("cpu", vocab, hidden, v).unwrap()).collect();
        let parts = heads.iter_mut().zip(&hiddens).zip(weights);
        let parts =
            parts.map(|((head, h), w)| Part { head: head.as_mut(), hidden_rh: h.clone(), spans: vec![(0..rows, w)] });
        let mut mixed = MixedLogits::new(parts.collect(), rows, vocab, temperature).unwrap();
        let (value, grad) = loss(&spec, &mut mixed, &student, vocab);
        let (expected, expected_grad) = loss(&spec, &mut given, &student, vocab);
        assert!((value - expected).abs() < 1e-6, "{value} and {expected}");
        for (got, expected) in grad.iter().zip(&expected_grad) {
            assert!((got - expected).abs() < 2e-6, "{got} and {expected}");
        }
        for at in [0, 5, 13, 27, 32] {
            let shifted = |by: f32| {
                let mut logits = student.clone();
                logits[at] += by;
                logits
            };
            let (high, low) = (shifted(0.01), shifted(-0.01));
            let slope = (loss(&spec, &mut mixed, &high, vocab).0 - loss(&spec, &mut mixed, &low, vocab).0) / 0.02;
            assert!((slope - f64::from(grad[at])).abs() < 2e-4, "{at}: {slope} and {}", grad[at]);
        }
    }
}

fn resolved(distillation: &str) -> Resolved {
    let toml = format!(
        "[train]\n[train.train_policy]\ntype = \"grpo\"\n[distillation]\nenable = true\n{distillation}\n\
         [[distillation.teachers]]\nname = \"math\"\nmodel_name_or_path = \"m\"\ndatasets = [\"a/train\", \"b/train\"]\n\
         [[distillation.teachers]]\nname = \"code\"\nmodel_name_or_path = \"c\"\ndatasets = [\"b/train\", \"b/test\"]\n"
    );
    ConfigFile::parse("run.toml", &toml).unwrap().resolve("20260102030405").unwrap()
}

fn names(names: &[&str]) -> Vec<String> {
    names.iter().map(|n| n.to_string()).collect()
}

#[test]
fn datasets_find_their_teachers() {
    let config = resolved("");
    let training = names(&["a/train", "b/train"]);
    let routes = Routes::training(&config, &training).unwrap();
    assert_eq!((routes.of(0), routes.of(1)), (vec![0], vec![0, 1]));
    let validation = |held_out: &[&str]| Routes::validation(&config, &names(held_out), &training, &routes);
    let found = validation(&["b/test", "a/validation", "b/other"]).unwrap();
    assert_eq!((found.of(0), found.of(1), found.of(2)), (vec![1], vec![0], vec![0, 1]));
    let text = validation(&["z/validation"]).unwrap_err().to_string();
    assert!(text.contains("no teacher answers for the validation dataset `z/validation`"), "{text}");
    let error = Routes::training(&config, &names(&["a/train", "c/train"])).unwrap_err();
    assert!(error.to_string().contains("run.toml") && error.to_string().contains("the dataset `c/train`"), "{error}");
    assert!(error.hint().unwrap().contains("`datasets`"));
}

#[test]
fn teachers_whose_candidates_differ_are_refused_where_they_meet() {
    for support in ["teacher", "union"] {
        let config = resolved(&format!("top_k = 4\ntop_k_support = \"{support}\""));
        assert!(Routes::training(&config, &names(&["a/train"])).is_ok(), "one teacher each is exact");
        let text = Routes::training(&config, &names(&["a/train", "b/train"])).unwrap_err().to_string();
        assert!(text.contains("the teachers `math`, `code` answer for `b/train` together"), "{text}");
    }
    for exact in ["top_k = 4", "top_k = 0", "top_k = -1\ntop_k_support = \"union\""] {
        assert!(Routes::training(&resolved(exact), &names(&["b/train"])).is_ok(), "{exact}");
    }
}

#[test]
fn each_of_several_teachers_has_its_metrics() {
    let done = |name: &str, tokens, depth_max| {
        (name.to_string(), TeacherStats { tokens, seconds: 2.0, depth_max, latency_ms_max: 500 })
    };
    let one = work_metrics(&[done("teacher", 10, 3)]);
    assert_eq!(one.keys().filter(|k| k.matches('/').count() > 1).count(), 0);
    let two = work_metrics(&[done("math", 10, 3), done("code", 30, 2)]);
    assert_eq!((two["teacher/tokens_per_second"], two["teacher/code/tokens_per_second"]), (10.0, 15.0));
    assert_eq!((two["teacher/queue_depth_max"], two["teacher/code/queue_depth_max"]), (3.0, 2.0));
    assert_eq!(two["teacher/math/latency_max_seconds"], 0.5);
}
