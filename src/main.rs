//! `st-tool`: parses the command line, runs one command, and prints an error once.

mod arriving;
mod cli;
mod commands;
mod context;
mod env;
mod forecast;
mod get;
mod hot;
mod input;
mod live;
mod machine;
mod memory;
mod models;
mod picture;
mod planned;
mod profile;
mod report;
mod repos;
mod shown;
mod signals;
mod size;
mod store;
mod table;
mod tensor_file;
mod text;
mod tiny;
mod ui;

use std::io::{self, Write as _};
use std::process::ExitCode;
use std::thread::{self, JoinHandle};

use cli::Cli;
use context::Context;
use env::Env;
use report::OutputError;
use signals::Interrupt;
use ui::Ui;

/// Of the thread that does the work. The one that a process begins with has what a limit of the session leaves it, and
/// that may be too little.
const STACK_BYTES: usize = 16 << 20;

fn main() -> ExitCode {
    let _console = st_sys::Utf8Output::new();
    let cli = match Cli::from_args() {
        Ok(cli) => cli,
        Err(error) => return not_run(&error),
    };
    let env = Env::read();
    let ui = Ui::new(cli.quiet, env.no_color);
    start_logging(cli.verbose, ui.color);
    let worker = thread::Builder::new().name("main".into()).stack_size(STACK_BYTES);
    match worker.spawn(move || run(cli, env, ui)).map(JoinHandle::join) {
        Ok(Ok(status)) => status,
        Ok(Err(panic)) => std::panic::resume_unwind(panic),
        Err(error) => {
            report::print(&anyhow::Error::from(error).context("cannot start a thread"), ui.color);
            ExitCode::FAILURE
        }
    }
}

/// What was asked for is the help; or wrong arguments end here, with clap's message and exit status 2.
fn not_run(error: &clap::Error) -> ExitCode {
    let printed = error.print().and_then(|()| io::stdout().flush());
    match printed {
        _ if error.use_stderr() => ExitCode::from(2),
        Err(cause) if cause.kind() != io::ErrorKind::BrokenPipe => {
            report::print(&OutputError(cause).into(), false);
            ExitCode::FAILURE
        }
        _ => ExitCode::SUCCESS,
    }
}

fn run(cli: Cli, env: Env, ui: Ui) -> ExitCode {
    let result =
        Interrupt::install().map_err(anyhow::Error::from).map(|interrupt| Context { env, ui, interrupt, yes: cli.yes });
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
