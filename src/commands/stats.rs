//! What a run cost, in words and as JSON.

use serde_json::{Value, json};
use st_model::{Engine, GenerateStats, StoreStats};

use crate::machine::peak_resident;
use crate::size::show_size;

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
    match peak_resident() {
        Some(bytes) => out.push_str(&format!("memory:     {} resident at the peak", show_size(bytes))),
        None => out.push_str("memory:     not known on this system"),
    }
    if engine.plan().budget.is_some() {
        let store = engine.store_stats();
        let tokens = tokens(stats);
        out.push_str(&format!(
            "\nexperts:    {:.1} % found in memory, {} read per token, {:.2} s stalled on the disk, {:.0} % of reading hidden",
            100.0 * store.hit_rate(),
            show_size(store.bytes_read / tokens),
            store.stall_seconds,
            100.0 * store.hidden_share()
        ));
    }
    out
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
        "peak_resident_bytes": peak_resident(),
        "ctx": engine.ctx(),
    });
    if engine.plan().budget.is_some() {
        object["experts"] = experts_json(&engine.store_stats(), tokens(stats));
    }
    object
}

/// What the expert cache did over `tokens` tokens.
pub(crate) fn experts_json(store: &StoreStats, tokens: u64) -> Value {
    json!({
        "hit_rate": store.hit_rate(),
        "bytes_read": store.bytes_read,
        "bytes_read_per_token": store.bytes_read as f64 / tokens.max(1) as f64,
        "stall_seconds": store.stall_seconds,
        "hidden_share": store.hidden_share(),
    })
}

fn tokens(stats: &GenerateStats) -> u64 {
    (stats.prompt_tokens + stats.generated_tokens).max(1) as u64
}

fn live_share(stats: &GenerateStats) -> f64 {
    match stats.generate_work.neurons {
        0 => 0.0,
        neurons => stats.generate_work.live_neurons as f64 / neurons as f64,
    }
}
