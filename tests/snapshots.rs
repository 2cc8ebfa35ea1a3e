//! Snapshots: what goes on from one has the bits of a run from the beginning, on any machine; what is damaged is never gone on from.

use std::sync::Arc;

use st_convert::{Layout, WeightType};
use st_model::{Engine, KvType, LoadOptions, Sequence, Session, SnapshotError};

use crate::common;
use crate::program::run;

fn engine(name: &str, options: LoadOptions) -> (Arc<Engine>, Vec<u32>) {
    let golden = common::goldens().into_iter().find(|golden| golden.name == name).expect("a golden");
    let engine = common::engine(golden.gguf(WeightType::Q4_0, Layout::Gguf), &options);
    (engine, golden.ids.iter().copied().cycle().take(700).collect())
}

fn saved(engine: &Engine, sequence: &Sequence) -> Vec<u8> {
    let mut bytes = Vec::new();
    engine.save(sequence, &mut bytes).expect("saved");
    assert!(bytes.len() as u64 <= engine.snapshot_bytes(sequence));
    bytes
}

/// The logits of the last of `tokens`, the first of which are those of `sequence`.
fn go_on(engine: &Arc<Engine>, sequence: Sequence, tokens: &[u32]) -> Vec<f32> {
    let mut session = Session::new(engine).expect("a session");
    let len = sequence.len();
    *session.sequence_mut() = sequence;
    session.forward(&tokens[len..]).expect("a forward pass");
    session.logits().to_vec()
}

#[test]
fn what_goes_on_from_a_snapshot_has_the_bits_of_a_cold_run() {
    for name in ["long_mixed", "mini-21b_golden_0"] {
        for kv_type in [None, Some(KvType::Q8_0)] {
            let resident = LoadOptions { threads: 2, kv_type, ..LoadOptions::default() };
            let (engine, text) = engine(name, resident.clone());
            let ctx = engine.ctx().min(text.len());
            let mut session = Session::new(&engine).expect("a session");
            session.forward(&text[..ctx]).expect("a forward pass");
            let expected = session.logits().to_vec();
            // Of another instruction set, with few experts in memory.
            let little = LoadOptions { slots: Some(16), isa: Some(common::other_isa()), ..resident };
            let (other, _) = self::engine(name, little);
            for len in [1, 256, 300, ctx - 1].into_iter().filter(|&len| len < ctx) {
                let mut session = Session::new(&engine).expect("a session");
                for piece in text[..len].chunks(100) {
                    session.forward(piece).expect("a forward pass");
                }
                let bytes = saved(&engine, session.sequence());
                assert_eq!(engine.snapshot_tokens(&*bytes).expect("tokens"), &text[..len]);
                assert!(
                    go_on(&engine, engine.restore(&*bytes).expect("restored"), &text[..ctx]) == expected,
                    "{name} {len}"
                );
                // It can be cut by its last token.
                let mut cut = other.restore(&*bytes).expect("restored");
                assert_eq!(cut.truncate(len - 1), len - 1);
                let whole = other.restore(&*bytes).expect("restored");
                (0..=len).for_each(|to| assert_eq!(engine.snapshot_keeps(len, to), whole.keeps(to), "{len} {to}"));
                assert!(go_on(&other, cut, &text[..ctx]) == expected, "{name} {len} elsewhere");
            }
        }
    }
}

#[test]
fn what_is_damaged_or_of_another_model_is_refused() {
    let (engine, text) = engine("long_mixed", LoadOptions { ctx: Some(400), ..LoadOptions::default() });
    let mut session = Session::new(&engine).expect("a session");
    session.forward(&text[..300]).expect("a forward pass");
    let bytes = saved(&engine, session.sequence());
    let pages = engine.kv_pages().0;
    for len in (0..bytes.len()).step_by(977).chain([bytes.len() - 1]) {
        assert!(engine.restore(&bytes[..len]).is_err(), "cut at {len}");
    }
    for at in (0..bytes.len()).step_by(977).chain(0..200) {
        let mut changed = bytes.clone();
        changed[at] ^= 0x10;
        assert!(engine.restore(&*changed).is_err(), "changed at {at}");
    }
    let longer = [bytes.as_slice(), &[0]].concat();
    assert!(matches!(engine.restore(&*longer), Err(SnapshotError::Damaged(_))));
    let huge: Vec<u8> = [&bytes[..56], &u64::MAX.to_le_bytes(), &bytes[64..]].concat();
    assert!(engine.restore(&*huge).is_err());
    // Nothing that failed holds pages.
    assert_eq!(engine.kv_pages().0, pages);
    let other_kv = LoadOptions { kv_type: Some(KvType::F32), ..LoadOptions::default() };
    assert!(matches!(self::engine("long_mixed", other_kv).0.restore(&*bytes), Err(SnapshotError::Other)));
    let other_model = self::engine("mini-21b_golden_0", LoadOptions::default()).0;
    assert!(matches!(other_model.restore(&*bytes), Err(SnapshotError::Other)));
    let short = self::engine("long_mixed", LoadOptions { ctx: Some(100), ..LoadOptions::default() }).0;
    assert!(matches!(short.restore(&*bytes), Err(SnapshotError::Context { tokens: 300, ctx: 100 })));
    assert!(engine.restore(&*bytes).is_ok());
}

/// A conversation that is kept in a file answers as a new one does, and runs only what is new.
#[test]
fn a_session_in_a_file_changes_no_token() {
    let folder = tempfile::tempdir().expect("a folder");
    let file = folder.path().join("s.stkv");
    let path = file.to_str().expect("UTF-8");
    let ask = |question: &str, with: &[&str]| -> serde_json::Value {
        let args = ["run", "tiny", "-p", question, "-n", "20", "--seed", "3", "--json"];
        serde_json::from_str(&run(args.iter().chain(with)).ok()).expect("JSON")
    };
    let long = "Lily had a red ball and a blue box. ".repeat(12);
    for question in [format!("{long} What color is the ball?"), format!("{long} What color is the box?")] {
        let cold = ask(&question, &[]);
        for with in [vec!["--session", path], vec!["--session", path, "--isa", common::other_isa().name()]] {
            let kept = ask(&question, &with);
            assert_eq!((&kept["ids"], &kept["prompt_ids"]), (&cold["ids"], &cold["prompt_ids"]));
        }
    }
    let again = ask(&format!("{long} What color is the box?"), &["--session", path]);
    assert!(again["stats"]["prompt_tokens"].as_u64() < Some(60), "{again}");
    // A damaged one is begun anew, another file is left alone.
    let mut bytes = std::fs::read(&file).expect("read");
    bytes[100] ^= 1;
    std::fs::write(&file, &bytes).expect("written");
    let args = ["run", "tiny", "-p", "x", "-n", "3", "--session", path];
    let begun = run(args);
    assert!(begun.stderr.contains("is begun anew"), "{}", begun.stderr);
    let text = folder.path().join("text");
    std::fs::write(&text, "mine").expect("written");
    run(["run", "tiny", "-p", "x", "--session", text.to_str().expect("UTF-8")]).fails(&["not a session"]);
    assert_eq!(std::fs::read(&text).expect("there"), b"mine");
}
