//! One arithmetic: the same bits whatever the way of computing.

use std::sync::Arc;

use st_convert::{Layout, WeightType};
use st_model::{Engine, IoMode, Isa, KvType, LoadOptions, ModelError, Session, StoreError};

use crate::common;

fn isas() -> Vec<Isa> {
    Isa::ALL.into_iter().filter(|&isa| st_kernels::Kernels::for_isa(isa).is_some()).collect()
}

/// Logits of every position are equal bit for bit, for both layouts, 1 and 2 threads, and every instruction set.
#[test]
fn layout_threads_and_instruction_set_change_no_bit() {
    for golden in common::goldens() {
        for ty in [WeightType::Q4_0, WeightType::Q8_0] {
            let first = LoadOptions { isa: Some(Isa::Scalar), ..LoadOptions::default() };
            let ids = &golden.ids[..golden.ids.len().min(100)];
            let expected = common::all_logits(&common::engine(golden.gguf(ty, Layout::Gguf), &first), ids);
            assert!(expected.iter().any(|v| *v != expected[0]), "constant logits");
            for layout in [Layout::Gguf, Layout::Offload] {
                for isa in isas() {
                    for threads in [1, 2] {
                        let options = LoadOptions { isa: Some(isa), threads, ..LoadOptions::default() };
                        let got = common::all_logits(&common::engine(golden.gguf(ty, layout), &options), ids);
                        assert!(got == expected, "{} {ty:?} {layout:?} {isa:?} {threads}", golden.name);
                    }
                }
            }
        }
    }
}

/// Greedy tokens are equal however the prompt is cut, with every kind of KV cache.
#[test]
fn pieces_of_a_prompt_change_no_token() {
    for golden in common::goldens() {
        for kv_type in [KvType::Bf16, KvType::F16, KvType::F32, KvType::Q8_0] {
            let options = LoadOptions { threads: 2, kv_type: Some(kv_type), ..LoadOptions::default() };
            let engine = common::engine(golden.gguf(WeightType::Q4_0, Layout::Gguf), &options);
            let expected = common::greedy(&engine, &golden.ids, golden.ids.len(), 32);
            assert!(expected.iter().any(|id| *id != expected[0]), "a constant answer");
            for piece in [1, 7, 64] {
                assert_eq!(
                    common::greedy(&engine, &golden.ids, piece, 32),
                    expected,
                    "{} {kv_type:?} {piece}",
                    golden.name
                );
            }
        }
    }
}

/// A conversation: a prompt longer than the window that touches more experts than the cache holds, some tokens, a second
/// turn, some more tokens.
fn conversation(engine: &Arc<Engine>, first: &[u32], second: &[u32]) -> Vec<u32> {
    let mut session = Session::new(engine).expect("a session");
    let mut tokens = Vec::new();
    for turn in [first, second] {
        session.forward(turn).expect("a forward pass");
        for _ in 0..24 {
            let best = common::argmax(session.logits());
            tokens.push(best);
            session.forward(&[best]).expect("a forward pass");
        }
    }
    tokens
}

/// Streamed equals resident, token for token: both layouts, from the fewest slots to one for every expert, 1 and 2 threads,
/// direct and buffered reads, with prefetch and without.
#[test]
fn streaming_changes_no_token() {
    let goldens = common::goldens();
    let golden = |name: &str| goldens.iter().find(|golden| golden.name == name).expect(name);
    let (long, short) = (golden("long_mixed"), golden("chat_sum"));
    let resident = common::engine(long.gguf(WeightType::Q4_0, Layout::Gguf), &LoadOptions::default());
    let expected = conversation(&resident, &long.ids, &short.ids);
    assert!(expected.iter().any(|id| *id != expected[0]), "a constant answer");
    let c = resident.config();
    let (fewest, all) = (2 * c.n_experts_used, c.n_experts * c.n_layers);
    for layout in [Layout::Gguf, Layout::Offload] {
        for slots in [fewest, fewest + 1, c.n_layers * c.n_experts_used, all - 1, all] {
            for (threads, prefetch) in [(1, true), (2, true), (2, false)] {
                for io in [IoMode::Direct, IoMode::Buffered] {
                    let options = LoadOptions { threads, prefetch, io, slots: Some(slots), ..LoadOptions::default() };
                    let engine = match Engine::load(long.gguf(WeightType::Q4_0, layout), &options) {
                        Ok(engine) => engine,
                        // A file system without direct I/O, as tmpfs.
                        Err(ModelError::Experts(StoreError::DirectRefused { .. })) => continue,
                        Err(error) => panic!("{error}"),
                    };
                    let got = conversation(&engine, &long.ids, &short.ids);
                    assert_eq!(got, expected, "{layout:?} {slots} slots {threads} threads {prefetch} {io:?}");
                    assert!(engine.store_stats().evictions > 0 || slots >= all - 1, "{slots} slots and no eviction");
                }
            }
        }
    }
}
