//! One module per verb: resolve the arguments, call a crate, render its result.

mod answer;
mod bench;
mod cache_sim;
mod chat;
mod check;
mod download;
mod engine;
mod fit;
mod inspect;
mod layout;
mod list;
mod logits;
mod perplexity;
mod plan;
mod predictor;
mod profile;
mod quantize;
mod receipt;
mod routing;
mod run;
mod serve;
mod session;
mod shell;
mod stats;
mod tokenize;
mod tokens;

use std::path::Path;
use std::process::ExitCode;

use st_convert::{Difference, WeightType};
use st_gguf::{Kind, Layout, check_output};

use crate::cli::{Command, LayoutName, TypeName};
use crate::context::Context;
use crate::report::Advice;
use crate::ui;

/// Runs one command; the exit status is its own where it distinguishes outcomes.
pub(crate) fn run(command: Command, context: &Context) -> anyhow::Result<ExitCode> {
    match command {
        Command::Download(args) => download::run(&args, context),
        Command::Quantize(args) => quantize::run(&args, context),
        Command::Layout(args) => layout::run(&args, context),
        Command::Run(args) => run::run(&args, context),
        Command::Serve(args) => serve::run(&args, context),
        Command::Bench(args) => bench::run(&args, context),
        Command::CacheSim(args) => cache_sim::run(&args, context),
        Command::Logits(args) => logits::run(&args, context),
        Command::Inspect(args) => inspect::run(&args, context),
        Command::Perplexity(args) => perplexity::run(&args, context),
        Command::Plan(args) => plan::run(&args, context),
        Command::Profile(args) => profile::run(&args, context),
        Command::Verify(args) => receipt::verify(&args, context),
        Command::Tokenize(args) => tokenize::run(&args, context),
        Command::List(args) => list::run(&args, context),
        Command::Rm(args) => list::rm(&args, context),
        Command::Completions(args) => shell::completions(&args),
        Command::Man(args) => shell::man(&args, context),
    }
}

/// Whether a conversion of `input` may be written to `output`.
fn check_converted(output: &Path, force: bool, input: Option<&Path>) -> anyhow::Result<()> {
    if let Some(input) = input.filter(|input| st_sys::same_path(input, output)) {
        let message = format!("{} is the file that is read: it would be lost", output.display());
        let also = if input == output { String::new() } else { format!(" (it is {}, too)", input.display()) };
        return Err(Advice::new(message + &also, "name another file for the output").into());
    }
    Ok(check_output(output, Kind::GGUF, force)?)
}

/// Tells how the file `with` differs from what would be written; a status of its own where it does.
fn show_differences(with: &Path, differences: &[Difference], context: &Context) -> anyhow::Result<ExitCode> {
    if differences.is_empty() {
        context.ui.note(format_args!("{}: every tensor is equal", with.display()));
        return Ok(ExitCode::SUCCESS);
    }
    let lines: String = differences.iter().map(|difference| format!("{difference}\n")).collect();
    ui::print(&lines)?;
    Ok(ExitCode::FAILURE)
}

impl From<TypeName> for WeightType {
    fn from(name: TypeName) -> Self {
        match name {
            TypeName::Q4_0 => Self::Q4_0,
            TypeName::Q8_0 => Self::Q8_0,
            TypeName::F16 => Self::F16,
            TypeName::Bf16 => Self::BF16,
            TypeName::F32 => Self::F32,
        }
    }
}

impl From<LayoutName> for Layout {
    fn from(name: LayoutName) -> Self {
        match name {
            LayoutName::Gguf => Self::Gguf,
            LayoutName::Offload => Self::Offload,
        }
    }
}
