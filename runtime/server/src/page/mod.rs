//! The page: one file inside this program, which asks for nothing but this server's own addresses.
//!
//! Its style and its script stand in it, and the policy that goes along names their hashes: a browser runs no other, whatever a
//! model writes.

use std::sync::LazyLock;

use axum::body::Body;
use axum::http::{HeaderValue, header};
use axum::response::Response;
use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use sha2::{Digest as _, Sha256};

const FRAME: &str = include_str!("index.html");
const STYLE: &str = include_str!("style.css");
const SCRIPT: &str = concat!(
    "'use strict';\n(() => {\n",
    include_str!("store.js"),
    include_str!("http.js"),
    include_str!("markdown.js"),
    include_str!("chat.js"),
    include_str!("machine.js"),
    include_str!("start.js"),
    "})();\n",
);

/// The page and its policy.
static PAGE: LazyLock<(String, HeaderValue)> = LazyLock::new(|| {
    let page = FRAME.replace("/*STYLE*/", STYLE).replace("/*SCRIPT*/", SCRIPT);
    let hash = |text: &str| BASE64_STANDARD.encode(Sha256::digest(text));
    let policy = format!(
        "default-src 'none'; connect-src 'self'; img-src data:; style-src 'sha256-{}'; script-src 'sha256-{}'; base-uri 'none'; \
         form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'",
        hash(STYLE),
        hash(SCRIPT),
    );
    let policy = HeaderValue::from_str(&policy).unwrap_or_else(|_| HeaderValue::from_static("default-src 'none'"));
    (page, policy)
});

/// `GET /`.
pub(crate) async fn handle() -> Response {
    let (page, policy) = &*PAGE;
    let mut response = Response::new(Body::from(page.as_str()));
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("text/html; charset=utf-8"));
    headers.insert(header::CONTENT_SECURITY_POLICY, policy.clone());
    headers.insert(header::REFERRER_POLICY, HeaderValue::from_static("no-referrer"));
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-cache"));
    headers.insert("cross-origin-opener-policy", HeaderValue::from_static("same-origin"));
    response
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_page_is_whole_and_names_no_other_place() {
        let (page, policy) = &*PAGE;
        assert!(page.contains(STYLE) && page.contains(SCRIPT) && !page.contains("/*SCRIPT*/"));
        assert_eq!(page.matches("</script").count(), 1);
        assert_eq!(page.matches("</style").count(), 1);
        assert!(policy.to_str().is_ok_and(|policy| policy.starts_with("default-src 'none'; connect-src 'self'")));
        for way_out in
            ["src=\"", "url(", "@import", "href=\"http", "innerHTML", "insertAdjacentHTML", "document.write", "eval("]
        {
            assert!(!page.contains(way_out), "{way_out}");
        }
    }
}
