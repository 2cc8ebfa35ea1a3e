//! `st-tool tokenize`: text to token ids, and back.

use std::io::{self, Write as _};
use std::path::Path;
use std::process::ExitCode;

use serde_json::json;
use st_model::ModelError;
use st_model::tokenizer::Tokenizer;

use super::tokens;
use crate::cli::TokenizeArgs;
use crate::context::Context;
use crate::models::Model;
use crate::report::{Advice, OutputError};
use crate::{input, ui};

pub(crate) fn run(args: &TokenizeArgs, context: &Context) -> anyhow::Result<ExitCode> {
    let file = Model::resolve(&args.model)?.open_gguf(context)?;
    let tokenizer = Tokenizer::from_metadata(&file.header.metadata)?.ok_or(ModelError::NoTokenizer)?;
    let text = match (&args.prompt, &args.file) {
        (Some(prompt), _) if prompt != "-" => prompt.clone(),
        (_, Some(file)) => input::prompt(file, &context.interrupt)?,
        _ => input::prompt(Path::new("-"), &context.interrupt)?,
    };
    let ids = match args.decode {
        true => tokens::ids(&text)?,
        false => tokenizer.encode(&text, !args.plain)?,
    };
    let vocab = tokenizer.vocab_size();
    if let Some(id) = ids.iter().find(|&&id| id as usize >= vocab) {
        let message = format!("there is no token {id}: the vocabulary has {vocab}");
        return Err(Advice::new(message, "ids are those of this model, as tokenize prints them").into());
    }
    let bytes = |id: u32| tokenizer.token_bytes(id).unwrap_or_default();
    if args.json {
        let tokens = ids.iter().map(|&id| json!({"id": id, "text": String::from_utf8_lossy(bytes(id))}));
        ui::print_json(&json!({ "tokens": tokens.collect::<Vec<_>>() }))?;
    } else if args.decode {
        let text: Vec<u8> = ids.iter().flat_map(|&id| bytes(id)).copied().collect();
        print_text(&text)?;
    } else {
        let list: Vec<String> = ids.iter().map(u32::to_string).collect();
        ui::print(&format!("{}\n", list.join(",")))?;
    }
    Ok(ExitCode::SUCCESS)
}

/// The bytes as they are; at a terminal, text.
fn print_text(text: &[u8]) -> Result<(), OutputError> {
    if io::IsTerminal::is_terminal(&io::stdout()) {
        return ui::print(&format!("{}\n", String::from_utf8_lossy(text)));
    }
    let mut out = io::stdout().lock();
    out.write_all(text).and_then(|()| out.flush()).map_err(OutputError)
}
