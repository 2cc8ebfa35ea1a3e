//! Converting while the checkpoint is fetched: the bytes of a finished download, whatever comes in between.

use std::collections::BTreeMap;
use std::fs;
#[cfg(unix)]
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use safetensors::SafeTensors;
use safetensors::tensor::TensorView;
use serde_json::json;
use tempfile::{TempDir, tempdir};

use crate::common::repo;
use crate::hub::server::{Fault, RepoFile, Server, Settings};
use crate::program::{Run, arg, names, patiently, program, run};

const REPO: &str = "Tiiny/SmallThinker-4BA0.6B-Instruct";
const SHARDS: usize = 3;

/// The bundled checkpoint in shards that divide experts, served by a hub; a copy of it in a folder; a home.
struct World {
    server: Server,
    folder: TempDir,
}

fn shard(number: usize) -> String {
    format!("model-{:05}-of-{SHARDS:05}.safetensors", number + 1)
}

impl World {
    fn new() -> Self {
        let folder = tempdir().expect("a folder");
        let checkpoint = folder.path().join("checkpoint");
        fs::create_dir(&checkpoint).expect("created");
        let from = repo("models/tiny/checkpoint");
        for name in names(&from).into_iter().filter(|name| !name.ends_with(".safetensors")) {
            fs::copy(from.join(&name), checkpoint.join(&name)).expect("copied");
        }
        write_shards(&from.join("model.safetensors"), &checkpoint);
        let files = names(&checkpoint).into_iter().map(|name| {
            let content = fs::read(checkpoint.join(&name)).expect("read");
            let file = if name.ends_with(".safetensors") { RepoFile::large(content) } else { RepoFile::small(content) };
            (name, file)
        });
        let settings = Settings { repo: REPO.to_owned(), files: files.collect(), ..Settings::default() };
        Self { server: Server::start(settings), folder }
    }

    fn program(&self, args: &[&str]) -> Command {
        let mut command = program();
        command.env("HF_HUB_OFFLINE", "0").env("HF_ENDPOINT", self.server.endpoint());
        command.env("HF_HOME", self.folder.path().join("hf")).current_dir(self.folder.path()).args(args);
        command
    }

    fn run(&self, args: &[&str]) -> Run {
        Run::of(&mut self.program(args))
    }

    /// What a conversion of the folder gives.
    fn expected(&self, args: &[&str]) -> Vec<u8> {
        let out = self.folder.path().join("expected.gguf");
        let checkpoint = self.folder.path().join("checkpoint");
        run([&["quantize", arg(&checkpoint), "-q", "--force", "-o", arg(&out)], args].concat()).ok();
        fs::read(out).expect("read")
    }

    fn shards(&self) -> PathBuf {
        self.folder.path().join(".o.gguf.shards")
    }

    /// Requests for the data of a shard.
    fn fetches(&self, number: usize) -> usize {
        // Headers are asked for from the start, and not read to the end.
        self.server.ranges(&shard(number)).len()
    }
}

/// Cuts a checkpoint so that no shard ends with an expert.
fn write_shards(model: &Path, folder: &Path) {
    let bytes = fs::read(model).expect("read");
    let tensors = SafeTensors::deserialize(&bytes).expect("safetensors");
    let all: BTreeMap<String, TensorView<'_>> = tensors.tensors().into_iter().collect();
    let mut map = serde_json::Map::new();
    let size = all.len().div_ceil(SHARDS) + 1;
    let all: Vec<_> = all.into_iter().collect();
    for (number, tensors) in all.chunks(size).enumerate() {
        let name = shard(number);
        map.extend(tensors.iter().map(|(tensor, _)| (tensor.clone(), json!(name))));
        let written = safetensors::serialize(tensors.iter().map(|(name, view)| (name, view)), None).expect("a shard");
        fs::write(folder.join(name), written).expect("written");
    }
    let index = json!({ "metadata": {}, "weight_map": map });
    fs::write(folder.join("model.safetensors.index.json"), index.to_string()).expect("written");
}

#[test]
fn the_bytes_are_those_of_a_finished_download() {
    let predictor = repo("models/tiny/model_lm_head.pt");
    for args in [
        &["--q4_0"][..],
        &["--q4_0", "--layout", "offload"],
        &["--q8_0", "--output-type", "f16"],
        &["--f16"],
        &["--q4_0", "--predictor", arg(&predictor)],
    ] {
        let world = World::new();
        let said = world.run(&[&["quantize", "4b", "-o", "o.gguf"], args].concat());
        assert!(said.stderr.contains("3 shards") && said.stderr.contains("while they are fetched"), "{}", said.stderr);
        said.ok();
        assert!(fs::read(world.folder.path().join("o.gguf")).expect("read") == world.expected(args), "{args:?}");
        // No checkpoint in the cache, and nothing beside the output.
        assert!(!world.folder.path().join("hf/hub/models--Tiiny--SmallThinker-4BA0.6B-Instruct/blobs").exists());
        assert_eq!(names(world.folder.path()).iter().filter(|name| name.starts_with(".o")).count(), 0);
    }
}

#[test]
fn searching_tells_the_same_gains() {
    let world = World::new();
    let said = world.run(&["quantize", "4b", "--q4_0", "--search", "-o", "o.gguf"]).stderr;
    let checkpoint = world.folder.path().join("checkpoint");
    let expected =
        run(["quantize", arg(&checkpoint), "--q4_0", "--search", "-o", arg(&world.folder.path().join("e.gguf"))]);
    let gains = |text: &str| text.lines().filter(|line| line.contains(" %")).map(str::to_owned).collect::<Vec<_>>();
    assert_eq!(gains(&said), gains(&expected.stderr));
    assert!(!gains(&said).is_empty());
}

#[test]
fn the_whole_checkpoint_is_kept_where_that_is_wanted() {
    let world = World::new();
    world.run(&["quantize", "4b", "--q4_0", "--keep", "-q", "-o", "o.gguf"]).ok();
    assert!(fs::read(world.folder.path().join("o.gguf")).expect("read") == world.expected(&["--q4_0"]));
    let again = Run::of(world.program(&["quantize", "4b", "--q8_0", "-q", "-o", "p.gguf"]).env("HF_HUB_OFFLINE", "1"));
    again.ok();
}

#[test]
fn a_shard_that_is_not_what_the_hub_states_counts_for_nothing() {
    let world = World::new();
    for _ in 0..2 {
        world.server.spoil(&shard(1), Fault::WrongByte(100_000));
    }
    // Its header is asked for first, and is not spoilt by that byte.
    for _ in 0..8 {
        world.server.spoil(&shard(1), Fault::WrongByte(100_000));
    }
    world.run(&["quantize", "4b", "--q4_0", "-q", "-o", "o.gguf"]).fails(&[&shard(1), "sha256"]).hint();
    assert!(!world.folder.path().join("o.gguf").exists());
    world.server.heal();
    world.server.forget();
    let said = world.run(&["quantize", "4b", "--q4_0", "-o", "o.gguf"]);
    assert!(said.stderr.contains("1 of 3 shards are in the output already"), "{}", said.stderr);
    said.ok();
    assert_eq!(world.fetches(0), 0, "what is in the output is not fetched again");
    assert!(fs::read(world.folder.path().join("o.gguf")).expect("read") == world.expected(&["--q4_0"]));
}

#[test]
#[cfg(unix)]
fn a_killed_conversion_goes_on_where_it_was() {
    let world = World::new();
    let args = ["quantize", "4b", "--q4_0", "--layout", "offload", "-q", "-o", "o.gguf"];
    for killed in 0..SHARDS {
        // The connection stays silent in the middle of a shard.
        for _ in 0..20 {
            world.server.spoil(&shard(killed), Fault::StallAfter(1_500_000));
        }
        let mut child = world.program(&args).stderr(Stdio::null()).spawn().expect("it starts");
        let journal = || fs::read_to_string(world.shards().join("journal.json")).unwrap_or_default();
        let arrives = |(name, bytes): (String, u64)| name.ends_with(".incomplete") && bytes >= 1_400_000;
        patiently(|| {
            (0..killed).all(|before| journal().contains(&shard(before)))
                && walk(&world.shards()).into_iter().any(arrives)
        });
        child.kill().expect("killed");
        child.wait().expect("it ends");
        world.server.heal();
        if killed > 0 {
            // Of the shards before, only what later ones need is left.
            let before = fs::metadata(world.shards().join(shard(killed - 1))).expect("there");
            assert!(before.blocks() * 512 < before.len() / 2, "{} of {}", before.blocks() * 512, before.len());
        }
        assert!(!world.folder.path().join("o.gguf").exists());
        world.server.forget();
    }
    world.run(&args).ok();
    let ranges = [0, 1].map(|number| world.server.ranges(&shard(number)));
    assert!(ranges.iter().all(Vec::is_empty), "{ranges:?}");
    let ranges = world.server.ranges(&shard(2));
    assert!(ranges.iter().any(|range| range.as_deref().is_some_and(|range| range != "bytes=0-")), "{ranges:?}");
    let expected = world.expected(&["--q4_0", "--layout", "offload"]);
    assert!(fs::read(world.folder.path().join("o.gguf")).expect("read") == expected);
    assert_eq!(names(world.folder.path()).iter().filter(|name| name.starts_with(".o")).count(), 0);
}

#[test]
fn another_conversion_into_the_same_file_begins_anew() {
    let world = World::new();
    for _ in 0..20 {
        world.server.spoil(&shard(1), Fault::status(403));
    }
    world.run(&["quantize", "4b", "--q4_0", "-q", "-o", "o.gguf"]).fails(&["403"]);
    world.server.heal();
    world.run(&["quantize", "4b", "--q8_0", "-q", "-o", "o.gguf"]).ok();
    assert!(fs::read(world.folder.path().join("o.gguf")).expect("read") == world.expected(&["--q8_0"]));
    // What is no conversion's is left alone.
    fs::create_dir(world.folder.path().join(".p.gguf.shards")).expect("created");
    fs::write(world.folder.path().join(".p.gguf.shards/mine"), "mine").expect("written");
    world.run(&["quantize", "4b", "--q4_0", "-q", "-o", "p.gguf"]).fails(&["in the way"]);
    assert_eq!(fs::read(world.folder.path().join(".p.gguf.shards/mine")).expect("there"), b"mine");
}

#[test]
fn what_cannot_be_converted_leaves_nothing() {
    let world = World::new();
    world.server.change(|settings| {
        let config = String::from_utf8(settings.files["config.json"].content().to_vec()).expect("text");
        let config = config.replace("\"rope_theta\"", "\"rope_thetas\"");
        settings.files.insert("config.json".to_owned(), RepoFile::small(config));
    });
    world.run(&["quantize", "4b", "--q4_0", "-q", "-o", "o.gguf"]).fails(&["rope_theta"]);
    assert_eq!(names(world.folder.path()).iter().filter(|name| name.contains("o.gguf")).count(), 0);
    assert!(world.fetches(1) <= 2, "more than headers was fetched");
}

/// Gives the world's checkpoint, and the hub's, an LM head in a shard of its own.
fn add_head(world: &World, tied: bool, change: u8) {
    let checkpoint = world.folder.path().join("checkpoint");
    let bytes = fs::read(repo("models/tiny/checkpoint/model.safetensors")).expect("read");
    let tensors = SafeTensors::deserialize(&bytes).expect("safetensors");
    let embedding = tensors.tensor("model.embed_tokens.weight").expect("an embedding");
    let mut data = embedding.data().to_vec();
    data[0] ^= change;
    let head = TensorView::new(embedding.dtype(), embedding.shape().to_vec(), &data).expect("a head");
    let written = safetensors::serialize([("lm_head.weight", &head)], None).expect("a shard");
    let put = |name: &str, content: Vec<u8>, large: bool| {
        fs::write(checkpoint.join(name), &content).expect("written");
        let file = if large { RepoFile::large(content) } else { RepoFile::small(content) };
        world.server.change(|settings| drop(settings.files.insert(name.to_owned(), file)));
    };
    put("head.safetensors", written, true);
    let text = |name: &str| fs::read_to_string(checkpoint.join(name)).expect("text");
    let index = text("model.safetensors.index.json")
        .replace("\"weight_map\":{", "\"weight_map\":{\"lm_head.weight\":\"head.safetensors\",");
    put("model.safetensors.index.json", index.into_bytes(), false);
    let config =
        text("config.json").replace("\"tie_word_embeddings\": true", &format!("\"tie_word_embeddings\": {tied}"));
    put("config.json", config.into_bytes(), false);
}

/// Whether the head is the embedding decides what is written, and is known before the shards are here.
#[test]
fn a_head_is_what_it_is_in_a_finished_download() {
    for (tied, change, args) in [
        (true, 1, &["--q8_0"][..]),
        (true, 1, &["--q8_0", "--keep-head"]),
        (true, 0, &["--q8_0"]),
        (true, 0, &["--q8_0", "--keep-head"]),
        (false, 1, &["--q8_0"]),
        (false, 0, &["--q8_0"]),
    ] {
        let world = World::new();
        add_head(&world, tied, change);
        world.run(&[&["quantize", "4b", "-q", "-o", "o.gguf"], args].concat()).ok();
        let made = fs::read(world.folder.path().join("o.gguf")).expect("read");
        assert!(made == world.expected(args), "tied {tied}, change {change}, {args:?}");
        // Where it had to be known for sure, all was fetched first.
        let whole = change == 0 && (!tied || args.len() > 1);
        let cached = world.folder.path().join("hf/hub/models--Tiiny--SmallThinker-4BA0.6B-Instruct/blobs").exists();
        assert_eq!(cached, whole, "tied {tied}, change {change}, {args:?}");
    }
}

/// Files below a folder with their sizes.
fn walk(folder: &Path) -> Vec<(String, u64)> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        match entry.metadata() {
            Ok(metadata) if metadata.is_dir() => found.extend(walk(&entry.path())),
            Ok(metadata) => found.push((entry.file_name().to_string_lossy().into_owned(), metadata.len())),
            Err(_) => {}
        }
    }
    found
}
