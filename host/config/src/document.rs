//! The file as written: a tree of values that know where they stand, and the `--set` arguments laid over it.

use crate::problem::{Place, Problem, Severity};
use crate::shape::{self, Shape};
use std::ops::Range;
use std::sync::Arc;
use toml::Spanned;
use toml::de::{DeTable, DeValue};
use toml_parser::lexer::TokenKind;

/// Parts of a dotted key. TOML's own parser limits nested brackets only.
const KEY_PARTS_MAX: usize = 16;

/// A value with the places of its key and of itself.
#[derive(Clone, Debug)]
pub(crate) struct Node {
    pub value: NodeValue,
    pub origin: Origin,
}

#[derive(Clone, Debug)]
pub(crate) enum NodeValue {
    Bool(bool),
    Integer(i64),
    Float(f64),
    Text(String),
    /// A date or time, or a number that does not fit; kept as written.
    Other(&'static str, String),
    List(Vec<Node>),
    Table(Vec<(String, Node)>),
}

/// Where a value comes from.
#[derive(Clone, Debug)]
pub(crate) enum Origin {
    /// Bytes of the key and of the value in the file.
    File { key: Range<usize>, value: Range<usize> },
    /// The whole `--set` argument.
    Override(Arc<str>),
}

/// A parsed file with its text.
#[derive(Clone, Debug)]
pub(crate) struct Document {
    pub file: String,
    pub text: Arc<str>,
    pub root: Node,
}

impl Node {
    pub fn table(&self) -> Option<&Vec<(String, Node)>> {
        if let NodeValue::Table(entries) = &self.value { Some(entries) } else { None }
    }

    /// The value at a dotted path; a part in quotes is not needed, since no known key contains a dot.
    pub fn at<'a, 'p>(&'a self, mut path: impl Iterator<Item = &'p str>) -> Option<&'a Node> {
        path.try_fold(self, |node, part| node.table()?.iter().find(|(key, _)| key == part).map(|(_, child)| child))
    }

    /// The deepest value on the way to `path`, with the number of parts it took; a part below a list is its index.
    pub fn deepest(&self, path: &[&str]) -> (&Node, usize) {
        let mut node = self;
        for (depth, part) in path.iter().enumerate() {
            let below = match &node.value {
                NodeValue::Table(entries) => entries.iter().find(|(key, _)| key == part).map(|(_, child)| child),
                NodeValue::List(items) => part.parse::<usize>().ok().and_then(|index| items.get(index)),
                _ => None,
            };
            match below {
                Some(below) => node = below,
                None => return (node, depth),
            }
        }
        (node, path.len())
    }

    /// The value in the words of an error message.
    pub fn describe(&self) -> String {
        match &self.value {
            NodeValue::Bool(flag) => format!("`{flag}`"),
            NodeValue::Integer(number) => format!("the integer `{number}`"),
            NodeValue::Float(number) => format!("the number `{number:?}`"),
            NodeValue::Text(text) if text.chars().count() > 60 => {
                format!("the string `{:?}…`", text.chars().take(60).collect::<String>())
            }
            NodeValue::Text(text) => format!("the string `{text:?}`"),
            NodeValue::Other(kind, text) => format!("the {kind} `{text}`"),
            NodeValue::List(_) => "a list".into(),
            NodeValue::Table(_) => "a table".into(),
        }
    }
}

impl Document {
    /// Reads TOML. Every syntax error is reported, not only the first.
    pub fn parse(file: &str, text: &str) -> Result<Self, Vec<Problem>> {
        let text: Arc<str> = text.into();
        let mut document =
            Self { file: file.into(), text: text.clone(), root: Node::file(NodeValue::Table(Vec::new()), 0..0, 0..0) };
        if let Some(span) = key_too_deep(&text) {
            let message = format!("a dotted key has more than {KEY_PARTS_MAX} parts");
            return Err(vec![document.syntax_problem(message, Some(span))]);
        }
        let (root, errors) = DeTable::parse_recoverable(&text);
        if !errors.is_empty() {
            return Err(errors.iter().map(|e| document.syntax_problem(e.message().to_string(), e.span())).collect());
        }
        document.root.value = table_value(root.get_ref());
        Ok(document)
    }

    fn syntax_problem(&self, message: String, span: Option<Range<usize>>) -> Problem {
        Problem {
            severity: Severity::Error,
            key: String::new(),
            message: format!("this is not TOML: {message}"),
            hint: None,
            place: span.map(|span| self.place_of(span)),
        }
    }

    /// Line and column of bytes of the text.
    pub fn place_of(&self, span: Range<usize>) -> Place {
        let mut start = span.start.min(self.text.len());
        while !self.text.is_char_boundary(start) {
            start -= 1;
        }
        let before = &self.text[..start];
        let line_start = before.rfind('\n').map_or(0, |i| i + 1);
        Place {
            file: self.file.clone(),
            line: before.matches('\n').count() + 1,
            column: before[line_start..].chars().count() + 1,
            span: start..span.end.clamp(start, self.text.len()),
        }
    }

    /// Where the value of `node` stands.
    pub fn place(&self, node: &Node) -> Place {
        match &node.origin {
            Origin::File { value, .. } => self.place_of(value.clone()),
            Origin::Override(argument) => override_place(argument),
        }
    }

    /// Where the key of `node` stands.
    pub fn key_place(&self, node: &Node) -> Place {
        match &node.origin {
            Origin::File { key, .. } => self.place_of(key.clone()),
            Origin::Override(argument) => override_place(argument),
        }
    }

    /// Lays `a.b=c` over the file. The value is read as TOML; where that fails, or where the key wants a string and the
    /// text is not one, the text itself is the value.
    #[expect(clippy::result_large_err, reason = "made once per argument of the command line")]
    pub fn apply_override(&mut self, argument: &str) -> Result<(), Problem> {
        let problem = |key: &str, message: String, hint: Option<String>| Problem {
            severity: Severity::Error,
            key: key.into(),
            message,
            hint,
            place: Some(override_place(argument)),
        };
        let Some((key, text)) = argument.split_once('=') else {
            let hint = Some("write `--set train.optm_lr=1e-5`".into());
            return Err(problem("", format!("`{argument}` has no `=` between key and value"), hint));
        };
        let (key, text) = (key.trim(), text.trim());
        let path = key_parts(key).ok_or_else(|| problem(key, format!("`{key}` is not a dotted key"), None))?;
        let shapes = known_path(&path).map_err(|(at, hint)| {
            let (message, hint) = unknown_key(&at, hint.as_deref());
            problem(key, message, hint)
        })?;
        let origin: Arc<str> = argument.into();
        let parsed = if text.is_empty() { None } else { parse_value(text, &origin) };
        let wants_text = shapes.iter().any(|s| s.takes_text());
        let fits = parsed.as_ref().is_some_and(|node| shapes.iter().any(|s| may_fit(node, s)));
        let node = match parsed {
            Some(node) if fits || !wants_text => node,
            _ => Node { value: NodeValue::Text(text.into()), origin: Origin::Override(origin.clone()) },
        };
        insert(&mut self.root, &path, node, &origin);
        Ok(())
    }
}

/// Message and hint for a key that does not exist.
pub(crate) fn unknown_key(path: &str, nearest: Option<&str>) -> (String, Option<String>) {
    (format!("unknown key `{path}`"), nearest.map(|n| format!("did you mean `{n}`?")))
}

fn override_place(argument: &str) -> Place {
    Place { file: argument.into(), line: 0, column: 0, span: 0..0 }
}

impl Node {
    fn file(value: NodeValue, key: Range<usize>, span: Range<usize>) -> Self {
        Self { value, origin: Origin::File { key, value: span } }
    }
}

fn table_value(table: &DeTable<'_>) -> NodeValue {
    let mut entries: Vec<(String, Node)> =
        table.iter().map(|(key, value)| (key.get_ref().to_string(), convert(value, key.span()))).collect();
    // The parser's map is sorted by name; messages follow the file.
    entries.sort_by_key(|(_, node)| if let Origin::File { key, .. } = &node.origin { key.start } else { 0 });
    NodeValue::Table(entries)
}

fn convert(value: &Spanned<DeValue<'_>>, key: Range<usize>) -> Node {
    let converted = match value.get_ref() {
        DeValue::Boolean(flag) => NodeValue::Bool(*flag),
        DeValue::Integer(integer) => match i64::from_str_radix(integer.as_str(), integer.radix()) {
            Ok(number) => NodeValue::Integer(number),
            Err(_) => NodeValue::Other("too large integer", integer.to_string()),
        },
        DeValue::Float(float) => match float.as_str().parse::<f64>() {
            Ok(number) if number.is_finite() => NodeValue::Float(number),
            _ => NodeValue::Other("infinite or undefined number", float.as_str().to_string()),
        },
        DeValue::String(text) => NodeValue::Text(text.to_string()),
        DeValue::Datetime(time) => NodeValue::Other("date or time", time.to_string()),
        DeValue::Array(items) => NodeValue::List(items.iter().map(|item| convert(item, item.span())).collect()),
        DeValue::Table(table) => table_value(table),
    };
    Node::file(converted, key, value.span())
}

fn key_too_deep(text: &str) -> Option<Range<usize>> {
    let mut dots = 0;
    for token in toml_parser::Source::new(text).lex() {
        match token.kind() {
            TokenKind::Dot => dots += 1,
            TokenKind::Newline | TokenKind::Equals | TokenKind::Comma => dots = 0,
            _ => {}
        }
        if dots >= KEY_PARTS_MAX {
            return Some(token.span().start()..token.span().end());
        }
    }
    None
}

/// The parts of a dotted key.
pub(crate) fn key_parts(key: &str) -> Option<Vec<String>> {
    let document = Document::parse("", &format!("{key} = 0")).ok()?;
    let mut parts = Vec::new();
    let mut node = &document.root;
    while let NodeValue::Table(entries) = &node.value {
        let [(name, child)] = entries.as_slice() else { return None };
        parts.push(name.clone());
        node = child;
    }
    Some(parts)
}

fn parse_value(text: &str, origin: &Arc<str>) -> Option<Node> {
    let document = Document::parse("", &format!("value = {text}")).ok()?;
    let NodeValue::Table(entries) = document.root.value else { return None };
    let [(_, node)] = <[(String, Node); 1]>::try_from(entries).ok()?;
    Some(overridden(node, origin))
}

fn overridden(node: Node, origin: &Arc<str>) -> Node {
    let value = match node.value {
        NodeValue::List(items) => NodeValue::List(items.into_iter().map(|n| overridden(n, origin)).collect()),
        NodeValue::Table(entries) => {
            NodeValue::Table(entries.into_iter().map(|(key, n)| (key, overridden(n, origin))).collect())
        }
        other => other,
    };
    Node { value, origin: Origin::Override(origin.clone()) }
}

/// The shapes at a path, or the part that is unknown with the nearest known path.
pub(crate) fn known_path(path: &[String]) -> Result<Vec<&'static Shape>, (String, Option<String>)> {
    let mut shapes = vec![shape::root()];
    for (depth, part) in path.iter().enumerate() {
        let below: Vec<&Shape> = shapes.iter().flat_map(|s| s.child(part)).map(|(_, shape)| shape).collect();
        if below.is_empty() {
            let parent = path[..depth].join(".");
            let names = shapes.iter().flat_map(|s| s.key_names());
            return Err((path.join("."), nearest_path(&parent, part, names)));
        }
        shapes = below;
    }
    Ok(shapes)
}

/// The nearest key in the same table, else the same name in another table.
pub(crate) fn nearest_path<'a>(parent: &str, name: &str, siblings: impl Iterator<Item = &'a str>) -> Option<String> {
    let join = |parent: &str, name: &str| if parent.is_empty() { name.to_string() } else { format!("{parent}.{name}") };
    if let Some(sibling) = shape::nearest(name, siblings) {
        return Some(join(parent, sibling));
    }
    let mut elsewhere = Vec::new();
    tables_with(shape::root(), "", name, &mut elsewhere);
    elsewhere.sort_by_key(|path| path.matches('.').count());
    elsewhere.into_iter().next()
}

fn tables_with(shape: &Shape, path: &str, name: &str, found: &mut Vec<String>) {
    for key in shape.key_names() {
        let here = if path.is_empty() { key.to_string() } else { format!("{path}.{key}") };
        if key == name {
            found.push(here.clone());
        }
        for (_, child) in shape.child(key) {
            tables_with(child, &here, name, found);
        }
    }
}

/// Whether a value has the kind that a shape wants; its bounds are checked later.
fn may_fit(node: &Node, shape: &Shape) -> bool {
    match (shape, &node.value) {
        (Shape::Any, _) | (Shape::Bool, NodeValue::Bool(_)) => true,
        (Shape::Integer(_) | Shape::Number(_), NodeValue::Integer(_) | NodeValue::Float(_)) => true,
        (Shape::Text | Shape::Choice(_), NodeValue::Text(_)) => true,
        (Shape::List { .. }, NodeValue::List(_)) => true,
        (Shape::Table(_) | Shape::Map(_) | Shape::Tagged { .. }, NodeValue::Table(_)) => true,
        (Shape::Either(shapes), _) => shapes.iter().any(|s| may_fit(node, s)),
        _ => false,
    }
}

fn insert(root: &mut Node, path: &[String], leaf: Node, origin: &Arc<str>) {
    let Some((name, rest)) = path.split_first() else { return };
    // A value of another kind on the way is replaced: the argument says what it is now.
    if root.table().is_none() {
        *root = Node { value: NodeValue::Table(Vec::new()), origin: Origin::Override(origin.clone()) };
    }
    let NodeValue::Table(entries) = &mut root.value else { return };
    let index = entries.iter().position(|(key, _)| key == name).unwrap_or_else(|| {
        let empty = Node { value: NodeValue::Table(Vec::new()), origin: Origin::Override(origin.clone()) };
        entries.push((name.clone(), empty));
        entries.len() - 1
    });
    if rest.is_empty() {
        entries[index].1 = leaf;
    } else {
        insert(&mut entries[index].1, rest, leaf, origin);
    }
}
