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

/// An edit of `[server]` counts at once, and what of it does not is said in one message, and once.
#[test]
fn an_edited_file_says_what_counts_only_from_the_next_start_on() -> Result<()> {
    let place = Place::new()?;
    let model = fixture("models/llama").display().to_string();
    let write = |tables: &str| {
        let routes = "[routes.m]\nhandlers = [\"near\"]\n";
        let text = format!("{tables}\n[handlers.near]\nkind = \"local\"\nmodel = {model:?}\n{routes}");
        // As an editor does it: the file is there whole at any moment.
        let new = place.write("new.toml", text)?;
        let path = place.path("h.toml");
        std::fs::rename(new, &path)?;
        Ok::<_, anyhow::Error>(path)
    };
    let config = write("")?.display().to_string();
    let mut served = Served::start(&place, &["--config", &config])?;
    let at = served.address;
    let ask = |tokens: u64| -> Result<u16> {
        let head = "POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json";
        Ok(http(at, head, &chat("m", &json!({"max_tokens": tokens})).to_string())?.0)
    };
    let mut until_reload = || -> Result<Vec<String>> {
        let mut lines: Vec<String> = Vec::new();
        while !lines.last().is_some_and(|line| line.starts_with("reload ")) {
            lines.push(served.story.next().with_context(|| format!("it ended: {lines:?}"))??);
        }
        lines.pop();
        Ok(lines)
    };
    assert_eq!(ask(3)?, 200);
    write("[server]\nmax_tokens = 2\nlog = \"off\"")?;
    assert_eq!((until_reload()?, ask(3)?, ask(2)?), (Vec::new(), 400, 200));
    let fixed = "[memory]\ncontent = \"none\"\n[fine_tuning]\nbases = [\"near\"]";
    write(&format!(
        "[server]\nlisten = \"127.0.0.1:1\"\nconnections = 9\nheader_timeout = \"9s\"\nbody_timeout = \"8s\"\n{fixed}"
    ))?;
    let said = until_reload()?;
    let wanted = "h.toml: what is edited of [server] listen, connections, header_timeout, body_timeout; [fine_tuning]; [memory] counts from the next start on";
    assert!(said.len() == 1 && said[0].ends_with(wanted), "{said:?}");
    assert_eq!(ask(3)?, 200, "the limit is gone");
    // Nothing new of that: nothing is said again. What is as it was when the server began is no difference.
    write(&format!(
        "[server]\nmax_tokens = 1\nlisten = \"127.0.0.1:1\"\nconnections = 9\nheader_timeout = \"9s\"\nbody_timeout = \"8s\"\n{fixed}"
    ))?;
    assert_eq!((until_reload()?, ask(2)?), (Vec::new(), 400));
    write(&format!("[server]\nmax_tokens = 1\nconnections = 9\n{fixed}"))?;
    let said = until_reload()?;
    assert!(said.len() == 1 && said[0].contains("of [server] connections; [fine_tuning]; [memory] counts"), "{said:?}");
    write("[server]\nmax_tokens = 2")?;
    assert_eq!((until_reload()?, ask(2)?), (Vec::new(), 200));
    assert!(!place.path("home/memory").exists(), "it counts from the next start on");
    Ok(())
}

/// The log goes to a pipe that holds 64 KiB, and nobody reads that.
#[test]
fn a_log_that_nobody_reads_keeps_no_answer_waiting() -> Result<()> {
    let place = Place::new()?;
    let model = fixture("models/llama").display().to_string();
    let served = Served::start(&place, &["--log", "json", "--model-dir", &model])?;
    let id = "x".repeat(64);
    for number in 0..600 {
        let head = format!("GET /v1/models HTTP/1.1\r\nhost: localhost\r\nx-request-id: {id}");
        assert_eq!(http(served.address, &head, "")?.0, 200, "{number}");
    }
    Ok(())
}

#[test]
fn one_line_is_logged_of_a_request_and_no_word_of_it() -> Result<()> {
    let place = Place::new()?;
    let model = fixture("models/llama").display().to_string();
    let config = place
        .write("h.toml", format!("[server]\nlog = \"json\"\n[handlers.m]\nkind = \"local\"\nmodel = {model:?}\n"))?;
    let config = config.display().to_string();
    let mut person = String::new();
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
            line["user"].as_str().context("a pseudonym")?.clone_into(&mut person);
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
            assert!(line.contains(&format!("user {person}")), "a person has one pseudonym in a home: {line}");
        }
        let whole: Value = serde_json::from_str(&answer)?;
        let said = whole["choices"][0]["message"]["content"].as_str().context("a text")?;
        assert!(!line.contains("secret") && !line.contains("anna") && !line.contains(said), "{line}");
    }
    Ok(())
}
