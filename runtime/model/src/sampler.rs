//! Logits to the next token.
//!
//! Owns the choice and its randomness: biases, penalties, what is allowed at all, then greedy at temperature 0, else top-k,
//! top-p, min-p, temperature and a draw, in llama.cpp's order, so that the same settings mean the same there and here. A draw
//! depends on the seed and the token's place in the text and on nothing else: equal seeds give equal draws on every machine,
//! however often a token is chosen and whatever was chosen before. Refuses logits that are not numbers. Nothing is allocated
//! per token once the buffers have grown.

use std::cmp::Ordering;
use std::collections::HashMap;

/// How many of the latest tokens the repeat penalty looks back on.
pub const REPEAT_WINDOW: usize = 64;

/// How tokens are chosen.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct SamplerOptions {
    /// Divides the logits before the draw; 0 is greedy. Finite, not negative.
    pub temperature: f32,
    /// Keep the `top_k` likeliest tokens; 0 keeps all.
    pub top_k: usize,
    /// Keep the likeliest tokens up to this total probability, in (0, 1]; 1 keeps all.
    pub top_p: f32,
    /// Drop tokens less likely than this share of the likeliest one, in [0, 1]; 0 drops none.
    pub min_p: f32,
    /// Makes the last [`REPEAT_WINDOW`] tokens less likely where above 1; 1 does nothing. Finite, positive.
    pub repeat_penalty: f32,
    /// Taken from the logit of a token once for each time that the answer has it. Finite.
    pub frequency_penalty: f32,
    /// Taken from the logit of every token that the answer has. Finite.
    pub presence_penalty: f32,
    /// Start of the random sequence.
    pub seed: u64,
}

impl Default for SamplerOptions {
    /// What most programs of this kind choose: temperature 0.8 among the 40 likeliest, top-p 0.95, min-p 0.05, no penalty. The seed
    /// is 0, the same text every time.
    fn default() -> Self {
        Self { temperature: 0.8, top_k: 40, top_p: 0.95, min_p: 0.05, ..Self::greedy() }
    }
}

impl SamplerOptions {
    /// Always the likeliest token, no penalty: the same text every time.
    pub fn greedy() -> Self {
        Self {
            temperature: 0.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            repeat_penalty: 1.0,
            frequency_penalty: 0.0,
            presence_penalty: 0.0,
            seed: 0,
        }
    }
}

/// Why no token can be chosen.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum SamplerError {
    /// A setting outside its range.
    #[error("{name} is {got}, expected {expected}")]
    Option {
        /// The setting.
        name: &'static str,
        /// Its value.
        got: f32,
        /// Its range.
        expected: &'static str,
    },
    /// The model computed something that is not a finite number.
    #[error("the logit of token {id} is {got}: the model's weights or its file are damaged")]
    NotFinite {
        /// The first token concerned.
        id: usize,
        /// Its logit.
        got: f32,
    },
    /// There is nothing to choose from.
    #[error("there is no token to choose from")]
    Empty,
    /// What the answer must fit does not let it go on.
    #[error("the answer cannot go on as its grammar asks: {0}")]
    Constraint(String),
}

/// One token still in the running.
#[derive(Debug, Clone, Copy)]
struct Candidate {
    id: u32,
    logit: f32,
    /// exp(logit - the highest logit).
    weight: f32,
}

/// Best first: higher logit, then lower id, so that the order is total and never depends on chance.
fn best_first(a: &Candidate, b: &Candidate) -> Ordering {
    b.logit.total_cmp(&a.logit).then(a.id.cmp(&b.id))
}

/// Tokens that may be chosen, one bit each: token `id` is bit `id % 32` of word `id / 32`. What is beyond its end may not.
pub type Allowed<'a> = &'a [u32];

/// Chooses tokens; remembers the recent ones.
#[derive(Debug, Clone)]
pub struct Sampler {
    options: SamplerOptions,
    /// What is added to logits.
    bias: Vec<(u32, f32)>,
    /// The latest tokens, a ring once full.
    recent: Vec<u32>,
    next_recent: usize,
    /// How often the answer has each token, where somebody wants to know.
    counts: HashMap<u32, u32>,
    /// Logits with all that changes them.
    adjusted: Vec<f32>,
    candidates: Vec<Candidate>,
}

impl Sampler {
    /// A sampler before a text.
    ///
    /// # Errors
    /// Where an option is outside its range.
    pub fn new(options: SamplerOptions) -> Result<Self, SamplerError> {
        let checks = [
            ("temperature", options.temperature, "a number from 0", options.temperature >= 0.0),
            ("top-p", options.top_p, "above 0 and at most 1", options.top_p > 0.0 && options.top_p <= 1.0),
            ("min-p", options.min_p, "from 0 to 1", (0.0..=1.0).contains(&options.min_p)),
            ("repeat penalty", options.repeat_penalty, "a number above 0", options.repeat_penalty > 0.0),
            ("frequency penalty", options.frequency_penalty, "a number", true),
            ("presence penalty", options.presence_penalty, "a number", true),
        ];
        for (name, got, expected, holds) in checks {
            if !holds || !got.is_finite() {
                return Err(SamplerError::Option { name, got, expected });
            }
        }
        Ok(Self {
            options,
            bias: Vec::new(),
            recent: Vec::with_capacity(REPEAT_WINDOW),
            next_recent: 0,
            counts: HashMap::new(),
            adjusted: Vec::new(),
            candidates: Vec::new(),
        })
    }

    /// The same with `bias` added to the logits of some tokens, each before anything else.
    ///
    /// # Errors
    /// Where a bias is no finite number.
    pub fn with_bias(mut self, bias: Vec<(u32, f32)>) -> Result<Self, SamplerError> {
        if let Some(&(_, got)) = bias.iter().find(|(_, bias)| !bias.is_finite()) {
            return Err(SamplerError::Option { name: "logit bias", got, expected: "a number" });
        }
        self.bias = bias;
        Ok(self)
    }

    /// The options it was made with.
    pub fn options(&self) -> &SamplerOptions {
        &self.options
    }

    /// Begins an answer that goes on with `text`: the penalties know the end of it, and nothing of other answers.
    pub fn begin(&mut self, text: &[u32]) {
        self.counts.clear();
        self.recent.clear();
        self.recent.extend_from_slice(&text[text.len().saturating_sub(REPEAT_WINDOW)..]);
        self.next_recent = 0;
    }

    /// Takes note of a token that is now part of the answer: the penalties count it.
    pub fn accept(&mut self, id: u32) {
        if self.recent.len() < REPEAT_WINDOW {
            self.recent.push(id);
        } else {
            self.recent[self.next_recent] = id;
            self.next_recent = (self.next_recent + 1) % REPEAT_WINDOW;
        }
        if self.counts_tokens() {
            *self.counts.entry(id).or_default() += 1;
        }
    }

    fn counts_tokens(&self) -> bool {
        self.options.frequency_penalty != 0.0 || self.options.presence_penalty != 0.0
    }

    /// The token of place `position` in the text, given one logit per token of the vocabulary. Does not
    /// [`accept`](Sampler::accept) it.
    ///
    /// # Errors
    /// Where `logits` is empty or holds NaN or infinity; -inf is a token that is not to be chosen.
    pub fn sample(&mut self, logits: &[f32], position: usize) -> Result<u32, SamplerError> {
        self.sample_among(logits, position, None)
    }

    /// [`Sampler::sample`] among some tokens alone.
    ///
    /// # Errors
    /// As [`Sampler::sample`], and where no token is allowed.
    pub fn sample_among(
        &mut self,
        logits: &[f32],
        position: usize,
        allowed: Option<Allowed<'_>>,
    ) -> Result<u32, SamplerError> {
        if let Some((id, got)) = first_not_finite(logits) {
            return Err(SamplerError::NotFinite { id, got });
        }
        let mut adjusted = std::mem::take(&mut self.adjusted);
        let logits = match self.adjusts() || allowed.is_some() {
            false => logits,
            true => {
                adjusted.clear();
                adjusted.extend_from_slice(logits);
                self.adjust(&mut adjusted, allowed);
                &adjusted
            }
        };
        let chosen = match self.options.temperature {
            0.0 => argmax(logits),
            _ => self.draw(logits, position),
        };
        self.adjusted = adjusted;
        chosen.ok_or(SamplerError::Empty)
    }

    /// Whether anything changes logits.
    fn adjusts(&self) -> bool {
        self.options.repeat_penalty != 1.0 || !self.bias.is_empty() || !self.counts.is_empty()
    }

    fn adjust(&self, logits: &mut [f32], allowed: Option<Allowed<'_>>) {
        // A logit stays a number, however far it is moved.
        let moved = |logit: &mut f32, by: f32| *logit = (*logit + by).clamp(f32::MIN, f32::MAX);
        for &(id, bias) in &self.bias {
            if let Some(logit) = logits.get_mut(id as usize) {
                moved(logit, bias);
            }
        }
        if self.options.repeat_penalty != 1.0 {
            self.penalize(logits, self.options.repeat_penalty);
        }
        for (&id, &count) in &self.counts {
            if let Some(logit) = logits.get_mut(id as usize) {
                moved(logit, -(self.options.frequency_penalty * count as f32));
                moved(logit, -self.options.presence_penalty);
            }
        }
        if let Some(allowed) = allowed {
            for (word, logits) in logits.chunks_mut(32).enumerate() {
                let bits = allowed.get(word).copied().unwrap_or(0);
                if bits != u32::MAX {
                    let logits = logits.iter_mut().enumerate().filter(|(bit, _)| bits >> bit & 1 == 0);
                    logits.for_each(|(_, logit)| *logit = f32::NEG_INFINITY);
                }
            }
        }
    }

    fn penalize(&self, logits: &mut [f32], penalty: f32) {
        for (i, &id) in self.recent.iter().enumerate() {
            let counted = self.recent[..i].contains(&id);
            if let Some(logit) = logits.get_mut(id as usize).filter(|_| !counted) {
                let less = if *logit > 0.0 { *logit / penalty } else { *logit * penalty };
                // A logit stays a number, however far the penalty moves it.
                *logit = less.clamp(f32::MIN, f32::MAX);
            }
        }
    }

    fn draw(&mut self, logits: &[f32], position: usize) -> Option<u32> {
        let k = match self.options.top_k {
            0 => logits.len(),
            k => k.min(logits.len()),
        };
        keep_top_k(logits, k, &mut self.candidates);
        let candidates = &mut self.candidates;
        let best = candidates.iter().map(|c| c.logit).fold(f32::NEG_INFINITY, f32::max);
        let mut total = 0.0f64;
        for candidate in candidates.iter_mut() {
            candidate.weight = (candidate.logit - best).exp();
            total += f64::from(candidate.weight);
        }
        if self.options.top_p < 1.0 {
            keep_top_p(candidates, f64::from(self.options.top_p) * total);
        }
        let min_p = self.options.min_p;
        candidates.retain(|c| c.weight >= min_p);

        let mut total = 0.0f64;
        for candidate in candidates.iter_mut() {
            candidate.weight = ((candidate.logit - best) / self.options.temperature).exp();
            total += f64::from(candidate.weight);
        }
        // Walking in a fixed order keeps the draw the same however the candidates were selected.
        candidates.sort_unstable_by(best_first);
        let target = unit(self.options.seed, position as u64) * total;
        let mut reached = 0.0f64;
        for candidate in candidates.iter() {
            reached += f64::from(candidate.weight);
            if reached > target {
                return Some(candidate.id);
            }
        }
        candidates.last().map(|c| c.id)
    }
}

/// The first logit that is neither a finite number nor -inf, which a token has that is not to be chosen. Blocks are judged whole: a search
/// that may end at any logit is not vectorized, and a vocabulary is long.
fn first_not_finite(logits: &[f32]) -> Option<(usize, f32)> {
    const BLOCK: usize = 256;
    // False for NaN, too.
    let can_be = |logit: f32| logit < f32::INFINITY;
    let all_can_be = |block: &[f32]| block.iter().fold(true, |all, &logit| all & can_be(logit));
    let block = logits.chunks(BLOCK).position(|block| !all_can_be(block))?;
    let rest = logits.iter().enumerate().skip(block * BLOCK);
    rest.map(|(id, &logit)| (id, logit)).find(|&(_, logit)| !can_be(logit))
}

/// The id of the highest logit, the lowest id where several are equal; `None` where no token is allowed.
fn argmax(logits: &[f32]) -> Option<u32> {
    // Floats compared as integers in the same order, which is vectorized.
    let key = |logit: &f32| {
        let bits = logit.to_bits() as i32;
        bits ^ ((bits >> 31) & i32::MAX)
    };
    let highest = logits.iter().map(key).max()?;
    let highest = f32::from_bits((highest ^ ((highest >> 31) & i32::MAX)) as u32);
    if highest == f32::NEG_INFINITY {
        return None;
    }
    logits.iter().position(|&logit| logit == highest).map(|id| id as u32)
}

/// Fills `out` with the `k` best candidates that are allowed, in no order.
///
/// One pass with a rising threshold: most logits of a large vocabulary are dismissed by a single comparison.
fn keep_top_k(logits: &[f32], k: usize, out: &mut Vec<Candidate>) {
    out.clear();
    let room = k.saturating_mul(2).max(k + 1024);
    let mut threshold = f32::MIN;
    for (id, &logit) in (0u32..).zip(logits) {
        if logit >= threshold {
            out.push(Candidate { id, logit, weight: 0.0 });
            if out.len() >= room {
                out.select_nth_unstable_by(k - 1, best_first);
                out.truncate(k);
                threshold = out[k - 1].logit;
            }
        }
    }
    if out.len() > k && k > 0 {
        out.select_nth_unstable_by(k - 1, best_first);
        out.truncate(k);
    }
}

/// Keeps the best candidates until their weights reach `enough`, the one that reaches it included; at least one.
///
/// Sorts only as many as it keeps, a stretch at a time.
fn keep_top_p(candidates: &mut Vec<Candidate>, enough: f64) {
    let mut reached = 0.0f64;
    let mut sorted = 0;
    let mut stretch = 256;
    while sorted < candidates.len() {
        let rest = &mut candidates[sorted..];
        let n = stretch.min(rest.len());
        if n < rest.len() {
            rest.select_nth_unstable_by(n - 1, best_first);
        }
        rest[..n].sort_unstable_by(best_first);
        for (i, candidate) in rest[..n].iter().enumerate() {
            reached += f64::from(candidate.weight);
            if reached >= enough {
                candidates.truncate(sorted + i + 1);
                return;
            }
        }
        sorted += n;
        stretch *= 4;
    }
}

/// The random number of place `position` in a text, uniform in [0, 1): that entry of the sequence of splitmix64 (Steele, Lea and
/// Flood), which can be entered anywhere. The seed goes through the same mixing first, so that the sequences of neighbouring
/// seeds do not overlap.
fn unit(seed: u64, position: u64) -> f64 {
    const STEP: u64 = 0x9e37_79b9_7f4a_7c15;
    let state = mix(seed.wrapping_add(STEP)).wrapping_add(position.wrapping_add(1).wrapping_mul(STEP));
    (mix(state) >> 11) as f64 / (1u64 << 53) as f64
}

fn mix(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sampler(change: impl FnOnce(&mut SamplerOptions)) -> Sampler {
        let mut options = SamplerOptions { temperature: 1.0, ..SamplerOptions::greedy() };
        change(&mut options);
        Sampler::new(options).expect("valid options")
    }

    /// How often each of `n` tokens is drawn in `draws` draws.
    fn histogram(sampler: &mut Sampler, logits: &[f32], draws: usize) -> Vec<usize> {
        let mut counts = vec![0; logits.len()];
        for position in 0..draws {
            counts[sampler.sample(logits, position).expect("a token") as usize] += 1;
        }
        counts
    }

    #[test]
    fn greedy_takes_the_lowest_id_on_ties() {
        let mut greedy = Sampler::new(SamplerOptions::greedy()).expect("valid");
        assert_eq!(greedy.sample(&[0.0, 3.0, 3.0, -1.0], 0), Ok(1));
        assert_eq!(greedy.sample(&[0.0, -0.0], 0), Ok(0));
        assert_eq!(greedy.sample(&[-0.0, 0.0], 0), Ok(0));
        assert_eq!(greedy.sample(&[-3.0, -2.0, -2.0, -7.0], 0), Ok(1));
        let mut long = vec![-1.0; 1000];
        long[777] = -0.5;
        assert_eq!(greedy.sample(&long, 0), Ok(777));
    }

    #[test]
    fn logits_that_are_no_numbers_are_refused() {
        let mut draw = sampler(|_| ());
        let Err(SamplerError::NotFinite { id: 1, .. }) = draw.sample(&[0.0, f32::NAN], 0) else {
            panic!("NaN was accepted");
        };
        assert!(draw.sample(&[f32::INFINITY], 0).is_err());
        let mut long = vec![0.0; 1000];
        long[777] = f32::NAN;
        assert!(matches!(draw.sample(&long, 0), Err(SamplerError::NotFinite { id: 777, .. })));
        // What is not to be chosen is not chosen, and is no reason to choose nothing.
        let mut only = vec![f32::NEG_INFINITY; 1000];
        only[777] = -3.0;
        assert_eq!(draw.sample(&only, 0), Ok(777));
        assert_eq!(draw.sample(&[], 0), Err(SamplerError::Empty));
    }

    #[test]
    fn options_outside_their_range_are_refused() {
        let bad: [fn(&mut SamplerOptions); 8] = [
            |o| o.temperature = -0.1,
            |o| o.temperature = f32::NAN,
            |o| o.temperature = f32::INFINITY,
            |o| o.top_p = 0.0,
            |o| o.top_p = 1.1,
            |o| o.min_p = -0.1,
            |o| o.min_p = f32::NAN,
            |o| o.repeat_penalty = 0.0,
        ];
        for change in bad {
            let mut options = SamplerOptions::greedy();
            change(&mut options);
            assert!(Sampler::new(options).is_err(), "{options:?}");
        }
    }

    #[test]
    fn draws_follow_the_probabilities() {
        let logits = [0.5f32.ln(), 0.3f32.ln(), 0.2f32.ln()];
        let counts = histogram(&mut sampler(|o| o.seed = 7), &logits, 20_000);
        for (count, p) in counts.iter().zip([0.5, 0.3, 0.2]) {
            let got = *count as f64 / 20_000.0;
            assert!((got - p).abs() < 0.015, "{counts:?}");
        }
    }

    #[test]
    fn equal_seeds_give_equal_draws_and_others_do_not() {
        let logits: Vec<f32> = (0..1000).map(|i| (i as f32 * 0.37).sin()).collect();
        let draws = |seed| -> Vec<u32> {
            let mut s = sampler(|o| o.seed = seed);
            (0..32).map(|position| s.sample(&logits, position).expect("a token")).collect()
        };
        assert_eq!(draws(1), draws(1));
        assert_ne!(draws(1), draws(2));
    }

    #[test]
    fn a_draw_depends_on_seed_and_place_alone() {
        let logits: Vec<f32> = (0..1000).map(|i| (i as f32 * 0.37).sin()).collect();
        let mut s = sampler(|o| o.seed = 3);
        let forwards: Vec<u32> = (0..32).map(|position| s.sample(&logits, position).expect("a token")).collect();
        let mut backwards: Vec<u32> =
            (0..32).rev().map(|position| s.sample(&logits, position).expect("a token")).collect();
        backwards.reverse();
        assert_eq!(forwards, backwards);
        // From the authors' splitmix64.c with the seed 0.
        assert_eq!(mix(0x9e37_79b9_7f4a_7c15), 0xe220_a839_7b1d_cdaf);
        // Places far apart and neighbouring seeds have numbers of their own.
        let mut all: Vec<u64> = (0..100)
            .flat_map(|seed| [0, 1, 2, 1 << 20, u64::MAX].map(|position| unit(seed, position).to_bits()))
            .collect();
        all.sort_unstable();
        all.dedup();
        assert_eq!(all.len(), 500);
        let mean = (0..10_000).map(|position| unit(9, position)).sum::<f64>() / 10_000.0;
        assert!((mean - 0.5).abs() < 0.01, "{mean}");
    }

    #[test]
    fn biases_and_penalties_move_logits_of_the_answer_alone() {
        let greedy = |change: fn(&mut SamplerOptions)| {
            sampler(|o| {
                o.temperature = 0.0;
                change(o);
            })
        };
        let mut biased = greedy(|_| ()).with_bias(vec![(2, 100.0), (0, -100.0), (9, 1.0)]).expect("numbers");
        assert_eq!(biased.sample(&[3.0, 2.0, 1.0], 0), Ok(2));
        assert!(greedy(|_| ()).with_bias(vec![(0, f32::NAN)]).is_err());

        // The prompt does not count, each time in the answer does.
        let mut s = greedy(|o| o.frequency_penalty = 1.0);
        s.begin(&[0; 5]);
        assert_eq!(s.sample(&[3.0, 0.5], 0), Ok(0));
        s.accept(0);
        s.accept(0);
        assert_eq!(s.sample(&[3.0, 0.5], 0), Ok(0));
        s.accept(0);
        assert_eq!(s.sample(&[3.0, 0.5], 0), Ok(1));
        s.begin(&[]);
        assert_eq!(s.sample(&[3.0, 0.5], 0), Ok(0));

        let mut s = greedy(|o| o.presence_penalty = 1.0);
        s.accept(0);
        s.accept(0);
        assert_eq!(s.sample(&[3.0, 0.5], 0), Ok(0));
        assert_eq!(s.sample(&[1.4, 0.5], 0), Ok(1));
    }

    #[test]
    fn what_is_not_allowed_is_never_chosen() {
        let logits: Vec<f32> = (0..100).map(|i| -(i as f32)).collect();
        for temperature in [0.0, 1.0] {
            let mut s = sampler(|o| o.temperature = temperature);
            let mut allowed = [0u32; 4];
            assert_eq!(s.sample_among(&logits, 0, Some(&allowed)), Err(SamplerError::Empty));
            allowed[2] = 1 << 7;
            assert_eq!(s.sample_among(&logits, 0, Some(&allowed)), Ok(71));
            // A mask that is shorter than the vocabulary allows nothing beyond its end.
            assert_eq!(s.sample_among(&logits, 0, Some(&allowed[..2])), Err(SamplerError::Empty));
            assert_eq!(s.sample_among(&logits, 5, Some(&[u32::MAX; 4])), s.sample(&logits, 5));
        }
    }

    #[test]
    fn top_k_keeps_the_best() {
        let logits: Vec<f32> = (0..5000).map(|i| ((i * 7919) % 5000) as f32 * 1e-4).collect();
        let mut kept = Vec::new();
        for k in [1, 2, 40, 1024, 4999, 5000] {
            keep_top_k(&logits, k, &mut kept);
            let mut all: Vec<u32> = (0..5000).collect();
            all.sort_by(|&a, &b| logits[b as usize].total_cmp(&logits[a as usize]).then(a.cmp(&b)));
            let mut got: Vec<u32> = kept.iter().map(|c| c.id).collect();
            got.sort_unstable();
            all.truncate(k);
            all.sort_unstable();
            assert_eq!(got, all);
        }
        let counts = histogram(&mut sampler(|o| o.top_k = 2), &[1.0, 1.1, 1.2], 500);
        assert_eq!(counts[0], 0);
        assert!(counts[1] > 0 && counts[2] > 0);
    }

    #[test]
    fn ties_at_the_edge_of_top_k_keep_the_lowest_ids() {
        let mut kept = Vec::new();
        keep_top_k(&[1.0; 5000], 3, &mut kept);
        let mut ids: Vec<u32> = kept.iter().map(|c| c.id).collect();
        ids.sort_unstable();
        assert_eq!(ids, [0, 1, 2]);
    }

    #[test]
    fn top_p_keeps_the_token_that_reaches_it() {
        let logits = [0.5f32.ln(), 0.3f32.ln(), 0.15f32.ln(), 0.05f32.ln()];
        let counts = histogram(&mut sampler(|o| o.top_p = 0.7), &logits, 500);
        assert!(counts[0] > 0 && counts[1] > 0);
        assert_eq!(counts[2..], [0, 0]);
        let counts = histogram(&mut sampler(|o| o.top_p = 1e-9), &logits, 100);
        assert_eq!(counts, [100, 0, 0, 0]);
    }

    #[test]
    fn top_p_over_a_large_flat_vocabulary() {
        let logits = vec![0.0; 10_000];
        let mut s = sampler(|o| o.top_p = 0.5);
        s.sample(&logits, 0).expect("a token");
        assert_eq!(s.candidates.len(), 5000);
    }

    #[test]
    fn min_p_is_relative_to_the_best() {
        let logits = [0.6f32.ln(), 0.35f32.ln(), 0.05f32.ln()];
        let counts = histogram(&mut sampler(|o| o.min_p = 0.1), &logits, 500);
        assert!(counts[1] > 0);
        assert_eq!(counts[2], 0);
        let counts = histogram(&mut sampler(|o| o.min_p = 1.0), &logits, 50);
        assert_eq!(counts, [50, 0, 0]);
    }

    #[test]
    fn repeat_penalty_counts_each_recent_token_once_and_forgets_old_ones() {
        let mut s = Sampler::new(SamplerOptions { repeat_penalty: 2.0, ..SamplerOptions::greedy() }).expect("valid");
        let logits = [1.0, 1.5, -0.1];
        assert_eq!(s.sample(&logits, 0), Ok(1));
        s.accept(1);
        s.accept(1);
        // 1.5 / 2 = 0.75; dividing twice would do as well, so the margin is checked below.
        assert_eq!(s.sample(&logits, 0), Ok(0));
        assert_eq!(s.sample(&[0.7, 1.5, 0.0], 0), Ok(1));
        for _ in 0..REPEAT_WINDOW {
            s.accept(2);
        }
        assert_eq!(s.sample(&logits, 0), Ok(1));
        // A negative logit is multiplied: -0.1 becomes -0.2.
        assert_eq!(s.sample(&[-0.15, -0.2, -0.1], 0), Ok(0));
        s.begin(&[]);
        assert_eq!(s.sample(&[-0.15, -0.2, -0.1], 0), Ok(2));
    }

    #[test]
    fn extreme_settings_still_choose() {
        for repeat_penalty in [1e-38, f32::MAX] {
            for temperature in [0.0, f32::MIN_POSITIVE, 1.0, f32::MAX] {
                for (top_k, top_p, min_p) in [(0, 1.0, 0.0), (1, f32::MIN_POSITIVE, 1.0), (usize::MAX, 0.5, 0.5)] {
                    let (frequency_penalty, presence_penalty) = (f32::MAX, -f32::MAX);
                    let options = SamplerOptions {
                        temperature,
                        top_k,
                        top_p,
                        min_p,
                        repeat_penalty,
                        frequency_penalty,
                        presence_penalty,
                        seed: 1,
                    };
                    let mut s = Sampler::new(options).expect("valid");
                    for logits in [[30.0, -30.0, 1.0], [0.0, 0.0, 0.0], [f32::MAX, f32::MIN, -1.0]] {
                        (0..3).for_each(|id| s.accept(id));
                        assert!(s.sample(&logits, 0).expect("a token") < 3, "{options:?}");
                    }
                }
            }
        }
    }

    #[test]
    fn buffers_do_not_grow_after_the_first_token() {
        let logits: Vec<f32> = (0..4000).map(|i| (i as f32 * 0.11).cos()).collect();
        let mut s = sampler(|o| {
            o.top_k = 40;
            o.repeat_penalty = 1.1;
        });
        s.sample(&logits, 0).expect("a token");
        let before = (s.candidates.as_ptr(), s.adjusted.as_ptr(), s.candidates.capacity());
        for _ in 0..100 {
            let id = s.sample(&logits, 0).expect("a token");
            s.accept(id);
        }
        assert_eq!(before, (s.candidates.as_ptr(), s.adjusted.as_ptr(), s.candidates.capacity()));
    }
}
