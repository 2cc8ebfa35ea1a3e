//! Tokens that are run before they are chosen, so that one pass over memory and disk makes several.
//!
//! Owns what is run ahead of an answer (tokens that must come, or drafts that may) and how the rows of such a pass are settled:
//! token by token the answer chooses by the logits of the row before, as it does without drafts, and what was run and is not chosen
//! is taken back. So drafts change how fast tokens come and never which.

use std::ops::ControlFlow;
use std::time::Instant;

use crate::answer::{Answer, Next};
use crate::error::ModelError;
use crate::governor::{Chance, Governor, MOST_ROWS};
use crate::lookup::Lookup;
use crate::sampler::{Sampler, SamplerError};
use crate::sequence::Sequence;

/// Tokens that must come and are run in one pass, at most.
const MOST_CERTAIN: usize = 64;
/// Tokens after which somebody who drafts for a price is asked once more, though that did not pay.
const ASKED_AGAIN: u32 = 64;

/// Whether answers are drafted, and how far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum DraftLimit {
    /// Never. What must come is run in one pass all the same.
    Off,
    /// As many tokens a pass as pay.
    #[default]
    Auto,
    /// So many tokens a pass, wherever there is a draft.
    Most(usize),
}

/// Who drafts.
pub trait Draft: std::fmt::Debug + Send {
    /// Appends tokens that may follow `text` to `out`, `most` at most.
    ///
    /// # Errors
    /// What computing them meets.
    fn propose(&mut self, text: &[u32], most: usize, out: &mut Vec<u32>) -> Result<(), ModelError>;

    /// Whether that takes no time to speak of, so that it is asked at every token.
    fn is_free(&self) -> bool {
        false
    }
}

/// What became of drafts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DraftStats {
    /// Passes with rows of drafts.
    pub passes: u64,
    /// Tokens that were drafted and run.
    pub drafted: u64,
    /// Those of them that are part of the answer.
    pub accepted: u64,
}

impl DraftStats {
    /// What came since `earlier`.
    #[must_use]
    pub fn since(&self, earlier: &Self) -> Self {
        Self {
            passes: self.passes - earlier.passes,
            drafted: self.drafted - earlier.drafted,
            accepted: self.accepted - earlier.accepted,
        }
    }

    /// The share of drafted tokens that are part of the answer; 0 where none were drafted.
    pub fn accepted_share(&self) -> f64 {
        if self.drafted == 0 { 0.0 } else { self.accepted as f64 / self.drafted as f64 }
    }
}

/// What a pass has besides what is planned now.
#[derive(Clone, Copy, Debug)]
pub struct Planned {
    /// Rows, the answer's own next token included.
    pub rows: usize,
    /// Tokens that they are expected to make.
    pub tokens: f64,
    /// Tokens that must come and have room in it.
    pub most_certain: usize,
    /// Whether it is a pass of few rows, with drafts among them.
    pub takes_drafts: bool,
}

impl Planned {
    /// A pass for one answer alone.
    pub fn alone() -> Self {
        Self { rows: 1, tokens: 1.0, most_certain: MOST_CERTAIN, takes_drafts: true }
    }
}

/// One conversation's drafts.
#[derive(Debug)]
pub struct Drafts {
    limit: DraftLimit,
    lookup: Lookup,
    /// By the length of the match.
    by_length: [Chance; 5],
    other: Option<Other>,
    /// What is expected to come after the latest token, and who said so.
    proposed: Vec<u32>,
    by_other: bool,
    /// The match that proposed it.
    matched: usize,
    /// For each of `proposed`, the chance that it and all before it are right.
    chances: Vec<f64>,
    /// What is run after the latest token.
    ahead: Vec<u32>,
    /// How many of `ahead` must come.
    certain: usize,
    stats: DraftStats,
}

/// Somebody else who drafts.
#[derive(Debug)]
struct Other {
    draft: Box<dyn Draft>,
    chance: Chance,
    /// Seconds for a token.
    seconds: f64,
    asked: u64,
    /// Tokens since it was asked.
    since: u32,
}

impl Drafts {
    /// Drafts for a conversation that has not begun.
    pub fn new(limit: DraftLimit) -> Self {
        Self {
            limit,
            lookup: Lookup::default(),
            by_length: [0.25, 0.4, 0.55, 0.7, 0.8].map(Chance::expected),
            other: None,
            proposed: Vec::new(),
            by_other: false,
            matched: 0,
            chances: Vec::new(),
            ahead: Vec::new(),
            certain: 0,
            stats: DraftStats::default(),
        }
    }

    /// The same with somebody who drafts where the text itself does not.
    #[must_use]
    pub fn with(mut self, draft: Box<dyn Draft>) -> Self {
        self.other = Some(Other { draft, chance: Chance::expected(0.5), seconds: 0.0, asked: 0, since: 0 });
        self
    }

    /// How far it drafts.
    pub fn limit(&self) -> DraftLimit {
        self.limit
    }

    /// What became of drafts so far.
    pub fn stats(&self) -> DraftStats {
        self.stats
    }

    /// An answer begins that goes on with `text`.
    pub fn begin(&mut self, text: &[u32]) {
        self.ahead.clear();
        self.proposed.clear();
        if self.limit != DraftLimit::Off {
            self.lookup.begin(text);
        }
    }

    /// What is run after the latest token, and from which of these rows on logits are wanted, the latest token's being row 0:
    /// where a token must come, nobody has to choose it.
    pub fn ahead(&self) -> (&[u32], usize) {
        (&self.ahead, self.certain)
    }

    /// Decides what is run after the latest token of `answer`.
    ///
    /// # Errors
    /// Where the answer cannot go on, and what drafting meets.
    pub fn plan(&mut self, answer: &mut Answer, governor: &Governor, pass: &Planned) -> Result<(), ModelError> {
        self.ahead.clear();
        self.ahead.extend_from_slice(answer.certain(pass.most_certain)?);
        self.certain = self.ahead.len();
        self.proposed.clear();
        let most = answer.room_ahead().min(MOST_ROWS - 1);
        if self.certain > 0 || self.limit == DraftLimit::Off || most == 0 {
            return Ok(());
        }
        self.propose(most, governor, pass)?;
        let run = match self.limit {
            DraftLimit::Off => 0,
            _ if !pass.takes_drafts => 0,
            // What was made for a price is there now.
            DraftLimit::Auto => governor.worth(pass.rows, pass.tokens, &self.chances, 0.0),
            DraftLimit::Most(n) => n.min(MOST_ROWS.saturating_sub(pass.rows)),
        };
        let run = run.min(self.proposed.len());
        self.ahead.extend_from_slice(&self.proposed[..run]);
        Ok(())
    }

    /// Tokens that the rows of [`Drafts::ahead`] are expected to make.
    pub fn expected(&self) -> f64 {
        let drafted = self.ahead.len() - self.certain;
        self.certain as f64 + self.chances.iter().take(drafted).sum::<f64>()
    }

    /// Asks whoever may know what comes next.
    fn propose(&mut self, most: usize, governor: &Governor, pass: &Planned) -> Result<(), ModelError> {
        self.by_other = false;
        self.matched = self.lookup.propose(most, &mut self.proposed);
        self.chances.clear();
        let mut chance = 1.0;
        for i in 0..self.proposed.len() {
            chance *= self.by_length[class(self.matched + i)].next();
            self.chances.push(chance);
        }
        let Some(other) = &mut self.other else { return Ok(()) };
        let chance = other.chance.next();
        let chances: Vec<f64> = (1..=most as i32).map(|i| chance.powi(i)).collect();
        let asked = match self.limit {
            _ if other.draft.is_free() => most,
            _ if !pass.takes_drafts => 0,
            DraftLimit::Off => 0,
            DraftLimit::Most(n) => n.min(most),
            DraftLimit::Auto if governor.worth(pass.rows, pass.tokens, &self.chances, 0.0) > 0 => 0,
            DraftLimit::Auto => {
                other.since += 1;
                let worth = governor.worth(pass.rows, pass.tokens, &chances, other.seconds);
                if worth == 0 && other.since > ASKED_AGAIN { 1 } else { worth }
            }
        };
        if asked == 0 {
            return Ok(());
        }
        self.proposed.clear();
        let start = Instant::now();
        other.draft.propose(self.lookup.text(), asked, &mut self.proposed)?;
        if !self.proposed.is_empty() {
            other.since = 0;
            other.asked += 1;
            let seconds = start.elapsed().as_secs_f64() / self.proposed.len() as f64;
            other.seconds += (seconds - other.seconds) * (1.0 / other.asked as f64).max(0.1);
        }
        self.by_other = true;
        self.chances.clear();
        self.chances.extend_from_slice(&chances[..self.proposed.len()]);
        Ok(())
    }

    /// Chooses tokens by the logits of a pass of the latest token and what [`Drafts::ahead`] gave, which are the end of
    /// `sequence`: `logits` has those after so many of them; where a token must come they may be empty. Each token that has become part
    /// of the answer is shown to `each`, with the logits of the row before it, and `each` may break.
    ///
    /// Returns the token that is to be run next; breaks where the answer is over. `sequence` then holds the tokens before the
    /// answer's last.
    ///
    /// # Errors
    /// Where no token can be chosen.
    pub fn settle<'l>(
        &mut self,
        answer: &mut Answer,
        sampler: &mut Sampler,
        sequence: &mut Sequence,
        logits: impl Fn(usize) -> &'l [f32],
        mut each: impl FnMut(&mut Answer, &[f32]) -> ControlFlow<()>,
    ) -> Result<ControlFlow<(), u32>, SamplerError> {
        let begin = sequence.len() - self.ahead.len();
        let mut right = 0;
        let outcome = loop {
            let (row, made) = (logits(right), answer.ids().len());
            let next = match answer.next(row, sampler) {
                Ok(next) => next,
                Err(error) => break Err(error),
            };
            let goes_on = answer.ids().len() == made || each(answer, row).is_continue();
            let (Next::Token(id), true) = (next, goes_on) else { break Ok(ControlFlow::Break(())) };
            self.judge(right, id);
            if self.limit != DraftLimit::Off {
                self.lookup.push(id);
            }
            if self.ahead.get(right) != Some(&id) {
                break Ok(ControlFlow::Continue(id));
            }
            right += 1;
        };
        let drafted = self.ahead.len() - self.certain;
        self.stats.passes += u64::from(drafted > 0);
        self.stats.drafted += drafted as u64;
        self.stats.accepted += right.saturating_sub(self.certain) as u64;
        // Where the pass began can always be gone back to.
        let kept = sequence.truncate(begin + right);
        debug_assert_eq!(kept, begin + right);
        self.ahead.clear();
        self.certain = 0;
        outcome
    }

    /// The token after so many others is `id`: was that expected?
    fn judge(&mut self, after: usize, id: u32) {
        let Some(&expected) = self.proposed.get(after) else { return };
        let is_right = expected == id;
        match &mut self.other {
            Some(other) if self.by_other => other.chance.judge(is_right),
            _ => self.by_length[class(self.matched + after)].judge(is_right),
        }
        if !is_right {
            self.proposed.clear();
        }
    }
}

/// Matches of about that length.
fn class(matched: usize) -> usize {
    match matched {
        0..=2 => 0,
        3 => 1,
        4..=6 => 2,
        7..=15 => 3,
        _ => 4,
    }
}
