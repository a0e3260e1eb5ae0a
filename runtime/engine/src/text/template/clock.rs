//! What `strftime_now` says: Python's `datetime.now().strftime(format)`, which is in local time and knows of no time zone.
//!
//! A training holds the time at which it began, so that one that goes on, on another day, renders what it rendered before.

use std::sync::atomic::{AtomicI64, Ordering};

use anyhow::{Context, Result};
use jiff::civil::DateTime;
use jiff::fmt::strtime;
use jiff::tz::TimeZone;
use jiff::{Timestamp, Zoned};

/// The time that is held; no time has the smallest number.
static HELD: AtomicI64 = AtomicI64::new(NONE);
const NONE: i64 = i64::MIN;

/// Has the templates of this process say this time from now on, in seconds as of [`present_time`].
pub fn hold_time(seconds: i64) {
    HELD.store(seconds, Ordering::Relaxed);
}

/// The time that is held, or the present one.
pub fn time() -> i64 {
    held().unwrap_or_else(present_time)
}

/// The present local time, as seconds from 1970 began to what a clock on the wall shows.
pub fn present_time() -> i64 {
    // Of what a clock shows no time is out of range.
    Zoned::now().datetime().to_zoned(TimeZone::UTC).map_or(0, |time| time.timestamp().as_second())
}

fn held() -> Option<i64> {
    Some(HELD.load(Ordering::Relaxed)).filter(|seconds| *seconds != NONE)
}

/// The time where this machine is: the one that is held, or the present one.
pub(super) fn now() -> DateTime {
    held().and_then(|seconds| at(seconds).ok()).unwrap_or_else(|| Zoned::now().datetime())
}

/// That time as `strftime` writes it.
///
/// # Errors
/// When the format is none.
pub fn local_time(format: &str) -> Result<String> {
    write(format, now())
}

/// That many seconds after 1970 began, in UTC.
pub(super) fn at(unix_seconds: i64) -> Result<DateTime> {
    let time = Timestamp::from_second(unix_seconds).context("the time is not one of our era")?;
    Ok(time.to_zoned(TimeZone::UTC).datetime())
}

/// Writes a time as `strftime` does in the C locale. `%z` and `%Z` are empty: a naive time has no zone.
pub(super) fn write(format: &str, time: DateTime) -> Result<String> {
    let mut plain = String::with_capacity(format.len());
    let mut rest = format;
    while let Some(at) = rest.find('%') {
        plain.push_str(&rest[..at]);
        rest = &rest[at..];
        let (end, meaning) = match rest.as_bytes().get(1) {
            Some(b'z' | b'Z') => (2, ""),
            Some(b'c') => (2, "%a %b %e %H:%M:%S %Y"),
            Some(b'x') => (2, "%m/%d/%y"),
            Some(b'X') => (2, "%H:%M:%S"),
            Some(b'f') => (2, "%6f"),
            Some(_) => {
                let end = rest.char_indices().nth(2).map_or(rest.len(), |(at, _)| at);
                (end, &rest[..end])
            }
            None => (1, "%%"),
        };
        plain.push_str(meaning);
        rest = &rest[end..];
    }
    plain.push_str(rest);
    Ok(strtime::format(&plain, time)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Right-hand sides are CPython 3.11's, of a naive `datetime`.
    #[test]
    fn formats_are_those_of_python() {
        let time = at(1_700_000_009).unwrap();
        for (format, expected) in [
            ("%d %b %Y", "14 Nov 2023"),
            ("%-d. %-m. %y, %A", "14. 11. 23, Tuesday"),
            ("%c|%x|%X", "Tue Nov 14 22:13:29 2023|11/14/23|22:13:29"),
            ("%Z%z|%f|%%Z", "|000000|%Z"),
            ("é%", "é%"),
        ] {
            assert_eq!(write(format, time).unwrap(), expected, "{format}");
        }
        assert!(write("%Q", time).is_err());
    }

    /// The time of a clock on the wall, which in most places is not that of UTC.
    #[test]
    fn now_is_local_time() {
        let (before, told, after) = (Zoned::now(), now(), Zoned::now());
        assert!(before.datetime() <= told && told <= after.datetime());
        let abroad = TimeZone::posix("XYZ-5:30").unwrap();
        assert_eq!(
            before.with_time_zone(abroad).datetime(),
            before.with_time_zone(TimeZone::UTC).datetime() + jiff::Span::new().hours(5).minutes(30)
        );
    }
}
