//! The program's stdout, which is its result. What a plugin prints is no part of that, and goes to stderr.

use std::borrow::Cow;
use std::fs::File;
use std::io::{self, IsTerminal, Write};
use std::sync::OnceLock;

use serde::de::IgnoredAny;

use crate::terminal::{shown, shown_json};

static OWN: OnceLock<File> = OnceLock::new();

/// Keeps stdout for [`Stdout`], and sends to stderr what anything else in this process prints.
///
/// # Errors
/// When the system refuses.
#[cfg(unix)]
pub fn set_apart() -> io::Result<()> {
    use std::os::fd::AsFd;
    let own = io::stdout().as_fd().try_clone_to_owned()?;
    // SAFETY: both numbers are open descriptors of this process: the standard library opens those that are not.
    if unsafe { libc::dup2(libc::STDERR_FILENO, libc::STDOUT_FILENO) } < 0 {
        return Err(io::Error::last_os_error());
    }
    OWN.get_or_init(|| own.into());
    Ok(())
}

/// Does nothing here: what a plugin prints stands in the result.
///
/// # Errors
/// None.
#[cfg(not(unix))]
pub fn set_apart() -> io::Result<()> {
    Ok(())
}

/// The program's stdout.
pub struct Stdout;

impl Stdout {
    /// Whether somebody reads it as it is written.
    pub fn is_terminal(&self) -> bool {
        OWN.get().map_or_else(|| io::stdout().is_terminal(), File::is_terminal)
    }

    /// Columns of the terminal that reads it; `None` where none does, or one that does not say.
    #[cfg(unix)]
    pub fn width(&self) -> Option<usize> {
        use std::os::fd::AsRawFd;
        if !self.is_terminal() {
            return None;
        }
        let number = OWN.get().map_or_else(|| io::stdout().as_raw_fd(), AsRawFd::as_raw_fd);
        let mut size = libc::winsize { ws_row: 0, ws_col: 0, ws_xpixel: 0, ws_ypixel: 0 };
        // SAFETY: the descriptor is open, and `size` is what this request fills and outlives the call.
        let failed = unsafe { libc::ioctl(number, libc::TIOCGWINSZ, &raw mut size) };
        (failed == 0 && size.ws_col > 0).then(|| size.ws_col.into())
    }

    /// Columns of the terminal that reads it; here it is not asked.
    #[cfg(not(unix))]
    pub fn width(&self) -> Option<usize> {
        None
    }

    /// Writes a text that is whole: byte for byte, but on a terminal nothing that it would obey.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn text(&mut self, text: &str) -> io::Result<()> {
        let text = match self.is_terminal() {
            false => Cow::Borrowed(text),
            true if serde_json::from_str::<IgnoredAny>(text).is_ok() => shown_json(text),
            true => shown(text),
        };
        self.write_all(text.as_bytes())?;
        self.flush()
    }
}

impl Write for Stdout {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match OWN.get() {
            Some(mut own) => own.write(bytes),
            None => io::stdout().write(bytes),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        match OWN.get() {
            Some(mut own) => own.flush(),
            None => io::stdout().flush(),
        }
    }
}
