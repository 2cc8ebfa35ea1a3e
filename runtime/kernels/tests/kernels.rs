//! Every instruction set against the portable code, bit for bit; one token against many; and all of it against plain
//! arithmetic on dequantized values.

use proptest::prelude::*;
use st_kernels::*;

/// Relative error of int8 activations against floats, of the root mean square.
const INT8_BOUND: f64 = 2e-2;
/// Relative error of f32 sums in another order.
const F32_BOUND: f64 = 2e-6;

struct Rng(u64);

impl Rng {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    /// Between -1 and 1, with a tail.
    fn float(&mut self) -> f32 {
        let u = (self.next() >> 40) as f32 / (1u64 << 23) as f32 - 1.0;
        u * u * u * 2.0
    }

    fn floats(&mut self, n: usize) -> Vec<f32> {
        (0..n).map(|_| self.float()).collect()
    }
}

/// As many cases as PROPTEST_CASES asks for, or `n`.
fn cases(n: u32) -> ProptestConfig {
    let cases = if std::env::var_os("PROPTEST_CASES").is_some() { ProptestConfig::default().cases } else { n };
    ProptestConfig::with_cases(cases)
}

fn isas() -> Vec<Kernels> {
    let all: Vec<_> = Isa::ALL.into_iter().filter_map(Kernels::for_isa).collect();
    assert!(all.iter().any(|k| k.isa() == Kernels::detect().isa()));
    all
}

fn bits(x: &[f32]) -> Vec<u32> {
    x.iter().map(|v| v.to_bits()).collect()
}

/// `sizes` is what the errors are measured by: `want`, or for sums the [`spread`] of their terms.
fn assert_close(got: &[f32], want: &[f64], sizes: &[f64], bound: f64, what: &str) {
    let norm = (sizes.iter().map(|v| v * v).sum::<f64>() / want.len() as f64).sqrt();
    let error =
        (got.iter().zip(want).map(|(a, b)| (f64::from(*a) - b).powi(2)).sum::<f64>() / want.len() as f64).sqrt();
    assert!(error <= bound * norm.max(1e-6), "{what}: error {error} of {norm}");
}

/// `rows × k` random weights as canonical bytes, and as the floats they stand for.
fn weights(rng: &mut Rng, ty: WeightType, rows: usize, k: usize) -> (Vec<u8>, Vec<f32>) {
    let mut bytes = vec![0; rows * ty.row_bytes(k).unwrap()];
    for row in bytes.chunks_exact_mut(ty.row_bytes(k).unwrap()) {
        let x = rng.floats(k);
        match ty {
            WeightType::Q4_0 => quantize_row_q4_0(&x, row),
            WeightType::Q8_0 => quantize_row_q8_0(&x, row),
            WeightType::F32 => row.copy_from_slice(&x.iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<_>>()),
            WeightType::F16 => {
                row.copy_from_slice(&x.iter().flat_map(|v| half::f16::from_f32(*v).to_le_bytes()).collect::<Vec<_>>());
            }
            WeightType::BF16 => {
                row.copy_from_slice(&x.iter().flat_map(|v| half::bf16::from_f32(*v).to_le_bytes()).collect::<Vec<_>>());
            }
            _ => random_blocks(rng, ty, row),
        }
    }
    if ty == WeightType::Q8_0 {
        // A value that the quantizer never makes, but a file may hold.
        bytes[2] = 0x80;
    }
    let mut floats = vec![0.0; rows * k];
    for (b, f) in bytes.chunks_exact(ty.row_bytes(k).unwrap()).zip(floats.chunks_exact_mut(k)) {
        dequantize_row(ty, b, f);
    }
    (bytes, floats)
}

/// Blocks of any bytes, but for f16 scales and powers of two of about the size of a weight.
fn random_blocks(rng: &mut Rng, ty: WeightType, row: &mut [u8]) {
    let (scales, by): (&[usize], f32) = match ty {
        WeightType::Q4_1 | WeightType::Q5_1 => (&[0, 2], 64.0),
        WeightType::Q4_K | WeightType::Q5_K => (&[0, 2], 2048.0),
        WeightType::Q2_K => (&[80, 82], 64.0),
        WeightType::Q3_K => (&[108], 512.0),
        WeightType::Q6_K => (&[208], 8192.0),
        WeightType::IQ4_XS => (&[0], 8192.0),
        WeightType::MXFP4 => (&[], 0.0),
        _ => (&[0], 256.0),
    };
    for block in row.chunks_exact_mut(ty.block_bytes()) {
        block.fill_with(|| (rng.next() >> 32) as u8);
        if ty == WeightType::MXFP4 {
            block[0] = 119 + (block[0] & 3);
        }
        for &at in scales {
            block[at..at + 2].copy_from_slice(&half::f16::from_f32(rng.float() / by).to_le_bytes());
        }
    }
}

/// Every type whose weights are integers.
fn quantized_types() -> impl Strategy<Value = WeightType> {
    let types: Vec<_> = WeightType::ALL.into_iter().filter(|ty| ty.is_quantized()).collect();
    prop::sample::select(types)
}

/// Types of gate, up and down: one for all, or any.
fn expert_types() -> impl Strategy<Value = [WeightType; 3]> {
    let ty = || prop::sample::select(&WeightType::ALL[..]);
    prop_oneof![ty().prop_map(|ty| [ty; 3]), prop::array::uniform3(ty())]
}

fn product(w: &[f32], x: &[f32], k: usize) -> Vec<f64> {
    let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum::<f64>();
    x.chunks_exact(k).flat_map(|x| w.chunks_exact(k).map(move |w| dot(w, x))).collect()
}

/// Root of the sum of the squares of each product's terms: what a sum of terms of random signs comes to, and what its error
/// grows with. The sum itself may cancel to nearly nothing and its error does not.
fn spread(w: &[f32], x: &[f32], k: usize) -> Vec<f64> {
    let squares = |v: &[f32]| v.iter().map(|v| v * v).collect::<Vec<_>>();
    product(&squares(w), &squares(x), k).into_iter().map(f64::sqrt).collect()
}

fn quantized(kernels: Kernels, x: &[f32], k: usize) -> Q8Acts {
    let mut acts = Q8Acts::new(k, 1);
    kernels.quantize_acts(x, &mut acts);
    acts
}

/// The error of a block, exact but for the rounding of f64.
fn squared_error(x: &[f32], block: &[u8]) -> f64 {
    let mut back = [0.0; 32];
    dequantize_row(WeightType::Q4_0, block, &mut back);
    x.iter().zip(back).map(|(a, b)| (f64::from(*a) - f64::from(b)).powi(2)).sum()
}

/// The search as one would write it for one block, which holds the reference's bytes.
fn search_plainly(x: &[f32], block: &mut [u8]) {
    let max = x.iter().fold(0f32, |max, v| if v.abs() > max.abs() { *v } else { max });
    let levels =
        |inverse: f32| -> Vec<f32> { x.iter().map(|v| (v * inverse).clamp(-8.0, 7.0).round_ties_even()).collect() };
    let mut best = (0.0, 0.0, 0.0);
    let steps = |first: f32| (0..9).map(move |i| first + 0.25 * i as f32);
    for at in steps(7.0).map(|at| -at).chain(steps(6.5)) {
        try_scale(x, &levels(at / max), at / max, &mut best);
    }
    let (_, inverse, scale) = best;
    let scale = half::f16::from_f32(scale);
    let error = |q: &dyn Fn(usize) -> f32, scale: half::f16| {
        x.iter().enumerate().fold(0f32, |sum, (i, v)| sum + (v - q(i) * scale.to_f32()).powi(2))
    };
    let nibble = |block: &[u8], i: usize| block[2 + i % 16] >> (i / 16 * 4) & 15;
    let before = error(&|i| f32::from(nibble(block, i)) - 8.0, half::f16::from_le_bytes([block[0], block[1]]));
    let q = levels(inverse);
    if error(&|i| q[i], scale) < before * (1.0 - 1e-5) {
        block[..2].copy_from_slice(&scale.to_le_bytes());
        for j in 0..16 {
            block[2 + j] = (q[j] + 8.0) as u8 | ((q[j + 16] + 8.0) as u8) << 4;
        }
    }
}

/// Keeps gain, factor and scale of the better of two.
fn try_scale(x: &[f32], q: &[f32], inverse: f32, best: &mut (f32, f32, f32)) {
    let (mut xq, mut qq) = (0f32, 0f32);
    for (x, q) in x.iter().zip(q) {
        xq += x * q;
        qq += q * q;
    }
    let scale = xq / qq;
    if xq * scale > best.0 {
        *best = (xq * scale, inverse, scale);
    }
}

#[test]
fn searching_scales_gains_a_tenth_on_real_weights() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/golden/quant_vectors.safetensors");
    let file = std::fs::read(path).unwrap();
    let tensors = safetensors::SafeTensors::deserialize(&file).unwrap();
    let bytes = tensors.tensor("tiny_q.input").unwrap().data();
    let x: Vec<f32> = bytes.as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).collect();
    let errors = Kernels::detect().quantize_row_q4_0_search(&x, &mut vec![0; x.len() / 32 * 18]);
    assert!(errors.chosen < 0.9 * errors.reference, "{errors:?}");
}

proptest! {
    #![proptest_config(cases(32))]

    #[test]
    fn quantizers_agree(blocks in 1usize..20, scale in -30i32..30, seed in 1u64..) {
        let mut rng = Rng(seed);
        let mut x = rng.floats(blocks * 32);
        x.iter_mut().for_each(|v| *v *= 2f32.powi(scale));
        // Ties of magnitude, and halves to round.
        x[3] = -x[1];
        for (i, v) in x[..32.min(blocks)].iter_mut().enumerate() {
            *v = i as f32 * 0.5 - 8.0;
        }
        let mut want = vec![0; blocks * 18];
        quantize_row_q4_0(&x, &mut want);
        for kernels in isas() {
            let mut got = vec![0; blocks * 18];
            kernels.quantize_row_q4_0(&x, &mut got);
            prop_assert!(got == want, "{kernels:?}");
        }
    }

    #[test]
    fn searched_scales_agree_and_are_never_worse(
        blocks in 1usize..40, scale in -45i32..18, zeros in 0usize..40, seed in 1u64..,
    ) {
        let mut rng = Rng(seed);
        let mut x = rng.floats(blocks * 32);
        x.iter_mut().for_each(|v| *v *= 2f32.powi(scale));
        x[32 * blocks - zeros.min(32 * blocks)..].fill(0.0);
        let mut plain = vec![0; blocks * 18];
        quantize_row_q4_0(&x, &mut plain);
        let mut want = plain.clone();
        for (x, block) in x.chunks_exact(32).zip(want.chunks_exact_mut(18)) {
            search_plainly(x, block);
        }
        let mut errors = None;
        for kernels in isas() {
            let mut got = vec![0; blocks * 18];
            let new = kernels.quantize_row_q4_0_search(&x, &mut got);
            prop_assert!(got == want, "{kernels:?}");
            prop_assert_eq!(*errors.get_or_insert(new), new, "{:?}", kernels);
        }
        let (mut before, mut after) = (0.0, 0.0);
        let blocks = plain.chunks_exact(18).zip(want.chunks_exact(18));
        for (x, (plain, chosen)) in x.chunks_exact(32).zip(blocks) {
            let (plain, chosen) = (squared_error(x, plain), squared_error(x, chosen));
            prop_assert!(chosen <= plain, "{chosen} after {plain}");
            (before, after) = (before + plain, after + chosen);
        }
        let errors = errors.unwrap();
        prop_assert!((errors.reference - before).abs() <= 1e-5 * before, "{errors:?}, {before} before");
        prop_assert!((errors.chosen - after).abs() <= 1e-5 * after, "{errors:?}, {after} after");
    }

    #[test]
    fn linear_r16_agrees(
        rows in 1usize..50, kb in 1usize..10, tokens in 1usize..31,
        ty in quantized_types(), seed in 1u64..,
    ) {
        let mut rng = Rng(seed);
        let k = (kb * 32).next_multiple_of(ty.block_len());
        let (bytes, floats) = weights(&mut rng, ty, rows, k);
        let x = rng.floats(tokens * k);
        let mut want = None;
        let pool = Pool::new(2).unwrap();
        for kernels in isas() {
            let mut tiles = vec![0; r16::packed_bytes(ty, rows, k).unwrap()];
            kernels.pack_r16(ty, rows, k, &bytes, &mut tiles);
            let w = R16::new(ty, rows, k, &tiles);
            let mut back = vec![0; bytes.len()];
            r16::unpack(ty, rows, k, &tiles, &mut back);
            prop_assert!(back == bytes, "{kernels:?}: R16");
            let mut row = vec![0.0; k];
            w.row_to_f32(rows - 1, &mut row);
            prop_assert_eq!(&row[..], &floats[(rows - 1) * k..]);

            let mut acts = Q8Acts::new(k, 1);
            kernels.quantize_acts_pool(&pool, &x, &mut acts);
            let mut out = vec![0.0; tokens * rows];
            kernels.linear_r16_pool(&pool, w, &acts, &mut out, || ());
            assert_close(&out, &product(&floats, &x, k), &spread(&floats, &x, k), INT8_BOUND, "linear_r16");
            let want = want.get_or_insert_with(|| bits(&out));
            prop_assert!(bits(&out) == *want, "{kernels:?}: {tokens} tokens");
            // One token at a time.
            for t in 0..tokens {
                let one = quantized(kernels, &x[t * k..(t + 1) * k], k);
                let mut out = vec![0.0; rows];
                kernels.linear_r16_pool(&pool, w, &one, &mut out, || ());
                prop_assert!(bits(&out) == want[t * rows..(t + 1) * rows], "{kernels:?}: token {t}");
            }
        }
    }

    #[test]
    fn floats_agree(
        rows in 1usize..12, k in 1usize..80, tokens in 1usize..4,
        ty in prop::sample::select(&[WeightType::F32, WeightType::F16, WeightType::BF16][..]), seed in 1u64..,
    ) {
        let mut rng = Rng(seed);
        let (bytes, floats) = weights(&mut rng, ty, rows, k);
        let x = rng.floats(tokens * k);
        let weight = rng.floats(k);
        let (mut want, mut want_norm) = (None, None);
        for kernels in isas() {
            let mut out = vec![0.0; tokens * rows];
            kernels.linear_float(ty, k, &bytes, &x, &mut ColumnsMut::new(&mut out, rows));
            assert_close(&out, &product(&floats, &x, k), &spread(&floats, &x, k), F32_BOUND, "linear_float");
            prop_assert_eq!(&bits(&out), want.get_or_insert_with(|| bits(&out)), "{:?}", kernels);

            let mut norm = vec![0.0; k];
            kernels.rms_norm(&x[..k], &weight, 1e-6, &mut norm);
            let mean = x[..k].iter().map(|v| f64::from(*v).powi(2)).sum::<f64>() / k as f64;
            let exact: Vec<_> =
                x.iter().zip(&weight).map(|(x, w)| f64::from(*x) / (mean + 1e-6).sqrt() * f64::from(*w)).collect();
            assert_close(&norm, &exact, &exact, F32_BOUND, "rms_norm");
            prop_assert_eq!(&bits(&norm), want_norm.get_or_insert_with(|| bits(&norm)), "{:?}", kernels);
        }
    }

    #[test]
    fn experts_agree(
        eb in 1usize..9, fb in 1usize..4, tokens in 1usize..15, dead in 0f32..1.2,
        types in expert_types(), seed in 1u64..,
    ) {
        let mut rng = Rng(seed);
        let len = types.iter().map(|ty| ty.block_len()).max().unwrap();
        let (n_embd, n_ff) = ((eb * 32).next_multiple_of(len), (fb * 32).next_multiple_of(len));
        let [gate_ty, up_ty, down_ty] = types;
        let format = ExpertFormat::with_types(types, n_embd, n_ff).unwrap();
        let (mut gate_bytes, _) = weights(&mut rng, gate_ty, n_ff, n_embd);
        // Rows of gate that are zero make neurons that are dead for every token.
        let row_bytes = gate_ty.row_bytes(n_embd).unwrap();
        for row in gate_bytes.chunks_exact_mut(row_bytes) {
            if rng.float().abs() < dead {
                match gate_ty {
                    WeightType::Q4_0 => row.fill(0x88),
                    // The scale is almost 0, the value is 0.
                    _ => row.fill(0),
                }
                if gate_ty == WeightType::Q4_0 {
                    row.chunks_exact_mut(18).for_each(|b| b[..2].fill(0));
                }
            }
        }
        let mut gate = vec![0.0; n_ff * n_embd];
        for (b, f) in gate_bytes.chunks_exact(row_bytes).zip(gate.chunks_exact_mut(n_embd)) {
            dequantize_row(gate_ty, b, f);
        }
        let (up_bytes, up) = weights(&mut rng, up_ty, n_ff, n_embd);
        let (down_bytes, down) = weights(&mut rng, down_ty, n_embd, n_ff);
        let x = rng.floats(tokens * n_embd);

        let g = product(&gate, &x, n_embd);
        let u = product(&up, &x, n_embd);
        let h: Vec<f32> = g.iter().zip(&u).map(|(g, u)| (g.max(0.0) * u) as f32).collect();
        let exact = product(&down, &h, n_ff);
        // The hidden values are products of two sums: their errors grow with the spread of either times the other.
        let spreads = spread(&gate, &x, n_embd).into_iter().zip(spread(&up, &x, n_embd));
        let h_sizes: Vec<f32> = (spreads.zip(g.iter().zip(&u)))
            .map(|((gs, us), (g, u))| if *g > 0.0 { ((gs * u).hypot(g * us) / 2f64.sqrt()) as f32 } else { 0.0 })
            .collect();
        let sizes = spread(&down, &h_sizes, n_ff);

        let mut want = None;
        for kernels in isas() {
            let mut record = vec![0; format.record_bytes()];
            for (matrix, bytes) in Matrix::ALL.into_iter().zip([&gate_bytes, &up_bytes, &down_bytes]) {
                kernels.pack_expert(&format, matrix, bytes, &mut record[format.region(matrix)]);
            }
            let mut plain = vec![0; format.record_bytes()];
            format.pack_record(&gate_bytes, &up_bytes, &down_bytes, &mut plain);
            prop_assert!(record == plain, "{kernels:?}: record");
            let region = |m| &record[format.region(m)];

            let groups = HiddenGroup::groups(n_ff);
            let pool = Pool::new(2).unwrap();
            let mut out = vec![0.0; tokens * n_embd];
            for t in 0..tokens {
                let x = &x[t * n_embd..(t + 1) * n_embd];
                let acts = quantized(kernels, x, n_embd);
                let input = ExpertInput { floats: if format.takes_floats() { x } else { &[] }, acts: &acts };
                let mut gates = vec![0.0; n_ff];
                pool.run_ranges(&mut gates, n_ff, RowSplit::Every(1), 32, || (), &|_, mut gates| {
                    kernels.expert_gate_rows(&format, region(Matrix::Gate), input, &[0], &mut gates);
                });
                let mut hidden = vec![HiddenGroup::ZERO; groups];
                pool.run_ranges(&mut hidden, groups, RowSplit::Every(1), 1, || (), &|_, mut hidden| {
                    kernels.expert_hidden_rows(&format, region(Matrix::Up), &gates, input, &[0], &mut hidden);
                });
                let active: Vec<bool> = (0..n_ff).map(|n| hidden[n / 32].active >> (n % 32) & 1 != 0).collect();
                prop_assert!(active.iter().zip(&gates).all(|(active, gate)| *active == (*gate > 0.0)));
                let out = &mut out[t * n_embd..(t + 1) * n_embd];
                pool.run_ranges(out, n_embd, RowSplit::Every(1), OUTPUT_CHUNK, || (), &|_, mut out| {
                    kernels.expert_down_rows(&format, region(Matrix::Down), &hidden, &mut out);
                });
            }
            let bound = if types.iter().any(|ty| ty.is_quantized()) { 2.0 * INT8_BOUND } else { 2.0 * F32_BOUND };
            assert_close(&out, &exact, &sizes, bound, "expert");
            let want = want.get_or_insert_with(|| bits(&out));
            prop_assert!(bits(&out) == *want, "{kernels:?}: one token");

            // A few tokens together, in another order, beside rows that belong to another expert.
            let rows: Vec<u32> = (0..tokens.min(FEW_ROWS) as u32).rev().collect();
            let n = rows.len();
            let acts = if format.takes_acts() { quantized(kernels, &x, n_embd) } else { Q8Acts::new(32, 0) };
            let input = ExpertInput { floats: if format.takes_floats() { &x } else { &[] }, acts: &acts };
            let own = 1..1 + n;
            let own = std::slice::from_ref(&own);
            let mut gates = vec![0.0; (n + 2) * n_ff];
            pool.run_ranges(&mut gates, n_ff, RowSplit::Ranges(own), 32, || (), &|_, mut gates| {
                kernels.expert_gate_rows(&format, region(Matrix::Gate), input, &rows, &mut gates);
            });
            let gates = &gates[n_ff..][..n * n_ff];
            let mut hidden = vec![HiddenGroup::ZERO; (n + 2) * groups];
            pool.run_ranges(&mut hidden, groups, RowSplit::Ranges(own), 1, || (), &|_, mut hidden| {
                kernels.expert_hidden_rows(&format, region(Matrix::Up), gates, input, &rows, &mut hidden);
            });
            let hidden = &hidden[groups..][..n * groups];
            let mut out = vec![0.0; (n + 2) * n_embd];
            pool.run_ranges(&mut out, n_embd, RowSplit::Ranges(own), OUTPUT_CHUNK, || (), &|_, mut out| {
                kernels.expert_down_rows(&format, region(Matrix::Down), hidden, &mut out);
            });
            for (i, &row) in rows.iter().enumerate() {
                let (got, row) = (&out[(1 + i) * n_embd..][..n_embd], row as usize);
                prop_assert!(bits(got) == want[row * n_embd..][..n_embd], "{kernels:?}: token {row} of {n} together");
            }

            // The tokens follow another expert's.
            let (first, rows) = (UNIT_ROWS, UNIT_ROWS + tokens);
            let x = [rng.floats(first * n_embd), x.clone()].concat();
            let acts = if format.takes_acts() { quantized(kernels, &x, n_embd) } else { Q8Acts::new(32, 0) };
            let input = ExpertInput { floats: if format.takes_floats() { &x } else { &[] }, acts: &acts };
            let mut h = vec![0.0; rows * n_ff];
            let rows = first..rows;
            pool.run_tiles(&mut h, n_ff, RowSplit::Ranges(std::slice::from_ref(&rows)), 32, &|_, mut h| {
                kernels.expert_gate_up_batch(&format, region(Matrix::Gate), region(Matrix::Up), input, first, &mut h);
            });
            let hidden = if down_ty.is_quantized() { quantized(kernels, &h, n_ff) } else { Q8Acts::new(32, 0) };
            let hidden = ExpertInput { floats: &h, acts: &hidden };
            let mut out = vec![0.0; tokens * n_embd];
            pool.run_tiles(&mut out, n_embd, RowSplit::All, OUTPUT_CHUNK, &|_, mut out| {
                kernels.expert_down_batch(&format, region(Matrix::Down), hidden, first, &mut out);
            });
            prop_assert!(bits(&out) == *want, "{kernels:?}: {tokens} tokens");
        }
    }

    #[test]
    fn attention_agrees(
        d in prop::sample::select(&[16usize, 32, 64, 96, 128][..]), group in 1usize..8,
        first in 0usize..600, tokens in 1usize..20, window in prop::option::of(1usize..400),
        ty in prop::sample::select(&[KvType::Bf16, KvType::F16, KvType::Q8_0, KvType::F32][..]), seed in 1u64..,
    ) {
        let mut rng = Rng(seed);
        let heads = 2;
        let len = first + tokens;
        // Pages that no token sees any more are gone.
        let seen = visible_range(first, window).start / KV_CHUNK..len.div_ceil(KV_CHUNK);
        let memory = KvPool::new(KvFormat::new(ty, heads, d), seen.len());
        let mut pages: Vec<_> = seen.clone().map(|_| memory.page().unwrap()).collect();
        let keys = rng.floats(len * heads * d);
        let values = rng.floats(len * heads * d);
        for pos in seen.start * KV_CHUNK..len {
            let at = pos * heads * d..(pos + 1) * heads * d;
            let page = std::sync::Arc::get_mut(&mut pages[pos / KV_CHUNK - seen.start]).unwrap();
            page.write(pos % KV_CHUNK, &keys[at.clone()], &values[at]);
        }
        let kv = KvPages::new(memory.format(), seen.start, &pages);
        let ld = heads * group * d;
        let mut q = rng.floats(tokens * ld);
        q.iter_mut().for_each(|v| *v *= 4.0);
        let scale = 1.0 / (d as f32).sqrt();

        let mut exact = vec![0f64; tokens * ld];
        for t in 0..tokens {
            let visible = visible_range(first + t, window);
            for h in 0..heads * group {
                let q = &q[t * ld + h * d..][..d];
                let row = |m: &'_ [f32], pos: usize| m[(pos * heads + h / group) * d..][..d].to_vec();
                let s: Vec<f64> = visible
                    .clone()
                    .map(|pos| row(&keys, pos).iter().zip(q).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum::<f64>())
                    .map(|s| s * f64::from(scale))
                    .collect();
                let max = s.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                let sum: f64 = s.iter().map(|s| (s - max).exp()).sum();
                for (s, pos) in s.iter().zip(visible.clone()) {
                    for (o, v) in exact[t * ld + h * d..][..d].iter_mut().zip(row(&values, pos)) {
                        *o += (s - max).exp() / sum * f64::from(v);
                    }
                }
            }
        }
        let bound = match ty {
            KvType::F32 => 2e-5,
            KvType::F16 => 5e-3,
            KvType::Bf16 => 4e-2,
            KvType::Q8_0 => 5e-2,
        };

        let mut want = None;
        for kernels in isas() {
            let mut out = vec![0.0; tokens * ld];
            Pool::new(2).unwrap().run_tiles(&mut out, ld, RowSplit::Every(4), group * d, &|_, mut out| {
                let head = out.columns().start / (group * d);
                kernels.attend_batch(kv, head, &q, ld, first, window, scale, &mut out);
            });
            assert_close(&out, &exact, &exact, bound, "attention");
            let want = want.get_or_insert_with(|| bits(&out));
            prop_assert!(bits(&out) == *want, "{kernels:?}: many tokens");
            for t in [0, tokens - 1] {
                let visible = visible_range(first + t, window);
                for head in 0..heads {
                    let at = t * ld + head * group * d;
                    let mut partials = Vec::new();
                    for chunk in kv_chunks(&visible) {
                        let mut part = vec![0.0; partial_len(group, d)];
                        let q = &q[at..at + group * d];
                        kernels.attend_chunk(kv, head, q, visible.clone(), chunk, scale, &mut part);
                        partials.extend(part);
                    }
                    let mut out = vec![0.0; group * d];
                    kernels.attend_merge(&partials, d, &mut out);
                    prop_assert!(bits(&out) == want[at..at + group * d], "{kernels:?}: token {t}");
                }
            }
        }
    }
}

#[test]
fn rope_rotates_halves() {
    let mut x = vec![1.0, 2.0, 3.0, 4.0];
    Kernels::detect().rope(&mut x, &[0.0, 1.0], &[1.0, 0.0]);
    assert_eq!(x, [-3.0, 2.0, 1.0, 4.0]);
}
