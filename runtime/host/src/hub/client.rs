//! Requests to the hub. Redirects are followed by hand, so that the token goes to the hub's own address and to no other.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, SystemTime};

use anyhow::{Context, Result, anyhow, bail};
use homeroom_engine::files::read_bytes;
use ureq::http::{Response, Uri};
use ureq::tls::{Certificate, PemItem, RootCerts, TlsConfig, parse_pem};
use ureq::{Agent, Body, Timeout};

use super::endpoint::{Endpoint, Origin, redirected};
use super::patience::{Failure, Patience, Silence, Stop};
use super::proxy;
use super::token::Token;
use crate::interrupt::{self, Interrupted};

/// Redirects that are followed for one request.
const REDIRECTS_MAX: usize = 5;
/// Longest reason of a refusal that is passed on, in characters.
const REASON_MAX: usize = 300;
/// Longest file of certificates, in bytes.
const CERTIFICATES_BYTES_MAX: u64 = 16 << 20;
/// Variables that name a file of certificates to trust, as curl's and Python's programs have them.
const CERTIFICATES: [&str; 3] = ["SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"];

/// Asks the hub.
pub(super) struct Client {
    pub(super) endpoint: Endpoint,
    pub(super) token: Option<Token>,
    pub(super) patience: Patience,
    pub(super) stop: Stop,
    pub(super) silence: Silence,
    /// A server has answered.
    has_answered: AtomicBool,
    /// The proxy of the environment.
    proxy: Option<proxy::Named>,
    /// For other machines; through the proxy if there is one.
    agent: Agent,
    /// For this machine and those of `NO_PROXY`; never through a proxy.
    direct: Agent,
}

/// A refusal of the hub.
pub(super) struct Refusal {
    pub(super) status: u16,
    /// `X-Error-Code`: `RepoNotFound`, `GatedRepo`, `RevisionNotFound`, `EntryNotFound`.
    pub(super) code: String,
    /// `X-Error-Message`, without the token and what a terminal would obey.
    pub(super) reason: String,
}

impl Client {
    /// Makes a client; connects to nothing.
    ///
    /// # Errors
    /// When a file of certificates that the environment names cannot be used.
    pub(super) fn new(endpoint: Endpoint, token: Option<Token>, patience: Patience) -> Result<Self> {
        let config = || {
            Agent::config_builder()
                .timeout_resolve(Some(patience.connect))
                .timeout_connect(Some(patience.connect))
                .timeout_recv_response(Some(patience.silence))
                .timeout_per_read(Some(patience.silence))
                .timeout_per_write(Some(patience.silence))
                .http_status_as_error(false)
                .max_redirects(0)
                .max_redirects_will_error(false)
                .accept_encoding("identity")
                .user_agent(concat!("homeroom/", env!("CARGO_PKG_VERSION")))
        };
        let tls = match certificates()? {
            Some(certificates) => TlsConfig::builder().root_certs(RootCerts::new_with_certs(&certificates)).build(),
            None => TlsConfig::default(),
        };
        let proxy = proxy::Named::from_environment();
        let through = proxy.as_ref().and_then(|named| named.proxy.as_ref().ok()).cloned();
        let agent = Agent::new_with_config(config().tls_config(tls.clone()).proxy(through).build());
        let direct = Agent::new_with_config(config().tls_config(tls).proxy(None).build());
        let (stop, silence, has_answered) = (Stop::default(), Silence::default(), AtomicBool::new(false));
        Ok(Self { endpoint, token, patience, stop, silence, has_answered, proxy, agent, direct })
    }

    /// Ends every wait of this client's requests, and has later ones fail.
    pub(super) fn shut_down(&self) {
        self.stop.set();
        self.agent.clone().shutdown();
        self.direct.clone().shutdown();
    }

    /// Whether a server has answered.
    pub(super) fn has_answered(&self) -> bool {
        self.has_answered.load(Ordering::SeqCst)
    }

    /// Whether the hub is asked through a proxy.
    pub(super) fn is_through_proxy(&self) -> bool {
        let uri = self.endpoint.at("").parse::<Uri>().ok();
        let is_exception = |named: &proxy::Named| uri.as_ref().is_some_and(|uri| named.is_exception(uri));
        !self.endpoint.origin().is_loopback() && self.proxy.as_ref().is_some_and(|named| !is_exception(named))
    }

    /// Asks for an address, from a byte on if that is said, and follows where it is redirected. The answer is one that has a body:
    /// 200, 206, or 416 where a byte was said.
    ///
    /// # Errors
    /// When there is no connection, and when the hub refuses; `explain` makes the message of that.
    pub(super) fn get(
        &self,
        url: &str,
        from: Option<u64>,
        explain: &dyn Fn(&Refusal) -> anyhow::Error,
    ) -> Result<Response<Body>, Failure> {
        let mut uri: Uri = url.parse().map_err(|_| anyhow!("{url}: not an address"))?;
        for _ in 0..=REDIRECTS_MAX {
            let response = self.ask(&uri, from)?;
            let status = response.status().as_u16();
            match status {
                200 | 206 => return Ok(response),
                416 if from.is_some() => return Ok(response),
                301 | 302 | 303 | 307 | 308 => {
                    let location = response.headers().get("location").and_then(|location| location.to_str().ok());
                    let location = location.ok_or_else(|| anyhow!("{}: it redirects to nowhere", host(&uri)))?;
                    uri = redirected(&uri, location).with_context(|| host(&uri))?;
                }
                _ => return Err(self.refused(&uri, &response, explain)),
            }
        }
        Err(anyhow!("{}: more than {REDIRECTS_MAX} redirects", host(&uri)).into())
    }

    /// Asks the hub's own address for anything, without the token; returns the host and the status that it answers with.
    ///
    /// # Errors
    /// When there is no answer.
    pub(super) fn reach(&self) -> Result<(String, u16), Failure> {
        let uri: Uri = self.endpoint.at("").parse().map_err(|_| anyhow!("not an address"))?;
        let response = self.ask(&uri, None)?;
        Ok((host(&uri), response.status().as_u16()))
    }

    fn ask(&self, uri: &Uri, from: Option<u64>) -> Result<Response<Body>, Failure> {
        self.stop.check()?;
        let origin = Origin::of(uri)?;
        let proxy = self.proxy.as_ref().filter(|named| !origin.is_loopback() && !named.is_exception(uri));
        if let Some(proxy::Named { variable, proxy: Err(why), .. }) = proxy {
            return Err(anyhow!(
                "{variable}: {why}\nhint: set it to the address of an HTTP proxy, like http://proxy.school:3128, or unset it; hosts in \
                 NO_PROXY are asked without one"
            )
            .into());
        }
        let agent = if proxy.is_some() { &self.agent } else { &self.direct };
        let mut request = agent.get(uri);
        if let Some(token) = &self.token
            && origin == *self.endpoint.origin()
            && !origin.can_be_overheard()
        {
            request = request.header("authorization", format!("Bearer {}", token.secret.expose()));
        }
        // No If-Range: a file of a commit never changes, its digest is checked, and the server that a redirect leads to has other
        // tags than the hub.
        if let Some(from) = from {
            request = request.header("range", format!("bytes={from}-"));
        }
        let _awaited = self.silence.begin(&host(uri));
        let response = request.call().map_err(|error| unreachable(uri, proxy, error))?;
        self.has_answered.store(true, Ordering::SeqCst);
        Ok(response)
    }

    fn refused(&self, uri: &Uri, response: &Response<Body>, explain: &dyn Fn(&Refusal) -> anyhow::Error) -> Failure {
        let status = response.status().as_u16();
        let header = |name: &str| response.headers().get(name).map(|value| String::from_utf8_lossy(value.as_bytes()));
        let after = header("retry-after").and_then(|wait| retry_after(&wait));
        let what = match status {
            429 => "the hub says that there were too many requests (status 429)".to_owned(),
            408 | 425 | 500 | 502 | 503 | 504 => format!("the hub cannot answer now (status {status})"),
            _ => {
                let text = |name| self.clean(&header(name).unwrap_or_default());
                let (code, reason) = (text("x-error-code"), text("x-error-message"));
                let error = explain(&Refusal { status, code, reason });
                return Failure::Final(if self.is_hub(uri) { error } else { error.context(host(uri)) });
            }
        };
        Failure::Passing { what: if self.is_hub(uri) { what } else { what.replace("the hub", &host(uri)) }, after }
    }

    fn is_hub(&self, uri: &Uri) -> bool {
        Origin::of(uri).is_ok_and(|origin| origin == *self.endpoint.origin())
    }

    /// A server's text without the token and control characters, cut last: half a token is not found.
    fn clean(&self, text: &str) -> String {
        let text: String = text.chars().filter(|c| !c.is_control()).collect();
        let text = self.token.as_ref().map_or(text.clone(), |token| token.secret.scrub(&text));
        text.chars().take(REASON_MAX).collect()
    }
}

/// Why there is no answer. A connection that cannot be made at all may be made later; one that is not trusted will not, nor will a server
/// that does not speak HTTP learn it.
fn unreachable(uri: &Uri, proxy: Option<&proxy::Named>, error: ureq::Error) -> Failure {
    use io::ErrorKind::{AddrNotAvailable, ConnectionRefused, HostUnreachable, NetworkDown, NetworkUnreachable};
    if interrupt::asked() {
        return Failure::Final(Interrupted::default().into());
    }
    // The host of an address is looked up and connected to by the proxy, so that what fails here is the proxy.
    let reached = proxy.map_or_else(|| host(uri), proxy::Named::shown);
    let gone = |what: &str| Failure::Unreachable { host: reached.clone(), what: what.to_owned() };
    match &error {
        ureq::Error::HostNotFound => return gone("this name has no address here"),
        ureq::Error::Timeout(Timeout::Resolve | Timeout::Connect) => return gone("no answer in time"),
        ureq::Error::Io(error) if is_lookup(error) => return gone("this name has no address here"),
        ureq::Error::Io(error) => match error.kind() {
            ConnectionRefused => return gone("no server answers there"),
            AddrNotAvailable | HostUnreachable | NetworkDown | NetworkUnreachable => return gone(&error.to_string()),
            _ => {}
        },
        _ => {}
    }
    let host = host(uri);
    let words = match &error {
        ureq::Error::Io(error) => return failed(&host, error),
        ureq::Error::Timeout(_) => "no answer in time".to_owned(),
        ureq::Error::ConnectProxyFailed(reason) => return refused_by_proxy(&host, &reached, reason),
        error if is_about_trust(&error.to_string()) => return distrusted(&host, &error.to_string()),
        ureq::Error::Protocol(_) | ureq::Error::Http(_) | ureq::Error::LargeResponseHeader(..) => {
            return Failure::Final(anyhow!(
                "{host}: its answer is not HTTP as it should be ({error})\nhint: look whether HF_ENDPOINT is right; a proxy may change answers, too"
            ));
        }
        error => error.to_string(),
    };
    Failure::Passing { what: format!("{host}: {words}"), after: None }
}

/// Whether a name was looked up in vain: there is no kind for it.
fn is_lookup(error: &io::Error) -> bool {
    error.to_string().contains("failed to lookup address")
}

/// A proxy that answers, and makes no connection to a host. `reason` ends in the status twice, `407/407`, if there is one.
fn refused_by_proxy(host: &str, proxy: &str, reason: &str) -> Failure {
    let status = reason.rsplit('/').next().and_then(|status| status.parse::<u16>().ok());
    match status {
        Some(407) => Failure::Final(anyhow!(
            "{proxy} asks for a user and a password (status 407)\nhint: they belong into the address: http://USER:PASSWORD@HOST:PORT, with \
             %40 for @ and %3A for :"
        )),
        Some(status @ 400..500) => Failure::Final(anyhow!(
            "{proxy} makes no connection to {host} (status {status})\nhint: whoever keeps the proxy can allow {host}"
        )),
        Some(status) => {
            Failure::Passing { what: format!("{proxy} makes no connection to {host} (status {status})"), after: None }
        }
        None => Failure::Passing { what: format!("{proxy} does not answer"), after: None },
    }
}

/// As [`broken`], or a connection that is not trusted.
fn failed(host: &str, error: &io::Error) -> Failure {
    let text = error.to_string();
    if is_about_trust(&text) {
        return distrusted(host, &text);
    }
    match broken(error) {
        Failure::Passing { what, after } => Failure::Passing { what: format!("{host}: {what}"), after },
        other => other,
    }
}

/// What a connection that broke off is called.
pub(super) fn broken(error: &io::Error) -> Failure {
    if interrupt::asked() {
        return Failure::Final(Interrupted::default().into());
    }
    let text = error.to_string();
    let what = match error.kind() {
        io::ErrorKind::ConnectionRefused => "no server answers there".to_owned(),
        io::ErrorKind::TimedOut | io::ErrorKind::WouldBlock => "no answer in time".to_owned(),
        io::ErrorKind::UnexpectedEof | io::ErrorKind::ConnectionReset | io::ErrorKind::ConnectionAborted => {
            "the connection was cut".to_owned()
        }
        _ if text.contains("timeout") => "no answer in time".to_owned(),
        _ => text,
    };
    Failure::Passing { what, after: None }
}

fn is_about_trust(text: &str) -> bool {
    text.contains("invalid peer certificate")
}

fn distrusted(host: &str, text: &str) -> Failure {
    let set = CERTIFICATES.iter().find(|name| std::env::var_os(name).is_some_and(|value| !value.is_empty()));
    let hint = match set {
        Some(name) => format!("{name} names the certificates that are trusted; the one of this connection is not among them"),
        None => "in a network whose proxy opens encrypted connections, as in many schools, SSL_CERT_FILE has to name the file (PEM) \
                 of its certificate; with it installed in the system that is /etc/ssl/certs/ca-certificates.crt or the like"
            .to_owned(),
    };
    Failure::Final(anyhow!("{host}: its certificate is not trusted ({text})\nhint: {hint}"))
}

/// The certificates that the environment names, if it does.
fn certificates() -> Result<Option<Vec<Certificate<'static>>>> {
    for name in CERTIFICATES {
        let Some(file) = super::stores::variable(name) else { continue };
        let read = || -> Result<Vec<Certificate<'static>>> {
            let bytes = read_bytes(&file, CERTIFICATES_BYTES_MAX)?;
            let mut certificates = Vec::new();
            for item in parse_pem(&bytes) {
                if let PemItem::Certificate(certificate) = item? {
                    certificates.push(certificate);
                }
            }
            if certificates.is_empty() {
                bail!("{}: there is no certificate in it (PEM)", file.display());
            }
            Ok(certificates)
        };
        return read().map(Some).with_context(|| name.to_owned());
    }
    Ok(None)
}

/// The host of an address: the rest may hold what gives access.
pub(super) fn host(uri: &Uri) -> String {
    uri.host().unwrap_or_default().to_owned()
}

/// A time to wait: seconds, or a date.
fn retry_after(text: &str) -> Option<Duration> {
    let text = text.trim();
    let seconds = text.parse().ok().and_then(|seconds| Duration::try_from_secs_f64(seconds).ok());
    seconds.or_else(|| {
        let date = httpdate::parse_http_date(text).ok()?;
        Some(date.duration_since(SystemTime::now()).unwrap_or_default())
    })
}
