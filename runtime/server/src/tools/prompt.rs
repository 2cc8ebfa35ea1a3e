//! How the model is told of tools where its own template has no place for them: Qwen's form, in a system message, and calls and
//! results as text.

use std::io::{self, Write};

use serde::Serialize as _;
use serde_json::ser::{Formatter, Serializer};
use serde_json::{Value, json};

use super::{CLOSE, OPEN, Tools};

/// A call as text. Arguments are a text of JSON, and stay as they are: so the text is the one that was made.
pub(crate) fn call_text(name: &str, arguments: &str) -> String {
    format!("{OPEN}\n{{\"name\": {}, \"arguments\": {arguments}}}\n{CLOSE}", Value::from(name))
}

/// Messages in which tools, calls and results are text, for a template that knows none of them.
pub(crate) fn told(messages: Vec<Value>, tools: &Tools) -> Vec<Value> {
    let mut out: Vec<Value> = Vec::with_capacity(messages.len() + 1);
    let mut latest_is_result = false;
    for message in messages {
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        let (role, content) = (text(&message["role"]), text(&message["content"]));
        let is_result = role == "tool" || role == "function";
        if is_result {
            let result = format!("<tool_response>\n{content}\n</tool_response>");
            match out.last_mut().filter(|_| latest_is_result) {
                // Results that follow each other are one message.
                Some(last) => last["content"] = format!("{}\n{result}", text(&last["content"])).into(),
                None => out.push(json!({"role": "user", "content": result})),
            }
        } else {
            out.push(json!({"role": role, "content": content_with_calls(&message)}));
        }
        latest_is_result = is_result;
    }
    if !tools.tools.is_empty() {
        tell(&mut out, tools);
    }
    out
}

/// Messages for a template that knows tools and results: calls alone are text, so that they stay as they were made.
pub(crate) fn with_calls_as_text(mut messages: Vec<Value>) -> Vec<Value> {
    for message in messages.iter_mut().filter(|message| message["tool_calls"].is_array()) {
        let content = content_with_calls(message);
        if let Some(fields) = message.as_object_mut() {
            fields.remove("tool_calls");
            fields.insert("content".to_owned(), content.into());
        }
    }
    messages
}

/// What a message says, and its calls, each in a line of its own.
fn content_with_calls(message: &Value) -> String {
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let calls = message["tool_calls"].as_array().into_iter().flatten();
    let calls = calls.map(|call| {
        let function = &call["function"];
        call_text(&text(&function["name"]), &arguments(&function["arguments"]))
    });
    let content = Some(text(&message["content"])).filter(|text| !text.is_empty());
    content.into_iter().chain(calls).collect::<Vec<_>>().join("\n")
}

/// Arguments as text, as they came; an object as JSON.
fn arguments(value: &Value) -> String {
    match value {
        Value::String(text) if text.trim().is_empty() => "{}".to_owned(),
        Value::String(text) => text.clone(),
        other => spaced(other),
    }
}

/// JSON as the grammar of calls has it made: a blank after each comma and colon.
pub(crate) fn spaced(value: &Value) -> String {
    struct Spaced;
    impl Formatter for Spaced {
        fn begin_array_value<W: ?Sized + Write>(&mut self, out: &mut W, first: bool) -> io::Result<()> {
            if first { Ok(()) } else { out.write_all(b", ") }
        }

        fn begin_object_key<W: ?Sized + Write>(&mut self, out: &mut W, first: bool) -> io::Result<()> {
            if first { Ok(()) } else { out.write_all(b", ") }
        }

        fn begin_object_value<W: ?Sized + Write>(&mut self, out: &mut W) -> io::Result<()> {
            out.write_all(b": ")
        }
    }
    let mut bytes = Vec::new();
    match value.serialize(&mut Serializer::with_formatter(&mut bytes, Spaced)) {
        Ok(()) => String::from_utf8_lossy(&bytes).into_owned(),
        Err(_) => value.to_string(),
    }
}

/// Puts the tools into the system message.
fn tell(messages: &mut Vec<Value>, tools: &Tools) {
    let list: Vec<String> = tools.json().iter().map(Value::to_string).collect();
    let told = format!(
        "# Tools\n\nYou may call one or more functions to assist with the user query.\n\nYou are provided with function signatures \
         within <tools></tools> XML tags:\n<tools>\n{}\n</tools>\n\nFor each function call, return a json object with function name \
         and arguments within {OPEN}{CLOSE} XML tags:\n{OPEN}\n{{\"name\": <function-name>, \"arguments\": \
         <args-json-object>}}\n{CLOSE}",
        list.join("\n")
    );
    match messages.first_mut().filter(|first| first["role"] == "system") {
        Some(first) => {
            let system = first["content"].as_str().unwrap_or_default();
            first["content"] = format!("{system}\n\n{told}").into();
        }
        None => messages.insert(0, json!({"role": "system", "content": told})),
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Choice, Tool};
    use super::*;
    use crate::fields::Fields;

    #[test]
    fn calls_and_results_are_text_as_it_was_made() {
        let mut fields = Fields::of(json!({"name": "look", "description": "Looks."}), "").expect("an object");
        let tool = Tool::take(&mut fields, "parameters").expect("a tool");
        let tools = Tools::new(vec![tool], Choice::Auto, true).expect("tools");
        let messages = vec![
            json!({"role": "system", "content": "Be short."}),
            json!({"role": "user", "content": "Look."}),
            json!({"role": "assistant", "content": "I look.", "tool_calls": [
                {"id": "1", "function": {"name": "look", "arguments": "{\"at\":  1}"}},
                {"id": "2", "function": {"name": "look", "arguments": {}}},
            ]}),
            json!({"role": "tool", "tool_call_id": "1", "content": "A cat."}),
            json!({"role": "tool", "tool_call_id": "2", "content": "A dog."}),
        ];
        let told = told(messages, &tools);
        let system = told[0]["content"].as_str().expect("a text");
        assert!(system.starts_with("Be short.\n\n# Tools\n\n") && system.contains("<tools>\n{\"type\":\"function\""));
        assert_eq!(
            told[2]["content"],
            "I look.\n<tool_call>\n{\"name\": \"look\", \"arguments\": {\"at\":  1}}\n</tool_call>\n\
             <tool_call>\n{\"name\": \"look\", \"arguments\": {}}\n</tool_call>"
        );
        assert_eq!(
            told[3],
            json!({"role": "user", "content": "<tool_response>\nA cat.\n</tool_response>\n<tool_response>\nA dog.\n</tool_response>"})
        );
        assert_eq!(told.len(), 4);
        assert_eq!(spaced(&json!({"a": [1, {"b": "x, y: z"}], "c": 1.5})), r#"{"a": [1, {"b": "x, y: z"}], "c": 1.5}"#);
    }
}
