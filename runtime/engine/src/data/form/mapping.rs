//! Which of some names is what: as the user says, and else by names that are known.

use super::super::columns::{Columns, Role};
use super::super::names::{Sure, plain, role_of};
use super::super::row::{RowFormat, RowKind};

/// Which of some names is what.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Mapping {
    /// What rows are, but for a label that may rate them.
    pub format: RowFormat,
    /// Places among the names.
    pub roles: Vec<(Role, usize)>,
}

/// Why names do not say what is what.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Unclear {
    /// A name that the user gave is not there.
    Missing(Role, String),
    /// Several may be one thing.
    Ambiguous(Role, Vec<String>),
    /// One is there, and the other is not.
    Half(Role, String),
    /// None is known.
    Unknown,
}

/// Names of what is to be done, beside which `input` is what it is done to: Alpaca's rows, in any language.
const INSTRUCTIONS: [&str; 12] = [
    "instruction",
    "instructions",
    "anweisung",
    "instrucción",
    "instruccion",
    "consigna",
    "consigne",
    "istruzione",
    "instrução",
    "opdracht",
    "polecenie",
    "指令",
];

/// Names of what an instruction is done to.
const INPUTS: [&str; 6] = ["input", "eingabe", "entrada", "entrée", "输入", "入力"];

/// Finds out which of some names is what: as the user says, and else by names that are known.
pub(super) fn map(names: &[&str], columns: &Columns, wanted: Option<RowKind>) -> Result<Mapping, Unclear> {
    let mut given = Vec::new();
    for (role, name) in columns.iter() {
        given.push((role, find(names, name).ok_or_else(|| Unclear::Missing(role, name.to_owned()))?));
    }
    let is_given = |role: Role| given.iter().any(|(other, _)| *other == role);
    let is_taken = |index: usize| given.iter().any(|(_, taken)| *taken == index);
    let known: Vec<(Role, Sure, usize)> = (0..names.len())
        .filter(|index| !is_taken(*index))
        .filter_map(|index| role_of(names[index]).map(|(role, sure)| (role, sure, index)))
        .filter(|(role, ..)| !is_given(*role))
        .collect();
    // What the user says, or the surest; of several that are as sure none.
    let pick = |role: Role| -> Result<Option<usize>, Unclear> {
        if let Some((_, index)) = given.iter().find(|(other, _)| *other == role) {
            return Ok(Some(*index));
        }
        let of_role = || known.iter().filter(|(other, ..)| *other == role);
        let Some(best) = of_role().map(|(_, sure, _)| *sure).max() else { return Ok(None) };
        let mut surest = of_role().filter(|(_, sure, _)| *sure == best).map(|(.., index)| *index);
        match (surest.next(), surest.next()) {
            (first, None) => Ok(first),
            (first, second) => {
                let all = first.into_iter().chain(second).chain(surest);
                Err(Unclear::Ambiguous(role, all.map(|index| names[index].to_owned()).collect()))
            }
        }
    };
    let is_pair = is_given(Role::Prompt) || is_given(Role::Completion);
    let mut roles = Vec::new();
    let format = 'format: {
        let is_judged = is_given(Role::Chosen) || !is_pair && !is_given(Role::Text) && !is_given(Role::Messages);
        if is_judged
            && let (Some(chosen), Some(rejected)) = (pick(Role::Chosen)?, pick(Role::Rejected)?)
            && (wanted != Some(RowKind::Demonstration) || pick(Role::Messages)?.is_none())
        {
            roles.extend(pick(Role::Prompt)?.map(|index| (Role::Prompt, index)));
            roles.extend([(Role::Chosen, chosen), (Role::Rejected, rejected)]);
            break 'format RowFormat::Preference;
        }
        if !is_pair
            && !is_given(Role::Text)
            && let Some(messages) = pick(Role::Messages)?
        {
            roles.push((Role::Messages, messages));
            break 'format RowFormat::Messages;
        }
        if !is_given(Role::Text) {
            match (pick(Role::Prompt), pick(Role::Completion)) {
                (Ok(Some(prompt)), Ok(Some(completion))) => {
                    roles.extend([(Role::Prompt, prompt), (Role::Completion, completion)]);
                    roles.extend(pick(Role::Label)?.map(|index| (Role::Label, index)));
                    break 'format RowFormat::PromptCompletion;
                }
                (Err(unclear), Ok(Some(_)) | Err(_)) | (Ok(Some(_)), Err(unclear)) => return Err(unclear),
                _ => {}
            }
        }
        if let Some(text) = pick(Role::Text)?.filter(|_| !is_pair) {
            roles.push((Role::Text, text));
            break 'format RowFormat::Text;
        }
        let half = [Role::Prompt, Role::Completion, Role::Chosen, Role::Rejected].into_iter().find_map(|role| {
            let index = pick(role).ok().flatten()?;
            Some(Unclear::Half(role, names[index].to_owned()))
        });
        return Err(half.unwrap_or(Unclear::Unknown));
    };
    if let Some((_, prompt)) = roles.iter().find(|(role, _)| *role == Role::Prompt).copied() {
        let is_instruction = INSTRUCTIONS.contains(&&*plain(names[prompt]));
        let is_input = |(role, _, index): &&(Role, Sure, usize)| match role {
            Role::Input => true,
            Role::Prompt => is_instruction && *index != prompt && INPUTS.contains(&&*plain(names[*index])),
            _ => false,
        };
        let inputs = known.iter().filter(is_input).map(|(.., index)| (Role::Input, *index));
        roles.extend(given.iter().copied().filter(|(role, _)| *role == Role::Input).chain(inputs));
    }
    if format != RowFormat::Text {
        roles.extend(pick(Role::System)?.map(|index| (Role::System, index)));
        roles.extend(pick(Role::Tools)?.map(|index| (Role::Tools, index)));
    }
    // What the user names and nothing reads would be lost.
    match given.iter().find(|used| !roles.contains(used)) {
        Some((role, index)) => Err(Unclear::Half(*role, names[*index].to_owned())),
        None => Ok(Mapping { format, roles }),
    }
}

/// The place of a name that a user typed, or of a column by its number.
pub(super) fn find(names: &[&str], name: &str) -> Option<usize> {
    let exact = names.iter().position(|other| *other == name);
    let alike = || {
        let mut alike = (0..names.len()).filter(|index| plain(names[*index]) == plain(name) && !plain(name).is_empty());
        alike.next().filter(|_| alike.next().is_none())
    };
    let number = || name.parse::<usize>().ok()?.checked_sub(1).filter(|index| *index < names.len());
    exact.or_else(alike).or_else(number)
}

impl Mapping {
    /// The places of a role.
    pub fn of(&self, role: Role) -> impl Iterator<Item = usize> {
        self.roles.iter().filter(move |(other, _)| *other == role).map(|(_, index)| *index)
    }

    /// What is what, in words. `name`: of a place.
    pub fn words(&self, format: RowFormat, name: impl Fn(usize) -> String) -> String {
        let names = |role: Role| self.of(role).map(&name).collect::<Vec<_>>().join(" + ");
        let named = |role: Role| match names(role) {
            name if plain(&name) == role.name() => name,
            name => format!("{name} → {}", role.name()),
        };
        let mut words: Vec<String> = Vec::new();
        let mut add = |text: String| words.push(text);
        if self.of(Role::System).next().is_some() {
            add(named(Role::System));
        }
        if let Some(prompt) = self.of(Role::Prompt).next() {
            let asked: Vec<String> = std::iter::once(prompt).chain(self.of(Role::Input)).map(&name).collect();
            add(format!("{} → user", asked.join(" + ")));
        }
        match format {
            RowFormat::Messages => add(named(Role::Messages)),
            RowFormat::PromptCompletion => add(format!("{} → assistant", names(Role::Completion))),
            RowFormat::Rated => {
                add(format!("{} → assistant", names(Role::Completion)));
                add(named(Role::Label));
            }
            RowFormat::Preference => {
                add(named(Role::Chosen));
                add(named(Role::Rejected));
            }
            RowFormat::Text => add(named(Role::Text)),
        }
        if self.of(Role::Tools).next().is_some() {
            add(named(Role::Tools));
        }
        words.join(", ")
    }

    /// The keys that all rows of a file have alike.
    pub fn keys(&self, format: RowFormat, name: impl Fn(usize) -> String) -> String {
        let wanted: &[Role] = match format {
            RowFormat::Messages => &[Role::Messages],
            RowFormat::PromptCompletion => &[Role::Prompt, Role::Completion],
            RowFormat::Rated => &[Role::Prompt, Role::Completion, Role::Label],
            RowFormat::Preference => &[Role::Chosen, Role::Rejected],
            RowFormat::Text => &[Role::Text],
        };
        let names: Vec<String> =
            wanted.iter().flat_map(|role| self.of(*role)).map(|at| format!("`{}`", name(at))).collect();
        names.join(" and ")
    }
}

/// Whether rows may lack it.
pub(super) fn is_optional(role: Role) -> bool {
    matches!(role, Role::Input | Role::System | Role::Tools | Role::Label)
}
