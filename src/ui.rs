//! What appears on stderr besides errors: notes and progress. Nothing here writes to stdout.

use std::io::{self, IsTerminal, Write};
use std::path::Path;
use std::sync::Mutex;
use std::time::Duration;

use indicatif::{MultiProgress, ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde_json::Value;
use st_convert::Progress;
use st_hub::{DownloadProgress, HubError, ListedFile, Listing};

use crate::report::OutputError;
use crate::shown::{harmless, harmless_json, one_line};
use crate::size::show_size;

/// How much is shown, and where.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Ui {
    /// Neither notes nor progress.
    pub(crate) quiet: bool,
    /// Whether messages are coloured.
    pub(crate) color: bool,
    /// Whether progress bars are drawn.
    pub(crate) bars: bool,
}

impl Ui {
    /// Bars and colours only where stderr is a terminal.
    pub(crate) fn new(quiet: bool, no_color: bool) -> Self {
        let terminal = io::stderr().is_terminal();
        Self { quiet, color: terminal && !no_color, bars: terminal && !quiet }
    }

    /// Writes a line to stderr unless `--quiet`.
    pub(crate) fn note(&self, text: impl std::fmt::Display) {
        if !self.quiet {
            self.say(text);
        }
    }

    /// Writes a line to stderr that was asked for explicitly.
    pub(crate) fn say(&self, text: impl std::fmt::Display) {
        // Notes are for people: a closed stderr is no reason to stop.
        let _ = writeln!(io::stderr().lock(), "{}", harmless(&text.to_string()));
    }
}

/// Writes to stdout and flushes: at a terminal harmlessly, elsewhere as it is.
pub(crate) fn print(text: &str) -> Result<(), OutputError> {
    let text = if io::stdout().is_terminal() { harmless(text) } else { text.into() };
    print_bytes(text.as_bytes())
}

/// Writes JSON and a line break to stderr. With stderr gone there is nobody left to tell.
pub(crate) fn log(value: &Value) {
    let _ = writeln!(io::stderr().lock(), "{value}");
}

/// Writes JSON and a line break to stdout, as [`print()`] does: at a terminal with the escapes that JSON has.
pub(crate) fn print_json(value: &Value) -> Result<(), OutputError> {
    let line = format!("{value}\n");
    let line = if io::stdout().is_terminal() { harmless_json(&line) } else { line };
    print_bytes(line.as_bytes())
}

/// Writes a path to stdout, byte by byte what it is, but at a terminal: whoever reads it opens it.
pub(crate) fn print_path(path: &Path) -> Result<(), OutputError> {
    if io::stdout().is_terminal() {
        return print(&format!("{}\n", path.display()));
    }
    print_bytes(&[path.as_os_str().as_encoded_bytes(), b"\n"].concat())
}

fn print_bytes(bytes: &[u8]) -> Result<(), OutputError> {
    let mut out = io::stdout().lock();
    out.write_all(bytes).and_then(|()| out.flush()).map_err(OutputError)
}

fn bar_style() -> ProgressStyle {
    let style = ProgressStyle::with_template(
        "{msg:24!} {wide_bar} {binary_bytes}/{binary_total_bytes} {binary_bytes_per_sec} {eta}",
    );
    style.unwrap_or_else(|_| ProgressStyle::default_bar())
}

/// A bar that counts to `total`.
pub(crate) fn count_bar(ui: Ui, title: &'static str, total: u64) -> ProgressBar {
    let style = ProgressStyle::with_template("{msg:24!} {wide_bar} {human_pos}/{human_len} {eta}");
    ProgressBar::with_draw_target(Some(total), target(ui))
        .with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()))
        .with_message(title)
}

/// A bar for so many bytes.
pub(crate) fn bytes_bar(ui: Ui, title: &'static str, total: u64) -> ProgressBar {
    ProgressBar::with_draw_target(Some(total), target(ui)).with_style(bar_style()).with_message(title)
}

fn target(ui: Ui) -> ProgressDrawTarget {
    if ui.bars { ProgressDrawTarget::stderr() } else { ProgressDrawTarget::hidden() }
}

/// A bar for a conversion.
pub(crate) struct ConvertBar {
    bar: ProgressBar,
}

impl ConvertBar {
    /// Nothing is drawn before the work begins.
    pub(crate) fn new(ui: Ui, title: &'static str) -> Self {
        let bar = ProgressBar::with_draw_target(Some(0), target(ui)).with_style(bar_style()).with_message(title);
        Self { bar }
    }
}

impl Progress for ConvertBar {
    fn start(&self, total_bytes: u64) {
        self.bar.set_length(total_bytes);
        self.bar.reset_eta();
    }

    fn advance(&self, bytes: u64) {
        self.bar.inc(bytes);
    }

    fn finish(&self) {
        self.bar.finish_and_clear();
    }
}

impl Drop for ConvertBar {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
    }
}

/// A bar per file for a download and one for all; where bars are not drawn, a line per event that matters.
pub(crate) struct DownloadBars {
    ui: Ui,
    bars: MultiProgress,
    total: ProgressBar,
    files: Mutex<Vec<FileBar>>,
}

/// What is shown of one file.
struct FileBar {
    name: String,
    bar: ProgressBar,
    /// How much of it the total counts as done already.
    counted: u64,
}

impl DownloadBars {
    /// Nothing is drawn before the first file begins.
    pub(crate) fn new(ui: Ui) -> Self {
        let bars = MultiProgress::with_draw_target(target(ui));
        let total = ProgressBar::hidden().with_style(bar_style()).with_message("total");
        Self { ui, bars, total, files: Mutex::default() }
    }

    fn with<T>(&self, file: usize, act: impl FnOnce(&mut FileBar) -> T) -> Option<T> {
        let mut files = self.files.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        files.get_mut(file).map(act)
    }

    fn line(&self, text: String) {
        if self.ui.bars {
            // Above the bars; a terminal that fails to show it is not worth an error.
            let _ = self.bars.println(harmless(&text));
        } else {
            self.ui.note(text);
        }
    }
}

impl DownloadProgress for DownloadBars {
    fn listed(&self, listing: &Listing) {
        let (missing, total) = (listing.missing_bytes(), listing.total_bytes());
        if missing > 0 {
            let here = total - missing;
            let there = if here > 0 { format!(", {} are here already", show_size(here)) } else { String::new() };
            let files = listing.files.len();
            self.line(format!("{}: {files} files, {} to fetch{there}", listing.repo, show_size(missing)));
            self.bars.add(self.total.clone());
            self.total.set_length(total);
            self.total.set_position(here);
            self.total.reset_eta();
        }
        let file_bar = |file: &ListedFile| {
            let name = one_line(&file.path);
            let bar = ProgressBar::hidden().with_style(bar_style()).with_message(name.clone());
            FileBar { name, bar, counted: file.on_disk }
        };
        let mut files = self.files.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        *files = listing.files.iter().map(file_bar).collect();
        for (shown, file) in files.iter().zip(&listing.files) {
            shown.bar.set_length(file.size);
        }
    }

    fn started(&self, file: usize, already: u64) {
        self.with(file, |shown| {
            // Another process may have fetched some of it since the listing.
            let bar = &self.total;
            bar.set_position((bar.position() + already).saturating_sub(shown.counted));
            if already < shown.bar.length().unwrap_or(0) {
                self.bars.insert_before(&self.total, shown.bar.clone());
                shown.bar.set_position(already);
                shown.bar.reset_eta();
            }
        });
    }

    fn advanced(&self, file: usize, bytes: u64) {
        self.total.inc(bytes);
        self.with(file, |shown| shown.bar.inc(bytes));
    }

    fn rewound(&self, file: usize, bytes: u64) {
        let back = |bar: &ProgressBar| bar.set_position(bar.position().saturating_sub(bytes));
        back(&self.total);
        self.with(file, |shown| back(&shown.bar));
    }

    fn waiting(&self, file: usize) {
        if let Some(name) = self.with(file, |shown| shown.name.clone()) {
            self.line(format!("{name}: another process is fetching it; waiting"));
        }
    }

    fn retrying(&self, file: Option<usize>, wait: Duration, cause: &HubError) {
        let name = file.and_then(|file| self.with(file, |shown| format!("{}: ", shown.name))).unwrap_or_default();
        self.line(format!("{name}{cause}; trying again in {} s", wait.as_secs().max(1)));
    }

    fn finished(&self, file: usize) {
        let done = self.with(file, |shown| {
            shown.bar.finish_and_clear();
            self.bars.remove(&shown.bar);
            let size = shown.bar.length().unwrap_or(0);
            (shown.counted < size).then(|| format!("{}: {}", shown.name, show_size(size)))
        });
        // What was here before is no news.
        if !self.ui.bars
            && let Some(Some(line)) = done
        {
            self.line(line);
        }
    }
}

impl Drop for DownloadBars {
    fn drop(&mut self) {
        self.total.finish_and_clear();
    }
}
