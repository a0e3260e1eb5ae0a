//! The `homeroom` program.

// Training frees and takes large buffers at every step; this allocator keeps its pages.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> std::process::ExitCode {
    homeroom_engine::run::pages::on_keep(keep_pages);
    share_one_thread_pool();
    fail_where_files_may_not_grow();
    homeroom::cli::main()
}

/// Has the allocator keep the pages of what is freed, or give those and later ones back after a moment, as it does by itself.
fn keep_pages(are_kept: bool) {
    // SAFETY: as mimalloc 3 declares them in `mimalloc.h`; an option is an enumeration, which C passes as an int.
    unsafe extern "C" {
        fn mi_option_get(option: std::ffi::c_int) -> std::ffi::c_long;
        fn mi_option_set(option: std::ffi::c_int, value: std::ffi::c_long);
        fn mi_collect(force: bool);
    }
    /// `mi_option_purge_delay` of mimalloc 3: milliseconds until pages are given back.
    const PURGE_DELAY: std::ffi::c_int = 15;
    /// Twelve days. Below 0 freed pages would not even be noted as such.
    const LONG: std::ffi::c_long = 1 << 30;
    static BEFORE: std::sync::atomic::AtomicIsize = std::sync::atomic::AtomicIsize::new(0);
    let order = std::sync::atomic::Ordering::SeqCst;
    // SAFETY: these read and set a word that the allocator looks at, and have it give back what nobody uses; both may be done while
    // other threads allocate.
    unsafe {
        if are_kept {
            BEFORE.store(mi_option_get(PURGE_DELAY) as isize, order);
            mi_option_set(PURGE_DELAY, LONG);
        } else {
            mi_option_set(PURGE_DELAY, BEFORE.load(order) as std::ffi::c_long);
            mi_collect(true);
        }
    }
}

/// Has candle use the threads that our kernels use.
///
/// Left alone, candle 0.11 reads `/proc/cpuinfo` at every matrix product to count processors, and runs elementwise operations on
/// threads of its own, for which it waits by spinning: on a machine that is busy with something else, that took most of the time.
fn share_one_thread_pool() {
    let threads = std::thread::available_parallelism().map_or(1, usize::from).to_string();
    for (name, value) in [("RAYON_NUM_THREADS", threads.as_str()), ("CANDLE_NUM_THREADS", "1")] {
        if std::env::var_os(name).is_none() {
            // SAFETY: no other thread has been started yet, so none reads the environment.
            unsafe { std::env::set_var(name, value) };
        }
    }
}

/// Has a write beyond the limit of a file's size (`ulimit -f`) fail as on a full disk; left alone, its signal ends the program.
fn fail_where_files_may_not_grow() {
    #[cfg(unix)]
    // SAFETY: to ignore a signal has no preconditions, and no handler is set.
    unsafe {
        libc::signal(libc::SIGXFSZ, libc::SIG_IGN);
    }
}
