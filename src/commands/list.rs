//! `st-tool list` and `st-tool rm`: which models are here, in the hub's cache and in the store, and removing one.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::Context as _;
use serde_json::json;
use st_gguf::GgufFile;
use st_hub::{HeldRepo, Hub, Published, RepoId, TypeTag};

use super::inspect::by_type;
use crate::cli::{ListArgs, RmArgs};
use crate::context::Context;
use crate::get::{Wanted, can_ask, confirmed};
use crate::models::Model;
use crate::report::Advice;
use crate::repos::{hub, short_name};
use crate::shown::escaped;
use crate::size::show_size;
use crate::store::{Store, Unfinished};
use crate::{table, ui};

/// The type of what was cut off while it was fetched or made.
const NOT_WHOLE: &str = "not whole";

/// Where a model is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Place {
    Hub,
    Store,
}

/// One model that is here.
#[derive(Debug)]
struct Row {
    repo: RepoId,
    place: Place,
    /// The file, or the folder of a checkpoint.
    path: PathBuf,
    /// The name of the file; that of a checkpoint is empty.
    file: String,
    /// Files inside the repository, where it is in the hub's cache.
    names: Vec<String>,
    ty: String,
    bytes: u64,
    last_used: Option<SystemTime>,
    /// What there is of a file that is not whole.
    unfinished: Option<Unfinished>,
}

pub(crate) fn run(args: &ListArgs, context: &Context) -> anyhow::Result<ExitCode> {
    let rows = rows(&hub(context), &Store::new(&context.env.store))?;
    if args.json {
        let models: Vec<_> = rows.iter().map(Row::json).collect();
        ui::print_json(&json!({ "models": models }))?;
    } else if rows.is_empty() {
        context.ui.note("no model is here; `st-tool run tiny` needs none, `st-tool run 4b` fetches one");
    } else {
        ui::print(&table(&rows))?;
    }
    Ok(ExitCode::SUCCESS)
}

fn table(rows: &[Row]) -> String {
    let head = ["model", "file", "type", "size", "last used", "in"].map(str::to_owned).to_vec();
    let cells = |row: &Row| {
        let used = row.last_used.and_then(|used| used.elapsed().ok()).map_or_else(String::new, ago);
        let place = if row.place == Place::Hub { "hub cache" } else { "store" };
        [
            escaped(&short_name(&row.repo)),
            escaped(&row.file),
            row.ty.clone(),
            show_size(row.bytes),
            used,
            place.to_owned(),
        ]
        .to_vec()
    };
    table::markdown(&std::iter::once(head).chain(rows.iter().map(cells)).collect::<Vec<_>>())
}

fn ago(time: Duration) -> String {
    let hours = time.as_secs() / 3600;
    match hours {
        0 => "now".to_owned(),
        1..48 => format!("{hours} h ago"),
        _ => format!("{} days ago", hours / 24),
    }
}

impl Row {
    fn json(&self) -> serde_json::Value {
        let seconds = |time: SystemTime| time.duration_since(UNIX_EPOCH).ok().map(|since| since.as_secs());
        json!({
            "model": self.repo.as_str(),
            "file": Some(&self.file).filter(|file| !file.is_empty()),
            "type": self.ty,
            "bytes": self.bytes,
            "last_used": self.last_used.and_then(seconds),
            "place": if self.place == Place::Hub { "hub" } else { "store" },
            "path": self.path.display().to_string(),
        })
    }
}

/// Everything that is here, by the names of the repositories.
fn rows(hub: &Hub, store: &Store) -> anyhow::Result<Vec<Row>> {
    let mut rows: Vec<Row> = hub.held()?.iter().flat_map(of_hub).collect();
    for (repo, files) in store.all() {
        rows.extend(files.into_iter().filter_map(|path| of_store(&repo, path)));
    }
    for (repo, conversions) in store.unfinished() {
        rows.extend(conversions.into_iter().map(|unfinished| of_unfinished(&repo, unfinished)));
    }
    rows.sort_by(|a, b| (a.repo.as_str(), &a.file, &a.path).cmp(&(b.repo.as_str(), &b.file, &b.path)));
    Ok(rows)
}

fn of_store(repo: &RepoId, path: PathBuf) -> Option<Row> {
    let metadata = fs::metadata(&path).ok()?;
    Some(Row {
        repo: repo.clone(),
        place: Place::Store,
        file: path.file_name().unwrap_or_default().to_string_lossy().into_owned(),
        names: Vec::new(),
        ty: type_of(&path).unwrap_or_else(|| "?".to_owned()),
        bytes: metadata.len(),
        last_used: metadata.accessed().ok(),
        path,
        unfinished: None,
    })
}

fn of_unfinished(repo: &RepoId, unfinished: Unfinished) -> Row {
    let modified = |part: &PathBuf| fs::metadata(part).and_then(|metadata| metadata.modified()).ok();
    Row {
        repo: repo.clone(),
        place: Place::Store,
        file: unfinished.file.file_name().unwrap_or_default().to_string_lossy().into_owned(),
        names: Vec::new(),
        ty: NOT_WHOLE.to_owned(),
        bytes: unfinished.bytes(),
        last_used: unfinished.parts.iter().filter_map(modified).max(),
        path: unfinished.file.clone(),
        unfinished: Some(unfinished),
    }
}

/// The SmallThinker models of a repository in the hub's cache.
fn of_hub(held: &HeldRepo) -> Vec<Row> {
    let row = |file: &str, path: &Path, names: Vec<String>, ty: String| {
        let of = held.files.iter().filter(|file| names.contains(&file.name));
        Row {
            repo: held.repo.clone(),
            place: Place::Hub,
            file: file.to_owned(),
            path: path.to_owned(),
            ty,
            bytes: of.clone().map(|file| file.bytes).sum(),
            last_used: of.filter_map(|file| file.last_used).max(),
            names,
            unfinished: None,
        }
    };
    let mut rows = Vec::new();
    for model in Published::all(&held.listed()) {
        let names: Vec<String> = model.files.iter().map(|file| file.path.clone()).collect();
        let Some(first) = held.files.iter().find(|file| file.name == names[0]) else { continue };
        if let Some(ty) = type_of(&first.path) {
            let file = names[0].clone();
            rows.push(row(&file, &first.path, names, ty));
        }
    }
    let config = held.files.iter().find(|file| file.name == "config.json");
    let says = config.and_then(|config| fs::read_to_string(&config.path).ok()).unwrap_or_default();
    if let (Some(config), true) = (config, says.contains("SmallThinkerForCausalLM")) {
        let names = held.files.iter().map(|file| file.name.clone()).filter(|name| !name.ends_with(".gguf")).collect();
        rows.push(row("", config.path.parent().unwrap_or(Path::new("")), names, "checkpoint".to_owned()));
    }
    if rows.is_empty() && held.files.is_empty() && held.repo.as_str().contains("SmallThinker") {
        rows.push(Row { bytes: held.bytes, ..row("", Path::new(""), Vec::new(), NOT_WHOLE.to_owned()) });
    }
    rows
}

/// The type of most bytes of a SmallThinker file; `None` for another.
fn type_of(path: &Path) -> Option<String> {
    let file = GgufFile::open(path).ok()?;
    let architecture = file.header.metadata.str("general.architecture").ok().flatten()?;
    (architecture == "smallthinker").then(|| by_type(&file.header).first().map_or("?", |first| first.0).to_owned())
}

pub(crate) fn rm(args: &RmArgs, context: &Context) -> anyhow::Result<ExitCode> {
    let wanted = match Model::resolve(&args.model)? {
        Model::Hub(wanted) => wanted,
        Model::Tiny => return Err(not_fetched("the bundled model is a part of this program")),
        Model::File(path) | Model::Folder(path) => {
            return Err(not_fetched(&format!(
                "{} is not in the hub's cache or in the store by this name",
                path.display()
            )));
        }
    };
    let (hub, store) = (hub(context), Store::new(&context.env.store));
    let rows: Vec<Row> = rows(&hub, &store)?.into_iter().filter(|row| is_of(row, &wanted)).collect();
    if rows.is_empty() {
        return Err(Advice::new(format!("nothing of {wanted} is here"), "st-tool list shows what is here").into());
    }
    if let Some(row) = rows.iter().find(|row| row.unfinished.as_ref().is_some_and(Unfinished::is_under_way)) {
        let message = format!("{} is being made by another program", row.path.display());
        return Err(Advice::new(message, "stop that one first, or let it end").into());
    }
    let bytes: u64 = rows.iter().map(|row| row.bytes).sum();
    if !context.yes && !can_ask() {
        let message = format!("{} of {wanted} would be removed, and nobody can be asked", show_size(bytes));
        return Err(Advice::new(message, format!("st-tool rm {wanted} --yes removes it")).into());
    }
    for row in &rows {
        let what = if row.path.as_os_str().is_empty() { row.repo.to_string() } else { row.path.display().to_string() };
        context.ui.note(format_args!("{:>10}  {what}", show_size(row.bytes)));
    }
    if !context.yes && !confirmed(&format!("Remove {}? [y/N] ", show_size(bytes)), false, context)? {
        return Err(Advice::new("nothing was removed", "y removes what is listed").into());
    }
    for row in &rows {
        remove(row, &hub, &store)?;
    }
    context.ui.note(format_args!("{} removed", show_size(bytes)));
    Ok(ExitCode::SUCCESS)
}

fn not_fetched(message: &str) -> anyhow::Error {
    Advice::new(message, "rm removes what was fetched from the hub, and what was made of that; st-tool list shows it")
        .into()
}

/// Whether a model is what is to be removed: all of a repository and its GGUF files, or one type.
fn is_of(row: &Row, wanted: &Wanted) -> bool {
    let same = |a: &RepoId, b: &RepoId| a.is_same(b);
    let of_repo = same(&row.repo, &wanted.repo) || wanted.gguf_repos().iter().any(|repo| same(&row.repo, repo));
    let stem = Path::new(&row.file).file_stem().and_then(|stem| stem.to_str()).unwrap_or_default();
    let is_type = |ty: &TypeTag| !stem.is_empty() && (ty.ends(stem.trim_end_matches("-offload")) || ty.ends(stem));
    of_repo && wanted.ty.as_ref().is_none_or(is_type)
}

/// Whether a file is no weights.
fn is_small(name: &str) -> bool {
    ![".gguf", ".safetensors", ".bin", ".pt"].iter().any(|ending| name.ends_with(ending))
}

fn remove(row: &Row, hub: &Hub, store: &Store) -> anyhow::Result<()> {
    match row.place {
        Place::Store => {
            match &row.unfinished {
                Some(unfinished) => unfinished.remove()?,
                None => fs::remove_file(&row.path).with_context(|| format!("cannot remove {}", row.path.display()))?,
            }
            store.tidy(&row.repo);
        }
        Place::Hub => {
            hub.remove_files(&row.repo, &row.names)?;
            // Nor is the rest of use without what was removed.
            if hub.held_of(&row.repo)?.is_some_and(|held| held.files.iter().all(|file| is_small(&file.name))) {
                hub.remove(&row.repo)?;
            }
        }
    }
    Ok(())
}
