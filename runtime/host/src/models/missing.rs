//! What is said of a model that is not on this machine: what of it is, and what brings it here.

use std::path::Path;

use crate::hub::{self, COMMIT_TOLD, HubName, stores};
use crate::near::{self, did_you_mean};
use crate::registry;

/// Why there is no such model on this machine, and what to do; `why` one of the hub is not downloaded.
pub fn not_there(name: &Path, why: &str) -> String {
    let text = name.display();
    let near = near::model(name);
    let Some(hub_name) = name.to_str().and_then(HubName::parse) else {
        let near = did_you_mean(near);
        return format!(
            "{text}: no such model{near}\nhint: name a Hugging Face directory, a .gguf file, or a model of the Hugging Face hub as `owner/name`; `homeroom list-models` shows the models that are here"
        );
    };
    if HubName::typed(name).is_none() {
        let (owner, _) = hub_name.repo.split_once('/').unwrap_or_default();
        let (near, bring) = (did_you_mean(near), how_to_bring(&hub_name));
        return format!(
            "{text}: no such file or directory, and no model of that name is on this machine{near}\nhint: `{owner}` is a directory here, so that this may be a path that is wrong, and nothing is downloaded; if a model of the Hugging Face hub is meant, {bring}"
        );
    }
    not_here(&hub_name, why)
}

/// As [`not_there`], of a name on the hub.
pub(super) fn not_here(name: &HubName, why: &str) -> String {
    let bring = how_to_bring(name);
    let hint = match near::model(Path::new(&name.to_string())).filter(|near| *near != name.repo) {
        Some(near) => format!("did you mean `{near}`? if not, {bring}"),
        None => bring,
    };
    format!("{name}: not on this machine{}; {why}\nhint: {hint}", others(name))
}

/// What brings a model of the hub here.
pub(super) fn how_to_bring(name: &HubName) -> String {
    if hub::offline().is_none() {
        return format!("`homeroom pull {name}` downloads it");
    }
    let folder = format!("models--{}", name.repo.replace('/', "--"));
    let looked: Vec<String> = stores::stores().iter().map(|store| store.display().to_string()).collect();
    format!(
        "bring it: on a machine with a network `HF_HUB_CACHE=/media/stick homeroom pull {name}`, here `homeroom import /media/stick/{folder}`; looked in: {}",
        looked.join(", ")
    )
}

/// What there is of the same model: other quantizations, or other commits.
fn others(name: &HubName) -> String {
    let bases = registry::bases().unwrap_or_default();
    let same = bases.into_iter().filter(|base| base.name.eq_ignore_ascii_case(&name.repo) && !base.forms.is_empty());
    let (mut forms, mut commits) = (Vec::new(), Vec::new());
    for base in same {
        forms.extend(base.forms);
        commits.extend(base.commits.iter().map(|commit| commit[..COMMIT_TOLD.min(commit.len())].to_owned()));
    }
    for names in [&mut forms, &mut commits] {
        names.sort();
        names.dedup();
    }
    match (forms.as_slice(), &name.revision) {
        ([], _) => String::new(),
        (_, None) => format!(", which has {} of it", forms.join(", ")),
        (_, Some(_)) => format!(", which has {} of it at {}", forms.join(", "), commits.join(", ")),
    }
}
