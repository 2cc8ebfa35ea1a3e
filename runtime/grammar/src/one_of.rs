//! `oneOf` whose alternatives exclude each other, as `anyOf`: the same texts, and a language that grammars can say.
//!
//! Owns what counts as excluding each other: different types, different constants, or objects of which a property that one of them
//! must have excludes itself, wherever `$ref` leads within the schema. What cannot be told counts as overlapping, and is left as it
//! is: it will be refused by name.

use serde_json::{Map, Value};

/// References that are followed, and alternatives within alternatives, at most.
const DEPTH: usize = 32;
/// Comparisons of two schemas, at most.
const WORK: usize = 200_000;

/// Values that stand for themselves: nothing in them is a schema.
const DATA: [&str; 4] = ["const", "enum", "default", "examples"];

/// The schema with each such `oneOf` as `anyOf`.
pub(crate) fn as_any_of(schema: &Value) -> Value {
    let mut work = Work { root: schema, left: WORK };
    work.rewritten(schema)
}

struct Work<'s> {
    root: &'s Value,
    left: usize,
}

impl Work<'_> {
    fn rewritten(&mut self, schema: &Value) -> Value {
        match schema {
            Value::Array(items) => items.iter().map(|item| self.rewritten(item)).collect(),
            Value::Object(fields) => {
                let becomes_any = !fields.contains_key("anyOf")
                    && fields.get("oneOf").and_then(Value::as_array).is_some_and(|all| self.exclude_each_other(all));
                let field = |(key, value): (&String, &Value)| match key.as_str() {
                    "oneOf" if becomes_any => ("anyOf".to_owned(), self.rewritten(value)),
                    key if DATA.contains(&key) => (key.to_owned(), value.clone()),
                    key => (key.to_owned(), self.rewritten(value)),
                };
                Value::Object(fields.iter().map(field).collect::<Map<_, _>>())
            }
            other => other.clone(),
        }
    }

    fn exclude_each_other(&mut self, all: &[Value]) -> bool {
        let mut pairs = all.iter().enumerate().flat_map(|(i, a)| all[i + 1..].iter().map(move |b| (a, b)));
        pairs.all(|(a, b)| self.exclude(a, b, 0))
    }

    /// Whether no value fits both, as far as that can be told.
    fn exclude(&mut self, a: &Value, b: &Value, depth: usize) -> bool {
        self.left = self.left.saturating_sub(1);
        if depth > DEPTH || self.left == 0 {
            return false;
        }
        if *a == Value::Bool(false) || *b == Value::Bool(false) {
            return true;
        }
        let (Some(one), Some(other)) = (a.as_object(), b.as_object()) else { return false };
        self.differ(one, other, depth) || self.parts_exclude(one, b, depth) || self.parts_exclude(other, a, depth)
    }

    /// Whether what `one` is made of excludes `other`.
    fn parts_exclude(&mut self, one: &Map<String, Value>, other: &Value, depth: usize) -> bool {
        let list = |key: &str| one.get(key).and_then(Value::as_array).filter(|list| !list.is_empty());
        let root = self.root;
        let pointer = one.get("$ref").and_then(Value::as_str).and_then(|target| target.strip_prefix('#'));
        let target = pointer.and_then(|pointer| root.pointer(pointer));
        target.is_some_and(|target| self.exclude(target, other, depth + 1))
            || list("allOf").is_some_and(|all| all.iter().any(|part| self.exclude(part, other, depth + 1)))
            || ["anyOf", "oneOf"].into_iter().filter_map(list).any(|all| {
                // Each of them has to.
                all.iter().all(|part| self.exclude(part, other, depth + 1))
            })
    }

    /// Whether two objects exclude each other by what they say themselves.
    fn differ(&mut self, a: &Map<String, Value>, b: &Map<String, Value>, depth: usize) -> bool {
        if let (Some(of_a), Some(of_b)) = (types(a), types(b)) {
            if !of_a.iter().any(|one| of_b.iter().any(|other| overlap(one, other))) {
                return true;
            }
            if of_a == ["object"] && of_b == ["object"] && self.properties_exclude(a, b, depth) {
                return true;
            }
        }
        match (constants(a), constants(b)) {
            (Some(of_a), Some(of_b)) => !of_a.iter().any(|one| of_b.iter().any(|other| equal(one, other))),
            _ => false,
        }
    }

    fn properties_exclude(&mut self, a: &Map<String, Value>, b: &Map<String, Value>, depth: usize) -> bool {
        let names = [a, b].into_iter().filter_map(|schema| schema.get("required")?.as_array()).flatten();
        let names: Vec<&str> = names.filter_map(Value::as_str).collect();
        names.into_iter().any(|name| self.exclude(property(a, name), property(b, name), depth + 1))
    }
}

/// Anything goes.
static ANY: Value = Value::Bool(true);

/// The schema of a property.
fn property<'a>(schema: &'a Map<String, Value>, name: &str) -> &'a Value {
    let others = || match schema.contains_key("patternProperties") {
        true => &ANY,
        false => schema.get("additionalProperties").unwrap_or(&ANY),
    };
    schema.get("properties").and_then(|properties| properties.get(name)).unwrap_or_else(others)
}

/// The types that a schema names, or that its constants have.
fn types(schema: &Map<String, Value>) -> Option<Vec<&str>> {
    match schema.get("type") {
        Some(Value::String(one)) => Some(vec![one]),
        Some(Value::Array(all)) => all.iter().map(Value::as_str).collect(),
        _ => constants(schema).map(|all| all.into_iter().map(type_of).collect()),
    }
}

/// The only values that a schema allows, where it lists them.
fn constants(schema: &Map<String, Value>) -> Option<Vec<&Value>> {
    let listed = schema.get("enum").and_then(Value::as_array);
    schema.get("const").map(|one| vec![one]).or_else(|| listed.map(|all| all.iter().collect()))
}

fn type_of(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "boolean",
        Value::Number(_) => "number",
        Value::String(_) => "string",
        Value::Array(_) => "array",
        Value::Object(_) => "object",
    }
}

fn overlap(a: &str, b: &str) -> bool {
    let is_number = |name| name == "integer" || name == "number";
    a == b || (is_number(a) && is_number(b))
}

/// Whether two constants may be the same value: 1 is 1.0, and what has parts is not looked into.
fn equal(a: &Value, b: &Value) -> bool {
    match (a, b) {
        (Value::Number(a), Value::Number(b)) => a.as_f64() == b.as_f64(),
        (Value::Array(_), Value::Array(_)) | (Value::Object(_), Value::Object(_)) => true,
        (a, b) => a == b,
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn is_rewritten(alternatives: &Value) -> bool {
        let kind = |name: &str| json!({"type": "object", "properties": {"kind": {"const": name}, "n": {"type": "integer"}}, "required": ["kind"]});
        let schema = json!({"$defs": {"cat": kind("cat"), "dog": kind("dog"), "loop": {"$ref": "#/$defs/loop"}}, "oneOf": alternatives});
        as_any_of(&schema).get("anyOf").is_some()
    }

    #[test]
    fn alternatives_that_exclude_each_other_are_any_of_them() {
        for alternatives in [
            json!([{"type": "string"}, {"type": "integer"}, {"type": ["null", "array"]}]),
            json!([{"const": "a"}, {"enum": ["b", "c"]}, {"type": "null"}]),
            json!([{"$ref": "#/$defs/cat"}, {"$ref": "#/$defs/dog"}]),
            json!([{"$ref": "#/$defs/cat"}, {"anyOf": [{"$ref": "#/$defs/dog"}, {"type": "string"}]}]),
            json!([{"allOf": [{"$ref": "#/$defs/cat"}], "title": "x"}, {"$ref": "#/$defs/dog"}]),
            json!([
                {"type": "object", "properties": {"a": {}}, "required": ["a"], "additionalProperties": false},
                {"type": "object", "properties": {"b": {}}, "required": ["b"], "additionalProperties": false},
            ]),
        ] {
            assert!(is_rewritten(&alternatives), "{alternatives}");
        }
    }

    #[test]
    fn what_may_fit_two_stays() {
        for alternatives in [
            json!([{"type": "integer"}, {"type": "number"}]),
            json!([{"const": 1}, {"enum": [1.0, 2]}]),
            json!([{"type": "string"}, {"const": "a"}]),
            json!([{"$ref": "#/$defs/cat"}, {"type": "object"}]),
            json!([{"$ref": "#/$defs/loop"}, {"$ref": "#/$defs/loop"}]),
            json!([{"$ref": "https://example.com"}, {"$ref": "#/$defs/dog"}]),
            json!([{"properties": {"a": {"const": 1}}, "required": ["a"]}, {"properties": {"a": {"const": 2}}, "required": ["a"]}]),
            json!([{"type": "object", "properties": {"a": {"const": 1}}}, {"type": "object", "properties": {"a": {"const": 2}}}]),
            json!([true, {"type": "string"}]),
        ] {
            assert!(!is_rewritten(&alternatives), "{alternatives}");
        }
    }

    #[test]
    fn constants_and_names_are_no_schemas() {
        let schema = json!({
            "const": {"oneOf": [{"type": "null"}, {"type": "string"}]},
            "properties": {"oneOf": {"type": "string"}, "x": {"oneOf": [{"type": "null"}, {"type": "string"}]}},
        });
        let rewritten = as_any_of(&schema);
        assert_eq!(
            (&rewritten["const"], &rewritten["properties"]["oneOf"]),
            (&schema["const"], &json!({"type": "string"}))
        );
        assert_eq!(rewritten["properties"]["x"], json!({"anyOf": [{"type": "null"}, {"type": "string"}]}));
    }
}
