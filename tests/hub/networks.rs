//! Encrypted connections, certificates of a school's proxy, and proxies.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Mutex};
use std::thread;

use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::{ServerConfig, ServerConnection, StreamOwned};

use super::*;

const TOKEN: &str = "hf_0123456789abcdefghijklmnop";

/// A model whose files are small, so that none is redirected to the storage.
fn small() -> Result<Repo> {
    Ok(llama()?.with("model.safetensors", vec![1; 99]).with("tokenizer.json", "{}"))
}

/// An encrypted connection in front of a server, with the certificate of the fixtures. It serves until the tests end.
fn encrypted(server: SocketAddr) -> Result<SocketAddr> {
    let chain = CertificateDer::pem_file_iter(fixture("tls/server.pem"))?.collect::<Result<Vec<_>, _>>()?;
    let key = PrivateKeyDer::from_pem_file(fixture("tls/server.key"))?;
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = ServerConfig::builder_with_provider(provider).with_safe_default_protocol_versions()?;
    let config = Arc::new(config.with_no_client_auth().with_single_cert(chain, key)?);
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let address = listener.local_addr()?;
    thread::spawn(move || {
        for stream in listener.incoming().map_while(Result::ok) {
            let config = config.clone();
            thread::spawn(move || -> Result<()> {
                let mut stream = BufReader::new(StreamOwned::new(ServerConnection::new(config)?, stream));
                let head = head(&mut stream)?;
                let mut behind = TcpStream::connect(server)?;
                behind.write_all(head.as_bytes())?;
                let mut answer = Vec::new();
                behind.read_to_end(&mut answer)?;
                let mut stream = stream.into_inner();
                stream.write_all(&answer)?;
                stream.conn.send_close_notify();
                Ok(stream.flush()?)
            });
        }
    });
    Ok(address)
}

/// A request up to its empty line.
fn head(stream: &mut impl BufRead) -> Result<String> {
    let mut head = String::new();
    while !head.ends_with("\r\n\r\n") && stream.read_line(&mut head)? > 0 {}
    Ok(head)
}

/// A proxy that connects to a server, whatever it is asked for, and keeps what it was asked.
fn proxy(server: SocketAddr) -> Result<(SocketAddr, Arc<Mutex<Vec<String>>>)> {
    let asked = Arc::<Mutex<Vec<String>>>::default();
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let (address, kept) = (listener.local_addr()?, asked.clone());
    thread::spawn(move || {
        for stream in listener.incoming().map_while(Result::ok) {
            let kept = kept.clone();
            thread::spawn(move || -> Result<()> {
                let mut client = BufReader::new(stream.try_clone()?);
                kept.lock().expect("no panic").push(head(&mut client)?);
                (&stream).write_all(b"HTTP/1.1 200 connected\r\n\r\n")?;
                let behind = TcpStream::connect(server)?;
                let mut back = behind.try_clone()?;
                thread::spawn(move || {
                    let _ = std::io::copy(&mut back, &mut &stream);
                    let _ = stream.shutdown(std::net::Shutdown::Both);
                });
                std::io::copy(&mut client, &mut &behind)?;
                Ok(())
            });
        }
    });
    Ok((address, asked))
}

#[test]
fn a_certificate_that_is_not_trusted_is_told_with_what_to_do_and_one_that_is_named_is_trusted() -> Result<()> {
    let place = Place::new()?;
    let server = Server::of("a/b", small()?)?;
    let url = format!("https://{}", encrypted(server.address)?);
    let pull = |certificates: Option<PathBuf>| {
        let mut command = program(&server, &place, &["pull", "a/b"]);
        command.env("HF_ENDPOINT", &url).env("HF_TOKEN", TOKEN);
        for name in ["SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"] {
            command.env_remove(name);
        }
        if let Some(file) = certificates {
            command.env("REQUESTS_CA_BUNDLE", file);
        }
        command
    };
    refused(
        &mut pull(None),
        &["127.0.0.1: its certificate is not trusted", "hint: in a network whose proxy", "SSL_CERT_FILE"],
    )?;
    assert!(server.asked().is_empty() && !place.path("hf").exists());
    refused(&mut pull(Some(fixture("tls/make.sh"))), &["REQUESTS_CA_BUNDLE", "there is no certificate in it"])?;
    refused(&mut pull(Some(place.path("missing.pem"))), &["REQUESTS_CA_BUNDLE", "missing.pem"])?;
    succeeds(&mut pull(Some(fixture("tls/authority.pem"))))?;
    assert!(server.asked().iter().all(|asked| asked.token.is_some()));

    // From there, plain http is refused even on this machine, and nobody gets the token.
    let elsewhere = Server::of("a/b", small()?)?;
    let (to, before) = (format!("http://{}/file", elsewhere.address), server.asked().len());
    server.on(move |_| Some(Act::Redirect(302, to.clone())));
    refused(&mut pull(Some(fixture("tls/authority.pem"))), &["it redirects from https to plain http", "not followed"])?;
    assert_eq!((elsewhere.asked().len(), server.asked().len()), (0, before + 1));
    Ok(())
}

#[test]
fn a_proxy_is_used_for_other_machines_and_not_for_this_one() -> Result<()> {
    let place = Place::new()?;
    let server = Server::of("a/b", small()?)?;
    let (address, through) = proxy(server.address)?;
    let pull = |url: &str, home: &str| {
        let mut command = program(&server, &place, &["pull", "a/b"]);
        command
            .env("HF_ENDPOINT", url)
            .env("HTTPS_PROXY", format!("http://{address}"))
            .env("HF_HOME", place.path(home));
        for name in ["ALL_PROXY", "all_proxy", "https_proxy", "HTTP_PROXY", "http_proxy", "NO_PROXY", "no_proxy"] {
            command.env_remove(name);
        }
        command.env("HF_TOKEN", TOKEN);
        command
    };
    succeeds(&mut pull(&server.url(), "here"))?;
    assert!(through.lock().expect("no panic").is_empty());
    assert!(server.asked().iter().all(|asked| asked.token.is_some()));
    server.is_well();
    let ran = succeeds(&mut pull("http://hub.example", "there"))?;
    assert!(
        ran.stderr.contains("note: HF_ENDPOINT is plain http") && ran.stderr.contains("the token is not sent"),
        "{}",
        ran.stderr
    );
    let through = through.lock().expect("no panic").clone();
    assert!(
        !through.is_empty() && through.iter().all(|asked| asked.starts_with("CONNECT hub.example:80 ")),
        "{through:?}"
    );
    assert!(server.asked().iter().all(|asked| asked.token.is_none()) && !through.concat().contains(TOKEN));
    Ok(())
}

#[test]
fn a_variable_that_is_wrong_is_named_and_its_value_is_not_shown() -> Result<()> {
    let place = Place::new()?;
    let server = Server::start()?;
    let with = |name: &str, value: &str| {
        let mut command = program(&server, &place, &["pull", "a/b"]);
        command.env(name, value);
        command
    };
    for bad in ["hub.example", "https://me:secret@hub.example", "ftp://hub.example", "https://hub.example/?x"] {
        refused(&mut with("HF_ENDPOINT", bad), &["HF_ENDPOINT: "])?;
    }
    let ran = run(&mut with("HF_ENDPOINT", "https://me:secret@hub.example"))?;
    assert!(!ran.stderr.contains("secret"), "{}", ran.stderr);
    let ran = run(&mut with("HF_TOKEN", "hf_secret with a space"))?;
    assert!(ran.stderr.contains("HF_TOKEN: it holds characters") && !ran.stderr.contains("secret"), "{}", ran.stderr);
    let token = place.write("token", TOKEN)?;
    std::fs::set_permissions(&token, std::os::unix::fs::PermissionsExt::from_mode(0o644))?;
    let told = run(&mut with("HF_TOKEN_PATH", token.to_str().context("a path")?))?.stderr;
    assert!(told.contains("others can read this token") && !told.contains(TOKEN), "{told}");
    assert!(server.asked().iter().any(|asked| asked.token.as_deref() == Some(&format!("Bearer {TOKEN}"))));
    Ok(())
}

#[test]
fn a_proxy_that_cannot_be_used_is_not_gone_past() -> Result<()> {
    let place = Place::new()?;
    let server = Server::of("a/b", small()?)?;
    let pull = |variable: &str, value: &str| {
        let mut command = program(&server, &place, &["pull", "a/b"]);
        command.env("HF_ENDPOINT", "http://hub.invalid");
        for name in
            ["ALL_PROXY", "all_proxy", "https_proxy", "HTTPS_PROXY", "HTTP_PROXY", "http_proxy", "NO_PROXY", "no_proxy"]
        {
            command.env_remove(name);
        }
        command.env(variable, value);
        command
    };
    refused(&mut pull("ALL_PROXY", "socks5://me:secret@proxy:1080"), &["ALL_PROXY: SOCKS proxies are not supported"])?;
    refused(&mut pull("https_proxy", "http://proxy:port"), &["https_proxy: it holds no address of a proxy"])?;
    let mut direct = pull("ALL_PROXY", "socks5://proxy");
    refused(direct.env("NO_PROXY", "hub.invalid"), &["no connection to hub.invalid"])?;
    let closed = TcpListener::bind("127.0.0.1:0")?.local_addr()?;
    let told = run(&mut pull("HTTPS_PROXY", &format!("http://me:secret@{closed}")))?.stderr;
    assert!(told.contains(&format!("no connection to the proxy {closed} (HTTPS_PROXY)")), "{told}");
    assert!(!told.contains("secret") && !told.contains("connection to hub.invalid"), "{told}");
    refused(
        &mut pull("HTTPS_PROXY", "http://proxy.invalid:3128"),
        &["no connection to the proxy proxy.invalid:3128 (HTTPS_PROXY)"],
    )?;
    for (status, words) in
        [(407, "asks for a user and a password"), (403, "makes no connection to hub.invalid (status 403)")]
    {
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let address = listener.local_addr()?;
        thread::spawn(move || -> Result<()> {
            let mut stream = listener.accept()?.0;
            head(&mut BufReader::new(stream.try_clone()?))?;
            Ok(write!(stream, "HTTP/1.1 {status} no\r\nContent-Length: 0\r\n\r\n")?)
        });
        let mut command = pull("HTTPS_PROXY", &format!("http://{address}"));
        refused(&mut command, &[&format!("the proxy {address} (HTTPS_PROXY)"), words])?;
    }
    assert!(server.asked().is_empty());
    Ok(())
}
