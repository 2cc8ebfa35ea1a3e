//! What the server counts, in the text format of Prometheus.

use std::fmt::Write as _;

use st_model::Engine;

use crate::app::App;

/// The page of numbers.
struct Page(String);

impl Page {
    /// A number with its name, kind and meaning.
    fn add(&mut self, name: &str, kind: &str, help: &str, value: impl std::fmt::Display) {
        let _ = write!(self.0, "# HELP st_{name} {help}\n# TYPE st_{name} {kind}\nst_{name} {value}\n");
    }

    fn counter(&mut self, name: &str, help: &str, value: impl std::fmt::Display) {
        self.add(name, "counter", help, value);
    }

    fn gauge(&mut self, name: &str, help: &str, value: impl std::fmt::Display) {
        self.add(name, "gauge", help, value);
    }
}

/// All numbers.
pub(super) fn text(app: &App) -> String {
    let m = &app.metrics;
    let mut page = Page(String::new());
    page.0.push_str("# HELP st_http_responses_total Responses by the first digit of their status.\n");
    page.0.push_str("# TYPE st_http_responses_total counter\n");
    for (hundreds, number) in m.responses.iter().enumerate().skip(1) {
        let _ = writeln!(page.0, "st_http_responses_total{{status=\"{hundreds}xx\"}} {}", number.get());
    }
    page.counter("requests_refused_total", "Requests that found the queue full.", m.refused.get());
    page.counter("requests_hung_up_total", "Answers that ended since their client had gone.", m.hung_up.get());
    page.counter("prompt_tokens_total", "Tokens of the prompts of all answers that began.", m.prompt_tokens.get());
    page.counter("prompt_tokens_cached_total", "Of them, tokens that were not run again.", m.cached_tokens.get());
    page.counter("prefix_hits_total", "Answers that began with tokens that were not run again.", m.prefix_hits.get());
    page.counter("prompt_tokens_read_total", "Tokens of prompts that were run.", m.read_tokens.get());
    page.counter("completion_tokens_total", "Tokens of answers.", m.made_tokens.get());
    page.counter("drafted_tokens_total", "Tokens that were drafted and run.", m.drafted.get());
    page.counter("drafted_tokens_accepted_total", "Of them, tokens that are part of an answer.", m.accepted.get());
    page.counter("steps_total", "Passes through the layers.", m.steps.get());
    page.counter("busy_seconds_total", "Time in them.", m.busy.seconds());
    page.gauge("prompt_piece", "Tokens of prompts that are read at once while others are answered.", m.piece.get());
    page.gauge("connections", "Connections that are open.", m.connections.get());
    page.gauge("queue_length", "Jobs that wait.", app.queue.len());
    page.gauge("conversations", "Answers under way.", app.slots.busy());
    page.gauge("conversations_most", "Answers that may be under way at once.", app.settings.parallel);
    page.gauge("prefixes", "Texts that are kept for those that begin like them.", m.prefixes.get());
    page.gauge("snapshots", "Texts that are kept on disk.", m.snapshots.get());
    page.gauge("snapshot_bytes", "Bytes of them.", m.snapshot_bytes.get());
    page.gauge("kv_pages", "Pages of keys and values in use.", m.kv_pages.get());
    if let Some(bytes) = st_sys::resident() {
        page.gauge("resident_bytes", "Memory of this process.", bytes);
    }
    page.gauge("loaded_share", "Share of the weights that are read.", app.loaded());
    if let Ok(engine) = app.engine() {
        of_engine(&mut page, engine);
    }
    page.0
}

fn of_engine(page: &mut Page, engine: &Engine) {
    let (plan, store) = (engine.plan(), engine.store_stats());
    page.gauge("kv_pages_most", "Pages of keys and values that the plan counts.", engine.planned_pages());
    if let Some(budget) = plan.budget {
        page.gauge("memory_budget_bytes", "The most memory that this process may take.", budget);
    }
    page.gauge("expert_slots", "Experts that have a place in memory.", engine.expert_slots());
    page.gauge("experts", "Experts of the model.", plan.n_experts_total);
    page.counter("expert_lookups_total", "Experts that were asked for.", store.lookups);
    page.counter("expert_hits_total", "Of them, experts that were in memory.", store.hits);
    page.counter("expert_evictions_total", "Experts that gave up their place.", store.evictions);
    page.counter("expert_read_bytes_total", "Bytes of experts that were read.", store.bytes_read);
    page.counter("expert_stall_seconds_total", "Time in which computing waited for an expert.", store.stall_seconds);
    page.counter("expert_failures_total", "Reads of experts that failed for good.", store.failures);
}
