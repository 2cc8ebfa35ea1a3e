use super::*;

/// A file in memory: keys and tensors that tests change.
#[derive(Clone)]
struct File {
    keys: Vec<(String, Value)>,
    tensors: Vec<(String, Vec<u64>)>,
}

impl Described for File {
    fn value(&self, key: &str) -> Option<&Value> {
        self.keys.iter().find(|(name, _)| name == key).map(|(_, value)| value)
    }

    fn keys(&self) -> Box<dyn Iterator<Item = &str> + '_> {
        Box::new(self.keys.iter().map(|(key, _)| key.as_str()))
    }

    fn tensor_shape(&self, name: &str) -> Option<&[u64]> {
        self.tensors.iter().find(|(other, _)| other == name).map(|(_, shape)| shape.as_slice())
    }

    fn tensor_names(&self) -> Box<dyn Iterator<Item = &str> + '_> {
        Box::new(self.tensors.iter().map(|(name, _)| name.as_str()))
    }
}

impl File {
    fn of(shape: &ModelShape) -> Self {
        let mut keys = vec![("general.architecture".to_owned(), Value::from(ARCHITECTURE))];
        keys.extend(shape.to_metadata());
        let mut tensors = Vec::new();
        for tensor in Tensor::ALL {
            let layers = if tensor.scope() == Scope::Model { 1 } else { shape.n_layers };
            tensors.extend((0..layers).map(|layer| (tensor.name(layer), tensor.ggml_shape(shape))));
        }
        Self { keys, tensors }
    }

    fn small() -> Self {
        Self::of(&small())
    }

    fn with(mut self, key: &str, value: impl Into<Value>) -> Self {
        self = self.without(key);
        self.keys.push((full(key), value.into()));
        self
    }

    fn without(mut self, key: &str) -> Self {
        self.keys.retain(|(name, _)| *name != full(key));
        self
    }

    fn tensor(mut self, name: &str, shape: &[u64]) -> Self {
        self.tensors.retain(|(other, _)| other != name);
        self.tensors.push((name.to_owned(), shape.to_vec()));
        self
    }

    fn shape(&self) -> ModelShape {
        ModelShape::from_metadata(self).unwrap()
    }

    /// Asserts that the file is refused with a message that has all of `parts`.
    #[track_caller]
    fn refused(&self, parts: &[&str]) {
        let message = ModelShape::from_metadata(self).unwrap_err().to_string();
        assert!(parts.iter().all(|part| message.contains(part)), "got: {message}\nexpected: {parts:?}");
    }
}

/// A model of eight layers with windows of 64 on all but each fourth.
fn small() -> ModelShape {
    let local = |layer: usize| !layer.is_multiple_of(4);
    ModelShape {
        n_layers: 8,
        n_embd: 64,
        n_heads: 4,
        n_kv_heads: 2,
        head_dim: 16,
        n_experts: 6,
        n_experts_used: 2,
        n_ff: 32,
        n_vocab: 100,
        context_length: 128,
        rope_layers: (0..8).map(local).collect(),
        windows: (0..8).map(|layer| local(layer).then_some(64)).collect(),
        ..ModelShape::published_4b()
    }
}

const FOURTHS: [bool; 8] = [false, true, true, true, false, true, true, true];

#[test]
fn what_is_written_is_read_again() {
    for shape in [small(), ModelShape::published_4b(), ModelShape::published_21b()] {
        assert_eq!(File::of(&shape).shape(), shape);
        assert_eq!(shape.ignored(&File::of(&shape)), [""; 0]);
    }
}

#[test]
fn a_window_leaves_positions_out_of_every_fourth_layer_whatever_its_pattern() {
    let silent = File::small().without("rope.layer_pattern");
    assert_eq!(silent.shape().rope_layers, FOURTHS);
    let unused = silent.clone().with("attention.sliding_window_pattern", vec![false; 8]);
    assert_eq!(unused.shape().rope_layers, FOURTHS, "the window counts, not who uses it");
    assert_eq!(unused.shape().windows, [None; 8]);
    // What is written of it is the same model.
    assert_eq!(File::of(&unused.shape()).shape(), unused.shape());
    for none in [silent.clone().without("attention.sliding_window"), silent.with("attention.sliding_window", 0u32)] {
        assert_eq!(none.shape().rope_layers, [true; 8]);
        assert_eq!(none.shape().windows, [None; 8]);
    }
}

#[test]
fn either_name_of_the_experts_width_will_do() {
    let file = File::small();
    assert_eq!(file.clone().without("expert_feed_forward_length").shape(), small());
    assert_eq!(file.clone().without("feed_forward_length").shape(), small());
    let neither = file.without("feed_forward_length").without("expert_feed_forward_length");
    neither.refused(&["`smallthinker.expert_feed_forward_length` is missing"]);
}

#[test]
fn patterns_are_lists_of_flags_or_integers_or_a_period() {
    let slides = |value: Value| -> Vec<bool> {
        let file = File::small().with("attention.sliding_window_pattern", value);
        file.shape().windows.iter().map(Option::is_some).collect()
    };
    assert_eq!(slides(vec![0u32, 1, 1, 1, 0, 1, 1, 1].into()), FOURTHS);
    assert_eq!(slides(4u32.into()), FOURTHS);
    assert_eq!(slides(2u32.into()), [false, true, false, true, false, true, false, true]);
    assert_eq!(slides(0u32.into()), [true; 8]);
    let layers = File::small().with("rope.layer_pattern", vec![1i32; 8]);
    assert_eq!(layers.shape().rope_layers, [true; 8]);
    File::small().with("rope.layer_pattern", vec![2u32; 8]).refused(&["rope.layer_pattern", "only 0 and 1"]);
    File::small().with("rope.layer_pattern", vec![true; 7]).refused(&["one for each of 8 layers", "7 entries"]);
    File::small().with("rope.layer_pattern", "all").refused(&["rope.layer_pattern", "string"]);
    File::small().with("attention.sliding_window_pattern", -1i32).refused(&["sliding_window_pattern"]);
}

#[test]
fn a_list_that_says_the_same_for_every_layer_is_one_number() {
    assert_eq!(File::small().with("attention.head_count_kv", vec![2u32; 8]).shape(), small());
    let mixed = File::small().with("attention.head_count_kv", vec![2u32, 4, 2, 2, 2, 2, 2, 2]);
    mixed.refused(&["attention.head_count_kv", "the same for all layers"]);
}

#[test]
fn what_may_be_absent_has_its_default() {
    let file = File::small();
    assert_eq!(file.clone().without("expert_gating_func").shape().gating, Gating::Sigmoid);
    assert_eq!(file.clone().without("attention.key_length").without("attention.value_length").shape(), small());
    assert_eq!(file.clone().without("rope.dimension_count").without("vocab_size").shape(), small());
    for key in ["block_count", "embedding_length", "expert_count", "rope.freq_base", "context_length"] {
        file.clone().without(key).refused(&[key, "is missing"]);
    }
    File { keys: Vec::new(), ..file.clone() }.refused(&["`general.architecture` is missing"]);
    let other = File { keys: vec![("general.architecture".into(), "qwen2".into())], ..file };
    other.refused(&["`qwen2`", "`smallthinker`"]);
}

#[test]
fn numbers_that_make_no_model_are_refused() {
    let cases: [(&str, Value); 9] = [
        ("block_count", 0u32.into()),
        ("block_count", u32::MAX.into()),
        ("block_count", "eight".into()),
        ("attention.head_count_kv", 3u32.into()),
        ("expert_used_count", 7u32.into()),
        ("expert_gating_func", 3u32.into()),
        ("attention.layer_norm_rms_epsilon", 0.0f32.into()),
        ("rope.freq_base", f32::INFINITY.into()),
        ("attention.sliding_window", u64::MAX.into()),
    ];
    for (key, value) in cases {
        File::small().with(key, value).refused(&[key]);
    }
}

#[test]
fn scaled_positions_are_refused_and_plain_ones_taken() {
    let yarn = File::small().with("rope.scaling.type", "yarn").with("rope.scaling.factor", 4.0f32);
    yarn.refused(&["smallthinker.rope.scaling.type", "yarn with a factor of 4", "not computed"]);
    File::small().with("rope.scaling.factor", 2.0f32).refused(&["rope.scaling.factor", "is 2"]);
    File::small().with("rope.scale_linear", 8.0f32).refused(&["rope.scale_linear"]);
    File::small().with("rope.scaling.attn_factor", 1.5f32).refused(&["rope.scaling.attn_factor"]);
    File::small().with("rope.scaling.type", "longrope").refused(&["longrope"]);
    File::small().with("rope.freq_base_swa", 1e4f32).refused(&["rope.freq_base_swa", "10000"]);
    let none = File::small().with("rope.scaling.type", "none").with("rope.scaling.factor", 4.0f32);
    assert_eq!(none.shape(), small());
    let one = File::small().with("rope.scaling.type", "linear").with("rope.scaling.factor", 1.0f32);
    assert_eq!(one.with("rope.freq_base_swa", 1.5e6f32).shape(), small());
}

#[test]
fn settings_that_are_not_computed_are_refused_unless_they_ask_for_nothing() {
    let cases: [(&str, Value, Value); 12] = [
        ("attention.value_length", 32u32.into(), 16u32.into()),
        ("rope.dimension_count", 8u32.into(), 16u32.into()),
        ("attention.scale", 1.0f32.into(), 0.25f32.into()),
        ("attention.causal", false.into(), true.into()),
        ("attention.max_alibi_bias", 8.0f32.into(), 0.0f32.into()),
        ("attention.clamp_kqv", 30.0f32.into(), 0.0f32.into()),
        ("attn_logit_softcapping", 50.0f32.into(), 0.0f32.into()),
        ("final_logit_softcapping", 30.0f32.into(), 0.0f32.into()),
        ("expert_weights_scale", 2.5f32.into(), 1.0f32.into()),
        ("expert_weights_norm", false.into(), true.into()),
        ("expert_shared_count", 1u32.into(), 0u32.into()),
        ("logit_scale", "much".into(), 1.0f32.into()),
    ];
    for (key, wrong, neutral) in cases {
        File::small().with(key, wrong).refused(&[&full(key), "not computed"]);
        assert_eq!(File::small().with(key, neutral).shape(), small(), "{key}");
    }
}

#[test]
fn tensors_that_have_no_place_are_refused_by_name() {
    for name in [
        "blk.0.attn_q.bias",
        "blk.8.attn_norm.weight",
        "blk.3.attn_q_norm.weight",
        "blk.3.attn_qkv.bias",
        "blk.0.ffn_up_shexp.weight",
        "blk.x.attn_q.weight",
        "output.bias",
        "rope_freqs.weight",
        "token_embd_norm.weight",
    ] {
        File::small().tensor(name, &[16]).refused(&[&format!("`{name}`"), "has no place"]);
    }
    let fused = File::small().tensor("blk.0.attn_qkv.weight", &[64, 128]);
    let without = |name: &str| fused.tensors.iter().filter(|(other, _)| other != name).cloned().collect();
    File { tensors: without("blk.0.attn_q.weight"), ..fused.clone() }.refused(&["blk.0.attn_qkv.weight"]);
}

#[test]
fn tensors_that_are_missing_or_of_another_shape_are_named() {
    let file = File::small();
    let without = |name: &str| File {
        tensors: file.tensors.iter().filter(|(other, _)| other != name).cloned().collect(),
        ..file.clone()
    };
    without("blk.7.ffn_gate_inp.weight").refused(&["`blk.7.ffn_gate_inp.weight` is missing"]);
    without("token_embd.weight").refused(&["`token_embd.weight` is missing"]);
    assert_eq!(without("output.weight").shape(), small(), "the embedding is the head");
    file.clone().tensor("blk.3.attn_k.weight", &[32, 64]).refused(&["attn_k", "[64, 32]", "[32, 64]"]);
    file.clone().tensor("token_embd.weight", &[32, 100]).refused(&["token_embd"]);
    file.clone().tensor("token_embd.weight", &[64, 0]).refused(&["vocab_size"]);
    assert_eq!(file.tensor("output_norm.weight", &[64, 1, 1]).shape(), small());
}

#[test]
fn what_says_nothing_about_the_model_is_told_of() {
    let file = File::small().tensor("lm_head_profiler.weight", &[20]).with("favourite_colour", "red");
    assert_eq!(file.shape(), small());
    assert_eq!(
        small().ignored(&file),
        ["metadata key `smallthinker.favourite_colour` was ignored", "tensor `lm_head_profiler.weight` was ignored"]
    );
    let more = file.tensor("b", &[1]).tensor("c", &[1]);
    assert!(small().ignored(&more)[1].contains("`lm_head_profiler.weight` and 2 more"));
}

#[test]
fn names_in_another_encoding_are_told_of() {
    let mut file = File::small();
    file.keys.push(("general.name".into(), Value::Octets(b"caf\xe9".to_vec())));
    assert_eq!(file.shape(), small());
    assert_eq!(small().ignored(&file), ["metadata key `general.name` is not UTF-8 text, and is kept as it is"]);
    file.keys.push(("general.author".into(), Value::Octets(vec![0xff])));
    assert!(small().ignored(&file)[0].starts_with("metadata key `general.name` and 1 more like it"));
}

#[test]
fn token_ids_of_minus_one_are_none_and_told_of() {
    assert!(is_no_token(&Value::I32(-1)) && is_no_token(&Value::U32(u32::MAX)) && is_no_token(&Value::I64(-1)));
    assert!(!is_no_token(&Value::U32(0)) && !is_no_token(&Value::from("-1")));
    let mut file = File::small();
    file.keys.push(("tokenizer.ggml.bos_token_id".into(), (-1i32).into()));
    file.keys.push(("tokenizer.ggml.eos_token_id".into(), 5u32.into()));
    assert_eq!(small().ignored(&file), ["metadata key `tokenizer.ggml.bos_token_id` was ignored"]);
}

#[test]
fn layouts_that_llama_cpp_reads_otherwise_are_told_of() {
    assert_eq!(ModelShape::published_21b().llama_cpp_differences(), [""; 0]);
    assert_eq!(ModelShape::published_4b().llama_cpp_differences(), [""; 0]);
    assert!(small().llama_cpp_differences()[0].contains("64"));
}
