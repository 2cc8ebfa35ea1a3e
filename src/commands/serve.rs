//! `st-tool serve`: the model over HTTP.

use std::ffi::OsStr;
use std::net::{SocketAddr, TcpListener, ToSocketAddrs as _};
use std::ops::ControlFlow;
use std::path::Path;
use std::process::ExitCode;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Duration;

use anyhow::Context as _;
use serde_json::{Map, Value, json};
use st_gguf::GgufFile;
use st_model::{Engine, LoadOptions, LoadProgress, MemoryPlan, ModelDigest};
use st_server::{Loading, Operator, Record, ServeError, Settings, What, serve};

use super::engine::{self, show_plan};
use super::receipt;
use crate::cli::ServeArgs;
use crate::context::Context;
use crate::models::Model;
use crate::report::Advice;
use crate::{hot, input, ui};

/// A file of keys is not longer.
const MAX_KEYS: u64 = 64 << 10;

pub(crate) fn run(args: &ServeArgs, context: &Context) -> anyhow::Result<ExitCode> {
    context.interrupt.end_at_any_second();
    let keys = keys(args, context)?;
    let listener = listen(args, !keys.is_empty())?;
    let address = listener.local_addr()?;
    let file = engine::open(args.model.as_deref(), context)?;
    let settings = Settings {
        parallel: args.parallel,
        queue: args.queue,
        max_body: usize::try_from(args.max_body).unwrap_or(usize::MAX).min(MAX_BODY),
        prompt_piece: args.prompt_piece,
        draft: args.draft,
        grace: Duration::from_secs(args.grace.into()),
        keys,
        cache: args.cache_dir.clone().map(|folder| (folder, args.cache_size)).filter(|(_, size)| *size > 0),
        cors: args.cors.iter().map(|origin| origin.trim_end_matches('/').to_owned()).collect(),
        receipts: receipts(args, &file, context)?,
        ..named(args, &file)?
    };
    let options = LoadOptions {
        sequences: args.parallel,
        beside: settings.memory(engine::vocabulary(&file)),
        hot: engine::hot(&file, &args.engine, context),
        ..engine::options(&args.engine, args.ctx, args.kv_type)
    };
    context.ui.note(format_args!("note: the model is loading; http://{address}/health tells how far it is"));
    let (file, loaded) = (Mutex::new(Some(file)), OnceLock::new());
    let here = Here { context, address, options, log_json: args.log_json, file, loaded };
    let served = serve(listener, settings, &here);
    if let Some(engine) = here.loaded.get() {
        hot::keep(engine, context);
    }
    match served {
        Ok(()) => Ok(ExitCode::SUCCESS),
        Err(ServeError::Load(error)) => Err(error),
        Err(error) => Err(error.into()),
    }
}

/// Larger requests than this hold more than any context.
const MAX_BODY: usize = 1 << 30;

/// What receipts say of the model, where they are given.
fn receipts(
    args: &ServeArgs,
    file: &GgufFile,
    context: &Context,
) -> anyhow::Result<Option<Arc<(String, ModelDigest)>>> {
    if !args.receipts {
        return Ok(None);
    }
    let name = args.model.as_deref().map_or("tiny".into(), OsStr::to_string_lossy).into_owned();
    Ok(Some(Arc::new((name, receipt::digest(file, engine::threads(&args.engine), context)?))))
}

/// The names of the model, and what it says of itself.
fn named(args: &ServeArgs, file: &GgufFile) -> anyhow::Result<Settings> {
    let model = Model::resolve(args.model.as_deref().unwrap_or("tiny".as_ref()))?;
    let own = model.file_stem();
    let mut names = args.alias.clone();
    if !names.contains(&own) {
        names.push(own);
    }
    let mut about = Map::new();
    if let Some(name) = model.path().and_then(Path::file_name) {
        about.insert("file".to_owned(), json!(name.to_string_lossy()));
    }
    if let Ok(Some(name)) = file.header.metadata.str("general.name") {
        about.insert("name".to_owned(), Value::from(name));
    }
    Ok(Settings { names, about, ..Settings::new("") })
}

/// The keys of which a request must have one.
fn keys(args: &ServeArgs, context: &Context) -> anyhow::Result<Vec<String>> {
    let of_file =
        args.api_key_file.as_deref().map(|path| input::text(path, MAX_KEYS, "more than keys take", &context.interrupt));
    let of_environment = || context.env.api_key.clone().filter(|_| !args.no_auth);
    let Some(text) = of_file.transpose()?.or_else(|| args.api_key.clone()).or_else(of_environment) else {
        return Ok(Vec::new());
    };
    let keys: Vec<String> = text.lines().map(str::trim).filter(|key| !key.is_empty()).map(str::to_owned).collect();
    match keys.is_empty() {
        true => Err(Advice::new("there is no key in what is given as one", "--no-auth goes without").into()),
        false => Ok(keys),
    }
}

/// Begins to listen, at addresses of other machines only where a key is asked for.
fn listen(args: &ServeArgs, has_key: bool) -> anyhow::Result<TcpListener> {
    let name = args.host.trim_start_matches('[').trim_end_matches(']');
    let cannot = || format!("cannot listen on {}", args.host);
    let addresses: Vec<SocketAddr> = (name, args.port).to_socket_addrs().with_context(cannot)?.collect();
    if !has_key && !args.no_auth && addresses.iter().any(|address| !address.ip().is_loopback()) {
        let message = format!("{} can be reached from other machines, and no key is asked for", args.host);
        let hint = "--api-key-file FILE names what requests must bring; --no-auth lets everybody in";
        return Err(Advice::new(message, hint).into());
    }
    TcpListener::bind(addresses.as_slice()).with_context(|| format!("cannot listen on {name}, port {}", args.port))
}

/// The program as the server's operator.
struct Here<'a> {
    context: &'a Context,
    address: SocketAddr,
    options: LoadOptions,
    log_json: bool,
    /// Taken when it is loaded.
    file: Mutex<Option<GgufFile>>,
    loaded: OnceLock<Arc<Engine>>,
}

impl Operator for Here<'_> {
    type Error = anyhow::Error;

    fn load(&self, follow: &Loading<'_>) -> anyhow::Result<Arc<Engine>> {
        let file = self.file.lock().unwrap_or_else(PoisonError::into_inner).take();
        let file = file.context("the model was loaded already")?;
        let engine =
            engine::load_with(file, self.options.clone(), &Progress { context: self.context, follow }, self.context)?;
        Ok(Arc::clone(self.loaded.get_or_init(|| engine)))
    }

    fn ready(&self, _: &Engine) {
        // Who started the server may have gone, and others still want answers.
        let _ = ui::print(&format!("http://{}\n", self.address));
    }

    fn told(&self, record: &Record) {
        match (self.log_json, &record.what) {
            (true, _) => ui::log(&record.json()),
            (false, What::Failed(why)) => self.context.ui.note(format_args!("note: a step failed: {why}")),
            (false, _) => {}
        }
    }

    fn should_end(&self) -> bool {
        self.context.interrupt.raised()
    }
}

/// Shows the plan, and tells the server how far the loading is.
struct Progress<'a> {
    context: &'a Context,
    follow: &'a Loading<'a>,
}

impl LoadProgress for Progress<'_> {
    fn planned(&self, plan: &MemoryPlan) {
        self.follow.planned(plan);
        show_plan(plan, self.context);
    }

    fn reading(&self) -> ControlFlow<()> {
        self.context.interrupt.flow()
    }

    fn loaded(&self, bytes: u64) {
        self.follow.loaded(bytes);
    }
}
