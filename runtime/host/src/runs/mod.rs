//! Runs: what a training or a pipeline did, kept in `runs/<id>/` below `$HOMEROOM_HOME`, so that it can be read without this program.
//!
//! ```text
//! runs/algebra-1/
//!   run.json        kind, status, dates, command, version, processor, settings, result or error
//!   config.toml     the settings as resolved
//!   script.lua      a pipeline's script as it ran
//!   events.jsonl    one line an event: steps, evaluations, checkpoints, swaps, samples
//!   output.txt      what was printed
//!   result.json     what came of it
//!   report.html     all of it in one page
//!   adapters/1/     what a pipeline trained
//!   trainings/1/    checkpoints, `trainer_state.json`, TensorBoard event files
//!   steps/          results of a pipeline's verbs
//!   lock            held while the run lives: a run that says `running` without it was killed
//! ```
//!
//! [`directory`] writes a run, [`list`] reads them all, [`events`] are its lines, [`output`] keeps what is printed.

mod directory;
mod events;
mod list;
mod lock;
pub mod output;

pub use directory::{About, End, RunDirectory};
pub use events::{Events, events};
pub use list::{Entry, Kind, Status, find, list};
