//! Streams as providers send them, and the events that they become.

use std::time::Duration;

use super::super::BaseUrl;
use super::*;
use crate::handler::sse::Events;
use crate::handler::{Completion, ToolCall, collect};

fn endpoint() -> Endpoint {
    let [connect_timeout, read_timeout, answer_timeout] = [Duration::from_secs(1); 3];
    Endpoint {
        name: "far".into(),
        base_url: BaseUrl::parse("http://127.0.0.1:1/v1").expect("an address"),
        model: "asked".into(),
        api_key: None,
        connect_timeout,
        read_timeout,
        answer_timeout,
    }
}

fn read(stream: &str) -> Result<Completion, HandlerError> {
    read_as(stream, Wanted { choices: 1, tools: false, logprobs: false })
}

fn read_as(stream: &str, wanted: Wanted) -> Result<Completion, HandlerError> {
    let endpoint = endpoint();
    let events: Vec<_> = Answer::new(&endpoint, wanted, Events::new(stream.as_bytes())).collect();
    collect(Box::new(events.into_iter()))
}

/// What it is, the stream, its text, its reason, its tokens.
type Whole<'a> = (&'a str, &'a str, &'a str, &'a str, Option<(u64, u64)>);

/// `D`: a piece with this delta; `C`: one with this choice; else the whole piece.
fn stream(pieces: &[&str]) -> String {
    let piece = |piece: &&str| match piece.split_at_checked(1).unwrap_or_default() {
        ("D", delta) => {
            format!("data: {{\"choices\":[{{\"index\":0,\"delta\":{delta},\"finish_reason\":null}}]}}\n\n")
        }
        ("C", choice) => format!("data: {{\"choices\":[{choice}]}}\n\n"),
        (":", _) => format!("{piece}\n\n"),
        _ => format!("data: {piece}\n\n"),
    };
    pieces.iter().map(piece).collect()
}

const A: &str = r#"D{"content":"a"}"#;
const STOP: &str = r#"C{"index":0,"delta":{},"finish_reason":"stop"}"#;
const DONE: &str = "[DONE]";

/// Wherever the connection ends, also within a character: an answer is whole once its reason has come, and else it broke off.
#[test]
fn a_stream_that_ends_anywhere_broke_off_or_was_whole() {
    let whole = stream(&[r#"D{"content":"é🦊"}"#, r#"D{"content":"ü"}"#, STOP, DONE]);
    let reason = whole.find("\"stop\"").expect("a reason") + 6;
    let endpoint = endpoint();
    for cut in 0..=whole.len() {
        let wanted = Wanted { choices: 1, tools: false, logprobs: false };
        let events: Vec<_> = Answer::new(&endpoint, wanted, Events::new(&whole.as_bytes()[..cut])).collect();
        match collect(Box::new(events.into_iter())) {
            Ok(answer) => assert!(answer.text() == "é🦊ü" && cut > reason, "cut at {cut}"),
            Err(error) => assert!(error.kind == Kind::Cut && cut <= reason + 4, "cut at {cut}: {error}"),
        }
    }
}

/// Nobody hears of a call without a name, so that nobody else would stop it.
#[test]
fn calls_without_end_are_not_gathered() {
    let nameless = (0..).map(|index: usize| {
        let call = format!("{{\"index\":{index},\"id\":\"c\",\"function\":{{\"arguments\":\"{{}}\"}}}}");
        Ok(format!("{{\"choices\":[{{\"delta\":{{\"tool_calls\":[{call}]}}}}]}}"))
    });
    let long = |field: &str| {
        let text = "x".repeat(1 << 16);
        let call = format!("{{\"index\":0,\"id\":\"c\",\"function\":{{\"{field}\":\"{text}\"}}}}");
        std::iter::repeat_with(move || Ok(format!("{{\"choices\":[{{\"delta\":{{\"tool_calls\":[{call}]}}}}]}}")))
    };
    let (endpoint, wanted) = (endpoint(), Wanted { choices: 1, tools: true, logprobs: false });
    type Pieces = Box<dyn Iterator<Item = io::Result<String>>>;
    let all: [(&str, Pieces); 2] = [("`index`", Box::new(nameless)), ("`arguments`", Box::new(long("arguments")))];
    for (field, pieces) in all {
        let (mut count, mut last) = (0, None);
        for item in Answer::new(&endpoint, wanted, pieces.inspect(|_| count += 1)) {
            last = Some(item);
        }
        let error = last.expect("an item").expect_err("it has no end");
        assert!(error.kind == Kind::Protocol && error.to_string().contains(field) && count < 300, "{count}: {error}");
    }
}

#[test]
fn answers_in_all_dialects_are_whole() {
    let twice = |text: &str| format!("data: {{\"choices\":[{{\"delta\":{{\"content\":\"{text}\"}}}}]}}");
    let glued = format!(
        "{}\n{}\ndata: {{\"choices\":[{{\"delta\":{{}},\"finish_reason\":\"stop\"}}]}}\ndata: [DONE]\n",
        twice("é"),
        twice("ß")
    );
    let cases: &[Whole] = &[
        (
            "OpenAI",
            &stream(&[
                r#"D{"role":"assistant","content":"","refusal":null}"#,
                A,
                STOP,
                r#"{"choices":[],"usage":{"prompt_tokens":3,"completion_tokens":1,"total_tokens":4}}"#,
                DONE,
            ]),
            "a",
            "stop",
            Some((3, 1)),
        ),
        (
            "Azure: filters before, between and after",
            &stream(&[
                r#"{"choices":[],"created":0,"id":"","model":"","object":"","prompt_filter_results":[{"prompt_index":0,"content_filter_results":{"hate":{"filtered":false}}}]}"#,
                A,
                r#"{"id":"","model":"","choices":[{"index":0,"finish_reason":null,"content_filter_results":{},"content_filter_offsets":{"check_offset":44}}],"usage":null}"#,
                A,
                STOP,
                r#"C{"index":0,"delta":null,"finish_reason":null,"content_filter_results":{}}"#,
                DONE,
            ]),
            "aa",
            "stop",
            None,
        ),
        (
            "OpenRouter: comments",
            &stream(&[": OPENROUTER PROCESSING", A, ": OPENROUTER PROCESSING", STOP, DONE]),
            "a",
            "stop",
            None,
        ),
        (
            "LocalAI: a reason that is none",
            &stream(&[
                r#"C{"delta":{"content":"a"},"finish_reason":""}"#,
                r#"C{"delta":{"content":"b"},"finish_reason":"null"}"#,
                STOP,
            ]),
            "ab",
            "stop",
            None,
        ),
        (
            "Gemini: a reason with every piece",
            &stream(&[
                r#"C{"delta":{"content":"a"},"finish_reason":"stop"}"#,
                r#"C{"delta":{"content":"b"},"finish_reason":"stop"}"#,
                r#"C{"delta":{"content":"c"},"finish_reason":"length"}"#,
                DONE,
            ]),
            "abc",
            "length",
            None,
        ),
        (
            "vLLM: the reason with the last text, usage with every piece, empty calls",
            &stream(&[
                r#"{"choices":[{"delta":{"content":"a","tool_calls":[]}}],"usage":{"prompt_tokens":7,"completion_tokens":1}}"#,
                r#"{"choices":[{"delta":{"content":"b"},"finish_reason":"length","stop_reason":null}],"usage":{"prompt_tokens":7,"completion_tokens":2}}"#,
                DONE,
            ]),
            "ab",
            "length",
            Some((7, 2)),
        ),
        (
            "Mistral: content in parts, with thoughts",
            &stream(&[
                r#"D{"content":[{"type":"thinking","thinking":[{"type":"text","text":"hm"}],"text":"hm"},{"type":"text","text":"a"},{"type":"reference","reference_ids":[1]},{"type":"text","text":"b"}]}"#,
                r#"C{"delta":{"content":""},"finish_reason":"model_length"}"#,
            ]),
            "ab",
            "length",
            None,
        ),
        (
            "DeepSeek: thoughts beside",
            &stream(&[
                r#"D{"content":null,"reasoning_content":"hm"}"#,
                r#"D{"content":"a","reasoning_content":null}"#,
                STOP,
            ]),
            "a",
            "stop",
            None,
        ),
        (
            "thoughts that found no end",
            &stream(&[r#"D{"reasoning":"hm"}"#, r#"C{"delta":{},"finish_reason":"length"}"#]),
            "",
            "length",
            None,
        ),
        ("an answer of nothing", &stream(&[r#"D{"role":"assistant","content":null}"#, STOP, DONE]), "", "stop", None),
        (
            "a refusal",
            &stream(&[r#"D{"content":null,"refusal":"I "}"#, r#"D{"content":null,"refusal":"will not"}"#, STOP]),
            "I will not",
            "stop",
            None,
        ),
        (
            "a refusal in parts",
            &stream(&[r#"D{"content":[{"type":"refusal","refusal":"no"}]}"#, STOP]),
            "no",
            "stop",
            None,
        ),
        (
            "a message and no delta",
            &stream(&[r#"C{"index":0,"message":{"role":"assistant","content":"é🦊"},"finish_reason":"stop"}"#, DONE]),
            "é🦊",
            "stop",
            None,
        ),
        (
            "Perplexity: the message so far beside each delta",
            &stream(&[
                r#"C{"delta":{"content":"a"},"message":{"content":"a"}}"#,
                r#"C{"delta":{"content":"b"},"message":{"content":"ab"},"finish_reason":"stop"}"#,
            ]),
            "ab",
            "stop",
            None,
        ),
        (
            "all of it once more at the end",
            &stream(&[A, A, r#"C{"message":{"content":"aa"},"finish_reason":"stop"}"#]),
            "aa",
            "stop",
            None,
        ),
        (
            "Moonshot: usage in the choice",
            &stream(&[A, r#"C{"delta":{},"finish_reason":"stop","usage":{"prompt_tokens":5,"completion_tokens":2}}"#]),
            "a",
            "stop",
            Some((5, 2)),
        ),
        (
            "Groq: usage of its own",
            &stream(&[
                A,
                r#"{"choices":[{"delta":{},"finish_reason":"stop"}],"x_groq":{"id":"r","usage":{"prompt_tokens":5.0,"completion_tokens":2}}}"#,
            ]),
            "a",
            "stop",
            Some((5, 2)),
        ),
        (
            "usage that is not said again",
            &stream(&[
                A,
                STOP,
                r#"{"choices":[],"usage":{"prompt_tokens":5,"completion_tokens":2}}"#,
                r#"{"choices":[],"usage":{"total_tokens":7}}"#,
            ]),
            "a",
            "stop",
            Some((5, 2)),
        ),
        (
            "usage that is none",
            &stream(&[A, STOP, r#"{"choices":[],"usage":{"prompt_tokens":-1,"completion_tokens":"2"}}"#]),
            "a",
            "stop",
            None,
        ),
        (
            "empty pieces",
            &stream(&["", " ", "{}", "null", r#"{"type":"ping"}"#, r#"{"choices":null}"#, A, STOP]),
            "a",
            "stop",
            None,
        ),
        (
            "an error that is none",
            &stream(&[
                r#"{"error":"","choices":[{"delta":{"content":"a"}}]}"#,
                r#"{"error":{},"choices":[{"error":0,"delta":{},"finish_reason":"stop"}]}"#,
            ]),
            "a",
            "stop",
            None,
        ),
        ("no [DONE], and another one", &(stream(&[A, STOP]) + "data: DONE\n\n"), "a", "stop", None),
        ("one line break and not two", &glued, "éß", "stop", None),
        (
            "JSON over several lines",
            "data: {\"choices\":\ndata: [{\"delta\":{\"content\":\"a\"},\ndata: \"finish_reason\":\"stop\"}]}\n\n",
            "a",
            "stop",
            None,
        ),
        (
            "\\r\\n, no space, no last line",
            "data:{\"choices\":[{\"delta\":{\"content\":\"a\"}}]}\r\n\r\nevent: x\r\ndata:{\"choices\":[{\"finish_reason\":\"stop\"}]}",
            "a",
            "stop",
            None,
        ),
        (
            "completions of before chat",
            &stream(&[r#"C{"index":0,"text":"é"}"#, r#"C{"text":"ß","finish_reason":"stop"}"#, DONE]),
            "éß",
            "stop",
            None,
        ),
        (
            "a text beside the delta that says the same",
            &stream(&[
                r#"C{"delta":{"content":"a"},"text":"a"}"#,
                r#"C{"delta":{},"text":"a","finish_reason":"stop"}"#,
            ]),
            "a",
            "stop",
            None,
        ),
        ("content of one part", &stream(&[r#"D{"content":{"type":"text","text":"é"}}"#, STOP]), "é", "stop", None),
        (
            "content of strings",
            &stream(&[r#"D{"content":["a","b",null]}"#, r#"D{"content":[]}"#, STOP]),
            "ab",
            "stop",
            None,
        ),
        (
            "parts whose text has a value",
            &stream(&[r#"D{"content":[{"type":"text","text":{"value":"é","annotations":[]}},{"type":"text"}]}"#, STOP]),
            "é",
            "stop",
            None,
        ),
        ("a delta's text", &stream(&[r#"D{"type":"text_delta","text":"a"}"#, STOP]), "a", "stop", None),
        (
            "other choices",
            &stream(&[
                r#"C{"index":1,"delta":{"content":"x"},"finish_reason":"length"}"#,
                r#"{"choices":[{"index":2,"delta":{"content":"y"}},{"index":0,"delta":{"content":"a"}}]}"#,
                r#"C{"index":"0","delta":{"content":"b"}}"#,
                STOP,
                r#"C{"index":1,"error":"it fell"}"#,
            ]),
            "ab",
            "stop",
            None,
        ),
        ("an unknown reason", &stream(&[A, r#"C{"delta":{},"finish_reason":"weird"}"#]), "a", "weird", None),
    ];
    for (what, bytes, text, reason, tokens) in cases {
        let whole = read(bytes).unwrap_or_else(|error| panic!("{what}: {error}\n{bytes}"));
        let usage = whole.usage.prompt_tokens.zip(whole.usage.completion_tokens);
        assert_eq!((whole.text(), whole.finish().word(), usage), (*text, *reason, *tokens), "{what}: {bytes}");
    }
    for (words, reason) in [
        ("eos eos_token end_turn END_TURN stop_sequence STOP COMPLETE", "stop"),
        ("length max_tokens MAX_TOKENS model_length model_context_window_exceeded", "length"),
        ("content_filter SAFETY RECITATION refusal sensitive", "content_filter"),
    ] {
        for word in words.split(' ') {
            let bytes = stream(&[A, &format!(r#"C{{"delta":{{}},"finish_reason":"{word}"}}"#), DONE]);
            assert_eq!(read(&bytes).expect(word).finish().word(), reason, "{word}");
        }
    }
}

#[test]
fn what_is_no_answer_is_never_taken_for_one() {
    let cut = Kind::Cut;
    let cases: &[(&str, &str, Kind, &str)] = &[
        ("nothing", "", cut.clone(), "connection ended"),
        ("comments alone", ": ping\n\n: ping\n\n", cut.clone(), "connection ended"),
        ("no reason", &stream(&[A]), cut.clone(), "connection ended"),
        (
            "half a piece where every piece has a reason",
            &(stream(&[
                r#"C{"delta":{"content":"a"},"finish_reason":"stop"}"#,
                r#"C{"delta":{"content":"b"},"finish_reason":"stop"}"#,
            ]) + "data: {\"choices\":[{\"del\n\n"),
            Kind::Cut,
            "connection ended",
        ),
        ("no reason but [DONE]", &stream(&[A, DONE]), cut.clone(), "without a finish_reason"),
        (
            "vLLM: aborted, and [DONE] all the same",
            &stream(&[A, r#"C{"delta":{},"finish_reason":"abort"}"#, DONE]),
            cut.clone(),
            "its finish_reason is abort",
        ),
        (
            "Mistral, OpenRouter: error",
            &stream(&[A, r#"C{"delta":{"content":""},"finish_reason":"error"}"#, DONE]),
            cut.clone(),
            "its finish_reason is error",
        ),
        (
            "DeepSeek: out of resources",
            &stream(&[A, r#"C{"delta":{},"finish_reason":"insufficient_system_resource"}"#]),
            cut,
            "insufficient_system_resource",
        ),
        (
            "OpenRouter: in the middle",
            &stream(&[
                A,
                r#"{"id":"g","error":{"code":502,"message":"Worker local total request limit reached"},"choices":[{"index":0,"delta":{"content":""},"finish_reason":"error"}]}"#,
            ]),
            Kind::Unavailable,
            "Worker local",
        ),
        (
            "OpenRouter: without a choice",
            &stream(&[r#"{"choices":[],"error":{"code":429,"message":"slow down"}}"#, DONE]),
            Kind::RateLimited { retry_after: None },
            "slow down",
        ),
        (
            "an error in the choice",
            &stream(&[r#"C{"error":{"code":"server_error","message":"it fell"},"delta":{}}"#, DONE]),
            Kind::Unavailable,
            "it fell",
        ),
        (
            "an error in a word",
            &stream(&[r#"{"error":"the model runner stopped"}"#]),
            Kind::Unavailable,
            "model runner",
        ),
        (
            "vLLM: an error with a status",
            &stream(&[
                r#"{"error":{"message":"This model's maximum context length is 4096 tokens","type":"BadRequestError","param":null,"code":400}}"#,
                DONE,
            ]),
            Kind::ContextLength,
            "4096",
        ),
        (
            "vLLM of before",
            &stream(&[
                r#"{"object":"error","message":"bad grammar","type":"BadRequestError","param":null,"code":400}"#,
                DONE,
            ]),
            Kind::InvalidRequest { param: None },
            "bad grammar",
        ),
        (
            "Anthropic's",
            "event: error\ndata: {\"type\":\"error\",\"error\":{\"type\":\"overloaded_error\",\"message\":\"Overloaded\"}}\n\n",
            Kind::Unavailable,
            "Overloaded",
        ),
        ("a named one", "event: error\ndata: {\"message\":\"out of memory\"}\n\n", Kind::Unavailable, "out of memory"),
        ("FastAPI's", &stream(&[r#"{"detail":"not today"}"#]), Kind::Unavailable, "not today"),
        (
            "Gemini's, in a list",
            &stream(&[r#"[{"error":{"code":429,"message":"quota","status":"RESOURCE_EXHAUSTED"}}]"#]),
            Kind::RateLimited { retry_after: None },
            "quota",
        ),
        (
            "a wrong key",
            &stream(&[r#"{"error":{"message":"no","type":"authentication_error"}}"#]),
            Kind::Authentication,
            "no",
        ),
        (
            "an error after the reason",
            &stream(&[A, STOP, r#"{"error":{"message":"late"}}"#]),
            Kind::Unavailable,
            "late",
        ),
        (
            "all of it thought",
            &stream(&[r#"D{"content":null,"reasoning_content":"42"}"#, STOP, DONE]),
            Kind::Protocol,
            "reasoning",
        ),
        (
            "the call of a tool",
            &stream(&[
                r#"D{"tool_calls":[{"id":"c","type":"function","function":{"name":"f","arguments":""}}]}"#,
                r#"C{"delta":{},"finish_reason":"tool_calls"}"#,
                DONE,
            ]),
            Kind::Protocol,
            "tool",
        ),
        ("content that is a number", &stream(&[r#"D{"content":5}"#, STOP]), Kind::Protocol, "`content`"),
        ("a part that is a number", &stream(&[r#"D{"content":["a",5]}"#, STOP]), Kind::Protocol, "`content`"),
        (
            "a part of no known form",
            &stream(&[r#"D{"content":{"type":"image","url":"x"}}"#, STOP]),
            Kind::Protocol,
            "`content`",
        ),
        ("a text of no known form", &stream(&[r#"C{"text":["a"],"finish_reason":"stop"}"#]), Kind::Protocol, "`text`"),
        ("a delta that is a list", &stream(&[r#"D["a"]"#, STOP]), Kind::Protocol, "`delta`"),
        (
            "a message that is a text",
            &stream(&[r#"C{"message":"a","finish_reason":"stop"}"#]),
            Kind::Protocol,
            "`message`",
        ),
        (
            "thoughts in parts and no more",
            &stream(&[r#"D{"content":[{"type":"thinking","thinking":"42"}]}"#, STOP]),
            Kind::Protocol,
            "reasoning",
        ),
        (
            "another choice alone",
            &stream(&[r#"C{"index":1,"delta":{"content":"a"},"finish_reason":"stop"}"#]),
            Kind::Cut,
            "connection ended",
        ),
        ("the call of a function", &stream(&[r#"D{"function_call":{"name":"f"}}"#]), Kind::Protocol, "tool"),
        (
            "half a piece",
            "data: {\"choices\":[{\"delta\":{\"content\":\"a\"}}]}\n\ndata: {\"choi",
            Kind::Cut,
            "connection ended",
        ),
        (
            "half a piece and another",
            "data: {\"choices\":[{\"delta\":{\"content\":\"a\"\n\ndata: {\"choices\":[]}\n\n",
            Kind::Protocol,
            "not JSON",
        ),
        (
            "half a character of two",
            &stream(&[r#"D{"content":"\ud83e"}"#, r#"D{"content":"\udd8a"}"#, STOP]),
            Kind::Protocol,
            "not JSON",
        ),
    ];
    for (what, bytes, kind, words) in cases {
        let error = read(bytes).expect_err(what);
        assert!(error.kind == *kind && error.to_string().contains(words), "{what}: {error:?}\n{bytes}");
    }
}

/// What it is, the pieces, and the calls that they make: id, name, arguments.
type Called<'a> = (&'a str, &'a [&'a str], &'a [(&'a str, &'a str, &'a str)]);

#[test]
fn calls_in_all_dialects_are_whole() {
    const CALLS: &str = r#"C{"index":0,"delta":{},"finish_reason":"tool_calls"}"#;
    let cases: &[Called<'_>] = &[
        (
            "OpenAI: arguments in pieces, two calls",
            &[
                r#"D{"role":"assistant","content":null}"#,
                r#"D{"tool_calls":[{"index":0,"id":"c1","type":"function","function":{"name":"f","arguments":""}}]}"#,
                r#"D{"tool_calls":[{"index":0,"function":{"arguments":"{\"a\""}}]}"#,
                r#"D{"tool_calls":[{"index":0,"function":{"arguments":":1}"}}]}"#,
                r#"D{"tool_calls":[{"index":1,"id":"c2","type":"function","function":{"name":"g","arguments":"{}"}}]}"#,
                CALLS,
                DONE,
            ],
            &[("c1", "f", r#"{"a":1}"#), ("c2", "g", "{}")],
        ),
        (
            "vLLM: id and name with every piece; the reason is stop",
            &[
                r#"D{"tool_calls":[{"index":0,"id":"c","type":"function","function":{"name":"f","arguments":"{"}}]}"#,
                r#"D{"tool_calls":[{"index":0,"id":"c","type":"function","function":{"name":"f","arguments":"}"}}]}"#,
                STOP,
            ],
            &[("c", "f", "{}")],
        ),
        (
            "Gemini: no numbers, whole calls",
            &[
                r#"D{"tool_calls":[{"id":"a","function":{"name":"f","arguments":"{}"}},{"id":"b","function":{"name":"f","arguments":"{}"}}]}"#,
                CALLS,
            ],
            &[("a", "f", "{}"), ("b", "f", "{}")],
        ),
        (
            "a name that comes late, and arguments that are an object",
            &[
                r#"D{"tool_calls":[{"index":3,"id":"c","function":{}}]}"#,
                r#"D{"tool_calls":[{"index":3,"function":{"name":"f","arguments":{"a":1}}}]}"#,
                CALLS,
            ],
            &[("c", "f", r#"{"a":1}"#)],
        ),
        (
            "a message, and no delta",
            &[
                r#"C{"message":{"content":null,"tool_calls":[{"id":"c","type":"function","function":{"name":"f","arguments":"{}"}}]},"finish_reason":"tool_calls"}"#,
            ],
            &[("c", "f", "{}")],
        ),
    ];
    for (what, pieces, want) in cases {
        let wanted = Wanted { choices: 1, tools: true, logprobs: false };
        let whole = read_as(&stream(pieces), wanted).unwrap_or_else(|error| panic!("{what}: {error}"));
        let call = |(id, name, arguments): &(&str, &str, &str)| ToolCall {
            id: (*id).into(),
            name: (*name).into(),
            arguments: (*arguments).into(),
        };
        let want: Vec<ToolCall> = want.iter().map(call).collect();
        assert_eq!((&whole.choices[0].tool_calls, whole.finish()), (&want, &FinishReason::ToolCalls), "{what}");
    }
}

#[test]
fn choices_thoughts_and_log_probabilities_are_passed_on() {
    let wanted = Wanted { choices: 2, tools: false, logprobs: true };
    let pieces = [
        r#"{"system_fingerprint":"fp_1","choices":[{"index":0,"delta":{"reasoning_content":"hm"}}]}"#,
        r#"C{"index":1,"delta":{"content":"b"},"logprobs":{"content":[{"token":"b","logprob":-0.5,"bytes":[98],"top_logprobs":[{"token":"b","logprob":-0.5,"bytes":null}]}]}}"#,
        r#"C{"index":0,"delta":{"content":"a"},"logprobs":{"content":[{"token":"a","logprob":-1}]}}"#,
        r#"C{"index":1,"delta":{},"finish_reason":"length"}"#,
        STOP,
        DONE,
    ];
    let whole = read_as(&stream(&pieces), wanted).expect("it is whole");
    assert_eq!(whole.start.fingerprint.as_deref(), Some("fp_1"));
    let [first, second] = &whole.choices[..] else { panic!("{whole:?}") };
    assert_eq!((first.text.as_str(), first.reasoning.as_str(), &first.finish), ("a", "hm", &FinishReason::Stop));
    assert_eq!((second.text.as_str(), &second.finish), ("b", &FinishReason::Length));
    assert_eq!((first.logprobs[0].logprob, second.logprobs[0].top[0].logprob), (-1.0, -0.5));
    assert_eq!(second.logprobs[0].bytes.as_deref(), Some(&b"b"[..]));
    let one = read_as(&stream(&[A, STOP, DONE]), wanted).expect_err("one is missing");
    assert!(one.kind == Kind::Protocol && one.to_string().contains("1 of 2 choices"), "{one}");
    let cut = read_as(&stream(&[A, STOP, r#"C{"index":1,"delta":{"content":"b"}}"#]), wanted).expect_err("it is cut");
    assert_eq!(cut.kind, Kind::Cut);
}
