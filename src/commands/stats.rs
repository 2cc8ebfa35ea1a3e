//! What a run cost, in words and as JSON.

use serde_json::{Value, json};
use st_model::{Engine, GenerateStats, HeadStats, StoreStats};

use crate::forecast::{Between, Forecast};
use crate::size::show_size;
use crate::table;
use st_sys::peak_resident;

/// The lines that `--stats` prints.
pub(crate) fn lines(stats: &GenerateStats, engine: &Engine) -> String {
    let mut out = format!(
        "prompt:     {} tokens in {:.2} s, {:.1} tokens/s\n",
        stats.prompt_tokens,
        stats.prompt_time.as_secs_f64(),
        stats.prompt_rate()
    );
    out.push_str(&format!(
        "generation: {} tokens in {:.2} s, {:.1} tokens/s, {:.2} GB/s of weights touched, {:.0} % of neurons live\n",
        stats.generated_tokens,
        stats.generate_time.as_secs_f64(),
        stats.generate_rate(),
        stats.weight_bandwidth() / 1e9,
        100.0 * live_share(stats)
    ));
    if stats.drafts.passes > 0 {
        let (drafts, share) = (stats.drafts, 100.0 * stats.drafts.accepted_share());
        out.push_str(&format!("drafts:     {} of {} accepted ({share:.0} %)\n", drafts.accepted, drafts.drafted));
    }
    if let Some(head) = engine.head_stats() {
        out.push_str(&format!("head:       {}\n", head_line(&head)));
    }
    match peak_resident() {
        Some(bytes) => out.push_str(&format!("memory:     {} resident at the peak", show_size(bytes))),
        None => out.push_str("memory:     not known on this system"),
    }
    if engine.plan().reports_cache() {
        out.push_str(&format!("\n{}", experts_table(&parts(stats)).trim_end()));
    }
    out
}

/// What was forecast, on a line below what came.
pub(crate) fn forecast_line(forecast: &Forecast) -> String {
    let between = |b: Between| format!("{:.1} ({:.1}–{:.1})", b.expected, b.low, b.high);
    format!(
        "forecast:   prompt {}, generation {} tokens/s; {:.0} % of experts found in memory, {} read per token",
        between(forecast.prompt),
        between(forecast.generation),
        100.0 * forecast.found,
        show_size(forecast.bytes as u64)
    )
}

/// What a sparse head did.
pub(crate) fn head_line(head: &HeadStats) -> String {
    let lost = match head.lost_share() {
        Some(share) => format!("; the likeliest token lost in {:.2} % of {}", 100.0 * share, head.positions),
        None => String::new(),
    };
    format!(
        "approximate: {:.1} % of rows computed, those that score above {}{lost}",
        100.0 * head.computed_share(),
        head.threshold
    )
}

/// The same as an object.
pub(crate) fn head_json(head: &HeadStats) -> Value {
    json!({
        "approximate": true,
        "threshold": head.threshold,
        "positions": head.positions,
        "rows_computed_share": head.computed_share(),
        "likeliest_lost": head.lost,
        "likeliest_lost_share": head.lost_share(),
    })
}

/// What the expert cache did for a part of the work.
pub(crate) struct ExpertWork {
    /// What the part is called.
    pub(crate) name: String,
    /// What the cache counted.
    pub(crate) store: StoreStats,
    /// Tokens run meanwhile.
    pub(crate) tokens: u64,
}

/// Prompt and generation, as far as there was any.
fn parts(stats: &GenerateStats) -> Vec<ExpertWork> {
    let all = [
        ("prompt", stats.prompt_experts, stats.prompt_work),
        ("generation", stats.generate_experts, stats.generate_work),
    ];
    let some = all.into_iter().filter(|(_, _, work)| work.tokens > 0);
    some.map(|(name, store, work)| ExpertWork { name: name.into(), store, tokens: work.tokens }).collect()
}

/// A table of what the expert cache did, part by part.
pub(crate) fn experts_table(parts: &[ExpertWork]) -> String {
    let head = [
        "experts",
        "found in memory",
        "hits",
        "misses",
        "read per token",
        "stalled",
        "hidden",
        "guesses right",
        "evictions",
        "rereads",
    ];
    let row = |ExpertWork { name, store, tokens }: &ExpertWork| {
        vec![
            name.clone(),
            format!("{:.1} %", 100.0 * store.hit_rate()),
            store.hits.to_string(),
            store.misses().to_string(),
            show_size(store.bytes_read / (*tokens).max(1)),
            format!("{:.2} s", store.stall_seconds),
            format!("{:.0} %", 100.0 * store.hidden_share()),
            store.guess_right_share().map_or_else(|| "–".to_owned(), |share| format!("{:.0} %", 100.0 * share)),
            store.evictions.to_string(),
            store.rereads.to_string(),
        ]
    };
    let rows: Vec<_> = std::iter::once(head.map(str::to_owned).to_vec()).chain(parts.iter().map(row)).collect();
    table::markdown(&rows)
}

/// The same as an object.
pub(crate) fn json(stats: &GenerateStats, engine: &Engine) -> Value {
    let mut object = json!({
        "prompt_tokens": stats.prompt_tokens,
        "prompt_seconds": stats.prompt_time.as_secs_f64(),
        "prompt_tokens_per_second": stats.prompt_rate(),
        "generated_tokens": stats.generated_tokens,
        "generation_seconds": stats.generate_time.as_secs_f64(),
        "generation_tokens_per_second": stats.generate_rate(),
        "weight_bytes_per_second": stats.weight_bandwidth(),
        "live_neuron_share": live_share(stats),
        "drafted_tokens": stats.drafts.drafted,
        "accepted_tokens": stats.drafts.accepted,
        "peak_resident_bytes": peak_resident(),
        "ctx": engine.ctx(),
    });
    if let Some(head) = engine.head_stats() {
        object["sparse_head"] = head_json(&head);
    }
    if engine.plan().reports_cache() {
        object["experts"] = cache_json(engine);
        for part in parts(stats) {
            object["experts"][&part.name] = experts_json(&part);
        }
    }
    object
}

/// The size of the expert cache.
pub(crate) fn cache_json(engine: &Engine) -> Value {
    json!({"slots": engine.plan().n_slots(), "lent_slots": engine.plan().lent, "experts": engine.plan().n_experts_total})
}

/// What the expert cache did for a part of the work, as an object.
pub(crate) fn experts_json(ExpertWork { store, tokens, .. }: &ExpertWork) -> Value {
    json!({
        "hits": store.hits,
        "misses": store.misses(),
        "hit_rate": store.hit_rate(),
        "bytes_read": store.bytes_read,
        "bytes_read_per_token": store.bytes_read as f64 / (*tokens).max(1) as f64,
        "stall_seconds": store.stall_seconds,
        "io_seconds": store.io_seconds,
        "hidden_share": store.hidden_share(),
        "guesses": store.guess_judged,
        "guesses_right": store.guess_right,
        "guess_right_share": store.guess_right_share(),
        "loads": store.loads,
        "evictions": store.evictions,
        "rereads": store.rereads,
        "retries": store.retries,
    })
}

fn live_share(stats: &GenerateStats) -> f64 {
    match stats.generate_work.neurons {
        0 => 0.0,
        neurons => stats.generate_work.live_neurons as f64 / neurons as f64,
    }
}
