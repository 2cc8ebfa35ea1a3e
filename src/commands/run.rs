//! `st-tool run`: one answer to a prompt, or a chat.

use std::io::{self, IsTerminal};
use std::ops::ControlFlow;
use std::path::Path;
use std::process::ExitCode;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use indicatif::ProgressBar;
use serde_json::json;
use st_grammar::{Grammar, Grammars};
use st_model::chat::{ChatError, Message, Role};
use st_model::sampler::{Sampler, SamplerOptions};
use st_model::{
    Batch, Engine, FinishReason, GenerateOptions, Generation, LoadOptions, Observer, Routing, Session, generate_within,
};

use super::chat::Chat;
use super::routing::{Recorder, RoutingFile};
use super::{engine, fit, session, stats, tokens};
use crate::cli::{RunArgs, SamplingArgs};
use crate::context::Context;
use crate::report::{Advice, Interrupted, OutputError};
use crate::signals::Interrupt;
use crate::{input, ui};

/// How long a prompt is run before a bar shows how far it is.
const PATIENCE: Duration = Duration::from_secs(1);

/// What there is to answer.
enum Input {
    Text(String),
    Ids(Vec<u32>),
    /// Lines typed at a terminal.
    Chat,
}

pub(crate) fn run(args: &RunArgs, context: &Context) -> anyhow::Result<ExitCode> {
    check_swallowed_model(args)?;
    args.session.as_deref().map_or(Ok(()), session::check)?;
    // Everything that can be wrong without the model is found before it is loaded.
    let options = sampler_options(&args.sampling);
    let mut sampler = Sampler::new(options)?.with_bias(args.sampling.logit_bias.clone())?;
    let source = fit::source(args, context)?;
    let input = read_input(args, &context.interrupt)?;
    let routing = args.record_routing.as_deref().map(RoutingFile::create).transpose()?;
    let file = engine::open(args.model.as_deref(), context)?;
    let beside = source.as_ref().map_or(0, |_| Grammars::memory(engine::vocabulary(&file), 1));
    let sparse_head = engine::sparse_head(&args.head, &file, context)?;
    let load = LoadOptions { beside, sparse_head, ..engine::options(&args.engine, args.ctx, args.kv_type) };
    let engine = engine::load_with(file, load, &engine::Loading(context), context)?;
    let mut recorder = routing.map(|file| file.begin(&engine)).transpose()?;
    let style = Style { json: args.json, stats: args.stats, seed: options.seed };
    let generate_options = GenerateOptions { max_tokens: args.max_tokens.0, stop: args.stop.clone() };

    let mut session = Session::new(&engine)?;
    if let Some(path) = &args.session {
        session::load(path, &mut session, context)?;
    }
    let grammar = source.map(|source| fit::compile(&engine, &source)).transpose()?;
    let out = Out { style, recorder: recorder.as_mut(), grammar, context };
    let outcome = match input {
        Input::Chat => Chat::new(&mut session, args, sampler, generate_options, out).and_then(Chat::run),
        Input::Ids(ids) => answer_once(&mut session, &ids, &mut sampler, &generate_options, out),
        Input::Text(text) => encode(&engine, &text, args, context)
            .and_then(|prompt| answer_once(&mut session, &prompt, &mut sampler, &generate_options, out)),
    };
    // An answer that was stopped, or failed, was computed as far as it is there.
    let outcome = match &args.session {
        Some(path) => session::save(path, &session).and(outcome),
        None => outcome,
    };
    match recorder {
        Some(recorder) => recorder.finish(outcome, context),
        None => outcome,
    }
}

/// The answer to the only prompt.
fn answer_once(
    session: &mut Session,
    prompt: &[u32],
    sampler: &mut Sampler,
    options: &GenerateOptions,
    mut out: Out<'_>,
) -> anyhow::Result<ExitCode> {
    let kept = session.keep_prefix(prompt);
    match out.answer(session, &prompt[kept..], sampler, options)?.finish_reason {
        FinishReason::Cancelled => Err(Interrupted.into()),
        FinishReason::Stop | FinishReason::Length | FinishReason::Error => Ok(ExitCode::SUCCESS),
    }
}

/// `--stop` takes several texts, so a MODEL written after them would be one of them, and another model would answer.
fn check_swallowed_model(args: &RunArgs) -> anyhow::Result<()> {
    let is_model = |text: &&String| text.ends_with(".gguf") || ["tiny", "4b", "21b"].contains(&text.as_str());
    match args.stop.last().filter(is_model) {
        Some(text) if args.model.is_none() => {
            let message = format!("{text:?} is taken as a text for --stop, and no MODEL is given");
            Err(Advice::new(message, "write the MODEL first: st-tool run MODEL --stop TEXT").into())
        }
        _ => Ok(()),
    }
}

/// How an answer is given out.
#[derive(Clone, Copy)]
pub(crate) struct Style {
    /// An object at the end instead of text as it is made.
    pub(crate) json: bool,
    /// Statistics on stderr at the end.
    pub(crate) stats: bool,
    /// The seed, to be told in the object.
    pub(crate) seed: u64,
}

/// Where answers go, and who watches them being made.
pub(crate) struct Out<'a> {
    pub(crate) style: Style,
    pub(crate) recorder: Option<&'a mut Recorder>,
    /// What answers have to fit.
    pub(crate) grammar: Option<Grammar>,
    pub(crate) context: &'a Context,
}

impl Out<'_> {
    /// Generates an answer and gives it out: text to stdout as it is made, or one JSON object.
    pub(crate) fn answer(
        &mut self,
        session: &mut Session,
        prompt: &[u32],
        sampler: &mut Sampler,
        options: &GenerateOptions,
    ) -> anyhow::Result<Generation> {
        let Self { style, context, .. } = *self;
        let constraint = fit::constraint(self.grammar.as_ref());
        let mut failure: Option<OutputError> = None;
        let mut ends_line = true;
        let bar = ui::count_bar(context.ui, "reading the prompt", prompt.len() as u64);
        let mut watch = Watch { bar: &bar, start: Instant::now(), recorder: self.recorder.as_deref_mut(), context };
        let outcome = generate_within(session, prompt, sampler, options, constraint, &mut watch, &mut |text| {
            if !bar.is_finished() {
                bar.finish_and_clear();
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
        if let Some(error) = failure {
            return Err(error.into());
        }
        match outcome {
            Ok(answer) => {
                self.finish(session, &answer, ends_line)?;
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
            let object = json!({
                "text": answer.text,
                "prompt_ids": session_prompt(session, answer),
                "ids": answer.ids,
                "finish_reason": answer.finish_reason,
                "seed": self.style.seed,
                "stats": stats::json(&answer.stats, engine),
            });
            ui::print_json(&object)?;
        } else if engine.tokenizer().is_none() {
            ui::print(&format!("{}\n", ids()))?;
        } else if !ends_line {
            ui::print("\n")?;
        }
        if self.style.stats {
            self.context.ui.say(stats::lines(&answer.stats, engine));
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

    fn progress(&mut self, done: usize, _: usize) -> ControlFlow<()> {
        if !self.bar.is_finished() && self.start.elapsed() > PATIENCE {
            self.bar.set_position(done as u64);
        }
        self.context.interrupt.flow()
    }
}

/// The prompt text as token ids: through the chat template, or as it is.
fn encode(engine: &Engine, text: &str, args: &RunArgs, context: &Context) -> anyhow::Result<Vec<u32>> {
    let tokenizer = engine.tokenizer().ok_or_else(no_tokenizer)?;
    let empty = if args.raw { text.is_empty() } else { text.trim().is_empty() };
    if empty {
        return Err(Advice::new("the prompt is empty", "give a text with -p TEXT, -f FILE or on stdin").into());
    }
    engine.check_texts(args.system.as_deref().into_iter().chain([text]))?;
    if args.raw {
        return Ok(tokenizer.encode_prompt(text, true)?);
    }
    let Some(template) = engine.chat_template().map_err(|error| bad_template(&error))? else {
        if args.system.is_some() {
            return Err(no_template("a system message needs one").into());
        }
        context.ui.note("note: the file has no chat template: the text is continued as it is, as with --raw");
        return Ok(tokenizer.encode_prompt(text, true)?);
    };
    let mut messages: Vec<Message> = Vec::new();
    messages.extend(args.system.as_ref().map(|system| Message::new(Role::System, system)));
    messages.push(Message::new(Role::User, text));
    let rendered = template.render(&messages, true).map_err(|error| bad_template(&error))?;
    Ok(tokenizer.encode_chat(&rendered)?)
}

/// What goes without a chat template.
const RAW: &str = "--raw -p TEXT continues a text as it is";

/// The error for text where there are only token ids.
pub(crate) fn no_tokenizer() -> Advice {
    Advice::new("the file has no tokenizer, so it takes no text", "--token-ids 1,2,3 takes the prompt as token ids")
}

/// The error for a chat where its format cannot be used.
pub(crate) fn bad_template(error: &ChatError) -> Advice {
    Advice::new(error.to_string(), RAW)
}

/// The error for a chat where there is no format for one.
pub(crate) fn no_template(why: &str) -> Advice {
    Advice::new(format!("the file has no chat template, and {why}"), RAW)
}

fn read_input(args: &RunArgs, interrupt: &Interrupt) -> anyhow::Result<Input> {
    if let Some(list) = &args.token_ids {
        return tokens::parse(list, interrupt).map(Input::Ids);
    }
    let text = match (&args.prompt, &args.file) {
        (Some(prompt), _) if prompt != "-" => return Ok(Input::Text(prompt.clone())),
        (None, Some(file)) => input::prompt(file, interrupt)?,
        (None, None) if io::stdin().is_terminal() => return Ok(Input::Chat),
        _ => input::prompt(Path::new("-"), interrupt)?,
    };
    Ok(Input::Text(without_last_break(text)))
}

/// Files and pipes end in a line break that is not part of the prompt.
fn without_last_break(mut text: String) -> String {
    if text.ends_with('\n') {
        text.pop();
        if text.ends_with('\r') {
            text.pop();
        }
    }
    text
}

fn sampler_options(args: &SamplingArgs) -> SamplerOptions {
    SamplerOptions {
        temperature: args.temp,
        top_k: args.top_k.0.unwrap_or(0),
        top_p: args.top_p,
        min_p: args.min_p,
        repeat_penalty: args.repeat_penalty,
        frequency_penalty: args.frequency_penalty,
        presence_penalty: args.presence_penalty,
        seed: args.seed.0.unwrap_or_else(any_seed),
    }
}

/// A seed that differs from run to run. Short, so that a person can copy it.
fn any_seed() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let mixed = (since.as_nanos() as u64 ^ u64::from(std::process::id()) << 32).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    mixed >> 32
}

/// The ids of the prompt: what the session holds ahead of the answer.
fn session_prompt<'s>(session: &'s Session, answer: &Generation) -> &'s [u32] {
    let tokens = session.tokens();
    &tokens[..tokens.len() - answer.stats.generated_tokens.min(tokens.len())]
}
