//! Supervised fine-tuning: one step on given responses.

use std::collections::BTreeMap;

use cosmos_engine::objective::{SftLoss, SftSample};

use crate::error::{Result, Role};
use crate::policy::StepOutcome;
use crate::student::Student;
use crate::task::Item;

/// Token ids of an item with the tokens to learn: the response and the id that ends it, or the assistant's turns.
pub fn example(item: &Item, response_ids: Vec<u32>, end_id: Option<u32>) -> SftSample {
    if let Some((ids, mask)) = &item.conversation {
        return SftSample { ids: ids.clone(), trained: mask.clone() };
    }
    let mut ids = item.prompt_ids.clone();
    let mut trained = vec![false; ids.len()];
    trained.extend(std::iter::repeat_n(true, response_ids.len() + usize::from(end_id.is_some())));
    ids.extend(response_ids);
    ids.extend(end_id);
    SftSample { ids, trained }
}

/// Trains on `samples`: mean negative log-likelihood over all their response tokens, `mini_batch` at a time.
pub fn step(student: &mut Student, samples: &[SftSample], mini_batch: usize, step: u64) -> Result<StepOutcome> {
    let tokens: usize = samples.iter().map(SftSample::scored).sum();
    let weight = 1.0 / tokens.max(1) as f64;
    let mut stats = None;
    let in_backward = student.updates_in_backward(samples.len().div_ceil(mini_batch.max(1)))?;
    let mut outcome = StepOutcome { learning_rate: student.learning_rate(step), ..StepOutcome::default() };
    for micro in samples.chunks(mini_batch.max(1)) {
        let mut loss = SftLoss::new(micro, weight).role("student")?;
        if loss.rows() > 0 {
            let (batch, positions) = loss.batch().role("student")?;
            if in_backward {
                stats = Some(student.backward_step(step, &batch, &positions, &mut loss)?);
            } else {
                student.model.forward_backward(&batch, &positions, &mut loss).role("student")?;
            }
            outcome.tokens += batch.lens_b.iter().sum::<usize>() as u64;
        }
        outcome.loss_max = outcome.loss_max.max(loss.nll_sum() / loss.tokens().max(1) as f64);
        outcome.report.total += loss.total();
        outcome.report.tokens += loss.tokens();
        outcome.report.non_finite_rows += loss.non_finite_rows();
        outcome.top1 += loss.correct() as u64;
    }
    // Without a token there was no backward, and yet weights decay.
    let stats = stats.map_or_else(|| student.optimizer_step(step), Ok)?;
    outcome.skipped = u64::from(!stats.finite);
    outcome.grad_norm = stats.grad_norm;
    Ok(outcome)
}

/// Metrics of a step.
pub fn metrics(outcome: &StepOutcome) -> BTreeMap<String, f64> {
    BTreeMap::from([
        ("train/loss_avg".to_string(), outcome.report.total),
        ("train/grad_norm".to_string(), outcome.grad_norm),
        ("train/learning_rate".to_string(), outcome.learning_rate),
        ("train/loss_max".to_string(), outcome.loss_max),
        ("train/tokens".to_string(), outcome.report.tokens as f64),
        ("train/token_accuracy".to_string(), outcome.top1 as f64 / outcome.report.tokens.max(1) as f64),
    ])
}
