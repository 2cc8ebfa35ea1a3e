//! Addresses: the hub's own, those that its answers lead to, and how either is shown.
//!
//! An address may carry secrets: user and password in front of the host, and a signature in its query. Both are left out
//! of whatever a person or a log gets to see, by [`shown`]; the endpoint's password is taken out of the address before
//! anything else sees it.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use percent_encoding::percent_decode_str;
use ureq::http::Uri;

use crate::HubError;

/// The hub that is asked.
#[derive(Clone)]
pub(crate) struct Endpoint {
    /// Scheme, host, and perhaps a path; no password, no slash at the end.
    address: String,
    uri: Uri,
    /// What goes into `Authorization` where the address came with a user.
    basic: Option<String>,
}

impl Endpoint {
    /// Reads `http[s]://[USER[:PASSWORD]@]HOST[:PORT][/PATH]`.
    pub(crate) fn parse(text: &str) -> Result<Endpoint, HubError> {
        let invalid = || HubError::InvalidEndpoint { endpoint: without_user(text) };
        let (scheme, rest) = text.trim_end_matches('/').split_once("://").ok_or_else(invalid)?;
        let (user, rest) = rest.rsplit_once('@').map_or((None, rest), |(user, rest)| (Some(user), rest));
        // In front of the host nothing may be that ends an address.
        if user.is_some_and(|user| user.contains(['/', '?', '#'])) || rest.contains(['?', '#']) {
            return Err(invalid());
        }
        let address = format!("{scheme}://{rest}");
        let uri: Uri = address.parse().map_err(|_| invalid())?;
        if !matches!(uri.scheme_str(), Some("http" | "https")) || uri.host().is_none_or(str::is_empty) {
            return Err(invalid());
        }
        let basic = user.map(|user| {
            let (name, password) = user.split_once(':').unwrap_or((user, ""));
            let pair: Vec<u8> =
                percent_decode_str(name).chain([b':'].iter().copied()).chain(percent_decode_str(password)).collect();
            format!("Basic {}", STANDARD.encode(pair))
        });
        Ok(Endpoint { address, uri, basic })
    }

    /// The address without a slash at its end, to be shown and to be extended.
    pub(crate) fn as_str(&self) -> &str {
        &self.address
    }

    /// What proves the user that the address names.
    pub(crate) fn basic(&self) -> Option<&str> {
        self.basic.as_deref()
    }

    /// Whether `uri` is an address of this hub, so that it may see tokens.
    pub(crate) fn owns(&self, uri: &Uri) -> bool {
        same_origin(uri, &self.uri)
    }
}

impl std::fmt::Debug for Endpoint {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Endpoint").field(&self.address).finish()
    }
}

/// An address as it may be shown: without user, password, query and fragment.
pub(crate) fn shown(url: &str) -> String {
    let url = url.split(['?', '#']).next().unwrap_or(url);
    let (scheme, rest) = split_scheme(url);
    let (authority, path) = rest.split_at(rest.find('/').unwrap_or(rest.len()));
    format!("{scheme}{}{path}", authority.rsplit('@').next().unwrap_or_default())
}

/// A text that was to be an address and is none: whatever could be a password is left out.
pub(crate) fn without_user(text: &str) -> String {
    let (scheme, rest) = split_scheme(text);
    format!("{scheme}{}", rest.rsplit('@').next().unwrap_or_default())
}

/// A name that may be an address by mistake, as it may be shown.
pub fn without_secrets(name: &str) -> String {
    let user = |name: &str| name.split_once('@').is_some_and(|(user, _)| user.contains(':'));
    if name.contains("://") || user(name) { shown(&without_user(name)) } else { name.to_owned() }
}

/// `https://` and the rest.
fn split_scheme(text: &str) -> (&str, &str) {
    text.split_at(text.find("://").map_or(0, |at| at + 3))
}

/// Scheme, host and port, for a message.
pub(crate) fn origin(uri: &Uri) -> String {
    let authority = uri.authority().map(|a| a.as_str()).unwrap_or_default();
    format!("{}://{}", uri.scheme_str().unwrap_or_default(), authority.rsplit('@').next().unwrap_or_default())
}

/// The port that a connection goes to.
pub(crate) fn port(uri: &Uri) -> u16 {
    uri.port_u16().unwrap_or(if uri.scheme_str() == Some("https") { 443 } else { 80 })
}

fn same_origin(a: &Uri, b: &Uri) -> bool {
    let host = |uri: &Uri| uri.host().unwrap_or_default().to_ascii_lowercase();
    a.scheme_str() == b.scheme_str() && host(a) == host(b) && port(a) == port(b)
}

/// The address that `location` means when `base` answered with it.
pub(crate) fn join(base: &Uri, location: &str) -> String {
    let scheme = base.scheme_str().unwrap_or("https");
    let origin = format!("{scheme}://{}", base.authority().map(|a| a.as_str()).unwrap_or_default());
    // What stands in front of a query may look like an address, the query itself may hold one.
    let path_end = location.find(['?', '#']).unwrap_or(location.len());
    if location[..path_end].contains("://") {
        location.to_owned()
    } else if let Some(rest) = location.strip_prefix("//") {
        format!("{scheme}://{rest}")
    } else if location.starts_with('/') {
        format!("{origin}{location}")
    } else if path_end == 0 {
        format!("{origin}{}{location}", base.path())
    } else {
        let folder = base.path().rsplit_once('/').map_or("", |(folder, _)| folder);
        format!("{origin}{folder}/{location}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn uri(text: &str) -> Uri {
        text.parse().unwrap()
    }

    #[test]
    fn the_endpoint_is_told_from_its_password() {
        let plain = Endpoint::parse("http://hub:1/api/").unwrap();
        assert_eq!((plain.as_str(), plain.basic()), ("http://hub:1/api", None));
        let endpoint = Endpoint::parse("https://reader:p%40ss:w@hub").unwrap();
        assert_eq!(endpoint.as_str(), "https://hub");
        // printf 'reader:p@ss:w' | base64
        assert_eq!(endpoint.basic(), Some("Basic cmVhZGVyOnBAc3M6dw=="));
        assert!(!format!("{endpoint:?}").contains("ss"));
        for wrong in ["reader:secret@hub", "http://reader:sec/ret@hub", "ftp://reader:secret@hub", "http://a:secret@"] {
            let error = Endpoint::parse(wrong).unwrap_err().to_string();
            assert!(!error.contains("sec") && !error.contains("ret"), "{error}");
        }
    }

    #[test]
    fn no_secret_is_shown() {
        assert_eq!(shown("https://user:secret@hub.co:1/x@1?sig=secret#y"), "https://hub.co:1/x@1");
        assert_eq!(shown("user:secret@hub"), "hub");
        assert_eq!(origin(&uri("https://user:secret@hub.co:1/x?y")), "https://hub.co:1");
    }

    #[test]
    fn a_hub_owns_addresses_of_its_scheme_host_and_port() {
        let hub = Endpoint::parse("https://user:secret@hub.co").unwrap();
        assert!(hub.owns(&uri("https://Hub.co/a")) && hub.owns(&uri("https://hub.co:443/b")));
        for other in ["http://hub.co/", "https://hub.co:444/", "https://cdn.hub.co/", "https://hub.co.evil.org/"] {
            assert!(!hub.owns(&uri(other)), "{other}");
        }
    }

    #[test]
    fn locations_resolve_against_the_address_that_sent_them() {
        let base = uri("http://hub:8080/a/b?c");
        assert_eq!(join(&base, "https://cdn/x?sig"), "https://cdn/x?sig");
        assert_eq!(join(&base, "//cdn/x"), "http://cdn/x");
        assert_eq!(join(&base, "/x?from=http://y"), "http://hub:8080/x?from=http://y");
        assert_eq!(join(&base, "x"), "http://hub:8080/a/x");
        assert_eq!(join(&base, "?d"), "http://hub:8080/a/b?d");
    }
}
