//! `st-tool inspect`: what is in a GGUF file, of any architecture.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::process::ExitCode;

use serde_json::json;
use st_gguf::{Array, ExpertIndex, GgufError, GgufFile, Header, Layout, Matrix, Value};

use super::check::{self, Checked};
use super::engine;
use crate::cli::InspectArgs;
use crate::context::Context;
use crate::models::Model;
use crate::shown::escaped;
use crate::size::show_size;
use crate::ui;

/// Characters of a text, and elements of an array, that are shown.
const SHOWN_TEXT: usize = 100;
const SHOWN_ELEMENTS: usize = 8;

pub(crate) fn run(args: &InspectArgs, context: &Context) -> anyhow::Result<ExitCode> {
    let file = Model::resolve(&args.model)?.open_gguf(context)?;
    let checked = if args.check { Some(check::run(&file, context)?) } else { None };
    let verdict = checked.as_ref().map_or(Ok(()), |checked| checked.verdict(context.ui));
    engine::tell_of_ignored(&file.header, context);
    if args.json {
        let mut object = json(&file, args.tensors);
        if let Some(checked) = &checked {
            object["check"] = checked.json();
        }
        ui::print_json(&object)?;
    } else if verdict.is_ok() {
        ui::print(&(table(&file, args.tensors) + &checked.as_ref().map(Checked::text).unwrap_or_default()))?;
    }
    verdict?;
    Ok(ExitCode::SUCCESS)
}

/// Tensors and bytes per type, most bytes first.
pub(super) fn by_type(header: &Header) -> Vec<(&'static str, usize, u64)> {
    let mut types: BTreeMap<&'static str, (usize, u64)> = BTreeMap::new();
    for tensor in &header.tensors {
        let entry = types.entry(tensor.ty.name()).or_default();
        entry.0 += 1;
        entry.1 = entry.1.saturating_add(tensor.n_bytes);
    }
    let mut list: Vec<_> = types.into_iter().map(|(name, (count, bytes))| (name, count, bytes)).collect();
    list.sort_by_key(|&(name, _, bytes)| (std::cmp::Reverse(bytes), name));
    list
}

/// Where the experts of a model that can be run lie.
fn experts(header: &Header) -> Result<ExpertIndex, GgufError> {
    ExpertIndex::from_header(header, &header.model_shape()?)
}

/// What the experts of a layer are, in words, and the layers of which that is true.
fn kinds_of_layers(index: &ExpertIndex) -> Vec<(Vec<usize>, String)> {
    let mut kinds: Vec<(Vec<usize>, String)> = Vec::new();
    for layer in 0..index.n_layers() {
        let [gate, up, down] = index.types(layer);
        let types = match (gate == up, up == down) {
            (true, true) => gate.to_string(),
            (true, false) => format!("gate and up {gate}, down {down}"),
            _ => format!("gate {gate}, up {up}, down {down}"),
        };
        let bytes: u64 = match index.record(layer, 0) {
            Some(record) => record.len,
            None => Matrix::ALL.map(|matrix| index.matrix(layer, 0, matrix).len).iter().sum(),
        };
        let place = match index.layout() {
            Layout::Gguf => "three matrices",
            Layout::Offload => "a record",
        };
        let kind = format!("{types}, each expert {place} of {}", show_size(bytes));
        match kinds.iter_mut().find(|(_, known)| *known == kind) {
            Some((layers, _)) => layers.push(layer),
            None => kinds.push((vec![layer], kind)),
        }
    }
    kinds
}

/// Ascending numbers of layers in words: `layers 0 to 3, 6, 9`.
fn spans(layers: &[usize]) -> String {
    let mut spans: Vec<(usize, usize)> = Vec::new();
    for &layer in layers {
        match spans.last_mut() {
            Some((_, last)) if *last + 1 == layer => *last = layer,
            _ => spans.push((layer, layer)),
        }
    }
    let shown = |&(first, last): &(usize, usize)| match last - first {
        0 => first.to_string(),
        1 => format!("{first}, {last}"),
        _ => format!("{first} to {last}"),
    };
    let list = spans.iter().map(shown).collect::<Vec<_>>().join(", ");
    if layers.len() == 1 { format!("layer {list}") } else { format!("layers {list}") }
}

fn table(file: &GgufFile, tensors: bool) -> String {
    let header = &file.header;
    let mut out = format!(
        "{}: GGUF version {}, {}, alignment {}\n",
        escaped(header.file_name()),
        header.version,
        show_size(header.file_len),
        header.alignment
    );
    let width = header.metadata.iter().map(|(key, _)| key.chars().count()).max().unwrap_or(0);
    for (key, value) in header.metadata.iter() {
        let _ = writeln!(out, "  {:width$}  {}", escaped(key), show(value));
    }
    match experts(header) {
        Ok(index) => {
            let (layers, experts) = (index.n_layers(), index.n_experts());
            let _ = writeln!(out, "layout {}: {layers} layers of {experts} experts each", index.layout().name());
            for (layers, kind) in kinds_of_layers(&index) {
                let _ = writeln!(out, "  {}: {kind}", spans(&layers));
            }
        }
        Err(error) => {
            let _ = writeln!(out, "not a SmallThinker model that can be run: {}", escaped(&error.to_string()));
        }
    }
    for (name, count, bytes) in by_type(header) {
        let _ = writeln!(out, "{name:>8}  {count:>5} tensors  {:>10}", show_size(bytes));
    }
    if tensors {
        let width = header.tensors.iter().map(|tensor| tensor.name.chars().count()).max().unwrap_or(0);
        for tensor in &header.tensors {
            let shape: Vec<String> = tensor.shape.iter().map(u64::to_string).collect();
            let _ = writeln!(
                out,
                "{:width$}  {:6}  {:>20}  {:>10}  at {}",
                escaped(&tensor.name),
                tensor.ty.name(),
                shape.join(" x "),
                show_size(tensor.n_bytes),
                tensor.offset
            );
        }
    }
    out
}

fn show(value: &Value) -> String {
    match value {
        Value::String(text) => show_text(text),
        Value::Octets(bytes) => show_text(&String::from_utf8_lossy(bytes)),
        Value::Array(array) => {
            let shown: Vec<String> =
                (0..array.len().min(SHOWN_ELEMENTS)).map(|i| escaped(&element(array, i).to_string())).collect();
            let more = match array.len() - shown.len() {
                0 => String::new(),
                _ => format!(", … {} in all", array.len()),
            };
            format!("[{}{more}]", shown.join(", "))
        }
        scalar => to_json(scalar).to_string(),
    }
}

fn show_text(text: &str) -> String {
    let cut: String = text.chars().take(SHOWN_TEXT).collect();
    let more = if cut.len() < text.len() { "…" } else { "" };
    escaped(&cut) + more
}

fn json(file: &GgufFile, tensors: bool) -> serde_json::Value {
    let header = &file.header;
    let metadata: serde_json::Map<_, _> =
        header.metadata.iter().map(|(key, value)| (key.to_owned(), to_json(value))).collect();
    let types: Vec<_> = by_type(header)
        .into_iter()
        .map(|(name, count, bytes)| json!({"type": name, "tensors": count, "bytes": bytes}))
        .collect();
    let layout = experts(header).ok().map(|index| index.layout().name());
    let mut object = json!({
        "file": header.file_name(),
        "version": header.version,
        "alignment": header.alignment,
        "bytes": header.file_len,
        "layout": layout,
        "metadata": metadata,
        "types": types,
    });
    if tensors {
        let list = header.tensors.iter().map(|tensor| {
            json!({
                "name": tensor.name,
                "type": tensor.ty.name(),
                "shape": tensor.shape,
                "bytes": tensor.n_bytes,
                "offset": tensor.offset,
            })
        });
        object["tensors"] = list.collect();
    }
    object
}

fn to_json(value: &Value) -> serde_json::Value {
    match value {
        Value::U8(x) => json!(x),
        Value::I8(x) => json!(x),
        Value::U16(x) => json!(x),
        Value::I16(x) => json!(x),
        Value::U32(x) => json!(x),
        Value::I32(x) => json!(x),
        Value::U64(x) => json!(x),
        Value::I64(x) => json!(x),
        Value::F32(x) => json!(x),
        Value::F64(x) => json!(x),
        Value::Bool(x) => json!(x),
        Value::String(x) => json!(x),
        Value::Octets(x) => json!(String::from_utf8_lossy(x)),
        Value::Array(array) => (0..array.len()).map(|i| element(array, i)).collect(),
    }
}

/// Element `i`, which exists.
fn element(array: &Array, i: usize) -> serde_json::Value {
    match array {
        Array::U8(items) => json!(items[i]),
        Array::I8(items) => json!(items[i]),
        Array::U16(items) => json!(items[i]),
        Array::I16(items) => json!(items[i]),
        Array::U32(items) => json!(items[i]),
        Array::I32(items) => json!(items[i]),
        Array::U64(items) => json!(items[i]),
        Array::I64(items) => json!(items[i]),
        Array::F32(items) => json!(items[i]),
        Array::F64(items) => json!(items[i]),
        Array::Bool(items) => json!(items[i]),
        Array::String(items) => json!(items.get(i)),
        Array::Octets(items) => json!(items.get(i).map(String::from_utf8_lossy)),
        Array::Array(items) => (0..items[i].len()).map(|j| element(&items[i], j)).collect(),
    }
}
