//! `distillation.wire = "cosmos-rl"`: what this side has to know because the original's messages leave it out.
//!
//! A request names a row of the dataset, not the prompt's tokens: a teacher looks the prompt up, and whoever publishes turns
//! a prompt's number into its row. Results lie under names without a run, so that ours are made different for every run.

use std::sync::{Arc, Mutex, PoisonError};

use cosmos_broker::{
    Broker, BrokerLimits, CosmosRlBroker, CosmosRlOptions, PromptOf, RedisAddress, RedisLink, RowOf, SampleId,
};
use cosmos_config::{Config, Wire};
use sha2::{Digest, Sha256};

use crate::error::Result;
use crate::mixture::{Mixture, Schedule};
use crate::prepare::{self, Base};
use crate::roles::RoleOptions;
use crate::task::Text;

/// One side of the original's wire.
#[derive(Clone)]
pub struct Foreign {
    prompt_of: PromptOf,
    row_of: RowOf,
    /// Whether this side is a teacher that ends with the original's end marker.
    heeds_end: bool,
    /// Whether this side publishes, under names of its run.
    publishes: bool,
}

/// Whether the run speaks it.
pub fn is_spoken(config: &Config) -> bool {
    config.distillation.enable && config.distillation.wire == Wire::CosmosRl
}

/// Whether the teacher is a process of the original, which the controller does not see.
pub fn has_the_teacher(config: &Config) -> bool {
    is_spoken(config) && config.distillation.parallelism.n_init_replicas == 0
}

impl Foreign {
    /// A side that publishes requests about prompts in the order of `schedule`.
    pub fn publisher(schedule: Schedule) -> Self {
        let schedule = Mutex::new(schedule);
        Self {
            prompt_of: Arc::new(|_| Err("this process answers no requests".into())),
            row_of: Arc::new(move |sample| {
                let mut schedule = schedule.lock().unwrap_or_else(PoisonError::into_inner);
                i64::try_from(schedule.index(sample.prompt)).unwrap_or(i64::MAX)
            }),
            heeds_end: false,
            publishes: true,
        }
    }

    /// The same for a process that has no prompts of its own.
    ///
    /// # Errors
    /// Those of the plugins and datasets.
    pub fn publisher_of(base: &Base, options: &RoleOptions) -> Result<Option<Self>> {
        if !is_spoken(base.config()) {
            return Ok(None);
        }
        Ok(Some(Self::publisher(prepare::prompts(base, &options.plugins)?.schedule)))
    }

    /// A teacher, which takes prompts from `dataset`. In a run of ours it ends when the controller says so, alone with the
    /// original's end marker (`heeds_end`).
    pub fn teacher(dataset: Mixture, text: Text, heeds_end: bool) -> Self {
        let dataset = Mutex::new(dataset);
        let prompt_of = move |row: i64| {
            let row = u64::try_from(row).map_err(|_| "it is no row of the dataset".to_string())?;
            let mut dataset = dataset.lock().unwrap_or_else(PoisonError::into_inner);
            if row >= dataset.len() {
                return Err(format!("the dataset here has {} rows", dataset.len()));
            }
            let mut items = dataset.get(&[row], &text).map_err(|e| e.to_string())?;
            let item = items.pop().unwrap_or_else(|| Err("the dataset gives nothing".into()))?;
            Ok(item.prompt_ids)
        };
        Self { prompt_of: Arc::new(prompt_of), row_of: Arc::new(|_| -1), heeds_end, publishes: false }
    }

    /// The queue to or from the original. `name`: ours in its messages.
    ///
    /// # Errors
    /// An objective that its messages have no place for.
    pub fn queue(self, link: Arc<RedisLink>, run: &str, name: &str, config: &Config) -> Result<Arc<dyn Broker>> {
        let d = &config.distillation;
        let limits = BrokerLimits { requests_max: config.host.queue_samples_max, ..BrokerLimits::default() };
        let options = CosmosRlOptions {
            name: name.to_string(),
            limits,
            wire: Default::default(),
            top_k: i32::try_from(d.top_k).unwrap_or(i32::MAX),
            token_ids_back: d.trainer_token_ids_from_teacher,
            prompt_of: self.prompt_of,
            row_of: self.row_of,
            heeds_end: self.heeds_end,
            salt: if self.publishes { salt(run) } else { SampleId::default() },
        };
        Ok(Arc::new(CosmosRlBroker::new(link, options)?))
    }
}

/// Tells a teacher of the original that the run is over.
///
/// # Errors
/// Those of the broker.
pub fn say_the_end(config: &Config, broker_url: &str, run: &str) -> Result<()> {
    let link = RedisLink::connect(&RedisAddress::parse(broker_url)?, super::redis_limits(config))?;
    let nobody = Foreign {
        prompt_of: Arc::new(|_| Err(String::new())),
        row_of: Arc::new(|_| -1),
        heeds_end: false,
        publishes: true,
    };
    Ok(nobody.queue(link, run, "controller", config)?.close()?)
}

/// What keeps the names of a run's samples apart from those of every other run.
fn salt(run: &str) -> SampleId {
    let hash = Sha256::digest(run.as_bytes());
    let number = |from: usize, to: usize| hash[from..to].iter().fold(0u64, |n, byte| n << 8 | u64::from(*byte));
    SampleId { epoch: number(0, 4) as u32, prompt: number(4, 12), generation: number(12, 16) as u32 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_sample_of_another_run_has_another_name() {
        assert_eq!(salt("cosmos-1"), salt("cosmos-1"));
        let (one, other) = (salt("cosmos-1"), salt("cosmos-2"));
        assert!(one.epoch != other.epoch && one.prompt != other.prompt && one.generation != other.generation);
    }
}
