//! The `homeroom` program.

// Training frees and takes large buffers at every step; this allocator keeps its pages.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> std::process::ExitCode {
    homeroom::cli::main()
}
