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

fn isas() -> Vec<Kernels> {
    let all: Vec<_> = Isa::ALL.into_iter().filter_map(Kernels::for_isa).collect();
    assert!(all.iter().any(|k| k.isa() == Kernels::detect().isa()));
    all
}

fn scalar() -> Kernels {
    Kernels::for_isa(Isa::Scalar).unwrap()
}

fn bits(x: &[f32]) -> Vec<u32> {
    x.iter().map(|v| v.to_bits()).collect()
}

fn assert_close(got: &[f32], want: &[f64], bound: f64, what: &str) {
    let norm = (want.iter().map(|v| v * v).sum::<f64>() / want.len() as f64).sqrt();
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

fn product(w: &[f32], x: &[f32], k: usize) -> Vec<f64> {
    let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum::<f64>();
    x.chunks_exact(k).flat_map(|x| w.chunks_exact(k).map(move |w| dot(w, x))).collect()
}

fn quantized(kernels: Kernels, x: &[f32], k: usize) -> Q8Acts {
    let mut acts = Q8Acts::new(k, 1);
    kernels.quantize_acts(x, &mut acts);
    acts
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(16))]

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
    fn linear_r16_agrees(
        rows in 1usize..50, kb in 1usize..10, tokens in 1usize..31,
        ty in prop::sample::select(&[WeightType::Q4_0, WeightType::Q8_0][..]), seed in 1u64..,
    ) {
        let mut rng = Rng(seed);
        let k = kb * 32;
        let (bytes, floats) = weights(&mut rng, ty, rows, k);
        let x = rng.floats(tokens * k);
        let mut want = None;
        let pool = Pool::new(2).unwrap();
        for kernels in isas() {
            let mut w = R16Matrix::zeroed(ty, rows, k).unwrap();
            w.pack_rows(kernels, 0, &bytes);
            let mut back = vec![0; bytes.len()];
            r16::unpack(ty, rows, k, w.view().tiles(), &mut back);
            prop_assert!(back == bytes, "{kernels:?}: R16");
            let mut row = vec![0.0; k];
            w.view().row_to_f32(rows - 1, &mut row);
            prop_assert_eq!(&row[..], &floats[(rows - 1) * k..]);

            let mut acts = Q8Acts::new(k, 1);
            kernels.quantize_acts_pool(&pool, &x, &mut acts);
            let mut out = vec![0.0; tokens * rows];
            kernels.linear_r16_pool(&pool, w.view(), &acts, &mut out);
            assert_close(&out, &product(&floats, &x, k), INT8_BOUND, "linear_r16");
            let want = want.get_or_insert_with(|| bits(&out));
            prop_assert!(bits(&out) == *want, "{kernels:?}: {tokens} tokens");
            // One token at a time, and from columns on.
            for t in 0..tokens {
                let one = quantized(kernels, &x[t * k..(t + 1) * k], k);
                let mut out = vec![0.0; rows];
                kernels.linear_r16(w.view(), &one, 0, &mut ColumnsMut::new(&mut out, rows));
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
            assert_close(&out, &product(&floats, &x, k), F32_BOUND, "linear_float");
            prop_assert_eq!(&bits(&out), want.get_or_insert_with(|| bits(&out)), "{:?}", kernels);
            prop_assert_eq!(kernels.dot_f32(&floats[..k], &x[..k]), scalar().dot_f32(&floats[..k], &x[..k]));

            let mut norm = vec![0.0; k];
            kernels.rms_norm(&x[..k], &weight, 1e-6, &mut norm);
            let mean = x[..k].iter().map(|v| f64::from(*v).powi(2)).sum::<f64>() / k as f64;
            let exact: Vec<_> =
                x.iter().zip(&weight).map(|(x, w)| f64::from(*x) / (mean + 1e-6).sqrt() * f64::from(*w)).collect();
            assert_close(&norm, &exact, F32_BOUND, "rms_norm");
            prop_assert_eq!(&bits(&norm), want_norm.get_or_insert_with(|| bits(&norm)), "{:?}", kernels);
        }
    }

    #[test]
    fn experts_agree(
        eb in 1usize..9, fb in 1usize..4, tokens in 1usize..15, dead in 0f32..1.2,
        ty in prop::sample::select(&WeightType::ALL[..]), seed in 1u64..,
    ) {
        let mut rng = Rng(seed);
        let (n_embd, n_ff) = (eb * 32, fb * 32);
        let format = ExpertFormat::new(ty, n_embd, n_ff).unwrap();
        let (mut gate_bytes, _) = weights(&mut rng, ty, n_ff, n_embd);
        // Rows of gate that are zero make neurons that are dead for every token.
        let row_bytes = ty.row_bytes(n_embd).unwrap();
        for row in gate_bytes.chunks_exact_mut(row_bytes) {
            if rng.float().abs() < dead {
                match ty {
                    WeightType::Q4_0 => row.fill(0x88),
                    _ => row.fill(0),
                }
                if ty == WeightType::Q4_0 {
                    row.chunks_exact_mut(18).for_each(|b| b[..2].fill(0));
                }
            }
        }
        let mut gate = vec![0.0; n_ff * n_embd];
        for (b, f) in gate_bytes.chunks_exact(row_bytes).zip(gate.chunks_exact_mut(n_embd)) {
            dequantize_row(ty, b, f);
        }
        let (up_bytes, up) = weights(&mut rng, ty, n_ff, n_embd);
        let (down_bytes, down) = weights(&mut rng, ty, n_embd, n_ff);
        let x = rng.floats(tokens * n_embd);

        let g = product(&gate, &x, n_embd);
        let u = product(&up, &x, n_embd);
        let h: Vec<f32> = g.iter().zip(&u).map(|(g, u)| (g.max(0.0) * u) as f32).collect();
        let exact = product(&down, &h, n_ff);

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
            let mut out = vec![0.0; tokens * n_embd];
            for t in 0..tokens {
                let x = &x[t * n_embd..(t + 1) * n_embd];
                let acts = quantized(kernels, x, n_embd);
                let input = ExpertInput { floats: x, acts: &acts };
                let mut hidden = vec![HiddenGroup::ZERO; groups];
                let mut active = 0;
                for (i, hidden) in hidden.chunks_mut(2).enumerate() {
                    let range = i * 2..i * 2 + hidden.len();
                    let (gate, up) = (region(Matrix::Gate), region(Matrix::Up));
                    active += kernels.expert_gate_up(&format, gate, up, input, 0, range, hidden);
                }
                prop_assert_eq!(active, hidden.iter().map(|h| h.active.count_ones() as usize).sum::<usize>());
                for (i, out) in out[t * n_embd..(t + 1) * n_embd].chunks_mut(OUTPUT_CHUNK).enumerate() {
                    let range = i * OUTPUT_CHUNK..i * OUTPUT_CHUNK + out.len();
                    kernels.expert_down(&format, region(Matrix::Down), &hidden, range, out);
                }
            }
            let bound = if ty.is_quantized() { 2.0 * INT8_BOUND } else { 2.0 * F32_BOUND };
            assert_close(&out, &exact, bound, "expert");
            let want = want.get_or_insert_with(|| bits(&out));
            prop_assert!(bits(&out) == *want, "{kernels:?}: one token");

            let acts = if ty.is_quantized() { quantized(kernels, &x, n_embd) } else { Q8Acts::new(32, 0) };
            let input = ExpertInput { floats: &x, acts: &acts };
            let mut h = vec![0.0; tokens * n_ff];
            let pool = Pool::new(2).unwrap();
            pool.run_columns(&mut h, n_ff, 32, &|mut h| {
                kernels.expert_gate_up_batch(&format, region(Matrix::Gate), region(Matrix::Up), input, &mut h);
            });
            let hidden = if ty.is_quantized() { quantized(kernels, &h, n_ff) } else { Q8Acts::new(32, 0) };
            let hidden = ExpertInput { floats: &h, acts: &hidden };
            let mut out = vec![0.0; tokens * n_embd];
            pool.run_columns(&mut out, n_embd, OUTPUT_CHUNK, &|mut out| {
                kernels.expert_down_batch(&format, region(Matrix::Down), hidden, &mut out);
            });
            prop_assert!(bits(&out) == *want, "{kernels:?}: {tokens} tokens");
        }
    }

    #[test]
    fn attention_agrees(
        d in prop::sample::select(&[16usize, 32, 64, 96, 128][..]), group in 1usize..8,
        first in 0usize..600, tokens in 1usize..20, window in prop::option::of(1usize..400),
        ty in prop::sample::select(&[KvType::F16, KvType::Q8_0, KvType::F32][..]), seed in 1u64..,
    ) {
        let mut rng = Rng(seed);
        let heads = 2;
        let len = first + tokens;
        let capacity = window.map_or(len, |w| w + tokens);
        let mut kv = KvBuffer::new(ty, heads, d, capacity);
        let keys = rng.floats(len * heads * d);
        let values = rng.floats(len * heads * d);
        for pos in 0..len {
            let at = pos * heads * d..(pos + 1) * heads * d;
            kv.write(pos, &keys[at.clone()], &values[at]);
        }
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
            KvType::Q8_0 => 5e-2,
        };

        let mut want = None;
        for kernels in isas() {
            let mut out = vec![0.0; tokens * ld];
            Pool::new(2).unwrap().run_tiles(&mut out, ld, 4, group * d, &|mut out| {
                let head = out.columns().start / (group * d);
                kernels.attend_batch(&kv, head, &q, first, window, scale, &mut out);
            });
            assert_close(&out, &exact, bound, "attention");
            let want = want.get_or_insert_with(|| bits(&out));
            prop_assert!(bits(&out) == *want, "{kernels:?}: many tokens");
            // Only the last tokens' positions are all still there.
            for t in [0, tokens - 1] {
                let visible = visible_range(first + t, window);
                for head in 0..heads {
                    let at = t * ld + head * group * d;
                    let mut partials = Vec::new();
                    for chunk in kv_chunks(&visible) {
                        let mut part = vec![0.0; partial_len(group, d)];
                        let q = &q[at..at + group * d];
                        kernels.attend_chunk(&kv, head, q, visible.clone(), chunk, scale, &mut part);
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
