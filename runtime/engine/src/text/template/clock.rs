//! What `strftime_now` says: Python's `datetime.now().strftime(format)`, which is in local time and knows of no time zone.

use anyhow::{Context, Result};
use jiff::civil::DateTime;
use jiff::fmt::strtime;
use jiff::tz::TimeZone;
use jiff::{Timestamp, Zoned};

/// The present time where this machine is.
pub(super) fn now() -> DateTime {
    Zoned::now().datetime()
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
