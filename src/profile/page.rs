//! A profile as pictures, and as one page that opens offline.

use std::fmt::Write as _;

use super::{Cache, Profile, TextProfile};
use crate::picture::{Heat, Lines, Quartiles, Series, boxes, escape, heat, lines};
use crate::size::show_size;

/// How pages begin, so that one can be told from other files.
pub(crate) const BEGIN: &str = "<!doctype html>\n<!-- made by st-tool profile -->";

/// A picture, the name of its file, and its numbers as a table.
pub(crate) struct Picture {
    pub(crate) file: String,
    pub(crate) svg: String,
    caption: String,
    table: Vec<Vec<String>>,
}

/// Every picture of a profile.
pub(crate) fn pictures(profile: &Profile) -> Vec<Picture> {
    let texts = &profile.texts;
    let most = texts.iter().flat_map(|text| text.frequency.iter().flatten()).copied().fold(0.0, f64::max).max(1e-9);
    let several = texts.len() > 1;
    let numbered = |i: usize| if several { format!("-{}", i + 1) } else { String::new() };
    let mut all: Vec<Picture> = Vec::new();
    for (i, text) in texts.iter().enumerate() {
        all.push(sorted(text, most, format!("experts-sorted{}.svg", numbered(i))));
    }
    for (i, text) in texts.iter().enumerate() {
        all.push(in_place(text, most, format!("experts{}.svg", numbered(i))));
    }
    for (i, text) in texts.iter().enumerate() {
        all.push(sparsity(text, i, format!("sparsity{}.svg", numbered(i))));
    }
    all.push(locality(texts));
    all.push(load(texts));
    if texts.iter().any(|text| !text.caches.is_empty()) {
        all.push(found(texts));
    }
    if texts.iter().any(|text| text.caches.iter().any(|cache| cache.tokens_per_second.is_some())) {
        all.push(speed(texts));
    }
    all
}

fn percent(share: f64) -> String {
    format!("{:.1} %", 100.0 * share)
}

fn strings(cells: &[&str]) -> Vec<String> {
    cells.iter().map(|cell| (*cell).to_owned()).collect()
}

/// Rows of a table: one a layer, or the like, with its number in front.
fn rows(head: Vec<String>, rows: impl Iterator<Item = Vec<String>>) -> Vec<Vec<String>> {
    std::iter::once(head)
        .chain(rows.enumerate().map(|(i, row)| std::iter::once(i.to_string()).chain(row).collect()))
        .collect()
}

/// Figure 4: how often experts are chosen, the most frequent first.
fn sorted(text: &TextProfile, most: f64, file: String) -> Picture {
    let mut frequency = text.frequency.clone();
    frequency.iter_mut().for_each(|layer| layer.sort_by(|a, b| b.total_cmp(a)));
    let title = format!("How often experts are chosen: {}", text.name);
    let svg = heat(&Heat {
        title: &title,
        description: "Each row is a layer, each cell an expert, the most frequent at the left; brighter is more frequent.",
        rows: &frequency,
        row: "layer",
        column: "experts of the layer, the most frequent first",
        value: "of tokens",
        most,
        name: &|layer, rank| format!("layer {layer}, rank {}", rank + 1),
    });
    let quarter = |layer: &[f64]| layer.len().div_ceil(4);
    let table = rows(
        strings(&["layer", "most frequent", "median", "least frequent", "share of the busiest quarter"]),
        frequency.iter().map(|layer| {
            let total: f64 = layer.iter().sum::<f64>().max(1e-12);
            vec![
                percent(layer.first().copied().unwrap_or(0.0)),
                percent(layer.get(layer.len() / 2).copied().unwrap_or(0.0)),
                percent(layer.last().copied().unwrap_or(0.0)),
                percent(layer[..quarter(layer)].iter().sum::<f64>() / total),
            ]
        }),
    );
    let s = &text.statements;
    let caption = format!(
        "Figure 4 of the report, of this text: {} of the experts are chosen by fewer than 14 % of the tokens, {} by 40 to 60 %.",
        percent(s.rarely_used),
        percent(s.busy)
    );
    Picture { file, svg, caption, table }
}

/// Figure 5: the same experts in their places, so that texts can be compared.
fn in_place(text: &TextProfile, most: f64, file: String) -> Picture {
    let title = format!("Which experts are chosen: {}", text.name);
    let svg = heat(&Heat {
        title: &title,
        description: "Each row is a layer, each cell an expert in its place; brighter is more frequent. Texts are compared cell by cell.",
        rows: &text.frequency,
        row: "layer",
        column: "expert",
        value: "of tokens",
        most,
        name: &|layer, expert| format!("layer {layer}, expert {expert}"),
    });
    let n_experts = text.frequency.first().map_or(0, Vec::len);
    let head = std::iter::once("layer".to_owned()).chain((0..n_experts).map(|expert| expert.to_string())).collect();
    let table = rows(head, text.frequency.iter().map(|layer| layer.iter().map(|&share| percent(share)).collect()));
    let caption = "Figure 5 of the report: the set of busy experts is another for another kind of text.".to_owned();
    Picture { file, svg, caption, table }
}

/// Figure 6: sparsity by layer.
fn sparsity(text: &TextProfile, series: usize, file: String) -> Picture {
    let title = format!("Neurons that are 0 in chosen experts: {}", text.name);
    let description =
        "For each layer the median, the middle half and nine of ten of the shares of an expert's neurons that are 0.";
    let svg = boxes(&title, description, "layer", "share of neurons that are 0", &text.sparsity, series);
    let table = rows(
        strings(&["layer", "5 %", "25 %", "median", "75 %", "95 %", "mean"]),
        text.sparsity.iter().map(|&Quartiles { p5, p25, median, p75, p95, mean }| {
            [p5, p25, median, p75, p95, mean].map(|share| format!("{share:.3}")).to_vec()
        }),
    );
    let caption = format!(
        "Figure 6 of the report: the least median is {:.3}, the mean over all layers {:.3}. What is 0 is neither multiplied nor read.",
        text.statements.least_median_sparsity, text.statements.mean_sparsity
    );
    Picture { file, svg, caption, table }
}

fn of_texts(texts: &[TextProfile], points: impl Fn(&TextProfile) -> Vec<(f64, f64)>) -> Vec<Series> {
    texts.iter().map(|text| Series { name: text.name.clone(), points: points(text) }).collect()
}

/// A table with a column for each text.
fn by_text(
    first: &str,
    texts: &[TextProfile],
    places: Vec<String>,
    cell: impl Fn(&TextProfile, usize) -> Option<String>,
) -> Vec<Vec<String>> {
    let head = std::iter::once(first.to_owned()).chain(texts.iter().map(|text| text.name.clone())).collect();
    let row = |(i, place): (usize, String)| {
        let cells = texts.iter().map(|text| cell(text, i).unwrap_or_else(|| "–".to_owned()));
        std::iter::once(place).chain(cells).collect()
    };
    std::iter::once(head).chain(places.into_iter().enumerate().map(row)).collect()
}

fn locality(texts: &[TextProfile]) -> Picture {
    let n = texts.first().map_or(0, |text| text.locality.len());
    let name = |i: usize| texts.first().map_or_else(String::new, |text| text.locality[i].distance.to_string());
    let series = of_texts(texts, |text| text.locality.iter().enumerate().map(|(i, l)| (i as f64, l.share)).collect());
    let svg = lines(&Lines {
        title: "Experts that an earlier token chose, too",
        description: "By the distance between two tokens, the share of a token's experts that the earlier one chose in the same layer.",
        across: "distance in tokens",
        upwards: "share of experts",
        series: &series,
        ticks: Some((0..n).map(|i| (i as f64, name(i))).collect()),
    });
    let table =
        by_text("distance", texts, (0..n).map(name).collect(), |text, i| Some(percent(text.locality.get(i)?.share)));
    let caption =
        "What a token's experts have in common with those of a token before it: what keeps a cache useful.".to_owned();
    Picture { file: "locality.svg".into(), svg, caption, table }
}

fn load(texts: &[TextProfile]) -> Picture {
    let n = texts.first().map_or(0, |text| text.load.len());
    let series =
        of_texts(texts, |text| text.load.iter().enumerate().map(|(i, load)| (i as f64, load.largest)).collect());
    let svg = lines(&Lines {
        title: "Load of the busiest expert",
        description: "By layer, how many times the mean load the busiest expert has; 1 would be even.",
        across: "layer",
        upwards: "times the mean load",
        series: &series,
        ticks: None,
    });
    let table = by_text("layer", texts, (0..n).map(|i| i.to_string()).collect(), |text, i| {
        let load = text.load.get(i)?;
        Some(format!("{:.2} × the mean, evenness {:.3}", load.largest, load.evenness))
    });
    let caption =
        "How uneven the load of a layer's experts is. Evenness is the entropy of the load, of its largest value."
            .to_owned();
    Picture { file: "load.svg".into(), svg, caption, table }
}

/// Where a cache stands by its memory, and the name of that axis: small models have all their places within a GiB.
fn memory_axis(texts: &[TextProfile]) -> (impl Fn(&Cache) -> f64, &'static str) {
    let most = texts.iter().flat_map(|text| &text.caches).map(|cache| cache.memory_bytes).max();
    let (unit, name) = match most {
        Some(most) if most < 1 << 30 => (1u64 << 20, "--memory in MiB"),
        _ => (1 << 30, "--memory in GiB"),
    };
    (move |cache: &Cache| cache.memory_bytes as f64 / unit as f64, name)
}

fn memories(texts: &[TextProfile]) -> Vec<String> {
    texts.first().map_or_else(Vec::new, |text| text.caches.iter().map(|cache| show_size(cache.memory_bytes)).collect())
}

fn found(texts: &[TextProfile]) -> Picture {
    let (at, across) = memory_axis(texts);
    let mut series = of_texts(texts, |text| text.caches.iter().map(|cache| (at(cache), cache.hit_rate)).collect());
    if let [text] = texts {
        let points = text.caches.iter().map(|cache| (at(cache), cache.best_hit_rate)).collect();
        series.push(Series { name: "if the future were known".into(), points });
    }
    let svg = lines(&Lines {
        title: "Experts found in memory",
        description: "By the memory of the whole process, the share of experts that a token finds in the cache once that is warm.",
        across,
        upwards: "share found in memory",
        series: &series,
        ticks: None,
    });
    let table = by_text("--memory", texts, memories(texts), |text, i| {
        let cache = text.caches.get(i)?;
        Some(format!("{}, {} read per token", percent(cache.hit_rate), show_size(cache.bytes_read_per_token as u64)))
    });
    let caption =
        "What caches of other sizes would have held of this routing, by the policy that runs have.".to_owned();
    Picture { file: "cache.svg".into(), svg, caption, table }
}

fn speed(texts: &[TextProfile]) -> Picture {
    let (at, across) = memory_axis(texts);
    let series = of_texts(texts, |text| {
        text.caches.iter().filter_map(|cache| Some((at(cache), cache.tokens_per_second?))).collect()
    });
    let svg = lines(&Lines {
        title: "Tokens per second over memory",
        description: "By the memory of the whole process, the speed that is forecast for this machine and its disk.",
        across,
        upwards: "tokens/s, forecast",
        series: &series,
        ticks: None,
    });
    let table = by_text("--memory", texts, memories(texts), |text, i| {
        Some(format!("{:.1} tokens/s", text.caches.get(i)?.tokens_per_second?))
    });
    let caption = "A forecast from what was measured of this machine, not a measurement.".to_owned();
    Picture { file: "speed.svg".into(), svg, caption, table }
}

const STYLE: &str = "\
:root{color-scheme:light dark;--ink:#1f2328;--faint:#59636e;--line:#d1d9e0;--paper:#fff;--panel:#f6f8fa}\
@media(prefers-color-scheme:dark){:root{--ink:#f0f6fc;--faint:#9da7b1;--line:#3d444d;--paper:#0d1117;--panel:#151b23}}\
*{box-sizing:border-box}body{margin:0 auto;max-width:1500px;padding:16px;font:16px/1.5 system-ui,sans-serif;color:var(--ink);\
background:var(--paper)}h1{font-size:1.5rem}h2{font-size:1.2rem;margin-top:2rem}.faint{color:var(--faint)}\
.grid{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,460px),1fr));gap:16px}\
figure{margin:0;border:1px solid var(--line);border-radius:8px;padding:8px;min-width:0}\
.wide{overflow-x:auto}.wide svg{display:block;width:100%;min-width:460px;height:auto}figcaption{color:var(--faint);font-size:.9rem;padding:4px 8px}\
@media(max-width:520px){figure .wide::after{content:\"the rest is to the right \u{2192}\";position:sticky;left:0;\
color:var(--faint);font-size:.8rem}}\
details{padding:4px 8px;font-size:.9rem}summary{cursor:pointer}table{border-collapse:collapse;font-variant-numeric:tabular-nums}\
th,td{padding:2px 10px;text-align:right;border-bottom:1px solid var(--line);white-space:nowrap}th:first-child,td:first-child{text-align:left}\
summary:focus-visible{outline:2px solid #0072b2}";

fn table(caption: &str, rows: &[Vec<String>]) -> String {
    let mut out =
        format!("<div class=\"wide\" tabindex=\"0\"><table><caption class=\"faint\">{}</caption>", escape(caption));
    for (i, row) in rows.iter().enumerate() {
        out.push_str("<tr>");
        for (j, cell) in row.iter().enumerate() {
            let tag = match (i, j) {
                (0, _) => "th scope=\"col\"",
                (_, 0) => "th scope=\"row\"",
                _ => "td",
            };
            let _ = write!(out, "<{tag}>{}</{}>", escape(cell), &tag[..2]);
        }
        out.push_str("</tr>");
    }
    out + "</table></div>"
}

/// The page.
pub(crate) fn page(profile: &Profile, pictures: &[Picture]) -> String {
    let model = escape(&profile.model);
    let mut out = format!(
        "{BEGIN}\n<html lang=\"en\"><head><meta charset=\"utf-8\"><meta name=\"viewport\" content=\"width=device-width,initial-scale=1\">\
         <meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">\
         <title>Profile of {model}</title><style>{STYLE}</style></head><body><main>\n<h1>Profile of {model}</h1>\n\
         <p class=\"faint\">{} layers of {} experts with {} neurons each, {} per expert; a token uses {} experts of every layer.</p>\n",
        profile.layers,
        profile.experts,
        profile.neurons,
        show_size(profile.expert_bytes),
        profile.experts_used
    );
    let head = strings(&[
        "text",
        "tokens",
        "experts rarely used",
        "experts busy",
        "least median sparsity",
        "mean sparsity",
        "chosen again by the next token",
    ]);
    let row = |text: &TextProfile| {
        let s = &text.statements;
        vec![
            text.name.clone(),
            text.tokens.to_string(),
            percent(s.rarely_used),
            percent(s.busy),
            format!("{:.3}", s.least_median_sparsity),
            format!("{:.3}", s.mean_sparsity),
            percent(text.locality.first().map_or(0.0, |locality| locality.share)),
        ]
    };
    let rows: Vec<_> = std::iter::once(head).chain(profile.texts.iter().map(row)).collect();
    out += &table("The texts. Rarely used: by fewer than 14 % of the tokens. Busy: by 40 to 60 %.", &rows);
    out.push_str("\n<div class=\"grid\">\n");
    for picture in pictures {
        let numbers = table(&picture.caption, &picture.table);
        let _ = writeln!(
            out,
            "<figure id=\"{}\"><div class=\"wide\" tabindex=\"0\">{}</div><figcaption>{}</figcaption><details><summary>The numbers</summary>\
             {numbers}</details></figure>",
            escape(picture.file.trim_end_matches(".svg")),
            picture.svg,
            escape(&picture.caption)
        );
    }
    out + "</div></main></body></html>\n"
}
