//! Cheap, repeatable pseudo-random weights.
//!
//! Every row of every tensor has its own generator, keyed by (seed, tensor, row), so rows can be made in any order, on
//! any number of threads and in any output format, and are the same numbers. Normals come from a table of quantiles:
//! weights need the right variance and shape, not the far tails.

/// Quantiles in the table; one 64-bit draw gives five 12-bit indices.
const TABLE: usize = 4096;

/// SplitMix64: one addition and two multiplications per draw, any seed is a good one.
#[derive(Clone, Debug)]
pub struct Rng(u64);

impl Rng {
    /// The generator of one row.
    pub fn for_row(seed: u64, tensor: &str, row: u64) -> Self {
        let mut hash = 0xcbf2_9ce4_8422_2325_u64 ^ seed.wrapping_mul(0x9e37_79b9_7f4a_7c15);
        for byte in tensor.bytes() {
            hash = (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3);
        }
        let mut rng = Self(hash ^ row.wrapping_mul(0xd1b5_4a32_d192_ed03));
        rng.next_u64();
        rng
    }

    /// The next 64 random bits.
    #[inline]
    pub fn next_u64(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number below `n` (`n` > 0), without a visible bias for the small `n` used here.
    pub fn below(&mut self, n: usize) -> usize {
        ((u128::from(self.next_u64()) * n as u128) >> 64) as usize
    }
}

/// A table of standard normal quantiles.
#[derive(Clone, Debug)]
pub struct Normals(Vec<f32>);

impl Default for Normals {
    fn default() -> Self {
        Self::new()
    }
}

impl Normals {
    /// The table: mean 0 and variance 1 exactly (up to rounding), extremes at ±3.7.
    pub fn new() -> Self {
        let raw: Vec<f64> = (0..TABLE).map(|i| normal_quantile((i as f64 + 0.5) / TABLE as f64)).collect();
        let variance = raw.iter().map(|x| x * x).sum::<f64>() / TABLE as f64;
        Self(raw.iter().map(|x| (x / variance.sqrt()) as f32).collect())
    }

    /// One draw.
    pub fn sample(&self, rng: &mut Rng) -> f32 {
        self.0[(rng.next_u64() >> 52) as usize]
    }

    /// Fills `out` with independent draws of standard deviation `sigma`.
    pub fn fill(&self, rng: &mut Rng, sigma: f32, out: &mut [f32]) {
        let table: &[f32; TABLE] = self.0[..].try_into().expect("the table has TABLE entries");
        let mut groups = out.chunks_exact_mut(5);
        for group in &mut groups {
            let bits = rng.next_u64();
            for (i, x) in group.iter_mut().enumerate() {
                *x = sigma * table[(bits >> (12 * i)) as usize % TABLE];
            }
        }
        for x in groups.into_remainder() {
            *x = sigma * self.sample(rng);
        }
    }
}

/// The standard normal distribution function, to 1e-7 (Abramowitz and Stegun 7.1.26 on the error function).
pub fn normal_cdf(x: f64) -> f64 {
    let z = x.abs() / std::f64::consts::SQRT_2;
    let t = 1.0 / (1.0 + 0.327_591_1 * z);
    let poly =
        t * (0.254_829_592 + t * (-0.284_496_736 + t * (1.421_413_741 + t * (-1.453_152_027 + t * 1.061_405_429))));
    let upper = 0.5 * poly * (-z * z).exp();
    if x >= 0.0 { 1.0 - upper } else { upper }
}

/// The standard normal density.
pub fn normal_pdf(x: f64) -> f64 {
    (-0.5 * x * x).exp() / (2.0 * std::f64::consts::PI).sqrt()
}

/// The inverse of [`normal_cdf`] by bisection; clamps to ±8.
pub fn normal_quantile(p: f64) -> f64 {
    let (mut low, mut high) = (-8.0_f64, 8.0_f64);
    for _ in 0..60 {
        let middle = 0.5 * (low + high);
        if normal_cdf(middle) < p { low = middle } else { high = middle }
    }
    0.5 * (low + high)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_repeatable_and_distinct() {
        let draw = |seed, tensor: &str, row| Rng::for_row(seed, tensor, row).next_u64();
        assert_eq!(draw(1, "a", 0), draw(1, "a", 0));
        let all = [draw(1, "a", 0), draw(2, "a", 0), draw(1, "b", 0), draw(1, "a", 1)];
        for (i, x) in all.iter().enumerate() {
            assert!(all[i + 1..].iter().all(|y| x != y));
        }
    }

    #[test]
    fn draws_have_the_stated_moments() {
        let normals = Normals::new();
        let mut out = vec![0.0; 200_003];
        normals.fill(&mut Rng::for_row(7, "moments", 0), 0.5, &mut out);
        let n = out.len() as f64;
        let mean = out.iter().map(|&x| f64::from(x)).sum::<f64>() / n;
        let variance = out.iter().map(|&x| f64::from(x).powi(2)).sum::<f64>() / n - mean * mean;
        assert!(mean.abs() < 0.005, "{mean}");
        assert!((variance - 0.25).abs() < 0.005, "{variance}");
    }

    #[test]
    fn quantile_inverts_the_distribution() {
        for p in [0.001, 0.08, 0.35, 0.5, 0.65, 0.92, 0.999] {
            assert!((normal_cdf(normal_quantile(p)) - p).abs() < 1e-6);
        }
        assert!((normal_quantile(0.975) - 1.959_964).abs() < 1e-4);
    }
}
