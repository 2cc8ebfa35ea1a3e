//! Requests to the hub: redirects, the token, which failures are worth another attempt, and how long to wait.
//!
//! Redirects are followed here and not by the HTTP library, for two reasons: the token goes to the hub and to no
//! other host, and the hub states size and entity tag of a large file on the redirect itself.

use std::io::{self, Read};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use ureq::http::{HeaderMap, Response, StatusCode, Uri, header};
use ureq::{Agent, Body, Timeout};

use crate::address::{Endpoint, join, origin, shown};
use crate::{Credentials, HubConfig, HubError, RepoId};

/// Redirects followed before giving up.
const MAX_REDIRECTS: usize = 10;
/// How often the cancel flag is looked at while something else is waited for.
const WATCH: Duration = Duration::from_millis(50);
/// Bytes asked of the socket at once.
const INPUT_BUFFER: usize = 256 << 10;

/// A failed attempt, and whether another one may help.
#[derive(Debug)]
pub(crate) struct Failure {
    pub(crate) error: HubError,
    pub(crate) transient: bool,
    /// How long the server asks to wait.
    pub(crate) retry_after: Option<Duration>,
}

impl Failure {
    pub(crate) fn transient(error: HubError) -> Failure {
        Failure { error, transient: true, retry_after: None }
    }
}

impl From<HubError> for Failure {
    fn from(error: HubError) -> Failure {
        Failure { error, transient: false, retry_after: None }
    }
}

/// The answer at the end of the redirects: status 200, 206 or 416.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) response: Response<Body>,
    /// Where it came from, without the query.
    pub(crate) url: String,
    /// Scheme and host it came from.
    pub(crate) host: String,
    /// Size of the file as the hub (not a storage host) states it.
    pub(crate) linked_size: Option<u64>,
    /// Entity tag of the file as the hub (not a storage host) states it.
    pub(crate) linked_etag: Option<String>,
}

/// A connection pool and the rules above, for one operation on one repository.
#[derive(Debug)]
pub(crate) struct Client<'a> {
    config: &'a HubConfig,
    agent: Agent,
    hub: Endpoint,
    /// The value of `Authorization` for the hub.
    authorization: Option<String>,
    /// Raised when one file has failed for good, so that the others stop.
    abort: AtomicBool,
}

impl<'a> Client<'a> {
    pub(crate) fn new(config: &'a HubConfig) -> Result<Client<'a>, HubError> {
        let hub = Endpoint::parse(&config.endpoint)?;
        // User and password of the address go first, as with the Hugging Face tools: they are of this very hub.
        let authorization = match (hub.basic(), &config.token) {
            (Some(basic), _) => Some(basic.to_owned()),
            (None, Some(token)) if !config.offline => Some(token.bearer()?),
            (None, _) => None,
        };
        let agent = Agent::config_builder()
            // Each request has its own.
            .proxy(None)
            .user_agent(concat!("st-tool/", env!("CARGO_PKG_VERSION")))
            .accept("*/*")
            // A compressed answer has no size to check, and ranges would count compressed bytes.
            .accept_encoding("identity")
            .http_status_as_error(false)
            .max_redirects(0)
            .max_redirects_will_error(false)
            .timeout_connect(Some(config.connect_timeout))
            .timeout_per_read(Some(config.stall_timeout))
            .timeout_per_write(Some(config.stall_timeout))
            .input_buffer_size(INPUT_BUFFER)
            .output_buffer_size(16 << 10)
            .build()
            .new_agent();
        Ok(Client { config, agent, hub, authorization, abort: AtomicBool::new(false) })
    }

    /// The hub's address, without password and trailing slash.
    pub(crate) fn endpoint(&self) -> &str {
        self.hub.as_str()
    }

    /// Whether work should end: cancelled from outside, or pointless because another file has failed.
    pub(crate) fn stopped(&self) -> bool {
        self.config.cancel.load(Ordering::Relaxed) || self.abort.load(Ordering::Relaxed)
    }

    /// Makes all work of this client end soon.
    pub(crate) fn abort(&self) {
        self.abort.store(true, Ordering::Relaxed);
    }

    /// Runs `work` while another thread watches the cancel flag and, when it is raised, closes every connection, so
    /// that no read is left blocking.
    pub(crate) fn watched<T>(&self, work: impl FnOnce() -> Result<T, HubError>) -> Result<T, HubError> {
        let done = AtomicBool::new(false);
        thread::scope(|scope| {
            let watch = || {
                while !done.load(Ordering::Acquire) {
                    if self.stopped() {
                        self.agent.clone().shutdown();
                        return;
                    }
                    thread::park_timeout(WATCH);
                }
            };
            let watcher = thread::Builder::new().spawn_scoped(scope, watch).map_err(HubError::Thread)?;
            // Also on unwinding, or the scope would wait for a watcher that waits for `done`.
            struct Finish<'b>(&'b AtomicBool, thread::Thread);
            impl Drop for Finish<'_> {
                fn drop(&mut self) {
                    self.0.store(true, Ordering::Release);
                    self.1.unpark();
                }
            }
            let _finish = Finish(&done, watcher.thread().clone());
            work()
        })
    }

    /// One GET, following redirects. `from` asks for the bytes from that offset on.
    pub(crate) fn get(&self, url: &str, from: Option<u64>, subject: &Subject<'_>) -> Result<Answer, Failure> {
        let mut url = url.to_owned();
        let (mut linked_size, mut linked_etag) = (None, None);
        for _ in 0..=MAX_REDIRECTS {
            if self.stopped() {
                return Err(HubError::Cancelled.into());
            }
            let uri: Uri = url.parse().map_err(|_| bad_response(&url, "an address that does not parse"))?;
            let on_hub = self.hub.owns(&uri);
            let mut request = self.agent.get(&uri).config().proxy(self.config.proxies.of(&uri)?).build();
            if let Some(authorization) = self.authorization.as_ref().filter(|_| on_hub) {
                request = request.header(header::AUTHORIZATION, authorization);
            }
            if let Some(from) = from {
                request = request.header(header::RANGE, format!("bytes={from}-"));
            }
            tracing::debug!(url = shown(&url), from, "GET");
            let response = request.call().map_err(|e| self.network_failure(&uri, e))?;
            let headers = response.headers();
            let status = response.status();
            if on_hub {
                // A redirect's own entity tag is that of its body.
                let own = if status.is_redirection() { None } else { text(headers, "etag") };
                let etag = text(headers, "x-linked-etag").or(own);
                linked_etag = linked_etag.or_else(|| etag.map(normalize_etag));
                linked_size = linked_size.or_else(|| text(headers, "x-linked-size").and_then(|v| v.parse().ok()));
            }
            match status {
                StatusCode::OK | StatusCode::PARTIAL_CONTENT | StatusCode::RANGE_NOT_SATISFIABLE => {
                    let answer = Answer { response, url: shown(&url), host: origin(&uri), linked_size, linked_etag };
                    return match subject.wants_page() || !is_page(answer.response.headers()) {
                        true => Ok(answer),
                        false => Err(HubError::WebPage { url: answer.url, wanted: subject.wanted() }.into()),
                    };
                }
                StatusCode::MOVED_PERMANENTLY
                | StatusCode::FOUND
                | StatusCode::SEE_OTHER
                | StatusCode::TEMPORARY_REDIRECT
                | StatusCode::PERMANENT_REDIRECT => {
                    let target =
                        text(headers, "location").ok_or_else(|| bad_response(&url, "a redirect to nowhere"))?;
                    let target = join(&uri, target);
                    let downgrade = url.starts_with("https://") && !target.starts_with("https://");
                    if downgrade || !(target.starts_with("https://") || target.starts_with("http://")) {
                        return Err(bad_response(&url, "a redirect away from https").into());
                    }
                    url = target;
                }
                _ => return Err(self.refused(&uri, &url, &response, self.sent(on_hub), subject)),
            }
        }
        Err(bad_response(&url, "too many redirects").into())
    }

    /// What went along to the hub, or to another host.
    fn sent(&self, on_hub: bool) -> Credentials {
        match &self.authorization {
            Some(_) if !on_hub => Credentials::Nothing,
            Some(_) if self.hub.basic().is_some() => Credentials::Password,
            Some(_) => Credentials::Token,
            None => Credentials::Nothing,
        }
    }

    /// A whole small body, attempted as often as the retry policy says. Returns the answer's `Link: rel="next"` too.
    pub(crate) fn get_small(
        &self,
        url: &str,
        limit: u64,
        subject: &Subject<'_>,
        notify: &dyn Fn(Duration, &HubError),
    ) -> Result<(Vec<u8>, Option<String>), HubError> {
        let mut attempt = 0;
        loop {
            let failure = match self.get(url, None, subject).and_then(|answer| self.read_small(answer, limit, subject))
            {
                Ok(body) => return Ok(body),
                // Without any network, waiting before saying so helps nobody.
                Err(failure) if matches!(failure.error, HubError::Unreachable { .. }) => return Err(failure.error),
                Err(failure) => failure,
            };
            self.wait_to_retry(failure, &mut attempt, notify)?;
        }
    }

    fn read_small(
        &self,
        answer: Answer,
        limit: u64,
        subject: &Subject<'_>,
    ) -> Result<(Vec<u8>, Option<String>), Failure> {
        if answer.response.status() != StatusCode::OK {
            return Err(bad_response(&answer.url, "a partial answer to a request for all").into());
        }
        let next = text(answer.response.headers(), "link").and_then(next_link).map(str::to_owned);
        let mut body = Vec::new();
        let mut reader = answer.response.into_body().into_reader().take(limit + 1);
        reader
            .read_to_end(&mut body)
            .map_err(|e| self.read_failure(&answer.host, &answer.url, body.len() as u64, e))?;
        if body.len() as u64 > limit {
            return Err(bad_response(&answer.url, "far more than such an answer has").into());
        }
        if !subject.wants_page() && begins_as_page(&body) {
            return Err(HubError::WebPage { url: answer.url, wanted: subject.wanted() }.into());
        }
        Ok((body, next))
    }

    /// Sleeps before the next attempt, or returns the error where there shall be none.
    pub(crate) fn wait_to_retry(
        &self,
        failure: Failure,
        attempt: &mut u32,
        notify: &dyn Fn(Duration, &HubError),
    ) -> Result<(), HubError> {
        if self.stopped() {
            return Err(HubError::Cancelled);
        }
        let retry = &self.config.retry;
        let backoff = retry.first_wait.saturating_mul(1u32.checked_shl(*attempt).unwrap_or(u32::MAX));
        let wait = failure.retry_after.unwrap_or(backoff.min(retry.longest_backoff));
        if !failure.transient || *attempt >= retry.retries || wait > retry.longest_wait {
            return Err(failure.error);
        }
        *attempt += 1;
        tracing::info!(?wait, attempt = *attempt, error = %failure.error, "will try again");
        notify(wait, &failure.error);
        let mut left = wait;
        while !left.is_zero() {
            let slice = left.min(WATCH);
            (retry.sleep)(slice);
            left -= slice;
            if self.stopped() {
                return Err(HubError::Cancelled);
            }
        }
        Ok(())
    }

    /// What a failed read of a body means. Stalls and cuts are transient.
    pub(crate) fn read_failure(&self, host: &str, what: &str, at: u64, error: io::Error) -> Failure {
        if self.stopped() {
            return HubError::Cancelled.into();
        }
        let timeout = |e: &ureq::Error| matches!(e, ureq::Error::Timeout(_));
        let source = error.get_ref().and_then(|source| source.downcast_ref());
        Failure::transient(if error.kind() == io::ErrorKind::TimedOut || source.is_some_and(timeout) {
            HubError::Stalled { host: host.to_owned(), limit: self.config.stall_timeout }
        } else {
            HubError::Cut { file: what.to_owned(), at, cause: error.to_string() }
        })
    }

    fn network_failure(&self, uri: &Uri, error: ureq::Error) -> Failure {
        if self.stopped() {
            return HubError::Cancelled.into();
        }
        let host = origin(uri);
        Failure::transient(match error {
            ureq::Error::Timeout(Timeout::PerRead | Timeout::PerWrite) => {
                HubError::Stalled { host, limit: self.config.stall_timeout }
            }
            ureq::Error::Io(e) if is_cut(&e) => {
                HubError::Cut { file: shown(&uri.to_string()), at: 0, cause: e.to_string() }
            }
            ureq::Error::Protocol(e) => return bad_response(&uri.to_string(), e).into(),
            other => HubError::Unreachable { host, cause: other.to_string() },
        })
    }

    /// What a status that is neither success nor redirect means.
    fn refused(
        &self,
        uri: &Uri,
        url: &str,
        response: &Response<Body>,
        sent: Credentials,
        subject: &Subject<'_>,
    ) -> Failure {
        let headers = response.headers();
        let (host, url) = (origin(uri), shown(url));
        let code = text(headers, "x-error-code").unwrap_or_default();
        let message =
            text(headers, "x-error-message").map(|m| m.chars().filter(|c| !c.is_control()).take(300).collect());
        let repo = subject.repo.to_string();
        match response.status().as_u16() {
            status @ (401 | 403) if code == "GatedRepo" => {
                HubError::Gated { repo, host: self.endpoint().to_owned(), status, sent }.into()
            }
            401 => HubError::Unauthorized { repo, host, sent }.into(),
            403 => HubError::Forbidden { url, message, page: code.is_empty() && is_page(headers) }.into(),
            404 if code == "RevisionNotFound" => {
                HubError::RevisionNotFound { repo, revision: subject.revision.to_owned() }.into()
            }
            404 => match subject.what {
                What::File(file) => HubError::FileNotFound { repo, file: file.to_owned() }.into(),
                What::Listing if code.is_empty() => HubError::NoListing { repo, host }.into(),
                What::Info | What::Listing => HubError::RepoNotFound { repo, host }.into(),
            },
            429 => {
                let retry_after = retry_after(headers);
                Failure { error: HubError::RateLimited { host, retry_after }, transient: true, retry_after }
            }
            status @ (408 | 500..=599) => {
                Failure { error: HubError::Status { url, status }, transient: true, retry_after: retry_after(headers) }
            }
            status => HubError::Status { url, status }.into(),
        }
    }
}

/// What a request is about, for its error message.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Subject<'a> {
    pub(crate) repo: &'a RepoId,
    pub(crate) revision: &'a str,
    pub(crate) what: What<'a>,
}

/// What of a repository is asked for.
#[derive(Debug, Clone, Copy)]
pub(crate) enum What<'a> {
    Info,
    Listing,
    File(&'a str),
}

impl Subject<'_> {
    /// Whether a web page is what was asked for.
    fn wants_page(&self) -> bool {
        let ends = |file: &str, end: &str| file.to_ascii_lowercase().ends_with(end);
        matches!(self.what, What::File(file) if [".html", ".htm", ".xhtml"].iter().any(|end| ends(file, end)))
    }

    fn wanted(&self) -> String {
        match self.what {
            What::File(file) => file.to_owned(),
            What::Info | What::Listing => "the hub's answer".to_owned(),
        }
    }
}

/// Whether the answer says that it is a web page.
fn is_page(headers: &HeaderMap) -> bool {
    let kind = text(headers, "content-type").unwrap_or_default().trim_start().to_ascii_lowercase();
    kind.starts_with("text/html") || kind.starts_with("application/xhtml")
}

/// Whether the text looks like a web page, whatever its sender says.
fn begins_as_page(body: &[u8]) -> bool {
    let body = body.strip_prefix(b"\xef\xbb\xbf").unwrap_or(body).trim_ascii_start();
    [&b"<!doctype html"[..], b"<html"].iter().any(|s| body.get(..s.len()).is_some_and(|b| b.eq_ignore_ascii_case(s)))
}

pub(crate) fn bad_response(url: &str, reason: impl ToString) -> HubError {
    HubError::BadResponse { url: shown(url), reason: reason.to_string() }
}

/// Entity tags name blobs, so only the tag itself counts: no quotes, no mark of weakness.
fn normalize_etag(etag: &str) -> String {
    etag.strip_prefix("W/").unwrap_or(etag).trim_matches('"').to_owned()
}

fn text<'h>(headers: &'h HeaderMap, name: &str) -> Option<&'h str> {
    headers.get(name).and_then(|value| value.to_str().ok())
}

/// Seconds, from `Retry-After` or from the hub's `ratelimit: "api";r=0;t=55`.
fn retry_after(headers: &HeaderMap) -> Option<Duration> {
    let seconds = |text: &str| text.trim().parse().ok().map(Duration::from_secs);
    text(headers, "retry-after").and_then(seconds).or_else(|| {
        let limit = text(headers, "ratelimit")?;
        let field = |name: &str| limit.split(';').find_map(|part| part.trim().strip_prefix(name));
        if field("r=")? == "0" { seconds(field("t=")?) } else { None }
    })
}

/// The address in `<address>; rel="next"`.
fn next_link(link: &str) -> Option<&str> {
    link.split(',').find_map(|part| {
        let (address, rest) = part.trim().strip_prefix('<')?.split_once('>')?;
        rest.split(';').any(|p| matches!(p.trim(), "rel=\"next\"" | "rel=next")).then_some(address)
    })
}

fn is_cut(error: &io::Error) -> bool {
    use io::ErrorKind::{BrokenPipe, ConnectionAborted, ConnectionReset, UnexpectedEof};
    matches!(error.kind(), UnexpectedEof | ConnectionReset | ConnectionAborted | BrokenPipe)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headers_are_read() {
        assert_eq!(next_link("<http://h/t?cursor=2>; rel=\"next\""), Some("http://h/t?cursor=2"));
        assert_eq!(next_link("<a>; rel=\"prev\", <b>; rel=\"next\""), Some("b"));
        assert_eq!(next_link("nonsense"), None);
        assert_eq!(normalize_etag("W/\"abc\""), "abc");
        let mut headers = HeaderMap::new();
        headers.insert("ratelimit", "\"api\";r=0;t=55".parse().unwrap());
        assert_eq!(retry_after(&headers), Some(Duration::from_secs(55)));
        headers.insert("retry-after", "7".parse().unwrap());
        assert_eq!(retry_after(&headers), Some(Duration::from_secs(7)));
        headers.insert("retry-after", "Wed, 21 Oct 2015 07:28:00 GMT".parse().unwrap());
        assert_eq!(retry_after(&headers), Some(Duration::from_secs(55)));
    }
    #[test]
    fn pages_are_known_by_their_type_or_their_beginning() {
        let mut headers = HeaderMap::new();
        assert!(!is_page(&headers));
        headers.insert("content-type", "Text/HTML; charset=utf-8".parse().unwrap());
        assert!(is_page(&headers));
        assert!(begins_as_page(b"\n <!DOCTYPE html>") && begins_as_page(b"\xef\xbb\xbf<HTML lang=en>"));
        assert!(!begins_as_page(b"<h") && !begins_as_page(b"{\"html\": 1}"));
    }
}
