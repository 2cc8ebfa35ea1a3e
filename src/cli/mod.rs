//! The command line as types: names, defaults and help, and nothing that acts.

mod answering;
mod engine;
mod files;
mod measuring;
mod values;

use std::ffi::OsString;
use std::path::PathBuf;

use clap::error::ContextKind;
use clap::{ArgAction, Args, CommandFactory, FromArgMatches, Parser, Subcommand};
use st_model::{Isa, Kernels};

pub(crate) use answering::{RunArgs, SamplingArgs, ServeArgs, StatsName, VerifyArgs};
pub(crate) use engine::{EngineArgs, HeadArgs, IoName, KvName};
pub(crate) use files::{DownloadArgs, InspectArgs, LayoutArgs, LayoutName, ListArgs, QuantizeArgs, RmArgs, TypeName};
pub(crate) use measuring::{
    BenchArgs, BenchFormat, CacheSimArgs, LogitsArgs, PerplexityArgs, PlanArgs, ProfileArgs, TokenizeArgs,
};

/// SmallThinker from the Hugging Face hub to an answer, on a CPU, with little memory and a disk.
///
/// MODEL is `tiny` (a small model inside this program), a .gguf file, `4b`, `21b`, or `owner/name` on the hub;
/// `4b:q4_0` is the GGUF file of that type; for `quantize` also a folder with a checkpoint.
#[derive(Debug, Parser)]
#[command(name = "st-tool", version = env!("ST_TOOL_VERSION"), max_term_width = 100, arg_required_else_help = true)]
pub(crate) struct Cli {
    /// No progress and no notes; errors are still shown.
    #[arg(short, long, global = true, display_order = 900)]
    pub(crate) quiet: bool,

    /// Log what happens inside to stderr; twice for more.
    #[arg(short, long, global = true, display_order = 901, action = ArgAction::Count)]
    pub(crate) verbose: u8,

    /// Fetch or remove without asking.
    #[arg(long, global = true, display_order = 902)]
    pub(crate) yes: bool,

    #[command(subcommand)]
    pub(crate) command: Command,
}

/// What the figures of the expert cache mean; the only place that tells it to people.
const EXPERT_FIGURES: &str = "\
With --memory, the figures tell of the expert cache too, for prompt and generation apart:
  hits, misses     experts asked for that were in memory from an earlier use, or had to be read; a
                   batch of prompt tokens asks once for each expert that it touches in a layer
  found in memory  hits / (hits + misses)
  read per token   bytes read from the disk / tokens, with what pages hold beyond the experts
  stalled          time in which a computing thread was blocked, waiting for an expert
  hidden           share of the time of reading in which no computing thread was blocked
  guesses right    share of the missing experts guessed for the next layer that its router chose,
                   whether or not the guess was followed; – where none was made
  evictions        experts that gave up their place to another
  rereads          experts read that had been in memory before: what more memory would save";

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Fetch a model from the Hugging Face hub.
    Download(DownloadArgs),
    /// Convert a checkpoint to a GGUF file.
    Quantize(QuantizeArgs),
    /// Rearrange the experts of a GGUF file for reading them from disk, or back.
    Layout(LayoutArgs),
    /// Answer a prompt, or chat.
    #[command(after_help = EXPERT_FIGURES)]
    Run(RunArgs),
    /// Answer over HTTP, as OpenAI's API does; several at once.
    Serve(ServeArgs),
    /// Measure speed.
    #[command(after_help = EXPERT_FIGURES)]
    Bench(BenchArgs),
    /// Replay recorded routing with caches of other sizes and policies.
    CacheSim(CacheSimArgs),
    /// Write the logits of every position to a file.
    Logits(LogitsArgs),
    /// Show what is in a GGUF file.
    Inspect(InspectArgs),
    /// Measure how well a model predicts a text.
    Perplexity(PerplexityArgs),
    /// Say what a model would take and how fast it would be here, before it is fetched.
    Plan(PlanArgs),
    /// Run texts, and show which experts they use, how sparse neurons are, and what caches would do.
    Profile(ProfileArgs),
    /// Prove an answer by its receipt: make it again, here, and compare each token and its logits.
    Verify(VerifyArgs),
    /// Turn text into token ids, or back.
    Tokenize(TokenizeArgs),
    /// Show which models are here, in the hub's cache and in the store of converted files.
    List(ListArgs),
    /// Remove a model from the hub's cache and from the store.
    Rm(RmArgs),
    /// Print what a shell completes: names of verbs, options and values.
    Completions(CompletionsArgs),
    /// Write the manual pages.
    Man(ManArgs),
}

#[derive(Debug, Args)]
pub(crate) struct CompletionsArgs {
    /// The shell that will read them.
    #[arg(value_name = "SHELL")]
    pub(crate) shell: clap_complete::Shell,
}

#[derive(Debug, Args)]
pub(crate) struct ManArgs {
    /// The folder for `st-tool.1` and a page for each verb; it is made where it is missing.
    #[arg(value_name = "DIR")]
    pub(crate) dir: PathBuf,
}

impl Cli {
    /// Reads the arguments of the process.
    pub(crate) fn from_args() -> Result<Self, clap::Error> {
        Self::from(std::env::args_os())
    }

    /// The whole command line, for whoever describes it. `--version` tells more than `-V`.
    pub(crate) fn definition() -> clap::Command {
        let runs = |isa: &Isa| Kernels::for_isa(*isa).is_some();
        let sets: Vec<_> = Isa::ALL.into_iter().filter(runs).map(Isa::name).collect();
        let used = Kernels::detect().isa().name();
        let version = format!("{}\ninstruction sets: {}\nused here: {used}", env!("ST_TOOL_VERSION"), sets.join(", "));
        Self::command().long_version(version)
    }

    fn from(args: impl IntoIterator<Item = impl Into<OsString> + Clone>) -> Result<Self, clap::Error> {
        // -1 is a value, for the option's own words to accept or refuse, and never an option that does not exist.
        let takes_numbers = |arg: clap::Arg| match arg.is_positional() || !arg.get_action().takes_values() {
            true => arg,
            false => arg.allow_negative_numbers(true),
        };
        let mut command = Self::definition().mut_subcommands(|verb| verb.mut_args(takes_numbers));
        let mut matches = command.try_get_matches_from_mut(args).map_err(|mut error| {
            // "'-- --option' passes it as a value": it would be a MODEL.
            error.remove(ContextKind::Suggested);
            error
        })?;
        Self::from_arg_matches_mut(&mut matches).map_err(|error| error.format(&mut command))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_definition_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn minus_one_is_no_limit_and_any() {
        let parse = |args: &[&str]| match Cli::from([&["st-tool", "run"], args].concat()).expect("valid").command {
            Command::Run(args) => args,
            _ => panic!("run"),
        };
        for (args, given) in [
            (&["-n", "-1", "--seed", "-1", "--top-k", "-1", "--threads", "-1"][..], None),
            (&["-n-1", "--seed=-1", "--top-k=-1", "--threads=-1"], None),
            (&["-n", "7", "--seed", "7", "--top-k", "7", "--threads", "7"], Some(7)),
        ] {
            let args = parse(args);
            assert_eq!((args.max_tokens.0, args.sampling.top_k.0, args.engine.threads.0), (given, given, given));
            assert_eq!(args.sampling.seed.0, given.map(|n| n as u64));
        }
        let args = parse(&[]);
        assert_eq!((args.max_tokens.0, args.sampling.top_k.0, args.engine.threads.0), (None, Some(40), None));
    }

    #[test]
    fn exactly_one_type_is_asked_for() {
        let parse = |args: &[&str]| {
            let all = ["st-tool", "quantize", "m"].iter().chain(args).copied();
            Cli::from(all.collect::<Vec<_>>())
        };
        assert!(parse(&[]).is_err());
        assert!(parse(&["--q4_0", "--f32"]).is_err());
        for (flag, name) in [
            ("--q4_0", TypeName::Q4_0),
            ("--q8_0", TypeName::Q8_0),
            ("--f16", TypeName::F16),
            ("--bf16", TypeName::Bf16),
            ("--f32", TypeName::F32),
        ] {
            let Command::Quantize(args) = parse(&[flag]).expect("valid").command else { panic!("quantize") };
            assert_eq!(args.type_name(), name);
        }
    }
}
