//! What the searches have found, and the inputs that they began with, replayed.

use std::path::Path;

#[test]
fn every_input_of_the_corpus_ends_in_a_value_or_an_error() {
    for (name, run) in st_fuzz::TARGETS {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus").join(name);
        let files: Vec<_> = std::fs::read_dir(&folder).expect("a corpus").map(|entry| entry.unwrap().path()).collect();
        assert!(!files.is_empty(), "{} is empty", folder.display());
        for file in files {
            run(&std::fs::read(&file).unwrap());
        }
    }
}

#[test]
fn the_bundled_model_is_read_by_all_that_read_gguf_files() {
    let model = include_bytes!("../../models/tiny/tiny-q4_0.gguf");
    st_fuzz::gguf_header(model);
    st_fuzz::expert_index(model);
    st_fuzz::tokenizer_metadata(model);
}
