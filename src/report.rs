//! How an error reaches the person: one line with the chain of causes, and what to do about it.

mod hub;

use std::fmt;
use std::io::{self, Write};
use std::sync::Arc;

use st_convert::ConvertError;
use st_experts::TraceError;
use st_format::FormatError;
use st_gguf::{GgufError, Placeholder};
use st_hub::HubError;
use st_model::{ModelError, StoreError};

use crate::shown::one_line;
use crate::size::show_size;

/// What may help where there is no memory.
pub(crate) const NO_MEMORY: &str =
    "--memory bounds what a model takes; a limit of this session (`ulimit -v`) may be in the way";

/// An error of the command line itself, with advice.
#[derive(Debug)]
pub(crate) struct Advice {
    message: String,
    hint: String,
}

impl Advice {
    /// An error that says `message`, then what to do.
    pub(crate) fn new(message: impl Into<String>, hint: impl Into<String>) -> Self {
        Self { message: message.into(), hint: hint.into() }
    }
}

impl fmt::Display for Advice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Advice {}

/// The work was stopped by a signal.
#[derive(Debug)]
pub(crate) struct Interrupted;

impl fmt::Display for Interrupted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("interrupted")
    }
}

impl std::error::Error for Interrupted {}

/// Standard output could not be written.
#[derive(Debug)]
pub(crate) struct OutputError(pub(crate) io::Error);

impl fmt::Display for OutputError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("cannot write to standard output")
    }
}

impl std::error::Error for OutputError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        Some(&self.0)
    }
}

/// Whether whoever read the output has gone: nothing is wrong then, there is only nobody to write for.
pub(crate) fn is_closed_output(error: &anyhow::Error) -> bool {
    error.downcast_ref::<OutputError>().is_some_and(|OutputError(cause)| cause.kind() == io::ErrorKind::BrokenPipe)
}

/// Whether a signal ended the work.
pub(crate) fn is_interruption(error: &anyhow::Error) -> bool {
    error.chain().any(|cause| {
        cause.is::<Interrupted>()
            || matches!(cause.downcast_ref(), Some(ConvertError::Cancelled))
            || matches!(cause.downcast_ref(), Some(HubError::Cancelled))
            || matches!(cause.downcast_ref(), Some(ModelError::Cancelled))
    })
}

/// Writes `error: …` and, where there is one, `hint: …` to stderr.
pub(crate) fn print(error: &anyhow::Error, color: bool) {
    let (red, cyan, off) = if color { ("\x1b[1;31m", "\x1b[1;36m", "\x1b[0m") } else { ("", "", "") };
    let mut text = format!("{red}error{off}: {}\n", chain(error));
    if let Some(hint) = error.chain().find_map(hint) {
        text.push_str(&format!("{cyan}hint{off}: {}\n", one_line(&hint)));
    }
    // With stderr gone there is nobody left to tell.
    let _ = io::stderr().lock().write_all(text.as_bytes());
}

/// The messages of all causes on one line; what a message repeats of its cause is left out.
fn chain(error: &anyhow::Error) -> String {
    let mut line = String::new();
    for cause in error.chain() {
        let mut message = one_line(&cause.to_string());
        // What begins with the name that the line ends with need not repeat it.
        if let Some((name, rest)) = message.split_once(": ")
            && !name.is_empty()
            && line.ends_with(name)
        {
            message = rest.to_owned();
        }
        if line.is_empty() {
            line = message;
        } else if !line.ends_with(&message) {
            line = format!("{line}: {message}");
        }
    }
    line
}

fn hint(error: &(dyn std::error::Error + 'static)) -> Option<String> {
    if let Some(advice) = error.downcast_ref::<Advice>() {
        return Some(advice.hint.clone());
    }
    if let Some(error) = error.downcast_ref::<HubError>() {
        return hub::hint(error);
    }
    if let Some(error) = error.downcast_ref::<GgufError>() {
        return gguf_hint(error);
    }
    if let Some(error) = error.downcast_ref::<ConvertError>() {
        return convert_hint(error);
    }
    if let Some(TraceError::Malformed { .. } | TraceError::Empty) = error.downcast_ref() {
        return Some("st-tool run --record-routing FILE writes a routing trace".into());
    }
    if let Some(error) = error.downcast_ref::<ModelError>() {
        return model_hint(error);
    }
    // What several threads may be told is shared.
    let shared = || error.downcast_ref::<Arc<io::Error>>().map(AsRef::as_ref);
    error.downcast_ref().or_else(shared).and_then(io_hint)
}

fn io_hint(error: &io::Error) -> Option<String> {
    Some(match error.kind() {
        io::ErrorKind::FileTooLarge => {
            "the file system, or a limit of this session (`ulimit -f`), allows no file of this size".into()
        }
        io::ErrorKind::OutOfMemory => NO_MEMORY.into(),
        // Nothing that is waited for here says so, but the start of a thread.
        io::ErrorKind::WouldBlock => "a limit of this session (`ulimit -a`: -u, -v) is in the way".into(),
        _ => return None,
    })
}

/// What to do about a file whose bytes have changed.
const DAMAGED: &str = "download or convert the file again; `st-tool inspect --check` lists all that is damaged";

fn gguf_hint(error: &GgufError) -> Option<String> {
    Some(match error {
        GgufError::Exists { .. } => "--force replaces it; -o names another file".into(),
        GgufError::OtherKind { .. } | GgufError::Descriptor { .. } => "name another file for the output".into(),
        GgufError::Stdout { .. } => "-o FILE names the file; ./- is one of that name".into(),
        GgufError::Busy { .. } => "wait for it to end, or name another file for the output".into(),
        GgufError::Io { source, .. }
            if matches!(source.kind(), io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem) =>
        {
            "`ls -ld` on the file and its folder says who may".into()
        }
        GgufError::NoFolder { folder, .. } => format!("`mkdir -p {}` makes it", folder.display()),
        GgufError::NoSpace { needed, .. } => {
            format!("free some space or write to another disk; the file takes {}", show_size(*needed))
        }
        GgufError::Placeholder { what, .. } => placeholder_hint(*what),
        GgufError::Damaged { .. } => DAMAGED.into(),
        GgufError::Truncated { .. } => "the file may not be complete: fetch or convert it again".into(),
        GgufError::Cut { .. } => "fetch the file again, or convert it again".into(),
        GgufError::SplitPart { number, count, .. } => format!(
            "put all {count} parts into one folder under their own names, NAME-{number:05}-of-{count:05}.gguf; or \
             `llama-gguf-split --merge` makes one file of them"
        ),
        GgufError::Type { .. } => OTHER_TYPES.into(),
        GgufError::TransposedDown { file, .. } => transposed_hint(file),
        GgufError::MissingTensor { .. } => INCOMPLETE.into(),
        GgufError::Model { problem, .. } => return format_hint(problem),
        _ => return None,
    })
}

/// What to do about a file for PowerInfer: its plain twin has the same name without a part of it.
fn transposed_hint(file: &str) -> String {
    let plain = file.replace(".powerinfer", "");
    let twin = match plain == file {
        true => "the plain file of the model, without `powerinfer` in its name".to_owned(),
        false => plain,
    };
    format!(
        "take {twin}; `st-tool quantize {file} --q4_0 --allow-requantize` makes a plain one of this, with weights that are rounded \
         once more"
    )
}

/// Where predictors come from.
const PREDICTOR: &str =
    "--predictor FILE takes the model_lm_head.pt of the authors' repository of this model, or a .powerinfer.gguf";

/// What to do about a file that lacks tensors.
const INCOMPLETE: &str = "the file may not be complete: fetch or convert it again";

/// What to do about weights of types that are not computed with.
const OTHER_TYPES: &str = "of the published files of a model, those of Q2_K to Q6_K, Q4_0 to Q8_0, IQ4_XS and IQ4_NL run, and of F16 and BF16, \
    but none of IQ1, IQ2, IQ3 or TQ: `st-tool run 4b:q4_k_s` fetches one";

fn format_hint(problem: &FormatError) -> Option<String> {
    Some(match problem {
        FormatError::MissingTensor { .. } => INCOMPLETE.into(),
        FormatError::KeyNotComputed { .. } | FormatError::TensorNotComputed { .. } => {
            "without it the answers would be wrong: take a file of the model as it was published, or run this one in \
             the program that it was made for"
                .into()
        }
        _ => return None,
    })
}

fn placeholder_hint(what: Placeholder) -> String {
    match what {
        Placeholder::LfsPointer => "`git lfs pull` in its folder fetches the file; so does `st-tool download`",
        Placeholder::WebPage => "the address of a file on the hub has /resolve/ where that of its page has /blob/",
    }
    .into()
}

fn convert_hint(error: &ConvertError) -> Option<String> {
    Some(match error {
        ConvertError::MissingShard { .. }
        | ConvertError::NoIndex { .. }
        | ConvertError::BadShard { .. }
        | ConvertError::NoWeights { .. } => {
            "the checkpoint may not be complete: copy it anew, or `st-tool download` it where it is from the hub".into()
        }
        ConvertError::OtherWeights { .. } => {
            "weights are read from safetensors files; transformers' `save_pretrained` writes them".into()
        }
        ConvertError::Quantized { .. } => "take the checkpoint that it was made from, before it was quantized".into(),
        ConvertError::Placeholder { what, .. } => placeholder_hint(*what),
        ConvertError::PackedInput { .. } => "st-tool layout IN.gguf OUT.gguf --to gguf".into(),
        ConvertError::SourceType { .. } | ConvertError::ComputedType { .. } => OTHER_TYPES.into(),
        ConvertError::Requantize { .. } => {
            "take a checkpoint, or a BF16, F16 or Q8_0 file; --allow-requantize does it all the same".into()
        }
        ConvertError::TooLarge { .. } => "--bf16 and --f32 hold every weight".into(),
        ConvertError::Gguf(error) => return gguf_hint(error),
        _ => return None,
    })
}

fn model_hint(error: &ModelError) -> Option<String> {
    Some(match error {
        ModelError::Budget { minimum, .. } => {
            format!("--memory {}MiB is the least that works", minimum.div_ceil(1 << 20))
        }
        ModelError::Vocabulary => "--draft-model takes a model of the same family, such as 4b for 21b".into(),
        ModelError::BudgetUnknown => "without --memory the model runs unbounded".into(),
        ModelError::BudgetBeyondContainer { limit, .. } => {
            format!("--memory {}MiB at most, or a container with more memory", limit >> 20)
        }
        ModelError::ContextFull { .. } => {
            "a larger --ctx, where the model and the memory allow it, or a shorter prompt".into()
        }
        ModelError::NoTokenizer => "--token-ids 1,2,3 takes the prompt as token ids".into(),
        ModelError::NoChatTemplate | ModelError::Chat(_) => "--raw -p TEXT continues a text as it is".into(),
        ModelError::Isa { .. } => "without --isa the best that it can run are used".into(),
        ModelError::NoPredictor { .. } | ModelError::Predictor { .. } => PREDICTOR.into(),
        ModelError::MissingTensor { .. } => INCOMPLETE.into(),
        ModelError::TensorType { .. } => OTHER_TYPES.into(),
        ModelError::Gguf(error) => return gguf_hint(error),
        ModelError::Experts(StoreError::Corrupt { .. }) => DAMAGED.into(),
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use anyhow::Context as _;

    use super::*;

    #[test]
    fn the_chain_is_one_line_without_repetitions() {
        let error = io::Error::other("disk\non\x1b[31m fire");
        let error = Err::<(), _>(error).context("cannot read a").context("cannot read a: cannot read a").unwrap_err();
        assert_eq!(chain(&error), "cannot read a: cannot read a: disk on\u{fffd}[31m fire");
    }

    #[test]
    fn only_a_closed_standard_output_is_no_error() {
        let pipe = || io::Error::from(io::ErrorKind::BrokenPipe);
        assert!(is_closed_output(&OutputError(pipe()).into()));
        assert!(!is_closed_output(&pipe().into()));
        assert!(!is_closed_output(&OutputError(io::ErrorKind::StorageFull.into()).into()));
    }
}
