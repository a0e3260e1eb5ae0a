//! Progress of long work: a bar on a terminal, plain lines off it. All of it goes to stderr.

use std::fmt::Display;
use std::io::{IsTerminal, Write, stderr};
use std::time::{Duration, Instant};

use homeroom_engine::train::StepReport;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use crate::machine::peak_memory_bytes;
use crate::terminal;

/// Writes a line to stderr, what a terminal would obey in it escaped. A reader that has gone away, as `2>&1 | head` has, must not end a
/// run: the standard `eprintln` would panic.
pub fn line(text: impl Display) {
    prompt(format_args!("{text}\n"));
}

/// As [`line`], and stays in the line. In one piece, so that lines of several processes do not mix.
pub fn prompt(text: impl Display) {
    let text = text.to_string();
    let _ = stderr().write_all(terminal::shown(&text).as_bytes());
}

/// Progress of a training run.
pub struct Training {
    bar: Option<ProgressBar>,
    started: Instant,
    tokens: usize,
    seconds: f64,
}

impl Training {
    /// Before the first of `steps`.
    pub fn start(steps: u64) -> Self {
        let bar = stderr().is_terminal().then(|| {
            let style = "step {pos}/{len} {wide_bar} {msg}  {eta} left";
            let style = ProgressStyle::with_template(style).expect("the template is right");
            let bar = ProgressBar::with_draw_target(Some(steps), ProgressDrawTarget::stderr()).with_style(style);
            bar.enable_steady_tick(Duration::from_secs(1));
            bar
        });
        Self { bar, started: Instant::now(), tokens: 0, seconds: 0.0 }
    }

    /// A step is done.
    pub fn step(&mut self, report: &StepReport, steps: u64) {
        self.tokens += report.tokens;
        self.seconds += report.seconds;
        let speed = self.tokens as f64 / self.seconds.max(1e-9);
        match &self.bar {
            Some(bar) => {
                bar.set_position(report.step);
                bar.set_message(format!("loss {:.3}  {} tok/s", report.loss, thousands(speed as usize)));
            }
            None => {
                // About twenty lines a run, the first and the last among them.
                let part = |step: u64| step * 20 / steps.max(1);
                if report.step > 1 && report.step < steps && part(report.step) == part(report.step - 1) {
                    return;
                }
                let rest = self.started.elapsed().as_secs_f64() / report.step as f64 * (steps - report.step) as f64;
                line(format_args!(
                    "step {:>5}/{steps}   loss {:.3}   lr {:.1e}   {} tok/s   {}   {} left",
                    report.step,
                    report.loss,
                    report.learning_rate,
                    thousands(speed as usize),
                    peak_memory_bytes().map_or_else(|| "?".to_owned(), bytes),
                    duration(rest),
                ));
            }
        }
    }

    /// The run has ended.
    pub fn end(self) {
        if let Some(bar) = self.bar {
            bar.finish();
        }
    }
}

/// A bar over `count` things on a terminal; nothing off it.
pub fn counting(what: &'static str, count: usize) -> ProgressBar {
    let style = ProgressStyle::with_template("{msg} {pos}/{len} {wide_bar} {eta} left").expect("the template is right");
    let target = if stderr().is_terminal() { ProgressDrawTarget::stderr() } else { ProgressDrawTarget::hidden() };
    ProgressBar::with_draw_target(Some(count as u64), target).with_style(style).with_message(what)
}

/// 1,234,567.
pub fn thousands(number: usize) -> String {
    let digits = number.to_string();
    let mut out = String::new();
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            out.push(',');
        }
        out.push(digit);
    }
    out
}

/// 1.9 GiB.
pub fn bytes(bytes: u64) -> String {
    let bytes = bytes as f64;
    let units = [("GiB", 30), ("MiB", 20), ("KiB", 10)];
    let unit = units.iter().find(|(_, shift)| bytes >= f64::from(1 << shift));
    unit.map_or_else(|| format!("{bytes} B"), |(name, shift)| format!("{:.1} {name}", bytes / f64::from(1 << shift)))
}

/// 1h02m, 3m05s or 7s.
pub fn duration(seconds: f64) -> String {
    let seconds = seconds.round() as u64;
    match (seconds / 3600, seconds / 60 % 60, seconds % 60) {
        (0, 0, s) => format!("{s}s"),
        (0, m, s) => format!("{m}m{s:02}s"),
        (h, m, _) => format!("{h}h{m:02}m"),
    }
}
