//! What a server does beside answering: it takes files, trains on them for clients, and remembers answers by consent.

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::fd::{FromRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::{Value, json};

use crate::handlers::http;
use crate::support::{Place, fixture, homeroom, refused, succeeds};

/// A server with a home of its own.
struct Served {
    child: Child,
    address: SocketAddr,
}

impl Served {
    fn start(home: &Path) -> Result<Self> {
        let mut child = in_home(home).args(["serve", "--port", "0"]).stderr(Stdio::piped()).spawn()?;
        let mut story = BufReader::new(child.stderr.take().context("a pipe")?);
        let mut lines = String::new();
        let address = loop {
            let from = lines.len();
            if story.read_line(&mut lines)? == 0 {
                bail!("it ended before it served:\n{lines}");
            }
            if let Some(url) = lines[from..].strip_prefix("serving") {
                let url = url.split_whitespace().next().context("an address")?;
                break url.trim_start_matches("http://").trim_end_matches("/v1").parse()?;
            }
        };
        // What it says later is read, so that its pipe never fills.
        std::thread::spawn(move || std::io::copy(&mut story, &mut std::io::sink()));
        Ok(Self { child, address })
    }

    fn get(&self, path: &str) -> Result<(u16, Value)> {
        let (status, _, body) = http(self.address, &format!("GET /v1/{path} HTTP/1.1\r\nhost: localhost"), "")?;
        Ok((status, serde_json::from_str(&body).with_context(|| body.clone())?))
    }

    fn post(&self, path: &str, body: &Value) -> Result<(u16, Value)> {
        let head = format!("POST /v1/{path} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json");
        let (status, _, text) = http(self.address, &head, &body.to_string())?;
        Ok((status, serde_json::from_str(&text).with_context(|| text.clone())?))
    }

    fn upload(&self, form: &str) -> Result<(u16, Value)> {
        let head = "POST /v1/files HTTP/1.1\r\nhost: localhost\r\ncontent-type: multipart/form-data; boundary=xx";
        let (status, _, text) = http(self.address, head, form)?;
        Ok((status, serde_json::from_str(&text).with_context(|| text.clone())?))
    }

    fn ask(&self, more: &Value) -> Result<(u16, String)> {
        let mut body = json!({"model": "near", "messages": [{"role": "user", "content": "write to ada@example.org"}], "max_tokens": 4, "temperature": 0});
        body.as_object_mut().context("an object")?.extend(more.as_object().context("an object")?.clone());
        let head = "POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json";
        let (status, _, text) = http(self.address, head, &body.to_string())?;
        Ok((status, text))
    }

    /// The job once it has one of these states.
    fn until(&self, job: &str, states: &[&str]) -> Result<Value> {
        let late = Instant::now() + Duration::from_secs(300);
        loop {
            let (_, now) = self.get(&format!("fine_tuning/jobs/{job}"))?;
            if states.iter().any(|state| now["status"] == *state) {
                return Ok(now);
            }
            ensure!(Instant::now() < late, "{now}");
            std::thread::sleep(Duration::from_millis(100));
        }
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn in_home(home: &Path) -> Command {
    let mut command = homeroom();
    command.env("HOMEROOM_HOME", home);
    command
}

fn form(purpose: &str, rows: &str) -> String {
    format!(
        "--xx\r\nContent-Disposition: form-data; name=\"purpose\"\r\n\r\n{purpose}\r\n--xx\r\nContent-Disposition: form-data; name=\"file\"; filename=\"rows.jsonl\"\r\nContent-Type: application/octet-stream\r\n\r\n{rows}\r\n--xx--\r\n"
    )
}

/// A home with a tiny model, and what else its file of handlers says.
fn home(place: &Place, more: &str) -> Result<PathBuf> {
    let model = fixture("models/llama");
    let text = format!("[handlers.near]\nkind = \"local\"\nmodel = {model:?}\n{more}");
    place.write("home/handlers.toml", text)?;
    Ok(place.path("home"))
}

fn tuning(more: &str) -> String {
    format!("[fine_tuning]\nbases = [{:?}]\n{more}", fixture("models/llama"))
}

fn lessons(place: &Place, count: usize) -> Result<String> {
    Ok(fs::read_to_string(place.rows("rows.jsonl", count)?)?)
}

/// A server with some keys, and what it is asked with them.
struct Keyed {
    server: Served,
    keys: Vec<String>,
}

impl Keyed {
    fn start(home: &Path, names: &[&str]) -> Result<Self> {
        let key = |name: &&str| Ok(succeeds(in_home(home).args(["keys", "add", name]))?.stdout.trim().to_owned());
        let keys = names.iter().map(key).collect::<Result<_>>()?;
        Ok(Self { server: Served::start(home)?, keys })
    }

    fn send(&self, key: usize, line: &str, kind: &str, body: &str) -> Result<(u16, String, Value)> {
        let key = &self.keys[key];
        let head = format!("{line} HTTP/1.1\r\nhost: localhost\r\nauthorization: Bearer {key}\r\ncontent-type: {kind}");
        let (status, head, text) = http(self.server.address, &head, body)?;
        Ok((status, head, serde_json::from_str(&text).with_context(|| text.clone())?))
    }

    fn upload(&self, key: usize, rows: &str) -> Result<(u16, String, Value)> {
        self.send(key, "POST /v1/files", "multipart/form-data; boundary=xx", &form("fine-tune", rows))
    }
}

/// A key leaves room, places and turns to others.
#[test]
fn a_key_has_its_share_of_files_uploads_and_jobs() -> Result<()> {
    let place = Place::new()?;
    let shares = "threads = 1\nkey_files_mib_max = 1\nkey_uploads = 1\nkey_jobs = 1\n";
    let home = home(&place, &tuning(shares))?;
    let site = Keyed::start(&home, &["ada", "bob"])?;
    let large = "x".repeat(700 << 10);
    let (status, _, file) = site.upload(0, &large)?;
    assert_eq!(status, 200, "{file}");
    let (status, head, refused) = site.upload(0, &large)?;
    assert!(status == 429 && head.contains("x-should-retry: false"), "{status} {head} {refused}");
    assert_eq!((&refused["error"]["code"], &refused["error"]["param"]), (&json!("insufficient_quota"), &json!("file")));
    let words = message(&refused);
    assert!(
        words.contains("the files of the key `ada` would be more than 1 MiB") && words.contains("DELETE"),
        "{words}"
    );
    assert_eq!(site.upload(1, &large)?.0, 200, "the other key has its own share");
    let id = file["id"].as_str().context("an id")?;
    assert_eq!(site.send(0, &format!("DELETE /v1/files/{id}"), "text/plain", "")?.0, 200);
    let (status, _, rows) = site.upload(0, &lessons(&place, 40)?)?;
    assert_eq!(status, 200, "what is deleted makes room: {rows}");
    let (_, _, rows_of_bob) = site.upload(1, &lessons(&place, 40)?)?;

    // One is being sent.
    let mut stream = TcpStream::connect(site.server.address)?;
    write!(
        stream,
        "POST /v1/files HTTP/1.1\r\nhost: localhost\r\nauthorization: Bearer {}\r\ncontent-type: multipart/form-data; boundary=xx\r\ncontent-length: 90000\r\n\r\n--xx\r\n",
        site.keys[0]
    )?;
    std::thread::sleep(Duration::from_millis(500));
    let (status, _, refused) = site.upload(0, "{}")?;
    assert!(status == 429 && message(&refused).contains("so many files at once: 1"), "{status} {refused}");
    assert_eq!(site.upload(1, "{}")?.0, 200);
    drop(stream);

    let order = |file: &Value| {
        json!({"model": "llama", "training_file": file["id"], "hyperparameters": {"n_epochs": 1000, "batch_size": 4}})
            .to_string()
    };
    let create = |key, file: &Value| site.send(key, "POST /v1/fine_tuning/jobs", "application/json", &order(file));
    let (status, _, job) = create(0, &rows)?;
    assert_eq!(status, 200, "{job}");
    let (status, head, refused) = create(0, &rows)?;
    assert!(status == 429 && head.contains("x-should-retry: false") && head.contains("retry-after: "), "{head}");
    assert!(message(&refused).contains("so many jobs that have not ended: 1"), "{refused}");
    assert!(message(&refused).contains("or cancel one"), "{refused}");
    assert_eq!(create(1, &rows_of_bob)?.0, 200);
    let id = job["id"].as_str().context("an id")?;
    let (status, _, cancelled) =
        site.send(0, &format!("POST /v1/fine_tuning/jobs/{id}/cancel"), "application/json", "{}")?;
    assert!(status == 200 && cancelled["status"] == "cancelled", "{cancelled}");
    assert_eq!(create(0, &rows)?.0, 200, "its turn is free again");
    let check = succeeds(in_home(&home).args(["handlers", "check"]))?.stdout;
    assert!(check.contains("each key: 1 MiB of files, files sent at once: 1, jobs that have not ended: 1"), "{check}");
    Ok(())
}

/// A file system that hangs: what is read is a pipe that nobody writes to.
#[test]
fn a_disk_that_hangs_keeps_no_other_answer_waiting() -> Result<()> {
    let place = Place::new()?;
    let server = Served::start(&home(&place, &tuning(""))?)?;
    let file = server.upload(&form("fine-tune", "{}"))?.1;
    let id = file["id"].as_str().context("an id")?;
    let content = place.path("home/files").join(id).join("content.jsonl");
    fs::remove_file(&content)?;
    let name = std::ffi::CString::new(content.display().to_string())?;
    // SAFETY: the name ends with a zero and outlives the call.
    ensure!(unsafe { libc::mkfifo(name.as_ptr(), 0o600) } == 0, "no pipe");
    let (at, path) = (server.address, format!("GET /v1/files/{id}/content HTTP/1.1\r\nhost: localhost"));
    let waiting: Vec<_> = (0..6)
        .map(|_| {
            let path = path.clone();
            std::thread::spawn(move || http(at, &path, ""))
        })
        .collect();
    std::thread::sleep(Duration::from_millis(500));
    for _ in 0..3 {
        let (status, ..) = http(at, "GET /healthz HTTP/1.1\r\nhost: localhost", "")?;
        assert_eq!((status, server.ask(&json!({}))?.0), (200, 200));
        assert_eq!(server.get("files")?.0, 200);
    }
    assert!(waiting.iter().all(|one| !one.is_finished()), "they wait for the pipe");
    Ok(())
}

fn message(error: &Value) -> &str {
    error["error"]["message"].as_str().unwrap_or_default()
}

#[test]
fn files_are_bounded_and_no_form_is_taken_that_is_not_whole() -> Result<()> {
    let place = Place::new()?;
    let server = Served::start(&home(&place, &tuning("file_mib_max = 1\n"))?)?;
    let good = form("fine-tune", "{\"a\": 1}");
    for (wrong, status, words) in [
        (form("assistants", "{}"), 400, "kept here for fine-tune alone"),
        (form("fine-tune", ""), 400, "the file is empty"),
        (form("fine-tune", &"x".repeat(1 << 20)) + "", 200, ""),
        (form("fine-tune", &"x".repeat((1 << 20) + 1)), 413, "larger than 1 MiB"),
        (good.replace("--xx--", ""), 400, "breaks off before its last boundary"),
        (good.replace("name=\"purpose\"", "name=\"purpsoe\""), 400, "`purpsoe`: unknown field"),
        (good.replace("; filename=\"rows.jsonl\"", ""), 400, "should be a file"),
        (good[good.find("\r\n--xx\r\n").context("two parts")? + 2..].to_owned(), 400, "`purpose` is missing"),
        (String::new(), 400, "malformed"),
        ("{}".to_owned(), 400, "malformed"),
    ] {
        let (got, answer) = server.upload(&wrong)?;
        assert!(got == status && message(&answer).contains(words), "{status} {words}: {got} {answer}");
    }
    let (status, answer) = server.post("files", &json!({}))?;
    assert!(status == 415 && message(&answer).contains("multipart/form-data"), "{answer}");
    assert_eq!(server.get("files")?.1["data"].as_array().map(Vec::len), Some(1));
    // A client that leaves in the middle leaves nothing.
    let mut stream = TcpStream::connect(server.address)?;
    write!(
        stream,
        "POST /v1/files HTTP/1.1\r\nhost: localhost\r\ncontent-type: multipart/form-data; boundary=xx\r\ncontent-length: 90000\r\n\r\n{}",
        &good[..good.len() - 10]
    )?;
    std::thread::sleep(Duration::from_millis(300));
    drop(stream);
    let files = place.path("home/files");
    let late = Instant::now() + Duration::from_secs(10);
    while fs::read_dir(&files)?.count() > 1 {
        ensure!(Instant::now() < late, "it is still there");
        std::thread::sleep(Duration::from_millis(100));
    }
    for path in ["files?limt=1", "files?limit=0", "files?order=up", "files?after=file-1"] {
        assert_eq!(server.get(path)?.0, 400, "{path}");
    }
    for path in ["files/%ff", "fine_tuning/jobs/%ff/events"] {
        assert_eq!(server.get(path)?.0, 400, "{path}");
    }
    for path in ["files/file-0", "files/..%2F..%2Fhandlers.toml", "files/file-0/content", "fine_tuning/jobs/ftjob-0"] {
        assert_eq!(server.get(path)?.0, 404, "{path}");
    }
    Ok(())
}

#[test]
fn nothing_is_taken_or_kept_unless_the_file_of_handlers_says_so() -> Result<()> {
    let place = Place::new()?;
    let server = Served::start(&home(&place, "")?)?;
    let (status, answer) = server.upload(&form("fine-tune", "{}"))?;
    assert!(status == 404 && message(&answer).contains("[fine_tuning]"), "{answer}");
    let (status, answer) = server.post("fine_tuning/jobs", &json!({}))?;
    assert!(status == 404 && message(&answer).contains("[fine_tuning]"), "{answer}");
    let (status, answer) = server.post("feedback", &json!({"response_id": "x", "rating": 1}))?;
    assert!(status == 404 && message(&answer).contains("[memory]"), "{answer}");
    for room in ["files", "fine_tuning", "memory"] {
        assert!(!place.path("home").join(room).exists(), "{room}");
    }
    Ok(())
}

#[test]
fn a_job_goes_on_after_its_server_was_killed_and_the_model_answers() -> Result<()> {
    let place = Place::new()?;
    let home = home(&place, &tuning("threads = 1\nqueue = 1\n"))?;
    let rows = lessons(&place, 40)?;
    let server = Served::start(&home)?;
    let file = server.upload(&form("fine-tune", &rows))?.1;
    let body = json!({
        "model": "llama", "training_file": file["id"], "suffix": "Klasse 7b", "seed": 3,
        "method": {"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 1000, "batch_size": 4}}},
    });
    let (status, job) = server.post("fine_tuning/jobs", &body)?;
    assert_eq!(status, 200, "{job}");
    let id = job["id"].as_str().context("an id")?.to_owned();
    server.until(&id, &["running"])?;
    // One more may wait, and no further.
    let mut short = body.clone();
    short["method"]["supervised"]["hyperparameters"]["n_epochs"] = json!(2);
    let (_, next) = server.post("fine_tuning/jobs", &short)?;
    let (status, full) = server.post("fine_tuning/jobs", &short)?;
    assert!(status == 429 && message(&full).contains("1 jobs wait already"), "{full}");
    let events = |server: &Served| -> Result<Vec<Value>> {
        let (_, list) = server.get(&format!("fine_tuning/jobs/{id}/events?limit=100"))?;
        Ok(list["data"].as_array().cloned().unwrap_or_default())
    };
    let late = Instant::now() + Duration::from_secs(240);
    while !events(&server)?.iter().any(|event| event["type"] == "metrics") {
        ensure!(Instant::now() < late, "no step: {:?}", events(&server)?);
        std::thread::sleep(Duration::from_millis(100));
    }
    // Killed, not asked.
    drop(server);
    let server = Served::start(&home)?;
    server.until(&id, &["running"])?;
    let resumed = |server: &Served| -> Result<bool> {
        let run = fs::read_dir(home.join("runs"))?.next().context("a run")??.path();
        let _ = server;
        Ok(fs::read_to_string(run.join("events.jsonl"))?.contains("\"event\":\"resumed\""))
    };
    while !resumed(&server)? {
        ensure!(Instant::now() < late, "it does not go on: {:?}", events(&server)?);
        std::thread::sleep(Duration::from_millis(100));
    }
    let (status, cancelled) = server.post(&format!("fine_tuning/jobs/{id}/cancel"), &json!({}))?;
    assert!(status == 200 && cancelled["status"] == "cancelled", "{cancelled}");
    // The one that waited has its turn, and its model answers at once.
    let next = next["id"].as_str().context("an id")?;
    let done = server.until(next, &["succeeded", "failed"])?;
    assert_eq!(done["status"], "succeeded", "{done}");
    let model = done["fine_tuned_model"].as_str().context("a model")?;
    assert!(model.starts_with("ft-llama-klasse-7b-"), "{model}");
    let (status, answer) = server.ask(&json!({"model": model}))?;
    assert_eq!(status, 200, "{answer}");
    let models = server.get("models")?.1.to_string();
    assert!(models.contains(model) && models.contains("\"near\""), "{models}");
    Ok(())
}

/// A file is its key's, and so is a model; the file of handlers says which keys may train.
#[test]
fn what_a_key_sends_and_trains_is_that_keys_alone() -> Result<()> {
    let place = Place::new()?;
    let home = home(&place, &tuning("keys = [\"ada\", \"bob\"]\n"))?;
    let site = Keyed::start(&home, &["ada", "bob", "pupil"])?;
    let send = |key: usize, line: &str, kind: &str, body: &str| -> Result<(u16, Value)> {
        let (status, _, answer) = site.send(key, line, kind, body)?;
        Ok((status, answer))
    };
    let (form, kind) = (form("fine-tune", &lessons(&place, 16)?), "multipart/form-data; boundary=xx");
    let (status, file) = send(0, "POST /v1/files", kind, &form)?;
    assert_eq!(status, 200, "{file}");
    let (status, refused) = send(2, "POST /v1/files", kind, &form)?;
    assert!(status == 403 && message(&refused).contains("the key `pupil` may not"), "{refused}");
    let id = file["id"].as_str().context("an id")?;
    for (method, path) in [("GET", ""), ("DELETE", ""), ("GET", "/content")] {
        assert_eq!(send(1, &format!("{method} /v1/files/{id}{path}"), "text/plain", "")?.0, 404, "{method} {path}");
    }
    assert_eq!(send(1, "GET /v1/files", "text/plain", "")?.1["data"], json!([]));
    let order = json!({"model": "llama", "training_file": id, "hyperparameters": {"n_epochs": 1}}).to_string();
    assert_eq!(send(1, "POST /v1/fine_tuning/jobs", "application/json", &order)?.0, 400, "the file is Ada's");
    let (_, job) = send(0, "POST /v1/fine_tuning/jobs", "application/json", &order)?;
    let job = format!("/v1/fine_tuning/jobs/{}", job["id"].as_str().context("an id")?);
    let late = Instant::now() + Duration::from_secs(240);
    let done = loop {
        let (_, now) = send(0, &format!("GET {job}"), "text/plain", "")?;
        if now["status"] == "succeeded" {
            break now;
        }
        ensure!(Instant::now() < late && now["status"] != "failed", "{now}");
        std::thread::sleep(Duration::from_millis(100));
    };
    for line in [format!("GET {job}"), format!("GET {job}/events"), format!("POST {job}/cancel")] {
        assert_eq!(send(1, &line, "application/json", "{}")?.0, 404, "{line}");
    }
    let ask =
        json!({"model": done["fine_tuned_model"], "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2})
            .to_string();
    let asked = |key| send(key, "POST /v1/chat/completions", "application/json", &ask);
    assert_eq!(asked(0)?.0, 200);
    for key in [1, 2] {
        let (status, answer) = asked(key)?;
        assert!(status == 404 && !message(&answer).contains("known are ft-"), "{answer}");
        assert!(!send(key, "GET /v1/models", "text/plain", "")?.1.to_string().contains("\"ft-"));
    }
    // Whoever runs the server removes it while it is served.
    let model = done["fine_tuned_model"].as_str().context("a model")?;
    let listed = |path: &str| -> Result<bool> {
        Ok(send(0, &format!("GET {path}"), "text/plain", "")?.1.to_string().contains(&format!("\"{model}\"")))
    };
    assert!(listed("/v1/models")? && listed("/api/tags")?);
    fs::remove_dir_all(home.join("models").join(model))?;
    let (status, answer) = asked(0)?;
    assert_eq!((status, &answer["error"]["code"]), (404, &json!("model_not_found")), "{answer}");
    let (status, answer) = send(
        0,
        "POST /api/chat",
        "application/json",
        &json!({"model": model, "messages": [{"role": "user", "content": "hi"}]}).to_string(),
    )?;
    assert!(status == 404 && answer["error"].as_str().is_some_and(|words| words.contains(model)), "{answer}");
    assert!(!listed("/v1/models")? && !listed("/api/tags")?);
    assert_eq!(send(0, &format!("GET /v1/models/{model}"), "text/plain", "")?.0, 404);
    let again = json!({"model": model, "training_file": id}).to_string();
    let (status, answer) = send(0, "POST /v1/fine_tuning/jobs", "application/json", &again)?;
    assert_eq!((status, &answer["error"]["code"]), (400, &json!("model_not_available")), "{answer}");
    Ok(())
}

/// What somebody wants of a job that has ended, or of a model that may not be trained, is refused in words.
#[test]
fn a_job_that_cannot_be_done_says_why() -> Result<()> {
    let place = Place::new()?;
    let server = Served::start(&home(&place, &tuning(""))?)?;
    let file = server.upload(&form("fine-tune", "{\"messages\": [{\"role\": \"user\", \"content\": 7}]}\n"))?.1;
    let order = |model: &str, more: Value| {
        let mut body = json!({"model": model, "training_file": file["id"]});
        body.as_object_mut().expect("an object").extend(more.as_object().expect("an object").clone());
        server.post("fine_tuning/jobs", &body)
    };
    for (model, more, param) in [
        ("gpt-4o-mini", json!({}), "model"),
        ("../../etc", json!({}), "model"),
        ("llama", json!({"validation_file": "file-0"}), "validation_file"),
        ("llama", json!({"modle": 1}), "modle"),
    ] {
        let (status, answer) = order(model, more)?;
        assert_eq!((status, &answer["error"]["param"]), (400, &json!(param)), "{answer}");
    }
    let (_, job) = order("llama", json!({}))?;
    let job = server.until(job["id"].as_str().context("an id")?, &["failed"])?;
    assert_eq!(
        (&job["error"]["code"], &job["error"]["param"]),
        (&json!("invalid_training_file"), &json!("training_file"))
    );
    let words = job["error"]["message"].as_str().unwrap_or_default();
    assert!(words.contains("rows.jsonl") && words.contains("line 1"), "{words}");
    let (_, events) = server.get(&format!("fine_tuning/jobs/{}/events", job["id"].as_str().context("an id")?))?;
    let told = format!("{job}{events}");
    let places = [place.path("home"), fixture("models/llama")];
    assert!(!places.iter().any(|place| told.contains(&place.display().to_string())), "{told}");
    let id = job["id"].as_str().context("an id")?;
    for (wish, words) in [("cancel", "has failed already"), ("pause", "is failed"), ("resume", "is failed")] {
        let (status, answer) = server.post(&format!("fine_tuning/jobs/{id}/{wish}"), &json!({}))?;
        assert!(status == 400 && message(&answer).contains(words), "{answer}");
    }
    Ok(())
}

#[test]
fn what_is_thought_of_answers_is_kept_by_consent_and_exported() -> Result<()> {
    let place = Place::new()?;
    let home = home(&place, "[memory]\ncontent = \"redacted\"\n")?;
    let server = Served::start(&home)?;
    let whole: Value = serde_json::from_str(&server.ask(&json!({}))?.1)?;
    let (_, stream) = server.ask(&json!({"stream": true}))?;
    let first = stream.lines().find_map(|line| line.strip_prefix("data: ")).context("a chunk")?;
    let first: Value = serde_json::from_str(first)?;
    for (id, rating, correction) in
        [(&whole["id"], json!(1), Value::Null), (&first["id"], json!("down"), json!("better"))]
    {
        let body = json!({"response_id": id, "rating": rating, "correction": correction, "comment": null});
        let (status, answer) = server.post("feedback", &body)?;
        assert!(status == 200 && answer["kept"] == json!(["rating", "correction", "comment"]), "{answer}");
    }
    // Answers by Ollama's API have their id in a header alone.
    for is_streamed in [true, false] {
        let body = json!({"model": "near", "messages": [{"role": "user", "content": "hi"}], "stream": is_streamed});
        let head = "POST /api/chat HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json";
        let (_, head, _) = http(server.address, head, &body.to_string())?;
        let id = head.lines().find_map(|line| line.strip_prefix("x-homeroom-response-id: ")).context("an id")?;
        let (status, answer) = server.post("feedback", &json!({"response_id": id, "comment": "fine"}))?;
        assert_eq!(status, 200, "{answer}");
    }
    let (status, answer) = server.post("feedback", &json!({"response_id": "chatcmpl-other", "rating": 1}))?;
    assert!(status == 404 && answer["error"]["code"] == "response_not_found", "{answer}");
    let out = place.path("rows.jsonl");
    succeeds(in_home(&home).args(["feedback", "export", "--out"]).arg(&out))?;
    let rows: Vec<Value> = fs::read_to_string(&out)?.lines().map(serde_json::from_str).collect::<Result<_, _>>()?;
    let text = whole["choices"][0]["message"]["content"].clone();
    let prompt = "write to [EMAIL_1]";
    assert_eq!(
        rows,
        [
            json!({"prompt": prompt, "completion": text, "label": true}),
            json!({"prompt": prompt, "completion": text, "label": false}),
            json!({"prompt": prompt, "completion": "better", "label": true}),
        ]
    );
    succeeds(in_home(&home).args(["feedback", "export", "--pairs", "--out"]).arg(&out))?;
    assert_eq!(
        serde_json::from_str::<Value>(&fs::read_to_string(&out)?)?,
        json!({"prompt": prompt, "chosen": "better", "rejected": text})
    );
    refused(
        in_home(&home).args(["feedback", "export", "--model", "far", "--out"]).arg(&out),
        &["no answer was rated of model `far`", "hint: "],
    )?;
    let head = succeeds(in_home(&home).args(["feedback", "verify"]))?.stdout;
    #[cfg(unix)]
    for file in ["chain.jsonl", "head.json", "contents"] {
        use std::os::unix::fs::PermissionsExt;
        let path = home.join("memory").join(file);
        let wanted = if path.is_dir() { 0o700 } else { 0o600 };
        assert_eq!(fs::metadata(&path)?.permissions().mode() & 0o777, wanted, "{file}");
    }
    // Deleted while the server runs, which goes on writing behind it.
    let kept = succeeds(in_home(&home).args(["feedback", "person", "--export", "nobody"]))?.stdout;
    assert_eq!(kept, "");
    succeeds(in_home(&home).args(["feedback", "person", "--delete", "nobody"]))?;
    server.ask(&json!({}))?;
    succeeds(in_home(&home).args(["feedback", "verify", "--head", head.trim()]))?;
    let chain = home.join("memory/chain.jsonl");
    let changed = fs::read_to_string(&chain)?.replacen("\"number\":2", "\"number\":3", 1);
    fs::write(&chain, changed)?;
    refused(in_home(&home).args(["feedback", "verify"]), &["line 2 says that it is line 3"])?;
    let mut ended = in_home(&home).args(["serve", "--port", "0"]).stderr(Stdio::piped()).spawn()?;
    let mut story = String::new();
    ended.stderr.take().context("a pipe")?.read_to_string(&mut story)?;
    assert!(!ended.wait()?.success() && story.contains("line 2 says"), "{story}");
    Ok(())
}

#[test]
fn a_conversation_is_saved_as_a_row_to_learn_from() -> Result<()> {
    let place = Place::new()?;
    let home = home(&place, "")?;
    let out = place.path("rows.jsonl");
    let talk = |lines: &str| -> Result<(bool, String)> {
        let mut command = in_home(&home);
        command.args(["chat", "--max-tokens", "3", "--temperature", "0"]).stdin(Stdio::piped());
        let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
        child.stdin.take().context("a pipe")?.write_all(lines.as_bytes())?;
        let output = child.wait_with_output()?;
        Ok((output.status.success(), String::from_utf8(output.stderr)?))
    };
    let save = format!("/save {}\n", out.display());
    let (done, story) = talk(&format!("/system be kind\none\ntwo\n{save}/clear\nthree\n{save}"))?;
    assert!(done && story.contains("a row of 5 messages") && story.contains("a row of 3 messages"), "{story}");
    let rows = fs::read_to_string(&out)?;
    let rows: Vec<Value> = rows.lines().map(serde_json::from_str).collect::<Result<_, _>>()?;
    assert_eq!(rows[1]["messages"][1], json!({"role": "user", "content": "three"}));
    succeeds(in_home(&home).args(["preview"]).arg(&out))?;
    let (done, story) = talk(&save)?;
    assert!(!done && story.contains("nothing was said yet"), "{story}");
    assert!(!home.join("chat_history").exists(), "what is piped is not kept");
    Ok(())
}

/// A terminal on which `chat` runs, and what it shows.
struct Typing {
    child: Child,
    keys: fs::File,
    seen: String,
}

impl Typing {
    fn start(command: &mut Command) -> Result<Self> {
        let (mut ours, mut theirs) = (0, 0);
        let null = std::ptr::null_mut();
        // SAFETY: the numbers outlive the call; null asks for no name, and for default settings and size.
        let failed = unsafe { libc::openpty(&raw mut ours, &raw mut theirs, null, null.cast(), null.cast()) };
        ensure!(failed == 0, "no terminal: {}", std::io::Error::last_os_error());
        // SAFETY: openpty succeeded, so both are open, and nothing else owns them.
        let (keys, theirs) = unsafe { (fs::File::from_raw_fd(ours), OwnedFd::from_raw_fd(theirs)) };
        command.env("TERM", "xterm").stdin(theirs.try_clone()?).stdout(theirs.try_clone()?).stderr(theirs);
        let child = command.spawn()?;
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        Ok(Self { child, keys, seen: String::new() })
    }

    /// Waits until it shows some words, behind what was waited for before.
    fn until(&mut self, words: &str) -> Result<()> {
        let mut buffer = [0; 4096];
        while !self.seen.contains(words) {
            let count = self.keys.read(&mut buffer).with_context(|| format!("no {words:?} in {:?}", self.seen))?;
            self.seen.push_str(&String::from_utf8_lossy(&buffer[..count]));
        }
        let end = self.seen.find(words).context("it is there")? + words.len();
        self.seen.drain(..end);
        Ok(())
    }

    fn press(&mut self, keys: &str) -> Result<()> {
        Ok(self.keys.write_all(keys.as_bytes())?)
    }

    /// Waits until it has ended, a minute at most.
    fn end(&mut self) -> Result<ExitStatus> {
        let begun = Instant::now();
        while begun.elapsed() < Duration::from_secs(60) {
            if let Some(status) = self.child.try_wait()? {
                return Ok(status);
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        self.child.kill()?;
        bail!("it has not ended, and shows {:?}", self.seen)
    }
}

#[test]
fn on_a_terminal_lines_are_edited_and_what_was_typed_comes_back() -> Result<()> {
    let place = Place::new()?;
    let home = home(&place, "")?;
    let chat = |more: &[&str]| {
        let mut command = in_home(&home);
        command.args(["chat", "--max-tokens", "3", "--temperature", "0"]).args(more);
        Typing::start(&mut command)
    };
    let mut one = chat(&[])?;
    one.until("> ")?;
    // A letter is taken back, and one is put in before others.
    one.press("/systex\u{7f}m ind\u{1b}[D\u{1b}[D\u{1b}[Dk\r")?;
    // The line is drawn again at each key; only the next one's prompt stands behind a line's end.
    one.until("\n")?;
    one.until("> ")?;
    one.press("\u{4}")?;
    assert!(one.end()?.success());
    assert_eq!(fs::read_to_string(home.join("chat_history"))?, "/system kind\n");
    let mut two = chat(&[])?;
    two.until("> ")?;
    two.press("\u{1b}[A\r")?;
    two.until("/system kind")?;
    two.until("\n")?;
    two.until("> ")?;
    two.press("\u{3}")?;
    two.until("press Ctrl-C again to end")?;
    two.press("/ex\t\r")?;
    assert!(two.end()?.success());
    let mut three = chat(&["--no-history"])?;
    three.until("> ")?;
    three.press("secret\r")?;
    three.until("\n")?;
    three.until("> ")?;
    three.press("\u{4}")?;
    three.end()?;
    assert!(!fs::read_to_string(home.join("chat_history"))?.contains("secret"));
    Ok(())
}
