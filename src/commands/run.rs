//! `st-tool run`: one answer to a prompt, or a chat.

use std::io::{self, IsTerminal};
use std::ops::ControlFlow;
use std::path::Path;
use std::process::ExitCode;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use serde_json::json;
use st_model::chat::{ChatError, Message, Role};
use st_model::sampler::{Sampler, SamplerOptions};
use st_model::tokenizer::Tokenizer;
use st_model::{Engine, FinishReason, GenerateOptions, Generation, ModelError, Session, Step, generate};

use super::chat::Chat;
use super::routing::RoutingFile;
use super::{engine, stats, tokens};
use crate::cli::{RunArgs, SamplingArgs};
use crate::context::Context;
use crate::report::{Advice, Interrupted, OutputError};
use crate::signals::Interrupt;
use crate::text::MAX_PROMPT;
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
    // Everything that can be wrong without the model is found before it is loaded.
    let options = sampler_options(&args.sampling);
    let mut sampler = Sampler::new(options)?;
    let input = read_input(args, &context.interrupt)?;
    let routing = args.record_routing.as_deref().map(RoutingFile::create).transpose()?;
    let engine = engine::load(args.model.as_deref(), &args.engine, args.ctx, args.kv_type, context)?;
    let recorder = routing.map(|file| file.begin(&engine)).transpose()?;
    let style = Style { json: args.json, stats: args.stats, seed: options.seed };
    let generate_options = GenerateOptions { max_tokens: args.max_tokens.0, stop: args.stop.clone() };

    let mut session = Session::new(&engine)?;
    if let Some(recorder) = &recorder {
        recorder.attach(&mut session);
    }
    let outcome = match input {
        Input::Chat => Chat::new(session, args, sampler, generate_options, style, context).and_then(Chat::run),
        Input::Ids(ids) => answer_once(session, &ids, &mut sampler, &generate_options, style, context),
        Input::Text(text) => encode(&engine, &text, args, context)
            .and_then(|prompt| answer_once(session, &prompt, &mut sampler, &generate_options, style, context)),
    };
    match recorder {
        Some(recorder) => recorder.finish(outcome, context),
        None => outcome,
    }
}

/// The answer to the only prompt.
fn answer_once(
    mut session: Session<'_>,
    prompt: &[u32],
    sampler: &mut Sampler,
    options: &GenerateOptions,
    style: Style,
    context: &Context,
) -> anyhow::Result<ExitCode> {
    match answer(&mut session, prompt, sampler, options, style, context)?.finish_reason {
        FinishReason::Cancelled => Err(Interrupted.into()),
        FinishReason::Stop | FinishReason::Length => Ok(ExitCode::SUCCESS),
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

/// Generates an answer and gives it out: text to stdout as it is made, or one JSON object.
pub(crate) fn answer(
    session: &mut Session<'_>,
    prompt: &[u32],
    sampler: &mut Sampler,
    options: &GenerateOptions,
    style: Style,
    context: &Context,
) -> anyhow::Result<Generation> {
    let engine = session.engine();
    let mut failure: Option<OutputError> = None;
    let mut ends_line = true;
    let (bar, start) = (ui::count_bar(context.ui, "reading the prompt", prompt.len() as u64), Instant::now());
    let answer = generate(session, prompt, sampler, options, &mut |step| {
        match step {
            Step::Prompt(done) if start.elapsed() > PATIENCE => bar.set_position(done as u64),
            Step::Prompt(_) => {}
            Step::Text(text) => {
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
            }
        }
        context.interrupt.flow()
    });
    bar.finish_and_clear();
    let answer = answer?;
    if let Some(error) = failure {
        return Err(error.into());
    }
    let ids = || answer.ids.iter().map(u32::to_string).collect::<Vec<_>>().join(",");
    if style.json {
        let object = json!({
            "text": answer.text,
            "prompt_ids": session_prompt(session, &answer),
            "ids": answer.ids,
            "finish_reason": answer.finish_reason,
            "seed": style.seed,
            "stats": stats::json(&answer.stats, engine),
        });
        ui::print_json(&object)?;
    } else if engine.tokenizer().is_none() {
        ui::print(&format!("{}\n", ids()))?;
    } else if !ends_line {
        ui::print("\n")?;
    }
    if style.stats {
        context.ui.say(stats::lines(&answer.stats, engine));
    }
    Ok(answer)
}

/// The prompt text as token ids: through the chat template, or as it is.
fn encode(engine: &Engine, text: &str, args: &RunArgs, context: &Context) -> anyhow::Result<Vec<u32>> {
    let tokenizer = engine.tokenizer().ok_or_else(no_tokenizer)?;
    let empty = if args.raw { text.is_empty() } else { text.trim().is_empty() };
    if empty {
        return Err(Advice::new("the prompt is empty", "give a text with -p TEXT, -f FILE or on stdin").into());
    }
    check_length(engine, tokenizer, text)?;
    if args.raw {
        return Ok(tokenizer.encode_prompt(text, true)?);
    }
    let Some(template) = engine.chat_template().map_err(bad_template)? else {
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

/// Refuses a text that the context cannot hold before anything is made of it: rendering and encoding take several times
/// its size. Texts so short that this takes no memory to speak of are left to the model.
pub(crate) fn check_length(engine: &Engine, tokenizer: &Tokenizer, text: &str) -> anyhow::Result<()> {
    const SHORT: usize = 64 << 10;
    if text.len() <= SHORT.max(engine.ctx()) {
        return Ok(());
    }
    let least = text.len() / tokenizer.longest_token().max(1);
    let needed = if least > engine.ctx() { least } else { tokenizer.count_to(text, engine.ctx() + 1)? };
    match needed > engine.ctx() {
        true => Err(ModelError::ContextFull { needed, ctx: engine.ctx() }.into()),
        false => Ok(()),
    }
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
        (None, Some(file)) => input::text(file, MAX_PROMPT, interrupt)?,
        (None, None) if io::stdin().is_terminal() => return Ok(Input::Chat),
        _ => input::text(Path::new("-"), MAX_PROMPT, interrupt)?,
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
fn session_prompt<'s>(session: &'s Session<'_>, answer: &Generation) -> &'s [u32] {
    let tokens = session.tokens();
    &tokens[..tokens.len() - answer.stats.generated_tokens.min(tokens.len())]
}
