//! Which instructions the kernels may use: a set of features, asked of the processor once, that an environment variable can lower.
//!
//! Sets are no order: a processor has AVX-VNNI without AVX-512, or AMX with all of it, and any of these can be taken away, for tests and
//! for another machine's bits. What a product is multiplied with is asked in one place, [`Isa::f32_unit`] and its neighbours.

mod detect;
#[cfg(target_arch = "x86_64")]
mod dpbusd;
mod names;
mod unit;

use std::cell::Cell;
use std::fmt;
use std::sync::atomic::{AtomicU16, AtomicU32, Ordering};

#[cfg(target_arch = "x86_64")]
pub(crate) use self::dpbusd::{Dpbusd, Run, run};
pub use self::names::VARIABLE;
pub use self::unit::{Bf16Unit, F32Unit, Int8Unit};

/// Instructions that come together, as kernels are written for them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Feature {
    /// AVX2, FMA, F16C and BMI2.
    Avx2,
    /// `vpdpbusd` in 256 bits, in either encoding: AVX-VNNI's own, or that of AVX-512 with VNNI.
    AvxVnni,
    /// AVX-512 F, BW, CD, DQ and VL.
    Avx512,
    /// `vpdpbusd` in 512 bits.
    Avx512Vnni,
    /// `vdpbf16ps` in 512 bits.
    Avx512Bf16,
    /// AMX's tiles, which the system lets this process use.
    AmxTile,
    /// Tiles of bf16 pairs.
    AmxBf16,
    /// Tiles of bytes.
    AmxInt8,
    /// AArch64's vectors of 128 bits.
    Neon,
    /// `sdot` on AArch64.
    DotProd,
    /// `bfmmla` and `bfdot` on AArch64.
    NeonBf16,
    /// `smmla` on AArch64.
    I8mm,
}

impl Feature {
    /// All of them; each after those that it stands on.
    pub const ALL: [Self; 12] = [
        Self::Avx2,
        Self::AvxVnni,
        Self::Avx512,
        Self::Avx512Vnni,
        Self::Avx512Bf16,
        Self::AmxTile,
        Self::AmxBf16,
        Self::AmxInt8,
        Self::Neon,
        Self::DotProd,
        Self::NeonBf16,
        Self::I8mm,
    ];

    /// Features without which kernels for this one cannot do: they round, pack and take up tails with those.
    const fn stands_on(self) -> &'static [Self] {
        match self {
            Self::Avx2 | Self::Neon => &[],
            Self::AvxVnni | Self::Avx512 => &[Self::Avx2],
            // What has products of bytes in 512 bits has them in 256, too.
            Self::Avx512Vnni => &[Self::AvxVnni, Self::Avx512],
            Self::Avx512Bf16 | Self::AmxTile => &[Self::Avx512],
            Self::AmxBf16 => &[Self::AmxTile, Self::Avx512Bf16],
            Self::AmxInt8 => &[Self::AmxTile, Self::Avx512Vnni],
            Self::DotProd | Self::NeonBf16 => &[Self::Neon],
            Self::I8mm => &[Self::DotProd],
        }
    }

    const fn bit(self) -> u16 {
        1 << self as u16
    }
}

/// A set of features. It holds none without those that it stands on.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Isa(u16);

impl Isa {
    /// Rust without intrinsics, for the compiler's baseline: SSE2 on x86-64, NEON on AArch64.
    pub const PORTABLE: Self = Self(0);
    /// AVX2 and what comes with it.
    pub const AVX2: Self = Self(Feature::Avx2.bit());
    /// AVX2 with products of bytes.
    pub const AVXVNNI: Self = Self(Self::AVX2.0 | Feature::AvxVnni.bit());
    /// AVX-512 with products of bytes.
    pub const AVX512: Self = Self(Self::AVXVNNI.0 | Feature::Avx512.bit() | Feature::Avx512Vnni.bit());
    /// AVX-512 with products of bytes and of bf16 pairs.
    pub const AVX512BF16: Self = Self(Self::AVX512.0 | Feature::Avx512Bf16.bit());
    /// All that x86-64 has here.
    pub const AMX: Self =
        Self(Self::AVX512BF16.0 | Feature::AmxTile.bit() | Feature::AmxBf16.bit() | Feature::AmxInt8.bit());
    /// AArch64's vectors.
    pub const NEON: Self = Self(Feature::Neon.bit());
    /// All that AArch64 has here.
    pub const AARCH64: Self =
        Self(Self::NEON.0 | Feature::DotProd.bit() | Feature::NeonBf16.bit() | Feature::I8mm.bit());

    /// Those of some features that have all that they stand on.
    fn closed(features: impl IntoIterator<Item = Feature>) -> Self {
        let given = features.into_iter().fold(0, |bits, feature| bits | feature.bit());
        Feature::ALL.into_iter().fold(Self::PORTABLE, |isa, feature| {
            let stands = given & feature.bit() != 0 && feature.stands_on().iter().all(|below| isa.has(*below));
            if stands { Self(isa.0 | feature.bit()) } else { isa }
        })
    }

    /// What this processor has and the system lets this process use.
    pub fn detected() -> Self {
        detect::found().isa
    }

    /// Whether the processor has AMX and the system does not let this process use it.
    pub fn amx_is_refused() -> bool {
        detect::found().amx_is_refused
    }

    /// What the environment variable allows of it.
    ///
    /// # Errors
    /// When the variable holds a name that is not known.
    pub fn allowed() -> Result<Self, String> {
        // Empty is as if it were not there.
        let value = std::env::var_os(VARIABLE).filter(|value| !value.is_empty());
        let Some(value) = value else { return Ok(Self::detected()) };
        let value = value.to_string_lossy();
        let set = value.parse::<Self>().map_err(|problem| format!("{VARIABLE} is `{value}`; {problem}"))?;
        Ok(set.and(Self::detected()))
    }

    /// Returns true where the set holds this feature.
    pub const fn has(self, feature: Feature) -> bool {
        self.0 & feature.bit() != 0
    }

    /// Returns true where the set holds all of another.
    pub const fn contains(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }

    /// Its features, each after those that it stands on.
    pub fn features(self) -> impl Iterator<Item = Feature> {
        Feature::ALL.into_iter().filter(move |feature| self.has(*feature))
    }

    /// What both sets hold.
    #[must_use]
    pub const fn and(self, other: Self) -> Self {
        // What a feature stands on is in both, since it is.
        Self(self.0 & other.0)
    }

    /// The set with a feature, and with what that stands on.
    #[must_use]
    pub fn with(self, feature: Feature) -> Self {
        feature.stands_on().iter().fold(Self(self.0 | feature.bit()), |isa, below| isa.with(*below))
    }

    /// The set without a feature, nor any that stands on it.
    #[must_use]
    pub fn without(self, feature: Feature) -> Self {
        Self::closed(self.features().filter(|other| *other != feature))
    }

    /// What runs here: what the processor has, and what tests emulate.
    fn runnable() -> Self {
        // See `neon`: where there are none of AArch64's instructions, the crate's own tests write them out.
        let written_out = if cfg!(all(test, not(target_arch = "aarch64"))) { Self::AARCH64 } else { Self::PORTABLE };
        Self::closed(Self(Self::detected().0 | written_out.0 | EMULATED.load(Ordering::Relaxed)).features())
    }

    /// The sets that tests hold to each other: each level, and sets with features taken away, as far as this processor has them or a test
    /// emulates them.
    pub fn tested() -> Vec<Self> {
        let sets = [
            Self::PORTABLE,
            Self::NEON,
            Self::NEON.with(Feature::DotProd),
            Self::NEON.with(Feature::I8mm),
            Self::AARCH64,
            Self::AVX2,
            Self::AVXVNNI,
            Self::AVX512.without(Feature::Avx512Vnni),
            Self::AVX512BF16.without(Feature::Avx512Vnni),
            Self::AVX512,
            Self::AVX512BF16,
            Self::AMX.without(Feature::AmxInt8),
            Self::AMX.without(Feature::AmxBf16),
            Self::AMX,
            Self::detected(),
        ];
        let mut tested = Vec::new();
        for set in sets.map(|set| set.and(Self::runnable())) {
            if !tested.contains(&set) {
                tested.push(set);
            }
        }
        tested
    }
}

/// Its name, as [`VARIABLE`] knows it.
impl fmt::Debug for Isa {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.name())
    }
}

thread_local!(static FORCED: Cell<Option<Isa>> = const { Cell::new(None) });

/// What this process uses, or [`UNSET`].
static USED: AtomicU32 = AtomicU32::new(UNSET);
const UNSET: u32 = u32::MAX;

/// Features that the processor lacks and a test emulates.
static EMULATED: AtomicU16 = AtomicU16::new(0);

/// Lets [`with_isa`] and [`Isa::tested`] take features that the processor lacks, where it has what they stand on: for tests that catch
/// what it then does not know and do it themselves. [`Isa::detected`] and [`isa`] hold them no more than before.
///
/// # Safety
/// Until the process ends, every thread's instructions of these features do what the manuals say.
#[doc(hidden)]
pub unsafe fn emulate(features: &[Feature]) {
    EMULATED.fetch_or(features.iter().fold(0, |bits, feature| bits | feature.bit()), Ordering::Relaxed);
}

/// What kernels that are called from this thread use.
pub fn isa() -> Isa {
    FORCED.get().unwrap_or_else(|| match USED.load(Ordering::Relaxed) {
        UNSET => {
            // A wrong name is reported where the program starts; here it changes nothing.
            let isa = Isa::allowed().unwrap_or_else(|_| Isa::detected());
            USED.store(u32::from(isa.0), Ordering::Relaxed);
            isa
        }
        // Nothing but the bits of a set is stored.
        bits => Isa(bits as u16),
    })
}

/// Keeps this process to what a run began with, as far as [`Isa::allowed`] has it, and returns what that is. For a program that goes on
/// with the run, before it computes anything.
pub fn keep_to(isa: Isa) -> Isa {
    let isa = isa.and(Isa::allowed().unwrap_or_else(|_| Isa::detected()));
    USED.store(u32::from(isa.0), Ordering::Relaxed);
    isa
}

/// Runs `f` with the kernels that this thread calls kept to `isa`, or to what the processor has of it: for tests that
/// hold one path to another.
pub fn with_isa<R>(isa: Isa, f: impl FnOnce() -> R) -> R {
    /// Puts back what was before, also when `f` panics.
    struct Before(Option<Isa>);
    impl Drop for Before {
        fn drop(&mut self) {
            FORCED.set(self.0);
        }
    }
    let _before = Before(FORCED.replace(Some(isa.and(Isa::runnable()))));
    f()
}

/// Writes a function whose body is compiled for each kind of vectors, with the set to use as its first argument.
///
/// The body is plain Rust over slices that the compiler vectorises; floats are never contracted to fused operations, so
/// every path yields the same bits. It must not hand closures to other threads, which would run them as baseline code.
macro_rules! per_isa {
    ($(#[$meta:meta])* $vis:vis fn $name:ident $(<$generic:ident: $bound:path>)? ($($arg:ident: $ty:ty),* $(,)?) $(-> $ret:ty)? $body:block) => {
        $(#[$meta])*
        #[allow(clippy::too_many_arguments)]
        $vis fn $name $(<$generic: $bound>)? (isa: $crate::isa::Isa, $($arg: $ty),*) $(-> $ret)? {
            #[inline(always)]
            #[allow(clippy::too_many_arguments)]
            fn body $(<$generic: $bound>)? ($($arg: $ty),*) $(-> $ret)? $body
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx512f,avx512bw,avx512cd,avx512dq,avx512vl,avx2,fma,f16c,bmi2")]
            #[allow(clippy::too_many_arguments)]
            fn avx512 $(<$generic: $bound>)? ($($arg: $ty),*) $(-> $ret)? { body($($arg),*) }
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx2,fma,f16c,bmi2")]
            #[allow(clippy::too_many_arguments)]
            fn avx2 $(<$generic: $bound>)? ($($arg: $ty),*) $(-> $ret)? { body($($arg),*) }
            match isa.f32_unit() {
                // SAFETY: the set comes from `isa` or `with_isa`, which hold no more than the processor has.
                #[cfg(target_arch = "x86_64")]
                $crate::isa::F32Unit::Avx512 => unsafe { avx512($($arg),*) },
                // SAFETY: as above.
                #[cfg(target_arch = "x86_64")]
                $crate::isa::F32Unit::Avx2 => unsafe { avx2($($arg),*) },
                _ => body($($arg),*),
            }
        }
    };
}
pub(crate) use per_isa;

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// Every set there is.
    pub(crate) fn all() -> impl Iterator<Item = Isa> {
        (0..1u16 << Feature::ALL.len())
            .map(|bits| Isa::closed(Feature::ALL.into_iter().filter(move |feature| bits & feature.bit() != 0)))
    }

    #[test]
    fn a_feature_without_what_it_stands_on_is_not_there() {
        for isa in all() {
            for feature in isa.features() {
                assert!(feature.stands_on().iter().all(|below| isa.has(*below)), "{isa:?}");
                assert!(!isa.without(feature).has(feature), "{isa:?}");
            }
        }
        assert_eq!(Isa::closed([Feature::Avx2, Feature::Avx512Bf16, Feature::AmxTile]), Isa::AVX2);
        assert_eq!(Isa::AMX.without(Feature::Avx512), Isa::AVXVNNI);
        assert_eq!(Isa::AMX.without(Feature::AmxTile), Isa::AVX512BF16);
        assert_eq!(Isa::AVX512.without(Feature::AvxVnni), Isa::AVX2.with(Feature::Avx512));
        assert_eq!(Isa::PORTABLE.with(Feature::AmxInt8), Isa::AMX.without(Feature::Avx512Bf16));
        for level in [Isa::AVX2, Isa::AVXVNNI, Isa::AVX512, Isa::AVX512BF16, Isa::AMX, Isa::NEON, Isa::AARCH64] {
            assert_eq!(Isa::closed(level.features()), level);
        }
    }

    #[test]
    fn tests_walk_over_sets_that_this_processor_has_each_once() {
        let tested = Isa::tested();
        assert!(tested.contains(&Isa::PORTABLE) && tested.contains(&Isa::detected()));
        for (i, set) in tested.iter().enumerate() {
            assert!(Isa::runnable().contains(*set) && !tested[..i].contains(set), "{tested:?}");
        }
    }
}
