//! Vectors of texts: through the server, from the program, and from a provider.

use std::collections::BTreeMap;
use std::fs;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use homeroom::handler::config::{Config, Handlers};
use homeroom::handler::embedding::Embedder;
use homeroom::handler::limit::{Limited, Limits};
use homeroom::handler::{Context, EmbedRequest, Gives, Handler, HandlerError, Input, Kind, Request};
use homeroom::models::ModelRef;
use homeroom::serve::{Models, Running};
use homeroom_engine::run::compute::Compute;
use serde_json::{Value, json};

use crate::handlers::{chat_body, endpoint, http, local, scripted, serve, settings};
use crate::support::{Place, fixture, homeroom, refused};

fn path(name: &str) -> PathBuf {
    fixture("embeddings").join(name)
}

fn embedder(name: &str) -> Result<Embedder> {
    Embedder::load(name, &ModelRef { name: path(name), ..ModelRef::default() }, Compute::Auto)
}

/// A server of two embedding models and a chat model.
fn served() -> Result<Running> {
    let limits = Limits { running: 32, waiting: 64 };
    let behind =
        |name: &str| -> Result<Arc<dyn Handler>> { Ok(Arc::new(Limited::new(Arc::new(embedder(name)?), limits))) };
    serve(Models::from([
        ("bert".into(), behind("bert")?),
        ("xlm".into(), behind("xlm-roberta")?),
        ("tutor".into(), local()?),
    ]))
}

fn post(at: SocketAddr, body: &str) -> Result<(u16, String, String)> {
    http(at, "POST /v1/embeddings HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json", body)
}

fn ask(at: SocketAddr, body: &Value) -> Result<(String, Value)> {
    let (status, headers, body) = post(at, &body.to_string())?;
    anyhow::ensure!(status == 200, "{status}: {body}");
    Ok((headers, serde_json::from_str(&body)?))
}

/// Status, param, code and message of a refusal, which has OpenAI's shape.
fn refusal(at: SocketAddr, body: &str) -> Result<(u16, Value, Value, String)> {
    let (status, _, body) = post(at, body)?;
    let answer: Value = serde_json::from_str(&body).with_context(|| format!("{status}: {body}"))?;
    let error = &answer["error"];
    assert!(error["type"].is_string() && answer.as_object().is_some_and(|fields| fields.len() == 1), "{answer}");
    let message = error["message"].as_str().context("a message")?.to_owned();
    Ok((status, error["param"].clone(), error["code"].clone(), message))
}

/// Texts of `tests/fixtures/embeddings/NAME`, their tokens and their vectors, as sentence-transformers makes them.
fn expected(name: &str) -> Result<Vec<Value>> {
    let whole: Value = serde_json::from_str(&fs::read_to_string(path(name).join("expected.json"))?)?;
    Ok(whole["rows"].as_array().context("rows")?.clone())
}

fn numbers(vector: &Value) -> Result<Vec<f32>> {
    Ok(serde_json::from_value(vector.clone())?)
}

fn close(a: &[f32], b: &[f32]) -> bool {
    a.len() == b.len() && a.iter().zip(b).all(|(a, b)| (a - b).abs() < 1e-5)
}

/// Reads base64 of f32, the lowest byte first, as OpenAI's clients do.
fn decode(base64: &Value) -> Result<Vec<f32>> {
    let letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let text = base64.as_str().context("a text")?;
    let (mut bits, mut n, mut bytes) = (0_u32, 0, Vec::new());
    for letter in text.trim_end_matches('=').chars() {
        bits = bits << 6 | u32::try_from(letters.find(letter).context("a letter of base64")?)?;
        n += 6;
        if n >= 8 {
            n -= 8;
            bytes.push((bits >> n & 0xff) as u8);
        }
    }
    Ok(bytes.chunks_exact(4).map(|four| f32::from_le_bytes(four.try_into().expect("four"))).collect())
}

#[test]
fn the_server_embeds_as_openai_does() -> Result<()> {
    let server = served()?;
    let at = server.address;
    for (model, name) in [("bert", "bert"), ("xlm", "xlm-roberta")] {
        let rows = expected(name)?;
        let texts: Vec<&Value> = rows.iter().map(|row| &row["text"]).collect();
        let (headers, whole) = ask(at, &json!({"model": model, "input": texts, "user": "u"}))?;
        assert!(headers.contains(&format!("x-homeroom-handler: {name}")), "{headers}");
        assert!(headers.contains("x-ignored-params: user") && headers.contains("x-homeroom-truncated: 1"), "{headers}");
        assert_eq!((&whole["object"], &whole["model"]), (&json!("list"), &json!(model)));
        let tokens: usize = rows.iter().map(|row| row["ids"].as_array().map_or(0, Vec::len)).sum();
        assert_eq!(whole["usage"], json!({"prompt_tokens": tokens, "total_tokens": tokens}));
        let data = whole["data"].as_array().context("data")?;
        assert_eq!(data.len(), rows.len());
        let (_, packed) = ask(at, &json!({"model": model, "input": texts, "encoding_format": "base64"}))?;
        for (index, (row, made)) in rows.iter().zip(data).enumerate() {
            assert_eq!((&made["object"], &made["index"]), (&json!("embedding"), &json!(index)));
            let vector = numbers(&made["embedding"])?;
            assert!(close(&vector, &numbers(&row["vector"])?), "{name}: {}", row["text"]);
            assert_eq!(decode(&packed["data"][index]["embedding"])?, vector, "the same bits");
        }
        // One text, its tokens, and a list of those.
        let one = |input: &Value| -> Result<Vec<f32>> {
            let (headers, whole) =
                ask(at, &json!({"model": model, "input": input, "dimensions": numbers(&rows[0]["vector"])?.len()}))?;
            assert!(!headers.contains("x-homeroom-truncated"), "{headers}");
            numbers(&whole["data"][0]["embedding"])
        };
        let wanted = numbers(&rows[3]["vector"])?;
        for input in [&rows[3]["text"], &rows[3]["ids"], &json!([rows[3]["ids"]]), &json!([rows[3]["text"]])] {
            // BERT's fixture cuts this text, so that it is given as tokens only.
            let cut = rows[3]["truncated"] == true && (input.is_string() || input[0].is_string());
            assert!(cut || close(&one(input)?, &wanted), "{name}: {input}");
        }
    }
    server.stop();
    server.wait()
}

#[test]
fn what_cannot_be_embedded_is_refused_in_openais_shape() -> Result<()> {
    let server = served()?;
    let at = server.address;
    let long = "many words of a long text ".repeat(40);
    for (body, status, param, code, words) in [
        (json!({"model": "bert", "input": []}), 400, "input", Value::Null, "empty list"),
        (json!({"model": "bert", "input": vec!["x"; 2049]}), 400, "input", Value::Null, "2049 texts"),
        (json!({"model": "bert", "input": "x", "dimensions": 35}), 400, "dimensions", Value::Null, "vectors have 36"),
        (json!({"model": "bert", "input": "x", "inputs": 1}), 400, "inputs", Value::Null, "did you mean `input`?"),
        (
            json!({"model": "bert", "input": [1, 500_000]}),
            400,
            "input",
            Value::Null,
            "check_embedding_ctx_length=False",
        ),
        // Ids of another tokenizer, all below 131.
        (json!({"model": "bert", "input": [[2, 7, 3], [9, 11]]}), 400, "input", Value::Null, "input 1: "),
        (
            json!({"model": "bert", "input": ["x", long], "truncate": false}),
            400,
            "input",
            json!("context_length_exceeded"),
            "input 1 is longer than the 27 tokens",
        ),
        (json!({"model": "tutor", "input": "x"}), 400, "model", json!("model_not_supported"), "; `bert` does"),
        (json!({"model": "nobody", "input": "x"}), 404, "model", json!("model_not_found"), "no model `nobody`"),
    ] {
        let (got, at_param, got_code, message) = refusal(at, &body.to_string())?;
        assert_eq!((got, at_param, got_code), (status, json!(param), code), "{message}");
        assert!(message.contains(words), "{message}");
        assert!(!message.contains("many words"), "a text is not told: {message}");
    }
    for body in ["", "{", "[]", "\u{0}\u{1}", "{\"model\":\"bert\",\"input\":\"\\ud800\"}", &"[".repeat(200_000)] {
        assert_eq!(refusal(at, body)?.0, 400, "{body:.30}");
    }
    let large = format!("{{\"model\":\"bert\",\"input\":\"{}\"}}", "x".repeat(5 << 20));
    assert_eq!(refusal(at, &large)?.0, 413);
    let plain = http(at, "POST /v1/embeddings HTTP/1.1\r\nhost: localhost\r\ncontent-type: text/plain", "{}")?;
    assert_eq!(plain.0, 415);
    assert_eq!(http(at, "GET /v1/embeddings HTTP/1.1\r\nhost: localhost", "")?.0, 405);
    let elsewhere = http(at, "POST /embeddings HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json", "{}")?;
    assert!(elsewhere.0 == 404 && elsewhere.2.contains("did you mean /v1/embeddings?"), "{}", elsewhere.2);

    // The other way round, and both are listed.
    let (status, _, body) = crate::handlers::post(at, &chat_body(&json!({"model": "xlm", "stream": true})))?;
    assert!(status == 400 && body.contains("`xlm` is an embedding model") && body.contains("`tutor` does"), "{body}");
    let list = http(at, "GET /v1/models HTTP/1.1\r\nhost: localhost", "")?.2;
    assert!(["bert", "xlm", "tutor"].iter().all(|id| list.contains(&format!("\"id\":\"{id}\""))), "{list}");
    server.stop();
    server.wait()
}

#[test]
fn a_class_of_thirty_gets_what_each_would_get_alone() -> Result<()> {
    let server = served()?;
    let at = server.address;
    let rows = Arc::new(expected("bert")?);
    let book: Vec<String> = (0..400).map(|n| format!("page {n} of a book about cells and their parts")).collect();
    let index = thread::spawn(move || ask(at, &json!({"model": "bert", "input": book})));
    let pupils = (0..30).map(|pupil| {
        let rows = rows.clone();
        thread::spawn(move || -> Result<()> {
            for turn in 0..4 {
                let row = &rows[(pupil + 5 * turn) % rows.len()];
                let (_, whole) = ask(at, &json!({"model": "bert", "input": row["text"]}))?;
                assert!(close(&numbers(&whole["data"][0]["embedding"])?, &numbers(&row["vector"])?), "{}", row["text"]);
            }
            Ok(())
        })
    });
    for pupil in pupils.collect::<Vec<_>>() {
        pupil.join().expect("it does not panic")?;
    }
    let (_, whole) = index.join().expect("it does not panic")?;
    assert_eq!(whole["data"].as_array().map(Vec::len), Some(400));
    server.stop();
    server.wait()
}

fn texts(texts: &[&str]) -> EmbedRequest {
    let input = texts.iter().map(|text| Input::Text((*text).to_owned())).collect();
    EmbedRequest { input, ..EmbedRequest::default() }
}

#[test]
fn nobody_computes_for_who_has_left() -> Result<()> {
    let model = embedder("bert")?;
    let gone = Context::default();
    gone.cancel();
    assert_eq!(model.embed(&texts(&["a"]), &gone).expect_err("it is cancelled").kind, Kind::Cancelled);
    let late = Context::default().within(Duration::ZERO);
    assert_eq!(model.embed(&texts(&["a"]), &late).expect_err("it is late").kind, Kind::Timeout);
    // In the middle of the work, which the thread ends before all of it is done: the client leaves, or the server stops.
    let many = EmbedRequest { input: vec![Input::Text("cells and letters ".repeat(6)); 200_000], ..texts(&[]) };
    for server_stops in [false, true] {
        let stops = Arc::new(AtomicBool::new(false));
        let context = Context::default().or_with(stops.clone());
        let leaves = context.clone();
        let client = thread::spawn(move || {
            thread::sleep(Duration::from_millis(30));
            if server_stops { stops.store(true, Ordering::SeqCst) } else { leaves.cancel() }
        });
        assert_eq!(model.embed(&many, &context).expect_err("it is cancelled").kind, Kind::Cancelled);
        client.join().expect("it does not panic");
    }
    let late = Context::default().within(Duration::from_millis(30));
    assert_eq!(model.embed(&many, &late).expect_err("it is late").kind, Kind::Timeout);
    // A client that closes the connection gives up its work, too: the server still stops at once.
    let server = served()?;
    let body = json!({"model": "bert", "input": vec!["cells and letters of a book ".repeat(20); 2000]}).to_string();
    let mut stream = TcpStream::connect(server.address)?;
    write!(
        stream,
        "POST /v1/embeddings HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n{body}",
        body.len()
    )?;
    drop(stream);
    let after = ask(server.address, &json!({"model": "bert", "input": "one more"}))?;
    assert_eq!(after.1["data"].as_array().map(Vec::len), Some(1));
    server.stop();
    server.wait()
}

#[test]
fn an_embedding_model_is_asked_for_nothing_else() -> Result<()> {
    let model = embedder("bert")?;
    assert_eq!(model.gives(), Gives::Vectors);
    let refused = model.stream(&Request::default(), &Context::default()).err().context("it answers nothing")?;
    assert!(refused.message.contains("`bert` is an embedding model"), "{refused}");
    let chat = local()?;
    let refused = chat.embed(&texts(&["a"]), &Context::default()).expect_err("it embeds nothing");
    assert!(refused.message.contains("does not embed"), "{refused}");
    for (reference, compute, words) in [
        (ModelRef { name: path("bert"), ..ModelRef::default() }, Compute::Bf16, "computes in f32"),
        (
            ModelRef { name: path("bert"), base_model: Some("x".into()), ..ModelRef::default() },
            Compute::Auto,
            "has no base model",
        ),
        (ModelRef { name: fixture("models/llama"), ..ModelRef::default() }, Compute::Auto, "unknown encoder `llama`"),
    ] {
        let refused = format!("{:#}", Embedder::load("m", &reference, compute).err().context(words)?);
        assert!(refused.contains(words), "{refused}");
    }
    Ok(())
}

#[test]
fn a_file_of_handlers_serves_embeddings_and_mixes_no_vectors() -> Result<()> {
    let (bert, llama) = (path("bert"), fixture("models/llama"));
    let file = |routes: &str| {
        let text = format!(
            "[handlers.minilm]\nkind = \"local\"\nmodel = {bert:?}\n[handlers.chat]\nkind = \"local\"\nmodel = {llama:?}\n\
             [handlers.far]\nkind = \"openai\"\nbase_url = \"http://127.0.0.1:9/v1\"\nmodel = \"x\"\n\
             [handlers.further]\nkind = \"openai\"\nbase_url = \"http://127.0.0.1:9/v2\"\nmodel = \"x\"\n{routes}"
        );
        Ok::<_, anyhow::Error>(Handlers::new(Config::parse(Path::new("handlers.toml"), &text)?))
    };
    let good =
        file("[routes.vectors]\nhandlers = [\"minilm\"]\n[routes.tutor]\nhandlers = [\"chat\", \"far\"]")?.served()?;
    let kinds: BTreeMap<&str, Gives> = good.iter().map(|(name, handler)| (name.as_str(), handler.gives())).collect();
    assert_eq!(kinds, BTreeMap::from([("vectors", Gives::Vectors), ("tutor", Gives::Either)]));
    let made = good["vectors"].embed(&texts(&["a", "b"]), &Context::default())?;
    assert_eq!((made.dimensions, made.values.len(), made.handler.as_str()), (36, 72, "minilm"));
    for routes in ["handlers = [\"minilm\", \"far\"]", "handlers = [\"chat\", \"minilm\"]"] {
        let refused = format!("{:#}", file(&format!("[routes.mixed]\n{routes}"))?.served().err().context("it mixes")?);
        assert!(refused.contains("[routes.mixed]: `minilm` is an embedding model"), "{refused}");
    }
    // Of models elsewhere nobody knows here: the route is asked and refuses, and neither endpoint is.
    let two = file("[routes.two]\nhandlers = [\"far\", \"further\"]")?.served()?;
    let refused = two["two"].embed(&texts(&["a"]), &Context::default()).expect_err("it could mix");
    assert!(refused.message.contains("the route has 2 handlers"), "{refused}");
    Ok(())
}

/// What a provider sends for two texts, and what becomes of it.
fn told(status: &str, body: &str) -> Result<Result<homeroom::handler::Embeddings, HandlerError>> {
    let reply = format!("HTTP/1.1 {status}\r\ncontent-length: {}\r\nconnection: close\r\n\r\n{body}", body.len());
    let (url, thread) = scripted(vec![reply])?;
    let made = endpoint(&url, "m")?.embed(&texts(&["a", "b"]), &Context::default());
    thread.join().expect("the server does not panic");
    Ok(made)
}

#[test]
fn a_providers_vectors_are_passed_on_in_order() -> Result<()> {
    let body = json!({
        "object": "list", "model": "m-2",
        "data": [{"index": 1, "embedding": [3.5, -4]}, {"index": 0, "object": "embedding", "embedding": [1, 2e-3]}],
        "usage": {"prompt_tokens": 5, "total_tokens": 5},
    });
    let made = told("200 OK", &body.to_string())??;
    assert_eq!((made.values.as_slice(), made.dimensions), (&[1.0, 0.002, 3.5, -4.0][..], 2));
    assert_eq!((made.model.as_str(), made.handler.as_str(), made.prompt_tokens), ("m-2", "far", Some(5)));
    let bare = told("200 OK", "\u{feff}{\"data\":[{\"embedding\":[1]},{\"embedding\":[2]}]}")??;
    assert_eq!((bare.values.as_slice(), bare.prompt_tokens, bare.model.as_str()), (&[1.0, 2.0][..], None, "m"));
    Ok(())
}

#[test]
fn what_a_provider_sends_instead_is_told_without_its_key() -> Result<()> {
    let protocol = Kind::Protocol;
    for (status, body, kind, words) in [
        ("200 OK", "{\"data\":[{\"embedding\":[1]}]}", protocol.clone(), "1 vectors for 2 texts"),
        ("200 OK", "{\"data\":[{\"embedding\":[1]},{\"embedding\":[1,2]}]}", protocol.clone(), "1 and 2 numbers"),
        (
            "200 OK",
            "{\"data\":[{\"index\":0,\"embedding\":[1]},{\"index\":0,\"embedding\":[1]}]}",
            protocol.clone(),
            "index 0",
        ),
        (
            "200 OK",
            "{\"data\":[{\"index\":0,\"embedding\":[1]},{\"index\":9,\"embedding\":[1]}]}",
            protocol.clone(),
            "index 9",
        ),
        ("200 OK", "{\"data\":[{\"embedding\":[]},{\"embedding\":[]}]}", protocol.clone(), "0 and 0 numbers"),
        ("200 OK", "{\"data\":[{\"embedding\":[1e300]},{\"embedding\":[1]}]}", protocol.clone(), "number out of range"),
        ("200 OK", "{\"data\":[{\"embedding\":\"AACA\"},{\"embedding\":[1]}]}", protocol.clone(), "it sent no vectors"),
        ("200 OK", "<html>sk-test-1234</html>", protocol.clone(), "a web page"),
        ("200 OK", "", protocol.clone(), "it sent no vectors"),
        (
            "200 OK",
            "{\"error\":{\"message\":\"busy sk-test-1234\",\"code\":429}}",
            Kind::RateLimited { retry_after: None },
            "busy",
        ),
        ("401 No", "{\"error\":{\"message\":\"bad key sk-test-1234\"}}", Kind::Authentication, "bad key"),
        (
            "404 No",
            "{\"error\":{\"message\":\"no such model\",\"code\":\"model_not_found\"}}",
            Kind::NotFound,
            "no such model",
        ),
        ("302 Go", "", Kind::Protocol, "302"),
        ("503 No", "", Kind::Unavailable, "503"),
    ] {
        let error = told(status, body)?.err().with_context(|| body.to_owned())?;
        assert_eq!(error.kind, kind, "{body}: {error}");
        assert!(error.to_string().contains(words) && !format!("{error:?}").contains("sk-test"), "{body}: {error}");
    }
    let one = endpoint("http://127.0.0.1:9/v1", "m")?;
    let long = EmbedRequest { refuse_long: true, ..texts(&["a"]) };
    assert!(one.embed(&long, &Context::default()).expect_err("it is refused").message.contains("truncate"));
    Ok(())
}

#[test]
fn a_silent_provider_holds_nobody_who_leaves() -> Result<()> {
    let listener = std::net::TcpListener::bind("127.0.0.1:0")?;
    let url = format!("http://{}/v1", listener.local_addr()?);
    let provider = thread::spawn(move || -> Result<usize> {
        let mut stream = listener.accept()?.0;
        let mut bytes = Vec::new();
        // Until the handler hangs up.
        stream.read_to_end(&mut bytes)?;
        Ok(bytes.len())
    });
    let patient = homeroom::handler::openai::OpenAi::new(homeroom::handler::openai::Endpoint {
        read_timeout: Duration::from_secs(600),
        ..settings(&url, "m")?
    });
    let context = Context::default();
    let leaves = context.clone();
    let client = thread::spawn(move || {
        thread::sleep(Duration::from_millis(200));
        leaves.cancel();
    });
    let began = Instant::now();
    assert_eq!(patient.embed(&texts(&["a"]), &context).expect_err("it is cancelled").kind, Kind::Cancelled);
    assert!(began.elapsed() < Duration::from_secs(60));
    client.join().expect("it does not panic");
    assert!(provider.join().expect("it does not panic")? > 100);
    Ok(())
}

#[test]
fn our_own_server_is_a_provider() -> Result<()> {
    let server = served()?;
    let far = endpoint(&server.url(), "bert")?;
    let rows = expected("bert")?;
    let input: Vec<Input> =
        rows.iter().map(|row| Input::Text(row["text"].as_str().unwrap_or_default().to_owned())).collect();
    // More texts than go to a provider at once.
    let input = vec![input; 30].concat();
    let made = far.embed(&EmbedRequest { input, ..EmbedRequest::default() }, &Context::default())?;
    assert_eq!(made.values.len(), 30 * rows.len() * 36);
    for (at, vector) in made.values.chunks_exact(36).enumerate() {
        assert!(close(vector, &numbers(&rows[at % rows.len()]["vector"])?), "{at}");
    }
    let tokens: usize = rows.iter().map(|row| row["ids"].as_array().map_or(0, Vec::len)).sum();
    assert_eq!(made.prompt_tokens, Some(30 * tokens as u64));
    let refused =
        endpoint(&server.url(), "tutor")?.embed(&texts(&["a"]), &Context::default()).expect_err("a chat model");
    assert!(refused.message.contains("`bert` does"), "{refused}");
    server.stop();
    server.wait()
}

#[test]
fn commands_that_want_a_chat_model_say_what_it_is() -> Result<()> {
    let place = Place::new()?;
    let model = path("bert");
    let rows = fixture("rows/colours.jsonl");
    let words = ["is an embedding model", "/v1/embeddings"];
    refused(homeroom().args(["chat", "--prompt", "hi", "--model-dir"]).arg(&model), &words)?;
    refused(homeroom().args(["eval", "--file"]).arg(&rows).arg("--model-dir").arg(&model), &words)?;
    refused(
        homeroom().args(["export-model", "--output-dir"]).arg(place.path("out")).arg("--model-dir").arg(&model),
        &words,
    )?;
    refused(homeroom().args(["bench", "train", "--model-name"]).arg(&model), &words)?;
    refused(homeroom().args(["fine-tune", "--training-file"]).arg(&rows).arg("--model-name").arg(&model), &words)?;
    assert!(!place.path("out").exists());
    Ok(())
}
