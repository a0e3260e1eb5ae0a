//! Python's values in a chat template, where minijinja and Rust differ: methods of strings, tests, `json.dumps`.
//!
//! Not covered: printing a list or a mapping whole (`{{ tool }}`, not `{{ tool | tojson }}`) leaves out the escapes of
//! Python's `repr` for unprintable characters, and its spelling of exponents.

use minijinja::value::{Kwargs, Rest, Tuple, ValueKind, ValueOrKwargs, from_args};
use minijinja::{Environment, Error, ErrorKind, State, Value, escape_formatter, filters};

use super::{bounds, strings};

/// Sets what templates written for jinja2 and transformers expect.
pub(super) fn add_to(env: &mut Environment<'static>) {
    env.set_unknown_method_callback(python_method);
    env.set_formatter(|out, state, value| match f64::try_from(value.clone()) {
        Ok(x) if value.kind() == ValueKind::Number && !value.is_integer() => Ok(out.write_str(&python_float(x))?),
        _ => {
            bounds::weigh(state, value)?;
            escape_formatter(out, state, value)
        }
    });
    env.add_filter("tojson", to_json_filter);
    env.add_filter("trim", trim_filter);
    env.add_filter("int", int_filter);
    env.add_filter("float", float_filter);
    env.add_filter("center", center_filter);
    env.add_filter("truncate", truncate_filter);
    env.add_filter("wordcount", wordcount_filter);
    env.add_filter("striptags", |state: &State, text: String| -> Result<String, Error> {
        state.consume_fuel(text.len() as u64 / 16)?;
        Ok(minijinja_contrib::filters::striptags(text))
    });
    env.add_filter("filesizeformat", minijinja_contrib::filters::filesizeformat);
    env.add_filter("homeroom_percent", percent);
    env.add_test("callable", |value: &Value| value.kind() == ValueKind::Plain);
    env.add_test("iterable", is_iterable);
    env.add_test("sequence", is_sequence);
}

/// jinja2: whatever has a length and items by index, so strings and mappings too.
fn is_sequence(value: &Value) -> bool {
    use ValueKind::{Map, Seq, String, Undefined};
    matches!(value.kind(), Seq | String | Map | Undefined)
}

/// jinja2: whatever `iter` takes, so not none, which minijinja iterates as nothing.
fn is_iterable(value: &Value) -> bool {
    is_sequence(value) || value.kind() == ValueKind::Iterable
}

/// `str.isspace`: Unicode white space and the four information separators.
pub(super) fn is_python_space(c: char) -> bool {
    c.is_whitespace() || ('\u{1c}'..='\u{1f}').contains(&c)
}

/// jinja2's `trim` filter: `str.strip`.
fn trim_filter(state: &State, value: &Value, chars: Option<&str>) -> Result<String, Error> {
    bounds::weigh(state, value)?;
    let text = value.to_string();
    Ok(match chars {
        Some(chars) => {
            state.consume_fuel((text.len() / 64).saturating_mul(chars.len()) as u64)?;
            text.trim_matches(|c| chars.contains(c)).into()
        }
        None => text.trim_matches(is_python_space).into(),
    })
}

/// jinja2's `int`, which is 0 where there is no number.
fn int_filter(
    state: &State,
    value: Value,
    default: Option<Value>,
    base: Option<u32>,
    options: Kwargs,
) -> Result<Value, Error> {
    let default = default.or(options.get("default")?).unwrap_or(Value::from(0));
    let trimmed = value.as_str().map(|text| Value::from(text.trim()));
    filters::int(state, &trimmed.unwrap_or(value), Some(default), base, options)
}

/// jinja2's `float`, which is 0.0 where there is no number.
fn float_filter(state: &State, value: Value, default: Option<Value>, options: Kwargs) -> Result<Value, Error> {
    let default = default.or(options.get("default")?).unwrap_or(Value::from(0.0));
    let trimmed = value.as_str().map(|text| Value::from(text.trim()));
    filters::float(state, &trimmed.unwrap_or(value), Some(default), options)
}

fn center_filter(value: &str, width: Option<usize>) -> Result<String, Error> {
    let width = bounds::width(width.unwrap_or(80), "center: a width")?;
    Ok(strings::justify(value, "center", width, ' '))
}

fn truncate_filter(state: &State, text: &str, args: Rest<ValueOrKwargs>) -> Result<String, Error> {
    let args = args.into_values();
    let (length, cuts_words, end, leeway, options): (
        Option<usize>,
        Option<bool>,
        Option<String>,
        Option<usize>,
        Kwargs,
    ) = from_args(&args)?;
    let length = length.or(options.get("length")?).unwrap_or(255);
    let cuts_words = cuts_words.or(options.get("killwords")?).unwrap_or(false);
    let end = end.or(options.get("end")?).unwrap_or_else(|| "...".into());
    let leeway = leeway.or(options.get("leeway")?).unwrap_or(5);
    options.assert_all_used()?;
    state.consume_fuel(text.len() as u64 / 16)?;
    if text.chars().count() <= length.saturating_add(leeway) {
        return Ok(text.to_owned());
    }
    let Some(kept) = length.checked_sub(end.chars().count()) else {
        return Err(Error::new(ErrorKind::InvalidOperation, format!("truncate: {end:?} is longer than {length}")));
    };
    let kept = &text[..text.char_indices().nth(kept).map_or(text.len(), |(at, _)| at)];
    let kept = if cuts_words { kept } else { kept.rsplit_once(' ').map_or(kept, |(words, _)| words) };
    Ok(format!("{kept}{end}"))
}

fn wordcount_filter(state: &State, text: &str) -> Result<usize, Error> {
    state.consume_fuel(text.len() as u64 / 16)?;
    let is_word = |c: char| c == '_' || c.is_alphanumeric();
    Ok(text.split(|c| !is_word(c)).filter(|word| !word.is_empty()).count())
}

/// `text % value`, which [`super::source`] writes as a filter where the text is a string of the template.
fn percent(state: &mut State, text: &Value, value: Value) -> Result<Value, Error> {
    bounds::weigh(state, &value)?;
    let values = strings::formatted(value).into_iter().map(ValueOrKwargs::from);
    filters::format(state, text, Rest(values.collect()))
}

/// Methods of Python's values that minijinja-contrib lacks or has with Rust's idea of white space and lines.
fn python_method(state: &mut State, value: &Value, method: &str, args: &[Value]) -> Result<Value, Error> {
    if method == "split" && args.last().is_some_and(Value::is_kwargs) {
        let (sep, most, options): (Option<Value>, Option<Value>, Kwargs) = from_args(args)?;
        let sep = sep.or(options.get("sep")?).unwrap_or_default();
        let most = most.or(options.get("maxsplit")?).unwrap_or(Value::from(-1));
        options.assert_all_used()?;
        return python_method(state, value, method, &[sep, most]);
    }
    let first = args.first().and_then(Value::as_str);
    charge_method(state, value, method, args)?;
    match (value.as_str(), method, first) {
        (Some(s), "strip", None) if args.is_empty() => Ok(s.trim_matches(is_python_space).into()),
        (Some(s), "lstrip", None) if args.is_empty() => Ok(s.trim_start_matches(is_python_space).into()),
        (Some(s), "rstrip", None) if args.is_empty() => Ok(s.trim_end_matches(is_python_space).into()),
        (Some(s), "removeprefix", Some(p)) => Ok(s.strip_prefix(p).unwrap_or(s).into()),
        (Some(s), "removesuffix", Some(p)) => Ok(s.strip_suffix(p).unwrap_or(s).into()),
        (Some(s), "partition", Some(p)) => Ok(match s.split_once(p) {
            Some((a, b)) => Tuple::from([a, p, b].map(Value::from)).into(),
            None => Tuple::from([s, "", ""].map(Value::from)).into(),
        }),
        (Some(s), "rpartition", Some(p)) => Ok(match s.rsplit_once(p) {
            Some((a, b)) => Tuple::from([a, p, b].map(Value::from)).into(),
            None => Tuple::from(["", "", s].map(Value::from)).into(),
        }),
        (None, "copy", None) if value.kind() == ValueKind::Map => Ok(value.clone()),
        (Some(s), ..) if let Some(result) = strings::method(s, method, args) => result,
        (None, ..)
            if value.kind() == ValueKind::Seq
                && let Some(result) = strings::method_of_list(value, method, args) =>
        {
            result
        }
        _ => minijinja_contrib::pycompat::unknown_method_callback(state, value, method, args),
    }
}

/// Charges for what a method may walk or make, before it does.
fn charge_method(state: &State, value: &Value, method: &str, args: &[Value]) -> Result<(), Error> {
    args.iter().try_for_each(|arg| bounds::weigh(state, arg))?;
    let first = args.first().and_then(Value::as_str);
    match (value.as_str(), method, first) {
        (None, "count" | "index", _) => bounds::weigh(state, value),
        (Some(s), "split" | "rsplit", by) => bounds::charge_pieces(state, Some(s), by),
        (Some(s), "splitlines", _) => bounds::charge_pieces(state, Some(s), Some("\n")),
        (Some(s), "strip" | "lstrip" | "rstrip", Some(chars)) => {
            state.consume_fuel((s.len() / 64).saturating_mul(chars.len()) as u64)
        }
        (Some(s), "replace", Some(old)) => {
            let new = args.get(1).and_then(Value::as_str).unwrap_or_default();
            let places = if s.len() < 4096 && new.len() < 4096 { 0 } else { s.matches(old).count() };
            state.consume_fuel(places.saturating_mul(new.len()) as u64 / 64)
        }
        (Some(s), "find" | "rfind" | "index" | "rindex" | "count" | "startswith" | "endswith", _) if args.len() > 1 => {
            state.consume_fuel(s.len() as u64 / 16)
        }
        (Some(s), "swapcase" | "casefold" | "istitle" | "isidentifier" | "isprintable" | "isdecimal", _) => {
            state.consume_fuel(s.len() as u64 / 16)
        }
        (Some(s), "expandtabs", _) => {
            state.consume_fuel((s.len() as u64).saturating_add(256 * s.matches('\t').count() as u64) / 16)
        }
        (Some(s), "join", _) => {
            let pieces = args.first().and_then(Value::len).unwrap_or(0);
            state.consume_fuel(pieces.saturating_mul(s.len()) as u64 / 64)
        }
        (Some(s), "format", _) => {
            bounds::format(s, "format")?;
            let fields = s.matches('{').count();
            // A width of three digits at most; that of an argument may not be asked for.
            if s.split("{{").any(|part| part.split('}').any(|field| field.matches('{').count() > 1)) {
                return Err(bounds::beyond("format with a field inside a field"));
            }
            let longest = args.iter().map(|arg| arg.as_str().map_or(1000, str::len)).max().unwrap_or(0);
            state.consume_fuel(fields.saturating_mul(1000 + longest) as u64 / 64)
        }
        _ => Ok(()),
    }
}

/// `str.splitlines`: the boundaries of the Python documentation, "\r\n" being one. `keep`: each line has its end.
pub(super) fn python_lines(text: &str, keep: bool) -> Vec<&str> {
    let ends_line = |c: char| matches!(c, '\n'..='\r' | '\u{1c}'..='\u{1e}' | '\u{85}' | '\u{2028}' | '\u{2029}');
    let mut lines = Vec::new();
    let mut rest = text;
    while let Some((at, c)) = rest.char_indices().find(|(_, c)| ends_line(*c)) {
        let end = if rest[at..].starts_with("\r\n") { at + 2 } else { at + c.len_utf8() };
        lines.push(&rest[..if keep { end } else { at }]);
        rest = &rest[end..];
    }
    if !rest.is_empty() {
        lines.push(rest);
    }
    lines
}

/// `tojson` as transformers has it: `json.dumps` with `ensure_ascii=False`, nothing escaped for HTML.
fn to_json_filter(state: &State, value: &Value, args: Rest<ValueOrKwargs>) -> Result<String, Error> {
    let args = args.into_values();
    let (ensure_ascii, indent, separators, options): (Option<bool>, Option<Value>, Option<Value>, Kwargs) =
        from_args(&args)?;
    let indent = indent.or(options.get("indent")?).filter(|v| !v.is_none());
    let indent = match indent {
        None => None,
        Some(v) => Some(match (v.as_str(), v.as_i64()) {
            (Some(text), _) => {
                bounds::width(text.len(), "tojson: an indentation")?;
                text.to_owned()
            }
            (_, width) => {
                let width = width.map_or(0, |n| usize::try_from(n.max(0)).unwrap_or(usize::MAX));
                " ".repeat(bounds::width(width, "tojson: an indentation")?)
            }
        }),
    };
    let separators = separators.or(options.get("separators")?).filter(|v| !v.is_none());
    let mut style = JsonStyle {
        ensure_ascii: ensure_ascii.or(options.get("ensure_ascii")?).unwrap_or(false),
        sort_keys: options.get::<Option<bool>>("sort_keys")?.unwrap_or(false),
        between: if indent.is_some() { "," } else { ", " }.into(),
        after_key: ": ".into(),
        indent,
    };
    if let Some(pair) = separators {
        bounds::weigh(state, &pair)?;
        style.between = pair.get_item_by_index(0)?.to_string();
        style.after_key = pair.get_item_by_index(1)?.to_string();
        bounds::width(style.between.len().max(style.after_key.len()), "tojson: a separator")?;
    }
    options.assert_all_used()?;
    bounds::weigh(state, value)?;
    let mut out = Json { text: String::new(), state: Some(state), charged: 0 };
    style.write(value, 0, &mut out)?;
    Ok(out.text)
}

/// `json.dumps(value, ensure_ascii=False)`.
pub(super) fn to_json(value: &Value) -> Result<String, Error> {
    let style =
        JsonStyle { ensure_ascii: false, sort_keys: false, between: ", ".into(), after_key: ": ".into(), indent: None };
    let mut out = Json { text: String::new(), state: None, charged: 0 };
    style.write(value, 0, &mut out)?;
    Ok(out.text)
}

/// JSON as far as it is written, and paid for.
struct Json<'a> {
    text: String,
    /// Who pays.
    state: Option<&'a State<'a, 'a>>,
    /// Bytes that were paid for.
    charged: usize,
}

impl Json<'_> {
    fn charge(&mut self) -> Result<(), Error> {
        let new = self.text.len() - self.charged;
        match self.state {
            Some(state) if new > 4096 => {
                self.charged = self.text.len();
                state.consume_fuel(new as u64 / 8)
            }
            _ => Ok(()),
        }
    }
}

struct JsonStyle {
    ensure_ascii: bool,
    sort_keys: bool,
    between: String,
    after_key: String,
    indent: Option<String>,
}

impl JsonStyle {
    fn write(&self, value: &Value, depth: usize, out: &mut Json) -> Result<(), Error> {
        // minijinja stops runaway templates, not runaway data; serde_json admits 128 levels.
        if depth > 256 {
            return Err(bounds::beyond("tojson: a value nests too deeply"));
        }
        out.charge()?;
        match value.kind() {
            ValueKind::None => out.text.push_str("null"),
            ValueKind::Bool => out.text.push_str(if value.is_true() { "true" } else { "false" }),
            ValueKind::Number if value.is_integer() => out.text.push_str(&value.to_string()),
            ValueKind::Number => out.text.push_str(&python_float(f64::try_from(value.clone())?)),
            ValueKind::String => self.write_string(value.as_str().unwrap_or_default(), &mut out.text),
            ValueKind::Seq | ValueKind::Iterable => {
                let items: Vec<Value> = value.try_iter()?.collect();
                self.write_all(('[', ']'), items.len(), depth, out, |i, out| self.write(&items[i], depth + 1, out))?;
            }
            ValueKind::Map => {
                let mut keys: Vec<Value> = value.try_iter()?.collect();
                if self.sort_keys {
                    keys.sort();
                }
                self.write_all(('{', '}'), keys.len(), depth, out, |i, out| {
                    match keys[i].kind() {
                        ValueKind::String => self.write(&keys[i], depth + 1, out)?,
                        _ => {
                            let mut key = Json { text: String::new(), state: out.state, charged: 0 };
                            self.write(&keys[i], depth + 1, &mut key)?;
                            self.write_string(&key.text, &mut out.text);
                        }
                    }
                    out.text.push_str(&self.after_key);
                    self.write(&value.get_item(&keys[i])?, depth + 1, out)
                })?;
            }
            kind => {
                return Err(Error::new(ErrorKind::InvalidOperation, format!("tojson: {kind} has no JSON form")));
            }
        }
        Ok(())
    }

    fn write_all(
        &self,
        (open, close): (char, char),
        len: usize,
        depth: usize,
        out: &mut Json,
        item: impl Fn(usize, &mut Json) -> Result<(), Error>,
    ) -> Result<(), Error> {
        let new_line = |depth: usize, out: &mut Json| {
            if let Some(indent) = &self.indent {
                out.text.push('\n');
                out.text.push_str(&indent.repeat(depth));
            }
        };
        out.text.push(open);
        for i in 0..len {
            if i > 0 {
                out.text.push_str(&self.between);
            }
            new_line(depth + 1, out);
            item(i, out)?;
        }
        if len > 0 {
            new_line(depth, out);
        }
        out.text.push(close);
        Ok(())
    }

    fn write_string(&self, text: &str, out: &mut String) {
        out.push('"');
        for c in text.chars() {
            match c {
                '"' => out.push_str("\\\""),
                '\\' => out.push_str("\\\\"),
                '\n' => out.push_str("\\n"),
                '\r' => out.push_str("\\r"),
                '\t' => out.push_str("\\t"),
                '\u{8}' => out.push_str("\\b"),
                '\u{c}' => out.push_str("\\f"),
                c if c < ' ' || (self.ensure_ascii && c > '~') => {
                    let mut units = [0; 2];
                    for unit in c.encode_utf16(&mut units) {
                        out.push_str(&format!("\\u{unit:04x}"));
                    }
                }
                c => out.push(c),
            }
        }
        out.push('"');
    }
}

/// `repr(float)`: the shortest digits that read back, with a signed exponent of two digits from 1e16 on.
fn python_float(x: f64) -> String {
    if !x.is_finite() {
        return match (x.is_nan(), x > 0.0) {
            (true, _) => "NaN".into(),
            (_, true) => "Infinity".into(),
            (_, false) => "-Infinity".into(),
        };
    }
    // Rust's `{:?}` changes to exponents at the same sizes as Python: below 1e-4 and from 1e16 on.
    let digits = format!("{x:?}");
    match digits.split_once('e') {
        Some((mantissa, exponent)) => match exponent.strip_prefix('-') {
            Some(e) => format!("{}e-{e:0>2}", mantissa.trim_end_matches(".0")),
            None => format!("{}e+{exponent:0>2}", mantissa.trim_end_matches(".0")),
        },
        None => digits,
    }
}
