//! The swap: chatbots talk to one name, and a line of TOML says who answers, while they talk. No answer is lost and none is mixed.

use std::collections::HashMap;
use std::sync::Mutex;
use std::sync::atomic::AtomicBool;

use super::*;

/// Fields that a strict endpoint of OpenAI's knows.
const OPENAI_FIELDS: [&str; 6] = ["model", "messages", "max_tokens", "temperature", "stream", "stream_options"];
/// The same of Anthropic's of version 2026-10-21, which refuses a temperature.
const ANTHROPIC_FIELDS: [&str; 5] = ["model", "messages", "max_tokens", "stream", "system"];

/// A provider that refuses what it does not know, and else says who it is and what it heard last.
fn strict(check: fn(&str, &Value) -> Result<String, String>) -> Result<String> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let url = format!("http://{}", listener.local_addr()?);
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let Ok(mut stream) = stream else { return };
            std::thread::spawn(move || {
                let request = read_request(&stream).unwrap_or_default();
                let (head, body) = request.split_once("\r\n\r\n").unwrap_or_default();
                let body: Value = serde_json::from_str(body).unwrap_or_default();
                let reply = match check(&head.to_ascii_lowercase(), &body) {
                    Ok(frames) => stream_of(&frames),
                    Err(why) => {
                        let error =
                            json!({"type": "error", "error": {"type": "invalid_request_error", "message": why}});
                        refusal(400, "connection: close\r\n", &error)
                    }
                };
                // Slowly, so that many are under way when the file changes.
                for piece in reply.as_bytes().chunks(200) {
                    let _ = stream.write_all(piece);
                    std::thread::sleep(Duration::from_millis(2));
                }
            });
        }
    });
    Ok(url)
}

/// The last message, if the body has known fields alone and its messages are texts by turns.
fn heard<'b>(body: &'b Value, fields: &[&str]) -> Result<&'b str, String> {
    let unknown = body.as_object().ok_or("no object")?.keys().find(|key| !fields.contains(&key.as_str()));
    if let Some(unknown) = unknown {
        return Err(format!("{unknown}: extra inputs are not permitted"));
    }
    let messages = body["messages"].as_array().ok_or("no messages")?;
    let turns = messages.iter().filter(|message| message["role"] != "system").enumerate();
    for (nth, message) in turns {
        let role = if nth % 2 == 0 { "user" } else { "assistant" };
        let keys: Vec<&String> = message.as_object().ok_or("no message")?.keys().collect();
        if message["role"] != role || keys != ["role", "content"] && keys != ["content", "role"] {
            return Err(format!("message {nth} is not one of the {role}"));
        }
    }
    text_of(&messages.last().ok_or("no message")?["content"]).ok_or_else(|| "no text".to_owned())
}

fn text_of(content: &Value) -> Option<&str> {
    content.as_str().or_else(|| content[0]["text"].as_str())
}

fn openai(head: &str, body: &Value) -> Result<String, String> {
    if !head.starts_with("post /v1/chat/completions ") || !head.contains("authorization: bearer sk-swap") {
        return Err(format!("{head}: not found, or no key"));
    }
    let last = heard(body, &OPENAI_FIELDS)?;
    let piece = |delta: Value, reason: Option<&str>| {
        let choice = json!({"index": 0, "delta": delta, "finish_reason": reason});
        format!(
            "data: {}\n\n",
            json!({"id": "x", "object": "chat.completion.chunk", "model": "gpt", "choices": [choice]})
        )
    };
    let words: String =
        format!("openai heard {last}").split_inclusive(' ').map(|word| piece(json!({"content": word}), None)).collect();
    Ok(words + &piece(json!({}), Some("stop")) + "data: [DONE]\n\n")
}

fn anthropic(head: &str, body: &Value) -> Result<String, String> {
    let has_key = head.contains("x-api-key: sk-swap") || head.contains("authorization: bearer sk-swap");
    if !head.starts_with("post /v1/messages ") || !head.contains("anthropic-version: 2026-10-21") || !has_key {
        return Err(format!("{head}: not found, no version or no key"));
    }
    if !body["max_tokens"].is_u64() {
        return Err("max_tokens: field required".to_owned());
    }
    let last = heard(body, &ANTHROPIC_FIELDS)?;
    let event = |value: Value| format!("event: {}\ndata: {value}\n\n", value["type"].as_str().unwrap_or_default());
    let start = json!({"type": "message_start", "message": {"id": "msg_1", "type": "message", "role": "assistant", "model": "claude", "content": [],
        "stop_reason": null, "stop_sequence": null, "usage": {"input_tokens": 3, "output_tokens": 1}}});
    let block = json!({"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}});
    let text = format!("anthropic heard {last}");
    let word = |word: &str| {
        event(json!({"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": word}}))
    };
    let words: String = text.split_inclusive(' ').map(word).collect();
    let end = [
        json!({"type": "content_block_stop", "index": 0}),
        json!({"type": "message_delta", "delta": {"stop_reason": "end_turn", "stop_sequence": null}, "usage": {"output_tokens": 9}}),
        json!({"type": "message_stop"}),
    ];
    Ok(event(start) + &event(block) + &event(json!({"type": "ping"})) + &words + &end.map(event).concat())
}

/// What a chatbot knows: an address and a name. The script is the same whoever answers.
struct Chatbot {
    address: SocketAddr,
    number: usize,
}

/// An answer as a chatbot saw it.
struct Seen {
    messages: Vec<Message>,
    handler: String,
    text: String,
}

impl Chatbot {
    /// Two turns, the second with the first in it; every other conversation is streamed.
    fn talk(&self, nth: usize) -> Result<Vec<Seen>> {
        let (mut messages, mut seen) = (Vec::new(), Vec::new());
        for turn in ["one", "two"] {
            messages.push(Message::new(Role::User, format!("{turn} {} {nth}", self.number)));
            let json: Vec<Value> =
                messages.iter().map(|message| json!({"role": message.role, "content": message.content})).collect();
            let body =
                json!({"model": "tutor", "messages": json, "max_tokens": 6, "temperature": 0, "stream": nth % 2 == 1});
            let (status, headers, body) = post(self.address, &body)?;
            anyhow::ensure!(status == 200, "{status}: {body}");
            let header = headers.lines().find_map(|line| line.strip_prefix("x-homeroom-handler: ")).map(str::to_owned);
            let (handler, text) = if nth % 2 == 1 {
                anyhow::ensure!(body.trim_end().ends_with("data: [DONE]"), "cut: {body}");
                let datas = body.lines().filter_map(|line| line.strip_prefix("data: {"));
                let chunks =
                    datas.map(|data| serde_json::from_str(&format!("{{{data}"))).collect::<Result<Vec<Value>, _>>()?;
                let named = chunks.iter().find_map(|chunk| chunk["x-homeroom-handler"].as_str()).map(str::to_owned);
                let text = chunks.iter().filter_map(|chunk| chunk["choices"][0]["delta"]["content"].as_str()).collect();
                (header.or(named), text)
            } else {
                let whole: Value = serde_json::from_str(&body)?;
                (header, whole["choices"][0]["message"]["content"].as_str().context("a text")?.to_owned())
            };
            seen.push(Seen {
                messages: messages.clone(),
                handler: handler.context("who answered")?,
                text: text.clone(),
            });
            messages.push(Message::new(Role::Assistant, text));
        }
        Ok(seen)
    }
}

#[test]
fn one_line_of_toml_swaps_who_answers_and_no_conversation_is_lost_or_mixed() -> Result<()> {
    const CHATBOTS: usize = 6;
    let there = serve(Models::from([("llama".into(), local()?)]))?;
    let directory = tempfile::tempdir()?;
    let config = directory.path().join("handlers.toml");
    let key = "api_key = { env = \"HOMEROOM_TEST_SWAP_KEY\" }";
    let handlers = format!(
        "[handlers.here]\nkind = \"local\"\nmodel = {:?}\n[handlers.there]\nkind = \"openai\"\nbase_url = {:?}\nmodel = \"llama\"\n\
         [handlers.gpt]\nkind = \"openai\"\nbase_url = \"{}/v1\"\nmodel = \"gpt\"\n{key}\n\
         [handlers.claude]\nkind = \"anthropic\"\nbase_url = \"{}/v1\"\nmodel = \"claude\"\napi_version = \"2026-10-21\"\nunsupported = \"drop\"\n{key}\n",
        fixture("models/llama"),
        there.url(),
        strict(openai)?,
        strict(anthropic)?,
    );
    let route = |name: &str| format!("{handlers}[routes.tutor]\nhandlers = [{name:?}]\n");
    std::fs::write(&config, route("here"))?;
    let mut command = homeroom();
    command.args(["serve", "--port", "0", "--config"]).arg(&config).env("HOMEROOM_TEST_SWAP_KEY", "sk-swap-0123456789");
    let mut served = super::program::Served(command.stderr(Stdio::piped()).spawn()?);
    let lines = BufReader::new(served.0.stderr.take().context("a pipe")?).lines();
    // All of it is read as it comes, so that the pipe never fills.
    let (sender, story) = std::sync::mpsc::channel();
    std::thread::spawn(move || lines.map_while(Result::ok).try_for_each(|line| sender.send(line)));
    let until = |words: &str| -> Result<String> {
        loop {
            let line =
                story.recv_timeout(Duration::from_secs(60)).with_context(|| format!("no line begins with {words}"))?;
            if line.starts_with(words) {
                return Ok(line);
            }
        }
    };
    let url = until("serving")?;
    let address: SocketAddr = url
        .split_whitespace()
        .nth(1)
        .and_then(|url| url.strip_prefix("http://")?.strip_suffix("/v1"))
        .context("an address")?
        .parse()?;

    let over = AtomicBool::new(false);
    let all: Mutex<Vec<Seen>> = Mutex::default();
    let answered = |name: &str| all.lock().expect("no panic").iter().filter(|seen| seen.handler == name).count();
    std::thread::scope(|scope| -> Result<()> {
        let (over, all) = (&over, &all);
        let chatbots: Vec<_> = (0..CHATBOTS)
            .map(|number| {
                scope.spawn(move || -> Result<usize> {
                    let chatbot = Chatbot { address, number };
                    let mut nth = 0;
                    while !over.load(Ordering::SeqCst) {
                        let seen =
                            chatbot.talk(nth).with_context(|| format!("chatbot {number}, conversation {nth}"))?;
                        all.lock().expect("no panic").extend(seen);
                        nth += 1;
                    }
                    Ok(nth)
                })
            })
            .collect();
        let swap = || -> Result<()> {
            for (nth, name) in ["here", "there", "gpt", "claude", "here"].into_iter().enumerate() {
                let before = answered(name);
                if nth > 0 {
                    std::fs::write(&config, route(name))?;
                    until("reload")?;
                }
                let deadline = Instant::now() + Duration::from_secs(60);
                while answered(name) < before + 3 * CHATBOTS
                    && Instant::now() < deadline
                    && chatbots.iter().all(|c| !c.is_finished())
                {
                    std::thread::sleep(Duration::from_millis(20));
                }
            }
            Ok(())
        };
        let swapped = swap();
        over.store(true, Ordering::SeqCst);
        for chatbot in chatbots {
            assert!(chatbot.join().expect("no panic")? > 0);
        }
        swapped
    })?;

    let reference = local()?;
    let mut known: HashMap<String, String> = HashMap::new();
    let mut counts: BTreeMap<String, usize> = BTreeMap::new();
    for Seen { messages, handler, text } in all.into_inner().expect("no panic") {
        *counts.entry(handler.clone()).or_default() += 1;
        let last = &messages.last().context("a message")?.content;
        let want = match handler.as_str() {
            "gpt" => format!("openai heard {last}"),
            "claude" => format!("anthropic heard {last}"),
            _ => match known.get(&format!("{messages:?}")) {
                Some(text) => text.clone(),
                None => {
                    let request = Request {
                        messages: messages.clone(),
                        max_tokens: Some(6),
                        temperature: Some(0.0),
                        ..Request::default()
                    };
                    let text = reference.complete(&request, &Context::default())?.text().to_owned();
                    known.insert(format!("{messages:?}"), text.clone());
                    text
                }
            },
        };
        assert_eq!(text, want, "{handler} to {messages:?}");
    }
    assert!(["here", "there", "gpt", "claude"].iter().all(|name| counts[*name] >= 3 * CHATBOTS), "{counts:?}");
    there.stop();
    there.wait()
}
