//! The rewards of a run: which ones score what, with which weight, and the scoring that goes on while completions are
//! still being generated.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::Instant;

use cosmos_config::{GrpoConfig, Resolved};
use cosmos_plugin::{Pending, Reward, RewardSample, Score};
use serde::{Deserialize, Serialize};

use crate::choose::{Filter, Weighted};
use crate::error::Result;
use crate::offers::{OfferRole, Offered};
use crate::plugins::Plugins;
use crate::rollout::{Completion, advantages, groups};
use crate::task::Item;

/// Completions of one prompt are judged together; so many of them go to a reward at once at most.
const CHUNK: usize = 64;

/// An open reward.
struct Term {
    offered: Offered,
    reward: Reward,
}

/// The rewards of training or of validation.
pub struct RewardSet {
    terms: Vec<Term>,
    /// For each dataset: its terms with their weights.
    routes: Vec<Vec<(usize, f64)>>,
    filter: Option<OpenFilter>,
}

enum OpenFilter {
    Total,
    Terms(Vec<usize>),
}

impl RewardSet {
    /// Opens every reward that `routes` (the rewards of each dataset) and `filter` name, each once. `None` when there is
    /// none at all.
    pub fn open(
        resolved: &Resolved,
        plugins: &Plugins,
        role: OfferRole,
        routes: &[Vec<Weighted>],
        filter: Option<&Filter>,
    ) -> Result<Option<Self>> {
        let mut terms: Vec<Term> = Vec::new();
        let mut open = |offered: &Offered| -> Result<usize> {
            let same = |t: &Term| t.offered.plugin == offered.plugin && t.offered.name == offered.name;
            if let Some(known) = terms.iter().position(same) {
                return Ok(known);
            }
            let reward = plugins.open_reward(resolved, offered, role)?;
            terms.push(Term { offered: offered.clone(), reward });
            Ok(terms.len() - 1)
        };
        let mut opened = Vec::with_capacity(routes.len());
        for route in routes {
            let route = route.iter().map(|w| Ok((open(&w.offered)?, w.weight)));
            opened.push(route.collect::<Result<Vec<_>>>()?);
        }
        let filter = match filter {
            None => None,
            Some(Filter::Total) => Some(OpenFilter::Total),
            Some(Filter::Terms(named)) => {
                Some(OpenFilter::Terms(named.iter().map(&mut open).collect::<Result<Vec<_>>>()?))
            }
        };
        Ok((!terms.is_empty()).then_some(Self { terms, routes: opened, filter }))
    }

    /// Names of the plugins at work, each once.
    pub fn plugins(&self) -> Vec<&str> {
        let mut names: Vec<&str> = Vec::new();
        for term in &self.terms {
            if !names.contains(&term.offered.plugin_name.as_str()) {
                names.push(&term.offered.plugin_name);
            }
        }
        names
    }

    /// Whether groups are filtered.
    pub fn filters(&self) -> bool {
        self.filter.is_some()
    }

    /// Starts scoring the completions of `items`, `n` of each.
    pub fn scoring<'a>(&'a self, items: &'a HashMap<u64, Arc<Item>>, n: usize) -> Scoring<'a> {
        Scoring { set: self, items, n: n.max(1), open: BTreeMap::new(), handed: Vec::new(), first: None }
    }

    /// Terms that score completions of dataset `source`.
    fn wanted(&self, source: usize) -> Vec<usize> {
        let mut wanted: Vec<usize> = self.routes.get(source).into_iter().flatten().map(|(term, _)| *term).collect();
        if let Some(OpenFilter::Terms(terms)) = &self.filter {
            wanted.extend(terms);
        }
        wanted.sort_unstable();
        wanted.dedup();
        wanted
    }

    /// Whether another reward of the same plugin, or the count of failures, has the name of this metric.
    fn is_taken(&self, term: usize, name: &str) -> bool {
        let plugin = self.terms[term].offered.plugin;
        name == FAILED || self.terms.iter().any(|t| t.offered.plugin == plugin && t.offered.name == name)
    }

    /// Name under which a reward's own value is logged, without `reward/`.
    fn value_name(&self, term: usize) -> String {
        let offered = &self.terms[term].offered;
        match offered.name.as_str() {
            FAILED => format!("{}/{FAILED}/value", offered.plugin_name),
            _ => offered.full(),
        }
    }
}

/// Counts the samples that a plugin could not score.
const FAILED: &str = "failed";

/// Samples that were handed to one reward.
struct Handed {
    term: usize,
    samples: Vec<u64>,
    pending: Pending,
}

/// Rewards under way. Completions are handed over as their groups finish, and scored while others are generated.
pub struct Scoring<'a> {
    set: &'a RewardSet,
    items: &'a HashMap<u64, Arc<Item>>,
    n: usize,
    /// Groups that are not complete yet, by prompt.
    open: BTreeMap<u64, Vec<(u64, RewardSample)>>,
    handed: Vec<Handed>,
    first: Option<Instant>,
}

/// The verdict on one completion.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Verdict {
    /// Weighted sum of the rewards; a failed one counts as 0.
    pub value: f64,
    /// What its group is filtered by; none when that failed, or the whole reward is the filter.
    pub filter: Option<f64>,
    /// The rewards' own values and their further numbers, by the name they are logged under.
    pub metrics: Vec<(String, f64)>,
    /// Plugins that failed on it, once for each reward.
    pub failed: Vec<String>,
}

/// Verdicts on all completions of a phase, in their order.
#[derive(Debug, Default)]
pub struct Judged {
    /// The verdicts.
    pub verdicts: Vec<Verdict>,
    /// Seconds that nothing else was done meanwhile.
    pub wait_seconds: f64,
    /// Seconds from the first completion handed over to the last score.
    pub seconds: f64,
    /// Whether groups are filtered by the verdicts.
    pub filters: bool,
    /// Whether it is the whole reward that they are filtered by.
    pub by_total: bool,
}

/// The verdicts on `completions`, once they are all there. Conversations are judged by their environment already, so
/// without a reward their verdicts are empty; `None` when nothing judges.
pub fn wait(scoring: Option<Scoring<'_>>, completions: &[Completion]) -> Result<Option<Judged>> {
    match scoring {
        Some(scoring) => scoring.wait(completions).map(Some),
        None if completions.iter().any(|c| c.reward.is_some()) => {
            Ok(Some(Judged { verdicts: vec![Verdict::default(); completions.len()], ..Judged::default() }))
        }
        None => Ok(None),
    }
}

impl Judged {
    /// What each of `completions` is worth: its verdict and what it has already.
    pub fn values(&self, completions: &[Completion]) -> Vec<f64> {
        let value = |(completion, verdict): (&Completion, &Verdict)| match completion.reward {
            Some(before) => before + verdict.value,
            None => verdict.value,
        };
        completions.iter().zip(&self.verdicts).map(value).collect()
    }

    /// The numbers of each of `completions`, those that it has already first.
    pub fn numbers(&self, completions: &[Completion]) -> Vec<Vec<(String, f64)>> {
        let both = |(c, v): (&Completion, &Verdict)| c.reward_metrics.iter().chain(&v.metrics).cloned().collect();
        completions.iter().zip(&self.verdicts).map(both).collect()
    }
}

impl Scoring<'_> {
    /// Takes a finished completion; the last one of a group hands the group over.
    pub fn finished(&mut self, completion: &Completion) -> Result<()> {
        let ordinal = completion.sample / self.n as u64;
        let item = self.items.get(&ordinal);
        let sample = RewardSample {
            prompt: completion.prompt.clone(),
            completion: completion.text.clone(),
            reference: item.and_then(|i| i.reference.clone()),
            metadata: item.map(|i| i.metadata.clone()).unwrap_or_default(),
        };
        let group = self.open.entry(ordinal).or_default();
        group.push((completion.sample, sample));
        if group.len() >= self.n {
            self.hand_over(ordinal)?;
        }
        Ok(())
    }

    fn hand_over(&mut self, ordinal: u64) -> Result<()> {
        let Some(mut group) = self.open.remove(&ordinal) else { return Ok(()) };
        group.sort_by_key(|(sample, _)| *sample);
        self.first.get_or_insert_with(Instant::now);
        let source = self.items.get(&ordinal).map_or(0, |i| i.source);
        for term in self.set.wanted(source) {
            for part in group.chunks(CHUNK) {
                let samples = part.iter().map(|(sample, _)| *sample).collect();
                let pending = self.set.terms[term].reward.start(part.iter().map(|(_, s)| s.clone()).collect())?;
                self.handed.push(Handed { term, samples, pending });
            }
        }
        Ok(())
    }

    /// Waits for what is still under way. The verdicts are those of `completions`, in their order, whatever the order in
    /// which they finished.
    pub fn wait(mut self, completions: &[Completion]) -> Result<Judged> {
        let started = Instant::now();
        let unfinished: Vec<u64> = self.open.keys().copied().collect();
        for ordinal in unfinished {
            self.hand_over(ordinal)?;
        }
        // In the order of the samples, so that the log does not depend on which finished first.
        self.handed.sort_by_key(|h| (h.samples.first().copied(), h.term));
        let mut scores: HashMap<(u64, usize), Option<Score>> = HashMap::new();
        for handed in self.handed {
            let offered = &self.set.terms[handed.term].offered;
            for (sample, score) in handed.samples.iter().zip(handed.pending.wait()?) {
                if let Err(reason) = &score {
                    tracing::warn!("reward `{}` of sample {sample} left out: {reason}", offered.full());
                }
                scores.insert((*sample, handed.term), score.ok());
            }
        }
        let verdicts = completions
            .iter()
            .map(|completion| {
                let source = self.items.get(&(completion.sample / self.n as u64)).map_or(0, |i| i.source);
                self.set.verdict(source, |term| scores.remove(&(completion.sample, term)).flatten())
            })
            .collect();
        Ok(Judged {
            verdicts,
            wait_seconds: started.elapsed().as_secs_f64(),
            seconds: self.first.map_or(0.0, |first| first.elapsed().as_secs_f64()),
            filters: self.set.filters(),
            by_total: matches!(self.set.filter, Some(OpenFilter::Total)),
        })
    }
}

impl RewardSet {
    fn verdict(&self, source: usize, mut score: impl FnMut(usize) -> Option<Score>) -> Verdict {
        let mut verdict = Verdict::default();
        let mut values: HashMap<usize, f64> = HashMap::new();
        for term in self.wanted(source) {
            let offered = &self.terms[term].offered;
            let Some(score) = score(term) else {
                verdict.failed.push(offered.plugin_name.clone());
                continue;
            };
            values.insert(term, score.value);
            verdict.metrics.push((self.value_name(term), score.value));
            for (name, value) in score.metrics {
                let short = format!("{}/{name}", offered.plugin_name);
                let clashes = self.is_taken(term, &name) || verdict.metrics.iter().any(|(n, _)| *n == short);
                let name = if clashes { format!("{}/{name}", offered.full()) } else { short };
                verdict.metrics.push((name, value));
            }
        }
        let route = self.routes.get(source).map(Vec::as_slice).unwrap_or_default();
        verdict.value = route.iter().map(|(term, weight)| weight * values.get(term).copied().unwrap_or(0.0)).sum();
        verdict.filter = match &self.filter {
            None | Some(OpenFilter::Total) => None,
            Some(OpenFilter::Terms(terms)) => terms.iter().map(|term| values.get(term).copied()).sum(),
        };
        verdict
    }
}

/// Numbers of the rewards between two steps; part of a checkpoint.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Tally {
    /// Completions that a filter looked at.
    pub judged: u64,
    /// Those that it dropped.
    pub dropped: u64,
    /// Completions with a filter value.
    pub valued: u64,
    /// Sum of the filter values, as bits.
    #[serde(with = "crate::rollout::bits_of_double")]
    pub filter_sum: f64,
    /// Seconds waited for rewards.
    pub wait_seconds: f64,
    /// Seconds that rewards were under way.
    pub seconds: f64,
}

impl Tally {
    /// Adds the numbers of another phase.
    pub fn add(&mut self, other: &Self) {
        self.judged += other.judged;
        self.dropped += other.dropped;
        self.valued += other.valued;
        self.filter_sum += other.filter_sum;
        self.wait_seconds += other.wait_seconds;
        self.seconds += other.seconds;
    }

    /// What the step logs.
    pub fn metrics(&self, metrics: &mut BTreeMap<String, f64>) {
        if self.seconds > 0.0 {
            metrics.insert("reward/wait_seconds".into(), self.wait_seconds);
            metrics.insert("reward/seconds".into(), self.seconds);
        }
        if self.judged > 0 {
            metrics.insert("rollout/filtered_ratio".into(), self.dropped as f64 / self.judged as f64);
        }
        if self.valued > 0 {
            metrics.insert("rollout/filter_reward_mean".into(), self.filter_sum / self.valued as f64);
        }
    }
}

/// Gives completions (groups one after the other, in order) their rewards and advantages, and leaves out the groups in
/// which the filter finds no difference. A reward that a completion already has is added.
pub fn judge(completions: &mut Vec<Completion>, judged: Judged, n: usize, grpo: &GrpoConfig, tally: &mut Tally) {
    tally.wait_seconds += judged.wait_seconds;
    tally.seconds += judged.seconds;
    let values = judged.values(completions);
    let advantages = advantages(completions, &values, n as u64, grpo.unbiased_advantage);
    let groups: Vec<usize> = groups(completions, n as u64).map(<[Completion]>::len).collect();
    // Conversations without a further reward have no verdict to filter by, but a reward.
    let dapo = grpo.variant == cosmos_config::Variant::Dapo && grpo.filter_reward_metric.is_empty();
    let by_total = judged.by_total || (dapo && n > 1 && !grpo.bypass_reward);
    let filter = |(verdict, value): (&Verdict, &f64)| match by_total {
        true => verdict.failed.is_empty().then_some(*value),
        false => verdict.filter,
    };
    let filters: Vec<Option<f64>> = judged.verdicts.iter().zip(&values).map(filter).collect();
    for ((completion, verdict), (value, advantage)) in
        completions.iter_mut().zip(judged.verdicts).zip(values.into_iter().zip(advantages))
    {
        completion.reward = Some(value);
        completion.reward_metrics.extend(verdict.metrics);
        completion.reward_failed = verdict.failed;
        // Bypassed rewards are only looked at.
        completion.advantage = if grpo.bypass_reward { 0.0 } else { advantage };
    }
    if !(judged.filters || by_total) {
        return;
    }
    tally.judged += completions.len() as u64;
    tally.valued += filters.iter().flatten().count() as u64;
    tally.filter_sum += filters.iter().flatten().sum::<f64>();
    let mut rest = filters.as_slice();
    let mut kept = Vec::with_capacity(filters.len());
    for size in groups {
        let (group, others) = rest.split_at(size);
        kept.extend(std::iter::repeat_n(differs(group), size));
        rest = others;
    }
    let before = completions.len();
    let mut keep = kept.into_iter();
    completions.retain(|_| keep.next().unwrap_or(true));
    tally.dropped += (before - completions.len()) as u64;
}

/// Whether a group teaches something: two of its values differ. Those that failed say nothing.
fn differs(group: &[Option<f64>]) -> bool {
    let mut values = group.iter().flatten();
    values.next().is_some_and(|first| values.any(|value| value != first))
}

/// Means of the rewards' numbers and counts of failures as `<prefix>reward/<plugin>/<name>`.
pub fn reward_metrics<'a>(
    prefix: &str,
    plugins: &[&str],
    verdicts: impl Iterator<Item = (&'a [(String, f64)], &'a [String])>,
    metrics: &mut BTreeMap<String, f64>,
) {
    let mut named: BTreeMap<&str, (f64, u64)> = BTreeMap::new();
    let mut failed: BTreeMap<&str, u64> = plugins.iter().map(|plugin| (*plugin, 0)).collect();
    for (numbers, failures) in verdicts {
        for (name, value) in numbers {
            let entry = named.entry(name).or_default();
            *entry = (entry.0 + value, entry.1 + 1);
        }
        for plugin in failures {
            *failed.entry(plugin).or_default() += 1;
        }
    }
    metrics.extend(named.into_iter().map(|(name, (sum, n))| (format!("{prefix}reward/{name}"), sum / n as f64)));
    metrics.extend(failed.into_iter().map(|(plugin, n)| (format!("{prefix}reward/{plugin}/{FAILED}"), n as f64)));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_group_of_equals_teaches_nothing() {
        assert!(differs(&[Some(1.0), Some(0.0)]));
        assert!(differs(&[None, Some(1.0), Some(0.5)]));
        assert!(!differs(&[Some(1.0), Some(1.0)]));
        assert!(!differs(&[Some(1.0), None]));
        assert!(!differs(&[None, None]));
    }

    #[test]
    fn numbers_are_averaged_and_failures_counted() {
        let pairs = |pairs: &[(&str, f64)]| pairs.iter().map(|(n, v)| (n.to_string(), *v)).collect::<Vec<_>>();
        let (first, second) = (pairs(&[("a/x", 1.0), ("a/r", 0.5)]), pairs(&[("a/x", 2.0)]));
        let failed = vec!["b".to_string()];
        let mut metrics = BTreeMap::new();
        let verdicts = [(first.as_slice(), [].as_slice()), (second.as_slice(), failed.as_slice())];
        reward_metrics("val/", &["a", "b"], verdicts.into_iter(), &mut metrics);
        let got: Vec<(&str, f64)> = metrics.iter().map(|(n, v)| (n.as_str(), *v)).collect();
        assert_eq!(
            got,
            [
                ("val/reward/a/failed", 0.0),
                ("val/reward/a/r", 0.5),
                ("val/reward/a/x", 1.5),
                ("val/reward/b/failed", 1.0)
            ]
        );
    }
}
