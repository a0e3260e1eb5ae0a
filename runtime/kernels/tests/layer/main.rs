//! Kernels of a decoder layer against plain f64, under every instruction set that the processor has and on one, two and three
//! threads.
//!
//! Much of what they do is raw pointers, so they are to be run under AddressSanitizer too:
//!
//! ```sh
//! RUSTC_BOOTSTRAP=1 RUSTFLAGS="-Zsanitizer=address" cargo test --release -p homeroom-kernels \
//!     --target x86_64-unknown-linux-gnu --target-dir target/asan --tests
//! ```

#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
mod amx;
mod attention;
mod cross_entropy;
mod elementwise;
mod helpers;
mod integers;
mod product;

use homeroom_kernels::{Feature, Isa};

use self::helpers::{U, bits, close, is_gradient, narrow, normal, on_any_threads, on_threads, uniform, unit, wide};

/// Instruction sets, as far as this processor has them, and AMX.
fn isas() -> impl Iterator<Item = Isa> {
    #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
    amx::emulator::install();
    // Emulated, AMX is slow: all of it is enough.
    let emulated = |isa: &Isa| isa.has(Feature::AmxTile) && !Isa::detected().has(Feature::AmxTile);
    Isa::tested()
        .into_iter()
        .filter(move |isa| !emulated(isa) || isa.has(Feature::AmxBf16) && isa.has(Feature::AmxInt8))
}
