//! A chat: messages, the file's template, and what was run of them already.
//!
//! Owns that a turn runs only what the turns before have not run, and which messages stay when an answer fails or is
//! stopped: what the person has read is part of the conversation, and a question without an answer is not.

use std::ops::ControlFlow;
use std::sync::Arc;

use crate::answer::GenerateOptions;
use crate::chat::{ChatTemplate, Message, Role};
use crate::engine::Engine;
use crate::error::ModelError;
use crate::generate::{GenerateError, Generation, generate};
use crate::observer::Observer;
use crate::sampler::{Sampler, SamplerOptions};
use crate::session::Session;
use crate::tokenizer::Tokenizer;

/// A conversation in messages with a model whose file has a tokenizer and a chat template.
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
        Ok(Self { session: Session::new(engine)?, sampler: Sampler::new(options)?, messages: Vec::new() })
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
        let mut session = Session::new(self.session.engine())?;
        *session.sequence_mut() = self.session.sequence().fork();
        Ok(Self { session, sampler: self.sampler.clone(), messages: self.messages.clone() })
    }

    /// Says `text` and has it answered; [`generate()`](crate::generate()) has `observer` and `on_text`.
    ///
    /// # Errors
    /// As [`generate()`](crate::generate()); [`ModelError::Chat`] where the template refuses the messages.
    pub fn ask(
        &mut self,
        text: &str,
        options: &GenerateOptions,
        observer: &mut dyn Observer,
        on_text: &mut dyn FnMut(&str) -> ControlFlow<()>,
    ) -> Result<Generation, GenerateError> {
        self.messages.push(Message::new(Role::User, text));
        let outcome = self.answer(options, observer, on_text);
        let answer = outcome.as_ref().unwrap_or_else(|failed| failed.answer());
        if answer.is_cut_off() && answer.text.is_empty() {
            self.messages.pop();
        } else {
            self.messages.push(Message::new(Role::Assistant, &answer.text));
        }
        outcome
    }

    fn answer(
        &mut self,
        options: &GenerateOptions,
        observer: &mut dyn Observer,
        on_text: &mut dyn FnMut(&str) -> ControlFlow<()>,
    ) -> Result<Generation, GenerateError> {
        let (tokenizer, template) = needs(self.session.engine())?;
        let rendered = template.render(&self.messages, true).map_err(|error| ModelError::Chat(Arc::new(error)))?;
        let ids = tokenizer.encode_chat(&rendered).map_err(ModelError::from)?;
        let kept = self.session.keep_prefix(&ids);
        generate(&mut self.session, &ids[kept..], &mut self.sampler, options, observer, on_text)
    }
}

/// What only chats need.
fn needs(engine: &Engine) -> Result<(&Tokenizer, &ChatTemplate), ModelError> {
    let template = engine.chat_template()?.ok_or(ModelError::NoChatTemplate)?;
    Ok((engine.tokenizer().ok_or(ModelError::NoTokenizer)?, template))
}
