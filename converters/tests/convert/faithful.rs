//! What is written is what was read: every tensor, every type, both layouts, any number of threads.

use std::path::Path;

use crate::common::{Checkpoint, LAYOUTS, TYPES, bytes, mini, options, repository, run, tiny};
use st_convert::{
    Cancel, ConvertOptions, DifferenceKind, Input, Layout, NoProgress, WeightType, compare, convert, plan,
};
use st_gguf::{GgmlType, GgufFile, GgufWriter, Metadata, TensorInfo, TensorSpec, WriteOptions};
use st_kernels::{dequantize_row, quantize_row_q4_0, quantize_row_q8_0};

/// What a matrix of bfloat16 has to become, computed without the converter.
fn expected(data: &[u8], ty: WeightType) -> Vec<u8> {
    let mut floats = vec![0.0; data.len() / 2];
    dequantize_row(WeightType::BF16, data, &mut floats);
    let mut out = vec![0; ty.row_bytes(floats.len()).unwrap()];
    match ty {
        WeightType::Q4_0 => quantize_row_q4_0(&floats, &mut out),
        WeightType::Q8_0 => quantize_row_q8_0(&floats, &mut out),
        WeightType::BF16 => out.copy_from_slice(data),
        WeightType::F16 => out = floats.iter().flat_map(|&x| half::f16::from_f32(x).to_le_bytes()).collect(),
        WeightType::F32 => out = floats.iter().flat_map(|x| x.to_le_bytes()).collect(),
        _ => unreachable!("{ty} is not written"),
    }
    out
}

#[test]
fn the_bundled_model_is_what_this_converter_makes() {
    let made = bytes(&tiny(), &options(WeightType::Q4_0, Layout::Gguf));
    let bundled = std::fs::read(repository("models/tiny/tiny-q4_0.gguf")).unwrap();
    assert!(made == bundled, "models/tiny/tiny-q4_0.gguf differs from a new conversion of models/tiny/checkpoint");
}

#[test]
fn every_tensor_holds_the_weights_of_its_source() {
    for name in ["mini-4b", "mini-21b"] {
        let mut source = Checkpoint::load(&mini(name));
        for ty in TYPES {
            let dir = tempfile::tempdir().unwrap();
            let out = dir.path().join("out.gguf");
            run(&mini(name), &options(ty, Layout::Gguf), &out).unwrap();
            let file = GgufFile::open(&out).unwrap();
            for info in &file.header.tensors {
                let alignment = if ty.is_quantized() { 4096 } else { 32 };
                assert_eq!(info.offset % alignment, 0, "{}", info.name);
                let got = file.read_tensor(info).unwrap();
                let small = info.name.contains("norm") || info.name.contains("ffn_gate_inp");
                let ty = if small { WeightType::F32 } else { ty };
                assert_eq!(info.ty, ty.ggml(), "{}", info.name);
                let wanted: Vec<u8> =
                    sources(&info.name).iter().flat_map(|name| expected(&source.tensor(name).data, ty)).collect();
                assert!(got == wanted, "{name}: {} as {ty}", info.name);
            }
            let experts = if name == "mini-4b" { 4 * 3 } else { 4 * 3 + 1 };
            assert_eq!(file.header.tensors.len(), 2 + 4 * 7 + experts);
        }
    }
}

/// The names under which a GGUF tensor's parts lie in a checkpoint, written down a second time.
fn sources(gguf: &str) -> Vec<String> {
    let whole = match gguf {
        "token_embd.weight" => "model.embed_tokens.weight",
        "output_norm.weight" => "model.norm.weight",
        "output.weight" => "lm_head.weight",
        _ => "",
    };
    if !whole.is_empty() {
        return vec![whole.into()];
    }
    let mut parts = gguf.split('.').skip(1);
    let (layer, tensor) = (parts.next().unwrap(), parts.next().unwrap());
    let one = |name: &str| vec![format!("model.layers.{layer}.{name}.weight")];
    let experts = |name: &str| {
        (0..8).map(|e| format!("model.layers.{layer}.block_sparse_moe.experts.{e}.{name}.weight")).collect()
    };
    match tensor {
        "attn_norm" => one("input_layernorm"),
        "attn_q" => one("self_attn.q_proj"),
        "attn_k" => one("self_attn.k_proj"),
        "attn_v" => one("self_attn.v_proj"),
        "attn_output" => one("self_attn.o_proj"),
        "ffn_norm" => one("post_attention_layernorm"),
        "ffn_gate_inp" => one("block_sparse_moe.primary_router"),
        "ffn_gate_exps" => experts("gate"),
        "ffn_up_exps" => experts("up"),
        "ffn_down_exps" => experts("down"),
        other => panic!("unknown tensor {other}"),
    }
}

/// Each output of `input` is the same at 1, 2 and 5 threads; returns the outputs.
fn same_at_any_number_of_threads(input: &Path, name: &str) -> Vec<Vec<u8>> {
    let types = TYPES.into_iter().map(|ty| (ty, false)).chain([(WeightType::Q4_0, true)]);
    let each = types.flat_map(|(ty, search)| LAYOUTS.map(|layout| ConvertOptions { search, ..options(ty, layout) }));
    let same = |options: ConvertOptions| {
        let one = bytes(input, &ConvertOptions { threads: 1, ..options.clone() });
        for threads in [2, 5] {
            let many = bytes(input, &ConvertOptions { threads, ..options.clone() });
            assert!(one == many, "{name} as {options:?} at {threads} threads");
        }
        one
    };
    each.map(same).collect()
}

/// A checkpoint of two shards and the same in one file, whose embedding is cut into many units of work.
#[test]
fn neither_threads_nor_shards_change_a_byte() {
    let sharded = same_at_any_number_of_threads(&mini("mini-21b"), "two shards");
    let dir = tempfile::tempdir().unwrap();
    let mut whole = Checkpoint::load(&mini("mini-21b"));
    whole.save(dir.path());
    assert!(same_at_any_number_of_threads(dir.path(), "one file") == sharded);

    let rows = 10_001;
    whole.config["vocab_size"] = rows.into();
    for name in ["model.embed_tokens.weight", "lm_head.weight"] {
        let tensor = whole.tensor(name);
        let again = tensor.data.iter().copied().cycle();
        (tensor.shape[0], tensor.data) = (rows, again.take(rows * tensor.shape[1] * 2).collect());
    }
    whole.save(dir.path());
    same_at_any_number_of_threads(dir.path(), "a large embedding");
}

#[test]
fn threads_change_no_byte_of_what_a_gguf_becomes() {
    let dir = tempfile::tempdir().unwrap();
    for ty in [WeightType::F32, WeightType::F16, WeightType::BF16, WeightType::Q8_0] {
        let input = dir.path().join(format!("{ty}.gguf"));
        run(&mini("mini-21b"), &options(ty, Layout::Gguf), &input).unwrap();
        same_at_any_number_of_threads(&input, ty.name());
    }
}

#[test]
fn what_a_search_gains_is_told_for_each_kind_of_matrix() {
    let input = Input::open(&mini("mini-21b")).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let gains = |layout, threads, search| {
        let options = ConvertOptions { threads, search, ..options(WeightType::Q4_0, layout) };
        let out = dir.path().join(format!("{}-{threads}.gguf", layout.name()));
        convert(&input, &options, &out, true, &NoProgress, &Cancel::new()).unwrap().gains
    };
    assert_eq!(gains(Layout::Gguf, 1, false), []);
    for layout in LAYOUTS {
        let gains = [1, 2, 5].map(|threads| gains(layout, threads, true));
        assert!(gains[0] == gains[1] && gains[0] == gains[2], "{gains:?}");
        let names: Vec<&str> = gains[0].iter().map(|gain| gain.tensor.part()).collect();
        let expected = "token_embd output attn_q attn_k attn_v attn_output ffn_gate_exps ffn_up_exps ffn_down_exps";
        assert_eq!(names.join(" "), expected);
        for gain in &gains[0] {
            let rule = st_convert::tensor_map::rule_of(gain.tensor);
            let instances = rule.instances(input.shape()).count();
            assert_eq!(gain.weights as usize, instances * rule.rows(input.shape()) * rule.cols(input.shape()));
            assert!(0.0 < gain.errors.chosen && gain.errors.chosen < 0.95 * gain.errors.reference, "{gain:?}");
        }
    }
}

#[test]
fn metadata_states_the_model() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out.gguf");
    let plan = run(&tiny(), &options(WeightType::Q4_0, Layout::Gguf), &out).unwrap();
    assert!(plan.warnings.iter().any(|warning| warning.contains("64")), "{:?}", plan.warnings);
    assert_eq!(plan.output_bytes, std::fs::metadata(&out).unwrap().len());
    let metadata = GgufFile::open(&out).unwrap().header.metadata;
    let number = |key: &str| metadata.u32(&format!("smallthinker.{key}")).unwrap();
    assert_eq!(number("block_count"), Some(8));
    assert_eq!(number("context_length"), Some(2048));
    assert_eq!(number("embedding_length"), Some(192));
    assert_eq!(number("feed_forward_length"), Some(64));
    assert_eq!(number("expert_feed_forward_length"), Some(64));
    assert_eq!(number("expert_count"), Some(16));
    assert_eq!(number("expert_used_count"), Some(4));
    assert_eq!(number("expert_gating_func"), Some(2));
    assert_eq!(number("attention.head_count"), Some(4));
    assert_eq!(number("attention.head_count_kv"), Some(2));
    assert_eq!(number("attention.key_length"), Some(64));
    assert_eq!(number("attention.value_length"), Some(64));
    assert_eq!(number("attention.sliding_window"), Some(64));
    assert_eq!(number("rope.dimension_count"), Some(64));
    assert_eq!(metadata.f32("smallthinker.rope.freq_base").unwrap(), Some(1.5e6));
    assert_eq!(metadata.f32("smallthinker.attention.layer_norm_rms_epsilon").unwrap(), Some(1e-6));
    let pattern = [false, true, true, true, false, true, true, true];
    assert_eq!(metadata.bools("smallthinker.attention.sliding_window_pattern").unwrap(), Some(&pattern[..]));
    assert_eq!(metadata.bools("smallthinker.rope.layer_pattern").unwrap(), Some(&pattern[..]));
    assert_eq!(metadata.str("general.architecture").unwrap(), Some("smallthinker"));
    assert_eq!(metadata.u32("general.alignment").unwrap(), Some(4096));
    assert_eq!(metadata.u32("general.file_type").unwrap(), Some(2));
    assert_eq!(metadata.strings("tokenizer.ggml.tokens").unwrap().unwrap().len(), 2048);
    assert_eq!(metadata.strings("tokenizer.ggml.merges").unwrap().unwrap().len(), 1789);
    assert_eq!(metadata.u32("tokenizer.ggml.eos_token_id").unwrap(), Some(2047));
    assert_eq!(metadata.u32("tokenizer.ggml.bos_token_id").unwrap(), Some(2045));
    assert_eq!(metadata.u32s("tokenizer.ggml.eos_token_ids").unwrap(), Some(vec![2047, 2045]));
    assert!(metadata.str("tokenizer.chat_template").unwrap().unwrap().contains("<|im_start|>"));
}

#[test]
fn a_gguf_of_the_source_type_is_as_good_as_the_checkpoint() {
    let dir = tempfile::tempdir().unwrap();
    for middle in [WeightType::F32, WeightType::BF16] {
        let between = dir.path().join(format!("{middle}.gguf"));
        for model in [tiny(), mini("mini-21b")] {
            let _ = std::fs::remove_file(&between);
            run(&model, &options(middle, Layout::Gguf), &between).unwrap();
            for layout in LAYOUTS {
                let wanted = options(WeightType::Q4_0, layout);
                assert!(bytes(&between, &wanted) == bytes(&model, &wanted), "{middle} {layout:?}");
            }
            let again = options(middle, Layout::Gguf);
            assert!(bytes(&between, &again) == std::fs::read(&between).unwrap(), "{middle} to itself");
        }
    }
    let q8_0 = dir.path().join("q8_0.gguf");
    run(&tiny(), &options(WeightType::Q8_0, Layout::Gguf), &q8_0).unwrap();
    assert!(bytes(&q8_0, &options(WeightType::Q8_0, Layout::Gguf)) == std::fs::read(&q8_0).unwrap());
    assert!(!bytes(&q8_0, &options(WeightType::Q4_0, Layout::Gguf)).is_empty());
}

#[test]
fn a_split_gguf_is_as_good_as_a_whole_one() {
    let dir = tempfile::tempdir().unwrap();
    let whole = dir.path().join("whole.gguf");
    run(&mini("mini-21b"), &options(WeightType::BF16, Layout::Gguf), &whole).unwrap();
    let file = GgufFile::open(&whole).unwrap();
    let tensors = &file.header.tensors;
    let parts = [&tensors[..7], &tensors[7..]];
    let path = |number: usize| dir.path().join(format!("m-{number:05}-of-00002.gguf"));
    for (i, part) in parts.into_iter().enumerate() {
        let mut metadata = if i == 0 { file.header.metadata.clone() } else { Metadata::new() };
        metadata.insert("split.no", i as u32);
        metadata.insert("split.count", 2u32);
        metadata.insert("split.tensors.count", tensors.len() as u32);
        let spec = |t: &TensorInfo| TensorSpec { name: t.name.clone(), shape: t.shape.clone(), ty: t.ty };
        let specs: Vec<TensorSpec> = part.iter().map(spec).collect();
        let mut writer = GgufWriter::create(&path(i + 1), &metadata, &specs, WriteOptions::default()).unwrap();
        part.iter().for_each(|tensor| writer.write(&file.read_tensor(tensor).unwrap()).unwrap());
        writer.finish().unwrap();
    }
    for layout in LAYOUTS {
        let wanted = options(WeightType::Q4_0, layout);
        for number in [1, 2] {
            assert!(bytes(&path(number), &wanted) == bytes(&whole, &wanted), "part {number}, {layout:?}");
        }
    }
}

#[test]
fn the_embedding_may_have_a_type_of_its_own() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out.gguf");
    let mixed = ConvertOptions { output_type: Some(WeightType::Q8_0), ..options(WeightType::Q4_0, Layout::Gguf) };
    run(&mini("mini-21b"), &mixed, &out).unwrap();
    for info in &GgufFile::open(&out).unwrap().header.tensors {
        let head = ["token_embd.weight", "output.weight"].contains(&info.name.as_str());
        assert_eq!(info.ty == GgmlType::Q8_0, head, "{}", info.name);
    }
}

#[test]
fn search_changes_blocks_and_never_the_rest() {
    let searched = ConvertOptions { search: true, ..options(WeightType::Q4_0, Layout::Gguf) };
    let (plain, searched) =
        (bytes(&mini("mini-4b"), &options(WeightType::Q4_0, Layout::Gguf)), bytes(&mini("mini-4b"), &searched));
    assert_eq!(plain.len(), searched.len());
    assert!(plain != searched);
    let wrong = ConvertOptions { search: true, ..options(WeightType::Q8_0, Layout::Gguf) };
    assert!(plan(&Input::open(&mini("mini-4b")).unwrap(), &wrong).is_err());
}

#[test]
fn a_comparison_names_what_differs() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out.gguf");
    let wanted = options(WeightType::Q4_0, Layout::Gguf);
    run(&mini("mini-4b"), &wanted, &out).unwrap();
    let input = Input::open(&mini("mini-4b")).unwrap();
    let differences = |options: &ConvertOptions| compare(&input, options, &out, &NoProgress, &Cancel::new()).unwrap();
    assert_eq!(differences(&wanted), []);

    let types = differences(&options(WeightType::Q8_0, Layout::Gguf));
    assert!(types.iter().all(|difference| matches!(difference.kind, DifferenceKind::Type { .. })), "{types:?}");
    let packed = differences(&options(WeightType::Q4_0, Layout::Offload));
    assert_eq!(packed.iter().filter(|difference| difference.kind == DifferenceKind::Missing).count(), 4);
    assert_eq!(packed.iter().filter(|difference| difference.kind == DifferenceKind::Extra).count(), 12);

    let header = GgufFile::open(&out).unwrap().header;
    let at = header.tensor("blk.2.ffn_up_exps.weight").unwrap().offset as usize + 100;
    let mut file = std::fs::read(&out).unwrap();
    file[at] ^= 1;
    std::fs::write(&out, file).unwrap();
    let flipped = differences(&wanted);
    assert_eq!(flipped.len(), 1);
    assert_eq!(flipped[0].tensor, "blk.2.ffn_up_exps.weight");
    assert!(matches!(flipped[0].kind, DifferenceKind::Bytes { count: 1, first: 100, .. }), "{flipped:?}");
}
