//! Whoever waits for something slow keeps nobody else waiting.

use std::sync::{Barrier, Condvar, Mutex, PoisonError};

use homeroom::handler::Gives;

use super::*;

/// A door that is shut until it is opened.
#[derive(Default)]
struct Door {
    is_open: Mutex<bool>,
    opened: Condvar,
}

impl Door {
    fn wait(&self) {
        let is_open = self.is_open.lock().unwrap_or_else(PoisonError::into_inner);
        drop(self.opened.wait_while(is_open, |is_open| !*is_open));
    }

    fn open(&self) {
        *self.is_open.lock().unwrap_or_else(PoisonError::into_inner) = true;
        self.opened.notify_all();
    }
}

/// Takes as long as a door is shut to say what it gives, as a slow disk would.
struct Slow {
    door: Arc<Door>,
    words: Arc<dyn Handler>,
}

impl Handler for Slow {
    fn stream(&self, request: &Request, context: &Context) -> Result<EventStream, HandlerError> {
        self.words.stream(request, context)
    }

    fn gives(&self) -> Gives {
        self.door.wait();
        Gives::Answers
    }
}

#[test]
fn a_request_that_waits_before_it_is_let_in_keeps_nobody_else() -> Result<()> {
    let door = Arc::new(Door::default());
    let slow = Arc::new(Slow { door: door.clone(), words: words(2, 0) });
    let models: Vec<(String, Arc<dyn Handler>)> = vec![("slow".into(), slow), ("m".into(), words(3, 0))];
    let site = Site::new(models.into_iter().collect(), &[], Settings::default())?;
    let at = site.at();
    let ask = |path: &'static str, more: Value| {
        let mut body = json!({"model": "slow"});
        body.as_object_mut().expect("an object").extend(more.as_object().expect("an object").clone());
        let head = format!("POST {path} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json");
        std::thread::spawn(move || http(at, &head, &body.to_string()).map(|(status, ..)| (path, status)))
    };
    let messages = json!({"messages": [{"role": "user", "content": "hi"}]});
    let mut waiting = vec![
        ask("/v1/completions", json!({"prompt": "hi"})),
        ask("/v1/embeddings", json!({"input": "hi"})),
        ask("/api/generate", json!({"prompt": "hi"})),
        ask("/api/embed", json!({"input": "hi"})),
        ask("/api/show", json!({})),
    ];
    // More than there are threads for connections, of each kind.
    waiting.extend((0..4).map(|_| ask("/v1/chat/completions", messages.clone())));
    waiting.extend((0..4).map(|_| ask("/api/chat", messages.clone())));
    let page = std::thread::spawn(move || http(at, "GET / HTTP/1.1\r\nhost: localhost", ""));
    std::thread::sleep(Duration::from_millis(500));
    for _ in 0..5 {
        assert_eq!(site.ask("GET", "/healthz", "", "")?.0, 200);
        assert_eq!(site.post("/v1/chat/completions", "", &chat("m", &json!({})))?.0, 200);
        assert_eq!(site.get("/v1/models", "")?.0, 200);
    }
    assert!(!page.is_finished() && waiting.iter().all(|one| !one.is_finished()), "they wait");
    door.open();
    assert_eq!(page.join().expect("it does not panic")?.0, 200);
    for one in waiting {
        let (path, status) = one.join().expect("it does not panic")?;
        let makes_vectors = ["/v1/embeddings", "/api/embed"].contains(&path);
        assert_eq!(status, if makes_vectors { 400 } else { 200 }, "{path}");
    }
    site.end()
}

/// Bodies of megabytes are taken from whoever may send such, and read beside what others are answered.
#[test]
fn large_bodies_are_read_beside_other_answers() -> Result<()> {
    let settings = Settings { max_body: 32 << 20, ..Settings::default() };
    let site = Site::new(Models::from([("m".to_owned(), words(3, 0))]), &[], settings)?;
    let at = site.at();
    // A list of lists takes long to read, and is refused at its end.
    let body = format!("{{\"model\": \"m\", \"x\": [{}[]], \"messages\": 1}}", "[[[[[1]]]]],".repeat(1 << 17));
    let body = Arc::new(body);
    let all_but_the_end = Arc::new(Barrier::new(5));
    let streams: Vec<TcpStream> = (0..4).map(|_| TcpStream::connect(at)).collect::<Result<_, _>>()?;
    let sending: Vec<_> = streams
        .into_iter()
        .map(|mut stream| {
            let (body, all_but_the_end) = (body.clone(), all_but_the_end.clone());
            std::thread::spawn(move || -> Result<String> {
                let head = "POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json";
                let (begin, end) = body.split_at(body.len() - 1);
                let length = body.len();
                let sent = stream.set_nodelay(true).and_then(|()| {
                    write!(stream, "{head}\r\nconnection: close\r\ncontent-length: {length}\r\n\r\n{begin}")
                });
                all_but_the_end.wait();
                sent?;
                stream.set_read_timeout(Some(Duration::from_secs(60)))?;
                stream.write_all(end.as_bytes())?;
                let mut answer = String::new();
                stream.read_to_string(&mut answer)?;
                Ok(answer)
            })
        })
        .collect();
    // The server has all but the ends by then, so that what takes long begins with these.
    std::thread::sleep(Duration::from_millis(300));
    all_but_the_end.wait();
    let mut beside = 0;
    while sending.iter().any(|one| !one.is_finished()) {
        assert_eq!(site.ask("GET", "/healthz", "", "")?.0, 200);
        beside += usize::from(sending.iter().all(|one| !one.is_finished()));
    }
    for one in sending {
        let answer = one.join().expect("it does not panic")?;
        assert!(answer.starts_with("HTTP/1.1 400 ") && answer.contains("`x` is not known here"), "{answer}");
    }
    // One may come before the ends do, and one just behind the first answer.
    assert!(beside > 2, "{beside} answers came while all bodies were read");
    site.end()
}
