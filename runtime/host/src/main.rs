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

/// Has the allocator keep the pages of what is freed, or give them back after a moment, as it does by itself.
fn keep_pages(are_kept: bool) {
    unsafe extern "C" {
        fn mi_option_set(option: std::ffi::c_int, value: std::ffi::c_long);
    }
    /// `mi_option_purge_delay` of mimalloc 3: milliseconds until pages are given back; below 0 they never are.
    const PURGE_DELAY: std::ffi::c_int = 15;
    const DEFAULT: std::ffi::c_long = 1000;
    // SAFETY: this sets a number that the allocator reads, which may be done at any time.
    unsafe { mi_option_set(PURGE_DELAY, if are_kept { -1 } else { DEFAULT }) };
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
