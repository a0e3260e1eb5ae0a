//! The files that models, adapters and runs are made of, and how results are written: whole or not at all, and private where they are.

pub(crate) mod bitsandbytes;
mod claimed;
pub mod digest;
mod exchange;
pub mod gguf;
mod known;
mod litter;
mod lock;
pub mod mapped;
mod modes;
mod new_directory;
mod regular;
mod remove;
mod replace;
mod space;
mod spilled;
mod sync;
mod temporary;
pub mod tensors;
#[cfg(test)]
mod tests;
mod vacant;

pub use self::claimed::ClaimedFile;
pub use self::known::{
    CONFIG_FILE, HOMEROOM_FILE, TEMPLATES_DIR, TEXT_FILES, WEIGHTS_FILE, named_templates, replaceable,
    replaceable_but_for, result_files,
};
pub use self::litter::Scratch;
pub use self::lock::Lock;
pub use self::modes::{keep_private, make_directory, open_to_readers, prepare};
pub use self::new_directory::{Kept, NewDirectory, abandon_all};
pub use self::regular::{SMALL_FILE_BYTES_MAX, broken_link, is_named, open_regular, read_bytes, read_text, utf8};
pub(crate) use self::regular::{parse_object, read_if_there};
pub use self::remove::take_away;
pub use self::replace::replace_file;
pub use self::space::{bytes_below, bytes_below_few, ensure_room, free_bytes};
pub use self::spilled::{Spill, Spilled, nameless};
pub use self::vacant::{recover, recover_all, vacant};
