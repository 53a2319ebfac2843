//! The JSON schema of a plugin's settings. The schema is the plugin's, and so hostile: [`guard`] bounds what checking
//! against it can cost before the library sees it.

mod guard;

use serde::Serialize;
use serde_json::Value;

use crate::voice::one_line;
use guard::Guard;

/// Text of a schema.
const SCHEMA_BYTES_MAX: usize = 256 << 10;
/// Problems of one check; the rest would not be read.
const PROBLEMS_MAX: usize = 64;
/// Text of one problem. It may quote the settings, and names of the schema.
const MESSAGE_BYTES_MAX: usize = 400;
/// Compiled form of one regular expression. A longer one is refused.
const REGEX_BYTES_MAX: usize = 256 << 10;
/// The library recurses over schema and settings; [`guard`] bounds the depth to what fits here.
const STACK_BYTES: usize = 64 << 20;

/// Something in the settings that the plugin's schema does not allow.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct SettingsProblem {
    /// Where, for example `dataset.splits.0`; empty: the settings as a whole.
    pub path: String,
    /// What is wrong there.
    pub message: String,
}

/// A checked and compiled schema.
pub(crate) struct Schema {
    json: Value,
    guard: Guard,
    /// There until it is dropped.
    validator: Option<jsonschema::Validator>,
}

impl Schema {
    /// `None` for an empty text: the plugin takes no settings.
    ///
    /// # Errors
    /// What is wrong with the schema, in words that follow "its settings schema".
    pub(crate) fn compile(text: &str) -> Result<Option<Self>, String> {
        let text = text.trim();
        if text.is_empty() {
            return Ok(None);
        }
        if text.len() > SCHEMA_BYTES_MAX {
            return Err(format!("has {} bytes, at most {SCHEMA_BYTES_MAX} are allowed", text.len()));
        }
        let json: Value = serde_json::from_str(text).map_err(|error| format!("is not JSON: {error}"))?;
        if !json.is_object() {
            return Err("is no JSON object".into());
        }
        let guard = Guard::new(&json)?;
        // `regex` never backtracks: its time is linear in the text.
        let patterns = jsonschema::PatternOptions::regex().size_limit(REGEX_BYTES_MAX).dfa_size_limit(REGEX_BYTES_MAX);
        let options = jsonschema::options().with_pattern_options(patterns).should_validate_formats(false);
        let built = on_large_stack(|| options.build(&json).map_err(|error| error.to_string()))?;
        let validator = built.map_err(|detail| format!("is no valid JSON schema: {detail}"))?;
        Ok(Some(Self { json, guard, validator: Some(validator) }))
    }

    pub(crate) fn json(&self) -> &Value {
        &self.json
    }

    /// What is wrong with these settings; nothing when they fit.
    pub(crate) fn problems(&self, settings: &Value) -> Vec<SettingsProblem> {
        let whole = |message: String| vec![SettingsProblem { path: String::new(), message }];
        if let Err(message) = self.guard.allows(settings) {
            return whole(message);
        }
        let Some(validator) = &self.validator else { return Vec::new() };
        let found = on_large_stack(|| {
            let errors = validator.iter_errors(settings).take(PROBLEMS_MAX);
            let problem = |error: jsonschema::ValidationError<'_>| SettingsProblem {
                path: dotted(error.instance_path().as_str()),
                message: one_line(&error.to_string(), MESSAGE_BYTES_MAX),
            };
            errors.map(problem).collect()
        });
        found.unwrap_or_else(whole)
    }
}

impl Drop for Schema {
    fn drop(&mut self) {
        // Dropping recurses as deep as compiling did.
        let validator = self.validator.take();
        let _ = on_large_stack(move || drop(validator));
    }
}

/// `a.b.0` of the JSON pointer `/a/b/0`.
fn dotted(pointer: &str) -> String {
    let parts = pointer.split('/').skip(1).map(|part| part.replace("~1", "/").replace("~0", "~"));
    one_line(&parts.collect::<Vec<_>>().join("."), MESSAGE_BYTES_MAX)
}

fn on_large_stack<T: Send>(work: impl FnOnce() -> T + Send) -> Result<T, String> {
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new().name("plugin-settings".into()).stack_size(STACK_BYTES);
        let thread = thread.spawn_scoped(scope, work).map_err(|error| format!("could not be checked: {error}"))?;
        thread.join().map_err(|_| "could not be checked: the checker panicked".to_owned())
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn schema(json: &Value) -> Schema {
        Schema::compile(&json.to_string()).unwrap_or_else(|error| panic!("{error}")).unwrap()
    }

    fn refused(text: &str) -> String {
        match Schema::compile(text) {
            Ok(_) => panic!("not refused: {}", &text[..text.len().min(200)]),
            Err(detail) => detail,
        }
    }

    #[test]
    fn problems_have_the_place_and_the_reason() {
        let schema = schema(&json!({
            "$schema": "https://json-schema.org/draft/2020-12/schema",
            "type": "object",
            "properties": {
                "size": {"type": "integer", "minimum": 1},
                "splits": {"type": "array", "items": {"$ref": "#/$defs/split"}},
            },
            "required": ["size"],
            "additionalProperties": false,
            "$defs": {"split": {"type": "string", "pattern": "^[a-z]+$"}},
        }));
        assert_eq!(schema.problems(&json!({"size": 3, "splits": ["train"]})), []);
        let problems = schema.problems(&json!({"size": 0, "splits": ["train", "T 1"], "sise": 3}));
        let at = |path: &str| {
            let found = problems.iter().find(|problem| problem.path == path);
            found.unwrap_or_else(|| panic!("{path}: {problems:?}")).message.clone()
        };
        assert!(at("size").contains("minimum"), "{problems:?}");
        assert!(at("splits.1").contains("^[a-z]+$"), "{problems:?}");
        assert!(at("").contains("sise"), "{problems:?}");
        assert!(schema.problems(&json!({}))[0].message.contains("size"));
        let flood: Vec<_> = (0..1000).map(|_| "X".repeat(1000)).collect();
        let problems = schema.problems(&json!({"size": 1, "splits": flood}));
        assert_eq!(problems.len(), PROBLEMS_MAX);
        assert!(problems.iter().all(|problem| problem.message.len() < 500));
    }

    #[test]
    fn older_drafts_are_understood_and_unknown_ones_refused() {
        let older = schema(&json!({
            "$schema": "http://json-schema.org/draft-07/schema#",
            "definitions": {"n": {"type": "number"}},
            "properties": {"a": {"$ref": "#/definitions/n"}, "l": {"items": [{"type": "null"}]}},
        }));
        assert_eq!(older.problems(&json!({"a": "x", "l": [3]})).len(), 2);
        assert!(refused(r#"{"$schema": "https://example.com/mine"}"#).contains("`$schema`"));
        assert!(refused(r#"{"type": "thing"}"#).contains("no valid JSON schema"));
        assert!(refused(r#"{"minimum": "3"}"#).contains("no valid JSON schema"));
        assert!(refused("[").contains("is not JSON"));
        assert!(refused("[]").contains("no JSON object"));
        assert!(refused(&format!("{{\"title\": \"{}\"}}", "x".repeat(SCHEMA_BYTES_MAX))).contains("at most 262144"));
        assert!(Schema::compile("  ").unwrap().is_none());
    }

    #[test]
    fn regular_expressions_cannot_explode() {
        let started = std::time::Instant::now();
        let catastrophic = schema(&json!({"properties": {"a": {"pattern": "^(a+)+$"}}}));
        let text = "a".repeat(50_000) + "b";
        assert_eq!(catastrophic.problems(&json!({"a": text})).len(), 1);
        assert!(refused(r#"{"pattern": "(?=a)b"}"#).contains("no valid JSON schema"));
        assert!(refused(r#"{"pattern": "((\\w{200}){200}){200}"}"#).contains("no valid JSON schema"));
        assert!(started.elapsed() < std::time::Duration::from_secs(60));
    }

    #[test]
    fn a_schema_as_deep_as_allowed_fits_the_stack() {
        // A chain through every reference that is allowed, and settings that follow it as deep as is allowed.
        let link = |number: usize| {
            (format!("d{number}"), json!({"properties": {"x": {"$ref": format!("#/$defs/d{}", number + 1)}}}))
        };
        let mut definitions: serde_json::Map<_, _> = (0..guard::REFERENCES_MAX - 1).map(link).collect();
        definitions.insert(format!("d{}", guard::REFERENCES_MAX - 1), json!({"type": "object"}));
        let chain = schema(&json!({"$ref": "#/$defs/d0", "$defs": definitions}));
        let mut settings = json!({});
        for _ in 0..guard::SETTINGS_DEPTH_MAX {
            settings = json!({"x": settings});
        }
        assert_eq!(chain.problems(&settings), []);
        let nested = |number: usize| {
            let inner = json!({"$ref": format!("#/$defs/d{}", number + 1)});
            (format!("d{number}"), (1..guard::NESTING_MAX).fold(inner, |inner, _| json!({"properties": {"x": inner}})))
        };
        let mut definitions: serde_json::Map<_, _> = (0..guard::REFERENCES_MAX - 1).map(nested).collect();
        definitions.insert(format!("d{}", guard::REFERENCES_MAX - 1), json!({"type": "object"}));
        assert_eq!(schema(&json!({"$ref": "#/$defs/d0", "$defs": definitions})).problems(&settings), []);
        let problems = chain.problems(&json!({"x": settings}));
        assert!(problems[0].message.contains("levels"), "{problems:?}");
    }
}
