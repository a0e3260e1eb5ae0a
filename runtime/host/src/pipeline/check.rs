//! What can be said of a pipeline without running it: that what its parameters name is there, that its script compiles, that the
//! verbs, options and parameters it names exist, that values which are written down are of the right kind and in range, that files, models
//! and strategies named so are there, that no name is undeclared; and the same of the modules that it requires.
//!
//! No weights and no plugin are loaded. Of what only a run comes to, nothing is said.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow};
use mlua::Lua;
use serde_json::Value as Json;

use super::api::spec::{LOGS, METHODS, VERBS, Verb};
use super::api::{Session, named_problem, to_lua, words};
use super::bytecode::{Access, Functions, Global};
use super::config::PipelineConfig;
use super::errors::{nearest, short};
use super::sandbox::{Sandbox, module_path, script_text, shown};
use super::tokens::{KEYWORDS, Token, tokens};
use crate::models::{Network, not_there};
use crate::near::did_you_mean;

/// What the second part of a problem begins with.
const HINT: &str = "\nhint: ";

/// Problems that are told; of the others there is only a count.
const PROBLEMS_TOLD: usize = 50;

/// A script or a module of it.
struct Script {
    name: String,
    functions: Functions,
    tokens: Vec<(usize, Token)>,
}

/// Problems of one script, each with its line.
#[derive(Default)]
struct Found(Vec<(usize, String)>);

impl Found {
    fn add(&mut self, line: usize, problem: String) {
        self.0.push((line, problem));
    }

    fn extend(&mut self, line: usize, problem: Option<String>) {
        self.0.extend(problem.map(|problem| (line, problem)));
    }

    /// In the order of lines, each once.
    fn told(mut self, script: &str) -> Vec<String> {
        self.0.sort_by_key(|(line, _)| *line);
        let mut told: Vec<String> = self.0.into_iter().map(|(line, text)| format!("{script}:{line}: {text}")).collect();
        told.dedup();
        told
    }
}

/// Checks a pipeline's parameters, its script and the modules that it requires.
///
/// # Errors
/// All problems in one message, each with its file and line.
pub fn check(config: &PipelineConfig, sandbox: &Sandbox, session: &Session) -> Result<()> {
    let root = config.script.parent().context("a file has a directory")?;
    let mut problems: Vec<String> =
        config.named.iter().filter_map(|(name, path)| missing(config, session, name, path)).collect();
    let file = if problems.is_empty() { &config.script } else { &config.path };
    let (mut seen, mut todo, mut scripts) = (HashSet::new(), vec![config.script.clone()], Vec::new());
    while let Some(path) = todo.pop() {
        if !seen.insert(path.clone()) {
            continue;
        }
        if let Err(error) = sandbox.compile(&path) {
            problems.push(format!("{error:#}"));
            continue;
        }
        let text = script_text(&path)?;
        let functions = match Functions::of(&text) {
            Ok(functions) => functions,
            // It runs, and nothing more can be said of it.
            Err(error) => {
                problems.push(format!("{}: cannot be checked: {error:#}", shown(&path)));
                continue;
            }
        };
        let script = Script { name: shown(&path), tokens: tokens(&text), functions };
        let mut found = Found::default();
        todo.extend(required(&script.tokens, root, &mut found));
        scripts.push((script, found));
    }
    let hides_params = scripts.iter().any(|(script, _)| script.functions.declared("params") > 0);
    let mut known = Known { config, lua: sandbox.lua(), session, saved: None, hides_params };
    known.saved = saved_names(&known, scripts.iter().map(|(script, _)| script));
    let params: Vec<&str> = config.params.keys().map(String::as_str).collect();
    let provided = sandbox.names();
    for (script, mut found) in scripts {
        names(&script.functions, &script.tokens, &params, Some(&known), &mut found);
        globals(&script.functions, &script.tokens, &provided, &mut found);
        problems.extend(found.told(&script.name));
    }
    match problems.len() {
        0 => Ok(()),
        1 => Err(anyhow!(problems.remove(0))),
        count => {
            let more = count.saturating_sub(PROBLEMS_TOLD);
            problems.truncate(PROBLEMS_TOLD);
            // What to do is told behind all of them.
            let mut hints = Vec::new();
            for problem in &mut problems {
                let Some((what, hint)) = problem.split_once(HINT) else { continue };
                let hint = format!("{HINT}{hint}");
                if !hints.contains(&hint) {
                    hints.push(hint);
                }
                *problem = what.to_owned();
            }
            if more > 0 {
                problems.push(format!("and {more} more"));
            }
            Err(anyhow!("{}: {count} problems\n  {}{}", shown(file), problems.join("\n  "), hints.concat()))
        }
    }
}

/// What is wrong with what a parameter of type `path` or `model` names, if something is.
fn missing(config: &PipelineConfig, session: &Session, name: &str, path: &Path) -> Option<String> {
    let text = path.display().to_string();
    let is_of_hub = config.hub_models.iter().any(|(param, _)| param == name);
    let refusal = config.network(Network::Allowed).refusal();
    let problem = match session.locate(&text) {
        Ok(Some(_)) => return None,
        // A run downloads it.
        Ok(None) if is_of_hub && refusal.is_none() => return None,
        Ok(None) if path.is_absolute() => format!("there is no file or directory {}", text),
        Ok(None) => not_there(path, &refusal.unwrap_or_default()),
        Err(error) => format!("{error:#}"),
    };
    Some(format!("{}: {problem}", config.place(name)))
}

/// Names of verbs, options and parameters that are not there, and values of options that cannot be.
fn names(functions: &Functions, tokens: &[(usize, Token)], params: &[&str], known: Option<&Known>, found: &mut Found) {
    let name = |at: usize| match tokens.get(at) {
        Some((_, Token::Name(name))) => Some(name.as_str()),
        _ => None,
    };
    let is = |at: usize, symbol: char| tokens.get(at).is_some_and(|(_, token)| *token == Token::Symbol(symbol));
    let unknown = |what: &str, key: &str, known: &[&str]| {
        let hint = match nearest(key, known.iter().copied()) {
            Some(near) => format!(", did you mean `{near}`?"),
            None if known.is_empty() => "; it is empty".to_owned(),
            None => format!("; it has {}", known.join(", ")),
        };
        format!("`{what}` has no `{}`{hint}", short(key))
    };
    let call = |verb: &'static Verb, line: usize, from: usize, found: &mut Found| {
        let Some(given) = given(tokens, from) else { return };
        match known {
            Some(known) => known.options(verb, line, &given, found),
            None => given.options.iter().for_each(|(line, name, _)| found.extend(*line, verb.unknown(name))),
        }
    };
    let logs: Vec<&str> = LOGS.iter().map(|log| log.name).collect();
    let verbs: Vec<&str> = VERBS.iter().map(|verb| verb.name).chain(["log", "null"]).collect();
    // As the compiler sees them: also in texts with values, and not where a variable has the name.
    for Access { line, path } in functions.accesses() {
        let path: Vec<&str> = path.iter().map(String::as_str).collect();
        match path[..] {
            ["homeroom", "log", key, ..] if !logs.contains(&key) => {
                found.add(line, unknown("homeroom.log", key, &logs))
            }
            ["homeroom", key, ..] if !verbs.contains(&key) => found.add(line, unknown("homeroom", key, &verbs)),
            ["params", key, ..] if !params.contains(&key) => found.add(line, unknown("params", key, params)),
            _ => {}
        }
    }
    if functions.declared("homeroom") > 0 {
        return;
    }
    let mut datasets = Datasets::default();
    for (at, (line, _)) in tokens.iter().enumerate() {
        let is_field = at > 0 && (is(at - 1, '.') || is(at - 1, ':'));
        let Some(first) = name(at).filter(|_| !is_field) else { continue };
        if first == "homeroom"
            && is(at + 1, '.')
            && let Some(verb) = name(at + 2).and_then(|key| VERBS.iter().find(|verb| verb.name == key))
        {
            call(verb, *line, at + 3, found);
        }
        datasets.chain(tokens, at, &mut |method, at| call(method, tokens[at].0, at + 1, found));
        if first == "local" {
            datasets.learn(tokens, at, functions);
        }
    }
}

/// What an expression is, as far as it can be told.
#[derive(Clone, Copy, PartialEq)]
enum Value {
    /// What `prepare_dataset` returns.
    Prepared,
    Dataset,
    Unknown,
}

/// Variables that are datasets, or hold them, wherever they are in scope.
#[derive(Default)]
struct Datasets(HashMap<String, Value>);

impl Datasets {
    /// Learns what `local NAME = …` declares, if no other variable has the name and nothing else is assigned to it.
    fn learn(&mut self, tokens: &[(usize, Token)], at: usize, functions: &Functions) {
        let [(_, Token::Name(name)), (_, Token::Symbol('=')), ..] = &tokens[(at + 1).min(tokens.len())..] else {
            return;
        };
        let assigns =
            |pair: &[(usize, Token)]| matches!(pair, [(_, Token::Name(set)), (_, Token::Symbol('='))] if set == name);
        if functions.declared(name) != 1 || tokens.windows(2).filter(|pair| assigns(pair)).count() != 1 {
            return;
        }
        let (value, end) = self.chain(tokens, at + 3, &mut |_, _| {});
        let ends = match tokens.get(end) {
            None | Some((_, Token::Symbol(';'))) => true,
            Some((_, Token::Name(word))) => word != "and" && word != "or",
            _ => false,
        };
        if ends && value != Value::Unknown {
            self.0.insert(name.clone(), value);
        }
    }

    /// Follows the fields and calls behind a name: what they come to, and where they end. `method` gets the methods of datasets that are
    /// called, with the place of their names.
    fn chain(
        &self,
        tokens: &[(usize, Token)],
        start: usize,
        method: &mut dyn FnMut(&'static Verb, usize),
    ) -> (Value, usize) {
        let name = |at: usize| match tokens.get(at) {
            Some((_, Token::Name(name))) => name.as_str(),
            _ => "",
        };
        let is = |at: usize, symbol: char| tokens.get(at).is_some_and(|(_, token)| *token == Token::Symbol(symbol));
        let (mut value, mut at) =
            if name(start) == "homeroom" && is(start + 1, '.') && name(start + 2) == "prepare_dataset" {
                (Value::Prepared, arguments(tokens, start + 3))
            } else {
                (self.0.get(name(start)).copied().unwrap_or(Value::Unknown), Some(start + 1))
            };
        while let Some(from) = at.filter(|_| value != Value::Unknown) {
            let next = name(from + 1);
            if is(from, '.') && !is(from + 1, '.') {
                let is_part = value == Value::Prepared && (next == "train" || next == "eval");
                value = if is_part { Value::Dataset } else { Value::Unknown };
                at = Some(from + 2);
            } else if is(from, ':') {
                let called = METHODS.iter().find(|method| method.name == next).filter(|_| value == Value::Dataset);
                called.into_iter().for_each(|called| method(called, from + 1));
                let is_dataset = called.is_some_and(|called| called.returns == "Dataset");
                value = if is_dataset { Value::Dataset } else { Value::Unknown };
                at = arguments(tokens, from + 2);
            } else if is(from, '(') || is(from, '[') || is(from, '{') {
                value = Value::Unknown;
            } else {
                return (value, from);
            }
        }
        (Value::Unknown, tokens.len())
    }
}

/// Where the arguments of a call end; `None`: there are none.
fn arguments(tokens: &[(usize, Token)], from: usize) -> Option<usize> {
    match tokens.get(from)? {
        (_, Token::Text(_)) => Some(from + 1),
        (_, Token::Symbol('(' | '{')) => {
            let mut depth = 0_usize;
            let end = tokens[from..].iter().position(|(_, token)| {
                match token {
                    Token::Symbol('(' | '{' | '[') => depth += 1,
                    Token::Symbol(')' | '}' | ']') => depth = depth.saturating_sub(1),
                    _ => {}
                }
                depth == 0
            });
            end.map(|end| from + end + 1)
        }
        _ => None,
    }
}

/// Globals that nobody provides or declared, as the compiler sees them. Of one that is set, only that is told.
fn globals(functions: &Functions, tokens: &[(usize, Token)], known: &[String], found: &mut Found) {
    let all = functions.globals();
    let unknown = all.iter().filter(|global| !known.contains(&global.name));
    let is_set = |name: &str| all.iter().any(|global| global.is_set && global.name == name);
    let names: BTreeSet<&str> = tokens
        .iter()
        .filter_map(|(_, token)| match token {
            Token::Name(name) if !KEYWORDS.contains(&name.as_str()) => Some(name.as_str()),
            _ => None,
        })
        .collect();
    for global in unknown {
        let name = short(&global.name);
        if global.is_set {
            let declares = |pair: &[(usize, Token)]| {
                matches!(pair, [(line, Token::Name(word)), (_, Token::Name(named))]
                    if *line == global.line && word == "function" && *named == global.name)
            };
            let is_function = tokens.windows(2).any(declares);
            let how = if is_function { format!("local function {name}") } else { format!("local {name} = …") };
            found.add(global.line, format!("`{name}` is not declared; write `{how}`"));
        } else if !is_set(&global.name) {
            // Its own name may be near to that of a variable that is declared later, or elsewhere.
            let near = names.iter().copied().filter(|near| *near != global.name && !is_unknown(&all, known, near));
            let near = nearest(&global.name, known.iter().map(String::as_str).chain(near));
            found.add(global.line, format!("unknown name `{name}`{}", did_you_mean(near)));
        }
    }
}

fn is_unknown(globals: &[Global], known: &[String], name: &str) -> bool {
    globals.iter().any(|global| global.name == name) && !known.iter().any(|known| known == name)
}

/// Line, name and value of an option that is written as `name = value`.
type GivenOption<'a> = (usize, &'a str, &'a [(usize, Token)]);

/// The table of options that a call begins with, if it does: its keys, and the tokens of each value.
struct Given<'a> {
    options: Vec<GivenOption<'a>>,
    /// Whether it has only such options, so that what is not among them is not given.
    is_whole: bool,
}

fn given(tokens: &[(usize, Token)], from: usize) -> Option<Given<'_>> {
    let is = |at: usize, symbol: char| tokens.get(at).is_some_and(|(_, token)| *token == Token::Symbol(symbol));
    let open = if is(from, '(') { from + 1 } else { from };
    if !is(open, '{') {
        return None;
    }
    let mut given = Given { options: Vec::new(), is_whole: true };
    let (mut depth, mut blocks, mut start) = (0_usize, 0_usize, open + 1);
    for (at, (_, token)) in tokens.iter().enumerate().skip(open) {
        let mut item_ends = false;
        match token {
            Token::Symbol('{' | '(' | '[') => depth += 1,
            Token::Symbol('}' | ')' | ']') => {
                depth -= 1;
                item_ends = depth == 0;
            }
            Token::Symbol(',' | ';') => item_ends = depth == 1 && blocks == 0,
            Token::Name(word) => match word.as_str() {
                // An `if` of a value has no `end`: it stands behind what a value stands behind.
                "if" if is_value(tokens, at) => {}
                "function" | "if" | "do" | "repeat" => blocks += 1,
                "end" | "until" => blocks = blocks.saturating_sub(1),
                _ => {}
            },
            _ => {}
        }
        if item_ends {
            match &tokens[start..at] {
                [(line, Token::Name(name)), (_, Token::Symbol('=')), value @ ..]
                    if !matches!(value, [(_, Token::Symbol('=')), ..]) =>
                {
                    given.options.push((*line, name, value));
                }
                [] => {}
                _ => given.is_whole = false,
            }
            start = at + 1;
        }
        if depth == 0 {
            // An `if` of a value within another was taken for a statement: what stands behind it is not known.
            given.is_whole &= blocks == 0;
            return Some(given);
        }
    }
    None
}

/// Whether a value begins at a token, and not a statement.
fn is_value(tokens: &[(usize, Token)], at: usize) -> bool {
    let Some((_, before)) = at.checked_sub(1).and_then(|before| tokens.get(before)) else { return false };
    match before {
        Token::Symbol(symbol) => "=({[,+-*/%^.<>#".contains(*symbol),
        Token::Name(word) => matches!(word.as_str(), "return" | "and" | "or" | "not"),
        _ => false,
    }
}

/// What is known of a pipeline without running it.
struct Known<'a> {
    config: &'a PipelineConfig,
    lua: &'a Lua,
    session: &'a Session,
    /// Names that the script may save models under; `None`: they may be any.
    saved: Option<Vec<String>>,
    /// Whether a script has a variable named `params`, so that what is named so may be that.
    hides_params: bool,
}

impl Known<'_> {
    /// The value that some tokens are, if that can be told: a literal, a list of texts, or a parameter's value. A parameter that is not set
    /// has none.
    fn value(&self, tokens: &[(usize, Token)]) -> Option<Json> {
        let plain = |token: &Token| match token {
            Token::Text(text) => text.clone().map(Json::from),
            Token::Number(number) if number.is_finite() => Some((*number).into()),
            Token::Name(word) if word == "true" || word == "false" => Some((word == "true").into()),
            _ => None,
        };
        match tokens {
            [(_, token)] => plain(token),
            [(_, Token::Symbol('-')), (_, Token::Number(number))] => Some((-number).into()),
            [(_, Token::Name(params)), (_, Token::Symbol('.')), (_, Token::Name(name))]
                if params == "params" && !self.hides_params =>
            {
                self.config.params.get(name).filter(|value| !value.is_null()).cloned()
            }
            [(_, Token::Symbol('{')), items @ .., (_, Token::Symbol('}'))] => {
                let items = items.split(|(_, token)| matches!(token, Token::Symbol(',' | ';')));
                let items = items.filter(|item| !item.is_empty()).map(|item| match item {
                    [(_, token)] => plain(token),
                    _ => None,
                });
                items.collect::<Option<Vec<Json>>>().map(Json::Array)
            }
            _ => None,
        }
    }

    /// Whether a value is a parameter's that names a file or a model, of which it is told already that it is not there.
    fn is_told(&self, value: &[(usize, Token)]) -> bool {
        matches!(value, [_, _, (_, Token::Name(name))] if self.config.named.iter().any(|(named, _)| named == name))
    }

    /// What is wrong with the options of a call.
    fn options(&self, verb: &'static Verb, line: usize, given: &Given, found: &mut Found) {
        let mut names = Vec::new();
        for (line, name, value) in &given.options {
            let Some(option) = verb.option(name) else {
                found.extend(*line, verb.unknown(name));
                continue;
            };
            if names.contains(&option.name) {
                let all: Vec<String> = option.names().map(|name| format!("`{name}`")).collect();
                found.add(*line, format!("{}: {} are one option; give one of them", verb.name, all.join(" and ")));
            }
            names.push(option.name);
            let Some(plain) = self.value(value) else { continue };
            let Ok(shown) = to_lua(self.lua, &plain) else { continue };
            if !option.kind.admits(&shown) {
                let (wanted, shown) = (option.kind.words(), words(&shown));
                found.add(*line, format!("{}: `{name}` should be {wanted}, not {shown}", verb.name));
            } else if let Some(text) = plain.as_str().filter(|_| !self.is_told(value)) {
                let problem = named_problem(self.session, verb.name, option, text, self.saved.as_deref());
                found.extend(*line, problem);
            }
        }
        let is_given = |name: &str| names.contains(&name);
        if is_given("on_eval") && given.is_whole && !(is_given("eval") && is_given("eval_steps")) {
            found.add(line, format!("{}: `on_eval` is never called without `eval` and `eval_steps`", verb.name));
        }
        for option in verb.all().filter(|option| option.required && given.is_whole && !names.contains(&option.name)) {
            let wanted = option.kind.words();
            found.add(line, format!("{}: `{}` is missing; it should be {wanted}", verb.name, option.name));
        }
    }
}

/// The names that calls of `save_model` in some scripts give; `None`: one of them is not known.
fn saved_names<'a>(known: &Known, scripts: impl Iterator<Item = &'a Script>) -> Option<Vec<String>> {
    let mut names = Vec::new();
    for script in scripts {
        for (at, (_, token)) in script.tokens.iter().enumerate() {
            if *token == Token::Name("save_model".to_owned()) {
                let given = given(&script.tokens, at + 1)?;
                let (_, _, value) = given.options.iter().find(|(_, name, _)| *name == "name")?;
                names.push(known.value(value)?.as_str()?.to_owned());
            }
        }
    }
    Some(names)
}

/// The modules that a script requires by name.
fn required(tokens: &[(usize, Token)], scripts: &Path, found: &mut Found) -> Vec<PathBuf> {
    let mut modules = Vec::new();
    for (at, (line, token)) in tokens.iter().enumerate() {
        if *token != Token::Name("require".to_owned()) {
            continue;
        }
        let open = usize::from(tokens.get(at + 1).is_some_and(|(_, token)| *token == Token::Symbol('(')));
        if let Some((_, Token::Text(Some(name)))) = tokens.get(at + 1 + open) {
            match module_path(scripts, name) {
                Ok(path) => modules.push(path),
                Err(error) => found.add(*line, format!("{error:#}")),
            }
        }
    }
    modules
}

#[cfg(test)]
mod tests {
    use super::*;

    fn functions(text: &str) -> Functions {
        Functions::of(text).unwrap_or_else(|error| panic!("{text}: {error:#}"))
    }

    fn problems(text: &str) -> Vec<String> {
        let mut found = Found::default();
        names(&functions(text), &tokens(text), &["model", "dataset"], None, &mut found);
        found.told("s.lua")
    }

    #[test]
    fn names_that_are_not_there_are_told_by_line() {
        let cases = [
            ("homeroom.fine_tun {}", "s.lua:1: `homeroom` has no `fine_tun`, did you mean `fine_tune`?"),
            ("\n\nprint(params.modle)", "s.lua:3: `params` has no `modle`, did you mean `model`?"),
            (
                "homeroom.fine_tune {\n  epoch = 1 }",
                "s.lua:2: fine_tune: unknown option `epoch`, did you mean `epochs`?",
            ),
            ("homeroom.fine_tune({ lora_q = 1 })", "unknown option `lora_q`, did you mean `lora_r`?"),
            (
                "local d = homeroom.prepare_dataset { path = \"x\" }\nlocal t = d.train:filter(print)\nt:dedupe { by = \"x\" }:split { evla = 1 }",
                "s.lua:3: split: unknown option `evla`, did you mean `eval`?",
            ),
            (
                "homeroom.prepare_dataset { path = \"x\" }.train:concat { k = 1 }",
                "concat: unknown option `k`, it takes none",
            ),
            ("homeroom.log.wrn(\"x\")", "`homeroom.log` has no `wrn`, did you mean `warn`?"),
            ("print(`a {params.modle}`)", "`params` has no `modle`, did you mean `model`?"),
            ("--[[ x\n]] homeroom.nothing()", "s.lua:2: `homeroom` has no `nothing`; it has load_model"),
        ];
        for (text, expected) in cases {
            let found = problems(text);
            assert!(found.len() == 1 && found[0].contains(expected), "{text}: {found:?}");
        }
    }

    fn undeclared(text: &str) -> Vec<String> {
        let mut found = Found::default();
        let known = ["print", "pairs", "type", "homeroom", "params", "require"].map(str::to_owned);
        globals(&functions(text), &tokens(text), &known, &mut found);
        found.told("s.lua")
    }

    #[test]
    fn uses_of_what_is_not_declared_are_told_by_line() {
        for (text, expected) in [
            ("print(1)\nfoo()", "s.lua:2: unknown name `foo`"),
            ("prnt(1)", "unknown name `prnt`, did you mean `print`?"),
            ("g(1)", "s.lua:1: unknown name `g`"),
            ("local helper = 1\nprint(\"a\" .. helpr(2))", "s.lua:2: unknown name `helpr`, did you mean `helper`?"),
            ("x = 1", "s.lua:1: `x` is not declared; write `local x = …`"),
            ("if params.a then\n  count = 2 end", "s.lua:2: `count` is not declared"),
            ("print(function() best = 3 end)", "`best` is not declared"),
            ("function go() end go()", "`go` is not declared; write `local function go`"),
            ("local a = 1\nlocal t = { x = a,\n  y = modle }", "s.lua:3: unknown name `modle`"),
            ("local m = 1 return function() return `{m} {n}` end", "unknown name `n`"),
            ("do local x = 1 end return x", "unknown name `x`"),
        ] {
            let found = undeclared(text);
            assert!(found.len() == 1 && found[0].contains(expected), "{text}: {found:?}");
        }
    }

    #[test]
    fn what_is_declared_anywhere_before_is_left_alone() {
        for text in [
            "local x x = 1 local function f(g) g() return f(g) end f(print)",
            "local t = { x = 1, f = function(y) y = 2 end; z = { w = 3 } } t.q = 1 t.f(2) t:g()",
            "for i = 1, 3 do i = 2 end for k, v in pairs({}) do v(k) k = 1 end",
            "local a, b = 1, 2 a, b = b, a local s: string | number = 1 local h: (number) -> string = print",
            "type Row = { text: string } export type F<T> = (T) -> () local r: Row? = nil",
            "homeroom.fine_tune { on_step = function(report) return not (report.loss > 1) end }",
            "local n = 1 n += 2 print(n == 2) if (n) then return (n) end",
            "local m = require(\"lib/m\") m.go() -- foo()\nprint([[ x = 1 ]], `{m()}`)",
        ] {
            assert_eq!(undeclared(text), [""; 0], "{text}");
        }
    }

    #[test]
    fn a_table_of_options_is_read_as_far_as_it_can_be_told() {
        for (text, names, is_whole) in [
            ("{ a = 1, b = if x then 2 else 3, c = function() if x then return 1 end end; d = {} }", "a b c d", true),
            ("({ a = 1, })", "a", true),
            ("{ a = 1, 2, b = 3 }", "a b", false),
            ("{ a = 1, [b] = 3 }", "a", false),
            ("{ a = if x then if y then 1 else 2 else 3, b = 4 }", "a", false),
            ("{ a == 1 }", "", false),
            ("{}", "", true),
        ] {
            let tokens = tokens(text);
            let given = given(&tokens, 0).expect("a table");
            let found: Vec<&str> = given.options.iter().map(|(_, name, _)| *name).collect();
            assert_eq!((found.join(" ").as_str(), given.is_whole), (names, is_whole), "{text}");
        }
        assert!(given(&tokens("(options)"), 0).is_none() && given(&tokens("{ a = 1"), 0).is_none());
    }

    #[test]
    fn what_is_not_an_option_is_left_alone() {
        for text in [
            "homeroom.fine_tune { on_step = function(r) local n = 1; n = 2; if n == 3 then n = 4 end end, epochs = 1 }",
            "homeroom.load_model { name = params.model, options = { anything = 1, rank = { x = 2 } }, lora_r = 3 }",
            "-- homeroom.typo {}\nlocal s = \"homeroom.typo params.typo\" .. [==[ params.typo ]] ]==]",
            "local t = { params = { typo = 1 } } print(t.params.typo)",
            "homeroom.log.info(\"x\", { anything = 1 })",
            "f(x == 1, { epoch = 2 })",
            "local function f(params) return params.nothing end local homeroom = { go = f } homeroom.go {} homeroom.fine_tune { x = 1 }",
            "for _, params in {} do print(params.nothing) end",
            "local t = { filter = print, sample = print, split = print } t:filter { k = 1 } t:sample { k = 1 } t:split { k = 1 }",
            "local d = homeroom.prepare_dataset { path = \"x\" } do local d = { train = {} } d.train:split { k = 1 } end",
            "local d = homeroom.prepare_dataset { path = \"x\" }.train d = {} d:split { k = 1 }",
            "local n = #homeroom.prepare_dataset { path = \"x\" }.train:rows() print(n)",
        ] {
            assert_eq!(problems(text), [""; 0], "{text}");
        }
    }
}
