//! `st-tool profile`: runs texts and writes what the model did with them, as numbers, pictures and a page.

use std::fs;
use std::io::{self, Write as _};
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;

use anyhow::Context as _;
use st_experts::TraceHeader;
use st_gguf::{Kind, OutputFile, begins_with};
use st_model::{Batch, Engine, Inputs, LoadOptions, ModelError, Observer, Routing, Session};

use super::engine;
use crate::cli::ProfileArgs;
use crate::context::Context;
use crate::forecast::{Machine, Weights, speed_at};
use crate::hot::Beside;
use crate::models::Model;
use crate::profile::{self, Importance, Profile, TextProfile, Watch};
use crate::report::Advice;
use crate::{input, picture, table, ui};

/// Tokens that go through the model as one text; a longer text is cut into such.
const WINDOW: usize = 2048;

const JSON: Kind = Kind { name: "a profile", recognizes: |bytes| begins_with(bytes, profile::BEGIN.as_bytes()) };
const PAGE: Kind = Kind {
    name: "a profile's page",
    recognizes: |bytes| begins_with(bytes, b"<!doctype html>\n<!-- made by st-tool profile -->"),
};
const PICTURE: Kind =
    Kind { name: "a picture of a profile", recognizes: |bytes| begins_with(bytes, picture::BEGIN.as_bytes()) };

pub(crate) fn run(args: &ProfileArgs, context: &Context) -> anyhow::Result<ExitCode> {
    let texts = args.file.iter().map(|path| Ok((name_of(path), input::prompt(path, &context.interrupt)?)));
    let texts = texts.collect::<anyhow::Result<Vec<_>>>()?;
    fs::create_dir_all(&args.output).with_context(|| format!("cannot create {}", args.output.display()))?;
    // What cannot be written is found out before the work.
    st_gguf::check_output(&args.output.join("profile.json"), JSON, true)?;
    st_gguf::check_output(&args.output.join("report.html"), PAGE, true)?;
    let matrix = args.output.join("imatrix.gguf");
    Importance::check(&matrix)?;
    let file = Model::resolve(&args.model)?.open_gguf(context)?;
    let weights = Weights::of(&file)?;
    let shape = file.header.model_shape()?;
    let beside = args.write_hot.as_ref().map(|model| Beside::of(model, &shape)).transpose()?;
    let mut uses = vec![vec![0; shape.n_experts]; shape.n_layers];
    let ctx = WINDOW.min(shape.context_length);
    let options = LoadOptions {
        beside: Watch::memory(&shape) + Importance::memory(&shape),
        ..engine::options(&args.engine, Some(ctx), None)
    };
    let engine = engine::load_with(file, options, &engine::Loading(context), context)?;
    let machine = Machine::load(&context.env.store, engine::threads(&args.engine), engine.isa());
    let mut profile = Profile {
        st_tool_profile: 1,
        model: args.model.to_string_lossy().into_owned(),
        layers: shape.n_layers,
        experts: shape.n_experts,
        experts_used: shape.n_experts_used,
        neurons: shape.n_ff,
        expert_bytes: engine.plan().slot,
        forecast: machine.is_some(),
        texts: Vec::new(),
    };
    let mut importance = Importance::new(&shape, ctx);
    for (name, text) in texts {
        let watch = run_text(&engine, &name, &text, args.tokens, &mut importance, context)?;
        let all = uses.iter_mut().flatten();
        all.zip(&watch.chosen).for_each(|(uses, more)| *uses += more);
        let mut of_text = TextProfile::of(name, &watch);
        let header = TraceHeader {
            n_layers: shape.n_layers as u32,
            n_experts: shape.n_experts as u32,
            expert_bytes: engine.plan().slot,
            other_bytes: None,
        };
        let live = 1.0 - of_text.statements.mean_sparsity;
        let speed = |found: f64| speed_at(&weights, machine.as_ref()?, found, live);
        of_text.replay(&watch, header, engine.plan().beside_cache() - engine.plan().beside, &speed);
        profile.texts.push(of_text);
        context.interrupt.check()?;
    }
    write(&args.output, &profile)?;
    importance.write(&matrix, &profile.texts.iter().map(|text| text.name.clone()).collect::<Vec<_>>())?;
    if let Some(beside) = beside {
        let path = beside.write(uses)?;
        context.ui.note(format!("{}: the experts that these texts used most", path.display()));
    }
    match args.json {
        true => ui::print_json(&serde_json::to_value(&profile)?)?,
        false => ui::print(&summary(&profile, &args.output))?,
    }
    Ok(ExitCode::SUCCESS)
}

/// The name of a text: that of its file.
fn name_of(path: &Path) -> String {
    match input::is_stdin(path) {
        true => "stdin".to_owned(),
        false => path.file_stem().unwrap_or(path.as_os_str()).to_string_lossy().into_owned(),
    }
}

/// Runs a text, cut into windows, and counts.
fn run_text(
    engine: &Arc<Engine>,
    name: &str,
    text: &str,
    most: usize,
    importance: &mut Importance,
    context: &Context,
) -> anyhow::Result<Watch> {
    let tokenizer = engine.tokenizer().ok_or(ModelError::NoTokenizer)?;
    let mut tokens = tokenizer.encode_prompt(text, true)?;
    tokens.truncate(most);
    if tokens.is_empty() {
        return Err(Advice::new(format!("{name} is empty"), "-f FILE names a text; several may be named").into());
    }
    let bar = ui::count_bar(context.ui, "profiling", tokens.len() as u64);
    let mut watch = Watch::new(engine.config(), bar.clone(), context.interrupt.clone());
    let mut session = Session::new(engine)?;
    for window in tokens.chunks(engine.ctx()) {
        session.reset();
        session.run(window, &mut Both { watch: &mut watch, importance })?;
    }
    bar.finish_and_clear();
    Ok(watch)
}

/// Counts of one text, and sums over all.
struct Both<'a> {
    watch: &'a mut Watch,
    importance: &'a mut Importance,
}

impl Observer for Both<'_> {
    fn routing(&mut self, layer: usize, batch: &Batch, routing: &Routing) -> io::Result<()> {
        self.watch.routing(layer, batch, routing)
    }

    fn watches_neurons(&self) -> bool {
        true
    }

    fn neurons(&mut self, layer: usize, expert: u32, rows: &[u32], live: &[u32]) -> io::Result<()> {
        self.watch.neurons(layer, expert, rows, live)
    }

    fn watches_inputs(&self) -> bool {
        true
    }

    fn inputs(&mut self, layer: usize, of: Inputs<'_>, rows: &[f32]) -> io::Result<()> {
        self.importance.add(layer, of, rows);
        Ok(())
    }

    fn progress(&mut self, done: usize, of: usize) -> ControlFlow<()> {
        self.watch.progress(done, of)
    }
}

fn write(folder: &Path, profile: &Profile) -> anyhow::Result<()> {
    let put = |name: &str, kind: Kind, text: &str| -> anyhow::Result<()> {
        let path: PathBuf = folder.join(name);
        let mut file = OutputFile::create(&path, kind, true)?;
        file.write_all(text.as_bytes()).with_context(|| format!("cannot write {}", path.display()))?;
        Ok(file.finish()?)
    };
    let pictures = profile::pictures(profile);
    for picture in &pictures {
        put(&picture.file, PICTURE, &picture.svg)?;
    }
    put("report.html", PAGE, &profile::page(profile, &pictures))?;
    put("profile.json", JSON, &(serde_json::to_string(profile)? + "\n"))
}

fn summary(profile: &Profile, folder: &Path) -> String {
    let head = [
        "text",
        "tokens",
        "experts rarely used",
        "least median sparsity",
        "mean sparsity",
        "chosen again by the next token",
    ];
    let row = |text: &TextProfile| {
        let s = &text.statements;
        vec![
            text.name.clone(),
            text.tokens.to_string(),
            format!("{:.1} %", 100.0 * s.rarely_used),
            format!("{:.3}", s.least_median_sparsity),
            format!("{:.3}", s.mean_sparsity),
            format!("{:.1} %", 100.0 * text.locality.first().map_or(0.0, |locality| locality.share)),
        ]
    };
    let rows: Vec<_> = std::iter::once(head.map(str::to_owned).to_vec()).chain(profile.texts.iter().map(row)).collect();
    format!("{}\n{}\n", table::markdown(&rows), folder.join("report.html").display())
}
