//! Kernels against the machine: what they read or compute per second, beside what a plain read loop reaches.
//!
//! `cargo bench -p st-kernels [-- FILTER]`, with every instruction set that this CPU has (FILTER `/avx2/`: with that one). Weights
//! rotate through more memory than the caches hold, as they do when a model decodes. Threads: 2, or as many as there are.
#![allow(clippy::print_stdout, missing_docs)]

use std::cell::Cell;
use std::hint::black_box;
use std::time::{Duration, Instant};

use criterion::{Criterion, Throughput};
use std::sync::Arc;

use st_kernels::*;

/// Bytes that the weights of a "cold" benchmark rotate through.
const COLD_BYTES: usize = 512 << 20;

struct Bench {
    criterion: Criterion,
    pool: Pool,
    kernels: Kernels,
    read_bandwidth: f64,
}

#[derive(Clone, Copy)]
enum Work {
    Bytes(usize),
    Flops(usize),
}

impl Bench {
    fn run(&mut self, name: &str, work: Work, mut f: impl FnMut(Kernels, &Pool)) {
        let name = format!("{name}/{}/{}t", self.kernels.isa().name(), self.pool.n_threads());
        let best = Cell::new(f64::INFINITY);
        let (kernels, pool) = (self.kernels, &self.pool);
        let mut group = self.criterion.benchmark_group("kernels");
        group.throughput(match work {
            Work::Bytes(n) => Throughput::Bytes(n as u64),
            Work::Flops(n) => Throughput::Elements(n as u64),
        });
        let mut samples = Vec::new();
        group.bench_function(&name, |b| {
            b.iter_custom(|iters| {
                let start = Instant::now();
                for _ in 0..iters {
                    f(kernels, pool);
                }
                let elapsed = start.elapsed();
                samples.push(elapsed.as_secs_f64() / iters as f64);
                best.set(best.get().min(elapsed.as_secs_f64() / iters as f64));
                elapsed
            });
        });
        group.finish();
        if samples.is_empty() {
            return;
        }
        samples.sort_by(f64::total_cmp);
        let median = samples[samples.len() / 2];
        match work {
            Work::Bytes(n) => println!(
                "  {name}: {:.1} us, {:.2} GB/s (best {:.2}), {:.0} % of the read bandwidth\n",
                median * 1e6,
                n as f64 / median / 1e9,
                n as f64 / best.get() / 1e9,
                n as f64 / median / self.read_bandwidth * 100.0
            ),
            Work::Flops(n) => println!(
                "  {name}: {:.1} us, {:.1} GFLOP/s (best {:.1})\n",
                median * 1e6,
                n as f64 / median / 1e9,
                n as f64 / best.get() / 1e9
            ),
        }
    }
}

fn random_bytes(n: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15u64;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    };
    (0..n.div_ceil(8)).flat_map(|_| next().to_le_bytes()).take(n).collect()
}

fn random_floats(n: usize) -> Vec<f32> {
    random_bytes(n * 2).chunks_exact(2).map(|b| f32::from(i16::from_le_bytes([b[0], b[1]])) / 32768.0).collect()
}

/// Random Q4_0 blocks with sane scales.
fn random_q4(n: usize) -> Vec<u8> {
    let mut bytes = random_bytes(n / 32 * 18);
    for block in bytes.chunks_exact_mut(18) {
        block[1] = 0x20;
    }
    bytes
}

/// Copies of something, taken in turn.
struct Cold {
    all: AlignedBuf<u8>,
    len: usize,
    at: usize,
}

impl Cold {
    fn new(one: &[u8]) -> Self {
        let len = one.len();
        let mut all = AlignedBuf::zeroed((COLD_BYTES / len).max(2) * len);
        all.chunks_exact_mut(len).for_each(|c| c.copy_from_slice(one));
        Self { all, len, at: 0 }
    }

    fn next(&mut self) -> &[u8] {
        self.next_mut()
    }

    fn next_mut(&mut self) -> &mut [u8] {
        self.at = (self.at + self.len) % self.all.len();
        &mut self.all[self.at..self.at + self.len]
    }
}

fn read_bandwidth(pool: &Pool) -> f64 {
    let memory: Vec<u64> = vec![1; COLD_BYTES / 8];
    let piece = memory.len() / pool.n_threads();
    let mut times: Vec<f64> = (0..7)
        .map(|_| {
            let start = Instant::now();
            pool.run(&|t| {
                let mut sums = [0u64; 32];
                for c in memory[t * piece..(t + 1) * piece].chunks_exact(32) {
                    for (s, v) in sums.iter_mut().zip(c) {
                        *s ^= v;
                    }
                }
                black_box(sums);
            });
            start.elapsed().as_secs_f64()
        })
        .collect();
    times.sort_by(f64::total_cmp);
    COLD_BYTES as f64 / times[times.len() / 2]
}

fn linear(b: &mut Bench) {
    for (rows, k) in [(768, 1536), (1536, 1536), (151_936, 1536)] {
        let one = random_q4(rows * k);
        let mut tiles = vec![0; one.len()];
        b.kernels.pack_r16(WeightType::Q4_0, rows, k, &one, &mut tiles);
        let mut cold = Cold::new(&tiles);
        for m in [1, 2, 4, 8] {
            let mut acts = Q8Acts::new(k, m);
            b.kernels.quantize_acts(&random_floats(m * k), &mut acts);
            let mut out = vec![0.0; m * rows];
            b.run(&format!("gemv_r16_q4_{rows}x{k}_m{m}"), Work::Bytes(one.len()), |kernels, pool| {
                let w = R16::new(WeightType::Q4_0, rows, k, cold.next());
                kernels.linear_r16_pool(pool, w, &acts, &mut out, || ());
            });
        }
    }
    let (rows, k) = (1536, 1536);
    let one = random_q4(rows * k);
    let mut tiles = vec![0; one.len()];
    b.kernels.pack_r16(WeightType::Q4_0, rows, k, &one, &mut tiles);
    for m in [12, 64, 512] {
        let mut acts = Q8Acts::new(k, m);
        b.kernels.quantize_acts(&random_floats(m * k), &mut acts);
        let mut out = vec![0.0; m * rows];
        b.run(&format!("gemm_r16_q4_{rows}x{k}_m{m}"), Work::Flops(2 * m * rows * k), |kernels, pool| {
            let w = R16::new(WeightType::Q4_0, rows, k, &tiles);
            kernels.linear_r16_pool(pool, w, &acts, &mut out, || ());
        });
    }
    let x = random_floats(512 * k);
    let mut acts = Q8Acts::new(k, 512);
    b.run("quantize_acts_m512", Work::Bytes(512 * k * 4), |kernels, pool| {
        kernels.quantize_acts_pool(pool, &x, &mut acts);
    });
    let mut one = Q8Acts::new(k, 1);
    b.run("quantize_acts_m1", Work::Bytes(k * 4), |kernels, _| kernels.quantize_acts(&x[..k], &mut one));
    let mut blocks = vec![0; x.len() / 32 * 18];
    b.run("quantize_row_q4_0_1thread", Work::Bytes(x.len() * 4), |kernels, _| {
        kernels.quantize_row_q4_0(&x, &mut blocks);
    });
    b.run("quantize_row_q4_0_search_1thread", Work::Bytes(x.len() * 4), |kernels, _| {
        kernels.quantize_row_q4_0_search(&x, &mut blocks);
    });
    let router: Vec<u8> = x[..32 * k].iter().flat_map(|v| v.to_le_bytes()).collect();
    let mut router = Cold::new(&router);
    let mut out = vec![0.0; 32];
    b.run("linear_f32_32x1536_1thread", Work::Bytes(32 * k * 4), |kernels, _| {
        kernels.linear_float(WeightType::F32, k, router.next(), &x[..k], &mut ColumnsMut::new(&mut out, 32));
    });
}

fn experts(b: &mut Bench) {
    let (n_embd, n_ff) = (1536, 768);
    let format = ExpertFormat::new(WeightType::Q4_0, n_embd, n_ff).expect("a shape of the 4B");
    let x = random_floats(n_embd);
    let mut acts = Q8Acts::new(n_embd, 1);
    b.kernels.quantize_acts(&x, &mut acts);
    let groups = n_ff / 32;
    for zeros in [0, 65, 90] {
        // Gate rows with scale 0 are dead neurons.
        let mut gate = random_q4(n_ff * n_embd);
        let pick = random_bytes(n_ff);
        for (row, pick) in gate.chunks_exact_mut(n_embd / 32 * 18).zip(&pick) {
            let dead = usize::from(*pick) * 100 < zeros * 256;
            for block in row.chunks_exact_mut(18) {
                // All live: make the product positive by taking the sign of the activations.
                block[..2].copy_from_slice(&if dead { [0, 0] } else { [0, 0x20] });
            }
            if !dead {
                for (i, block) in row.chunks_exact_mut(18).enumerate() {
                    for j in 0..16 {
                        let s = |c: usize| if x[i * 32 + c] > 0.0 { 15u8 } else { 1 };
                        block[2 + j] = s(j) | s(j + 16) << 4;
                    }
                }
            }
        }
        let (up, down) = (random_q4(n_ff * n_embd), random_q4(n_ff * n_embd));
        let mut record = vec![0; format.record_bytes()];
        format.pack_record(&gate, &up, &down, &mut record);
        let mut cold = Cold::new(&record);
        let (mut gates, mut hidden) = (vec![0.0; n_ff], vec![HiddenGroup::ZERO; groups]);
        let input = ExpertInput { floats: &[], acts: &acts };
        let (mut all_gates, mut all_hidden) = (ColumnsMut::new(&mut gates, n_ff), ColumnsMut::new(&mut hidden, groups));
        b.kernels.expert_gate_rows(&format, &record[format.region(Matrix::Gate)], input, &[0], &mut all_gates);
        let gates = &gates[..];
        b.kernels.expert_hidden_rows(&format, &record[format.region(Matrix::Up)], gates, input, &[0], &mut all_hidden);
        let live: usize = hidden.iter().map(|h| h.live.count_ones() as usize).sum();
        let active: usize = hidden.iter().map(|h| h.active.count_ones() as usize).sum();
        println!("{zeros} % zeros: {active} neurons active, {live} live of {n_ff}");
        let up_bytes = active * (n_embd / 32) * 18;
        let down_bytes = live * n_embd / 2 + groups * n_embd * 2;
        b.run(&format!("expert_hidden_{zeros}zeros"), Work::Bytes(up_bytes), |kernels, pool| {
            let up = &cold.next()[format.region(Matrix::Up)];
            pool.run_ranges(&mut hidden, groups, RowSplit::Every(1), 3, || (), &|_, mut out| {
                kernels.expert_hidden_rows(&format, up, gates, input, &[0], &mut out);
            });
        });
        let mut out = vec![0.0; n_embd];
        b.run(&format!("expert_down_{zeros}zeros"), Work::Bytes(down_bytes), |kernels, pool| {
            let record = cold.next();
            pool.run_ranges(&mut out, n_embd, RowSplit::Every(1), 3 * OUTPUT_CHUNK, || (), &|_, mut out| {
                kernels.expert_down_rows(&format, &record[format.region(Matrix::Down)], &hidden, &mut out);
            });
        });
    }
    let canonical = random_q4(n_ff * n_embd);
    let mut record = vec![0; format.record_bytes()];
    for matrix in Matrix::ALL {
        format.pack(matrix, &canonical, &mut record[format.region(matrix)]);
    }
    for m in [16, 64, 128] {
        let x = random_floats(m * n_embd);
        let mut acts = Q8Acts::new(n_embd, m);
        b.kernels.quantize_acts(&x, &mut acts);
        let mut h = vec![0.0; m * n_ff];
        let mut hidden = Q8Acts::new(n_ff, m);
        let mut out = vec![0.0; m * n_embd];
        b.run(&format!("expert_gemm_m{m}"), Work::Flops(6 * m * n_embd * n_ff), |kernels, pool| {
            let (gate, up) = (&record[format.region(Matrix::Gate)], &record[format.region(Matrix::Up)]);
            let input = ExpertInput { floats: &[], acts: &acts };
            pool.run_tiles(&mut h, n_ff, RowSplit::All, 64, &|_, mut h| {
                kernels.expert_gate_up_batch(&format, gate, up, input, 0, &mut h);
            });
            kernels.quantize_acts_pool(pool, &h, &mut hidden);
            let input = ExpertInput { floats: &[], acts: &hidden };
            pool.run_tiles(&mut out, n_embd, RowSplit::All, OUTPUT_CHUNK, &|_, mut out| {
                kernels.expert_down_batch(&format, &record[format.region(Matrix::Down)], input, 0, &mut out);
            });
        });
    }
}

/// What a cache slot costs that is filled from a file's own bytes, by type and matrix.
fn packing(b: &mut Bench) {
    let (n_embd, n_ff) = (1536, 768);
    for ty in WeightType::ALL.into_iter().filter(|ty| ty.is_quantized()) {
        let format = ExpertFormat::new(ty, n_embd, n_ff).expect("a shape of the 4B");
        let mut record = Cold::new(&vec![0; format.record_bytes()]);
        for matrix in Matrix::ALL {
            let canonical = random_bytes(format.canonical_bytes(matrix));
            let region = format.region(matrix);
            b.run(&format!("pack_{ty}_{matrix:?}"), Work::Bytes(canonical.len()), |kernels, _| {
                kernels.pack_expert(&format, matrix, &canonical, &mut record.next_mut()[region.clone()]);
            });
        }
    }
}

/// Pages of `n` positions, filled with the keys and values that `row` gives.
fn kv_pages<'x>(format: KvFormat, n: usize, row: impl Fn(usize) -> (&'x [f32], &'x [f32])) -> Vec<Arc<KvPage>> {
    let pool = KvPool::new(format, usize::MAX);
    let mut pages: Vec<_> = (0..n.div_ceil(KV_CHUNK)).map(|_| pool.page().expect("memory")).collect();
    for pos in 0..n {
        let (keys, values) = row(pos);
        Arc::get_mut(&mut pages[pos / KV_CHUNK]).expect("held once").write(pos % KV_CHUNK, keys, values);
    }
    pages
}

fn attention(b: &mut Bench) {
    let (heads, group, d) = (2, 6, 128);
    let scale = 1.0 / (d as f32).sqrt();
    for ty in [KvType::Bf16, KvType::F16, KvType::Q8_0] {
        for depth in [512, 4096] {
            let format = KvFormat::new(ty, heads, d);
            let copies = COLD_BYTES / 4 / (format.bytes_per_position() * depth);
            let x = random_floats(heads * d * 2);
            let row = |pos: usize| (&x[pos % 200..][..heads * d], &x[pos % 199..][..heads * d]);
            let layers: Vec<_> = (0..copies).map(|_| kv_pages(format, depth, row)).collect();
            let q = random_floats(heads * group * d);
            let chunks = depth / KV_CHUNK;
            let len = partial_len(group, d);
            let mut partials = vec![0.0; heads * chunks * len];
            let mut out = vec![0.0; heads * group * d];
            let bytes = format.bytes_per_position() * depth;
            let mut at = 0;
            b.run(&format!("attend_decode_{ty:?}_{depth}"), Work::Bytes(bytes), |kernels, pool| {
                at = (at + 1) % layers.len();
                let kv = KvPages::new(format, 0, &layers[at]);
                pool.run_chunks(&mut partials, len, &|i, out| {
                    let (head, chunk) = (i / chunks, i % chunks);
                    let q = &q[head * group * d..(head + 1) * group * d];
                    kernels.attend_chunk(kv, head, q, 0..depth, chunk, scale, out);
                });
                for (out, partials) in out.chunks_exact_mut(group * d).zip(partials.chunks_exact(chunks * len)) {
                    kernels.attend_merge(partials, d, out);
                }
            });
        }
    }
    let tokens = 512;
    let q = random_floats(tokens * heads * group * d);
    let mut out = vec![0.0; q.len()];
    for (ty, depth) in [(KvType::Bf16, 0), (KvType::Bf16, 3584), (KvType::F16, 3584)] {
        let format = KvFormat::new(ty, heads, d);
        let pages = kv_pages(format, depth + tokens, |pos| (&q[pos..][..heads * d], &q[pos + 7..][..heads * d]));
        let kv = KvPages::new(format, 0, &pages);
        let pairs: usize = (depth..depth + tokens).map(|p| p + 1).sum();
        let name = format!("attend_batch_512_{ty:?}_at_{depth}");
        b.run(&name, Work::Flops(4 * pairs * heads * group * d), |kernels, pool| {
            pool.run_tiles(&mut out, heads * group * d, RowSplit::Every(16), group * d, &|_, mut out| {
                let head = out.columns().start / (group * d);
                kernels.attend_batch(kv, head, &q, heads * group * d, depth, None, scale, &mut out);
            });
        });
    }
}

fn fork_join(b: &mut Bench) {
    b.run("fork_join", Work::Flops(1), |_, pool| {
        pool.run(&|t| {
            black_box(t);
        });
    });
}

fn main() {
    let threads = std::thread::available_parallelism().map_or(1, |n| n.get()).min(2);
    let criterion = Criterion::default()
        .sample_size(20)
        .warm_up_time(Duration::from_millis(200))
        .measurement_time(Duration::from_millis(800))
        .without_plots()
        .configure_from_args();
    let pool = Pool::new(threads).expect("threads");
    let read_bandwidth = read_bandwidth(&pool);
    println!("plain read loop, {threads} threads: {:.1} GB/s", read_bandwidth / 1e9);
    let mut bench = Bench { criterion, pool, kernels: Kernels::detect(), read_bandwidth };
    fork_join(&mut bench);
    for kernels in Isa::ALL.into_iter().filter_map(Kernels::for_isa).filter(|k| k.isa() != Isa::Scalar) {
        bench.kernels = kernels;
        linear(&mut bench);
        experts(&mut bench);
        packing(&mut bench);
        attention(&mut bench);
    }
    bench.criterion.final_summary();
}
