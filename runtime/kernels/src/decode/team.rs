//! Many short jobs one after another, as in decoding a token: a leader hands out tasks, and whoever of the pool has time takes
//! some, without being woken for each job.
//!
//! The leader never waits for a thread to come: what nobody takes it does itself. So a busy pool makes a team slower, and
//! never stops it. Neighbouring tasks are taken together, many at first and single ones in the end: threads read long pieces of
//! memory in order, seldom meet at the ticket, and end together.

use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use crate::isa::{isa, with_isa};
use crate::pool::{Shared, threads};

/// How long a thread that waits keeps its core to itself: most jobs of a token are shorter. Then it lets whoever wants the core run before
/// it looks again, as a school's computer does other things, too.
const SPIN: Duration = Duration::from_micros(50);
/// Polls between two looks at the clock.
const POLLS: u32 = 64;

/// Bits of a ticket that count tasks, twice; the others count jobs, so that no ticket of one job is one of the next.
const BITS: u32 = 20;
const MASK: u64 = (1 << BITS) - 1;

/// The tasks of a job by number, from anybody who takes one.
type Call = unsafe fn(*const (), usize);

/// Threads that do a leader's jobs. See [`lead`].
pub struct Team {
    threads: usize,
    job: Line<Job>,
    /// Tasks of the job that are done.
    done: Line<AtomicUsize>,
    failed: AtomicBool,
}

/// What threads look at until there is something to do.
struct Job {
    /// Number of the job, its tasks, and how many of them are taken.
    ticket: AtomicU64,
    /// What the job's tasks are; written while no task can be taken.
    call: AtomicPtr<()>,
    context: AtomicPtr<()>,
    /// Tasks that others wait for: the first so many.
    before: AtomicUsize,
    over: AtomicBool,
}

/// In a cache line of its own, so that writing it does not slow down those who read what lies beside it.
#[repr(align(64))]
struct Line<T>(T);

/// A wait that is under way.
#[derive(Default)]
struct Wait {
    polls: u32,
    since: Option<Instant>,
    /// It has taken longer than [`SPIN`].
    is_long: bool,
}

impl Wait {
    /// Waits a little more: first awake, then by letting others run.
    fn more(&mut self) {
        self.polls = self.polls.wrapping_add(1);
        if !self.is_long && self.polls.is_multiple_of(POLLS) {
            self.is_long = self.since.get_or_insert_with(Instant::now).elapsed() > SPIN;
        }
        if self.is_long { std::thread::yield_now() } else { std::hint::spin_loop() }
    }
}

impl Team {
    fn new() -> Self {
        let job = Job {
            ticket: AtomicU64::new(0),
            call: AtomicPtr::new(std::ptr::null_mut()),
            context: AtomicPtr::new(std::ptr::null_mut()),
            before: AtomicUsize::new(0),
            over: AtomicBool::new(false),
        };
        Self { threads: threads(), job: Line(job), done: Line(AtomicUsize::new(0)), failed: AtomicBool::new(false) }
    }

    /// Calls `f` with each number below `tasks`, started in ascending order, and returns when all have ended.
    ///
    /// # Panics
    /// When a task does, or there are more than a million.
    pub fn run<F: Fn(usize) + Sync>(&self, tasks: usize, f: F) {
        self.run_after(0, tasks, f);
    }

    /// As [`Team::run`]; the first `before` tasks are spread over all threads like a job of their own.
    fn run_after<F: Fn(usize) + Sync>(&self, before: usize, tasks: usize, f: F) {
        unsafe fn call<F: Fn(usize)>(context: *const (), task: usize) {
            // SAFETY: `run_after` passes its `f`, and returns only when no task runs.
            unsafe { (*context.cast::<F>())(task) }
        }
        if tasks == 0 {
            return;
        }
        assert!((tasks as u64) < MASK, "{tasks} tasks");
        let job = &self.job.0;
        self.done.0.store(0, Ordering::Relaxed);
        job.call.store(call::<F> as *mut (), Ordering::Relaxed);
        job.context.store((&raw const f).cast_mut().cast(), Ordering::Relaxed);
        job.before.store(before, Ordering::Relaxed);
        let number = (job.ticket.load(Ordering::Relaxed) >> (2 * BITS)) + 1;
        job.ticket.store(number << (2 * BITS) | (tasks as u64) << BITS, Ordering::Release);
        while self.tasks() {}
        let mut wait = Wait::default();
        while self.done.0.load(Ordering::Acquire) < tasks {
            wait.more();
        }
        assert!(!self.failed.load(Ordering::Relaxed), "a task of a team panicked");
    }

    /// Calls `f` with the number and the values of each part of `values`, `size` long, the last perhaps shorter.
    ///
    /// # Panics
    /// As [`Team::run`].
    pub fn parts<T: Send>(&self, values: &mut [T], size: usize, f: impl Fn(usize, &mut [T]) + Sync) {
        let len = values.len();
        let values = Shared::new(values);
        self.run(len.div_ceil(size), |task| {
            let from = task * size;
            // SAFETY: no two tasks have a part in common, and all lie in the slice, which is borrowed until all have ended.
            f(task, unsafe { values.slice(from, size.min(len - from)) });
        });
    }

    /// As [`Team::parts`] of `first`, and in the same job of `second`, each of whose parts may ask for all of `first`, and then waits
    /// until it is done.
    ///
    /// # Panics
    /// As [`Team::run`].
    pub fn parts_then<'f, A: Send + Sync, B: Send>(
        &self,
        first: (&'f mut [A], usize),
        f: impl Fn(usize, &mut [A]) + Sync,
        second: (&mut [B], usize),
        g: impl Fn(usize, &mut [B], &dyn Fn() -> &'f [A]) + Sync,
    ) {
        /// Counts a part as done, also when it panicked.
        struct Done<'a>(&'a AtomicUsize);
        impl Drop for Done<'_> {
            fn drop(&mut self) {
                self.0.fetch_add(1, Ordering::Release);
            }
        }
        let (lens, sizes) = ((first.0.len(), second.0.len()), (first.1, second.1));
        let (firsts, seconds) = (Shared::new(first.0), Shared::new(second.0));
        let (before, done) = (lens.0.div_ceil(sizes.0), AtomicUsize::new(0));
        self.run_after(before, before + lens.1.div_ceil(sizes.1), |task| match task.checked_sub(before) {
            None => {
                let _done = Done(&done);
                let from = task * sizes.0;
                // SAFETY: no two tasks have a part in common, and the whole is only read when all have ended.
                f(task, unsafe { firsts.slice(from, sizes.0.min(lens.0 - from)) });
            }
            Some(task) => {
                let from = task * sizes.1;
                // SAFETY: no two tasks have a part in common.
                let part = unsafe { seconds.slice(from, sizes.1.min(lens.1 - from)) };
                g(task, part, &|| {
                    // Tasks are taken in ascending order, and each thread does its own so: all of `first` is done or being done.
                    let mut wait = Wait::default();
                    while done.load(Ordering::Acquire) < before {
                        wait.more();
                    }
                    // SAFETY: nobody writes `first` any more.
                    unsafe { &*firsts.slice(0, lens.0) }
                });
            }
        });
    }

    /// Takes some tasks and does them; false when there is none.
    fn tasks(&self) -> bool {
        let job = &self.job.0;
        let ticket = job.ticket.load(Ordering::Acquire);
        let (tasks, next) = ((ticket >> BITS & MASK) as usize, (ticket & MASK) as usize);
        if next >= tasks {
            return false;
        }
        // These belong to the ticket: another job is only begun when all tasks of this one are done, and if that has
        // happened the exchange fails.
        let (call, context) = (job.call.load(Ordering::Relaxed), job.context.load(Ordering::Relaxed));
        let before = job.before.load(Ordering::Relaxed);
        let count = if next < before {
            (before - next).div_ceil(self.threads)
        } else {
            (3 * (tasks - next) / (4 * self.threads)).max(1)
        };
        let taken = ticket + count as u64;
        if job.ticket.compare_exchange(ticket, taken, Ordering::AcqRel, Ordering::Relaxed).is_err() {
            return true;
        }
        for task in next..next + count {
            // SAFETY: `call` was made from a `Call` by `run_after`, whose `f` lives until this task is counted as done.
            let run = std::panic::AssertUnwindSafe(|| unsafe {
                std::mem::transmute::<*mut (), Call>(call)(context, task);
            });
            if std::panic::catch_unwind(run).is_err() {
                self.failed.store(true, Ordering::Relaxed);
            }
        }
        self.done.0.fetch_add(count, Ordering::Release);
        true
    }

    fn help(&self) {
        let mut wait = Wait::default();
        while !self.job.0.over.load(Ordering::Acquire) {
            if self.tasks() {
                wait = Wait::default();
            } else {
                wait.more();
            }
        }
    }
}

/// Runs `f` as the leader of a team of all threads of the pool that have time.
///
/// They are busy waiting between jobs, so `f` should be little else than jobs, and short.
pub fn lead<R: Send>(f: impl FnOnce(&Team) -> R + Send) -> R {
    /// Lets the helpers go, also when `f` panics.
    struct Over<'a>(&'a Team);
    impl Drop for Over<'_> {
        fn drop(&mut self) {
            self.0.job.0.over.store(true, Ordering::Release);
        }
    }
    let (team, isa) = (&Team::new(), isa());
    rayon::scope(|scope| {
        for _ in 1..threads() {
            scope.spawn(move |_| with_isa(isa, || team.help()));
        }
        let _over = Over(team);
        with_isa(isa, || f(team))
    })
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicU32;

    use super::*;

    fn on<R: Send>(threads: usize, f: impl FnOnce() -> R + Send) -> R {
        rayon::ThreadPoolBuilder::new().num_threads(threads).build().expect("threads start").install(f)
    }

    #[test]
    fn every_task_of_every_job_is_done_once_before_the_next_job_begins() {
        for threads in [1, 2, 5] {
            on(threads, || {
                lead(|team| {
                    for job in 0..2000_u32 {
                        let counts: Vec<AtomicU32> = (0..job % 37).map(|_| AtomicU32::new(0)).collect();
                        team.run(counts.len(), |task| {
                            counts[task].fetch_add(1, Ordering::Relaxed);
                        });
                        assert!(counts.iter().all(|count| count.load(Ordering::Relaxed) == 1), "job {job}");
                    }
                });
            });
        }
    }

    #[test]
    fn second_parts_see_all_of_the_first() {
        for threads in [1, 2, 5] {
            on(threads, || {
                lead(|team| {
                    for n in 0..300 {
                        let (mut first, mut second) = (vec![0; n], vec![0; 97]);
                        team.parts_then(
                            (&mut first, 7),
                            |part, values| values.fill(part + 1),
                            (&mut second, 10),
                            |part, values, all| values.fill(part + all().iter().sum::<usize>()),
                        );
                        let sum: usize = (0..n).map(|i| i / 7 + 1).sum();
                        assert!(second.iter().enumerate().all(|(i, value)| *value == i / 10 + sum));
                    }
                });
            });
        }
    }

    #[test]
    fn teams_that_run_at_once_do_not_wait_for_each_other() {
        on(2, || {
            rayon::scope(|scope| {
                for _ in 0..6 {
                    scope.spawn(|_| {
                        lead(|team| (0..50).for_each(|_| team.run(9, |_| std::thread::yield_now())));
                    });
                }
            });
        });
    }

    #[test]
    fn a_task_that_panics_is_the_leaders_panic() {
        let caught = std::panic::catch_unwind(|| {
            on(2, || lead(|team| team.run(100, |task| assert!(task != 50, "the fiftieth"))));
        });
        assert!(caught.is_err());
    }
}
