//! What Ollama asks for beside a GGUF file: a `Modelfile` with the chat format in Go's template language.
//!
//! Ollama does not run a model's own chat template. The formats here are Go templates, a file each; the one that is taken is the one that
//! writes of some conversations what the model's own template writes, whatever either is called.
//! <https://docs.ollama.com/modelfile>, <https://docs.ollama.com/template>

mod go;
mod modelfile;

use std::rc::Rc;

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value as Json, json};

use self::go::{Template, Value};
pub use self::modelfile::{From, modelfile};
use crate::text::template::{ChatTemplate, local_time};

/// The formats by name. `@BOS@` and `@EOS@` stand for the tokenizer's tokens, `@DATE@` for a day.
const FORMATS: [(&str, &str); 26] = [
    ("chatml", include_str!("formats/chatml.tmpl")),
    ("llama3", include_str!("formats/llama3.tmpl")),
    ("llama3.1", include_str!("formats/llama3.1.tmpl")),
    ("llama2", include_str!("formats/llama2.tmpl")),
    ("llama4", include_str!("formats/llama4.tmpl")),
    ("mistral-v1", include_str!("formats/mistral-v1.tmpl")),
    ("mistral-instruct", include_str!("formats/mistral-instruct.tmpl")),
    ("mistral-v3", include_str!("formats/mistral-v3.tmpl")),
    ("mistral-v3-tekken", include_str!("formats/mistral-v3-tekken.tmpl")),
    ("mistral-v7", include_str!("formats/mistral-v7.tmpl")),
    ("gemma", include_str!("formats/gemma.tmpl")),
    ("gemma3", include_str!("formats/gemma3.tmpl")),
    ("gemma4", include_str!("formats/gemma4.tmpl")),
    ("phi3", include_str!("formats/phi3.tmpl")),
    ("phi4", include_str!("formats/phi4.tmpl")),
    ("phi4-mini", include_str!("formats/phi4-mini.tmpl")),
    ("granite", include_str!("formats/granite.tmpl")),
    ("zephyr", include_str!("formats/zephyr.tmpl")),
    ("smollm3", include_str!("formats/smollm3.tmpl")),
    ("olmo2", include_str!("formats/olmo2.tmpl")),
    ("deepseek-r1", include_str!("formats/deepseek-r1.tmpl")),
    ("deepseek-v2", include_str!("formats/deepseek-v2.tmpl")),
    ("exaone", include_str!("formats/exaone.tmpl")),
    ("exaone4", include_str!("formats/exaone4.tmpl")),
    ("cohere", include_str!("formats/cohere.tmpl")),
    ("alpaca", include_str!("formats/alpaca.tmpl")),
];

/// The day that Llama 3.1's template names where nobody tells it another.
const FIXED_DAY: &str = "26 Jul 2024";
/// How templates write the present day.
const DAYS: [&str; 3] = ["%d %b %Y", "%d %B %Y", "%B %d, %Y"];
/// Stands for a system message in a rendering.
const MARK: &str = "«system»";

/// What Ollama writes a conversation by.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Format {
    /// Its name here.
    pub name: &'static str,
    /// The template in Go's language.
    pub template: String,
    /// What stands for the system message of a conversation that has none.
    pub system: Option<String>,
    /// What a user should know of it, each a sentence.
    pub notes: Vec<String>,
}

/// Tokens that a format is written with.
#[derive(Clone, Copy, Debug, Default)]
pub struct Ends<'a> {
    /// The token that begins a text.
    pub bos: Option<&'a str>,
    /// The token that ends one.
    pub eos: Option<&'a str>,
    /// Whether the model's GGUF file has a text begin with `bos`, so that Ollama puts it there.
    pub adds_bos: bool,
}

/// The format that writes what a model's own chat template writes.
///
/// # Errors
/// When none does; names those that there are, and says what to do.
pub fn choose(template: &ChatTemplate, ends: Ends<'_>) -> Result<Format> {
    let question = [message("user", "Wie heißt du?")];
    let render = |messages: &[Json]| template.render(messages, None, true);
    let plain = render(&question).context("its chat template refuses a plain question")?;
    let (begins, plain) = match ends.bos.and_then(|bos| plain.strip_prefix(bos)) {
        Some(rest) => (true, rest),
        None => (false, plain.as_str()),
    };
    let bare = |text: String| match ends.bos.filter(|_| begins) {
        Some(bos) => text.strip_prefix(bos).map(str::to_owned).unwrap_or(text),
        None => text,
    };
    // What comes of no system message, where it is what comes of another one.
    let marked = render(&[message("system", MARK), question[0].clone()]).map(bare);
    let default = marked.as_ref().ok().and_then(|marked| {
        let (before, after) = marked.split_once(MARK)?;
        plain.strip_prefix(before)?.strip_suffix(after)
    });
    let system = default.filter(|system| !system.is_empty());
    let probes = probes();
    let expected: Vec<Option<String>> = probes.iter().map(|messages| render(messages).ok().map(bare)).collect();
    ensure!(
        expected.iter().flatten().count() > 1,
        "its chat template refuses conversations of several turns, so no format of Ollama's can be told from another"
    );
    let days = DAYS.iter().map(|form| local_time(form)).collect::<Result<Vec<_>>>()?;
    let days: Vec<&str> = days.iter().map(String::as_str).chain([FIXED_DAY]).collect();
    for (name, source) in FORMATS {
        // The last line break is the file's.
        let source = source.strip_suffix('\n').unwrap_or(source);
        let named = |word: &str, token: Option<&str>| source.contains(word) && token.is_none();
        if named("@BOS@", ends.bos) || named("@EOS@", ends.eos) {
            continue;
        }
        let source = source.replace("@BOS@", &escaped(ends.bos)).replace("@EOS@", &escaped(ends.eos));
        let dated = source.contains("@DATE@");
        for day in if dated { &days[..] } else { &[""] } {
            let source = source.replace("@DATE@", day);
            let go = Template::new(&source).with_context(|| format!("the format {name} is damaged"))?;
            let same = probes.iter().zip(&expected).all(|(messages, expected)| {
                let Some(expected) = expected else { return true };
                go.render(&given(messages, system)).is_ok_and(|written| written == *expected)
            });
            if same {
                let mut notes = Vec::new();
                let mut template = source;
                if begins && !ends.adds_bos {
                    template = format!("{{{{- \"{}\" }}}}\n{template}", escaped(ends.bos));
                } else if !begins && ends.adds_bos {
                    let bos = ends.bos.unwrap_or_default();
                    notes
                        .push(format!("Ollama begins each prompt with {bos}, which the model's own template does not"));
                }
                if dated && *day != FIXED_DAY
                    || system.is_some_and(|system| days[..DAYS.len()].iter().any(|day| system.contains(day)))
                {
                    notes.push("the template names the present day, and the Modelfile that of the export".to_owned());
                }
                if marked.is_err() {
                    notes.push("the model's own template refuses a system message; Ollama does not".to_owned());
                }
                let padded = format!(" {MARK} ");
                let (as_is, bare) = (render(&[message("user", &padded)])?, render(&[message("user", MARK)])?);
                if as_is != bare.replace(MARK, &padded) {
                    notes.push(
                        "the model's own template takes white space from both ends of a message; Ollama does not"
                            .to_owned(),
                    );
                }
                return Ok(Format { name, template, system: system.map(str::to_owned), notes });
            }
        }
    }
    let names: Vec<&str> = FORMATS.iter().map(|(name, _)| *name).collect();
    bail!(
        "its chat template writes none of the formats that are known for Ollama: {}\nhint: `--format gguf` writes the file with its own template, which llama.cpp and LM Studio read; for Ollama a Modelfile beside it with a TEMPLATE of yours does",
        names.join(", ")
    )
}

/// A token as a text of Go's has it.
fn escaped(token: Option<&str>) -> String {
    token.unwrap_or_default().replace('\\', "\\\\").replace('"', "\\\"")
}

fn message(role: &str, content: &str) -> Json {
    json!({"role": role, "content": content})
}

/// Conversations by which formats are told apart: a question, one with a system message, several turns with one and without, and odd
/// characters. White space stands at no end, as some templates take it away there and Ollama does not.
pub fn probes() -> Vec<Vec<Json>> {
    let odd = "{{ .System }} \"quoted\" 'once' `tick` \\n <b>&amp;</b>\n\n- ein Maß, 数, 🙂\tend";
    vec![
        vec![message("user", "Wie heißt du?")],
        vec![message("system", "You answer in one word."), message("user", "Why?")],
        vec![
            message("user", "One?"),
            message("assistant", "Uno."),
            message("user", "Two?"),
            message("assistant", "Dos."),
            message("user", "Three?"),
        ],
        vec![
            message("system", "First line.\n\nSecond \"line\" with {braces} and %d."),
            message("user", odd),
            message("assistant", "Antwort: „ja“\n```\ncode {{ x }}\n```"),
            message("user", "and?"),
        ],
        vec![message("user", odd)],
    ]
}

/// What Ollama gives a template: the messages, the one that it puts before them if they have no system message, and that by itself.
fn given(messages: &[Json], default: Option<&str>) -> Value {
    let text = |value: &Json| value.as_str().unwrap_or_default().to_owned();
    let mut all: Vec<(String, String)> =
        messages.iter().map(|message| (text(&message["role"]), text(&message["content"]))).collect();
    if let Some(default) = default.filter(|_| all.first().is_none_or(|(role, _)| role != "system")) {
        all.insert(0, ("system".to_owned(), default.to_owned()));
    }
    let systems: Vec<&str> =
        all.iter().filter(|(role, _)| role == "system").map(|(_, content)| content.as_str()).collect();
    let fields = |(role, content): &(String, String)| {
        Value::Fields(Rc::new([("Role", Value::text(role)), ("Content", Value::text(content))].into()))
    };
    let system = Value::text(&systems.join("\n\n"));
    let messages = Value::List(all.iter().map(fields).collect());
    Value::Fields(Rc::new([("System", system), ("Messages", messages)].into()))
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    fn published() -> Json {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures/templates/published.json");
        serde_json::from_slice(&std::fs::read(folder).unwrap()).unwrap()
    }

    /// The format of a published template: none where it is unlike all.
    fn format_of(name: &str) -> Result<Format> {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures/templates/published");
        let family = &published()["families"][name];
        let (bos, eos) = (family["bos"].as_str(), family["eos"].as_str());
        let source = std::fs::read_to_string(folder.join(format!("{name}.jinja")))?;
        choose(&ChatTemplate::new(&source, bos, eos)?, Ends { bos, eos, adds_bos: bos.is_some() })
    }

    #[test]
    fn published_templates_have_the_format_that_writes_what_they_write() {
        for (name, format) in [
            ("chatml", "chatml"),
            ("qwen2_5", "chatml"),
            ("qwen3", "chatml"),
            ("lfm2_v2", "chatml"),
            ("falcon_h1", "chatml"),
            ("llama3", "llama3"),
            ("llama3_1", "llama3.1"),
            ("llama3_2", "llama3.1"),
            ("llama4", "llama4"),
            ("mistral_v1", "mistral-v1"),
            ("mistral_v2v3", "mistral-v3"),
            ("mistral_v3_tekken", "mistral-v3-tekken"),
            ("mistral_v7_tekken", "mistral-v7"),
            ("gemma", "gemma"),
            ("gemma3", "gemma3"),
            ("gemma4_v5", "gemma4"),
            ("phi3", "phi3"),
            ("phi_4", "phi4"),
            ("deepseek_r1_distill", "deepseek-r1"),
            ("deepseek_v2", "deepseek-v2"),
            ("exaone", "exaone"),
            ("exaone4", "exaone4"),
            ("cohere", "cohere"),
            ("alpaca", "alpaca"),
        ] {
            match format_of(name) {
                Ok(found) => assert_eq!(found.name, format, "{name}"),
                Err(error) => panic!("{name}: {error:#}"),
            }
        }
        for name in ["cohere2", "gptoss", "jamba", "muse_glimmer"] {
            let error = format_of(name).unwrap_err().to_string();
            assert!(error.contains("none of the formats") && error.contains("chatml, llama3"), "{name}: {error}");
        }
    }

    /// A template that is written here, as others publish it.
    fn format_written(source: &str) -> Result<Format> {
        let (bos, eos) = (Some("<s>"), Some("</s>"));
        choose(&ChatTemplate::new(source, bos, eos)?, Ends { bos, eos, adds_bos: true })
    }

    #[test]
    fn formats_without_a_published_template_here_are_told_by_what_they_write() -> Result<()> {
        for (format, source) in [
            (
                "zephyr",
                "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + eos_token + '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}",
            ),
            (
                "llama2",
                "{% if messages[0].role == 'system' %}{% set s = '<<SYS>>\n' + messages[0].content + '\n<</SYS>>\n\n' %}{% set messages = messages[1:] %}{% else %}{% set s = '' %}{% endif %}{% for m in messages %}{% if m.role == 'user' %}{{ bos_token + '[INST] ' + (s if loop.first else '') + m.content | trim + ' [/INST]' }}{% else %}{{ ' ' + m.content | trim + ' ' + eos_token }}{% endif %}{% endfor %}",
            ),
            (
                "granite",
                "{% if messages[0].role != 'system' %}{% set messages = [{'role': 'system', 'content': \"Today's Date: \" + strftime_now('%B %d, %Y') + '. You are Granite.'}] + messages %}{% endif %}{% for m in messages %}{{ '<|start_of_role|>' + m.role + '<|end_of_role|>' + m.content + '<|end_of_text|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|start_of_role|>assistant<|end_of_role|>' }}{% endif %}",
            ),
            (
                "olmo2",
                "{{ bos_token }}{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + (eos_token if m.role == 'assistant' else '') + '\n' }}{% if loop.last and add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}{% endfor %}",
            ),
            (
                "phi4-mini",
                "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content + '<|end|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}",
            ),
            (
                "smollm3",
                "{{ '<|im_start|>system\n## Metadata\n\nKnowledge Cutoff Date: June 2025\nToday Date: ' + strftime_now('%d %B %Y') + '\nReasoning Mode: /think\n\n## Custom Instructions\n\n' }}{% if messages[0].role == 'system' %}{{ messages[0].content + '\n\n' }}{% else %}{{ 'You are SmolLM.\n\n' }}{% endif %}{{ '<|im_end|>\n' }}{% for m in messages %}{% if m.role != 'system' %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
            ),
        ] {
            assert_eq!(format_written(source)?.name, format);
        }
        Ok(())
    }

    #[test]
    fn what_a_template_says_by_itself_is_the_system_message() -> Result<()> {
        let qwen = format_of("qwen2_5")?;
        assert_eq!(
            qwen.system.as_deref(),
            Some("You are Qwen, created by Alibaba Cloud. You are a helpful assistant.")
        );
        assert_eq!(format_of("gemma3")?.system, None);
        assert_eq!(format_of("llama3_1")?.system, None);
        let gemma = format_of("gemma")?;
        assert!(gemma.notes.iter().any(|note| note.contains("refuses a system message")), "{:?}", gemma.notes);
        assert!(gemma.notes.iter().any(|note| note.contains("white space")), "{:?}", gemma.notes);
        let dated = format_of("llama3_2")?;
        assert!(dated.notes.iter().any(|note| note.contains("present day")), "{:?}", dated.notes);
        assert!(format_of("qwen3")?.notes.is_empty());
        Ok(())
    }

    #[test]
    fn a_text_begins_once() -> Result<()> {
        let source = "{{ bos_token }}{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}";
        let (bos, eos) = (Some("<s>"), Some("</s>"));
        let format =
            |source: &str, adds_bos| choose(&ChatTemplate::new(source, bos, eos)?, Ends { bos, eos, adds_bos });
        assert!(!format(source, true)?.template.contains("<s>"));
        assert!(format(source, false)?.template.starts_with("{{- \"<s>\" }}\n"));
        let without = format(&source.replace("{{ bos_token }}", ""), true)?;
        assert!(without.notes[0].contains("begins each prompt with <s>"), "{:?}", without.notes);
        Ok(())
    }
}
