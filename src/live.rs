//! One line that moves while an answer is made: tokens per second, memory, experts found, the disk.
//!
//! Only where stderr is a terminal. Where the answer is written to the same terminal, the line has its last row and the answer scrolls above
//! it; the terminal gets its rows back when the line goes.

use std::io::{self, IsTerminal as _, Write as _};
use std::time::{Duration, Instant};

use st_model::{Engine, StoreStats};
use st_sys::{resident, terminal_size};

use crate::size::show_size;

/// How often the line changes.
const PERIOD: Duration = Duration::from_millis(200);

/// The line.
pub(crate) struct Live {
    /// Rows and columns, where the answer is on the same terminal.
    rows: Option<u16>,
    columns: usize,
    shown: Option<Instant>,
    /// What was counted when the line changed last.
    since: (Instant, u64, StoreStats),
    began: StoreStats,
    tokens: u64,
}

impl Live {
    /// A line for the answer that begins now; `None` where there is no terminal for it.
    pub(crate) fn begin(engine: &Engine) -> Option<Self> {
        let (rows, columns) = terminal_size()?;
        let rows = Some(rows).filter(|&rows| rows > 2 && io::stdout().is_terminal());
        let stats = engine.store_stats();
        let columns = usize::from(columns).max(20);
        let live = Self { rows, columns, shown: None, since: (Instant::now(), 0, stats), began: stats, tokens: 0 };
        if let Some(rows) = rows {
            // A row below the cursor, and all but the last as the part that scrolls.
            put(&format!("\n\x1b[A\x1b7\x1b[1;{}r\x1b8", rows - 1));
        }
        Some(live)
    }

    /// Another token is there.
    pub(crate) fn token(&mut self, engine: &Engine) {
        self.tokens += 1;
        if self.shown.is_some_and(|shown| shown.elapsed() < PERIOD) {
            return;
        }
        self.shown = Some(Instant::now());
        let line: String = self.line(engine).chars().take(self.columns - 1).collect();
        match self.rows {
            Some(rows) => put(&format!("\x1b7\x1b[{rows};1H\x1b[2K{line}\x1b8")),
            None => put(&format!("\r\x1b[2K{line}")),
        }
    }

    fn line(&mut self, engine: &Engine) -> String {
        let (now, stats) = (Instant::now(), engine.store_stats());
        let (then, tokens, before) = std::mem::replace(&mut self.since, (now, self.tokens, stats));
        let seconds = now.duration_since(then).as_secs_f64().max(1e-3);
        let rate = (self.tokens - tokens) as f64 / seconds;
        let mut line = format!("{} tokens, {rate:.1} tokens/s", self.tokens);
        if let Some(bytes) = resident() {
            line += &format!(" · memory {}", show_size(bytes));
            if let Some(budget) = engine.plan().budget {
                line += &format!(" of {}", show_size(budget));
            }
        }
        if engine.plan().reports_cache() {
            let found = stats.since(&self.began).hit_rate();
            let read = stats.since(&before).bytes_read as f64 / seconds;
            line += &format!(" · found {:.0} % · disk {}/s", 100.0 * found, show_size(read as u64));
        }
        line
    }
}

impl Drop for Live {
    fn drop(&mut self) {
        match self.rows {
            Some(rows) => put(&format!("\x1b7\x1b[r\x1b[{rows};1H\x1b[2K\x1b8")),
            None => put("\r\x1b[2K"),
        }
    }
}

/// Writes to stderr; with that gone there is nobody left to see it.
fn put(text: &str) {
    let mut stderr = io::stderr().lock();
    let _ = stderr.write_all(text.as_bytes()).and_then(|()| stderr.flush());
}
