//! What goes wrong with a run, why, and what to do: one table. Errors of a run, `runs show` and `doctor` take their words from it, so that
//! a failure is explained in the same words wherever it is met.

use std::fmt;
use std::io;

use anyhow::Error;
use serde::Serialize;
use serde_json::Value;

use crate::progress::size;
use crate::runs::{Entry, Status, events, trainings};

/// A failure that is known.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Trouble {
    /// Its name, for programs.
    pub name: &'static str,
    /// What happened.
    pub cause: &'static str,
    /// What to do.
    pub remedy: &'static str,
    /// Words of an error by which it is known.
    #[serde(skip)]
    signs: &'static [&'static str],
}

/// Too little memory, found before it was begun.
pub const MEMORY: Trouble = Trouble {
    name: "memory",
    cause: "the training needs more memory than this machine, or its container, can give it now",
    remedy: "close other programs, or take less: --gradient-checkpointing, a smaller --pass-tokens, --strategy qlora, a shorter --max-seq-len, a smaller base; `homeroom plan` has the figures of each, --fit chooses what keeps the step",
    signs: &["of memory are needed, and", "of memory are free", "Cannot allocate memory"],
};
/// The system has ended the process, as memory was used up.
pub const KILLED_FOR_MEMORY: Trouble = Trouble {
    name: "killed-for-memory",
    cause: "the system ended the process without a word, when hardly any memory was left",
    remedy: "close other programs and go on from the last checkpoint by `homeroom resume RUN`; if that ends so again, start anew with --fit, which takes smaller passes for the same steps",
    signs: &[],
};
/// The process was ended otherwise.
pub const KILLED: Trouble = Trouble {
    name: "killed",
    cause: "the process ended without a word: by a signal, with its session, or as the machine went off",
    remedy: "`homeroom resume RUN` goes on from the last checkpoint; `nohup`, `tmux` or `systemd-run` keep a run alive when its session ends",
    signs: &[],
};
/// No room on a disk.
pub const DISK: Trouble = Trouble {
    name: "disk",
    cause: "the disk that it writes to is full, or a quota or a limit of file sizes is reached",
    remedy: "make room (`homeroom runs list` and `homeroom list-models` show what takes some, `homeroom runs rm` and `homeroom rm` remove it), or set HOMEROOM_HOME to a larger disk; then `homeroom resume RUN` goes on from the last checkpoint",
    signs: &["No space left on device", "Disk quota exceeded", "File too large", "MiB are needed here, and"],
};
/// A place that cannot be written.
pub const READ_ONLY: Trouble = Trouble {
    name: "read-only",
    cause: "the place that it writes to is not this user's, or is mounted read-only",
    remedy: "name another --output-dir, or set HOMEROOM_HOME to a directory of your own",
    signs: &["Read-only file system", "Permission denied", "cannot write here"],
};
/// The numbers of a training are no longer good.
pub const NUMBERS: Trouble = Trouble {
    name: "diverged",
    cause: "the loss rose instead of falling, or was no number any more: the learning rate is too high for these rows, or the base is damaged",
    remedy: "start anew with a third of the learning rate (--learning-rate), and look at the rows with `homeroom preview`",
    signs: &[
        "the loss diverges",
        "the loss is NaN",
        "the loss is inf",
        "the loss after its update is",
        "a gradient is not finite",
        "its update is beyond all numbers",
        "a reward is not finite",
    ],
};
/// A model whose files are not whole.
pub const DAMAGED: Trouble = Trouble {
    name: "damaged-model",
    cause: "a file of the model is cut short, missing or damaged, as after a download or a copy that was broken off",
    remedy: "fetch it again: `homeroom pull NAME` completes and checks a model of the hub; of a copy compare the sizes with the original",
    signs: &[
        "not a whole safetensors file",
        "the file may be cut short",
        "neither config.json nor",
        "download or copy the weights, too",
        "tokenizer.json: cannot open",
    ],
};
/// A model that this program does not run.
pub const UNSUPPORTED: Trouble = Trouble {
    name: "unsupported-model",
    cause: "the model is of a family that this program does not run",
    remedy: "take one of a family that is known; the README's table has all, `homeroom list-models` those that are here",
    signs: &["this model cannot be run"],
};
/// A model that is not here.
pub const MISSING: Trouble = Trouble {
    name: "missing-model",
    cause: "no model of that name is on this machine, or the hub did not give it",
    remedy: "`homeroom list-models` shows what is here, `homeroom pull owner/name` downloads one of the hub; gated ones want HF_TOKEN",
    signs: &["no such model", "not on this machine", "no model of that name is on this machine"],
};
/// A base that is not what it was.
pub const CHANGED: Trouble = Trouble {
    name: "changed-base",
    cause: "files of the base are not those that the run began with",
    remedy: "put the old files back and go on by `homeroom resume RUN`, or start anew",
    signs: &[
        "it was trained on another base",
        "the adapter belongs to another base",
        "the file was shortened while it was in use",
        "it was written while it was read",
    ],
};
/// A strategy that cannot be loaded.
pub const STRATEGY: Trouble = Trouble {
    name: "strategy",
    cause: "the training strategy is not there, or may not be loaded",
    remedy: "`homeroom plugins list` shows what is found and why not; `homeroom plugins lock NAME` trusts one of your own",
    signs: &["unknown strategy", "it is not in plugins.lock", "since it was locked", "no strategy can be loaded"],
};
/// Rows that cannot be learned from.
pub const ROWS: Trouble = Trouble {
    name: "rows",
    cause: "rows of the training file are not what the objective learns from, or are too long",
    remedy: "`homeroom preview FILE` shows each as the model sees it, with what is wrong by line; --on-long-row truncate cuts long ones",
    signs: &["tokens, the limit is", "nothing to train on"],
};
/// A graphics processor was asked for.
pub const CUDA: Trouble = Trouble {
    name: "cuda",
    cause: "this build of the program computes on the processor; no CUDA and no other graphics processor is used, nor any driver needed",
    remedy: "leave --device and CUDA_VISIBLE_DEVICES out; `homeroom doctor` says what the processor has, `homeroom plan` how long a training takes on it",
    signs: &["CUDA"],
};
/// A training that takes much longer than before.
pub const STUCK: Trouble = Trouble {
    name: "stuck",
    cause: "a step takes many times as long as those before: another program has the processor, or memory is short and the machine swaps",
    remedy: "look with `top` and `free -h`; what is computed is not lost: Ctrl-C ends the run at a checkpoint, `homeroom resume RUN` goes on, with --fit a new one takes less memory",
    signs: &[],
};

/// All of them that an error's words tell, the particular ones first.
const OF_ERRORS: [Trouble; 11] =
    [CUDA, MEMORY, DISK, NUMBERS, DAMAGED, UNSUPPORTED, CHANGED, STRATEGY, MISSING, READ_ONLY, ROWS];

impl fmt::Display for Trouble {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "cause: {}\nremedy: {}", self.cause, self.remedy)
    }
}

/// The failure that an error is, if it is known.
pub fn of(error: &Error) -> Option<Trouble> {
    let io = error.chain().filter_map(|cause| cause.downcast_ref::<io::Error>());
    let by_kind = io.map(io::Error::kind).find_map(|kind| match kind {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded | io::ErrorKind::FileTooLarge => Some(DISK),
        io::ErrorKind::OutOfMemory => Some(MEMORY),
        io::ErrorKind::ReadOnlyFilesystem => Some(READ_ONLY),
        _ => None,
    });
    by_kind.or_else(|| in_words(&format!("{error:#}")))
}

/// The variable that names graphics processors to use, if one does: what names none is set to keep from them.
pub fn visible_devices() -> Option<&'static str> {
    let names = |name: &&str| {
        let value = std::env::var(name).unwrap_or_default();
        !matches!(value.trim(), "" | "-1" | "none" | "NoDevFiles")
    };
    ["CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES"].into_iter().find(names)
}

/// The failure that the words of an error tell; names of files in it tell nothing, but for those that every model has.
pub fn in_words(error: &str) -> Option<Trouble> {
    const OF_A_MODEL: &str = "tokenizer.json";
    let told = |word| match str::rsplit_once(word, ['/', '\\']) {
        Some((_, name)) => Some(name).filter(|name| name.starts_with(OF_A_MODEL)),
        None => Some(word),
    };
    let words = error.split_whitespace().filter_map(told).collect::<Vec<_>>().join(" ");
    OF_ERRORS.into_iter().find(|trouble| trouble.signs.iter().any(|sign| words.contains(sign)))
}

/// What a run's record tells of how it failed.
#[derive(Clone, Debug, Serialize)]
pub struct Explained {
    /// The failure.
    #[serde(flatten)]
    pub trouble: Trouble,
    /// What in the record says so.
    pub because: String,
}

/// Explains a run that failed or was killed; `None`: it did neither, or failed in a way that is not known.
pub fn of_run(run: &Entry) -> Option<Explained> {
    let record = run.record.as_ref()?;
    match run.status {
        Status::Failed => {
            let error = record.error.as_deref()?;
            let trouble = in_words(error)?;
            Some(Explained { trouble, because: error.lines().next().unwrap_or_default().to_owned() })
        }
        Status::Killed => Some(killed(&events(&run.path))),
        _ => None,
    }
}

impl Explained {
    /// What to do, with the run's name; of a run of which nothing can go on without what would go on.
    pub fn remedy(&self, run: &Entry) -> String {
        let goes_on = run.can_go_on();
        let parts = self.trouble.remedy.split("; ").filter(|part| goes_on || !part.contains("homeroom resume RUN"));
        parts.collect::<Vec<_>>().join("; ").replace("RUN", &run.id)
    }
}

/// Where less than this part of all memory was left, or a peak came within it of all, that is why a process ended without a word.
const NEAR_PART: u64 = 8;

/// Why a run whose record ends without an end was ended, by what its steps say of memory.
fn killed(events: &[Value]) -> Explained {
    let training = trainings(events).pop();
    let done = training.as_ref().and_then(|training| training.steps.last()).map_or(0, |step| step.step);
    let planned = training.as_ref().and_then(|training| training.planned());
    let of = planned.map(|planned| format!(" of {planned}")).unwrap_or_default();
    let place = format!("its record ends after step {done}{of}, without an end");
    let number = |key: &str| events.iter().rev().find_map(|event| event["memory"][key].as_u64());
    let (peak, left, all) = (number("peak_bytes"), number("left_bytes"), number("all_bytes"));
    let planned = number("planned_bytes");
    let stalled =
        events.iter().rev().take_while(|event| event["event"] != "step").find(|event| event["event"] == "stalled");
    let near = |bytes: u64, all: u64| bytes > all - all / NEAR_PART;
    let for_memory = all.and_then(|all| match (left, peak, planned) {
        (Some(left), Some(peak), _) if left < all / NEAR_PART || near(peak, all) => Some(format!(
            "{place}; it took {} at the highest, and {} of {} were left when it was last seen",
            size(peak),
            size(left),
            size(all)
        )),
        (.., Some(planned)) if near(planned, all) => {
            Some(format!("{place}; by the plan it takes {}, and {} are all that there is", size(planned), size(all)))
        }
        _ => None,
    });
    match (for_memory, stalled) {
        (Some(because), _) => Explained { trouble: KILLED_FOR_MEMORY, because },
        (None, Some(event)) => {
            let doing = event["doing"].as_str().unwrap_or("in a step");
            let because = format!("{place}; it was {doing} for {} s", event["seconds"].as_u64().unwrap_or(0));
            Explained { trouble: STUCK, because }
        }
        (None, None) => Explained { trouble: KILLED, because: place },
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::path::Path;

    use anyhow::{Context, anyhow};
    use serde_json::json;

    use super::*;

    #[test]
    fn an_error_is_known_by_its_kind_whatever_is_said_and_else_by_its_words() {
        let full = || io::Error::from(io::ErrorKind::StorageFull);
        assert_eq!(of(&Error::from(full()).context("a.safetensors: cannot write")), Some(DISK));
        assert_eq!(of(&anyhow!("/x: 70 MiB are needed here, and 3 MiB are free")), Some(DISK));
        assert_eq!(of(&anyhow!("step 3: the loss is NaN; try a lower learning rate")), Some(NUMBERS));
        assert_eq!(in_words("about 9.1 GB of memory are needed, and 8.0 GB can be had"), Some(MEMORY));
        assert_eq!(of(&anyhow!("the sheep are out")), None);
        let read: Result<(), Error> = Err(io::Error::from(io::ErrorKind::NotFound)).context("no such thing");
        assert_eq!(read.err().as_ref().and_then(of), None);
    }

    #[test]
    fn each_has_a_cause_and_a_remedy_and_no_two_share_a_name_or_a_sign() {
        let all: Vec<Trouble> = OF_ERRORS.into_iter().chain([KILLED, KILLED_FOR_MEMORY, STUCK]).collect();
        for (at, one) in all.iter().enumerate() {
            assert!(!one.cause.is_empty() && !one.remedy.is_empty() && !one.cause.ends_with('.'), "{one:?}");
            for other in &all[at + 1..] {
                assert_ne!(one.name, other.name);
                let shares =
                    |sign: &&str| other.signs.iter().any(|other| other.contains(*sign) || sign.contains(other));
                assert!(!one.signs.iter().any(shares), "{one:?} {other:?}");
            }
        }
    }

    /// What the system says, and what numbers and names are put into.
    const NOT_OURS: [&str; 9] = [
        "Cannot allocate memory",
        "No space left on device",
        "Disk quota exceeded",
        "File too large",
        "Read-only file system",
        "Permission denied",
        "the loss is NaN",
        "the loss is inf",
        "tokenizer.json: cannot open",
    ];

    /// A sign that no error holds any more explains nothing.
    #[test]
    fn each_sign_stands_in_a_message_of_ours() {
        fn gather(directory: &Path, text: &mut String) {
            for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
                let path = entry.path();
                if path.is_dir() {
                    gather(&path, text);
                } else if path.extension().is_some_and(|extension| extension == "rs") && !path.ends_with("troubles.rs")
                {
                    text.push_str(&fs::read_to_string(&path).unwrap_or_default());
                }
            }
        }
        let mut text = String::new();
        let runtime = Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("a crate lies in a folder");
        ["host/src", "engine/src"].iter().for_each(|part| gather(&runtime.join(part), &mut text));
        for sign in OF_ERRORS.iter().flat_map(|trouble| trouble.signs).filter(|sign| !NOT_OURS.contains(sign)) {
            assert!(text.contains(sign), "no message has `{sign}`");
        }
    }

    #[test]
    fn a_file_is_not_taken_for_what_happened() {
        assert_eq!(in_words("/data/CUDA/rows.csv: line 3: not JSON"), None);
        assert_eq!(in_words("/x/lib.so: it has changed since it was locked"), Some(STRATEGY));
    }

    #[test]
    fn a_run_that_ends_without_a_word_is_explained_by_what_it_said_of_memory() {
        let step = |step: u64, left: u64| {
            json!({"event": "step", "training": 1, "step": step, "loss": 2.0,
                "memory": {"peak_bytes": 700, "left_bytes": left, "all_bytes": 1000}})
        };
        let started = json!({"event": "started", "training": 1, "steps": 9});
        let short = killed(&[started.clone(), step(1, 400), step(2, 100)]);
        assert_eq!(short.trouble, KILLED_FOR_MEMORY);
        assert_eq!(
            short.because,
            "its record ends after step 2 of 9, without an end; it took 700 B at the highest, and 100 B of 1.00 kB were left when it was last seen"
        );
        assert_eq!(killed(&[started.clone(), step(1, 400)]).trouble, KILLED);
        // Before the first step the plan is all that is known.
        let memory = json!({"planned_bytes": 950, "left_bytes": 600, "all_bytes": 1000});
        let mut planned = started.clone();
        planned["memory"] = memory;
        let first = killed(&[planned]);
        assert_eq!(first.trouble, KILLED_FOR_MEMORY);
        assert!(
            first.because.ends_with("by the plan it takes 950 B, and 1.00 kB are all that there is"),
            "{}",
            first.because
        );
        let stalled = json!({"event": "stalled", "training": 1, "doing": "in step 2 of 9", "seconds": 300});
        let stuck = killed(&[started, step(1, 400), stalled]);
        assert_eq!(stuck.trouble, STUCK);
        assert!(stuck.because.ends_with("it was in step 2 of 9 for 300 s"), "{}", stuck.because);
    }
}
