use std::io::Write as _;
use std::path::Path;

use anyhow::Result;
use serde_json::{Value as Json, json};
use tempfile::NamedTempFile;

use super::dataset::load_examples;
use super::problem::{spans, thousands};
use super::*;
use crate::text::template::ChatTemplate;
use crate::text::tokenizer::Tokenizer;

const CHATML: &str = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}";

/// Byte-level BPE of 320 pieces; BOS is `<|im_start|>` but is not added, EOS is `<|im_end|>`.
fn tokenizer() -> Tokenizer {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures/models/llama");
    Tokenizer::from_dir(&dir).unwrap()
}

fn chatml() -> ChatTemplate {
    ChatTemplate::new(CHATML, None, None).unwrap()
}

fn file(bytes: impl AsRef<[u8]>) -> NamedTempFile {
    let mut file = NamedTempFile::new().unwrap();
    file.write_all(bytes.as_ref()).unwrap();
    file
}

fn sources(path: &Path) -> Vec<Source> {
    vec![Source::file(path)]
}

fn plainly() -> Reading {
    Reading::default()
}

fn check_demonstrations(path: &Path) -> Result<()> {
    check_rows(&sources(path), &plainly(), RowKind::Demonstration, "sft")
}

fn load(bytes: impl AsRef<[u8]>, template: Option<&ChatTemplate>) -> Result<Dataset> {
    load_within(bytes, template, 4096, OnLongRow::Refuse)
}

fn load_within(
    bytes: impl AsRef<[u8]>,
    template: Option<&ChatTemplate>,
    max_seq_len: usize,
    on_long_row: OnLongRow,
) -> Result<Dataset> {
    let tokenizer = &tokenizer();
    let encoder = Encoder { tokenizer, template, embeddings: tokenizer.vocab_size(), max_seq_len, on_long_row };
    load_examples(&sources(file(bytes).path()), &plainly(), encoder)
}

/// The message for a file of these bytes, without its path.
fn refusal(bytes: impl AsRef<[u8]>) -> String {
    let message = format!("{:#}", load(bytes, Some(&chatml())).unwrap_err());
    message[message.find(": ").unwrap() + 2..].to_owned()
}

fn texts(example: &Example) -> (String, String) {
    let tokenizer = tokenizer();
    let trained = example.ids.iter().zip(&example.trained).filter(|t| *t.1);
    let trained: Vec<u32> = trained.map(|t| *t.0).collect();
    let decode = |ids: &[u32]| tokenizer.decode(ids, false).unwrap();
    (decode(&example.ids), decode(&trained))
}

const HI: &str = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nyo<|im_end|>\n";

#[test]
fn a_conversation_learns_the_assistants_turns() {
    let row = json!({"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "yo"}], "id": 3});
    let data = load(format!("\n{row}\n"), Some(&chatml())).unwrap();
    assert_eq!(data.format, RowFormat::Messages);
    assert_eq!(data.examples.len(), 1);
    assert_eq!(data.examples[0].line(), 2);
    assert_eq!(texts(&data.examples[0]), (HI.into(), "yo<|im_end|>\n".into()));
}

#[test]
fn prompt_and_completion_are_a_conversation_where_there_is_a_template() {
    let message = |role: &str, text: &str| json!({"role": role, "content": text});
    let rows = [
        json!({"prompt": "Hi", "completion": "yo"}),
        json!({"prompt": [message("user", "Hi")], "completion": [message("assistant", "yo")]}),
        json!({"prompt": "Hi", "completion": "yo", "system": "S"}),
        json!({"prompt": [message("user", "a"), message("assistant", "b"), message("user", "c")], "completion": [message("assistant", "d")]}),
    ];
    let bytes: String = rows.iter().map(|r| format!("{r}\n")).collect();
    let data = load(bytes, Some(&chatml())).unwrap();
    assert_eq!(data.format, RowFormat::PromptCompletion);
    let texts: Vec<_> = data.examples.iter().map(texts).collect();
    assert_eq!(texts[0], (HI.into(), "yo<|im_end|>\n".into()));
    assert_eq!(texts[1], texts[0]);
    assert_eq!(texts[2].0, format!("<|im_start|>system\nS<|im_end|>\n{HI}"));
    assert_eq!(texts[3].1, "d<|im_end|>\n");
}

/// What a row's keys say is used, whichever form the row has.
#[test]
fn tools_and_system_are_used_in_every_form_of_a_conversation() {
    let source = format!("{{% if tools %}}<{{{{ tools[0].function.name }}}}>{{% endif %}}{CHATML}");
    let template = ChatTemplate::new(&source, None, None).unwrap();
    let message = |role: &str, text: &str| json!({"role": role, "content": text});
    let tools = json!([{"type": "function", "function": {"name": "wétter"}}]);
    let rows = [
        json!({"prompt": "Hi", "completion": "yo", "tools": tools, "system": "S"}),
        json!({"prompt": "Hi", "completion": "yo", "tools": tools.to_string(), "system": "S", "id": 7, "source": "x"}),
        json!({"prompt": [message("user", "Hi")], "completion": [message("assistant", "yo")], "tools": tools, "system": "S"}),
    ];
    let all: String = rows.iter().map(|row| format!("{row}\n")).collect();
    let mut data = load(all, Some(&template)).unwrap().examples;
    let talk = [message("user", "Hi"), message("assistant", "yo")];
    let with_system = [&[message("system", "S")], &talk[..]].concat();
    let rows = [
        json!({"messages": talk, "tools": tools, "system": "S"}),
        json!({"messages": with_system, "tools": tools, "functions": [], "system_prompt": "S"}),
        json!({"messages": with_system, "tools": tools, "system": "S"}),
    ];
    let all: String = rows.iter().map(|row| format!("{row}\n")).collect();
    data.extend(load(all, Some(&template)).unwrap().examples);
    let expected = format!("<wétter><|im_start|>system\nS<|im_end|>\n{HI}");
    for example in &data {
        assert_eq!(texts(example), (expected.clone(), "yo<|im_end|>\n".into()));
    }
    assert_eq!(data.len(), 6);
    let empty = load(json!({"messages": talk, "system": ""}).to_string(), Some(&template)).unwrap();
    assert_eq!(texts(&empty.examples[0]).0, HI, "an empty one is none");
}

#[test]
fn what_would_be_lost_of_a_conversation_is_refused() {
    let check = |row: Json, expected: &str| {
        let told = check_row(&row.to_string()).unwrap_err().to_string();
        assert!(told.starts_with(expected), "{row}: {told}");
    };
    let talk = json!([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]);
    let other = json!([{"role": "developer", "content": "T"}, {"role": "assistant", "content": "b"}]);
    let twice = "`system` stands beside a system message that says something else; keep one";
    check(json!({"messages": other, "system": "S"}), twice);
    check(json!({"prompt": other, "completion": [talk[1]], "system": "S"}), twice);
    check(json!({"messages": talk, "system": 3}), "system: a number is not a string");
    let functions = "`functions` is not read: rename it to `tools`";
    check(json!({"messages": talk, "functions": [{"name": "f"}]}), functions);
    check(json!({"prompt": "a", "completion": "b", "functions": [{"name": "f"}]}), functions);
    check(json!({"prompt": [talk[0]], "completion": [talk[1]], "functions": [{"name": "f"}]}), functions);
    check(json!({"messages": talk, "system_prompt": "S"}), "`system_prompt` is not read: rename it to `system`");
    let variables = |variables: Json| json!({"messages": talk, "chat_template_kwargs": variables});
    check(variables(json!([false])), "chat_template_kwargs: a list is not an object");
    check(variables(json!({"tools": []})), "chat_template_kwargs: `tools` is given to the chat template by the row");
    check(json!({"prompt": "a", "completion": "b", "input": "é"}), "`input` is not read: put it into `prompt`");
    check(json!({"prompt": "a", "completion": "b", "reasoning": "é"}), "`reasoning` is not read: write the row as");
    let call = json!([talk[0], {"role": "assistant", "content": "b", "function_call": {"name": "f"}}]);
    check(json!({"messages": call}), "message 2: `function_call` is not read: write it as `tool_calls`");
    for row in [
        json!({"prompt": "a", "completion": "b", "input": "", "history": [], "metadata": {"a": 1}}),
        json!({"messages": talk, "input": "a", "functions": null}),
        json!({"text": "a", "system": "S", "input": "b"}),
    ] {
        check_row(&row.to_string()).unwrap();
    }
}

/// The piece that spells " the" begins in the prompt, so it is not learned: nobody is asked to write half of it.
#[test]
fn a_raw_completion_is_learned_from_its_first_whole_token() {
    let load = |prompt: &str, completion: &str| {
        let row = json!({"prompt": prompt, "completion": completion});
        load(row.to_string(), None)
    };
    let data = load("2 + 2 =", " 4.").unwrap();
    let expected = ("2 + 2 = 4.<|im_end|>", " 4.<|im_end|>");
    let (all, learned) = texts(&data.examples[0]);
    assert_eq!((&*all, &*learned), expected);

    let data = load("say ", "then").unwrap();
    let (all, learned) = texts(&data.examples[0]);
    assert_eq!((&*all, &*learned), ("say then<|im_end|>", "n<|im_end|>"));

    let message = load("say ", "the").unwrap_err().to_string();
    assert!(message.contains("line 1: nothing to train on: the completion begins inside"), "{message}");
}

#[test]
fn text_is_learned_but_for_its_first_token_and_ends() {
    let data = load("{\"text\": \"Hi <|im_start|>\"}\n", None).unwrap();
    assert_eq!(data.format, RowFormat::Text);
    let example = &data.examples[0];
    let mut expected = tokenizer().encode("Hi <|im_start|>", true).unwrap().ids;
    expected.extend(tokenizer().eos_id);
    assert_eq!(example.ids, expected);
    assert!(example.ids.contains(&tokenizer().bos_id.unwrap()));
    assert!(!example.trained[0] && example.trained[1..].iter().all(|&t| t));
}

/// Byte-level BPE that adds `<|endoftext|>` as BOS, and one of its own kind that also adds EOS.
fn tokenizers_that_add() -> [Tokenizer; 2] {
    let from = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures/models/llama");
    [false, true].map(|add_eos| {
        let dir = tempfile::tempdir().unwrap();
        std::fs::copy(from.join("tokenizer.json"), dir.path().join("tokenizer.json")).unwrap();
        let config = json!({
            "bos_token": "<|endoftext|>", "eos_token": "<|im_end|>", "add_bos_token": true, "add_eos_token": add_eos,
        });
        std::fs::write(dir.path().join("tokenizer_config.json"), config.to_string()).unwrap();
        let tokenizer = Tokenizer::from_dir(dir.path()).unwrap();
        assert!(tokenizer.add_bos);
        tokenizer
    })
}

/// Public sets hold texts that were rendered before: each with a BOS, an EOS or both.
#[test]
fn a_bos_or_eos_that_a_text_has_is_not_doubled() {
    for tokenizer in tokenizers_that_add() {
        let encoder = Encoder {
            tokenizer: &tokenizer,
            template: None,
            embeddings: tokenizer.vocab_size(),
            max_seq_len: 64,
            on_long_row: OnLongRow::Refuse,
        };
        let example = |row: Json| {
            let row = check_row(&row.to_string()).unwrap();
            let (examples, _) = encoder.examples(1, &row).unwrap().unwrap();
            let example = examples.into_iter().next().unwrap();
            let learned: Vec<u32> = example.ids.iter().zip(&example.trained).filter(|t| *t.1).map(|t| *t.0).collect();
            [&example.ids[..], &learned].map(|ids| tokenizer.decode(ids, false).unwrap())
        };
        let (bos, eos) = ("<|endoftext|>", "<|im_end|>");
        for (text, expected) in [
            ("on né".to_owned(), format!("{bos}on né{eos}")),
            (format!("{bos}on né"), format!("{bos}on né{eos}")),
            (format!("on né{eos}"), format!("{bos}on né{eos}")),
            (format!("{bos}on né{eos}"), format!("{bos}on né{eos}")),
            (format!("{bos}a{eos}\n{bos}b{eos}\n"), format!("{bos}a{eos}\n{bos}b{eos}\n")),
            (format!("{bos}{bos}x"), format!("{bos}{bos}x{eos}")),
            (format!("{eos}x"), format!("{bos}{eos}x{eos}")),
        ] {
            assert_eq!(
                example(json!({"text": text})),
                [expected.clone(), expected[bos.len()..].to_owned()],
                "{text:?}"
            );
        }
        let raw = |prompt: &str, completion: &str| example(json!({"prompt": prompt, "completion": completion}));
        assert_eq!(raw(&format!("{bos}on"), &format!(" né{eos}")), [format!("{bos}on né{eos}"), format!(" né{eos}")]);
        assert_eq!(raw(&format!("on{eos}"), "\n\n"), [format!("{bos}on{eos}\n\n{eos}"), format!("\n\n{eos}")]);
    }
}

/// The template's own BOS is the only one, whatever the tokenizer adds, and so is its end of a turn.
#[test]
fn a_bos_or_eos_typed_around_prompt_and_completion_is_the_templates() {
    let source = format!("{{{{ bos_token }}}}{CHATML}");
    let template = ChatTemplate::new(&source, Some("<|endoftext|>"), Some("<|im_end|>")).unwrap();
    for tokenizer in tokenizers_that_add() {
        let encoder = Encoder {
            tokenizer: &tokenizer,
            template: Some(&template),
            embeddings: tokenizer.vocab_size(),
            max_seq_len: 64,
            on_long_row: OnLongRow::Refuse,
        };
        let ids = |prompt: &str, completion: &str| {
            let row = check_row(&json!({"prompt": prompt, "completion": completion}).to_string()).unwrap();
            encoder.examples(1, &row).map(|examples| examples.unwrap().0[0].ids.clone())
        };
        let plain = ids("Hi", "yo").unwrap();
        let expected = format!("<|endoftext|>{HI}");
        assert_eq!(plain, tokenizer.encode(&expected, false).unwrap().ids);
        assert_eq!(ids("<|endoftext|>Hi", "yo<|im_end|>").unwrap(), plain);
        assert_eq!(ids("Hi", "yo<|im_end|>\n").unwrap(), plain);
        assert_ne!(ids("Hi", "<|im_end|>yo").unwrap(), plain);
        let message = ids("Hi", "<|im_end|>").unwrap_err().to_string();
        assert!(message.starts_with("nothing to train on: `completion`"), "{message}");
    }
}

/// What ends answers in other models is no end here, and a text in the middle never is.
#[test]
fn a_completion_loses_only_the_end_of_its_tokenizer_or_template() {
    let tokenizer = &tokenizer();
    let end_of = |text: &str| tokenizer.eos_ids.contains(&tokenizer.id(text).unwrap());
    assert!(end_of("<|endoftext|>") && tokenizer.eos_token.as_deref() == Some("<|im_end|>"), "both end answers");
    let template = chatml();
    let embeddings = tokenizer.vocab_size();
    let encoder =
        Encoder { tokenizer, template: Some(&template), embeddings, max_seq_len: 256, on_long_row: OnLongRow::Refuse };
    let ids = |row: Json| {
        let row = check_row(&row.to_string()).unwrap();
        encoder.examples(1, &row).unwrap().unwrap().0[0].ids.clone()
    };
    let strings = |prompt: &str, completion: &str| ids(json!({"prompt": prompt, "completion": completion}));
    let messages = |prompt: &str, completion: &str| {
        ids(json!({"messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]}))
    };
    for (prompt, completion) in [
        ("<|endoftext|>é", "It is <|endoftext|>"),
        ("a<|im_end|>", "<|im_end|>x"),
        ("<|im_start|>a", "<|im_start|>x<|im_end|> y"),
    ] {
        assert_eq!(strings(prompt, completion), messages(prompt, completion), "{completion:?}");
    }
    assert_eq!(strings("a", "<|endoftext|>x<|im_end|>"), messages("a", "<|endoftext|>x"));
}

#[test]
fn examples_whose_turn_has_no_end_token_are_counted() {
    let row = json!({"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "yo"}]});
    let twice = format!("{row}\n{row}\n");
    let endless = |source: &str| {
        let template = ChatTemplate::new(source, None, None).unwrap();
        let data = load(&twice, Some(&template)).unwrap();
        (data.endless, end_of_turn(&data.examples[1], &tokenizer()))
    };
    let end = tokenizer().id("<|im_end|>");
    assert_eq!(endless(CHATML), (0, end));
    assert_eq!(endless("{% for m in messages %}{{ m.role }}: {{ m.content }}\n\n{% endfor %}"), (2, None));
    // What ends the turn is there, and not trained.
    let outside = "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}<|im_end|>{% endfor %}";
    assert_eq!(endless(outside), (2, None));
    assert_eq!(
        endless(&outside.replace("{{ m.content }}{% endgeneration %}", "{{ m.content }}<|im_end|>{% endgeneration %}")),
        (0, end)
    );
    let text = load("{\"text\": \"a\"}", None).unwrap();
    assert_eq!((text.endless, end_of_turn(&text.examples[0], &tokenizer())), (0, end));
    // Rows that were cut are told as such.
    let long =
        json!({"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "yo ".repeat(40)}]});
    let cut = load_within(long.to_string(), Some(&chatml()), 40, OnLongRow::Truncate).unwrap();
    assert_eq!((cut.truncated, cut.endless), (1, 0));
    assert_eq!(note_endless(0, 5), None);
    assert!(note_endless(2, 1234).unwrap().starts_with("note: 2 of 1,234 examples end without an end token"));
}

/// What ends a turn in the template ends answers; a text goes on to end with what the tokenizer names.
#[test]
fn a_text_ends_with_the_tokenizers_own_end() {
    let dir = tempfile::tempdir().unwrap();
    let fixture = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures/models/llama");
    std::fs::copy(fixture.join("tokenizer.json"), dir.path().join("tokenizer.json")).unwrap();
    std::fs::write(dir.path().join("chat_template.jinja"), CHATML).unwrap();
    let rows = file("{\"text\": \"Hi\"}\n");
    let load = |config: serde_json::Value| {
        std::fs::write(dir.path().join("tokenizer_config.json"), config.to_string()).unwrap();
        let tokenizer = &Tokenizer::from_dir(dir.path()).unwrap();
        assert!(tokenizer.eos_ids.contains(&tokenizer.id("<|im_end|>").unwrap()));
        let embeddings = tokenizer.vocab_size();
        let encoder =
            Encoder { tokenizer, template: None, embeddings, max_seq_len: 64, on_long_row: OnLongRow::Refuse };
        load_examples(&sources(rows.path()), &plainly(), encoder)
    };
    let data = load(json!({"eos_token": "<|endoftext|>"})).unwrap();
    assert_eq!(data.examples[0].ids.last(), tokenizer().id("<|endoftext|>").as_ref());
    let message = load(json!({})).unwrap_err().to_string();
    assert!(message.contains("no EOS token"), "{message}");
}

#[test]
fn the_problems_of_a_file_are_told_together() {
    let long = "ab ".repeat(700);
    let bytes = format!(
        "{}\n{}\n\n{}\n{}\n",
        json!({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}),
        "{\"messages\" [1]}",
        json!({"messages": [{"role": "user", "content": long}, {"role": "assistant", "content": "b"}]}),
        json!({"messages": [{"role": "user", "content": "a"}]}),
    );
    let row = json!([{"role": "user", "content": long}, {"role": "assistant", "content": "b"}]);
    let text = chatml().render(row.as_array().unwrap(), None, false).unwrap();
    let count = thousands(tokenizer().encode(&text, false).unwrap().ids.len());
    assert_eq!(count.len(), 5, "{count} has a thousands separator");
    let template = chatml();
    let file = file(bytes);
    let tokenizer = &tokenizer();
    let (template, embeddings) = (Some(&template), tokenizer.vocab_size());
    let encoder = Encoder { tokenizer, template, embeddings, max_seq_len: 1024, on_long_row: OnLongRow::Refuse };
    let message = load_examples(&sources(file.path()), &plainly(), encoder).unwrap_err().to_string();
    let expected = format!(
        "{}: 3 problems\n  line 2: not JSON: expected `:` at column 13\n  line 4: {count} tokens, the limit is 1,024\n  line 5: nothing to train on: no assistant message\nhint: a JSONL file holds one JSON object a line, each on a single line\nhint: cut long rows with `--on-long-row truncate`, leave them out with `--on-long-row skip`, or allow more with a larger `--max-seq-len`",
        file.path().display()
    );
    assert_eq!(message, expected);
}

#[test]
fn of_many_problems_the_later_ones_are_listed_by_line() {
    let mut bytes = "{\n".repeat(30);
    bytes.push_str(&"{\"messages\": [{\"role\": \"user\", \"content\": \"a\"}]}\n".repeat(5));
    bytes.push_str("{\"text\": \"a\"}\n");
    bytes.push_str("{\"messages\": []}\n");
    let message = refusal(bytes);
    let lines: Vec<&str> = message.lines().collect();
    assert_eq!(lines[0], "37 problems");
    assert!(lines[20].starts_with("  line 20: not JSON"));
    assert_eq!(
        lines[21..24],
        [
            "  not JSON: lines 21-30",
            "  not of the form of the rows before: line 36",
            "  nothing to train on: lines 31-35, 37"
        ]
    );
}

#[test]
fn lines_are_listed_only_so_far() {
    let bytes = "{\n{\"text\": \"a\"}\n".repeat(5000);
    let message = refusal(bytes);
    assert!(message.len() < 4000, "{}", message.len());
    let expected = "  not JSON: lines 41, 43, 45, 47, 49, 51, 53, 55, 57, 59, 61, 63, 65, 67, 69, 71, 73, 75, 77, 79 and 4,960 more\n";
    assert!(message.starts_with("5,000 problems\n") && message.contains(expected), "{message}");
    // Nor is a file that is no text read as rows.
    assert!(refusal(b"\x01\x03\0\0\0\n{\n{\n").starts_with("not text in UTF-8\nhint: "));
}

#[test]
fn byte_order_mark_blank_lines_and_crlf_are_tolerated() {
    let data = load("\u{feff}{\"text\": \"a\"}\r\n  \r\n{\"text\": \"b\"}", None).unwrap();
    let lines: Vec<usize> = data.examples.iter().map(OfLine::line).collect();
    assert_eq!(lines, [1, 3]);
    // sha256sum of the same rows, a line each.
    let plain = load("{\"text\": \"a\"}\n{\"text\": \"b\"}\n", None).unwrap();
    assert_eq!(data.digest, plain.digest);
    assert_eq!(data.digest, "sha256:7081c67ae5b8be37bc95863185de1e243ea3b7cdb98e08df9685ff46d0d2f113");
}

#[test]
fn a_malformed_row_is_told_by_what_is_wrong_with_it() {
    let user = "{\"role\": \"user\", \"content\": \"a\"}";
    let check = |row: &str, expected: &str| {
        let message = refusal(row.replace("USER", user));
        let told = message.lines().nth(1).unwrap().strip_prefix("  line 1: ").unwrap();
        assert_eq!(told, expected, "{row}");
    };
    check(r#"{"mesages": []}"#, "unknown row with `mesages`; `mesages`: did you mean `messages`?");
    check(
        r#"{"prompt": "a", "completon": "b"}"#,
        "unknown row with `prompt`, `completon`; `completon`: did you mean `completion`?",
    );
    check(r#"{"prompt": "a"}"#, "unknown row with `prompt`; `prompt` and `completion` go together");
    check(r#"{"question": "a"}"#, "unknown row with `question`");
    check("3", "not an object but a number");
    check("{}", "an object without keys");
    check(r#"{"messages": "a"}"#, "messages: a string is not a list of messages");
    check(r#"{"messages": []}"#, "nothing to train on: `messages` is empty");
    check(r#"{"messages": [USER, 3]}"#, "message 2: a number is not an object");
    check(r#"{"messages": [{"content": "a"}]}"#, "message 1: no `role`");
    check(
        r#"{"messages": [{"rol": "user", "content": "a"}]}"#,
        "message 1: no `role`, but `rol`: did you mean `role`?",
    );
    check(
        r#"{"messages": [{"role": "asistant", "content": "a"}]}"#,
        "message 1: unknown role `asistant`, did you mean `assistant`?",
    );
    check(
        r#"{"messages": [{"role": "gpt", "content": "a"}]}"#,
        "message 1: unknown role `gpt`, the roles are system, developer, user, assistant, tool",
    );
    check(
        r#"{"messages": [{"role": "user", "contents": "a"}]}"#,
        "message 1: no `content`, but `contents`: did you mean `content`?",
    );
    check(r#"{"messages": [{"role": "user", "content": null}]}"#, "message 1: content: null is not a string");
    check(
        r#"{"messages": [USER, {"role": "assistant", "content": " "}]}"#,
        "nothing to train on: message 2 (assistant) has empty content and no tool_calls",
    );
    check(
        r#"{"messages": [USER, {"role": "assistant", "content": "a", "weight": 2}]}"#,
        "message 2: weight: 2 is neither 0 nor 1",
    );
    check(
        r#"{"messages": [USER, {"role": "assistant", "content": "a", "weight": 0}]}"#,
        "nothing to train on: every assistant message has weight 0",
    );
    check(
        r#"{"messages": [USER, {"role": "assistant", "tool_calls": {}}]}"#,
        "message 2: tool_calls: an object is not a list",
    );
    check(r#"{"messages": [USER], "tools": 3}"#, "tools: a number is not a list");
    check(r#"{"messages": [USER], "tools": "{}"}"#, "tools: a string of an object, not of a list");
    check(
        r#"{"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}"#,
        "message 1: content: part 1 is `image_url`, only text is learned",
    );
    check(
        r#"{"prompt": "a", "completion": ["b"]}"#,
        "`prompt` is a string and `completion` is a list; both must be strings or both lists of messages",
    );
    check(r#"{"prompt": "a", "completion": ""}"#, "nothing to train on: `completion` is empty");
    check(r#"{"text": 3}"#, "text: a number is not a string");
}

#[test]
fn rows_of_another_shape_than_the_first_are_refused() {
    let message = refusal("{\"text\": \"a\"}\n{\"prompt\": \"a\", \"completion\": \"b\"}\n");
    let hint = "hint: all rows of a file have one form: write them alike, or as files of their own\nhint: `--on-bad-row skip` leaves them out";
    let first = "line 2: has `prompt` and `completion`, while the rows before have `text`";
    assert_eq!(message, format!("1 problem\n  {first}\n{hint}"));
    let other = "{\"prompt\": \"a\", \"completion\": \"b\"}\n".repeat(30);
    let message = refusal(format!("{{\"text\": \"a\"}}\n{other}{{\"text\": 3}}\n"));
    let rest = "line 32: text: a number is not a string\n  not of the form of the rows before: lines 3-31";
    assert_eq!(message, format!("31 problems\n  {first}\n  {rest}\n{hint}"), "the wrong row is seen");
}

#[test]
fn files_that_hold_no_rows_are_refused() {
    assert_eq!(refusal("\n\n"), "no rows");
    assert_eq!(refusal("[]"), "no rows");
    assert_eq!(refusal(b"{\"text\": \"\xff\"}"), "1 problem\n  line 1: not UTF-8: byte 11 of the line");
    assert!(check_demonstrations(Path::new("no/such.jsonl")).unwrap_err().to_string().contains("no/such.jsonl"));
}

#[test]
fn conversations_need_a_chat_template() {
    let row = json!({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]});
    let message = load(row.to_string(), None).unwrap_err().to_string();
    assert!(
        message.contains(
            "line 1: `messages` need a chat template, and the model has none\nhint: choose an instruction-tuned model"
        ),
        "{message}"
    );
    let row = json!({"prompt": "a", "completion": "b", "system": "c"});
    let message = load(row.to_string(), None).unwrap_err().to_string();
    assert!(message.contains("line 1: `system` needs a chat template"), "{message}");
    let row = json!({"prompt": "a", "completion": "b", "tools": [{"type": "function"}]});
    let message = load(row.to_string(), None).unwrap_err().to_string();
    assert!(message.contains("line 1: `tools` need a chat template"), "{message}");
}

#[test]
fn what_the_template_refuses_is_told_by_line() {
    let source = "{% if messages[0].role == 'system' %}\n{{ raise_exception('no system role') }}\n{% endif %}";
    let template = ChatTemplate::new(source, None, None).unwrap();
    let row =
        |text: &str| json!({"messages": [{"role": "system", "content": text}, {"role": "assistant", "content": "b"}]});
    let message = load(format!("{}\n{}\n", row("a"), row("ä")), Some(&template)).unwrap_err().to_string();
    let expected = "all 2 rows: the chat template knows no system message; put what it says into the first message of the user: chat template, line 2: no system role";
    assert!(message.ends_with(expected), "{message}");
}

/// What the model would not see is not learned as if it had.
#[test]
fn what_a_template_leaves_out_is_told_once() {
    let row = |key: &str, text: &str| {
        let messages = json!([{"role": "user", "content": text}, {"role": "assistant", "content": "b"}]);
        json!({"messages": messages, key: [{"title": "t", "text": "u"}]})
    };
    let file =
        format!("{}\n{}\n{}\n{}\n", row("tools", "a"), row("documents", "a"), row("tools", "ä"), row("names", "b"));
    let message = load(file, Some(&chatml())).unwrap_err().to_string();
    let lines: Vec<&str> = message.lines().skip(1).collect();
    assert!(
        lines[0].starts_with("  line 1: the chat template writes no `tools`, so the model would not see them; "),
        "{message}"
    );
    assert!(
        lines[1].starts_with("  line 2: the chat template writes no `documents`, so the model would not see them; "),
        "{message}"
    );
    assert_eq!(lines[2..], ["  refused by the chat template: line 3", "hint: `--on-bad-row skip` leaves them out"]);
    let source = "{% for d in documents or [] %}[{{ d.title }}: {{ d.text }}]{% endfor %}{% for m in messages %}{{ m.content }}|{% endfor %}";
    let template = ChatTemplate::new(source, None, None).unwrap();
    let data = load(row("documents", "a").to_string(), Some(&template)).unwrap();
    assert_eq!(texts(&data.examples[0]), ("[t: u]a|b|".into(), "b|".into()));
}

#[test]
fn a_long_row_is_refused_cut_or_left_out() {
    let long = "ab ".repeat(50);
    let bytes = format!("{}\n{}\n", json!({"text": "a"}), json!({"text": long}));
    let load = |on_long_row| load_within(&bytes, None, 16, on_long_row);
    assert!(load(OnLongRow::Refuse).unwrap_err().to_string().contains("tokens, the limit is 16\n"));
    let cut = load(OnLongRow::Truncate).unwrap();
    assert_eq!((cut.examples[1].ids.len(), cut.truncated, cut.skipped), (16, 1, 0));
    assert_eq!(cut.examples[1].trained.len(), 16);
    let skipped = load(OnLongRow::Skip).unwrap();
    assert_eq!((skipped.examples.len(), skipped.truncated, skipped.skipped), (1, 0, 1));

    let only = json!({"text": long}).to_string();
    let message = load_within(&only, None, 16, OnLongRow::Skip).unwrap_err().to_string();
    assert!(message.contains("no rows left, all 1 are longer than 16 tokens"), "{message}");
    let untrained = json!({"prompt": long, "completion": "b"}).to_string();
    let message = load_within(&untrained, None, 16, OnLongRow::Truncate).unwrap_err().to_string();
    assert!(message.contains("nothing to train on: no trained token among the first 16"), "{message}");
}

#[test]
fn content_parts_and_tools_in_a_string_are_read() {
    let row = json!({
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]},
            {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]},
        ],
        "tools": "[{\"type\": \"function\"}]",
    });
    let row = check_row(&row.to_string()).unwrap();
    let Row::Messages { messages, tools, .. } = &row else { panic!("{row:?}") };
    assert_eq!(messages[0]["content"], json!([{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]));
    assert_eq!(tools, &Some(json!([{"type": "function"}])));
}

/// A template that drops earlier turns gives an example a turn; all of a line go to one side.
#[test]
fn examples_of_one_line_are_not_parted_by_a_split() {
    let source = "{{ messages[-2:] | map(attribute='content') | join('|') if not add_generation_prompt else messages[-1].content + '|' }}";
    let template = ChatTemplate::new(source, None, None).unwrap();
    let turn = |role: &str, text: &str| json!({"role": role, "content": text});
    let row =
        json!({"messages": [turn("user", "a"), turn("assistant", "b"), turn("user", "c"), turn("assistant", "d")]});
    let data = load(format!("{row}\n").repeat(5), Some(&template)).unwrap();
    assert_eq!(data.examples.len(), 10);
    assert_eq!(texts(&data.examples[1]), ("c|d".into(), "d".into()));
    let (train, eval) = data.split(0.4, 3).unwrap();
    assert_eq!((train.len(), eval.len()), (6, 4));
    let line = |i: &usize| data.examples[*i].line();
    assert!(train.iter().all(|t| eval.iter().all(|e| line(t) != line(e))));
}

#[test]
fn numbers_and_lines_are_written_short() {
    assert_eq!([0, 999, 1000, 2381, 1234567].map(thousands), ["0", "999", "1,000", "2,381", "1,234,567"]);
    assert_eq!(spans(&[3]), "3");
    assert_eq!(spans(&[1, 2, 4, 6, 7, 8]), "1-2, 4, 6-8");
}

/// A row of the fixture as TRL tokenised it: ids, and how many of them are prompt.
fn tokenised(sequence: &Json) -> (Vec<u32>, usize) {
    let ids = sequence["ids"].as_array().unwrap().iter().map(|id| id.as_u64().unwrap() as u32).collect();
    (ids, sequence["prompt"].as_u64().unwrap() as usize)
}

/// Of strings and of messages, with a system message and with earlier turns.
#[test]
fn judged_rows_become_the_sequences_that_trl_makes_of_them() {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures/objectives");
    let tokenizer = &Tokenizer::from_dir(&dir.join("model")).unwrap();
    let source = std::fs::read_to_string(dir.join("model/chat_template.jinja")).unwrap();
    let template = &ChatTemplate::new(&source, None, None).unwrap();
    for (file, case, kind) in [
        ("preference.jsonl", "dpo", RowKind::Preference),
        ("preference.jsonl", "orpo", RowKind::Preference),
        ("rated.jsonl", "kto", RowKind::Rating),
    ] {
        let encoder = Encoder {
            tokenizer,
            template: Some(template),
            embeddings: 323,
            max_seq_len: 256,
            on_long_row: OnLongRow::Refuse,
        };
        let data = load_groups(&sources(&dir.join(file)), &plainly(), encoder, kind, case, |_| ()).unwrap();
        let text = std::fs::read_to_string(dir.join(format!("{case}.json"))).unwrap();
        let trl: Json = serde_json::from_str(&text).unwrap();
        let rows = trl["rows"].as_array().unwrap();
        assert_eq!(data.examples.len(), rows.len());
        for (i, (group, row)) in data.examples.iter().zip(rows).enumerate() {
            assert_eq!(group.label, row["label"].as_bool());
            let sequences = row["sequences"].as_array().unwrap();
            assert_eq!(group.sequences.len(), sequences.len());
            for (example, sequence) in group.sequences.iter().zip(sequences) {
                let prompt = example.prompt();
                assert_eq!((example.ids.to_vec(), prompt), tokenised(sequence), "{case}, row {i}");
                assert!(example.trained.iter().enumerate().all(|(t, trained)| *trained == (t >= prompt)));
                assert_eq!(example.line(), i + 1);
            }
        }
    }
}

#[test]
fn a_prompt_may_stand_in_the_answers() {
    let said = |role: &str, text: &str| json!({"role": role, "content": text});
    let asked = json!([said("system", "S"), said("user", "é?")]);
    let whole = |answer: &str| json!([said("system", "S"), said("user", "é?"), said("assistant", answer)]);
    let beside = json!({"prompt": asked, "chosen": [said("assistant", "ja")], "rejected": [said("assistant", "no")]});
    let beside = check_row(&beside.to_string()).unwrap();
    for prompt in [Json::Null, json!("é?"), asked] {
        let mut row = json!({"chosen": whole("ja"), "rejected": whole("no"), "messages": whole("ja")});
        if !prompt.is_null() {
            row["prompt"] = prompt;
        }
        assert_eq!(check_row(&row.to_string()).unwrap(), beside, "{row}");
        // The same row is a conversation where that is learned.
        let file = file(row.to_string());
        check_demonstrations(file.path()).unwrap();
        check_rows(&sources(file.path()), &plainly(), RowKind::Preference, "dpo").unwrap();
    }
}

#[test]
fn what_cannot_be_judged_is_refused() {
    let check = |row: Json, expected: &str| {
        let told = check_row(&row.to_string()).unwrap_err().to_string();
        assert!(told.starts_with(expected), "{row}: {told}");
    };
    let said = |role: &str, text: &str| json!({"role": role, "content": text});
    let (yes, no) = (said("assistant", "ja"), said("assistant", "no"));
    check(
        json!({"prompt": "a", "chosen": "b", "rejected": "b"}),
        "nothing to train on: `chosen` and `rejected` are the same",
    );
    check(json!({"prompt": "a", "chosen": "b", "rejected": ""}), "nothing to train on: `rejected` is empty");
    check(
        json!({"prompt": "a", "chosen": "b"}),
        "unknown row with `prompt`, `chosen`; `chosen` and `rejected` go together",
    );
    check(
        json!({"prompt": "a", "chosen": "b", "rejectd": "c"}),
        "unknown row with `prompt`, `chosen`, `rejectd`; `rejectd`: did you mean",
    );
    check(
        json!({"chosen": "b", "rejected": "c"}),
        "no `prompt`; only `chosen` and `rejected` that are whole conversations",
    );
    check(json!({"chosen": [yes], "rejected": [no]}), "no `prompt`, and `chosen` and `rejected` do not begin alike");
    check(json!({"prompt": "a", "chosen": [yes], "rejected": [no]}), "`prompt` is a string and `chosen` is a list");
    check(
        json!({"prompt": [said("user", "a")], "chosen": [yes], "rejected": "no"}),
        "`prompt` is a list and `rejected` is a string",
    );
    let cut = json!({"chosen": [said("user", "a"), yes], "rejected": [said("user", "a")]});
    check(cut, "nothing to train on: `rejected` says nothing beyond");
    check(
        json!({"prompt": "a", "chosen": "b", "rejected": "c", "input": "é"}),
        "`input` is not read: put it into `prompt`",
    );
    check(json!({"prompt": "a", "completion": "b", "label": true, "history": ["é"]}), "`history` is not read");
}

#[test]
fn rows_for_another_objective_are_refused_with_its_name() {
    let preference = format!("{}\n", json!({"prompt": "a", "chosen": "b", "rejected": "c"}));
    let rated = format!("{}\n", json!({"prompt": "a", "completion": "b", "label": false}));
    let plain = format!("{}\n", json!({"prompt": "a", "completion": "b", "label": 3}));
    let hint = "choose what is learned with `--objective`";
    let check = |rows: &str, kind: RowKind, objective: &str, words: &[&str]| {
        let told = format!("{:#}", check_rows(&sources(file(rows).path()), &plainly(), kind, objective).unwrap_err());
        assert!(words.iter().chain([&hint]).all(|word| told.contains(word)), "{told}");
    };
    check(
        &preference.repeat(3),
        RowKind::Demonstration,
        "sft",
        &["all 3 rows: has `chosen` and `rejected`: rows for dpo or orpo; sft learns from"],
    );
    check(
        &rated,
        RowKind::Demonstration,
        "sft",
        &["line 1: has a `label` that rates its completion: rows for kto; sft"],
    );
    check(
        &rated,
        RowKind::Preference,
        "dpo",
        &["rows for kto; dpo learns from rows with `prompt`, `chosen` and `rejected`"],
    );
    check(
        &plain,
        RowKind::Rating,
        "kto",
        &["rows for sft; kto learns from rows with `prompt`, `completion` and `label` (true or false)"],
    );
    check_demonstrations(file(&plain).path()).unwrap();
    for (label, good) in [(json!("up"), true), (json!("👎"), false), (json!("True"), true), (json!(false), false)] {
        let row = json!({"prompt": "a", "completion": "b", "label": label});
        assert!(matches!(check_row(&row.to_string()).unwrap(), Row::Rated { label, .. } if label == good), "{row}");
    }
    let told =
        check_rows(&sources(file(rated + &plain).path()), &plainly(), RowKind::Rating, "kto").unwrap_err().to_string();
    assert!(told.contains("line 2: label: 3 is no rating; write true or false"), "{told}");
    // Nothing is learned from both answers as if both were right.
    let told = load(preference, Some(&chatml())).unwrap_err().to_string();
    assert!(told.contains("rows for dpo or orpo"), "{told}");
}

#[test]
fn two_answers_are_cut_or_left_out_together() {
    let rows = [
        json!({"prompt": "a", "chosen": "b", "rejected": "c"}),
        json!({"prompt": "a", "chosen": "b", "rejected": "c ".repeat(30)}),
    ];
    let rows: String = rows.iter().map(|row| format!("{row}\n")).collect();
    let (tokenizer, template) = (tokenizer(), chatml());
    let load = |on_long_row| {
        let (tokenizer, template) = (&tokenizer, Some(&template));
        let encoder = Encoder { tokenizer, template, embeddings: 320, max_seq_len: 40, on_long_row };
        load_groups(&sources(file(&rows).path()), &plainly(), encoder, RowKind::Preference, "dpo", |_| ())
    };
    let skipped = load(OnLongRow::Skip).unwrap();
    assert_eq!((skipped.examples.len(), skipped.skipped), (1, 1));
    let cut = load(OnLongRow::Truncate).unwrap();
    let lengths: Vec<usize> = cut.examples[1].sequences.iter().map(|example| example.ids.len()).collect();
    assert_eq!((lengths[1], cut.truncated, cut.skipped), (40, 1, 0));
    assert!(lengths[0] < 40);
    assert!(format!("{:#}", load(OnLongRow::Refuse).unwrap_err()).contains("line 2: "));
    let (train, held) = cut.split(0.5, 3).unwrap();
    assert_eq!((train.len(), held.len()), (1, 1));
}

/// What `table.json` says of a file, as it is.
fn entry_of(folder: &Path, entry: &Json) -> Json {
    let name = entry["file"].as_str().unwrap();
    let path = folder.join(name);
    let mut reading = Reading::default();
    let mut found = json!({"file": name});
    if let Some(columns) = entry["columns"].as_str() {
        (reading.columns, found["columns"]) = (columns.parse().unwrap(), columns.into());
    }
    if let Some(system) = entry["system"].as_str() {
        (reading.system, found["system"]) = (Some(system.to_owned()), system.into());
    }
    if let Some(word) = entry["on_bad_row"].as_str() {
        (reading.on_bad_row, found["on_bad_row"]) = (word.parse().unwrap(), word.into());
    }
    let mut rows = Vec::new();
    let read = std::fs::File::open(&path).map_err(anyhow::Error::from).and_then(|file| {
        read_texts(&path, file, &reading, |number, text| {
            // What a script or a run reads again is the same row.
            assert!(check_row(&text).is_ok(), "{name}: {text}");
            rows.push(format!("{number} {text}"));
            Ok(())
        })
    });
    match read {
        Ok((recognised, left_out)) => {
            found["says"] = recognised.words.unwrap_or_else(|| "JSONL".to_owned()).into();
            if let Some(note) = left_out {
                found["note"] = note.replace(&path.display().to_string(), name).into();
            }
            let short = |row: String| if row.len() > 400 { format!("{}…", &row[..100]) } else { row };
            found["rows"] = rows.into_iter().map(|row| Json::from(short(row))).collect();
        }
        Err(error) => found["refused"] = format!("{error:#}").replace(&path.display().to_string(), name).into(),
    }
    found
}

/// Files as people have them, and broken ones: what each is found to be and its rows, or the sentence that helps.
#[test]
fn every_file_is_recognised_or_refused_as_the_table_says() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures/rows");
    let table: Json = serde_json::from_slice(&std::fs::read(folder.join("table.json")).unwrap()).unwrap();
    let entries = table.as_array().unwrap();
    let mut listed = std::collections::BTreeSet::new();
    let mut wrong = String::new();
    for entry in entries {
        listed.insert(entry["file"].as_str().unwrap().to_owned());
        let found = entry_of(&folder, entry);
        if found != *entry {
            wrong.push_str(&format!("{},\n", serde_json::to_string_pretty(&found).unwrap()));
        }
    }
    for (part, least) in [("people", 40), ("bad", 20)] {
        let files: Vec<String> = std::fs::read_dir(folder.join(part))
            .unwrap()
            .map(|file| format!("{part}/{}", file.unwrap().file_name().to_string_lossy()))
            .collect();
        assert!(files.len() >= least);
        for file in files.iter().filter(|file| !listed.contains(*file)) {
            let found = entry_of(&folder, &json!({"file": file}));
            wrong.push_str(&format!("{},\n", serde_json::to_string_pretty(&found).unwrap()));
        }
    }
    if let Ok(path) = std::env::var("FOUND_ROWS") {
        std::fs::write(path, &wrong).unwrap();
    }
    assert!(wrong.is_empty(), "not as the table says, but:\n{wrong}");
}

/// Whether tokens stay in memory or are spilled changes nothing that is read of them.
#[test]
fn rows_are_the_same_whether_their_tokens_are_spilled_or_not() {
    let said = |n: usize| json!([{"role": "user", "content": "é".repeat(n % 7)}, {"role": "assistant", "content": "w ".repeat(n % 11 + 1)}]);
    let text: String = (0..1300).map(|n| format!("{}\n", json!({"messages": said(n)}))).collect();
    let (file, tokenizer, template) = (file(text), tokenizer(), chatml());
    let encoder = Encoder {
        tokenizer: &tokenizer,
        template: Some(&template),
        embeddings: tokenizer.vocab_size(),
        max_seq_len: 40,
        on_long_row: OnLongRow::Truncate,
    };
    let load = |held| {
        let keeper = super::tokens::Keeper::of(held);
        super::dataset::load_examples_keeping(&sources(file.path()), &plainly(), encoder, keeper).unwrap()
    };
    let (here, spilled, both) = (load(usize::MAX), load(0), load(20_000));
    assert_eq!(here.examples.len(), 1300);
    assert!(here.examples.iter().map(OfLine::line).eq(1..=1300), "in the order of the file");
    for other in [spilled, both] {
        assert_eq!(here.examples, other.examples);
        assert_eq!((&here.digest, here.truncated, here.endless), (&other.digest, other.truncated, other.endless));
    }
}

/// As transformers and TRL have them: what a row says to the template goes before what the model's files say.
#[test]
fn variables_of_a_row_reach_its_template() {
    let source = format!("{{%- if deep %}}DEEP {{{{ deep }}}} {{% endif %}}{CHATML}");
    let template = ChatTemplate::new(&source, None, None).unwrap();
    let text = |row: Json| {
        let data = load(row.to_string(), Some(&template)).unwrap();
        let tokenizer = tokenizer();
        data.examples.iter().map(|example| tokenizer.decode(&example.ids, false).unwrap()).collect::<String>()
    };
    let talk = json!([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]);
    let plain = text(json!({"messages": talk}));
    assert_eq!(plain, text(json!({"messages": talk, "chat_template_kwargs": {"deep": false}})));
    let deep = text(json!({"messages": talk, "chat_template_kwargs": {"deep": 7}}));
    assert_eq!(deep, format!("DEEP 7 {plain}"));
    assert_eq!(deep, text(json!({"prompt": "a", "completion": "b", "chat_template_kwargs": {"deep": 7}})));
    let error = load(r#"{"prompt": "a", "completion": "b", "chat_template_kwargs": {"deep": 7}}"#, None).unwrap_err();
    assert!(error.to_string().contains("`chat_template_kwargs` are for a chat template"), "{error}");
}

/// A column that the user calls a label, and that rates nothing, would be lost without a word.
#[test]
fn a_label_that_rates_nothing_is_refused_where_the_user_named_it() {
    let reading = Reading { columns: "label=grade".parse().unwrap(), ..Reading::default() };
    let told = |name: &str, text: &str| {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(name);
        std::fs::write(&path, text).unwrap();
        let checked = check_rows(&sources(&path), &reading, RowKind::Demonstration, "sft");
        checked.map_err(|error| format!("{error:#}"))
    };
    for (name, text) in [
        ("a.jsonl", "{\"prompt\": \"a\", \"completion\": \"b\", \"grade\": 3}\n"),
        ("a.csv", "prompt,completion,grade\na,b,3\nc,d,4\n"),
        ("b.csv", "prompt,completion,grade\na,b,\nc,d,\n"),
    ] {
        let error = told(name, text).unwrap_err();
        assert!(error.contains("`grade` is to be `label`, and ") && error.contains("rates nothing"), "{error}");
    }
    let rated = told("c.csv", "prompt,completion,grade\na,b,true\n").unwrap_err();
    assert!(rated.contains("rows for kto"), "{rated}");
}
