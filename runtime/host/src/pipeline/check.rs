//! What can be said of a pipeline without running it: that what its parameters name is there, that its script compiles, that the
//! verbs, options and parameters it names exist, and the same of the modules that it requires.

use std::collections::HashSet;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow};

use super::api::Session;
use super::api::spec::{METHODS, VERBS, Verb};
use super::config::PipelineConfig;
use super::errors::{nearest, short};
use super::sandbox::{Sandbox, module_path, script_text, shown};
use crate::models::{Network, not_there};
use crate::near::did_you_mean;

/// What the second part of a problem begins with.
const HINT: &str = "\nhint: ";

/// Problems that are told; of the others there is only a count.
const PROBLEMS_TOLD: usize = 50;

/// Checks a pipeline's parameters, its script and the modules that it requires.
///
/// # Errors
/// All problems in one message, each with its line.
pub fn check(config: &PipelineConfig, sandbox: &Sandbox, session: &Session) -> Result<()> {
    let scripts = config.script.parent().context("a file has a directory")?;
    let params: Vec<&str> = config.params.keys().map(String::as_str).collect();
    let known = sandbox.names();
    let mut problems: Vec<String> =
        config.named.iter().filter_map(|(name, path)| missing(config, session, name, path)).collect();
    let file = if problems.is_empty() { &config.script } else { &config.path };
    let (mut seen, mut todo) = (HashSet::new(), vec![config.script.clone()]);
    while let Some(path) = todo.pop().filter(|path| seen.insert(path.clone())) {
        if let Err(error) = sandbox.compile(&path) {
            problems.push(format!("{error:#}"));
            continue;
        }
        let text = script_text(&path)?;
        names(&shown(&path), &text, &params, &mut problems);
        globals(&shown(&path), &text, &known, &mut problems);
        todo.extend(required(&shown(&path), &text, scripts, &mut problems));
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
    Some(format!("{}: parameter `{name}`: {problem}", config.path.display()))
}

#[derive(Clone, Debug, PartialEq)]
enum Token {
    Name(String),
    Text(String),
    Number,
    Symbol(char),
}

/// The tokens of a script, each with its line. `==`, `..` and the like are single symbols in a row.
fn tokens(text: &str) -> Vec<(usize, Token)> {
    let chars: Vec<char> = text.chars().collect();
    let (mut at, mut line, mut out) = (0, 1, Vec::new());
    let long = |at: usize| {
        // [[, [=[ and so on: the number of equal signs, if it is one.
        let signs = chars[at..].iter().skip(1).take_while(|c| **c == '=').count();
        (chars.get(at) == Some(&'[') && chars.get(at + signs + 1) == Some(&'[')).then_some(signs)
    };
    let long_end = |from: usize, signs: usize| {
        let close: Vec<char> = format!("]{}]", "=".repeat(signs)).chars().collect();
        let found = chars[from..].windows(close.len()).position(|window| window == close);
        found.map_or(chars.len(), |found| from + found + close.len())
    };
    while at < chars.len() {
        let start = at;
        match chars[at] {
            '-' if chars.get(at + 1) == Some(&'-') => {
                at = match chars.get(at + 2).and_then(|_| long(at + 2)) {
                    Some(signs) => long_end(at + 2, signs),
                    None => chars[at..].iter().position(|c| *c == '\n').map_or(chars.len(), |end| at + end),
                };
            }
            '[' if long(at).is_some() => {
                at = long_end(at, long(at).unwrap_or(0));
                out.push((line, Token::Text(String::new())));
            }
            quote @ ('"' | '\'' | '`') => {
                at += 1;
                let mut said = String::new();
                while at < chars.len() && chars[at] != quote {
                    at += usize::from(chars[at] == '\\');
                    said.extend(chars.get(at));
                    at += 1;
                }
                at += 1;
                out.push((line, Token::Text(said)));
            }
            c if c.is_alphabetic() || c == '_' => {
                let rest = chars[at..].iter().take_while(|c| c.is_alphanumeric() || **c == '_');
                let name: String = rest.collect();
                at += name.chars().count();
                out.push((line, Token::Name(name)));
            }
            c if c.is_ascii_digit() => {
                at += chars[at..].iter().take_while(|c| c.is_alphanumeric() || **c == '_').count();
                out.push((line, Token::Number));
            }
            c => {
                at += 1;
                if !c.is_whitespace() {
                    out.push((line, Token::Symbol(c)));
                }
            }
        }
        line += chars[start..at.min(chars.len())].iter().filter(|c| **c == '\n').count();
    }
    out
}

/// Names of verbs, options and parameters that are not there.
fn names(script: &str, text: &str, params: &[&str], problems: &mut Vec<String>) {
    let tokens = tokens(text);
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
    let verbs: Vec<&str> = VERBS.iter().map(|verb| verb.name).chain(["log", "null"]).collect();
    for at in 0..tokens.len() {
        let line = tokens[at].0;
        let mut problem = |message: String| problems.push(format!("{script}:{line}: {message}"));
        let is_field = at > 0 && (is(at - 1, '.') || is(at - 1, ':'));
        match (name(at), name(at + 2)) {
            (Some("homeroom"), Some(key)) if !is_field && is(at + 1, '.') => {
                match VERBS.iter().find(|verb| verb.name == key) {
                    Some(verb) => keys(script, &tokens, at + 3, verb, problems),
                    None if verbs.contains(&key) => {}
                    None => problem(unknown("homeroom", key, &verbs)),
                }
            }
            (Some("params"), Some(key)) if !is_field && is(at + 1, '.') && !params.contains(&key) => {
                problem(unknown("params", key, params));
            }
            _ => {}
        }
        if is(at, ':')
            && let Some(method) = name(at + 1).and_then(|key| METHODS.iter().find(|method| method.name == key))
        {
            keys(script, &tokens, at + 2, method, problems);
        }
    }
}

/// Words of Luau that are no names.
const KEYWORDS: [&str; 22] = [
    "and", "break", "continue", "do", "else", "elseif", "end", "false", "for", "function", "if", "in", "local", "nil",
    "not", "or", "repeat", "return", "then", "true", "until", "while",
];

/// Calls of functions and assignments to variables that are not there. What is declared is written first where it is declared, so a
/// name that is first called or assigned to is not; other uses are left to a run.
fn globals(script: &str, text: &str, known: &[String], problems: &mut Vec<String>) {
    let tokens = tokens(text);
    let symbol = |at: Option<usize>| match tokens.get(at?) {
        Some((_, Token::Symbol(symbol))) => Some(*symbol),
        _ => None,
    };
    let word = |at: Option<usize>| match tokens.get(at?) {
        Some((_, Token::Name(name))) => Some(name.as_str()),
        _ => None,
    };
    let (mut seen, mut open) = (HashSet::new(), Vec::new());
    for (at, (line, token)) in tokens.iter().enumerate() {
        let (before, next) = (at.checked_sub(1), Some(at + 1));
        let name = match token {
            Token::Symbol(bracket @ ('{' | '(' | '[')) => {
                open.push(*bracket);
                continue;
            }
            Token::Symbol('}' | ')' | ']') => {
                open.pop();
                continue;
            }
            Token::Name(name) if !KEYWORDS.contains(&name.as_str()) => name.as_str(),
            _ => continue,
        };
        // `..` joins texts.
        let is_field =
            symbol(before) == Some(':') || symbol(before) == Some('.') && symbol(at.checked_sub(2)) != Some('.');
        let assigns = symbol(next) == Some('=') && symbol(Some(at + 2)) != Some('=');
        let in_table = open.last() == Some(&'{');
        let is_key = assigns && in_table && matches!(symbol(before), Some('{' | ',' | ';'));
        if is_field || is_key || !seen.insert(name) || known.iter().any(|known| known == name) {
            continue;
        }
        let is_function = word(before) == Some("function");
        let begins = match before.map(|before| &tokens[before].1) {
            Some(Token::Symbol(symbol)) => ")]};".contains(*symbol),
            Some(Token::Name(word)) => !["local", "for", "type", "function"].contains(&word.as_str()),
            _ => true,
        };
        let made = is_function && symbol(next) == Some('(') && word(at.checked_sub(2)) != Some("local")
            || assigns && begins && !in_table;
        if made {
            let name = short(name);
            let how = if is_function { format!("local function {name}") } else { format!("local {name} = …") };
            problems.push(format!("{script}:{line}: `{name}` is not declared; write `{how}`"));
        } else if symbol(next) == Some('(') && !is_function {
            let near = nearest(
                name,
                known.iter().map(String::as_str).chain(seen.iter().copied().filter(|near| *near != name)),
            );
            problems.push(format!("{script}:{line}: unknown name `{}`{}", short(name), did_you_mean(near)));
        }
    }
}

/// The keys of the table of options that a call begins with, if it does.
fn keys(script: &str, tokens: &[(usize, Token)], from: usize, verb: &Verb, problems: &mut Vec<String>) {
    let is = |at: usize, symbol: char| tokens.get(at).is_some_and(|(_, token)| *token == Token::Symbol(symbol));
    let open = if is(from, '(') { from + 1 } else { from };
    if !is(open, '{') {
        return;
    }
    let (mut depth, mut blocks) = (0_usize, 0_usize);
    for (at, (line, token)) in tokens.iter().enumerate().skip(open) {
        match token {
            Token::Symbol('{' | '(' | '[') => depth += 1,
            Token::Symbol('}' | ')' | ']') => {
                depth -= 1;
                if depth == 0 {
                    return;
                }
            }
            Token::Name(word) => match word.as_str() {
                "function" | "if" | "do" | "repeat" => blocks += 1,
                "end" | "until" => blocks = blocks.saturating_sub(1),
                key => {
                    let begins = is(at - 1, '{') || is(at - 1, ',') || is(at - 1, ';');
                    let assigns = is(at + 1, '=') && !is(at + 2, '=');
                    if depth == 1 && blocks == 0 && begins && assigns {
                        let unknown = verb.unknown(key);
                        problems.extend(unknown.map(|message| format!("{script}:{line}: {message}")));
                    }
                }
            },
            _ => {}
        }
    }
}

/// The modules that a script requires by name.
fn required(script: &str, text: &str, scripts: &Path, problems: &mut Vec<String>) -> Vec<PathBuf> {
    let tokens = tokens(text);
    let mut found = Vec::new();
    for (at, (line, token)) in tokens.iter().enumerate() {
        if *token != Token::Name("require".to_owned()) {
            continue;
        }
        let open = usize::from(tokens.get(at + 1).is_some_and(|(_, token)| *token == Token::Symbol('(')));
        if let Some((_, Token::Text(name))) = tokens.get(at + 1 + open) {
            match module_path(scripts, name) {
                Ok(path) => found.push(path),
                Err(error) => problems.push(format!("{script}:{line}: {error:#}")),
            }
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    fn problems(text: &str) -> Vec<String> {
        let mut problems = Vec::new();
        names("s.lua", text, &["model", "dataset"], &mut problems);
        problems
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
            ("d:split { evla = 1 }", "s.lua:1: split: unknown option `evla`, did you mean `eval`?"),
            ("--[[ x\n]] homeroom.nothing()", "s.lua:2: `homeroom` has no `nothing`; it has load_model"),
        ];
        for (text, expected) in cases {
            let found = problems(text);
            assert!(found.len() == 1 && found[0].contains(expected), "{text}: {found:?}");
        }
    }

    fn undeclared(text: &str) -> Vec<String> {
        let mut problems = Vec::new();
        let known = ["print", "pairs", "type", "homeroom", "params", "require"].map(str::to_owned);
        globals("s.lua", text, &known, &mut problems);
        problems
    }

    #[test]
    fn calls_and_assignments_of_what_is_not_declared_are_told_by_line() {
        for (text, expected) in [
            ("print(1)\nfoo()", "s.lua:2: unknown name `foo`"),
            ("prnt(1)", "unknown name `prnt`, did you mean `print`?"),
            ("local helper = 1\nprint(\"a\" .. helpr(2))", "s.lua:2: unknown name `helpr`, did you mean `helper`?"),
            ("x = 1", "s.lua:1: `x` is not declared; write `local x = …`"),
            ("if params.a then\n  count = 2 end", "s.lua:2: `count` is not declared"),
            ("print(function() best = 3 end)", "`best` is not declared"),
            ("function go() end go()", "`go` is not declared; write `local function go`"),
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
            "local m = require(\"lib/m\") m.go() -- foo()\nprint([[ x = 1 ]], `{n()}`)",
        ] {
            assert_eq!(undeclared(text), [""; 0], "{text}");
        }
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
        ] {
            assert_eq!(problems(text), [""; 0], "{text}");
        }
    }
}
