//! A hub on loopback: the HTTP interface of the Hugging Face hub for one repository, and misbehaviour on demand.
//!
//! Two listeners play two hosts: the hub itself (repository info, tree, resolve) and a storage host that large files
//! are redirected to. Every request is logged. A [`Fault`] is queued for a file and spoils one request for it.

use std::collections::{BTreeMap, VecDeque};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use sha1::{Digest as _, Sha1};
use sha2::Sha256;

pub(crate) const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

/// What spoils a request. Queued with [`Server::spoil`]; each is used once.
#[derive(Debug, Clone)]
pub(crate) enum Fault {
    /// The hub answers with this status and these headers.
    Status(u16, Vec<(&'static str, String)>),
    /// The connection ends after this many bytes of the body.
    CutAfter(usize),
    /// After this many bytes of the body nothing more is sent, but the connection stays.
    StallAfter(usize),
    /// The whole file, with status 200, whatever range was asked for.
    IgnoreRange,
    /// Status 206, but the range starts this many bytes early.
    EarlyRange(u64),
    /// The byte at this offset of the file is another one.
    WrongByte(u64),
    /// `Content-Length` and body have this many bytes, whatever the file has.
    Length(u64),
    /// A chunked body with this many bytes after the file's own.
    Extra(usize),
    /// The hub states this `X-Linked-Size`.
    LinkedSize(u64),
    /// The hub states this `X-Linked-Etag`.
    LinkedEtag(String),
    /// The hub redirects there.
    RedirectTo(String),
    /// The hub answers with this type of content and this body.
    Instead(&'static str, &'static str),
}

impl Fault {
    pub(crate) fn status(status: u16) -> Fault {
        Fault::Status(status, Vec::new())
    }

    /// Whether it is the host that states the identity, and not the one that sends the body, that misbehaves.
    fn is_of_the_hub(&self) -> bool {
        matches!(
            self,
            Fault::Status(..) | Fault::LinkedSize(_) | Fault::LinkedEtag(_) | Fault::RedirectTo(_) | Fault::Instead(..)
        )
    }
}

/// One file, either in memory or a block repeated to any length.
#[derive(Debug, Clone)]
pub(crate) struct RepoFile {
    pub(crate) block: Arc<Vec<u8>>,
    pub(crate) size: u64,
    pub(crate) large: bool,
    /// SHA-256 of large files, git's SHA-1 of others.
    pub(crate) etag: String,
    /// Size stated in the listing, when it is not the real one.
    pub(crate) listed_size: Option<u64>,
}

impl RepoFile {
    pub(crate) fn small(content: impl Into<Vec<u8>>) -> RepoFile {
        let block = content.into();
        let mut hash = Sha1::new_with_prefix(format!("blob {}\0", block.len()));
        hash.update(&block);
        RepoFile::new(block, false, hex(&hash.finalize()))
    }

    pub(crate) fn large(content: impl Into<Vec<u8>>) -> RepoFile {
        let block = content.into();
        let etag = hex(&Sha256::digest(&block));
        RepoFile::new(block, true, etag)
    }

    /// A large file of `size` bytes (for measuring) that takes one MiB of memory.
    pub(crate) fn huge(size: u64) -> RepoFile {
        let block = pattern(1 << 20, 7);
        let mut hash = Sha256::new();
        let mut left = size;
        while left > 0 {
            let n = left.min(block.len() as u64);
            hash.update(&block[..n as usize]);
            left -= n;
        }
        RepoFile { size, ..RepoFile::new(block, true, hex(&hash.finalize())) }
    }

    fn new(block: Vec<u8>, large: bool, etag: String) -> RepoFile {
        RepoFile { size: block.len() as u64, block: Arc::new(block), large, etag, listed_size: None }
    }

    pub(crate) fn content(&self) -> &[u8] {
        &self.block
    }
}

/// Bytes that look random and are always the same.
pub(crate) fn pattern(len: usize, seed: u64) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 32) as u8
    };
    (0..len).map(|_| next()).collect()
}

pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

/// One request as it arrived.
#[derive(Debug, Clone)]
pub(crate) struct Seen {
    pub(crate) storage: bool,
    /// Path and query, as sent.
    pub(crate) target: String,
    /// The repository's file it is about, if any.
    pub(crate) file: Option<String>,
    pub(crate) range: Option<String>,
    pub(crate) authorization: Option<String>,
}

#[derive(Default)]
pub(crate) struct Settings {
    pub(crate) repo: String,
    pub(crate) files: BTreeMap<String, RepoFile>,
    /// Requests to the hub without this token are refused.
    pub(crate) token: Option<String>,
    /// Everybody is refused for want of an accepted licence.
    pub(crate) gated: bool,
    /// Files per page of the listing; 0 means all.
    pub(crate) page: usize,
    /// The commit that the repository info states.
    pub(crate) commit: Option<String>,
    /// Names that the repository had before it moved, and how that is told.
    pub(crate) former: Vec<String>,
    pub(crate) moved: Moved,
    /// The mirror has no address for the listing of files.
    pub(crate) no_listing: bool,
    /// Every request is written to stderr as `HOST METHOD TARGET RANGE`.
    pub(crate) echo: bool,
}

/// The redirect from a former name.
pub(crate) struct Moved {
    pub(crate) status: u16,
    /// What stands in front of the path; nothing for a relative location.
    pub(crate) base: String,
}

impl Default for Moved {
    fn default() -> Moved {
        Moved { status: 307, base: String::new() }
    }
}

struct Shared {
    settings: Mutex<Settings>,
    faults: Mutex<BTreeMap<String, VecDeque<Fault>>>,
    log: Mutex<Vec<Seen>>,
    storage: SocketAddr,
    stop: AtomicBool,
}

/// The two running hosts. Dropping it stops them.
pub(crate) struct Server {
    shared: Arc<Shared>,
    hub: SocketAddr,
}

impl Server {
    pub(crate) fn start(settings: Settings) -> Server {
        let hub = TcpListener::bind("127.0.0.1:0").unwrap();
        let storage = TcpListener::bind("127.0.0.1:0").unwrap();
        let shared = Arc::new(Shared {
            settings: Mutex::new(settings),
            faults: Mutex::default(),
            log: Mutex::default(),
            storage: storage.local_addr().unwrap(),
            stop: AtomicBool::new(false),
        });
        let address = hub.local_addr().unwrap();
        for (listener, is_storage) in [(hub, false), (storage, true)] {
            let shared = Arc::clone(&shared);
            thread::spawn(move || {
                for stream in listener.incoming() {
                    if shared.stop.load(Ordering::Relaxed) {
                        return;
                    }
                    let shared = Arc::clone(&shared);
                    let stream = stream.unwrap();
                    thread::spawn(move || {
                        // A client that goes away is no failure of the server.
                        let _ = shared.serve(&stream, is_storage);
                        let _ = stream.shutdown(Shutdown::Both);
                    });
                }
            });
        }
        Server { shared, hub: address }
    }

    pub(crate) fn endpoint(&self) -> String {
        format!("http://{}", self.hub)
    }

    /// Queues a fault for a file, or for `"info"` or `"tree"`.
    pub(crate) fn spoil(&self, file: &str, fault: Fault) {
        self.shared.faults.lock().unwrap().entry(file.to_owned()).or_default().push_back(fault);
    }

    /// Drops the faults that were not met.
    pub(crate) fn heal(&self) {
        self.shared.faults.lock().unwrap().clear();
    }

    pub(crate) fn change(&self, change: impl FnOnce(&mut Settings)) {
        change(&mut self.shared.settings.lock().unwrap());
    }

    pub(crate) fn log(&self) -> Vec<Seen> {
        self.shared.log.lock().unwrap().clone()
    }

    pub(crate) fn forget(&self) {
        self.shared.log.lock().unwrap().clear();
    }

    /// The `Range` headers of the requests that reached the host which sends the file, in order.
    pub(crate) fn ranges(&self, file: &str) -> Vec<Option<String>> {
        let large = self.shared.settings.lock().unwrap().files[file].large;
        let sends = |seen: &&Seen| seen.file.as_deref() == Some(file) && seen.storage == large;
        self.log().iter().filter(sends).map(|seen| seen.range.clone()).collect()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Relaxed);
        for address in [self.hub, self.shared.storage] {
            let _ = TcpStream::connect(address);
        }
    }
}

struct Request {
    method: String,
    target: String,
    headers: BTreeMap<String, String>,
}

fn read_request(reader: &mut impl BufRead) -> std::io::Result<Option<Request>> {
    let mut line = String::new();
    if reader.read_line(&mut line)? == 0 {
        return Ok(None);
    }
    let mut words = line.split_whitespace().map(str::to_owned);
    let (method, target) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
    let mut headers = BTreeMap::new();
    loop {
        let mut line = String::new();
        reader.read_line(&mut line)?;
        match line.trim_end().split_once(':') {
            Some((name, value)) => headers.insert(name.to_ascii_lowercase(), value.trim().to_owned()),
            None => return Ok(Some(Request { method, target, headers })),
        };
    }
}

impl Shared {
    fn serve(&self, stream: &TcpStream, is_storage: bool) -> std::io::Result<()> {
        stream.set_nodelay(true)?;
        let mut reader = BufReader::new(stream);
        while let Some(request) = read_request(&mut reader)? {
            let goes_on = if is_storage { self.storage(stream, &request)? } else { self.hub(stream, &request)? };
            if !goes_on {
                break;
            }
        }
        Ok(())
    }

    fn note(&self, request: &Request, storage: bool, echo: bool, file: Option<&str>) {
        if echo {
            let host = if storage { "storage" } else { "hub" };
            let range = request.headers.get("range").map_or("-", String::as_str);
            let _ = writeln!(std::io::stderr(), "{host} {} {} {range}", request.method, request.target);
        }
        self.log.lock().unwrap().push(Seen {
            storage,
            target: request.target.clone(),
            file: file.map(str::to_owned),
            range: request.headers.get("range").cloned(),
            authorization: request.headers.get("authorization").cloned(),
        });
    }

    fn fault(&self, file: &str, of_the_hub: bool) -> Option<Fault> {
        let mut faults = self.faults.lock().unwrap();
        let queue = faults.get_mut(file)?;
        if queue.front()?.is_of_the_hub() == of_the_hub { queue.pop_front() } else { None }
    }

    fn hub(&self, stream: &TcpStream, request: &Request) -> std::io::Result<bool> {
        let settings = self.settings.lock().unwrap();
        let repo = settings.repo.clone();
        let (path, query) = request.target.split_once('?').unwrap_or((&request.target, ""));
        let path = decode(path);
        let route = Route::of(&path, &repo);
        let subject = match &route {
            Route::Info(_) => Some("info".to_owned()),
            Route::Tree(_) => Some("tree".to_owned()),
            Route::Resolve(_, file) => Some((*file).to_owned()),
            Route::Unknown => None,
        };
        let file_name = if let Route::Resolve(_, file) = &route { Some(*file) } else { None };
        self.note(request, false, settings.echo, file_name);

        if let Some(token) = &settings.token
            && request.headers.get("authorization") != Some(&format!("Bearer {token}"))
        {
            return answer(stream, request, 401, &[], b"");
        }
        if let Some(rest) = settings.former.iter().find_map(|former| without_name(&request.target, former)) {
            let location = format!("{}{}", settings.moved.base, rest.replace("{}", &repo));
            // The entity tag is that of the redirect's own body, as some frameworks give one.
            let headers = [("Location", location), ("ETag", "W/\"53-redirect\"".to_owned())];
            return answer(stream, request, settings.moved.status, &headers, b"Moved");
        }
        if settings.gated {
            return answer(stream, request, 403, &[("X-Error-Code", "GatedRepo".into())], b"");
        }
        let fault = subject.and_then(|subject| self.fault(&subject, true));
        if let Some(Fault::Status(status, headers)) = &fault {
            return answer(stream, request, *status, headers, b"spoilt");
        }
        if let Some(Fault::RedirectTo(target)) = &fault {
            return answer(stream, request, 302, &[("Location", target.clone())], b"");
        }
        if let Some(Fault::Instead(kind, body)) = fault {
            return answer(stream, request, 200, &[("Content-Type", kind.to_owned())], body.as_bytes());
        }
        if settings.no_listing && matches!(route, Route::Tree(_)) {
            return answer(stream, request, 404, &[], b"");
        }
        let revision_is_known = |revision: &str| ["main", "v1", "refs/pr/1", COMMIT].contains(&revision);
        match route {
            Route::Unknown => answer(stream, request, 404, &[("X-Error-Code", "RepoNotFound".into())], b""),
            Route::Info(revision) | Route::Tree(revision) | Route::Resolve(revision, _)
                if !revision_is_known(revision) =>
            {
                answer(stream, request, 404, &[("X-Error-Code", "RevisionNotFound".into())], b"")
            }
            Route::Info(_) => {
                let siblings: Vec<_> =
                    settings.files.keys().map(|path| serde_json::json!({ "rfilename": path })).collect();
                let sha = settings.commit.as_deref().unwrap_or(COMMIT);
                let info = serde_json::json!({ "id": repo, "modelId": repo, "sha": sha, "siblings": siblings,
                    "private": false, "downloads": 0, "likes": 0, "tags": [] });
                answer(stream, request, 200, &[], info.to_string().as_bytes())
            }
            Route::Tree(_) => {
                let (body, next) = listing(&settings, query);
                let mut headers = vec![("Content-Type", "application/json".to_owned())];
                if let Some(cursor) = next {
                    let address = request.headers.get("host").cloned().unwrap_or_default();
                    let link =
                        format!("<http://{address}{}?recursive=true&cursor={cursor}>; rel=\"next\"", encoded(&path));
                    headers.push(("Link", link));
                }
                answer(stream, request, 200, &headers, body.as_bytes())
            }
            Route::Resolve(_, name) => {
                let Some(file) = settings.files.get(name).cloned() else {
                    return answer(stream, request, 404, &[("X-Error-Code", "EntryNotFound".into())], b"");
                };
                drop(settings);
                self.resolve(stream, request, name, &file, fault)
            }
        }
    }

    fn resolve(
        &self,
        stream: &TcpStream,
        request: &Request,
        name: &str,
        file: &RepoFile,
        fault: Option<Fault>,
    ) -> std::io::Result<bool> {
        let mut headers = vec![("X-Repo-Commit", COMMIT.to_owned())];
        let size = if let Some(Fault::LinkedSize(n)) = fault { Some(n) } else { file.large.then_some(file.size) };
        let etag = if let Some(Fault::LinkedEtag(e)) = fault { Some(e) } else { file.large.then(|| file.etag.clone()) };
        headers.extend(size.map(|n| ("X-Linked-Size", n.to_string())));
        headers.extend(etag.map(|e| ("X-Linked-Etag", format!("\"{e}\""))));
        if file.large {
            let target = format!("http://{}/{}?signature=secret", self.storage, encoded(name));
            headers.push(("Location", target));
            return answer(stream, request, 302, &headers, b"");
        }
        headers.push(("ETag", format!("\"{}\"", file.etag)));
        self.send(stream, request, name, file, headers)
    }

    fn storage(&self, stream: &TcpStream, request: &Request) -> std::io::Result<bool> {
        let path = request.target.split('?').next().unwrap_or_default();
        let name = decode(path.trim_start_matches('/'));
        let (echo, file) = {
            let settings = self.settings.lock().unwrap();
            (settings.echo, settings.files.get(&name).cloned())
        };
        self.note(request, true, echo, Some(&name));
        let Some(file) = file else {
            return answer(stream, request, 404, &[], b"");
        };
        // Storage hosts have entity tags of their own, which are no content hashes.
        self.send(stream, request, &name, &file, vec![("ETag", "\"storage\"".to_owned())])
    }

    /// The body of a file, or the range asked for, spoilt by the next fault.
    fn send(
        &self,
        mut stream: &TcpStream,
        request: &Request,
        name: &str,
        file: &RepoFile,
        mut headers: Vec<(&'static str, String)>,
    ) -> std::io::Result<bool> {
        let fault = self.fault(name, false);
        let range =
            request.headers.get("range").and_then(|r| r.strip_prefix("bytes=")?.strip_suffix('-')?.parse().ok());
        let mut from: u64 = if matches!(fault, Some(Fault::IgnoreRange)) { 0 } else { range.unwrap_or(0) };
        if let Some(Fault::EarlyRange(n)) = fault {
            from = from.saturating_sub(n);
        }
        if from > 0 && from >= file.size {
            headers.push(("Content-Range", format!("bytes */{}", file.size)));
            return answer(stream, request, 416, &headers, b"");
        }
        let mut until = file.size;
        if let Some(Fault::Length(n)) = fault {
            until = from + n;
        }
        let status = if range.is_some() && !matches!(fault, Some(Fault::IgnoreRange)) { 206 } else { 200 };
        if status == 206 {
            headers.push(("Content-Range", format!("bytes {from}-{}/{}", until - 1, file.size)));
        }
        headers.push(("Accept-Ranges", "bytes".to_owned()));
        let extra = if let Some(Fault::Extra(n)) = fault { Some(n) } else { None };
        match extra {
            Some(_) => headers.push(("Transfer-Encoding", "chunked".to_owned())),
            None => headers.push(("Content-Length", (until - from).to_string())),
        }
        stream.write_all(head(status, &headers).as_bytes())?;
        if request.method == "HEAD" {
            return Ok(true);
        }
        if let Some(extra) = extra {
            let total = (until - from) as usize + extra;
            write!(stream, "{total:x}\r\n")?;
        }
        let stop_at = match fault {
            Some(Fault::CutAfter(n) | Fault::StallAfter(n)) => until.min(from + n as u64),
            _ => until,
        };
        let wrong = if let Some(Fault::WrongByte(at)) = fault { Some(at) } else { None };
        write_content(stream, file, from, stop_at, wrong)?;
        if let Some(extra) = extra {
            stream.write_all(&vec![b'+'; extra])?;
            stream.write_all(b"\r\n0\r\n\r\n")?;
        }
        match fault {
            Some(Fault::StallAfter(_)) => {
                // Until the client gives up and closes, or the test is over.
                stream.set_read_timeout(Some(Duration::from_secs(60)))?;
                let _ = stream.read(&mut [0]);
                Ok(false)
            }
            Some(Fault::CutAfter(_)) => Ok(false),
            _ => Ok(true),
        }
    }
}

fn write_content(
    mut stream: &TcpStream,
    file: &RepoFile,
    from: u64,
    until: u64,
    wrong: Option<u64>,
) -> std::io::Result<()> {
    let len = file.block.len() as u64;
    let mut at = from;
    while at < until {
        let start = at % len.max(1);
        let n = (len - start).min(until - at).max(u64::from(len == 0));
        let piece = file.block.get(start as usize..(start + n) as usize).unwrap_or(b"?");
        match wrong.filter(|wrong| (at..at + n).contains(wrong)) {
            Some(wrong) => {
                let mut piece = piece.to_vec();
                piece[(wrong - at) as usize] ^= 0x40;
                stream.write_all(&piece)?;
            }
            None => stream.write_all(piece)?,
        }
        at += n;
    }
    Ok(())
}

/// The target with `{}` in place of the repository's name, if it is about this one.
fn without_name(target: &str, repo: &str) -> Option<String> {
    ["/api/models/", "/"].iter().find_map(|prefix| {
        let rest = target.strip_prefix(prefix)?.strip_prefix(repo)?;
        rest.starts_with('/').then(|| format!("{prefix}{{}}{rest}"))
    })
}

enum Route<'a> {
    Info(&'a str),
    Tree(&'a str),
    Resolve(&'a str, &'a str),
    Unknown,
}

impl<'a> Route<'a> {
    fn of(path: &'a str, repo: &str) -> Route<'a> {
        let path = path.trim_start_matches('/');
        if let Some(rest) = path.strip_prefix("api/models/").and_then(|p| p.strip_prefix(repo)) {
            if rest.is_empty() {
                return Route::Info("main");
            }
            return if let Some(revision) = rest.strip_prefix("/revision/") {
                Route::Info(revision)
            } else if let Some(revision) = rest.strip_prefix("/tree/") {
                Route::Tree(revision.trim_end_matches('/'))
            } else {
                Route::Unknown
            };
        }
        match path.strip_prefix(repo).and_then(|p| p.strip_prefix("/resolve/")).and_then(|p| p.split_once('/')) {
            Some((revision, file)) => Route::Resolve(revision, file),
            None => Route::Unknown,
        }
    }
}

/// One page of the listing, and where the next begins.
fn listing(settings: &Settings, query: &str) -> (String, Option<usize>) {
    let cursor: usize = query.split('&').find_map(|p| p.strip_prefix("cursor=")?.parse().ok()).unwrap_or(0);
    let page = if settings.page == 0 { usize::MAX } else { settings.page };
    let item = |(path, file): (&String, &RepoFile)| {
        let size = file.listed_size.unwrap_or(file.size);
        if file.large {
            let pointer = hex(&Sha1::digest(&file.etag));
            serde_json::json!({ "type": "file", "path": path, "size": size, "oid": pointer,
                "lfs": { "oid": file.etag, "size": size, "pointerSize": 134 } })
        } else {
            serde_json::json!({ "type": "file", "path": path, "size": size, "oid": file.etag })
        }
    };
    let mut items: Vec<_> = settings.files.iter().skip(cursor).take(page).map(item).collect();
    let end = cursor + items.len();
    items.push(serde_json::json!({ "type": "directory", "path": "a folder", "oid": COMMIT, "size": 0 }));
    (serde_json::Value::Array(items).to_string(), (end < settings.files.len()).then_some(end))
}

fn head(status: u16, headers: &[(&'static str, String)]) -> String {
    let mut text = format!("HTTP/1.1 {status} Whatever\r\n");
    for (name, value) in headers {
        text.push_str(&format!("{name}: {value}\r\n"));
    }
    text + "\r\n"
}

fn answer(
    mut stream: &TcpStream,
    request: &Request,
    status: u16,
    headers: &[(&'static str, String)],
    body: &[u8],
) -> std::io::Result<bool> {
    let mut headers = headers.to_vec();
    headers.push(("Content-Length", body.len().to_string()));
    stream.write_all(head(status, &headers).as_bytes())?;
    if request.method != "HEAD" {
        stream.write_all(body)?;
    }
    Ok(true)
}

fn decode(text: &str) -> String {
    let (mut bytes, mut out) = (text.bytes(), Vec::new());
    while let Some(byte) = bytes.next() {
        out.push(match byte {
            b'%' => {
                let mut digit = || bytes.next().and_then(|b| char::from(b).to_digit(16)).unwrap_or(0) as u8;
                digit() << 4 | digit()
            }
            byte => byte,
        });
    }
    String::from_utf8_lossy(&out).into_owned()
}

fn encoded(text: &str) -> String {
    let escape = |byte: u8| match byte {
        b'/' | b'-' | b'.' | b'_' => char::from(byte).to_string(),
        byte if byte.is_ascii_alphanumeric() => char::from(byte).to_string(),
        byte => format!("%{byte:02X}"),
    };
    text.bytes().map(escape).collect()
}
