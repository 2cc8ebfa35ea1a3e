//! `st-tool inspect --check`: whether a file's data is what it was when it was written, or uploaded.

use std::fs::File;
use std::io::Read as _;
use std::path::Path;

use anyhow::Context as _;
use serde_json::json;
use sha2::{Digest as _, Sha256};
use st_convert::Progress as _;
use st_gguf::{CheckReport, GgufError, GgufFile};

use crate::context::Context;
use crate::report::{Advice, Interrupted};
use crate::size::show_size;
use crate::ui::{ConvertBar, Ui};

const READ_BYTES: usize = 1 << 20;
/// Damaged parts that are named in a text.
const SHOWN: usize = 20;

/// What the comparison found.
pub(crate) struct Checked {
    file: String,
    /// With the checksums in the file; `None` where it has none.
    sums: Option<CheckReport>,
    /// Whether there are checksums of other tensors.
    unfit: bool,
    /// With the hub's SHA-256, where that is known: what was expected and what came.
    sha256: Option<(String, String)>,
}

/// Reads all of `file` that there is something to compare with.
pub(crate) fn run(file: &GgufFile, context: &Context) -> anyhow::Result<Checked> {
    let path = file.source.path();
    let expected = path.and_then(st_hub::expected_sha256);
    let hashed = if expected.is_some() { file.header.file_len } else { 0 };
    let bar = ConvertBar::new(context.ui, "checking");
    bar.start(file.checked_bytes() + hashed);
    let mut progress = |bytes| {
        bar.advance(bytes);
        context.interrupt.flow()
    };
    let sums = match file.checksums().is_empty() {
        true => None,
        false => Some(file.check(&mut progress)?.ok_or(Interrupted)?),
    };
    let sha256 = match (path, expected) {
        (Some(path), Some(expected)) => {
            let advance = |bytes| if progress(bytes).is_break() { Err(Interrupted) } else { Ok(()) };
            Some((expected, sha256(path, advance)?))
        }
        _ => None,
    };
    bar.finish();
    let (file, unfit) = (file.header.file_name().to_owned(), file.checksums().are_of_another_file());
    Ok(Checked { file, sums, unfit, sha256 })
}

fn sha256(path: &Path, mut advance: impl FnMut(u64) -> Result<(), Interrupted>) -> anyhow::Result<String> {
    let cannot = || format!("cannot read {}", path.display());
    let mut file = File::open(path).with_context(cannot)?;
    let (mut hasher, mut buffer) = (Sha256::new(), vec![0; READ_BYTES]);
    loop {
        match file.read(&mut buffer).with_context(cannot)? {
            0 => return Ok(hasher.finalize().iter().map(|byte| format!("{byte:02x}")).collect()),
            n => {
                hasher.update(&buffer[..n]);
                advance(n as u64)?;
            }
        }
    }
}

impl Checked {
    fn damaged(&self) -> &[GgufError] {
        self.sums.as_ref().map_or(&[], |report| &report.damaged)
    }

    /// A line for what was compared.
    pub(crate) fn text(&self) -> String {
        let mut out = String::new();
        if let Some(report) = &self.sums {
            let CheckReport { parts, bytes, without, .. } = *report;
            let damaged = report.damaged.len();
            let right = parts - damaged as u64;
            out.push_str(&format!("checksums: {right} of {parts} parts are right ({})", show_size(bytes)));
            out.push_str(&if without > 0 { format!("; {without} tensors have none\n") } else { "\n".into() });
        }
        if let Some((expected, got)) = &self.sha256 {
            let verdict = if expected == got { "is the hub's" } else { "is not the hub's" };
            out.push_str(&format!("SHA-256 {got} {verdict}\n"));
        }
        out
    }

    pub(crate) fn json(&self) -> serde_json::Value {
        let damaged = self.damaged().iter().map(|error| match error {
            GgufError::Damaged { tensor, expert, offset, .. } => {
                json!({"tensor": tensor, "expert": expert, "offset": offset})
            }
            other => json!({"error": other.to_string()}),
        });
        json!({
            "checksums": self.sums.as_ref().map(|report| json!({
                "parts": report.parts,
                "bytes": report.bytes,
                "tensors_without": report.without,
                "damaged": damaged.collect::<Vec<_>>(),
            })),
            "sha256": self.sha256.as_ref().map(|(expected, got)| json!({"expected": expected, "got": got})),
        })
    }

    /// An error where something is damaged, after a note for each part that is, or where there was nothing to compare with.
    pub(crate) fn verdict(&self, ui: Ui) -> anyhow::Result<()> {
        let again = "download or convert the file again";
        let damaged = self.damaged();
        for error in damaged.iter().take(SHOWN).filter(|_| damaged.len() > 1) {
            ui.note(format_args!("note: {error}"));
        }
        if damaged.len() > SHOWN {
            ui.note(format_args!("note: and {} more; --json lists all", damaged.len() - SHOWN));
        }
        if let ([first, others @ ..], Some(report)) = (damaged, &self.sums) {
            let (count, parts) = (damaged.len(), report.parts);
            let which = if others.is_empty() {
                first.to_string()
            } else {
                format!("{}: {count} of {parts} parts are damaged", self.file)
            };
            return Err(Advice::new(which, again).into());
        }
        if let Some((expected, got)) = &self.sha256
            && expected != got
        {
            let message = format!("{} is damaged: its SHA-256 is {got}, the hub states {expected}", self.file);
            return Err(Advice::new(message, again).into());
        }
        if self.sums.is_none() && self.sha256.is_none() {
            let why = match self.unfit {
                true => "its checksums are of other tensors: another program has rewritten it",
                false => "it has no checksums, and it is no file that was downloaded from the hub",
            };
            let hint = "`st-tool quantize` and `st-tool layout` write files with checksums";
            return Err(Advice::new(format!("{} cannot be checked: {why}", self.file), hint).into());
        }
        Ok(())
    }
}
