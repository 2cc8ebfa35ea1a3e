//! Chat messages to prompt text, through the file's own Jinja template.
//!
//! Owns the reading of `tokenizer.chat_template` and an environment in which it renders as Hugging Face
//! `transformers` renders it: whitespace control, Python string methods, `tojson`, `raise_exception`,
//! `strftime_now`, `{% generation %}`. Invents no template: a file without one has no chat format, and the caller
//! must then treat prompts as plain text. Templates are untrusted and run on bounded fuel.

use std::time::SystemTime;

use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Rest};
use minijinja::{Environment, Error, ErrorKind, Value, context};
use minijinja_contrib::pycompat::unknown_method_callback;
use serde::{Deserialize, Serialize};
use st_gguf::{GgufError, Metadata};

use crate::python;

const KEY_TEMPLATE: &str = "tokenizer.chat_template";
const TEMPLATE: &str = "chat_template";
/// Instructions one rendering may take: some hundred times what a long chat needs.
const FUEL: u64 = 5_000_000;

/// Who says a message.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// Sets the behaviour of the assistant.
    System,
    /// The person.
    User,
    /// The model.
    Assistant,
}

impl Role {
    /// The name templates know it by.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::System => "system",
            Self::User => "user",
            Self::Assistant => "assistant",
        }
    }
}

/// One message of a chat.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Message {
    /// Who says it.
    pub role: Role,
    /// What is said.
    pub content: String,
}

impl Message {
    /// A message of `role` saying `content`.
    pub fn new(role: Role, content: impl Into<String>) -> Self {
        let content = content.into();
        Self { role, content }
    }

    fn to_value(&self) -> Value {
        Value::from_pairs([("role", self.role.as_str()), ("content", self.content.as_str())])
    }
}

/// Why a chat cannot be rendered.
#[derive(Debug, thiserror::Error)]
pub enum ChatError {
    /// The key has the wrong type.
    #[error(transparent)]
    Metadata(#[from] GgufError),
    /// The template is not valid Jinja.
    #[error("the file's chat template does not compile: {0}")]
    Template(#[source] Box<Error>),
    /// The template refused these messages by `raise_exception`.
    #[error("the file's chat template refuses these messages: {0}")]
    Refused(String),
    /// The template failed on these messages.
    #[error("the file's chat template failed: {0}")]
    Render(#[source] Box<Error>),
}

/// A compiled chat template.
#[derive(Debug)]
pub struct ChatTemplate {
    environment: Environment<'static>,
    bos_token: Option<String>,
    eos_token: Option<String>,
}

impl ChatTemplate {
    /// Reads the chat template of a file; `None` where the file has none.
    ///
    /// # Errors
    /// Where the template is not text or does not compile.
    pub fn from_metadata(metadata: &Metadata) -> Result<Option<Self>, ChatError> {
        let Some(source) = metadata.str(KEY_TEMPLATE)? else {
            return Ok(None);
        };
        let tokens = metadata.strings("tokenizer.ggml.tokens")?;
        let token = |key| -> Result<Option<String>, ChatError> {
            let id = metadata.u32(key)?.map(|id| id as usize);
            let text = tokens.zip(id).and_then(|(tokens, id)| tokens.get(id));
            Ok(text.map(str::to_owned))
        };
        let mut template = Self::new(source)?;
        template.bos_token = token("tokenizer.ggml.bos_token_id")?;
        template.eos_token = token("tokenizer.ggml.eos_token_id")?;
        Ok(Some(template))
    }

    /// Compiles a template from its source.
    ///
    /// # Errors
    /// Where it does not compile.
    pub fn new(source: &str) -> Result<Self, ChatError> {
        let compile_error = |error| ChatError::Template(Box::new(error));
        let mut environment = Environment::new();
        let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
        environment.set_syntax(syntax.map_err(compile_error)?);
        environment.set_fuel(Some(FUEL));
        environment.set_unknown_method_callback(unknown_method_callback);
        environment.add_filter("tojson", to_json);
        environment.add_function("raise_exception", |message: String| {
            Err::<Value, _>(Error::new(ErrorKind::InvalidOperation, REFUSED).with_source(Refusal(message)))
        });
        environment.add_function("strftime_now", |format: String| python::strftime(&format, SystemTime::now()));
        environment.add_template_owned(TEMPLATE, without_generation_tags(source)).map_err(compile_error)?;
        Ok(Self { environment, bos_token: None, eos_token: None })
    }

    /// The prompt text for `messages`; with `add_generation_prompt` it ends where the assistant's answer begins.
    ///
    /// # Errors
    /// Where the template refuses the messages, or fails on them.
    pub fn render(&self, messages: &[Message], add_generation_prompt: bool) -> Result<String, ChatError> {
        let messages: Vec<Value> = messages.iter().map(Message::to_value).collect();
        let template = self.environment.get_template(TEMPLATE);
        let rendered = template.and_then(|template| {
            template.render(context! {
                messages => messages,
                add_generation_prompt => add_generation_prompt,
                bos_token => text_or_undefined(self.bos_token.as_deref()),
                eos_token => text_or_undefined(self.eos_token.as_deref()),
                tools => (),
                documents => (),
            })
        });
        rendered.map_err(|error| match refusal(&error) {
            Some(message) => ChatError::Refused(message),
            None => ChatError::Render(Box::new(error)),
        })
    }
}

/// An absent token is undefined, which prints as nothing, rather than `None`.
fn text_or_undefined(text: Option<&str>) -> Value {
    text.map_or(Value::UNDEFINED, Value::from)
}

const REFUSED: &str = "raise_exception";

/// Carries the message of `raise_exception` through the template engine's error.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct Refusal(String);

fn refusal(error: &Error) -> Option<String> {
    let mut cause: Option<&(dyn std::error::Error + 'static)> = Some(error);
    while let Some(error) = cause {
        if let Some(Refusal(message)) = error.downcast_ref::<Refusal>() {
            return Some(message.clone());
        }
        cause = error.source();
    }
    None
}

/// `json.dumps` with the defaults that `transformers` gives it.
fn to_json(value: Value, positional: Rest<Value>, kwargs: Kwargs) -> Result<Value, Error> {
    let ensure_ascii = match (positional.first(), kwargs.get::<Option<bool>>("ensure_ascii")?) {
        (Some(first), _) => first.is_true(),
        (None, keyword) => keyword.unwrap_or(false),
    };
    let options = python::JsonOptions {
        ensure_ascii,
        indent: kwargs.get::<Option<usize>>("indent")?,
        separators: kwargs.get::<Option<Vec<String>>>("separators")?,
        sort_keys: kwargs.get::<Option<bool>>("sort_keys")?.unwrap_or(false),
    };
    kwargs.assert_all_used()?;
    let json = serde_json::to_value(&value).map_err(|error| {
        Error::new(ErrorKind::BadSerialization, "cannot write this value as JSON").with_source(error)
    })?;
    // Marked safe so that no later escaping touches it.
    Ok(Value::from_safe_string(python::json_dumps(&json, &options)))
}

/// Rewrites `{% generation %}` … `{% endgeneration %}` (which only marks a span for training) as a block that is
/// always rendered, whitespace control kept.
fn without_generation_tags(source: &str) -> String {
    let mut out = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(open) = rest.find("{%") {
        let (before, tag) = rest.split_at(open + 2);
        out.push_str(before);
        rest = tag;
        let Some(close) = tag.find("%}") else { break };
        let inner = &tag[..close];
        let word = inner.trim_matches(|c: char| c.is_whitespace() || c == '-' || c == '+');
        let replacement = match word {
            "generation" => "if true",
            "endgeneration" => "endif",
            _ => continue,
        };
        out.push_str(&inner.replacen(word, replacement, 1));
        rest = &tag[close..];
    }
    out.push_str(rest);
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn render(source: &str, messages: &[Message]) -> String {
        let template = ChatTemplate::new(source).expect("the template compiles");
        template.render(messages, true).expect("it renders")
    }

    fn user(content: &str) -> Vec<Message> {
        vec![Message::new(Role::User, content)]
    }

    #[test]
    fn chatml_as_the_golden_says() {
        let golden: serde_json::Value =
            serde_json::from_str(include_str!("../../../tests/golden/tokenizer_vectors.json"))
                .expect("the golden parses");
        let config: serde_json::Value =
            serde_json::from_str(include_str!("../../../models/tiny/checkpoint/tokenizer_config.json"))
                .expect("the configuration parses");
        let messages: Vec<Message> = serde_json::from_value(golden["chat"]["messages"].clone()).expect("messages");
        let source = config["chat_template"].as_str().expect("a template");
        assert_eq!(render(source, &messages), golden["chat"]["rendered"].as_str().expect("text"));
    }

    // Expected strings made with transformers 4.x's `apply_chat_template` environment
    // (ImmutableSandboxedEnvironment, trim_blocks, lstrip_blocks).
    #[test]
    fn whitespace_as_transformers() {
        let source = "{%- for m in messages %}\n  {{- m.role }}:\n  {% if true %}\n  {{ m.content }}\n  {% endif %}\n{%- endfor %}\n";
        assert_eq!(render(source, &user("x")), "user:\n  x\n");
        assert_eq!(render("a\n", &[]), "a");
        assert_eq!(render("a\n\n", &[]), "a\n");
    }

    #[test]
    fn python_methods_and_loop_controls() {
        let source = "{% for m in messages %}{% if m.content.startswith('skip') %}{% continue %}{% endif %}{{ m.content.strip().split('|')[-1] }}{% endfor %}";
        let mut messages = user("skip me");
        messages.extend(user(" a|b "));
        assert_eq!(render(source, &messages), "b");
    }

    #[test]
    fn json_as_python_writes_it() {
        let json = |filter: &str| render(&format!("{{{{ messages | {filter} }}}}"), &user("<é & 'q'>\n"));
        assert_eq!(json("tojson"), r#"[{"role": "user", "content": "<é & 'q'>\n"}]"#);
        assert_eq!(
            json("tojson(ensure_ascii=True, sort_keys=true)"),
            r#"[{"content": "<\u00e9 & 'q'>\n", "role": "user"}]"#
        );
        assert_eq!(
            json("tojson(indent=2)"),
            "[\n  {\n    \"role\": \"user\",\n    \"content\": \"<é & 'q'>\\n\"\n  }\n]"
        );
        assert_eq!(json("tojson(separators=(',', ':'))"), r#"[{"role":"user","content":"<é & 'q'>\n"}]"#);
    }

    #[test]
    fn generation_blocks_render_their_content() {
        let source = "{% for m in messages %}{%- generation -%} {{ m.content }} {%- endgeneration %}!{% endfor %}";
        assert_eq!(render(source, &user("hi")), "hi!");
    }

    #[test]
    fn refusal_carries_the_templates_words() {
        let template = ChatTemplate::new("{{ raise_exception('no system role here') }}");
        let error = template.expect("compiles").render(&[], true).expect_err("refused");
        assert_eq!(error.to_string(), "the file's chat template refuses these messages: no system role here");
    }

    #[test]
    fn broken_and_endless_templates_are_errors() {
        assert!(matches!(ChatTemplate::new("{% if %}"), Err(ChatError::Template(_))));
        assert!(matches!(ChatTemplate::new("{%"), Err(ChatError::Template(_))));
        let endless = "{% for a in range(9999) %}{% for b in range(9999) %}{% for c in range(9999) %}{% endfor %}{% endfor %}{% endfor %}";
        let template = ChatTemplate::new(endless).expect("compiles");
        assert!(matches!(template.render(&[], true), Err(ChatError::Render(_))));
    }

    #[test]
    fn an_undefined_variable_is_empty_as_in_jinja2() {
        assert_eq!(render("[{{ nothing }}]{% if tools %}x{% endif %}", &[]), "[]");
    }
}
