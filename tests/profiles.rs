//! Profiles: the figures are those of the model, and the pictures those of the figures.

use std::fs;
use std::path::Path;

use serde_json::Value;
use tempfile::tempdir;

use crate::common::repo;
use crate::program::{arg, little_memory, names, run};

fn profile(folder: &Path, args: &[&str]) -> Value {
    profile_of(folder, "700", args)
}

fn profile_of(folder: &Path, tokens: &str, args: &[&str]) -> Value {
    let heldout = repo("models/tiny/heldout.txt");
    let common = ["profile", "tiny", "-q", "-f", arg(&heldout), "-o", arg(folder), "--tokens", tokens];
    run([&common[..], args].concat()).ok();
    serde_json::from_slice(&fs::read(folder.join("profile.json")).expect("written")).expect("JSON")
}

fn numbers(value: &Value) -> Vec<f64> {
    value.as_array().expect("a list").iter().map(|number| number.as_f64().expect("a number")).collect()
}

#[test]
fn a_profile_says_what_the_model_did_and_is_the_same_however_it_ran() {
    let folder = tempdir().unwrap();
    let first = profile(folder.path(), &["--threads", "2"]);
    let text = &first["texts"][0];
    assert_eq!((text["name"].as_str(), text["tokens"].as_u64()), (Some("heldout"), Some(700)));
    let (layers, experts, used) = (8, 16, 4.0);
    let frequency = text["frequency"].as_array().unwrap();
    assert_eq!(frequency.len(), layers);
    for layer in frequency {
        let layer = numbers(layer);
        assert_eq!(layer.len(), experts);
        assert!((layer.iter().sum::<f64>() - used).abs() < 1e-9, "each token chooses {used}: {layer:?}");
    }
    for box_plot in text["sparsity"].as_array().unwrap() {
        let order = ["p5", "p25", "median", "p75", "p95"].map(|name| box_plot[name].as_f64().unwrap());
        assert!(order.is_sorted() && (0.0..=1.0).contains(&order[0]), "{box_plot}");
    }
    let hit_rates: Vec<f64> =
        text["caches"].as_array().unwrap().iter().map(|c| c["hit_rate"].as_f64().unwrap()).collect();
    assert!(hit_rates.is_sorted() && hit_rates.last().is_some_and(|&rate| rate > 0.999), "{hit_rates:?}");
    for cache in text["caches"].as_array().unwrap() {
        assert!(cache["best_hit_rate"].as_f64() >= cache["hit_rate"].as_f64(), "{cache}");
    }
    let locality: Vec<f64> =
        text["locality"].as_array().unwrap().iter().map(|l| l["share"].as_f64().unwrap()).collect();
    assert!(locality.iter().all(|share| (0.25 * used / experts as f64..=1.0).contains(share)), "{locality:?}");
    // Another way to the same figures.
    let second = profile(
        folder.path(),
        &["--threads", "1", "--memory", &(little_memory("tiny").parse::<u64>().unwrap() + (8 << 20)).to_string()],
    );
    for part in ["frequency", "sparsity", "locality", "load", "statements"] {
        assert_eq!(text[part], second["texts"][0][part], "{part}");
    }
}

/// The statements of the report on the bundled model, beside what its training code counted on held-out records.
#[test]
fn the_reports_statements_are_recomputed_on_the_bundled_model() {
    let folder = tempdir().unwrap();
    let statistics: Value =
        serde_json::from_slice(&fs::read(repo("tests/golden/routing_stats.json")).unwrap()).unwrap();
    let profile = profile(folder.path(), &[]);
    let text = &profile["texts"][0];
    let golden = numbers(&statistics["gate_zero_fraction_per_layer"]);
    let means: Vec<f64> = text["sparsity"].as_array().unwrap().iter().map(|q| q["mean"].as_f64().unwrap()).collect();
    for (layer, (mean, golden)) in means.iter().zip(&golden).enumerate() {
        assert!((mean - golden).abs() < 0.05, "layer {layer}: {mean} here, {golden} there");
    }
    let mean = text["statements"]["mean_sparsity"].as_f64().unwrap();
    assert!((mean - statistics["gate_zero_fraction"].as_f64().unwrap()).abs() < 0.03, "{mean}");
    // A small model trained for balance has few experts that are rarely used; the figure is what its frequencies say.
    let frequency: Vec<f64> = text["frequency"].as_array().unwrap().iter().flat_map(numbers).collect();
    let rare = frequency.iter().filter(|&&share| share < 0.14).count() as f64 / frequency.len() as f64;
    assert_eq!(text["statements"]["rarely_used"].as_f64(), Some(rare));
}

#[test]
fn pictures_have_a_mark_for_each_figure_and_pages_need_nothing_from_elsewhere() {
    let folder = tempdir().unwrap();
    let other = folder.path().join("other text & more.txt");
    fs::write(&other, "What is 3 + 4? 3 + 4 = 7. ".repeat(40)).unwrap();
    let out = folder.path().join("out");
    profile(&out, &["-f", arg(&other)]);
    let expected = [
        "cache.svg",
        "experts-1.svg",
        "experts-2.svg",
        "experts-sorted-1.svg",
        "experts-sorted-2.svg",
        "imatrix.gguf",
        "load.svg",
        "locality.svg",
        "profile.json",
        "report.html",
        "sparsity-1.svg",
        "sparsity-2.svg",
    ];
    assert_eq!(names(&out), expected);
    let read = |name: &str| fs::read_to_string(out.join(name)).unwrap();
    assert_eq!(read("experts-1.svg").matches("class=\"cell\"").count(), 8 * 16);
    assert_eq!(read("sparsity-2.svg").matches("class=\"box\"").count(), 8);
    assert_eq!(read("locality.svg").matches("data-value=").count(), 2 * 7);
    let page = read("report.html");
    assert_eq!(page.matches("class=\"cell\"").count(), 4 * 8 * 16);
    assert!(page.contains("other text &amp; more") && !page.contains("other text & more"));
    for elsewhere in ["src=", "href=", "url(", "@import", "<script"] {
        assert!(!page.contains(elsewhere), "{elsewhere}");
    }
    let addresses = page.matches("://").count();
    assert_eq!(addresses, page.matches("http://www.w3.org/2000/svg").count(), "only the name of SVG");
    // Again, over the same files; but over no others.
    profile(&out, &["-f", arg(&other)]);
    fs::write(out.join("report.html"), "a text of mine").unwrap();
    let refused = run(["profile", "tiny", "-f", arg(&other), "-o", arg(&out)]);
    refused.fails(&["report.html"]);
    assert_eq!(read("report.html"), "a text of mine");
    fs::remove_file(out.join("report.html")).unwrap();
    fs::copy(repo("models/tiny/tiny-q4_0.gguf"), out.join("imatrix.gguf")).unwrap();
    run(["profile", "tiny", "-f", arg(&other), "-o", arg(&out)]).fails(&["imatrix.gguf", "importance matrix"]);
}

#[test]
fn an_importance_matrix_is_written_and_weighs_the_search() {
    let folder = tempdir().unwrap();
    profile_of(folder.path(), "1500", &[]);
    let matrix = folder.path().join("imatrix.gguf");
    let checkpoint = repo("models/tiny/checkpoint");
    let [plain, searched, weighed, f32] =
        ["plain", "searched", "weighed", "f32"].map(|name| folder.path().join(name).with_extension("gguf"));
    run(["quantize", "-q", arg(&checkpoint), "--q4_0", "-o", arg(&plain)]).ok();
    run(["quantize", "-q", arg(&checkpoint), "--q4_0", "--search", "-o", arg(&searched)]).ok();
    run(["quantize", "-q", arg(&checkpoint), "--q4_0", "--imatrix", arg(&matrix), "-o", arg(&weighed)]).ok();
    run(["quantize", "-q", arg(&checkpoint), "--f32", "-o", arg(&f32)]).ok();
    assert_ne!(fs::read(&searched).unwrap(), fs::read(&weighed).unwrap());
    // On text that neither the model nor the matrix has seen.
    let text: String = fs::read_to_string(repo("models/tiny/heldout.txt"))
        .unwrap()
        .lines()
        .skip(1500)
        .take(400)
        .map(|line| format!("{line}\n"))
        .collect();
    let file = folder.path().join("text");
    fs::write(&file, text).unwrap();
    let divergence = |model: &Path| {
        let said =
            run(["perplexity", arg(model), "-q", "-f", arg(&file), "--ctx", "256", "--against", arg(&f32), "--json"])
                .ok();
        let object: Value = serde_json::from_str(&said).unwrap();
        object["against"]["kl_divergence"]["mean"].as_f64().unwrap()
    };
    let [plain, searched, weighed] = [&plain, &searched, &weighed].map(|model| divergence(model));
    // The bundled model was trained for the reference's scales, so which of the three is nearest says nothing of others.
    assert!([plain, searched, weighed].iter().all(|kl| (0.0..0.2).contains(kl)), "{plain} {searched} {weighed}");
    assert!(divergence(&f32).abs() < 1e-12);
    let wrong = folder.path().join("wrong");
    fs::write(&wrong, "no matrix").unwrap();
    run(["quantize", arg(&checkpoint), "--q4_0", "--imatrix", arg(&wrong), "-o", "x.gguf"])
        .fails(&["is no importance matrix"]);
    let other = repo("tests/golden/mini-4b");
    run(["quantize", arg(&other), "--q4_0", "--imatrix", arg(&matrix), "-o", "x.gguf"]).fails(&["another model"]);
    run(["quantize", arg(&checkpoint), "--q8_0", "--imatrix", arg(&matrix), "-o", "x.gguf"])
        .fails(&["needs a Q4_0 output"]);
    assert!(!Path::new("x.gguf").exists());
}
