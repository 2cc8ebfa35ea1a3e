//! One conversation: what was said, the file's template, and what was run of it already.
//!
//! Owns that a turn runs only what the turns before have not run, and which messages stay when an answer fails or is
//! stopped: what the person has read is part of the conversation, and a question without an answer is not.

use std::ops::ControlFlow;
use std::sync::Arc;

use crate::answer::GenerateOptions;
use crate::chat::{ChatTemplate, Message, Role};
use crate::constraint::Constraint;
use crate::engine::Engine;
use crate::error::ModelError;
use crate::generate::{GenerateError, Generation, generate_within};
use crate::observer::Observer;
use crate::sampler::{Sampler, SamplerOptions};
use crate::session::Session;
use crate::tokenizer::Tokenizer;

/// What is to be answered.
#[derive(Clone, Copy, Debug)]
pub enum Prompt<'a> {
    /// The next message. The file's template makes a prompt of it and of all messages before it.
    Message(&'a str),
    /// A text that is continued as it is, whatever was said before.
    Text(&'a str),
    /// Tokens that are continued.
    Ids(&'a [u32]),
}

impl<'a> Prompt<'a> {
    fn text(self) -> Option<&'a str> {
        match self {
            Self::Message(text) | Self::Text(text) => Some(text),
            Self::Ids(_) => None,
        }
    }
}

/// A conversation with a model: messages where the file has a tokenizer and a chat template, or texts to be continued.
#[derive(Debug)]
pub struct Chat {
    session: Session,
    sampler: Sampler,
    messages: Vec<Message>,
}

impl Chat {
    /// A conversation without a message.
    ///
    /// # Errors
    /// [`ModelError::NoTokenizer`], [`ModelError::NoChatTemplate`], [`ModelError::Chat`] where the file's cannot be used, and
    /// sampler options out of range.
    pub fn new(engine: &Arc<Engine>, options: SamplerOptions) -> Result<Self, ModelError> {
        needs(engine)?;
        Ok(Self::over(Session::new(engine)?, Sampler::new(options)?))
    }

    /// A conversation in `session`, which may hold what was run before: what a prompt has in common with that is not run again.
    /// Whether the file takes messages or texts shows when one is asked.
    pub fn over(session: Session, sampler: Sampler) -> Self {
        Self { session, sampler, messages: Vec::new() }
    }

    /// The messages so far.
    pub fn messages(&self) -> &[Message] {
        &self.messages
    }

    /// The messages so far, to be added to or exchanged. What stays at their beginning is not run again.
    pub fn messages_mut(&mut self) -> &mut Vec<Message> {
        &mut self.messages
    }

    /// The tokens and the engine.
    pub fn session(&self) -> &Session {
        &self.session
    }

    /// A second conversation that begins as this one and goes its own way. The two share the memory of what they have in
    /// common.
    ///
    /// # Errors
    /// Where buffers cannot be allocated.
    pub fn fork(&self) -> Result<Self, ModelError> {
        let mut session = Session::new(self.session.engine())?.drafted(self.session.draft_limit());
        *session.sequence_mut() = self.session.sequence().fork();
        Ok(Self { session, sampler: self.sampler.clone(), messages: self.messages.clone() })
    }

    /// Exchanges the system message, or takes it away, for all answers from now on.
    pub fn set_system(&mut self, text: Option<&str>) {
        let message = text.map(|text| Message::new(Role::System, text));
        self.messages.splice(..self.system(), message);
    }

    /// Messages that are the system's, at the beginning: one or none.
    fn system(&self) -> usize {
        usize::from(self.messages.first().is_some_and(|first| first.role == Role::System))
    }

    /// Forgets all that was said and run, but not the system message.
    pub fn clear(&mut self) {
        self.messages.truncate(self.system());
        self.session.reset();
    }

    /// Says `text` as the next message and has it answered; [`generate()`](crate::generate()) has `observer` and `on_text`.
    ///
    /// # Errors
    /// As [`Chat::ask_within`].
    pub fn ask(
        &mut self,
        text: &str,
        options: &GenerateOptions,
        observer: &mut dyn Observer,
        on_text: &mut dyn FnMut(&str) -> ControlFlow<()>,
    ) -> Result<Generation, GenerateError> {
        self.ask_within(Prompt::Message(text), options, None, observer, on_text)
    }

    /// Has `prompt` answered, by what fits `constraint` where there is one.
    ///
    /// # Errors
    /// As [`generate()`](crate::generate()); [`ModelError::NoTokenizer`] and [`ModelError::NoChatTemplate`] where the prompt
    /// needs one; [`ModelError::Chat`] where the template refuses the messages; [`ModelError::ContextFull`] before it is asked.
    pub fn ask_within(
        &mut self,
        prompt: Prompt<'_>,
        options: &GenerateOptions,
        constraint: Option<Box<dyn Constraint>>,
        observer: &mut dyn Observer,
        on_text: &mut dyn FnMut(&str) -> ControlFlow<()>,
    ) -> Result<Generation, GenerateError> {
        self.messages.extend(prompt.text().map(|text| Message::new(Role::User, text)));
        let outcome = self.encode(prompt).map_err(GenerateError::from).and_then(|ids| {
            let kept = self.session.keep_prefix(&ids);
            let (session, sampler) = (&mut self.session, &mut self.sampler);
            generate_within(session, &ids[kept..], sampler, options, constraint, observer, on_text)
        });
        let answer = outcome.as_ref().unwrap_or_else(|failed| failed.answer());
        match prompt {
            Prompt::Ids(_) => {}
            _ if answer.is_cut_off() && answer.text.is_empty() => drop(self.messages.pop()),
            _ => self.messages.push(Message::new(Role::Assistant, &answer.text)),
        }
        outcome
    }

    /// The tokens of a prompt whose message, where it is one, has been said. What no context holds is refused first.
    fn encode(&self, prompt: Prompt<'_>) -> Result<Vec<u32>, ModelError> {
        let engine = self.session.engine();
        match prompt {
            Prompt::Ids(ids) => Ok(ids.to_vec()),
            Prompt::Text(text) => {
                let tokenizer = engine.tokenizer().ok_or(ModelError::NoTokenizer)?;
                engine.check_texts([text].into_iter())?;
                Ok(tokenizer.encode_prompt(text, true)?)
            }
            Prompt::Message(_) => {
                let (tokenizer, template) = needs(engine)?;
                engine.check_texts(self.messages.iter().map(|message| message.content.as_str()))?;
                Ok(tokenizer.encode_chat(&template.render(&self.messages, true).map_err(Arc::new)?)?)
            }
        }
    }
}

/// What only chats need.
fn needs(engine: &Engine) -> Result<(&Tokenizer, &ChatTemplate), ModelError> {
    let tokenizer = engine.tokenizer().ok_or(ModelError::NoTokenizer)?;
    Ok((tokenizer, engine.chat_template()?.ok_or(ModelError::NoChatTemplate)?))
}
