//! Whether the log is as it was written.

use std::collections::{BTreeSet, HashMap};
use std::path::Path;

use anyhow::{Result, bail, ensure};
use homeroom_engine::files::Lock;

use super::chain::{Chain, Ranges, Said, digest};
use super::contents::Contents;
use super::head::Apart;
use super::{directory, is_there};
use crate::progress::line;

/// What is said where there is no log.
pub(super) fn nothing(directory: &Path) -> String {
    format!("{}: nothing is kept here\nhint: [memory] in the file of handlers says what is", directory.display())
}

/// What a check found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Verified {
    /// Lines of the chain.
    pub lines: u64,
    /// Digest of the last, which says all of them.
    pub head: String,
    /// Contents that are there and are what was written.
    pub contents: usize,
    /// Contents that were removed, as the chain says.
    pub removed: usize,
}

/// Checks the chain of a data directory, and that each content is the one that was written or was removed as the chain says. `head`: a
/// digest that a check gave before, and that has to be in the chain still.
///
/// # Errors
/// When something is not as it was written, with its line; all contents of that kind in one message.
pub fn verify(data: &Path, head: Option<&str>) -> Result<Verified> {
    let directory = directory(data);
    ensure!(is_there(&directory), nothing(&directory));
    let _lock = Lock::take(&directory, &mut |note| line(note))?;
    let mut chain = Chain::new(&directory);
    let (mut digests, mut gone, mut heads) = (HashMap::new(), Ranges::default(), BTreeSet::new());
    chain.catch_up(|link| {
        heads.insert(link.before.clone());
        if let Some(content) = link.said.content() {
            digests.insert(link.number, content.to_owned());
        }
        if let Said::Removed { numbers, .. } = &link.said {
            gone.extend(numbers.iter().copied());
        }
    })?;
    heads.insert(chain.tail().digest.clone());
    if let Some(head) = head {
        ensure!(
            heads.contains(head),
            "the chain has no line of digest {head}: it was written anew, or cut off before that"
        );
    }
    let removed: BTreeSet<u64> = digests.keys().filter(|number| gone.holds(**number)).copied().collect();
    let contents = Contents::new(&directory);
    let mut problems = Vec::new();
    match chain.apart() {
        Some(Apart::Ahead) => problems.push(format!("chain.jsonl: {}", Apart::Ahead.words())),
        Some(apart) => line(format_args!("note: {}: {}", directory.display(), apart.words())),
        None => {}
    }
    let mut there = BTreeSet::new();
    for day in contents.days() {
        contents.read(&day, |line, content| match content {
            None => problems.push(format!("contents/{day}.jsonl: a line that is no content")),
            Some(content) => {
                let number = content.number;
                match digests.get(&number) {
                    None => problems.push(format!("content {number}: the chain does not know it")),
                    Some(_) if removed.contains(&number) => {
                        problems.push(format!("content {number}: was removed, and is there"))
                    }
                    Some(known) if *known != digest(line) => {
                        problems.push(format!("content {number}: is not what was written"))
                    }
                    Some(_) if !there.insert(number) => problems.push(format!("content {number}: is there twice")),
                    Some(_) => {}
                }
            }
        })?;
    }
    let mut lost: Vec<&u64> =
        digests.keys().filter(|number| !there.contains(number) && !removed.contains(number)).collect();
    lost.sort();
    problems
        .extend(lost.into_iter().map(|number| format!("content {number}: is gone, and the chain does not say why")));
    if !problems.is_empty() {
        const SHOWN: usize = 20;
        let more = problems.len().saturating_sub(SHOWN);
        problems.truncate(SHOWN);
        let more = if more > 0 { format!("\n  and {more} more") } else { String::new() };
        bail!("{}: not as it was written:\n  {}{more}", directory.display(), problems.join("\n  "));
    }
    let tail = chain.tail();
    Ok(Verified { lines: tail.number, head: tail.digest.clone(), contents: there.len(), removed: removed.len() })
}
