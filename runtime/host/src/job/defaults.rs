//! Defaults that teach: a small file is gone through often enough, in steps that are small enough, for its rows to show in answers.

use homeroom_engine::train::TrainConfig;

/// The learning rate when neither the strategy nor the user gives one.
pub const LEARNING_RATE: f64 = 2e-4;
/// About as many steps show in answers at the default learning rate.
const STEPS_ENOUGH: u64 = 100;
/// More epochs than these learn rows by heart.
const EPOCHS_MANY: u64 = 10;
/// Rows of a batch,
const BATCH: usize = 8;
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

/// Chooses what was left open by the number of rows; returns what was chosen and why, if that is not what is usual.
pub fn choose(config: &mut TrainConfig, open: Open, rows: usize) -> Option<String> {
    let mut chosen = Vec::new();
    if open.batch_size {
        let most = (rows / STEPS_AN_EPOCH).clamp(1, BATCH);
        // 1, 2, 4 or 8.
        config.batch_size = 1 << most.ilog2();
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
    let rows = if rows == 1 { "1 row".to_owned() } else { format!("{rows} rows") };
    (!chosen.is_empty()).then(|| format!("{} chosen, as {rows} teach little in fewer steps", chosen.join(" and ")))
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
