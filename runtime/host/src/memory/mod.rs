//! The memory of the class: answers that were given, by consent in the file of handlers, and what was thought of them.
//!
//! ```text
//! memory/
//!   chain.jsonl            what was written in order, chained by digests; it holds no content
//!   head.json              number and digest of its last line
//!   contents/2026-11-30.jsonl   conversations and feedback of a day; what is removed is removed here
//!   .lock                  held while something is written
//! ```
//!
//! [`chain`] is append-only, [`contents`] is not: so one person's data can be deleted, and time can run out, while the chain stays whole
//! and tells that something was removed, when and why. [`rows`] are what a model learns from it.
//!
//! Answers wait in a [`queue`] for a thread that writes them, so that no stream waits. Whoever writes or reads writes those first.

mod chain;
mod contents;
mod head;
mod mend;
mod person;
mod queue;
pub mod rows;
pub mod settings;
mod verify;
mod whose;

use std::borrow::Cow;
use std::collections::{BTreeSet, HashMap, VecDeque};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context, Result, ensure};
use homeroom_engine::data::report::personal::Redactor;
use homeroom_engine::files::{Lock, make_directory};
use serde_json::Value;

use self::chain::{Chain, FILE, Ranges, Said, digest, ranges};
pub use self::contents::{About, Content};
use self::contents::{CONTENT_BYTES_MAX, Contents};
pub use self::person::Person;
use self::queue::Queue;
use self::settings::{Content as Kept, Settings};
pub use self::verify::{Verified, verify};
pub use self::whose::Whose;
use crate::hex::hex;
use crate::progress::line;
use crate::random;
use crate::registry::when;

/// Answers of which it is known whose they are, so that they can be rated.
const KNOWN_MAX: usize = 50_000;
/// Most that can be said of one answer.
const FEEDBACK_MAX: u8 = 16;
/// How often it is looked whether a time is over.
const HOUR: Duration = Duration::from_secs(3600);
/// After a failure it is written again so much later.
const RETRY: Duration = Duration::from_secs(1);
/// Contents that are this much more than the bound make room at once.
const OVER_BYTES: u64 = 8 << 20;

/// The directory of the memory in a data directory.
pub fn directory(data: &Path) -> PathBuf {
    data.join("memory")
}

/// An answer that was given.
#[derive(Clone, Debug)]
pub struct Answered {
    /// Its id.
    pub id: String,
    /// The id that its handler gave it.
    pub provider_id: Option<String>,
    /// The model, as the client named it.
    pub model: String,
    /// The handler that answered.
    pub handler: String,
    /// Whose it is.
    pub person: Person,
    /// The conversation before it.
    pub messages: Value,
    /// The text.
    pub answer: String,
}

/// What somebody thinks of an answer.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Feedback {
    /// The answer's id.
    pub response_id: String,
    /// 1: it is good, -1: it is not.
    pub rating: Option<i8>,
    /// A better answer.
    pub correction: Option<String>,
    /// Words about it.
    pub comment: Option<String>,
}

/// Why feedback is not taken.
#[derive(Debug)]
pub enum Refused {
    /// There is no such answer, or it is another's.
    Unknown,
    /// Too much was said of it already.
    Enough,
    /// It cannot be written.
    Failed(anyhow::Error),
}

#[derive(Clone, Debug)]
struct Known {
    /// Its number in the chain; 0: it is not there.
    number: u64,
    /// It waits to be written, which gives it its number.
    waits: bool,
    person: Person,
    said: u8,
}

/// Whose the answers are. Nobody who has it waits for anything.
#[derive(Default)]
struct State {
    known: HashMap<String, Known>,
    /// Ids in the order in which they came.
    order: VecDeque<String>,
}

impl State {
    /// Forgets answers of some numbers.
    fn forget(&mut self, goes: impl Fn(u64) -> bool) {
        self.known.retain(|_, known| !goes(known.number));
        self.order.retain(|id| self.known.contains_key(id));
    }
}

/// The memory of a server.
pub struct Memory {
    directory: PathBuf,
    settings: Settings,
    contents: Contents,
    /// Whoever has it also has the lock of the directory, or waits for that.
    chain: Mutex<Chain>,
    state: Mutex<State>,
    queue: Arc<Queue>,
    /// That it cannot be written was said.
    is_told: AtomicBool,
}

impl Memory {
    /// Opens the memory of a data directory for a server; completes what was being removed, and removes what is too old.
    ///
    /// # Errors
    /// When the chain is broken or cannot be read, or the directory cannot be written.
    pub fn open(data: &Path, settings: Settings) -> Result<Self> {
        let directory = directory(data);
        make_directory(&directory)?;
        let memory = Self::of(directory, settings);
        memory.mend()?;
        memory.forget_old()?;
        memory.recall()?;
        Ok(memory)
    }

    /// Opens the memory of a data directory to look at it, or to delete a person's data.
    ///
    /// # Errors
    /// When there is none.
    pub fn at(data: &Path) -> Result<Self> {
        let directory = directory(data);
        ensure!(is_there(&directory), verify::nothing(&directory));
        Ok(Self::of(directory, Settings::default()))
    }

    fn of(directory: PathBuf, settings: Settings) -> Self {
        let (contents, chain) = (Contents::new(&directory), Mutex::new(Chain::new(&directory)));
        let (state, queue) = (Mutex::default(), Arc::default());
        Self { directory, settings, contents, chain, state, queue, is_told: AtomicBool::new(false) }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Tells what cannot be written, once.
    fn tell(&self, error: &anyhow::Error) {
        if !self.is_told.swap(true, Ordering::Relaxed) {
            line(format_args!("warning: conversations are not kept: {error:#}"));
        }
    }

    /// Writes answers as they come, and looks each hour whether a time is over, as long as the memory is used.
    ///
    /// # Errors
    /// When no thread can be started.
    pub fn begin(memory: &Arc<Self>) -> Result<()> {
        let (queue, memory) = (memory.queue.clone(), Arc::downgrade(memory));
        thread::Builder::new().name("memory".to_owned()).spawn(move || {
            let mut looked = Instant::now();
            while queue.wait(HOUR.saturating_sub(looked.elapsed())) {
                let Some(memory) = memory.upgrade() else { return };
                if looked.elapsed() >= HOUR {
                    looked = Instant::now();
                    if let Err(error) = memory.forget_old() {
                        line(format_args!("warning: what is too old cannot be removed: {error:#}"));
                    }
                } else if !memory.settle() {
                    drop(memory);
                    thread::sleep(RETRY);
                }
            }
        })?;
        Ok(())
    }

    /// Writes the answers that wait. Returns false if the log cannot be written, which is told once; they wait on.
    pub fn settle(&self) -> bool {
        self.locked(|_| Ok(())).inspect_err(|error| self.tell(error)).is_ok()
    }

    /// Does something with the directory, that nobody else does meanwhile, when all answers that wait are written.
    fn locked<T>(&self, work: impl FnOnce(&mut Chain) -> Result<T>) -> Result<T> {
        // This process first, so that its threads do not wait by looking.
        let mut chain = self.chain.lock().unwrap_or_else(PoisonError::into_inner);
        let _lock = Lock::take(&self.directory, &mut |note| line(note))?;
        let mut removed = Ranges::default();
        chain.catch_up(|link| {
            if let Said::Removed { numbers, .. } = &link.said {
                removed.extend(numbers.iter().copied());
            }
        })?;
        if !removed.is_empty() {
            self.state().forget(|number| removed.holds(number));
        }
        if let Some(apart) = chain.apart() {
            let words = apart.words();
            line(format_args!("note: {}: {words}; it is set right", self.directory.display()));
        }
        self.write_waiting(&mut chain);
        let done = work(&mut chain);
        // The chain is longer than its head until that is written: the next who comes sets it right.
        if done.is_ok()
            && let Err(error) = chain.keep_head()
        {
            self.tell(&error);
        }
        done
    }

    /// Writes the answers that wait now. What cannot be written is told once, and its answer can still be rated.
    fn write_waiting(&self, chain: &mut Chain) {
        for _ in 0..self.queue.len() {
            let Some((person, about)) = self.queue.pop() else { break };
            let About::Answer { id, .. } = &about else { continue };
            let id = id.clone();
            let written = self.write(chain, person, about).inspect_err(|error| self.tell(error));
            if let Some(known) = self.state().known.get_mut(&id) {
                (known.number, known.waits) = (written.unwrap_or(0), false);
            }
        }
        let lost = self.queue.lost();
        if lost > 0 {
            line(format_args!("warning: {lost} answers were not kept, as too many waited to be written"));
        }
    }

    /// Completes what another process began to remove, and takes back what a crash left half written.
    fn mend(&self) -> Result<()> {
        self.locked(|_| mend::mend(&self.directory, &self.contents))
    }

    /// Reads whose the answers are that are kept.
    fn recall(&self) -> Result<()> {
        self.locked(|_| {
            let mut state = self.state();
            let State { known, order } = &mut *state;
            self.contents.all(|_, content| match content.about {
                About::Answer { id, .. } => {
                    let (number, person) = (content.number, content.person);
                    note(known, order, id, Known { number, waits: false, person, said: 0 });
                }
                About::Feedback { response_id, .. } => {
                    if let Some(known) = known.get_mut(&response_id) {
                        known.said = known.said.saturating_add(1);
                    }
                }
            })
        })
    }

    /// Remembers an answer, as far as the settings allow, and does not wait until it is written.
    pub fn answered(&self, answered: Answered) {
        let Answered { id, provider_id, model, handler, person, mut messages, mut answer } = answered;
        let known = Known { number: 0, waits: false, person: person.clone(), said: 0 };
        if self.settings.content == Kept::None {
            let mut state = self.state();
            let State { known: all, order } = &mut *state;
            note(all, order, id, known);
            return;
        }
        let mut redactor = Redactor::default();
        if self.settings.content == Kept::Redacted {
            messages = redactor.row(&messages).unwrap_or(messages);
            answer = redactor.text(&answer).into_owned();
        }
        let mut bytes = messages.to_string().len() + answer.len();
        if bytes > CONTENT_BYTES_MAX {
            (messages, answer, bytes) = (Value::Null, String::new(), 0);
        }
        let about = About::Answer { id: id.clone(), provider_id, model, handler, messages, answer };
        // Nobody sees it in the queue and does not know it.
        let mut state = self.state();
        let State { known: all, order } = &mut *state;
        let waits = self.queue.push((person, about), bytes);
        note(all, order, id, Known { waits, ..known });
    }

    /// Takes what somebody thinks of an answer of their own. Returns true if its words are kept, and false if the rating alone is.
    ///
    /// # Errors
    /// When the answer is not known, another's, or enough was said of it; or nothing can be written.
    pub fn rate(&self, person: Person, feedback: Feedback) -> Result<bool, Refused> {
        let is_known = |known: &Known| known.person == person;
        // What another process has removed is not known any more, and an answer that waits is written.
        self.locked(|_| Ok(())).map_err(Refused::Failed)?;
        if self.state().known.get(&feedback.response_id).is_some_and(|known| known.waits && is_known(known)) {
            // It came in between.
            self.locked(|_| Ok(())).map_err(Refused::Failed)?;
        }
        let number = {
            let mut state = self.state();
            let known = state.known.get_mut(&feedback.response_id).filter(|known| is_known(known));
            let known = known.ok_or(Refused::Unknown)?;
            if known.said >= FEEDBACK_MAX {
                return Err(Refused::Enough);
            }
            known.said += 1;
            known.number
        };
        let Feedback { response_id, rating, mut correction, mut comment } = feedback;
        let keeps = self.settings.content != Kept::None;
        let mut redactor = Redactor::default();
        let mut redact = |text: Option<String>| match (self.settings.content, text) {
            (Kept::Full, text) => text,
            (Kept::Redacted, Some(text)) => Some(match redactor.text(&text) {
                Cow::Borrowed(_) => text,
                Cow::Owned(text) => text,
            }),
            _ => None,
        };
        (correction, comment) = (redact(correction), redact(comment));
        let person = if keeps { person } else { Person::default() };
        let answer_number = Some(number).filter(|number| *number > 0);
        let about = About::Feedback { response_id, answer_number, rating, correction, comment };
        self.locked(|chain| self.write(chain, person, about)).map(|_| keeps).map_err(Refused::Failed)
    }

    fn write(&self, chain: &mut Chain, person: Person, about: About) -> Result<u64> {
        let time = when::text(SystemTime::now());
        let day = time.get(..10).context("a time begins with its day")?.to_owned();
        let is_answer = matches!(about, About::Answer { .. });
        let number = chain.tail().number + 1;
        let content = Content { number, salt: salt()?, time: time.clone(), person, about };
        let line = serde_json::to_vec(&content)?;
        // The content first: one without a line in the chain is removed at once, or after a crash at the next start.
        let before = self.contents.append(&day, &line)?;
        let content = digest(&line);
        let said = if is_answer { Said::Answer { content } } else { Said::Feedback { content } };
        let number = match chain.append(time, said) {
            Ok(number) => number,
            Err(error) => {
                let _ = self.contents.cut(&day, before);
                return Err(error);
            }
        };
        if number.is_multiple_of(256) {
            self.make_room(chain)?;
        }
        Ok(number)
    }

    /// Removes the contents of days that are too old, and of the oldest days where there is too much.
    ///
    /// # Errors
    /// When they cannot be removed.
    pub fn forget_old(&self) -> Result<()> {
        let Self { settings, contents, .. } = self;
        let age = Duration::from_secs(86_400 * settings.retention_days);
        let oldest = SystemTime::now().checked_sub(age).map(when::text).unwrap_or_default();
        self.locked(|chain| {
            for day in contents.days().into_iter().filter(|day| day.as_str() < oldest.get(..10).unwrap_or_default()) {
                self.remove_in(chain, contents.numbers(&day)?, "retention")?;
            }
            self.make_room(chain)
        })
    }

    fn make_room(&self, chain: &mut Chain) -> Result<()> {
        let mut days: VecDeque<(String, u64)> =
            self.contents.days().into_iter().map(|day| (day.clone(), self.contents.bytes(&day))).collect();
        let mut bytes: u64 = days.iter().map(|(_, bytes)| bytes).sum();
        if bytes <= self.settings.bytes_max + OVER_BYTES {
            return Ok(());
        }
        while bytes > self.settings.bytes_max
            && let Some((day, of_day)) = days.pop_front()
        {
            self.remove_in(chain, self.contents.numbers(&day)?, "room")?;
            bytes -= of_day;
        }
        Ok(())
    }

    /// Removes contents, and says so in the chain. That first: whoever is killed meanwhile has the rest removed at the next start.
    fn remove_in(&self, chain: &mut Chain, numbers: BTreeSet<u64>, why: &str) -> Result<()> {
        let said = Said::Removed { numbers: ranges(&numbers), why: why.to_owned() };
        if !numbers.is_empty() {
            chain.append(when::text(SystemTime::now()), said)?;
        }
        self.state().forget(|number| numbers.contains(&number));
        // What can be read no more may be theirs.
        self.contents.remove(|_, content| content.is_none_or(|content| numbers.contains(&content.number)))
    }

    /// All that is kept of a person, in order.
    ///
    /// # Errors
    /// When several keys have a person of that name and none is named; or it cannot be read.
    pub fn of_person(&self, whose: Whose<'_>) -> Result<Vec<Content>> {
        let (mut found, mut keys) = (Vec::new(), BTreeSet::new());
        self.locked(|_| {
            self.contents.all(|_, content| {
                if whose.takes(&content.person, &mut keys) {
                    found.push(content);
                }
            })
        })?;
        whose.one_of(&keys)?;
        found.sort_by_key(|content| content.number);
        Ok(found)
    }

    /// Removes all that is kept of a person; returns how many contents that were.
    ///
    /// # Errors
    /// When several keys have a person of that name and none is named; or it cannot be removed.
    pub fn forget_person(&self, whose: Whose<'_>) -> Result<usize> {
        // A line of the chain may follow, so that what a crash left there goes first.
        self.mend()?;
        self.locked(|chain| {
            let (mut numbers, mut keys) = (BTreeSet::new(), BTreeSet::new());
            self.contents.all(|_, content| {
                if whose.takes(&content.person, &mut keys) {
                    numbers.insert(content.number);
                }
            })?;
            whose.one_of(&keys)?;
            let count = numbers.len();
            self.remove_in(chain, numbers, "person")?;
            Ok(count)
        })
    }

    /// All contents, in order.
    ///
    /// # Errors
    /// When they cannot be read.
    pub fn contents(&self) -> Result<Vec<Content>> {
        let mut found = Vec::new();
        self.locked(|_| self.contents.all(|_, content| found.push(content)))?;
        found.sort_by_key(|content| content.number);
        Ok(found)
    }
}

impl Drop for Memory {
    /// Writes what waits.
    fn drop(&mut self) {
        self.queue.close();
        if self.queue.len() > 0 {
            self.settle();
        }
    }
}

/// Whether something is kept, or was.
fn is_there(directory: &Path) -> bool {
    [FILE, head::FILE].iter().any(|name| directory.join(name).exists()) || !Contents::new(directory).days().is_empty()
}

fn note(known: &mut HashMap<String, Known>, order: &mut VecDeque<String>, id: String, of: Known) {
    if known.insert(id.clone(), of).is_none() {
        order.push_back(id);
    }
    while order.len() > KNOWN_MAX
        && let Some(oldest) = order.pop_front()
    {
        known.remove(&oldest);
    }
}

/// What nobody can guess: 128 random bits.
///
/// # Errors
/// When the system has no random numbers.
fn salt() -> Result<String> {
    Ok(hex(&random::bytes::<16>()?))
}

#[cfg(test)]
mod tests;
