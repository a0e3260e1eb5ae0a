//! Chat templates of published models, held to what transformers and TRL make of them: `tests/fixtures/templates/published.json`, beside
//! the Python that made it.

use std::fmt::Write as _;
use std::ops::Range;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value as Json, json};

use super::*;
use crate::text::tokenizer::Tokenizer;
use crate::text::tokens::tokenize;

fn folder() -> PathBuf {
    match std::env::var_os("HOMEROOM_TEMPLATES") {
        Some(elsewhere) => elsewhere.into(),
        None => Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures/templates/published"),
    }
}

struct Golden {
    json: Json,
}

struct Family<'a> {
    name: &'a str,
    template: ChatTemplate,
    /// TRL's version of it, which says what is trained.
    training: Option<ChatTemplate>,
    control: Vec<Control>,
    cases: &'a Map<String, Json>,
}

impl Golden {
    fn read() -> Self {
        let folder = folder();
        let file =
            if folder.ends_with("published") { folder.with_extension("json") } else { folder.join("extra.json") };
        Self { json: serde_json::from_slice(&std::fs::read(file).unwrap()).unwrap() }
    }

    fn families(&self) -> impl Iterator<Item = Family<'_>> {
        self.json["families"].as_object().unwrap().iter().map(|(name, family)| {
            let template = |name: &str| {
                let source = std::fs::read_to_string(folder().join(format!("{name}.jinja"))).ok()?;
                let template = ChatTemplate::new(&source, family["bos"].as_str(), family["eos"].as_str());
                let template = template.unwrap_or_else(|error| panic!("{name}: {error:#}"));
                Some(template.with_clock(self.json["now"].as_i64().unwrap()))
            };
            let words =
                |key: &str| family[key].as_array().unwrap().iter().map(|word| word.as_str().unwrap().to_owned());
            let special = words("special").map(|text| (text, true)).chain(words("added").map(|text| (text, false)));
            let control = special.zip(0..).map(|((text, special), id)| Control { text, id, special }).collect();
            Family {
                name,
                template: template(name).unwrap_or_else(|| panic!("no {name}.jinja")),
                training: template(&format!("{name}_training")),
                control,
                cases: family["cases"].as_object().unwrap(),
            }
        })
    }

    /// A conversation, and what else the template is given.
    fn given<'a>(&'a self, title: &str, case: &'a Json) -> (&'a [Json], Given<'a>) {
        let messages = case.get("messages").unwrap_or(&self.json["conversations"][title]).as_array().unwrap();
        let more = |key: &str| self.json["given"][title].as_array().is_some_and(|keys| keys.contains(&json!(key)));
        let tools = more("tools").then(|| &self.json["tools"]);
        (messages, Given { tools, documents: more("documents").then(|| &self.json["documents"]), ..Given::default() })
    }
}

#[test]
fn published_templates_write_what_transformers_writes() {
    let golden = Golden::read();
    let (mut cases, mut wrong) = (0, String::new());
    for family in golden.families() {
        for (title, case) in family.cases {
            let (messages, given) = golden.given(title, case);
            let mut check = |prompt: bool, expected: Option<String>| {
                cases += 1;
                match (expected, family.template.render(messages, given, prompt)) {
                    (Some(expected), Ok(text)) if text == expected => {}
                    (None, Err(_)) => {}
                    // A loop over none writes nothing here.
                    (None, Ok(_)) if case["error"] == "'NoneType' object is not iterable" => {}
                    (expected, found) => {
                        let _ = writeln!(
                            wrong,
                            "{} {title} {prompt}:\n  {expected:?}\n  {found:?}\n  {}",
                            family.name, case["error"]
                        );
                    }
                }
            };
            let text = case["text"].as_str();
            if title != "typed" {
                check(false, text.map(str::to_owned));
            }
            match (case["prompt"].as_str(), case["served"].as_str(), title.as_str()) {
                (Some(prompt), ..) => check(true, Some(format!("{}{prompt}", text.unwrap()))),
                (_, Some(served), _) => check(true, Some(served.to_owned())),
                (.., "typed") => check(true, text.map(str::to_owned)),
                _ => {}
            }
        }
    }
    assert!(wrong.is_empty(), "{wrong}");
    assert!(cases > 30);
}

/// Where TRL trains more of a turn than what is added to its prompt, or less, white space at the ends apart.
const UNLIKE_TRL: [(&str, &str); 10] = [
    ("deepseek_r1_distill", "it trains the heading of an answer, and thinking is kept"),
    ("deepseekv3", "the same"),
    ("glm4moe", "an answer has no end but the next turn, which it adds"),
    ("gptoss", "it trains the heading of an answer"),
    ("muse_glimmer", "the same"),
    ("nemotron_3_nano", "it trains the beginning of a block of thinking, which the prompt has already"),
    ("phi3", "it parts the end of the text from the last answer"),
    ("phi3_5", "the same"),
    ("qwen3_5_think", "it trains the beginning of a block of thinking, which the prompt has already"),
    ("qwen3_8", "the same"),
];

/// A null among what is learned: transformers has no answer behind the prompt that is served, since the template writes a prompt otherwise
/// once it is answered. Then the answer is put behind that prompt.
#[test]
fn published_templates_train_what_transformers_and_trl_mark() {
    let golden = Golden::read();
    let (mut cases, mut wrong) = (0, String::new());
    for family in golden.families() {
        for (title, case) in family.cases {
            let (messages, given) = golden.given(title, case);
            let found = |template: &ChatTemplate| {
                let texts =
                    template.render_for_training(messages, given, &family.control).map_err(|e| e.to_string())?;
                let of =
                    |text: &Rendered| text.trained.iter().map(|s| text.text[s.clone()].to_owned()).collect::<Vec<_>>();
                Ok::<_, String>((texts.iter().flat_map(of).collect::<Vec<String>>(), texts))
            };
            let mut tell = |said: &str| {
                let _ = writeln!(wrong, "{} {title}: {said}", family.name);
            };
            if case["unheard"] == true {
                match found(&family.template) {
                    Err(error)
                        if error.contains("the model would not see them") || error.contains("cannot be learned") => {}
                    found => tell(&format!("it is left out, but {found:?}")),
                }
            }
            let Some(learned) = case["learned"].as_array() else { continue };
            cases += 1;
            let (pieces, texts) = match found(&family.template) {
                Ok(found) => found,
                Err(error) => {
                    tell(&error);
                    continue;
                }
            };
            let same = |(piece, learned): (&String, &Json)| learned.as_str().is_none_or(|learned| learned == piece);
            if pieces.len() != learned.len() || !pieces.iter().zip(learned).all(same) {
                tell(&format!("{learned:?}, but {pieces:?}"));
            }
            // Texts of their own begin with what is served.
            let turns: Vec<usize> = (0..messages.len()).filter(|i| messages[*i]["role"] == "assistant").collect();
            if !family.template.source().contains("endgeneration") && texts.len() == turns.len() {
                for (text, turn) in texts.iter().zip(&turns) {
                    let served = family.template.render(&messages[..*turn], given, true).unwrap();
                    if !text.text.starts_with(&served) || text.trained[0].start != served.len() {
                        tell(&format!("{served:?} does not begin {text:?}"));
                    }
                }
            } else if texts.len() == 1 && Some(texts[0].text.as_str()) != case["text"].as_str() {
                tell(&format!("{:?}, but {:?}", case["text"], texts[0].text));
            }
            if let (Some(trl), Some(training)) = (case["trl"].as_array(), &family.training) {
                let alike =
                    pieces.iter().map(|piece| piece.trim()).eq(trl.iter().map(|piece| piece.as_str().unwrap().trim()));
                if !alike && !UNLIKE_TRL.iter().any(|(name, _)| *name == family.name) {
                    tell(&format!("TRL trains {trl:?}, not {pieces:?}"));
                }
                match found(training) {
                    Ok((pieces, texts)) if json!(pieces) == json!(trl) && texts.len() == 1 => cases += 1,
                    found => tell(&format!("TRL: {trl:?}, but {found:?}")),
                }
            }
        }
    }
    assert!(wrong.is_empty(), "{wrong}");
    assert!(cases > 30);
}

#[test]
fn typed_control_words_of_published_templates_stay_text() {
    let golden = Golden::read();
    let mut wrong = String::new();
    for family in golden.families() {
        let case = &family.cases["typed"];
        let (Some(messages), Some(obeyed)) = (case["messages"].as_array(), case["obeyed"].as_array()) else { continue };
        let rendered = match family.template.render_prompt(messages, None, &family.control) {
            Ok(rendered) => rendered,
            Err(error) => {
                let _ = writeln!(wrong, "{}: {error:#}", family.name);
                continue;
            }
        };
        let control: Vec<&Control> = family.control.iter().collect();
        let typed = |span: &Range<usize>| rendered.literal.iter().any(|l| l.start < span.end && span.start < l.end);
        let found = marks::occurrences(&rendered.text, &control).into_iter().filter(|(span, _)| !typed(span));
        let found: Vec<&str> = found.map(|(_, i)| family.control[i].text.as_str()).collect();
        if found != obeyed.iter().map(|word| word.as_str().unwrap()).collect::<Vec<_>>() {
            let _ = writeln!(wrong, "{}:\n  {obeyed:?}\n  {found:?}\n  {:?}", family.name, rendered.text);
        }
    }
    assert!(wrong.is_empty(), "{wrong}");
}

/// Ids as the tokenizers that lie here give them; those of SmolLM2 are looked at where its model is tested.
#[test]
fn ids_and_masks_of_published_templates_are_those_of_transformers() {
    let golden = Golden::read();
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    let (mut cases, mut wrong) = (0, String::new());
    for (place, names) in golden.json["ids"].as_object().into_iter().flatten().filter(|(place, _)| *place != "smollm2")
    {
        let tokenizer = Tokenizer::from_dir(&root.join(place)).unwrap();
        for (name, titles) in names.as_object().unwrap() {
            let source = std::fs::read_to_string(folder().join(format!("{name}.jinja"))).unwrap();
            let tokens = [&tokenizer.bos_token, &tokenizer.eos_token].map(Option::as_deref);
            let template = ChatTemplate::new(&source, tokens[0], tokens[1]).unwrap();
            for (title, expected) in titles.as_object().unwrap() {
                let typed = title == "typed";
                let list = if typed { &golden.json["typed"] } else { &golden.json["conversations"][title] };
                let messages = list.as_array().unwrap();
                let control = tokenizer.control_in(messages, None).unwrap();
                let rendered = match typed {
                    true => template.render_prompt(messages, None, &control).unwrap(),
                    false => {
                        let marked = template
                            .render_marked(
                                &template.reads.prepare(messages).unwrap(),
                                Given::default(),
                                false,
                                &control,
                            )
                            .unwrap();
                        Rendered { text: marked.text, trained: marked.generated, literal: marked.literal }
                    }
                };
                let (ids, trained) = tokenize(&rendered, &tokenizer).unwrap();
                let same_mask = expected["trained"]
                    .as_array()
                    .is_none_or(|mask| mask.iter().map(|m| *m == 1).eq(trained.iter().copied()));
                if json!(ids) != expected["ids"] || !same_mask {
                    let (ids, mask) = (json!(ids), json!(trained));
                    let _ = writeln!(wrong, "{place} {name} {title}:\n  {expected}\n  {ids}\n  {mask}");
                }
                cases += 1;
            }
        }
    }
    assert!(wrong.is_empty(), "{wrong}");
    assert!(cases > 20 || golden.json["ids"] == json!({}));
}
