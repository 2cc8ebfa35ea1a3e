//! What every command works with.

use crate::env::Env;
use crate::signals::Interrupt;
use crate::ui::Ui;

/// Settings, and the ways to the person and back.
#[derive(Debug)]
pub(crate) struct Context {
    /// Settings from the environment.
    pub(crate) env: Env,
    /// Notes and progress.
    pub(crate) ui: Ui,
    /// Whether the person has agreed to what would be asked.
    pub(crate) yes: bool,
    /// Requests to stop.
    pub(crate) interrupt: Interrupt,
}
