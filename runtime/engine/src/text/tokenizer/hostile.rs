//! Tokenizer files that would fill or hang the program, each refused in words by one process.

use std::path::Path;
use std::sync::mpsc;
use std::thread;

use serde_json::{Value, json};

use super::directory::read_tokenizer_json;

/// A small byte-level tokenizer, as a file.
fn file() -> Value {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures/models/llama/tokenizer.json");
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

/// What is said when the file is read.
fn refusal(file: &Value) -> String {
    match read_tokenizer_json(file.to_string().as_bytes()) {
        Ok(_) => "is read".into(),
        Err(error) => format!("{error:#}"),
    }
}

/// Changes a key of the file, and a part of what is said about it.
fn check(cases: Vec<(&str, Value, &str)>) {
    let mut wrong = Vec::new();
    for (key, value, expected) in cases {
        let mut file = file();
        file[key] = value.clone();
        let said = refusal(&file);
        if !said.contains(expected) {
            let shown: String = value.to_string().chars().take(200).collect();
            wrong.push(format!("{key}: {shown}\n  {said}\n  does not say {expected:?}"));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

fn replace(pattern: Value, content: &str) -> Value {
    json!({"type": "Replace", "pattern": pattern, "content": content})
}

fn sequence(steps: Vec<Value>) -> Value {
    json!({"type": "Sequence", "normalizers": steps})
}

/// The bytes of a charsmap as base64.
fn charsmap(bytes: &[u8]) -> Value {
    const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut text = String::new();
    for chunk in bytes.chunks(3) {
        let bits = chunk.iter().fold(0u32, |bits, byte| bits << 8 | u32::from(*byte)) << (8 * (3 - chunk.len()));
        for digit in 0..=chunk.len() {
            text.push(DIGITS[(bits >> (18 - 6 * digit)) as usize & 63] as char);
        }
    }
    while !text.len().is_multiple_of(4) {
        text.push('=');
    }
    json!({"type": "Precompiled", "precompiled_charsmap": text})
}

/// A short token may be normalized to a long one.
#[test]
fn added_tokens_are_bounded_as_they_are_normalized() {
    let mut file = file();
    let token = |i: u32| {
        json!({"id": 320 + i, "content": format!("{i:0100}"), "single_word": false, "lstrip": false, "rstrip": false,
            "normalized": true, "special": true})
    };
    file["added_tokens"] = (0..1000).map(token).collect();
    file["normalizer"] = replace(json!({"String": "0"}), &"b".repeat(64));
    let said = refusal(&file);
    assert!(said.starts_with("added_tokens: have "), "{said}");
}

#[test]
fn what_a_file_asks_for_is_bounded() {
    let padding = |strategy: Value| {
        json!({"strategy": strategy, "direction": "Right", "pad_to_multiple_of": null, "pad_id": 0,
            "pad_type_id": 0, "pad_token": "<|endoftext|>"})
    };
    let multiple = json!({"strategy": "BatchLongest", "direction": "Right", "pad_to_multiple_of": 10_000_000_000u64,
        "pad_id": 0, "pad_type_id": 0, "pad_token": "<|endoftext|>"});
    let huge = [&u32::MAX.to_le_bytes()[..], b"abcd"].concat();
    let cut = [&64u32.to_le_bytes()[..], b"abcd"].concat();
    let wide = [&4u32.to_le_bytes()[..], &[0; 4], "x".repeat(1 << 20).as_bytes()].concat();
    let added = |content: String, id: u32| {
        json!([{"id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
            "normalized": false, "special": true}])
    };
    let many: Vec<Value> = (0..200_001).map(|i| added(format!("<{i}>"), 320)[0].clone()).collect();
    let template = |single: Value, ids: usize| {
        json!({"type": "TemplateProcessing", "single": single, "pair": [], "special_tokens":
            {"a": {"id": "a", "ids": vec![0; ids], "tokens": vec!["a"; ids]}}})
    };
    let text = json!({"Sequence": {"id": "A", "type_id": 0}});
    let token = json!({"SpecialToken": {"id": "a", "type_id": 0}});
    let deep = (0..40).fold(json!({"type": "NFC"}), |inner, _| sequence(vec![inner]));
    let byte_level = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true});
    let digits = json!({"type": "Digits", "individual_digits": true});
    let metaspace = json!({"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": true});
    let mixed = [&digits, &byte_level, &digits, &byte_level, &digits, &metaspace];
    let nfkc = [&4u32.to_le_bytes()[..], &[0; 4], "x".repeat(16).as_bytes(), &[0]].concat();
    let long: Vec<Value> = (0..5000).map(|i| added(format!("{i:0900}"), 320 + i)[0].clone()).collect();
    let unigram = |piece: String| json!({"type": "Unigram", "unk_id": 0, "vocab": [["a", 0.0], [piece, -1.0]]});
    let mut white = added(" ".into(), 320);
    (white[0]["lstrip"], white[0]["rstrip"]) = (json!(true), json!(true));
    check(vec![
        // Switched off before they act.
        ("padding", padding(json!({"Fixed": 10_000_000_000u64})), "is read"),
        ("padding", multiple, "is read"),
        (
            "truncation",
            json!({"direction": "Right", "max_length": 0, "strategy": "LongestFirst", "stride": 0}),
            "is read",
        ),
        ("normalizer", charsmap(&huge), "a trie of 4294967295 bytes"),
        ("normalizer", charsmap(&cut), "a trie of 64 bytes, 4 are there"),
        ("normalizer", charsmap(b"ab"), "its charsmap is cut short"),
        ("normalizer", charsmap(&wide), "puts up to 1048576 bytes in place of a character"),
        ("normalizer", json!({"type": "Precompiled", "precompiled_charsmap": "?"}), "is not base64"),
        ("normalizer", json!({"type": "Prepend", "prepend": "x".repeat(1 << 20)}), "its prepend has 1048576 bytes"),
        ("normalizer", sequence(vec![json!({"type": "Prepend", "prepend": "xxxx"}); 40]), "68 bytes are prepended"),
        (
            "normalizer",
            sequence(vec![replace(json!({"String": "a"}), "aa"); 40]),
            "makes a text up to 128 times longer",
        ),
        ("normalizer", sequence(vec![replace(json!({"Regex": "."}), "aaaaaaaaa"); 3]), "81 times longer"),
        ("normalizer", replace(json!({"String": "a"}), &"b".repeat(1025)), "its content has 1025 bytes"),
        ("normalizer", replace(json!({"String": ""}), "b"), "its pattern is empty"),
        ("normalizer", replace(json!({"Regex": ""}), "b"), "its pattern is empty"),
        ("normalizer", replace(json!({"Regex": "(a+)+(?!b)$"}), "b"), "repeats what repeats and looks around"),
        (
            "normalizer",
            replace(json!({"Regex": "(?=(((a?){16}){16}){16}b)a"}), "b"),
            "looks around and repeats up to 4096 times",
        ),
        (
            "normalizer",
            replace(json!({"Regex": "(?!x)(((a?){16}){16}){16}b"}), "b"),
            "looks around and repeats up to 4096 times",
        ),
        ("normalizer", replace(json!({"Regex": "(?=a*a*a*a*b)a"}), "b"), "repeats where it looks around"),
        ("normalizer", replace(json!({"Regex": "(?!(a+)[b](?=c*))a"}), "b"), "repeats where it looks around"),
        ("normalizer", replace(json!({"Regex": "(?<=a*)b"}), "b"), "repeats where it looks around"),
        ("normalizer", replace(json!({"Regex": "x|(?<!(?:a{2,})c)b"}), "b"), "repeats where it looks around"),
        (
            "normalizer",
            replace(json!({"Regex": format!("(?={})a", "a?".repeat(300))}), "b"),
            "looks around for a pattern of 603 bytes",
        ),
        ("normalizer", replace(json!({"Regex": "(?:a|a)*(?=b)"}), "b"), "repeats what repeats and looks around"),
        ("normalizer", replace(json!({"Regex": "((a*)*)\\2c"}), "b"), "repeats what repeats and looks around"),
        ("normalizer", replace(json!({"Regex": "((a{100}){100}){100}"}), "b"), "repeats up to 1000000 times"),
        ("normalizer", replace(json!({"Regex": "a{99999999999999999999}"}), "b"), "its pattern repeats"),
        ("normalizer", replace(json!({"Regex": "(".repeat(5000)}), "b"), "at most 100 deep"),
        ("normalizer", replace(json!({"Regex": "a".repeat(20_000)}), "b"), "its pattern has 20000 bytes"),
        ("normalizer", sequence(vec![json!({"type": "NFC"}); 100]), "has more than 64 steps"),
        ("normalizer", deep, "at most 8 deep"),
        (
            "pre_tokenizer",
            json!({"type": "Sequence", "pretokenizers": vec![digits.clone(); 100]}),
            "more than 64 steps",
        ),
        ("normalizer", sequence(vec![json!({"type": "ByteLevel"}); 3]), "at most 2 steps of this kind"),
        (
            "normalizer",
            sequence(vec![json!({"type": "ByteLevel"}), replace(json!({"String": "a"}), &"b".repeat(33))]),
            "66 times longer",
        ),
        ("normalizer", sequence(vec![charsmap(&nfkc); 3]), "at most 2 steps of this kind"),
        (
            "normalizer",
            sequence(vec![charsmap(&nfkc), replace(json!({"Regex": "."}), &"b".repeat(33))]),
            "66 times longer",
        ),
        (
            "pre_tokenizer",
            json!({"type": "Sequence", "pretokenizers": vec![byte_level.clone(); 3]}),
            "at most 2 steps of this kind",
        ),
        ("pre_tokenizer", json!({"type": "Sequence", "pretokenizers": mixed}), "at most 2 steps of this kind"),
        ("pre_tokenizer", json!({"type": "FixedLength", "length": 0}), "its length is 0"),
        (
            "pre_tokenizer",
            json!({"type": "Split", "pattern": {"Regex": "(\\s+\\s+)+(?!x)"}, "behavior": "Isolated", "invert": false}),
            "repeats what repeats",
        ),
        (
            "pre_tokenizer",
            json!({"type": "Split", "pattern": {"String": ""}, "behavior": "Isolated", "invert": false}),
            "its pattern is empty",
        ),
        (
            "decoder",
            json!({"type": "Sequence", "decoders": vec![replace(json!({"String": "a"}), "aa"); 40]}),
            "128 times longer",
        ),
        (
            "decoder",
            json!({"type": "Strip", "content": " ", "start": 0, "stop": u64::MAX}),
            "its stop is 18446744073709551615",
        ),
        ("post_processor", template(json!([text, text, text]), 1), "its text 3 times"),
        ("post_processor", template(json!(vec![token.clone(); 100]), 1), "its single has 100 pieces"),
        ("post_processor", template(json!([token, text]), 100_000), "stands for 100000 ids"),
        ("post_processor", template(json!("a a $A:0 $A:0 $A:0"), 1), "its text 3 times"),
        ("post_processor", json!({"type": "Sequence", "processors": vec![byte_level; 100]}), "more than 64 steps"),
        ("added_tokens", json!(many), "has 200001"),
        ("added_tokens", added("x".repeat(5000), 320), "number 0 has 5000 bytes"),
        ("added_tokens", added("<x>".into(), u32::MAX), "has id 4294967295"),
        ("added_tokens", json!(long), "have 4500000 bytes"),
        ("added_tokens", white, "number 0 is white space and takes in the white space around it"),
        ("model", unigram("a".repeat(60_000)), "its vocab has a piece of 60000 bytes"),
        ("model", unigram("é".repeat(129)), "its vocab has a piece of 258 bytes"),
        (
            "model",
            json!({"type": "WordPiece", "unk_token": "a", "continuing_subword_prefix": "##",
            "max_input_chars_per_word": 201, "vocab": {"a": 0}}),
            "max_input_chars_per_word is 201",
        ),
    ]);
}

/// The parts of published tokenizers: Llama 3, GPT-4o, DeepSeek-V3, Llama 2, T5 and Gemma.
#[test]
fn what_published_files_ask_for_is_given() {
    let split =
        |regex: &str| json!({"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": false});
    let llama3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
    let gpt4o = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";
    let cl100k = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+";
    let deepseek = r##"[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"##;
    let thousands = r"\p{N}{1,3}(?=(?:\p{N}{3})*(?:\P{N}|$))|(?=(\d{3})+(?!\d))";
    let byte_level = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false});
    check(vec![
        ("pre_tokenizer", split(thousands), "is read"),
        ("pre_tokenizer", json!({"type": "Sequence", "pretokenizers": [split(llama3), byte_level]}), "is read"),
        ("pre_tokenizer", split(llama3), "is read"),
        ("pre_tokenizer", split(gpt4o), "is read"),
        ("pre_tokenizer", split(cl100k), "is read"),
        (
            "pre_tokenizer",
            json!({"type": "Sequence", "pretokenizers": [split(r"\p{N}{1,3}"), split("[一-龥぀-ゟ゠-ヿ]+"), split(deepseek)]}),
            "is read",
        ),
        (
            "normalizer",
            sequence(vec![json!({"type": "Prepend", "prepend": "▁"}), replace(json!({"String": " "}), "▁")]),
            "is read",
        ),
        (
            "normalizer",
            sequence(vec![
                json!({"type": "Strip", "strip_left": false, "strip_right": true}),
                replace(json!({"Regex": " {2,}"}), "▁"),
            ]),
            "is read",
        ),
        ("normalizer", json!({"type": "NFKC"}), "is read"),
    ]);
}

/// Run by the test below, in a process of its own, whose standard error it reads.
#[test]
#[ignore = "panics on purpose"]
fn panics() {
    let (send, receive) = mpsc::channel();
    let other = thread::spawn(move || {
        receive.recv().unwrap();
        panic!("words of another thread");
    });
    let done: Option<()> = crate::guard::quietly(|| {
        send.send(()).unwrap();
        assert!(other.join().is_err());
        panic!("words of the library");
    });
    assert_eq!(done, None);
    panic!("words of ours");
}

/// A damaged file makes the library panic; of that only our own error is said. Panics elsewhere are reported as ever,
/// at the same time too.
#[test]
fn a_panic_inside_prints_nothing_of_itself() {
    let test = std::env::current_exe().unwrap();
    let args = ["--ignored", "--exact", "--nocapture", "text::tokenizer::hostile::panics"];
    let output = std::process::Command::new(test).args(args).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(said.contains("words of another thread") && said.contains("words of ours"), "{said}");
    assert!(!said.contains("words of the library"), "{said}");
}
