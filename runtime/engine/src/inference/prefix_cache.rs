//! Keys and values of prompts that were read, for prompts that begin alike.
//!
//! They depend on the tokens and on the adapter, so each is kept under both.

use std::sync::{Arc, Weak};

use super::adapters::Adapter;
use crate::models::Architecture;
use crate::run::waist::KvCache;

/// Prefixes that are kept of each adapter, and the bytes of all.
const PREFIXES: usize = 8;
const BYTES: usize = 256 << 20;
/// A prefix with fewer tokens is read again as quickly.
const SHORTEST: usize = 16;

/// Prefixes of sequences that ended, the latest last.
#[derive(Default)]
pub(super) struct PrefixCache {
    prefixes: Vec<Prefix>,
}

struct Prefix {
    /// `None`: the base alone.
    adapter: Option<Weak<Adapter>>,
    generation: u64,
    ids: Vec<u32>,
    cache: Box<dyn KvCache>,
}

fn generation(adapter: Option<&Arc<Adapter>>) -> u64 {
    adapter.map_or(0, |adapter| adapter.generation())
}

/// Whether prompts of these lengths are turned by the same frequencies.
fn turn_alike(architecture: &Architecture, a: usize, b: usize) -> bool {
    architecture.ropes.iter().all(|rope| rope.set(a) == rope.set(b))
}

impl PrefixCache {
    /// A copy of the longest prefix of a prompt that is here under the same adapter, if it is worth it. The last token of the prompt is
    /// not in it: what follows that is asked for.
    pub(super) fn find(
        &self,
        architecture: &Architecture,
        adapter: Option<&Arc<Adapter>>,
        prompt: &[u32],
    ) -> Option<Box<dyn KvCache>> {
        let shared = |prefix: &Prefix| {
            let same = prefix.ids.iter().zip(prompt).take_while(|(a, b)| a == b).count();
            same.min(prefix.cache.prefilled()).min(prompt.len().saturating_sub(1))
        };
        // Some ropes turn by other frequencies in longer prompts.
        let turns_alike = |prefix: &&Prefix| turn_alike(architecture, prefix.cache.prompt_length(), prompt.len());
        let own = self.prefixes.iter().filter(|prefix| prefix.generation == generation(adapter)).filter(turns_alike);
        let (len, prefix) = own.map(|prefix| (shared(prefix), prefix)).max_by_key(|(len, _)| *len)?;
        (len >= SHORTEST).then(|| prefix.cache.prefix(len)).flatten()
    }

    /// Keeps what a sequence that ended was read by, and drops what takes its place.
    pub(super) fn keep(
        &mut self,
        architecture: &Architecture,
        adapter: Option<&Arc<Adapter>>,
        mut ids: Vec<u32>,
        cache: Box<dyn KvCache>,
    ) {
        ids.truncate(cache.prefilled());
        if ids.len() < SHORTEST {
            return;
        }
        let generation = generation(adapter);
        self.prefixes.retain(|other| {
            let gone = other.adapter.as_ref().is_some_and(|adapter| adapter.strong_count() == 0);
            let alike = turn_alike(architecture, other.cache.prompt_length(), cache.prompt_length());
            !gone && (other.generation != generation || !alike || !ids.starts_with(&other.ids))
        });
        self.prefixes.push(Prefix { adapter: adapter.map(Arc::downgrade), generation, ids, cache });
        let own = |prefix: &Prefix| prefix.generation == generation;
        while self.prefixes.iter().filter(|prefix| own(prefix)).count() > PREFIXES {
            let first = self.prefixes.iter().position(own).expect("there are some");
            self.prefixes.remove(first);
        }
        let bytes = |all: &[Prefix]| all.iter().map(|prefix| prefix.cache.bytes()).sum::<usize>();
        while self.prefixes.len() > 1 && bytes(&self.prefixes) > BYTES {
            self.prefixes.remove(0);
        }
    }
}
