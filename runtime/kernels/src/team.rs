//! Many short jobs one after another, as in decoding a token or in a layer of a training: a leader hands out tasks, and whoever of the pool
//! has time takes some, without being woken for each job.
//!
//! The leader never waits for a thread to come: what nobody takes it does itself. So a busy pool makes a team slower, and
//! never stops it. In decoding, neighbouring tasks are taken together, many at first and single ones in the end: threads read long pieces of
//! memory in order, seldom meet at the ticket, and end together. Longer tasks are taken one by one, by each thread first from a share of
//! its own: what it wrote in one job, rows or columns, it mostly finds in its own cache in the next.

use std::any::Any;
use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::ptr;
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::{Duration, Instant};

use rayon::{Yield, current_num_threads as threads};

use crate::isa::{Isa, isa, with_isa};
use crate::shared::Shared;

/// How long a thread that waits keeps its core to itself: most jobs of a token are shorter. Then it lets whoever wants the core run before
/// it looks again, as a school's computer does other things, too.
const SPIN: Duration = Duration::from_micros(50);
/// How long it looks again and again. Then it sleeps for moments, or leaves an open team.
const AWAKE: Duration = Duration::from_millis(1);
const NAP: Duration = Duration::from_micros(50);
/// Polls between two looks at the clock.
const POLLS: u32 = 64;

/// Bits of a ticket for a task's number, twice; the others count jobs, so that no ticket of one job is one of the next.
const BITS: u32 = 20;
const MASK: u64 = (1 << BITS) - 1;
/// The most tasks of a job.
pub(crate) const MOST: usize = MASK as usize - 1;

/// The tasks of a job by number, from anybody who takes one.
type Call = unsafe fn(*const (), usize);

/// Threads that do a leader's jobs. See [`lead`].
pub struct Team {
    threads: usize,
    job: Line<Job>,
    /// Tasks of the job that are done.
    done: Line<AtomicUsize>,
    /// What the first task that panicked did so with.
    panicked: Mutex<Option<Box<dyn Any + Send>>>,
    failed: AtomicBool,
    /// Whether its threads do other work of the pool, too, while there is none of the leader's, and leave when there is none for long.
    is_open: bool,
    /// What its threads may use.
    isa: Isa,
    /// Threads that help now.
    present: AtomicUsize,
    /// Threads were asked to help, and none has left since.
    asked: AtomicBool,
    /// This team, for those that are asked.
    me: Weak<Team>,
}

/// What threads look at until there is something to do.
struct Job {
    /// For each thread a share of the job's tasks: number of the job, end of the share, and its next task. All tasks may be in the first.
    tickets: Box<[Line<AtomicU64>]>,
    /// Number of the job whose tickets are all written, twice, and one more where it is dealt in shares.
    number: Line<AtomicU64>,
    /// What the job's tasks are; written while no task can be taken.
    call: AtomicPtr<()>,
    context: AtomicPtr<()>,
    /// Tasks that others wait for: the first so many.
    before: AtomicUsize,
    /// Whether its tasks are taken one by one.
    singly: AtomicBool,
    over: AtomicBool,
}

/// What a thread does, for those that it asks to compute.
#[derive(Clone, Copy)]
pub(crate) enum Here<'a> {
    /// Nothing of a team's.
    Apart,
    /// It leads a team.
    Leads(&'a Team),
    /// A task.
    InTask,
}

#[derive(Clone, Copy)]
enum Place {
    Apart,
    Leads(*const Team),
    InTask,
}

thread_local! {
    static PLACE: Cell<Place> = const { Cell::new(Place::Apart) };
    /// The team that this thread helps, and how many it helps by turns: the last of them on top of what it began before.
    static HELPS: Cell<(*const Team, usize)> = const { Cell::new((ptr::null(), 0)) };
}

/// Teams that a thread helps by turns.
const HELPED_MOST: usize = 4;

/// Another place until it is dropped.
struct Within(Place);

impl Within {
    fn new(place: Place) -> Self {
        Self(PLACE.replace(place))
    }
}

impl Drop for Within {
    fn drop(&mut self) {
        PLACE.set(self.0);
    }
}

/// What this thread does.
pub(crate) fn here<'a>() -> Here<'a> {
    match PLACE.get() {
        Place::Apart => Here::Apart,
        // SAFETY: `in_team` sets it while its team lives, and this thread is within what it calls as long as it is set. The team is
        // used by whom this thread calls, which returns before.
        Place::Leads(team) => Here::Leads(unsafe { &*team }),
        Place::InTask => Here::InTask,
    }
}

/// In a cache line of its own, so that writing it does not slow down those who read what lies beside it.
#[repr(align(64))]
struct Line<T>(T);

/// A wait that is under way.
#[derive(Default)]
struct Wait {
    polls: u32,
    since: Option<Instant>,
    /// How long it has taken when the clock was last looked at.
    taken: Duration,
}

impl Wait {
    /// Waits a little more: first awake, then by letting others run.
    fn more(&mut self) {
        self.polls = self.polls.wrapping_add(1);
        if self.taken > SPIN {
            self.taken = self.since.get_or_insert_with(Instant::now).elapsed();
            std::thread::yield_now();
        } else if self.polls.is_multiple_of(POLLS) {
            self.taken = self.since.get_or_insert_with(Instant::now).elapsed();
        } else {
            std::hint::spin_loop();
        }
    }

    /// Waits for a job, which may be far.
    fn for_job(&mut self) {
        if self.taken > AWAKE { std::thread::sleep(NAP) } else { self.more() }
    }
}

impl Team {
    fn new(isa: Isa, is_open: bool) -> Arc<Self> {
        let job = Job {
            tickets: (0..threads()).map(|_| Line(AtomicU64::new(0))).collect(),
            number: Line(AtomicU64::new(0)),
            call: AtomicPtr::new(std::ptr::null_mut()),
            context: AtomicPtr::new(std::ptr::null_mut()),
            before: AtomicUsize::new(0),
            singly: AtomicBool::new(false),
            over: AtomicBool::new(false),
        };
        Arc::new_cyclic(|me| Self {
            threads: threads(),
            job: Line(job),
            done: Line(AtomicUsize::new(0)),
            panicked: Mutex::new(None),
            failed: AtomicBool::new(false),
            is_open,
            isa,
            present: AtomicUsize::new(0),
            asked: AtomicBool::new(false),
            me: me.clone(),
        })
    }

    /// Asks each thread of the pool to help. None is waited for: who comes late finds that all is over.
    fn ask(&self) {
        self.asked.store(true, Ordering::Relaxed);
        if let Some(team) = self.me.upgrade() {
            rayon::spawn_broadcast(move |_| with_isa(team.isa, || team.help()));
        }
    }

    /// Calls `f` with each number below `tasks`, started in ascending order, and returns when all have ended.
    ///
    /// # Panics
    /// When a task does, or there are more than a million.
    pub fn run<F: Fn(usize) + Sync>(&self, tasks: usize, f: F) {
        self.run_after(0, tasks, false, f);
    }

    /// As [`Team::run`], in no particular order. Tasks are taken one by one, since each is long, and each thread takes from the same part of
    /// them in every job, as long as there are any.
    ///
    /// # Panics
    /// As [`Team::run`].
    pub(crate) fn run_singly<F: Fn(usize) + Sync>(&self, tasks: usize, f: F) {
        if !self.asked.load(Ordering::Relaxed) && self.present.load(Ordering::Relaxed) + 1 < self.threads {
            self.ask();
        }
        self.run_after(0, tasks, true, f);
    }

    /// As [`Team::run`]; the first `before` tasks are spread over all threads like a job of their own.
    fn run_after<F: Fn(usize) + Sync>(&self, before: usize, tasks: usize, singly: bool, f: F) {
        unsafe fn call<F: Fn(usize)>(context: *const (), task: usize) {
            // SAFETY: `run_after` passes its `f`, and returns only when no task runs.
            unsafe { (*context.cast::<F>())(task) }
        }
        if tasks == 0 {
            return;
        }
        assert!(tasks <= MOST, "{tasks} tasks");
        let job = &self.job.0;
        self.done.0.store(0, Ordering::Relaxed);
        job.call.store(call::<F> as *mut (), Ordering::Relaxed);
        job.context.store((&raw const f).cast_mut().cast(), Ordering::Relaxed);
        job.before.store(before, Ordering::Relaxed);
        job.singly.store(singly, Ordering::Relaxed);
        let number = (job.number.0.load(Ordering::Relaxed) >> 1) + 1;
        let shares = if singly { self.threads } else { 1 };
        for (share, ticket) in job.tickets[..shares].iter().enumerate() {
            let [from, end] = [share, share + 1].map(|share| (share * tasks / shares) as u64);
            ticket.0.store(number << (2 * BITS) | end << BITS | from, Ordering::Release);
        }
        let known = number << 1 | u64::from(singly);
        job.number.0.store(known, Ordering::Release);
        let home = self.home();
        while self.tasks(home, known) {}
        let mut wait = Wait::default();
        while self.done.0.load(Ordering::Acquire) < tasks {
            wait.more();
        }
        if self.failed.load(Ordering::Relaxed) {
            self.failed.store(false, Ordering::Relaxed);
            let panicked = self.panicked.lock().unwrap_or_else(PoisonError::into_inner).take();
            resume_unwind(panicked.unwrap_or_else(|| Box::new("a task panicked")));
        }
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
        self.run_after(before, before + lens.1.div_ceil(sizes.1), false, |task| match task.checked_sub(before) {
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

    /// The share that this thread begins with.
    fn home(&self) -> usize {
        rayon::current_thread_index().unwrap_or(0) % self.threads
    }

    /// Takes some tasks of the job that `known` tells of and does them, of the share `home` while it has any, then of those behind it; false
    /// when there is none.
    fn tasks(&self, home: usize, known: u64) -> bool {
        let (number, in_shares) = (known >> 1, known & 1 == 1);
        match in_shares {
            true => (home..self.threads).chain(0..home).any(|share| self.tasks_of(share, number)),
            false => self.tasks_of(0, number),
        }
    }

    /// As [`Team::tasks`], of the present job; of the one `seen` there is none.
    fn tasks_unseen(&self, home: usize, seen: &mut u64) -> bool {
        let known = self.job.0.number.0.load(Ordering::Acquire);
        let found = known != *seen && self.tasks(home, known);
        if !found {
            *seen = known;
        }
        found
    }

    /// See [`Team::tasks`].
    fn tasks_of(&self, share: usize, number: u64) -> bool {
        let job = &self.job.0;
        let place = &job.tickets[share].0;
        let ticket = place.load(Ordering::Acquire);
        let (end, next) = ((ticket >> BITS & MASK) as usize, (ticket & MASK) as usize);
        if next >= end || ticket >> (2 * BITS) != number & (u64::MAX >> (2 * BITS)) {
            return false;
        }
        // These belong to the ticket: another job is only begun when all tasks of this one are done, and if that has
        // happened the exchange fails.
        let (call, context) = (job.call.load(Ordering::Relaxed), job.context.load(Ordering::Relaxed));
        let before = job.before.load(Ordering::Relaxed);
        let count = if job.singly.load(Ordering::Relaxed) {
            1
        } else if next < before {
            (before - next).div_ceil(self.threads)
        } else {
            (3 * (end - next) / (4 * self.threads)).max(1)
        };
        let taken = ticket + count as u64;
        if place.compare_exchange(ticket, taken, Ordering::AcqRel, Ordering::Relaxed).is_err() {
            return true;
        }
        let within = Within::new(Place::InTask);
        for task in next..next + count {
            // SAFETY: `call` was made from a `Call` by `run_after`, whose `f` lives until this task is counted as done.
            let run = AssertUnwindSafe(|| unsafe {
                std::mem::transmute::<*mut (), Call>(call)(context, task);
            });
            if let Err(with) = catch_unwind(run) {
                self.panicked.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(with);
                self.failed.store(true, Ordering::Relaxed);
            }
        }
        drop(within);
        self.done.0.fetch_add(count, Ordering::Release);
        true
    }

    /// Does tasks until the leader is done, or has had none for long.
    ///
    /// A thread that waits for something of its own may be asked, and what the leader waits for may lie below this call. So it leaves an open
    /// team, whose leader may wait for other work, when there is nothing to do.
    fn help(&self) {
        /// Counts a helper, and puts back what it did before.
        struct Present<'a>(&'a Team, (*const Team, usize));
        impl Drop for Present<'_> {
            fn drop(&mut self) {
                HELPS.set(self.1);
                self.0.present.fetch_sub(1, Ordering::Relaxed);
                self.0.asked.store(false, Ordering::Relaxed);
            }
        }
        let before = HELPS.get();
        let is_here = ptr::eq(before.0, self) || matches!(PLACE.get(), Place::Leads(team) if ptr::eq(team, self));
        if is_here {
            return;
        }
        if !matches!(PLACE.get(), Place::Apart) || before.1 == HELPED_MOST {
            // It may be asked again.
            self.asked.store(false, Ordering::Relaxed);
            return;
        }
        self.present.fetch_add(1, Ordering::Relaxed);
        let _present = Present(self, HELPS.replace((self, before.1 + 1)));
        let home = self.home();
        let (mut wait, mut seen) = (Wait::default(), 0);
        while !self.job.0.over.load(Ordering::Acquire) {
            if self.tasks_unseen(home, &mut seen) || self.is_open && matches!(rayon::yield_now(), Some(Yield::Executed))
            {
                wait = Wait::default();
            } else if self.is_open && wait.taken > AWAKE {
                return;
            } else {
                wait.for_job();
            }
        }
    }
}

/// Runs `f` as the leader of a team of all threads of the pool that have time.
///
/// They are busy waiting between jobs, so `f` should be little else than jobs, and short.
pub fn lead<R: Send>(f: impl FnOnce(&Team) -> R + Send) -> R {
    in_team(isa(), false, f)
}

/// Runs `f` as the leader of a team that does what `f` starts by [`for_each`](crate::pool::for_each), and what else the pool is asked
/// to do meanwhile.
pub(crate) fn lead_pool<R: Send>(isa: Isa, f: impl FnOnce() -> R + Send) -> R {
    in_team(isa, true, |_| f())
}

fn in_team<R: Send>(isa: Isa, is_open: bool, f: impl FnOnce(&Team) -> R + Send) -> R {
    /// Lets the helpers go, also when `f` panics.
    struct Over<'a>(&'a Team);
    impl Drop for Over<'_> {
        fn drop(&mut self) {
            self.0.job.0.over.store(true, Ordering::Release);
        }
    }
    rayon::scope(|_| {
        let team = Team::new(isa, is_open);
        team.ask();
        let _over = Over(&team);
        let _within = Within::new(Place::Leads(&*team));
        with_isa(isa, || f(&team))
    })
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicU32;

    use rayon::prelude::*;

    use super::*;
    use crate::pool::{for_each, on_pool};

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
    fn a_task_that_panics_is_the_leaders_panic_with_its_words() {
        let led = || lead(|team| team.run(100, |task| assert!(task != 50, "the fiftieth")));
        let started = || on_pool(|| for_each(100, |task| assert!(task != 50, "the fiftieth")));
        for run in [&led as &(dyn Fn() + Sync), &started] {
            let caught = catch_unwind(AssertUnwindSafe(|| on(2, run))).expect_err("a panic");
            assert_eq!(caught.downcast_ref::<&str>(), Some(&"the fiftieth"));
        }
    }

    #[test]
    fn work_on_the_pool_is_shared_however_it_is_started() {
        for threads in [1, 2, 3, 5] {
            on(threads, || {
                on_pool(|| {
                    let sum = AtomicUsize::new(0);
                    let add = |value| {
                        sum.fetch_add(value, Ordering::Relaxed);
                    };
                    for _ in 0..50 {
                        for_each(7, |task| {
                            // A task's own tasks, and its own call of the pool.
                            for_each(3, |inner| add(task * inner));
                            on_pool(|| for_each(2, add));
                        });
                        let all: usize = (0..1000_usize).into_par_iter().sum();
                        assert_eq!(all, 499_500);
                        rayon::broadcast(|_| sum.fetch_add(0, Ordering::Relaxed));
                    }
                    assert_eq!(sum.into_inner(), 50 * (21 * 3 + 7));
                });
            });
        }
    }

    #[test]
    fn passes_and_tokens_that_run_at_once_all_end() {
        on(3, || {
            rayon::scope(|scope| {
                for number in 0..12 {
                    scope.spawn(move |_| match number % 3 {
                        0 => lead(|team| (0..50).for_each(|_| team.run(9, |_| std::thread::yield_now()))),
                        1 => on_pool(|| (0..50).for_each(|_| for_each(9, |_| std::thread::yield_now()))),
                        _ => (0..50).for_each(|_| for_each(9, |_| std::thread::yield_now())),
                    });
                }
            });
        });
    }

    /// What the leader waits for lies below the call for help, again and again.
    #[test]
    fn a_thread_that_is_asked_within_the_leaders_own_work_does_it_first() {
        for threads in [2, 3, 5] {
            on(threads, || {
                for _ in 0..300 {
                    on_pool(|| {
                        let all: usize = (0..64_usize)
                            .into_par_iter()
                            .with_max_len(1)
                            .map(|i| (0..i).into_par_iter().sum::<usize>())
                            .sum();
                        assert_eq!(all, 41_664);
                        for_each(5, |_| ());
                    });
                }
            });
        }
    }

    #[test]
    fn a_thread_that_left_is_asked_again() {
        on(2, || {
            on_pool(|| {
                for _ in 0..3 {
                    std::thread::sleep(20 * AWAKE);
                    let (there, begun) = (AtomicUsize::new(0), Instant::now());
                    while there.swap(0, Ordering::Relaxed) < 2 {
                        assert!(begun.elapsed() < Duration::from_secs(60), "nobody came");
                        for_each(2, |_| {
                            there.fetch_add(1, Ordering::Relaxed);
                            let begun = Instant::now();
                            while there.load(Ordering::Relaxed) < 2 && begun.elapsed() < Duration::from_millis(5) {
                                std::thread::yield_now();
                            }
                            if there.load(Ordering::Relaxed) < 2 {
                                there.store(0, Ordering::Relaxed);
                            }
                        });
                    }
                }
            });
        });
    }

    /// The first tasks wait until each thread has one, or for a moment where a thread does not come.
    #[test]
    fn a_thread_begins_with_its_own_share_of_long_tasks() {
        for threads in [2, 3, 5] {
            let tasks = 7 * threads;
            on(threads, || {
                on_pool(|| {
                    let (mut met, begun) = (0, Instant::now());
                    while met < 20 {
                        assert!(begun.elapsed() < Duration::from_secs(60), "{threads} threads met {met} times");
                        let firsts: Vec<AtomicUsize> = (0..threads).map(|_| AtomicUsize::new(usize::MAX)).collect();
                        let is_set = |first: &AtomicUsize| first.load(Ordering::Relaxed) < tasks;
                        for_each(tasks, |task| {
                            let mine = &firsts[rayon::current_thread_index().expect("a thread of the pool")];
                            let _ = mine.compare_exchange(usize::MAX, task, Ordering::Relaxed, Ordering::Relaxed);
                            let begun = Instant::now();
                            while !firsts.iter().all(is_set) && begun.elapsed() < Duration::from_millis(5) {
                                std::thread::yield_now();
                            }
                        });
                        if !firsts.iter().all(is_set) {
                            continue;
                        }
                        met += 1;
                        for (thread, first) in firsts.iter().enumerate() {
                            assert_eq!(first.load(Ordering::Relaxed) / 7, thread, "{firsts:?}");
                        }
                    }
                });
            });
        }
    }

    /// Each thread must come, or the tasks never meet.
    #[test]
    fn every_thread_of_the_pool_comes() {
        for threads in [2, 3, 5] {
            on(threads, || {
                on_pool(|| {
                    let (there, begun) = (AtomicUsize::new(0), Instant::now());
                    for_each(threads, |_| {
                        there.fetch_add(1, Ordering::Relaxed);
                        while there.load(Ordering::Relaxed) < threads {
                            assert!(begun.elapsed() < Duration::from_secs(60), "{there:?} of {threads} threads came");
                            std::thread::yield_now();
                        }
                    });
                });
            });
        }
    }
}
