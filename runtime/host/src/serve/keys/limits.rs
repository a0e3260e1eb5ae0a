//! Limits of a key: requests and tokens a minute, tokens a day; for each person of a key that is trusted to name people.
//!
//! A request reserves what it may take before it begins, and pays what it took when it ends, however it ends. Whoever asks at the same
//! time finds the reservation, so that a hundred requests at once come to no more than one after another would.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::Key;
use super::days::{Days, Now};
use crate::progress::line;

/// Seconds of a minute.
const MINUTE_S: u64 = 60;
/// Wait for what is reserved and not paid yet, at least: nobody knows how much of it is given back.
const UNPAID: Duration = Duration::from_secs(2);
/// People whom the programs of all keys name, at most, of those who asked lately or today.
const PEOPLE_MAX: usize = 50_000;
/// Tokens of an answer where neither the request nor a limit says, as they are reserved.
const ANSWER: u64 = crate::handler::local::DEFAULT_MAX_TOKENS as u64;

/// How much may be asked. A field that is `None` is no limit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Limits {
    /// Requests in any minute.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub requests_per_minute: Option<u64>,
    /// Tokens of prompts and answers in any minute.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tokens_per_minute: Option<u64>,
    /// Tokens of prompts and answers from one midnight to the next.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tokens_per_day: Option<u64>,
}

impl Limits {
    /// Returns true if there is none.
    pub fn is_none(&self) -> bool {
        *self == Self::default()
    }
}

/// A limit that was reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Reached {
    /// `requests_per_minute`.
    Requests,
    /// `tokens_per_minute`.
    Tokens,
    /// `tokens_per_day`.
    Day,
    /// More people than are counted.
    People,
}

impl Reached {
    /// Its name, for logs and metrics.
    pub fn name(self) -> &'static str {
        match self {
            Self::Requests => "requests_per_minute",
            Self::Tokens => "tokens_per_minute",
            Self::Day => "tokens_per_day",
            Self::People => "people",
        }
    }
}

/// Why a request is refused.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Excess {
    /// The limit.
    pub reached: Reached,
    /// The message for people.
    pub message: String,
    /// When to try again.
    pub retry_after: Duration,
    /// Whether trying again then may help without any other change.
    pub retry: bool,
}

/// What a request may take, in tokens.
#[derive(Clone, Copy, Debug)]
pub struct Wish {
    /// Of the prompt, as estimated.
    pub prompt: u64,
    /// Of the answer, if the request says.
    pub answer: Option<u64>,
    /// How many answers.
    pub choices: u64,
}

/// Whose use is counted.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Who {
    pub key: String,
    /// The person's pseudonym, which is kept on disk in the place of a name.
    pub user: Option<String>,
}

/// What was asked by the keys of a server.
pub struct Meters {
    state: Mutex<State>,
    now: Box<dyn Fn() -> Now + Send + Sync>,
}

struct State {
    meters: BTreeMap<Who, Meter>,
    days: Days,
}

/// The use of a key or of a person in the last minute.
#[derive(Default)]
struct Meter {
    requests: Window,
    tokens: Window,
    /// Tokens that are reserved and not paid.
    reserved: u64,
}

impl Meters {
    /// Counts with a clock, and keeps what is used of a day in `days`.
    pub fn new(days: Days, now: impl Fn() -> Now + Send + Sync + 'static) -> Arc<Self> {
        Arc::new(Self { state: Mutex::new(State { meters: BTreeMap::new(), days }), now: Box::new(now) })
    }

    /// Counts with the clock of this machine.
    pub fn with(days: Days) -> Arc<Self> {
        Self::new(days, Now::clock())
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Writes what is used of the day to disk, if that has changed.
    pub fn keep(&self) {
        let now = (self.now)();
        let job = self.state().days.begin_keep(now.day);
        // Neither the disk nor whoever reads stderr is waited for under the lock.
        let kept = job.map(|job| job.run());
        let tells = kept.and_then(|kept| self.state().days.end_keep(kept));
        if let Some(words) = tells {
            line(words);
        }
    }

    /// Lets a request in, or says which limit it would exceed. Nothing is counted of one that is refused. `person`: the pseudonym of the one
    /// for whom a key asks that is trusted to name people.
    ///
    /// # Errors
    /// When it would exceed one.
    pub fn admit(self: &Arc<Self>, key: &Key, person: Option<&str>, wish: Wish) -> Result<Ticket, Excess> {
        let now = (self.now)();
        let who = Who { key: key.name.clone(), user: person.map(str::to_owned) };
        let whose = if who.user.is_some() { "this person" } else { "this key" };
        let limits = key.limits;
        let mut state = self.state();
        let State { meters, days } = &mut *state;
        if meters.len() >= PEOPLE_MAX && !meters.contains_key(&who) {
            meters.retain(|_, meter| meter.is_in_use(now.second));
            if meters.len() >= PEOPLE_MAX || days.people(now.day) >= PEOPLE_MAX {
                let message = format!("more than {PEOPLE_MAX} people ask; try again later");
                let retry_after = Duration::from_secs(MINUTE_S);
                return Err(Excess { reached: Reached::People, message, retry_after, retry: true });
            }
        }
        let meter = meters.entry(who.clone()).or_default();
        if let Some(most) = limits.requests_per_minute
            && let Some(wait) = meter.requests.wait(now.second, 1, most)
        {
            let message = format!("{whose} may ask {most} times a minute; try again in {} s", wait.as_secs());
            return Err(Excess { reached: Reached::Requests, message, retry_after: wait, retry: true });
        }
        // The answer ends at what is left of the day, if the request does not say where.
        let mut at_most = None;
        let asked = wish.answer.map(|answer| answer.saturating_mul(wish.choices));
        let usual = ANSWER.saturating_mul(wish.choices);
        let mut answer = asked.unwrap_or(usual);
        if let Some(most) = limits.tokens_per_day {
            let (used, reserved) = (days.used(&who, now.day), days.reserved(&who));
            let left = most.saturating_sub(used).saturating_sub(reserved);
            let least = wish.prompt.saturating_add(asked.unwrap_or(wish.choices));
            if left < least {
                // What others reserved may come back.
                let retry = most.saturating_sub(used) >= least;
                let left = most.saturating_sub(used);
                let message = if left == 0 {
                    format!("{whose} has used the {most} tokens of today")
                } else if retry {
                    format!("{whose} has {left} of {most} tokens left today, which other requests may need; try again")
                } else {
                    format!("{whose} has {left} of {most} tokens left today, and this request may take {least}")
                };
                let retry_after = if retry { UNPAID } else { now.midnight_in };
                return Err(Excess { reached: Reached::Day, message, retry_after, retry });
            }
            let room = left - wish.prompt;
            if asked.is_none() {
                answer = room.min(usual);
            }
        }
        // What is reserved is what it may have.
        if asked.is_none() && (limits.tokens_per_day.is_some() || limits.tokens_per_minute.is_some()) {
            at_most = Some(answer);
        }
        let reserve = wish.prompt.saturating_add(answer);
        if let Some(most) = limits.tokens_per_minute {
            // A request that is larger than the limit has a minute for itself.
            let reserve = reserve.min(most);
            let free = most.saturating_sub(meter.reserved);
            let wait = if free < reserve { Some(UNPAID) } else { meter.tokens.wait(now.second, reserve, free) };
            if let Some(wait) = wait {
                let message = format!(
                    "{whose} may use {most} tokens a minute, and this request may take {reserve}; try again in {} s",
                    wait.as_secs()
                );
                return Err(Excess { reached: Reached::Tokens, message, retry_after: wait, retry: true });
            }
        }
        meter.requests.add(now.second, 1);
        meter.reserved = meter.reserved.saturating_add(reserve);
        let daily = limits.tokens_per_day.is_some();
        if daily {
            days.reserve(&who, reserve);
        }
        Ok(Ticket { meters: self.clone(), who, reserved: reserve, answer, daily, at_most, paid: 0 })
    }
}

/// Leave for one request. What it reserved is given back when it is dropped, and what was paid is counted.
pub struct Ticket {
    meters: Arc<Meters>,
    who: Who,
    reserved: u64,
    answer: u64,
    daily: bool,
    /// Most tokens of all answers, if that is less than the request may take otherwise.
    pub at_most: Option<u64>,
    paid: u64,
}

impl Ticket {
    /// Tokens that were reserved for answers.
    pub fn answer(&self) -> u64 {
        self.answer
    }

    /// Says how many tokens the request took.
    pub fn pay(&mut self, tokens: u64) {
        self.paid = tokens;
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        let now = (self.meters.now)();
        let mut state = self.meters.state();
        let State { meters, days } = &mut *state;
        if let Some(meter) = meters.get_mut(&self.who) {
            meter.reserved = meter.reserved.saturating_sub(self.reserved);
            meter.tokens.add(now.second, self.paid);
        }
        if self.daily {
            days.pay(&self.who, self.reserved, self.paid, now.day);
        }
    }
}

impl Meter {
    fn is_in_use(&mut self, second: u64) -> bool {
        self.reserved > 0 || self.requests.sum(second) > 0 || self.tokens.sum(second) > 0
    }
}

/// What was counted in the last minute, by seconds.
#[derive(Default)]
struct Window(VecDeque<(u64, u64)>);

impl Window {
    fn sum(&mut self, second: u64) -> u64 {
        while self.0.front().is_some_and(|(then, _)| then + MINUTE_S <= second) {
            self.0.pop_front();
        }
        self.0.iter().fold(0, |sum, (_, count)| sum.saturating_add(*count))
    }

    fn add(&mut self, second: u64, count: u64) {
        self.sum(second);
        match self.0.back_mut().filter(|(last, _)| *last >= second) {
            Some((_, counted)) => *counted = counted.saturating_add(count),
            None if count > 0 => self.0.push_back((second, count)),
            None => {}
        }
    }

    /// The time until `more` can be added without exceeding `most`; `None`: now.
    fn wait(&mut self, second: u64, more: u64, most: u64) -> Option<Duration> {
        let mut sum = self.sum(second);
        if sum.saturating_add(more) <= most {
            return None;
        }
        let ends = self.0.iter().find(|(_, count)| {
            sum = sum.saturating_sub(*count);
            sum.saturating_add(more) <= most
        });
        // What never fits is told to come back in a minute.
        let seconds = ends.map_or(MINUTE_S, |(then, _)| (then + MINUTE_S).saturating_sub(second));
        Some(Duration::from_secs(seconds.max(1)))
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU64, Ordering};

    use super::*;

    struct Clock {
        second: AtomicU64,
        day: AtomicU64,
    }

    fn meters(days: Days) -> (Arc<Meters>, Arc<Clock>) {
        let clock = Arc::new(Clock { second: AtomicU64::new(1000), day: AtomicU64::new(20_000) });
        let read = clock.clone();
        let now = move || Now {
            second: read.second.load(Ordering::SeqCst),
            day: read.day.load(Ordering::SeqCst) as i64,
            midnight_in: Duration::from_secs(7200),
        };
        (Meters::new(days, now), clock)
    }

    fn key(limits: Limits) -> Key {
        let (mut key, _) = Key::make("k").expect("there are random numbers");
        (key.limits, key.trust_forwarded) = (limits, true);
        key
    }

    fn wish(prompt: u64, answer: u64) -> Wish {
        Wish { prompt, answer: Some(answer), choices: 1 }
    }

    fn refused(of: Result<Ticket, Excess>) -> Excess {
        of.err().expect("it is refused")
    }

    #[test]
    fn so_many_requests_fit_into_any_minute() {
        let (meters, clock) = meters(Days::none());
        let key = key(Limits { requests_per_minute: Some(3), ..Limits::default() });
        let ask = || meters.admit(&key, None, wish(1, 1)).map(drop);
        for second in [1000, 1010, 1040] {
            clock.second.store(second, Ordering::SeqCst);
            assert_eq!(ask(), Ok(()));
        }
        clock.second.store(1050, Ordering::SeqCst);
        let excess = ask().expect_err("it is the fourth");
        assert_eq!(
            (excess.reached, excess.retry_after, excess.retry),
            (Reached::Requests, Duration::from_secs(10), true)
        );
        assert!(meters.admit(&key, Some("anna"), wish(1, 1)).is_ok(), "another person has her own");
        clock.second.store(1060, Ordering::SeqCst);
        assert_eq!(ask(), Ok(()), "the first is a minute ago, and what was refused does not count");
        assert!(ask().is_err());
    }

    #[test]
    fn tokens_are_reserved_and_then_paid() {
        let (meters, clock) = meters(Days::none());
        let key = key(Limits { tokens_per_minute: Some(100), ..Limits::default() });
        let mut first = meters.admit(&key, None, wish(20, 60)).expect("it fits");
        assert_eq!(refused(meters.admit(&key, None, wish(1, 20))).reached, Reached::Tokens);
        first.pay(30);
        drop(first);
        let second = meters.admit(&key, None, wish(10, 60)).expect("the rest was given back");
        drop(second);
        assert_eq!(refused(meters.admit(&key, None, wish(50, 40))).retry_after, Duration::from_secs(60));
        clock.second.store(1060, Ordering::SeqCst);
        let large = meters.admit(&key, None, wish(500, 500)).expect("it has the minute for itself");
        assert!(meters.admit(&key, None, wish(0, 1)).is_err());
        drop(large);
    }

    #[test]
    fn the_day_ends_answers_at_what_is_left() {
        let (meters, clock) = meters(Days::none());
        let key = key(Limits { tokens_per_day: Some(1000), ..Limits::default() });
        let open = |prompt| meters.admit(&key, None, Wish { prompt, answer: None, choices: 1 });
        let mut first = open(100).expect("it fits");
        assert_eq!(first.at_most, Some(900));
        let excess = refused(open(1));
        assert!(excess.retry && excess.reached == Reached::Day, "what is reserved may come back: {excess:?}");
        first.pay(990);
        drop(first);
        let excess = refused(meters.admit(&key, None, wish(5, 6)));
        assert!(!excess.retry && excess.message.contains("10 of 1000 tokens left today"), "{excess:?}");
        assert_eq!(excess.retry_after, Duration::from_secs(7200));
        let mut last = open(5).expect("five are left");
        assert_eq!(last.at_most, Some(5));
        last.pay(12);
        drop(last);
        assert!(refused(open(0)).message.contains("has used the 1000 tokens of today"));
        assert!(meters.admit(&key, Some("anna"), wish(5, 6)).is_ok(), "another person has her own");
        clock.day.store(20_001, Ordering::SeqCst);
        assert_eq!(open(1).expect("it is another day").at_most, Some(999));
    }

    /// What a hundred at once come to exceeds the limit by nothing that was not reserved.
    #[test]
    fn a_hundred_at_once_come_to_no_more_than_is_left() {
        let (meters, _) = meters(Days::none());
        let key = key(Limits { tokens_per_day: Some(1000), ..Limits::default() });
        let admitted = AtomicU64::new(0);
        std::thread::scope(|scope| {
            for _ in 0..100 {
                scope.spawn(|| {
                    for _ in 0..5 {
                        if let Ok(mut ticket) = meters.admit(&key, None, wish(10, 30)) {
                            std::thread::yield_now();
                            ticket.pay(40);
                            admitted.fetch_add(1, Ordering::SeqCst);
                        }
                    }
                });
            }
        });
        assert_eq!(admitted.load(Ordering::SeqCst), 25);
    }

    #[test]
    fn a_window_forgets_what_is_a_minute_ago() {
        let mut window = Window::default();
        for (second, count) in [(0, 5), (0, 5), (30, 10), (59, 0)] {
            window.add(second, count);
        }
        assert_eq!((window.0.len(), window.sum(59), window.sum(60), window.sum(90)), (2, 20, 10, 0));
        window.add(100, u64::MAX);
        window.add(101, 5);
        assert_eq!(window.wait(101, 1, 10), Some(Duration::from_secs(59)));
        assert_eq!(window.wait(101, 20, 10), Some(Duration::from_secs(60)));
    }
}
