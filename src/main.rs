//! `st-tool`: parses the command line, runs one command, and prints an error once.

mod cli;
mod commands;
mod env;
mod machine;
mod models;
mod report;
mod signals;
mod size;
mod table;
mod tensor_file;
mod terminal;
mod ui;

use std::io;
use std::process::ExitCode;

use clap::Parser as _;

use cli::Cli;
use commands::Context;
use env::Env;
use signals::Interrupt;
use ui::Ui;

fn main() -> ExitCode {
    // Wrong arguments end here, with clap's message and exit status 2.
    let cli = Cli::parse();
    let env = Env::read();
    let ui = Ui::new(cli.quiet, env.no_color);
    start_logging(cli.verbose, ui.color);
    let result = Interrupt::install().map_err(anyhow::Error::from).map(|interrupt| Context { env, ui, interrupt });
    let outcome = result.map(|context| {
        let status = commands::run(cli.command, &context);
        (status, context.interrupt)
    });
    match outcome {
        Ok((Ok(status), _)) => status,
        Ok((Err(error), _)) if report::is_closed_output(&error) => ExitCode::SUCCESS,
        Ok((Err(error), interrupt)) if report::is_interruption(&error) => {
            report::print(&error, ui.color);
            ExitCode::from(interrupt.exit_status())
        }
        Ok((Err(error), _)) | Err(error) => {
            report::print(&error, ui.color);
            ExitCode::FAILURE
        }
    }
}

fn start_logging(verbose: u8, color: bool) {
    let level = match verbose {
        0 => return,
        1 => tracing::Level::INFO,
        2 => tracing::Level::DEBUG,
        _ => tracing::Level::TRACE,
    };
    tracing_subscriber::fmt().with_max_level(level).with_ansi(color).with_writer(io::stderr).init();
}
