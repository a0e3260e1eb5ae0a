//! What a chat template may use up. It is code of whoever made the model, and it runs in the program that answers
//! everybody: running out of stack or memory there would end the program, and no caller could catch it.
//!
//! * Work: minijinja's fuel counts every instruction, every byte written or made and every item visited by its own
//!   filters. A rendering has [`FUEL`], more for a long conversation. 64 bytes cost one, so it bounds memory as well.
//! * Work within one operation: [`super::source`] puts the filter `homeroom_weighed` on what is compared, joined or
//!   printed. It walks the value once and charges for the walk. Lists are not repeated, sums of them are bounded
//!   (`homeroom_summed`), and a slice becomes a list at once.
//! * Depth: a weighed value has at most [`DEPTH_MAX`] levels; each value kept in a namespace pays for the level that it
//!   may add (`homeroom_kept`), and no namespace is kept in a namespace, so no value holds itself. A template that may
//!   nest deep all the same (macros, recursion) is rendered on a stack of its own, as all are compiled.

use std::borrow::Cow;
use std::fmt;

use anyhow::{Result, anyhow, ensure};
use minijinja::value::{Kwargs, Rest, ValueKind, ValueOrKwargs};
use minijinja::{Environment, Error, ErrorKind, State, Value, filters, tests};
use serde_json::Value as Json;

use super::{Given, NAME};
use crate::guard::quietly;

/// Fuel of a rendering of up to 100 messages. A long conversation in the most wordy template of a published model takes
/// some 1,000 a message.
pub(super) const FUEL: u64 = 2_000_000;
/// Fuel for each message beyond these.
const FUEL_A_MESSAGE: u64 = 20_000;
/// Fuel for each byte of messages, tools and documents.
const FUEL_A_BYTE: u64 = 4;
/// The most that any rendering is given.
const FUEL_MAX: u64 = 16_000_000;
/// Most levels of lists and mappings within one another that are compared or printed. JSON has 128 at most.
const DEPTH_MAX: usize = 256;
/// Stack to compile on, and to render on what may nest deep. It is reserved, and taken as it is used.
const STACK_BYTES: usize = 256 << 20;
/// Longest list that is added to another: sums of lists are made in one instruction, whatever they cost.
const SUMMED_MAX: usize = 100_000;
/// Longest text that a template writes by itself, in bytes, and how many more for each byte of messages and tools.
const WRITTEN_MAX: usize = 1 << 20;
const WRITTEN_A_BYTE: usize = 8;
/// Longest detail of an error, in characters: a template writes its own.
const DETAIL_MAX: usize = 1000;
/// Widest indentation of `tojson`, and longest format of `strftime_now`, in characters.
const WIDTH_MAX: usize = 256;

/// A template used more than it may.
#[derive(Debug)]
pub(super) struct Exceeded(pub String);

impl fmt::Display for Exceeded {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Exceeded {}

/// Marks details of errors that say that a bound was met.
const BOUND: &str = "stopped: ";

/// An error for what would go beyond a bound.
pub(super) fn beyond(what: &str) -> Error {
    Error::new(ErrorKind::InvalidOperation, format!("{BOUND}{what}"))
}

/// Whether an error says that a bound was met; `detail` is its own.
pub(super) fn is_beyond(kind: ErrorKind, detail: Option<&str>) -> bool {
    let said = |detail: &str| detail.starts_with(BOUND) || detail == "recursion limit exceeded";
    kind == ErrorKind::OutOfFuel || detail.is_some_and(said)
}

/// The fuel for a rendering of these.
pub(super) fn fuel(messages: &[Json], given: Given<'_>) -> u64 {
    let bytes = bytes(messages, given);
    let asked = FUEL_A_MESSAGE.saturating_mul(messages.len() as u64);
    let asked = asked.saturating_add(FUEL_A_BYTE.saturating_mul(bytes as u64));
    asked.clamp(FUEL, FUEL_MAX)
}

/// Checks how long a rendering of these is: a caller makes tokens of it.
///
/// # Errors
/// When it is longer than these and what a template adds to them.
pub(super) fn written(text: String, messages: &[Json], given: Given<'_>) -> Result<String> {
    if text.len() > WRITTEN_MAX {
        let most = WRITTEN_MAX.saturating_add(bytes(messages, given).saturating_mul(WRITTEN_A_BYTE));
        let n = text.len();
        ensure!(
            n <= most,
            Exceeded(format!("{NAME}: stopped: it writes {n} bytes, at most {most} for these messages"))
        );
    }
    Ok(text)
}

/// A detail of an error, cut to a length that can be shown.
pub(super) fn cut(detail: &str) -> String {
    match detail.char_indices().nth(DETAIL_MAX) {
        Some((at, _)) => format!("{}…", &detail[..at]),
        None => detail.to_owned(),
    }
}

fn bytes(messages: &[Json], given: Given<'_>) -> usize {
    messages.iter().chain(given.values()).map(text_bytes).sum()
}

fn text_bytes(value: &Json) -> usize {
    match value {
        Json::String(text) => text.len(),
        Json::Array(items) => items.iter().map(text_bytes).sum::<usize>() + items.len(),
        Json::Object(fields) => fields.iter().map(|(key, value)| key.len() + text_bytes(value)).sum(),
        _ => 1,
    }
}

/// Runs `run`, whose panics become errors, on a stack of its own if it may go `deep`.
pub(super) fn on_stack<T: Send>(deep: bool, run: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    let guarded =
        || quietly(run).unwrap_or_else(|| Err(anyhow!(Exceeded(format!("{NAME}: stopped: it fails inside")))));
    if !deep {
        return guarded();
    }
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new().name("chat template".into()).stack_size(STACK_BYTES);
        let thread = thread.spawn_scoped(scope, guarded).map_err(|e| anyhow!("{NAME}: no thread to render on: {e}"))?;
        thread.join().unwrap_or_else(|_| Err(anyhow!("{NAME}: its thread failed")))
    })
}

/// Adds the bounded forms of what minijinja leaves open.
pub(super) fn add_to(env: &mut Environment<'static>) {
    env.set_fuel(Some(FUEL));
    env.set_debug(false); // or errors hold copies of all variables
    env.remove_global("debug"); // prints them
    // A template has no others to include, itself least of all.
    env.set_path_join_callback(|_, _| "another template".into());

    env.add_filter("homeroom_weighed", |state: &State, value: Value| weigh(state, &value).map(|()| value));
    env.add_filter("homeroom_factor", factor);
    env.add_filter("homeroom_kept", kept);
    env.add_filter("homeroom_summed", summed);
    env.add_filter("homeroom_sliced", sliced);
    env.add_filter("homeroom_listed", listed);
    env.add_filter("map", map_filter);
    env.add_filter("split", split_filter);
    env.add_filter("lines", |state: &State, value: &Value| {
        charge_pieces(state, value.as_str(), Some("\n"))?;
        filters::lines(value)
    });
    add_comparison(env, &["eq", "equalto", "=="], |a, b| a == b);
    add_comparison(env, &["ne", "!="], |a, b| a != b);
    add_comparison(env, &["lt", "lessthan", "<"], |a, b| a < b);
    add_comparison(env, &["le", "<="], |a, b| a <= b);
    add_comparison(env, &["gt", "greaterthan", ">"], |a, b| a > b);
    add_comparison(env, &["ge", ">="], |a, b| a >= b);
    add_walk(env, "lower", tests::is_lower);
    add_walk(env, "upper", tests::is_upper);
    add_ends(env, "startingwith", tests::is_startingwith);
    add_ends(env, "endingwith", tests::is_endingwith);
    env.add_filter("sum", sum_filter);
    env.add_test("in", |state: &State, value: &Value, container: &Value| -> Result<bool, Error> {
        weigh(state, value)?;
        weigh(state, container)?;
        tests::is_in(state, value, container)
    });
}

fn add_comparison(env: &mut Environment<'static>, names: &[&'static str], compare: fn(&Value, &Value) -> bool) {
    for name in names {
        env.add_test(*name, move |state: &State, a: &Value, b: &Value| -> Result<bool, Error> {
            // Only lists and mappings among themselves are walked.
            if a.as_object().is_some() && b.as_object().is_some() {
                weigh(state, a)?;
                weigh(state, b)?;
            }
            let texts = a.as_str().zip(b.as_str());
            state.consume_fuel(texts.map_or(0, |(a, b)| a.len().min(b.len()) as u64 / 256))?;
            Ok(compare(a, b))
        });
    }
}

/// A test of each character of a text.
fn add_walk(env: &mut Environment<'static>, name: &'static str, test: fn(&Value) -> bool) {
    env.add_test(name, move |state: &State, value: &Value| -> Result<bool, Error> {
        state.consume_fuel(value.as_str().map_or(0, str::len) as u64 / 16)?;
        Ok(test(value))
    });
}

/// A test of the ends of a text, or of what a value is as a text.
fn add_ends(env: &mut Environment<'static>, name: &'static str, test: fn(Cow<'_, str>, Cow<'_, str>) -> bool) {
    env.add_test(name, move |state: &State, value: &Value, end: &Value| -> Result<bool, Error> {
        weigh(state, value)?;
        weigh(state, end)?;
        let text = |value: &Value| -> Result<String, Error> {
            let text = value.as_str().map_or_else(|| value.to_string(), str::to_owned);
            state.consume_fuel(text.len() as u64 / 64)?;
            Ok(text)
        };
        Ok(test(text(value)?.into(), text(end)?.into()))
    });
}

/// A sum of texts copies what was added so far at each step.
fn sum_filter(
    state: &State,
    values: Value,
    attribute: Option<&str>,
    start: Option<Value>,
    options: Kwargs,
) -> Result<Value, Error> {
    let first = match &start {
        Some(start) => Some(start.clone()),
        None => options.peek::<Option<Value>>("start")?,
    };
    if first.is_some_and(|first| first.as_str().is_some()) {
        let mut scales = Scales { state, units: 0, namespaces: true };
        let (mut bytes, mut steps) = (0u64, 0u64);
        for value in values.try_iter()? {
            scales.put(&value, 0)?;
            let item = match attribute {
                Some(attribute) => value.get_attr(attribute)?,
                None => value,
            };
            bytes += item.as_str().map_or(64, str::len) as u64;
            steps += bytes / 64;
        }
        scales.charge(1)?;
        state.consume_fuel(steps)?;
    }
    filters::sum(state, values, attribute, start, options)
}

/// Charges for walking `value` to its end, before something does.
///
/// # Errors
/// When there is not enough fuel for that, or `value` nests deeper than [`DEPTH_MAX`].
pub(super) fn weigh(state: &State, value: &Value) -> Result<(), Error> {
    if value.as_object().is_none() {
        return Ok(());
    }
    let mut scales = Scales { state, units: 0, namespaces: true };
    scales.put(value, 0)?;
    scales.charge(1)
}

/// A walk over a value.
struct Scales<'a> {
    state: &'a State<'a, 'a>,
    /// Not yet charged, in 64ths of fuel.
    units: u64,
    /// Namespaces may be met.
    namespaces: bool,
}

impl Scales<'_> {
    fn put(&mut self, value: &Value, depth: usize) -> Result<(), Error> {
        if depth > DEPTH_MAX {
            return Err(beyond("a value nests too deeply"));
        }
        self.units += 32 + value.as_str().map_or(0, |text| text.len() as u64);
        self.charge(64 * 64)?;
        let Some(object) = value.as_object() else {
            return Ok(());
        };
        // A loop knows the items around it.
        let of = |name: &str| object.type_name().ends_with(name);
        if !self.namespaces && (of("::Namespace") || of("::Loop")) {
            return Err(beyond("a namespace is kept in a namespace"));
        }
        match value.kind() {
            ValueKind::Seq | ValueKind::Iterable => {
                for item in value.try_iter()? {
                    self.put(&item, depth + 1)?;
                }
            }
            ValueKind::Map => {
                for key in value.try_iter()? {
                    self.put(&key, depth + 1)?;
                    self.put(&value.get_item(&key)?, depth + 1)?;
                }
            }
            _ => {}
        }
        Ok(())
    }

    /// Charges what has gathered, if it is as much as `least`.
    fn charge(&mut self, least: u64) -> Result<(), Error> {
        if self.units >= least {
            self.state.consume_fuel(self.units.div_ceil(64))?;
            self.units = 0;
        }
        Ok(())
    }
}

/// A factor of a product: lists are not repeated, since minijinja makes that no longer list until something walks it.
fn factor(value: Value) -> Result<Value, Error> {
    match value.kind() {
        ValueKind::Seq | ValueKind::Iterable => Err(beyond("it repeats a list")),
        _ => Ok(value),
    }
}

/// A term of a sum.
fn summed(value: Value) -> Result<Value, Error> {
    match value.as_object().and_then(|object| object.enumerator_len()) {
        Some(len) if len > SUMMED_MAX => Err(beyond(&format!("it adds to a list of {len} items"))),
        _ => Ok(value),
    }
}

/// What is sliced: the slice goes over all of it.
fn sliced(state: &State, value: Value) -> Result<Value, Error> {
    if let Some(len) = value.as_object().and_then(|object| object.enumerator_len()) {
        state.consume_fuel(len as u64 / 4)?;
    }
    Ok(value)
}

/// A slice as a list, so that it is not carried out anew each time that it is walked.
fn listed(state: &State, value: Value) -> Result<Value, Error> {
    if value.kind() != ValueKind::Iterable {
        return Ok(value);
    }
    let mut items = Vec::new();
    for item in value.try_iter()? {
        if items.len().is_multiple_of(64) {
            state.consume_fuel(32)?;
        }
        items.push(item);
    }
    Ok(Value::from(items))
}

/// A value kept in a namespace. `wraps`: how many lists, mappings and calls its expression has, each of which may put
/// what was kept before into another level; `lazy`: some of them are only carried out when they are walked; `leaks`: a
/// namespace of the template may have come into a value.
fn kept(state: &State, value: Value, wraps: u64, lazy: bool, leaks: bool) -> Result<Value, Error> {
    if value.as_object().is_some() {
        state.consume_fuel(10 + 1000 * wraps + if lazy { 5000 } else { 0 })?;
        if leaks {
            let mut scales = Scales { state, units: 0, namespaces: false };
            scales.put(&value, 0)?;
            scales.charge(1)?;
        }
    }
    Ok(value)
}

/// `map(attribute='role')` looks, `map('upper')` walks each item.
fn map_filter(state: &mut State, value: Value, args: Rest<ValueOrKwargs>) -> Result<Vec<Value>, Error> {
    args.iter().try_for_each(|arg| weigh(state, arg))?;
    if !args.first().is_some_and(|arg| arg.is_kwargs()) {
        weigh(state, &value)?;
    }
    filters::map(state, value, args)
}

fn split_filter(state: &State, value: &Value, by: Option<&str>, most: Option<i64>) -> Result<Value, Error> {
    charge_pieces(state, value.as_str(), by)?;
    filters::split(value, by.map(Into::into), most)
}

/// Charges for the list of pieces that `text` falls into.
pub(super) fn charge_pieces(state: &State, text: Option<&str>, by: Option<&str>) -> Result<(), Error> {
    let text = text.unwrap_or_default();
    // Short texts are paid for by their bytes.
    if text.len() < 4096 {
        return Ok(());
    }
    let pieces = match by {
        Some(by) => text.matches(by).count(),
        None => text.split_whitespace().count(),
    };
    state.consume_fuel(pieces as u64 / 2 + 1)
}

/// Checks a width that a template asks for.
pub(super) fn width(asked: usize, what: &str) -> Result<usize, Error> {
    if asked > WIDTH_MAX {
        return Err(beyond(&format!("{what} of {asked} characters")));
    }
    Ok(asked)
}

/// Checks a format: numbers in it are widths, and some formatters make room for them before they look.
pub(super) fn format(text: &str, what: &str) -> Result<(), Error> {
    let mut digits = 0;
    for c in text.chars() {
        digits = if c.is_ascii_digit() { digits + 1 } else { 0 };
        if digits > 3 {
            return Err(beyond(&format!("{what} with a width of more than three digits")));
        }
    }
    Ok(())
}
