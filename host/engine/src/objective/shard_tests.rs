//! Losses over a cut vocabulary equal those over the whole one.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use cosmos_parallel::{Collective, ThreadGroup, ThreadRank};

use super::*;
use crate::objective::{SftLoss, SftSample};

/// Counts what a rank gets.
struct Counted {
    inner: ThreadRank,
    values: Arc<AtomicUsize>,
}

impl Collective for Counted {
    fn rank(&self) -> usize {
        self.inner.rank()
    }
    fn world(&self) -> usize {
        self.inner.world()
    }
    fn all_gather(&self, mine: &[f32], all: &mut [f32]) -> cosmos_parallel::Result<()> {
        self.values.fetch_add(all.len(), Ordering::Relaxed);
        self.inner.all_gather(mine, all)
    }
    fn all_reduce_sum(&self, values: &mut [f32]) -> cosmos_parallel::Result<()> {
        self.values.fetch_add(values.len(), Ordering::Relaxed);
        self.inner.all_reduce_sum(values)
    }
    fn all_reduce_max(&self, values: &mut [f32]) -> cosmos_parallel::Result<()> {
        self.values.fetch_add(values.len(), Ordering::Relaxed);
        self.inner.all_reduce_max(values)
    }
    fn reduce_scatter_sum(&self, all: &[f32], mine: &mut [f32]) -> cosmos_parallel::Result<()> {
        self.values.fetch_add(all.len(), Ordering::Relaxed);
        self.inner.reduce_scatter_sum(all, mine)
    }
    fn broadcast(&self, root: usize, values: &mut [f32]) -> cosmos_parallel::Result<()> {
        self.values.fetch_add(values.len(), Ordering::Relaxed);
        self.inner.broadcast(root, values)
    }
    fn barrier(&self) -> cosmos_parallel::Result<()> {
        self.inner.barrier()
    }
    fn all_to_all(&self, send: &[f32], received: &mut [f32]) -> cosmos_parallel::Result<()> {
        self.values.fetch_add(received.len(), Ordering::Relaxed);
        self.inner.all_to_all(send, received)
    }
    fn send(&self, to: usize, values: &[f32]) -> cosmos_parallel::Result<()> {
        self.values.fetch_add(values.len(), Ordering::Relaxed);
        self.inner.send(to, values)
    }
    fn recv(&self, from: usize, values: &mut [f32]) -> cosmos_parallel::Result<()> {
        self.inner.recv(from, values)
    }
    fn all_gather_bytes(&self, mine: &[u8], bytes_max: usize) -> cosmos_parallel::Result<Vec<Vec<u8>>> {
        self.values.fetch_add(mine.len() * self.world(), Ordering::Relaxed);
        self.inner.all_gather_bytes(mine, bytes_max)
    }
}

/// Runs a loss on every rank of a cut vocabulary; the gradients put together, each rank's result, and the values that rank
/// 0 got from the others. Parts differ in length where the vocabulary does not divide, and lie in reverse.
fn on_shards<T: Send>(
    vocab: usize,
    ranks: usize,
    logits_rv: &[f32],
    work: impl Fn(&VocabShard, Vec<f32>) -> (T, Vec<f32>) + Sync,
) -> (Vec<T>, Vec<f32>, usize) {
    let rows = logits_rv.len() / vocab;
    let counted = Arc::new(AtomicUsize::new(0));
    let work = &work;
    let done: Vec<(VocabShard, T, Vec<f32>)> = std::thread::scope(|scope| {
        let threads: Vec<_> = ThreadGroup::of(ranks, 30_000)
            .into_iter()
            .enumerate()
            .map(|(rank, inner)| {
                let cut = |part: usize| vocab * part / ranks;
                let first = cut(ranks - 1 - rank);
                let values = if rank == 0 { counted.clone() } else { Arc::default() };
                let collective = Arc::new(Counted { inner, values });
                let shard = VocabShard { first, len: cut(ranks - rank) - first, vocab, collective };
                scope.spawn(move || {
                    let (result, gradient) = work(&shard, local(&shard, logits_rv));
                    (shard, result, gradient)
                })
            })
            .collect();
        threads.into_iter().map(|t| t.join().unwrap()).collect()
    });
    let mut gradient_rv = vec![f32::NAN; rows * vocab];
    let mut results = Vec::new();
    for (shard, result, own_rv) in done {
        for (row, own_v) in gradient_rv.chunks_mut(vocab).zip(own_rv.chunks(shard.len)) {
            row[shard.ids()].copy_from_slice(own_v);
        }
        results.push(result);
    }
    (results, gradient_rv, counted.load(Ordering::Relaxed))
}

fn local(shard: &VocabShard, logits_rv: &[f32]) -> Vec<f32> {
    logits_rv.chunks(shard.vocab).flat_map(|row| row[shard.ids()].to_vec()).collect()
}

struct Part {
    rows_v: Vec<f32>,
    width: usize,
}

impl LogitsSource for Part {
    fn logits_rv(&mut self, rows: Range<usize>, out: &mut Vec<f32>) -> Result<()> {
        out.clear();
        out.extend_from_slice(&self.rows_v[rows.start * self.width..rows.end * self.width]);
        Ok(())
    }
}

/// One rank's loss, chunk by chunk.
fn run_part(
    spec: &ObjectiveSpec,
    samples: &[Sample],
    shard: &VocabShard,
    mut rows_v: Vec<f32>,
    teacher_v: Vec<f32>,
    chunk: usize,
) -> (Report, Vec<f32>) {
    let width = shard.len;
    let mut source = Part { rows_v: teacher_v, width };
    let mut loss = PolicyLoss::new(spec, samples, Normaliser::of(spec, samples, 0.5), Some(&mut source)).unwrap();
    loss.set_vocab_shard(shard).unwrap();
    rows_v.truncate(loss.rows() * width);
    let ranges: Vec<Range<usize>> = (0..loss.rows()).step_by(chunk).map(|s| s..loss.rows().min(s + chunk)).collect();
    if loss.needs_first_pass() {
        for rows in &ranges {
            loss.observe(rows.clone(), &rows_v[rows.start * width..rows.end * width]).unwrap();
        }
    }
    for rows in &ranges {
        loss.gradient(rows.clone(), &mut rows_v[rows.start * width..rows.end * width]).unwrap();
    }
    (loss.into_report(), rows_v)
}

fn assert_close(what: &str, got: &[f32], expected: &[f32]) {
    let largest = expected.iter().fold(0.0f32, |m, e| m.max(e.abs()));
    for (index, (got, expected)) in got.iter().zip(expected).enumerate() {
        assert!((got - expected).abs() <= 1e-6 * largest, "{what} at {index}: {got} and {expected}, largest {largest}");
    }
}

#[test]
fn objectives_over_a_cut_vocabulary() {
    let rows = 8;
    let (student_rv, teacher_rv) = (noise(1, rows * VOCAB), noise(5, rows * VOCAB));
    let base = ObjectiveSpec { kl_beta: 0.1, entropy_coeff: 0.05, temperature: 0.7, ..ObjectiveSpec::default() };
    let mut specs = vec![
        base.clone(),
        ObjectiveSpec { variant: Variant::Gspo, ..base.clone() },
        ObjectiveSpec { off_policy_masking_delta: Some(0.01), use_decoupled_loss: true, ..base.clone() },
        ObjectiveSpec { aipo_rho: Some(1.5), temperature: 1.0, ..base.clone() },
    ];
    for kind in KINDS {
        for (beta, discount, kl_clip, include_prompt) in
            [(0.0, 0.0, None, false), (0.5, 0.9, Some(0.7), false), (1.0, 0.0, None, true)]
        {
            let distill = Some(DistillSpec { discount, kl_clip, include_prompt, ..distill(kind, beta) });
            specs.push(ObjectiveSpec { distill: distill.clone(), ..base.clone() });
            specs.push(ObjectiveSpec { distill, variant: Variant::Gspo, temperature: 1.0, ..base.clone() });
        }
    }
    for spec in specs.iter().filter(|spec| spec.check().is_ok()) {
        for known_old in [true, false] {
            let made = samples(spec, &student_rv, &teacher_rv, known_old);
            let (expected, gradient) = run(spec, &made, &student_rv, &teacher_rv, 3);
            for ranks in [2, 3, 4, 8] {
                let (reports, got, _) = on_shards(VOCAB, ranks, &student_rv, |shard, rows_v| {
                    run_part(spec, &made, shard, rows_v, local(shard, &teacher_rv), 3)
                });
                for report in &reports {
                    let near = (report.total - expected.total).abs() <= 1e-6 * expected.total.abs().max(0.1);
                    assert!(near, "{} and {} of {spec:?} on {ranks}", report.total, expected.total);
                    assert_eq!(report.top1_agreed, expected.top1_agreed);
                    assert_eq!(report.kl.len(), expected.kl.len());
                    assert_eq!(report.total.to_bits(), reports[0].total.to_bits(), "ranks must agree to the bit");
                }
                assert_close(&format!("{spec:?} on {ranks}"), &got[..gradient.len()], &gradient);
            }
        }
    }
}

#[test]
fn a_bad_number_on_one_rank_ends_the_row_on_all() {
    let (mut student_rv, teacher_rv) = (noise(1, 8 * VOCAB), noise(5, 8 * VOCAB));
    let spec = ObjectiveSpec { distill: Some(distill(DistillKind::FullVocab, 0.5)), ..ObjectiveSpec::default() };
    let made = samples(&spec, &student_rv, &teacher_rv, true);
    student_rv[VOCAB + 3] = f32::NAN;
    // A part of a row may hold nothing.
    student_rv[2 * VOCAB..2 * VOCAB + 4].fill(f32::NEG_INFINITY);
    let (expected, gradient) = run(&spec, &made, &student_rv, &teacher_rv, 100);
    let (reports, got, _) = on_shards(VOCAB, 3, &student_rv, |shard, rows_v| {
        run_part(&spec, &made, shard, rows_v, local(shard, &teacher_rv), 100)
    });
    for report in reports {
        assert!(report.total.is_nan() && report.non_finite_rows == expected.non_finite_rows);
    }
    assert!(expected.non_finite_rows >= 1 && got[VOCAB..2 * VOCAB].iter().all(|g| *g == 0.0));
    assert_close("gradient", &got[..gradient.len()], &gradient);
}

#[test]
fn responses_over_a_cut_vocabulary() {
    let made = [SftSample::response(vec![1, 4, 2, 0], 2), SftSample::response(vec![2, 5, 5], 0)];
    let rows_v = noise(3, 4 * VOCAB);
    let run = |shard: &VocabShard, mut rows_v: Vec<f32>| {
        let mut loss = SftLoss::new(&made, 0.25).unwrap();
        loss.set_vocab_shard(shard).unwrap();
        for (r, chunk) in rows_v.chunks_mut(2 * shard.len).enumerate() {
            loss.gradient(2 * r..2 * r + 2, chunk).unwrap();
        }
        ((loss.total(), loss.correct()), rows_v)
    };
    let (expected, gradient) = run(&VocabShard::whole(VOCAB), rows_v.clone());
    for ranks in [2, 3, 4, 8] {
        let (results, got, _) = on_shards(VOCAB, ranks, &rows_v, run);
        for (total, correct) in results {
            assert!((total / expected.0 - 1.0).abs() < 1e-6 && correct == expected.1);
        }
        assert_close("gradient", &got, &gradient);
    }
}

/// The ranks exchange numbers of rows: as many for a small vocabulary as for a large one.
#[test]
fn what_is_exchanged_does_not_grow_with_the_vocabulary() {
    for kind in KINDS {
        let spec = ObjectiveSpec { distill: Some(distill(kind, 0.5)), ..ObjectiveSpec::default() };
        let (narrow_rv, teacher_rv) = (noise(1, 8 * VOCAB), noise(5, 8 * VOCAB));
        let made = samples(&spec, &narrow_rv, &teacher_rv, true);
        let counts: Vec<usize> = [VOCAB, 50 * VOCAB]
            .into_iter()
            .map(|vocab| {
                let (wide_rv, teacher_rv) = (noise(1, 8 * vocab), noise(5, 8 * vocab));
                let (_, _, count) = on_shards(vocab, 2, &wide_rv, |shard, rows_v| {
                    run_part(&spec, &made, shard, rows_v, local(shard, &teacher_rv), 4)
                });
                count
            })
            .collect();
        assert!(counts[0] > 0 && counts[0] == counts[1], "{kind:?}: {counts:?}");
        // Two ranks' statistics, picked logits and divergences of 7 rows, twice 32 bits a number.
        assert!(counts[1] <= 7 * 2 * 2 * (2 * 4 + 4 + 3), "{kind:?}: {counts:?}");
    }
}

#[test]
fn a_wrong_width_is_refused() {
    let spec = ObjectiveSpec::default();
    let made = [Sample { ids: vec![1, 2], prompt_len: 1, ..Sample::default() }];
    let mut loss = PolicyLoss::new(&spec, &made, Normaliser::of(&spec, &made, 1.0), None).unwrap();
    let whole = VocabShard::whole(9);
    assert!(loss.set_vocab_shard(&VocabShard { first: 8, len: 2, ..whole.clone() }).is_err());
    loss.set_vocab_shard(&VocabShard { first: 3, len: 3, ..whole }).unwrap();
    let text = loss.gradient(0..1, &mut [0.0; 9]).unwrap_err().to_string();
    assert!(text.starts_with("rows of 9 logits where the rank has ids 3..6 of 9"), "{text}");
}
