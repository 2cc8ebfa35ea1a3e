//! Reading that goes wrong below a whole engine: the right tokens or one clear error, never a hang; and after an error the
//! conversation goes on and the next one is answered rightly.

use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, mpsc};
use std::thread;
use std::time::Duration;

use st_convert::{Layout, WeightType};
use st_experts::io::{BufferedIo, DirectIo, ExpertIo, Fault, FaultyIo};
use st_gguf::GgufFile;
use st_model::{Engine, LoadOptions, ModelError, Session, StoreError};

use crate::common;

/// Tokens of an answer.
const ANSWER: usize = 8;

/// Runs `act` on a thread of its own and fails where it does not come back.
fn watched(what: String, act: impl FnOnce() + Send + 'static) {
    let (done, wait) = mpsc::channel();
    let runs = thread::spawn(move || {
        act();
        let _ = done.send(());
    });
    // Second by second, so that a pause of the whole process counts as one.
    for _ in 0..120 {
        if wait.recv_timeout(Duration::from_secs(1)) != Err(mpsc::RecvTimeoutError::Timeout) {
            return runs.join().unwrap_or_else(|_| panic!("{what}"));
        }
    }
    panic!("{what}: it hangs");
}

/// Deterministic numbers for fault plans.
fn hash(seed: u64, x: u64) -> u64 {
    let mixed = (seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ x).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    (mixed ^ mixed >> 29).wrapping_mul(0x94d0_49bb_1331_11eb) >> 17
}

/// The tiny model in one layout, two prompts, and their right answers.
#[derive(Clone)]
struct Case {
    layout: Layout,
    path: PathBuf,
    /// Each with its answer after it: a prompt of several waves, and a short one.
    texts: [Vec<u32>; 2],
    prompts: [usize; 2],
}

fn cases() -> Vec<Case> {
    let goldens = common::goldens();
    let golden = |name: &str| goldens.iter().find(|golden| golden.name == name).expect(name);
    let prompts = [golden("long_mixed"), golden("chat_sum")];
    let resident = common::engine(prompts[0].gguf(WeightType::Q4_0, Layout::Gguf), &LoadOptions::default());
    let texts = prompts.map(|golden| {
        let answer = common::greedy(&resident, &golden.ids, golden.ids.len(), ANSWER);
        [&golden.ids[..], &answer].concat()
    });
    let case = |layout| Case {
        layout,
        path: common::converted(&prompts[0].checkpoint, WeightType::Q4_0, layout),
        texts: texts.clone(),
        prompts: prompts.map(|golden| golden.ids.len()),
    };
    [Layout::Gguf, Layout::Offload].map(case).to_vec()
}

impl Case {
    /// The model, its experts read with the faults of `plan`; everything else varies with the seed.
    fn engine(&self, seed: u64, plan: impl Fn(u64) -> Vec<Fault> + Send + Sync + 'static) -> Arc<Engine> {
        let buffered =
            || BufferedIo::open(&self.path, true).map(|io| Arc::new(io) as Arc<dyn ExpertIo>).expect("a file");
        let io = match DirectIo::open(&self.path) {
            Ok(io) if seed % 4 < 2 => Arc::new(io) as Arc<dyn ExpertIo>,
            // Every other time, and where the file system has no direct reads.
            _ => buffered(),
        };
        let options = LoadOptions {
            threads: 1 + seed as usize % 2,
            slots: Some(8 + (seed * 13) as usize % 100),
            io_threads: Some(1 + seed as usize % 4),
            prefetch: !seed.is_multiple_of(5),
            guess: !seed.is_multiple_of(3),
            expert_io: Some(Arc::new(FaultyIo::new(io, plan))),
            ..LoadOptions::default()
        };
        common::engine(GgufFile::open(&self.path).expect("a model"), &options)
    }

    /// Goes on with text `n` from where the session stands, greedily from the end of the prompt on; never a wrong token.
    fn go_on(&self, session: &mut Session, n: usize) -> Result<(), ModelError> {
        let text = &self.texts[n];
        assert!(text.starts_with(session.tokens()));
        // At least one token that is known: the logits of a token whose successor failed are gone.
        let known = self.prompts[n].max(session.len() + 1);
        session.forward(&text[session.len()..known])?;
        while session.len() < text.len() {
            let best = common::argmax(session.logits());
            assert_eq!(best, text[session.len()], "a wrong token");
            session.forward(&[best])?;
        }
        Ok(())
    }
}

/// Until no read is under way: one that has failed already fails whoever asks for its expert next.
fn wait_for_reads(engine: &Arc<Engine>) {
    let busy = || engine.store_stats().io_seconds;
    let mut before = busy();
    loop {
        thread::sleep(Duration::from_millis(1));
        match busy() {
            now if now == before => return,
            now => before = now,
        }
    }
}

/// What is late, comes in parts, or is wrong only once never shows.
#[test]
fn passing_faults_never_show() {
    for case in cases() {
        for seed in 0..20 {
            let case = case.clone();
            watched(format!("{:?}, seed {seed}", case.layout), move || {
                let engine = case.engine(seed, move |offset| {
                    let dice = hash(seed, offset);
                    let mut faults = vec![];
                    if dice.is_multiple_of(5) {
                        faults.push(Fault::Delay(Duration::from_micros(dice % 400)));
                    }
                    if seed % 2 == 0 && (dice / 5).is_multiple_of(2) {
                        faults.push(Fault::Short((dice % 9000) as usize));
                    }
                    match dice / 10 % 5 {
                        // A read in several parts could fail once in each, which is more than one retry makes good.
                        0 if seed % 2 == 1 => faults.push(Fault::FailOnce),
                        1 => faults.push(Fault::CorruptOnce),
                        _ => {}
                    }
                    faults
                });
                let mut session = Session::new(&engine).expect("a session");
                for n in [0, 1] {
                    session.reset();
                    case.go_on(&mut session, n).expect("no error");
                }
                let stats = engine.store_stats();
                assert!(stats.failures == 0 && (stats.retries > 0 || seed % 2 == 0));
            });
        }
    }
}

/// What stays wrong is one error that names the expert and its place in the file. The tokens before it are right, the same
/// conversation goes on where it stood once the disk recovers, and the next one is answered rightly.
#[test]
fn lasting_faults_are_one_error_and_the_next_answer_is_right() {
    for case in cases() {
        let failed = Arc::new(AtomicU64::new(0));
        for seed in 0..30 {
            let (case, failed) = (case.clone(), Arc::clone(&failed));
            watched(format!("{:?}, seed {seed}", case.layout), move || {
                let fault = [Fault::Panic, Fault::Corrupt, Fault::Fail][seed as usize % 3];
                // The fault comes with some read: of the prompt, or of a token after it. An expert is verified when it is
                // first read, so there a wrong byte comes from the first read on.
                let begins = if fault == Fault::Corrupt { 0 } else { hash(seed, 1) % 600 };
                let (broken, reads) = (Arc::new(AtomicBool::new(true)), AtomicU64::new(0));
                let is_broken = Arc::clone(&broken);
                let engine = case.engine(seed, move |offset| {
                    let late = reads.fetch_add(1, Ordering::SeqCst) >= begins;
                    let bad = late && is_broken.load(Ordering::SeqCst) && hash(seed, offset).is_multiple_of(9);
                    let delay = Fault::Delay(Duration::from_micros(hash(seed, offset) % 300));
                    match (bad, hash(seed, offset + 1).is_multiple_of(4)) {
                        (true, true) => vec![Fault::Delay(Duration::from_millis(2)), fault],
                        (true, false) => vec![fault],
                        (false, true) => vec![delay],
                        (false, false) => vec![],
                    }
                });
                let mut session = Session::new(&engine).expect("a session");
                match case.go_on(&mut session, 0) {
                    Ok(()) => {}
                    Err(ModelError::Experts(
                        ref error @ (StoreError::Read { ref path, layer, expert, offset, .. }
                        | StoreError::Corrupt { ref path, layer, expert, offset, .. }),
                    )) => {
                        assert!(path == &case.path && layer < 8 && expert < 16 && offset > 0);
                        assert_eq!(matches!(error, StoreError::Corrupt { .. }), fault == Fault::Corrupt);
                        assert!(!error.to_string().contains('\n'));
                        failed.fetch_add(1, Ordering::SeqCst);
                    }
                    Err(other) => panic!("{other}"),
                }
                // As long as it lasts, another prompt meets it or is answered rightly.
                let mut other = Session::new(&engine).expect("a session");
                assert!(matches!(case.go_on(&mut other, 1), Ok(()) | Err(ModelError::Experts(_))));
                broken.store(false, Ordering::SeqCst);
                wait_for_reads(&engine);
                if session.len() < case.texts[0].len() {
                    case.go_on(&mut session, 0).expect("it goes on");
                }
                session.reset();
                case.go_on(&mut session, 1).expect("no error");
            });
        }
        let failed = failed.load(Ordering::SeqCst);
        assert!(failed >= 10, "only {failed} of 30 seeds met a fault");
    }
}
