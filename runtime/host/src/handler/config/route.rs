//! `[routes.NAME]`: handlers under one name, in order.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::Path;

use toml::Spanned;
use toml::de::DeValue;

use super::HandlerSpec;
use crate::handler::wrap::settings::{self, Settings};
use crate::toml_problems::{Problems, near};

/// The keys of its table, besides those of what stands around it.
const KEYS: [&str; 4] = ["handlers", "egress", "fallback_on", "context_fallback"];
/// Errors after which a route can ask its next handler.
const FALLBACK_ON: [&str; 9] = [
    "unavailable",
    "overloaded",
    "rate_limited",
    "timeout",
    "cut",
    "protocol",
    "authentication",
    "not_found",
    "internal",
];

/// Whether conversations of a route may leave this machine.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Egress {
    /// They may not.
    #[default]
    Deny,
    /// They may, with placeholders for what is likely personal.
    Redact,
    /// They may.
    Allow,
}

impl Egress {
    /// Its word in the file.
    pub fn word(self) -> &'static str {
        match self {
            Self::Deny => "deny",
            Self::Redact => "redact",
            Self::Allow => "allow",
        }
    }
}

/// What a route says besides its handlers.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Rules {
    /// `egress`.
    pub egress: Egress,
    /// `fallback_on`: the errors after which the next handler is asked.
    pub fallback_on: Option<Vec<String>>,
    /// `context_fallback`: handlers for conversations that are too long for one of the route.
    pub context_fallback: Vec<String>,
    /// What stands around the route.
    pub settings: Settings,
}

/// Reads `[routes.NAME]`: the names of its handlers, and what else it says.
pub(super) fn read<'a>(
    problems: &mut Problems<'a>,
    path: &Path,
    span: &Range<usize>,
    value: &Spanned<DeValue<'a>>,
    names: &[&str],
    handlers: &BTreeMap<String, HandlerSpec>,
) -> (Vec<String>, Rules) {
    let mut rules = Rules::default();
    let Some(table) = value.get_ref().as_table() else { return (Vec::new(), rules) };
    problems.unknown_keys(table, &[&KEYS[..], &settings::ROUTE_KEYS].concat());
    rules.settings = Settings::parse(problems, path, table);
    // What is wrong with it is said, and nothing else because of that.
    let mut is_known = true;
    if let Some(value) = table.get("egress")
        && let Some(egress) = problems.text("egress", value)
    {
        let known = [Egress::Deny, Egress::Redact, Egress::Allow];
        match known.into_iter().find(|known| known.word() == egress) {
            Some(egress) => rules.egress = egress,
            None => {
                let words = known.map(Egress::word);
                problems.at(value.span(), format!("`egress`: `{egress}` is unknown, {}", near(&egress, &words)));
                is_known = false;
            }
        }
    }
    if let Some(value) = table.get("fallback_on") {
        let words = problems.texts("fallback_on", value);
        for other in words.iter().filter(|word| !FALLBACK_ON.contains(&word.as_str())) {
            problems.at(value.span(), format!("`fallback_on`: `{other}` is unknown, {}", near(other, &FALLBACK_ON)));
        }
        rules.fallback_on = Some(words);
    }
    let deny = rules.egress == Egress::Deny && is_known;
    if let Some(list) = table.get("context_fallback") {
        rules.context_fallback = chain(problems, "context_fallback", list, names, handlers, deny);
    }
    let Some(list) = table.get("handlers") else {
        problems.at(span.clone(), "the route has no `handlers`; add handlers = [\"…\"]");
        return (Vec::new(), rules);
    };
    (chain(problems, "handlers", list, names, handlers, deny), rules)
}

/// A list of handlers, each of which may be asked.
fn chain<'a>(
    problems: &mut Problems<'a>,
    key: &str,
    list: &Spanned<DeValue<'a>>,
    names: &[&str],
    handlers: &BTreeMap<String, HandlerSpec>,
    deny: bool,
) -> Vec<String> {
    let Some(items) = list.get_ref().as_array() else {
        problems.wrong_type(key, list, "a list of names");
        return Vec::new();
    };
    if items.is_empty() {
        problems.at(list.span(), format!("`{key}`: the list is empty; name at least one handler"));
    }
    let mut chain: Vec<String> = Vec::new();
    for item in items.iter() {
        let Some(name) = problems.text(key, item) else { continue };
        if !names.contains(&name.as_str()) {
            problems.at(item.span(), format!("`{name}`: there is no such handler, {}", near(&name, names)));
        } else if chain.contains(&name) {
            problems.at(item.span(), format!("`{name}`: is in the list twice"));
        } else if let Some(host) = handlers.get(&name).and_then(HandlerSpec::far_host).filter(|_| deny) {
            let hint = "take it out, or say egress = \"allow\", or \"redact\" to hide what is likely personal";
            problems
                .at(item.span(), format!("`{name}`: sends conversations to {host}, and egress is \"deny\"; {hint}"));
        }
        chain.push(name);
    }
    chain
}
