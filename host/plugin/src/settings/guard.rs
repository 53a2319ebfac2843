//! What checking settings against a schema can cost, known before it is done. A schema is a graph: each place in it
//! leads to others, at the same place of the settings (`allOf`, `$ref`) or one level deeper (`properties`). A cycle of
//! the first kind never ends, and a ladder of them doubles the work with every rung.

use std::collections::HashMap;

use serde_json::{Map, Value};

/// Places of a schema.
const PLACES_MAX: usize = 10_000;
/// Uses of `$ref`.
pub(super) const REFERENCES_MAX: usize = 128;
/// Schemas within schemas, as they are written.
pub(super) const NESTING_MAX: usize = 16;
/// Places that are looked at one after the other for the same value.
const CHAIN_MAX: usize = 64;
/// Regular expressions of a schema.
const PATTERNS_MAX: usize = 64;
const PATTERN_BYTES_MAX: usize = 1000;
/// Lists and objects within each other in the settings.
pub(super) const SETTINGS_DEPTH_MAX: usize = 64;
/// Looks at a value, all together. Some hundred nanoseconds each.
const STEPS_MAX: u64 = 10_000_000;
/// How much oftener a branch is looked at whose failure is to be explained.
const BRANCH_WEIGHT: u64 = 3;

/// Bounds for one schema.
pub(super) struct Guard {
    /// In an order in which every place comes after those of its `here`.
    places: Vec<Place>,
}

/// A schema within the schema.
#[derive(Default)]
struct Place {
    /// Places for the same value, each with how often it is looked at.
    here: Vec<(usize, u64)>,
    /// Places for the values inside.
    inside: Vec<usize>,
}

impl Guard {
    /// # Errors
    /// In words that follow "its settings schema".
    pub(super) fn new(schema: &Value) -> Result<Self, String> {
        let mut survey = Survey { root: schema, known: HashMap::new(), places: Vec::new(), references: 0, patterns: 0 };
        check_draft(schema)?;
        survey.place(schema, 0)?;
        Ok(Self { places: in_order(survey.places)? })
    }

    /// Whether these settings can be checked within bounds.
    pub(super) fn allows(&self, settings: &Value) -> Result<(), String> {
        let (depth, size) = extent(settings)?;
        // Steps for a value with `n` levels inside it, from those for `n - 1`.
        let mut steps: Vec<u64> = vec![0; self.places.len()];
        for _ in 0..=depth {
            let shallower = steps.clone();
            for (index, place) in self.places.iter().enumerate() {
                let here = place.here.iter().map(|(other, weight)| steps[*other].saturating_mul(*weight));
                let inside = place.inside.iter().map(|other| shallower[*other]);
                steps[index] = here.chain(inside).fold(1, u64::saturating_add);
            }
        }
        let total = steps.last().copied().unwrap_or(0).saturating_mul(size);
        if total > STEPS_MAX {
            return Err("they are too large or too deep to be checked against the plugin's schema".into());
        }
        Ok(())
    }
}

/// Levels and size of the settings.
fn extent(settings: &Value) -> Result<(usize, u64), String> {
    let mut size = 0;
    let mut deepest = 0;
    let mut waiting = vec![(settings, 0)];
    while let Some((value, depth)) = waiting.pop() {
        if depth > SETTINGS_DEPTH_MAX {
            return Err(format!("they have more than {SETTINGS_DEPTH_MAX} levels"));
        }
        deepest = deepest.max(depth);
        size += 1;
        match value {
            Value::String(text) => size += text.len() as u64 / 256,
            Value::Array(items) => waiting.extend(items.iter().map(|item| (item, depth + 1))),
            Value::Object(fields) => waiting.extend(fields.values().map(|field| (field, depth + 1))),
            _ => {}
        }
    }
    Ok((deepest, size))
}

/// Only the drafts whose keywords are known here. A dialect of its own could give any keyword any meaning.
fn check_draft(schema: &Value) -> Result<(), String> {
    const DRAFTS: [&str; 4] = [
        "http://json-schema.org/draft-07/schema",
        "https://json-schema.org/draft-07/schema",
        "https://json-schema.org/draft/2019-09/schema",
        "https://json-schema.org/draft/2020-12/schema",
    ];
    match schema.get("$schema") {
        None => Ok(()),
        Some(Value::String(name)) if DRAFTS.contains(&name.trim_end_matches('#')) => Ok(()),
        Some(_) => Err("has a `$schema` other than those of draft 7, 2019-09 and 2020-12".into()),
    }
}

/// Keywords that move the meaning of a reference, or leave it to the moment of checking.
const MOVING: [&str; 7] =
    ["$id", "$anchor", "$dynamicAnchor", "$dynamicRef", "$recursiveAnchor", "$recursiveRef", "$vocabulary"];
/// One schema for the same value.
const HERE: [&str; 4] = ["not", "if", "then", "else"];
/// A list of schemas for the same value.
const HERE_LIST: [&str; 3] = ["allOf", "anyOf", "oneOf"];
/// Schemas by name for the same value.
const HERE_NAMED: [&str; 2] = ["dependentSchemas", "dependencies"];
/// One schema for each value inside.
const INSIDE: [&str; 7] = [
    "additionalProperties",
    "unevaluatedProperties",
    "propertyNames",
    "items",
    "additionalItems",
    "unevaluatedItems",
    "contains",
];
/// A list of schemas for values inside.
const INSIDE_LIST: [&str; 2] = ["items", "prefixItems"];
/// Schemas by name for values inside.
const INSIDE_NAMED: [&str; 2] = ["properties", "patternProperties"];
/// Schemas that only references lead to.
const APART: [&str; 2] = ["$defs", "definitions"];

struct Survey<'a> {
    root: &'a Value,
    /// Places by the address of their JSON, which does not move while it is borrowed.
    known: HashMap<*const Value, usize>,
    places: Vec<Place>,
    references: usize,
    patterns: usize,
}

impl<'a> Survey<'a> {
    /// The number of the place, with everything that it leads to.
    fn place(&mut self, schema: &'a Value, nesting: usize) -> Result<usize, String> {
        if let Some(index) = self.known.get(&std::ptr::from_ref(schema)) {
            return Ok(*index);
        }
        if nesting > NESTING_MAX {
            return Err(format!("has more than {NESTING_MAX} schemas within each other"));
        }
        let index = self.places.len();
        if index >= PLACES_MAX {
            return Err(format!("has more than {PLACES_MAX} parts"));
        }
        self.known.insert(schema, index);
        self.places.push(Place::default());
        if let Value::Object(keywords) = schema {
            self.check_keywords(keywords, index == 0)?;
            let place = self.edges(keywords, nesting + 1)?;
            self.places[index] = place;
        }
        Ok(index)
    }

    fn check_keywords(&mut self, keywords: &Map<String, Value>, is_root: bool) -> Result<(), String> {
        let moving = |name: &&&str| keywords.contains_key(**name) && !(is_root && **name == "$id");
        if let Some(name) = MOVING.iter().find(moving) {
            return Err(format!("uses `{name}`: only `$ref` to a place in the same schema is allowed"));
        }
        if !is_root && keywords.contains_key("$schema") {
            return Err("has a `$schema` inside".into());
        }
        let named = keywords.get("patternProperties").and_then(Value::as_object).into_iter().flat_map(Map::keys);
        let plain = keywords.get("pattern").and_then(Value::as_str);
        for pattern in named.map(String::as_str).chain(plain) {
            self.patterns += 1;
            if self.patterns > PATTERNS_MAX {
                return Err(format!("has more than {PATTERNS_MAX} regular expressions"));
            }
            if pattern.len() > PATTERN_BYTES_MAX {
                return Err(format!("has a regular expression above {PATTERN_BYTES_MAX} bytes"));
            }
        }
        Ok(())
    }

    fn edges(&mut self, keywords: &'a Map<String, Value>, nesting: usize) -> Result<Place, String> {
        let mut place = Place::default();
        // What is unevaluated is found by evaluating everything else again.
        let is_again = keywords.keys().any(|name| name.starts_with("unevaluated"));
        for (name, value) in keywords {
            let name = name.as_str();
            if name == "$ref" {
                let target = self.reference(value)?;
                place.here.push((target, if is_again { BRANCH_WEIGHT } else { 1 }));
            }
            let here = HERE.contains(&name).then(|| one(value)).into_iter().flatten();
            let here = here.chain(HERE_LIST.contains(&name).then(|| listed(value)).into_iter().flatten());
            let here = here.chain(HERE_NAMED.contains(&name).then(|| named(value)).into_iter().flatten());
            let weight = if name == "allOf" && !is_again { 1 } else { BRANCH_WEIGHT };
            for schema in here {
                place.here.push((self.place(schema, nesting)?, weight));
            }
            let inside = INSIDE.contains(&name).then(|| one(value)).into_iter().flatten();
            let inside = inside.chain(INSIDE_LIST.contains(&name).then(|| listed(value)).into_iter().flatten());
            let inside = inside.chain(INSIDE_NAMED.contains(&name).then(|| named(value)).into_iter().flatten());
            for schema in inside {
                place.inside.push(self.place(schema, nesting)?);
            }
            for schema in APART.contains(&name).then(|| named(value)).into_iter().flatten() {
                self.place(schema, nesting)?;
            }
        }
        Ok(place)
    }

    fn reference(&mut self, value: &'a Value) -> Result<usize, String> {
        let Value::String(target) = value else {
            return Err("has a `$ref` that is no text".into());
        };
        let shown = crate::voice::one_line(target, 100);
        self.references += 1;
        if self.references > REFERENCES_MAX {
            return Err(format!("uses `$ref` more than {REFERENCES_MAX} times"));
        }
        let pointer = target.strip_prefix('#').filter(|pointer| pointer.is_empty() || pointer.starts_with('/'));
        let Some(pointer) = pointer.filter(|pointer| !pointer.contains('%')) else {
            return Err(format!(
                "refers to `{shown}`: only places in the same schema, such as `#/$defs/x`, are allowed"
            ));
        };
        let schema = self.root.pointer(pointer).filter(|schema| schema.is_object() || schema.is_boolean());
        let schema = schema.ok_or_else(|| format!("refers to `{shown}`, which is no schema in it"))?;
        // A reference starts over: nesting is about what is written inside each other.
        self.place(schema, 0)
    }
}

fn one(value: &Value) -> Option<&Value> {
    (value.is_object() || value.is_boolean()).then_some(value)
}

fn listed(value: &Value) -> impl Iterator<Item = &Value> {
    value.as_array().into_iter().flatten().filter_map(one)
}

fn named(value: &Value) -> impl Iterator<Item = &Value> {
    value.as_object().into_iter().flat_map(Map::values).filter_map(one)
}

/// Puts every place after those of its `here`, the first place last.
fn in_order(places: Vec<Place>) -> Result<Vec<Place>, String> {
    let mut order: Vec<usize> = Vec::with_capacity(places.len());
    // 0: not seen; 1: on the way down; otherwise the length of the chain below, plus 2.
    let mut state: Vec<usize> = vec![0; places.len()];
    for start in (0..places.len()).rev() {
        let mut path = vec![(start, 0)];
        while let Some((index, next)) = path.pop() {
            if next == 0 && state[index] > 1 {
                continue;
            }
            state[index] = 1;
            if let Some((other, _)) = places[index].here.get(next) {
                path.push((index, next + 1));
                match state[*other] {
                    0 => path.push((*other, 0)),
                    1 => return Err("refers to itself without end".into()),
                    _ => {}
                }
                continue;
            }
            let below = places[index].here.iter().map(|(other, _)| state[*other] - 1).max().unwrap_or(0);
            if below > CHAIN_MAX {
                return Err(format!("looks at one value through more than {CHAIN_MAX} schemas"));
            }
            state[index] = below + 2;
            order.push(index);
        }
    }
    let mut position = vec![0; places.len()];
    for (at, index) in order.iter().enumerate() {
        position[*index] = at;
    }
    let mut places: Vec<Option<Place>> = places.into_iter().map(Some).collect();
    let moved = order.iter().filter_map(|index| {
        let mut place = places[*index].take()?;
        place.here.iter_mut().for_each(|(other, _)| *other = position[*other]);
        place.inside.iter_mut().for_each(|other| *other = position[*other]);
        Some(place)
    });
    Ok(moved.collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn refused(schema: &Value) -> String {
        match Guard::new(schema) {
            Ok(_) => panic!("not refused: {schema}"),
            Err(detail) => detail,
        }
    }

    #[test]
    fn references_stay_in_the_schema_and_end() {
        assert!(refused(&json!({"$ref": "https://example.com/s.json"})).contains("only places in the same schema"));
        assert!(refused(&json!({"$ref": "file:///etc/passwd"})).contains("only places in the same schema"));
        assert!(refused(&json!({"$ref": "#name"})).contains("only places"));
        assert!(refused(&json!({"$ref": "#/$defs/none"})).contains("no schema in it"));
        assert!(refused(&json!({"properties": {"a": {"$id": "x"}}})).contains("`$id`"));
        assert!(refused(&json!({"$dynamicRef": "#a"})).contains("`$dynamicRef`"));
        assert!(refused(&json!({"$ref": "#"})).contains("without end"));
        let cycle = json!({"$ref": "#/$defs/a", "$defs": {"a": {"allOf": [{"$ref": "#/$defs/b"}]}, "b": {"not": {"$ref": "#/$defs/a"}}}});
        assert!(refused(&cycle).contains("without end"));
        // Unused, and the library may still follow it.
        assert!(refused(&json!({"$defs": {"a": {"$ref": "#/$defs/a"}}})).contains("without end"));
        // One level deeper each time: it ends with the settings.
        Guard::new(&json!({"properties": {"child": {"$ref": "#"}}, "$id": "https://example.com/tree"})).unwrap();
    }

    #[test]
    fn numbers_of_everything_are_bounded() {
        let many = |count: usize, one: Value| json!({"allOf": vec![one; count]});
        assert!(refused(&many(20_000, json!({}))).contains("more than 10000 parts"));
        assert!(refused(&many(100, json!({"pattern": "a"}))).contains("more than 64 regular expressions"));
        assert!(refused(&json!({"pattern": "a".repeat(2000)})).contains("above 1000 bytes"));
        let references = json!({"$defs": {"a": {}}, "anyOf": vec![json!({"$ref": "#/$defs/a"}); 200]});
        assert!(refused(&references).contains("more than 128 times"));
        let mut deep = json!({});
        for _ in 0..40 {
            deep = json!({"not": deep});
        }
        assert!(refused(&deep).contains("within each other"));
        let link = |number: usize| (format!("d{number}"), json!({"$ref": format!("#/$defs/d{}", number + 1)}));
        let mut definitions: Map<_, _> = (0..100).map(link).collect();
        definitions.insert("d100".into(), json!({}));
        assert!(refused(&json!({"$ref": "#/$defs/d0", "$defs": definitions})).contains("more than 64 schemas"));
    }

    #[test]
    fn ladders_are_refused_by_what_they_cost() {
        let rung = |number: usize| {
            let next = json!({"$ref": format!("#/$defs/d{}", number + 1)});
            (format!("d{number}"), json!({"allOf": [next.clone(), next]}))
        };
        let mut definitions: Map<_, _> = (0..25).map(rung).collect();
        definitions.insert("d25".into(), json!({"type": "integer"}));
        let ladder = Guard::new(&json!({"properties": {"a": {"$ref": "#/$defs/d0"}}, "$defs": definitions})).unwrap();
        assert!(ladder.allows(&json!({"a": 1})).unwrap_err().contains("too large or too deep"));
        ladder.allows(&json!(1)).unwrap();
        let tree = json!({"allOf": [{"properties": {"c": {"$ref": "#"}}}, {"properties": {"c": {"$ref": "#"}}}]});
        let tree = Guard::new(&tree).unwrap();
        let nested = |levels: usize| (0..levels).fold(json!({}), |inner, _| json!({"c": inner}));
        tree.allows(&nested(10)).unwrap();
        assert!(tree.allows(&nested(40)).is_err());
        let wide = Guard::new(&json!({"additionalProperties": {"type": "string"}})).unwrap();
        wide.allows(&json!({"a": "x".repeat(1 << 20), "b": vec![0; 10_000]})).unwrap();
        assert!(wide.allows(&nested(SETTINGS_DEPTH_MAX + 1)).unwrap_err().contains("64 levels"));
    }
}
