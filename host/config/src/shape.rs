//! The tree of known keys, built once from the JSON schema of [`Config`](crate::Config), so that checking, explaining and the
//! reference page all read the same definition as serde.

use crate::keys::Config;
use serde_json::{Map, Value};
use std::collections::HashSet;
use std::sync::OnceLock;

/// What a value may be.
#[derive(Clone, Debug)]
pub(crate) enum Shape {
    Bool,
    Integer(Bounds),
    Number(Bounds),
    Text,
    Choice(Vec<Choice>),
    List {
        of: Box<Shape>,
        length: Option<usize>,
    },
    Table(Vec<Key>),
    Map(Box<Shape>),
    Any,
    /// One of several shapes; the first that fits is taken.
    Either(Vec<Shape>),
    /// A table whose keys depend on the value of `tag`.
    Tagged {
        tag: String,
        cases: Vec<(String, Vec<Key>)>,
    },
}

/// One allowed text.
#[derive(Clone, Debug)]
pub(crate) struct Choice {
    pub value: String,
    pub doc: String,
}

/// A key of a table.
#[derive(Clone, Debug)]
pub(crate) struct Key {
    pub name: String,
    pub doc: String,
    pub shape: Shape,
    /// JSON null when the key has no value by default.
    pub default: Value,
}

/// Smallest and largest allowed number.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Bounds {
    pub min: Option<f64>,
    pub max: Option<f64>,
}

impl Bounds {
    pub fn hold(self, value: f64) -> bool {
        self.min.is_none_or(|min| value >= min) && self.max.is_none_or(|max| value <= max)
    }

    fn of(schema: &Map<String, Value>) -> Self {
        Self { min: schema.get("minimum").and_then(Value::as_f64), max: schema.get("maximum").and_then(Value::as_f64) }
    }

    fn describe(self, noun: &str) -> String {
        match (self.min, self.max) {
            (Some(min), Some(max)) => format!("{noun} from {min} to {max}"),
            (Some(min), None) => format!("{noun} of at least {min}"),
            (None, Some(max)) => format!("{noun} of at most {max}"),
            (None, None) => noun.to_string(),
        }
    }
}

impl Shape {
    /// The shape in words: `an integer of at least 1 or a table`.
    pub fn describe(&self) -> String {
        match self {
            Self::Bool => "`true` or `false`".into(),
            Self::Integer(bounds) => bounds.describe("an integer"),
            Self::Number(bounds) => bounds.describe("a number"),
            Self::Text => "a string".into(),
            Self::Choice(choices) => {
                let all: Vec<String> = choices.iter().map(|c| format!("`\"{}\"`", c.value)).collect();
                if all.len() == 1 { all.concat() } else { format!("one of {}", all.join(", ")) }
            }
            Self::List { of, length: Some(length) } => format!("a list of {length} (each {})", of.describe()),
            Self::List { of, length: None } => format!("a list (each {})", of.describe()),
            Self::Map(of) if matches!(**of, Self::Any) => "a table".into(),
            Self::Map(of) => format!("a table (each value {})", of.describe()),
            Self::Table(_) | Self::Tagged { .. } => "a table".into(),
            Self::Any => "any value".into(),
            Self::Either(shapes) => shapes.iter().map(Shape::describe).collect::<Vec<_>>().join(" or "),
        }
    }

    /// The allowed texts, wherever in the shape they stand.
    pub fn choices(&self) -> Vec<&Choice> {
        let mut choices: Vec<&Choice> = match self {
            Self::Choice(choices) => choices.iter().collect(),
            Self::List { of, .. } | Self::Map(of) => of.choices(),
            Self::Either(shapes) => shapes.iter().flat_map(Shape::choices).collect(),
            _ => Vec::new(),
        };
        let mut seen = HashSet::new();
        choices.retain(|choice| seen.insert(choice.value.as_str()));
        choices
    }

    /// Whether some text fits.
    pub fn takes_text(&self) -> bool {
        match self {
            Self::Text | Self::Choice(_) | Self::Any => true,
            Self::Either(shapes) => shapes.iter().any(Shape::takes_text),
            _ => false,
        }
    }

    /// The shapes that `name` may have below this one. Several when it depends on a tag.
    pub fn child(&self, name: &str) -> Vec<(Option<&Key>, &Shape)> {
        let among = |keys: &'_ [Key]| keys.iter().position(|k| k.name == name);
        match self {
            Self::Table(keys) => among(keys).map(|i| (Some(&keys[i]), &keys[i].shape)).into_iter().collect(),
            Self::Tagged { cases, .. } => {
                cases.iter().filter_map(|(_, keys)| among(keys).map(|i| (Some(&keys[i]), &keys[i].shape))).collect()
            }
            Self::Map(of) => vec![(None, of)],
            Self::List { of, .. } => of.child(name),
            Self::Any => vec![(None, self)],
            Self::Either(shapes) => shapes.iter().flat_map(|s| s.child(name)).collect(),
            _ => Vec::new(),
        }
    }

    /// The names of the keys below, without repetition.
    pub fn key_names(&self) -> Vec<&str> {
        let mut names: Vec<&str> = match self {
            Self::Table(keys) => keys.iter().map(|k| k.name.as_str()).collect(),
            Self::Tagged { cases, .. } => {
                cases.iter().flat_map(|(_, keys)| keys.iter().map(|k| k.name.as_str())).collect()
            }
            Self::Either(shapes) => shapes.iter().flat_map(Shape::key_names).collect(),
            Self::List { of, .. } => of.key_names(),
            _ => Vec::new(),
        };
        let mut seen = HashSet::new();
        names.retain(|name| seen.insert(*name));
        names
    }
}

/// The shape of the whole configuration.
pub(crate) fn root() -> &'static Shape {
    static ROOT: OnceLock<Shape> = OnceLock::new();
    ROOT.get_or_init(|| {
        let settings = schemars::generate::SchemaSettings::draft2020_12().with(|s| s.inline_subschemas = true);
        let schema = settings.into_generator().into_root_schema_for::<Config>();
        build(schema.as_value())
    })
}

/// The JSON schema of a configuration file, with every key's documentation.
pub fn schema() -> Value {
    schemars::schema_for!(Config).to_value()
}

fn build(schema: &Value) -> Shape {
    let Some(schema) = schema.as_object() else { return Shape::Any };
    let kinds: Vec<&str> = match schema.get("type") {
        Some(Value::String(kind)) => vec![kind],
        Some(Value::Array(kinds)) => kinds.iter().filter_map(Value::as_str).filter(|k| *k != "null").collect(),
        _ => Vec::new(),
    };
    if let Some(shape) = alternatives(schema) {
        return shape;
    }
    if let Some(values) = schema.get("enum").and_then(Value::as_array) {
        let texts = values.iter().filter_map(Value::as_str);
        return Shape::Choice(texts.map(|v| Choice { value: v.into(), doc: String::new() }).collect());
    }
    if let Some(value) = schema.get("const").and_then(Value::as_str) {
        return Shape::Choice(vec![Choice { value: value.into(), doc: text(schema, "description") }]);
    }
    match kinds.as_slice() {
        ["boolean"] => Shape::Bool,
        ["integer"] => Shape::Integer(Bounds::of(schema)),
        ["number"] => Shape::Number(Bounds::of(schema)),
        ["string"] => Shape::Text,
        ["array"] => Shape::List {
            of: Box::new(schema.get("items").map_or(Shape::Any, build)),
            length: schema.get("minItems").and_then(Value::as_u64).map(|n| n as usize),
        },
        ["object"] => match (schema.get("properties"), schema.get("additionalProperties")) {
            (Some(Value::Object(properties)), _) => Shape::Table(keys(properties)),
            (_, Some(of @ Value::Object(_))) => Shape::Map(Box::new(build(of))),
            _ => Shape::Map(Box::new(Shape::Any)),
        },
        _ => Shape::Any,
    }
}

/// `anyOf` and `oneOf`: an enum of texts, a tagged table, or several shapes.
fn alternatives(schema: &Map<String, Value>) -> Option<Shape> {
    let list = schema.get("oneOf").or_else(|| schema.get("anyOf"))?.as_array()?;
    let is_null = |v: &&Value| v.get("type").and_then(Value::as_str) == Some("null");
    let shapes: Vec<Shape> = list.iter().filter(|v| !is_null(v)).map(build).collect();
    if shapes.iter().all(|s| matches!(s, Shape::Choice(_))) {
        let all = shapes.into_iter().flat_map(|s| if let Shape::Choice(c) = s { c } else { Vec::new() });
        return Some(Shape::Choice(all.collect()));
    }
    let tagged: Vec<(String, Vec<Key>)> = shapes.iter().filter_map(tagged_case).collect();
    if tagged.len() == shapes.len() && tagged.len() > 1 {
        return Some(Shape::Tagged { tag: "type".into(), cases: tagged });
    }
    match <[Shape; 1]>::try_from(shapes) {
        Ok([only]) => Some(only),
        Err(shapes) => Some(Shape::Either(shapes)),
    }
}

fn tagged_case(shape: &Shape) -> Option<(String, Vec<Key>)> {
    let Shape::Table(keys) = shape else { return None };
    let Shape::Choice(tag) = &keys.iter().find(|k| k.name == "type")?.shape else { return None };
    Some((tag.first()?.value.clone(), keys.clone()))
}

fn keys(properties: &Map<String, Value>) -> Vec<Key> {
    let key = |(name, schema): (&String, &Value)| Key {
        name: name.clone(),
        doc: schema.as_object().map(|s| text(s, "description")).unwrap_or_default(),
        shape: build(schema),
        default: schema.get("default").cloned().unwrap_or(Value::Null),
    };
    properties.iter().map(key).collect()
}

fn text(schema: &Map<String, Value>, key: &str) -> String {
    schema.get(key).and_then(Value::as_str).unwrap_or_default().to_string()
}

/// The candidate nearest to `word`, if it is near enough to have been meant.
pub fn nearest<'a>(word: &str, candidates: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    let lower = word.to_lowercase();
    candidates
        .into_iter()
        .map(|c| (strsim::normalized_damerau_levenshtein(&lower, &c.to_lowercase()), c))
        .filter(|(score, _)| *score >= 0.6)
        .max_by(|a, b| a.0.total_cmp(&b.0))
        .map(|(_, c)| c)
}
