//! Receipts: an answer is proven wherever and however it is made again, and what was changed is found and named.

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};
use st_convert::{Layout, WeightType};
use tempfile::{TempDir, tempdir};

use crate::common::{converted, other_isa, repo};
use crate::http::Server;
use crate::program::{arg, little_memory, names, run};

const QUESTION: &str = "Tell me a story about a cat.";

/// A receipt of an answer of the bundled model, and the folder that it lies in.
fn receipt(args: &[&str]) -> (TempDir, PathBuf) {
    let folder = tempdir().unwrap();
    let path = folder.path().join("receipt.json");
    let common = ["run", "tiny", "-q", "-p", QUESTION, "-n", "40", "--receipt", arg(&path)];
    run([&common[..], args].concat()).ok();
    (folder, path)
}

fn verify(path: &Path, args: &[&str]) -> crate::program::Run {
    run([&["verify", "-q", arg(path)][..], args].concat())
}

fn tiny(layout: Layout) -> PathBuf {
    converted(&repo("models/tiny/checkpoint"), WeightType::Q4_0, layout)
}

#[test]
fn an_answer_is_proven_however_it_is_made_again() {
    let (_folder, path) = receipt(&["--seed", "7", "--temp", "1.1", "--presence-penalty", "0.3", "--threads", "2"]);
    let [gguf, offload] = [Layout::Gguf, Layout::Offload].map(tiny);
    for (name, model) in [("tiny", None), ("gguf", Some(arg(&gguf))), ("offload", Some(arg(&offload)))] {
        // A little more than what verifying needs, which it says itself.
        let refused = verify(&path, &[model.as_slice(), &["--memory", "1MiB"]].concat()).fails(&["needs at least"]);
        let least = refused.stderr.split("needs at least ").nth(1).and_then(|rest| rest.split(' ').next());
        let memory = (least.expect("bytes").parse::<u64>().expect("a number") + (3 << 19)).to_string();
        for args in [
            &["--threads", "1"][..],
            &["--threads", "3", "--isa", other_isa().name()],
            &["--isa", "scalar", "--threads", "1"],
            &["--memory", &memory],
            &["--memory", &memory, "--no-prefetch", "--no-guess", "--io", "buffered"],
        ] {
            let model = model.as_slice();
            let said = verify(&path, &[model, args].concat()).ok();
            assert!(said.starts_with("the same: ") && said.contains("tokens"), "{name} {args:?}: {said}");
        }
    }
    // One that was made by other means is the same, but for what it says of the model's name.
    // Hashing the model leaves the program a little larger.
    let memory = (little_memory("tiny").parse::<u64>().unwrap() + (8 << 20)).to_string();
    let (_other, other) =
        receipt(&["--seed", "7", "--temp", "1.1", "--presence-penalty", "0.3", "--memory", &memory, "--isa", "scalar"]);
    assert_eq!(fs::read(&path).unwrap(), fs::read(&other).unwrap());
}

#[test]
fn what_ends_an_answer_and_what_it_has_to_fit_are_proven_too() {
    let schema = json!({"type": "object", "properties": {"cat": {"enum": ["Tom", "Kit"]}}, "required": ["cat"],
        "additionalProperties": false});
    for args in [
        &["--temp", "0", "-n", "40"][..],
        &["--temp", "0", "-n", "5"],
        &["--stop=.", "--seed", "3"],
        &["--schema", &schema.to_string(), "--seed", "3"],
        &["--kv-type", "q8_0", "--seed", "3", "--logit-bias", "10=3", "-n", "40"],
    ] {
        let folder = tempdir().unwrap();
        let path = folder.path().join("r");
        run([&["run", "tiny", "-q", "-p", QUESTION, "--receipt", arg(&path)][..], args].concat()).ok();
        verify(&path, &[]).ok();
        let receipt: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
        assert_eq!(
            receipt["answer"]["ids"].as_array().map(Vec::len),
            receipt["answer"]["logits"].as_array().map(Vec::len)
        );
    }
}

/// Drafts leave no trace: a text that repeats itself, which is drafted, has the receipt of one that is not.
#[test]
fn drafts_leave_no_trace_in_a_receipt() {
    let folder = tempdir().unwrap();
    let prompt = "The cat sat. The cat sat. The cat sat. The cat sat. The cat";
    let made = |draft: &str| {
        let path = folder.path().join(draft);
        let args = [
            "run",
            "tiny",
            "-q",
            "--raw",
            "-p",
            prompt,
            "--temp",
            "0",
            "--seed",
            "1",
            "-n",
            "40",
            "--json",
            "--receipt",
            arg(&path),
        ];
        let answer: Value = serde_json::from_str(&run([&args[..], &["--draft", draft]].concat()).ok()).unwrap();
        (fs::read(&path).unwrap(), answer["stats"]["accepted_tokens"].as_u64().unwrap_or(0))
    };
    let ((plain, none), (drafted, some)) = (made("off"), made("8"));
    assert!(none == 0 && some > 0, "{none} and {some} drafts accepted");
    assert!(plain == drafted);
    verify(&folder.path().join("8"), &["--threads", "1"]).ok();
}

/// Changes a receipt; where `summed` is set with the checksums that go with it.
fn change(path: &Path, summed: bool, edit: impl FnOnce(&mut Value)) -> PathBuf {
    let mut receipt: Value = serde_json::from_slice(&fs::read(path).unwrap()).unwrap();
    edit(&mut receipt);
    if summed {
        for part in ["model", "prompt", "settings", "seed", "answer"] {
            let sum = Sha256::digest(receipt[part].to_string());
            receipt["sums"][part] = sum[..8].iter().map(|byte| format!("{byte:02x}")).collect::<String>().into();
        }
    }
    let changed = path.with_file_name("changed.json");
    fs::write(&changed, receipt.to_string()).unwrap();
    changed
}

#[test]
fn a_receipt_that_was_changed_is_found_out() {
    let (_folder, path) = receipt(&["--seed", "7", "--temp", "1.5", "--top-k", "0"]);
    assert_eq!(change(&path, true, |_| ()), path.with_file_name("changed.json"));
    verify(&path.with_file_name("changed.json"), &[]).ok();
    let ids = |receipt: &mut Value, part: &str, at: usize| {
        let id = &mut if part == "prompt" { &mut receipt["prompt"] } else { &mut receipt["answer"]["ids"] }[at];
        *id = json!(id.as_u64().unwrap() ^ 1);
    };
    type Edit<'a> = (&'a str, &'a dyn Fn(&mut Value), &'a str);
    let edits: [Edit<'_>; 6] = [
        ("prompt", &|receipt| ids(receipt, "prompt", 5), "token 1 is not proven"),
        ("seed", &|receipt| receipt["seed"] = json!(8), "by the same logits"),
        ("settings", &|receipt| receipt["settings"]["temperature"] = json!(0.0), "by the same logits"),
        ("answer", &|receipt| ids(receipt, "answer", 11), "token 12 is not the same"),
        ("answer", &|receipt| receipt["answer"]["text"] = json!("Another."), "the text is not"),
        (
            "answer",
            &|receipt| {
                for list in ["ids", "logits"] {
                    receipt["answer"][list].as_array_mut().unwrap().truncate(9);
                }
                receipt["answer"]["finish_reason"] = json!("stop");
            },
            "ends otherwise",
        ),
    ];
    for (part, edit, found) in edits {
        let changed = change(&path, false, edit);
        verify(&changed, &[]).fails(&[&format!("its {part} was changed")]);
        let changed = change(&path, true, edit);
        verify(&changed, &[]).fails(&["is not proven", found]);
    }
}

#[test]
fn another_model_is_named_by_what_differs() {
    let (folder, path) = receipt(&["--temp", "0"]);
    let searched = folder.path().join("searched.gguf");
    let checkpoint = repo("models/tiny/checkpoint");
    run(["quantize", "-q", arg(&checkpoint), "--q4_0", "--search", "-o", arg(&searched)]).ok();
    verify(&path, &[arg(&searched)]).fails(&["is not the model of", "a weight in token_embd.weight is another"]);
    let q8_0 = converted(&checkpoint, WeightType::Q8_0, Layout::Gguf);
    verify(&path, &[arg(&q8_0)]).fails(&["is of type Q8_0, and Q4_0 in the receipt"]);
    let other = converted(&repo("tests/golden/mini-4b"), WeightType::Q4_0, Layout::Gguf);
    verify(&path, &[arg(&other)]).fails(&["is not the model of"]);
    // A byte of one expert; the file's checksum names it where it has one, the receipt where it has none.
    let mut bytes = fs::read(tiny(Layout::Gguf)).unwrap();
    let file = st_gguf::GgufFile::open(tiny(Layout::Gguf)).unwrap();
    let tensor = file.header.tensor("blk.1.ffn_up_exps.weight").unwrap();
    let part = tensor.n_bytes / file.header.model_shape().unwrap().n_experts as u64;
    bytes[(tensor.offset + 3 * part + 7) as usize] ^= 0x10;
    let damaged = folder.path().join("damaged.gguf");
    fs::write(&damaged, &bytes).unwrap();
    verify(&path, &[arg(&damaged)]).fails(&["blk.1.ffn_up_exps.weight", "expert 3"]);
    // The same length under another name, so that no sums are found.
    let key = b"st.checksums.version";
    let at = bytes.windows(key.len()).position(|bytes| bytes == key).unwrap();
    bytes[at] = b'x';
    fs::write(&damaged, &bytes).unwrap();
    verify(&path, &[arg(&damaged)]).fails(&["a weight in blk.1.ffn_up_exps.weight of expert 3 is another"]);
}

#[test]
fn only_receipts_are_read_and_replaced() {
    let folder = tempdir().unwrap();
    let path = folder.path().join("r");
    for (text, said) in [
        ("", "it is no receipt"),
        ("{}", "it is no receipt"),
        (r#"{"st_tool_receipt":2}"#, "form 2"),
        (r#"{"st_tool_receipt":1}"#, "it is no receipt"),
        ("[[[[", "it is no receipt"),
    ] {
        fs::write(&path, text).unwrap();
        verify(&path, &[]).fails(&[said]);
    }
    verify(&folder.path().join("none"), &[]).fails(&["cannot read"]);
    fs::write(&path, "a text of mine").unwrap();
    run(["run", "tiny", "-p", "x", "--receipt", arg(&path)]).fails(&["is not a receipt"]);
    assert_eq!(fs::read_to_string(&path).unwrap(), "a text of mine");
    run(["run", "tiny", "-p", "x", "--sparse-head", "--receipt", "r"]).misused("cannot be used with");
    assert_eq!(names(folder.path()), ["r"]);
}

#[test]
fn a_server_gives_receipts_to_who_asks() {
    let server = Server::start(&["--receipts", "--parallel", "2"]);
    let folder = tempdir().unwrap();
    let schema = json!({"type": "json_schema", "json_schema": {"schema": {
        "type": "object", "properties": {"cat": {"enum": ["Tom", "Kit"]}}, "required": ["cat"], "additionalProperties": false}}});
    for (address, body) in [
        ("/v1/completions", json!({"prompt": "One day, ", "max_tokens": 20, "seed": 5, "receipt": true, "n": 2})),
        (
            "/v1/chat/completions",
            json!({"messages": [{"role": "user", "content": QUESTION}], "max_tokens": 30, "seed": 5,
            "presence_penalty": 0.4, "logit_bias": {"7": -1.5}, "receipt": true}),
        ),
        (
            "/v1/chat/completions",
            json!({"messages": [{"role": "user", "content": "A cat?"}], "receipt": true, "response_format": schema}),
        ),
    ] {
        let answer = server.ask(address, &body);
        for choice in answer["choices"].as_array().unwrap() {
            let path = folder.path().join("receipt.json");
            fs::write(&path, choice["receipt"].to_string()).unwrap();
            verify(&path, &["--threads", "1"]).ok();
        }
        // Streamed, it comes with the last of each answer, and is the same.
        let mut streamed = body.clone();
        streamed["stream"] = true.into();
        streamed["seed"] = answer["seed"].clone();
        let mut given = 0;
        for chunk in server.stream(address, &streamed).all() {
            for choice in chunk["choices"].as_array().into_iter().flatten() {
                assert_eq!(choice["receipt"].is_null(), choice["finish_reason"].is_null(), "{choice}");
                if !choice["receipt"].is_null() {
                    let index = choice["index"].as_u64().unwrap() as usize;
                    assert_eq!(choice["receipt"], answer["choices"][index]["receipt"]);
                    given += 1;
                }
            }
        }
        assert_eq!(given, answer["choices"].as_array().unwrap().len());
    }
    assert!(
        server.ask("/v1/completions", &json!({"prompt": "One", "max_tokens": 2}))["choices"][0]["receipt"].is_null()
    );
    let without = Server::start(&[]);
    without.post("/v1/completions", &json!({"prompt": "One", "receipt": true})).fails(400, Some("receipt"));
}
