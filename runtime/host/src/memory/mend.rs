//! What is set right at a start: contents that a killed process left without a line in the chain, or began to remove.

use std::collections::{HashMap, HashSet};
use std::path::Path;

use anyhow::{Result, bail};

use super::chain::{Chain, Ranges, Said, digest};
use super::contents::Contents;
use crate::progress::line;

/// Completes what was being removed, and takes back what was half written: of contents that the chain does not know that is the one
/// whose line would be the next. The caller holds the lock.
///
/// # Errors
/// When there are others that the chain does not know, of which nothing is removed; or something cannot be read or written.
pub fn mend(directory: &Path, contents: &Contents) -> Result<()> {
    let (mut gone, mut digests) = (Ranges::default(), HashMap::new());
    let mut chain = Chain::new(directory);
    chain.catch_up(|link| match &link.said {
        Said::Removed { numbers, .. } => gone.extend(numbers.iter().copied()),
        Said::Answer { content } | Said::Feedback { content } => drop(digests.insert(link.number, content.clone())),
    })?;
    // Numbers whose content is there as it was written; the others of those numbers; and what the chain does not know.
    let (mut whole, mut other, mut unknown) = (HashSet::new(), HashMap::new(), Vec::new());
    for day in contents.days() {
        contents.read(&day, |line, content| {
            let Some(number) = content.map(|content| content.number) else { return };
            let found = digest(line);
            match digests.get(&number) {
                _ if gone.holds(number) => {}
                Some(known) if *known == found => drop(whole.insert(number)),
                Some(_) => drop(other.insert(found, number)),
                None => unknown.push(number),
            }
        })?;
    }
    let next = chain.tail().number + 1;
    unknown.sort_unstable();
    if !unknown.is_empty() && unknown != [next] {
        let (first, last) = (unknown.first().unwrap_or(&0), unknown.last().unwrap_or(&0));
        bail!(
            "{}: the chain ends with line {}, and there are {} contents that it does not know, of numbers {first} to {last}\n{}",
            directory.display(),
            next - 1,
            unknown.len(),
            chain.hint()
        );
    }
    // One that was changed stays where it is alone: that is no crash, and a check tells it.
    other.retain(|_, number| whole.contains(number));
    let lost = digests.keys().any(|number| !gone.holds(*number) && !whole.contains(number));
    let half_written = unknown.len() + other.len();
    if half_written > 0 {
        line(format_args!(
            "note: {}: {half_written} contents that were half written are taken back",
            directory.display()
        ));
    }
    contents.remove(|line, content| match content {
        // Of a line that is torn nothing is known; it stays where a content is missing, which it may be.
        None => !lost,
        Some(content) => {
            gone.holds(content.number) || unknown.contains(&content.number) || other.contains_key(&digest(line))
        }
    })
}
