//! Upstreams that fail in every way, and what a route makes of it: no text twice, no answer cut in silence, times kept, and no more
//! requests upstream than the file of handlers allows.

use std::net::Shutdown;
use std::sync::Mutex;

use socket2::SockRef;

use super::*;

const WORD: &str = "data: {\"choices\":[{\"index\":0,\"delta\":{\"content\":\"half \"}}]}\n\n";
const END: &str = "data: {\"choices\":[{\"index\":0,\"delta\":{},\"finish_reason\":\"stop\"}]}\n\ndata: [DONE]\n\n";
const ERROR: &str = "data: {\"error\":{\"message\":\"overloaded\",\"code\":503}}\n\n";
const HEAD: &str = "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nconnection: close\r\n\r\n";

/// What an upstream does with a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// It answers.
    None,
    /// The connection is reset.
    Reset,
    /// The connection is closed without a word.
    Closed,
    /// A status, and the value of `Retry-After` if that is not empty.
    Status(u16, &'static str),
    /// Nothing comes.
    SilentBeforeHeaders,
    /// Headers and pings come.
    SilentBeforeText,
    /// Text comes, and then nothing.
    SilentAfterText,
    /// An error in a stream that began with 200.
    ErrorBeforeText,
    ErrorAfterText,
    /// The stream ends.
    CutBeforeText,
    CutAfterText,
    /// A byte now and then.
    Drip,
    /// A gigabyte without a line break.
    EndlessLine,
    /// A gigabyte of text.
    EndlessText,
}

/// A provider that fails. Each connection is one request.
pub struct Upstream {
    pub url: String,
    requests: Arc<Mutex<Vec<String>>>,
}

impl Upstream {
    /// One that does with each request what `faults` says of its number, and with those behind the last what that says.
    pub fn new(faults: Vec<Fault>) -> Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let url = format!("http://{}/v1", listener.local_addr()?);
        let requests: Arc<Mutex<Vec<String>>> = Arc::default();
        let seen = requests.clone();
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let Ok(stream) = stream else { return };
                let seen = seen.clone();
                let faults = faults.clone();
                std::thread::spawn(move || {
                    let request = read_request(&stream).unwrap_or_default();
                    let number = {
                        let mut seen = seen.lock().expect("no test panics with it");
                        seen.push(request);
                        seen.len() - 1
                    };
                    // Whoever asked may have left.
                    let _ = faults[number.min(faults.len() - 1)].happen(stream);
                });
            }
        });
        Ok(Self { url, requests })
    }

    pub fn requests(&self) -> Vec<String> {
        self.requests.lock().expect("no test panics with it").clone()
    }
}

impl Fault {
    fn happen(self, mut stream: TcpStream) -> Result<()> {
        let long = Duration::from_secs(5);
        let mut say = |text: &str| stream.write_all(text.as_bytes());
        match self {
            Self::None => say(&format!("{HEAD}{WORD}{WORD}{END}"))?,
            Self::Reset => SockRef::from(&stream).set_linger(Some(Duration::ZERO))?,
            Self::Closed => {}
            Self::Status(status, after) => {
                let after = if after.is_empty() { String::new() } else { format!("retry-after: {after}\r\n") };
                say(&refusal(status, &format!("connection: close\r\n{after}"), &json!({"error": {"message": "no"}})))?;
            }
            Self::SilentBeforeHeaders => std::thread::sleep(long),
            Self::SilentBeforeText => {
                say(HEAD)?;
                for _ in 0..100 {
                    say(": ping\n\n")?;
                    std::thread::sleep(long / 100);
                }
            }
            Self::SilentAfterText => {
                say(&format!("{HEAD}{WORD}"))?;
                std::thread::sleep(long);
            }
            Self::ErrorBeforeText => say(&format!("{HEAD}{ERROR}"))?,
            Self::ErrorAfterText => say(&format!("{HEAD}{WORD}{ERROR}"))?,
            Self::CutBeforeText => say(HEAD)?,
            Self::CutAfterText => say(&format!("{HEAD}{WORD}"))?,
            Self::Drip => {
                say(HEAD)?;
                for byte in format!("{WORD}{END}").chars() {
                    say(&byte.to_string())?;
                    std::thread::sleep(Duration::from_millis(20));
                }
            }
            Self::EndlessLine => {
                say(&format!("{HEAD}data: "))?;
                (0..1024).try_for_each(|_| say(&"x".repeat(1 << 20)))?;
            }
            Self::EndlessText => {
                say(HEAD)?;
                let piece =
                    format!("data: {{\"choices\":[{{\"delta\":{{\"content\":\"{}\"}}}}]}}\n\n", "x".repeat(1 << 16));
                (0..1 << 14).try_for_each(|_| say(&piece))?;
            }
        }
        if self != Self::Reset {
            stream.shutdown(Shutdown::Write)?;
        }
        Ok(())
    }
}

/// What a route can have around it. None of it changes what happens.
const AROUND: &str =
    "system = \"Be kind.\"\nanswer_timeout_s = 30\nwords = { list = [\"zzz\"] }\nlog = \"log.jsonl\"\n";

/// A route over an upstream and a handler that always answers, with the settings of the first.
pub fn route(directory: &Path, url: &str, settings: &str) -> Result<Arc<dyn Handler>> {
    let spare = directory.join("spare.jsonl");
    std::fs::write(&spare, "{\"user\": \"hi\", \"answer\": \"the spare one\"}\n")?;
    let text = format!(
        "[handlers.far]\nkind = \"openai\"\nbase_url = {url:?}\nmodel = \"m\"\n{settings}\n[handlers.spare]\nkind = \"replay\"\nfile = \"spare.jsonl\"\n\
         [routes.tutor]\nhandlers = [\"far\", \"spare\"]\n{AROUND}"
    );
    let handlers = Handlers::new(Config::parse(&directory.join("handlers.toml"), &text)?);
    handlers.served()?.remove("tutor").context("the route")
}

/// What a stream said until its end or its error, and by which handlers.
pub fn told(handler: &dyn Handler) -> (String, Result<(), Kind>) {
    let mut text = String::new();
    let stream = match handler.stream(&asked("hi", 5), &Context::default()) {
        Ok(stream) => checked(stream),
        Err(error) => return (text, Err(error.kind)),
    };
    for event in stream {
        match event {
            Ok(Event::Delta { text: piece, .. }) => text.push_str(&piece),
            Ok(_) => {}
            Err(error) => return (text, Err(error.kind)),
        }
    }
    (text, Ok(()))
}

const SETTINGS: &str =
    "first_token_timeout_s = 0.3\nidle_timeout_s = 0.3\nretry = { max = 2, base_s = 0.02, cap_s = 0.2 }";
const SPARE: &str = "the spare one";

/// Of each fault: how often the upstream is asked, and the error of a stream that has begun, if the answer was cut after its first text.
#[test]
fn every_fault_ends_in_a_whole_answer_or_in_an_error_and_never_in_between() -> Result<()> {
    let cases = [
        (Fault::Reset, 3, None),
        (Fault::Closed, 3, None),
        (Fault::Status(429, "0.05"), 3, None),
        (Fault::Status(429, "60"), 1, None),
        (Fault::Status(429, ""), 3, None),
        (Fault::Status(500, ""), 3, None),
        (Fault::Status(503, "0.01"), 3, None),
        (Fault::Status(503, "3"), 1, None),
        (Fault::Status(529, ""), 3, None),
        (Fault::SilentBeforeHeaders, 1, None),
        (Fault::SilentBeforeText, 1, None),
        (Fault::SilentAfterText, 1, Some(Kind::Timeout)),
        (Fault::ErrorBeforeText, 3, None),
        (Fault::ErrorAfterText, 1, Some(Kind::Unavailable)),
        (Fault::CutBeforeText, 3, None),
        (Fault::CutAfterText, 1, Some(Kind::Cut)),
        (Fault::Drip, 1, None),
        (Fault::EndlessLine, 1, None),
        (Fault::EndlessText, 1, Some(Kind::Protocol)),
    ];
    // At once, since most of the time is spent in waits.
    let results = std::thread::scope(|scope| {
        let runs = cases.map(|(fault, calls, cut)| {
            scope.spawn(move || -> Result<()> {
                let directory = tempfile::tempdir()?;
                let upstream = Upstream::new(vec![fault])?;
                let handler = route(directory.path(), &upstream.url, SETTINGS)?;
                let since = Instant::now();
                let (text, end) = told(handler.as_ref());
                let streamed = since.elapsed();
                match &cut {
                    None => assert_eq!((text.as_str(), &end), (SPARE, &Ok(())), "{fault:?}"),
                    Some(kind) => {
                        let is_all = text.bytes().all(|byte| byte == b'x') || text == "half ";
                        assert!(is_all && end.as_ref() == Err(kind), "{fault:?}: {} bytes, {end:?}", text.len());
                    }
                }
                assert_eq!(upstream.requests().len(), calls, "{fault:?}");
                // Unstreamed nothing was shown, so that the next handler gives the answer in any case.
                let whole = handler.complete(&asked("hi", 5), &Context::default());
                let whole = whole.with_context(|| format!("{fault:?}"))?;
                assert_eq!(whole.text(), SPARE, "{fault:?}");
                assert_eq!(upstream.requests().len(), 2 * calls, "{fault:?}");
                assert!(streamed < Duration::from_secs(4), "{fault:?} took {streamed:?}");
                Ok(())
            })
        });
        runs.map(|run| run.join().expect("what it asserts holds"))
    });
    results.into_iter().collect()
}

/// Nobody listens: there is no request to count.
#[test]
fn a_refused_connection_is_passed_on_after_its_retries() -> Result<()> {
    let directory = tempfile::tempdir()?;
    let handler = route(directory.path(), "http://127.0.0.1:1/v1", SETTINGS)?;
    assert_eq!(told(handler.as_ref()), (SPARE.to_owned(), Ok(())));
    Ok(())
}

#[test]
fn what_fails_once_is_asked_again_and_answers() -> Result<()> {
    let directory = tempfile::tempdir()?;
    for fault in
        [Fault::Reset, Fault::Status(500, ""), Fault::Status(429, "0.1"), Fault::ErrorBeforeText, Fault::CutBeforeText]
    {
        let upstream = Upstream::new(vec![fault, Fault::None])?;
        let handler = route(directory.path(), &upstream.url, SETTINGS)?;
        let since = Instant::now();
        assert_eq!(told(handler.as_ref()), ("half half ".to_owned(), Ok(())), "{fault:?}");
        assert_eq!(upstream.requests().len(), 2, "{fault:?}");
        if let Fault::Status(429, _) = fault {
            assert!(since.elapsed() >= Duration::from_millis(100), "Retry-After is obeyed");
        }
    }
    Ok(())
}

#[test]
fn a_time_limit_for_all_holds_through_retries_and_fallbacks() -> Result<()> {
    let directory = tempfile::tempdir()?;
    let upstream = Upstream::new(vec![Fault::SilentBeforeHeaders])?;
    let text = format!(
        "[handlers.a]\nkind = \"openai\"\nbase_url = {url:?}\nmodel = \"m\"\n[handlers.b]\nkind = \"openai\"\nbase_url = {url:?}\nmodel = \"m\"\n\
         first_token_timeout_s = 0.1\n[routes.tutor]\nhandlers = [\"b\", \"a\"]\nanswer_timeout_s = 0.5\n",
        url = upstream.url
    );
    let handlers = Handlers::new(Config::parse(&directory.path().join("h.toml"), &text)?);
    let tutor = handlers.served()?.remove("tutor").context("the route")?;
    for streamed in [true, false] {
        let since = Instant::now();
        let kind = match streamed {
            true => told(tutor.as_ref()).1.expect_err("it is silent"),
            false => tutor.complete(&asked("hi", 5), &Context::default()).expect_err("it is silent").kind,
        };
        let took = since.elapsed();
        assert_eq!(kind, Kind::Timeout);
        assert!(took >= Duration::from_millis(450) && took < Duration::from_millis(1500), "{took:?}");
    }
    Ok(())
}

#[test]
fn a_breaker_opens_lets_one_try_and_closes() -> Result<()> {
    let directory = tempfile::tempdir()?;
    let failing = Fault::Status(500, "");
    let upstream = Upstream::new(vec![failing, failing, failing, Fault::None])?;
    let handler = route(directory.path(), &upstream.url, "breaker = { failures = 2, window_s = 60, open_s = 0.3 }")?;
    let mut steps = Vec::new();
    for wait in [0, 0, 0, 0, 350, 0, 350, 0] {
        std::thread::sleep(Duration::from_millis(wait));
        let (text, end) = told(handler.as_ref());
        assert_eq!(end, Ok(()));
        steps.push((text == SPARE, upstream.requests().len()));
    }
    // Two fail, two are not asked; one tries and fails, one is not asked; one tries and answers, and so does the next.
    let (spare, far) = (true, false);
    let want = [(spare, 1), (spare, 2), (spare, 2), (spare, 2), (spare, 3), (spare, 3), (far, 4), (far, 5)];
    assert_eq!(steps, want);
    let counts = homeroom::handler::tally::counts().get("far").copied().context("it is counted")?;
    assert!(counts.breaker_opened >= 2 && counts.breaker_refused >= 3 && counts.fallbacks >= 6, "{counts:?}");
    Ok(())
}

/// The SDKs ask twice more by themselves, which would multiply the requests upstream.
#[test]
fn a_client_is_told_not_to_ask_again_what_was_tried_again() -> Result<()> {
    let upstream = Upstream::new(vec![Fault::Status(500, "")])?;
    let served = |settings: &str| -> Result<(u16, String)> {
        let text = format!(
            "[handlers.far]\nkind = \"openai\"\nbase_url = {:?}\nmodel = \"m\"\n{settings}\n[routes.tutor]\nhandlers = [\"far\"]\n",
            upstream.url
        );
        let handlers = Handlers::new(Config::parse(Path::new("h.toml"), &text)?);
        let server = serve(handlers.served()?.into_iter().collect())?;
        let (status, headers, _) = post(server.address, &chat_body(&json!({"model": "tutor"})))?;
        server.stop();
        server.wait()?;
        Ok((status, headers))
    };
    let (status, headers) = served("retry = { max = 2, base_s = 0.01 }")?;
    assert!(status == 503 && headers.contains("x-should-retry: false"), "{status} {headers}");
    assert_eq!(upstream.requests().len(), 3);
    let (status, headers) = served("")?;
    assert!(status == 503 && !headers.contains("x-should-retry"), "{status} {headers}");
    assert_eq!(upstream.requests().len(), 4);
    Ok(())
}
