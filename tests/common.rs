//! What several test modules share: the goldens, and models made from the bundled checkpoints.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, LazyLock, Mutex, PoisonError};

use safetensors::SafeTensors;
use st_convert::{Cancel, ConvertOptions, Input, Layout, NoProgress, WeightType, convert};
use st_gguf::GgufFile;
use st_kernels::Kernels;
use st_model::{Engine, Isa, LoadOptions, Session};
use tempfile::TempDir;

/// A file below the repository's root.
pub(crate) fn repo(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(path)
}

/// One golden: a prompt, and what the published code makes of it.
pub(crate) struct Golden {
    /// For messages.
    pub(crate) name: String,
    /// The safetensors file.
    pub(crate) path: PathBuf,
    /// The checkpoint it was computed with.
    pub(crate) checkpoint: PathBuf,
    /// The prompt.
    pub(crate) ids: Vec<u32>,
    /// The 64 tokens that follow greedily.
    pub(crate) greedy_ids: Vec<u32>,
}

impl Golden {
    fn open(path: &str, checkpoint: &str) -> Self {
        let path = repo("tests/golden").join(path);
        let bytes = std::fs::read(&path).expect("a golden");
        let tensors = SafeTensors::deserialize(&bytes).expect("safetensors");
        let ids = |name: &str| i32s(&tensors, name).into_iter().map(|id| id as u32).collect();
        Self {
            name: path.file_stem().expect("a name").to_string_lossy().into_owned(),
            checkpoint: repo(checkpoint),
            ids: ids("ids"),
            greedy_ids: ids("greedy_ids"),
            path,
        }
    }

    /// The logits of every position, row by row.
    pub(crate) fn logits(&self) -> Vec<f32> {
        let bytes = std::fs::read(&self.path).expect("a golden");
        f32s(&SafeTensors::deserialize(&bytes).expect("safetensors"), "logits")
    }

    /// The golden's checkpoint as a GGUF file.
    pub(crate) fn gguf(&self, ty: WeightType, layout: Layout) -> GgufFile {
        GgufFile::open(converted(&self.checkpoint, ty, layout)).expect("a converted checkpoint")
    }
}

/// All goldens.
pub(crate) fn goldens() -> Vec<Golden> {
    let tiny = "models/tiny/checkpoint";
    [
        ("tiny/chat_story.safetensors", tiny),
        ("tiny/chat_sum.safetensors", tiny),
        ("tiny/chat_zh.safetensors", tiny),
        ("tiny/long_mixed.safetensors", tiny),
        ("mini-4b_golden_0.safetensors", "tests/golden/mini-4b"),
        ("mini-4b_golden_1.safetensors", "tests/golden/mini-4b"),
        ("mini-21b_golden_0.safetensors", "tests/golden/mini-21b"),
        ("mini-21b_golden_1.safetensors", "tests/golden/mini-21b"),
    ]
    .into_iter()
    .map(|(path, checkpoint)| Golden::open(path, checkpoint))
    .collect()
}

/// A tensor of a golden as f32.
pub(crate) fn f32s(tensors: &SafeTensors<'_>, name: &str) -> Vec<f32> {
    values(tensors, name, f32::from_le_bytes)
}

/// A tensor of a golden as i32.
pub(crate) fn i32s(tensors: &SafeTensors<'_>, name: &str) -> Vec<i32> {
    values(tensors, name, i32::from_le_bytes)
}

fn values<T>(tensors: &SafeTensors<'_>, name: &str, from: fn([u8; 4]) -> T) -> Vec<T> {
    let tensor = tensors.tensor(name).expect(name);
    let (chunks, _) = tensor.data().as_chunks::<4>();
    chunks.iter().map(|bytes| from(*bytes)).collect()
}

/// The index of the largest value, the first where several are.
pub(crate) fn argmax(row: &[f32]) -> u32 {
    let mut best = 0;
    for (i, value) in row.iter().enumerate() {
        if *value > row[best] {
            best = i;
        }
    }
    best as u32
}

/// A checkpoint converted to `ty` and `layout`, once per test process.
pub(crate) fn converted(checkpoint: &Path, ty: WeightType, layout: Layout) -> PathBuf {
    static DONE: LazyLock<Mutex<(TempDir, HashMap<String, PathBuf>)>> = LazyLock::new(|| {
        let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("a temporary folder");
        Mutex::new((dir, HashMap::new()))
    });
    let mut done = DONE.lock().unwrap_or_else(PoisonError::into_inner);
    let key = format!("{} {ty:?} {layout:?}", checkpoint.display());
    if let Some(path) = done.1.get(&key) {
        return path.clone();
    }
    let path = done.0.path().join(format!("{}.gguf", done.1.len()));
    let input = Input::open(checkpoint).expect("a checkpoint");
    let options = ConvertOptions { threads: 2, ..ConvertOptions::new(ty, layout) };
    convert(&input, &options, &path, false, &NoProgress, &Cancel::default()).expect("a conversion");
    done.1.insert(key, path.clone());
    path
}

/// A loaded model.
pub(crate) fn engine(file: GgufFile, options: &LoadOptions) -> Arc<Engine> {
    Engine::load(file, options).expect("a model")
}

/// The logits of every position of `ids`, row by row.
pub(crate) fn all_logits(engine: &Arc<Engine>, ids: &[u32]) -> Vec<f32> {
    logits_by(engine, ids, ids.len())
}

/// The same, fed in pieces of `piece` tokens.
pub(crate) fn logits_by(engine: &Arc<Engine>, ids: &[u32], piece: usize) -> Vec<f32> {
    let mut logits = Vec::new();
    let mut session = Session::new(engine).expect("a session");
    for ids in ids.chunks(piece) {
        let push = |_, row: &[f32]| {
            logits.extend_from_slice(row);
            Ok(())
        };
        session.run_all(ids, &mut (), push).expect("a forward pass");
    }
    logits
}

/// `n` greedy tokens after `ids`, the prompt fed in pieces of `piece`.
pub(crate) fn greedy(engine: &Arc<Engine>, ids: &[u32], piece: usize, n: usize) -> Vec<u32> {
    let mut session = Session::new(engine).expect("a session");
    for piece in ids.chunks(piece) {
        session.forward(piece).expect("a forward pass");
    }
    let mut tokens = Vec::new();
    while tokens.len() < n {
        let best = argmax(session.logits());
        tokens.push(best);
        session.forward(&[best]).expect("a forward pass");
    }
    tokens
}

/// Numbers that look like chance and are the same every time.
pub(crate) struct Dice(pub(crate) u64);

impl Dice {
    pub(crate) fn below(&mut self, n: usize) -> usize {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) as usize % n
    }
}

/// An instruction set that this CPU runs and does not run by itself: one with vectors where there are several, since portable code is
/// slow.
pub(crate) fn other_isa() -> Isa {
    let here: Vec<Isa> = Isa::ALL.into_iter().filter(|&isa| Kernels::for_isa(isa).is_some()).collect();
    if here.len() > 2 { here[1] } else { here[0] }
}
