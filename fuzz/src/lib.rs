//! Everything that reads what strangers wrote, as functions over bytes: any bytes end in a value or an error, soon and in little memory.
//!
//! Owns one function for each kind of input, and their list. `tests/corpus.rs` replays `corpus/`; `libfuzzer/` searches for more:
//!
//! ```text
//! cargo install cargo-fuzz
//! RUSTC_BOOTSTRAP=1 cargo fuzz run --fuzz-dir fuzz/libfuzzer gguf_header fuzz/corpus/gguf_header -- -max_total_time=600
//! ```
//!
//! Each of them takes any bytes, a model's too:
//!
//! ```
//! let model = std::fs::read("../models/tiny/tiny-q4_0.gguf").expect("the bundled model");
//! for (_, read) in st_fuzz::TARGETS {
//!     read(&model);
//! }
//! ```
//!
//! What a search finds goes into `corpus/` under the name of its kind, and is an ordinary test from then on.

use std::path::Path;

use st_convert::{ConvertOptions, Input, Layout, WeightType};
use st_experts::RoutingTrace;
use st_format::{Matrix, ModelShape};
use st_gguf::{ExpertIndex, Header, MemorySource};
use st_model::chat::{ChatTemplate, Message, Role};
use st_model::tokenizer::Tokenizer;

/// A kind of input: its name, which is that of its folder in `corpus/`, and what reads it.
pub type Target = (&'static str, fn(&[u8]));

/// Every kind of input.
pub const TARGETS: [Target; 6] = [
    ("gguf_header", gguf_header),
    ("expert_index", expert_index),
    ("tokenizer_metadata", tokenizer_metadata),
    ("chat_template", chat_template),
    ("checkpoint", checkpoint),
    ("routing_trace", routing_trace),
];

fn header(data: &[u8]) -> Option<Header> {
    Header::parse(&MemorySource(data)).ok()
}

/// The header of a GGUF file.
pub fn gguf_header(data: &[u8]) {
    header(data);
}

/// Where a GGUF file says that its experts lie.
pub fn expert_index(data: &[u8]) {
    let Some(header) = header(data) else { return };
    let Ok(shape) = ModelShape::from_metadata(&header) else { return };
    let Ok(index) = ExpertIndex::from_header(&header, &shape) else { return };
    // Whatever the index names lies inside the file.
    for layer in 0..index.n_layers() {
        for expert in 0..index.n_experts() {
            for matrix in Matrix::ALL {
                let range = index.matrix(layer, expert, matrix);
                assert!(range.offset.checked_add(range.len).is_some_and(|end| end <= data.len() as u64));
            }
        }
    }
}

/// The vocabulary and merges in the keys of a GGUF file.
pub fn tokenizer_metadata(data: &[u8]) {
    let Some(header) = header(data) else { return };
    let Ok(Some(tokenizer)) = Tokenizer::from_metadata(&header.metadata) else { return };
    let text = String::from_utf8_lossy(&data[..data.len().min(64)]).into_owned() + "Hello, 世界 <|im_end|>";
    if let Ok(ids) = tokenizer.encode(&text, false) {
        tokenizer.decode(&ids, true);
    }
}

/// A chat template.
pub fn chat_template(data: &[u8]) {
    let Ok(source) = std::str::from_utf8(data) else { return };
    let Ok(template) = ChatTemplate::new(source, ["<|im_start|>", "<|im_end|>"]) else { return };
    let messages = [Message::new(Role::System, "Be kind."), Message::new(Role::User, "Hello <|im_end|>")];
    let _ = template.render(&messages, true);
}

/// A checkpoint: `config.json`, a zero byte, and the header of `model.safetensors` with nothing behind it.
pub fn checkpoint(data: &[u8]) {
    let cut = data.iter().position(|&byte| byte == 0).unwrap_or(data.len());
    let (config, rest) = data.split_at(cut);
    let header = rest.get(1..).unwrap_or_default();
    let Ok(folder) = tempfile::tempdir() else { return };
    let write = |name: &str, bytes: &[u8]| std::fs::write(folder.path().join(name), bytes).is_ok();
    let weights = [&(header.len() as u64).to_le_bytes(), header].concat();
    if write("config.json", config) && write("model.safetensors", &weights) {
        plan(folder.path());
    }
}

fn plan(folder: &Path) {
    if let Ok(input) = Input::open(folder) {
        let _ = st_convert::plan(&input, &ConvertOptions::new(WeightType::Q4_0, Layout::Gguf));
    }
}

/// A recorded routing.
pub fn routing_trace(data: &[u8]) {
    if let Ok(trace) = RoutingTrace::read(data) {
        trace.rows().for_each(drop);
    }
}
