//! TensorBoard's event files, `events.out.tfevents.<seconds>.<host>.<process>.<number>`, with the tags that transformers writes.
//!
//! A file is a row of TFRecords: length as u64, its checksum, the bytes, their checksum, all little-endian. The bytes of a record are a
//! protocol buffer `Event`; the few fields that scalars take are written by hand. A run that goes on opens another file, whose first
//! event says from which step on those of the older ones no longer count.
//!
//! Sources: `tensorflow/core/lib/io/record_writer.h` (TFRecord, masked CRC-32C), `tensorboard/compat/proto/event.proto` and
//! `summary.proto` (field numbers), `torch/utils/tensorboard/writer.py` (`purge_step`), transformers'
//! `integrations/integration_utils.py` (`rewrite_logs`), <https://protobuf.dev/programming-guides/encoding/>.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, ErrorKind, Write};
use std::path::Path;
use std::sync::{Mutex, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use homeroom_engine::files::make_directory;
use serde_json::Value;

use super::history::goes_back;
use crate::private;
use crate::progress::line;

/// What names of event files begin with.
const PREFIX: &str = "events.out.tfevents.";

/// Where a number of an event stands in it, and its tag.
const TAGS: [(&str, &str, &str); 10] = [
    ("step", "/loss", "train/loss"),
    ("step", "/grad_norm", "train/grad_norm"),
    ("step", "/learning_rate", "train/learning_rate"),
    ("step", "/rewards/chosen", "train/rewards/chosen"),
    ("step", "/rewards/rejected", "train/rewards/rejected"),
    ("step", "/rewards/accuracy", "train/rewards/accuracies"),
    ("step", "/rewards/margin", "train/rewards/margins"),
    ("eval", "/eval_loss", "eval/loss"),
    ("eval", "/perplexity", "eval/perplexity"),
    ("eval", "/token_accuracy", "eval/token_accuracy"),
];

/// The event files of a run's trainings, each opened by its first number. `None`: it cannot be written, which was said.
#[derive(Default)]
pub struct Boards(Mutex<BTreeMap<u64, Option<Scalars>>>);

impl Boards {
    /// Writes what an event says in numbers.
    pub fn write(&self, run: &Path, event: &Value) {
        let (kind, step) = (event["event"].as_str().unwrap_or_default(), event["step"].as_u64());
        let back = goes_back(kind, event);
        let (Some(step), true) = (step, back.is_some() || TAGS.iter().any(|(of, ..)| *of == kind)) else { return };
        let number = event["training"].as_u64().unwrap_or(1);
        let directory = run.join("trainings").join(number.to_string());
        let mut boards = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let first = back.map_or(step, |back| back + 1);
        let opened = match boards.remove(&number) {
            None => make_directory(&directory).and_then(|()| Ok(Some(Scalars::open(&directory, first)?))),
            Some(board) => Ok(board),
        };
        let written = opened.and_then(|board| match board {
            None => Ok(None),
            Some(mut board) => board.write(event).map(|()| Some(board)).map_err(anyhow::Error::from),
        });
        let board = written.unwrap_or_else(|error| {
            let place = directory.display();
            line(format_args!("note: {place}: no more is written for TensorBoard ({error:#}); the run goes on"));
            None
        });
        boards.insert(number, board);
    }
}

/// The event file of a training.
struct Scalars(File);

impl Scalars {
    /// Opens a new file in a directory. If there are older ones, what they say of `step` and later steps no longer counts.
    ///
    /// # Errors
    /// When it cannot be written.
    fn open(directory: &Path, step: u64) -> io::Result<Self> {
        let is_older = |entry: &fs::DirEntry| entry.file_name().to_string_lossy().starts_with(PREFIX);
        let goes_on = fs::read_dir(directory)?.flatten().any(|entry| is_older(&entry));
        let now = now();
        let mut options = private::options();
        options.append(true).create_new(true);
        for number in 0.. {
            // Readers take the files in the order of their names.
            let name = format!("{PREFIX}{:010}.{}.{}.{number}", now as u64, host(), std::process::id());
            match options.open(directory.join(name)) {
                Err(error) if error.kind() == ErrorKind::AlreadyExists => {}
                Err(error) => return Err(error),
                Ok(file) => {
                    let mut scalars = Self(file);
                    scalars.record(&version(now))?;
                    if goes_on {
                        scalars.purge(now, step)?;
                    }
                    return Ok(scalars);
                }
            }
        }
        unreachable!("numbers do not end")
    }

    /// Writes what an event of a run says in numbers, if it says any. One that was rewound takes back what was written after it.
    ///
    /// # Errors
    /// When it cannot be written.
    fn write(&mut self, event: &Value) -> io::Result<()> {
        let (now, step) = (now(), event["step"].as_u64().unwrap_or(0));
        let kind = event["event"].as_str().unwrap_or_default();
        if let Some(back) = goes_back(kind, event) {
            return self.purge(now, back + 1);
        }
        let values = TAGS.iter().filter(|(of, ..)| *of == kind);
        let values = values.filter_map(|(_, place, tag)| Some((*tag, event.pointer(place)?.as_f64()?)));
        let values: Vec<_> = values.collect();
        if values.is_empty() { Ok(()) } else { self.record(&scalars(now, step, &values)) }
    }

    fn purge(&mut self, now: f64, step: u64) -> io::Result<()> {
        self.record(&restart(now, step))
    }

    /// In one piece, so that a kill tears none but the last.
    fn record(&mut self, event: &[u8]) -> io::Result<()> {
        let before = self.0.metadata()?.len();
        // Behind half a record nothing would be read.
        self.0.write_all(&record(event)).inspect_err(|_| _ = self.0.set_len(before))
    }
}

/// Seconds since 1970.
fn now() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |since| since.as_secs_f64())
}

#[cfg(unix)]
fn host() -> String {
    let mut name = [0u8; 256];
    // SAFETY: the buffer is as long as is said, and a zero stays behind what is written into it.
    let failed = unsafe { libc::gethostname(name.as_mut_ptr().cast(), name.len() - 1) };
    let name = name.split(|byte| *byte == 0).next().filter(|name| failed == 0 && !name.is_empty());
    let plain = |c: char| if c.is_ascii_alphanumeric() || "-.".contains(c) { c } else { '-' };
    name.map_or_else(|| "localhost".to_owned(), |name| String::from_utf8_lossy(name).chars().map(plain).collect())
}

#[cfg(not(unix))]
fn host() -> String {
    "localhost".to_owned()
}

/// A TFRecord.
fn record(data: &[u8]) -> Vec<u8> {
    let length = (data.len() as u64).to_le_bytes();
    let mut record = length.to_vec();
    record.extend(masked_crc(&length).to_le_bytes());
    record.extend(data);
    record.extend(masked_crc(data).to_le_bytes());
    record
}

/// CRC-32C (Castagnoli), turned and shifted as TFRecord wants it.
fn masked_crc(data: &[u8]) -> u32 {
    let mut crc = !0u32;
    for byte in data {
        crc ^= u32::from(*byte);
        for _ in 0..8 {
            crc = (crc >> 1) ^ (0x82f6_3b78 & (crc & 1).wrapping_neg());
        }
    }
    (!crc).rotate_right(15).wrapping_add(0xa282_ead8)
}

/// The first event of a file: `wall_time` = 1 (double), `file_version` = 3 (string).
fn version(time: f64) -> Vec<u8> {
    [fixed64(1, time), bytes(3, b"brain.Event:2")].concat()
}

/// An event of some scalars: `step` = 2 (int64), `summary` = 5, in that `value` = 1, in that `tag` = 1 and `simple_value` = 2 (float).
fn scalars(time: f64, step: u64, values: &[(&str, f64)]) -> Vec<u8> {
    let value = |(tag, value): &(&str, f64)| bytes(1, &[bytes(1, tag.as_bytes()), fixed32(2, *value as f32)].concat());
    let summary: Vec<u8> = values.iter().flat_map(value).collect();
    [fixed64(1, time), whole(2, step), bytes(5, &summary)].concat()
}

/// `session_log` = 7 with `status` = 1 (START = 1): steps from this one on that were read before no longer count.
fn restart(time: f64, step: u64) -> Vec<u8> {
    [fixed64(1, time), whole(2, step), bytes(7, &whole(1, 1))].concat()
}

fn varint(mut number: u64) -> Vec<u8> {
    let mut out = Vec::new();
    while number >= 0x80 {
        out.push(number as u8 | 0x80);
        number >>= 7;
    }
    out.push(number as u8);
    out
}

/// A whole number; 0 is what a field has that is not written.
fn whole(field: u64, number: u64) -> Vec<u8> {
    if number == 0 { Vec::new() } else { [varint(field << 3), varint(number)].concat() }
}

fn fixed64(field: u64, number: f64) -> Vec<u8> {
    [varint(field << 3 | 1), number.to_le_bytes().to_vec()].concat()
}

fn bytes(field: u64, bytes: &[u8]) -> Vec<u8> {
    [varint(field << 3 | 2), varint(bytes.len() as u64), bytes.to_vec()].concat()
}

fn fixed32(field: u64, number: f32) -> Vec<u8> {
    [varint(field << 3 | 5), number.to_le_bytes().to_vec()].concat()
}

#[cfg(test)]
mod tests {
    use anyhow::Result;
    use serde_json::json;

    use super::*;

    /// The same events as TensorBoard's own writer has them: tests/fixtures/make_tensorboard.py.
    #[test]
    fn events_are_the_bytes_that_tensorboard_writes() {
        let ours = [
            version(1_700_000_000.25),
            scalars(
                1_700_000_001.5,
                0,
                &[("train/loss", 2.5), ("train/grad_norm", 0.0), ("train/learning_rate", 2e-4)],
            ),
            scalars(1_700_000_002.75, 300, &[("eval/loss", f64::NAN)]),
            restart(1_700_000_003.0, 121),
            scalars(1_700_000_004.0, 1 << 40, &[("train/loss", -1.0)]),
        ];
        let ours: Vec<u8> = ours.iter().flat_map(|event| record(event)).collect();
        assert!(ours == include_bytes!("../../../../tests/fixtures/tensorboard/events.out.tfevents"));
    }

    #[test]
    fn each_training_that_goes_on_has_a_file_of_its_own() -> Result<()> {
        let place = tempfile::tempdir()?;
        for step in [1, 3] {
            let mut scalars = Scalars::open(place.path(), step)?;
            scalars.write(&json!({"event": "step", "step": step, "loss": 1.0}))?;
            // These say nothing in numbers.
            scalars.write(&json!({"event": "step", "step": step, "loss": null}))?;
            scalars.write(&json!({"event": "swapped", "step": step}))?;
        }
        let mut files = fs::read_dir(place.path())?.map(|entry| Ok(entry?.path())).collect::<Result<Vec<_>>>()?;
        files.sort();
        let lengths = files.iter().map(|file| Ok(fs::metadata(file)?.len())).collect::<Result<Vec<_>>>()?;
        let record = |event: &[u8]| record(event).len() as u64;
        let one = record(&version(0.0)) + record(&scalars(0.0, 1, &[("train/loss", 1.0)]));
        assert_eq!(lengths, [one, one + record(&restart(0.0, 3))]);
        Ok(())
    }
}
