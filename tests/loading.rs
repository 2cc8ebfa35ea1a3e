//! Loading a model that is stopped on the way.

use std::io::{BufRead as _, BufReader, Read as _};
use std::ops::ControlFlow;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};

use st_gguf::GgufFile;
use st_model::{Engine, LoadOptions, LoadProgress, MemoryPlan, ModelError, Reference};

use crate::common::{all_logits, engine, repo};
use crate::program::program;
use crate::reject::altered;

/// Counts what it is told, and breaks at one reading, counted from 0.
#[derive(Default)]
struct StopAt {
    at: Option<usize>,
    plans: AtomicUsize,
    readings: AtomicUsize,
    /// Readings before the plan: those of the tokenizer.
    before_plan: AtomicUsize,
}

impl LoadProgress for StopAt {
    fn planned(&self, plan: &MemoryPlan) {
        assert!(plan.total() > 0);
        self.plans.fetch_add(1, Ordering::SeqCst);
        self.before_plan.store(self.readings.load(Ordering::SeqCst), Ordering::SeqCst);
    }

    fn reading(&self) -> ControlFlow<()> {
        match Some(self.readings.fetch_add(1, Ordering::SeqCst)) == self.at {
            true => ControlFlow::Break(()),
            false => ControlFlow::Continue(()),
        }
    }
}

fn tiny() -> GgufFile {
    GgufFile::open(repo("models/tiny/tiny-q4_0.gguf")).expect("the bundled model")
}

/// Loads something and throws it away.
type Load = dyn Fn(&StopAt) -> Result<(), ModelError>;

/// How `load` ended, and what was seen of it.
fn stopped(at: Option<usize>, load: &Load) -> (Result<(), ModelError>, StopAt) {
    let progress = StopAt { at, ..StopAt::default() };
    (load(&progress), progress)
}

/// One wish to stop, whenever it is made, is enough.
#[test]
fn loading_stops_at_any_reading() {
    let engine = |threads: usize| {
        move |progress: &StopAt| {
            let options = LoadOptions { threads, ..LoadOptions::default() };
            Engine::load_with(tiny(), &options, progress).map(|_| ())
        }
    };
    let reference = |progress: &StopAt| Reference::load_with(&tiny(), progress).map(|_| ());
    let loads: [(usize, &Load); 3] = [(1, &engine(1)), (1, &engine(2)), (0, &reference)];
    for (plans, load) in loads {
        let (whole, seen) = stopped(None, load);
        whole.expect("a model");
        let (readings, before_plan) = (seen.readings.into_inner(), seen.before_plan.into_inner());
        assert_eq!(seen.plans.into_inner(), plans);
        assert!(before_plan < readings / 2);
        for at in [0, 1, readings / 2, readings - 1] {
            let (result, seen) = stopped(Some(at), load);
            assert!(matches!(result, Err(ModelError::Cancelled)), "at {at} of {readings}: {result:?}");
            // What is left of the matrix may still be asked for; the next one is not begun.
            let asked = seen.readings.into_inner();
            assert!(asked > at && asked < at.max(1) + readings / 2, "at {at} of {readings}: {asked}");
            assert_eq!(seen.plans.into_inner(), if at < before_plan { 0 } else { plans });
        }
    }
}

/// From the moment the plan is shown: while weights are read, or soon after.
#[test]
fn ctrl_c_while_a_model_is_loaded_ends_the_command() {
    let mut command = program();
    command.args(["bench", "tiny", "-p", "0", "-n", "100", "-r", "100000", "--memory", "60MiB"]);
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("the program starts");
    let mut stderr = BufReader::new(child.stderr.take().expect("a pipe"));
    let mut line = String::new();
    stderr.read_line(&mut line).expect("a line");
    assert!(line.starts_with("memory: "), "{line:?}");
    let killed = Command::new("kill").args(["-INT", &child.id().to_string()]).status();
    assert!(killed.expect("kill runs").success());
    let (mut rest, mut stdout) = (String::new(), String::new());
    stderr.read_to_string(&mut rest).expect("UTF-8");
    child.stdout.take().expect("a pipe").read_to_string(&mut stdout).expect("UTF-8");
    let status = child.wait().expect("it ends");
    assert_eq!((status.code(), rest.as_str(), stdout.as_str()), (Some(130), "error: interrupted\n", ""));
}

/// A file that holds the embedding a second time, as the LM head, takes the memory of one that does not.
#[test]
fn a_head_that_is_the_embedding_is_kept_once() {
    let with_head = |last: u8| {
        altered(|_, tensors| {
            let (mut spec, mut bytes) =
                tensors.iter().find(|(spec, _)| spec.name == "token_embd.weight").expect("an embedding").clone();
            spec.name = "output.weight".into();
            *bytes.last_mut().expect("a byte") ^= last;
            tensors.push((spec, bytes));
        })
    };
    let options = LoadOptions::default();
    let plan = |file: &GgufFile| Engine::plan_for(file, &options).expect("a plan").dense;
    let logits = |file: GgufFile| all_logits(&engine(file, &options), &[1, 2, 3]);
    let ((_same_folder, same), (_other_folder, other)) = (with_head(0), with_head(0x10));
    let [same, other] = [same, other].map(|path| GgufFile::open(path).expect("a model"));
    let head = other.header.tensor("output.weight").expect("a head").n_bytes;
    let tied = plan(&tiny());
    assert_eq!((plan(&same), plan(&other)), (tied, tied + head));
    let tied = logits(tiny());
    assert!(logits(same) == tied);
    let other = logits(other);
    // The last byte belongs to the last token's row.
    let (n, differ) = (tied.len() / 3, |i: &usize| tied[*i] != other[*i]);
    assert!((0..tied.len()).filter(differ).all(|i| i % n == n - 1) && (0..tied.len()).any(|i| differ(&i)));
}
