//! The port that a server listens on.

use std::io::ErrorKind;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener};

use anyhow::{Result, anyhow, bail};

use super::keys::Keys;

/// Opens a port of this machine that no other machine reaches.
///
/// # Errors
/// When the host is another one, or the port is taken.
pub fn bind(host: &str, port: u16) -> Result<TcpListener> {
    bind_for(host, port, &Keys::none())
}

/// Opens a port, which other machines reach only if a key is wanted.
///
/// # Errors
/// When the host is no address, other machines could use the models without a key, or the port is taken.
pub fn bind_for(host: &str, port: u16, keys: &Keys) -> Result<TcpListener> {
    let address = match host.trim_matches(['[', ']']) {
        "localhost" => IpAddr::V4(Ipv4Addr::LOCALHOST),
        other => other.parse::<IpAddr>().map_err(|_| {
            anyhow!("--host {host}: this is no address of a machine; serve on 127.0.0.1, or with keys on 0.0.0.0, which is all addresses of this machine")
        })?,
    };
    if !address.is_loopback() && keys.wanted()?.is_none() {
        bail!(
            "--host {host}: other machines could use the models without a key, and there is no key yet\nhint: `homeroom keys add NAME` makes one; or serve on 127.0.0.1, and forward a port (ssh -L) where others need it"
        );
    }
    let address = SocketAddr::new(address, port);
    TcpListener::bind(address).map_err(|error| match error.kind() {
        ErrorKind::AddrInUse => {
            anyhow!("{address}: another program listens there, perhaps another `homeroom serve`; end it, or take another --port (0: a free one)")
        }
        ErrorKind::AddrNotAvailable => {
            anyhow!("{address}: this machine has no such address; --host 0.0.0.0 is all that it has")
        }
        _ => anyhow!("{address}: cannot listen there: {error}; --port 0 takes a free port"),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn other_machines_are_not_served_without_a_key() {
        for host in ["0.0.0.0", "::", "192.168.0.1"] {
            let refused = bind(host, 0).expect_err("it is refused").to_string();
            assert!(refused.contains("there is no key yet\nhint: `homeroom keys add NAME`"), "{refused}");
        }
        for host in ["example.com", ""] {
            let refused = bind(host, 0).expect_err("it is refused").to_string();
            assert!(refused.contains("no address of a machine"), "{refused}");
        }
        for host in ["127.0.0.1", "localhost"] {
            assert!(bind(host, 0).is_ok(), "{host}");
        }
    }
}
