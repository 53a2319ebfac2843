//! A loaded plugin.

use std::path::Path;
use std::sync::Arc;

use serde_json::Value;

use crate::batch::{Awaited, CountExamples, Describe, Open};
use crate::crew::Crew;
use crate::host::LoadTimes;
use crate::info::{NAME_BYTES_MAX, Offer};
use crate::open::{Dataset, Environment, Reward};
use crate::seat::{Blueprint, Role, Stage, Stop};
use crate::settings::Schema;
use crate::voice::one_line;
use crate::{Limits, PluginError, PluginInfo, SettingsProblem};

/// A loaded, checked and compiled plugin. Clones share the compiled code; every dataset, reward and environment opened
/// from it has instances and threads of its own.
#[derive(Clone)]
pub struct Plugin {
    info: Arc<PluginInfo>,
    schema: Arc<Option<Schema>>,
    blueprint: Arc<Blueprint>,
    times: LoadTimes,
}

impl std::fmt::Debug for Plugin {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Plugin").field("info", &self.info).finish_non_exhaustive()
    }
}

impl Plugin {
    /// Asks the component who it is.
    pub(crate) fn describe(
        blueprint: Blueprint,
        path: &Path,
        sha256: &str,
        mut times: LoadTimes,
    ) -> Result<Self, PluginError> {
        let stem = blueprint.plugin.clone();
        let mut blueprint = Arc::new(blueprint);
        let started = std::time::Instant::now();
        let crew = Crew::new(blueprint.clone(), Role::Describe, 1);
        let answer = Awaited::<Describe>::once(&crew, ())?;
        times.instantiate_ms = crew.instantiate_time().as_secs_f64() * 1e3;
        times.describe_ms = (started.elapsed().as_secs_f64() * 1e3 - times.instantiate_ms).max(0.0);
        drop(crew);
        let description = answer.map_err(|stop| match stop.stage {
            Stage::Interface => PluginError::WrongInterface { path: path.into(), detail: stop.reason },
            _ => stop.into_error(&stem, "`metadata.describe`"),
        })?;
        let (info, schema) = PluginInfo::new(&stem, sha256, description)?;
        Arc::make_mut(&mut blueprint).plugin = info.name.clone();
        Ok(Self { info: Arc::new(info), schema: Arc::new(schema), blueprint, times })
    }

    /// What the plugin says about itself.
    pub fn info(&self) -> &PluginInfo {
        &self.info
    }

    /// The limits it runs under, with everything automatic decided.
    pub fn limits(&self) -> &Limits {
        &self.blueprint.limits
    }

    /// Where the time went when it was loaded.
    pub fn load_times(&self) -> LoadTimes {
        self.times
    }

    /// Checks settings, in the form in which `init` takes them, against the schema that the plugin declares: what is
    /// wrong and where, or nothing. A plugin without a schema has no complaints.
    pub fn check_settings(&self, settings: &Value) -> Vec<SettingsProblem> {
        self.schema.as_ref().as_ref().map_or_else(Vec::new, |schema| schema.problems(settings))
    }

    /// Opens the dataset `name`. `settings_json` is a JSON object, or empty for none.
    ///
    /// # Errors
    /// The name is not offered, the settings are not JSON, or the plugin's `init` or `len` failed.
    pub fn dataset(&self, name: &str, settings_json: &str) -> Result<Dataset, PluginError> {
        self.check_offer("dataset", &self.info.datasets, name)?;
        let settings = self.settings_text(settings_json)?;
        let crew = Crew::new(self.blueprint.clone(), Role::Dataset { name: name.into(), settings }, 1);
        let answer = Awaited::<CountExamples>::once(&crew, ())?;
        let len = answer.map_err(|stop| {
            let function = if stop.stage == Stage::Call { "len" } else { "init" };
            self.failed(stop, &format!("`dataset.{function}` of `{name}`"))
        })?;
        Ok(Dataset::new(crew, len))
    }

    /// Opens the reward `name`. `settings_json` is a JSON object, or empty for none.
    ///
    /// # Errors
    /// The name is not offered, the settings are not JSON, or the plugin's `init` failed.
    pub fn reward(&self, name: &str, settings_json: &str) -> Result<Reward, PluginError> {
        self.check_offer("reward", &self.info.rewards, name)?;
        let settings = self.settings_text(settings_json)?;
        let role = Role::Reward { name: name.into(), settings };
        Ok(Reward::new(self.open(role, &format!("`reward.init` of `{name}`"))?))
    }

    /// Opens the environment `name`. `settings_json` is a JSON object, or empty for none.
    ///
    /// # Errors
    /// The name is not offered, the settings are not JSON, or the plugin's `init` failed.
    pub fn environment(&self, name: &str, settings_json: &str) -> Result<Environment, PluginError> {
        let offered = self.info.environments.iter();
        let offers: Vec<_> = offered.map(|name| Offer { name: name.clone(), role: "environment".into() }).collect();
        self.check_offer("environment", &offers, name)?;
        let settings = self.settings_text(settings_json)?;
        let role = Role::Environment { name: name.into(), settings };
        Ok(Environment::new(self.open(role, &format!("`environment.init` of `{name}`"))?))
    }

    /// A crew whose first instance stands.
    fn open(&self, role: Role, function: &str) -> Result<Arc<Crew>, PluginError> {
        let crew = Crew::new(self.blueprint.clone(), role, self.limits().workers());
        Awaited::<Open>::once(&crew, ())?.map_err(|stop| self.failed(stop, function))?;
        Ok(crew)
    }

    fn failed(&self, stop: Stop, function: &str) -> PluginError {
        let stop = Stop { reason: one_line(&stop.reason, crate::voice::REASON_BYTES_MAX), ..stop };
        stop.into_error(&self.info.name, function)
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

    fn settings_text(&self, text: &str) -> Result<String, PluginError> {
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
