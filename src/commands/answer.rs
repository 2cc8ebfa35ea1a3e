//! One answer given out while it is made: text or JSON to stdout, progress and statistics to stderr, its routing to a file.

use std::io;
use std::ops::ControlFlow;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

use indicatif::ProgressBar;
use serde_json::json;
use st_grammar::Grammar;
use st_model::{Batch, Chat, FinishReason, GenerateOptions, Generation, Observer, Prompt, Routing, Session};

use super::receipt::Begun;
use super::routing::Recorder;
use super::{fit, plan, stats};
use crate::context::Context;
use crate::forecast::Forecast;
use crate::live::Live;
use crate::report::{Interrupted, OutputError};
use crate::ui;

/// How long a prompt is run before a bar shows how far it is.
const PATIENCE: Duration = Duration::from_secs(1);

/// How an answer is given out.
#[derive(Clone, Copy)]
pub(crate) struct Style {
    /// An object at the end instead of text as it is made.
    pub(crate) json: bool,
    /// Statistics on stderr at the end.
    pub(crate) stats: bool,
    /// A line of them that moves while an answer is made.
    pub(crate) live: bool,
    /// The seed, to be told in the object.
    pub(crate) seed: u64,
}

/// Where answers go, and who watches them being made.
pub(crate) struct Out<'a> {
    pub(crate) style: Style,
    /// When answers end.
    pub(crate) options: GenerateOptions,
    pub(crate) recorder: Option<&'a mut Recorder>,
    /// What answers have to fit.
    pub(crate) grammar: Option<Grammar>,
    /// What the only answer is proven by.
    pub(crate) receipt: Option<Begun>,
    /// How fast they were to be.
    pub(crate) forecast: Option<Forecast>,
    pub(crate) context: &'a Context,
}

impl Out<'_> {
    /// The answer to the only prompt.
    pub(crate) fn answer_once(&mut self, chat: &mut Chat, prompt: Prompt<'_>) -> anyhow::Result<ExitCode> {
        let answer = self.answer(chat, prompt)?;
        // An answer that was stopped is proven as far as it is there, if its prompt was read.
        if let Some(receipt) = self.receipt.take().filter(|_| !answer.ids.is_empty()) {
            let prompt = session_prompt(chat.session(), &answer);
            receipt.finish(chat.session().engine(), prompt, &self.options, &answer, self.context)?;
        }
        match answer.finish_reason {
            FinishReason::Cancelled => Err(Interrupted.into()),
            FinishReason::Stop | FinishReason::Length | FinishReason::Error => Ok(ExitCode::SUCCESS),
        }
    }

    /// Generates an answer and gives it out: text to stdout as it is made, or one JSON object.
    pub(crate) fn answer(&mut self, chat: &mut Chat, prompt: Prompt<'_>) -> anyhow::Result<Generation> {
        let Self { style, context, .. } = *self;
        let constraint = fit::constraint(self.grammar.as_ref());
        let mut failure: Option<OutputError> = None;
        let mut ends_line = true;
        let bar = ui::count_bar(context.ui, "reading the prompt", 0);
        let mut watch = Watch { bar: &bar, start: Instant::now(), recorder: self.recorder.as_deref_mut(), context };
        let engine = Arc::clone(chat.session().engine());
        let mut live = None;
        let outcome = chat.ask_within(prompt, &self.options, constraint, &mut watch, &mut |text| {
            if !bar.is_finished() {
                bar.finish_and_clear();
                live = style.live.then(|| Live::begin(&engine)).flatten();
            }
            if let Some(live) = &mut live {
                live.token(&engine);
            }
            if !style.json && !text.is_empty() {
                ends_line = text.ends_with('\n');
                if let Err(error) = ui::print(text) {
                    failure = Some(error);
                    return ControlFlow::Break(());
                }
            }
            context.interrupt.flow()
        });
        bar.finish_and_clear();
        drop(live);
        if let Some(error) = failure {
            return Err(error.into());
        }
        match outcome {
            Ok(answer) => {
                self.finish(chat.session(), &answer, ends_line)?;
                Ok(answer)
            }
            Err(error) => {
                // The error begins a line of its own, below what there is of the answer.
                if !ends_line {
                    ui::print("\n")?;
                }
                Err(error.into())
            }
        }
    }

    /// What follows the text of an answer.
    fn finish(&self, session: &Session, answer: &Generation, ends_line: bool) -> anyhow::Result<()> {
        let engine = session.engine();
        let ids = || answer.ids.iter().map(u32::to_string).collect::<Vec<_>>().join(",");
        if self.style.json {
            let mut stats = stats::json(&answer.stats, engine);
            if let Some(forecast) = &self.forecast {
                stats["forecast"] = plan::json(forecast);
            }
            let object = json!({
                "text": answer.text,
                "prompt_ids": session_prompt(session, answer),
                "ids": answer.ids,
                "finish_reason": answer.finish_reason,
                "seed": self.style.seed,
                "stats": stats,
            });
            ui::print_json(&object)?;
        } else if engine.tokenizer().is_none() {
            ui::print(&format!("{}\n", ids()))?;
        } else if !ends_line {
            ui::print("\n")?;
        }
        if self.style.stats {
            self.context.ui.say(stats::lines(&answer.stats, engine));
            if let Some(forecast) = &self.forecast {
                self.context.ui.say(stats::forecast_line(forecast));
            }
        }
        Ok(())
    }
}

/// Watches an answer being made: shows how far a long prompt is, records the routing, and stops on request.
struct Watch<'a> {
    bar: &'a ProgressBar,
    start: Instant,
    recorder: Option<&'a mut Recorder>,
    context: &'a Context,
}

impl Observer for Watch<'_> {
    fn routing(&mut self, layer: usize, batch: &Batch, routing: &Routing) -> io::Result<()> {
        self.recorder.as_mut().map_or(Ok(()), |recorder| recorder.routing(layer, batch, routing))
    }

    fn takes_drafts(&self) -> bool {
        // A trace holds the answer's tokens and no others.
        self.recorder.is_none()
    }

    fn progress(&mut self, done: usize, of: usize) -> ControlFlow<()> {
        if !self.bar.is_finished() && self.start.elapsed() > PATIENCE {
            self.bar.set_length(of as u64);
            self.bar.set_position(done as u64);
        }
        self.context.interrupt.flow()
    }
}

/// The ids of the prompt: what the session holds ahead of the answer.
fn session_prompt<'s>(session: &'s Session, answer: &Generation) -> &'s [u32] {
    let tokens = session.tokens();
    &tokens[..tokens.len() - answer.stats.generated_tokens.min(tokens.len())]
}
