//! `st-tool bench`: prompt and generation speed, and how near they come to what the machine's memory gives.
//!
//! The prompt is English text and generation goes on greedily from it, so that routing and neuron sparsity are the
//! model's own; a file without a tokenizer gets scattered token ids, and the result says so.

use std::io;
use std::ops::ControlFlow;
use std::process::ExitCode;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use serde_json::{Value, json};
use st_model::sampler::{Sampler, SamplerOptions};
use st_model::{
    Batch, BatchKind, Draft, DraftLimit, Engine, GenerateOptions, HeadStats, ModelError, Observer, Routing, Sequence,
    Session, StoreStats, Work, generate,
};

use super::routing::{Recorder, RoutingFile};
use super::stats::{ExpertWork, cache_json, experts_json, experts_table, forecast_line, head_json, head_line};
use super::{engine, plan};
use crate::cli::{BenchArgs, BenchFormat};
use crate::context::Context;
use crate::forecast::{self, Forecast, Weights};
use crate::machine::read_bandwidth;
use crate::models::Model;
use crate::report::Advice;
use crate::size::show_size;
use crate::ui;
use st_sys::{peak_resident, reset_peak_resident};

/// Repeated until it is long enough.
const TEXT: &str = "Once upon a time there was a small fox who lived at the edge of a forest. Every morning it walked down to \
the river to drink, and every morning the river asked it the same question: what did you learn yesterday? The fox thought \
for a while and said that it had learned how the wind turns before rain, and that 17 + 25 = 42. ";

/// Tokens between the beginnings of two conversations' texts.
const APART: usize = 17;

/// Speed of one kind of work over all repetitions.
struct Measured {
    name: String,
    /// Tokens per second of each repetition, ascending.
    rates: Vec<f64>,
    work: Work,
    experts: StoreStats,
    seconds: f64,
}

/// What one repetition took.
struct Repetition {
    seconds: f64,
    work: Work,
    experts: StoreStats,
}

impl Measured {
    fn new(name: String) -> Self {
        Self { name, rates: Vec::new(), work: Work::default(), experts: StoreStats::default(), seconds: 0.0 }
    }

    fn add(&mut self, tokens: usize, Repetition { seconds, work, experts }: Repetition) {
        self.rates.push(tokens as f64 / seconds);
        self.rates.sort_by(f64::total_cmp);
        self.seconds += seconds;
        self.work.add(&work);
        self.experts = self.experts.plus(&experts);
    }

    fn median(&self) -> f64 {
        let (low, high) = ((self.rates.len() - 1) / 2, self.rates.len() / 2);
        (self.rates[low] + self.rates[high]) / 2.0
    }

    fn bytes_per_token(&self) -> f64 {
        self.work.weight_bytes as f64 / self.work.tokens.max(1) as f64
    }

    fn bytes_per_second(&self) -> f64 {
        self.work.weight_bytes as f64 / self.seconds
    }

    fn expert_work(&self) -> ExpertWork {
        ExpertWork { name: self.name.clone(), store: self.experts, tokens: self.work.tokens }
    }

    /// `None` where the neurons were not looked at one by one.
    fn live_share(&self) -> Option<f64> {
        (self.work.neurons > 0).then(|| self.work.live_neurons as f64 / self.work.neurons as f64)
    }
}

pub(crate) fn run(args: &BenchArgs, context: &Context) -> anyhow::Result<ExitCode> {
    if args.generated_tokens == 0 && (args.prompt_tokens == 0 || args.parallel > 1) {
        return Err(
            Advice::new("there is nothing to measure", "give prompt tokens (-p) or generated tokens (-n)").into()
        );
    }
    let routing = args.record_routing.as_deref().map(RoutingFile::create).transpose()?;
    let name = args.model.as_deref().unwrap_or("tiny".as_ref());
    let file = Model::resolve(name)?.open_gguf(context)?;
    let threads = engine::threads(&args.engine);
    // What is wrong with the file is for loading to say.
    let weights = Weights::of(&file).ok();
    // Measured before the model is loaded, with little memory: both must fit the budget.
    let bandwidth = read_bandwidth(threads, args.engine.memory);
    reset_peak_resident();
    // Generation begins after one token that it goes on from.
    let ctx = args.depth.saturating_add(args.prompt_tokens.max(args.generated_tokens.saturating_add(1)));
    let engine = engine::load_for(file, &args.engine, &args.head, Some(ctx), args.parallel, None, context)?;
    let tokens = text_tokens(&engine, ctx + args.parallel * APART)?;

    let mut recorder = routing.map(|file| file.begin(&engine)).transpose()?;
    let watch = Watch { recorder: recorder.as_mut(), context };
    let measured = match args.parallel {
        1 => measure_all(Session::new(&engine)?, &tokens, args, watch),
        _ => measure_together(&engine, &tokens, args, watch).map(|row| vec![row]),
    };
    let rows = match recorder {
        Some(recorder) => recorder.finish(measured, context)?,
        None => measured?,
    };
    let facts = Facts {
        model: &name.to_string_lossy(),
        threads,
        isa: engine.isa().name(),
        depth: args.depth,
        bandwidth,
        routing: if engine.tokenizer().is_some() { "English text" } else { "scattered token ids" },
        cache: engine.plan().reports_cache().then(|| cache_json(&engine)),
        head: engine.head_stats(),
        // It is one of conversations that begin, one at a time.
        forecast: weights
            .and_then(|weights| forecast::known(&context.env.store, &weights, &engine, threads))
            .filter(|_| args.depth == 0 && args.parallel == 1),
    };
    match args.output {
        BenchFormat::Md => ui::print(&markdown(&rows, &facts))?,
        BenchFormat::Json => ui::print_json(&json(&rows, &facts))?,
    }
    Ok(ExitCode::SUCCESS)
}

/// Every repetition of both kinds of work.
fn measure_all(
    mut session: Session,
    tokens: &[u32],
    args: &BenchArgs,
    mut watch: Watch<'_>,
) -> anyhow::Result<Vec<Measured>> {
    let mut prompt = Measured::new(format!("prompt {}", args.prompt_tokens));
    let mut generation = Measured::new(format!("generation {}", args.generated_tokens));
    let mut greedy = Sampler::new(SamplerOptions::greedy())?;
    let mut drafted = args.draft_accept.map(|share| Drafted::new(args, share, session.engine().n_vocab() as u32));
    if let Some(drafted) = &drafted {
        // One session for both, since the memory plan has one: rows that are run one by one are run without drafts.
        session = session.drafted(DraftLimit::Auto).drafted_by(Box::new(drafted.answer.clone()));
    }
    // One more than asked for: the first only warms up.
    for repetition in 0..=args.repetitions {
        let counts = repetition > 0;
        if args.prompt_tokens > 0 {
            start(&mut session, &tokens[..args.depth], &mut watch)?;
            let measured = measure(&mut session, |session| {
                Ok(session.run(&tokens[args.depth..args.depth + args.prompt_tokens], &mut watch)?)
            })?;
            if counts {
                prompt.add(args.prompt_tokens, measured);
            }
        }
        if args.generated_tokens > 0 {
            start(&mut session, &tokens[..=args.depth], &mut watch)?;
            let mut answer = Vec::with_capacity(args.generated_tokens);
            let measured = measure(&mut session, |session| {
                for _ in 0..args.generated_tokens {
                    let next = greedy.sample(session.logits(), 0)?;
                    answer.push(next);
                    session.run(&[next], &mut watch)?;
                }
                Ok(())
            })?;
            if counts {
                generation.add(args.generated_tokens, measured);
            }
            if let Some(drafted) = &mut drafted {
                drafted.run(&mut session, &tokens[..=args.depth], &answer, &mut greedy, counts, &mut watch)?;
            }
        }
        watch.context.interrupt.check()?;
    }

    let drafted = drafted.map(|drafted| drafted.finish(&session));
    Ok([prompt, generation].into_iter().chain(drafted).filter(|row| !row.rates.is_empty()).collect())
}

/// Generation with drafts that are known to be right so often.
struct Drafted {
    answer: Spoiled,
    options: GenerateOptions,
    measured: Measured,
}

impl Drafted {
    fn new(args: &BenchArgs, share: f64, n_vocab: u32) -> Self {
        let answer = Spoiled { share, n_vocab, text: Arc::default() };
        let options = GenerateOptions { max_tokens: Some(args.generated_tokens), ..GenerateOptions::default() };
        let name = format!("generation {}, {:.0} % of drafts right", args.generated_tokens, 100.0 * share);
        Self { answer, options, measured: Measured::new(name) }
    }

    /// Generates `answer`, which is known to follow `prompt`, once more.
    fn run(
        &mut self,
        session: &mut Session,
        prompt: &[u32],
        answer: &[u32],
        greedy: &mut Sampler,
        counts: bool,
        watch: &mut Watch<'_>,
    ) -> anyhow::Result<()> {
        self.answer.set(prompt.iter().chain(answer).copied().collect());
        session.reset();
        let go_on = &mut |_: &str| ControlFlow::Continue(());
        let experts = session.engine().store_stats();
        let made = generate(session, prompt, greedy, &self.options, watch, go_on)?;
        // It may end before the other, which no end token stops.
        anyhow::ensure!(answer.starts_with(&made.ids), "drafts changed the answer");
        if counts && made.stats.generated_tokens > 0 {
            let (seconds, work) = (made.stats.generate_time.as_secs_f64(), made.stats.generate_work);
            let experts = session.engine().store_stats().since(&experts);
            self.measured.add(made.stats.generated_tokens, Repetition { seconds, work, experts });
        }
        Ok(())
    }

    fn finish(self, session: &Session) -> Measured {
        let stats = session.draft_stats();
        let share = 100.0 * stats.accepted_share();
        let name = format!("{}: {} drafted, {share:.0} % accepted", self.measured.name, stats.drafted);
        Measured { name, ..self.measured }
    }
}

/// Drafts what is known to come, with mistakes at places drawn by lot.
#[derive(Clone, Debug)]
struct Spoiled {
    share: f64,
    n_vocab: u32,
    text: Arc<Mutex<Vec<u32>>>,
}

impl Spoiled {
    fn set(&self, text: Vec<u32>) {
        *self.text.lock().unwrap_or_else(PoisonError::into_inner) = text;
    }
}

impl Draft for Spoiled {
    fn propose(&mut self, text: &[u32], most: usize, out: &mut Vec<u32>) -> Result<(), ModelError> {
        let known = self.text.lock().unwrap_or_else(PoisonError::into_inner);
        for (place, &token) in known.iter().enumerate().skip(text.len()).take(most) {
            let lot = (place as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 40;
            let is_right = (lot as f64) < self.share * (1u64 << 24) as f64;
            out.push(if is_right { token } else { (token + 1) % self.n_vocab });
        }
        Ok(())
    }

    fn is_free(&self) -> bool {
        true
    }
}

/// Several conversations, one token of each in every step.
fn measure_together(
    engine: &Engine,
    tokens: &[u32],
    args: &BenchArgs,
    mut watch: Watch<'_>,
) -> anyhow::Result<Measured> {
    let n = args.parallel;
    let mut generation = Measured::new(format!("generation {} × {n}", args.generated_tokens));
    let mut sequences: Vec<Sequence> = (0..n).map(|_| engine.sequence()).collect();
    let mut workspace = engine.workspace()?;
    let mut greedy = Sampler::new(SamplerOptions::greedy())?;
    let (mut batch, mut next) = (Batch::default(), vec![0; n]);
    for repetition in 0..=args.repetitions {
        for (i, sequence) in sequences.iter_mut().enumerate() {
            sequence.reset();
            let prompt = &tokens[i * APART..i * APART + args.depth + 1];
            for piece in prompt.chunks(engine.max_rows()) {
                batch.clear(BatchKind::Prompt);
                let (&last, others) = piece.split_last().unwrap_or((&0, &[]));
                others.iter().for_each(|&token| batch.push(0, token));
                batch.push_with_logits(0, last);
                engine.forward(&batch, &mut [&mut *sequence], &mut workspace, &mut watch)?;
            }
            next[i] = greedy.sample(workspace.logits(0), 0)?;
        }
        let (work, experts, start) = (workspace.work(), engine.store_stats(), Instant::now());
        for _ in 0..args.generated_tokens {
            batch.clear(BatchKind::Decode);
            next.iter().enumerate().for_each(|(i, &token)| {
                batch.push_with_logits(i, token);
            });
            let mut all: Vec<&mut Sequence> = sequences.iter_mut().collect();
            engine.forward(&batch, &mut all, &mut workspace, &mut watch)?;
            for (i, next) in next.iter_mut().enumerate() {
                *next = greedy.sample(workspace.logits(i), 0)?;
            }
        }
        let seconds = start.elapsed().as_secs_f64();
        if repetition > 0 {
            let (work, experts) = (workspace.work().since(&work), engine.store_stats().since(&experts));
            generation.add(n * args.generated_tokens, Repetition { seconds, work, experts });
        }
    }
    Ok(generation)
}

/// What belongs to all rows.
struct Facts<'a> {
    model: &'a str,
    threads: usize,
    /// Whose kernels computed.
    isa: &'static str,
    depth: usize,
    /// Bytes per second.
    bandwidth: f64,
    routing: &'static str,
    /// The size of the expert cache, where there is a budget.
    cache: Option<Value>,
    /// What a sparse head did, warming up included.
    head: Option<HeadStats>,
    /// How fast it was to be.
    forecast: Option<Forecast>,
}

/// Records the routing, and stops on request.
struct Watch<'a> {
    recorder: Option<&'a mut Recorder>,
    context: &'a Context,
}

impl Observer for Watch<'_> {
    fn routing(&mut self, layer: usize, batch: &Batch, routing: &Routing) -> io::Result<()> {
        self.recorder.as_mut().map_or(Ok(()), |recorder| recorder.routing(layer, batch, routing))
    }

    fn takes_drafts(&self) -> bool {
        self.recorder.is_none()
    }

    fn progress(&mut self, _: usize, _: usize) -> ControlFlow<()> {
        self.context.interrupt.flow()
    }
}

fn start(session: &mut Session, tokens: &[u32], watch: &mut Watch<'_>) -> anyhow::Result<()> {
    session.reset();
    if !tokens.is_empty() {
        session.run(tokens, watch)?;
    }
    Ok(())
}

/// What `act` takes.
fn measure(session: &mut Session, act: impl FnOnce(&mut Session) -> anyhow::Result<()>) -> anyhow::Result<Repetition> {
    let (work, experts) = (session.work(), session.engine().store_stats());
    let start = Instant::now();
    act(session)?;
    Ok(Repetition {
        seconds: start.elapsed().as_secs_f64(),
        work: session.work().since(&work),
        experts: session.engine().store_stats().since(&experts),
    })
}

fn text_tokens(engine: &Engine, n: usize) -> anyhow::Result<Vec<u32>> {
    let once = match engine.tokenizer() {
        Some(tokenizer) => tokenizer.encode(TEXT, false)?,
        None => {
            let n_vocab = engine.n_vocab() as u64;
            (0..997u64).map(|i| (i.wrapping_mul(0x9e37_79b9_7f4a_7c15) % n_vocab) as u32).collect()
        }
    };
    Ok(once.iter().copied().cycle().take(n).collect())
}

fn markdown(rows: &[Measured], facts: &Facts<'_>) -> String {
    let mut out = String::from(
        "| test | tokens/s | min | max | weights per token | GB/s | of memory bandwidth | live neurons |\n|---|--:|--:|--:|--:|--:|--:|--:|\n",
    );
    for row in rows {
        out.push_str(&format!(
            "| {} | {:.2} | {:.2} | {:.2} | {} | {:.2} | {:.0} % | {} |\n",
            row.name,
            row.median(),
            row.rates[0],
            row.rates[row.rates.len() - 1],
            show_size(row.bytes_per_token() as u64),
            row.bytes_per_second() / 1e9,
            100.0 * row.bytes_per_second() / facts.bandwidth,
            row.live_share().map_or_else(|| "–".to_owned(), |share| format!("{:.0} %", 100.0 * share)),
        ));
    }
    out.push_str(&format!(
        "\n{}, {} threads, {}, depth {}, routing of {}; memory read at {:.2} GB/s by the same threads",
        facts.model,
        facts.threads,
        facts.isa,
        facts.depth,
        facts.routing,
        facts.bandwidth / 1e9
    ));
    if let Some(bytes) = peak_resident() {
        out.push_str(&format!("; {} resident at the peak", show_size(bytes)));
    }
    if let Some(head) = &facts.head {
        out.push_str(&format!("\n\n{}", head_line(head)));
    }
    if let Some(forecast) = &facts.forecast {
        out.push_str(&format!("\n\n{}", forecast_line(forecast)));
    }
    if facts.cache.is_some() {
        let parts: Vec<ExpertWork> = rows.iter().map(Measured::expert_work).collect();
        out.push_str(&format!("\n\n{}", experts_table(&parts).trim_end()));
    }
    out.push('\n');
    out
}

fn json(rows: &[Measured], facts: &Facts<'_>) -> Value {
    let tests: Vec<Value> = rows
        .iter()
        .map(|row| {
            json!({
                "test": row.name,
                "tokens_per_second": {"median": row.median(), "min": row.rates[0], "max": row.rates[row.rates.len() - 1]},
                "weight_bytes_per_token": row.bytes_per_token(),
                "weight_bytes_per_second": row.bytes_per_second(),
                "bandwidth_share": row.bytes_per_second() / facts.bandwidth,
                "live_neuron_share": row.live_share(),
                "experts": facts.cache.as_ref().map(|_| experts_json(&row.expert_work())),
            })
        })
        .collect();
    json!({
        "model": facts.model,
        "threads": facts.threads,
        "isa": facts.isa,
        "depth": facts.depth,
        "routing": facts.routing,
        "memory_bytes_per_second": facts.bandwidth,
        "peak_resident_bytes": peak_resident(),
        "tests": tests,
        "cache": facts.cache,
        "sparse_head": facts.head.as_ref().map(head_json),
        "forecast": facts.forecast.as_ref().map(plan::json),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_of_an_even_number_is_between_the_middle_two() {
        let mut row = Measured::new("x".into());
        for seconds in [1.0, 0.5, 0.25, 0.125] {
            row.add(1, Repetition { seconds, work: Work::default(), experts: StoreStats::default() });
        }
        assert_eq!((row.median(), row.rates[0], row.rates[3]), (3.0, 1.0, 8.0));
    }
}
