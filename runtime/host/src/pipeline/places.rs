//! What a script may read. Its author need not be its user: a text in a script names what a parameter names, which the user sees
//! and sets, or what lies below the directory of the pipeline's TOML file; or a model of the Hugging Face hub by its name, which anybody
//! can read there (see [`super::api::Session::locate`]). Only regular files are read, so that nothing hangs on a
//! pipe or never ends, as `/dev/zero` does.

use std::fs::File;
use std::path::{Component, Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use homeroom_engine::data::{Source, Sources};
use homeroom_engine::files::open_regular;

use super::errors::short;
use crate::hub::HubName;

/// Longest path that a script may say, in bytes; systems admit as much.
const PATH_BYTES_MAX: usize = 4096;

/// Where a run's script may read.
pub struct Places {
    /// Directory of the script: what its paths are relative to.
    scripts: PathBuf,
    /// Directory of the TOML file, symbolic links resolved.
    folder: PathBuf,
    /// What parameters name: absolute paths, and names of models.
    named: Vec<PathBuf>,
}

/// A path that a script may read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    /// Where it is; symbolic links are resolved unless a parameter names it.
    pub path: PathBuf,
    /// Whether a parameter names it; else it is below the TOML file's directory, and what it leads to has to be there too.
    pub named: bool,
    /// Its name on the Hugging Face hub, if that is what it was found by.
    pub hub_name: Option<HubName>,
}

impl Place {
    /// A model in Hugging Face's cache. Whoever wrote it is a stranger as the script's author is.
    pub fn of_hub(path: PathBuf, name: HubName) -> Self {
        Self { path, named: true, hub_name: Some(name) }
    }

    /// Whether what it says of other models is the user's word.
    pub fn is_trusted(&self) -> bool {
        self.named && self.hub_name.is_none()
    }
}

/// Files of rows that a script reads.
#[derive(Debug, Default)]
pub struct OpenRows {
    /// Those to learn from.
    pub files: Vec<(PathBuf, File)>,
    /// Held-out ones.
    pub held_out: Vec<(PathBuf, File)>,
    /// What of a folder is not read.
    pub notes: Vec<String>,
}

impl Places {
    /// For a script in `scripts`, declared in the directory `folder`, with parameters that name `named`.
    ///
    /// # Errors
    /// When one of the directories is not there.
    pub fn new(scripts: &Path, folder: &Path, named: Vec<PathBuf>) -> Result<Self> {
        let real = |path: &Path| path.canonicalize().with_context(|| path.display().to_string());
        Ok(Self { scripts: real(scripts)?, folder: real(folder)?, named })
    }

    /// The place that a script means by a text, if something is there.
    ///
    /// # Errors
    /// When it may not read there. Whether something is there is not said then.
    pub fn find(&self, text: &str) -> Result<Option<Place>> {
        ensure!(text.len() <= PATH_BYTES_MAX, "a path of {} bytes is too long", text.len());
        if let Some(path) = self.named.iter().find(|path| path.as_os_str() == text) {
            // A model's name is no path, wherever the program was started.
            let there = path.is_absolute() && path.exists();
            return Ok(there.then(|| Place { path: path.clone(), named: true, hub_name: None }));
        }
        let path = plain(&self.scripts.join(text));
        if !path.starts_with(&self.folder) {
            return Err(self.outside(text));
        }
        let Ok(real) = path.canonicalize() else { return Ok(None) };
        if !real.starts_with(&self.folder) {
            return Err(self.outside(text));
        }
        Ok(Some(Place { path: real, named: false, hub_name: None }))
    }

    /// Whether nothing of that name lies beside the script.
    pub fn is_vacant(&self, name: &str) -> bool {
        self.scripts.join(name).symlink_metadata().is_err()
    }

    fn outside(&self, text: &str) -> anyhow::Error {
        anyhow::anyhow!(
            "`{}`: a script reads what a parameter of type `path` or `model` names, and what is below {}, the directory of its TOML file",
            short(text),
            self.folder.display()
        )
    }

    /// Opens the file that a script means.
    ///
    /// # Errors
    /// When it may not read there, nothing is there, or it is no regular file.
    pub fn open(&self, text: &str) -> Result<(PathBuf, File)> {
        let Some(place) = self.find(text)? else {
            bail!("there is no file {}", short(&self.scripts.join(text).display().to_string()));
        };
        let file = self.open_at(&place)?;
        Ok((place.path, file))
    }

    /// Opens the files of rows that a script means: a file, or those of a folder. The second list are held-out ones of a folder that has
    /// such. What of a folder is not read is said in the notes.
    ///
    /// # Errors
    /// As [`Self::open`] of any, and when a folder has no rows.
    pub fn open_rows(&self, text: &str) -> Result<OpenRows> {
        let Some(place) = self.find(text)?.filter(|place| place.path.is_dir()) else {
            return Ok(OpenRows { files: vec![self.open(text)?], ..OpenRows::default() });
        };
        let none = || bail!("a script has no standard input");
        let sources = Sources::of(std::slice::from_ref(&place.path), none)?;
        let open = |files: &[Source]| -> Result<Vec<(PathBuf, File)>> {
            let open = |file: &Source| match place.named {
                true => Ok((file.name.clone(), self.open_at(&Place { path: file.name.clone(), ..place.clone() })?)),
                // It may be a link to elsewhere.
                false => self.open(&file.name.display().to_string()),
            };
            files.iter().map(open).collect()
        };
        Ok(OpenRows { files: open(&sources.files)?, held_out: open(&sources.held_out)?, notes: sources.notes })
    }

    /// Opens a file. What was opened is what is looked at: a path can change in between.
    fn open_at(&self, place: &Place) -> Result<File> {
        let file = open_regular(&place.path)?;
        #[cfg(target_os = "linux")]
        if !place.named {
            use std::os::fd::AsRawFd;
            let opened = std::fs::read_link(format!("/proc/self/fd/{}", file.as_raw_fd()));
            if opened.is_ok_and(|opened| !opened.starts_with(&self.folder)) {
                return Err(self.outside(&place.path.display().to_string()));
            }
        }
        Ok(file)
    }

    /// Refuses a model that is not regular files, or whose files are links to somewhere that a script may not read.
    ///
    /// # Errors
    /// As said; or when it cannot be read.
    pub fn check_model(&self, place: &Place) -> Result<()> {
        let cannot = || format!("{}: cannot read", place.path.display());
        let kind = std::fs::metadata(&place.path).with_context(cannot)?;
        if !kind.is_dir() {
            return self.open_at(place).map(|_| ());
        }
        for entry in std::fs::read_dir(&place.path).with_context(cannot)? {
            let path = entry.with_context(cannot)?.path();
            // A link that leads nowhere is as good as no file.
            let Ok(kind) = std::fs::metadata(&path) else { continue };
            ensure!(kind.is_file() || kind.is_dir(), "{}: not a regular file", path.display());
            if !place.named && !path.canonicalize().is_ok_and(|real| real.starts_with(&self.folder)) {
                return Err(self.outside(&path.display().to_string()));
            }
        }
        Ok(())
    }
}

/// A path without `.` and `..`, without a look at what is there.
fn plain(path: &Path) -> PathBuf {
    let mut out = PathBuf::new();
    for part in path.components() {
        match part {
            Component::CurDir => {}
            Component::ParentDir => {
                out.pop();
            }
            other => out.push(other),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use homeroom_engine::files::read_text;

    use super::*;

    #[test]
    fn a_script_reads_below_the_folder_and_what_parameters_name() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().canonicalize().unwrap();
        let write = |name: &str| {
            let path = root.join(name);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(&path, "x").unwrap();
            path
        };
        let (mine, secret, other) = (write("project/sub/rows"), write("secret"), write("other/rows"));
        write("project/s.lua");
        #[cfg(unix)]
        {
            std::os::unix::fs::symlink(&secret, root.join("project/link")).unwrap();
            std::os::unix::fs::symlink(&root, root.join("project/up")).unwrap();
        }
        let project = root.join("project");
        let places = Places::new(&project, &project, vec![other.clone()]).unwrap();
        for text in ["sub/rows", "./sub/../sub/rows", mine.to_str().unwrap()] {
            let expected = Place { path: mine.clone(), named: false, hub_name: None };
            assert_eq!(places.find(text).unwrap(), Some(expected), "{text}");
        }
        assert_eq!(
            places.find(other.to_str().unwrap()).unwrap(),
            Some(Place { path: other, named: true, hub_name: None })
        );
        assert_eq!(places.find("sub/gone").unwrap(), None);
        let long = "x".repeat(5000);
        for text in [
            "../secret",
            "../gone",
            "sub/../../secret",
            secret.to_str().unwrap(),
            "/dev/zero",
            "/",
            long.as_str(),
            #[cfg(unix)]
            "link",
            #[cfg(unix)]
            "up/secret",
        ] {
            assert!(places.find(text).is_err(), "{text}");
        }
    }

    #[cfg(unix)]
    #[test]
    fn only_regular_files_are_opened_and_none_is_waited_for() {
        let dir = tempfile::tempdir().unwrap();
        let pipe = dir.path().join("pipe");
        let name = std::ffi::CString::new(pipe.to_str().unwrap()).unwrap();
        // SAFETY: the name is a C string.
        assert_eq!(unsafe { libc::mkfifo(name.as_ptr(), 0o600) }, 0);
        let socket = dir.path().join("socket");
        let _listening = std::os::unix::net::UnixListener::bind(&socket).unwrap();
        for path in [&pipe, Path::new("/dev/zero"), Path::new("/dev/null"), dir.path(), &socket] {
            assert!(open_regular(path).is_err(), "{}", path.display());
        }
        let file = dir.path().join("file");
        std::fs::write(&file, "four").unwrap();
        assert_eq!(read_text(&file, 4).unwrap(), "four");
        assert!(format!("{:#}", read_text(&file, 3).unwrap_err()).contains("longer than 3 bytes"));
    }
}
