//! `st-tool run`: one answer to a prompt, or a chat.

use std::io::{self, IsTerminal};
use std::path::Path;
use std::process::ExitCode;
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::Context as _;
use st_grammar::{Grammars, Source};
use st_model::sampler::{Sampler, SamplerOptions};
use st_model::{Chat, Engine, GenerateOptions, LoadOptions, ModelError, Prompt, Session};

use super::answer::{Out, Style};
use super::chat::Dialog;
use super::receipt::ReceiptFile;
use super::routing::RoutingFile;
use super::{engine, fit, session, tokens};
use crate::cli::{RunArgs, SamplingArgs, StatsName};
use crate::context::Context;
use crate::forecast::{self, Weights};
use crate::report::Advice;
use crate::signals::Interrupt;
use crate::{hot, input};

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
    let sampler = Sampler::new(options)?.with_bias(args.sampling.logit_bias.clone())?;
    let source = fit::source(args, context)?;
    let input = read_input(args, &context.interrupt)?;
    if args.receipt.is_some() && matches!(input, Input::Chat) {
        let message = "--receipt is of one answer, and this would be a chat";
        return Err(Advice::new(message, "-p TEXT or -f FILE gives a prompt").into());
    }
    let routing = args.record_routing.as_deref().map(RoutingFile::create).transpose()?;
    let receipt = args.receipt.as_deref().map(ReceiptFile::create).transpose()?;
    let file = engine::open(args.model.as_deref(), context)?;
    let smaller = |name| engine::Smaller::open(name, &args.engine, args.ctx, context);
    let smaller = args.draft_model.as_deref().map(smaller).transpose()?;
    let beside = source.as_ref().map_or(0, |_| Grammars::memory(engine::vocabulary(&file), 1))
        + smaller.as_ref().map_or(0, |smaller| smaller.bytes);
    let sparse_head = engine::sparse_head(&args.head, &file, context)?;
    let hot = engine::hot(&file, &args.engine, context);
    let load = LoadOptions { beside, sparse_head, hot, ..engine::options(&args.engine, args.ctx, args.kv_type) };
    // What is wrong with the file is for loading to say.
    let weights = Weights::of(&file).ok();
    let name = args.model.as_deref();
    let begin = |receipt: ReceiptFile| {
        let fit = source.as_ref().map(Source::to_json);
        receipt.begin(name, &file, engine::threads(&args.engine), (&sampler, fit), context)
    };
    let receipt = receipt.map(begin).transpose()?;
    let engine = engine::load_with(file, load, &engine::Loading(context), context)?;
    let mut recorder = routing.map(|file| file.begin(&engine)).transpose()?;
    let style = Style {
        json: args.json,
        stats: args.stats.is_some(),
        live: args.stats == Some(StatsName::Live),
        seed: options.seed,
    };
    let generate_options =
        GenerateOptions { max_tokens: args.max_tokens.0, stop: args.stop.clone(), hash_logits: receipt.is_some() };

    let mut session = Session::new(&engine)?.drafted(args.draft);
    if let Some(smaller) = smaller {
        session = session.drafted_by(smaller.load(&engine, options, context)?);
    }
    if let Some(path) = &args.session {
        session::load(path, &mut session, context)?;
    }
    let grammar = source.map(|source| fit::compile(&engine, &source)).transpose()?;
    let mut chat = Chat::over(session, sampler);
    chat.set_system(args.system.as_deref());
    let known = |weights| forecast::known(&context.env.store, &weights, &engine, engine::threads(&args.engine));
    let forecast = weights.and_then(known);
    let mut out =
        Out { style, options: generate_options, recorder: recorder.as_mut(), grammar, receipt, forecast, context };
    let outcome = match &input {
        Input::Chat => Dialog::new(&mut chat, args.raw, out).and_then(Dialog::run),
        Input::Ids(ids) => out.answer_once(&mut chat, Prompt::Ids(ids)),
        Input::Text(text) => prompt(&engine, text, args, context).and_then(|prompt| out.answer_once(&mut chat, prompt)),
    };
    hot::keep(&engine, context);
    // An answer that was stopped, or failed, was computed as far as it is there.
    let outcome = match &args.session {
        Some(path) => session::save(path, chat.session()).and(outcome),
        None => outcome,
    };
    match recorder {
        Some(recorder) => recorder.finish(outcome, context),
        None => outcome,
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

/// The text as a message, or as it is.
fn prompt<'t>(engine: &Engine, text: &'t str, args: &RunArgs, context: &Context) -> anyhow::Result<Prompt<'t>> {
    let empty = if args.raw { text.is_empty() } else { text.trim().is_empty() };
    if empty {
        return Err(Advice::new("the prompt is empty", "give a text with -p TEXT, -f FILE or on stdin").into());
    }
    if args.raw {
        return Ok(Prompt::Text(text));
    }
    if engine.tokenizer().is_some() && engine.chat_template().map_err(ModelError::from)?.is_none() {
        if args.system.is_some() {
            return Err(ModelError::NoChatTemplate).context("a system message needs a format");
        }
        context.ui.note("note: the file has no chat template: the text is continued as it is, as with --raw");
        return Ok(Prompt::Text(text));
    }
    Ok(Prompt::Message(text))
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
