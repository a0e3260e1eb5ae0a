//! What the processor has, and what the system lets this process use of it.

use std::sync::OnceLock;

#[cfg(any(test, target_arch = "x86_64", target_arch = "aarch64"))]
use super::Feature;
use super::Isa;

pub(super) struct Found {
    pub isa: Isa,
    /// See [`Isa::amx_is_refused`].
    pub amx_is_refused: bool,
}

/// Asked once a process.
pub(super) fn found() -> &'static Found {
    static FOUND: OnceLock<Found> = OnceLock::new();
    FOUND.get_or_init(find)
}

#[cfg(target_arch = "x86_64")]
fn find() -> Found {
    use std::arch::is_x86_feature_detected as has;
    let avx512 = has!("avx512f") && has!("avx512bw") && has!("avx512cd") && has!("avx512dq") && has!("avx512vl");
    let asked = [
        (Feature::Avx2, has!("avx2") && has!("fma") && has!("f16c") && has!("bmi2")),
        (Feature::AvxVnni, has!("avxvnni") || avx512 && has!("avx512vnni")),
        (Feature::Avx512, avx512),
        (Feature::Avx512Vnni, has!("avx512vnni")),
        (Feature::Avx512Bf16, has!("avx512bf16")),
    ];
    let amx = amx(leaf_7_edx(), tile_state(), request_tiles);
    // Other systems are not asked.
    let amx_is_refused = amx.is_err() && cfg!(target_os = "linux");
    let held = asked.into_iter().filter_map(|(feature, has)| has.then_some(feature));
    Found { isa: Isa::closed(held.chain(amx.unwrap_or_default())), amx_is_refused }
}

#[cfg(target_arch = "aarch64")]
fn find() -> Found {
    use std::arch::is_aarch64_feature_detected as has;
    let asked = [
        (Feature::Neon, has!("neon")),
        (Feature::DotProd, has!("dotprod")),
        (Feature::NeonBf16, has!("bf16")),
        (Feature::I8mm, has!("i8mm")),
    ];
    let held = asked.into_iter().filter_map(|(feature, has)| has.then_some(feature));
    Found { isa: Isa::closed(held), amx_is_refused: false }
}

#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
fn find() -> Found {
    Found { isa: Isa::PORTABLE, amx_is_refused: false }
}

/// What there is of AMX by EDX of CPUID's leaf 7, where the system keeps the state of tiles and grants the `request` to use them.
///
/// The system is asked only where there are tiles. An `Err` says that it refuses them.
#[cfg(any(test, target_arch = "x86_64"))]
fn amx(edx: u32, tile_state: bool, request: impl FnOnce() -> bool) -> Result<Vec<Feature>, ()> {
    let bits = [(22, Feature::AmxBf16), (24, Feature::AmxTile), (25, Feature::AmxInt8)];
    let held: Vec<Feature> =
        bits.into_iter().filter(|(bit, _)| edx >> bit & 1 != 0).map(|(_, feature)| feature).collect();
    if !held.contains(&Feature::AmxTile) {
        return Ok(Vec::new());
    }
    if tile_state && request() { Ok(held) } else { Err(()) }
}

#[cfg(target_arch = "x86_64")]
fn leaf_7_edx() -> u32 {
    use std::arch::x86_64::{__cpuid_count, __get_cpuid_max};
    if __get_cpuid_max(0).0 < 7 { 0 } else { __cpuid_count(7, 0).edx }
}

/// Whether the system keeps the state of tiles over a change of threads: bits 17 and 18 of XCR0.
#[cfg(target_arch = "x86_64")]
fn tile_state() -> bool {
    const OSXSAVE: u32 = 1 << 27;
    const TILES: u32 = 1 << 17 | 1 << 18;
    if std::arch::x86_64::__cpuid(1).ecx & OSXSAVE == 0 {
        return false;
    }
    let low: u32;
    // SAFETY: a system that sets OSXSAVE lets every program read XCR0; nothing but the two registers changes.
    unsafe {
        std::arch::asm!("xgetbv", in("ecx") 0, out("eax") low, out("edx") _, options(nomem, nostack, preserves_flags));
    }
    low & TILES == TILES
}

/// Asks Linux to let all threads of this process use tiles: `arch_prctl(ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA)`, see
/// <https://docs.kernel.org/arch/x86/xstate.html>. It returns an error where a kernel is older than 5.16 or a virtual machine refuses.
#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
fn request_tiles() -> bool {
    const ARCH_PRCTL: isize = 158;
    const ARCH_REQ_XCOMP_PERM: usize = 0x1023;
    const XFEATURE_XTILEDATA: usize = 18;
    let mut result = ARCH_PRCTL;
    // SAFETY: the call takes two numbers and touches no memory of this process; the kernel overwrites rcx and r11.
    unsafe {
        std::arch::asm!(
            "syscall",
            inlateout("rax") result,
            in("rdi") ARCH_REQ_XCOMP_PERM,
            in("rsi") XFEATURE_XTILEDATA,
            lateout("rcx") _,
            lateout("r11") _,
            options(nostack),
        );
    }
    result == 0
}

/// No other system is asked yet.
#[cfg(all(target_arch = "x86_64", not(target_os = "linux")))]
fn request_tiles() -> bool {
    false
}

#[cfg(test)]
mod tests {
    use super::*;

    const BF16: u32 = 1 << 22;
    const TILE: u32 = 1 << 24;
    const INT8: u32 = 1 << 25;

    #[test]
    fn tiles_that_the_system_refuses_are_not_there() {
        let never = || -> bool { panic!("the system is asked for what the processor does not have or keep") };
        assert_eq!(amx(0, true, never), Ok(vec![]));
        assert_eq!(amx(BF16 | INT8, true, never), Ok(vec![]));
        assert_eq!(amx(BF16 | TILE | INT8, false, never), Err(()));
        assert_eq!(amx(BF16 | TILE | INT8, true, || false), Err(()));
        assert_eq!(amx(TILE | INT8, true, || true), Ok(vec![Feature::AmxTile, Feature::AmxInt8]));
        let all = amx(BF16 | TILE | INT8 | 1 << 23, true, || true);
        assert_eq!(all, Ok(vec![Feature::AmxBf16, Feature::AmxTile, Feature::AmxInt8]));
    }

    /// The kernel answers here what it answers on any machine: the call comes back.
    #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
    #[test]
    fn asking_for_tiles_returns_where_there_are_none_and_agrees_with_what_is_found() {
        let granted = request_tiles();
        assert_eq!(granted && tile_state() && leaf_7_edx() & TILE != 0, found().isa.has(Feature::AmxTile));
        assert!(granted || !found().isa.has(Feature::AmxBf16));
    }

    /// Linux reads the features on its own.
    #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
    #[test]
    fn what_is_found_is_what_the_system_says() {
        let said = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let flags = said.lines().find_map(|line| line.strip_prefix("flags")).expect("the kernel lists flags");
        let has = |flag: &str| flags.split_whitespace().any(|has| has == flag);
        let isa = found().isa;
        for (feature, flag) in [
            (Feature::Avx2, "avx2"),
            (Feature::Avx512, "avx512bw"),
            (Feature::Avx512Vnni, "avx512_vnni"),
            (Feature::Avx512Bf16, "avx512_bf16"),
        ] {
            assert_eq!(isa.has(feature), has(flag), "{flag}");
        }
        assert_eq!(isa.has(Feature::AvxVnni), has("avx_vnni") || has("avx512_vnni"));
        assert_eq!(isa.has(Feature::AmxTile) || Isa::amx_is_refused(), leaf_7_edx() & TILE != 0);
        assert!(!isa.has(Feature::AmxTile) || has("amx_tile"));
    }
}
