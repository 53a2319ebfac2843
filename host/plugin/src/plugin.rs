//! A loaded plugin, and the datasets and rewards opened from it.

use std::sync::Arc;
use std::time::Duration;

use serde::Serialize;
use serde_json::Value;

use crate::batch::{self, GetExamples, ScoreSamples};
use crate::since_v0_1_0::{self as wit, metadata};
use crate::voice::one_line;
use crate::worker::{Blueprint, NotExported, Role, Stage, Stop, Worker};
use crate::{Example, Limits, PluginError, RewardSample, SampleFailure, Score};

/// Longest name in a description.
const NAME_BYTES_MAX: usize = 128;
/// Longest version or summary.
const TEXT_BYTES_MAX: usize = 4096;
/// Most offers, and most wanted grants.
const OFFERS_MAX: usize = 256;

/// Something a plugin offers by name.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Offer {
    /// What `[plugin]` refers to.
    pub name: String,
    /// Datasets: `train` or `validation`. Rewards: `train`, `validation` or `filter`.
    pub role: String,
}

/// What a plugin says about itself.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct PluginInfo {
    /// Its name.
    pub name: String,
    /// Its version.
    pub version: String,
    /// One line for people.
    pub summary: String,
    /// SHA-256 of the component, hexadecimal.
    pub sha256: String,
    /// Datasets by name.
    pub datasets: Vec<Offer>,
    /// Rewards by name.
    pub rewards: Vec<Offer>,
    /// JSON schema of its settings; none: it takes none.
    pub settings_schema: Option<Value>,
    /// Grants it asks for, in the configuration's words.
    pub wants: Vec<String>,
}

impl PluginInfo {
    fn new(plugin: &str, sha256: &str, description: metadata::Description) -> Result<Self, PluginError> {
        let bad =
            |detail: String| PluginError::BadDescription { plugin: plugin.into(), detail: one_line(&detail, 512) };
        let offers = |kind: &str, offers: Vec<Offer>| {
            if offers.len() > OFFERS_MAX {
                return Err(bad(format!("it offers {} {kind}s, at most {OFFERS_MAX} are allowed", offers.len())));
            }
            for (index, offer) in offers.iter().enumerate() {
                check_name(&offer.name).map_err(|detail| bad(format!("the name of {kind} {index} {detail}")))?;
                if offers[..index].contains(offer) {
                    return Err(bad(format!("the {kind} `{}` is offered twice as `{}`", offer.name, offer.role)));
                }
            }
            Ok(offers)
        };
        let datasets = description.datasets.into_iter();
        let datasets = datasets.map(|o| Offer { name: o.name, role: wit::dataset_role(o.role).into() });
        let rewards = description.rewards.into_iter();
        let rewards = rewards.map(|o| Offer { name: o.name, role: wit::reward_role(o.role).into() });
        check_name(&description.name).map_err(|detail| bad(format!("its name {detail}")))?;
        let schema = description.settings_schema.trim();
        let settings_schema = match schema {
            "" => None,
            text => match serde_json::from_str(text) {
                Ok(schema @ Value::Object(_)) => Some(schema),
                Ok(_) => return Err(bad("its settings schema is no JSON object".into())),
                Err(error) => return Err(bad(format!("its settings schema is not JSON: {error}"))),
            },
        };
        if description.wants.len() > OFFERS_MAX {
            return Err(bad(format!("it wants more than {OFFERS_MAX} grants")));
        }
        for want in &description.wants {
            want.parse::<crate::Grant>().map_err(|error| bad(format!("among the grants it wants, {error}")))?;
        }
        Ok(Self {
            name: description.name,
            version: one_line(&description.version, TEXT_BYTES_MAX),
            summary: one_line(&description.summary, TEXT_BYTES_MAX),
            sha256: sha256.into(),
            datasets: offers("dataset", datasets.collect())?,
            rewards: offers("reward", rewards.collect())?,
            settings_schema,
            wants: description.wants,
        })
    }
}

fn check_name(name: &str) -> Result<(), String> {
    if name.is_empty() {
        return Err("is empty".into());
    }
    if name.len() > NAME_BYTES_MAX {
        return Err(format!("has {} bytes, at most {NAME_BYTES_MAX} are allowed", name.len()));
    }
    let allowed = |c: char| c.is_alphanumeric() || matches!(c, '-' | '_' | '.' | '/');
    match name.chars().find(|c| !allowed(*c)) {
        Some(c) => Err(format!("has the character {c:?}; letters, digits and `-_./` are allowed")),
        None => Ok(()),
    }
}

/// A loaded, checked and compiled plugin. Clones share the compiled code; every dataset and reward opened from it has
/// an instance and a thread of its own.
#[derive(Clone)]
pub struct Plugin {
    info: Arc<PluginInfo>,
    blueprint: Arc<Blueprint>,
    /// Keeps the deadlines' ticker alive.
    _ticker: Arc<crate::host::Ticker>,
}

impl std::fmt::Debug for Plugin {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Plugin").field("info", &self.info).finish_non_exhaustive()
    }
}

impl Plugin {
    /// Asks the component who it is.
    pub(crate) fn describe(
        mut blueprint: Blueprint,
        path: &std::path::Path,
        sha256: &str,
        ticker: Arc<crate::host::Ticker>,
    ) -> Result<Self, PluginError> {
        let stem = blueprint.plugin.clone();
        let limits = blueprint.limits.clone();
        let shared = Arc::new(blueprint);
        let mut worker = Worker::new(shared.clone(), Role::Describe);
        let time = Duration::from_millis(limits.init_ms_max);
        let answer = worker
            .call(true, time, |live| Box::pin(async move { live.metadata.call_describe(&mut live.store).await }))?;
        drop(worker);
        let description = answer.map_err(|stop| match stop.stage {
            Stage::Interface => PluginError::WrongInterface { path: path.into(), detail: stop.reason },
            _ => stop.into_error(&stem, "`metadata.describe`"),
        })?;
        let info = PluginInfo::new(&stem, sha256, description)?;
        blueprint = Blueprint {
            plugin: info.name.clone(),
            pre: shared.pre.clone(),
            metadata: shared.metadata.clone(),
            dataset: shared.dataset.clone(),
            reward: shared.reward.clone(),
            grants: shared.grants.clone(),
            limits,
            capabilities: shared.capabilities.clone(),
        };
        Ok(Self { info: Arc::new(info), blueprint: Arc::new(blueprint), _ticker: ticker })
    }

    /// What the plugin says about itself.
    pub fn info(&self) -> &PluginInfo {
        &self.info
    }

    /// The limits it runs under.
    pub fn limits(&self) -> &Limits {
        &self.blueprint.limits
    }

    /// Opens the dataset `name`. `settings_json` is a JSON object, or empty for none.
    ///
    /// # Errors
    /// The name is not offered, the settings are not JSON, or the plugin's `init` or `len` failed.
    pub fn dataset(&self, name: &str, settings_json: &str) -> Result<Dataset, PluginError> {
        self.check_offer("dataset", &self.info.datasets, name)?;
        let settings = self.check_settings(settings_json)?;
        let mut worker = Worker::new(self.blueprint.clone(), Role::Dataset { name: name.into(), settings });
        let time = Duration::from_millis(self.blueprint.limits.init_ms_max);
        let answer = worker.call(true, time, |live| {
            Box::pin(async move {
                let guest = live.dataset.as_ref().ok_or(NotExported)?;
                guest.call_len(&mut live.store).await
            })
        })?;
        let failed = |reason| PluginError::Call {
            plugin: self.info.name.clone(),
            function: format!("`dataset.len` of `{name}`"),
            reason,
        };
        let len = answer.map_err(|stop| match stop.stage {
            Stage::Call => failed(stop.reason),
            _ => stop.into_error(&self.info.name, &format!("`dataset.init` of `{name}`")),
        })?;
        let len = len.map_err(|message| failed(one_line(&message, crate::voice::REASON_BYTES_MAX)))?;
        Ok(Dataset { worker, len })
    }

    /// Opens the reward `name`. `settings_json` is a JSON object, or empty for none.
    ///
    /// # Errors
    /// The name is not offered, the settings are not JSON, or the plugin's `init` failed.
    pub fn reward(&self, name: &str, settings_json: &str) -> Result<Reward, PluginError> {
        self.check_offer("reward", &self.info.rewards, name)?;
        let settings = self.check_settings(settings_json)?;
        let mut worker = Worker::new(self.blueprint.clone(), Role::Reward { name: name.into(), settings });
        let time = Duration::from_millis(self.blueprint.limits.init_ms_max);
        // Asking for nothing makes the instance and runs `init`.
        let answer = worker.call(true, time, |_| Box::pin(async { Ok(()) }))?;
        answer.map_err(|stop| stop.into_error(&self.info.name, &format!("`reward.init` of `{name}`")))?;
        Ok(Reward { worker })
    }

    fn check_offer(&self, kind: &'static str, offers: &[Offer], name: &str) -> Result<(), PluginError> {
        if offers.iter().any(|offer| offer.name == name) {
            return Ok(());
        }
        let offered: Vec<_> = offers.iter().map(|offer| format!("`{}` ({})", offer.name, offer.role)).collect();
        Err(PluginError::UnknownOffer {
            plugin: self.info.name.clone(),
            kind,
            name: one_line(name, NAME_BYTES_MAX),
            offered: if offered.is_empty() { format!("no {kind}s at all") } else { offered.join(", ") },
        })
    }

    fn check_settings(&self, text: &str) -> Result<String, PluginError> {
        let bad = |detail| PluginError::BadSettings { plugin: self.info.name.clone(), detail };
        let bytes_max = self.blueprint.limits.settings_bytes_max;
        if text.len() > bytes_max {
            return Err(bad(format!("they have {} bytes, above `settings_bytes_max` = {bytes_max}", text.len())));
        }
        if text.trim().is_empty() {
            return Ok("{}".into());
        }
        match serde_json::from_str(text) {
            Ok(Value::Object(_)) => Ok(text.into()),
            Ok(_) => Err(bad("they are no JSON object".into())),
            Err(error) => Err(bad(format!("they are not JSON: {error}"))),
        }
    }
}

impl Stop {
    fn into_error(self, plugin: &str, function: &str) -> PluginError {
        PluginError::Call { plugin: plugin.into(), function: function.into(), reason: self.reason_with_stage() }
    }

    /// The reason, with the place when it is not the call itself.
    pub(crate) fn reason_with_stage(&self) -> String {
        match self.stage {
            Stage::Instantiate => format!("while it was started: {}", self.reason),
            Stage::Interface | Stage::Call => self.reason.clone(),
            Stage::Init => format!("`init`: {}", self.reason),
        }
    }
}

/// An open dataset.
pub struct Dataset {
    worker: Worker,
    len: u64,
}

impl std::fmt::Debug for Dataset {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Dataset").field("len", &self.len).finish_non_exhaustive()
    }
}

impl Dataset {
    /// Number of examples.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// No examples at all.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The examples at `indices`, any number in any order: as many results as indices, in their order.
    ///
    /// # Errors
    /// Only when the host itself fails; what the plugin cannot do is a [`SampleFailure`] in its place.
    pub fn get(&mut self, indices: &[u64]) -> Result<Vec<Result<Example, SampleFailure>>, PluginError> {
        let inside: Vec<u64> = indices.iter().copied().filter(|index| *index < self.len).collect();
        let mut results = batch::run::<GetExamples>(&mut self.worker, &inside)?.into_iter();
        if inside.len() == indices.len() {
            return Ok(results.collect());
        }
        let plugin = &self.worker.blueprint().plugin;
        let place = |(item, index): (usize, &u64)| {
            let beyond = || SampleFailure {
                plugin: plugin.clone(),
                item,
                reason: format!("index {index} is beyond the dataset's {} examples", self.len),
            };
            if *index >= self.len {
                return Err(beyond());
            }
            // The guest saw only the indices inside, so its failures count those.
            let result = results.next().unwrap_or_else(|| Err(beyond()));
            result.map_err(|failure| SampleFailure { item, ..failure })
        };
        Ok(indices.iter().enumerate().map(place).collect())
    }
}

/// An open reward.
pub struct Reward {
    worker: Worker,
}

impl std::fmt::Debug for Reward {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Reward").finish_non_exhaustive()
    }
}

impl Reward {
    /// Scores any number of samples: as many results as samples, in their order.
    ///
    /// # Errors
    /// Only when the host itself fails; what the plugin cannot do is a [`SampleFailure`] in its place.
    pub fn score(&mut self, samples: &[RewardSample]) -> Result<Vec<Result<Score, SampleFailure>>, PluginError> {
        batch::run::<ScoreSamples>(&mut self.worker, samples)
    }

    /// Linear memory of the live instance in bytes, for `plugin bench`; `None` when there is none.
    ///
    /// # Errors
    /// When the host itself fails.
    pub fn memory_bytes(&mut self) -> Result<Option<u64>, PluginError> {
        let time = Duration::from_millis(self.worker.blueprint().limits.init_ms_max);
        let answer = self.worker.call(false, time, |live| {
            let bytes = live.store.data().meter.bytes();
            Box::pin(async move { Ok(bytes) })
        })?;
        Ok(answer.ok())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn description() -> metadata::Description {
        metadata::Description {
            name: "p".into(),
            version: "1.0.0".into(),
            summary: "a\nb".into(),
            datasets: vec![metadata::DatasetOffer { name: "d".into(), role: metadata::DatasetRole::Train }],
            rewards: vec![metadata::RewardOffer { name: "r".into(), role: metadata::RewardRole::Filter }],
            settings_schema: "{}".into(),
            wants: vec!["log".into()],
        }
    }

    #[test]
    fn descriptions_are_checked() {
        let info = PluginInfo::new("stem", "00", description()).unwrap();
        assert_eq!((info.summary.as_str(), info.rewards[0].role.as_str()), ("a\\nb", "filter"));
        let refused = |change: fn(&mut metadata::Description)| {
            let mut changed = description();
            change(&mut changed);
            PluginInfo::new("stem", "00", changed).unwrap_err().to_string()
        };
        assert!(refused(|d| d.name.clear()).contains("its name is empty"));
        assert!(refused(|d| d.name = "x".repeat(999)).contains("999 bytes"));
        assert!(refused(|d| d.name = "a\u{1b}b".into()).contains("\\u{1b}"));
        assert!(refused(|d| d.settings_schema = "[".into()).contains("not JSON"));
        assert!(refused(|d| d.settings_schema = "3".into()).contains("no JSON object"));
        assert!(refused(|d| d.wants = vec!["net".into()]).contains("`net` is not a grant"));
        assert!(refused(|d| d.rewards.push(d.rewards[0].clone())).contains("offered twice"));
    }
}
