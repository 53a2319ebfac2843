//! The settings JSON that the host hands to `init`.

use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

use crate::host::table;

/// What `init` receives: the dataset section that applies to this dataset or reward, and the run's `[custom]` section.
#[derive(Clone, Debug, Default)]
pub struct Settings {
    /// Where the rows are; for a validation dataset or reward, the validation section's table.
    pub dataset: DatasetSettings,
    /// The run's `[custom]` section, one table per plugin.
    pub custom: Map<String, Value>,
}

/// A dataset section.
#[derive(Clone, Debug, Default)]
pub struct DatasetSettings {
    /// Hub id or local path.
    pub name: Option<String>,
    /// Hub configuration ("" for the default one).
    pub subset: Option<String>,
    /// Hub revision ("" for the newest).
    pub revision: Option<String>,
    /// Splits, concatenated in this order.
    pub split: Splits,
    /// How many of the first rows to use.
    pub test_size: Option<TestSize>,
}

/// One split or several.
#[derive(Clone, Debug)]
pub enum Splits {
    /// `split = "train"`
    One(String),
    /// `split = ["train", "test"]`
    Many(Vec<String>),
}

impl Default for Splits {
    fn default() -> Self {
        Splits::Many(Vec::new())
    }
}

/// A count of rows or a fraction of all.
#[derive(Clone, Copy, Debug)]
pub enum TestSize {
    /// That many rows.
    Rows(u64),
    /// That fraction of the rows, rounded down.
    Fraction(f64),
}

impl Settings {
    /// Reads the settings; an empty text means no settings.
    ///
    /// # Errors
    /// What is wrong with the JSON.
    pub fn parse(text: &str) -> Result<Self, String> {
        if text.trim().is_empty() {
            return Ok(Self::default());
        }
        let wrong = |what: String| format!("the settings are not what this plugin takes: {what}");
        let mut sections: Map<String, Value> = serde_json::from_str(text).map_err(|e| wrong(e.to_string()))?;
        let mut section = |name: &str| match sections.remove(name) {
            None | Some(Value::Null) => Ok(Map::new()),
            Some(Value::Object(section)) => Ok(section),
            Some(_) => Err(wrong(format!("`{name}` is no table"))),
        };
        let dataset = DatasetSettings::of(&section("dataset")?).map_err(|e| wrong(format!("`dataset.{e}")))?;
        Ok(Self { dataset, custom: section("custom")? })
    }

    /// The plugin's own table `custom.<section>`, or its default.
    ///
    /// # Errors
    /// The key that is unknown or has a wrong type.
    pub fn custom<T: DeserializeOwned + Default>(&self, section: &str) -> Result<T, String> {
        match self.custom.get(section) {
            None => Ok(T::default()),
            Some(value) => serde_json::from_value(value.clone()).map_err(|e| format!("`custom.{section}`: {e}")),
        }
    }

    /// The number `custom.<section>.<key>`, or `default` when it is not set.
    ///
    /// # Errors
    /// It is set to something else.
    pub fn number(&self, section: &str, key: &str, default: f64) -> Result<f64, String> {
        match self.value(section, key) {
            None => Ok(default),
            Some(value) => value.as_f64().ok_or_else(|| format!("`custom.{section}.{key}` must be a number")),
        }
    }

    /// The text `custom.<section>.<key>`, or `default` when it is not set.
    ///
    /// # Errors
    /// It is set to something else.
    pub fn text(&self, section: &str, key: &str, default: &str) -> Result<String, String> {
        match self.value(section, key) {
            None => Ok(default.to_owned()),
            Some(value) => {
                value.as_str().map(str::to_owned).ok_or_else(|| format!("`custom.{section}.{key}` must be a text"))
            }
        }
    }

    fn value(&self, section: &str, key: &str) -> Option<&Value> {
        self.custom.get(section)?.get(key).filter(|value| !value.is_null())
    }
}

impl DatasetSettings {
    fn of(section: &Map<String, Value>) -> Result<Self, String> {
        let set = |key: &str| section.get(key).filter(|value| !value.is_null());
        let text = |key: &str| match set(key) {
            None => Ok(None),
            Some(value) => value.as_str().map(|t| Some(t.to_owned())).ok_or_else(|| format!("{key}` must be a text")),
        };
        let split = match set("split") {
            None => Splits::default(),
            Some(Value::String(split)) => Splits::One(split.clone()),
            Some(Value::Array(splits)) => {
                let splits = splits.iter().map(|s| s.as_str().map(str::to_owned)).collect::<Option<_>>();
                Splits::Many(splits.ok_or("split` must be a text or a list of texts")?)
            }
            Some(_) => return Err("split` must be a text or a list of texts".to_owned()),
        };
        let test_size = match set("test_size") {
            None => None,
            Some(value) => Some(match (value.as_u64(), value.as_f64()) {
                (Some(rows), _) => TestSize::Rows(rows),
                (None, Some(part)) => TestSize::Fraction(part),
                (None, None) => return Err("test_size` must be a number".to_owned()),
            }),
        };
        Ok(Self { name: text("name")?, subset: text("subset")?, revision: text("revision")?, split, test_size })
    }

    /// The host table that this section names.
    ///
    /// # Errors
    /// When no dataset is named.
    pub fn source(&self) -> Result<table::Source, String> {
        let name = self.name.clone().unwrap_or_default();
        if name.is_empty() {
            return Err("`dataset.name` is empty: name a hub dataset, a folder or a file".to_owned());
        }
        let splits = match &self.split {
            Splits::One(split) => vec![split.clone()],
            Splits::Many(splits) => splits.clone(),
        };
        Ok(table::Source {
            name,
            subset: self.subset.clone().unwrap_or_default(),
            revision: self.revision.clone().unwrap_or_default(),
            splits: splits.into_iter().filter(|s| !s.is_empty()).collect(),
        })
    }

    /// How many of `rows` rows `test_size` leaves: the first ones, never a random choice.
    ///
    /// # Errors
    /// When a fraction is not between 0 and 1.
    pub fn limit(&self, rows: u64) -> Result<u64, String> {
        match self.test_size {
            None => Ok(rows),
            Some(TestSize::Rows(count)) => Ok(rows.min(count)),
            Some(TestSize::Fraction(part)) if (0.0..=1.0).contains(&part) => Ok((rows as f64 * part) as u64),
            Some(TestSize::Fraction(part)) => {
                Err(format!("`dataset.test_size` is {part}: give a number of rows, or a fraction between 0 and 1"))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn test_size_is_rows_or_fraction() {
        let limit = |json: &str| Settings::parse(json).unwrap().dataset.limit(30);
        assert_eq!(limit("{}"), Ok(30));
        assert_eq!(limit(r#"{"dataset":{"test_size":null}}"#), Ok(30));
        assert_eq!(limit(r#"{"dataset":{"test_size":7}}"#), Ok(7));
        assert_eq!(limit(r#"{"dataset":{"test_size":70}}"#), Ok(30));
        assert_eq!(limit(r#"{"dataset":{"test_size":0.25}}"#), Ok(7));
        assert!(limit(r#"{"dataset":{"test_size":1.5}}"#).is_err());
    }

    #[test]
    fn splits_are_one_or_many() {
        let splits = |json: &str| Settings::parse(json).unwrap().dataset.source().unwrap().splits;
        assert_eq!(splits(r#"{"dataset":{"name":"a","split":"x"}}"#), ["x"]);
        assert_eq!(splits(r#"{"dataset":{"name":"a","split":["x","y"]}}"#), ["x", "y"]);
        assert!(splits(r#"{"dataset":{"name":"a","split":""}}"#).is_empty());
        assert!(Settings::default().dataset.source().is_err());
    }

    #[test]
    fn single_values_and_what_is_wrong_with_them() {
        let settings = Settings::parse(r#"{"custom":{"me":{"half":0.5,"word":"so"}}}"#).unwrap();
        assert_eq!(settings.number("me", "half", 1.0), Ok(0.5));
        assert_eq!(settings.number("me", "other", 1.0), Ok(1.0));
        assert_eq!(settings.text("me", "word", ""), Ok("so".to_owned()));
        assert!(settings.number("me", "word", 1.0).unwrap_err().contains("custom.me.word"));
        for (json, said) in [
            ("[]", "settings"),
            (r#"{"dataset":1}"#, "`dataset` is no table"),
            (r#"{"dataset":{"split":[1]}}"#, "`dataset.split`"),
            (r#"{"dataset":{"name":1}}"#, "`dataset.name`"),
        ] {
            assert!(Settings::parse(json).unwrap_err().contains(said), "{json}");
        }
    }
}
