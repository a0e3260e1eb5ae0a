//! Weights in memory of their own instead of a mapped file. Decoding is bound by how fast weights are read, and memory in pages of
//! 2 MiB, which a mapped file seldom has, is read about a fifth faster than in those of 4 KiB.

use std::collections::HashMap;
use std::sync::Arc;

use homeroom_kernels::on_pool;
use memmap2::MmapMut;

use crate::memory::available;
use crate::models::BaseModel;
use crate::models::weight::{Codes, Weight};

/// Weights begin at multiples of this: a cache line.
const ALIGNMENT: usize = 64;
/// Bytes of a large page.
const LARGE: usize = 2 << 20;
/// Bytes that one task copies.
const PART: usize = 4 << 20;
/// The share of the memory that is available which weights may take.
const SHARE: u64 = 4;

/// Memory of so many bytes, in large pages where the system has them.
fn large_pages(len: usize) -> Option<MmapMut> {
    let memory = MmapMut::map_anon(len).ok()?;
    #[cfg(target_os = "linux")]
    let _ = memory.advise(memmap2::Advice::HugePage);
    Some(memory)
}

/// Moves bytes to memory with large pages, if it can be had.
pub fn in_large_pages(bytes: Vec<u8>) -> Codes {
    let len = bytes.len();
    let copy = |mut memory: MmapMut| {
        memory[..len].copy_from_slice(&bytes);
        memory.make_read_only().ok()
    };
    // Whole pages, or the last part lies in small ones.
    let memory = (len > 0).then(|| large_pages(len.next_multiple_of(LARGE))).flatten().and_then(copy);
    match memory {
        Some(memory) => Codes::Resident(Arc::new(memory), 0..len),
        None => Codes::Owned(bytes),
    }
}

impl BaseModel {
    /// Copies weights that lie in mapped files to memory with large pages, if they take a quarter of what is available at most,
    /// and where the system has such pages (Linux). If they take more, those are that no codec stores, as far as they fit: an encoded base
    /// is one file for all processes. Otherwise, and when memory cannot be had, nothing changes; no value does.
    ///
    /// Returns whether any were copied.
    pub fn make_resident(&mut self) -> bool {
        let fits = |model: &Self, which: fn(&Weight) -> bool| {
            let weights = model.modules.iter().map(|module| &module.weight).filter(|weight| which(weight));
            let bytes: usize = weights.filter_map(|weight| Some(weight.mapped_bytes()?.len())).sum();
            bytes > 0 && available().is_some_and(|available| bytes as u64 <= available / SHARE)
        };
        let choices: [fn(&Weight) -> bool; 2] = [|_| true, |weight| weight.codec().is_none()];
        let which = choices.into_iter().find(|which| fits(self, *which));
        which.is_some_and(|which| self.copy_weights(which).is_some())
    }

    fn copy_weights(&mut self, which: fn(&Weight) -> bool) -> Option<()> {
        // A weight that several modules share lies in one place.
        let mut places: HashMap<(*const u8, usize), usize> = HashMap::new();
        let (mut sources, mut len) = (Vec::new(), 0);
        for module in &self.modules {
            let Some(bytes) = module.weight.mapped_bytes().filter(|_| which(&module.weight)) else { continue };
            places.entry((bytes.as_ptr(), bytes.len())).or_insert_with(|| {
                let at = len;
                sources.push((at, bytes));
                len = (at + bytes.len()).next_multiple_of(ALIGNMENT);
                at
            });
        }
        let mut memory = large_pages(len)?;
        let mut rest = &mut memory[..];
        let mut parts = Vec::new();
        for (number, (at, bytes)) in sources.iter().enumerate() {
            let end = sources.get(number + 1).map_or(len, |(next, _)| *next);
            let (here, after) = rest.split_at_mut(end - at);
            rest = after;
            parts.extend(here[..bytes.len()].chunks_mut(PART).zip(bytes.chunks(PART)));
        }
        on_pool(|| {
            rayon::scope(|scope| {
                for (to, from) in parts {
                    scope.spawn(move |_| to.copy_from_slice(from));
                }
            });
        });
        let memory = Arc::new(memory.make_read_only().ok()?);
        for module in &mut self.modules {
            let Some(bytes) = module.weight.mapped_bytes().filter(|_| which(&module.weight)) else { continue };
            let (at, len) = (places[&(bytes.as_ptr(), bytes.len())], bytes.len());
            let weight: Weight = module.weight.in_memory(memory.clone(), at..at + len);
            module.weight = Arc::new(weight);
        }
        Some(())
    }
}
