//! Sets of features in words: a level, and features more or less, as `HOMEROOM_CPU` takes them and a run's state records them.

use std::str::FromStr;

use super::{Feature, Isa};

/// Environment variable that keeps kernels to fewer instructions: a level (`portable`, `avx2`, `avxvnni`, `avx512`, `avx512bf16`, `amx`,
/// `neon`), and behind it, or alone, features to leave out (`-amx,-bf16`) or to add (`avx2,+avx512`), with commas between them.
pub const VARIABLE: &str = "HOMEROOM_CPU";

/// Levels by name; a later one is the better name of a set that holds several.
const LEVELS: [(&str, Isa); 7] = [
    ("portable", Isa::PORTABLE),
    ("neon", Isa::NEON),
    ("avx2", Isa::AVX2),
    ("avxvnni", Isa::AVXVNNI),
    ("avx512", Isa::AVX512),
    ("avx512bf16", Isa::AVX512BF16),
    ("amx", Isa::AMX),
];

/// What several features are together called, to leave them out.
const GROUPS: [(&str, &[Feature]); 3] = [
    ("amx", &[Feature::AmxTile, Feature::AmxBf16, Feature::AmxInt8]),
    ("bf16", &[Feature::Avx512Bf16, Feature::AmxBf16, Feature::NeonBf16]),
    ("vnni", &[Feature::AvxVnni, Feature::Avx512Vnni]),
];

impl Feature {
    /// Its name in a set's.
    pub fn name(self) -> &'static str {
        match self {
            Self::Avx2 => "avx2",
            Self::AvxVnni => "avxvnni",
            Self::Avx512 => "avx512",
            Self::Avx512Vnni => "avx512vnni",
            Self::Avx512Bf16 => "avx512bf16",
            Self::AmxTile => "amx-tile",
            Self::AmxBf16 => "amx-bf16",
            Self::AmxInt8 => "amx-int8",
            Self::Neon => "neon",
            Self::DotProd => "dotprod",
            Self::NeonBf16 => "neon-bf16",
            Self::I8mm => "i8mm",
        }
    }
}

impl Isa {
    /// The name that [`VARIABLE`] knows: the last level that the set holds, and what it holds beyond, as `avx2,+avx512`.
    pub fn name(self) -> String {
        let held = LEVELS.iter().rfind(|(_, level)| self.contains(*level));
        let (name, level) = held.expect("every set holds the portable one");
        let beyond = self.features().filter(|feature| !level.has(*feature));
        beyond.fold((*name).to_owned(), |name, feature| format!("{name},+{}", feature.name()))
    }
}

/// A set by name, whatever this processor has. A level of AVX-512 holds VNNI, which its first processors lack.
impl FromStr for Isa {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let all = Self::closed(Feature::ALL);
        text.split(',').map(str::trim).enumerate().try_fold(all, |isa, (i, word)| {
            let level = LEVELS.iter().find(|(name, _)| word.eq_ignore_ascii_case(name));
            if let (0, Some((_, level))) = (i, level) {
                return Ok(*level);
            }
            let named = |name: &str| -> Option<Vec<Feature>> {
                let group = GROUPS.iter().find(|(group, _)| name.eq_ignore_ascii_case(group));
                let feature = || Feature::ALL.into_iter().find(|feature| name.eq_ignore_ascii_case(feature.name()));
                group.map(|(_, features)| features.to_vec()).or_else(|| Some(vec![feature()?]))
            };
            if let Some(features) = word.strip_prefix('-').and_then(named) {
                return Ok(features.into_iter().fold(isa, Self::without));
            }
            if let Some(features) = word.strip_prefix('+').and_then(named) {
                // A feature brings what it stands on; of a group only what the set can have as it is.
                let is_group = features.len() > 1;
                let add = |isa: Self, feature: Feature| {
                    let can = !is_group || feature.stands_on().iter().all(|below| isa.has(*below));
                    if can { isa.with(feature) } else { isa }
                };
                return Ok(features.into_iter().fold(isa, add));
            }
            let levels = LEVELS.map(|(name, _)| name).join(", ");
            let groups = GROUPS.iter().map(|(name, _)| *name);
            let features: Vec<&str> = groups.chain(Feature::ALL.map(Feature::name)).collect();
            let whole = if text.contains(',') { format!("`{word}` is not known there; ") } else { String::new() };
            Err(format!("{whole}known are {levels}, and behind a - or + {}", features.join(", ")))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::all;
    use super::*;

    #[test]
    fn the_name_of_every_set_stands_for_it() {
        for isa in all() {
            assert_eq!(isa.name().parse(), Ok(isa), "{}", isa.name());
        }
        for (name, level) in LEVELS {
            assert_eq!(level.name(), name);
        }
        assert_eq!(Isa::AVXVNNI.with(Feature::Avx512).name(), "avxvnni,+avx512");
        assert_eq!(Isa::AVX2.with(Feature::Avx512).name(), "avx2,+avx512");
    }

    #[test]
    fn features_are_taken_away_from_a_level_or_from_all_that_there_is() {
        let emerald_rapids = Isa::AMX;
        let check = |text: &str, name: &str| {
            let set = text.parse::<Isa>().expect(text);
            assert_eq!(set.and(emerald_rapids).name(), name, "{text}");
        };
        check("-amx", "avx512bf16");
        check("-amx,-bf16", "avx512");
        check("-amx, -BF16 ,-vnni", "avx2,+avx512");
        check("-avx512", "avxvnni");
        check("-avx512vnni", "avxvnni,+avx512,+avx512bf16,+amx-tile,+amx-bf16");
        check("-amx-int8", "avx512bf16,+amx-tile,+amx-bf16");
        check("-bf16", "avx512,+amx-tile,+amx-int8");
        check("avx2,-avxvnni", "avx2");
        check("avx2,+vnni", "avxvnni");
        check("avx512,+bf16", "avx512bf16");
        check("avx2,+avx512vnni", "avx512");
        check("AVX2,+avxvnni", "avxvnni");
        check("avx512bf16,-avx2", "portable");
        check("avx512", "avx512");
        check("amx", "amx");
        check("neon", "portable");
        let graviton_3 = Isa::AARCH64;
        let check = |text: &str, name: &str| {
            let set = text.parse::<Isa>().expect(text);
            assert_eq!(set.and(graviton_3).name(), name, "{text}");
        };
        check("-bf16", "neon,+dotprod,+i8mm");
        check("-i8mm", "neon,+dotprod,+neon-bf16");
        check("-dotprod", "neon,+neon-bf16");
        check("neon,+i8mm", "neon,+dotprod,+i8mm");
        check("avx2", "portable");
    }

    #[test]
    fn a_name_that_is_not_known_is_refused_with_those_that_are() {
        for text in ["avx9000", "", "avx512,", "avx512,avx2", "-avx9000", "+", "--amx", "bf16", "avx2 -amx"] {
            let problem = text.parse::<Isa>().expect_err(text);
            assert!(problem.contains("known are portable, neon, avx2, avxvnni, avx512, avx512bf16, amx"), "{problem}");
            assert!(problem.ends_with("amx-int8, neon, dotprod, neon-bf16, i8mm"), "{problem}");
            assert_eq!(problem.contains("is not known there"), text.contains(','), "{problem}");
        }
    }
}
