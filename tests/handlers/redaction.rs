//! Nothing that is likely personal leaves this machine by a route that redacts, in whichever field of a request it stands.

use std::collections::BTreeSet;
use std::sync::Mutex;

use super::*;

/// What is planted, and what of it shows in a request that has it.
const PLANTED: [(&str, &str); 2] = [("lena.meier@schule-nord.de", "lena.meier"), ("+49 30 901 234 56", "901 234")];

/// A provider that says back the last message, whichever API is asked, and keeps all bytes that it got. Its address is not one of this
/// machine: Linux takes it for its own, and a file of handlers does not.
struct Away {
    port: u16,
    requests: Arc<Mutex<Vec<String>>>,
}

impl Away {
    fn new() -> Result<Self> {
        let listener = TcpListener::bind("0.0.0.0:0")?;
        let port = listener.local_addr()?.port();
        let requests: Arc<Mutex<Vec<String>>> = Arc::default();
        let seen = requests.clone();
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let Ok(mut stream) = stream else { return };
                let request = read_request(&stream).unwrap_or_default();
                let answer = answer(&request);
                seen.lock().expect("no test panics with it").push(request);
                let _ = stream.write_all(answer.as_bytes());
            }
        });
        Ok(Self { port, requests })
    }

    fn take(&self) -> Vec<String> {
        std::mem::take(&mut *self.requests.lock().expect("no test panics with it"))
    }
}

fn answer(request: &str) -> String {
    let (head, body) = request.split_once("\r\n\r\n").unwrap_or_default();
    let body: Value = serde_json::from_str(body).unwrap_or_default();
    let last = body["messages"].as_array().and_then(|all| all.last()).cloned().unwrap_or_default();
    // Results of tools stand before the text in Anthropic's form.
    let content =
        last["content"].as_array().and_then(|blocks| Some(&blocks.last()?["text"])).unwrap_or(&last["content"]);
    let text = content.as_str().or(body["prompt"].as_str()).unwrap_or("x");
    let frames = |pieces: &[Value]| pieces.iter().map(|piece| format!("data: {piece}\n\n")).collect::<String>();
    if head.contains("/embeddings") {
        let vectors = json!({"data": [{"embedding": [0.5, 0.25]}], "usage": {"prompt_tokens": 1}}).to_string();
        return format!("HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: {}\r\n\r\n{vectors}", vectors.len());
    }
    if head.contains("/messages") {
        return stream_of(&frames(&[
            json!({"type": "message_start", "message": {"id": "m", "model": "c", "usage": {"input_tokens": 1}}}),
            json!({"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": text}}),
            json!({"type": "message_delta", "delta": {"stop_reason": "end_turn"}, "usage": {"output_tokens": 1}}),
            json!({"type": "message_stop"}),
        ]));
    }
    let choice = json!({"delta": {"content": text}, "text": text, "finish_reason": "stop"});
    stream_of(&(frames(&[json!({"choices": [choice]})]) + "data: [DONE]\n\n"))
}

/// A place in a body.
#[derive(Clone, Debug)]
enum Spot {
    /// A text, by its JSON pointer.
    Text(String),
    /// A name in the object at a JSON pointer.
    Key(String, String),
}

impl Spot {
    /// All of a value.
    fn of(value: &Value, at: &str, spots: &mut Vec<Self>) {
        match value {
            Value::String(_) => spots.push(Self::Text(at.to_owned())),
            Value::Array(items) => {
                items.iter().enumerate().for_each(|(i, item)| Self::of(item, &format!("{at}/{i}"), spots))
            }
            Value::Object(fields) => {
                for (key, field) in fields {
                    spots.push(Self::Key(at.to_owned(), key.clone()));
                    Self::of(field, &format!("{at}/{key}"), spots);
                }
            }
            _ => {}
        }
    }

    /// A body with something planted here: behind what is there, and as all of it.
    fn planted(&self, body: &Value, datum: &str) -> Option<[Value; 2]> {
        let with = |text: &str| {
            let mut body = body.clone();
            match self {
                Self::Text(at) => *body.pointer_mut(at)? = json!(text),
                Self::Key(at, key) => {
                    let fields = body.pointer_mut(at)?.as_object_mut()?;
                    let value = fields.remove(key)?;
                    fields.insert(text.to_owned(), value);
                }
            }
            Some(body)
        };
        let before = match self {
            Self::Text(at) => body.pointer(at)?.as_str()?,
            Self::Key(_, key) => key,
        };
        Some([with(datum)?, with(&format!("{before} {datum}"))?])
    }
}

fn schema() -> Value {
    json!({
        "$schema": "https://json-schema.org/draft/2020-12/schema", "$id": "a", "$comment": "a", "title": "a",
        "type": "object", "description": "a", "additionalProperties": false,
        "properties": {"to": {
            "type": "string", "description": "a", "enum": ["a"], "const": "a", "default": "a", "examples": ["a", {"to": "a"}],
            "pattern": "a", "format": "a", "$ref": "#/$defs/a", "deprecated": false,
        }},
        "required": ["to"], "dependentRequired": {"to": ["to"]}, "patternProperties": {"a": {"type": "string"}},
        "$defs": {"a": {"$anchor": "a", "const": "a"}},
    })
}

/// A conversation with every field that has a text.
fn conversation() -> Value {
    json!({
        "model": "tutor", "user": "a", "safety_identifier": "a", "metadata": {"a": "a"}, "service_tier": "a",
        "prompt_cache_key": "a", "prompt_cache_retention": "a", "stop": ["a"], "reasoning_effort": "low",
        "stream_options": {"include_usage": true},
        "messages": [
            {"role": "system", "content": "a", "name": "a"},
            {"role": "developer", "content": [{"type": "text", "text": "a"}]},
            {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], "name": "a"},
            {"role": "assistant", "content": "a", "reasoning_content": "a", "refusal": "a", "id": "a", "tool_calls": [
                {"id": "call_1", "type": "function", "function": {"name": "mail", "arguments": "{\"to\": \"a\"}"}},
            ]},
            {"role": "tool", "content": "a", "tool_call_id": "call_1", "name": "mail"},
            {"role": "user", "content": "a"},
        ],
        "tools": [{"type": "function", "function": {
            "name": "mail", "description": "a", "parameters": schema(), "strict": true,
        }}],
        "tool_choice": {"type": "function", "function": {"name": "mail"}},
        "response_format": {"type": "json_schema", "json_schema": {
            "name": "a", "description": "a", "schema": schema(), "strict": true,
        }},
    })
}

fn ollama() -> Value {
    json!({
        "model": "tutor", "stream": false, "keep_alive": "5m", "format": schema(), "options": {"stop": ["a"]},
        "messages": [
            {"role": "system", "content": "a"},
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": "a", "thinking": "a", "tool_calls": [
                {"id": "call_1", "function": {"name": "mail", "arguments": {"to": "a"}}},
            ]},
            {"role": "tool", "content": "a", "tool_name": "mail"},
            {"role": "user", "content": "a"},
        ],
        "tools": [{"type": "function", "function": {"name": "mail", "description": "a", "parameters": schema()}}],
    })
}

fn served(away: &Away) -> Result<Running> {
    let port = away.port;
    let text = format!(
        "[handlers.openai]\nkind = \"openai\"\nbase_url = \"http://0.0.0.0:{port}/v1\"\nmodel = \"m\"\n\
         [handlers.anthropic]\nkind = \"anthropic\"\nbase_url = \"http://0.0.0.0:{port}/v1\"\nmodel = \"m\"\n\
         [routes.tutor]\nhandlers = [\"openai\"]\negress = \"redact\"\n\
         [routes.claude]\nhandlers = [\"anthropic\"]\negress = \"redact\"\n"
    );
    serve(Handlers::new(Config::parse(Path::new("h.toml"), &text)?).served()?.into_iter().collect())
}

fn send(at: SocketAddr, path: &str, body: &Value) -> Result<(u16, String)> {
    let head = format!("POST {path} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json");
    let (status, _, answer) = http(at, &head, &body.to_string())?;
    Ok((status, answer))
}

#[test]
fn what_is_planted_in_any_field_is_nowhere_in_what_a_provider_gets() -> Result<()> {
    let away = Away::new()?;
    let server = served(&away)?;
    let claude = Value::Object(
        conversation()
            .as_object()
            .context("an object")?
            .clone()
            .into_iter()
            .chain([("model".into(), json!("claude"))])
            .collect(),
    );
    let generate = json!({"model": "tutor", "stream": false, "system": "a", "prompt": "a", "format": schema()});
    let mut refused = BTreeSet::new();
    for (path, body) in [
        ("/v1/chat/completions", conversation()),
        ("/v1/chat/completions", claude),
        ("/v1/completions", json!({"model": "tutor", "prompt": "a", "stop": "a", "user": "a"})),
        ("/v1/embeddings", json!({"model": "tutor", "input": ["a"], "user": "a"})),
        ("/api/chat", ollama()),
        ("/api/generate", generate),
        ("/api/embed", json!({"model": "tutor", "input": "a"})),
    ] {
        let (status, answer) = send(server.address, path, &body)?;
        assert_eq!((status, away.take().len()), (200, 1), "{path} as it is: {answer}");
        let mut spots = Vec::new();
        Spot::of(&body, "", &mut spots);
        let mut arrived = 0;
        for spot in &spots {
            for (datum, shows) in PLANTED {
                for planted in spot.planted(&body, datum).with_context(|| format!("{spot:?}"))? {
                    let (status, answer) = send(server.address, path, &planted)?;
                    let requests = away.take();
                    for request in &requests {
                        assert!(!request.contains(shows), "{path} {spot:?}: {request}");
                    }
                    arrived += requests.len();
                    if answer.contains("redact") {
                        assert!(status == 400 && requests.is_empty(), "{spot:?}: {status} {answer}");
                        assert!(!answer.contains(shows), "{spot:?}: {answer}");
                        let error: Value = serde_json::from_str(&answer)?;
                        refused.extend(error["error"]["param"].as_str().map(str::to_owned));
                    } else {
                        assert!(status == 200 || requests.is_empty(), "{spot:?}: {status} {answer}");
                    }
                }
            }
        }
        assert!(arrived >= spots.len() / 2, "{path}: {arrived} of {} places arrive", spots.len());
    }
    let places = [
        "messages[3].tool_calls[0].function.name",
        "response_format.json_schema.schema",
        "tools[0].function.parameters",
    ];
    assert_eq!(refused.iter().map(String::as_str).collect::<Vec<_>>(), places);
    server.stop();
    server.wait()
}

/// Everywhere at once where something else can stand.
#[test]
fn what_is_replaced_comes_back_whole() -> Result<()> {
    let away = Away::new()?;
    let server = served(&away)?;
    let said = format!("Mail {} or call {}.", PLANTED[0].0, PLANTED[1].0);
    let mut body = conversation();
    for at in [
        "/messages/0/content",
        "/messages/0/name",
        "/messages/1/content/0/text",
        "/messages/2/content/1/text",
        "/messages/3/content",
        "/messages/3/reasoning_content",
        "/messages/4/content",
        "/messages/5/content",
        "/stop/0",
        "/tools/0/function/description",
        "/tools/0/function/parameters/properties/to/default",
        "/tools/0/function/parameters/properties/to/enum/0",
        "/response_format/json_schema/description",
        "/response_format/json_schema/schema/title",
    ] {
        *body.pointer_mut(at).context(at)? = json!(said);
    }
    let arguments = json!({"to": said, PLANTED[0].0: 1}).to_string();
    body["messages"][3]["tool_calls"][0]["function"]["arguments"] = json!(arguments);
    body["messages"][3]["tool_calls"][0]["id"] = json!(PLANTED[0].0);
    body["messages"][4]["tool_call_id"] = json!(PLANTED[0].0);
    for model in ["tutor", "claude"] {
        body["model"] = json!(model);
        let (status, answer) = send(server.address, "/v1/chat/completions", &body)?;
        let requests = away.take();
        assert_eq!((status, requests.len()), (200, 1), "{answer}");
        for (_, shows) in PLANTED {
            assert!(!requests[0].contains(shows), "{}", requests[0]);
        }
        assert!(requests[0].contains("Mail [EMAIL_1] or call [PHONE_1]."), "{}", requests[0]);
        let answer: Value = serde_json::from_str(&answer)?;
        assert_eq!(answer["choices"][0]["message"]["content"], json!(said));
    }
    server.stop();
    server.wait()
}
