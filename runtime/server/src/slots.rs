//! What each conversation does now, for those who look from outside.

use std::sync::{Mutex, PoisonError};

use serde_json::{Value, json};

/// The conversations' places.
pub(crate) struct Slots(Mutex<Vec<Option<Slot>>>);

/// What one does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Slot {
    /// Tokens of the prompt.
    pub(crate) prompt: usize,
    /// Of them, that need not be run.
    pub(crate) cached: usize,
    /// Of them, that are run.
    pub(crate) read: usize,
    /// Tokens made.
    pub(crate) made: usize,
}

impl Slots {
    pub(crate) fn new(parallel: usize) -> Self {
        Self(Mutex::new(vec![None; parallel]))
    }

    /// What all conversations do; places beyond them are idle.
    pub(crate) fn set(&self, conversations: impl Iterator<Item = Slot>) {
        let mut slots = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let mut conversations = conversations.fuse();
        slots.iter_mut().for_each(|slot| *slot = conversations.next());
    }

    /// Conversations under way.
    pub(crate) fn busy(&self) -> usize {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).iter().flatten().count()
    }

    pub(crate) fn json(&self, ctx: usize) -> Value {
        let slots = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let one = |(id, slot): (usize, &Option<Slot>)| match slot {
            None => json!({"id": id, "n_ctx": ctx, "is_processing": false, "state": "idle"}),
            Some(slot) => json!({
                "id": id,
                "n_ctx": ctx,
                "is_processing": true,
                "state": if slot.read < slot.prompt { "reading" } else { "answering" },
                "prompt_tokens": slot.prompt,
                "cached_tokens": slot.cached,
                "prompt_tokens_read": slot.read,
                "completion_tokens": slot.made,
            }),
        };
        slots.iter().enumerate().map(one).collect()
    }
}
