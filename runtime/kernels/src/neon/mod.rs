//! AArch64's vectors of 128 bits: the instructions that kernels for it are written in, a short list.
//!
//! There they are those of `core::arch::aarch64`, and a few that have no stable intrinsic are assembled (`native`). For this crate's tests on
//! other processors, functions of the same names and types do what Arm's manual says (`emulated`), so that the same text of kernels is
//! compiled and run there; nothing else is compiled of it on these.
//! Source: Arm Architecture Reference Manual for A-profile (DDI 0487), and <https://developer.arm.com/architectures/instruction-sets/intrinsics/>.

#[cfg(not(target_arch = "aarch64"))]
mod emulated;
#[cfg(target_arch = "aarch64")]
mod native;
#[cfg(all(test, not(target_arch = "aarch64")))]
mod tests;

#[cfg(not(target_arch = "aarch64"))]
pub(crate) use self::emulated::*;
#[cfg(target_arch = "aarch64")]
pub(crate) use self::native::*;
