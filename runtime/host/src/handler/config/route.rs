//! `[routes.NAME]`: handlers under one name, in order.

use std::collections::BTreeMap;
use std::ops::Range;

use toml::Spanned;
use toml::de::DeValue;

use super::HandlerSpec;
use crate::toml_problems::{Problems, near};

/// The keys of its table.
const KEYS: [&str; 2] = ["handlers", "egress"];

/// Reads `[routes.NAME]`: the names of its handlers.
pub(super) fn read<'a>(
    problems: &mut Problems<'a>,
    span: &Range<usize>,
    value: &Spanned<DeValue<'a>>,
    names: &[&str],
    handlers: &BTreeMap<String, HandlerSpec>,
) -> Vec<String> {
    let Some(table) = value.get_ref().as_table() else { return Vec::new() };
    problems.unknown_keys(table, &KEYS);
    let egress = table.get("egress").and_then(|value| Some((value, problems.text("egress", value)?)));
    let deny = match egress.as_ref().map(|(value, egress)| (value, egress.as_str())) {
        None | Some((_, "deny")) => true,
        Some((_, "allow")) => false,
        Some((value, "redact")) => {
            problems.at(value.span(), "`egress`: \"redact\" is not supported yet; use \"deny\" or \"allow\"");
            false
        }
        Some((value, other)) => {
            let known = ["deny", "redact", "allow"];
            problems.at(value.span(), format!("`egress`: `{other}` is unknown, {}", near(other, &known)));
            false
        }
    };
    let Some(list) = table.get("handlers") else {
        problems.at(span.clone(), "the route has no `handlers`; add handlers = [\"…\"]");
        return Vec::new();
    };
    let Some(items) = list.get_ref().as_array() else {
        problems.wrong_type("handlers", list, "a list of names");
        return Vec::new();
    };
    if items.is_empty() {
        problems.at(list.span(), "`handlers`: the list is empty; name at least one handler");
    }
    let mut chain: Vec<String> = Vec::new();
    for item in items.iter() {
        let Some(name) = problems.text("handlers", item) else { continue };
        if !names.contains(&name.as_str()) {
            problems.at(item.span(), format!("`{name}`: there is no such handler, {}", near(&name, names)));
        } else if chain.contains(&name) {
            problems.at(item.span(), format!("`{name}`: is in the list twice"));
        } else if let Some(host) = handlers.get(&name).and_then(HandlerSpec::far_host).filter(|_| deny) {
            let hint = "take it out, or say egress = \"allow\"";
            problems
                .at(item.span(), format!("`{name}`: sends conversations to {host}, and egress is \"deny\"; {hint}"));
        }
        chain.push(name);
    }
    chain
}
