//! What stands between a person and the hub: mirrors, proxies, pages in place of answers, and secrets in addresses.

use std::io::{BufRead as _, BufReader, Write as _};
use std::net::TcpListener;
use std::sync::mpsc;
use std::thread;

use st_hub::{Credentials, DownloadRequest, Hub, HubConfig, HubError, Proxies, Token};

use crate::server::{COMMIT, Fault, RepoFile};
use crate::{FIRST, REPO, SECOND, World, request, request_for};

#[test]
fn a_mirror_without_a_listing_is_not_said_to_lack_the_model() {
    let world = World::new();
    world.server.change(|s| s.no_listing = true);
    for revision in ["main", COMMIT] {
        let error = world.hub().list(&DownloadRequest { revision: revision.into(), ..request() }).unwrap_err();
        assert!(matches!(&error, HubError::NoListing { repo, .. } if repo == REPO), "{error}");
    }
    // What is not there at all is said as before.
    world.server.change(|s| s.repo = "somebody/else".into());
    let error = world.hub().list(&DownloadRequest { revision: COMMIT.into(), ..request() }).unwrap_err();
    assert!(matches!(error, HubError::RepoNotFound { .. }), "{error}");
}

const PAGE: &str = "\n<!DOCTYPE html><html><title>Log in</title></html>";

#[test]
fn a_pointer_in_place_of_a_large_file_is_called_one() {
    let world = World::new();
    let pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0000\nsize 300000\n";
    world.server.spoil(FIRST, Fault::Instead("text/plain", pointer));
    let error = world.download_with(&world.hub(), &request_for(&[FIRST])).0.unwrap_err();
    assert!(matches!(&error, HubError::LfsPointer { file, .. } if file == FIRST), "{error}");
    world.server.spoil(SECOND, Fault::Instead("text/plain", "of another length"));
    let error = world.download_with(&world.hub(), &request_for(&[SECOND])).0.unwrap_err();
    assert!(matches!(&error, HubError::Size { file, .. } if file == SECOND), "{error}");
    world.assert_complete(&world.download().0.unwrap());
}

#[test]
fn a_web_page_is_called_one() {
    // By its type in place of a file, by its beginning in place of an answer, whatever it calls itself.
    for (place, kind, wanted) in [
        ("info", "text/html", "the hub's answer"),
        ("info", "application/json", "the hub's answer"),
        ("tree", "text/html; charset=utf-8", "the hub's answer"),
        ("config.json", "text/html", "config.json"),
        (FIRST, "Text/HTML", FIRST),
    ] {
        let world = World::new();
        world.server.spoil(place, Fault::Instead(kind, PAGE));
        let error = world.download().0.unwrap_err();
        let HubError::WebPage { wanted: got, .. } = &error else { panic!("{place} {kind}: {error}") };
        assert_eq!(got, wanted);
        world.assert_nothing_wrong();
        world.assert_complete(&world.download().0.unwrap());
    }
    let world = World::new();
    world.put("page.html", RepoFile::small("<!doctype html>"));
    world.download_with(&world.hub(), &request_for(&["page.html"])).0.unwrap();
}

#[test]
fn a_page_of_a_filter_is_told_from_the_hubs_refusal() {
    for (headers, is_page) in [(vec![("Content-Type", "text/html".to_owned())], true), (vec![], false)] {
        let world = World::new();
        world.server.spoil("info", Fault::Status(403, headers));
        let error = world.download().0.unwrap_err();
        assert!(matches!(&error, HubError::Forbidden { page, .. } if *page == is_page), "{error}");
    }
}

#[test]
fn user_and_password_of_the_address_are_sent_and_not_shown() {
    let world = World::new();
    let endpoint = world.server.endpoint().replace("://", "://reader:Passw0rd@");
    let token = Token::new(b"hf_secret", "HF_TOKEN");
    let config = HubConfig { endpoint, token, ..world.config() };
    assert!(!format!("{config:?}").contains("Passw0rd") && !format!("{config:?}").contains("hf_secret"));
    let hub = Hub::new(config);
    world.assert_complete(&world.download_with(&hub, &request()).0.unwrap());
    // printf 'reader:Passw0rd' | base64
    let basic = Some("Basic cmVhZGVyOlBhc3N3MHJk".to_owned());
    assert!(world.server.log().iter().all(|seen| seen.storage || seen.authorization == basic));
    assert!(world.server.log().iter().all(|seen| !seen.storage || seen.authorization.is_none()));

    let other = DownloadRequest { revision: "v1".into(), ..request() };
    world.server.change(|s| s.gated = true);
    let error = hub.list(&other).unwrap_err();
    assert!(matches!(&error, HubError::Gated { host, .. } if *host == world.server.endpoint()), "{error:?}");
    world.server.change(|s| s.token = Some("x".into()));
    let error = hub.list(&other).unwrap_err();
    assert!(matches!(&error, HubError::Unauthorized { sent: Credentials::Password, .. }), "{error:?}");
    assert!(!format!("{error} {error:?}").contains("Passw0rd"));
}

#[test]
fn a_token_that_cannot_be_one_is_no_request_and_offline_none_is_needed() {
    let world = World::new();
    let odd = || Token::new("\u{201c}hf_abc\u{201d}".as_bytes(), "HF_TOKEN");
    let hub = Hub::new(HubConfig { token: odd(), ..world.config() });
    let error = hub.list(&request()).unwrap_err();
    assert!(matches!(&error, HubError::InvalidToken { found: '\u{201c}', .. }), "{error}");
    assert!(world.server.log().is_empty());
    let folder = world.download().0.unwrap();
    let offline = Hub::new(HubConfig { token: odd(), offline: true, ..world.config() });
    assert_eq!(offline.download(&request(), &()).unwrap(), folder);
}

/// A proxy that notes what it is asked for and refuses it: its address, and the first lines.
fn proxy() -> (String, mpsc::Receiver<String>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let (sender, lines) = mpsc::channel();
    thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            let mut lines = BufReader::new(stream.try_clone().unwrap()).lines().map_while(Result::ok);
            let head: Vec<String> = lines.by_ref().take_while(|line| !line.is_empty()).collect();
            if sender.send(head.join("\n")).is_err() {
                return;
            }
            // Whoever went away does not need it.
            let _ = stream.write_all(b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\nConnection: close\r\n\r\n");
        }
    });
    (address, lines)
}

#[test]
fn the_proxy_of_the_scheme_is_used_and_exceptions_are_reached_directly() {
    let (address, lines) = proxy();
    let world = World::new();
    let port = world.server.endpoint().rsplit_once(':').unwrap().1.to_owned();
    let hub = |no_proxy: String| {
        let own = format!("http://me:Passw0rd@{address}");
        let proxies = Proxies::from_variables(|name| match name {
            "HTTP_PROXY" => Some(own.clone()),
            "ALL_PROXY" => Some("socks5://127.0.0.1:1".into()),
            "NO_PROXY" => Some(no_proxy.clone()),
            _ => None,
        });
        Hub::new(HubConfig { proxies, ..world.config() })
    };
    let error = hub("localhost,10.0.0.0/8".into()).list(&request()).unwrap_err();
    assert!(matches!(error, HubError::Unreachable { .. }), "{error}");
    let asked = lines.recv().unwrap();
    assert!(asked.starts_with(&format!("CONNECT 127.0.0.1:{port} ")), "{asked}");
    // printf 'me:Passw0rd' | base64
    assert!(asked.to_lowercase().contains("proxy-authorization: basic bwu6ugfzc3cwcmq="), "{asked}");
    assert!(!format!("{error} {error:?}").contains("Passw0rd"), "{error:?}");
    for exception in [format!("127.0.0.1:{port}"), "127.0.0.0/8".into(), "*".into()] {
        assert!(hub(exception).list(&request()).is_ok());
    }
    assert!(lines.try_recv().is_err());
}
