//! `st-tool cache-sim`: what caches of other sizes and policies would have done with recorded routing.

use std::io::BufReader;
use std::process::ExitCode;

use serde_json::{Value, json};
use st_experts::cache_sim::{BELADY, Replay, SimRow, Tally};
use st_experts::{Policy, RoutingTrace, TraceHeader};
use st_model::MemoryPlan;

use crate::cli::CacheSimArgs;
use crate::context::Context;
use crate::report::Advice;
use crate::size::show_size;
use crate::{input, table, ui};

pub(crate) fn run(args: &CacheSimArgs, context: &Context) -> anyhow::Result<ExitCode> {
    let trace = input::with(&args.file, &context.interrupt, |file| RoutingTrace::read(BufReader::new(file)))?;
    let replay = Replay::new(&trace);
    let header = trace.header();
    let mut sizes = Vec::new();
    for n_slots in sizes_of(args, &replay, header)? {
        context.interrupt.check()?;
        sizes.push(Size { n_slots, header, rows: replay.all_policies(n_slots) });
    }
    match args.json {
        true => ui::print_json(&json(&sizes, header, &replay))?,
        false => ui::print(&tables(&sizes, header, &replay))?,
    }
    Ok(ExitCode::SUCCESS)
}

/// One size of the cache: what every policy does with it.
struct Size {
    n_slots: usize,
    header: Option<TraceHeader>,
    rows: Vec<SimRow>,
}

impl Size {
    fn cache_bytes(&self) -> Option<u64> {
        Some((self.n_slots as u64).saturating_mul(self.header?.expert_bytes))
    }

    /// The `--memory` that gives so many slots.
    fn memory(&self) -> Option<u64> {
        Some(MemoryPlan::budget_for(self.header?.other_bytes?.saturating_add(self.cache_bytes()?)))
    }
}

/// The sizes that were asked for, in slots.
fn sizes_of(args: &CacheSimArgs, replay: &Replay, header: Option<TraceHeader>) -> anyhow::Result<Vec<usize>> {
    let least = replay.min_slots();
    if args.memory.is_empty() {
        if let Some(few) = args.slots.iter().find(|&&n_slots| n_slots < least) {
            let message = format!("a cache of {few} experts is too small for this model: it needs at least {least}");
            return Err(Advice::new(message, format!("--slots {least} is the least that works")).into());
        }
        return Ok(if args.slots.is_empty() { replay.default_slots() } else { args.slots.clone() });
    }
    let Some(TraceHeader { expert_bytes: expert @ 1.., other_bytes: Some(other), .. }) = header else {
        let message = format!("{} does not say how much memory the recorded run took", input::name(&args.file));
        return Err(Advice::new(message, "--slots gives the sizes in experts").into());
    };
    let slots = |&budget: &u64| -> anyhow::Result<usize> {
        let cache = MemoryPlan::within_reserve(budget).and_then(|usable| usable.checked_sub(other)).unwrap_or(0);
        let n_slots = usize::try_from(cache / expert).unwrap_or(usize::MAX).min(replay.n_experts_in_all());
        if n_slots < least {
            let minimum = MemoryPlan::budget_for(other.saturating_add(expert.saturating_mul(least as u64)));
            let message = format!("{} leave no room for the experts of a token", show_size(budget));
            let hint =
                format!("--memory {}MiB is the least that works with the recorded context", minimum.div_ceil(1 << 20));
            return Err(Advice::new(message, hint).into());
        }
        Ok(n_slots)
    };
    args.memory.iter().map(slots).collect()
}

/// A part of a trace.
struct Part {
    name: &'static str,
    what: &'static str,
    /// Its share of a row.
    of: fn(&SimRow) -> Tally,
}

const PARTS: [Part; 2] = [
    Part { name: "generation", what: "tokens that were made", of: |row| row.generated },
    Part { name: "prompt", what: "tokens that were read", of: |row| row.prompt },
];

fn tables(sizes: &[Size], header: Option<TraceHeader>, replay: &Replay) -> String {
    let mut out = String::new();
    let policies = Policy::ALL.map(Policy::name).into_iter().chain([BELADY]).map(str::to_owned);
    let mut head: Vec<String> = vec!["slots".into()];
    head.extend(header.map(|_| "cache".into()));
    head.extend(header.and_then(|header| header.other_bytes).map(|_| "--memory".into()));
    head.extend(policies);
    for Part { name, what, of } in PARTS {
        let tokens = sizes[0].rows.first().map_or(0, |row| of(row).tokens);
        if tokens == 0 {
            continue;
        }
        let mut rows = vec![head.clone()];
        for size in sizes {
            let mut row = vec![size.n_slots.to_string()];
            row.extend(size.cache_bytes().map(show_size));
            row.extend(size.memory().map(|bytes| format!("{}MiB", bytes.div_ceil(1 << 20))));
            row.extend(size.rows.iter().map(|row| cell(of(row), header)));
            rows.push(row);
        }
        out.push_str(&format!("{name}: {tokens} {what}\n{}\n", table::markdown(&rows)));
    }
    let unit = if header.is_some() { "bytes" } else { "experts" };
    out.push_str(&format!(
        "Each cell: experts found in the cache, and {unit} read per token; {} experts in all. `run` uses {}; {BELADY} \
         knows the future: no policy does better.\n",
        replay.n_experts_in_all(),
        Policy::default().name(),
    ));
    out
}

fn cell(tally: Tally, header: Option<TraceHeader>) -> String {
    let read = match header {
        Some(header) => show_size((tally.misses_per_token() * header.expert_bytes as f64) as u64),
        None => format!("{:.2}", tally.misses_per_token()),
    };
    format!("{:.1} % {read:>9}", 100.0 * tally.hit_rate())
}

fn json(sizes: &[Size], header: Option<TraceHeader>, replay: &Replay) -> Value {
    let tally = |tally: Tally| {
        json!({
            "hits": tally.hits,
            "misses": tally.misses(),
            "hit_rate": tally.hit_rate(),
            "experts_read_per_token": tally.misses_per_token(),
            "bytes_read_per_token": header.map(|header| tally.misses_per_token() * header.expert_bytes as f64),
        })
    };
    let of_size = |size: &Size| {
        let policies: Vec<Value> = size
            .rows
            .iter()
            .map(|row| {
                let mut object = json!({"policy": row.policy});
                for Part { name, of, .. } in PARTS {
                    object[name] = tally(of(row));
                }
                object
            })
            .collect();
        json!({
            "slots": size.n_slots,
            "cache_bytes": size.cache_bytes(),
            "memory_bytes": size.memory(),
            "policies": policies,
        })
    };
    let mut object = json!({
        "experts": replay.n_experts_in_all(),
        "expert_bytes": header.map(|header| header.expert_bytes),
        "sizes": sizes.iter().map(of_size).collect::<Vec<_>>(),
    });
    for Part { name, of, .. } in PARTS {
        object[format!("{name}_tokens")] = sizes[0].rows.first().map_or(0, |row| of(row).tokens).into();
    }
    object
}
