//! One token and one prompt through a whole engine, on a small synthetic model with the statistics of the published
//! ones, in either layout.
//!
//! Regressions show here within a minute and without a large file; figures that mean something to a user come from
//! `st-tool bench` on a model of real size.

use std::hint::black_box;
use std::path::Path;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use st_bench::synth::gguf::write_gguf;
use st_bench::synth::mix::Mix;
use st_bench::synth::recipe::{Recipe, Statistics};
use st_bench::synth::shape::Shape;
use st_gguf::{GgmlType, GgufFile, Layout, ModelShape};
use st_model::{Engine, LoadOptions, Session};

const PROMPT: usize = 128;

fn write_model(layout: Layout, path: &Path) {
    let model = ModelShape {
        n_layers: 8,
        n_embd: 768,
        n_heads: 6,
        n_experts: 16,
        n_ff: 512,
        n_vocab: 16_000,
        context_length: 2048,
        ..ModelShape::published_4b()
    };
    let mut shape = Shape::of("small", model);
    shape.set_period(0);
    let statistics =
        Statistics { sparsity: 0.65, early_sparsity: 0.92, popular_share: 0.6, repeat_share: 0.5, seed: 1 };
    let recipe = Recipe::new(shape, &statistics).expect("the shape is possible");
    write_gguf(&recipe, &Mix::pure(GgmlType::Q4_0), layout, path, true, &|_| ()).expect("the model can be written");
}

fn end_to_end(criterion: &mut Criterion) {
    let dir = tempfile::tempdir().expect("a folder for the models");
    let prompt: Vec<u32> = (0..PROMPT as u32).map(|i| i * 7919 % 16_000).collect();
    for layout in [Layout::Gguf, Layout::Offload] {
        let path = dir.path().join(layout.name());
        write_model(layout, &path);
        for threads in [1, 2] {
            let options = LoadOptions { threads, ctx: Some(2048), ..LoadOptions::default() };
            let file = GgufFile::open(&path).expect("the model is there");
            let engine = Engine::load(file, &options).expect("the model loads");
            let mut session = Session::new(&engine).expect("there is memory");
            let mut group = criterion.benchmark_group(format!("{}, {threads} threads", layout.name()));

            group.throughput(Throughput::Elements(1));
            session.forward(&prompt).expect("the prompt runs");
            let mut next = 0;
            group.bench_function("decode", |bencher| {
                bencher.iter(|| {
                    if session.len() == session.ctx() {
                        session.reset();
                    }
                    next = (next + 7919) % 16_000;
                    session.forward(&[next]).expect("a token runs");
                    black_box(session.logits());
                });
            });
            group.throughput(Throughput::Elements(PROMPT as u64));
            group.bench_function("prompt", |bencher| {
                bencher.iter(|| {
                    session.reset();
                    session.forward(&prompt).expect("the prompt runs");
                    black_box(session.logits());
                });
            });
            group.finish();
        }
    }
}

criterion_group!(benches, end_to_end);
criterion_main!(benches);
