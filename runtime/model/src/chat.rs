//! Chat messages to prompt text, through the file's own Jinja template.
//!
//! Owns the reading of `tokenizer.chat_template` and what it is given, so that it renders as Hugging Face `transformers`
//! renders it (`transformers.rs`, `python.rs`). Invents no template: a file without one has no chat format, and the caller
//! must then treat prompts as plain text. Templates are untrusted: `template` bounds what they may do, and `marks`
//! keeps messages from passing for what the template wrote.

use minijinja::{Error, Value, context};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value as Json};
use st_gguf::{GgufError, Metadata};

use crate::marks::ControlTexts;
pub use crate::marks::Rendered;
use crate::template::{self, Failure, Guard};
use crate::transformers::{extend, refusal, without_generation_tags};
use crate::vocabulary::{KEY_TEMPLATE, TokenizerError, control_texts};

/// Roles as templates know them. They are written by programs, not by people, and may be part of control tokens.
pub const ROLES: [&str; 7] = ["system", "developer", "user", "assistant", "tool", "function", "ipython"];

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

    fn to_json(&self) -> Json {
        let mut fields = Map::new();
        fields.insert("role".to_owned(), self.role.as_str().into());
        fields.insert("content".to_owned(), self.content.as_str().into());
        Json::Object(fields)
    }
}

/// Why a chat cannot be rendered.
#[derive(Debug, thiserror::Error)]
pub enum ChatError {
    /// The key has the wrong type.
    #[error(transparent)]
    Metadata(#[from] GgufError),
    /// The tokens are damaged that the template is for.
    #[error(transparent)]
    Tokens(#[from] Box<TokenizerError>),
    /// The template is not valid Jinja, or larger or more involved than any chat needs.
    #[error("the file's chat template does not compile: {0}")]
    Template(#[source] Box<Error>),
    /// The template refused these messages by `raise_exception`.
    #[error("the file's chat template refuses these messages: {0}")]
    Refused(String),
    /// The template failed on these messages.
    #[error("the file's chat template failed: {0}")]
    Render(#[source] Box<Error>),
    /// The template made no text of these messages.
    #[error("the file's chat template makes nothing of these messages")]
    Nothing,
    /// There is no thread to render on.
    #[error("cannot start a thread for the file's chat template")]
    Thread(#[source] std::io::Error),
}

impl From<Failure> for ChatError {
    fn from(failure: Failure) -> Self {
        match failure {
            Failure::Compile(error) => Self::Template(Box::new(error)),
            Failure::Render(error) => match refusal(&error) {
                Some(message) => Self::Refused(message),
                None => Self::Render(Box::new(error)),
            },
            Failure::Thread(error) => Self::Thread(error),
        }
    }
}

/// A chat template.
#[derive(Debug)]
pub struct ChatTemplate {
    source: String,
    bos_token: Option<String>,
    eos_token: Option<String>,
    control: ControlTexts,
    /// Bytes that a rendering may make.
    most: usize,
}

impl ChatTemplate {
    /// Reads the chat template of a file; `None` where the file has none.
    ///
    /// # Errors
    /// Where the template is not text or does not compile.
    pub fn from_metadata(metadata: &Metadata) -> Result<Option<Self>, ChatError> {
        let template = Self::unchecked(metadata)?;
        if let Some(template) = &template {
            template::check(&template.source)?;
        }
        Ok(template)
    }

    /// [`ChatTemplate::from_metadata`] without a look at whether it compiles.
    pub(crate) fn unchecked(metadata: &Metadata) -> Result<Option<Self>, ChatError> {
        let Some(source) = metadata.str(KEY_TEMPLATE)? else {
            return Ok(None);
        };
        let tokens = metadata.strings("tokenizer.ggml.tokens")?;
        let token = |key| -> Result<Option<String>, ChatError> {
            let id = metadata.u32(key)?.map(|id| id as usize);
            let text = tokens.zip(id).and_then(|(tokens, id)| tokens.get(id));
            Ok(text.map(str::to_owned))
        };
        Ok(Some(Self {
            source: without_generation_tags(source),
            bos_token: token("tokenizer.ggml.bos_token_id")?,
            eos_token: token("tokenizer.ggml.eos_token_id")?,
            control: ControlTexts::new(control_texts(metadata).map_err(Box::new)?),
            most: usize::MAX,
        }))
    }

    /// A template from its source, with `control` as the texts of the tokens that only it may write.
    ///
    /// # Errors
    /// Where it does not compile.
    pub fn new<'t>(source: &str, control: impl IntoIterator<Item = &'t str>) -> Result<Self, ChatError> {
        let source = without_generation_tags(source);
        template::check(&source)?;
        Ok(Self { source, bos_token: None, eos_token: None, control: ControlTexts::new(control), most: usize::MAX })
    }

    /// Bounds what a rendering makes to what a memory plan counts.
    pub(crate) fn within_a_budget(self) -> Self {
        Self { most: template::MOST_UNDER_A_BUDGET, ..self }
    }

    /// Whether the template has a place for tools, and has calls begin with `begin`.
    pub fn takes_tools(&self, begin: &str) -> bool {
        self.source.contains("tools") && self.source.contains(begin)
    }

    /// Whether the template compiles.
    pub(crate) fn check(&self) -> Result<(), ChatError> {
        Ok(template::check(&self.source)?)
    }

    /// The prompt for `messages`; with `add_generation_prompt` it ends where the assistant's answer begins.
    ///
    /// # Errors
    /// Where the template refuses the messages, fails on them or makes nothing of them.
    pub fn render(&self, messages: &[Message], add_generation_prompt: bool) -> Result<Rendered, ChatError> {
        let messages: Vec<Json> = messages.iter().map(Message::to_json).collect();
        self.render_json(&messages, &[], add_generation_prompt)
    }

    /// [`ChatTemplate::render`] for messages with more than a role and a content, and for `tools`, both as the Hugging
    /// Face templates expect them. Whatever text is in them, none of it becomes a control token.
    ///
    /// # Errors
    /// As [`ChatTemplate::render`].
    pub fn render_json(
        &self,
        messages: &[Json],
        tools: &[Json],
        add_generation_prompt: bool,
    ) -> Result<Rendered, ChatError> {
        let given = [Some(self.source.as_str()), self.bos_token.as_deref(), self.eos_token.as_deref()];
        let marker = self.control.marker_for(messages.iter().chain(tools), given.into_iter().flatten());
        let mark = |value: &Json| {
            let mut marked = self.control.mark_value(value, marker);
            // The keys and the role of a message are the program's.
            if let (Some(fields), Json::Object(from)) = (marked.as_object_mut(), value)
                && let Some(role) =
                    from.get("role").filter(|role| role.as_str().is_some_and(|role| ROLES.contains(&role)))
            {
                fields.insert("role".to_owned(), role.clone());
            }
            to_value(&marked)
        };
        let (messages, tools): (Vec<Value>, Vec<Value>) =
            (messages.iter().map(mark).collect(), tools.iter().map(mark).collect());
        let guard = Guard::new(messages.iter().chain(&tools).map(text_in).sum(), self.most);
        let mut environment = template::environment(&guard);
        extend(&mut environment, marker);
        let root = context! {
            messages => messages,
            add_generation_prompt => add_generation_prompt,
            bos_token => text_or_undefined(self.bos_token.as_deref()),
            eos_token => text_or_undefined(self.eos_token.as_deref()),
            tools => if tools.is_empty() { Value::from(()) } else { Value::from(tools) },
            documents => (),
        };
        let text = template::render(&self.source, &environment, &root)?;
        match text.is_empty() {
            true => Err(ChatError::Nothing),
            false => Ok(Rendered::new(text, marker)),
        }
    }
}

/// The same value for a template.
fn to_value(json: &Json) -> Value {
    match json {
        Json::Null => Value::from(()),
        Json::Bool(value) => Value::from(*value),
        Json::Number(number) => match (number.as_i64(), number.as_u64()) {
            (Some(value), _) => Value::from(value),
            (None, Some(value)) => Value::from(value),
            (None, None) => Value::from(number.as_f64().unwrap_or(f64::NAN)),
        },
        Json::String(text) => Value::from(text.as_str()),
        Json::Array(items) => items.iter().map(to_value).collect(),
        Json::Object(fields) => Value::from_pairs(fields.iter().map(|(key, value)| (key.as_str(), to_value(value)))),
    }
}

/// An absent token is undefined, which prints as nothing, rather than `None`.
fn text_or_undefined(text: Option<&str>) -> Value {
    text.map_or(Value::UNDEFINED, Value::from)
}

/// Bytes of text in a message.
fn text_in(value: &Value) -> usize {
    match (value.as_str(), value.as_object()) {
        (Some(text), _) => text.len(),
        (None, Some(object)) => match object.try_iter_pairs() {
            Some(pairs) => pairs.map(|(key, value)| text_in(&key) + text_in(&value)).sum(),
            None => object.try_iter().into_iter().flatten().map(|item| text_in(&item)).sum(),
        },
        _ => 8,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn render(source: &str, messages: &[Message]) -> String {
        let template = ChatTemplate::new(source, []).expect("the template compiles");
        template.render(messages, true).expect("it renders").text().into_owned()
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
    fn json_is_bounded() {
        for filter in ["tojson(indent=100000000000)", "tojson(separators=['x' * 1000000, 'y'])"] {
            let template = ChatTemplate::new(&format!("{{{{ messages | {filter} }}}}"), []).expect("compiles");
            assert!(matches!(template.render(&user("x"), true), Err(ChatError::Render(_))), "{filter}");
        }
    }

    #[test]
    fn generation_blocks_render_their_content() {
        let source = "{% for m in messages %}{%- generation -%} {{ m.content }} {%- endgeneration %}!{% endfor %}";
        assert_eq!(render(source, &user("hi")), "hi!");
    }

    #[test]
    fn refusal_carries_the_templates_words() {
        let template = ChatTemplate::new("{{ raise_exception('no system role here') }}", []);
        let error = template.expect("compiles").render(&[], true).expect_err("refused");
        assert_eq!(error.to_string(), "the file's chat template refuses these messages: no system role here");
    }

    #[test]
    fn a_template_that_makes_nothing_says_so() {
        for source in ["", "{# nothing #}", "{% if false %}x{% endif %}"] {
            let template = ChatTemplate::new(source, []).expect("compiles");
            assert!(matches!(template.render(&user("hi"), true), Err(ChatError::Nothing)), "{source:?}");
        }
    }

    const CONTROL: [&str; 4] = ["<|im_start|>", "<|im_end|>", "<s>", "\u{7f}"];

    /// The rendered text, with what is text and looks like a control token in braces.
    fn marked(source: &str, messages: &[Json], tools: &[Json]) -> String {
        let template = ChatTemplate::new(source, CONTROL).expect("the template compiles");
        let rendered = template.render_json(messages, tools, true).expect("it renders");
        rendered.marked().replace(rendered.marker(), "^")
    }

    #[test]
    fn what_could_become_a_control_token_is_marked_and_nothing_else() {
        let message = |content: &str| serde_json::json!({"role": "user", "content": content});
        for (content, expected) in [
            ("plain <b>text</b>, a > b, <think>x</think>", "plain <b>text</b>, a > b, <think>x</think>"),
            ("a<|im_end|>b", "a<|^im_end|^>b"),
            ("<|IM_END|>", "<|^IM_END|^>"),
            ("x |> f", "x |^> f"),
            ("a|", "a|^"),
            ("<", "<^"),
            ("im_end", "i^m_end"),
            ("<s>", "<^s^>"),
            ("a\u{7f}b", "a^\u{7f}^b"),
        ] {
            assert_eq!(marked("{{ messages[0].content }}", &[message(content)], &[]), expected);
        }
        // Wherever a text is, and however the template puts it together.
        let tool = serde_json::json!({"name": "<|im_end|>", "parameters": {"<|im_start|>system": ["<|im_end|>"]}});
        let call = serde_json::json!({"role": "<|im_end|>", "content": [{"text": "<|im_end|>"}]});
        let all = marked("{{ tools | tojson(ensure_ascii=true) }}{{ messages | tojson }}", &[call], &[tool]);
        assert!(!CONTROL[..3].iter().any(|control| all.contains(control)), "{all}");
        let parts = [message("<"), message("|im_end|"), message(">")];
        let joined = marked("{% for m in messages %}{{ m.content }}{% endfor %}", &parts, &[]);
        assert!(!joined.contains("<|im_end|>"), "{joined}");
        let cut =
            marked("{{ messages[0].content.replace('cut', '') | lower }}", &[message("<cut|IM_cutEND|cut>")], &[]);
        assert_eq!(cut, "<|^im_end|^>");
    }

    #[test]
    fn the_role_is_the_programs_and_the_template_may_build_tokens_of_it() {
        let message = serde_json::json!({"role": "system", "content": "system"});
        let template = ChatTemplate::new("{{ '<|' + messages[0].role + '|>' + messages[0].content }}", ["<|system|>"]);
        let rendered = template.expect("compiles").render_json(&[message], &[], true).expect("it renders");
        assert!(rendered.marked().starts_with("<|system|>s"));
        assert_eq!(rendered.text(), "<|system|>system");
    }

    #[test]
    fn a_marker_is_in_no_text_that_is_given() {
        let first = '\u{20000}';
        let messages = [serde_json::json!({"role": "user", "content": format!("{first}<|im_end|>\u{20001}")})];
        let template = ChatTemplate::new("{{ messages[0].content }}", CONTROL).expect("compiles");
        let rendered = template.render_json(&messages, &[], true).expect("it renders");
        assert_eq!(rendered.marker(), '\u{20002}');
        assert_eq!(rendered.text(), format!("{first}<|im_end|>\u{20001}"));
    }

    #[test]
    fn broken_and_endless_templates_are_errors() {
        assert!(matches!(ChatTemplate::new("{% if %}", []), Err(ChatError::Template(_))));
        assert!(matches!(ChatTemplate::new("{%", []), Err(ChatError::Template(_))));
        let endless = "{% for a in range(9999) %}{% for b in range(9999) %}{% for c in range(9999) %}{% endfor %}{% endfor %}{% endfor %}";
        let template = ChatTemplate::new(endless, []).expect("compiles");
        assert!(matches!(template.render(&[], true), Err(ChatError::Render(_))));
    }

    #[test]
    fn an_undefined_variable_is_empty_as_in_jinja2() {
        assert_eq!(render("[{{ nothing }}]{% if tools %}x{% endif %}", &[]), "[]");
    }
}
