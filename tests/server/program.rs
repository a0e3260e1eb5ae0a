//! `keys` and `serve`, as the program runs them.

use std::process::{Child, Command, Stdio};

use super::*;
use crate::support::{Place, fixture, homeroom, printed_json, refused, succeeds};

fn keys(place: &Place, arguments: &[&str]) -> Command {
    let mut command = homeroom();
    command.env("HOMEROOM_HOME", place.path("home")).arg("keys").args(arguments);
    command
}

#[test]
fn a_key_is_printed_once_and_kept_as_a_digest() -> Result<()> {
    let place = Place::new()?;
    let ran = succeeds(&mut keys(&place, &["list"]))?;
    assert!(ran.stdout.is_empty() && ran.stderr.contains("homeroom keys add NAME"), "{ran:?}");
    let limits = [
        "--requests-per-minute",
        "30",
        "--tokens-per-minute",
        "9000",
        "--tokens-per-day",
        "50000",
        "--trust-forwarded",
    ];
    let ran = succeeds(&mut keys(&place, &[&["add", "class-7b", "--routes", "tutor,helper"][..], &limits].concat()))?;
    let text = ran.stdout.trim_end();
    assert!(ran.stdout.lines().count() == 1 && text.starts_with("sk-hr-") && text.len() == 70, "{ran:?}");
    assert!(
        !ran.stderr.contains(text) && ran.stderr.contains("class-7b   tutor, helper   30 requests a minute"),
        "{ran:?}"
    );
    assert!(ran.stderr.contains("from now on every request"), "{ran:?}");
    let path = place.path("home/keys.json");
    let file = std::fs::read_to_string(&path)?;
    assert!(!file.contains(&text[12..]), "the key is not kept");
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt;
        assert_eq!(std::fs::metadata(&path)?.permissions().mode() & 0o777, 0o600);
    }
    refused(
        &mut keys(&place, &["add", "class-7b"]),
        &["there is a key `class-7b` already", "homeroom keys rm class-7b"],
    )?;
    refused(&mut keys(&place, &["add", "Class 7b"]), &["a key's name consists of"])?;
    succeeds(&mut keys(&place, &["add", "staff"]))?;
    let ran = succeeds(&mut keys(&place, &["list"]))?;
    assert!(
        ran.stdout.contains("class-7b   sk-hr-") && ran.stdout.contains("50,000 tokens a day for each person"),
        "{ran:?}"
    );
    assert!(ran.stdout.contains("staff") && ran.stdout.contains("no limit"), "{ran:?}");
    let list = printed_json(&succeeds(&mut keys(&place, &["list", "--json"]))?)?;
    assert_eq!((&list[0]["routes"], &list[0]["tokens_per_day"]), (&json!(["tutor", "helper"]), &json!(50_000)));
    let digest = serde_json::from_str::<Value>(&file)?["keys"][0]["sha256"].as_str().context("a digest")?.to_owned();
    assert!(!list.to_string().contains(&digest) && !list.to_string().contains(&text[12..]), "{list}");
    refused(&mut keys(&place, &["rm", "clas-7b"]), &["there is no key `clas-7b`, did you mean `class-7b`?"])?;
    succeeds(&mut keys(&place, &["rm", "class-7b"]))?;
    let ran = succeeds(&mut keys(&place, &["rm", "staff"]))?;
    assert!(ran.stderr.contains("there is no key left"), "{ran:?}");
    Ok(())
}

/// A server that ends with the test.
struct Served {
    child: Child,
    story: std::io::Lines<BufReader<std::process::ChildStderr>>,
    address: SocketAddr,
}

impl Served {
    fn start(place: &Place, arguments: &[&str]) -> Result<Self> {
        let mut command = homeroom();
        command.env("HOMEROOM_HOME", place.path("home")).args(["serve", "--port", "0"]).args(arguments);
        let mut child = command.stderr(Stdio::piped()).spawn()?;
        let mut story = BufReader::new(child.stderr.take().context("a pipe")?).lines();
        let mut lines = Vec::new();
        loop {
            let line = story.next().with_context(|| format!("it ended: {lines:?}"))??;
            if let Some(rest) = line.strip_prefix("serving  http://") {
                let address = rest.split('/').next().context("an address")?.parse()?;
                return Ok(Self { child, story, address });
            }
            lines.push(line);
        }
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn other_machines_are_served_with_keys_alone() -> Result<()> {
    let place = Place::new()?;
    let model = fixture("models/llama").display().to_string();
    let serve = |host: &str| {
        let mut command = homeroom();
        command.env("HOMEROOM_HOME", place.path("home")).args([
            "serve",
            "--port",
            "0",
            "--host",
            host,
            "--model-dir",
            &model,
        ]);
        command
    };
    for host in ["0.0.0.0", "::"] {
        refused(&mut serve(host), &["there is no key yet", "hint: `homeroom keys add NAME`"])?;
    }
    let config = place.write(
        "h.toml",
        format!("[server]\nlisten = \"0.0.0.0:0\"\n[handlers.m]\nkind = \"local\"\nmodel = {model:?}\n"),
    )?;
    let mut by_file = homeroom();
    by_file.env("HOMEROOM_HOME", place.path("home")).arg("serve").arg("--config").arg(&config);
    refused(&mut by_file, &["there is no key yet"])?;

    let text = succeeds(&mut keys(&place, &["add", "class"]))?.stdout.trim_end().to_owned();
    let served = Served::start(&place, &["--host", "0.0.0.0", "--model-dir", &model])?;
    let at = SocketAddr::new(std::net::Ipv4Addr::LOCALHOST.into(), served.address.port());
    let list = |key: &str| http(at, &format!("GET /v1/models HTTP/1.1\r\nhost: 192.168.1.9\r\nx-api-key: {key}"), "");
    assert_eq!((list(&text)?.0, list("other")?.0), (200, 401));
    // Removed by another process, it is none here.
    succeeds(&mut keys(&place, &["rm", "class"]))?;
    assert_eq!(list(&text)?.0, 401);
    Ok(())
}

#[test]
fn one_line_is_logged_of_a_request_and_no_word_of_it() -> Result<()> {
    let place = Place::new()?;
    let model = fixture("models/llama").display().to_string();
    let config = place
        .write("h.toml", format!("[server]\nlog = \"json\"\n[handlers.m]\nkind = \"local\"\nmodel = {model:?}\n"))?;
    let config = config.display().to_string();
    for (arguments, is_json) in
        [(vec!["--config", &config], true), (vec!["--log", "text", "--model-dir", &model], false)]
    {
        let mut served = Served::start(&place, &arguments)?;
        let name = if is_json { "m" } else { "llama" };
        let messages = json!([{"role": "user", "content": "the secret of the class"}]);
        let body = chat(name, &json!({"messages": messages, "max_tokens": 5, "user": "anna"})).to_string();
        let head = "POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\nx-request-id: r-1\r\ncontent-type: application/json";
        let (status, _, answer) = http(served.address, head, &body)?;
        assert_eq!(status, 200, "{answer}");
        let line = served.story.next().context("a line")??;
        if is_json {
            let line: Value = serde_json::from_str(&line)?;
            assert_eq!(
                (&line["id"], &line["route"], &line["status"]),
                (&json!("r-1"), &json!("/v1/chat/completions"), &json!(200))
            );
            assert_eq!(
                (&line["model"], &line["completion_tokens"], &line["finish"]),
                (&json!("m"), &json!(5), &json!("length"))
            );
        } else {
            assert!(line.contains("POST /v1/chat/completions 200") && line.ends_with("r-1"), "{line}");
        }
        let whole: Value = serde_json::from_str(&answer)?;
        let said = whole["choices"][0]["message"]["content"].as_str().context("a text")?;
        assert!(!line.contains("secret") && !line.contains("anna") && !line.contains(said), "{line}");
    }
    Ok(())
}
