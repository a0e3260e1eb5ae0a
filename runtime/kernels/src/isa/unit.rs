//! What multiplies: the instructions of a set that products of each kind are made of. A unit is chosen by the set alone, never by how many
//! rows there are; where bf16 is faster than f32 says [`fastest`](crate::fastest).

use super::{Feature, Isa};

/// What products and sums of f32 are made of; what is written with [`per_isa`](super::per_isa) is compiled for each.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum F32Unit {
    /// Multiply-adds of 512 bits.
    Avx512,
    /// Multiply-adds of 256 bits.
    Avx2,
    /// Multiply-adds of 128 bits on AArch64.
    Neon,
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
    /// Rows of four by rows of four, `bfmmla`.
    Bfmmla,
    /// Values are widened to f32 and multiplied as such.
    Widened,
}

/// What products of integers are made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Int8Unit {
    /// Tiles of four bytes, `tdpbsud`.
    Amx,
    /// Four bytes in 512 bits, `vpdpbusd`.
    Avx512Vnni,
    /// Four bytes in 256 bits, `vpdpbusd`.
    AvxVnni,
    /// Pairs of sixteen bits in 256 bits, `vpmaddwd`.
    Avx2,
    /// Rows of eight bytes by rows of eight, `smmla`.
    Smmla,
    /// Four bytes in 128 bits, `sdot`.
    Sdot,
    /// What the compiler makes of plain Rust.
    Portable,
}

impl Isa {
    /// What multiplies f32.
    #[inline]
    pub const fn f32_unit(self) -> F32Unit {
        if self.has(Feature::Avx512) {
            F32Unit::Avx512
        } else if self.has(Feature::Avx2) {
            F32Unit::Avx2
        } else if self.has(Feature::Neon) {
            F32Unit::Neon
        } else {
            F32Unit::Portable
        }
    }

    /// What multiplies bf16.
    #[inline]
    pub const fn bf16_unit(self) -> Bf16Unit {
        if self.has(Feature::AmxBf16) {
            Bf16Unit::Amx
        } else if self.has(Feature::Avx512Bf16) {
            Bf16Unit::Avx512
        } else if self.has(Feature::NeonBf16) {
            Bf16Unit::Bfmmla
        } else {
            Bf16Unit::Widened
        }
    }

    /// What multiplies integers.
    #[inline]
    pub const fn int8_unit(self) -> Int8Unit {
        if self.has(Feature::AmxInt8) {
            Int8Unit::Amx
        } else if self.has(Feature::Avx512Vnni) {
            Int8Unit::Avx512Vnni
        } else if self.has(Feature::AvxVnni) {
            Int8Unit::AvxVnni
        } else if self.has(Feature::Avx2) {
            Int8Unit::Avx2
        } else if self.has(Feature::I8mm) {
            Int8Unit::Smmla
        } else if self.has(Feature::DotProd) {
            Int8Unit::Sdot
        } else {
            Int8Unit::Portable
        }
    }

    /// Returns true where there are products of bf16 pairs.
    pub const fn has_bf16(self) -> bool {
        !matches!(self.bf16_unit(), Bf16Unit::Widened)
    }

    /// Whether products of four pairs of bytes are made in 512 bits, or by AMX, which stands on that.
    #[inline]
    pub(crate) const fn multiplies_bytes_in_512(self) -> bool {
        matches!(self.int8_unit(), Int8Unit::Amx | Int8Unit::Avx512Vnni)
    }

    /// Returns true where four products of bytes and their sum are one instruction, so that products in integers are much faster than those
    /// of f32.
    #[inline]
    pub const fn multiplies_bytes(self) -> bool {
        matches!(self.int8_unit(), Int8Unit::Amx | Int8Unit::Avx512Vnni | Int8Unit::AvxVnni)
            || self.multiplies_signed_bytes()
    }

    /// Returns true where products with weights that lie in whole numbers are much faster than those of f32, though products of bytes go by
    /// twos: with multiply-adds of 256 bits.
    #[inline]
    pub const fn multiplies_stored(self) -> bool {
        matches!(self.f32_unit(), F32Unit::Avx2)
    }

    /// Whether both sides of products of bytes have a sign, as on AArch64; else one of them has none.
    #[inline]
    pub(crate) const fn multiplies_signed_bytes(self) -> bool {
        matches!(self.int8_unit(), Int8Unit::Smmla | Int8Unit::Sdot)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_levels_are_multiplied_with_what_they_are_named_for() {
        let check = |isa: Isa, of_f32: F32Unit, of_bf16: Bf16Unit, of_int8: Int8Unit| {
            assert_eq!((isa.f32_unit(), isa.bf16_unit(), isa.int8_unit()), (of_f32, of_bf16, of_int8), "{isa:?}");
        };
        check(Isa::PORTABLE, F32Unit::Portable, Bf16Unit::Widened, Int8Unit::Portable);
        check(Isa::NEON, F32Unit::Neon, Bf16Unit::Widened, Int8Unit::Portable);
        check(Isa::NEON.with(Feature::DotProd), F32Unit::Neon, Bf16Unit::Widened, Int8Unit::Sdot);
        check(Isa::NEON.with(Feature::I8mm), F32Unit::Neon, Bf16Unit::Widened, Int8Unit::Smmla);
        check(Isa::AARCH64, F32Unit::Neon, Bf16Unit::Bfmmla, Int8Unit::Smmla);
        check(Isa::AVX2, F32Unit::Avx2, Bf16Unit::Widened, Int8Unit::Avx2);
        check(Isa::AVXVNNI, F32Unit::Avx2, Bf16Unit::Widened, Int8Unit::AvxVnni);
        check(Isa::AVX512, F32Unit::Avx512, Bf16Unit::Widened, Int8Unit::Avx512Vnni);
        check(Isa::AVX512.without(Feature::Avx512Vnni), F32Unit::Avx512, Bf16Unit::Widened, Int8Unit::AvxVnni);
        check(Isa::AVX512.without(Feature::AvxVnni), F32Unit::Avx512, Bf16Unit::Widened, Int8Unit::Avx2);
        check(Isa::AVX512BF16, F32Unit::Avx512, Bf16Unit::Avx512, Int8Unit::Avx512Vnni);
        check(Isa::AMX, F32Unit::Avx512, Bf16Unit::Amx, Int8Unit::Amx);
        check(Isa::AMX.without(Feature::AmxInt8), F32Unit::Avx512, Bf16Unit::Amx, Int8Unit::Avx512Vnni);
        check(Isa::AMX.without(Feature::Avx512Bf16), F32Unit::Avx512, Bf16Unit::Widened, Int8Unit::Amx);
    }
}
