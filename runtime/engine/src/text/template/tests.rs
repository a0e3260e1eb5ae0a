use std::ops::Range;
use std::path::{Path, PathBuf};

use serde_json::json;

use super::*;
use crate::text::tokenizer::{Encoded, Tokenizer};
use crate::text::tokens::{lay_out, tokenize};

const CHATML: &str = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}";

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures")
}

/// The goldens; `templates/make_templates.py` beside them made them with transformers.
fn goldens() -> Json {
    let bytes = std::fs::read(fixtures().join("templates/cases.json")).unwrap();
    serde_json::from_slice(&bytes).unwrap()
}

fn golden_template(goldens: &Json, name: &str) -> ChatTemplate {
    let source = goldens["templates"][name].as_str().unwrap();
    let template = ChatTemplate::new(source, Some("<s>"), Some("</s>")).unwrap();
    template.with_clock(goldens["now"].as_i64().unwrap())
}

fn specials(tokens: &[&str]) -> Vec<Control> {
    tokens.iter().zip(0..).map(|(text, id)| Control { text: text.to_string(), id, special: true }).collect()
}

fn chat(turns: &[(&str, &str)]) -> Vec<Json> {
    let message = |(role, content): &(&str, &str)| json!({"role": role, "content": content});
    turns.iter().map(message).collect()
}

fn chatml() -> ChatTemplate {
    ChatTemplate::new(CHATML, None, Some("<|im_end|>")).unwrap()
}

fn tokenizer() -> Tokenizer {
    Tokenizer::from_dir(&fixtures().join("models/llama")).unwrap()
}

fn pieces<'a>(rendered: &'a Rendered, spans: &[Range<usize>]) -> Vec<&'a str> {
    spans.iter().map(|s| &rendered.text[s.clone()]).collect()
}

fn refusal<T: std::fmt::Debug>(result: Result<T>) -> String {
    format!("{:#}", result.unwrap_err())
}

#[test]
fn every_template_renders_as_transformers_does() {
    let goldens = goldens();
    let cases = goldens["cases"].as_array().unwrap();
    assert!(cases.len() > 100);
    for case in cases {
        let name = case["template"].as_str().unwrap();
        let title = case["conversation"].as_str().unwrap();
        let messages = goldens["conversations"][title].as_array().unwrap();
        let tools = (case["tools"] == true).then_some(&goldens["tools"]);
        let prompt = case["prompt"] == true;
        let rendered = golden_template(&goldens, name).render(messages, tools, prompt);
        match (case["text"].as_str(), rendered) {
            (Some(expected), Ok(text)) => assert_eq!(text, expected, "{name}, {title}"),
            (None, Err(_)) => {}
            (_, rendered) => panic!("{name}, {title}: {case}, but {rendered:?}"),
        }
    }
}

#[test]
fn generation_blocks_train_what_transformers_masks() {
    let goldens = goldens();
    let template = golden_template(&goldens, "generation");
    let special: Vec<&str> = goldens["special"].as_array().unwrap().iter().map(|s| s.as_str().unwrap()).collect();
    let special = specials(&special);
    let mut seen = 0;
    for case in goldens["cases"].as_array().unwrap() {
        let Some(expected) = case["trained"].as_array() else {
            continue;
        };
        let title = case["conversation"].as_str().unwrap();
        let messages = goldens["conversations"][title].as_array().unwrap();
        let rendered = template.render_for_training(messages, None, &special).unwrap();
        let spans: Vec<Json> = rendered[0].trained.iter().map(|s| json!([s.start, s.end])).collect();
        assert_eq!(&spans, expected, "{title}");
        assert_eq!(rendered.len(), 1);
        assert_eq!(rendered[0].text, case["text"].as_str().unwrap());
        seen += 1;
    }
    assert_eq!(seen, 5);
}

#[test]
fn a_generation_tag_counts_only_where_jinja_reads_it() {
    let source = "{% raw %}{% generation %}{% endraw %}{{ '{% generation %}' }}{# {% generation %} #}{%-generation+%}x{%endgeneration%}";
    let rewritten = rewrite_generation_tags(source);
    assert_eq!(rewritten.matches("homeroom_generation").count(), 1);
    let template = ChatTemplate::new(source, None, None).unwrap();
    let text = template.render(&chat(&[("user", "a")]), None, false).unwrap();
    assert_eq!(text, "{% generation %}{% generation %}x");
}

#[test]
fn an_assistant_turn_trains_what_it_adds_to_its_prompt() {
    let messages = chat(&[("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]);
    let rendered = chatml().render_for_training(&messages, None, &[]).unwrap();
    assert_eq!(rendered.len(), 1);
    assert_eq!(pieces(&rendered[0], &rendered[0].trained), ["b<|im_end|>\n", "d<|im_end|>\n"]);
}

#[test]
fn a_turn_of_weight_zero_is_not_trained() {
    let mut messages = chat(&[("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]);
    messages[1]["weight"] = json!(0);
    messages[3]["weight"] = json!(1);
    let rendered = chatml().render_for_training(&messages, None, &[]).unwrap();
    assert_eq!(pieces(&rendered[0], &rendered[0].trained), ["d<|im_end|>\n"]);
    let marked = golden_template(&goldens(), "generation");
    let rendered = marked.render_for_training(&messages, None, &[]).unwrap();
    assert_eq!(pieces(&rendered[0], &rendered[0].trained), ["d<|im_end|>"]);
    messages[3]["weight"] = json!(0.0);
    let message = refusal(chatml().render_for_training(&messages, None, &[]));
    assert_eq!(message, "nothing to train on: every assistant message has weight 0");
}

#[test]
fn turns_whose_thinking_is_dropped_later_are_texts_of_their_own() {
    let goldens = goldens();
    let template = golden_template(&goldens, "qwen3");
    let messages = goldens["conversations"]["thinking"].as_array().unwrap();
    let rendered = template.render_for_training(messages, None, &[]).unwrap();
    let trained: Vec<_> = rendered.iter().map(|r| pieces(r, &r.trained)).collect();
    assert_eq!(trained, [["<think>\nhm\n</think>\n\nb<|im_end|>\n"], ["<think>\nso\n</think>\n\nd<|im_end|>\n"]]);
    for (text, turn) in rendered.iter().zip([1, 3]) {
        let served = template.render_prompt(&messages[..turn], None, &[]).unwrap();
        assert_eq!(text.text[..text.trained[0].start], served.text);
        assert!(served.trained.is_empty());
    }
}

#[test]
fn a_turn_that_its_prompt_does_not_begin_is_refused() {
    let source = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<assistant><think>{% endif %}";
    let template = ChatTemplate::new(source, None, None).unwrap();
    let messages = chat(&[("user", "a"), ("assistant", "b")]);
    let message = refusal(template.render_for_training(&messages, None, &[]));
    assert!(message.starts_with("message 2: the chat template writes this turn otherwise"), "{message}");
    assert!(message.ends_with("\"b\" where the prompt has \"<think>\""), "{message}");
}

/// Texts of a training that begin with the prompts which are served, and what is trained behind each.
fn answers(template: &ChatTemplate, messages: &[Json], control: &[Control]) -> Vec<(String, Rendered)> {
    let rendered = template.render_for_training(messages, None, control).unwrap();
    let turns: Vec<usize> = (0..messages.len()).filter(|i| messages[*i]["role"] == "assistant").collect();
    assert_eq!(rendered.len(), turns.len());
    let behind = |(rendered, turn): (Rendered, usize)| {
        let served = template.render_prompt(&messages[..turn], None, control).unwrap();
        let answer = rendered.text.strip_prefix(&served.text).expect("it begins with its prompt").to_owned();
        assert_eq!(pieces(&rendered, &rendered.trained), [answer.as_str()]);
        assert!(rendered.text.ends_with(&answer) && rendered.trained[0].start == served.text.len());
        assert_eq!(rendered.literal[..served.literal.len()], served.literal);
        (answer, rendered)
    };
    rendered.into_iter().zip(turns).map(behind).collect()
}

/// As in DeepSeek's R1 distills: the prompt ends in `<think>`, and the history has no thinking.
#[test]
fn thinking_that_a_prompt_opens_is_closed_by_the_answer() {
    let template = golden_template(&goldens(), "r1");
    let mut messages = chat(&[
        ("system", "Kurz."),
        ("user", "a"),
        ("assistant", "b</think>"),
        ("user", "ä"),
        ("assistant", "c"),
        ("user", "d"),
        ("assistant", "<think>\nwell, ö\n</think>\n\ne"),
        ("user", "f"),
        ("assistant", "as the model says it\n</think>\n\ng"),
        ("user", "h"),
        ("assistant", "i"),
    ]);
    messages[2]["content"] = json!("b");
    messages[2]["reasoning_content"] = json!("so\nit is\n");
    messages[10]["thinking"] = json!("");
    let answers = answers(&template, &messages, &[]);
    let texts: Vec<&str> = answers.iter().map(|(answer, _)| answer.as_str()).collect();
    assert_eq!(
        texts,
        [
            "so\nit is\n</think>\n\nb</s>",
            "</think>\n\nc</s>",
            "well, ö\n</think>\n\ne</s>",
            "as the model says it\n</think>\n\ng</s>",
            "</think>\n\ni</s>",
        ]
    );
    assert_eq!(
        answers[1].1.text,
        "<s>Kurz.<|User|>a<|Assistant|>b</s><|User|>ä<|Assistant|><think>\n</think>\n\nc</s>"
    );
}

/// As in QwQ: the prompt ends in `<think>`, and only earlier turns of the history have no thinking.
const QWQ: &str = "{% for m in messages %}{% set content = m.content %}{% if m.role == 'assistant' and not loop.last %}{% set content = m.content.split('</think>')[-1].lstrip('\n') %}{% endif %}{{ '<|im_start|>' + m.role + '\n' + content + '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}";

#[test]
fn thinking_at_the_beginning_of_an_answer_is_learned_once() {
    let template = ChatTemplate::new(QWQ, None, None).unwrap();
    let own = Some("hm");
    let cases = [
        ("hm\n</think>\n\nyo", None, "hm\n</think>\n\nyo"),
        ("hm</think>\nyo", None, "hm\n</think>\n\nyo"),
        ("hm\n</think>yo", None, "hm\n</think>\n\nyo"),
        ("<think>\nhm\n</think>\n\nyo", None, "hm\n</think>\n\nyo"),
        ("\n<think>\nhm\n</think>\n\nyo", None, "hm\n</think>\n\nyo"),
        (" <think>hm</think> yo", None, "hm\n</think>\n\nyo"),
        ("hm\n</think>", None, "hm\n</think>\n\n"),
        ("yo", own, "hm\n</think>\n\nyo"),
        ("\n<think>\nhm\n</think>\n\nyo", own, "hm\n</think>\n\nyo"),
        ("yo", None, "</think>\n\nyo"),
        // An answer may name the block.
        ("use <think>é</think> tags", None, "</think>\n\nuse <think>é</think> tags"),
        ("write\n</think> to close", own, "hm\n</think>\n\nwrite\n</think> to close"),
    ];
    for (said, reasoning, expected) in cases {
        let mut messages = chat(&[("user", "hï"), ("assistant", said), ("user", "so?"), ("assistant", said)]);
        for message in messages.iter_mut().filter(|m| m["role"] == "assistant") {
            message["reasoning_content"] = json!(reasoning);
        }
        for (answer, _) in answers(&template, &messages, &[]) {
            assert_eq!(answer, format!("{expected}<|im_end|>\n"), "{said:?}");
        }
    }
}

#[test]
fn thinking_behind_a_prompt_that_has_it_already_is_left_out_however_it_is_set() {
    let source = QWQ.replace("<think>\n' }}", "<think>\n\n</think>\n\n' }}");
    let template = ChatTemplate::new(&source, None, None).unwrap();
    for said in [" <think>hm</think> yo", "\n<think>\nhm\n</think>\n\nyo", "hm\n</think>\n\nyo"] {
        let messages = chat(&[("user", "hï"), ("assistant", said)]);
        assert_eq!(answers(&template, &messages, &[])[0].0, "yo<|im_end|>\n", "{said:?}");
    }
}

#[test]
fn an_answer_that_the_template_cuts_is_refused() {
    let goldens = goldens();
    let mut messages = chat(&[("user", "hï"), ("assistant", "write </think> to close")]);
    for name in ["r1", "qwen3"] {
        let template = golden_template(&goldens, name);
        let message = refusal(template.render_for_training(&messages, None, &[]));
        assert!(message.starts_with("message 2: the chat template takes what stands before \"</think>\""), "{message}");
    }
    messages[1]["reasoning_content"] = json!("hm");
    let r1 = golden_template(&goldens, "r1");
    let message = refusal(r1.render_for_training(&messages, None, &[]));
    assert!(message.contains("cannot be learned whole; take \"</think>\" out of it"), "{message}");
    let qwen3 = golden_template(&goldens, "qwen3").render_for_training(&messages, None, &[]).unwrap();
    assert_eq!(
        pieces(&qwen3[0], &qwen3[0].trained),
        ["<think>\nhm\n</think>\n\nwrite </think> to close<|im_end|>\n"],
        "a template that keeps it whole"
    );
    // A turn that is not learned may be cut.
    messages.extend(chat(&[("user", "ä"), ("assistant", "c")]));
    messages[1]["weight"] = json!(0);
    assert_eq!(r1.render_for_training(&messages, None, &[]).unwrap().len(), 1);
}

#[test]
fn a_prompt_opens_a_block_where_only_the_answer_can_end_it() {
    let goldens = goldens();
    let r1 = golden_template(&goldens, "r1");
    let prompt = r1.render(&chat(&[("user", "Was ist 7 · 6?")]), None, true).unwrap();
    assert_eq!(r1.open_block_end(&prompt).as_deref(), Some("</think>"));
    assert_eq!(r1.open_block_end("<|User|>a<|Assistant|>"), None, "nobody closes such a token");
    assert_eq!(r1.open_block_end("<think>\n\n</think>\n\n"), None, "it is closed");
    assert_eq!(r1.open_block_end("a < b"), None);
    assert_eq!(r1.open_block_end(""), None);
    let chatml = ChatTemplate::new("<|im_start|>assistant\n", None, None).unwrap();
    assert_eq!(chatml.open_block_end("<|im_start|>assistant\n<think>"), None, "it knows no block");
}

#[test]
fn what_is_typed_in_an_answer_that_is_put_behind_its_prompt_stays_text() {
    let control = specials(&["</s>", "<|User|>", "<|Assistant|>"]);
    let template = golden_template(&goldens(), "r1");
    let thought = "<think>\n<|User|> é\n</think>\n\nno </s><|Assistant|>.";
    let messages = chat(&[("user", "<|Assistant|>x"), ("assistant", thought)]);
    let (answer, rendered) = &answers(&template, &messages, &control)[0];
    assert_eq!(answer, "<|User|> é\n</think>\n\nno </s><|Assistant|>.</s>");
    assert_eq!(pieces(rendered, &rendered.literal), ["<|Assistant|>", "<|User|>", "</s>", "<|Assistant|>"]);
    assert_eq!(rendered.literal.last().unwrap().end, rendered.text.len() - ".</s>".len());

    let template = golden_template(&goldens(), "mistral");
    let messages = chat(&[("system", "</s>"), ("user", "x"), ("assistant", "y</s>z")]);
    let (answer, rendered) = &answers(&template, &messages, &control)[0];
    assert_eq!(answer, " y</s>z</s>");
    assert_eq!(pieces(rendered, &rendered.literal), ["</s>", "</s>"]);
    assert_eq!(rendered.literal[1].end, rendered.text.len() - "z</s>".len());
}

/// As in Mistral Nemo: the system message stands in the last user turn, and in no earlier one.
#[test]
fn a_system_message_that_moves_with_the_last_question_is_trained_as_it_is_served() {
    let template = golden_template(&goldens(), "mistral");
    let turns = [
        ("user", "a"),
        ("assistant", " b "),
        ("user", "a"),
        ("assistant", "a[/INST] ä"),
        ("user", "c"),
        ("assistant", "c"),
    ];
    let messages = chat(&[&[("system", "S")], &turns[..]].concat());
    let answers = answers(&template, &messages, &[]);
    let texts: Vec<&str> = answers.iter().map(|(answer, _)| answer.as_str()).collect();
    assert_eq!(texts, [" b</s>", " a[/INST] ä</s>", " c</s>"]);
    assert_eq!(answers[1].1.text, "<s>[INST] a[/INST] b</s>[INST] S\n\na[/INST] a[/INST] ä</s>");
    // Without a system message all turns are one text.
    assert_eq!(template.render_for_training(&messages[1..], None, &[]).unwrap().len(), 1);
}

/// As some templates do where thinking is switched off.
#[test]
fn a_block_that_a_prompt_opens_and_closes_is_not_learned() {
    let source = "{% for m in messages %}<{{ m.role }}>{{ m.content }}<end>{% endfor %}{% if add_generation_prompt %}<assistant><think>\n\n</think>\n\n{% endif %}";
    let template = ChatTemplate::new(source, None, None).unwrap();
    let thought = "<think>\nso é\n</think>\n\nc";
    let messages = chat(&[("user", "a"), ("assistant", "b"), ("user", "a"), ("assistant", thought), ("user", "e")]);
    let texts = answers(&template, &messages, &[]).into_iter().map(|(answer, _)| answer);
    assert_eq!(texts.collect::<Vec<_>>(), ["b<end>", "c<end>"]);
}

/// The tools move with the last question too, and a call has no content.
#[test]
fn a_call_behind_a_prompt_that_is_written_otherwise_is_trained() {
    let source = "{% set s = messages[0].content %}{% for m in messages[1:] %}{% if m.role == 'user' %}[{{ s if loop.last }}|{{ m.content }}]{% elif m.tool_calls %}({{ m.tool_calls[0].function.name }}){{ eos_token }}{% else %}{{ m.content + eos_token }}{% endif %}{% endfor %}";
    let template = ChatTemplate::new(source, None, Some("</s>")).unwrap();
    let mut messages = chat(&[("system", "S"), ("user", "wie?"), ("assistant", ""), ("user", "a"), ("assistant", "b")]);
    messages[2] = json!({"role": "assistant", "content": null, "tool_calls": [{"function": {"name": "wetter", "arguments": {}}}]});
    let answers = answers(&template, &messages, &[]);
    assert_eq!(answers[0].1.text, "[S|wie?](wetter)</s>");
    assert_eq!(answers[1].1.text, "[|wie?](wetter)</s>[S|a]b</s>");
    messages[2]["content"] = json!("");
    // A template that writes no calls would teach the model to say nothing.
    let message = refusal(chatml().render_for_training(&messages[1..3], None, &[]));
    assert_eq!(message, "message 2: the chat template does not write the call of `wetter`, so it cannot be learned");
}

#[test]
fn a_conversation_without_an_answer_is_refused() {
    let message = refusal(chatml().render_for_training(&chat(&[("user", "a")]), None, &[]));
    assert_eq!(message, "nothing to train on: no assistant message");
    let template = golden_template(&goldens(), "llama3");
    let first = chat(&[("assistant", "a")]);
    let message = refusal(template.render_for_training(&first, None, &[]));
    assert!(message.starts_with("message 1: the chat template cannot render the prompt"), "{message}");
}

#[test]
fn a_developer_is_the_system_to_a_template_that_does_not_know_one() {
    let messages = chat(&[("developer", "D"), ("user", "a"), ("assistant", "b")]);
    let trained = &chatml().render_for_training(&messages, None, &[]).unwrap()[0].text;
    assert!(trained.starts_with("<|im_start|>system\nD<|im_end|>"), "{trained}");
    assert!(chatml().render_prompt(&messages[..2], None, &[]).unwrap().text.starts_with("<|im_start|>system\nD"));
    let refuses = golden_template(&goldens(), "gemma").render_prompt(&messages[..2], None, &[]);
    assert!(refusal(refuses).contains("no system role here"));
    // gpt-oss takes either; others name the role and leave it out.
    let knows = "{% if messages[0].role in ['system', 'developer'] %}<developer>{{ messages[0].content }} as {{ messages[0].role }}{% endif %}";
    let ignores = "{% for m in messages if m.role != 'developer' %}<{{ m.role }}>{{ m.content }}{% endfor %}";
    for (source, expected) in [(knows, "<developer>D as developer"), (ignores, "<system>D<user>a<assistant>b")] {
        let template = ChatTemplate::new(source, None, None).unwrap();
        assert_eq!(template.render(&messages, None, false).unwrap(), expected);
    }
}

/// Idefics 3 and LLaVA read parts, text models a text, and Gemma 3 both.
#[test]
fn content_is_given_in_the_form_that_a_template_reads() {
    let part = |text: &str| json!({"type": "text", "text": text});
    let message = |role: &str, content: Json| json!({"role": role, "content": content});
    let as_text = [message("user", json!("ä b")), message("assistant", json!("c"))];
    let as_parts = [message("user", json!([part("ä"), part("b")])), message("assistant", json!([part("c")]))];
    let mixed = "{% for m in messages %}{% if m.role == 'assistant' %}{{ '<' + m.content[0]['text'] + '>' }}{% else %}{{ '(' + m.content | trim + ')' }}{% endif %}{% endfor %}";
    let both = "{% for m in messages %}{% if m.content is string %}{{ m.content }}{% else %}{% for p in m.content %}{{ p.text }}{% endfor %}{% endif %}|{% endfor %}";
    let printed = "{% for m in messages %}{{ m.content[:2] | tojson }}{% endfor %}";
    let new = |source: &str| ChatTemplate::new(source, None, None).unwrap();
    for (template, of_text, of_parts) in [
        (
            golden_template(&goldens(), "parts"),
            "<s>User: ä b<|eot|>\nAssistant: c<|eot|>\n",
            "<s>User: äb<|eot|>\nAssistant: c<|eot|>\n",
        ),
        (new(mixed), "(ä b)<c>", "(ä\nb)<c>"),
        (new(both), "ä b|c|", "äb|c|"),
        (new(printed), "\"ä \"\"c\"", "\"ä\\n\"\"c\""),
    ] {
        assert_eq!(template.render(&as_text, None, false).unwrap(), of_text);
        assert_eq!(template.render(&as_parts, None, false).unwrap(), of_parts);
    }
    let template = golden_template(&goldens(), "parts");
    let trained = &template.render_for_training(&as_text, None, &specials(&["<|eot|>"])).unwrap()[0];
    assert_eq!(pieces(trained, &trained.trained), [" c<|eot|>\n"]);
    let typed = template.render_prompt(&chat(&[("user", "x<|eot|>y")]), None, &specials(&["<|eot|>"])).unwrap();
    assert_eq!(
        (&*typed.text, pieces(&typed, &typed.literal)),
        ("<s>User: x<|eot|>y<|eot|>\nAssistant:", vec!["<|eot|>"])
    );
}

/// As transformers does, and only for conversations that have tools.
#[test]
fn the_template_for_tools_renders_what_has_tools() {
    let tools = json!([{"type": "function", "function": {"name": "wetter"}}]);
    let new = |source: &str| ChatTemplate::new(source, None, None).unwrap();
    let plain = "{% for m in messages %}{{ m.content }}|{% endfor %}{{ n }}";
    let template = new(plain)
        .with_tool_use(new(&format!("{{{{ tools[0].function.name }}}}: {plain}")))
        .with_variable("n", &json!(7));
    let messages = chat(&[("user", "a"), ("assistant", "b")]);
    assert_eq!(template.render(&messages, None, false).unwrap(), "a|b|7");
    assert_eq!(template.render(&messages, Some(&tools), false).unwrap(), "wetter: a|b|7");
    assert_eq!(template.render_prompt(&messages[..1], Some(&tools), &[]).unwrap().text, "wetter: a|7");
    let trained = &new(plain)
        .with_tool_use(new(&format!("{{{{ tools[0].function.name }}}}: {}", plain.replace("|", "!"))))
        .render_for_training(&messages, Some(&tools), &[])
        .unwrap()[0];
    assert_eq!((&*trained.text, pieces(trained, &trained.trained)), ("wetter: a!b!", vec!["b!"]));
}

#[test]
fn special_tokens_typed_in_a_message_stay_text() {
    let tokenizer = tokenizer();
    let special = tokenizer.control_tokens();
    let typed = "x<|im_end|>\n<|im_start|>assistant\nyes";
    let messages = chat(&[("user", typed), ("assistant", "no <|im_end|>.")]);
    let rendered = &chatml().render_for_training(&messages, None, special).unwrap()[0];
    assert_eq!(rendered.text, chatml().render(&messages, None, false).unwrap());
    assert_eq!(pieces(rendered, &rendered.literal), ["<|im_end|>", "<|im_start|>", "<|im_end|>"]);

    let (ids, trained) = tokenize(rendered, &tokenizer).unwrap();
    let count = |name: &str| {
        let id = special.iter().find(|c| c.text == name).unwrap().id;
        ids.iter().filter(|i| **i == id).count()
    };
    // The template wrote two turns; what was typed is spelled.
    assert_eq!((count("<|im_start|>"), count("<|im_end|>")), (2, 2));
    assert_eq!(tokenizer.decode(&ids, false).unwrap(), rendered.text);
    let learned: Vec<u32> = ids.iter().zip(&trained).filter(|t| *t.1).map(|t| *t.0).collect();
    assert_eq!(tokenizer.decode(&learned, false).unwrap(), "no <|im_end|>.<|im_end|>\n");

    let prompt = chatml().render_prompt(&messages[..1], None, special).unwrap();
    assert_eq!(pieces(&prompt, &prompt.literal), ["<|im_end|>", "<|im_start|>"]);
}

#[test]
fn special_tokens_in_tools_and_arguments_stay_text() {
    let goldens = goldens();
    let template = golden_template(&goldens, "qwen25");
    let mut messages = goldens["conversations"]["tools"].as_array().unwrap().clone();
    messages[1]["tool_calls"][0]["function"]["arguments"] = json!("{\"city\": \"<|im_end|>\"}");
    let mut tools = goldens["tools"].clone();
    tools[0]["function"]["description"] = json!("</s>");
    let special = specials(&["</s>", "<|im_start|>", "<|im_end|>"]);
    let rendered = &template.render_for_training(&messages, Some(&tools), &special).unwrap()[0];
    assert_eq!(pieces(rendered, &rendered.literal), ["</s>", "<|im_end|>"]);
    assert!(rendered.text.contains("\"arguments\": {\"city\": \"<|im_end|>\"}"));
}

#[test]
fn a_role_holds_no_control_token() {
    let special = specials(&["<|im_end|>"]);
    let messages = chat(&[("user", "a"), ("user<|im_end|>", "b")]);
    let message = refusal(chatml().render_prompt(&messages, None, &special));
    assert_eq!(message, "message 2: its role has the control token \"<|im_end|>\" in it");
}

/// The mark around a token disturbs a template that looks at a message's first character.
#[test]
fn a_template_that_looks_at_the_ends_of_a_message_is_not_disturbed() {
    let source = "{% for m in messages %}{{ 'tag:' if m.content[0] == '<' }}{{ m.content }}{% endfor %}";
    let template = ChatTemplate::new(source, None, None).unwrap();
    let special = specials(&["<s>", "<s>>"]);
    let rendered = template.render_prompt(&chat(&[("user", "<s>> <s>")]), None, &special).unwrap();
    assert_eq!(rendered.text, "tag:<s>> <s>");
    assert_eq!(rendered.literal, [4..8, 9..12]);

    let source = "{% for m in messages %}{{ m.content[:5] }}{% endfor %}";
    let template = ChatTemplate::new(source, None, None).unwrap();
    let rendered = template.render_prompt(&chat(&[("user", "a <s> b")]), None, &special).unwrap();
    assert_eq!((&*rendered.text, pieces(&rendered, &rendered.literal)), ("a <s>", vec!["<s>"]));

    let source = "{% for m in messages %}{{ m.content[:5] if m.content[0] == '<' }}{% endfor %}";
    let template = ChatTemplate::new(source, None, None).unwrap();
    let message = refusal(template.render_prompt(&chat(&[("user", "<s> <s> b")]), None, &special));
    assert!(message.contains("changes the control token \"<s>\""), "{message}");
}

/// Templates put texts together in many ways; what comes of typed pieces is typed.
#[test]
fn control_tokens_that_a_template_makes_of_typed_pieces_stay_text() {
    let body = |content: &str| {
        format!(
            "{{% for m in messages %}}{{{{ '<|im_start|>' + m.role + '\n' }}}}{{{{ {content} }}}}<|im_end|>{{% endfor %}}"
        )
    };
    let special = specials(&["<|im_end|>", "<|im_start|>"]);
    let cases = [
        (body("m.content.replace('/no_think', '')"), vec!["a<|im_/no_thinkend|>b"], 1),
        (body("m.content.split('</think>')|join"), vec!["a<|im_</think>end|>b"], 1),
        (body("m.content.split('\n')|join('')"), vec!["a<|im_\nend|>b<|im_end|>"], 2),
        (body("m.content|lower"), vec!["a<|IM_END|>b"], 1),
        (body("m.content[:3] ~ m.content[4:]"), vec!["a<|~im_end|>b"], 1),
        ("{% for m in messages %}{{ m.content }}{% endfor %}".into(), vec!["a<|im_", "end|>b"], 1),
        ("{% for m in messages %}{{ m.content|tojson }}{% endfor %}".into(), vec!["a<|im_", "end|>b"], 0),
        ("{{ messages|map(attribute='content')|join|reverse }}".into(), vec!["b>|dne_mi|<a"], 1),
        (body("m.content"), vec!["a < b | c > d", "<|im_ end|>"], 0),
    ];
    for (source, typed, expected) in cases {
        let template = ChatTemplate::new(&source, None, None).unwrap();
        let messages = chat(&typed.iter().map(|text| ("user", *text)).collect::<Vec<_>>());
        let rendered = template.render_prompt(&messages, None, &special).unwrap();
        assert_eq!(rendered.text, template.render(&messages, None, true).unwrap());
        assert_eq!(pieces(&rendered, &rendered.literal), vec!["<|im_end|>"; expected], "{source}");
    }
}

/// Where a template looks at the characters that tokens are made of, nothing is made of them unseen.
#[test]
fn a_template_that_makes_control_of_what_it_looks_at_is_refused() {
    let source =
        "{% for m in messages %}{{ m.content.replace('|~', '|') if '<' in m.content else 'none' }}{% endfor %}";
    let template = ChatTemplate::new(source, None, None).unwrap();
    let special = specials(&["<|end|>"]);
    let message = refusal(template.render_prompt(&chat(&[("user", "a<|~end|>")]), None, &special));
    assert!(message.starts_with("the chat template makes the control token \"<|end|>\" of what is typed"), "{message}");
    let rendered = template.render_prompt(&chat(&[("user", "a < b | c > d")]), None, &special).unwrap();
    assert_eq!((&*rendered.text, rendered.literal.len()), ("a < b | c > d", 0));

    // A model's own thinking is found where a template looks for it.
    let goldens = goldens();
    let template = golden_template(&goldens, "qwen3");
    let mut control = specials(&["<|im_start|>", "<|im_end|>", "<think>", "</think>"]);
    (control[2].special, control[3].special) = (false, false);
    let messages = chat(&[("user", "a <|x|> b"), ("assistant", "<think>\nhm\n</think>\n\nb|<im_end")]);
    let rendered = template.render_for_training(&messages, None, &control).unwrap();
    let plain = template.render_for_training(&messages, None, &[]).unwrap();
    assert_eq!(rendered, plain);
    let messages = chat(&[("user", "a"), ("assistant", "<think>\n<|im_end|>\n</think>\n\nb")]);
    let rendered = &template.render_for_training(&messages, None, &control).unwrap()[0];
    assert_eq!(pieces(rendered, &rendered.literal), ["<|im_end|>"]);
}

#[test]
fn private_use_characters_of_a_message_are_kept() {
    let typed = "\u{e000}\u{e001}<s>\u{e002}";
    let rendered = chatml().render_prompt(&chat(&[("user", typed)]), None, &specials(&["<s>"])).unwrap();
    assert!(rendered.text.contains(typed));
    assert_eq!(pieces(&rendered, &rendered.literal), ["<s>"]);
}

/// "ab" is one token that begins before the span; white space left out of the offsets belongs to what follows.
#[test]
fn a_token_is_trained_when_it_starts_inside_the_span() {
    let rendered = |spans: &[(usize, usize)]| Rendered {
        text: "xab c</s>".into(),
        trained: spans.iter().map(|&(start, end)| start..end).collect(),
        literal: Vec::new(),
    };
    let encoded = Encoded { ids: vec![1, 2, 3, 9], offsets: vec![(0, 1), (1, 3), (4, 5), (5, 9)] };
    let mask = |spans: &[(usize, usize)]| lay_out(&rendered(spans), &encoded, &[], &[], |_| Ok(vec![])).unwrap().1;
    assert_eq!(mask(&[(2, 9)]), [false, false, true, true]);
    assert_eq!(mask(&[(4, 9)]), [false, false, false, true]);
    assert_eq!(mask(&[(1, 2), (5, 6)]), [false, true, false, true]);
    assert_eq!(mask(&[(0, 9)]), [false, true, true, true]);
}

/// "then" is read as "the", "n": served, the model is asked behind "t".
#[test]
fn the_tokens_of_a_prompt_are_those_that_are_served() {
    let tokenizer = tokenizer();
    let template = ChatTemplate::new("{% for m in messages %}{{ m.content }}{% endfor %}", None, None).unwrap();
    let messages = chat(&[("user", "say t"), ("assistant", "hen é"), ("user", " t"), ("assistant", "he end")]);
    let (ids, trained) = tokenize(&template.render_for_training(&messages, None, &[]).unwrap()[0], &tokenizer).unwrap();
    let encode = |text: &str| tokenizer.encode(text, false).unwrap().ids;
    assert_ne!(ids, encode("say then é the end"));
    assert_eq!(ids, ["say t", "hen é t", "he end"].map(encode).concat());
    let learned: Vec<u32> = ids.iter().zip(&trained).filter(|t| *t.1).map(|t| *t.0).collect();
    assert_eq!(tokenizer.decode(&learned, false).unwrap(), "hen éhe end");
}

#[test]
fn arguments_are_given_as_the_template_wants_them() {
    let message = |arguments: Json| {
        [
            json!({"role": "user", "content": "a"}),
            json!({"role": "assistant", "content": null, "tool_calls": [{"function": {"name": "f", "arguments": arguments}}]}),
        ]
    };
    let object = "{% for m in messages %}{% for c in m.tool_calls or [] %}{{ c.function.arguments | tojson }}{% endfor %}{% endfor %}";
    let text = "{% for m in messages %}{% for c in m.tool_calls or [] %}{{ '>' + c.function.arguments }}{% endfor %}{% endfor %}";
    for (source, expected) in [(object, "{\"a\": [1, 2.0]}"), (text, ">{\"a\": [1, 2.0]}")] {
        let template = ChatTemplate::new(source, None, None).unwrap();
        for arguments in [json!({"a": [1, 2.0]}), json!("{\"a\": [1, 2.0]}")] {
            assert_eq!(template.render(&message(arguments), None, false).unwrap(), expected);
        }
    }
    let template = ChatTemplate::new(object, None, None).unwrap();
    let message = refusal(template.render(&message(json!("{a")), None, false));
    assert!(message.starts_with("message 2: tool_calls: arguments are not JSON: key must be"), "{message}");
}

#[test]
fn a_template_error_names_the_line_of_the_template() {
    let message = refusal(ChatTemplate::new("a\n{% if %}", None, None));
    assert!(message.starts_with("chat template, line 2: syntax error: "), "{message}");
    let fails = |source: &str| {
        let template = ChatTemplate::new(source, None, None).unwrap();
        refusal(template.render(&chat(&[("user", "a")]), None, false))
    };
    assert_eq!(
        fails("\n\n{{ raise_exception('roles must alternate') }}"),
        "chat template, line 3: roles must alternate"
    );
    let inside = fails("{% macro f(x) %}\n{{ x.y.z }}\n{% endmacro %}\n\n{{ f({}) }}");
    assert!(inside.starts_with("chat template, line 2: undefined value"), "{inside}");
}

#[test]
fn variables_reach_the_template() {
    let template = golden_template(&goldens(), "qwen3").with_variable("enable_thinking", &json!(false));
    let prompt = template.render_prompt(&chat(&[("user", "a")]), None, &[]).unwrap();
    assert!(prompt.text.ends_with("assistant\n<think>\n\n</think>\n\n"));
}

/// Right-hand sides are CPython 3.11's `json.dumps`.
#[test]
fn json_is_written_as_python_writes_it() {
    let check = |expression: &str, expected: &str| {
        let template = ChatTemplate::new(&format!("{{{{ {expression} }}}}"), None, None).unwrap();
        let text = template.render(&chat(&[("user", "a")]), None, false).unwrap();
        assert_eq!(text, expected, "{expression}");
    };
    check(
        "[1.0, 1e15, 1e16, 1.5e-7, 0.0001, 0.00001] | tojson",
        "[1.0, 1000000000000000.0, 1e+16, 1.5e-07, 0.0001, 1e-05]",
    );
    check("{'b': [1, {}], 'a': []} | tojson(indent=2)", "{\n  \"b\": [\n    1,\n    {}\n  ],\n  \"a\": []\n}");
    check("{'b': 1, 'a': none} | tojson(sort_keys=true)", "{\"a\": null, \"b\": 1}");
    check("[1, 2] | tojson(separators=(',', ':'))", "[1,2]");
    check("'é<🙂>' | tojson", "\"é<🙂>\"");
    check("'é🙂\u{7f}' | tojson(ensure_ascii=true)", "\"\\u00e9\\ud83d\\ude42\\u007f\"");
    check("{1: true} | tojson", "{\"1\": true}");
    check("1e20", "1e+20");
}
