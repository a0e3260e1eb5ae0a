//! Answers that are being drawn at once, by one thread: a piece of a prompt, then a token for each that is past its prompt, and
//! so on. Each answer is what it would be alone.

use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Result, anyhow, ensure};

use super::finite::check_finite;
use super::sampler::Sampler;
use super::{Inference, Kept};
use crate::inference::generate::{Finish, Sampling};
use crate::memory::available;

/// Tokens of a prompt that are read at once: enough to fill the cores, few enough that others need not wait long.
const PIECE: usize = 256;
/// Answers that are drawn together, a class; more wait for one to end.
pub const TOGETHER: usize = 32;
/// The share of the memory that is available which keys and values of answers may come to; more answers wait.
const SHARE: u64 = 2;
/// Beginnings that are kept for later prompts, and their bytes.
const BEGINNINGS: usize = 8;
const BEGINNINGS_BYTES: usize = 256 << 20;
/// A beginning with fewer tokens is read again as quickly.
const SHORTEST: usize = 16;

/// One pass through a model uses all cores, so models take turns, in the order in which they came: a mutex alone would be taken
/// again by who has just let it go.
struct Cores {
    /// The number of the next who comes, and of who has its turn.
    numbers: Mutex<(u64, u64)>,
    next: Condvar,
}

static CORES: Cores = Cores { numbers: Mutex::new((0, 0)), next: Condvar::new() };

/// A turn, until it is dropped.
struct Turn;

impl Turn {
    fn wait() -> Self {
        let mut numbers = CORES.numbers.lock().unwrap_or_else(PoisonError::into_inner);
        let own = numbers.0;
        numbers.0 += 1;
        drop(CORES.next.wait_while(numbers, |(_, now)| *now != own));
        Self
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        CORES.numbers.lock().unwrap_or_else(PoisonError::into_inner).1 += 1;
        CORES.next.notify_all();
    }
}

/// What the drawing thread tells of an answer.
enum News {
    Token(u32),
    End(Finish),
    Failed(anyhow::Error),
}

/// An answer that was asked for.
struct Asked {
    prompt: Vec<u32>,
    sampler: Sampler,
    max_tokens: usize,
    news: Sender<News>,
    dropped: Arc<AtomicBool>,
}

/// The answers of one model.
pub struct Answers {
    inference: Arc<Inference>,
    /// To the thread that draws, once there is one.
    asked: Mutex<Option<Sender<Asked>>>,
}

impl Answers {
    /// None yet.
    pub fn new(inference: Inference) -> Self {
        Self { inference: Arc::new(inference), asked: Mutex::new(None) }
    }

    /// The model.
    pub fn inference(&self) -> &Inference {
        &self.inference
    }

    /// Begins to answer a prompt.
    ///
    /// # Errors
    /// When the prompt is empty or longer than the model's context, or the sampling is not of numbers in range.
    pub fn ask(&self, prompt: &[u32], sampling: Sampling) -> Result<Tokens> {
        let max_tokens = sampling.max_tokens;
        let sampler = Sampler::new(sampling, prompt)?;
        let context = self.inference.model.architecture.max_position_embeddings;
        ensure!(!prompt.is_empty(), "the prompt is empty");
        ensure!(prompt.len() <= context, "the prompt is {} tokens, the model's context {context}", prompt.len());
        let (news, heard) = channel();
        let dropped = Arc::new(AtomicBool::new(false));
        let finish = (max_tokens == 0).then_some(Finish::Length);
        if finish.is_none() {
            let mut asked = Asked { prompt: prompt.to_vec(), sampler, max_tokens, news, dropped: dropped.clone() };
            let mut thread = self.asked.lock().unwrap_or_else(PoisonError::into_inner);
            // A thread that ended by a panic is followed by another.
            for _ in 0..2 {
                let sender = thread.get_or_insert_with(|| start(self.inference.clone()));
                match sender.send(asked) {
                    Ok(()) => break,
                    Err(back) => (asked, *thread) = (back.0, None),
                }
            }
        }
        Ok(Tokens { heard, dropped, finish })
    }
}

/// Tokens of an answer as they are drawn, without the one that ends the turn. Dropping it ends the work.
pub struct Tokens {
    heard: Receiver<News>,
    dropped: Arc<AtomicBool>,
    finish: Option<Finish>,
}

impl Tokens {
    /// Why the answer ended, once it has.
    pub fn finish(&self) -> Option<Finish> {
        self.finish
    }

    /// The next token, `None` after the last; `Err` when it took longer than `patience`.
    ///
    /// # Errors
    /// The inner one when the model failed.
    pub fn next_within(&mut self, patience: Duration) -> Result<Option<Result<u32>>, RecvTimeoutError> {
        if self.finish.is_some() {
            return Ok(None);
        }
        Ok(match self.heard.recv_timeout(patience) {
            Err(RecvTimeoutError::Timeout) => return Err(RecvTimeoutError::Timeout),
            Ok(News::Token(id)) => Some(Ok(id)),
            Ok(News::End(finish)) => {
                self.finish = Some(finish);
                None
            }
            Ok(News::Failed(error)) => {
                self.finish = Some(Finish::Length);
                Some(Err(error))
            }
            Err(RecvTimeoutError::Disconnected) => {
                self.finish = Some(Finish::Length);
                Some(Err(anyhow!("the thread that draws answers stopped")))
            }
        })
    }
}

impl Iterator for Tokens {
    type Item = Result<u32>;

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            if let Ok(next) = self.next_within(Duration::from_secs(60)) {
                return next;
            }
        }
    }
}

impl Drop for Tokens {
    fn drop(&mut self) {
        self.dropped.store(true, Ordering::Relaxed);
    }
}

/// Starts the thread that draws; it ends when its sender is dropped and nothing is left to draw.
fn start(inference: Arc<Inference>) -> Sender<Asked> {
    let (sender, asked) = channel();
    let draw = move || {
        let bytes = inference.bytes_per_position().max(1) as u64;
        // A cache that grows holds up to twice what is in it.
        let positions_max = available().map_or(usize::MAX, |available| (available / SHARE / (2 * bytes)) as usize);
        Drawing { inference, waiting: VecDeque::new(), drawn: Vec::new(), kept: Vec::new(), positions_max }.run(&asked);
    };
    let started = std::thread::Builder::new().name("answers".to_owned()).spawn(draw);
    // Without a thread the sender fails at once, and whoever asks is told.
    drop(started);
    sender
}

/// An answer that is being drawn.
struct Sequence {
    asked: Asked,
    kept: Kept,
    /// What the model has read: the prompt so far, and the tokens drawn.
    read: Vec<u32>,
    /// The last token, which it has not read yet.
    last: Option<u32>,
    left: usize,
}

impl Sequence {
    fn new(inference: &Inference, asked: Asked, beginnings: &[(Vec<u32>, Kept)]) -> Self {
        let shared = |(ids, kept): &(Vec<u32>, Kept)| {
            let same = ids.iter().zip(&asked.prompt).take_while(|(a, b)| a == b).count();
            // The last token of the prompt is read in any case: what follows it is asked for.
            same.min(kept.prefilled()).min(asked.prompt.len() - 1)
        };
        let longest = beginnings.iter().map(|beginning| (shared(beginning), beginning)).max_by_key(|(len, _)| *len);
        let begun = longest.filter(|(len, _)| *len >= SHORTEST).and_then(|(len, (_, kept))| kept.prefix(len));
        let kept = begun.unwrap_or_else(|| inference.begin());
        let read = asked.prompt[..kept.positions()].to_vec();
        Self { kept, read, last: None, left: asked.max_tokens, asked }
    }

    /// Reads a piece of the prompt. After its last piece, draws.
    fn read(&mut self, inference: &Inference) -> Result<Option<Finish>> {
        let piece = &self.asked.prompt[self.read.len()..];
        let piece = &piece[..piece.len().min(PIECE)];
        let whole = self.read.len() + piece.len() == self.asked.prompt.len();
        let logits = inference.read(piece, &mut self.kept, self.asked.prompt.len(), whole)?;
        self.read.extend_from_slice(piece);
        logits.map_or(Ok(None), |logits| self.draw(inference, logits))
    }

    /// Draws a token; why the answer ends, if it does.
    fn draw(&mut self, inference: &Inference, logits: Vec<f32>) -> Result<Option<Finish>> {
        check_finite(&logits)?;
        let token = self.asked.sampler.draw(logits);
        if inference.model.tokenizer.eos_ids.contains(&token) {
            return Ok(Some(Finish::Stop));
        }
        self.left -= 1;
        self.last = Some(token);
        if self.asked.news.send(News::Token(token)).is_err() {
            return Ok(Some(Finish::Length));
        }
        let full = self.kept.positions() >= inference.model.architecture.max_position_embeddings;
        Ok((self.left == 0 || full).then_some(Finish::Length))
    }
}

/// The thread that draws.
struct Drawing {
    inference: Arc<Inference>,
    waiting: VecDeque<Asked>,
    drawn: Vec<Sequence>,
    /// Beginnings of sequences that ended, the latest last.
    kept: Vec<(Vec<u32>, Kept)>,
    /// Positions whose keys and values there is memory for.
    positions_max: usize,
}

impl Drawing {
    fn run(mut self, asked: &Receiver<Asked>) {
        loop {
            if self.drawn.is_empty() && self.waiting.is_empty() {
                let Ok(first) = asked.recv() else { return };
                self.waiting.push_back(first);
            }
            while let Ok(more) = asked.try_recv() {
                self.waiting.push_back(more);
            }
            self.waiting.retain(|asked| !asked.dropped.load(Ordering::Relaxed));
            while self.waiting.front().is_some_and(|asked| self.fits(asked))
                && let Some(asked) = self.waiting.pop_front()
            {
                self.drawn.push(Sequence::new(&self.inference, asked, &self.kept));
            }
            self.round();
        }
    }

    /// Whether an answer can be drawn beside those that are: there is a place, and memory for its keys and values however long it gets.
    /// One always fits.
    fn fits(&self, asked: &Asked) -> bool {
        let context = self.inference.model.architecture.max_position_embeddings;
        let positions = |asked: &Asked| asked.prompt.len().saturating_add(asked.max_tokens).min(context);
        let all = self.drawn.iter().map(|sequence| positions(&sequence.asked)).sum::<usize>() + positions(asked);
        self.drawn.is_empty() || self.drawn.len() < TOGETHER && all <= self.positions_max
    }

    /// A piece of one prompt, then a token of each sequence that is past its prompt.
    fn round(&mut self) {
        let mut ends: Vec<Option<Result<Finish>>> = Vec::new();
        ends.resize_with(self.drawn.len(), || None);
        for (sequence, end) in self.drawn.iter().zip(&mut ends) {
            if sequence.asked.dropped.load(Ordering::Relaxed) {
                *end = Some(Ok(Finish::Length));
            }
        }
        let inference = &self.inference;
        // The prompt with the least left to read is first: it costs the others least, and a long one hinders nobody else's.
        let reading =
            self.drawn.iter_mut().zip(&mut ends).filter(|(sequence, end)| end.is_none() && sequence.last.is_none());
        if let Some((sequence, end)) =
            reading.min_by_key(|(sequence, _)| sequence.asked.prompt.len() - sequence.read.len())
        {
            *end = guarded(|| sequence.read(inference)).transpose();
        }
        let mut steps: Vec<(&mut Sequence, &mut Option<Result<Finish>>)> = (self.drawn.iter_mut().zip(&mut ends))
            .filter(|(sequence, end)| end.is_none() && sequence.last.is_some())
            .collect();
        if !steps.is_empty() {
            let logits = guarded(|| {
                let mut sequences: Vec<(u32, &mut Kept)> = Vec::new();
                for (sequence, _) in &mut steps {
                    if let Some(last) = sequence.last {
                        sequence.read.push(last);
                        sequences.push((last, &mut sequence.kept));
                    }
                }
                inference.step(&mut sequences)
            });
            match logits {
                Ok(logits) => {
                    for ((sequence, end), logits) in steps.into_iter().zip(logits) {
                        *end = sequence.draw(inference, logits).transpose();
                    }
                }
                Err(error) => {
                    let words = format!("{error:#}");
                    steps.into_iter().for_each(|(_, end)| *end = Some(Err(anyhow!("{words}"))));
                }
            }
        }
        for number in (0..self.drawn.len()).rev() {
            let Some(end) = ends[number].take() else { continue };
            let sequence = self.drawn.remove(number);
            let news = match end {
                Ok(finish) => {
                    self.keep(sequence.read, sequence.kept);
                    News::End(finish)
                }
                // What is told is a line; some errors bring a trace along.
                Err(error) => {
                    let words = format!("{error:#}");
                    News::Failed(anyhow!("{}", words.lines().next().unwrap_or_default()))
                }
            };
            // Whoever asked may have gone.
            let _ = sequence.asked.news.send(news);
        }
    }

    /// Keeps the beginning of a sequence that ended, for a prompt that begins alike.
    fn keep(&mut self, mut ids: Vec<u32>, kept: Kept) {
        ids.truncate(kept.prefilled());
        if ids.len() < SHORTEST {
            return;
        }
        self.kept.retain(|(other, _)| !ids.starts_with(other));
        self.kept.push((ids, kept));
        let bytes = |all: &[(Vec<u32>, Kept)]| all.iter().map(|(_, kept)| kept.bytes()).sum::<usize>();
        while self.kept.len() > BEGINNINGS || self.kept.len() > 1 && bytes(&self.kept) > BEGINNINGS_BYTES {
            self.kept.remove(0);
        }
    }
}

/// A pass, in its turn; a panic is an error of those whose pass it was.
fn guarded<R>(pass: impl FnOnce() -> Result<R>) -> Result<R> {
    let _turn = Turn::wait();
    catch_unwind(AssertUnwindSafe(pass)).unwrap_or_else(|_| Err(anyhow!("the model's pass panicked")))
}
