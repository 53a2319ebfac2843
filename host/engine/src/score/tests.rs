use super::*;
use crate::generate::fake::{FakeModel, VOCAB, logits_after};
use crate::head::{Head, MixedLogits, ModelHead, Part};
use crate::model::LogitsSource;

fn log_softmax(z_v: &[f32]) -> Vec<f64> {
    let sum: f64 = z_v.iter().map(|&z| f64::from(z).exp()).sum();
    z_v.iter().map(|&z| f64::from(z) - sum.ln()).collect()
}

#[test]
fn scores_are_those_of_the_model() {
    let sequences: Vec<Vec<u32>> = (2..9).map(|n| (0..n).map(|i| (i * n * 7 + 3) % VOCAB as u32).collect()).collect();
    let candidates: Vec<Vec<u32>> = sequences
        .iter()
        .map(|s| (1..s.len()).flat_map(|t| [t as u32, ABSENT, (t as u32 * 11) % 50]).collect())
        .collect();
    let requests: Vec<ScoreRequest<'_>> =
        sequences.iter().zip(&candidates).map(|(ids, c)| ScoreRequest { ids, first: 1, candidates: Some(c) }).collect();
    let mut expected: Option<Vec<Scored>> = None;
    for (mini_batch, chunk_rows) in [(1, 1), (3, 2), (100, 100)] {
        let mut model = FakeModel::new();
        model.chunk_rows = chunk_rows;
        let options = ScoreOptions { temperature: 0.8, top_k: 3, mini_batch, keep_hidden: true, head: true };
        let scored = score(&mut model, &requests, &options).unwrap();
        for (ids, s) in sequences.iter().zip(&scored) {
            for t in 1..ids.len() {
                let scaled: Vec<f32> = logits_after(&ids[..t]).iter().map(|z| z / 0.8).collect();
                let exact = log_softmax(&scaled);
                let near = |got: f32, want: f64| assert!((f64::from(got) - want).abs() < 1e-5, "{got} {want}");
                near(s.logprobs[t - 1], exact[ids[t] as usize]);
                near(s.entropy[t - 1], -exact.iter().map(|l| l * l.exp()).sum::<f64>());
                near(s.candidate_logprobs[(t - 1) * 3], exact[t]);
                assert_eq!(s.candidate_logprobs[(t - 1) * 3 + 1], f32::NEG_INFINITY);
                assert_eq!(s.top_ids[(t - 1) * 3], s.top1[t - 1]);
                for j in 0..3 {
                    near(s.top_logprobs[(t - 1) * 3 + j], exact[s.top_ids[(t - 1) * 3 + j] as usize]);
                }
            }
        }
        assert_eq!(expected.get_or_insert(scored.clone()), &scored);
    }
}

/// A large head is read once for a chunk of rows, wherever these come from. The fake refuses more rows than a chunk.
#[test]
fn short_sequences_share_the_heads_chunks() {
    let sequences: Vec<Vec<u32>> = (0..9).map(|n| vec![n, 2 * n + 1, 7]).collect();
    let requests: Vec<ScoreRequest<'_>> =
        sequences.iter().map(|ids| ScoreRequest { ids, first: 1, candidates: None }).collect();
    let mut model = FakeModel::new();
    model.chunk_rows = 4;
    let together = score(&mut model, &requests, &ScoreOptions { mini_batch: 6, ..ScoreOptions::default() }).unwrap();
    // 6 and 3 sequences of two tokens.
    assert_eq!(model.head_calls, 3 + 2);
    for (request, scored) in requests.iter().zip(&together) {
        let alone = score(&mut model, std::slice::from_ref(request), &ScoreOptions::default()).unwrap();
        assert_eq!(&alone[0], scored);
    }
}

/// The vocabulary cut over ranks, in parts of unequal length: the same ids, also where logits are equal, and the same
/// numbers; every rank has them.
#[test]
fn scores_over_a_cut_vocabulary() {
    let sequences: Vec<Vec<u32>> = (2..7).map(|n| (0..n).map(|i| (i * n * 7 + 3) % VOCAB as u32).collect()).collect();
    let candidates: Vec<Vec<u32>> = sequences
        .iter()
        .map(|s| (1..s.len()).flat_map(|t| [t as u32, ABSENT, (t as u32 * 11) % 50]).collect())
        .collect();
    let run = |coarse: bool, top_k: usize, shard: Option<VocabShard>| {
        let requests: Vec<ScoreRequest<'_>> = sequences
            .iter()
            .zip(&candidates)
            .map(|(ids, c)| ScoreRequest { ids, first: 1, candidates: Some(c) })
            .collect();
        let mut model = FakeModel::new();
        (model.shard, model.coarse) = (shard, coarse);
        let options = ScoreOptions { temperature: 0.8, top_k, mini_batch: 2, keep_hidden: false, head: true };
        score(&mut model, &requests, &options).unwrap()
    };
    for (coarse, top_k) in [(false, 0), (false, 5), (true, 7), (true, 60)] {
        let expected = run(coarse, top_k, None);
        for ranks in [2, 3, 4, 8] {
            let got: Vec<Vec<Scored>> = std::thread::scope(|scope| {
                let threads: Vec<_> = cosmos_parallel::ThreadGroup::of(ranks, 30_000)
                    .into_iter()
                    .enumerate()
                    .map(|(rank, handle)| {
                        let first = VOCAB * rank / ranks;
                        let len = VOCAB * (rank + 1) / ranks - first;
                        let shard = VocabShard { first, len, vocab: VOCAB, collective: std::sync::Arc::new(handle) };
                        scope.spawn(move || run(coarse, top_k, Some(shard)))
                    })
                    .collect();
                threads.into_iter().map(|t| t.join().unwrap()).collect()
            });
            assert!(got.iter().all(|rank| rank == &got[0]), "all ranks have the same bits");
            for (got, expected) in got[0].iter().zip(&expected) {
                assert_eq!((&got.top1, &got.top_ids), (&expected.top1, &expected.top_ids), "{ranks} ranks");
                for (got, expected) in [
                    (&got.logprobs, &expected.logprobs),
                    (&got.entropy, &expected.entropy),
                    (&got.top_logprobs, &expected.top_logprobs),
                    (&got.candidate_logprobs, &expected.candidate_logprobs),
                ] {
                    assert_eq!(got.len(), expected.len());
                    for (got, expected) in got.iter().zip(expected) {
                        assert!(got == expected || (got - expected).abs() <= 1e-6 * expected.abs().max(1.0));
                    }
                }
            }
        }
    }
}

#[test]
fn hidden_states_give_the_logits_back() {
    let ids = [5, 9, 2, 7, 7];
    let mut model = FakeModel::new();
    let options = ScoreOptions { keep_hidden: true, head: false, ..ScoreOptions::default() };
    let scored = score(&mut model, &[ScoreRequest { ids: &ids, first: 2, candidates: None }], &options).unwrap();
    assert!(scored[0].logprobs.is_empty());
    let mut head = ModelHead(&mut model);
    let vocab = head.vocab();
    let part = Part { head: &mut head, hidden_rh: scored[0].hidden_rh.clone().unwrap(), spans: vec![(0..3, 1.0)] };
    let mut source = MixedLogits::new(vec![part], 3, vocab, 0.5).unwrap();
    let mut out = vec![1.0];
    source.logits_rv(1..3, &mut out).unwrap();
    assert_eq!(out, [logits_after(&ids[..3]), logits_after(&ids[..4])].concat());
    assert!(source.logits_rv(1..4, &mut out).is_err());
}

#[test]
fn bad_requests_are_refused_by_index() {
    let ok = [1u32, 2, 3];
    let fails = |request: ScoreRequest<'_>| {
        let good = ScoreRequest { ids: &ok, first: 1, candidates: None };
        score(&mut FakeModel::new(), &[good, request], &ScoreOptions::default()).unwrap_err().to_string()
    };
    assert!(fails(ScoreRequest { ids: &ok, first: 3, candidates: None }).contains("score request 1"));
    assert!(fails(ScoreRequest { ids: &ok, first: 0, candidates: None }).contains("score request 1"));
    assert!(fails(ScoreRequest { ids: &[1, 50], first: 1, candidates: None }).contains("token 50"));
    assert!(fails(ScoreRequest { ids: &ok, first: 1, candidates: Some(&[1, 2, 3]) }).contains("3 candidates for 2"));
    assert!(fails(ScoreRequest { ids: &ok, first: 1, candidates: Some(&[1, 60]) }).contains("candidate 60"));
    let none = ScoreOptions { mini_batch: 0, ..ScoreOptions::default() };
    assert!(score(&mut FakeModel::new(), &[], &none).is_err());
}
