//! `st-tool completions` and `st-tool man`: what shells and readers of manuals want to know, from the same definitions as
//! `--help`.

use std::io::{Read, Write as _};
use std::process::ExitCode;

use anyhow::Context as _;
use st_gguf::{Kind, OutputFile, check_output};

use crate::cli::{Cli, CompletionsArgs, ManArgs};
use crate::context::Context;
use crate::ui;

/// A page of a manual, as roff begins it: a comment or a request.
const PAGE: Kind = Kind { name: "a manual page", recognizes: begins_as_roff };

fn begins_as_roff(bytes: &mut dyn Read) -> std::io::Result<bool> {
    let mut first = [0; 1];
    Ok(bytes.read(&mut first)? == 1 && matches!(first[0], b'.' | b'\''))
}

pub(crate) fn completions(args: &CompletionsArgs) -> anyhow::Result<ExitCode> {
    let mut command = Cli::definition();
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut command, "st-tool", &mut script);
    ui::print(&String::from_utf8(script)?)?;
    Ok(ExitCode::SUCCESS)
}

/// Writes `st-tool.1` and a page for each verb; all can be written before the first is.
pub(crate) fn man(args: &ManArgs, context: &Context) -> anyhow::Result<ExitCode> {
    let pages = pages()?;
    std::fs::create_dir_all(&args.dir).with_context(|| format!("cannot make {}", args.dir.display()))?;
    for (name, _) in &pages {
        check_output(&args.dir.join(name), PAGE, true)?;
    }
    for (name, page) in &pages {
        let mut file = OutputFile::create(&args.dir.join(name), PAGE, true)?;
        file.write_all(page)?;
        file.finish()?;
    }
    context.ui.note(format_args!("wrote {} pages into {}", pages.len(), args.dir.display()));
    Ok(ExitCode::SUCCESS)
}

fn pages() -> std::io::Result<Vec<(String, Vec<u8>)>> {
    let mut command = Cli::definition().disable_help_subcommand(true);
    command.build();
    let verbs = command.get_subcommands().filter(|verb| !verb.is_hide_set()).cloned();
    let named = verbs.map(|verb| {
        let name = format!("st-tool-{}", verb.get_name());
        verb.name(name)
    });
    let all: Vec<_> = std::iter::once(command.clone()).chain(named).collect();
    let page = |command: clap::Command| {
        let name = format!("{}.1", command.get_name());
        let mut page = Vec::new();
        clap_mangen::Man::new(command).render(&mut page)?;
        Ok((name, page))
    };
    all.into_iter().map(page).collect()
}
