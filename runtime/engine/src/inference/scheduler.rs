//! The scheduler: sequences that are answered at once, by one thread. In a round it reads a piece of one prompt, then draws a token for
//! each sequence that is past its prompt: those of one adapter share the reading of the weights. Each answer is what it would be alone.
//! What nobody waits for goes on while nothing else does.

use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};

use anyhow::{Result, anyhow};

use super::Inference;
use super::generate::Finish;
use super::prefix_cache::PrefixCache;
use super::sequence::{Event, Request, Sequence};
use super::turns::Turn;
use crate::memory::available;
use crate::run::waist::KvCache;

/// Sequences that are answered together, a class; more wait for one to end.
pub const TOGETHER: usize = 32;
/// The share of the memory that is available which keys and values of sequences may come to; more requests wait.
const SHARE: u64 = 2;

/// Starts the scheduler; it ends when its sender is dropped and nothing is left to answer.
pub(super) fn start(inference: Arc<Inference>) -> Sender<Request> {
    let (sender, requests) = channel();
    let schedule = move || {
        // A cache that grows holds up to twice what is in it.
        let bytes_max = available().map_or(u64::MAX, |available| available / SHARE / 2);
        let (waiting, running, prefixes) = (VecDeque::new(), Vec::new(), PrefixCache::default());
        Scheduler { inference, waiting, running, prefixes, bytes_max, first_come: false }.run(&requests);
    };
    let started = std::thread::Builder::new().name("answers".to_owned()).spawn(schedule);
    // Without a thread the sender fails at once, and whoever asks is told.
    drop(started);
    sender
}

struct Scheduler {
    inference: Arc<Inference>,
    waiting: VecDeque<Request>,
    /// In the order in which they were admitted.
    running: Vec<Sequence>,
    prefixes: PrefixCache,
    /// Bytes of keys and values that there is memory for.
    bytes_max: u64,
    /// Whether the next round reads of the prompt that was admitted first.
    first_come: bool,
}

/// A sequence that draws, and why it ends, if it does.
type Drawing<'a> = (&'a mut Sequence, &'a mut Option<Result<Finish>>);

impl Scheduler {
    fn run(mut self, requests: &Receiver<Request>) {
        loop {
            if self.running.is_empty() && self.waiting.is_empty() {
                let Ok(first) = requests.recv() else { return };
                self.waiting.push_back(first);
            }
            while let Ok(more) = requests.try_recv() {
                self.waiting.push_back(more);
            }
            self.waiting.retain(|request| !request.is_dropped());
            while self.waiting.get(self.next()).is_some_and(|request| self.fits(request))
                && let Some(request) = self.waiting.remove(self.next())
            {
                self.running.push(Sequence::new(&self.inference, request, &self.prefixes));
            }
            self.round();
        }
    }

    /// The place of the request that is admitted next: the first that somebody waits for, or else the first.
    fn next(&self) -> usize {
        self.waiting.iter().position(|request| !request.background).unwrap_or(0)
    }

    /// Whether a request can be answered beside those that are: there is a place, and memory for its keys and values however long it
    /// gets. One always fits.
    fn fits(&self, request: &Request) -> bool {
        let bytes = |request: &Request| {
            let of_position = self.inference.bytes_per_position(request.adapter.as_deref());
            (request.positions_max(&self.inference) * of_position) as u64
        };
        let all = self.running.iter().map(|sequence| bytes(&sequence.request)).sum::<u64>() + bytes(request);
        self.running.is_empty() || self.running.len() < TOGETHER && all <= self.bytes_max
    }

    /// A piece of one prompt, then a token of each sequence that is past its prompt.
    fn round(&mut self) {
        let mut ends: Vec<Option<Result<Finish>>> = Vec::new();
        ends.resize_with(self.running.len(), || None);
        for (sequence, end) in self.running.iter().zip(&mut ends) {
            if sequence.request.is_dropped() {
                *end = Some(Ok(Finish::Length));
            }
        }
        let inference = &self.inference;
        self.running.iter_mut().for_each(|sequence| sequence.outgrow(inference));
        // Work in the background stands still while somebody waits for another answer.
        let is_waited_for = |(sequence, end): (&Sequence, &Option<_>)| end.is_none() && !sequence.request.background;
        let somebody_waits = self.running.iter().zip(&ends).any(is_waited_for);
        let goes_on = |sequence: &Sequence| !(somebody_waits && sequence.request.background);
        // In one round the prompt with the least left to read is first: it costs the others least, and a long one hinders nobody else's.
        // In the next it is the one that has waited longest: short ones that keep coming would else hold up a long one for ever.
        let mut reading = (self.running.iter_mut().zip(&mut ends))
            .filter(|(sequence, end)| end.is_none() && sequence.last.is_none() && goes_on(sequence));
        let next = match self.first_come {
            true => reading.next(),
            false => reading.min_by_key(|(sequence, _)| sequence.unread()),
        };
        self.first_come = !self.first_come;
        if let Some((sequence, end)) = next {
            *end = guarded(|| sequence.read(inference)).transpose();
            share(inference, sequence, &mut self.prefixes);
        }
        let mut by_adapter: Vec<(u64, Vec<Drawing<'_>>)> = Vec::new();
        let drawing = (self.running.iter_mut().zip(&mut ends))
            .filter(|(sequence, end)| end.is_none() && sequence.last.is_some() && goes_on(sequence));
        for (sequence, end) in drawing {
            let generation = sequence.generation();
            match by_adapter.iter_mut().find(|(other, _)| *other == generation) {
                Some((_, group)) => group.push((sequence, end)),
                None => by_adapter.push((generation, vec![(sequence, end)])),
            }
        }
        for (_, group) in by_adapter {
            draw(inference, group);
        }
        for number in (0..self.running.len()).rev() {
            let Some(end) = ends[number].take() else { continue };
            let sequence = self.running.remove(number);
            let event = match end {
                Ok(finish) => {
                    let architecture = &self.inference.model.architecture;
                    self.prefixes.keep(architecture, sequence.request.adapter.as_ref(), sequence.read, sequence.cache);
                    Event::End(finish)
                }
                // What is told is a line; some errors bring a trace along.
                Err(error) => {
                    let words = format!("{error:#}");
                    Event::Failed(anyhow!("{}", words.lines().next().unwrap_or_default()))
                }
            };
            // Whoever asked may have gone.
            let _ = sequence.request.events.send(event);
        }
    }
}

/// Keeps what was read of a prompt that is asked again, once all of it was read.
fn share(inference: &Inference, sequence: &mut Sequence, prefixes: &mut PrefixCache) {
    let request = &mut sequence.request;
    if sequence.last.is_none() || !std::mem::take(&mut request.shared) {
        return;
    }
    if let Some(cache) = sequence.cache.prefix(request.prompt.len()) {
        let architecture = &inference.model.architecture;
        prefixes.keep(architecture, request.adapter.as_ref(), request.prompt.clone(), cache);
    }
}

/// Draws a token for each of some sequences with the same adapter.
fn draw(inference: &Inference, mut group: Vec<Drawing<'_>>) {
    let adapter = group.first().and_then(|(sequence, _)| sequence.request.adapter.clone());
    let logits = guarded(|| {
        let mut sequences: Vec<(u32, &mut dyn KvCache)> = Vec::new();
        for (sequence, _) in &mut group {
            if let Some(last) = sequence.last {
                sequence.read.push(last);
                sequences.push((last, &mut *sequence.cache));
            }
        }
        inference.step(adapter.as_deref(), &mut sequences)
    });
    match logits {
        Ok(logits) => {
            for ((sequence, end), logits) in group.into_iter().zip(logits) {
                *end = sequence.draw(inference, logits).transpose();
            }
        }
        Err(error) => {
            let words = format!("{error:#}");
            group.into_iter().for_each(|(_, end)| *end = Some(Err(anyhow!("{words}"))));
        }
    }
}

/// A pass, in its turn; a panic is an error of those whose pass it was.
fn guarded<R>(pass: impl FnOnce() -> Result<R>) -> Result<R> {
    let _turn = Turn::wait();
    catch_unwind(AssertUnwindSafe(pass)).unwrap_or_else(|_| Err(anyhow!("the model's pass panicked")))
}

#[cfg(test)]
mod tests {
    use std::path::Path;
    use std::sync::atomic::AtomicBool;

    use super::*;
    use crate::inference::generate::Sampling;
    use crate::inference::sampler::Sampler;
    use crate::inference::sequence::PIECE;
    use crate::models::BaseModel;
    use crate::run::compute::Compute;

    /// Pieces of the long prompt.
    const PIECES: usize = 5;

    fn admitted(scheduler: &mut Scheduler, tokens: usize) -> Result<Receiver<Event>> {
        let prompt: Vec<u32> = (0..tokens as u32).map(|i| 3 + i * 7 % 300).collect();
        let sampler = Sampler::new(Sampling { max_tokens: 1, ..Sampling::default() }, &prompt)?;
        let (events, heard) = channel();
        let dropped = Arc::new(AtomicBool::new(false));
        let (adapter, constraint, logprobs, shared, background) = (None, None, None, false, false);
        let max_tokens = 1;
        let request =
            Request { adapter, prompt, sampler, constraint, logprobs, shared, background, max_tokens, events, dropped };
        scheduler.running.push(Sequence::new(&scheduler.inference, request, &scheduler.prefixes));
        Ok(heard)
    }

    fn scheduler() -> Result<Scheduler> {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures/models/llama");
        let mut model = BaseModel::load(&path)?;
        model.architecture.max_position_embeddings = PIECES * PIECE;
        let inference = Arc::new(Inference::new(Arc::new(model), Compute::F32));
        let (waiting, running, prefixes) = (VecDeque::new(), Vec::new(), PrefixCache::default());
        Ok(Scheduler { inference, waiting, running, prefixes, bytes_max: u64::MAX, first_come: false })
    }

    /// The other choices of a request begin with it.
    #[test]
    fn a_prompt_that_is_asked_again_is_there_from_its_first_token_on() -> Result<()> {
        for shared in [true, false] {
            let mut scheduler = scheduler()?;
            let _first = admitted(&mut scheduler, 40)?;
            let request = &mut scheduler.running[0].request;
            request.shared = shared;
            let prompt = request.prompt.clone();
            let Scheduler { inference, running, prefixes, .. } = &mut scheduler;
            running[0].read(inference)?;
            share(inference, &mut running[0], prefixes);
            let found = prefixes.find(&inference.model.architecture, None, &prompt);
            assert_eq!(found.map(|cache| cache.positions()), shared.then_some(39), "all but the last token");
        }
        Ok(())
    }

    #[test]
    fn what_nobody_waits_for_stands_still_while_somebody_waits() -> Result<()> {
        let mut scheduler = scheduler()?;
        let behind = admitted(&mut scheduler, 5)?;
        scheduler.running[0].request.background = true;
        let asked = admitted(&mut scheduler, 2 * PIECE)?;
        for _ in 0..2 {
            assert!(asked.try_recv().is_err(), "it is read in two pieces");
            scheduler.round();
            assert!(behind.try_recv().is_err(), "nobody waits for it");
        }
        assert!(asked.try_recv().is_ok());
        scheduler.round();
        assert!(behind.try_recv().is_ok(), "nothing else is asked any longer");
        Ok(())
    }

    #[test]
    fn a_long_prompt_is_answered_however_many_short_ones_follow_it() -> Result<()> {
        let mut scheduler = scheduler()?;
        let long = admitted(&mut scheduler, PIECES * PIECE - 1)?;
        let mut shorts = Vec::new();
        let mut rounds = 0;
        let first = loop {
            shorts.push(admitted(&mut scheduler, 5)?);
            scheduler.round();
            rounds += 1;
            if let Ok(event) = long.try_recv() {
                break event;
            }
            assert!(rounds < 2 * PIECES, "no token of the long prompt after {rounds} rounds");
        };
        assert!(!matches!(first, Event::Failed(_)));
        // In each other round a short one was read, none of which waited for the long one.
        let answered = shorts.iter().filter(|short| short.try_recv().is_ok()).count();
        assert_eq!((rounds, answered), (2 * PIECES, PIECES));
        Ok(())
    }
}
