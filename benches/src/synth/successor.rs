//! Token codes under which "the next token" is a linear map.
//!
//! A random model with a tied head repeats its last token for ever. Here every token carries a code of signs made of a
//! few cycles of coprime prime lengths; turning each cycle by one step turns the code of token `k` into that of token
//! `k + 1`, and by the Chinese remainder theorem no two tokens share a code. One attention head that looks at its own
//! position applies the turn, so that greedy text walks through the vocabulary with a wide margin at each step.
//! The cycles are Legendre sequences of primes 3 mod 4: unlike shifts are as good as orthogonal.

/// Sets of cycle lengths, shortest code first.
const CYCLES: [&[usize]; 5] = [&[3, 7, 11, 19], &[7, 11, 19], &[11, 19, 23], &[7, 11, 19, 23], &[19, 23, 31, 43]];

/// Codes of a vocabulary.
#[derive(Clone, Debug)]
pub struct Codes {
    cycles: &'static [usize],
    signs: Vec<Vec<f32>>,
    /// Tokens that the walk visits: all but special and padding tokens.
    n_regular: usize,
    multiplier: usize,
}

impl Codes {
    /// Codes for `n_regular` ordinary tokens followed by others up to `vocab`, in at most `width` signs; `None` where
    /// they do not fit.
    pub fn new(n_regular: usize, vocab: usize, width: usize) -> Option<Self> {
        let fits = |c: &&&[usize]| c.iter().product::<usize>() > vocab && c.iter().sum::<usize>() <= width;
        let cycles = *CYCLES.iter().filter(fits).min_by_key(|c| c.iter().sum::<usize>())?;
        let mut multiplier = n_regular * 618 / 1000;
        while gcd(multiplier, n_regular) != 1 {
            multiplier += 1;
        }
        Some(Self { cycles, signs: cycles.iter().map(|&p| legendre(p)).collect(), n_regular, multiplier })
    }

    /// Signs in a code.
    pub fn len(&self) -> usize {
        self.cycles.iter().sum()
    }

    /// Whether a code has no signs; never so.
    pub fn is_empty(&self) -> bool {
        self.cycles.is_empty()
    }

    /// Writes the code of `token` into the first [`Self::len`] values of `out`.
    pub fn write(&self, token: usize, out: &mut [f32]) {
        let step = self.step_of(token);
        let mut at = 0;
        for (signs, &p) in self.signs.iter().zip(self.cycles) {
            for i in 0..p {
                out[at + i] = signs[(i + step) % p];
            }
            at += p;
        }
    }

    /// How many steps a token is from the one where the walk begins.
    pub fn step_of(&self, token: usize) -> usize {
        match token < self.n_regular {
            true => (token as u128 * self.multiplier as u128 % self.n_regular as u128) as usize,
            false => token + 1,
        }
    }

    /// The place in a code whose sign moves to place `i` when the code takes a step.
    pub fn source_of(&self, i: usize) -> usize {
        let mut start = 0;
        for &p in self.cycles {
            if i < start + p {
                return start + (i - start + 1) % p;
            }
            start += p;
        }
        i
    }
}

/// Quadratic residues of the prime `p` as signs, with +1 at 0.
fn legendre(p: usize) -> Vec<f32> {
    let mut signs = vec![-1.0; p];
    for i in 0..p {
        signs[i * i % p] = 1.0;
    }
    signs
}

fn gcd(a: usize, b: usize) -> usize {
    if b == 0 { a } else { gcd(b, a % b) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_step_turns_one_code_into_another_token_code() {
        let codes = Codes::new(151_643, 151_936, 128).unwrap();
        let code = |token| {
            let mut out = vec![0.0; codes.len()];
            codes.write(token, &mut out);
            out
        };
        let stride = (1..151_643).find(|s| s * codes.multiplier % 151_643 == 1).unwrap();
        for token in [0, 1, 77, 151_000] {
            let turned: Vec<f32> = (0..codes.len()).map(|i| code(token)[codes.source_of(i)]).collect();
            assert_eq!(turned, code((token + stride) % 151_643), "{token}");
        }
    }

    #[test]
    fn codes_are_distinct_and_nearly_orthogonal() {
        let codes = Codes::new(151_643, 151_936, 128).unwrap();
        let mut first = vec![0.0; codes.len()];
        codes.write(12_345, &mut first);
        let mut other = first.clone();
        for token in (0..151_936).filter(|&t| t != 12_345) {
            codes.write(token, &mut other);
            let dot: f32 = first.iter().zip(&other).map(|(a, b)| a * b).sum();
            assert!(dot <= (codes.len() - 20) as f32, "{token}: {dot}");
        }
    }

    #[test]
    fn codes_that_do_not_fit_are_none() {
        assert!(Codes::new(151_643, 151_936, 64).is_none());
        assert!(Codes::new(400, 512, 32).is_none());
        assert!(Codes::new(500, 512, 40).is_some());
    }
}
