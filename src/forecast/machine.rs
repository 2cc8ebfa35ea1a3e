//! What was measured of this machine: memory, disk, and how fast it computes a layer of a shape. Kept in the store, since it takes a
//! second or two.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};
use st_experts::io::{ReadSpeed, read_speed};
use st_gguf::{Kind, ModelShape, OutputFile};
use st_model::{Engine, Isa, LoadOptions, Session};

use super::made;
use crate::machine::read_bandwidth;

/// How long a measurement is believed.
const FRESH: Duration = Duration::from_secs(30 * 24 * 3600);
/// Expert reads in flight, as the store has them.
const READS: usize = 4;

/// A machine, with so many threads and one instruction set.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Machine {
    st_tool_machine: String,
    pub(crate) threads: usize,
    isa: String,
    /// When it was measured, in seconds since 1970.
    measured: u64,
    /// Bytes per second that a plain loop reads from memory.
    pub(crate) bandwidth: f64,
    /// The disk that was measured last.
    pub(crate) disk: Option<Disk>,
    /// Experts found in memory with caches of these shares of them, by the routing of the bundled model.
    pub(crate) routing: Vec<(f64, f64)>,
    layers: Vec<LayerSpeed>,
}

/// How fast a disk is read, in bytes per second.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Disk {
    /// All the time.
    pub(crate) sustained: f64,
    /// In the bursts that layers ask for.
    pub(crate) burst: f64,
}

/// How fast a layer of a shape is computed, of made-up weights of type Q4_0.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct LayerSpeed {
    shape: String,
    /// Bytes of weights per second while tokens are made one by one.
    pub(crate) generation: f64,
    /// Seconds that a token of a prompt takes in a layer.
    pub(crate) prompt: f64,
    /// Bytes per second that one thread arranges of experts as files have them.
    pub(crate) arranging: f64,
}

impl Machine {
    /// What is known of this machine with so many threads and these kernels.
    pub(crate) fn load(home: &Path, threads: usize, isa: Isa) -> Option<Self> {
        let known: Self = serde_json::from_slice(&fs::read(path(home)).ok()?).ok()?;
        let age = now().checked_sub(known.measured)?;
        let same = (known.st_tool_machine.as_str(), known.threads, known.isa.as_str())
            == (env!("CARGO_PKG_VERSION"), threads, isa.name());
        (same && age < FRESH.as_secs()).then_some(known)
    }

    /// Measures memory; the rest is measured when it is asked for.
    pub(crate) fn measure(threads: usize, isa: Isa) -> Self {
        Self {
            st_tool_machine: env!("CARGO_PKG_VERSION").to_owned(),
            threads,
            isa: isa.name().to_owned(),
            measured: now(),
            bandwidth: read_bandwidth(threads, None),
            disk: None,
            routing: Vec::new(),
            layers: Vec::new(),
        }
    }

    /// Writes it down. It is only a saving: a store that cannot be written to costs the time once more.
    pub(crate) fn save(&self, home: &Path) {
        const KIND: Kind = Kind { name: "what is known of a machine", recognizes: |_| Ok(true) };
        let written = || -> anyhow::Result<()> {
            fs::create_dir_all(home)?;
            let mut file = OutputFile::create(&path(home), KIND, true)?;
            std::io::Write::write_all(&mut file, &serde_json::to_vec(self)?)?;
            Ok(file.finish()?)
        };
        if let Err(error) = written() {
            tracing::debug!(%error, "what was measured is not kept");
        }
    }

    /// The speed of a layer of this shape, where it is known.
    pub(crate) fn known_layer(&self, shape: &ModelShape) -> Option<&LayerSpeed> {
        let name = name_of(shape);
        self.layers.iter().find(|layer| layer.shape == name)
    }

    /// The speed of a layer of this shape; measured where it is not known.
    ///
    /// # Errors
    /// Where there is no memory for it.
    pub(crate) fn layer(&mut self, shape: &ModelShape, isa: Isa) -> anyhow::Result<LayerSpeed> {
        if let Some(known) = self.known_layer(shape) {
            return Ok(known.clone());
        }
        let layer = measure_layer(shape, self.threads, isa)?;
        self.layers.push(layer.clone());
        Ok(layer)
    }

    /// Measures the disk by the file at `path`, read in pieces of `piece` bytes.
    pub(crate) fn measure_disk(&mut self, path: &Path, piece: f64) {
        match read_speed(path, piece as usize, READS) {
            Ok(Some(ReadSpeed { sustained, burst })) => self.disk = Some(Disk { sustained, burst }),
            Ok(None) => {}
            Err(error) => tracing::debug!(%error, path = %path.display(), "the disk was not measured"),
        }
    }

    /// Measures the disk that `folder` lies on by a file that is written there and removed.
    pub(crate) fn measure_disk_of(&mut self, folder: &Path, piece: f64) {
        const BYTES: usize = 256 << 20;
        let mut measured = || -> std::io::Result<()> {
            fs::create_dir_all(folder)?;
            let path = folder.join(format!(".disk-{}", std::process::id()));
            let written = fs::File::create(&path).and_then(|mut file| {
                let noise: Vec<u8> = (0..1 << 20).map(|i: u32| (i.wrapping_mul(2_654_435_761) >> 13) as u8).collect();
                (0..BYTES >> 20).try_for_each(|_| std::io::Write::write_all(&mut file, &noise))?;
                file.sync_all()
            });
            if written.is_ok() {
                self.measure_disk(&path, piece);
            }
            let removed = fs::remove_file(&path);
            written.and(removed)
        };
        if let Err(error) = measured() {
            tracing::debug!(%error, folder = %folder.display(), "the disk was not measured");
        }
    }
}

fn path(home: &Path) -> PathBuf {
    home.join("machine.json")
}

fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs()
}

/// What of a shape a layer's time depends on.
fn name_of(shape: &ModelShape) -> String {
    let ModelShape { n_embd, n_heads, n_kv_heads, head_dim, n_experts, n_experts_used, n_ff, .. } = shape;
    format!("{n_embd} {n_heads}/{n_kv_heads}×{head_dim} {n_experts_used}/{n_experts}×{n_ff}")
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or_default()
}

/// Runs a model of few layers of this shape, more than caches hold.
fn measure_layer(shape: &ModelShape, threads: usize, isa: Isa) -> anyhow::Result<LayerSpeed> {
    const BEYOND_CACHES: usize = 96 << 20;
    const N_VOCAB: usize = 512;
    const PROMPT: usize = 512;
    const TOKENS: usize = 24;
    const ROUNDS: usize = 3;
    let expert = 3 * shape.n_embd * shape.n_ff / 32 * 18;
    let n_layers = BEYOND_CACHES.div_ceil(expert * shape.n_experts).clamp(1, 8);
    let few = ModelShape {
        n_layers,
        n_vocab: N_VOCAB,
        context_length: 1024,
        rope_layers: vec![true; n_layers],
        windows: vec![None; n_layers],
        ..shape.clone()
    };
    let options = LoadOptions { threads, isa: Some(isa), ..LoadOptions::default() };
    let engine = Engine::load(made::file(&few, false)?, &options)?;
    let mut session = Session::new(&engine)?;
    let token = |i: usize| (i * 97 % N_VOCAB) as u32;
    let prompt: Vec<u32> = (0..PROMPT).map(token).collect();
    let (mut prompt_times, mut rates) = (Vec::new(), Vec::new());
    // The first round reads and arranges the experts.
    for round in 0..=ROUNDS {
        session.reset();
        let start = Instant::now();
        session.forward(&prompt)?;
        if round > 0 {
            prompt_times.push(start.elapsed().as_secs_f64());
        }
        let (start, before) = (Instant::now(), session.work());
        for i in 0..TOKENS {
            session.forward(&[token(31 * (round + 1) + i)])?;
        }
        let work = session.work().since(&before);
        if round > 0 {
            rates.push(work.weight_bytes as f64 / start.elapsed().as_secs_f64());
        }
    }
    let (generation, prompt) = (median(rates), median(prompt_times) / (PROMPT * n_layers) as f64);
    let arranging = engine.arranging_speed();
    Ok(LayerSpeed { shape: name_of(shape), generation, prompt, arranging })
}
