//! Options whose value is one of a few words: the same words on the command line, in scripts and in TOML.

use anyhow::{Result, anyhow};
use homeroom_abi::describe::nearest;

/// The value that a word names; several words may name one.
///
/// # Errors
/// When none of them is the word. The message names the nearest one, or all.
pub(crate) fn value_of<T: Clone>(word: &str, known: &[(&'static str, T)]) -> Result<T> {
    let named = known.iter().find(|(name, _)| *name == word);
    named.map(|(_, value)| value.clone()).ok_or_else(|| {
        let names = known.iter().map(|(name, _)| *name);
        match nearest(word, names.clone()) {
            Some(near) => anyhow!("`{word}` is unknown, did you mean `{near}`?"),
            None => anyhow!("`{word}` is unknown, known are {}", names.collect::<Vec<_>>().join(", ")),
        }
    })
}

#[cfg(test)]
mod tests {
    use crate::adapt::requantize::StoredAs;
    use crate::data::OnLongRow;
    use crate::export::Floats;
    use crate::run::compute::Compute;
    use crate::train::schedule::Schedule;

    #[test]
    fn every_choice_has_one_set_of_words() {
        for schedule in [Schedule::Cosine, Schedule::Linear, Schedule::Constant] {
            assert_eq!(schedule.name().parse::<Schedule>().unwrap(), schedule);
        }
        assert_eq!("refuse".parse::<OnLongRow>().unwrap(), OnLongRow::Refuse);
        assert_eq!("truncate".parse::<OnLongRow>().unwrap(), OnLongRow::Truncate);
        assert_eq!("skip".parse::<OnLongRow>().unwrap(), OnLongRow::Skip);
        for compute in [Compute::Auto, Compute::Bf16, Compute::F32, Compute::Int8] {
            assert_eq!(compute.name().parse::<Compute>().unwrap(), compute);
        }
        for floats in [Floats::F32, Floats::F16, Floats::Bf16] {
            assert_eq!(floats.name().parse::<Floats>().unwrap(), floats);
        }
        assert_eq!("bf16".parse::<Floats>().unwrap(), Floats::Bf16);
        assert!(matches!("nf4".parse::<StoredAs>().unwrap(), StoredAs::Codec(codec) if codec.bits == 4));
        assert!(matches!("int8".parse::<StoredAs>().unwrap(), StoredAs::Codec(codec) if codec.bits == 8));
    }

    #[test]
    fn a_word_that_is_none_of_them_gets_the_nearest_or_all() {
        let said = |error: anyhow::Error| error.to_string();
        assert_eq!(said("cosin".parse::<Schedule>().unwrap_err()), "`cosin` is unknown, did you mean `cosine`?");
        assert_eq!(
            said("polynomial".parse::<Schedule>().unwrap_err()),
            "`polynomial` is unknown, known are cosine, linear, constant"
        );
        // The reference is for tests alone.
        assert!("plain".parse::<Compute>().is_err());
    }
}
