//! Which objective, and what it is told, by TRL's names.

use std::str::FromStr;

use anyhow::{Error, Result, bail, ensure};
use serde::{Deserialize, Serialize};

use super::Orpo;
use crate::data::{Group, RowKind};
use crate::words::value_of;

/// An objective of this program.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// Supervised fine-tuning.
    #[default]
    Sft,
    /// Direct preference optimisation.
    Dpo,
    /// Kahneman-Tversky optimisation.
    Kto,
    /// Odds ratio preference optimisation.
    Orpo,
}

impl FromStr for Kind {
    type Err = Error;

    fn from_str(word: &str) -> Result<Self> {
        value_of(word, &[("sft", Self::Sft), ("dpo", Self::Dpo), ("kto", Self::Kto), ("orpo", Self::Orpo)])
    }
}

impl Kind {
    /// Its name, as `--objective` has it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Sft => "sft",
            Self::Dpo => "dpo",
            Self::Kto => "kto",
            Self::Orpo => "orpo",
        }
    }

    /// The rows that it learns from.
    pub fn rows(self) -> RowKind {
        match self {
            Self::Sft => RowKind::Demonstration,
            Self::Dpo | Self::Orpo => RowKind::Preference,
            Self::Kto => RowKind::Rating,
        }
    }

    /// Whether it holds the model to a reference.
    pub fn has_reference(self) -> bool {
        matches!(self, Self::Dpo | Self::Kto)
    }

    /// Makes targets of all that it learns from in its groups: orpo learns prompts, too.
    pub fn mark(self, groups: &mut [Group]) {
        if self == Self::Orpo {
            groups.iter_mut().for_each(Orpo::learn_prompts);
        }
    }

    /// What the learning rate that a strategy proposes is multiplied by: it is one for sft. Dpo and kto go on from a model that answers
    /// well and need a tenth, as TRL's defaults for LoRA do; orpo learns to answer as well, and needs a half.
    pub fn learning_rate_scale(self) -> f64 {
        match self {
            Self::Sft => 1.0,
            Self::Dpo | Self::Kto => 0.1,
            Self::Orpo => 0.5,
        }
    }
}

/// An objective with its options.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct ObjectiveConfig {
    /// Which.
    pub objective: Kind,
    /// Of dpo and kto how closely the reference is kept to, of orpo what the odds ratio weighs. TRL's default is 0.1.
    pub beta: f64,
    /// Of kto, what the losses of good answers are multiplied by.
    pub desirable_weight: f64,
    /// Of kto, the same of bad ones.
    pub undesirable_weight: f64,
}

impl Default for ObjectiveConfig {
    fn default() -> Self {
        Self { objective: Kind::Sft, beta: 0.1, desirable_weight: 1.0, undesirable_weight: 1.0 }
    }
}

impl ObjectiveConfig {
    /// This objective with its defaults.
    pub fn of(objective: Kind) -> Self {
        Self { objective, ..Self::default() }
    }

    /// This objective with what was given of its options, by their names here.
    ///
    /// # Errors
    /// When an option is given that the objective does not read, or that it cannot go by.
    pub fn given(
        objective: Kind,
        beta: Option<f64>,
        desirable_weight: Option<f64>,
        undesirable_weight: Option<f64>,
    ) -> Result<Self> {
        let weights = [("desirable_weight", desirable_weight), ("undesirable_weight", undesirable_weight)];
        let given = weights.iter().find(|(_, weight)| weight.is_some() && objective != Kind::Kto);
        if let Some((name, _)) = given {
            bail!("objective {}: `{name}` is an option of kto", objective.name());
        }
        ensure!(beta.is_none() || objective != Kind::Sft, "objective sft: `beta` is an option of dpo, kto and orpo");
        let default = Self::of(objective);
        let config = Self {
            objective,
            beta: beta.unwrap_or(default.beta),
            desirable_weight: desirable_weight.unwrap_or(default.desirable_weight),
            undesirable_weight: undesirable_weight.unwrap_or(default.undesirable_weight),
        };
        config.check()?;
        Ok(config)
    }

    /// Refuses numbers that no objective can go by.
    ///
    /// # Errors
    /// With the first of them.
    pub fn check(&self) -> Result<()> {
        for (name, value) in [
            ("beta", self.beta),
            ("desirable_weight", self.desirable_weight),
            ("undesirable_weight", self.undesirable_weight),
        ] {
            ensure!(value.is_finite() && value > 0.0, "{name} is {value}, it should be above 0");
        }
        Ok(())
    }

    /// The options that it reads, by name.
    pub fn options(&self) -> Vec<(&'static str, f64)> {
        let Self { objective, beta, desirable_weight, undesirable_weight } = *self;
        let beta = ("beta", beta);
        match objective {
            Kind::Sft => Vec::new(),
            Kind::Dpo | Kind::Orpo => vec![beta],
            Kind::Kto => {
                vec![beta, ("desirable_weight", desirable_weight), ("undesirable_weight", undesirable_weight)]
            }
        }
    }

    /// In words: its name, and the options that it reads.
    pub fn words(&self) -> String {
        let options = self.options().into_iter().map(|(name, value)| format!("   {name} {value}"));
        format!("{}{}", self.objective.name(), options.collect::<String>())
    }
}
