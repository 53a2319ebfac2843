use super::*;
use crate::generate::fake::{FakeModel, VOCAB, logits_after};

fn requests(count: u64) -> Vec<GenerateRequest> {
    (0..count)
        .map(|id| GenerateRequest {
            id: 100 + id,
            prompt: (0..1 + id % 5).map(|i| ((id * 3 + i) % VOCAB as u64) as u32).collect(),
            n: 1 + (id % 4) as usize,
            max_new_tokens: 6 + (id % 3) as usize * 10,
            ..GenerateRequest::default()
        })
        .collect()
}

fn run(
    requests: &[GenerateRequest],
    params: &SamplingParams,
    options: &GenerateOptions,
) -> (Vec<Generated>, GenerateStats) {
    let mut all = Vec::new();
    let stats = generate(&mut FakeModel::new(), requests, params, options, &mut |g| {
        all.push(g);
        ControlFlow::Continue(())
    })
    .unwrap();
    all.sort_by_key(|g| (g.id, g.index));
    (all, stats)
}

fn options(slots: usize) -> GenerateOptions {
    GenerateOptions {
        slots,
        stop_ids: vec![3, 11],
        context_limit: 64,
        candidates: 4,
        logprobs: true,
        ..GenerateOptions::default()
    }
}

#[test]
fn completions_do_not_depend_on_slots_or_order() {
    let requests = requests(23);
    for params in [
        SamplingParams { seed: 9, ..SamplingParams::default() },
        SamplingParams { temperature: 0.7, top_k: 12, top_p: 0.9, repetition_penalty: 1.2, seed: 4 },
        SamplingParams { temperature: 0.0, ..SamplingParams::default() },
    ] {
        let (expected, _) = run(&requests, &params, &options(1));
        assert_eq!(expected.len(), requests.iter().map(|r| r.n).sum::<usize>());
        for slots in [3, 64] {
            assert_eq!(run(&requests, &params, &options(slots)).0, expected, "{slots} slots");
        }
        let mut turned = requests.clone();
        turned.reverse();
        assert_eq!(run(&turned, &params, &options(5)).0, expected);
    }
}

#[test]
fn completions_follow_the_model() {
    let requests = requests(12);
    let (all, stats) = run(&requests, &SamplingParams { temperature: 0.0, ..SamplingParams::default() }, &options(4));
    for g in &all {
        let request = requests.iter().find(|r| r.id == g.id).unwrap();
        let mut context = request.prompt.clone();
        for (i, &token) in g.tokens.iter().enumerate() {
            let z_v = logits_after(&context);
            let stats = RowStats::of(&z_v).unwrap();
            assert_eq!(token, stats.argmax);
            assert!((f64::from(g.logprobs[i]) - stats.log_prob(z_v[token as usize])).abs() < 1e-6);
            assert_eq!(g.candidate_ids[i * 4], token);
            assert!(g.candidate_logprobs[i * 4..i * 4 + 4].is_sorted_by(|a, b| a >= b));
            context.push(token);
        }
        let stopped = [3, 11].contains(g.tokens.last().unwrap());
        assert_eq!(g.finish, if stopped { FinishReason::Stop } else { FinishReason::Length });
        assert!(g.tokens[..g.tokens.len() - 1].iter().all(|t| ![3, 11].contains(t)));
        assert!(stopped || g.tokens.len() == request.max_new_tokens);
    }
    assert_eq!(stats.completion_tokens, all.iter().map(|g| g.tokens.len()).sum::<usize>());
    // Each token but a completion's first costs one row of a step.
    assert_eq!(stats.row_steps, stats.completion_tokens - all.len());
}

#[test]
fn completions_of_one_prompt_differ_and_other_seeds_too() {
    let request =
        [GenerateRequest { id: 1, prompt: vec![4, 2], n: 4, max_new_tokens: 20, ..GenerateRequest::default() }];
    let params = SamplingParams { seed: 1, ..SamplingParams::default() };
    let free = GenerateOptions { stop_ids: Vec::new(), ..options(4) };
    let (all, stats) = run(&request, &params, &free);
    assert!(all.windows(2).all(|pair| pair[0].tokens != pair[1].tokens));
    assert_eq!((stats.prompt_tokens, stats.prefills), (2, 1));
    assert_ne!(run(&request, &SamplingParams { seed: 2, ..params.clone() }, &free).0[0].tokens, all[0].tokens);
    // A first completion does not depend on how many follow.
    let single = [GenerateRequest { n: 1, ..request[0].clone() }];
    assert_eq!(run(&single, &params, &free).0[0], all[0]);
}

#[test]
fn a_later_turn_goes_on_in_its_own_stream() {
    let params = SamplingParams { seed: 5, ..SamplingParams::default() };
    let free = GenerateOptions { stop_ids: Vec::new(), ..options(4) };
    let whole = GenerateRequest { id: 9, prompt: vec![4, 2], n: 3, max_new_tokens: 20, ..GenerateRequest::default() };
    let (whole, _) = run(&[whole], &params, &free);
    let rest: Vec<GenerateRequest> = whole
        .iter()
        .map(|g| GenerateRequest {
            id: 9,
            prompt: [&[4, 2], &g.tokens[..7]].concat(),
            n: 1,
            max_new_tokens: 13,
            first_index: g.index,
            first_position: 7,
        })
        .collect();
    let (rest, _) = run(&rest, &params, &free);
    assert_eq!(rest.len(), 3);
    for (rest, whole) in rest.iter().zip(&whole) {
        assert_eq!((rest.index, rest.tokens.as_slice()), (whole.index, &whole.tokens[7..]));
    }
}

#[test]
fn uneven_lengths_keep_the_slots_busy() {
    let requests: Vec<GenerateRequest> = (0..40)
        .map(|id| GenerateRequest {
            id,
            prompt: vec![1, 2],
            n: 1,
            max_new_tokens: if id % 4 == 0 { 40 } else { 4 },
            ..GenerateRequest::default()
        })
        .collect();
    let free = GenerateOptions { stop_ids: Vec::new(), ..options(4) };
    let (_, stats) = run(&requests, &SamplingParams::default(), &free);
    let busy = stats.row_steps as f64 / (4 * stats.steps) as f64;
    assert!(busy > 0.85, "slots were busy {busy}");
    // Waiting for the longest of each four would take 39 steps for every four requests.
    assert!(stats.steps < 10 * 39 * 2 / 3);
}

#[test]
fn very_uneven_lengths_lose_little_to_idle_rows() {
    // Half of them end within four tokens, a tenth take fifty times as long.
    let len = |id: u64| match id * 7 % 10 {
        0 => 200,
        1..5 => 20 + id as usize % 40,
        _ => 1 + id as usize % 4,
    };
    let requests: Vec<GenerateRequest> = (0..400)
        .map(|id| GenerateRequest {
            id,
            prompt: vec![1, 2],
            n: 1,
            max_new_tokens: len(id),
            ..GenerateRequest::default()
        })
        .collect();
    let free = GenerateOptions { stop_ids: Vec::new(), context_limit: 300, ..options(16) };
    let (all, stats) = run(&requests, &SamplingParams::default(), &free);
    // A step has a row for each running sequence and no other; a slot without one is idle.
    assert_eq!(stats.row_steps, all.iter().map(|g| g.tokens.len() - 1).sum::<usize>());
    let idle = 1.0 - stats.row_steps as f64 / (16 * stats.steps) as f64;
    assert!(idle < 0.15, "{idle} of all rows were idle");
    // In batches of 16 that wait for their longest, most rows would be.
    let waiting: usize = all.chunks(16).map(|batch| batch.iter().map(|g| g.tokens.len()).max().unwrap_or(0)).sum();
    assert!(stats.row_steps * 2 < 16 * waiting);
}

#[test]
fn completions_of_a_prompt_share_its_computation() {
    let request =
        |id, n| GenerateRequest { id, prompt: vec![5; 20], n, max_new_tokens: 4, ..GenerateRequest::default() };
    let free = GenerateOptions { stop_ids: Vec::new(), ..options(16) };
    let (all, stats) = run(&[request(1, 8), request(2, 8)], &SamplingParams::default(), &free);
    assert_eq!((all.len(), stats.prompt_tokens, stats.prefills), (16, 2 * 20, 1));
}

#[test]
fn keys_and_values_are_bounded() {
    let requests: Vec<GenerateRequest> = (0..24)
        .map(|id| GenerateRequest { id, prompt: vec![4, 2], n: 2, max_new_tokens: 30, ..GenerateRequest::default() })
        .collect();
    let free = GenerateOptions { stop_ids: Vec::new(), ..options(16) };
    let (expected, wide) = run(&requests, &SamplingParams::default(), &free);
    assert!(wide.row_steps > 15 * wide.steps);
    let bytes = FakeModel::new().config().kv_token_bytes() * 3 * (32 + SLACK_TOKENS);
    let bounded = GenerateOptions { kv_bytes_max: Some(bytes), ..free };
    let (found, narrow) = run(&requests, &SamplingParams::default(), &bounded);
    assert_eq!(found, expected);
    assert!(narrow.row_steps <= 3 * narrow.steps, "{narrow:?}");
    // One that could never run is refused before anything is computed.
    let long = GenerateRequest { id: 77, max_new_tokens: 300, ..requests[0].clone() };
    let bounded = GenerateOptions { context_limit: 1000, ..bounded };
    let error = generate(&mut FakeModel::new(), &[long], &SamplingParams::default(), &bounded, &mut |_| {
        ControlFlow::Continue(())
    })
    .unwrap_err();
    assert!(error.to_string().contains("request 77") && error.to_string().contains("366 tokens"), "{error}");
    assert!(error.hint().unwrap().contains("host.kv_mib_max"));
}

#[test]
fn many_slots_wait_a_little_to_share_prompts() {
    let requests: Vec<GenerateRequest> = (0..64)
        .map(|id| GenerateRequest {
            id,
            prompt: vec![1; 30],
            n: 4,
            max_new_tokens: 4 + (id % 7) as usize,
            ..GenerateRequest::default()
        })
        .collect();
    let (_, stats) = run(&requests, &SamplingParams::default(), &options(64));
    assert!(stats.prompt_tokens < 64 * 30 * 2, "{} prompt tokens", stats.prompt_tokens);
}

#[test]
fn stops_early_when_told() {
    let mut seen = 0;
    let stats = generate(&mut FakeModel::new(), &requests(20), &SamplingParams::default(), &options(4), &mut |_| {
        seen += 1;
        if seen == 3 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    })
    .unwrap();
    assert_eq!(seen, 3);
    assert!(stats.completion_tokens > 0);
}

#[test]
fn the_context_limit_ends_a_completion() {
    let request =
        [GenerateRequest { id: 1, prompt: vec![1; 60], n: 2, max_new_tokens: 100, ..GenerateRequest::default() }];
    let (all, _) = run(&request, &SamplingParams::default(), &GenerateOptions { stop_ids: Vec::new(), ..options(2) });
    assert!(all.iter().all(|g| g.tokens.len() == 4 && g.finish == FinishReason::Context));
}

#[test]
fn what_cannot_be_served_is_refused_by_name() {
    let good = GenerateRequest { id: 77, prompt: vec![1, 2], n: 1, max_new_tokens: 4, ..GenerateRequest::default() };
    let fails = |request: GenerateRequest, options: GenerateOptions| {
        let params = SamplingParams::default();
        let error = generate(&mut FakeModel::new(), &[request], &params, &options, &mut |_| ControlFlow::Continue(()))
            .unwrap_err();
        error.to_string()
    };
    assert!(
        fails(GenerateRequest { prompt: vec![1; 64], ..good.clone() }, options(1))
            .contains("request 77: the prompt of 64 tokens")
    );
    assert!(fails(GenerateRequest { prompt: vec![], ..good.clone() }, options(1)).contains("request 77"));
    assert!(fails(GenerateRequest { max_new_tokens: 0, ..good.clone() }, options(1)).contains("request 77"));
    assert!(fails(GenerateRequest { prompt: vec![50], ..good.clone() }, options(1)).contains("token 50"));
    assert!(fails(good.clone(), options(0)).contains("0 slots"));
    let mut model = FakeModel::new();
    model.poison = Some(2);
    let error =
        generate(&mut model, &[good], &SamplingParams::default(), &options(1), &mut |_| ControlFlow::Continue(()))
            .unwrap_err();
    assert!(error.to_string().contains("request 77: the logits of completion token 0 are not finite"));
}

#[test]
fn nothing_to_do_is_fine() {
    let (all, stats) = run(
        &[GenerateRequest { id: 1, prompt: vec![1], n: 0, max_new_tokens: 1, ..GenerateRequest::default() }],
        &SamplingParams::default(),
        &options(2),
    );
    assert!(all.is_empty() && stats.steps == 0);
}
