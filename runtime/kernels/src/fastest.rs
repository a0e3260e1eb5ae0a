//! Which kind of product is faster. Flags do not say it: Intel's `vdpbf16ps` makes half of what its multiply-adds of f32 do, AMD's 2.7 times.
//! So a table by vendor and family answers that, and an unknown processor is measured, once a process.

use std::hint::black_box;
use std::ops::RangeInclusive;
use std::sync::OnceLock;
use std::time::Instant;

use half::bf16;

use crate::isa::{Bf16Unit, F32Unit, Int8Unit, Isa};
use crate::tile::spin;

impl Isa {
    /// Returns true where products of bf16 are faster than those of f32, which having them does not mean.
    pub fn prefers_bf16(self) -> bool {
        self.has_bf16() && bf16_is_faster(self.bf16_unit(), processor(), measured)
    }

    /// Returns true where products in integers are faster than those of bf16 and f32. By tiles they are not: scales of groups are put on
    /// sums outside of them, which takes longer than the products (on Granite Rapids 950 GFLOP/s in integers, 1,700 in bf16).
    pub fn prefers_integers(self) -> bool {
        !(self.bf16_unit() == Bf16Unit::Amx && self.prefers_bf16())
    }

    /// What multiplies each kind of values, in words: `f32 by avx512, bf16 by avx512bf16 (faster), int8 by avx512vnni`.
    pub fn units(self) -> String {
        let of_f32 = match self.f32_unit() {
            F32Unit::Avx512 => "avx512",
            F32Unit::Avx2 => "avx2",
            F32Unit::Neon => "neon",
            F32Unit::Portable => "portable code",
        };
        let of_bf16 = match (self.bf16_unit(), self.prefers_bf16()) {
            (Bf16Unit::Amx, true) => "by amx (faster)",
            (Bf16Unit::Amx, false) => "by amx (slower)",
            (Bf16Unit::Avx512, true) => "by avx512bf16 (faster)",
            (Bf16Unit::Avx512, false) => "by avx512bf16 (slower)",
            (Bf16Unit::Bfmmla, true) => "by bfmmla (faster)",
            (Bf16Unit::Bfmmla, false) => "by bfmmla (slower)",
            (Bf16Unit::Widened, _) => "as f32",
        };
        let of_int8 = match self.int8_unit() {
            Int8Unit::Amx => "amx",
            Int8Unit::Avx512Vnni => "avx512vnni",
            Int8Unit::AvxVnni => "avxvnni",
            Int8Unit::Avx2 => "avx2",
            Int8Unit::Smmla => "smmla",
            Int8Unit::Sdot => "sdot",
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
    /// See [`reads_past_caches`].
    past_caches: bool,
}

/// Families that are known, of measurements on one core: Emerald Rapids makes 165 GFLOP/s of f32, 80 by `vdpbf16ps`, 1,250 and more by `tdpbf16ps`;
/// Zen 4 170 and 460. Zen 5 was not measured, and is taken to be like Zen 4.
///
/// Of f32 and of bytes nothing stands here: on both, the widest unit is the fastest (bytes: 630 GOP/s by `vpdpbusd` and 4,000 and more by
/// `tdpbssd` on Emerald Rapids, 900 by `vpdpbusd` on Zen 4), as the order in which units are chosen has it.
const KNOWN: [Family; 2] = [
    Family {
        vendor: b"GenuineIntel",
        families: 6..=6,
        bf16: &[(Bf16Unit::Amx, 7.5), (Bf16Unit::Avx512, 0.5)],
        past_caches: false,
    },
    Family { vendor: b"AuthenticAMD", families: 0x19..=0x1A, bf16: &[(Bf16Unit::Avx512, 2.7)], past_caches: true },
];

fn known(vendor: [u8; 12], family: u32) -> Option<&'static Family> {
    KNOWN.iter().find(|known| *known.vendor == vendor && known.families.contains(&family))
}

/// Returns true where memory that is read once comes no slower when it is asked for past the second cache (`prefetchnta`). On Granite Rapids
/// it comes at half of the speed: 12 in place of 28 GB/s of weights in decoding, of 29 that reading alone reaches. Of a processor that is
/// not known it is not said.
#[cfg(target_arch = "x86_64")]
pub(crate) fn reads_past_caches() -> bool {
    static ANSWER: OnceLock<bool> = OnceLock::new();
    *ANSWER.get_or_init(|| {
        let (vendor, family) = processor();
        known(vendor, family).is_some_and(|known| known.past_caches)
    })
}

/// What must be so many times as fast as the usual way to be taken in its place, where it was measured: a machine has neighbours.
const BEATEN_BY: f64 = 1.3;

/// Whether bf16 by this unit is faster than f32: by the table, or else unless f32 wins a measurement, which yields the speed of bf16 as a
/// multiple of f32's.
fn bf16_is_faster(unit: Bf16Unit, (vendor, family): ([u8; 12], u32), measured: impl FnOnce(Bf16Unit) -> f64) -> bool {
    match known(vendor, family).and_then(|known| known.bf16.iter().find(|(of, _)| *of == unit)) {
        Some((_, times)) => *times > 1.0,
        None => 1.0 < BEATEN_BY * measured(unit),
    }
}

/// The speed of bf16 by this unit as a multiple of f32's: register loops by turns, the best of each, some 10 ms, once a process.
fn measured(unit: Bf16Unit) -> f64 {
    static TIMES: [OnceLock<f64>; 3] = [const { OnceLock::new() }; 3];
    let (times, isa) = match unit {
        Bf16Unit::Widened => return 1.0,
        Bf16Unit::Amx => (&TIMES[0], Isa::detected()),
        Bf16Unit::Avx512 => (&TIMES[1], Isa::detected().and(Isa::AVX512BF16)),
        Bf16Unit::Bfmmla => (&TIMES[2], Isa::detected()),
    };
    *times.get_or_init(|| {
        const STEPS: usize = 1 << 16;
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
    })
}

/// The processor's vendor as CPUID spells it, and its family; nothing where there is no CPUID, so that AArch64 is measured.
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
    use super::*;
    use crate::isa::Feature;
    use crate::isa::tests::all;

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
    fn the_measurement_tells_a_fast_unit_from_a_slow_one() {
        if !Isa::detected().has(Feature::Avx512Bf16) {
            return;
        }
        let times = measured(Bf16Unit::Avx512);
        let (vendor, family) = processor();
        let avx512 = |known: &Family| known.bf16.iter().find(|(unit, _)| *unit == Bf16Unit::Avx512).copied();
        if let Some((_, wanted)) = known(vendor, family).and_then(avx512) {
            assert!((times > BEATEN_BY.recip()) == (wanted > 1.0), "{times} for {wanted}");
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
