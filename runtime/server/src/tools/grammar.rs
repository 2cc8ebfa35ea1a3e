//! The grammar that an answer with tools fits.

use std::fmt::Write as _;

use serde_json::{Value, json};
use st_grammar::{GrammarError, Source, embedded};

use super::{CLOSE, Choice, Fit, OPEN};

/// What the answer has to fit; `None` where anything goes.
///
/// # Errors
/// Where a schema is too large or too deep.
pub(crate) fn source(fit: &Fit) -> Result<Option<Source>, GrammarError> {
    let tools = &fit.tools;
    if tools.tools.is_empty() {
        return Ok(fit.format.clone());
    }
    // Text in which no call begins, and text up to where one does: at the beginning of a line, so that it is read again as it was made.
    let no_call = format!("~/(?s:.*){OPEN}(?s:.*)/");
    let text = format!("TEXT: /(?s:.+)/ & {no_call}\n");
    let lead = format!("lead[lazy]: LEAD \"{OPEN}\"\nLEAD: /(?s:([^\\n].*\\n)?)/ & {no_call}\n");
    let free = match &fit.format {
        None => ("TEXT?".to_owned(), text),
        Some(Source::Schema(schema)) => format_rule(schema)?,
        Some(Source::JsonObject) => format_rule(&json!({"type": "object"}))?,
        Some(Source::Lark(_)) => return Err(GrammarError::Source("a grammar and tools at once".to_owned())),
    };
    let (start, rules) = match (&tools.choice, &fit.format) {
        (Choice::Never, _) => (free.0, free.1),
        (Choice::Auto, None) => (format!("{} | lead calls", free.0), free.1 + &lead),
        (Choice::Auto, Some(_)) => (format!("{} | \"{OPEN}\" calls", free.0), free.1),
        (Choice::Always | Choice::One(_), _) => (format!("\"{OPEN}\" calls"), String::new()),
    };
    let mut lark = format!("start: {start}\n{rules}");
    if tools.may_call() {
        lark += &calls(fit)?;
    }
    Ok(Some(Source::Lark(lark)))
}

fn format_rule(schema: &Value) -> Result<(String, String), GrammarError> {
    Ok(("format".to_owned(), format!("format: %json {}\n", embedded(schema)?)))
}

/// The rules of calls, the first of which has begun.
fn calls(fit: &Fit) -> Result<String, GrammarError> {
    let tools = &fit.tools;
    let allowed = tools.tools.iter().enumerate().filter(|(_, tool)| match &tools.choice {
        Choice::One(name) => tool.name == *name,
        _ => true,
    });
    let (mut names, mut rules) = (Vec::new(), String::new());
    for (index, tool) in allowed {
        names.push(format!("call{index}"));
        let begin = Value::from(format!("\n{{\"name\": \"{}\", \"arguments\": ", tool.name));
        let end = Value::from(format!("}}\n{CLOSE}"));
        let schema = object(&tool.parameters);
        let _ = writeln!(rules, "call{index}: {begin} args{index} {end}\nargs{index}: %json {}", embedded(&schema)?);
    }
    let several = tools.parallel && !matches!(tools.choice, Choice::One(_));
    let more = if several { format!(" (\"\\n{OPEN}\" call)*") } else { String::new() };
    Ok(format!("calls: call{more}\ncall: {}\n{rules}", names.join(" | ")))
}

/// Arguments are an object, whatever else their schema says.
fn object(schema: &Value) -> Value {
    let mut schema = schema.clone();
    if schema.get("type").is_none() && schema.get("$ref").is_none() && schema.get("anyOf").is_none() {
        schema["type"] = "object".into();
    }
    schema
}

#[cfg(test)]
mod tests {
    use st_grammar::Grammars;
    use st_model::{Constraint as _, Engine, LoadOptions};

    use super::super::{Tool, Tools};
    use super::*;
    use crate::fields::Fields;

    /// How far a text goes that fits, and whether it may end there.
    fn follow(engine: &Engine, grammars: &Grammars, source: &Source, text: &str) -> (usize, bool) {
        let mut fit = grammars.compile(source).expect("a grammar").constraint();
        let tokenizer = engine.tokenizer().expect("a tokenizer");
        let (mut at, mut ends) = (0, false);
        loop {
            for id in fit.forced().expect("it goes on") {
                ends |= engine.end_ids().contains(&id);
                let bytes = tokenizer.visible_bytes(id);
                match text.as_bytes()[at..].starts_with(bytes) {
                    true => at += bytes.len(),
                    false => return (at, ends),
                }
            }
            if ends {
                return (at, true);
            }
            let allowed = fit.allowed().expect("it goes on").to_vec();
            let may = |id: u32| allowed[id as usize / 32] & 1 << (id % 32) != 0;
            let begins = |&id: &u32| {
                let bytes = tokenizer.token_bytes(id).unwrap_or_default();
                may(id)
                    && !engine.end_ids().contains(&id)
                    && !bytes.is_empty()
                    && text.as_bytes()[at..].starts_with(bytes)
            };
            // The longest first, so that what a token may hold of the next part is tried, too.
            let ids = (0..engine.n_vocab() as u32).filter(begins);
            let Some(id) = ids.max_by_key(|&id| tokenizer.token_bytes(id).map(<[u8]>::len)) else {
                return (at, engine.end_ids().iter().any(|&id| may(id)));
            };
            at += tokenizer.token_bytes(id).map_or(0, <[u8]>::len);
            fit.accept(id).expect("it is allowed");
        }
    }

    #[test]
    fn a_call_holds_from_where_it_begins() {
        let engine = Engine::open("../../models/tiny/tiny-q4_0.gguf", &LoadOptions::default()).expect("a model");
        let grammars = Grammars::new(&engine).expect("tokens");
        let schema = json!({"type": "object", "properties": {"at": {"enum": ["home", "work"]}}, "required": ["at"], "additionalProperties": false});
        let fit = |choice: Choice, parallel: bool, format: Option<Source>| {
            let mut fields = Fields::of(json!({"name": "look", "parameters": schema}), "").expect("an object");
            let tool = Tool::take(&mut fields, "parameters").expect("a tool");
            let tools = Tools::new(vec![tool], choice, parallel).expect("tools");
            source(&Fit { tools, format }).expect("a source").expect("a grammar")
        };
        let call = "<tool_call>\n{\"name\": \"look\", \"arguments\": {\"at\": \"home\"}}\n</tool_call>";
        let whole = |source: &Source, text: &str| follow(&engine, &grammars, source, text) == (text.len(), true);
        let auto = fit(Choice::Auto, true, None);
        for text in [
            "",
            "I look.",
            "a < b, <tool> and\n\n<tool_",
            call,
            &format!("I look.\n{call}"),
            &format!("\u{e9}\n\n{call}\n{call}"),
        ] {
            assert!(whole(&auto, text), "{text}");
        }
        for (text, most) in [
            ("I look.\n<tool_call>\nI ", "I look.\n<tool_call>\n".len()),
            ("<tool_call>\n{\"name\": \"other", "<tool_call>\n{\"name\": \"".len()),
            (&format!("I look. {call}"), "I look. <tool_call".len()),
            (&format!("{call} Done."), call.len()),
        ] {
            let (at, _) = follow(&engine, &grammars, &auto, text);
            assert!(at <= most, "{text}: {at}");
        }
        assert!(!whole(&fit(Choice::Auto, false, None), &format!("{call}\n{call}")));
        assert!(whole(&fit(Choice::Never, true, None), "I look.") && !whole(&fit(Choice::Never, true, None), call));
        for choice in [Choice::Always, Choice::One("look".to_owned())] {
            let forced = fit(choice, true, None);
            assert!(whole(&forced, call) && follow(&engine, &grammars, &forced, "I look.").0 == 0);
        }
        let formed = fit(Choice::Auto, true, Some(Source::Schema(json!({"enum": [1, 2]}))));
        assert!(whole(&formed, "1") && whole(&formed, call) && !whole(&formed, "3"));
    }
}
