//! A report on rows, in words: short beside a training, whole in a preview.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use homeroom_engine::data::report::personal::kinds;
use homeroom_engine::data::report::{Finding, Instance, Level, Part, Place, Report, Summary};

use crate::progress::thousands;

/// Rows that are named of a finding.
const NAMED: usize = 5;
/// Columns of the longest bar.
const BAR: usize = 40;

/// A line for each thing that was found: what, where, and what to do.
pub fn lines(report: &Report) -> impl Iterator<Item = String> {
    report.findings.iter().enumerate().map(|(at, finding)| {
        let Finding { level, what, advice, .. } = finding;
        let word = word(*level);
        // What to do about several things is said once.
        let is_said = at > 0 && report.findings[at - 1].advice == *advice;
        let advice = if is_said { String::new() } else { format!("; {advice}") };
        format!("{word}: {what}: {}{advice}", places(report, finding))
    })
}

/// Where rows of a finding stand: "lines 12 (like 4), 40 and 3 more; held-out row 3"; of several files "a.csv row 3, b.csv row 7".
fn places(report: &Report, finding: &Finding) -> String {
    let mut out = String::new();
    let named = &finding.rows[..finding.rows.len().min(NAMED)];
    for (number, Instance { place, like, similarity, .. }) in named.iter().enumerate() {
        let before = number.checked_sub(1).map(|before| named[before].place.part);
        out += match (before, place.part) {
            (None, _) => "",
            (Some(before), part) if before == part => ", ",
            _ => "; ",
        };
        match report.places.unit(place.part) {
            Some(unit) => {
                if before != Some(place.part) {
                    let several = named.iter().filter(|row| row.place.part == place.part).count() > 1;
                    out += if place.part == Part::HeldOut { "held-out " } else { "" };
                    out += unit;
                    out += if several { "s " } else { " " };
                }
                let _ = write!(out, "{}", place.line);
            }
            None => out += &self::place(report, *place),
        }
        if let Some(like) = like {
            let like = match report.places.unit(like.part) {
                Some(_) if like.part == place.part => like.line.to_string(),
                _ => report.places.words(*like),
            };
            let share = similarity.map(|share| format!(", {:.0} %", 100.0 * share)).unwrap_or_default();
            let _ = write!(out, " (like {like}{share})");
        }
    }
    match finding.count - named.len() {
        0 => out,
        more => format!("{out} and {} more", thousands(more)),
    }
}

/// The whole of it. What was found is `level  what`, with where and what to do below.
pub fn whole(report: &Report) -> String {
    let mut out = format!("data      {}\n", rows(report));
    for (what, lengths) in [("tokens", &report.tokens), ("prompts", &report.prompt_tokens), ("words", &report.words)] {
        // Words say nothing that tokens do not.
        let Some(lengths) = lengths.as_ref().filter(|_| what != "words" || report.tokens.is_none()) else { continue };
        let trained = report.trained_tokens.filter(|_| what == "tokens" && lengths.total > 0);
        let share =
            trained.map(|trained| format!(", {:.0} % of them trained", 100.0 * trained as f64 / lengths.total as f64));
        let _ = writeln!(out, "{what:<8}  {}{}", summary(lengths), share.unwrap_or_default());
        if what != "prompts" {
            histogram(lengths, &mut out);
        }
    }
    for (at, finding) in report.findings.iter().enumerate() {
        let word = word(finding.level);
        let _ = writeln!(out, "{word:<8}  {}", finding.what);
        let _ = writeln!(out, "          {}", places(report, finding));
        if let Some(detail) = finding.rows.iter().find_map(|row| row.detail.as_ref()) {
            let _ = writeln!(out, "          {detail}");
        }
        // What to do about several things is said once, below them.
        if report.findings.get(at + 1).is_none_or(|next| next.advice != finding.advice) {
            let _ = writeln!(out, "          {}", finding.advice);
        }
    }
    if report.findings.is_empty() {
        out += "found     nothing that is wrong; names of persons are not looked for\n";
    }
    if report.comparison_cut {
        out += "note      more rows may be nearly alike than were compared; take out what was found, and look again\n";
    }
    out
}

/// A level in one word.
pub fn word(level: Level) -> &'static str {
    match level {
        Level::Error => "error",
        Level::Warning => "warning",
        Level::Note => "note",
    }
}

/// How many rows of which form.
pub fn rows(report: &Report) -> String {
    let mut words = format!("{} rows", thousands(report.rows + report.held_out));
    if report.held_out > 0 {
        let _ = write!(words, ", {} of them held out", thousands(report.held_out));
    }
    if report.refused > 0 {
        let _ = write!(words, ", {} refused", thousands(report.refused));
    }
    if report.skipped > 0 {
        let _ = write!(words, ", {} left out as too long", thousands(report.skipped));
    }
    let forms: Vec<String> = report
        .forms
        .iter()
        .map(|(form, count)| {
            let form = match *form {
                "messages" => "`messages`",
                "prompt_completion" => "`prompt` and `completion`",
                "preference" => "`chosen` and `rejected`",
                "rated" => "`completion` and `label`",
                _ => "`text`",
            };
            if report.forms.len() == 1 { form.to_owned() } else { format!("{} with {form}", thousands(*count)) }
        })
        .collect();
    if !forms.is_empty() {
        let _ = write!(words, "; {}", forms.join(", "));
    }
    for (count, what) in [
        (report.with_system, "with a system message"),
        (report.several_turns, "with several answers"),
        (report.with_tools, "with tools"),
    ] {
        if count > 0 {
            let all = count == report.forms.values().sum::<usize>();
            let count = if all { "all".to_owned() } else { thousands(count).to_string() };
            let _ = write!(words, "; {count} {what}");
        }
    }
    words
}

/// Lengths in one line.
pub fn summary(lengths: &Summary) -> String {
    let Summary { total, min, median, p95, max, .. } = *lengths;
    let [total, min, median, p95, max] = [total, min, median, p95, max].map(thousands);
    format!("{min} to {max}, half of them up to {median}, 95 % up to {p95}; {total} in all")
}

fn histogram(lengths: &Summary, out: &mut String) {
    let most = lengths.histogram.iter().map(|bin| bin.count).max().unwrap_or(1);
    for bin in &lengths.histogram {
        // Whatever there is is seen.
        let bar = "█".repeat((BAR * bin.count).div_ceil(most));
        let range = format!("{}-{}", thousands(bin.from), thousands(bin.to));
        let _ = writeln!(out, "  {range:>15}  {bar} {}", thousands(bin.count));
    }
}

/// What was redacted, in words: "3 e-mail addresses ([EMAIL_1] to [EMAIL_2])".
pub fn redacted(counts: &BTreeMap<&'static str, (usize, usize)>) -> String {
    let parts = counts.iter().map(|(kind, (places, values))| {
        let words = kinds().find(|(known, _)| known == kind).map_or(*kind, |(_, words)| words);
        let name = kind.to_ascii_uppercase();
        let to = if *values > 1 { format!(" to [{name}_{values}]") } else { String::new() };
        format!("{} {words}: [{name}_1]{to}", thousands(*places))
    });
    let parts: Vec<String> = parts.collect();
    if parts.is_empty() { "nothing was found".to_owned() } else { parts.join(", ") }
}

/// A place in one line.
pub fn place(report: &Report, place: Place) -> String {
    let held_out = if place.part == Part::HeldOut { "held-out " } else { "" };
    format!("{held_out}{}", report.places.words(place))
}
