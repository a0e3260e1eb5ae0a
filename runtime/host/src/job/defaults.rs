//! Defaults that teach: a small file is gone through often enough, in steps that are small enough, for its rows to show in answers.

use homeroom_engine::data::Group;
use homeroom_engine::train::TrainConfig;
use homeroom_engine::train::objective::{Kind, ObjectiveConfig};

/// The learning rate when neither the strategy nor the user gives one.
pub const LEARNING_RATE: f64 = 2e-4;
/// About as many steps show in answers at the default learning rate.
const STEPS_ENOUGH: u64 = 100;
/// More epochs than these learn rows by heart.
const EPOCHS_MANY: u64 = 10;
/// Rows of a batch,
pub const BATCH: usize = 8;
/// unless an epoch then has fewer steps than these.
const STEPS_AN_EPOCH: usize = 8;

/// What the user left open.
#[derive(Clone, Copy, Debug, Default)]
pub struct Open {
    /// Neither epochs nor steps were given.
    pub epochs: bool,
    /// Neither the rows of a batch nor the batches of a step were given.
    pub batch_size: bool,
}

/// Rows of a batch, where an epoch is of so many rows and nothing else is said: 1, 2, 4 or 8.
pub fn batch_size(rows: usize) -> usize {
    1 << (rows / STEPS_AN_EPOCH).clamp(1, BATCH).ilog2()
}

/// Chooses what was left open by the number of rows; returns what was chosen and why, if that is not what is usual.
pub fn choose(config: &mut TrainConfig, open: Open, rows: usize) -> Option<String> {
    let mut chosen = Vec::new();
    if open.batch_size {
        config.batch_size = batch_size(rows);
        if config.batch_size < BATCH {
            chosen.push(format!("batches of {}", config.batch_size));
        }
    }
    if open.epochs {
        let per_step = config.batch_size.saturating_mul(config.gradient_accumulation_steps);
        let steps = rows.div_ceil(per_step.max(1)).max(1) as u64;
        config.epochs = STEPS_ENOUGH.div_ceil(steps).clamp(1, EPOCHS_MANY);
        if config.epochs > 1 {
            chosen.push(format!("{} epochs", config.epochs));
        }
    }
    let rows = if rows == 1 { "1 row teaches".to_owned() } else { format!("{rows} rows teach") };
    (!chosen.is_empty()).then(|| format!("{} chosen, as {rows} little in fewer steps", chosen.join(" and ")))
}

/// What to change where the labels of kto's rows are not balanced; `None`: they are.
///
/// The paper wants what all good answers weigh to be from 1 to 4/3 of what all bad ones do. Source: Ethayarajh et al. 2024,
/// <https://arxiv.org/abs/2402.01306>, equation 8.
pub fn balance(objective: ObjectiveConfig, groups: &[&Group]) -> Option<String> {
    let good = groups.iter().filter(|group| group.label == Some(true)).count();
    let bad = groups.len() - good;
    if objective.objective != Kind::Kto {
        return None;
    }
    let counts = format!("{good} answers are rated good and {bad} bad");
    if good == 0 || bad == 0 {
        return Some(format!("{counts}; kto learns most from rows of both"));
    }
    let ratio = objective.desirable_weight * good as f64 / (objective.undesirable_weight * bad as f64);
    if (0.99..=1.34).contains(&ratio) {
        return None;
    }
    // To one decimal or two digits, whichever is finer: a weight is no measurement.
    let weight = |exact: f64| format!("{:.*}", if exact < 0.1 { 3 } else { 2 }, exact);
    Some(match ratio < 1.0 {
        true => {
            format!("{counts}; `--desirable-weight {}` weighs them alike", weight(objective.desirable_weight / ratio))
        }
        false => {
            format!(
                "{counts}; `--undesirable-weight {}` weighs them alike",
                weight(objective.undesirable_weight * ratio)
            )
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chosen(rows: usize, given: TrainConfig, open: Open) -> (u64, usize, u64) {
        let mut config = given;
        choose(&mut config, open, rows);
        let steps = homeroom_engine::train::planned_steps(rows, &config).expect("some steps");
        (config.epochs, config.batch_size, steps)
    }

    #[test]
    fn a_small_file_gets_about_a_hundred_steps_and_a_large_one_an_epoch() {
        let open = Open { epochs: true, batch_size: true };
        let all = |rows| chosen(rows, TrainConfig::default(), open);
        assert_eq!(all(1), (10, 1, 10));
        assert_eq!(all(12), (9, 1, 108));
        assert_eq!(all(40), (10, 4, 100));
        assert_eq!(all(475), (2, 8, 120));
        assert_eq!(all(5_000), (1, 8, 625));
    }

    #[test]
    fn labels_that_are_not_balanced_get_a_weight_that_balances_them() {
        let groups: Vec<Group> = (0..5).map(|i| Group::new(Vec::new(), Some(i == 0))).collect();
        let all: Vec<&Group> = groups.iter().collect();
        let kto = ObjectiveConfig::of(Kind::Kto);
        let told = balance(kto, &all).unwrap_or_default();
        assert_eq!(told, "1 answers are rated good and 4 bad; `--desirable-weight 4.00` weighs them alike");
        assert_eq!(balance(ObjectiveConfig { desirable_weight: 4.0, ..kto }, &all), None);
        assert_eq!(balance(ObjectiveConfig { desirable_weight: 5.0, ..kto }, &all), None);
        assert!(
            balance(ObjectiveConfig { desirable_weight: 6.0, ..kto }, &all)
                .is_some_and(|told| told.contains("`--undesirable-weight 1.50`"))
        );
        assert!(balance(kto, &all[1..]).is_some_and(|told| told.contains("0 answers are rated good and 4 bad")));
        assert_eq!(balance(ObjectiveConfig::of(Kind::Dpo), &all), None);
    }

    #[test]
    fn what_was_given_stays() {
        let given = TrainConfig { epochs: 3, batch_size: 8, ..TrainConfig::default() };
        assert_eq!(chosen(12, given, Open::default()), (3, 8, 6));
        assert_eq!(
            chosen(
                12,
                TrainConfig { batch_size: 3, ..TrainConfig::default() },
                Open { epochs: true, batch_size: false }
            )
            .1,
            3
        );
    }
}
