//! Compares a document with the tree of known keys: unknown keys are warnings, wrong types and values are errors, and all
//! of them are reported. What is left is the document as JSON that serde can read.

use crate::document::{Document, Node, NodeValue, nearest_path, unknown_key};
use crate::problem::{Place, Problem, Severity};
use crate::shape::{self, Bounds, Key, Shape};
use serde_json::{Map, Value};

pub(crate) struct Check<'a> {
    document: &'a Document,
    pub problems: Vec<Problem>,
}

impl<'a> Check<'a> {
    pub fn new(document: &'a Document) -> Self {
        Self { document, problems: Vec::new() }
    }

    /// The document as JSON, without what is unknown or wrong.
    pub fn run(&mut self) -> Value {
        self.value(&self.document.root, shape::root(), "").unwrap_or_default()
    }

    fn value(&mut self, node: &Node, shape: &Shape, path: &str) -> Option<Value> {
        match (shape, &node.value) {
            (Shape::Any, _) => self.free(node, path),
            (Shape::Bool, NodeValue::Bool(flag)) => Some(Value::Bool(*flag)),
            (Shape::Text, NodeValue::Text(text)) => Some(Value::String(text.clone())),
            (Shape::Choice(choices), NodeValue::Text(text)) if choices.iter().any(|c| c.value == *text) => {
                Some(Value::String(text.clone()))
            }
            (Shape::Integer(bounds), NodeValue::Integer(number)) => {
                self.bounded(node, shape, *bounds, *number as f64, (*number).into(), path)
            }
            // `8.0` for an integer is what upstream takes too.
            (Shape::Integer(bounds), NodeValue::Float(number)) if number.fract() == 0.0 && number.abs() < 9e15 => {
                self.bounded(node, shape, *bounds, *number, (*number as i64).into(), path)
            }
            (Shape::Number(bounds), NodeValue::Integer(number)) => {
                self.bounded(node, shape, *bounds, *number as f64, (*number as f64).into(), path)
            }
            (Shape::Number(bounds), NodeValue::Float(number)) => {
                self.bounded(node, shape, *bounds, *number, (*number).into(), path)
            }
            (Shape::List { of, length }, NodeValue::List(items)) => {
                if length.is_some_and(|length| length != items.len()) {
                    return self.wrong(node, shape, path);
                }
                let item = |(i, item): (usize, &Node)| self.value(item, of, &format!("{path}[{i}]"));
                Some(items.iter().enumerate().filter_map(item).collect())
            }
            (Shape::Table(keys), NodeValue::Table(entries)) => self.table(entries, keys, path),
            (Shape::Map(of), NodeValue::Table(entries)) => {
                let entry = |(key, n): &(String, Node)| Some((key.clone(), self.value(n, of, &join(path, key))?));
                Some(Value::Object(entries.iter().filter_map(entry).collect()))
            }
            (Shape::Tagged { tag, cases }, NodeValue::Table(entries)) => self.tagged(node, entries, tag, cases, path),
            (Shape::Either(shapes), _) => self.either(node, shape, shapes, path),
            _ => self.wrong(node, shape, path),
        }
    }

    /// Takes the first shape without a complaint; otherwise the complaint of the shape that has the right kind.
    fn either(&mut self, node: &Node, whole: &Shape, shapes: &[Shape], path: &str) -> Option<Value> {
        let before = self.problems.len();
        let exact = |s: &&Shape| !matches!((s, &node.value), (Shape::Integer(_), NodeValue::Float(_)));
        for shape in shapes.iter().filter(exact) {
            let value = self.value(node, shape, path);
            let complained = self.problems.drain(before..).any(|p| p.severity == Severity::Error);
            if !complained {
                return value;
            }
        }
        let inside = shapes.iter().find(|s| match &node.value {
            NodeValue::List(_) => matches!(s, Shape::List { .. }),
            NodeValue::Table(_) => matches!(s, Shape::Map(_) | Shape::Table(_)),
            _ => false,
        });
        match inside {
            Some(shape) => self.value(node, shape, path),
            None => self.wrong(node, whole, path),
        }
    }

    fn bounded(
        &mut self,
        node: &Node,
        shape: &Shape,
        bounds: Bounds,
        number: f64,
        value: Value,
        path: &str,
    ) -> Option<Value> {
        if bounds.hold(number) { Some(value) } else { self.wrong(node, shape, path) }
    }

    fn table(&mut self, entries: &[(String, Node)], keys: &[Key], path: &str) -> Option<Value> {
        let mut object = Map::new();
        for (name, node) in entries {
            let here = join(path, name);
            match keys.iter().find(|key| key.name == *name) {
                Some(key) => {
                    if let Some(value) = self.value(node, &key.shape, &here) {
                        object.insert(name.clone(), value);
                    }
                }
                None => {
                    let hint = nearest_path(path, name, keys.iter().map(|k| k.name.as_str()));
                    let (message, hint) = unknown_key(&here, hint.as_deref());
                    let place = self.document.key_place(node);
                    self.report(Severity::Warning, &here, format!("{message} is ignored"), hint, place);
                }
            }
        }
        Some(Value::Object(object))
    }

    fn tagged(
        &mut self,
        node: &Node,
        entries: &[(String, Node)],
        tag: &str,
        cases: &[(String, Vec<Key>)],
        path: &str,
    ) -> Option<Value> {
        let written = entries.iter().find(|(key, _)| key == tag).map(|(_, node)| node);
        let name = match written.map(|n| &n.value) {
            Some(NodeValue::Text(name)) => name.as_str(),
            Some(_) => "",
            None => inferred_type(entries),
        };
        let Some((name, keys)) = cases.iter().find(|(case, _)| case == name) else {
            let names = Shape::Choice(
                cases.iter().map(|(value, _)| shape::Choice { value: value.clone(), doc: String::new() }).collect(),
            );
            return self.wrong(written.unwrap_or(node), &names, &join(path, tag));
        };
        let mut object = self.table(entries, keys, path)?;
        if let Some(object) = object.as_object_mut() {
            object.insert(tag.into(), Value::String(name.clone()));
        }
        Some(object)
    }

    /// Any value, as long as JSON can hold it.
    fn free(&mut self, node: &Node, path: &str) -> Option<Value> {
        Some(match &node.value {
            NodeValue::Bool(flag) => (*flag).into(),
            NodeValue::Integer(number) => (*number).into(),
            NodeValue::Float(number) => (*number).into(),
            NodeValue::Text(text) => text.clone().into(),
            NodeValue::Other("date or time", text) => text.clone().into(),
            NodeValue::Other(..) => return self.wrong(node, &Shape::Number(Bounds::default()), path),
            NodeValue::List(items) => {
                items.iter().enumerate().filter_map(|(i, n)| self.free(n, &format!("{path}[{i}]"))).collect()
            }
            NodeValue::Table(entries) => {
                let entry = |(key, n): &(String, Node)| Some((key.clone(), self.free(n, &join(path, key))?));
                Value::Object(entries.iter().filter_map(entry).collect())
            }
        })
    }

    fn wrong(&mut self, node: &Node, shape: &Shape, path: &str) -> Option<Value> {
        let message = format!("`{path}` is {}, but must be {}", node.describe(), shape.describe());
        let hint = match (&node.value, shape) {
            (NodeValue::Text(text), _) => {
                let choices = shape.choices();
                match shape::nearest(text, choices.iter().map(|c| c.value.as_str())) {
                    Some(near) => Some(format!("did you mean `\"{near}\"`?")),
                    None if !shape.takes_text() && is_bare_value(text) => {
                        Some(format!("write `{text}` without quotes"))
                    }
                    None => None,
                }
            }
            (NodeValue::Integer(_) | NodeValue::Float(_), Shape::Text) => Some("put it in quotes".into()),
            _ => None,
        };
        let place = self.document.place(node);
        self.report(Severity::Error, path, message, hint, place);
        None
    }

    fn report(&mut self, severity: Severity, key: &str, message: String, hint: Option<String>, place: Place) {
        self.problems.push(Problem { severity, key: key.into(), message, hint, place: Some(place) });
    }
}

/// Upstream's guess when `type` is absent.
fn inferred_type(entries: &[(String, Node)]) -> &'static str {
    const GRPO_KEYS: [&str; 5] = ["temperature", "epsilon_low", "epsilon_high", "kl_beta", "use_remote_reward"];
    if entries.iter().any(|(key, _)| GRPO_KEYS.contains(&key.as_str())) { "grpo" } else { "sft" }
}

fn is_bare_value(text: &str) -> bool {
    text == "true" || text == "false" || text.parse::<f64>().is_ok_and(f64::is_finite)
}

fn join(path: &str, name: &str) -> String {
    if path.is_empty() { name.to_string() } else { format!("{path}.{name}") }
}
