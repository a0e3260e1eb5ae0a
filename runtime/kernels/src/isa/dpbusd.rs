//! `vpdpbusd` in 256 bits, which has two encodings: AVX-VNNI's, and that of AVX-512 with VNNI and VL. Both compute the same. Kernels are
//! written over [`Dpbusd`], and run in the encoding that the processor has: so those of AVX-VNNI also run, and are tested, where there is
//! AVX-512 alone.

use std::arch::is_x86_feature_detected;
use std::arch::x86_64::*;

/// Products of bytes by fours.
pub(crate) trait Dpbusd {
    /// To each of eight sums adds the products of four bytes without a sign and four with one. Exact, as long as sums are below 2^31.
    ///
    /// # Safety
    /// Called from what [`run`] runs.
    unsafe fn dpbusd(sums: __m256i, unsigned: __m256i, signed: __m256i) -> __m256i;
}

/// AVX-VNNI's encoding.
struct Vex;
/// AVX-512's.
struct Evex;

impl Dpbusd for Vex {
    #[inline(always)]
    unsafe fn dpbusd(sums: __m256i, unsigned: __m256i, signed: __m256i) -> __m256i {
        // SAFETY: the caller has the instructions enabled; so below.
        unsafe { _mm256_dpbusd_avx_epi32(sums, unsigned, signed) }
    }
}

impl Dpbusd for Evex {
    #[inline(always)]
    unsafe fn dpbusd(sums: __m256i, unsigned: __m256i, signed: __m256i) -> __m256i {
        // SAFETY: as above.
        unsafe { _mm256_dpbusd_epi32(sums, unsigned, signed) }
    }
}

/// What is compiled for each encoding.
pub(crate) trait Run {
    type Out;
    /// To be `#[inline(always)]`, with loops in place of closures: these would be compiled without the instructions.
    ///
    /// # Safety
    /// Called by [`run`] alone; and what the type asks.
    unsafe fn run<D: Dpbusd>(self) -> Self::Out;
}

/// Runs a job with AVX2, FMA, F16C, BMI2 and products of bytes enabled.
///
/// # Safety
/// The processor has [`Feature::AvxVnni`](super::Feature::AvxVnni); and what the job asks.
#[inline]
pub(crate) unsafe fn run<J: Run>(job: J) -> J::Out {
    #[target_feature(enable = "avx2,fma,f16c,bmi2,avxvnni")]
    unsafe fn vex<J: Run>(job: J) -> J::Out {
        // SAFETY: passed on to the caller.
        unsafe { job.run::<Vex>() }
    }
    #[target_feature(enable = "avx2,fma,f16c,bmi2,avx512f,avx512vl,avx512vnni")]
    unsafe fn evex<J: Run>(job: J) -> J::Out {
        // SAFETY: passed on to the caller.
        unsafe { job.run::<Evex>() }
    }
    // SAFETY: where the set has the feature, the processor has one of the two.
    unsafe { if is_x86_feature_detected!("avxvnni") { vex(job) } else { evex(job) } }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Products {
        unsigned: [u8; 32],
        signed: [i8; 32],
        sums: [i32; 8],
    }

    impl Run for Products {
        type Out = [i32; 8];

        #[inline(always)]
        unsafe fn run<D: Dpbusd>(self) -> [i32; 8] {
            let Self { unsigned, signed, mut sums } = self;
            // SAFETY: each is 32 bytes, and the caller is `run`, or has what it enables.
            unsafe {
                let unsigned = _mm256_loadu_si256(unsigned.as_ptr().cast());
                let signed = _mm256_loadu_si256(signed.as_ptr().cast());
                let added = D::dpbusd(_mm256_loadu_si256(sums.as_ptr().cast()), unsigned, signed);
                _mm256_storeu_si256(sums.as_mut_ptr().cast(), added);
            }
            sums
        }
    }

    /// The widest products do not saturate, as sums of two products of sixteen bits would.
    #[test]
    fn products_of_bytes_are_exact_in_the_encoding_that_is_there() {
        if !crate::Isa::detected().has(crate::Feature::AvxVnni) {
            return;
        }
        let unsigned: [u8; 32] = std::array::from_fn(|i| if i < 8 { 255 } else { (37 * i) as u8 });
        let signed: [i8; 32] = std::array::from_fn(|i| if i < 4 { -128 } else { (91 * i) as i8 });
        let sums: [i32; 8] = std::array::from_fn(|i| 1000 * i as i32 - 1);
        let wanted: [i32; 8] = std::array::from_fn(|lane| {
            let products = (4 * lane..4 * lane + 4).map(|i| i32::from(unsigned[i]) * i32::from(signed[i]));
            sums[lane] + products.sum::<i32>()
        });
        // SAFETY: the processor has the instructions, as was asked.
        assert_eq!(unsafe { run(Products { unsigned, signed, sums }) }, wanted);
        assert_eq!(wanted[0], -4 * 255 * 128 - 1);
    }
}
