use super::super::spec::LossType;
use super::*;

const VOCAB: usize = 9;

/// Logits kept in memory.
struct Kept(Vec<f32>);

impl LogitsSource for Kept {
    fn logits_rv(&mut self, rows: Range<usize>, out: &mut Vec<f32>) -> Result<()> {
        out.clear();
        out.extend_from_slice(&self.0[rows.start * VOCAB..rows.end * VOCAB]);
        Ok(())
    }
}

/// Smooth pseudo-random numbers in ±2.
fn noise(seed: usize, count: usize) -> Vec<f32> {
    (0..count).map(|i| (((i * 73 + seed * 151) % 97) as f32 * 0.7).sin() * 2.0).collect()
}

fn log_softmax(z_v: &[f32], temperature: f32) -> Vec<f32> {
    let mut z_v = z_v.to_vec();
    apply_temperature(&mut z_v, temperature);
    let stats = RowStats::of(&z_v).unwrap();
    z_v.iter().map(|&z| stats.log_prob(z) as f32).collect()
}

/// Two samples (3 and 4 completion tokens), all optional vectors present.
fn samples(spec: &ObjectiveSpec, student_rv: &[f32], teacher_rv: &[f32], known_old: bool) -> Vec<Sample> {
    let mut row = 0;
    let mut made = Vec::new();
    for (prompt_len, completion, advantage) in [(2, 3, 0.7f32), (1, 4, -0.4)] {
        let ids: Vec<u32> = (0..prompt_len + completion).map(|i| ((i * 5 + completion * 3) % VOCAB) as u32).collect();
        let mut sample = Sample { ids, prompt_len, advantage, ..Sample::default() };
        sample.teacher = TeacherView::Missing;
        let first = if spec.distill.as_ref().is_some_and(|d| d.include_prompt) { 1 } else { prompt_len };
        let rows: Vec<usize> = (row..row + sample.ids.len() - first).collect();
        row += rows.len();
        let target = |r: usize| sample.ids[first + r - rows[0]] as usize;
        let of = |z: &[f32], r: usize| log_softmax(&z[r * VOCAB..(r + 1) * VOCAB], spec.temperature);
        let mine = |shift: f32| -> Vec<f32> {
            rows.iter().map(|&r| of(student_rv, r)[target(r)] + shift * ((r % 3) as f32 - 0.8)).collect()
        };
        let (old, rollout, reference) = (mine(0.15), mine(-0.2), mine(0.3));
        let teacher = match spec.distill.as_ref().map(|d| d.kind) {
            None => TeacherView::NotDistilled,
            Some(DistillKind::FullVocab) => TeacherView::Full,
            Some(DistillKind::Sampled) => {
                TeacherView::Sampled(rows.iter().map(|&r| of(teacher_rv, r)[target(r)]).collect())
            }
            Some(_) => {
                let ids: Vec<u32> = rows.iter().flat_map(|&r| [(r % 4) as u32, ABSENT, 4 + (r % 5) as u32]).collect();
                let logprob =
                    |(i, &id): (usize, &u32)| if id == ABSENT { 0.0 } else { of(teacher_rv, rows[i / 3])[id as usize] };
                TeacherView::TopK { logprobs: ids.iter().enumerate().map(logprob).collect(), ids }
            }
        };
        sample.old = known_old.then_some(old);
        sample.rollout = Some(rollout);
        sample.reference = Some(reference);
        sample.teacher = teacher;
        made.push(sample);
    }
    made
}

fn run(
    spec: &ObjectiveSpec,
    samples: &[Sample],
    student_rv: &[f32],
    teacher_rv: &[f32],
    chunk: usize,
) -> (Report, Vec<f32>) {
    let mut source = Kept(teacher_rv.to_vec());
    let normaliser = Normaliser::of(spec, samples, 0.5);
    let mut loss = PolicyLoss::new(spec, samples, normaliser, Some(&mut source)).unwrap();
    let mut out = student_rv[..loss.rows() * VOCAB].to_vec();
    let ranges: Vec<Range<usize>> = (0..loss.rows()).step_by(chunk).map(|s| s..loss.rows().min(s + chunk)).collect();
    if loss.needs_first_pass() {
        for rows in &ranges {
            loss.observe(rows.clone(), &out[rows.start * VOCAB..rows.end * VOCAB]).unwrap();
        }
    }
    for rows in &ranges {
        loss.gradient(rows.clone(), &mut out[rows.start * VOCAB..rows.end * VOCAB]).unwrap();
    }
    (loss.into_report(), out)
}

fn distill(kind: DistillKind, beta: f64) -> DistillSpec {
    DistillSpec { kind, beta, coef: 0.8, discount: 0.0, kl_clip: None, include_prompt: false }
}

const KINDS: [DistillKind; 6] = [
    DistillKind::Sampled,
    DistillKind::Gjsd { mass: Mass::Tail },
    DistillKind::Gjsd { mass: Mass::Renormalize },
    DistillKind::Gjsd { mass: Mass::Raw },
    DistillKind::CosmosGjsd,
    DistillKind::FullVocab,
];

/// Every objective that is a function of the current logits with nothing held constant but what the samples give.
fn check_differences(spec: &ObjectiveSpec) {
    let rows = 8;
    let (student_rv, teacher_rv) = (noise(1, rows * VOCAB), noise(5, rows * VOCAB));
    let samples = samples(spec, &student_rv, &teacher_rv, true);
    let (report, gradient) = run(spec, &samples, &student_rv, &teacher_rv, 3);
    assert!(report.total.is_finite() && report.non_finite_rows == 0);
    let largest = gradient.iter().fold(0.0f32, |m, g| m.max(g.abs()));
    let mut checked = 0;
    for i in 0..gradient.len() {
        let at = |step: f32| {
            let mut moved = student_rv.clone();
            moved[i] += step;
            run(spec, &samples, &moved, &teacher_rv, 100).0.total
        };
        let (up, down) = (at(4e-3) - at(0.0), at(0.0) - at(-4e-3));
        let slope = (up + down) / 8e-3;
        // Where a clip switches within the step, the two sides differ.
        if (up - down).abs() < 2e-2 * f64::from(largest) * 4e-3 {
            let error = (slope - f64::from(gradient[i])).abs();
            assert!(error < 2e-3 * f64::from(largest) + 2e-5, "{spec:?} {i}: {slope} {}", gradient[i]);
            checked += 1;
        }
    }
    assert!(
        largest > 1e-3 && checked > gradient.len() * 2 / 3,
        "{spec:?}: only {checked} of {} are smooth",
        gradient.len()
    );
}

#[test]
fn gradients_match_differences_for_every_kind() {
    for kind in KINDS {
        for beta in [0.0, 0.3, 1.0] {
            for kl_clip in [None, Some(1.5)] {
                let mut own = distill(kind, beta);
                own.kl_clip = kl_clip;
                check_differences(&ObjectiveSpec {
                    distill: Some(own),
                    temperature: 0.8,
                    kl_beta: 0.2,
                    ..ObjectiveSpec::default()
                });
            }
        }
    }
}

#[test]
fn gradients_match_differences_for_every_option() {
    let base = ObjectiveSpec { entropy_coeff: 0.3, kl_beta: 0.5, temperature: 1.3, ..ObjectiveSpec::default() };
    for loss in [LossType::TokenMean, LossType::SeqMeanTokenSum, LossType::SeqMeanTokenMean, LossType::TokenSum] {
        check_differences(&ObjectiveSpec { loss, ..base.clone() });
    }
    for variant in [Variant::Grpo, Variant::Gspo, Variant::Dapo] {
        let own = ObjectiveSpec { variant, epsilon_low: -1.0, epsilon_high: -1.0, ..base.clone() };
        check_differences(&own);
        check_differences(&ObjectiveSpec { unbiased_kl_estimate: true, use_decoupled_loss: true, ..own.clone() });
        check_differences(&ObjectiveSpec { behav_imp_weight_cap: Some(1.2), use_decoupled_loss: true, ..own.clone() });
        check_differences(&ObjectiveSpec { off_policy_masking_delta: Some(-5.0), ..own.clone() });
        check_differences(&ObjectiveSpec { distill: Some(distill(DistillKind::Sampled, 0.5)), ..own.clone() });
        check_differences(&ObjectiveSpec { distill: Some(distill(DistillKind::CosmosGjsd, 0.5)), ..own });
    }
    check_differences(&ObjectiveSpec { aipo_rho: Some(1.05), ..base.clone() });
    let bounded = ObjectiveSpec { lower_bound_ratio: 1.02, ..base.clone() };
    check_differences(&ObjectiveSpec { distill: Some(distill(DistillKind::CosmosGjsd, 1.0)), ..bounded });
    check_differences(&ObjectiveSpec {
        unbiased_loss_max_tokens: Some(50),
        loss: LossType::SeqMeanTokenMean,
        ..base.clone()
    });
    let mut discounted = distill(DistillKind::Sampled, 0.5);
    discounted.discount = 0.9;
    discounted.include_prompt = true;
    check_differences(&ObjectiveSpec { distill: Some(discounted), ..base });
}

#[test]
fn chunks_do_not_matter() {
    let (student_rv, teacher_rv) = (noise(2, 8 * VOCAB), noise(3, 8 * VOCAB));
    for kind in KINDS {
        let mut own = distill(kind, 0.4);
        own.discount = 0.7;
        let spec = ObjectiveSpec { distill: Some(own), ..ObjectiveSpec::default() };
        let samples = samples(&spec, &student_rv, &teacher_rv, false);
        let whole = run(&spec, &samples, &student_rv, &teacher_rv, 100);
        assert_eq!(run(&spec, &samples, &student_rv, &teacher_rv, 1), whole);
        assert_eq!(run(&spec, &samples, &student_rv, &teacher_rv, 3), whole);
    }
}

#[test]
fn a_teacher_equal_to_the_student_gives_nothing() {
    let student_rv = noise(4, 8 * VOCAB);
    for kind in KINDS {
        if kind == (DistillKind::Gjsd { mass: Mass::Raw }) || kind == DistillKind::CosmosGjsd {
            continue; // Not divergences: the raw forward KL pulls the candidates' mass up even when all is equal.
        }
        for beta in [0.0, 0.5, 1.0] {
            let spec =
                ObjectiveSpec { distill: Some(distill(kind, beta)), temperature: 0.7, ..ObjectiveSpec::default() };
            let mut samples = samples(&spec, &student_rv, &student_rv, false);
            samples.iter_mut().for_each(|s| s.advantage = 0.0);
            let (report, gradient) = run(&spec, &samples, &student_rv, &student_rv, 3);
            assert!(
                report.total.abs() < 1e-6 && report.kl.iter().all(|kl| kl.abs() < 1e-6),
                "{kind:?} {beta}: {}",
                report.total
            );
            assert!(gradient.iter().all(|g| g.abs() < 1e-6), "{kind:?} {beta}");
        }
    }
}

#[test]
fn discounting_the_direct_kinds_credits_later_tokens() {
    let (student_rv, teacher_rv) = (noise(2, 8 * VOCAB), noise(3, 8 * VOCAB));
    let mut own = distill(DistillKind::FullVocab, 1.0);
    own.discount = 0.5;
    let spec = ObjectiveSpec { distill: Some(own), ..ObjectiveSpec::default() };
    let samples = samples(&spec, &student_rv, &teacher_rv, false);
    let (report, _) = run(&spec, &samples, &student_rv, &teacher_rv, 3);
    let kl = &report.kl;
    for (row, later) in [(0, 0.5 * kl[1] + 0.25 * kl[2]), (2, 0.0), (6, 0.0), (5, 0.5 * kl[6])] {
        let reward = if row < 3 { 0.7 } else { -0.4 };
        assert!((report.advantages[row] - (reward - 0.8 * later)).abs() < 1e-5, "row {row}");
    }
}

#[test]
fn sequences_far_off_policy_are_left_out() {
    let student_rv = noise(4, 8 * VOCAB);
    let spec = ObjectiveSpec { off_policy_masking_delta: Some(0.1), ..ObjectiveSpec::default() };
    let mut samples = samples(&spec, &student_rv, &student_rv, false);
    samples.iter_mut().for_each(|s| s.rollout.as_mut().unwrap().iter_mut().for_each(|r| *r += 1.0));
    let (report, gradient) = run(&spec, &samples, &student_rv, &student_rv, 3);
    assert_eq!(report.masked_sequences, 1);
    assert!(gradient[..3 * VOCAB].iter().any(|g| *g != 0.0), "the first has a positive advantage");
    assert!(gradient[3 * VOCAB..].iter().all(|g| *g == 0.0), "the second a negative one");
}

#[test]
fn missing_teachers_are_masked_and_counted() {
    let (student_rv, teacher_rv) = (noise(2, 12 * VOCAB), noise(3, 12 * VOCAB));
    let mut own = distill(DistillKind::Sampled, 0.0);
    own.include_prompt = true;
    let spec = ObjectiveSpec { distill: Some(own), ..ObjectiveSpec::default() };
    let mut samples = samples(&spec, &student_rv, &teacher_rv, false);
    let full = PolicyLoss::new(&spec, &samples, Normaliser::of(&spec, &samples, 1.0), None).unwrap().rows();
    samples[0].teacher = TeacherView::Missing;
    let normaliser = Normaliser::of(&spec, &samples, 1.0);
    let loss = PolicyLoss::new(&spec, &samples, normaliser, None).unwrap();
    assert_eq!((full, loss.rows(), normaliser.tokens, normaliser.sequences), (8, 4, 4, 2));
    let (batch, positions) = loss.batch().unwrap();
    assert_eq!((batch.lens_b, positions[0], positions[3]), (vec![4], Position { b: 0, t: 0 }, Position { b: 0, t: 3 }));
    let (report, _) = run(&spec, &samples, &student_rv, &teacher_rv, 2);
    assert_eq!((report.missing_samples, report.missing_tokens, report.kl.len(), report.samples), (1, 3, 4, 2));
    samples[1].teacher = TeacherView::Missing;
    let loss = PolicyLoss::new(&spec, &samples, normaliser, None).unwrap();
    assert_eq!(loss.rows(), 0);
    assert!(loss.batch().is_err() && !loss.needs_first_pass());
}

/// A conversation: what others said stands between the model's own tokens.
#[test]
fn tokens_of_others_are_context_only() {
    let (student_rv, teacher_rv) = (noise(2, 12 * VOCAB), noise(3, 12 * VOCAB));
    let heard = |sample: &Sample, ids: [u32; 3]| {
        let at = sample.prompt_len + 2;
        let mut long = sample.clone();
        long.ids.splice(at..at, ids);
        let own = |token: usize| !(2..5).contains(&token);
        long.own = Some((0..long.ids.len() - long.prompt_len).map(own).collect());
        long
    };
    for include_prompt in [false, true] {
        for kind in KINDS {
            let mut own = distill(kind, 0.4);
            (own.discount, own.include_prompt) = (0.7, include_prompt);
            let spec = ObjectiveSpec {
                distill: Some(own),
                kl_beta: 0.1,
                use_decoupled_loss: true,
                loss: LossType::SeqMeanTokenMean,
                ..ObjectiveSpec::default()
            };
            let plain = samples(&spec, &student_rv, &teacher_rv, true);
            let long: Vec<Sample> = plain.iter().map(|s| heard(s, [7, 8, 6])).collect();
            let alone = run(&spec, &plain, &student_rv, &teacher_rv, 3);
            assert_eq!(run(&spec, &long, &student_rv, &teacher_rv, 3), alone, "{kind:?}");
            let others: Vec<Sample> = plain.iter().map(|s| heard(s, [1, 0, 2])).collect();
            assert_eq!(run(&spec, &others, &student_rv, &teacher_rv, 3), alone, "{kind:?}");
            let normaliser = Normaliser::of(&spec, &long, 1.0);
            assert_eq!(normaliser, Normaliser::of(&spec, &plain, 1.0));
            let mut source = Kept(teacher_rv.clone());
            let (batch, positions) =
                PolicyLoss::new(&spec, &long, normaliser, Some(&mut source)).unwrap().batch().unwrap();
            // The model reads everything; the token after what it heard is predicted from the last token heard.
            assert_eq!(batch.lens_b, [7, 7]);
            let of_second: Vec<usize> = positions.iter().filter(|p| p.b == 1).map(|p| p.t).collect();
            assert_eq!(of_second, [0, 1, 5, 6]);
        }
    }
    let spec = ObjectiveSpec::default();
    let mut bad = samples(&spec, &student_rv, &teacher_rv, false);
    bad[0].own = Some(vec![true]);
    let error = PolicyLoss::new(&spec, &bad, Normaliser::of(&spec, &bad, 1.0), None).err().expect("refused");
    assert!(error.to_string().contains("a mask of 1 entries for a completion of 3 tokens"), "{error}");
}

#[test]
fn the_prompt_gets_no_reward() {
    let (student_rv, teacher_rv) = (noise(2, 12 * VOCAB), noise(3, 12 * VOCAB));
    let mut own = distill(DistillKind::Sampled, 0.0);
    own.include_prompt = true;
    let spec = ObjectiveSpec { distill: Some(own), ..ObjectiveSpec::default() };
    let samples = samples(&spec, &student_rv, &teacher_rv, false);
    let (report, _) = run(&spec, &samples, &student_rv, &teacher_rv, 3);
    assert!((report.advantages[0] - report.kl_advantages[0]).abs() < 1e-6);
    assert!((report.advantages[1] - report.kl_advantages[1] - 0.7).abs() < 1e-6);
    // Old log-probs of the completion alone leave the prompt on-policy and nothing else changed.
    let mut known = samples.clone();
    let target_logprob = |r: usize, id: u32| log_softmax(&student_rv[r * VOCAB..(r + 1) * VOCAB], 1.0)[id as usize];
    known[0].old = Some((1..4).map(|r| target_logprob(r, samples[0].ids[r + 1])).collect());
    known[0].rollout = known[0].old.clone();
    let (same, _) = run(&spec, &known, &student_rv, &teacher_rv, 3);
    assert!((same.total - report.total).abs() < 1e-6 && same.kl.len() == report.kl.len());
}

#[test]
fn the_bound_on_log_ratios_is_counted() {
    let (student_rv, teacher_rv) = (noise(2, 8 * VOCAB), noise(3, 8 * VOCAB));
    let mut own = distill(DistillKind::Sampled, 0.0);
    own.kl_clip = Some(0.5);
    let spec = ObjectiveSpec { distill: Some(own), ..ObjectiveSpec::default() };
    let samples = samples(&spec, &student_rv, &teacher_rv, false);
    let (report, _) = run(&spec, &samples, &student_rv, &teacher_rv, 3);
    let beyond = report.kl.iter().filter(|kl| kl.abs() > 0.5).count();
    assert!(beyond > 0 && report.kl_clipped_tokens == beyond);
    assert!(report.kl_advantages.iter().all(|a| a.abs() <= 0.4 + 1e-6));
}

#[test]
fn metrics_know_both_models() {
    let (student_rv, teacher_rv) = (noise(2, 8 * VOCAB), noise(3, 8 * VOCAB));
    let spec = ObjectiveSpec { distill: Some(distill(DistillKind::FullVocab, 1.0)), ..ObjectiveSpec::default() };
    let samples_full = samples(&spec, &student_rv, &teacher_rv, false);
    let (report, _) = run(&spec, &samples_full, &student_rv, &teacher_rv, 3);
    assert_eq!((report.teacher_entropy.len(), report.student_entropy.len(), report.top1_compared), (7, 7, 7));
    let argmax = |z: &[f32], r: usize| RowStats::of(&z[r * VOCAB..(r + 1) * VOCAB]).unwrap().argmax;
    assert_eq!(report.top1_agreed, (0..7).filter(|&r| argmax(&student_rv, r) == argmax(&teacher_rv, r)).count());
    let spec = ObjectiveSpec {
        distill: Some(distill(DistillKind::Gjsd { mass: Mass::Tail }, 1.0)),
        ..ObjectiveSpec::default()
    };
    let mut samples_k = samples(&spec, &student_rv, &teacher_rv, false);
    samples_k[1].teacher_top1 = Some(vec![argmax(&student_rv, 3), 0, 0, 0]);
    let (report, _) = run(&spec, &samples_k, &student_rv, &teacher_rv, 3);
    assert_eq!((report.top_k_mass_student.len(), report.top_k_mass_teacher.len(), report.top1_compared), (7, 7, 4));
    assert!(report.top1_agreed >= 1 && report.top_k_mass_student.iter().all(|m| (0.0..1.0).contains(m)));
}

#[test]
fn bad_logits_are_reported_and_give_no_gradient() {
    for kind in KINDS {
        for bad in [f32::NAN, f32::INFINITY] {
            for in_teacher in [false, true] {
                let (mut student_rv, mut teacher_rv) = (noise(2, 8 * VOCAB), noise(3, 8 * VOCAB));
                let mut own = distill(kind, 0.5);
                own.discount = 0.5;
                let spec = ObjectiveSpec { distill: Some(own), variant: Variant::Gspo, ..ObjectiveSpec::default() };
                let samples = samples(&spec, &student_rv, &teacher_rv, true);
                if in_teacher {
                    teacher_rv[2 * VOCAB + 4] = bad
                } else {
                    student_rv[2 * VOCAB + 4] = bad
                }
                let (report, gradient) = run(&spec, &samples, &student_rv, &teacher_rv, 3);
                if in_teacher && kind != DistillKind::FullVocab {
                    assert!(report.total.is_finite());
                    continue;
                }
                assert!(report.total.is_nan() && report.non_finite_rows == 1, "{kind:?}");
                assert!(
                    gradient[2 * VOCAB..3 * VOCAB].iter().all(|g| *g == 0.0) && gradient.iter().all(|g| g.is_finite())
                );
            }
        }
    }
    // A teacher's log-prob that is not a number.
    let rv = noise(2, 8 * VOCAB);
    let spec = ObjectiveSpec { distill: Some(distill(DistillKind::Sampled, 0.0)), ..ObjectiveSpec::default() };
    let mut samples = samples(&spec, &rv, &rv, false);
    samples[0].teacher = TeacherView::Sampled(vec![f32::NAN, -1.0, f32::NEG_INFINITY]);
    assert_eq!(run(&spec, &samples, &rv, &rv, 3).0.non_finite_rows, 2);
}

#[test]
fn what_does_not_fit_is_refused() {
    let rv = noise(2, 8 * VOCAB);
    let spec = ObjectiveSpec { distill: Some(distill(DistillKind::Sampled, 0.0)), ..ObjectiveSpec::default() };
    let good = samples(&spec, &rv, &rv, true);
    let fails = |spec: &ObjectiveSpec, change: &dyn Fn(&mut Sample)| {
        let mut own = good.clone();
        change(&mut own[1]);
        PolicyLoss::new(spec, &own, Normaliser::of(spec, &own, 1.0), None).err().expect("refused").to_string()
    };
    assert!(fails(&spec, &|s| s.old = Some(vec![0.0])).contains("sample 1: 1 old log-probs for 4"));
    assert!(fails(&spec, &|s| s.teacher = TeacherView::Sampled(vec![])).contains("sample 1: 0 teacher log-probs"));
    assert!(fails(&spec, &|s| s.teacher = TeacherView::Full).contains("does not fit"));
    assert!(fails(&spec, &|s| s.prompt_len = 0).contains("sample 1"));
    assert!(fails(&ObjectiveSpec { kl_beta: 0.1, ..spec.clone() }, &|s| s.reference = None).contains("no reference"));
    assert!(
        fails(&ObjectiveSpec { use_decoupled_loss: true, ..spec.clone() }, &|s| s.rollout = None)
            .contains("no rollout")
    );
    let mut wild = distill(DistillKind::Sampled, 1.5);
    assert!(fails(&ObjectiveSpec { distill: Some(wild.clone()), ..spec.clone() }, &|_| ()).contains("jsd_beta"));
    wild.beta = 1.0;
    wild.kl_clip = Some(0.0);
    assert!(fails(&ObjectiveSpec { distill: Some(wild), ..spec.clone() }, &|_| ()).contains("kl_clip"));
    let mut own = good.clone();
    own[0].ids[3] = u32::MAX;
    let mut loss = PolicyLoss::new(&spec, &own, Normaliser::of(&spec, &own, 1.0), None).unwrap();
    assert!(
        loss.gradient(0..7, &mut rv[..7 * VOCAB].to_vec()).unwrap_err().to_string().contains("outside the vocabulary")
    );
    assert!(loss.gradient(0..8, &mut rv.clone()).is_err());
    assert!(loss.observe(3..3, &[]).is_err());
}

#[path = "shard_tests.rs"]
mod shard_tests;
