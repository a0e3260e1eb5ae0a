//! What multiplies: the instructions of a set that products of each kind are made of, and which kind is faster.
//!
//! A unit is chosen by the set alone, never by how many rows there are. Flags do not say what is fast: Intel's `vdpbf16ps` makes half of
//! what its multiply-adds of f32 do, AMD's 2.7 times. So a table by vendor and family answers that, and an unknown processor is measured,
//! once a process.

use std::hint::black_box;
use std::ops::RangeInclusive;
use std::sync::OnceLock;
use std::time::Instant;

use half::bf16;

use super::{Feature, Isa};
use crate::tile::spin;

/// What products and sums of f32 are made of; what is written with [`per_isa`](super::per_isa) is compiled for each.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum F32Unit {
    /// Multiply-adds of 512 bits.
    Avx512,
    /// Multiply-adds of 256 bits.
    Avx2,
    /// What the compiler makes of plain Rust.
    Portable,
}

/// What products of bf16 are made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bf16Unit {
    /// Tiles of pairs, `tdpbf16ps`.
    Amx,
    /// Pairs in 512 bits, `vdpbf16ps`.
    Avx512,
    /// Values are widened to f32 and multiplied as such.
    Widened,
}

/// What products of integers are made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Int8Unit {
    /// Tiles of four bytes, `tdpbssd`.
    Amx,
    /// Four bytes in 512 bits, `vpdpbusd`.
    Avx512Vnni,
    /// Four bytes in 256 bits, `vpdpbusd`.
    AvxVnni,
    /// Pairs of sixteen bits in 256 bits, `vpmaddwd`.
    Avx2,
    /// What the compiler makes of plain Rust.
    Portable,
}

/// Whether products have kernels for a unit. One that has none is not chosen.
const fn has_kernels_bf16(unit: Bf16Unit) -> bool {
    match unit {
        Bf16Unit::Amx => false,
        Bf16Unit::Avx512 | Bf16Unit::Widened => true,
    }
}

/// See [`has_kernels_bf16`].
const fn has_kernels_int8(unit: Int8Unit) -> bool {
    match unit {
        Int8Unit::Amx => false,
        Int8Unit::Avx512Vnni | Int8Unit::AvxVnni | Int8Unit::Avx2 | Int8Unit::Portable => true,
    }
}

impl Isa {
    /// What multiplies f32.
    #[inline]
    pub const fn f32_unit(self) -> F32Unit {
        if self.has(Feature::Avx512) {
            F32Unit::Avx512
        } else if self.has(Feature::Avx2) {
            F32Unit::Avx2
        } else {
            F32Unit::Portable
        }
    }

    /// What multiplies bf16.
    #[inline]
    pub const fn bf16_unit(self) -> Bf16Unit {
        if has_kernels_bf16(Bf16Unit::Amx) && self.has(Feature::AmxBf16) {
            Bf16Unit::Amx
        } else if self.has(Feature::Avx512Bf16) {
            Bf16Unit::Avx512
        } else {
            Bf16Unit::Widened
        }
    }

    /// What multiplies integers.
    #[inline]
    pub const fn int8_unit(self) -> Int8Unit {
        if has_kernels_int8(Int8Unit::Amx) && self.has(Feature::AmxInt8) {
            Int8Unit::Amx
        } else if self.has(Feature::Avx512Vnni) {
            Int8Unit::Avx512Vnni
        } else if self.has(Feature::AvxVnni) {
            Int8Unit::AvxVnni
        } else if self.has(Feature::Avx2) {
            Int8Unit::Avx2
        } else {
            Int8Unit::Portable
        }
    }

    /// Returns true where there are products of bf16 pairs.
    pub const fn has_bf16(self) -> bool {
        !matches!(self.bf16_unit(), Bf16Unit::Widened)
    }

    /// Returns true where products of bf16 are faster than those of f32, which having them does not mean.
    pub fn prefers_bf16(self) -> bool {
        self.has_bf16() && bf16_is_faster(self.bf16_unit(), processor(), measured)
    }

    /// Whether products of four pairs of bytes are made in 512 bits.
    #[inline]
    pub(crate) const fn has_vnni(self) -> bool {
        matches!(self.int8_unit(), Int8Unit::Avx512Vnni)
    }

    /// Returns true where four products of bytes and their sum are one instruction, so that products in integers are much faster than those
    /// of f32.
    #[inline]
    pub const fn multiplies_bytes(self) -> bool {
        matches!(self.int8_unit(), Int8Unit::Avx512Vnni | Int8Unit::AvxVnni)
    }

    /// What multiplies each kind of values, in words: `f32 by avx512, bf16 by avx512bf16 (faster), int8 by avx512vnni`.
    pub fn units(self) -> String {
        let of_f32 = match self.f32_unit() {
            F32Unit::Avx512 => "avx512",
            F32Unit::Avx2 => "avx2",
            F32Unit::Portable => "portable code",
        };
        let of_bf16 = match (self.bf16_unit(), self.prefers_bf16()) {
            (Bf16Unit::Amx, true) => "by amx (faster)",
            (Bf16Unit::Amx, false) => "by amx (slower)",
            (Bf16Unit::Avx512, true) => "by avx512bf16 (faster)",
            (Bf16Unit::Avx512, false) => "by avx512bf16 (slower)",
            (Bf16Unit::Widened, _) => "as f32",
        };
        let of_int8 = match self.int8_unit() {
            Int8Unit::Amx => "amx",
            Int8Unit::Avx512Vnni => "avx512vnni",
            Int8Unit::AvxVnni => "avxvnni",
            Int8Unit::Avx2 => "avx2",
            Int8Unit::Portable => "portable code",
        };
        format!("f32 by {of_f32}, bf16 {of_bf16}, int8 by {of_int8}")
    }
}

/// How fast products of bf16 are on a family of processors by each unit, on registers alone, as multiples of its fastest multiply-adds of f32.
#[derive(Debug)]
struct Family {
    vendor: &'static [u8; 12],
    families: RangeInclusive<u32>,
    bf16: &'static [(Bf16Unit, f64)],
}

/// Families that were measured, one core each: Emerald Rapids makes 165 GFLOP/s of f32, 80 by `vdpbf16ps`, 1,250 and more by `tdpbf16ps`;
/// Zen 4 170 and 460. Zen 5 was not, and is taken to be like Zen 4.
///
/// Of f32 and of bytes nothing stands here: on both, the widest unit is the fastest (bytes: 630 GOP/s by `vpdpbusd` and 4,000 and more by
/// `tdpbssd` on Emerald Rapids, 900 by `vpdpbusd` on Zen 4), as the order in which units are chosen has it.
const KNOWN: [Family; 2] = [
    Family { vendor: b"GenuineIntel", families: 6..=6, bf16: &[(Bf16Unit::Amx, 7.5), (Bf16Unit::Avx512, 0.5)] },
    Family { vendor: b"AuthenticAMD", families: 0x19..=0x1A, bf16: &[(Bf16Unit::Avx512, 2.7)] },
];

/// What must be so many times as fast as the usual way to be taken in its place, where it was measured: a machine has neighbours.
const BEATEN_BY: f64 = 1.3;

/// Whether bf16 by this unit is faster than f32: by the table, or else unless f32 wins a measurement, which yields the speed of bf16 as a
/// multiple of f32's.
fn bf16_is_faster(unit: Bf16Unit, (vendor, family): ([u8; 12], u32), measured: impl FnOnce(Bf16Unit) -> f64) -> bool {
    let known = KNOWN.iter().find(|known| *known.vendor == vendor && known.families.contains(&family));
    match known.and_then(|known| known.bf16.iter().find(|(of, _)| *of == unit)) {
        Some((_, times)) => *times > 1.0,
        None => 1.0 < BEATEN_BY * measured(unit),
    }
}

/// The speed of bf16 by this unit as a multiple of f32's: register loops by turns, the best of each, some 10 ms, once a process.
fn measured(unit: Bf16Unit) -> f64 {
    static TIMES: OnceLock<f64> = OnceLock::new();
    match unit {
        // There is no register loop of tiles; the processor has them to be fast.
        Bf16Unit::Amx => f64::INFINITY,
        Bf16Unit::Widened => 1.0,
        Bf16Unit::Avx512 => *TIMES.get_or_init(|| {
            const STEPS: usize = 1 << 16;
            let isa = Isa::detected().and(Isa::AVX512BF16);
            let timed = |run: &dyn Fn() -> (f32, f64)| {
                let start = Instant::now();
                let (sum, operations) = black_box(run());
                black_box(sum);
                operations / start.elapsed().as_secs_f64()
            };
            let (mut wide, mut narrow) = (0f64, 0f64);
            for _ in 0..7 {
                wide = wide.max(timed(&|| spin::<f32>(isa, STEPS)));
                narrow = narrow.max(timed(&|| spin::<bf16>(isa, STEPS)));
            }
            narrow / wide
        }),
    }
}

/// The processor's vendor as CPUID spells it, and its family; nothing where there is no CPUID.
fn processor() -> ([u8; 12], u32) {
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::x86_64::__cpuid;
        let leaf = __cpuid(0);
        let mut vendor = [0; 12];
        for (bytes, register) in vendor.chunks_exact_mut(4).zip([leaf.ebx, leaf.edx, leaf.ecx]) {
            bytes.copy_from_slice(&register.to_le_bytes());
        }
        (vendor, family(__cpuid(1).eax))
    }
    #[cfg(not(target_arch = "x86_64"))]
    ([0; 12], 0)
}

/// The family in EAX of CPUID's leaf 1: bits 8 to 11, and where these are full, bits 20 to 27 more.
#[cfg(any(test, target_arch = "x86_64"))]
const fn family(eax: u32) -> u32 {
    match eax >> 8 & 0xF {
        0xF => 0xF + (eax >> 20 & 0xFF),
        family => family,
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::all;
    use super::*;

    #[test]
    fn bf16_is_preferred_where_it_is_faster_not_wherever_it_is() {
        let check = |vendor: &[u8; 12], family: u32, unit: Bf16Unit, wanted: bool| {
            let unmeasured = |_| -> f64 { panic!("{vendor:?} is known") };
            assert_eq!(bf16_is_faster(unit, (*vendor, family), unmeasured), wanted, "{vendor:?} {family} {unit:?}");
        };
        check(b"GenuineIntel", 6, Bf16Unit::Avx512, false);
        check(b"GenuineIntel", 6, Bf16Unit::Amx, true);
        check(b"AuthenticAMD", 25, Bf16Unit::Avx512, true);
        check(b"AuthenticAMD", 26, Bf16Unit::Avx512, true);
        for isa in all() {
            assert!(isa.has_bf16() || !isa.prefers_bf16(), "{isa:?}");
        }
    }

    #[test]
    fn an_unknown_processor_keeps_to_the_usual_order_unless_another_way_is_faster_by_far() {
        for (vendor, family) in [(b"GenuineIntel", 19), (b"AuthenticAMD", 27), (b"HygonGenuine", 24), (&[0; 12], 0)] {
            for (times, wanted) in [(2.7, true), (1.0, true), (0.78, true), (0.76, false), (0.5, false)] {
                let mut asked = 0;
                let faster = bf16_is_faster(Bf16Unit::Avx512, (*vendor, family), |_| {
                    asked += 1;
                    times
                });
                assert_eq!((faster, asked), (wanted, 1), "{vendor:?} {family}: {times}");
            }
        }
    }

    /// Units are chosen in the order of their speeds: a family for which that is another has to be asked for where they are chosen.
    #[test]
    fn no_family_that_is_known_has_units_in_another_order() {
        for known in &KNOWN {
            let bf16: Vec<_> = known.bf16.iter().map(|(unit, _)| *unit as usize).collect();
            assert!(bf16.is_sorted() && known.bf16.is_sorted_by(|a, b| a.1 > b.1), "{known:?}");
        }
    }

    #[test]
    fn a_unit_without_kernels_is_not_chosen() {
        for isa in all() {
            assert!(has_kernels_bf16(isa.bf16_unit()) && has_kernels_int8(isa.int8_unit()), "{isa:?}");
        }
    }

    #[test]
    fn the_levels_are_multiplied_with_what_they_are_named_for() {
        let check = |isa: Isa, of_f32: F32Unit, of_bf16: Bf16Unit, of_int8: Int8Unit| {
            assert_eq!((isa.f32_unit(), isa.bf16_unit(), isa.int8_unit()), (of_f32, of_bf16, of_int8), "{isa:?}");
        };
        check(Isa::PORTABLE, F32Unit::Portable, Bf16Unit::Widened, Int8Unit::Portable);
        check(Isa::NEON, F32Unit::Portable, Bf16Unit::Widened, Int8Unit::Portable);
        check(Isa::AVX2, F32Unit::Avx2, Bf16Unit::Widened, Int8Unit::Avx2);
        check(Isa::AVXVNNI, F32Unit::Avx2, Bf16Unit::Widened, Int8Unit::AvxVnni);
        check(Isa::AVX512, F32Unit::Avx512, Bf16Unit::Widened, Int8Unit::Avx512Vnni);
        check(Isa::AVX512.without(Feature::Avx512Vnni), F32Unit::Avx512, Bf16Unit::Widened, Int8Unit::AvxVnni);
        check(Isa::AVX512.without(Feature::AvxVnni), F32Unit::Avx512, Bf16Unit::Widened, Int8Unit::Avx2);
        check(Isa::AVX512BF16, F32Unit::Avx512, Bf16Unit::Avx512, Int8Unit::Avx512Vnni);
    }

    #[test]
    fn the_measurement_tells_a_fast_unit_from_a_slow_one() {
        if !Isa::detected().has(Feature::Avx512Bf16) {
            return;
        }
        let times = measured(Bf16Unit::Avx512);
        let known = KNOWN
            .iter()
            .find(|known| (*known.vendor, true) == (processor().0, known.families.contains(&processor().1)));
        if let Some((_, wanted)) = known.and_then(|known| known.bf16.iter().find(|(unit, _)| *unit == Bf16Unit::Avx512))
        {
            assert!((times > BEATEN_BY.recip()) == (*wanted > 1.0), "{times} for {wanted}");
        }
    }

    #[test]
    fn a_family_is_read_as_the_manuals_say() {
        assert_eq!(family(0x00A1_0F11), 0x19);
        assert_eq!(family(0x00B4_0F40), 0x1A);
        assert_eq!(family(0x000C_06F2), 6);
    }

    /// Linux reads both on its own.
    #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
    #[test]
    fn the_vendor_and_the_family_are_those_of_the_system() {
        let said = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let named = |name: &str| said.lines().find_map(|line| line.strip_prefix(name)?.split(": ").nth(1));
        let (vendor, family) = processor();
        assert_eq!(named("vendor_id").map(str::as_bytes), Some(&vendor[..]));
        assert_eq!(named("cpu family"), Some(&family.to_string()[..]));
    }
}
