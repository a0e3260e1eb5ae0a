//! Files that are right, and all that is wrong with others.

use anyhow::Context as _;

use super::*;
use crate::handler::{Context as RequestContext, HandlerError, Kind, Request};

const GOOD: &str = r#"
[handlers.near]
kind = "local"
model = "algebra-tutor"

[handlers.far]
kind = "openai"
base_url = "https://api.example.com/v1/"
model = "gpt-x"
api_key = { env = "HOMEROOM_TEST_KEY_THAT_IS_NOT_SET" }

[handlers.beside]
kind = "openai"
base_url = "http://localhost:11434/v1"
model = "x"

[routes.safe]
handlers = ["near", "beside"]

[routes.open]
handlers = ["near", "far"]
egress = "allow"
"#;

fn problems(text: &str) -> String {
    let error = Config::parse(Path::new("h.toml"), text).expect_err("it is wrong");
    format!("{error:#}")
}

#[test]
fn a_file_says_which_handlers_there_are() -> Result<()> {
    let config = Config::parse(Path::new("h.toml"), GOOD)?;
    assert_eq!(config.routes["open"], ["near", "far"]);
    assert_eq!(
        config.handlers["near"],
        HandlerSpec::Local(ModelRef { name: "algebra-tutor".into(), ..ModelRef::default() }, Compute::Auto)
    );
    assert_eq!(config.handlers["far"].far_host(), Some("api.example.com"));
    assert_eq!(config.handlers["beside"].far_host(), None);
    let handlers = Handlers::new(config);
    let refused = |name: &str| format!("{:#}", handlers.get(name).err().expect("it cannot be had"));
    assert!(refused("far").contains("HOMEROOM_TEST_KEY_THAT_IS_NOT_SET"), "{}", refused("far"));
    assert!(refused("naer").contains("did you mean `near`?"), "{}", refused("naer"));
    assert!(refused("near").contains("no such model"), "{}", refused("near"));
    assert!(handlers.get("beside").is_ok());
    Ok(())
}

/// The server goes on without it: other handlers, and other routes, are served.
#[test]
fn a_handler_without_its_key_is_disabled_and_says_so_when_it_is_asked() -> Result<()> {
    let refused = |text: &str, name: &str| -> Result<HandlerError> {
        let handlers = Handlers::new(Config::parse(Path::new("h.toml"), text)?);
        let served = handlers.served()?;
        let asked = served[name].complete(&Request::default(), &RequestContext::default());
        asked.err().context("it has no key")
    };
    const KEY: &str = "api_key = { env = \"HOMEROOM_TEST_KEY_THAT_IS_NOT_SET\" }\n";
    let endpoint = |name: &str, more: &str| {
        format!("[handlers.{name}]\nkind = \"openai\"\nbase_url = \"http://127.0.0.1:1/v1\"\nmodel = \"m\"\n{more}")
    };
    let far = endpoint("far", KEY) + "[routes.tutor]\nhandlers = [\"far\"]\n";
    let one = refused(&far, "tutor")?;
    assert_eq!(one.kind, Kind::Unavailable);
    let words = "no handler of `tutor` is enabled: `far`: api_key: the environment variable HOMEROOM_TEST_KEY_THAT_IS_NOT_SET is not set";
    assert!(one.to_string().contains(words), "{one}");
    assert!(one.message.contains("`tutor` is not ready to answer") && !one.message.contains("KEY"), "{one:?}");
    // What it holds is not shown, in case it is half a key.
    let other = far.replace("HOMEROOM_TEST_KEY_THAT_IS_NOT_SET", "CARGO_PKG_DESCRIPTION");
    let other = refused(&other, "tutor")?.to_string();
    assert!(other.contains("CARGO_PKG_DESCRIPTION holds is not a key") && !other.contains("open-weight"), "{other}");
    // The next handler of the route is asked, and an unset key of a handler that no route names is nobody's concern.
    let two = endpoint("beside", "") + &far.replace("[\"far\"]", "[\"far\", \"beside\"]");
    let two = refused(&two, "tutor")?.to_string();
    assert!(two.contains("127.0.0.1:1") && !two.contains("KEY"), "{two}");
    let own = endpoint("beside", KEY);
    assert!(refused(&own, "beside")?.to_string().starts_with("`beside` is disabled: api_key: "));
    Ok(())
}

#[test]
fn all_that_is_wrong_is_said_at_once() {
    let all = problems(
        r#"
[handlers.a]
kind = "lokal"

[handlers.b]
kind = "openai"
base_ulr = "https://api.example.com"
model = 7
api_key = "sk-secret"

[handlers.c]
kind = "local"
model = "x"
any_base = "yes"
compute = "f23"

[handlers.d]
model = "x"

[handlers.e]
kind = "openai"
base_url = "api.example.com"
model = "x"
read_timeout_s = 0
temperature = 3
system = "x"
system_file = "y"
retry = 3
breaker = { failure = 3, open_s = 0.0 }
words = [{ list = ["x"], file = "y" }, { list = [] }, { file = "x", action = "refus" }, { file = "x", in = ["answers"] }]

[handlers.f]
kind = "replay"
match = "oder"

[route.x]
[routes.a]
handlers = ["cc", "c", "c"]
fallback_on = ["timeouts"]
context_fallback = []
retry = { max = 1 }
[routes.y]
handlers = []
egress = "dney"
[routes.z]
"#,
    );
    for wanted in [
        "31 problems",
        "`lokal`: unknown kind, did you mean `local`?",
        "`base_ulr`: unknown key, did you mean `base_url`?",
        "[handlers.b]: `base_url` is missing",
        "`model`: is a whole number, should be a text in quotes",
        "a key does not belong in the file",
        "`any_base`: is a text, should be true or false",
        "`compute`: `f23` is unknown",
        "[handlers.d]: `kind` is missing",
        "`base_url`: an address begins with",
        "`read_timeout_s`: should be from 1 to 3600",
        "`route`: unknown key, did you mean `routes`?",
        "`cc`: there is no such handler, did you mean `c`?",
        "`c`: is in the list twice",
        "`fallback_on`: `timeouts` is unknown, did you mean `timeout`?",
        "`context_fallback`: the list is empty",
        "`temperature`: should be from 0 to 2",
        "`system_file`: there is a `system` already",
        "`retry`: is a whole number, should be a table with max, base_s, cap_s",
        "`failure`: unknown key, did you mean `failures`?",
        "`open_s`: should be from 0.001 to 86400",
        "`words`: should have either `list` or `file`",
        "`list`: the list has no word",
        "`action`: `refus` is unknown, did you mean `refuse`?",
        "`in`: `answers` is unknown, did you mean `answer`?",
        "`match`: `oder` is unknown, did you mean `order`?",
        "[handlers.f]: `file` is missing",
        "`retry`: unknown key",
        "`handlers`: the list is empty",
        "`dney` is unknown, did you mean `deny`?",
        "the route has no `handlers`",
        "`a`: a handler has this name already",
    ] {
        assert!(all.contains(wanted), "{wanted}\nis not in\n{all}");
    }
    assert!(!all.contains("sk-secret"), "{all}");
}

/// A key that is written and changes nothing misleads: each is read, or refused by name.
#[test]
fn each_key_changes_a_handler_of_each_kind_or_is_refused() -> Result<()> {
    const VALUES: [(&str, &str); 28] = [
        ("model", "\"other\""),
        ("base_model", "\"base\""),
        ("any_base", "true"),
        ("compute", "\"f32\""),
        ("base_url", "\"http://127.0.0.1:2/v1\""),
        ("api_key", "{ env = \"A_KEY\" }"),
        ("connect_timeout_s", "7"),
        ("read_timeout_s", "7"),
        ("answer_timeout_s", "7"),
        ("max_tokens_param", "\"max_completion_tokens\""),
        ("api_version", "\"2026-10-21\""),
        ("unsupported", "\"drop\""),
        ("file", "\"other.jsonl\""),
        ("match", "\"order\""),
        ("system", "\"Be kind.\""),
        ("system_file", "\"tutor.md\""),
        ("max_tokens", "7"),
        ("temperature", "0.5"),
        ("top_p", "0.5"),
        ("stop", "[\"x\"]"),
        ("words", "{ list = [\"x\"] }"),
        ("log", "\"log.jsonl\""),
        ("first_token_timeout_s", "7"),
        ("idle_timeout_s", "7"),
        ("limits", "{ running = 1 }"),
        ("retry", "{ max = 1 }"),
        ("breaker", "{ failures = 1 }"),
        ("record", "\"answers.jsonl\""),
    ];
    let all = [&local::KEYS[..], &openai::KEYS, &anthropic::KEYS, &replay::KEYS, &settings::HANDLER_KEYS].concat();
    for key in all.into_iter().filter(|key| *key != "kind") {
        assert!(VALUES.iter().any(|(known, _)| *known == key), "`{key}` has no value here");
    }
    let replay = ["system", "system_file", "max_tokens", "temperature", "top_p", "stop"];
    /// A kind, what it needs, and what it refuses.
    type Of<'a> = (&'a str, &'a [(&'a str, &'a str)], &'a [&'a str]);
    let kinds: [Of<'_>; 5] = [
        ("local", &[("model", "\"x\"")], &[]),
        ("openai", &[("model", "\"x\""), ("base_url", "\"http://127.0.0.1:1/v1\"")], &[]),
        ("anthropic", &[("model", "\"x\"")], &[]),
        ("anthropic", &[("model", "\"x\""), ("api_version", "\"2026-10-21\"")], &["temperature", "top_p"]),
        ("replay", &[("file", "\"x.jsonl\"")], &replay),
    ];
    for (kind, base, refused) in kinds {
        let own: &[&str] = match kind {
            "local" => &local::KEYS,
            "openai" => &openai::KEYS,
            "anthropic" => &anthropic::KEYS,
            _ => &replay::KEYS,
        };
        let parsed = |key: &str, value: &str| {
            let line = |(key, value): &(&str, &str)| format!("{key} = {value}\n");
            let lines: String = base.iter().filter(|(other, _)| *other != key).map(line).collect();
            let more = if key.is_empty() { String::new() } else { format!("{key} = {value}\n") };
            Config::parse(Path::new("h.toml"), &format!("[handlers.h]\nkind = \"{kind}\"\n{lines}{more}"))
        };
        let plain = parsed("", "")?;
        for (key, value) in VALUES.into_iter().filter(|line| !base.contains(line)) {
            let is_known = own.contains(&key) || settings::HANDLER_KEYS.contains(&key);
            match parsed(key, value) {
                Ok(changed) => assert!(
                    is_known && !refused.contains(&key) && changed != plain,
                    "{kind}: `{key}` is taken, and changes nothing"
                ),
                Err(error) => {
                    let error = format!("{error:#}");
                    let is_right = !is_known || refused.contains(&key);
                    assert!(is_right && error.contains(&format!("`{key}`")), "{kind}: `{key}`: {error}");
                }
            }
        }
    }
    Ok(())
}

/// An embedding model is known by its files, which are read when it is loaded.
#[test]
fn an_embedding_model_refuses_what_only_answers_have() -> Result<()> {
    let model = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures/embeddings/bert");
    let load = |more: &str| {
        let text = format!("[handlers.e]\nkind = \"local\"\nmodel = {model:?}\n{more}\n");
        Handlers::new(Config::parse(Path::new("h.toml"), &text)?).get("e").map(drop)
    };
    load("words = { list = [\"x\"] }\nanswer_timeout_s = 3\nlimits = { running = 1 }\nretry = { max = 1 }")?;
    for (more, key) in [
        ("temperature = 0.5", "`temperature`"),
        ("system = \"Be kind.\"", "`system`"),
        ("stop = [\"x\"]", "`stop`"),
        ("idle_timeout_s = 3", "`idle_timeout_s`"),
        ("record = \"a.jsonl\"", "`record`"),
        ("words = { list = [\"x\"], action = \"replace\" }", "`words`"),
    ] {
        let refused = format!("{:#}", load(more).expect_err(more));
        assert!(refused.contains(&format!("{key} is of answers")), "{refused}");
    }
    Ok(())
}

#[test]
fn denied_egress_is_an_error_of_the_file() {
    let denied = GOOD.replace("egress = \"allow\"", "egress = \"deny\"");
    let all = problems(&denied);
    assert!(all.contains("1 problem\n") && all.contains("api.example.com, and egress is \"deny\""), "{all}");
    let default = GOOD.replace("egress = \"allow\"\n", "");
    assert!(problems(&default).contains("egress is \"deny\""));
    // Nor does a host that only looks like this machine pass.
    let alike = GOOD.replace("http://localhost:11434", "http://localhost.example.com");
    assert!(problems(&alike).contains("localhost.example.com, and egress"));
}

#[test]
fn a_key_in_the_wrong_place_is_never_printed() {
    let file = |line: &str| {
        format!("[handlers.c]\nkind = \"openai\"\nbase_url = \"https://api.example.com\"\nmodel = \"m\"\n{line}\n")
    };
    for (line, wanted) in [
        (r#"apikey="sk-REAL-é""#, "`apikey`: unknown key, did you mean `api_key`?"),
        (r#"key="AIzaREAL""#, "`key`: unknown key"),
        (r#"headers={Authorization="Bearer sk-REAL"}"#, "`headers`: unknown key"),
        (r#"api_key={value="sk-REAL"}"#, "`value`: unknown key"),
        (r#"api_key={sk-REAL="x"}"#, "`[key]`: unknown key"),
        (r#"api_key={env="sk-proj-REAL"}"#, "`env`: should be the name of an environment variable"),
        (r#"api_key={env="AIzaSyREAL0123456789abc"}"#, "`env`: should be the name of an environment variable"),
        (r#"api_key={env="gsk_REAL0123456789abcdef"}"#, "`env`: should be the name of an environment variable"),
        ("api_key={env=\"A_KEY\"}\napi_key=\"REAL\"", "this key is there already"),
        ("api_key=sk-REAL", "quotes"),
        ("api_key=\"REAL", "line 5"),
        (r#"model="sk-REAL" # REAL"#, "this key is there already"),
        (r#"kind="sk-REAL""#, "this key is there already"),
        (r#"read_timeout_s="x" # REAL"#, "`read_timeout_s`: is a text"),
        ("notes=[\n\"REAL\",\n7 7]", "line 7"),
        ("[routes.r]\nhandlers={c={apikey=\"REAL\"}}", "`handlers`: is a table"),
        ("[handlers.d]\nkind=\"sk-REAL\"", "`[key]`: unknown kind"),
        ("[handlers.d]\nkind=\"openai\"\nmodel=\"m\"\nbase_url=\"https://a.b/v1?key=REAL\"", "`?` or `#`"),
        ("[handlers.d]\nkind=\"openai\"\nmodel=\"m\"\nbase_url=\"https://REAL@a.b/v1\"", "use api_key"),
    ] {
        let all = problems(&file(line));
        assert!(all.contains(wanted) && !all.contains("REAL"), "{line}: {wanted}\n{all}");
    }
    // What cannot be a key is shown.
    let all = problems("[handlers.x]\nkind = \"local\"\nmodel = \"m\"\ncompute = \"f23\"\n");
    assert!(all.contains("4 | compute = \"f23\""), "{all}");
}
