//! Templates of untrusted files, compiled and rendered within bounds.
//!
//! Owns the limits on what a template may be, make and hold. `minijinja` bounds instructions, not memory: one
//! instruction may double a text, another may lengthen it a millionfold. So compiled code is rewritten (`code.rs`) such
//! that every value an operation makes is weighed by a [`Guard`] before the next one sees it, and what can multiply its
//! input in a single step is charged before it begins (`guard.rs`). Compiling and rendering have a stack of their own,
//! which suffices for what the limits let through.

mod code;
mod guard;
mod methods;

use std::io;

use minijinja::syntax::SyntaxConfig;
use minijinja::{AutoEscape, Environment, Error, Value};

pub(crate) use guard::{Guard, MOST_UNDER_A_BUDGET};

/// The name that errors give a template.
const NAME: &str = "chat_template";
/// Instructions one rendering may take: some hundred times what a long chat needs.
const FUEL: u64 = 5_000_000;
/// What the deepest expression that is let through takes, several times over. Only pages that are used count.
const STACK: usize = 128 << 20;

/// Why there is no rendering.
#[derive(Debug)]
pub(crate) enum Failure {
    /// The template is no Jinja, or beyond a limit.
    Compile(Error),
    /// It failed on these values.
    Render(Error),
    /// There is no thread to render on.
    Thread(io::Error),
}

/// An environment that renders under `guard`, with nothing in it but what templates may use.
pub(crate) fn environment(guard: &Guard) -> Environment<'static> {
    let mut environment = Environment::new();
    environment.set_fuel(Some(FUEL));
    guard::install(&mut environment, guard);
    methods::install(&mut environment, guard);
    environment
}

/// Whether `source` compiles.
pub(crate) fn check(source: &str) -> Result<(), Failure> {
    on_own_stack(|| {
        let source = code::admit(source, syntax()?)?;
        code::compile(&source, NAME, syntax()?).map(drop)
    })
    .and_then(|checked| checked.map_err(Failure::Compile))
}

/// Renders `source` with the variables `root`.
pub(crate) fn render(source: &str, environment: &Environment<'_>, root: &Value) -> Result<String, Failure> {
    on_own_stack(|| {
        let source = syntax().and_then(|syntax| code::admit(source, syntax)).map_err(Failure::Compile)?;
        let compiled = syntax().and_then(|syntax| code::compile(&source, NAME, syntax));
        let (instructions, blocks) = compiled.map_err(Failure::Compile)?;
        let mut text = String::new();
        let mut out = minijinja::machinery::make_string_output(&mut text);
        let done =
            minijinja::machinery::eval(environment, &instructions, root.clone(), &blocks, &mut out, AutoEscape::None);
        done.map(drop).map_err(Failure::Render)?;
        Ok(text)
    })?
}

fn syntax() -> Result<SyntaxConfig, Error> {
    SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build()
}

/// Runs `work` on a thread with a stack of [`STACK`] bytes.
fn on_own_stack<T: Send>(work: impl FnOnce() -> T + Send) -> Result<T, Failure> {
    std::thread::scope(|scope| {
        let builder = std::thread::Builder::new().name("template".to_owned()).stack_size(STACK);
        let thread = builder.spawn_scoped(scope, work).map_err(Failure::Thread)?;
        Ok(thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
    })
}

#[cfg(test)]
#[path = "tests.rs"]
mod tests;
