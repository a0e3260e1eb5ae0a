//! What a refusal of the hub means, and what to do about it.

use anyhow::{Error, anyhow};
use homeroom_abi::describe::nearest;

use super::client::{Client, Refusal};
use super::{HubName, stores};

/// The message of a refusal to a question about a model, or about one of its files.
pub(super) fn explain(client: &Client, name: &HubName, file: Option<&str>, refusal: &Refusal) -> Error {
    let Refusal { status, code, reason } = refusal;
    let page = client.endpoint.at(&name.repo);
    let settings = client.endpoint.at("settings/tokens");
    let from = client.token.as_ref().map(|token| token.from.as_str());
    let reason = if reason.is_empty() { String::new() } else { format!(" ({reason})") };
    let repo = &name.repo;
    match (status, code.as_str(), from) {
        (_, "GatedRepo", None) => anyhow!(
            "{name}: its owner asks you to accept terms before it is downloaded{reason}\nhint: accept them on {page}, then set \
             HF_TOKEN to a token of your account, from {settings}"
        ),
        (_, "GatedRepo", Some(from)) => anyhow!(
            "{name}: its owner has not given the account of the token from {from} access{reason}\nhint: visit {page} with that \
             account and accept the terms; some owners answer later, and a fine-grained token needs the right to read gated models"
        ),
        (_, "RevisionNotFound", _) => {
            anyhow!(
                "{name}: there is {repo}, and no revision `{}` of it\nhint: {page} lists its branches and tags",
                name.revision()
            )
        }
        (_, "EntryNotFound", _) => {
            let file = file.unwrap_or("a file");
            anyhow!(
                "{name}: {file} is in the hub's list and not on the hub{reason}\nhint: try again later, or another revision"
            )
        }
        (_, "RepoNotFound", None) | (401, _, None) => anyhow!(
            "{name}: the hub has no such model, or it is private{reason}{}\nhint: look whether {page} is there; for a private model \
             set HF_TOKEN to a token of an account that may read it",
            near(repo)
        ),
        (401, _, Some(from)) if code != "RepoNotFound" => anyhow!(
            "{name}: the hub does not accept the token from {from}{reason}\nhint: make another on {settings}, or go without one: most \
             models need none"
        ),
        (404, _, _) | (_, "RepoNotFound", _) => anyhow!(
            "{name}: the hub has no such model, or the account of the token{} may not see it{reason}{}\nhint: look whether {page} is there",
            from.map(|from| format!(" from {from}")).unwrap_or_default(),
            near(repo)
        ),
        (403, _, None) => anyhow!(
            "{name}: the hub refuses to give it{reason} (status 403)\nhint: {page} says why; a model with restricted access needs a \
             token (HF_TOKEN)"
        ),
        (403, _, Some(from)) => anyhow!(
            "{name}: the hub refuses to give it to the account of the token from {from}{reason} (status 403)\nhint: {page} says why"
        ),
        _ => anyhow!("{name}: the hub refuses{reason} (status {status})\nhint: {page} may say why"),
    }
}

/// `, did you mean X?` of what is in the cache, or nothing.
fn near(repo: &str) -> String {
    let folders = stores::stores().into_iter().filter_map(|store| std::fs::read_dir(store).ok()).flatten().flatten();
    let repos: Vec<String> = folders
        .filter_map(|entry| stores::repo_of(entry.file_name().to_str()?))
        .filter(|other| other != repo)
        .collect();
    let near = nearest(repo, repos.iter().map(String::as_str));
    near.map(|near| format!(", did you mean `{near}`, which is here?")).unwrap_or_default()
}
