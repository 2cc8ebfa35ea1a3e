//! What one answer must fit, worked out on a thread of its own while the layers run.

use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread;

use llguidance::toktrie::SimpleVob;
use llguidance::{CancellationHandle, Matcher};
use st_model::Constraint;

use crate::error::{GrammarError, plain};

/// Stack of the thread: less is needed than for compiling.
const STACK: usize = 1 << 20;

/// What the thread tells after each token.
enum Told {
    /// Tokens that must come next; whether the text is at its end after them.
    Forced(Vec<u32>),
    /// Tokens that may come after those.
    Allowed(SimpleVob),
    Failed(String),
}

/// One answer's place in its grammar.
pub struct Fit {
    chosen: Sender<u32>,
    told: Receiver<Told>,
    cancel: Option<CancellationHandle>,
    /// What may come next, once it was asked for.
    allowed: Option<SimpleVob>,
    /// Tokens that must come, not taken yet.
    forced: Option<Vec<u32>>,
    failed: Option<String>,
}

impl std::fmt::Debug for Fit {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Fit").field("failed", &self.failed).finish_non_exhaustive()
    }
}

impl Fit {
    pub(crate) fn new(matcher: Matcher, end_id: u32) -> Self {
        let (chosen, choices) = channel();
        let (teller, told) = channel();
        let cancel = matcher.cancellation_handle();
        let work = move || follow(matcher, end_id, &choices, &teller);
        let thread = thread::Builder::new().name("st-mask".to_owned()).stack_size(STACK).spawn(work);
        let failed = thread.err().map(|error| GrammarError::Thread(error.kind()).to_string());
        Self { chosen, told, cancel, allowed: None, forced: None, failed }
    }

    /// Waits for the next that the thread tells.
    fn hear(&mut self) -> Result<(), String> {
        if let Some(why) = &self.failed {
            return Err(why.clone());
        }
        let told = self.told.recv().unwrap_or_else(|_| Told::Failed("its thread has ended".to_owned()));
        match told {
            Told::Forced(tokens) => self.forced = Some(tokens),
            Told::Allowed(mask) => self.allowed = Some(mask),
            Told::Failed(why) => {
                self.failed = Some(why.clone());
                return Err(why);
            }
        }
        Ok(())
    }

    /// Waits for the forced tokens that come before the next mask.
    fn hear_forced(&mut self) -> Result<(), String> {
        while self.forced.is_none() {
            self.hear()?;
        }
        Ok(())
    }
}

impl Constraint for Fit {
    fn accept(&mut self, id: u32) -> Result<(), String> {
        // Whatever was told about the place before is heard first.
        self.allowed()?;
        (self.allowed, self.forced) = (None, None);
        self.chosen.send(id).map_err(|_| self.failed.clone().unwrap_or_else(|| "its thread has ended".to_owned()))
    }

    fn forced(&mut self) -> Result<Vec<u32>, String> {
        self.hear_forced()?;
        Ok(self.forced.as_mut().map(std::mem::take).unwrap_or_default())
    }

    fn allowed(&mut self) -> Result<&[u32], String> {
        self.hear_forced()?;
        while self.allowed.is_none() {
            self.hear()?;
        }
        Ok(self.allowed.as_ref().map(SimpleVob::as_slice).unwrap_or_default())
    }
}

impl Drop for Fit {
    fn drop(&mut self) {
        // Nobody waits any more: what the thread is at is given up, and with the channel its loop ends.
        if let Some(cancel) = &self.cancel {
            cancel.cancel();
        }
    }
}

/// The thread: after each chosen token those that must follow, and then the mask of what may.
fn follow(mut matcher: Matcher, end_id: u32, choices: &Receiver<u32>, teller: &Sender<Told>) {
    loop {
        let forced = force(&mut matcher, end_id);
        let ends = forced.as_ref().is_ok_and(|forced| forced.last() == Some(&end_id));
        if teller.send(forced.map_or_else(Told::Failed, Told::Forced)).is_err() || ends {
            return;
        }
        let mask = matcher.compute_mask_or_eos();
        let failed = mask.is_err();
        if teller.send(mask.map_or_else(|error| Told::Failed(plain(&error)), Told::Allowed)).is_err() || failed {
            return;
        }
        let Ok(id) = choices.recv() else { return };
        if let Err(error) = matcher.consume_token(id) {
            let _ = teller.send(Told::Failed(plain(&error)));
            return;
        }
    }
}

/// Takes the tokens that must come next, an end token where nothing else can be said.
fn force(matcher: &mut Matcher, end_id: u32) -> Result<Vec<u32>, String> {
    let mut tokens = matcher.compute_ff_tokens();
    if !tokens.is_empty() {
        matcher.consume_tokens(&tokens).map_err(|error| plain(&error))?;
    }
    if let Some(error) = matcher.get_error() {
        return Err(plain(&error));
    }
    if matcher.is_stopped() {
        tokens.push(end_id);
    }
    Ok(tokens)
}
