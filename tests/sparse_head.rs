//! The LM head behind a predictor: which rows are computed, and what they are.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use st_convert::{Layout, WeightType};
use st_gguf::GgufFile;
use st_kernels::Kernels;
use st_model::{Engine, Isa, LoadOptions, ModelError, Predictor, SparseHead};

use crate::common;
use crate::program::{arg, little_memory, run};

fn trained() -> PathBuf {
    common::repo("models/tiny/model_lm_head.pt")
}

fn tiny(ty: WeightType) -> GgufFile {
    GgufFile::open(common::converted(&common::repo("models/tiny/checkpoint"), ty, Layout::Gguf)).expect("a model")
}

fn options(threshold: f32, check: bool) -> LoadOptions {
    let shape = tiny(WeightType::Q4_0).header.model_shape().expect("a shape");
    let predictor = Some(Predictor::open(&trained(), &shape).expect("a predictor"));
    LoadOptions { sparse_head: Some(SparseHead { threshold, predictor, check }), ..LoadOptions::default() }
}

/// The logits of every position of a text that the model was not trained on, some rows at a time.
fn logits(engine: &Arc<Engine>, piece: usize) -> Vec<f32> {
    let text = std::fs::read_to_string(common::repo("models/tiny/heldout.txt")).expect("a text");
    let text: String = text.chars().take(1500).collect();
    let ids = engine.tokenizer().expect("a tokenizer").encode(&text, true).expect("ids");
    common::logits_by(engine, &ids, piece)
}

#[test]
fn rows_above_the_threshold_are_those_of_the_whole_head() {
    for ty in [WeightType::Q4_0, WeightType::Q8_0, WeightType::F16] {
        let whole = logits(&common::engine(tiny(ty), &LoadOptions::default()), 64);
        let all = common::engine(tiny(ty), &options(f32::MIN, true));
        assert!(logits(&all, 64) == whole, "{ty}: every row scores above the lowest number");
        let stats = all.head_stats().expect("a sparse head");
        assert_eq!((stats.computed, stats.lost), (stats.rows, Some(0)));

        let engine = common::engine(tiny(ty), &options(0.0, true));
        let some = logits(&engine, 64);
        let equal = |(some, whole): (&f32, &f32)| *some == f32::NEG_INFINITY || some.to_bits() == whole.to_bits();
        assert!(some.iter().zip(&whole).all(equal), "{ty}");
        let n_vocab = engine.n_vocab();
        let rows = || some.chunks(n_vocab).zip(whole.chunks(n_vocab));
        let lost = rows().filter(|(some, whole)| some[common::argmax(whole) as usize] == f32::NEG_INFINITY).count();
        let computed = some.iter().filter(|logit| logit.is_finite()).count();
        let stats = engine.head_stats().expect("a sparse head");
        assert_eq!((stats.computed, stats.lost), (computed as u64, Some(lost as u64)));
        // What the predictor was trained for.
        assert!(stats.computed_share() < 0.2 && stats.lost_share().expect("checked") < 0.2, "{ty} {stats:?}");

        let best = logits(&common::engine(tiny(ty), &options(f32::MAX, false)), 64);
        assert!(best.chunks(n_vocab).all(|row| row.iter().filter(|logit| logit.is_finite()).count() == 1), "{ty}");
    }
}

#[test]
fn threads_rows_memory_and_instruction_set_change_no_bit_of_it() {
    let expected = logits(&common::engine(tiny(WeightType::Q4_0), &options(0.0, false)), 64);
    for isa in Isa::ALL.into_iter().filter(|&isa| Kernels::for_isa(isa).is_some()) {
        for (threads, piece, slots) in [(2, 1, None), (1, 7, Some(8)), (2, 200, Some(8))] {
            let options = LoadOptions { threads, slots, isa: Some(isa), ..options(0.0, piece == 7) };
            let got = logits(&common::engine(tiny(WeightType::Q4_0), &options), piece);
            assert!(got == expected, "{isa:?} {threads} threads, pieces of {piece}");
        }
    }
}

#[test]
fn a_predictor_is_taken_from_either_file_and_named_in_every_report() {
    let dir = tempfile::tempdir().expect("a folder");
    let (holds, model) = (dir.path().join("holds.gguf"), common::repo("models/tiny/tiny-q4_0.gguf"));
    let (model, trained) = (arg(&model), trained());
    let made = run([
        "quantize",
        arg(&common::repo("models/tiny/checkpoint")),
        "--q4_0",
        "-o",
        arg(&holds),
        "--predictor",
        arg(&trained),
    ]);
    assert!(
        made.stderr.contains("llama.cpp does not load a file that holds `lm_head_profiler.weight`"),
        "{}",
        made.stderr
    );
    made.ok();
    let question = ["-p", "Tell me a story about a fox.", "-n", "20", "--temp", "0", "--json"];
    let answer = |args: &[&str]| {
        let run = run([&["run"], args, &question[..]].concat());
        assert!(run.stderr.contains("approximate"), "{}", run.stderr);
        serde_json::from_str::<serde_json::Value>(&run.ok()).expect("JSON")
    };
    let of_pt = answer(&[model, "--sparse-head", "--predictor", arg(&trained), "--sparse-head-check"]);
    let of_gguf = answer(&[model, "--sparse-head", "0", "--predictor", arg(&holds)]);
    let of_model = answer(&[arg(&holds), "--sparse-head", "0", "--memory", &little_memory(arg(&holds))]);
    assert_eq!((&of_pt["ids"], &of_pt["ids"]), (&of_gguf["ids"], &of_model["ids"]));
    let head = &of_pt["stats"]["sparse_head"];
    assert_eq!((&head["approximate"], &head["threshold"]), (&true.into(), &0.0.into()));
    assert!(head["rows_computed_share"].as_f64() < Some(0.3) && head["likeliest_lost_share"].is_f64(), "{head}");
    let told = run(["run", model, "-p", "x", "-n", "3", "--stats", "--sparse-head=-2", "--predictor", arg(&trained)]);
    assert!(told.stderr.contains("head:       approximate: ") && told.stderr.contains("above -2"), "{}", told.stderr);
    let none = run(["run", model, "-p", "x", "--sparse-head"]).fails(&["holds no predictor"]);
    assert!(none.hint().contains("model_lm_head.pt"));
    run(["run", model, "-p", "x", "--sparse-head", "--predictor", model])
        .fails(&["no `lm_head_profiler.weight`"])
        .hint();
    run(["run", model, "-p", "x", "--sparse-head", "--predictor", arg(&common::repo("README.md"))]).fails(&["neither"]);
    run(["run", model, "-p", "x", "--predictor", model]).misused("--sparse-head");
    // The file is a model like any other, in the other layout too.
    let packed = dir.path().join("packed.gguf");
    run(["layout", arg(&holds), arg(&packed), "--to", "offload"]).ok();
    assert_eq!(answer(&[arg(&packed), "--sparse-head"])["ids"], of_pt["ids"]);
}

/// Whatever is in a file that is said to be a predictor: an error or a predictor, no panic and no more memory than the file is long.
#[test]
fn broken_predictors_are_refused() {
    let shape = tiny(WeightType::Q4_0).header.model_shape().expect("a shape");
    let whole = std::fs::read(trained()).expect("a predictor");
    let dir = tempfile::tempdir().expect("a folder");
    let path = dir.path().join("broken.pt");
    let open = |bytes: &[u8]| {
        std::fs::write(&path, bytes).expect("room on the disk");
        Predictor::open(&path, &shape)
    };
    for len in (0..whole.len()).step_by(whole.len() / 40) {
        assert!(open(&whole[..len]).is_err(), "{len} bytes");
    }
    let mut damaged = None;
    // The pickle comes first and is what can go wrong in more ways than one.
    let pickle = whole.windows(4).position(|bytes| bytes == b"PK\x03\x04" as &[u8]).expect("an entry");
    let mut state = 1u64;
    for i in 0..1500 {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let mut bytes = whole.clone();
        bytes[pickle + i % 420] ^= (state >> 56) as u8 | 1;
        match open(&bytes) {
            Ok(predictor) => assert_eq!(predictor.hidden(), 32),
            Err(error) => {
                assert!(matches!(error, ModelError::Predictor { .. }), "{error}");
                if error.to_string().ends_with("it is damaged") {
                    damaged.get_or_insert(bytes);
                }
            }
        }
    }
    // What the reader of pickles panics on is an error like others.
    open(&damaged.expect("one on which the reader panics")).expect_err("damaged");
    run(["run", "tiny", "-p", "x", "--sparse-head", "--predictor", arg(&path)]).fails(&["it is damaged"]);
    let other = st_gguf::ModelShape { n_embd: 256, ..shape.clone() };
    let error = Predictor::open(Path::new(&trained()), &other).expect_err("another model's");
    assert!(error.to_string().contains("expected [N, 256]"), "{error}");
    let mut more = whole;
    more.extend(b"_rebuild_parameter");
    assert!(open(&more).expect_err("more than tensors").to_string().contains("state dict"));
}
