//! Progress of long work: a bar on a terminal, plain lines off it and where bars are not drawn. All of it goes to stderr.

use std::cell::Cell;
use std::fmt::Display;
use std::io::{Write, stderr};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use homeroom_engine::train::StepReport;
use indicatif::{HumanCount, HumanDuration, ProgressBar, ProgressDrawTarget, ProgressStyle};

use crate::machine::peak_memory_bytes;
use crate::runs::output;
use crate::terminal;

/// Writes a line to stderr, what a terminal would obey in it escaped. A reader that has gone away, as `2>&1 | head` has, must not end a
/// run: the standard `eprintln` would panic.
pub fn line(text: impl Display) {
    prompt(format_args!("{text}\n"));
}

/// As [`line`], and stays in the line. In one piece, so that lines of several processes do not mix.
pub fn prompt(text: impl Display) {
    let text = text.to_string();
    let text = terminal::shown(&text);
    output::feed(&text);
    let _ = stderr().write_all(text.as_bytes());
}

/// Where a bar is drawn; `None` off a terminal, on a dumb one, and in continuous integration, whose logs keep each redrawing of a bar.
fn terminal() -> Option<ProgressDrawTarget> {
    let target = ProgressDrawTarget::stderr();
    let ci = std::env::var_os("CI").is_some_and(|value| !value.is_empty() && value != "false");
    (!target.is_hidden() && !ci).then_some(target)
}

/// Progress of a training run.
pub struct Training {
    bar: Option<ProgressBar>,
    started: Instant,
    /// Steps that were done before this process began.
    before: Option<u64>,
    tokens: usize,
    seconds: f64,
    last: String,
    evaluating: Option<Counting>,
}

impl Training {
    /// Before the first of `steps`.
    pub fn start(steps: u64) -> Self {
        let bar = terminal().map(|target| {
            let style = "step {pos}/{len} {wide_bar} {msg}  {eta} left";
            let style = ProgressStyle::with_template(style).expect("the template is right");
            let bar = ProgressBar::with_draw_target(Some(steps), target).with_style(style);
            bar.enable_steady_tick(Duration::from_secs(1));
            bar
        });
        Self {
            bar,
            started: Instant::now(),
            before: None,
            tokens: 0,
            seconds: 0.0,
            last: String::new(),
            evaluating: None,
        }
    }

    /// A step is done.
    pub fn step(&mut self, report: &StepReport, steps: u64) {
        let before = *self.before.get_or_insert(report.step.saturating_sub(1));
        self.tokens += report.tokens;
        self.seconds += report.seconds;
        let speed = thousands((self.tokens as f64 / self.seconds.max(1e-9)) as usize);
        match &self.bar {
            Some(bar) => {
                bar.set_position(report.step);
                bar.set_message(format!("loss {:.3}  {speed} tok/s", report.loss));
                self.last = format!("step {}/{steps}   loss {:.3}   {speed} tok/s", report.step, report.loss);
            }
            None => {
                // About ten lines a run, the first and the last among them.
                let part = |step: u64| step * 10 / steps.max(1);
                if report.step > 1 && report.step < steps && part(report.step) == part(report.step - 1) {
                    return;
                }
                let rest = match report.step < steps {
                    true => format!(
                        "   {} left",
                        left(self.started, report.step.saturating_sub(before), steps.saturating_sub(before))
                    ),
                    false => String::new(),
                };
                line(format_args!(
                    "step {:>5}/{steps}   loss {:.3}   lr {:.1e}   {speed} tok/s   {}{rest}",
                    report.step,
                    report.loss,
                    report.learning_rate,
                    peak_memory_bytes().map_or_else(|| "?".to_owned(), size),
                ));
            }
        }
    }

    /// Held-out rows are evaluated between steps.
    pub fn evaluating(&mut self, done: usize, all: usize) {
        let bar = self.evaluating.get_or_insert_with(|| counting("evaluating", all));
        bar.set_position(done as u64);
        if done == all
            && let Some(bar) = self.evaluating.take()
        {
            bar.finish_and_clear();
        }
    }

    /// Writes a line beside the bar.
    pub fn say(&self, text: impl Display) {
        match &self.bar {
            Some(bar) => bar.suspend(|| line(text)),
            None => line(text),
        }
    }

    /// The run has ended: after its last step, or where it was stopped.
    pub fn end(self) {
        if let Some(bar) = self.bar {
            // Not left where it is: it would tell of time left, and take the line that follows for its own where a terminal has no width.
            bar.finish_and_clear();
            if !self.last.is_empty() {
                line(self.last);
            }
        }
    }
}

/// The time that the rest takes if it goes on as it began.
fn left(started: Instant, done: u64, all: u64) -> HumanDuration {
    let each = started.elapsed().as_secs_f64() / done.max(1) as f64;
    let rest = Duration::try_from_secs_f64(each * all.saturating_sub(done) as f64);
    HumanDuration(rest.unwrap_or(Duration::MAX))
}

/// Progress over things that are counted.
pub struct Counting {
    bar: ProgressBar,
    what: &'static str,
    shown: fn(u64) -> String,
    started: Instant,
    told: Cell<Instant>,
}

/// Time between two lines where no bar is drawn.
const BETWEEN_LINES: Duration = Duration::from_secs(20);

/// A bar over `count` things; off a terminal a line now and then, none for what is done soon.
pub fn counting(what: &'static str, count: usize) -> Counting {
    drawn(what, count as u64, "{msg} {pos}/{len} {wide_bar} {eta} left", |count| HumanCount(count).to_string())
}

/// As [`counting`], of bytes.
pub fn bytes(what: &'static str, bytes: u64) -> Counting {
    drawn(what, bytes, "{msg} {decimal_bytes} of {decimal_total_bytes} {wide_bar} {eta} left", size)
}

fn drawn(what: &'static str, length: u64, template: &str, shown: fn(u64) -> String) -> Counting {
    let style = ProgressStyle::with_template(template).expect("the template is right");
    let target = terminal().unwrap_or_else(ProgressDrawTarget::hidden);
    let bar = ProgressBar::with_draw_target(Some(length), target).with_style(style).with_message(what);
    Counting { bar, what, shown, started: Instant::now(), told: Cell::new(Instant::now()) }
}

impl Counting {
    /// How many there are.
    pub fn set_length(&self, count: u64) {
        self.bar.set_length(count);
    }

    /// How many are done.
    pub fn set_position(&self, done: u64) {
        self.bar.set_position(done);
        if self.bar.is_hidden() && self.told.get().elapsed() >= BETWEEN_LINES {
            self.told.set(Instant::now());
            let all = self.bar.length().unwrap_or(done);
            let (what, left) = (self.what, left(self.started, done, all));
            line(format_args!("{what} {}/{}   {left} left", (self.shown)(done), (self.shown)(all)));
        }
    }

    /// All are done, or no more will be.
    pub fn finish_and_clear(&self) {
        self.bar.finish_and_clear();
    }
}

/// Progress of a download, in bytes; several threads report to it.
pub struct Downloading {
    bar: Option<ProgressBar>,
    total: u64,
    /// Bytes that are here.
    here: AtomicU64,
    /// Bytes that have come since the start.
    came: AtomicU64,
    /// Bytes that are here and are checked now.
    checking: AtomicU64,
    started: Instant,
    told: Mutex<Instant>,
}

/// A check of bytes that are here, which has ended when this is dropped.
pub struct Checking<'a> {
    progress: &'a Downloading,
    bytes: u64,
}

impl Drop for Checking<'_> {
    fn drop(&mut self) {
        self.progress.checking.fetch_sub(self.bytes, Ordering::Relaxed);
    }
}

impl Downloading {
    /// Before more comes of `total` bytes, of which some are here.
    pub fn start(total: u64, here: u64) -> Self {
        let bar = terminal().filter(|_| total > 0).map(|target| {
            let style = "{decimal_bytes} of {decimal_total_bytes} {wide_bar} {msg}";
            let style = ProgressStyle::with_template(style).expect("the template is right");
            ProgressBar::with_draw_target(Some(total), target).with_style(style)
        });
        let zero = || AtomicU64::new(0);
        let started = Instant::now();
        let here = AtomicU64::new(here);
        Self { bar, total, here, came: zero(), checking: zero(), started, told: Mutex::new(started) }
    }

    /// Bytes have come.
    pub fn add(&self, bytes: u64) {
        self.came.fetch_add(bytes, Ordering::Relaxed);
        self.here.fetch_add(bytes, Ordering::Relaxed);
    }

    /// Bytes were here before.
    pub fn add_old(&self, bytes: u64) {
        self.here.fetch_add(bytes, Ordering::Relaxed);
    }

    /// Bytes that are here are checked until what is returned is dropped.
    pub fn checking(&self, bytes: u64) -> Checking<'_> {
        self.checking.fetch_add(bytes, Ordering::Relaxed);
        Checking { progress: self, bytes }
    }

    /// Bytes that were here are given up.
    pub fn take_back(&self, bytes: u64) {
        self.here.fetch_sub(bytes, Ordering::Relaxed);
    }

    /// Bytes that are here.
    pub fn here(&self) -> u64 {
        self.here.load(Ordering::Relaxed)
    }

    /// Bytes that have come since the start, and the time since then.
    pub fn came(&self) -> (u64, Duration) {
        (self.came.load(Ordering::Relaxed), self.started.elapsed())
    }

    /// Draws the bar; off a terminal writes a line now and then. To be called often.
    pub fn tick(&self) {
        let (came, elapsed) = self.came();
        let rate = came as f64 / elapsed.as_secs_f64().max(1e-3);
        let left = Duration::try_from_secs_f64(self.total.saturating_sub(self.here()) as f64 / rate);
        let left = left.map_or_else(|_| String::new(), |left| format!("   {} left", HumanDuration(left)));
        let what = match self.checking.load(Ordering::Relaxed) {
            checking if checking > 0 && came == 0 => format!("checking {} that are here", size(checking)),
            _ => format!("{}/s{left}", size(rate as u64)),
        };
        if let Some(bar) = &self.bar {
            bar.set_position(self.here().min(self.total));
            bar.set_message(what);
            return;
        }
        let mut told = self.told.lock().unwrap_or_else(PoisonError::into_inner);
        if told.elapsed() >= BETWEEN_LINES {
            *told = Instant::now();
            line(format_args!("got {} of {}   {what}", size(self.here()), size(self.total)));
        }
    }

    /// Writes a line beside the bar.
    pub fn say(&self, text: impl Display) {
        match &self.bar {
            Some(bar) => bar.suspend(|| line(text)),
            None => line(text),
        }
    }

    /// No more will come.
    pub fn end(&self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

/// 1.23 M, or 4,567 where millions would be 0.00.
pub fn millions(number: usize) -> String {
    match number {
        ..10_000 => thousands(number).to_string(),
        _ => format!("{:.2} M", number as f64 / 1e6),
    }
}

/// A size in three digits and the hub's units, which count in thousands: `542 MB`, `1.80 GB`.
pub fn size(bytes: u64) -> String {
    const UNITS: [&str; 4] = ["kB", "MB", "GB", "TB"];
    let (mut number, mut unit) = (bytes as f64 / 1e3, 0);
    if bytes < 1000 {
        return format!("{bytes} B");
    }
    // From 999.5 on it would be rounded to four digits.
    while number >= 999.5 && unit + 1 < UNITS.len() {
        (number, unit) = (number / 1e3, unit + 1);
    }
    let digits = if number >= 99.95 { 0 } else { usize::from(number < 9.995) + 1 };
    format!("{number:.digits$} {}", UNITS[unit])
}

/// 1,234,567.
pub fn thousands(number: usize) -> HumanCount {
    HumanCount(number as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_size_has_three_digits() {
        for (bytes, text) in [
            (0, "0 B"),
            (999, "999 B"),
            (1000, "1.00 kB"),
            (9_994, "9.99 kB"),
            (9_995, "10.0 kB"),
            (99_950, "100 kB"),
            (999_499, "999 kB"),
            (999_500, "1.00 MB"),
            (541_614_861, "542 MB"),
            (15_200_000_000, "15.2 GB"),
            (u64::MAX, "18446744 TB"),
        ] {
            assert_eq!(size(bytes), text, "{bytes}");
        }
    }

    #[test]
    fn a_few_parameters_are_counted_and_many_are_told_in_millions() {
        assert_eq!([0, 4_567, 9_999].map(millions), ["0", "4,567", "9,999"]);
        assert_eq!([10_000, 4_884_480].map(millions), ["0.01 M", "4.88 M"]);
    }
}
