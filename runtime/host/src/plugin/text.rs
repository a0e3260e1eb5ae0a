//! Text of a plugin before anybody sees it: what acts on a terminal is taken out, and what is without end is cut.

use homeroom_abi::describe::{Description, PluginError};
use homeroom_abi::limits::is_hidden;
use homeroom_abi::plan::Plan;
use serde_json::Value;

/// Bytes of an error that are shown.
const MESSAGE_BYTES_MAX: usize = 16 << 10;
/// Bytes of a source file's name.
const FILE_BYTES_MAX: usize = 512;

/// A text of several lines, such as a panic's.
pub fn lines(text: &str) -> String {
    let kept = text.trim_end().chars().filter(|c| matches!(c, '\n' | '\t') || !is_hidden(*c));
    cut(kept.collect(), MESSAGE_BYTES_MAX)
}

/// A text of one line.
pub fn line(text: &str) -> String {
    let kept = text.trim().chars().map(|c| if matches!(c, '\n' | '\t') { ' ' } else { c }).filter(|c| !is_hidden(*c));
    cut(kept.collect(), MESSAGE_BYTES_MAX)
}

fn cut(mut text: String, most: usize) -> String {
    if text.len() > most {
        text.truncate((0..=most).rfind(|end| text.is_char_boundary(*end)).unwrap_or(0));
        text.push('…');
    }
    text
}

/// An error, with its place.
pub fn error(PluginError { message, at }: &PluginError) -> String {
    match at {
        Some(at) => format!("{} ({}:{})", lines(message), cut(line(&at.file), FILE_BYTES_MAX), at.line),
        None => lines(message),
    }
}

/// A description: names are refused where they are no names; the rest is cleaned.
pub fn clean_description(about: &mut Description) {
    about.version = line(&about.version);
    about.doc = line(&about.doc);
    for option in &mut about.options {
        option.doc = line(&option.doc);
        clean_value(&mut option.default);
    }
}

fn clean_value(value: &mut Value) {
    match value {
        Value::String(text) => *text = line(text),
        Value::Array(values) => values.iter_mut().for_each(clean_value),
        Value::Object(map) => {
            let entries = std::mem::take(map).into_iter();
            *map = entries
                .map(|(name, mut value)| {
                    clean_value(&mut value);
                    (line(&name), value)
                })
                .collect();
        }
        Value::Null | Value::Bool(_) | Value::Number(_) => {}
    }
}

/// The places in a plan's recipes, which errors name.
pub fn clean_plan(plan: &mut Plan) {
    for recipes in &mut plan.recipes {
        let all =
            std::iter::once(&mut recipes.forward).chain(&mut recipes.merged_weight).chain(&mut recipes.merged_bias);
        for at in all.flat_map(|recipe| &mut recipe.nodes).filter_map(|node| node.at.as_mut()) {
            if at.file.len() > FILE_BYTES_MAX || at.file.chars().any(is_hidden) {
                at.file = cut(line(&at.file), FILE_BYTES_MAX);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use homeroom_abi::describe::Source;

    #[test]
    fn what_acts_on_a_terminal_is_taken_out() {
        assert_eq!(line("\x1b]0;owned\x07\x1b[2Ja \u{9b}31mb\r\n\u{202e}c\u{7f}"), "]0;owned[2Ja 31mb c");
        assert_eq!(lines("left: 1\n\tright: 2\x08\n\n"), "left: 1\n\tright: 2");
        let long = error(&PluginError {
            message: "é".repeat(1 << 20),
            at: Some(Source { file: "\x1b[1m/a".repeat(1 << 20), line: 3 }),
        });
        assert!(
            long.len() < MESSAGE_BYTES_MAX + FILE_BYTES_MAX + 32 && long.ends_with(":3)") && !long.contains('\x1b')
        );
    }
}
