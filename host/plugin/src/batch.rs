//! Any number of items, in batches that the contract allows. When a batch goes wrong its items are tried one by one,
//! each in an instance of its own, so that only the guilty one is lost.

use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crate::accept::{self, RawOpened};
use crate::crew::{Crew, Job, LOOK, Order};
use crate::guest::{Description, Outcomes};
use crate::seat::{Asked, Live, Seat, Stop};
use crate::voice::{REASON_BYTES_MAX, one_line};
use crate::{Action, EpisodeStart, Example, Limits, Opened, PluginError, RewardSample, SampleFailure, Score, Turn};

/// One kind of call with a batch of items.
pub(crate) trait BatchCall: Sized + 'static {
    type Item: Send + Sync + 'static;
    /// The guest's answer for one item, before it is checked.
    type Raw;
    type Output: Send + 'static;

    /// Text of the item, in bytes.
    fn bytes(item: &Self::Item) -> usize;
    fn ask<'a>(live: &'a mut Live, items: &'a [Self::Item]) -> Asked<'a, Outcomes<Self::Raw>>;
    fn check(raw: Self::Raw, limits: &Limits) -> Result<Self::Output, String>;

    /// How long one call may take, with one item `alone` or with a batch.
    fn time_ms(limits: &Limits, alone: bool) -> u64 {
        if alone { limits.item_ms_max } else { limits.call_ms_max }
    }
}

/// `metadata.describe`.
pub(crate) struct Describe;

impl BatchCall for Describe {
    type Item = ();
    type Raw = Description;
    type Output = Description;

    fn bytes((): &()) -> usize {
        0
    }

    fn ask<'a>(live: &'a mut Live, _: &'a [()]) -> Asked<'a, Outcomes<Description>> {
        Box::pin(async { Ok(vec![Ok(live.exports.describe(&mut live.store).await?)]) })
    }

    fn check(raw: Description, _: &Limits) -> Result<Description, String> {
        Ok(raw)
    }

    fn time_ms(limits: &Limits, _: bool) -> u64 {
        limits.init_ms_max
    }
}

/// Nothing: it makes the instance and runs `init`.
pub(crate) struct Open;

impl BatchCall for Open {
    type Item = ();
    type Raw = ();
    type Output = ();

    fn bytes((): &()) -> usize {
        0
    }

    fn ask<'a>(_: &'a mut Live, _: &'a [()]) -> Asked<'a, Outcomes<()>> {
        Box::pin(async { Ok(vec![Ok(())]) })
    }

    fn check((): (), _: &Limits) -> Result<(), String> {
        Ok(())
    }

    fn time_ms(limits: &Limits, _: bool) -> u64 {
        limits.init_ms_max
    }
}

/// `dataset.len`.
pub(crate) struct CountExamples;

impl BatchCall for CountExamples {
    type Item = ();
    type Raw = u64;
    type Output = u64;

    fn bytes((): &()) -> usize {
        0
    }

    fn ask<'a>(live: &'a mut Live, _: &'a [()]) -> Asked<'a, Outcomes<u64>> {
        Box::pin(async { Ok(vec![live.exports.len(&mut live.store).await?]) })
    }

    fn check(raw: u64, _: &Limits) -> Result<u64, String> {
        Ok(raw)
    }

    fn time_ms(limits: &Limits, _: bool) -> u64 {
        limits.init_ms_max
    }
}

/// `dataset.get-batch`.
pub(crate) struct GetExamples;

impl BatchCall for GetExamples {
    type Item = u64;
    type Raw = Example;
    type Output = Example;

    fn bytes(_: &u64) -> usize {
        size_of::<u64>()
    }

    fn ask<'a>(live: &'a mut Live, items: &'a [u64]) -> Asked<'a, Outcomes<Example>> {
        Box::pin(live.exports.get_batch(&mut live.store, items))
    }

    fn check(raw: Example, _: &Limits) -> Result<Example, String> {
        accept::example(raw)
    }
}

/// `reward.score-batch`.
pub(crate) struct ScoreSamples;

impl BatchCall for ScoreSamples {
    type Item = RewardSample;
    type Raw = Score;
    type Output = Score;

    fn bytes(sample: &RewardSample) -> usize {
        let reference = sample.reference.as_ref().map_or(0, String::len);
        sample.prompt.len() + sample.completion.len() + reference + pairs_bytes(&sample.metadata)
    }

    fn ask<'a>(live: &'a mut Live, items: &'a [RewardSample]) -> Asked<'a, Outcomes<Score>> {
        Box::pin(live.exports.score_batch(&mut live.store, items))
    }

    fn check(raw: Score, limits: &Limits) -> Result<Score, String> {
        accept::score(raw, limits)
    }
}

/// `environment.reset-batch`.
pub(crate) struct ResetEpisodes;

impl BatchCall for ResetEpisodes {
    type Item = EpisodeStart;
    type Raw = RawOpened;
    type Output = Opened;

    fn bytes(start: &EpisodeStart) -> usize {
        let messages: usize = start.messages.iter().map(|message| message.role.len() + message.content.len()).sum();
        messages + start.reference.as_ref().map_or(0, String::len) + pairs_bytes(&start.metadata)
    }

    fn ask<'a>(live: &'a mut Live, items: &'a [EpisodeStart]) -> Asked<'a, Outcomes<RawOpened>> {
        Box::pin(live.exports.reset_batch(&mut live.store, items))
    }

    fn check(raw: RawOpened, limits: &Limits) -> Result<Opened, String> {
        accept::opened(raw, limits)
    }
}

/// `environment.step-batch`.
pub(crate) struct StepEpisodes;

impl BatchCall for StepEpisodes {
    type Item = Action;
    type Raw = Turn;
    type Output = Turn;

    fn bytes(action: &Action) -> usize {
        action.state.len() + action.completion.len()
    }

    fn ask<'a>(live: &'a mut Live, items: &'a [Action]) -> Asked<'a, Outcomes<Turn>> {
        Box::pin(live.exports.step_batch(&mut live.store, items))
    }

    fn check(raw: Turn, limits: &Limits) -> Result<Turn, String> {
        accept::turn(raw, limits)
    }
}

fn pairs_bytes(pairs: &[(String, String)]) -> usize {
    pairs.iter().map(|(key, value)| key.len() + value.len()).sum()
}

/// Items of one request and the results so far. The seats fill it in any order.
pub(crate) struct Board<C: BatchCall> {
    plugin: String,
    items: Vec<C::Item>,
    limits: Arc<Limits>,
    slots: Mutex<Slots<C::Output>>,
    complete: Condvar,
    cancelled: AtomicBool,
}

struct Slots<T> {
    results: Vec<Option<Result<T, Stop>>>,
    missing: usize,
    /// The host itself failed: no more results will come.
    host_failure: Option<String>,
}

impl<T> Slots<T> {
    /// The first result stands: a thread that was given up may still answer.
    fn put(&mut self, item: usize, result: Result<T, Stop>) {
        if let Some(slot @ None) = self.results.get_mut(item) {
            *slot = Some(result);
            self.missing -= 1;
        }
    }
}

impl<C: BatchCall> Board<C> {
    fn slots(&self) -> MutexGuard<'_, Slots<C::Output>> {
        self.slots.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn fill(&self, first: usize, results: impl Iterator<Item = Result<C::Output, Stop>>) {
        let mut slots = self.slots();
        for (offset, result) in results.enumerate() {
            slots.put(first + offset, result);
        }
        if slots.missing == 0 {
            self.complete.notify_all();
        }
    }
}

impl<C: BatchCall> Order for Board<C> {
    fn run(&self, seat: &mut Seat, range: Range<usize>, alone: bool) -> Result<(), Stop> {
        let time = Duration::from_millis(C::time_ms(&self.limits, alone));
        let items = &self.items[range.clone()];
        let answer = seat.ask::<C>(items, alone, time)?;
        if answer.len() != items.len() {
            let items = if items.len() == 1 { "1 item".into() } else { format!("{} items", items.len()) };
            return Err(Stop::call(format!("returned {} results for {items}", answer.len())));
        }
        let judged = answer.into_iter().map(|raw| check::<C>(raw, &self.limits).map_err(Stop::call));
        // Judged before the lock is taken: the other seats need it too.
        let judged: Vec<_> = judged.collect();
        self.fill(range.start, judged.into_iter());
        Ok(())
    }

    fn give_up(&self, range: Range<usize>, stop: Stop) {
        self.fill(range.start, range.map(|_| Err(stop.clone())));
    }

    fn host_failed(&self, detail: &str) {
        self.slots().host_failure = Some(detail.into());
        self.complete.notify_all();
    }

    fn is_cancelled(&self) -> bool {
        self.cancelled.load(Ordering::Relaxed)
    }

    fn plugin(&self) -> &str {
        &self.plugin
    }
}

fn check<C: BatchCall>(raw: Result<C::Raw, String>, limits: &Limits) -> Result<C::Output, String> {
    match raw {
        Ok(raw) => C::check(raw, limits),
        Err(message) if message.trim().is_empty() => Err("the plugin gave no reason".into()),
        Err(message) => Err(message),
    }
}

/// A request under way.
pub(crate) struct Awaited<C: BatchCall> {
    crew: Arc<Crew>,
    board: Arc<Board<C>>,
}

impl<C: BatchCall> Awaited<C> {
    /// Hands `items` to the crew in batches.
    pub(crate) fn start(crew: &Arc<Crew>, items: Vec<C::Item>) -> Result<Self, PluginError> {
        let limits = crew.limits().clone();
        let mut jobs = Vec::new();
        let board = Arc::new(Board::<C>::new(crew, items));
        for (range, bytes) in cut(board.items.len(), crew.spreads(), &limits, |item| C::bytes(&board.items[item])) {
            if bytes > limits.batch_bytes_max {
                let reason = format!("it has {bytes} bytes, above `batch_bytes_max` = {}", limits.batch_bytes_max);
                board.give_up(range, Stop::call(reason));
            } else {
                jobs.push(Job { order: board.clone(), range, alone: false, bytes });
            }
        }
        crew.enqueue(jobs)?;
        Ok(Self { crew: crew.clone(), board })
    }

    /// Asks a single question in a fresh instance.
    pub(crate) fn once(crew: &Arc<Crew>, item: C::Item) -> Result<Result<C::Output, Stop>, PluginError> {
        let board = Arc::new(Board::<C>::new(crew, vec![item]));
        crew.enqueue(vec![Job { order: board.clone(), range: 0..1, alone: true, bytes: 0 }])?;
        let mut results = Self { crew: crew.clone(), board }.results()?;
        results.pop().ok_or_else(|| PluginError::Host { detail: "a question got no answer".into() })
    }

    /// Waits for all results, in the order of the items.
    ///
    /// # Errors
    /// Only when the host itself fails; whatever the guest does ends in its samples' results.
    pub(crate) fn wait(self) -> Result<Vec<Result<C::Output, SampleFailure>>, PluginError> {
        let results = self.results()?;
        let failed = |(item, result): (usize, Result<C::Output, Stop>)| {
            result.map_err(|stop| SampleFailure {
                plugin: self.board.plugin.clone(),
                item,
                reason: one_line(&stop.reason_with_stage(), REASON_BYTES_MAX),
            })
        };
        Ok(results.into_iter().enumerate().map(failed).collect())
    }

    fn results(&self) -> Result<Vec<Result<C::Output, Stop>>, PluginError> {
        let mut slots = self.board.slots();
        loop {
            if let Some(detail) = slots.host_failure.take() {
                return Err(PluginError::Host { detail });
            }
            if slots.missing == 0 {
                let results = std::mem::take(&mut slots.results);
                return Ok(results.into_iter().flatten().collect());
            }
            let (next, waited) = self.board.complete.wait_timeout(slots, LOOK).unwrap_or_else(PoisonError::into_inner);
            slots = next;
            if waited.timed_out() {
                drop(slots);
                self.crew.supervise();
                slots = self.board.slots();
            }
        }
    }
}

impl<C: BatchCall> Drop for Awaited<C> {
    fn drop(&mut self) {
        if self.board.slots().missing > 0 {
            self.board.cancelled.store(true, Ordering::Relaxed);
            self.crew.forget_cancelled();
        }
    }
}

impl<C: BatchCall> Board<C> {
    fn new(crew: &Crew, items: Vec<C::Item>) -> Self {
        let results = std::iter::repeat_with(|| None).take(items.len()).collect();
        Self {
            plugin: crew.plugin().into(),
            slots: Mutex::new(Slots { results, missing: items.len(), host_failure: None }),
            items,
            limits: crew.limits().clone(),
            complete: Condvar::new(),
            cancelled: AtomicBool::new(false),
        }
    }
}

/// Batches that a request of few items is cut into, so that several cores share it.
const SHARES: usize = 16;
/// Below this the cost of a call outweighs the sharing.
const SHARE_ITEMS_MIN: usize = 8;

/// Cuts `len` items into batches within both limits, each with its bytes; an item that is too large alone gets a batch
/// alone. The cut depends on the items only, never on the number of workers: so do the results.
fn cut(len: usize, spread: bool, limits: &Limits, bytes: impl Fn(usize) -> usize) -> Vec<(Range<usize>, usize)> {
    let items_max = if spread { len.div_ceil(SHARES).max(SHARE_ITEMS_MIN) } else { len };
    let items_max = items_max.min(limits.batch_items_max);
    let mut batches = Vec::new();
    let mut start = 0;
    while start < len {
        let mut total = bytes(start);
        let mut end = start + 1;
        while end < len && end - start < items_max {
            let more = total.saturating_add(bytes(end));
            if more > limits.batch_bytes_max {
                break;
            }
            (total, end) = (more, end + 1);
        }
        batches.push((start..end, total));
        start = end;
    }
    batches
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn batches_keep_both_limits_and_cover_everything() {
        let limits = Limits { batch_items_max: 3, batch_bytes_max: 10, ..Limits::default() };
        let sizes = [4, 6, 1, 11, 1, 1, 1, 1, 10, 10];
        let ranges: Vec<_> = cut(sizes.len(), true, &limits, |item| sizes[item]).into_iter().map(|b| b.0).collect();
        assert_eq!(ranges, [0..2, 2..3, 3..4, 4..7, 7..8, 8..9, 9..10]);
        assert!(cut(0, true, &limits, |_| 1).is_empty());
    }

    #[test]
    fn few_items_are_shared_and_many_fill_their_batches() {
        let limits = Limits::default();
        let largest = |len, spread| cut(len, spread, &limits, |_| 1).iter().map(|b| b.0.len()).max();
        assert_eq!(largest(5, true), Some(5));
        assert_eq!(largest(64, true), Some(8));
        assert_eq!(largest(512, true), Some(32));
        assert_eq!(largest(5000, true), Some(64));
        assert_eq!(largest(60, false), Some(60));
    }
}
