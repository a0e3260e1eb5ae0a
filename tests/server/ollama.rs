//! Ollama's API, and what Moodle sends.

use super::*;

#[test]
fn an_answer_is_the_same_by_both_apis() -> Result<()> {
    let site = Site::new(models(&["m"])?, &[], Settings::default())?;
    let (_, _, body) = site.post("/v1/chat/completions", "", &chat("m", &json!({"max_tokens": 6})))?;
    let whole: Value = serde_json::from_str(&body)?;
    let text = whole["choices"][0]["message"]["content"].as_str().context("a text")?.to_owned();
    let options = json!({"temperature": 0, "num_predict": 6, "num_ctx": 2048});
    let asked = json!({"model": "m:latest", "messages": [{"role": "user", "content": "hi"}], "options": options});
    let (status, head, body) = site.post("/api/chat", "", &asked)?;
    assert!(status == 200 && head.contains("content-type: application/x-ndjson"), "{head}");
    assert!(head.contains("x-ignored-params: options.num_ctx") && head.contains("x-homeroom-handler: llama"), "{head}");
    let parts = objects(&body)?;
    let said: String = parts.iter().filter_map(|part| part["message"]["content"].as_str()).collect();
    assert_eq!(said, text);
    let (last, before) = parts.split_last().context("lines")?;
    assert!(before.len() > 1 && before.iter().all(|part| part["done"] == false && part["model"] == "m:latest"));
    assert_eq!((&last["done"], &last["done_reason"]), (&json!(true), &json!("length")));
    assert_eq!((&last["eval_count"], &last["prompt_eval_count"]), (&json!(6), &whole["usage"]["prompt_tokens"]));
    let nanos = |field: &str| last[field].as_u64().with_context(|| format!("{field} in {last}"));
    assert_eq!(nanos("prompt_eval_duration")? + nanos("eval_duration")?, nanos("total_duration")?);
    assert!(last["created_at"].as_str().is_some_and(|time| time.ends_with('Z')));
    for (path, field) in [("/api/chat", "message"), ("/api/generate", "response")] {
        let mut asked = json!({"model": "m", "stream": false, "options": options});
        match field {
            "message" => asked["messages"] = json!([{"role": "user", "content": "hi"}]),
            _ => asked["prompt"] = json!("hi"),
        }
        let (_, _, body) = site.post(path, "", &asked)?;
        let whole: Value = serde_json::from_str(&body)?;
        let said = if field == "message" { &whole["message"]["content"] } else { &whole["response"] };
        assert_eq!((said, &whole["done"], &whole["eval_count"]), (&json!(text), &json!(true), &json!(6)), "{path}");
    }
    site.end()
}

/// Field by field what Moodle 5's provider for Ollama sends, and what it reads. It knows a person by a digest and itself by a password.
#[test]
fn moodle_asks_as_it_does_ollama() -> Result<()> {
    let (mut key, text) = Key::make("moodle")?;
    key.trust_forwarded = true;
    let site = Site::new(models(&["tutor"])?, &[key], Settings::default())?;
    // echo -n moodle:KEY | base64, as PHP's base64_encode has it.
    let basic = super::access::base64(&format!("moodle:{text}"));
    let headers = format!("authorization: Basic {basic}\ncontent-type: application/json");
    let user = "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08";
    let asked = json!({
        "model": "tutor", "stream": false, "prompt": "What is a prime number?", "user": user,
        "options": {"temperature": 0.5, "top_k": 40.0, "top_p": 0.9, "seed": 7, "mirostat": 0}, "system": "Answer in one sentence.",
    });
    let (status, head, body) = site.ask("POST", "/api/generate", &headers, &asked.to_string())?;
    let whole: Value = serde_json::from_str(&body)?;
    assert!(status == 200 && head.contains("content-type: application/json"), "{body}");
    assert!(whole["response"].as_str().is_some_and(|text| !text.is_empty()), "{whole}");
    assert!(whole["done_reason"].is_string() && whole["model"] == "tutor", "{whole}");
    assert!(whole["prompt_eval_count"].as_u64() > Some(5) && whole["eval_count"].as_u64() > Some(0), "{whole}");
    // PHP writes an object without fields as a list where it was an array.
    for empty in [json!({}), json!([])] {
        let asked = json!({"model": "tutor", "stream": false, "prompt": "hi", "user": user, "options": empty});
        assert_eq!(site.ask("POST", "/api/generate", &headers, &asked.to_string())?.0, 200, "{empty}");
    }
    // It takes `error` for a text, and fails at anything else.
    for (asked, status) in
        [(json!({"model": "other", "prompt": "hi"}), 404), (json!({"model": "tutor", "options": {"x": 1}}), 400)]
    {
        let (got, _, body) = site.ask("POST", "/api/generate", &headers, &asked.to_string())?;
        assert!(got == status && serde_json::from_str::<Value>(&body)?["error"].is_string(), "{got} {body}");
    }
    let (got, _, body) = site.ask("POST", "/api/generate", "content-type: application/json", &asked.to_string())?;
    assert!(got == 401 && serde_json::from_str::<Value>(&body)?["error"].is_string(), "{got} {body}");
    site.end()
}

/// Field by field what Moodle's provider for OpenAI sends, and what it reads; its extra parameters stand beside the rest.
#[test]
fn moodle_asks_as_it_does_openai() -> Result<()> {
    let (mut key, text) = Key::make("moodle")?;
    key.trust_forwarded = true;
    let site = Site::new(models(&["tutor"])?, &[key], Settings::default())?;
    let headers = format!("authorization: Bearer {text}\nopenai-organization: \ncontent-type: application/json");
    let messages = json!([{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hi"}]);
    let asked = json!({"model": "tutor", "user": "9f86d081884c7d65", "messages": messages, "top_p": 0.9, "max_completion_tokens": 8});
    let (status, head, body) = site.ask("POST", "/v1/chat/completions", &headers, &asked.to_string())?;
    let whole: Value = serde_json::from_str(&body)?;
    assert!(status == 200 && whole["id"].is_string() && whole.get("system_fingerprint").is_some(), "{head} {body}");
    assert!(whole["choices"][0]["message"]["content"].is_string() && whole["choices"][0]["finish_reason"].is_string());
    assert!(
        whole["usage"]["prompt_tokens"].is_u64()
            && whole["usage"]["completion_tokens"].is_u64()
            && whole["model"] == "tutor"
    );
    let (status, _, body) =
        site.ask("POST", "/v1/chat/completions", &headers, &json!({"model": "x", "messages": messages}).to_string())?;
    assert!(status == 404 && serde_json::from_str::<Value>(&body)?["error"]["message"].is_string(), "{body}");
    site.end()
}

/// What Open WebUI sends: it looks which models there are, streams with the cost, and says for whom; titles it asks for by itself.
#[test]
fn open_webui_asks_for_people_and_for_itself() -> Result<()> {
    let (mut key, text) = Key::make("webui")?;
    key.trust_forwarded = true;
    key.limits.requests_per_minute = Some(2);
    let site = Site::new(models(&["tutor"])?, &[key], Settings::default())?;
    let (_, _, list) = site.get("/v1/models", &text)?;
    assert_eq!((&list["object"], &list["data"][0]["id"]), (&json!("list"), &json!("tutor")));
    let ask = |user: &str, more: &str| {
        let people =
            "x-openwebui-user-name: Anna%20B\nx-openwebui-user-email: anna@school.example\nx-openwebui-user-role: user";
        let ids = "x-openwebui-chat-id: c-1\nx-openwebui-message-id: m-1";
        let headers = format!(
            "authorization: Bearer {text}\ncontent-type: application/json\nx-openwebui-user-id: {user}\n{people}\n{ids}{more}"
        );
        let body = json!({
            "model": "tutor", "messages": [{"role": "user", "content": "hi"}], "stream": true, "max_tokens": 4,
            "stream_options": {"include_usage": true},
        });
        site.ask("POST", "/v1/chat/completions", &headers, &body.to_string())
    };
    let (status, _, body) = ask("u-1", "")?;
    let chunks = objects(&body.replace("data: ", ""))?;
    assert!(status == 200 && body.contains("data: [DONE]"), "{body}");
    assert_eq!(chunks.last().map(|last| &last["usage"]["completion_tokens"]), Some(&json!(4)));
    assert_eq!(ask("u-1", "\nx-openwebui-task: title_generation")?.0, 200);
    assert_eq!((ask("u-1", "")?.0, ask("u-2", "")?.0), (429, 200), "each person has the limit");
    site.end()
}

/// Field by field what Moodle's provider for Azure sends, which names the model in the address, and what it reads.
#[test]
fn moodle_asks_as_it_does_azure() -> Result<()> {
    let (key, text) = Key::make("moodle")?;
    let site = Site::new(models(&["tutor"])?, &[key], Settings::default())?;
    let asked = json!({"user": "9f86d081884c7d65", "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hi"}]});
    let path = "/openai/deployments/tutor/chat/completions?api-version=2024-06-01";
    let headers = format!("api-key: {text}\ncontent-type: application/json");
    let (status, _, body) = site.ask("POST", path, &headers, &asked.to_string())?;
    let whole: Value = serde_json::from_str(&body)?;
    assert!(status == 200 && whole["id"].is_string() && whole.get("system_fingerprint").is_some(), "{body}");
    assert!(whole["choices"][0]["message"]["content"].is_string() && whole["choices"][0]["finish_reason"].is_string());
    assert!(whole["usage"]["prompt_tokens"].is_u64() && whole["usage"]["completion_tokens"].is_u64());
    let (status, _, body) = site.ask("POST", &path.replace("tutor", "other"), &headers, &asked.to_string())?;
    assert!(status == 404 && serde_json::from_str::<Value>(&body)?["error"]["message"].is_string(), "{body}");
    assert_eq!(site.ask("GET", path, &headers, "")?.0, 405);
    site.end()
}

#[test]
fn what_is_served_is_listed_and_shown() -> Result<()> {
    let far: Arc<dyn Handler> = words(3, 0);
    let mut all: Vec<(String, Arc<dyn Handler>)> = vec![("far".into(), far)];
    all.push(("tutor".into(), local()?));
    let site = Site::new(all.into_iter().collect(), &[], Settings::default())?;
    let (_, _, tags) = site.get("/api/tags", "")?;
    let tutor = &tags["models"][1];
    assert_eq!((&tags["models"][0]["name"], &tutor["model"]), (&json!("far"), &json!("tutor")));
    assert!(tutor["size"].as_u64() > Some(0) && tutor["digest"].as_str().is_some_and(|digest| digest.len() == 64));
    assert_eq!((&tutor["details"]["family"], &tutor["details"]["format"]), (&json!("llama"), &json!("safetensors")));
    let (_, _, running) = site.get("/api/ps", "")?;
    assert_eq!((&running["models"][0]["name"], running["models"].as_array().map(Vec::len)), (&json!("tutor"), Some(1)));
    let (_, _, version) = site.get("/api/version", "")?;
    assert!(version["version"].as_str().is_some_and(|version| version.split('.').count() == 3), "{version}");
    for field in ["model", "name"] {
        let (status, _, body) = site.post("/api/show", "", &json!({field: "tutor:latest"}))?;
        let shown: Value = serde_json::from_str(&body)?;
        assert_eq!((status, &shown["capabilities"]), (200, &json!(["completion", "tools"])), "{body}");
        assert!(shown["model_info"]["llama.context_length"].as_u64() > Some(0), "{body}");
    }
    assert_eq!(site.post("/api/show", "", &json!({"model": "tutr"}))?.0, 404);
    for more in [json!({"model": "tutor", "verbose": true}), json!({"model": "tutor", "template": "x"})] {
        assert_eq!(site.post("/api/show", "", &more)?.0, 400, "{more}");
    }
    // To ask nothing is to load a model.
    for (path, asked) in
        [("/api/generate", json!({"model": "tutor"})), ("/api/chat", json!({"model": "tutor", "messages": []}))]
    {
        let (_, _, body) = site.post(path, "", &asked)?;
        assert_eq!(serde_json::from_str::<Value>(&body)?["done_reason"], "load", "{body}");
    }
    for (method, path) in
        [("POST", "/api/pull"), ("POST", "/api/create"), ("DELETE", "/api/delete"), ("POST", "/api/copy")]
    {
        let (status, _, body) = site.ask(method, path, "content-type: application/json", "{}")?;
        assert!(status == 404 && serde_json::from_str::<Value>(&body)?["error"].is_string(), "{path}: {body}");
    }
    let (status, _, body) = site.post("/api/embed", "", &json!({"model": "tutor", "input": "hi"}))?;
    assert!(status == 400 && body.contains("makes no embeddings"), "{body}");
    site.end()
}

/// A stream that breaks off ends in an error, and not as if it were whole.
#[test]
fn a_stream_that_breaks_off_says_so() -> Result<()> {
    struct Breaks;
    impl Handler for Breaks {
        fn stream(&self, _: &Request, _: &Context) -> Result<EventStream, HandlerError> {
            let error = HandlerError::new(homeroom::handler::Kind::Cut, "it broke off");
            let events = [Ok(Event::start("i", "m", "h")), Ok(Event::text("half")), Err(error)];
            Ok(Box::new(events.into_iter()))
        }
    }
    let site =
        Site::new(Models::from([("m".to_owned(), Arc::new(Breaks) as Arc<dyn Handler>)]), &[], Settings::default())?;
    let (status, _, body) = site.post("/api/generate", "", &json!({"model": "m", "prompt": "hi"}))?;
    let parts = objects(&body)?;
    assert_eq!((status, &parts[0]["response"]), (200, &json!("half")));
    assert_eq!(parts.last().map(|part| &part["error"]), Some(&json!("it broke off")));
    assert!(!parts.iter().any(|part| part["done"] == true), "{body}");
    site.end()
}
