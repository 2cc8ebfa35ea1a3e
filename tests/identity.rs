//! One arithmetic: the same bits whatever the way of computing.

use st_convert::{Layout, WeightType};
use st_model::{Isa, KvType, LoadOptions};

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
        for kv_type in [KvType::F16, KvType::F32, KvType::Q8_0] {
            let options = LoadOptions { threads: 2, kv_type, ..LoadOptions::default() };
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
