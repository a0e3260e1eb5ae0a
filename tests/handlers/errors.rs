//! The two texts of an error: what whoever asked reads, and what whoever runs the server does.

use super::program::Served;
use super::*;

/// An upstream that answers every request so. Returns its address.
fn always(reply: String) -> Result<String> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let url = format!("http://{}/v1", listener.local_addr()?);
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let Ok(mut stream) = stream else { return };
            let _ = read_request(&stream);
            let _ = stream.write_all(reply.as_bytes());
        }
    });
    Ok(url)
}

/// What of an upstream is nobody's business but that of whoever runs the server.
const PLACES: [&str; 6] = ["127.0.0.1", "10.1.2.3", "org-77", "docs.up.example", "/home/up", "gpt-x"];

struct Case {
    name: &'static str,
    reply: String,
    status: u16,
    /// What a client reads.
    told: &'static str,
    /// What a terminal or a log shows besides; empty: the client has read it.
    known: &'static str,
}

fn cases() -> Vec<Case> {
    let close = "connection: close\r\n";
    let error = |status: u16, error: Value| refusal(status, close, &json!({"error": error}));
    let key = json!({"message": "Incorrect key of org-77, see http://10.1.2.3/keys", "code": "invalid_api_key"});
    let wrong =
        json!({"message": "'temperature' should be at most 1, see https://docs.up.example/t.", "param": "temperature"});
    let long = json!({"message": "maximum context length is 8 tokens, and 9 came", "code": "context_length_exceeded"});
    let case = |name, reply, status, told, known| Case { name, reply, status, told, known };
    vec![
        case("key", error(401, key), 502, "the provider of `key` refused the server's key", "org-77"),
        case(
            "model",
            error(404, json!({"message": "no gpt-x here", "code": "model_not_found"})),
            502,
            "the provider of `model` has no such model",
            "no gpt-x here",
        ),
        case("broken", error(500, json!("/home/up/run.py died")), 503, "`broken` got nothing", "/home/up/run.py died"),
        case(
            "full",
            refusal(429, &format!("{close}retry-after: 7\r\n"), &json!({"error": "quota of org-77"})),
            429,
            "the provider of `full` takes no more requests for now; try again in 7 s",
            "quota of org-77",
        ),
        case(
            "page",
            "HTTP/1.1 200 OK\r\nconnection: close\r\n\r\n<html>".into(),
            502,
            "sent what is not",
            "a web page",
        ),
        case(
            "wrong",
            error(400, wrong),
            400,
            "the provider of `wrong` refused the request: 'temperature' should be at most 1, see [address].",
            "",
        ),
        case("long", error(400, long), 400, "refused the request: maximum context length is 8 tokens, and 9 came", ""),
        // Statuses of a wrong request, of which the request is not at fault.
        case(
            "gemini",
            error(
                400,
                json!({"message": "API key not valid. Please pass one of org-77.", "status": "INVALID_ARGUMENT"}),
            ),
            502,
            "the provider of `gemini` refused the server's key",
            "API key not valid",
        ),
        case(
            "poor",
            error(400, json!({"message": "Your credit balance is too low", "type": "invalid_request_error"})),
            429,
            "takes no more requests for now",
            "credit balance",
        ),
    ]
}

#[test]
fn a_client_reads_what_to_do_and_the_server_says_the_whole() -> Result<()> {
    let directory = tempfile::tempdir()?;
    let config = directory.path().join("h.toml");
    let (mut text, mut urls) = (String::new(), Vec::new());
    for case in cases() {
        let url = always(case.reply.clone())?;
        text += &format!(
            "[handlers.{0}]\nkind = \"openai\"\nbase_url = {url:?}\nmodel = \"gpt-x\"\n[routes.r-{0}]\nhandlers = [{0:?}]\n",
            case.name
        );
        urls.push(url);
    }
    text += "[handlers.gone]\nkind = \"openai\"\nbase_url = \"http://127.0.0.1:1/v1\"\nmodel = \"m\"\n[routes.r-gone]\nhandlers = [\"gone\"]\n";
    text += "[handlers.unset]\nkind = \"openai\"\nbase_url = \"http://127.0.0.1:1/v1\"\nmodel = \"m\"\napi_key = { env = \"HOMEROOM_TEST_KEY_OF_NOBODY\" }\n\
             [routes.r-unset]\nhandlers = [\"unset\"]\n";
    std::fs::write(&config, text)?;
    let command = homeroom().args(["serve", "--port", "0", "--config"]).arg(&config).stderr(Stdio::piped()).spawn()?;
    let mut served = Served(command);
    let mut story = BufReader::new(served.0.stderr.take().context("a pipe")?).lines();
    let mut serving = String::new();
    while !serving.starts_with("serving") {
        serving = story.next().context("it ended")??;
    }
    let at: SocketAddr =
        serving.split(['/', ' ']).find_map(|part| part.parse().ok()).with_context(|| serving.clone())?;
    let mut until = |words: &str| -> Result<String> {
        loop {
            let line = story.next().context("it ended")??;
            if line.contains(words) {
                return Ok(line);
            }
        }
    };
    let mut cases = cases();
    cases.push(Case {
        name: "gone",
        reply: String::new(),
        status: 503,
        told: "the handler `gone` got nothing from its provider; try again later",
        known: "the connection was refused",
    });
    urls.push("http://127.0.0.1:1/v1".into());
    for (Case { name, status, told, known, .. }, url) in cases.iter().zip(&urls) {
        for stream in [false, true] {
            let body = chat_body(&json!({"model": format!("r-{name}"), "stream": stream}));
            let (got, headers, body) = post(at, &body)?;
            assert!(got == *status, "{name}: {got} {body}");
            let error: Value = serde_json::from_str(&body)?;
            let message = error["error"]["message"].as_str().context("a message")?;
            assert!(message.contains(told), "{name}: {message}");
            for place in PLACES {
                assert!(!body.contains(place) && !headers.contains(place), "{name}: {place} is in {headers} {body}");
            }
            if !known.is_empty() {
                let line = until(known)?;
                assert!(line.starts_with("warning: request req-") && line.contains(url.as_str()), "{line}");
            }
        }
    }
    let (got, _, body) = post(at, &chat_body(&json!({"model": "r-unset"})))?;
    assert!(
        got == 503 && body.contains("`r-unset` is not ready to answer") && !body.contains("HOMEROOM_TEST"),
        "{body}"
    );
    until("HOMEROOM_TEST_KEY_OF_NOBODY is not set")?;
    // The terminal of whoever runs it shows the whole.
    for (Case { name, told, known, .. }, url) in cases.iter().zip(&urls) {
        let command =
            homeroom().args(["chat", "--handler", name, "--prompt", "hi", "--config"]).arg(&config).output()?;
        let story = String::from_utf8(command.stderr)?;
        let words = if known.is_empty() { "status 400" } else { known };
        assert!(!command.status.success() && story.contains(words) && story.contains(url.as_str()), "{name}: {story}");
        assert!(known.is_empty() || !story.contains(told), "{name}: {story}");
    }
    let check = homeroom().args(["handlers", "check", "--live", "--config"]).arg(&config).output()?;
    let report = String::from_utf8(check.stdout)?;
    for Case { known, .. } in &cases {
        assert!(report.contains(known), "{known} is not in {report}");
    }
    assert!(report.contains("docs.up.example"), "{report}");
    Ok(())
}

/// A key goes to the address that the file names, and to no other.
#[test]
fn a_redirect_to_another_host_gets_neither_key_nor_conversation() -> Result<()> {
    let elsewhere = TcpListener::bind("127.0.0.1:0")?;
    elsewhere.set_nonblocking(true)?;
    let location = format!("http://{}/v1/chat/completions", elsewhere.local_addr()?);
    for status in [301, 302, 303, 307, 308] {
        let reply = refusal(status, &format!("connection: close\r\nlocation: {location}\r\n"), &json!({}));
        let far = endpoint(&always(reply)?, "m")?;
        let refused = far.complete(&asked("hi", 5), &Context::default()).expect_err("it leads elsewhere");
        assert!(refused.kind == Kind::Protocol && refused.to_string().contains(&location), "{status}: {refused}");
        assert!(!refused.message.contains("http"), "{}", refused.message);
        assert!(elsewhere.accept().is_err_and(|error| error.kind() == std::io::ErrorKind::WouldBlock), "{status}");
    }
    Ok(())
}
