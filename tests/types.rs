//! Every weight type at every matrix: near the f32 path, and the same bits whatever the way of computing.

use st_convert::{Cancel, Layout, NoProgress, RelayoutOptions, WeightType, relayout};
use st_gguf::GgufFile;
use st_model::{Isa, KvType, LoadOptions, Reference, Session};

use crate::{common, golden, made};

/// A prompt of `n` tokens.
fn prompt(n: usize) -> Vec<u32> {
    (0..n as u32).map(|i| 3 + i * i * 7 % 200).collect()
}

/// The types that no other test makes files of.
fn types() -> impl Iterator<Item = WeightType> {
    WeightType::ALL.into_iter().filter(|ty| !WeightType::WRITTEN.contains(ty))
}

#[test]
fn every_type_stays_within_the_budget_of_the_f32_path() {
    for ty in types() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = made::model(folder.path(), |_, _| ty);
        let ids = prompt(80);
        let file = || GgufFile::open(&path).expect("a model");
        let mut reference = Reference::load(&file()).expect("a model");
        let expected = golden::flat(&reference.forward(&ids).expect("a forward pass"));
        let options = LoadOptions { kv_type: Some(KvType::F32), ..LoadOptions::default() };
        let engine = common::engine(file(), &options);
        let got = common::all_logits(&engine, &ids);
        golden::within(&ty.to_string(), &got, &expected, engine.n_vocab(), &golden::INT8_RANDOM);
    }
}

#[test]
fn layout_threads_batch_cache_and_instruction_set_change_no_bit() {
    for ty in types() {
        let folder = tempfile::tempdir().expect("a folder");
        let plain = made::model(folder.path(), |_, _| ty);
        let packed = folder.path().join("packed.gguf");
        let to = RelayoutOptions { to: Layout::Offload, threads: 2, overwrite: false };
        relayout(&plain, &to, &packed, &NoProgress, &Cancel::new()).expect("a file in the other layout");
        let back = folder.path().join("back.gguf");
        let to = RelayoutOptions { to: Layout::Gguf, ..to };
        relayout(&packed, &to, &back, &NoProgress, &Cancel::new()).expect("a file in the first layout");
        let tensors = |path| {
            let file = GgufFile::open(path).expect("a model");
            let tensors = &file.header.tensors;
            tensors.iter().map(|tensor| (tensor.name.clone(), file.read_tensor(tensor).expect("a tensor"))).collect()
        };
        let (first, again): (Vec<_>, Vec<_>) = (tensors(&plain), tensors(&back));
        assert!(first == again, "{ty}: other bytes after two layouts");

        let ids = prompt(34);
        let load = |path, options: &LoadOptions| common::engine(GgufFile::open(path).expect("a model"), options);
        let scalar = LoadOptions { isa: Some(Isa::Scalar), ..LoadOptions::default() };
        let expected = common::all_logits(&load(&plain, &scalar), &ids);
        let isas: Vec<_> = Isa::ALL.into_iter().filter(|&isa| st_kernels::Kernels::for_isa(isa).is_some()).collect();
        let ways = [(1, &plain, None), (2, &packed, None), (2, &plain, Some(5)), (1, &packed, Some(4))];
        for (i, isa) in isas.iter().rev().enumerate() {
            // The best instruction set runs every way, the others one each.
            let ways = if i == 0 { &ways[..] } else { &ways[i % 4..][..1] };
            for &(threads, path, slots) in ways {
                let engine = load(path, &LoadOptions { isa: Some(*isa), threads, slots, ..LoadOptions::default() });
                let got = common::all_logits(&engine, &ids);
                assert!(got == expected, "{ty} {isa:?} {threads} threads {slots:?}");
                // One token at a time, a few, and many.
                let mut session = Session::new(&engine).expect("a session");
                let mut done = 0;
                for n in [1, 1, 3, 8, 20, 1] {
                    session.forward(&ids[done..done + n]).expect("a forward pass");
                    done += n;
                    let want = &expected[(done - 1) * engine.n_vocab()..done * engine.n_vocab()];
                    assert!(session.logits() == want, "{ty} {isa:?}: after {n} tokens of {done}");
                }
            }
        }
    }
}
