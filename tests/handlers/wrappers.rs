//! What stands around handlers, as a file of handlers says it.

use std::sync::Mutex;

use homeroom::handler::wrap::timeouts::Timeouts;
use homeroom::handler::wrap::total::Total;
use homeroom::handler::wrap::wrapped;

use super::faults::{Fault, Upstream, told};
use super::*;

/// An endpoint that says back the last message, a letter a piece, and keeps the bodies that it got.
struct Echo {
    port: u16,
    bodies: Arc<Mutex<Vec<Value>>>,
}

impl Echo {
    fn new() -> Result<Self> {
        let listener = TcpListener::bind("0.0.0.0:0")?;
        let port = listener.local_addr()?.port();
        let bodies: Arc<Mutex<Vec<Value>>> = Arc::default();
        let seen = bodies.clone();
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let Ok(mut stream) = stream else { return };
                let request = read_request(&stream).unwrap_or_default();
                let body: Value =
                    serde_json::from_str(request.split("\r\n\r\n").last().unwrap_or_default()).unwrap_or_default();
                let last = body["messages"].as_array().and_then(|all| all.last()).cloned().unwrap_or_default();
                let piece = |letter: char| {
                    format!(
                        "data: {}\n\n",
                        json!({"choices": [{"index": 0, "delta": {"content": letter.to_string()}}]})
                    )
                };
                let pieces: String = last["content"].as_str().unwrap_or_default().chars().map(piece).collect();
                let end = "data: {\"choices\":[{\"index\":0,\"delta\":{},\"finish_reason\":\"stop\"}],\"usage\":{\"prompt_tokens\":3,\"completion_tokens\":2}}\n\ndata: [DONE]\n\n";
                seen.lock().expect("no test panics with it").push(body);
                let _ = stream.write_all(stream_of(&format!("{pieces}{end}")).as_bytes());
            }
        });
        Ok(Self { port, bodies })
    }

    /// Its address on this machine.
    fn near(&self) -> String {
        format!("http://127.0.0.1:{}/v1", self.port)
    }

    /// Its address as one that is not of this machine: Linux takes it for its own, and a file of handlers does not.
    fn far(&self) -> String {
        format!("http://0.0.0.0:{}/v1", self.port)
    }

    fn bodies(&self) -> Vec<Value> {
        self.bodies.lock().expect("no test panics with it").clone()
    }
}

fn endpoint_of(name: &str, url: &str, more: &str) -> String {
    format!("[handlers.{name}]\nkind = \"openai\"\nbase_url = {url:?}\nmodel = \"m\"\n{more}\n")
}

fn served(directory: &Path, text: &str) -> Result<BTreeMap<String, Arc<dyn Handler>>> {
    Handlers::new(Config::parse(&directory.join("handlers.toml"), text)?).served()
}

fn complete(handler: &Arc<dyn Handler>, text: &str) -> Result<Completion, HandlerError> {
    handler.complete(&asked(text, 50), &Context::default())
}

#[test]
fn a_request_gets_what_route_and_handler_say_where_it_says_nothing() -> Result<()> {
    let (directory, echo) = (tempfile::tempdir()?, Echo::new()?);
    std::fs::write(directory.path().join("tutor.md"), "You are a tutor.\n")?;
    let text = endpoint_of("near", &echo.near(), "system = \"not this one\"\nmax_tokens = 7\nstop = [\"END\"]")
        + "[routes.tutor]\nhandlers = [\"near\"]\nsystem_file = \"tutor.md\"\nmax_tokens = 9\ntemperature = 0.3\ntop_p = 0.8\n";
    let tutor = served(directory.path(), &text)?.remove("tutor").context("the route")?;
    let bare = Request { messages: vec![Message::new(Role::User, "hi")], ..Request::default() };
    tutor.complete(&bare, &Context::default())?;
    // An edit of the file counts from the next request on.
    std::fs::write(directory.path().join("tutor.md"), "You are another tutor.\n")?;
    tutor.complete(&Request { temperature: Some(0.0), max_tokens: Some(3), ..bare }, &Context::default())?;
    let bodies = echo.bodies();
    assert_eq!(bodies[0]["messages"][0], json!({"role": "system", "content": "You are a tutor."}));
    assert_eq!(bodies[0]["messages"].as_array().map(Vec::len), Some(2));
    for (field, first, second) in [
        ("max_tokens", json!(9), json!(3)),
        ("temperature", json!(0.3), json!(0.0)),
        ("top_p", json!(0.8), Value::Null),
        ("stop", json!(["END"]), json!(["END"])),
    ] {
        assert_eq!((&bodies[0][field], &bodies[1][field]), (&first, &second), "{field}");
    }
    assert_eq!(bodies[1]["messages"][0]["content"], "You are another tutor.");
    Ok(())
}

#[test]
fn words_are_refused_in_questions_and_end_answers() -> Result<()> {
    let (directory, echo) = (tempfile::tempdir()?, Echo::new()?);
    std::fs::write(directory.path().join("bad.txt"), "# a comment\nbad word\n")?;
    let text = endpoint_of("near", &echo.near(), "")
        + "[routes.tutor]\nhandlers = [\"near\"]\nwords = [{ file = \"bad.txt\", in = [\"question\"] }, { list = [\"darn\"], action = \"replace\", with = \"…\" }, \
           { list = [\"secret\"], in = [\"answer\"] }]\n";
    let tutor = served(directory.path(), &text)?.remove("tutor").context("the route")?;
    let refused = complete(&tutor, "a BAD  word").expect_err("it is refused");
    assert!(
        refused.kind == Kind::InvalidRequest { param: Some("messages".into()) } && !refused.message.contains("bad")
    );
    assert!(echo.bodies().is_empty(), "it did not get there");
    assert_eq!(complete(&tutor, "Darn it, not a badword")?.text(), "… it, not a badword");
    assert_eq!(echo.bodies()[0]["messages"][0]["content"], "… it, not a badword");
    // What was said before it stays said; what comes behind it is not.
    let cut = complete(&tutor, "this is secret stuff")?;
    assert_eq!((cut.text(), cut.finish()), ("this is ", &FinishReason::ContentFilter));
    assert_eq!(complete(&tutor, "a secretary")?.text(), "a secretary");
    Ok(())
}

/// The endpoint is not of this machine by its address, and says each letter in a piece of its own.
#[test]
fn a_route_that_redacts_sends_placeholders_away_and_answers_with_what_they_stand_for() -> Result<()> {
    let (directory, echo) = (tempfile::tempdir()?, Echo::new()?);
    let text = endpoint_of("far", &echo.far(), "record = \"record.jsonl\"")
        + &endpoint_of("near", &echo.near(), "")
        + "[routes.hidden]\nhandlers = [\"far\"]\negress = \"redact\"\n[routes.open]\nhandlers = [\"near\"]\negress = \"redact\"\n";
    let served = served(directory.path(), &text)?;
    let asked = "Mail lena.meier@schule-nord.de or call +49 30 901 234 56.";
    assert_eq!(complete(&served["hidden"], asked)?.text(), asked);
    assert_eq!(echo.bodies()[0]["messages"][0]["content"], "Mail [EMAIL_1] or call [PHONE_1].");
    // What is recorded of it is what left.
    let record = std::fs::read_to_string(directory.path().join("record.jsonl"))?;
    assert!(record.contains("[EMAIL_1]") && !record.contains("lena"), "{record}");
    // To a handler of this machine it goes as it is.
    assert_eq!(complete(&served["open"], asked)?.text(), asked);
    assert_eq!(echo.bodies()[1]["messages"][0]["content"], asked);
    Ok(())
}

/// The file refuses it, too; this is what holds if that were wrong.
#[test]
fn a_conversation_that_must_stay_gets_no_socket_that_leads_away() -> Result<()> {
    let echo = Echo::new()?;
    for url in [echo.far(), format!("http://localhost.example.com:{}/v1", echo.port), "https://10.255.255.1/v1".into()]
    {
        let far: Arc<dyn Handler> = Arc::new(endpoint(&url, "m")?);
        let route = Route::new(vec![("far".into(), far)]).staying();
        let since = Instant::now();
        let refused = route.complete(&asked("hi", 5), &Context::default()).expect_err("it must stay");
        assert!(
            refused.kind == Kind::Unavailable && refused.to_string().contains("egress is denied"),
            "{url}: {refused}"
        );
        assert!(since.elapsed() < Duration::from_secs(1), "nothing is looked up or waited for");
    }
    assert!(echo.bodies().is_empty());
    for url in [echo.near(), format!("http://localhost:{}/v1", echo.port)] {
        let near: Arc<dyn Handler> = Arc::new(endpoint(&url, "m")?);
        assert_eq!(
            collect(Route::new(vec![("near".into(), near)]).staying().stream(&asked("hi", 5), &Context::default())?)?
                .text(),
            "hi"
        );
    }
    Ok(())
}

#[test]
fn a_log_says_who_answered_and_how_it_ended_and_nothing_of_what_was_said() -> Result<()> {
    let (directory, echo) = (tempfile::tempdir()?, Echo::new()?);
    let failing = Upstream::new(vec![Fault::Status(500, "")])?;
    let text = endpoint_of("broken", &failing.url, "")
        + &endpoint_of("near", &echo.near(), "")
        + "[routes.tutor]\nhandlers = [\"broken\", \"near\"]\nlog = \"log.jsonl\"\n[routes.alone]\nhandlers = [\"broken\"]\nlog = \"log.jsonl\"\n";
    let served = served(directory.path(), &text)?;
    assert_eq!(complete(&served["tutor"], "tell nobody")?.text(), "tell nobody");
    assert!(complete(&served["alone"], "tell nobody").is_err());
    assert_eq!(served["tutor"].stream(&asked("tell nobody", 5), &Context::default())?.take(2).count(), 2);
    let path = directory.path().join("log.jsonl");
    let log = std::fs::read_to_string(&path)?;
    assert!(!log.contains("nobody"), "{log}");
    let lines: Vec<Value> = log.lines().map(serde_json::from_str).collect::<Result<_, _>>()?;
    let of = |line: usize, field: &str| lines[line][field].clone();
    for (line, route, handler, outcome) in [
        (0, "tutor", json!("near"), "stop"),
        (1, "alone", Value::Null, "unavailable"),
        (2, "tutor", json!("near"), "cancelled"),
    ] {
        assert_eq!(
            (of(line, "route"), of(line, "handler"), of(line, "outcome")),
            (json!(route), handler, json!(outcome))
        );
        assert!(of(line, "total_ms").is_number() && of(line, "time").is_string());
    }
    assert_eq!((of(0, "prompt_tokens"), of(0, "completion_tokens")), (json!(3), json!(2)));
    assert!(of(0, "first_token_ms").is_null() && of(2, "first_token_ms").is_number(), "{log}");
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt;
        assert_eq!(std::fs::metadata(&path)?.permissions().mode() & 0o777, 0o600);
    }
    Ok(())
}

#[test]
fn what_is_recorded_can_be_given_again() -> Result<()> {
    let (directory, echo) = (tempfile::tempdir()?, Echo::new()?);
    let text = endpoint_of("near", &echo.near(), "record = \"answers.jsonl\"");
    let near = served(directory.path(), &text)?.remove("near").context("the handler")?;
    for question in ["first é?", "second?"] {
        assert_eq!(complete(&near, question)?.text(), question);
    }
    drop(near.stream(&asked("broken off", 5), &Context::default())?.next());
    let again = |by: &str| -> Result<Arc<dyn Handler>> {
        let text = format!("[handlers.again]\nkind = \"replay\"\nfile = \"answers.jsonl\"\nmatch = {by:?}\n");
        served(directory.path(), &text)?.remove("again").context("the handler")
    };
    let by_user = again("user")?;
    let second = complete(&by_user, "second?")?;
    assert_eq!((second.text(), second.usage.completion_tokens), ("second?", Some(2)));
    assert_eq!(complete(&by_user, "broken off").expect_err("it was not whole").kind, Kind::NotFound);
    let in_order = again("order")?;
    assert_eq!(complete(&in_order, "whatever")?.text(), "first é?");
    // A crash cut the last record short, and a further one came.
    let path = directory.path().join("answers.jsonl");
    let recorded = std::fs::read(&path)?;
    std::fs::write(&path, &recorded[..recorded.len() - 5])?;
    complete(&near, "third?")?;
    let by_user = again("user")?;
    assert_eq!((complete(&by_user, "first é?")?.text(), complete(&by_user, "third?")?.text()), ("first é?", "third?"));
    assert_eq!(complete(&by_user, "second?").expect_err("it was cut short").kind, Kind::NotFound);
    Ok(())
}

#[test]
fn a_conversation_that_is_too_long_goes_to_the_handlers_for_those() -> Result<()> {
    let (directory, echo) = (tempfile::tempdir()?, Echo::new()?);
    let model = fixture("models/llama");
    let text = format!("[handlers.small]\nkind = \"local\"\nmodel = {model:?}\n")
        + &endpoint_of("big", &echo.near(), "")
        + &endpoint_of("other", "http://127.0.0.1:1/v1", "")
        + "[routes.tutor]\nhandlers = [\"small\"]\ncontext_fallback = [\"small\", \"other\", \"big\"]\n[routes.plain]\nhandlers = [\"small\"]\n";
    let served = served(directory.path(), &text)?;
    let long = "many words ".repeat(200);
    assert_eq!(complete(&served["plain"], &long).expect_err("too long").kind, Kind::ContextLength);
    assert_eq!(complete(&served["tutor"], &long)?.text(), long);
    let (text, end) = {
        let stream = served["tutor"].stream(&asked(&long, 5), &Context::default())?;
        collect(stream).map_or_else(|error| (String::new(), Err(error)), |whole| (whole.text().to_owned(), Ok(())))
    };
    assert_eq!((text, end), (long, Ok(())));
    assert_eq!(complete(&served["tutor"], "short")?.start.handler, "small", "it answers what fits");
    Ok(())
}

#[test]
fn a_refused_key_is_passed_on_only_if_the_route_says_so() -> Result<()> {
    let directory = tempfile::tempdir()?;
    let upstream = Upstream::new(vec![Fault::Status(401, "")])?;
    std::fs::write(directory.path().join("spare.jsonl"), "{\"user\": \"hi\", \"answer\": \"spare\"}\n")?;
    let text = |on: &str| {
        endpoint_of("far", &upstream.url, "")
            + "[handlers.spare]\nkind = \"replay\"\nfile = \"spare.jsonl\"\n"
            + &format!("[routes.tutor]\nhandlers = [\"far\", \"spare\"]\n{on}\n")
    };
    let answer = |on: &str| -> Result<(String, Result<(), Kind>)> {
        Ok(told(served(directory.path(), &text(on))?.remove("tutor").context("the route")?.as_ref()))
    };
    assert_eq!(answer("")?.1, Err(Kind::Authentication));
    assert_eq!(answer("fallback_on = [\"authentication\"]")?, ("spare".to_owned(), Ok(())));
    assert_eq!(answer("fallback_on = [\"timeout\"]")?.1, Err(Kind::Authentication));
    Ok(())
}

/// A model of this machine obeys the same time limits as an endpoint.
#[test]
fn time_limits_hold_for_models_of_this_machine() -> Result<()> {
    let kind = |handler: Arc<dyn Handler>| {
        handler.complete(&asked("hello there", 40), &Context::default()).map(|_| ()).map_err(|error| error.kind)
    };
    let none = Some(Duration::ZERO);
    let first_token = Timeouts { first_token: none, idle: None };
    assert_eq!(kind(wrapped(local()?, first_token)), Err(Kind::Timeout));
    assert_eq!(kind(wrapped(local()?, Timeouts { first_token: None, idle: none })), Err(Kind::Timeout));
    assert_eq!(kind(wrapped(local()?, Total(Duration::ZERO))), Err(Kind::Timeout));
    let long = Some(Duration::from_secs(60));
    assert_eq!(kind(wrapped(local()?, Timeouts { first_token: long, idle: long })), Ok(()));
    Ok(())
}

#[test]
fn limits_of_a_handler_are_those_of_the_file() -> Result<()> {
    let directory = tempfile::tempdir()?;
    let slow = Upstream::new(vec![Fault::SilentBeforeText])?;
    let text = endpoint_of("slow", &slow.url, "limits = { running = 1, waiting = 0 }\nfirst_token_timeout_s = 5");
    let handler = served(directory.path(), &text)?.remove("slow").context("the handler")?;
    let held = handler.stream(&asked("hi", 5), &Context::default())?;
    let refused = handler.stream(&asked("hi", 5), &Context::default()).err().context("it is full")?;
    assert!(matches!(refused.kind, Kind::Overloaded { .. }), "{refused:?}");
    drop(held);
    assert!(handler.stream(&asked("hi", 5), &Context::default()).is_ok());
    Ok(())
}

#[test]
fn handlers_check_says_what_is_there_and_what_is_missing() -> Result<()> {
    let (directory, echo) = (tempfile::tempdir()?, Echo::new()?);
    let config = directory.path().join("h.toml");
    let model = fixture("models/llama");
    let far = endpoint_of("far", &echo.far(), "api_key = { env = \"HOMEROOM_TEST_KEY_A\" }\nretry = { max = 1 }");
    let text = format!(
        "[handlers.here]\nkind = \"local\"\nmodel = {model:?}\n[handlers.lost]\nkind = \"local\"\nmodel = \"no-such-model\"\n{far}\
         [routes.tutor]\nhandlers = [\"here\"]\n[routes.away]\nhandlers = [\"far\"]\negress = \"redact\"\n"
    );
    std::fs::write(&config, &text)?;
    let check = |more: &[&str], key: bool| -> Result<(Option<i32>, String)> {
        let mut command = homeroom();
        if key {
            command.env("HOMEROOM_TEST_KEY_A", "sk-secret-0123456789");
        }
        let output = command.args(["handlers", "check", "--config"]).arg(&config).args(more).output()?;
        let (text, story) = (String::from_utf8(output.stdout)?, String::from_utf8(output.stderr)?);
        assert!(!text.contains("sk-secret") && !story.contains("sk-secret"), "{text}{story}");
        Ok((output.status.code(), text + &story))
    };
    let (code, story) = check(&[], false)?;
    assert_eq!(code, Some(1), "{story}");
    for wanted in [
        "tutor   egress deny: conversations stay on this machine",
        "here   local",
        "away   egress redact: conversations go to 0.0.0.0, with placeholders",
        "PROBLEM: disabled: api_key: the environment variable HOMEROOM_TEST_KEY_A is not set",
        "key HOMEROOM_TEST_KEY_A is not set",
        "redaction",
        "retry 1 times after 0.5 s to 8 s",
        "    answer timeout 600 s (default)\n    limits 32 running, 64 waiting (default)",
        "    answer timeout 1800 s, [server] answer_timeout (default)\n    limits 32 running, 64 waiting (default)",
        "in no route, and not served: lost",
    ] {
        assert!(story.contains(wanted), "{wanted}\nis not in\n{story}");
    }
    let (code, json) = check(&["--json", "--live"], true)?;
    let report: Value = serde_json::from_str(json.lines().find(|line| line.starts_with('{')).context("an object")?)?;
    assert_eq!(code, Some(0), "{json}");
    assert_eq!((&report["is_well"], &report["unrouted"]), (&json!(true), &json!(["lost"])));
    let away = &report["routes"][0];
    assert_eq!(
        (&away["name"], &away["egress"], &away["handlers"][0]["host"]),
        (&json!("away"), &json!("redact"), &json!("0.0.0.0"))
    );
    assert_eq!(away["handlers"][0]["key"], json!({"env": "HOMEROOM_TEST_KEY_A", "is_set": true}));
    assert!(
        away["handlers"][0]["live_s"].is_number() && report["routes"][1]["handlers"][0]["live_s"].is_number(),
        "{report}"
    );
    assert_eq!(echo.bodies().len(), 1, "one token was asked for");
    let bounds = |route: usize| {
        let handler = &report["routes"][route]["handlers"][0];
        (handler["limits"].clone(), handler["answer_timeout"].clone())
    };
    let limits = json!({"running": 32, "waiting": 64, "is_default": true});
    assert_eq!(bounds(0), (limits.clone(), json!({"seconds": 600.0, "is_of_server": false, "is_default": true})));
    assert_eq!(bounds(1), (limits, json!({"seconds": 1800.0, "is_of_server": true, "is_default": true})));
    // What is written is no default.
    let written = text
        .replace("[handlers.lost]", "limits = { running = 3, waiting = 5 }\nanswer_timeout_s = 7\n[handlers.lost]")
        + "[server]\nanswer_timeout = \"5m\"\n";
    std::fs::write(&config, written.replace("retry = {", "answer_timeout_s = 9\nretry = {"))?;
    let (_, story) = check(&[], true)?;
    for wanted in [
        "    answer timeout 9 s\n    limits 32 running, 64 waiting (default)",
        "    answer timeout 7 s\n    limits 3 running, 5 waiting\n",
    ] {
        assert!(story.contains(wanted), "{wanted}\nis not in\n{story}");
    }
    std::fs::write(&config, text.replace("handlers = [\"here\"]", "handlers = [\"here\", \"lost\"]"))?;
    let (code, story) = check(&[], true)?;
    assert!(
        code == Some(1)
            && story.contains("lost   local   no-such-model   PROBLEM: the model, or its base, is not on this machine"),
        "{story}"
    );
    Ok(())
}
