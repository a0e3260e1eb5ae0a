//! Work on rows by all threads, whose results come in the order of the rows: reading goes on meanwhile.

use std::collections::VecDeque;
use std::sync::mpsc::{Receiver, RecvTimeoutError, TryRecvError, sync_channel};
use std::time::Duration;

use anyhow::Result;
use rayon::Yield;

/// Rows that a thread takes at once.
const BATCH_ROWS: usize = 256;
/// Bytes after which a batch is closed.
const BATCH_BYTES: usize = 256 << 10;

/// Takes an item, of about so many bytes.
pub(super) type Give<'g, I> = &'g mut dyn FnMut(I, usize) -> Result<()>;

/// Calls `work` with each item that `produce` gives, by all threads, and `consume` with what comes of each, in the order of the items. A few
/// items a thread are in the making at once.
///
/// # Errors
/// Those of `produce` and `consume`, which end it.
pub(super) fn in_order<I: Send, O: Send, R>(
    work: impl Fn(I) -> O + Sync,
    mut consume: impl FnMut(O) -> Result<()>,
    produce: impl FnOnce(Give<'_, I>) -> Result<R>,
) -> Result<R> {
    // So many that no thread waits while the oldest is made.
    let most = 2 * rayon::current_num_threads() + 1;
    rayon::in_place_scope(|scope| {
        let mut making: VecDeque<Receiver<Vec<O>>> = VecDeque::new();
        let (mut batch, mut batch_bytes): (Vec<I>, usize) = (Vec::new(), 0);
        let work = &work;
        let begin = |batch: Vec<I>| {
            let (made, result) = sync_channel(1);
            scope.spawn(move |_| {
                // Nobody waits where an error has ended it.
                let _ = made.send(batch.into_iter().map(work).collect());
            });
            result
        };
        let produced = produce(&mut |item, bytes| {
            batch.push(item);
            batch_bytes += bytes;
            if batch.len() < BATCH_ROWS && batch_bytes < BATCH_BYTES {
                return Ok(());
            }
            making.push_back(begin(std::mem::take(&mut batch)));
            batch_bytes = 0;
            if making.len() < most {
                return Ok(());
            }
            let oldest = making.pop_front().expect("one was just begun");
            wait(&oldest).into_iter().try_for_each(&mut consume)
        })?;
        making.push_back(begin(batch));
        making.iter().flat_map(wait).try_for_each(&mut consume)?;
        Ok(produced)
    })
}

/// How long a thread of the pool waits for a batch before it looks for other work.
const PATIENCE: Duration = Duration::from_millis(1);

/// Waits for a batch. A thread of the pool works meanwhile: it may be the only one.
fn wait<O>(batch: &Receiver<Vec<O>>) -> Vec<O> {
    loop {
        match batch.try_recv() {
            Ok(made) => return made,
            Err(TryRecvError::Disconnected) => return Vec::new(),
            Err(TryRecvError::Empty) => match rayon::yield_now() {
                None => return batch.recv().unwrap_or_default(),
                Some(Yield::Executed) => {}
                // The batch is being made by another thread.
                Some(Yield::Idle) => match batch.recv_timeout(PATIENCE) {
                    Ok(made) => return made,
                    Err(RecvTimeoutError::Disconnected) => return Vec::new(),
                    Err(RecvTimeoutError::Timeout) => {}
                },
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use anyhow::bail;

    use super::*;

    fn squares(threads: usize, inside: bool, n: usize, bytes: usize) -> Vec<usize> {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        let run = || {
            let mut found = Vec::new();
            let work = |i: usize| {
                // The first of a batch is the last that is done.
                if i.is_multiple_of(BATCH_ROWS) {
                    std::thread::sleep(std::time::Duration::from_millis(2));
                }
                i * i
            };
            let consume = |square| {
                found.push(square);
                Ok(())
            };
            in_order(work, consume, |give| (0..n).try_for_each(|i| give(i, bytes))).unwrap();
            found
        };
        if inside { pool.install(run) } else { run() }
    }

    #[test]
    fn results_come_in_order_from_inside_and_outside_of_a_pool_of_any_size() {
        for (threads, inside, n, bytes) in
            [(1, true, 2600, 1), (3, true, 1111, 1), (2, false, 40, BATCH_BYTES), (1, true, 0, 1)]
        {
            assert_eq!(squares(threads, inside, n, bytes), (0..n).map(|i| i * i).collect::<Vec<_>>());
        }
    }

    #[test]
    fn an_error_ends_it_wherever_it_comes_from() {
        let consumed = in_order(
            |i: usize| i,
            |i| if i == 700 { bail!("row {i}") } else { Ok(()) },
            |give| (0..).try_for_each(|i| give(i, 1)),
        );
        assert_eq!(consumed.unwrap_err().to_string(), "row 700");
        let produced: Result<()> = in_order(
            |i: usize| i,
            |_| Ok(()),
            |give| {
                give(1, 1)?;
                bail!("no more")
            },
        );
        assert_eq!(produced.unwrap_err().to_string(), "no more");
    }
}
