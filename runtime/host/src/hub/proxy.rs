//! The proxy that the environment names. What cannot be used of it is told: a connection past a proxy that was asked for would show
//! others what the user meant to hide.

use ureq::http::Uri;
use ureq::{Proxy, ProxyProtocol};

/// Variables that name a proxy, as curl's and Python's programs have them; the first that is set counts.
const VARIABLES: [&str; 6] = ["HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy", "HTTP_PROXY", "http_proxy"];

/// The proxy that a variable of the environment names.
pub(super) struct Named {
    /// The variable.
    pub(super) variable: &'static str,
    /// The proxy, or why there is none that can be used.
    pub(super) proxy: Result<Proxy, &'static str>,
    /// Matches the hosts of `NO_PROXY`, which are asked without a proxy.
    exceptions: Option<Proxy>,
}

impl Named {
    /// The proxy that the environment names, if it does.
    pub(super) fn from_environment() -> Option<Self> {
        let set = |name: &&'static str| Some((*name, std::env::var_os(name).filter(|value| !value.is_empty())?));
        let (variable, value) = VARIABLES.iter().find_map(set)?;
        let exceptions = ["NO_PROXY", "no_proxy"].into_iter().find_map(|name| std::env::var(name).ok());
        Some(Self::new(variable, &value.to_string_lossy(), &exceptions.unwrap_or_default()))
    }

    fn new(variable: &'static str, value: &str, exceptions: &str) -> Self {
        let value = value.trim();
        let proxy = match value.split_once("://").map(|(scheme, _)| scheme.to_ascii_lowercase()) {
            Some(scheme) if scheme.starts_with("socks") => Err("SOCKS proxies are not supported"),
            Some(scheme) if !["http", "https"].contains(&scheme.as_str()) => Err("it holds no address of a proxy"),
            _ => Proxy::new(value).ok().filter(is_right).ok_or("it holds no address of a proxy"),
        };
        let entries = exceptions.split(',').map(str::trim).filter(|entry| !entry.is_empty());
        let matcher = entries.fold(Proxy::builder(ProxyProtocol::Http).host("localhost"), ureq::ProxyBuilder::no_proxy);
        Self { variable, proxy, exceptions: matcher.build().ok() }
    }

    /// Whether an address is asked without a proxy.
    pub(super) fn is_exception(&self, uri: &Uri) -> bool {
        self.exceptions.as_ref().is_some_and(|exceptions| exceptions.is_no_proxy(uri))
    }

    /// The proxy as a message names it, without user and password.
    pub(super) fn shown(&self) -> String {
        match &self.proxy {
            Ok(proxy) => format!("the proxy {}:{} ({})", proxy.host(), proxy.port(), self.variable),
            Err(_) => format!("the proxy of {}", self.variable),
        }
    }
}

/// `http://:8080` and `http://host:port` parse, too.
fn is_right(proxy: &Proxy) -> bool {
    let authority = proxy.uri().authority().map(|authority| authority.as_str()).unwrap_or_default();
    let address = authority.rsplit_once('@').map_or(authority, |(_, address)| address);
    let port = address.strip_prefix(proxy.host()).unwrap_or_default();
    !proxy.host().is_empty() && (port.is_empty() || port[1..].parse::<u16>().is_ok_and(|port| port > 0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_proxy_that_cannot_be_used_is_no_proxy() {
        for good in ["http://proxy.school:3128", "proxy.school:3128", "https://me:pass%40word@[::1]:8443", "HTTP://p"] {
            let named = Named::new("HTTPS_PROXY", good, "");
            assert!(named.proxy.is_ok(), "{good}");
            assert!(!named.shown().contains("pass"), "{}", named.shown());
        }
        for bad in [
            "socks5://p:1080",
            "SOCKS4://p",
            "socks5h://p",
            "ftp://p",
            "http://",
            "http://p:0",
            "http://p:x",
            "a b",
            "/x",
        ] {
            assert!(Named::new("HTTPS_PROXY", bad, "").proxy.is_err(), "{bad}");
        }
    }

    #[test]
    fn hosts_of_no_proxy_are_asked_without_one() {
        let named = Named::new("ALL_PROXY", "socks5://p", "mirror.school, .lab.example");
        let is_exception = |host: &str| named.is_exception(&format!("https://{host}/x").parse().expect("an address"));
        assert!(is_exception("mirror.school") && is_exception("a.lab.example"));
        assert!(!is_exception("huggingface.co") && !is_exception("mirror.school.example"));
    }
}
