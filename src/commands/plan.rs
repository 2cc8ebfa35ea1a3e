//! `st-tool plan`: what a model would take and how fast it would be here, before it is fetched, converted or loaded.

use std::ffi::OsStr;
use std::io::BufReader;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use serde_json::{Value, json};
use st_experts::RoutingTrace;
use st_experts::cache_sim::Replay;
use st_gguf::{GgufFile, ModelShape};
use st_hub::DownloadRequest;
use st_model::{LoadOptions, MemoryPlan, ModelError, Planner};
use st_server::Settings;
use st_sys::{available_memory, physical_cores};

use crate::cli::PlanArgs;
use crate::context::Context;
use crate::forecast::{Between, Forecast, Machine, Routing, Weights, made};
use crate::models::Model;
use crate::planned::Planned;
use crate::repos::hub;
use crate::size::show_size;
use crate::{forecast, input, table, ui};

const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;
/// Budgets that are looked at where none are asked for, at most.
const RUNGS: usize = 7;

pub(crate) fn run(args: &PlanArgs, context: &Context) -> anyhow::Result<ExitCode> {
    let trace = args
        .routing
        .as_deref()
        .map(|path| input::with(path, &context.interrupt, |file| RoutingTrace::read(BufReader::new(file))));
    let recorded = trace.transpose()?.map(|trace| Routing::Recorded(Replay::new(&trace)));
    let planned = find(&args.model, context)?;
    let weights = Weights::of(&planned.file)?;
    // Before anything is measured, which takes memory that a run does not.
    let memory = Memory::of(&planned, args)?;
    context.interrupt.check()?;
    let file = planned.on_disk.as_deref();
    let (machine, layer) = measured(&weights, args.threads.0, file, recorded.is_none(), context)?;
    let routing = recorded.unwrap_or_else(|| Routing::Curve(machine.routing.clone()));
    let of = |plan: &MemoryPlan| Forecast::of(&weights, plan, &machine, &layer, &routing);
    let rungs: Vec<Rung> = memory.plans.iter().map(|plan| Rung { plan: plan.clone(), forecast: of(plan) }).collect();
    let smaller = smaller(&weights, args, &machine, context)?;
    let report = Report {
        planned: &planned,
        weights: &weights,
        memory: &memory,
        machine: &machine,
        rungs,
        routing: &routing,
        smaller,
    };
    match args.json {
        true => ui::print_json(&report.json())?,
        false => ui::print(&report.text())?,
    }
    Ok(ExitCode::SUCCESS)
}

/// Finds out what `name` is, and reads its header.
fn find(name: &OsStr, context: &Context) -> anyhow::Result<Planned> {
    let written = name.to_string_lossy().into_owned();
    let here = |path: PathBuf| Ok(Planned::of_file(written.clone(), GgufFile::open(&path)?, Some(path)));
    let wanted = match Model::resolve(name)? {
        Model::Folder(path) => return Planned::of_folder(written, &path),
        Model::File(path) => return here(path),
        model @ Model::Tiny => return Ok(Planned::of_file(written, model.open_gguf(context)?, None)),
        Model::Hub(wanted) => wanted,
    };
    if let Some(path) = wanted.here(context)? {
        return here(path);
    }
    let hub = hub(context);
    match wanted.published(&hub, None)? {
        Some(found) => Planned::of_published(written, &found.listing, &found.model, hub),
        None => {
            let listing = hub.list(&DownloadRequest::new(wanted.repo))?;
            Planned::of_checkpoint(written, &listing, &hub, &context.env.store)
        }
    }
}

/// A budget, or none, and what comes of it.
struct Rung {
    plan: MemoryPlan,
    forecast: Option<Forecast>,
}

/// What is known of this machine, measured as far as it is not.
fn measured(
    weights: &Weights,
    threads: Option<usize>,
    file: Option<&Path>,
    routing: bool,
    context: &Context,
) -> anyhow::Result<(Machine, forecast::LayerSpeed)> {
    let (threads, isa) = (threads.unwrap_or_else(physical_cores), st_model::Kernels::detect().isa());
    let home = &context.env.store;
    let known = Machine::load(home, threads, isa);
    if known.as_ref().is_none_or(|machine| machine.known_layer(&weights.shape).is_none()) {
        context.ui.note("note: measuring this machine, which takes some seconds; the result is kept");
    }
    let mut machine = known.unwrap_or_else(|| Machine::measure(threads, isa));
    context.interrupt.check()?;
    let layer = machine.layer(&weights.shape, isa)?;
    if let Some(path) = file {
        machine.measure_disk(path, weights.read);
    }
    // A file of a few experts says nothing.
    if machine.disk.is_none() {
        machine.measure_disk_of(home, weights.read);
    }
    if routing && machine.routing.is_empty() {
        machine.routing = forecast::builtin(&|| context.interrupt.flow())?;
    }
    context.interrupt.check()?;
    machine.save(home);
    Ok((machine, layer))
}

/// The plans.
struct Memory {
    /// The smallest budget that works.
    least: u64,
    /// What it takes where nothing is bounded.
    most: u64,
    plans: Vec<MemoryPlan>,
}

impl Memory {
    fn of(planned: &Planned, args: &PlanArgs) -> anyhow::Result<Self> {
        let planner = Planner::new(planned.file.clone())?;
        let base = options(args, planner.config());
        let plan = |memory| {
            let mut plan = planner.plan(&LoadOptions { memory, ..base.clone() })?;
            // What is not in the header of a file that is still to be made.
            plan.process += planned.tokenizer;
            Ok::<_, ModelError>(plan)
        };
        let all = plan(None)?;
        let least = match plan(Some(MIB)) {
            Err(ModelError::Budget { minimum, .. }) => minimum + planned.tokenizer,
            Err(error) => return Err(error.into()),
            Ok(_) => MIB,
        };
        let most = MemoryPlan::budget_for(all.total());
        let budgets = if args.memory.is_empty() { ladder(least, most) } else { args.memory.clone() };
        let mut plans = budgets
            .into_iter()
            .map(|budget| {
                plan(Some(budget.saturating_sub(planned.tokenizer).max(1))).map(|mut plan| {
                    plan.budget = Some(budget);
                    plan
                })
            })
            .collect::<Result<Vec<_>, _>>()?;
        if args.memory.is_empty() {
            plans.push(all);
        }
        Ok(Self { least, most, plans })
    }
}

fn options(args: &PlanArgs, shape: &ModelShape) -> LoadOptions {
    let parallel = args.parallel.unwrap_or(1);
    let beside = args.parallel.map_or(0, |parallel| Settings { parallel, ..Settings::new("") }.memory(shape.n_vocab));
    LoadOptions { ctx: args.ctx, sequences: parallel, beside, ..LoadOptions::default() }
}

/// Round budgets from the smallest that works to what holds everything.
fn ladder(least: u64, most: u64) -> Vec<u64> {
    let step = if least < GIB { 64 * MIB } else { GIB / 4 };
    let first = least.next_multiple_of(step);
    let mut budgets = vec![first];
    let round = (0..).map(|i| (256 * MIB) << i).flat_map(|size| [size, size + size / 2]);
    budgets.extend(round.skip_while(|&size| size <= first + first / 8).take_while(|&size| size < most));
    while budgets.len() > RUNGS {
        // The upper ones differ more, so the lower ones are thinned out.
        let at = 1 + (0..budgets.len() - 2).min_by_key(|&i| budgets[i + 2] - budgets[i]).unwrap_or(0);
        budgets.remove(at);
    }
    budgets
}

/// What the small model of the family would do, to compare with a larger one.
fn smaller(
    weights: &Weights,
    args: &PlanArgs,
    machine: &Machine,
    context: &Context,
) -> anyhow::Result<Option<Smaller>> {
    let shape = ModelShape::published_4b();
    if weights.shape.n_layers * weights.shape.n_embd <= shape.n_layers * shape.n_embd || args.parallel.is_some() {
        return Ok(None);
    }
    let file = made::file(&shape, true)?;
    let weights = Weights::of(&file)?;
    let mut machine = machine.clone();
    let layer = machine.layer(&shape, st_model::Kernels::detect().isa())?;
    machine.save(&context.env.store);
    Ok(Some(Smaller { planner: Planner::new(file)?, weights, layer }))
}

struct Smaller {
    planner: Planner,
    weights: Weights,
    layer: forecast::LayerSpeed,
}

struct Report<'a> {
    planned: &'a Planned,
    weights: &'a Weights,
    memory: &'a Memory,
    machine: &'a Machine,
    rungs: Vec<Rung>,
    routing: &'a Routing,
    smaller: Option<Smaller>,
}

impl Report<'_> {
    fn text(&self) -> String {
        let shape = &self.weights.shape;
        let mut out = format!(
            "{}: {} layers of {} experts, of which a token uses {}; {}\n",
            self.planned.name, shape.n_layers, shape.n_experts, shape.n_experts_used, self.planned.source
        );
        if self.planned.fetch > 0 {
            out += &format!("to fetch:  {}\n", show_size(self.planned.fetch));
        }
        if self.planned.disk > 0 {
            let free = self.planned.free.map_or_else(String::new, |free| format!(" of {} free", show_size(free)));
            let short = self.planned.free.is_some_and(|free| free < self.planned.disk);
            out += &format!(
                "disk:      {}{free}{}\n",
                show_size(self.planned.disk),
                if short { ": too little" } else { "" }
            );
        }
        let here =
            available_memory().map_or_else(String::new, |bytes| format!("; {} are available here", show_size(bytes)));
        let (least, most) = (show_size(self.memory.least), show_size(self.memory.most));
        out += &format!("memory:    {least} at least, {most} for all of it{here}\n");
        let disk = self.machine.disk.map_or_else(
            || "not measured".to_owned(),
            |disk| format!("{:.2} GB/s, {:.2} GB/s in bursts", disk.sustained / 1e9, disk.burst / 1e9),
        );
        out += &format!("measured:  memory {:.1} GB/s, disk {disk}\n", self.machine.bandwidth / 1e9);
        out += &format!("routing:   {}\n\n", self.routing_name());
        out += &table::markdown(&self.memory_rows());
        out.push('\n');
        out += &table::markdown(&self.speed_rows());
        out += &format!("\n{}\n", self.advice());
        out
    }

    fn routing_name(&self) -> String {
        match self.routing {
            Routing::Recorded(_) if self.routing.fits(self.weights.shape.n_layers * self.weights.shape.n_experts) => {
                "as recorded".into()
            }
            Routing::Recorded(_) => "as recorded, of a model of another size".into(),
            Routing::Curve(_) => {
                "that of the bundled model; `run --record-routing` records one, --routing takes it".into()
            }
        }
    }

    fn memory_rows(&self) -> Vec<Vec<String>> {
        let head = ["--memory", "weights", "keys and values", "buffers", "program", "experts", "reserve"];
        let row = |Rung { plan, .. }: &Rung| {
            let context = match plan.sequences {
                1 => format!("{} tokens", plan.ctx),
                n => format!("{n} × {} tokens", plan.ctx),
            };
            vec![
                budget_name(plan),
                show_size(plan.dense),
                format!("{} ({context})", show_size(plan.kv_full + plan.kv_window)),
                show_size(plan.scratch + plan.io + plan.template),
                show_size(plan.process + plan.beside),
                format!(
                    "{} ({} of {})",
                    show_size(plan.slot * plan.n_slots() as u64),
                    plan.n_slots(),
                    plan.n_experts_total
                ),
                show_size(plan.reserve),
            ]
        };
        std::iter::once(head.map(str::to_owned).to_vec()).chain(self.rungs.iter().map(row)).collect()
    }

    fn speed_rows(&self) -> Vec<Vec<String>> {
        let head = ["--memory", "found in memory", "read per token", "generation, tokens/s", "prompt, tokens/s"];
        let between = |b: Between| format!("{} ({}–{})", rate(b.expected), rate(b.low), rate(b.high));
        let row = |Rung { plan, forecast }: &Rung| match forecast {
            None => [budget_name(plan)].into_iter().chain((0..4).map(|_| "–".to_owned())).collect(),
            Some(forecast) => vec![
                budget_name(plan),
                format!("{:.0} %", 100.0 * forecast.found),
                show_size(forecast.bytes as u64),
                between(forecast.generation),
                between(forecast.prompt),
            ],
        };
        std::iter::once(head.map(str::to_owned).to_vec()).chain(self.rungs.iter().map(row)).collect()
    }

    /// One sentence: what to do with the memory that there is.
    fn advice(&self) -> String {
        let available = available_memory().unwrap_or(u64::MAX);
        let name = &self.planned.short;
        if available < self.memory.least {
            let least = show_size(self.memory.least);
            return format!(
                "{name} needs {least} at least, and {} are available: close other programs.",
                show_size(available)
            );
        }
        let fits = |rung: &&Rung| rung.plan.budget.unwrap_or(self.memory.most) <= available;
        let Some(best) = self.rungs.iter().rev().find(fits) else {
            return format!("No budget that was asked for is available here; {} are.", show_size(available));
        };
        let Some(forecast) = best.forecast else { return format!("{name} works with {}.", budget_words(&best.plan)) };
        let speed = rate(forecast.generation.expected);
        let with = budget_words(&best.plan);
        if found_all(forecast) {
            return format!("{with} {name} makes about {speed} tokens/s: all of it is in memory.");
        }
        let compare = self.smaller.as_ref().and_then(|smaller| {
            let plan =
                smaller.planner.plan(&LoadOptions { memory: best.plan.budget, ..LoadOptions::default() }).ok()?;
            let its = Forecast::of(&smaller.weights, &plan, self.machine, &smaller.layer, self.routing)?;
            Some(format!("; the 4B would give {}", rate(its.generation.expected)))
        });
        format!("{with} {name} makes about {speed} tokens/s on this disk{}.", compare.unwrap_or_default())
    }

    fn json(&self) -> Value {
        let rung = |Rung { plan, forecast }: &Rung| {
            json!({
                "memory": plan.budget,
                "ctx": plan.ctx,
                "parallel": plan.sequences,
                "plan": {
                    "weights": plan.dense,
                    "keys_and_values": plan.kv_full + plan.kv_window,
                    "buffers": plan.scratch + plan.io,
                    "template": plan.template,
                    "program": plan.process,
                    "beside": plan.beside,
                    "experts": plan.slot * plan.n_slots() as u64,
                    "reserve": plan.reserve,
                    "total": plan.total(),
                },
                "slots": plan.n_slots(),
                "lent_slots": plan.lent,
                "experts": plan.n_experts_total,
                "forecast": forecast.as_ref().map(json),
            })
        };
        json!({
            "model": self.planned.name,
            "source": self.planned.source,
            "fetch_bytes": self.planned.fetch,
            "disk_bytes": self.planned.disk,
            "disk_free_bytes": self.planned.free,
            "smallest_memory": self.memory.least,
            "memory_for_all": self.memory.most,
            "available_memory": available_memory(),
            "machine": {"memory_bytes_per_second": self.machine.bandwidth, "disk": self.machine.disk},
            "routing": self.routing_name(),
            "budgets": self.rungs.iter().map(rung).collect::<Vec<_>>(),
            "advice": self.advice(),
        })
    }
}

/// A forecast as an object.
pub(crate) fn json(forecast: &Forecast) -> Value {
    let between = |b: Between| json!({"low": b.low, "expected": b.expected, "high": b.high});
    json!({
        "prompt_tokens_per_second": between(forecast.prompt),
        "generation_tokens_per_second": between(forecast.generation),
        "hit_rate": forecast.found,
        "experts_read_per_token": forecast.misses,
        "bytes_read_per_token": forecast.bytes,
    })
}

fn found_all(forecast: Forecast) -> bool {
    forecast.found >= 1.0
}

fn rate(tokens: f64) -> String {
    if tokens < 9.95 { format!("{tokens:.1}") } else { format!("{tokens:.0}") }
}

fn budget_name(plan: &MemoryPlan) -> String {
    plan.budget.map_or_else(|| "none".to_owned(), show_size)
}

fn budget_words(plan: &MemoryPlan) -> String {
    plan.budget.map_or_else(|| "Without --memory".to_owned(), |budget| format!("With {}", show_size(budget)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_ladder_goes_from_the_least_to_the_most() {
        for (least, most) in [(20 * MIB, 30 * MIB), (500 * MIB, 3 * GIB), (1200 * MIB, 13 * GIB), (5 * GIB, 90 * GIB)] {
            let budgets = ladder(least, most);
            assert!(budgets[0] >= least && budgets.len() <= RUNGS, "{budgets:?}");
            assert!(
                budgets.is_sorted_by(|a, b| a < b) && budgets[1..].iter().all(|&budget| budget < most),
                "{budgets:?}"
            );
        }
    }
}
