//! The part of Go's template language that our chat formats use, to see what Ollama makes of them.
//!
//! Actions are a pipeline of one command, `if` with `else if` and `else`, `range` over the messages, and `:=`; operands are texts, numbers,
//! variables, fields and calls of a few functions. What lies outside of that is an error. <https://pkg.go.dev/text/template>

use std::collections::BTreeMap;
use std::iter::Peekable;
use std::rc::Rc;

use anyhow::{Context, Result, bail, ensure};

/// A value of the language.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Value {
    Text(Rc<str>),
    Number(i64),
    Truth(bool),
    List(Rc<[Self]>),
    Fields(Rc<BTreeMap<&'static str, Self>>),
}

impl Value {
    pub(super) fn text(text: &str) -> Self {
        Self::Text(text.into())
    }

    /// Whether `if` takes it for true: everything but an empty value.
    fn holds(&self) -> bool {
        match self {
            Self::Text(text) => !text.is_empty(),
            Self::Number(number) => *number != 0,
            Self::Truth(truth) => *truth,
            Self::List(list) => !list.is_empty(),
            Self::Fields(fields) => !fields.is_empty(),
        }
    }

    fn number(&self) -> Result<i64> {
        match self {
            Self::Number(number) => Ok(*number),
            other => bail!("{other:?} is no number"),
        }
    }
}

/// A template that was read.
#[derive(Debug)]
pub(super) struct Template(Vec<Node>);

#[derive(Debug)]
enum Node {
    Text(String),
    Show(Term),
    Set(String, Term),
    If(Vec<(Term, Vec<Node>)>, Vec<Node>),
    Range { names: Vec<String>, over: Term, body: Vec<Node> },
}

#[derive(Debug)]
enum Term {
    Value(Value),
    /// A variable, or with an empty name what `.` is, and the fields that are followed from there.
    Place(String, Vec<String>),
    Call(String, Vec<Term>),
}

/// A piece of a template: text, or what stands between braces.
enum Piece {
    Text(String),
    Action(Vec<String>),
}

impl Template {
    /// Reads a template.
    ///
    /// # Errors
    /// When it is malformed, or uses what is not known here.
    pub(super) fn new(source: &str) -> Result<Self> {
        let mut pieces = pieces(source)?.into_iter().peekable();
        let (nodes, end) = block(&mut pieces)?;
        ensure!(end.is_none(), "`{}` ends nothing", end.unwrap_or_default().join(" "));
        Ok(Self(nodes))
    }

    /// What it writes of some fields.
    ///
    /// # Errors
    /// When a field, a variable or a function is missing or given what it does not take.
    pub(super) fn render(&self, root: &Value) -> Result<String> {
        let mut out = String::new();
        run(&self.0, root, &mut vec![(String::from("$"), root.clone())], &mut out)?;
        Ok(out)
    }
}

/// Cuts a template at its braces. A hyphen inside of a brace takes the white space away beside it.
fn pieces(source: &str) -> Result<Vec<Piece>> {
    let (mut found, mut rest, mut trims) = (Vec::new(), source, false);
    loop {
        let (text, action) = match rest.split_once("{{") {
            Some((text, action)) => (text, Some(action)),
            None => (rest, None),
        };
        let text = if trims { text.trim_start() } else { text };
        let ends = action.is_some_and(|action| action.starts_with("- "));
        let text = if ends { text.trim_end() } else { text };
        if !text.is_empty() {
            found.push(Piece::Text(text.to_owned()));
        }
        let Some(action) = action else { return Ok(found) };
        // No text in our formats holds braces.
        let (inner, after) = action.split_once("}}").context("an action does not end")?;
        let inner = if ends { &inner[1..] } else { inner };
        trims = inner.ends_with(" -");
        let inner = if trims { &inner[..inner.len() - 1] } else { inner };
        if !inner.trim().starts_with("/*") {
            found.push(Piece::Action(words(inner)?));
        }
        rest = after;
    }
}

/// The words of an action: names with their fields, texts with their quotes, parentheses.
fn words(action: &str) -> Result<Vec<String>> {
    let (mut found, mut rest) = (Vec::new(), action.trim_start());
    while let Some(first) = rest.chars().next() {
        let len = match first {
            '(' | ')' | ',' => 1,
            '"' => {
                let mut escaped = false;
                let end = rest.char_indices().skip(1).find(|(_, c)| {
                    let ends = *c == '"' && !escaped;
                    escaped = *c == '\\' && !escaped;
                    ends
                });
                end.context("a text does not end")?.0 + 1
            }
            '`' => rest[1..].find('`').context("a text does not end")? + 2,
            _ => rest.find(|c: char| c.is_whitespace() || "(),\"`".contains(c)).unwrap_or(rest.len()),
        };
        found.push(rest[..len].to_owned());
        rest = rest[len..].trim_start();
    }
    ensure!(!found.is_empty(), "an action is empty");
    Ok(found)
}

/// Reads to an `end` or an `else`, which is returned, or to the end.
fn block(pieces: &mut Peekable<impl Iterator<Item = Piece>>) -> Result<(Vec<Node>, Option<Vec<String>>)> {
    let mut nodes = Vec::new();
    while let Some(piece) = pieces.next() {
        let action = match piece {
            Piece::Text(text) => {
                nodes.push(Node::Text(text));
                continue;
            }
            Piece::Action(action) => action,
        };
        let parts: Vec<&str> = action.iter().map(String::as_str).collect();
        nodes.push(match parts.as_slice() {
            ["end" | "else", ..] => return Ok((nodes, Some(action))),
            ["if", condition @ ..] => {
                let mut cases = Vec::new();
                let mut condition = term(condition)?;
                loop {
                    let (body, end) = block(pieces)?;
                    cases.push((condition, body));
                    let end = end.context("an `if` does not end")?;
                    let end: Vec<&str> = end.iter().map(String::as_str).collect();
                    match end.as_slice() {
                        ["else", "if", next @ ..] => condition = term(next)?,
                        ["else"] => {
                            let (otherwise, end) = block(pieces)?;
                            ensure!(end.is_some_and(|end| end == ["end"]), "an `else` does not end");
                            break Node::If(cases, otherwise);
                        }
                        _ => break Node::If(cases, Vec::new()),
                    }
                }
            }
            ["range", action @ ..] => {
                let at = action.iter().position(|word| *word == ":=");
                let (names, over) = at.map_or((&[][..], action), |at| (&action[..at], &action[at + 1..]));
                let names = names.iter().filter(|name| **name != ",").map(|name| (*name).to_owned()).collect();
                let over = term(over)?;
                let (body, end) = block(pieces)?;
                ensure!(end.is_some_and(|end| end == ["end"]), "a `range` does not end");
                Node::Range { names, over, body }
            }
            [name, ":=", value @ ..] => Node::Set((*name).to_owned(), term(value)?),
            action => Node::Show(term(action)?),
        });
    }
    Ok((nodes, None))
}

/// Reads a command: an operand, or a function with its arguments.
fn term(words: &[&str]) -> Result<Term> {
    let mut words = words.iter().copied().peekable();
    let read = command(&mut words)?;
    ensure!(words.next().is_none(), "an action goes on where it should end");
    Ok(read)
}

fn command<'a>(words: &mut Peekable<impl Iterator<Item = &'a str>>) -> Result<Term> {
    let first = *words.peek().context("an operand is missing")?;
    if !first.starts_with(|c: char| c.is_ascii_alphabetic()) || ["true", "false"].contains(&first) {
        return operand(words);
    }
    words.next();
    let mut arguments = Vec::new();
    while words.peek().is_some_and(|word| *word != ")") {
        arguments.push(operand(words)?);
    }
    Ok(Term::Call(first.to_owned(), arguments))
}

fn operand<'a>(words: &mut Peekable<impl Iterator<Item = &'a str>>) -> Result<Term> {
    let word = words.next().context("an operand is missing")?;
    if word == "(" {
        let inner = command(words)?;
        ensure!(words.next() == Some(")"), "a parenthesis does not close");
        return Ok(inner);
    }
    if word.starts_with('"') {
        let text: String = serde_json::from_str(word).context("a text is not one of JSON, too")?;
        return Ok(Term::Value(Value::text(&text)));
    }
    if let Some(text) = word.strip_prefix('`') {
        return Ok(Term::Value(Value::text(text.trim_end_matches('`'))));
    }
    if let Ok(number) = word.parse() {
        return Ok(Term::Value(Value::Number(number)));
    }
    match word {
        "true" | "false" => Ok(Term::Value(Value::Truth(word == "true"))),
        word if word.starts_with(['.', '$']) => {
            let mut parts = word.split('.');
            let name = parts.next().unwrap_or_default().to_owned();
            Ok(Term::Place(name, parts.filter(|part| !part.is_empty()).map(str::to_owned).collect()))
        }
        word => bail!("`{word}` is not known"),
    }
}

type Variables = Vec<(String, Value)>;

fn run(nodes: &[Node], dot: &Value, variables: &mut Variables, out: &mut String) -> Result<()> {
    let outer = variables.len();
    for node in nodes {
        match node {
            Node::Text(text) => out.push_str(text),
            Node::Show(term) => match value(term, dot, variables)? {
                Value::Text(text) => out.push_str(&text),
                Value::Number(number) => out.push_str(&number.to_string()),
                other => bail!("{other:?} is no text"),
            },
            Node::Set(name, term) => {
                let value = value(term, dot, variables)?;
                variables.push((name.clone(), value));
            }
            Node::If(cases, otherwise) => {
                let mut chosen = otherwise;
                for (condition, body) in cases {
                    if value(condition, dot, variables)?.holds() {
                        chosen = body;
                        break;
                    }
                }
                run(chosen, dot, variables, out)?;
            }
            Node::Range { names, over, body } => {
                let Value::List(list) = value(over, dot, variables)? else { bail!("a `range` is over no list") };
                for (index, item) in list.iter().enumerate() {
                    let inner = variables.len();
                    match names.as_slice() {
                        [] => {}
                        [of] => variables.push((of.clone(), item.clone())),
                        [at, of, ..] => {
                            variables.push((at.clone(), Value::Number(index as i64)));
                            variables.push((of.clone(), item.clone()));
                        }
                    }
                    run(body, item, variables, out)?;
                    variables.truncate(inner);
                }
            }
        }
    }
    variables.truncate(outer);
    Ok(())
}

fn value(term: &Term, dot: &Value, variables: &Variables) -> Result<Value> {
    match term {
        Term::Value(value) => Ok(value.clone()),
        Term::Place(name, fields) => {
            let mut at = match name.as_str() {
                "" => dot,
                name => {
                    let found = variables.iter().rev().find(|(other, _)| other == name);
                    &found.with_context(|| format!("there is no variable `{name}`"))?.1
                }
            };
            for field in fields {
                let Value::Fields(all) = at else { bail!("`{field}` is no field of {at:?}") };
                at = all.get(field.as_str()).with_context(|| format!("there is no field `{field}`"))?;
            }
            Ok(at.clone())
        }
        Term::Call(name, arguments) => {
            let given = |at: usize| {
                let argument = arguments.get(at).with_context(|| format!("`{name}` lacks an argument"))?;
                value(argument, dot, variables)
            };
            Ok(match name.as_str() {
                "eq" => {
                    let first = given(0)?;
                    let mut same = false;
                    for at in 1..arguments.len() {
                        same |= given(at)? == first;
                    }
                    Value::Truth(same)
                }
                "ne" => Value::Truth(given(0)? != given(1)?),
                "lt" => Value::Truth(given(0)?.number()? < given(1)?.number()?),
                "not" => Value::Truth(!given(0)?.holds()),
                // These give the argument that decides.
                "and" | "or" => {
                    let mut last = given(0)?;
                    for at in 1..arguments.len() {
                        if last.holds() == (name == "or") {
                            break;
                        }
                        last = given(at)?;
                    }
                    last
                }
                "len" => match given(0)? {
                    Value::List(list) => Value::Number(list.len() as i64),
                    Value::Text(text) => Value::Number(text.len() as i64),
                    other => bail!("{other:?} has no length"),
                },
                "slice" => {
                    let Value::List(list) = given(0)? else { bail!("`slice` takes a list here") };
                    let from = usize::try_from(given(1)?.number()?).unwrap_or(usize::MAX);
                    let to = if arguments.len() > 2 { given(2)?.number()? as usize } else { list.len() };
                    Value::List(list.get(from..to).context("a slice is out of range")?.into())
                }
                name => bail!("the function `{name}` is not known"),
            })
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn conversation() -> Value {
        let message = |role: &str, content: &str| {
            Value::Fields(Rc::new([("Role", Value::text(role)), ("Content", Value::text(content))].into()))
        };
        let messages = [message("system", "s"), message("user", "a {{b}}\n"), message("assistant", "")];
        let fields = [("System", Value::text("s")), ("Messages", Value::List(messages.into()))];
        Value::Fields(Rc::new(fields.into()))
    }

    /// Right-hand sides are those of Go 1.19's text/template.
    #[test]
    fn templates_write_what_go_writes() -> Result<()> {
        for (source, expected) in [
            ("a {{ .System }} b", "a s b"),
            ("a \n {{- .System -}} \n b", "asb"),
            ("{{ \"<|x|>\\n\" }}{{ `\\n` }}{{/* no */ -}} y", "<|x|>\n\\ny"),
            ("{{ range .Messages }}[{{ .Role }} {{ .Content }}]{{ end }}", "[system s][user a {{b}}\n][assistant ]"),
            (
                "{{ range $i, $m := .Messages }}{{ $last := eq (len (slice $.Messages $i)) 1 }}{{ if $last }}!{{ else if eq $m.Role \"user\" \"tool\" }}u{{ else }}{{ $i }}{{ end }}{{ end }}",
                "0u!",
            ),
            ("{{ if and .System (ne .System \"t\") }}x{{ end }}{{ if or (not .System) (lt 1 2) }}y{{ end }}", "xy"),
            ("{{ if .Messages }}{{ len .System }}{{ else }}n{{ end }}", "1"),
        ] {
            assert_eq!(Template::new(source)?.render(&conversation())?, expected, "{source}");
        }
        Ok(())
    }

    #[test]
    fn what_is_not_known_is_an_error() -> Result<()> {
        for source in ["{{ if .System }}", "{{ end }}", "{{ .System", "{{ printf }}{{", "{{ \"a }}", "{{ x y"] {
            assert!(Template::new(source).is_err(), "{source}");
        }
        for source in
            ["{{ .Nothing }}", "{{ $x }}", "{{ printf 1 }}", "{{ .Messages }}", "{{ range .System }}{{ end }}"]
        {
            assert!(Template::new(source)?.render(&conversation()).is_err(), "{source}");
        }
        Ok(())
    }
}
