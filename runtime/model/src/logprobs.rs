//! How likely tokens are: logits to the logarithms of probabilities.

/// How likely a token was, and which were likelier.
#[derive(Clone, Debug, PartialEq)]
pub struct Logprobs {
    /// The natural logarithm of the token's probability.
    pub chosen: f32,
    /// The likeliest tokens with theirs, best first, the lower id first where two are equal.
    pub top: Vec<(u32, f32)>,
}

impl Logprobs {
    /// Of the token `id`, with the `top` likeliest, by the model's own `logits`: nothing that sampling does to them counts.
    ///
    /// # Panics
    /// Where `id` is not among them.
    pub fn of(logits: &[f32], id: u32, top: usize) -> Self {
        let highest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let sum: f64 = logits.iter().map(|&logit| f64::from(logit - highest).exp()).sum();
        let log = |logit: f32| (f64::from(logit - highest) - sum.ln()) as f32;
        let mut best: Vec<(u32, f32)> = Vec::with_capacity(top + 1);
        for (id, &logit) in (0u32..).zip(logits).filter(|_| top > 0) {
            if best.len() < top || best.last().is_some_and(|&(_, least)| logit > least) {
                let at = best.partition_point(|&(_, other)| other >= logit);
                best.insert(at, (id, logit));
                best.truncate(top);
            }
        }
        let top = best.into_iter().map(|(id, logit)| (id, log(logit))).collect();
        Self { chosen: log(logits[id as usize]), top }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn probabilities_are_those_of_the_softmax() {
        let logits = [0.5f32.ln() + 70.0, 0.1f32.ln() + 70.0, 0.3f32.ln() + 70.0, 0.1f32.ln() + 70.0];
        let got = Logprobs::of(&logits, 1, 3);
        assert!((got.chosen.exp() - 0.1).abs() < 1e-5);
        let ids: Vec<u32> = got.top.iter().map(|&(id, _)| id).collect();
        assert_eq!(ids, [0, 2, 1]);
        assert!((got.top[0].1.exp() - 0.5).abs() < 1e-5);
        assert_eq!(Logprobs::of(&logits, 3, 0).top, []);
        assert_eq!(Logprobs::of(&logits, 3, 9).top.len(), 4);
        let far = Logprobs::of(&[f32::MAX, f32::MIN], 1, 1);
        assert!(far.chosen < -1e30 && far.top == [(0, 0.0)]);
    }
}
