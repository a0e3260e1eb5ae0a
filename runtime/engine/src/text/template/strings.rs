//! Methods of Python's strings and lists that minijinja-contrib lacks, or has with fewer arguments.
//!
//! Positions are characters. Not covered: `encode`, `translate` and what belongs to it; `casefold` folds what lowering does, and "ß".

use minijinja::value::{Kwargs, Tuple, from_args};
use minijinja::{Error, ErrorKind, Value};

use super::bounds;
use super::python::{is_python_space, python_lines};

/// Calls a method of a string; `None`: it is none of these.
pub(super) fn method(s: &str, name: &str, args: &[Value]) -> Option<Result<Value, Error>> {
    Some(match name {
        "rsplit" => rsplit(s, args),
        "splitlines" => splitlines(s, args),
        "title" if args.is_empty() => Ok(title(s).into()),
        "swapcase" if args.is_empty() => Ok(swapcase(s).into()),
        "casefold" if args.is_empty() => Ok(s.to_lowercase().replace('ß', "ss").replace('ς', "σ").into()),
        "startswith" | "endswith" if args.len() > 1 => ends(s, args, name == "startswith"),
        "find" | "rfind" | "index" | "rindex" => found(s, name, args),
        "count" if args.len() > 1 => count(s, args),
        "center" | "ljust" | "rjust" => justified(s, name, args),
        "zfill" => zfill(s, args),
        "expandtabs" => expandtabs(s, args),
        "isdecimal" if args.is_empty() => Ok((!s.is_empty() && s.chars().all(|c| c.is_ascii_digit())).into()),
        "istitle" if args.is_empty() => Ok((title(s) == s && s.chars().any(is_cased)).into()),
        "isidentifier" if args.is_empty() => Ok(is_identifier(s).into()),
        "isprintable" if args.is_empty() => Ok(s.chars().all(is_printable).into()),
        _ => return None,
    })
}

/// Calls a method of a list or a tuple; `None`: it is none of these.
pub(super) fn method_of_list(list: &Value, name: &str, args: &[Value]) -> Option<Result<Value, Error>> {
    match (name, args) {
        ("index", [sought]) => Some(position(list, sought)),
        ("copy", []) => Some(Ok(list.clone())),
        _ => None,
    }
}

fn position(list: &Value, sought: &Value) -> Result<Value, Error> {
    let at = list.try_iter()?.position(|item| item == *sought);
    at.map(Value::from).ok_or_else(|| Error::new(ErrorKind::InvalidOperation, "index: it is not in the list"))
}

/// What `start` and `end` leave of a string, and how many characters stand before; `None` where nothing can be found, not even "".
fn window(s: &str, start: Option<i64>, end: Option<i64>) -> Option<(usize, &str)> {
    let n = s.chars().count() as i64;
    let place = |at: i64| if at < 0 { (at + n).max(0) } else { at.min(n) };
    let (from, to) = (place(start.unwrap_or(0)), place(end.unwrap_or(n)));
    if start.unwrap_or(0) > n || from > to {
        return None;
    }
    let byte = |at: i64| s.char_indices().nth(at as usize).map_or(s.len(), |(at, _)| at);
    Some((from as usize, &s[byte(from)..byte(to)]))
}

fn found(s: &str, name: &str, args: &[Value]) -> Result<Value, Error> {
    let (sought, start, end): (&str, Option<i64>, Option<i64>) = from_args(args)?;
    let at = window(s, start, end).and_then(|(before, within)| {
        let at = if name.starts_with('r') { within.rfind(sought) } else { within.find(sought) }?;
        Some(before + within[..at].chars().count())
    });
    match at {
        Some(at) => Ok(at.into()),
        None if name.ends_with("find") => Ok((-1).into()),
        None => Err(Error::new(ErrorKind::InvalidOperation, format!("{name}: substring not found"))),
    }
}

fn count(s: &str, args: &[Value]) -> Result<Value, Error> {
    let (sought, start, end): (&str, Option<i64>, Option<i64>) = from_args(args)?;
    Ok(window(s, start, end).map_or(0, |(_, within)| within.matches(sought).count()).into())
}

/// `startswith` and `endswith` of a part of a string.
fn ends(s: &str, args: &[Value], first: bool) -> Result<Value, Error> {
    let (sought, start, end): (Value, Option<i64>, Option<i64>) = from_args(args)?;
    let Some((_, within)) = window(s, start, end) else { return Ok(false.into()) };
    let fits = |sought: &str| if first { within.starts_with(sought) } else { within.ends_with(sought) };
    match sought.as_str() {
        Some(sought) => Ok(fits(sought).into()),
        None => Ok(sought.try_iter()?.any(|sought| sought.as_str().is_some_and(fits)).into()),
    }
}

fn rsplit(s: &str, args: &[Value]) -> Result<Value, Error> {
    let (by, most, options): (Option<Value>, Option<i64>, Kwargs) = from_args(args)?;
    let by = by.or(options.get("sep")?).filter(|by| !by.is_none());
    let most = most.or(options.get("maxsplit")?).and_then(|most| usize::try_from(most).ok());
    options.assert_all_used()?;
    let mut pieces: Vec<&str> = match by.as_ref().map(|by| by.as_str()) {
        Some(Some(by)) if !by.is_empty() => s.rsplitn(most.map_or(usize::MAX, |n| n.saturating_add(1)), by).collect(),
        Some(_) => return Err(Error::new(ErrorKind::InvalidOperation, "rsplit: the separator is no text")),
        None => {
            let (mut rest, mut pieces) = (s.trim_end_matches(is_python_space), Vec::new());
            while !rest.is_empty() {
                if Some(pieces.len()) == most {
                    pieces.push(rest);
                    break;
                }
                let word = rest.trim_end_matches(|c| !is_python_space(c)).len();
                pieces.push(&rest[word..]);
                rest = rest[..word].trim_end_matches(is_python_space);
            }
            pieces
        }
    };
    pieces.reverse();
    Ok(pieces.into_iter().collect())
}

fn splitlines(s: &str, args: &[Value]) -> Result<Value, Error> {
    let (keep, options): (Option<bool>, Kwargs) = from_args(args)?;
    let keep = keep.or(options.get("keepends")?).unwrap_or(false);
    options.assert_all_used()?;
    Ok(python_lines(s, keep).into_iter().collect())
}

fn is_cased(c: char) -> bool {
    c.is_lowercase() || c.is_uppercase()
}

/// Raises each letter that follows none, and lowers the others.
fn title(s: &str) -> String {
    let mut out = String::with_capacity(s.len());
    let mut inside = false;
    for c in s.chars() {
        match inside {
            true => out.extend(c.to_lowercase()),
            false => out.extend(c.to_uppercase()),
        }
        inside = is_cased(c);
    }
    out
}

fn swapcase(s: &str) -> String {
    let mut out = String::with_capacity(s.len());
    for c in s.chars() {
        match c.is_uppercase() {
            true => out.extend(c.to_lowercase()),
            false => out.extend(c.to_uppercase()),
        }
    }
    out
}

fn is_identifier(s: &str) -> bool {
    let mut chars = s.chars();
    let letter = |c: char| c == '_' || c.is_alphabetic();
    chars.next().is_some_and(letter) && chars.all(|c| letter(c) || c.is_numeric())
}

fn is_printable(c: char) -> bool {
    c == ' ' || !(c.is_control() || c.is_whitespace())
}

/// A width that a template may ask for.
fn width(asked: i64, name: &str) -> Result<usize, Error> {
    bounds::width(usize::try_from(asked.max(0)).unwrap_or(usize::MAX), &format!("{name}: a width"))
}

fn justified(s: &str, name: &str, args: &[Value]) -> Result<Value, Error> {
    let (asked, fill): (i64, Option<char>) = from_args(args)?;
    Ok(justify(s, name, width(asked, name)?, fill.unwrap_or(' ')).into())
}

/// `center`, `ljust` or `rjust`.
pub(super) fn justify(s: &str, name: &str, width: usize, fill: char) -> String {
    let missing = width.saturating_sub(s.chars().count());
    let left = match name {
        "ljust" => 0,
        "rjust" => missing,
        // CPython's way of parting an odd number.
        _ => missing / 2 + (missing & width & 1),
    };
    let fill = |n: usize| std::iter::repeat_n(fill, n).collect::<String>();
    format!("{}{s}{}", fill(left), fill(missing - left))
}

fn zfill(s: &str, args: &[Value]) -> Result<Value, Error> {
    let (asked,): (i64,) = from_args(args)?;
    let missing = width(asked, "zfill")?.saturating_sub(s.chars().count());
    let (sign, digits) = s.split_at(usize::from(s.starts_with(['+', '-'])));
    Ok(format!("{sign}{}{digits}", "0".repeat(missing)).into())
}

fn expandtabs(s: &str, args: &[Value]) -> Result<Value, Error> {
    let (size, options): (Option<i64>, Kwargs) = from_args(args)?;
    let size = size.or(options.get("tabsize")?).unwrap_or(8);
    options.assert_all_used()?;
    let size = width(size, "expandtabs")?;
    let (mut out, mut column) = (String::with_capacity(s.len()), 0);
    for c in s.chars() {
        match c {
            '\t' if size > 0 => {
                let n = size - column % size;
                out.extend(std::iter::repeat_n(' ', n));
                column += n;
            }
            '\t' => {}
            '\n' | '\r' => {
                out.push(c);
                column = 0;
            }
            _ => {
                out.push(c);
                column += 1;
            }
        }
    }
    Ok(out.into())
}

/// The values of `text % value`: those of a tuple, or the one.
pub(super) fn formatted(value: Value) -> Vec<Value> {
    match value.downcast_object_ref::<Tuple>() {
        Some(_) => value.try_iter().map(Iterator::collect).unwrap_or_default(),
        None => vec![value],
    }
}
