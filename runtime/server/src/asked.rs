//! A chat that is asked to go on, whatever API it came by: messages, tools and a format to jobs.

use std::sync::Arc;

use serde_json::Value;
use st_grammar::Source;

use crate::answers::Answers;
use crate::app::App;
use crate::error::ApiError;
use crate::prepare;
use crate::sampling::Sampling;
use crate::tools::{self, Fit};

/// What is asked.
pub(crate) struct Asked {
    /// In the form of chat completions: roles that templates know, and content that is text.
    pub(crate) messages: Vec<Value>,
    /// What they are called in the request.
    pub(crate) param: &'static str,
    pub(crate) fit: Fit,
    /// The field that says what format an answer has.
    pub(crate) format_param: &'static str,
    pub(crate) sampling: Sampling,
}

impl Asked {
    /// Hands the jobs to the queue. Returns their events, and the tokens of the prompt.
    ///
    /// # Errors
    /// What is wrong with the request, or why there is no room for it.
    pub(crate) async fn submit(self, app: &App) -> Result<(Answers, usize), ApiError> {
        let (tokens, engine) = (Arc::clone(&app.tokens), Arc::clone(app.engine()?));
        let jobs = prepare::apart(app, move |_| {
            let ids = prepare::chat(&engine, self.messages, &self.fit.tools, self.param)?;
            let mut jobs = self.sampling.jobs(&engine, &ids, self.param)?;
            let param = if self.fit.tools.tools.is_empty() { self.format_param } else { "tools" };
            let source = tools::source(&self.fit).map_err(|error| ApiError::field(param, error.to_string()))?;
            let fit = source.as_ref().map(Source::to_json);
            let grammar = source.map(|source| tokens.compile(&engine, &source, param)).transpose()?;
            jobs.iter_mut().for_each(|job| job.grammar = grammar.clone());
            if self.sampling.receipt {
                jobs.iter_mut().for_each(|job| job.prove(&engine, fit.clone()));
            }
            Ok(jobs)
        });
        let jobs = jobs.await?;
        let prompt = jobs.first().map_or(0, |job| job.prompt.len());
        let answers = app.queue.submit(jobs).inspect_err(|_| app.metrics.refused.add(1))?;
        Ok((Answers::new(answers), prompt))
    }
}
