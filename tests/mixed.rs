//! Files whose tensors are of different types: by kind, by layer, by matrix of an expert.

use std::path::{Path, PathBuf};
use std::sync::LazyLock;

use st_bench::synth::gguf::write_gguf;
use st_bench::synth::mix::{Mix, Tensor, remix};
use st_bench::synth::recipe::{Recipe, Statistics};
use st_bench::synth::shape::Shape;
use st_convert::{Cancel, Layout, NoProgress, RelayoutOptions, WeightType, relayout};
use st_gguf::{GgmlType, GgufFile, ModelShape};
use st_kernels::Kernels;
use st_model::{Engine, Isa, LoadOptions, Reference, Session};
use tempfile::TempDir;

use crate::common;
use crate::golden::{INT8_TRAINED, within};
use crate::made;
use crate::program::{Run, arg, program};

/// A way to give types to tensors, and what it is called.
type TypeOf = Box<dyn Fn(Tensor, usize) -> GgmlType + Send + Sync>;

/// Files that are made once, in both layouts.
struct Files {
    _dir: TempDir,
    /// The bundled model.
    trained: Vec<(String, [PathBuf; 2])>,
    /// A random model with a head of its own, whose rows are whole blocks of every type.
    random: Vec<(String, [PathBuf; 2])>,
}

static FILES: LazyLock<Files> = LazyLock::new(|| {
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("a temporary folder");
    let random = dir.path().join("random.gguf");
    write_random(&random);
    let trained = common::converted(&common::repo("models/tiny/checkpoint"), WeightType::F32, Layout::Gguf);
    let made = |name: &str, base: &Path, kinds: Vec<(String, TypeOf)>| -> Vec<_> {
        let files = kinds.into_iter().map(|(kind, type_of)| {
            let [gguf, offload] = ["gguf", "offload"].map(|layout| dir.path().join(format!("{name}-{kind}-{layout}")));
            remix(base, &gguf, &*type_of).expect("a mixed file");
            let options = RelayoutOptions { to: Layout::Offload, threads: 2, overwrite: false };
            relayout(&gguf, &options, &offload, &NoProgress, &Cancel::default()).expect("the other layout");
            (kind, [gguf, offload])
        });
        files.collect()
    };
    let layers = GgufFile::open(&trained).and_then(|file| file.header.model_shape()).expect("a model").n_layers;
    let mut few = kinds(layers);
    few.retain(|(kind, _)| ["all", "q4_k_m"].contains(&&**kind));
    Files { trained: made("trained", &trained, few), random: made("random", &random, kinds(6)), _dir: dir }
});

fn write_random(path: &Path) {
    let model = ModelShape {
        n_layers: 6,
        n_embd: 256,
        n_heads: 4,
        n_kv_heads: 2,
        head_dim: 64,
        n_experts: 8,
        n_experts_used: 2,
        n_ff: 256,
        n_vocab: 600,
        context_length: 512,
        ..ModelShape::published_4b()
    };
    let mut shape = Shape { tied: false, window: 32, ..Shape::of("random", model) };
    shape.set_period(3);
    let statistics = Statistics { sparsity: 0.65, early_sparsity: 0.9, popular_share: 0.6, repeat_share: 0.5, seed: 7 };
    let recipe = Recipe::new(shape, &statistics).expect("the shape is possible");
    write_gguf(&recipe, &Mix::pure(GgmlType::F32), Layout::Gguf, path, false, &|_| ()).expect("a file");
}

/// Kinds of published files.
const PUBLISHED: [&str; 9] =
    ["bf16_q8_0", "q4_0", "q4_0-imatrix", "q4_k_m", "q5_k_m", "q3_k_m", "q2_k", "iq4_nl", "iq4_xs"];

/// The mixes: one that repeats nothing from tensor to tensor and layer to layer, and those of published files.
fn kinds(n_layers: usize) -> Vec<(String, TypeOf)> {
    use GgmlType::*;
    const ALL: [GgmlType; 16] =
        [Q4_0, F16, Q8_0, Q6_K, BF16, Q4_K, F32, Q5_K, Q4_1, Q2_K, IQ4_XS, Q3_K, Q5_0, MXFP4, Q5_1, IQ4_NL];
    let stays_float =
        |tensor| matches!(tensor, Tensor::OutputNorm | Tensor::AttnNorm | Tensor::FfnNorm | Tensor::FfnGateInp);
    let all: TypeOf =
        Box::new(move |tensor, layer| if stays_float(tensor) { F32 } else { ALL[(tensor as usize + 7 * layer) % 16] });
    // Down alone another type, in some layers, as an importance matrix makes it.
    let down: TypeOf = Box::new(move |tensor, layer| match tensor {
        tensor if stays_float(tensor) => F32,
        Tensor::FfnDownExps if layer < 2 => Q8_0,
        Tensor::TokenEmbd | Tensor::Output => F16,
        _ => Q4_0,
    });
    let mut kinds = vec![("all".to_owned(), all), ("down".to_owned(), down)];
    for name in PUBLISHED {
        let mix = Mix::named(name).expect("a mix");
        kinds.push((name.to_owned(), Box::new(move |tensor, layer| mix.type_of(tensor, layer, n_layers, true))));
    }
    kinds
}

fn open(path: &Path) -> GgufFile {
    GgufFile::open(path).expect("a mixed file")
}

fn ids(n_vocab: usize) -> Vec<u32> {
    (0..70u32).map(|i| (i * i * 31 + i * 7 + 3) % n_vocab.min(600) as u32).collect()
}

/// Threads, rows at once and slots (`true`: the fewest) that a file is run with.
type Way = (usize, usize, bool);

/// Runs both layouts in every way of `ways` on each of `isas`, and expects the bits of `expected`.
fn expect_bits(kind: &str, files: &[PathBuf; 2], isas: &[Isa], ways: &[Way], ids: &[u32], expected: &[f32]) {
    for (i, path) in files.iter().enumerate() {
        for &isa in isas {
            for &(threads, piece, few) in ways {
                let mut options = LoadOptions { isa: Some(isa), threads, ..LoadOptions::default() };
                options.slots = few.then(|| 2 * open(path).header.model_shape().expect("a model").n_experts_used);
                let engine = common::engine(open(path), &options);
                let got = common::logits_by(&engine, ids, piece);
                assert!(got == expected, "{kind} layout {i} {isa:?} {threads} threads, pieces of {piece}, few: {few}");
                assert!(!few || engine.store_stats().evictions > 0, "nothing was evicted");
            }
        }
    }
}

/// The same bits for both layouts, all instruction sets, 1 and 2 threads, one row or many at once, and few slots or one for every expert.
#[test]
fn layout_threads_batch_and_memory_change_no_bit() {
    let isas: Vec<_> = Isa::ALL.into_iter().filter(|&isa| Kernels::for_isa(isa).is_some()).collect();
    for (kind, files) in FILES.trained.iter().chain(&FILES.random) {
        let engine = common::engine(open(&files[0]), &LoadOptions::default());
        let ids = ids(engine.n_vocab());
        let expected = common::all_logits(&engine, &ids);
        assert!(expected.iter().any(|value| *value != expected[0]), "constant logits");
        if kind == "all" {
            expect_bits(kind, files, &isas, &[(2, 3, false), (1, 40, true)], &ids, &expected);
            expect_bits(kind, files, &[Isa::Scalar], &[(2, 1, true)], &ids, &expected);
        } else {
            expect_bits(kind, files, &[engine.isa()], &[(2, 3, true)], &ids, &expected);
        }
    }
}

/// The kernels are as far from the f32 path on the same weights as with one type for all.
#[test]
fn mixed_files_stay_within_the_budget() {
    let golden = common::goldens().into_iter().find(|golden| golden.name == "chat_story").expect("a golden");
    for (kind, files) in &FILES.trained {
        for path in files {
            let mut reference = Reference::load(&open(path)).expect("a model");
            let expected = reference.forward(&golden.ids).and_then(|logits| Ok(logits.flatten_all()?.to_vec1()?));
            let engine = common::engine(open(path), &LoadOptions::default());
            let got = common::all_logits(&engine, &golden.ids);
            within(kind, &got, &expected.expect("logits"), engine.n_vocab(), &INT8_TRAINED);
        }
    }
}

/// The way back gives the first file's bytes.
#[test]
fn both_layouts_hold_the_same() {
    let dir = tempfile::tempdir().expect("a folder");
    for (kind, [gguf, offload]) in FILES.trained.iter().chain(&FILES.random) {
        let back = dir.path().join(format!("{}-{kind}", gguf.display()).replace('/', "-"));
        let options = RelayoutOptions { to: Layout::Gguf, threads: 2, overwrite: false };
        relayout(offload, &options, &back, &NoProgress, &Cancel::default()).expect("the way back");
        let read = |path: &Path| {
            let file = open(path);
            let mut tensors: Vec<_> = file
                .header
                .tensors
                .iter()
                .map(|tensor| (tensor.name.clone(), tensor.ty, file.read_tensor(tensor).expect("a tensor")))
                .collect();
            tensors.sort_by(|a, b| a.0.cmp(&b.0));
            tensors
        };
        assert!(read(gguf) == read(&back), "{kind}");
    }
}

/// Types whose values are in code books are refused by name, with the files to take instead.
#[test]
fn types_that_are_not_computed_are_refused_by_name() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = made::model(folder.path(), |_, _| WeightType::Q3_K);
    let mut bytes = std::fs::read(&path).expect("read");
    // IQ3_S has blocks of the same size. The type follows the name, the number of dimensions and those.
    let name = b"token_embd.weight";
    let at = bytes.windows(name.len()).position(|window| window == name).expect("a tensor") + name.len() + 4 + 2 * 8;
    assert_eq!(bytes[at], 11);
    bytes[at] = 21;
    std::fs::write(&path, bytes).expect("written");
    for verb in [&["run", "-p", "x"][..], &["layout", "x.gguf", "--to", "offload"], &["quantize", "--q4_0"]] {
        let args = [&verb[..1], &[arg(&path)], &verb[1..]].concat();
        let refused = Run::of(program().current_dir(folder.path()).args(args)).fails(&["token_embd.weight", "IQ3_S"]);
        assert!(refused.hint().contains("run 4b:q4_k_s"), "{}", refused.stderr);
    }
}

/// Where experts come and go, a head of its own leaves the embedding in the file: no memory is planned for it, and a file that is cut
/// while it runs is an error that names the place, after which the text goes on as it was.
#[test]
fn an_embedding_that_stays_in_the_file_takes_no_memory_and_tells_its_loss() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("model.gguf");
    write_random(&path);
    let few = LoadOptions { slots: Some(4), ..LoadOptions::default() };
    let plan = |options| Engine::plan_for(&open(&path), options).expect("a plan").dense;
    let embedding = open(&path).header.tensor("token_embd.weight").expect("an embedding").clone();
    assert_eq!(plan(&LoadOptions::default()) - plan(&few), embedding.n_bytes);

    let mut session = Session::new(&common::engine(open(&path), &few)).expect("a session");
    session.run(&[3, 4], &mut ()).expect("it runs");
    let before = session.logits().to_vec();
    let whole = std::fs::read(&path).expect("read");
    let cut = std::fs::File::options().write(true).open(&path).expect("opened");
    cut.set_len(embedding.offset).expect("cut");
    let error = session.run(&[5], &mut ()).expect_err("the file is cut");
    let said = error.to_string();
    assert!(said.contains("`token_embd.weight`") && said.contains("offset"), "{said}");
    std::fs::write(&path, whole).expect("written");
    session.run(&[5], &mut ()).expect("it runs again");
    assert!(session.logits() != before);
}
