//! `synth`: makes synthetic SmallThinker checkpoints for benchmarks.
#![allow(clippy::print_stdout, clippy::print_stderr)]

use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use anyhow::{Context, Result};
use clap::{Args, Parser, Subcommand, ValueEnum};
use st_bench::synth::checkpoint::write_checkpoint;
use st_bench::synth::gguf::write_gguf;
use st_bench::synth::measure::{Shares, measure};
use st_bench::synth::mix::Mix;
use st_bench::synth::recipe::{Recipe, Statistics, first_eighth};
use st_bench::synth::shape::Shape;
use st_format::Gating;
use st_gguf::Layout;

/// Synthetic SmallThinker checkpoints: random weights with the routing and sparsity of a trained model.
#[derive(Parser)]
#[command(version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Writes a checkpoint folder (BF16 safetensors) or a GGUF file.
    Make(Box<Make>),
    /// Runs a model and prints its routing and sparsity as they are.
    Measure(Measure),
}

#[derive(Args)]
struct Measure {
    /// A GGUF file.
    model: PathBuf,
    /// Tokens of the prompt, and tokens to generate after it.
    #[arg(short = 'n', long, default_value_t = 256)]
    tokens: usize,
    #[arg(long, default_value_t = 1)]
    threads: usize,
    #[arg(long, default_value_t = 1)]
    seed: u64,
    #[command(flatten)]
    asked: StatisticsArgs,
}

/// What a model is to show; `measure` prints it beside what the model does.
#[derive(Args)]
#[command(next_help_heading = "Statistics")]
struct StatisticsArgs {
    /// Share of neurons inside chosen experts that are zero.
    #[arg(long, default_value_t = 0.65)]
    sparsity: f64,
    /// The same for the first eighth of the layers (default: 0.92, or SPARSITY where that is more; 0 where SPARSITY is).
    #[arg(long)]
    early_sparsity: Option<f64>,
    /// Share of choices that the popular quarter of a layer's experts takes.
    #[arg(long, default_value_t = 0.6)]
    popular_share: f64,
    /// Share of its predecessor's experts that a token repeats.
    #[arg(long, default_value_t = 0.5)]
    repeat_share: f64,
}

impl StatisticsArgs {
    fn with_seed(&self, seed: u64) -> Statistics {
        let early = if self.sparsity > 0.0 { 0.92_f64.max(self.sparsity) } else { 0.0 };
        Statistics {
            sparsity: self.sparsity,
            early_sparsity: self.early_sparsity.unwrap_or(early),
            popular_share: self.popular_share,
            repeat_share: self.repeat_share,
            seed,
        }
    }
}

#[derive(Clone, Copy, ValueEnum)]
enum Preset {
    /// SmallThinker-4BA0.6B.
    #[value(name = "4b")]
    Small,
    /// SmallThinker-21BA3B.
    #[value(name = "21b")]
    Large,
}

#[derive(Clone, Copy, ValueEnum)]
enum Format {
    /// A Hugging Face folder: BF16 safetensors shards, config, tokenizer.
    Checkpoint,
    /// A standard GGUF file.
    Gguf,
    /// A GGUF file in the offload layout.
    Offload,
}

#[derive(Args)]
struct Make {
    /// The folder or file to write.
    output: PathBuf,
    #[arg(long, value_enum, default_value = "checkpoint")]
    format: Format,
    /// The published shape to start from.
    #[arg(long, value_enum, default_value = "4b")]
    preset: Preset,
    /// Weight types of a GGUF file: `q4_0-pure`, or what llama-quantize makes, such as `q4_k_m`.
    #[arg(long, default_value = "q4_0-pure")]
    mix: String,
    #[command(flatten)]
    shape: ShapeArgs,
    #[command(flatten)]
    statistics: StatisticsArgs,
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Tensor bytes per safetensors shard, in MiB.
    #[arg(long, default_value_t = 4096)]
    shard_mib: u64,
    /// Threads (default: all).
    #[arg(long, default_value_t = 0)]
    threads: usize,
    /// Replace an existing GGUF file.
    #[arg(long)]
    force: bool,
}

/// Overrides of the preset, one number each.
#[derive(Args)]
#[command(next_help_heading = "Shape")]
struct ShapeArgs {
    #[arg(long)]
    name: Option<String>,
    #[arg(long)]
    layers: Option<usize>,
    #[arg(long)]
    hidden: Option<usize>,
    #[arg(long)]
    heads: Option<usize>,
    #[arg(long)]
    kv_heads: Option<usize>,
    #[arg(long)]
    head_dim: Option<usize>,
    #[arg(long)]
    experts: Option<usize>,
    #[arg(long)]
    active: Option<usize>,
    #[arg(long)]
    ffn: Option<usize>,
    #[arg(long)]
    vocab: Option<usize>,
    #[arg(long)]
    context: Option<usize>,
    #[arg(long)]
    window: Option<usize>,
    /// One global NoPE layer, then PERIOD-1 rotary window layers; 0: all rotary and global.
    #[arg(long)]
    period: Option<usize>,
    /// Router weights by softmax (else normalised sigmoid).
    #[arg(long)]
    softmax: Option<bool>,
    /// The LM head is the embedding.
    #[arg(long)]
    tied: Option<bool>,
}

impl ShapeArgs {
    fn apply(self, preset: Preset) -> Shape {
        let (mut shape, published_period) = match preset {
            Preset::Small => (Shape::preset_4b(), 0),
            Preset::Large => (Shape::preset_21b(), 4),
        };
        let set = |field: &mut usize, value: Option<usize>| *field = value.unwrap_or(*field);
        set(&mut shape.n_layers, self.layers);
        set(&mut shape.n_embd, self.hidden);
        set(&mut shape.n_heads, self.heads);
        set(&mut shape.n_kv_heads, self.kv_heads);
        set(&mut shape.head_dim, self.head_dim);
        set(&mut shape.n_experts, self.experts);
        set(&mut shape.n_experts_used, self.active);
        set(&mut shape.n_ff, self.ffn);
        set(&mut shape.n_vocab, self.vocab);
        set(&mut shape.context_length, self.context);
        set(&mut shape.window, self.window);
        shape.set_period(self.period.unwrap_or(published_period));
        if let Some(softmax) = self.softmax {
            shape.gating = if softmax { Gating::Softmax } else { Gating::Sigmoid };
        }
        shape.tied = self.tied.unwrap_or(shape.tied);
        shape.name = self.name.unwrap_or(shape.name);
        shape
    }
}

fn main() -> Result<()> {
    match Cli::parse().command {
        Command::Make(args) => make(*args),
        Command::Measure(args) => report(&args),
    }
}

fn report(args: &Measure) -> Result<()> {
    let asked = args.asked.with_seed(args.seed);
    let runs = measure(&args.model, args.tokens, args.threads, args.seed)?;
    for (what, run) in ["scattered tokens", "greedy text"].into_iter().zip(runs) {
        let n_layers = run.layers.len();
        let early = first_eighth(n_layers);
        println!("{what}: {} tokens, {} different", run.tokens, run.distinct);
        println!("{:14}{:>16}{:>20}{:>16}", "", "neurons zero", "popular quarter", "repeated");
        println!("{:14}{:>7}{:>9}{:>11}{:>9}{:>7}{:>9}", "", "asked", "is", "asked", "is", "asked", "is");
        let row = |name: String, sparsity: f64, shares: Shares| {
            let [zeros, popular, repeated] = [shares.zeros, shares.popular, shares.repeated].map(percent);
            let [sparsity, asked_popular, asked_repeated] =
                [sparsity, asked.popular_share, asked.repeat_share].map(percent);
            println!("{name:14}{sparsity:>7}{zeros:>9}{asked_popular:>11}{popular:>9}{asked_repeated:>7}{repeated:>9}");
        };
        let sparsity = |layer: usize| if layer < early { asked.early_sparsity } else { asked.sparsity };
        for (layer, &shares) in run.layers.iter().enumerate() {
            row(format!("layer {layer}"), sparsity(layer), shares);
        }
        for (name, layers) in [("first eighth", 0..early), ("the rest", early..n_layers), ("all", 0..n_layers)] {
            if let Some(shares) = run.mean(layers.clone()) {
                let mean = layers.clone().map(sparsity).sum::<f64>() / layers.len() as f64;
                row(name.to_owned(), mean, shares);
            }
        }
        println!();
    }
    Ok(())
}

fn percent(share: f64) -> String {
    format!("{:.1} %", 100.0 * share)
}

fn make(args: Make) -> Result<()> {
    if args.threads > 0 {
        rayon::ThreadPoolBuilder::new().num_threads(args.threads).build_global().context("cannot start the threads")?;
    }
    let mix = Mix::named(&args.mix)?;
    let statistics = args.statistics.with_seed(args.seed);
    let recipe = Recipe::new(args.shape.apply(args.preset), &statistics)?;
    let plan = recipe.calibration();
    println!(
        "planned: {:.1} % of choices to popular experts, {:.1} % of experts repeated, {:.1} % of neurons zero ({:.1} % in \
         the first eighth of the layers)",
        100.0 * plan.popular_share,
        100.0 * plan.repeat_share,
        100.0 * statistics.sparsity,
        100.0 * statistics.early_sparsity,
    );
    if !recipe.has_successors() {
        println!("note: the shape has no room for token codes; greedy text will repeat one token");
    }
    let start = Instant::now();
    let written = AtomicU64::new(0);
    let progress = |bytes: u64| {
        let gib = 1_u64 << 30;
        let before = written.fetch_add(bytes, Ordering::Relaxed);
        if before / gib != (before + bytes) / gib {
            eprintln!("{} GiB after {:.0} s", (before + bytes) / gib, start.elapsed().as_secs_f64());
        }
    };
    match args.format {
        Format::Checkpoint => write_checkpoint(&recipe, &args.output, args.shard_mib << 20, &progress)?,
        Format::Gguf => write_gguf(&recipe, &mix, Layout::Gguf, &args.output, args.force, &progress)?,
        Format::Offload => write_gguf(&recipe, &mix, Layout::Offload, &args.output, args.force, &progress)?,
    }
    let (bytes, seconds) = (written.into_inner() as f64, start.elapsed().as_secs_f64());
    println!("wrote {:.2} GB in {seconds:.1} s ({:.0} MB/s)", bytes / 1e9, bytes / 1e6 / seconds);
    Ok(())
}
