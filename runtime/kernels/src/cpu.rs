//! Which instructions the kernels may use: asked of the processor once, or lowered by an environment variable.

use std::cell::Cell;
use std::sync::OnceLock;

/// Instruction sets that kernels are written for, each holding those before it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Cpu {
    /// Rust without intrinsics, for the compiler's baseline: SSE2 on x86-64, NEON on AArch64.
    Portable,
    /// AVX2, FMA and F16C.
    Avx2,
    /// AVX-512 F, BW, CD, DQ and VL.
    Avx512,
    /// AVX-512 with products of bf16 pairs.
    Avx512Bf16,
}

/// Names by which [`VARIABLE`] lowers what is used.
const NAMES: [(&str, Cpu); 4] =
    [("portable", Cpu::Portable), ("avx2", Cpu::Avx2), ("avx512", Cpu::Avx512), ("avx512bf16", Cpu::Avx512Bf16)];

/// Environment variable that keeps kernels to an older instruction set: `portable`, `avx2`, `avx512` or `avx512bf16`.
pub const VARIABLE: &str = "HOMEROOM_CPU";

impl Cpu {
    /// The best that this processor has.
    pub fn detected() -> Self {
        #[cfg(target_arch = "x86_64")]
        {
            use std::arch::is_x86_feature_detected as has;
            let avx2 = has!("avx2") && has!("fma") && has!("f16c") && has!("bmi2");
            let avx512 =
                has!("avx512f") && has!("avx512bw") && has!("avx512cd") && has!("avx512dq") && has!("avx512vl");
            match (avx2, avx512, has!("avx512bf16")) {
                (true, true, true) => Self::Avx512Bf16,
                (true, true, false) => Self::Avx512,
                (true, false, _) => Self::Avx2,
                _ => Self::Portable,
            }
        }
        #[cfg(not(target_arch = "x86_64"))]
        Self::Portable
    }

    /// What the environment variable allows of it.
    ///
    /// # Errors
    /// When the variable holds no name that is known.
    pub fn allowed() -> Result<Self, String> {
        let best = Self::detected();
        let Some(name) = std::env::var_os(VARIABLE) else { return Ok(best) };
        let known = NAMES.iter().find(|(known, _)| name.eq_ignore_ascii_case(known));
        match known {
            Some((_, cpu)) => Ok(best.min(*cpu)),
            None => {
                let known = NAMES.map(|(name, _)| name).join(", ");
                Err(format!("{VARIABLE} is `{}`; known are {known}", name.display()))
            }
        }
    }

    /// Returns true where there are products of bf16 pairs.
    pub fn has_bf16(self) -> bool {
        self == Self::Avx512Bf16
    }

    /// Returns true where products of bf16 are faster than those of f32, which having them does not mean.
    pub fn prefers_bf16(self) -> bool {
        self.has_bf16() && !has_slow_bf16(vendor())
    }

    /// Whether there are products of four pairs of bytes in 512 bits: AVX-512 with VNNI.
    pub(crate) fn has_vnni(self) -> bool {
        #[cfg(target_arch = "x86_64")]
        return self >= Self::Avx512 && std::arch::is_x86_feature_detected!("avx512vnni");
        #[cfg(not(target_arch = "x86_64"))]
        false
    }

    /// The name that [`VARIABLE`] knows.
    pub fn name(self) -> &'static str {
        NAMES.iter().find(|(_, cpu)| *cpu == self).map_or("", |(name, _)| name)
    }
}

/// The processor's vendor as CPUID spells it; nothing where there is no CPUID.
fn vendor() -> [u8; 12] {
    #[cfg(target_arch = "x86_64")]
    {
        let leaf = std::arch::x86_64::__cpuid(0);
        let mut vendor = [0; 12];
        for (bytes, register) in vendor.chunks_exact_mut(4).zip([leaf.ebx, leaf.edx, leaf.ecx]) {
            bytes.copy_from_slice(&register.to_le_bytes());
        }
        vendor
    }
    #[cfg(not(target_arch = "x86_64"))]
    [0; 12]
}

/// Vendors whose `vdpbf16ps` is slower than two `vfmadd231ps`: on Emerald Rapids it makes 80 GFLOP/s a core, f32 165. AMD's makes
/// 2.7 times what f32 does.
const SLOW_BF16: [&[u8; 12]; 1] = [b"GenuineIntel"];

fn has_slow_bf16(vendor: [u8; 12]) -> bool {
    SLOW_BF16.contains(&&vendor)
}

thread_local!(static FORCED: Cell<Option<Cpu>> = const { Cell::new(None) });

/// What kernels that are called from this thread use.
pub fn cpu() -> Cpu {
    static ALLOWED: OnceLock<Cpu> = OnceLock::new();
    // A wrong name is reported where the program starts; here it changes nothing.
    FORCED.get().unwrap_or_else(|| *ALLOWED.get_or_init(|| Cpu::allowed().unwrap_or_else(|_| Cpu::detected())))
}

/// Runs `f` with the kernels that this thread calls kept to `cpu`, or to what the processor has of it: for tests that
/// hold one path to another.
pub fn with_cpu<R>(cpu: Cpu, f: impl FnOnce() -> R) -> R {
    /// Puts back what was before, also when `f` panics.
    struct Before(Option<Cpu>);
    impl Drop for Before {
        fn drop(&mut self) {
            FORCED.set(self.0);
        }
    }
    let _before = Before(FORCED.replace(Some(cpu.min(Cpu::detected()))));
    f()
}

/// Writes a function whose body is compiled for each instruction set, with the one to use as its first argument.
///
/// The body is plain Rust over slices that the compiler vectorises; floats are never contracted to fused operations, so
/// every path yields the same bits. It must not hand closures to other threads, which would run them as baseline code.
macro_rules! per_cpu {
    ($(#[$meta:meta])* $vis:vis fn $name:ident $(<$generic:ident: $bound:path>)? ($($arg:ident: $ty:ty),* $(,)?) $(-> $ret:ty)? $body:block) => {
        $(#[$meta])*
        #[allow(clippy::too_many_arguments)]
        $vis fn $name $(<$generic: $bound>)? (cpu: $crate::cpu::Cpu, $($arg: $ty),*) $(-> $ret)? {
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
            match cpu {
                // SAFETY: a `Cpu` comes from `Cpu::detected` or is lower, so the processor has these instructions.
                #[cfg(target_arch = "x86_64")]
                $crate::cpu::Cpu::Avx512 | $crate::cpu::Cpu::Avx512Bf16 => unsafe { avx512($($arg),*) },
                // SAFETY: as above.
                #[cfg(target_arch = "x86_64")]
                $crate::cpu::Cpu::Avx2 => unsafe { avx2($($arg),*) },
                _ => body($($arg),*),
            }
        }
    };
}
pub(crate) use per_cpu;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bf16_is_preferred_where_it_is_faster_not_wherever_it_is() {
        assert!(has_slow_bf16(*b"GenuineIntel"));
        for other in [b"AuthenticAMD", b"HygonGenuine", &[0; 12]] {
            assert!(!has_slow_bf16(*other), "{other:?}");
        }
        for (_, cpu) in NAMES {
            assert_eq!(cpu.prefers_bf16(), cpu == Cpu::Avx512Bf16 && vendor() != *b"GenuineIntel");
        }
    }

    /// Linux reads the vendor on its own.
    #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
    #[test]
    fn the_vendor_is_that_of_the_system() {
        let said = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let named = said.lines().find_map(|line| line.strip_prefix("vendor_id")?.split(": ").nth(1));
        assert_eq!(named.map(str::as_bytes), Some(&vendor()[..]));
    }
}
