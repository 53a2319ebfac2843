//! What a plugin says about itself, checked.

use serde::Serialize;
use serde_json::Value;

use crate::PluginError;
use crate::guest::Description;
use crate::settings::Schema;
use crate::voice::one_line;

/// Longest name in a description.
pub(crate) const NAME_BYTES_MAX: usize = 128;
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
    /// Environments by name.
    pub environments: Vec<String>,
    /// JSON schema of its settings; none: it takes none.
    pub settings_schema: Option<Value>,
    /// Grants it asks for, in the configuration's words.
    pub wants: Vec<String>,
}

impl PluginInfo {
    /// Checks a description; with the compiled schema of its settings.
    pub(crate) fn new(
        plugin: &str,
        sha256: &str,
        description: Description,
    ) -> Result<(Self, Option<Schema>), PluginError> {
        let bad =
            |detail: String| PluginError::BadDescription { plugin: plugin.into(), detail: one_line(&detail, 512) };
        check_name(&description.name).map_err(|detail| bad(format!("its name {detail}")))?;
        check_offers("dataset", &description.datasets).map_err(bad)?;
        check_offers("reward", &description.rewards).map_err(bad)?;
        let named = |name: &String| Offer { name: name.clone(), role: "environment".into() };
        let environments: Vec<Offer> = description.environments.iter().take(OFFERS_MAX + 1).map(named).collect();
        check_offers("environment", &environments).map_err(bad)?;
        let schema = Schema::compile(&description.settings_schema)
            .map_err(|detail| bad(format!("its settings schema {detail}")))?;
        if description.wants.len() > OFFERS_MAX {
            return Err(bad(format!("it wants more than {OFFERS_MAX} grants")));
        }
        for want in &description.wants {
            want.parse::<crate::Grant>().map_err(|error| bad(format!("among the grants it wants, {error}")))?;
        }
        let info = Self {
            name: description.name,
            version: one_line(&description.version, TEXT_BYTES_MAX),
            summary: one_line(&description.summary, TEXT_BYTES_MAX),
            sha256: sha256.into(),
            datasets: description.datasets,
            rewards: description.rewards,
            environments: description.environments,
            settings_schema: schema.as_ref().map(|schema| schema.json().clone()),
            wants: description.wants,
        };
        Ok((info, schema))
    }
}

fn check_offers(kind: &str, offers: &[Offer]) -> Result<(), String> {
    if offers.len() > OFFERS_MAX {
        return Err(format!("it offers more than {OFFERS_MAX} {kind}s"));
    }
    for (index, offer) in offers.iter().enumerate() {
        check_name(&offer.name).map_err(|detail| format!("the name of {kind} {index} {detail}"))?;
        if offers[..index].contains(offer) {
            return Err(format!("the {kind} `{}` is offered twice as `{}`", offer.name, offer.role));
        }
    }
    Ok(())
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

#[cfg(test)]
mod tests {
    use super::*;

    fn description() -> Description {
        let offer = |name: &str, role: &str| Offer { name: name.into(), role: role.into() };
        Description {
            name: "p".into(),
            version: "1.0.0".into(),
            summary: "a\nb".into(),
            datasets: vec![offer("d", "train")],
            rewards: vec![offer("r", "filter")],
            environments: vec!["e".into()],
            settings_schema: "{}".into(),
            wants: vec!["log".into()],
        }
    }

    #[test]
    fn descriptions_are_checked() {
        let (info, schema) = PluginInfo::new("stem", "00", description()).unwrap();
        assert_eq!((info.summary.as_str(), info.environments[0].as_str()), ("a\\nb", "e"));
        assert!(schema.is_some());
        let refused = |change: fn(&mut Description)| {
            let mut changed = description();
            change(&mut changed);
            match PluginInfo::new("stem", "00", changed) {
                Ok((info, _)) => panic!("{info:?}"),
                Err(error) => error.to_string(),
            }
        };
        assert!(refused(|d| d.name.clear()).contains("its name is empty"));
        assert!(refused(|d| d.name = "x".repeat(999)).contains("999 bytes"));
        assert!(refused(|d| d.name = "a\u{1b}b".into()).contains("\\u{1b}"));
        assert!(refused(|d| d.settings_schema = "[".into()).contains("not JSON"));
        assert!(refused(|d| d.settings_schema = "3".into()).contains("no JSON object"));
        assert!(refused(|d| d.wants = vec!["net".into()]).contains("`net` is not a grant"));
        assert!(refused(|d| d.wants = vec!["dir:/x:rw".into()]).contains("is not a grant"));
        assert!(refused(|d| d.rewards.push(d.rewards[0].clone())).contains("offered twice"));
        assert!(refused(|d| d.environments.push("e".into())).contains("offered twice"));
        assert!(refused(|d| d.environments = vec!["e".into(); 9999]).contains("more than 256"));
    }
}
