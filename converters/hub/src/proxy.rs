//! Which proxy a connection goes through.
//!
//! The variables mean what they mean to curl and the Hugging Face tools: the one of the scheme goes first, `all_proxy` stands
//! in for what is not set, lower case goes before upper case, and `no_proxy` lists hosts, domains and networks, with or
//! without a port, that are reached directly.

use std::net::IpAddr;

use ureq::Proxy;
use ureq::http::Uri;

use crate::HubError;
use crate::address::port;

/// The proxies of a program. The default is none.
#[derive(Debug, Clone, Default)]
pub struct Proxies {
    http: Option<Variable>,
    https: Option<Variable>,
    direct: Vec<Exception>,
}

/// A proxy, or, where the text is no address of one, nothing. The text itself may hold a password and is not kept.
#[derive(Debug, Clone)]
struct Variable {
    name: String,
    proxy: Option<Proxy>,
}

impl Proxies {
    /// What the usual variables say; `var` looks one up.
    ///
    /// A proxy that is none is an error of whoever uses it: [`HubError::InvalidProxy`].
    pub fn from_variables(var: impl Fn(&str) -> Option<String>) -> Proxies {
        let either = |name: &str| {
            // One that is set to nothing hides the other.
            let names = [name.to_owned(), name.to_uppercase()];
            let found = names.into_iter().find_map(|name| var(&name).map(|value| (name, value)));
            found.map(|(name, value)| (name, value.trim().to_owned())).filter(|(_, value)| !value.is_empty())
        };
        let proxy = |name: &str| {
            let (name, value) = either(name).or_else(|| either("all_proxy"))?;
            Some(Variable { name, proxy: Proxy::new(&value).ok() })
        };
        let direct = either("no_proxy").map(|(_, list)| {
            list.split([',', ' ', '\t', '\n']).filter_map(|entry| Exception::parse(entry.trim())).collect()
        });
        Proxies { http: proxy("http_proxy"), https: proxy("https_proxy"), direct: direct.unwrap_or_default() }
    }

    /// The proxy for connections to `uri`.
    pub(crate) fn of(&self, uri: &Uri) -> Result<Option<Proxy>, HubError> {
        let variable = if uri.scheme_str() == Some("https") { &self.https } else { &self.http };
        let Some(variable) = variable else { return Ok(None) };
        if self.direct.iter().any(|exception| exception.covers(uri)) {
            return Ok(None);
        }
        match &variable.proxy {
            Some(proxy) => Ok(Some(proxy.clone())),
            None => Err(HubError::InvalidProxy { variable: variable.name.clone() }),
        }
    }
}

/// What is reached without a proxy.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Exception {
    hosts: Hosts,
    /// Only this port.
    port: Option<u16>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Hosts {
    All,
    /// A host, and every host of the domain of this name.
    Domain(String),
    /// Addresses that share the first bits with this one.
    Network(IpAddr, u32),
}

impl Exception {
    /// Reads `*`, `host`, `.domain`, `*.domain`, an address or `address/bits`, each but the last perhaps with `:port`.
    fn parse(entry: &str) -> Option<Exception> {
        if entry == "*" {
            return Some(Exception { hosts: Hosts::All, port: None });
        }
        if let Some((address, bits)) = entry.split_once('/') {
            let (address, bits) = (parse_address(address)?, bits.parse().ok()?);
            return (bits <= width(address)).then_some(Exception { hosts: Hosts::Network(address, bits), port: None });
        }
        if let Some(address) = parse_address(entry) {
            return Some(Exception { hosts: Hosts::Network(address, width(address)), port: None });
        }
        let (host, port) = match entry.rsplit_once(':') {
            Some((host, port)) => (host, Some(port.parse().ok()?)),
            None => (entry, None),
        };
        if let Some(address) = parse_address(host) {
            return Some(Exception { hosts: Hosts::Network(address, width(address)), port });
        }
        let domain = host.trim_start_matches('*').trim_matches('.').to_ascii_lowercase();
        (!domain.is_empty()).then_some(Exception { hosts: Hosts::Domain(domain), port })
    }

    fn covers(&self, uri: &Uri) -> bool {
        let host = uri.host().unwrap_or_default().trim_end_matches('.').to_ascii_lowercase();
        self.port.is_none_or(|wanted| wanted == port(uri))
            && match &self.hosts {
                Hosts::All => true,
                Hosts::Domain(domain) => {
                    host.strip_suffix(domain.as_str()).is_some_and(|rest| rest.is_empty() || rest.ends_with('.'))
                }
                Hosts::Network(network, bits) => {
                    parse_address(&host).is_some_and(|address| share_prefix(address, *network, *bits))
                }
            }
    }
}

/// An address, also in the brackets that it wears in front of a port.
fn parse_address(text: &str) -> Option<IpAddr> {
    text.strip_prefix('[').and_then(|text| text.strip_suffix(']')).unwrap_or(text).parse().ok()
}

fn width(address: IpAddr) -> u32 {
    if address.is_ipv4() { 32 } else { 128 }
}

fn share_prefix(a: IpAddr, b: IpAddr, bits: u32) -> bool {
    let differing = match (a, b) {
        (IpAddr::V4(a), IpAddr::V4(b)) => u128::from((a.to_bits() ^ b.to_bits()).checked_shr(32 - bits).unwrap_or(0)),
        (IpAddr::V6(a), IpAddr::V6(b)) => (a.to_bits() ^ b.to_bits()).checked_shr(128 - bits).unwrap_or(0),
        _ => return false,
    };
    differing == 0
}

#[cfg(test)]
mod tests {
    use super::*;

    fn proxies(variables: &[(&str, &str)]) -> Proxies {
        Proxies::from_variables(|name| variables.iter().find(|(n, _)| *n == name).map(|(_, value)| (*value).to_owned()))
    }

    fn of(proxies: &Proxies, uri: &str) -> Option<String> {
        proxies.of(&uri.parse().unwrap()).unwrap().map(|proxy| proxy.host().to_owned())
    }

    #[test]
    fn the_schemes_own_variable_goes_first() {
        let usual =
            proxies(&[("ALL_PROXY", "socks5://all:1"), ("HTTPS_PROXY", "http://tls:1"), ("http_proxy", "plain:1")]);
        assert_eq!(of(&usual, "https://hub/").as_deref(), Some("tls"));
        assert_eq!(of(&usual, "http://hub/").as_deref(), Some("plain"));
        let some = proxies(&[("all_proxy", "http://all:1"), ("HTTP_PROXY", "http://plain:1")]);
        assert_eq!(of(&some, "https://hub/").as_deref(), Some("all"));
        let both = proxies(&[("https_proxy", "http://lower:1"), ("HTTPS_PROXY", "http://upper:1")]);
        assert_eq!(of(&both, "https://hub/").as_deref(), Some("lower"));
        assert_eq!(of(&both, "http://hub/"), None);
        assert_eq!(of(&proxies(&[("https_proxy", ""), ("HTTPS_PROXY", "http://upper:1")]), "https://hub/"), None);
    }

    #[test]
    fn a_proxy_that_is_none_is_named_without_its_password() {
        let wrong = proxies(&[("HTTPS_PROXY", "gopher://me:secret@proxy"), ("NO_PROXY", "near")]);
        let error = wrong.of(&"https://hub/".parse().unwrap()).unwrap_err();
        assert_eq!(error.to_string(), "HTTPS_PROXY is not the address of a proxy");
        assert_eq!(of(&wrong, "https://near/"), None);
        let right = proxies(&[("HTTPS_PROXY", "http://me:secret@proxy")]);
        assert!(!format!("{wrong:?}{right:?}").contains("secret"));
    }

    #[test]
    fn exceptions_are_hosts_domains_networks_and_ports() {
        let cases = [
            ("*", "https://hub/", true),
            ("a, hub", "https://HUB/", true),
            ("hub", "https://cdn.hub/", true),
            (".hub", "https://hub/", true),
            ("*.hub b", "https://cdn.hub/", true),
            ("hub", "https://github/", false),
            ("hub:8080", "http://hub:8080/", true),
            ("hub:8080", "http://hub/", false),
            ("hub:443", "https://hub/", true),
            ("10.0.0.0/8", "http://10.1.2.3/", true),
            ("10.0.0.0/8", "http://11.1.2.3/", false),
            ("0.0.0.0/0", "http://11.1.2.3/", true),
            ("10.0.0.0/8", "http://hub/", false),
            ("127.0.0.1", "http://127.0.0.1:9/", true),
            ("127.0.0.1:8", "http://127.0.0.1:9/", false),
            ("fd00::/8", "http://[fd12::1]/", true),
            ("::1", "http://[::1]:9/", true),
            ("[::1]:8", "http://[::1]:9/", false),
            ("10.0.0.0/99,/8,:,.", "http://10.0.0.1/", false),
        ];
        for (list, uri, direct) in cases {
            let proxies = proxies(&[("all_proxy", "http://p:1"), ("no_proxy", list)]);
            assert_eq!(of(&proxies, uri).is_none(), direct, "{list} {uri}");
        }
    }
}
