//! `st-tool layout`: rearranges the experts of a converted file, or compares with what that would give.

use std::process::ExitCode;

use st_convert::{RelayoutOptions, compare_relayout, relayout};

use super::{check_converted, show_differences};
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
    if let Some(with) = &args.compare {
        not_stdin(with)?;
        let bar = ConvertBar::new(context.ui, "comparing");
        let differences = compare_relayout(&args.input, &options, with, &bar, context.interrupt.cancel())?;
        drop(bar);
        return show_differences(with, &differences, context);
    }
    // One of the two is there.
    let Some(output) = &args.output else { return Ok(ExitCode::FAILURE) };
    check_converted(output, args.force, Some(&args.input))?;
    let bar = ConvertBar::new(context.ui, "rearranging");
    let written = relayout(&args.input, &options, output, &bar, context.interrupt.cancel())?;
    drop(bar);
    for warning in &written.warnings {
        context.ui.note(format_args!("note: {warning}"));
    }
    context.ui.note(format_args!(
        "{}: {}; every weight is bit for bit what it was",
        output.display(),
        show_size(written.output_bytes)
    ));
    Ok(ExitCode::SUCCESS)
}
