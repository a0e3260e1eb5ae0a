//! `kind = "replay"`: recorded answers.

use std::ops::Range;
use std::path::{Path, PathBuf};

use toml::de::DeTable;

use super::{HandlerSpec, missing, refuse, with_settings};
use crate::handler::replay::{By, ReplaySpec};
use crate::handler::wrap::settings;
use crate::toml_problems::{Problems, near};

/// The keys of its table.
pub(super) const KEYS: [&str; 3] = ["kind", "file", "match"];

/// Reads `[handlers.NAME]`.
pub(super) fn read<'a>(
    problems: &mut Problems<'a>,
    path: &Path,
    name: &str,
    span: Range<usize>,
    table: &DeTable<'a>,
) -> Option<HandlerSpec> {
    problems.unknown_keys(table, &with_settings(&KEYS));
    refuse(problems, table, &settings::DEFAULT_KEYS, "recorded answers are given as they are");
    let by = table.get("match").and_then(|value| Some((value, problems.text("match", value)?)));
    let by = match by.as_ref().map(|(value, by)| (value, by.as_str())) {
        None | Some((_, "user")) => By::User,
        Some((_, "order")) => By::Order,
        Some((value, other)) => {
            problems.at(value.span(), format!("`match`: `{other}` is unknown, {}", near(other, &["user", "order"])));
            By::User
        }
    };
    if !table.contains_key("file") {
        missing(problems, span, name, "file");
    }
    let file = table.get("file").and_then(|value| problems.text("file", value))?;
    let file = path.parent().map_or_else(|| PathBuf::from(&file), |directory| directory.join(&file));
    Some(HandlerSpec::Replay(ReplaySpec { file, by }))
}
