//! `st-tool layout`: rearranges the experts of a converted file.

use std::process::ExitCode;

use st_convert::{RelayoutOptions, relayout};

use super::check_converted;
use crate::cli::LayoutArgs;
use crate::context::Context;
use crate::models::not_stdin;
use crate::size::show_size;
use crate::ui::ConvertBar;
use st_sys::available_threads;

pub(crate) fn run(args: &LayoutArgs, context: &Context) -> anyhow::Result<ExitCode> {
    let options = RelayoutOptions {
        to: args.to.into(),
        threads: args.threads.0.unwrap_or_else(available_threads),
        overwrite: args.force,
    };
    not_stdin(&args.input)?;
    check_converted(&args.output, args.force, Some(&args.input))?;
    let bar = ConvertBar::new(context.ui, "rearranging");
    let written = relayout(&args.input, &options, &args.output, &bar, context.interrupt.cancel())?;
    drop(bar);
    for warning in &written.warnings {
        context.ui.note(format_args!("note: {warning}"));
    }
    context.ui.note(format_args!(
        "{}: {}; every weight is bit for bit what it was",
        args.output.display(),
        show_size(written.output_bytes)
    ));
    Ok(ExitCode::SUCCESS)
}
