//! Lines of requests on their way to stderr. A thread of their own writes them, since whoever reads stderr may be slow, and no answer waits for
//! that.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, Sender, SyncSender, channel, sync_channel};
use std::thread;
use std::time::Duration;

use anyhow::Result;

use crate::progress::line;

/// Most lines that wait.
const LINES_MAX: usize = 4096;

enum Said {
    Line(String),
    /// Everything before it is written once its sender is gone.
    Mark(Sender<()>),
}

/// The log of a server.
pub struct Lines {
    sender: SyncSender<Said>,
    /// Lines that did not fit.
    lost: Arc<AtomicU64>,
}

impl Lines {
    /// Begins to write what comes, until this value is gone.
    ///
    /// # Errors
    /// When no thread can be started.
    pub fn begin() -> Result<Self> {
        let (sender, said) = sync_channel(LINES_MAX);
        let lost = Arc::<AtomicU64>::default();
        let counted = lost.clone();
        thread::Builder::new().name("log".to_owned()).spawn(move || write(&said, &counted, line))?;
        Ok(Self { sender, lost })
    }

    /// Has a line written, and waits for nothing. One that does not fit is counted, which is told later.
    pub fn say(&self, text: String) {
        if self.sender.try_send(Said::Line(text)).is_err() {
            self.lost.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Waits until what was said is written, or for a time.
    pub fn settle(&self, longest: Duration) {
        let (mark, written) = channel();
        if self.sender.try_send(Said::Mark(mark)).is_ok() {
            // It ends when the mark is dropped.
            let _ = written.recv_timeout(longest);
        }
    }
}

fn write(said: &Receiver<Said>, lost: &AtomicU64, line: impl Fn(String)) {
    for said in said {
        match said {
            Said::Line(text) => line(text),
            Said::Mark(mark) => drop(mark),
        }
        let lost = lost.swap(0, Ordering::Relaxed);
        if lost > 0 {
            line(format!("note: {lost} lines of the log are missing here: stderr was not read in time"));
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;

    #[test]
    fn lines_that_nobody_reads_are_counted_and_not_waited_for() {
        let (sender, said) = sync_channel(2);
        let lines = Lines { sender, lost: Arc::default() };
        for number in 0..5 {
            lines.say(number.to_string());
        }
        let lost = lines.lost.clone();
        drop(lines);
        let seen = Mutex::new(Vec::new());
        write(&said, &lost, |text| seen.lock().expect("nobody panics").push(text));
        let seen = seen.into_inner().expect("nobody panics");
        assert_eq!((&seen[0], &seen[2], seen.len()), (&"0".to_owned(), &"1".to_owned(), 3));
        assert!(seen[1].contains("3 lines of the log are missing"), "{seen:?}");
    }
}
