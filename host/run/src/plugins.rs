//! The plugins of a run: loaded under the configuration's grants and limits, with settings checked before anything is
//! opened.

use std::path::{Path, PathBuf};

use cosmos_config::{Config, Place, Resolved, nearest};
use cosmos_plugin::{Environment, Grant, Limits, Plugin, PluginHost};
use serde_json::{Map, Value, json};

use crate::error::{Result, RunError};
use crate::offers::{OfferRole, Offered};
use crate::task::{Dataset, Text};

/// A plugin of a run.
pub struct Loaded {
    /// The plugin.
    pub plugin: Plugin,
    /// Its file.
    pub path: PathBuf,
    /// The file's name without the extension.
    pub stem: String,
    /// What it may use, in the configuration's words.
    pub grants: Vec<String>,
    /// The `[plugin.<name>]` table that applies to it.
    table: Option<String>,
    /// `[custom]` with the plugin's own settings laid over it.
    custom: Value,
    /// What its training offers read.
    train_table: Value,
    /// What its validation offers read.
    validation_table: Value,
}

/// The plugins of a run.
pub struct Plugins {
    loaded: Vec<Loaded>,
}

impl Plugins {
    /// Loads `paths` under the grants and limits of the config's `[plugin.<name>]` tables.
    pub fn load(paths: &[PathBuf], resolved: &Resolved, text: Option<&Text>) -> Result<Self> {
        let config = &resolved.config;
        let host = PluginHost::new(PluginHost::default_cache_dir())?;
        let capabilities = crate::capabilities::capabilities(text.and_then(|t| t.chat.clone()));
        let mut loaded: Vec<Loaded> = Vec::new();
        for path in paths {
            let stem = path.file_stem().map(|s| s.to_string_lossy().into_owned()).unwrap_or_default();
            let table = table_name(&host, path, &stem, config);
            let (grants, limits) = grants_and_limits(config, table.as_deref())?;
            let plugin = host.load(path, &grants, limits, capabilities.clone())?;
            let name = &plugin.info().name;
            if let Some(other) = loaded.iter().find(|other| other.plugin.info().name == *name) {
                return Err(RunError::config(
                    "",
                    format!("two plugins are called `{name}`: {} and {}", other.path.display(), path.display()),
                    "leave one out, or build it under another name",
                ));
            }
            let own = table.as_ref().and_then(|table| config.plugin.get(table));
            let mut custom = Value::Object(config.custom.clone());
            if let Some(own) = own {
                overlay(&mut custom, &Value::Object(own.settings.clone()));
            }
            let table_of =
                |own: Option<&cosmos_config::Dataset>, common| crate::prepare::json_of(own.unwrap_or(common));
            loaded.push(Loaded {
                train_table: table_of(own.and_then(|o| o.train_dataset.as_ref()), config.train.train_policy.dataset()),
                validation_table: table_of(own.and_then(|o| o.validation_dataset.as_ref()), &config.validation.dataset),
                custom,
                grants: grants.iter().map(Grant::to_string).collect(),
                path: path.clone(),
                stem,
                table,
                plugin,
            });
        }
        let plugins = Self { loaded };
        plugins.warn_of_strange_tables(resolved);
        Ok(plugins)
    }

    /// The plugins.
    pub fn iter(&self) -> impl Iterator<Item = &Loaded> {
        self.loaded.iter()
    }

    /// Every dataset that they offer.
    pub fn datasets(&self) -> Vec<Offered> {
        self.offers(|plugin| &plugin.info().datasets)
    }

    /// Every reward that they offer.
    pub fn rewards(&self) -> Vec<Offered> {
        self.offers(|plugin| &plugin.info().rewards)
    }

    fn offers<'a>(&'a self, of: impl Fn(&'a Plugin) -> &'a Vec<cosmos_plugin::Offer>) -> Vec<Offered> {
        let all = self.loaded.iter().enumerate().flat_map(|(index, loaded)| {
            of(&loaded.plugin).iter().map(move |offer| Offered {
                plugin: index,
                plugin_name: loaded.plugin.info().name.clone(),
                stem: loaded.stem.clone(),
                name: offer.name.clone(),
                role: offer.role.clone(),
            })
        });
        all.collect()
    }

    /// Opens a dataset for `role`, its settings checked.
    pub fn open_dataset(&self, resolved: &Resolved, offered: &Offered, role: OfferRole) -> Result<Dataset> {
        let settings = self.checked_settings(resolved, offered.plugin, role)?;
        Ok(Dataset::Plugin(self.loaded[offered.plugin].plugin.dataset(&offered.name, &settings)?))
    }

    /// Opens a reward for `role`, its settings checked.
    pub fn open_reward(
        &self,
        resolved: &Resolved,
        offered: &Offered,
        role: OfferRole,
    ) -> Result<cosmos_plugin::Reward> {
        let settings = self.checked_settings(resolved, offered.plugin, role)?;
        Ok(self.loaded[offered.plugin].plugin.reward(&offered.name, &settings)?)
    }

    /// Opens the environment that `host.environment` names (`plugin/environment`), or the only one there is, its settings
    /// checked; with the plugin's name and its own.
    pub fn open_environment(&self, resolved: &Resolved) -> Result<(Environment, String, String)> {
        let name = resolved.config.host.environment.as_deref();
        let of = |index: usize, loaded: &Loaded| {
            let offers = loaded.plugin.info().environments.clone().into_iter();
            let plugin = loaded.plugin.info().name.clone();
            offers.map(move |offer| (index, plugin.clone(), offer)).collect::<Vec<_>>()
        };
        let all: Vec<_> = self.loaded.iter().enumerate().flat_map(|(index, loaded)| of(index, loaded)).collect();
        let full: Vec<String> = all.iter().map(|(_, plugin, offer)| format!("{plugin}/{offer}")).collect();
        let wrong = |message: String, hint: &str| Err(RunError::config("", message, hint));
        let listed = || if full.is_empty() { "none".to_string() } else { crate::offers::quoted(&full) };
        let mut fitting = (0..all.len()).filter(|&i| name.is_none_or(|name| full[i] == name));
        let Some(chosen) = fitting.next() else {
            return match name {
                Some(name) => wrong(
                    format!("`host.environment` = `{name}`, but the plugins offer: {}", listed()),
                    "name it as `plugin/environment`",
                ),
                None => wrong(
                    "`rollout.multi_turn_config.enable` is true, but no plugin offers an environment".into(),
                    "pass one that does with `--plugin FILE.wasm`, or set `enable = false`",
                ),
            };
        };
        if fitting.next().is_some() {
            let message = format!("the plugins offer several environments: {}", listed());
            return wrong(message, "name the one to use: `[host] environment = \"plugin/environment\"`");
        }
        let (index, plugin, offer) = &all[chosen];
        let settings = self.checked_settings(resolved, *index, OfferRole::Train)?;
        let environment = self.loaded[*index].plugin.environment(offer, &settings)?;
        Ok((environment, plugin.clone(), offer.clone()))
    }

    /// The settings of plugin `index` for `role` as JSON text: `{"dataset": …, "custom": …}`, checked against the schema
    /// that it declares.
    pub fn checked_settings(&self, resolved: &Resolved, index: usize, role: OfferRole) -> Result<String> {
        let loaded = &self.loaded[index];
        let table = if role == OfferRole::Validation { &loaded.validation_table } else { &loaded.train_table };
        let settings = json!({"dataset": table, "custom": loaded.custom});
        loaded.check_own_settings(resolved)?;
        let problems = loaded.plugin.check_settings(&settings);
        let others = match problems.len() {
            0 | 1 => String::new(),
            n => format!(" (and {} more problem(s))", n - 1),
        };
        if let Some(problem) = problems.first() {
            let path = loaded.written_path(resolved, &problem.path, role);
            return Err(RunError::config(
                text_of(place_of_problem(resolved, &path, &problem.message)),
                format!("`{}`: {}{others}", dotted(&path), problem.message),
                format!(
                    "plugin `{0}` declares it so; `cosmos-host plugin inspect {1}` prints its settings",
                    loaded.plugin.info().name,
                    loaded.path.display()
                ),
            ));
        }
        Ok(settings.to_string())
    }

    /// Tables of plugins that are not loaded are most likely misspelt.
    fn warn_of_strange_tables(&self, resolved: &Resolved) {
        let used: Vec<&str> = self.loaded.iter().filter_map(|l| l.table.as_deref()).collect();
        for name in resolved.config.plugin.keys().filter(|name| !used.contains(&name.as_str())) {
            let names: Vec<&str> =
                self.loaded.iter().flat_map(|l| [l.plugin.info().name.as_str(), l.stem.as_str()]).collect();
            let twice = names.contains(&name.as_str());
            let hint = match nearest(name, names.iter().copied()) {
                _ if twice => "; another table of that plugin is used".to_string(),
                Some(near) => format!("; did you mean `[plugin.{near}]`?"),
                None => String::new(),
            };
            let place = text_of(resolved.place_of_name(&["plugin"], name));
            tracing::warn!("{place}`[plugin.{name}]` is for a plugin that this run does not load{hint}");
        }
    }
}

impl Loaded {
    /// What stands in the plugin's own settings is for it alone, so a name that it does not know is a mistake.
    fn check_own_settings(&self, resolved: &Resolved) -> Result<()> {
        let Some(table) = &self.table else { return Ok(()) };
        let Some(own) = resolved.config.plugin.get(table) else { return Ok(()) };
        let declared = self.plugin.info().settings_schema.as_ref();
        let Some(known) = declared.and_then(|s| s.pointer("/properties/custom/properties")?.as_object()) else {
            return Ok(());
        };
        let Some(strange) = own.settings.keys().find(|key| !known.contains_key(*key)) else { return Ok(()) };
        let key = format!("plugin.{table}.settings");
        let inside = known.iter().find(|(_, of)| of.pointer(&format!("/properties/{strange}")).is_some());
        let hint = match (inside, nearest(strange, known.keys().map(String::as_str))) {
            (Some((section, _)), _) => format!("write `[{key}.{section}]`, then `{strange} = …`"),
            (None, Some(near)) => format!("did you mean `{near}`?"),
            (None, None) => format!("it knows {}", crate::offers::quoted(&known.keys().cloned().collect::<Vec<_>>())),
        };
        Err(RunError::config(
            text_of(resolved.place_of_name(&["plugin", table, "settings"], strange)),
            format!("`{key}.{strange}` is no setting of plugin `{}`", self.plugin.info().name),
            hint,
        ))
    }

    /// Where the file has what the settings call `path`, a dotted path or a JSON pointer.
    fn written_path(&self, resolved: &Resolved, path: &str, role: OfferRole) -> Vec<String> {
        let parts = path_parts(path);
        let (section, rest) = match parts.split_first() {
            Some((section, rest)) => (section.as_str(), rest),
            None => ("", [].as_slice()),
        };
        let joined = |start: &[&str]| start.iter().map(|s| s.to_string()).chain(rest.iter().cloned()).collect();
        let own = self.table.as_ref().and_then(|table| Some((table, resolved.config.plugin.get(table)?)));
        let in_own_settings = |settings: &Map<String, Value>| {
            let mut at = rest.iter();
            at.next().and_then(|first| at.try_fold(settings.get(first)?, |value, part| value.get(part))).is_some()
        };
        match (section, own) {
            ("custom", Some((table, own))) if in_own_settings(&own.settings) => joined(&["plugin", table, "settings"]),
            ("dataset", Some((table, own))) if role != OfferRole::Validation && own.train_dataset.is_some() => {
                joined(&["plugin", table, "train_dataset"])
            }
            ("dataset", Some((table, own))) if role == OfferRole::Validation && own.validation_dataset.is_some() => {
                joined(&["plugin", table, "validation_dataset"])
            }
            ("dataset", _) if role == OfferRole::Validation => joined(&["validation", "dataset"]),
            ("dataset", _) => joined(&["train", "train_policy", "dataset"]),
            _ => parts,
        }
    }
}

/// Where the value at `path` stands; for a table with a key too many, which the message quotes, where that key stands.
fn place_of_problem(resolved: &Resolved, path: &[String], message: &str) -> Option<Place> {
    let parts: Vec<&str> = path.iter().map(String::as_str).collect();
    let mut quoted = message.split('\'').skip(1).step_by(2);
    quoted.find_map(|name| resolved.place_of_name(&parts, name)).or_else(|| resolved.nearest_place(&parts))
}

/// `file:line:column: `, or nothing.
pub(crate) fn text_of(place: Option<Place>) -> String {
    place.map(|p| format!("{p}: ")).unwrap_or_default()
}

/// Parts of `a.b[0].c` or of `/a/b/0/c`.
fn path_parts(path: &str) -> Vec<String> {
    if let Some(pointer) = path.strip_prefix('/') {
        return pointer.split('/').map(|part| part.replace("~1", "/").replace("~0", "~")).collect();
    }
    let parts = path.split(['.', '[']).map(|part| part.trim_end_matches(']').to_string());
    parts.filter(|part| !part.is_empty()).collect()
}

fn dotted(path: &[String]) -> String {
    let mut text = String::new();
    for part in path {
        if part.bytes().all(|b| b.is_ascii_digit()) {
            text.push_str(&format!("[{part}]"));
        } else {
            let dot = if text.is_empty() { "" } else { "." };
            text.push_str(&format!("{dot}{part}"));
        }
    }
    text
}

/// Lays `over` onto `value`: tables key by key, anything else replaced.
fn overlay(value: &mut Value, over: &Value) {
    match (value, over) {
        (Value::Object(value), Value::Object(over)) => {
            for (key, over) in over {
                overlay(value.entry(key.clone()).or_insert(Value::Null), over);
            }
        }
        (value, over) => *value = over.clone(),
    }
}

/// The table for the plugin at `path`: the one called like its file, else like the plugin itself.
fn table_name(host: &PluginHost, path: &Path, stem: &str, config: &Config) -> Option<String> {
    if config.plugin.is_empty() || config.plugin.contains_key(stem) {
        return config.plugin.contains_key(stem).then(|| stem.to_string());
    }
    // What is wrong with a file that cannot be inspected is said when it is loaded.
    let name = host.inspect(path).ok()?.description?.name;
    config.plugin.contains_key(&name).then_some(name)
}

fn grants_and_limits(config: &Config, table: Option<&str>) -> Result<(Vec<Grant>, Limits)> {
    let mut limits = Limits::default();
    let Some(table) = table.and_then(|name| config.plugin.get(name)) else {
        return Ok((Vec::new(), limits));
    };
    let grants = table.allow.iter().map(|text| text.parse::<Grant>()).collect::<std::result::Result<Vec<_>, _>>()?;
    if let Some(mb) = table.memory_mb_max {
        limits.memory_bytes_max = mb << 20;
    }
    if let Some(ms) = table.call_ms_max {
        limits.call_ms_max = ms;
    }
    if let Some(mb) = table.component_mb_max {
        limits.component_bytes_max = mb << 20;
    }
    if let Some(workers) = table.workers {
        limits.workers = workers;
    }
    Ok((grants, limits))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_plugins_own_settings_are_laid_over_those_of_all() {
        let mut custom = json!({"game": {"max": 9, "ops": "+"}, "other": {"x": 1}});
        overlay(&mut custom, &json!({"game": {"max": 15}, "new": [1]}));
        assert_eq!(custom, json!({"game": {"max": 15, "ops": "+"}, "other": {"x": 1}, "new": [1]}));
    }

    #[test]
    fn paths_are_read_in_both_forms() {
        assert_eq!(path_parts("custom.game.list[2].x"), ["custom", "game", "list", "2", "x"]);
        assert_eq!(path_parts("/custom/ga~1me/0"), ["custom", "ga/me", "0"]);
        assert_eq!(dotted(&path_parts("custom.game.list[2].x")), "custom.game.list[2].x");
    }
}
