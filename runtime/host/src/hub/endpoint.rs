//! Where the hub is, what may be sent there, and where it may lead.

use std::net::{IpAddr, Ipv4Addr};

use anyhow::{Result, anyhow, ensure};
use ureq::http::Uri;

/// The hub itself.
const DEFAULT: &str = "https://huggingface.co";

/// Scheme, host and port of an address: who is meant by it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Origin {
    encrypted: bool,
    host: String,
    port: u16,
}

impl Origin {
    /// Reads the origin of an address.
    ///
    /// # Errors
    /// When it is no address with `http` or `https`, or has a name or password in it.
    pub(super) fn of(uri: &Uri) -> Result<Self> {
        let encrypted = match uri.scheme_str() {
            Some("https") => true,
            Some("http") => false,
            _ => return Err(anyhow!("an address begins with https:// or http://")),
        };
        let authority = uri.authority().ok_or_else(|| anyhow!("the address has no host"))?;
        ensure!(!authority.as_str().contains('@'), "a name or password in the address is not supported");
        let host = authority.host().trim_matches(['[', ']']).to_ascii_lowercase();
        ensure!(!host.is_empty(), "the address has no host");
        ensure!(is_plain(&host), "a host of numbers is written like 192.0.2.1");
        let port = authority.as_str().strip_prefix(authority.host()).unwrap_or_default();
        let is_right = port.is_empty() || authority.port_u16().is_some_and(|port| port > 0);
        ensure!(is_right, "the port should be from 1 to 65535");
        let port = authority.port_u16().unwrap_or(if encrypted { 443 } else { 80 });
        Ok(Self { encrypted, host, port })
    }

    /// Returns true if it is this machine.
    pub(super) fn is_loopback(&self) -> bool {
        let address = self.host.parse::<IpAddr>().map(|address| address.to_canonical());
        self.host.trim_end_matches('.') == "localhost"
            || address.is_ok_and(|address| address.is_loopback() || address.is_unspecified())
    }

    /// Returns true if what is sent there can be read on the way.
    pub(super) fn can_be_overheard(&self) -> bool {
        !self.encrypted && !self.is_loopback()
    }
}

/// Whether a host is a name, or an address in its usual form: `127.1`, `0x7f.1` and `2130706433` are this machine to some programs.
fn is_plain(host: &str) -> bool {
    let last = host.trim_end_matches('.').rsplit('.').next().unwrap_or_default();
    let is_number = last.bytes().all(|c| c.is_ascii_digit())
        || last.strip_prefix("0x").is_some_and(|digits| digits.bytes().all(|c| c.is_ascii_hexdigit()));
    !is_number || host.parse::<Ipv4Addr>().is_ok()
}

/// The hub's address: `$HF_ENDPOINT`, a mirror, or the hub itself.
#[derive(Clone, Debug)]
pub struct Endpoint {
    base: String,
    origin: Origin,
    /// `HF_ENDPOINT` names it.
    is_set: bool,
}

impl Endpoint {
    /// Reads an address.
    ///
    /// # Errors
    /// When it is none, or has a password, `?` or `#` in it.
    pub fn parse(text: &str) -> Result<Self> {
        let base = text.trim_end_matches('/');
        let uri: Uri = base.parse().map_err(|_| anyhow!("not an address"))?;
        ensure!(uri.query().is_none() && !text.contains('#'), "an address with `?` or `#` is not supported");
        let origin = Origin::of(&uri)?;
        Ok(Self { base: base.to_owned(), origin, is_set: false })
    }

    /// `$HF_ENDPOINT`, or the hub itself.
    ///
    /// # Errors
    /// When the variable is no address.
    pub fn from_environment() -> Result<Self> {
        let set = std::env::var("HF_ENDPOINT").ok().filter(|text| !text.trim().is_empty());
        let text = set.as_deref().map_or(DEFAULT, str::trim);
        // The value is not repeated: there may be a password in it.
        let endpoint = Self::parse(text);
        let endpoint = endpoint.map_err(|error| anyhow!("HF_ENDPOINT: {error}\nhint: it should be like {DEFAULT}"))?;
        Ok(Self { is_set: set.is_some(), ..endpoint })
    }

    /// The address if `HF_ENDPOINT` names it.
    pub(super) fn set(&self) -> Option<&str> {
        self.is_set.then_some(self.base.as_str())
    }

    /// The address of a path.
    pub(super) fn at(&self, path: &str) -> String {
        format!("{}/{path}", self.base)
    }

    pub(super) fn origin(&self) -> &Origin {
        &self.origin
    }
}

/// Where a redirect leads. From a mirror with plain http it may lead to plain http: no token is sent there. A path without a beginning is meant from the directory of the address that it comes from.
///
/// # Errors
/// When it leads to no address, from https to plain http, to plain http elsewhere than on this machine, or from elsewhere to this machine.
pub(super) fn redirected(from: &Uri, location: &str) -> Result<Uri> {
    let location = location.trim();
    let scheme = from.scheme_str().unwrap_or_default();
    let authority = from.authority().map(ToString::to_string).unwrap_or_default();
    let absolute = match location {
        _ if location.contains("://") && !location.starts_with(['/', '?', '.']) => location.to_owned(),
        _ if location.starts_with("//") => format!("{scheme}:{location}"),
        _ if location.starts_with('/') => format!("{scheme}://{authority}{location}"),
        _ if location.starts_with('?') => format!("{scheme}://{authority}{}{location}", from.path()),
        _ => {
            let directory = from.path().rsplit_once('/').map_or("", |(directory, _)| directory);
            format!("{scheme}://{authority}{directory}/{location}")
        }
    };
    let absolute = absolute.split('#').next().unwrap_or_default();
    let to: Uri = absolute.parse().map_err(|_| anyhow!("it redirects to what is no address"))?;
    let (before, after) = (Origin::of(from)?, Origin::of(&to)?);
    let host = &after.host;
    ensure!(
        !before.encrypted || after.encrypted,
        "it redirects from https to plain http ({host}), which is not followed"
    );
    ensure!(
        !after.can_be_overheard() || before.can_be_overheard(),
        "it redirects to plain http ({host}), which is not followed"
    );
    ensure!(before.is_loopback() || !after.is_loopback(), "it redirects to this machine, which is not followed");
    Ok(to)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn uri(text: &str) -> Uri {
        text.parse().expect("an address")
    }

    #[test]
    fn a_redirect_is_read_from_where_it_comes() -> Result<()> {
        let from = uri("https://hub.example/a/b/resolve/c?x=1");
        for (location, to) in [
            ("/api/x", "https://hub.example/api/x"),
            ("//cdn.example:8443/f", "https://cdn.example:8443/f"),
            ("other", "https://hub.example/a/b/resolve/other"),
            ("?y=2", "https://hub.example/a/b/resolve/c?y=2"),
            ("https://cdn.example/f?sig=a%2Fb#part", "https://cdn.example/f?sig=a%2Fb"),
            ("/f?next=http://evil.example", "https://hub.example/f?next=http://evil.example"),
        ] {
            assert_eq!(redirected(&from, location)?.to_string(), to);
        }
        let local = uri("http://127.0.0.1:7000/x");
        assert_eq!(redirected(&local, "http://localhost:7001/y")?.to_string(), "http://localhost:7001/y");
        assert!(redirected(&local, "https://cdn.example/y").is_ok());
        Ok(())
    }

    #[test]
    fn a_redirect_to_what_can_be_overheard_is_not_followed() {
        let (hub, local, plain) =
            (uri("https://hub.example/a"), uri("http://127.0.0.1:7000/a"), uri("http://mirror.school/a"));
        for (from, location) in [
            (&hub, "http://hub.example/a"),
            (&hub, "http://127.0.0.1/a"),
            (&hub, "http://localhost:7000/a"),
            (&hub, "https://127.0.0.1/a"),
            (&hub, "https://[::1]/a"),
            (&hub, "https://[::ffff:127.0.0.1]/a"),
            (&hub, "https://0.0.0.0/a"),
            (&hub, "https://127.1/a"),
            (&hub, "https://2130706433/a"),
            (&hub, "https://0x7f.1/a"),
            (&hub, "https://0x7F000001/a"),
            (&hub, "https://0/a"),
            (&hub, "https://127.0.0.1./a"),
            (&hub, "https://localhost./a"),
            (&hub, "file:///etc/passwd"),
            (&hub, "ftp://hub.example/a"),
            (&hub, "https://me:secret@hub.example/a"),
            (&hub, "https://hub.example:0/a"),
            (&hub, "https://a b/"),
            (&local, "http://192.0.2.1/a"),
            (&local, "http://localhost.evil.example/a"),
            (&local, "http://127.0.0.1.evil.example/a"),
            (&plain, "http://127.0.0.1/b"),
        ] {
            assert!(redirected(from, location).is_err(), "{from} to {location}");
        }
        assert!(redirected(&plain, "http://mirror.school/b").is_ok(), "no token is sent there");
    }

    #[test]
    fn an_endpoint_is_an_address_without_a_password() {
        for good in
            ["https://huggingface.co", "https://hf-mirror.example/hub/", "http://127.0.0.1:8080", "http://[::1]:80"]
        {
            assert!(Endpoint::parse(good).is_ok(), "{good}");
        }
        for bad in [
            "",
            "huggingface.co",
            "ftp://a",
            "https://",
            "https://me:pw@a",
            "https://a?x",
            "https://a#x",
            "https://a:0",
        ] {
            assert!(Endpoint::parse(bad).is_err(), "{bad}");
        }
        assert_eq!(Endpoint::parse("https://a/b/").expect("an address").at("x"), "https://a/b/x");
    }
}
