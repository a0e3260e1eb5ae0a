//! The HTTP client of an endpoint, and where its sockets may lead.
//!
//! A conversation that must not leave this machine is held to that where the socket is made: names are not looked up, since a look-up leaves
//! this machine, too, and a connection goes to a loopback address or nowhere. What a file of handlers says is checked when it is read; this
//! holds whatever it says.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use ureq::config::Config;
use ureq::http::Uri;
use ureq::unversioned::resolver::{ResolvedSocketAddrs, Resolver};
use ureq::unversioned::transport::{ConnectionDetails, Connector, DefaultConnector, NextTimeout, Transport};
use ureq::{Agent, Error};

use super::endpoint::Endpoint;
use crate::handler::Context;

impl Endpoint {
    /// Makes the HTTP client of one answer. Its shutdown ends every wait of that answer, and of no other.
    pub(in crate::handler) fn agent(&self, context: &Context) -> Agent {
        let config = Agent::config_builder()
            .timeout_connect(Some(self.connect_timeout))
            .timeout_per_read(Some(self.read_timeout))
            .timeout_per_write(Some(self.read_timeout))
            .timeout_global(Some(self.answer_timeout))
            .http_status_as_error(false)
            .max_redirects(0)
            .max_redirects_will_error(false)
            .user_agent(concat!("homeroom/", env!("CARGO_PKG_VERSION")));
        if self.base_url.is_loopback() || context.stays() {
            // A proxy of the environment would take conversations away from this machine.
            return Agent::with_parts(config.proxy(None).build(), Staying(DefaultConnector::new()), Here);
        }
        Agent::new_with_config(config.build())
    }
}

/// What is said of an address that is not this machine's.
const DENIED: &str = "egress is denied: the address is not one of this machine, and nothing was sent";

fn denied() -> Error {
    Error::Io(io::Error::new(io::ErrorKind::PermissionDenied, DENIED))
}

/// Finds addresses of this machine, and asks nobody.
#[derive(Debug)]
struct Here;

impl Resolver for Here {
    fn resolve(&self, uri: &Uri, _: &Config, _: NextTimeout) -> Result<ResolvedSocketAddrs, Error> {
        let host = uri.host().unwrap_or_default().trim_matches(['[', ']']);
        let port = uri.port_u16().unwrap_or(if uri.scheme_str() == Some("https") { 443 } else { 80 });
        let found: Vec<IpAddr> = match host.parse::<IpAddr>() {
            Ok(address) => vec![address],
            Err(_) if host.eq_ignore_ascii_case("localhost") => {
                vec![Ipv4Addr::LOCALHOST.into(), Ipv6Addr::LOCALHOST.into()]
            }
            Err(_) => Vec::new(),
        };
        let mut addresses = self.empty();
        for address in found.into_iter().filter(IpAddr::is_loopback) {
            addresses.push(SocketAddr::new(address, port));
        }
        if addresses.is_empty() { Err(denied()) } else { Ok(addresses) }
    }
}

/// Connects to addresses of this machine alone.
#[derive(Debug)]
struct Staying(DefaultConnector);

impl Connector for Staying {
    type Out = Box<dyn Transport>;

    fn connect(&self, details: &ConnectionDetails, chained: Option<()>) -> Result<Option<Self::Out>, Error> {
        if details.addrs.iter().any(|address| !address.ip().is_loopback()) {
            return Err(denied());
        }
        self.0.connect(details, chained)
    }
}
