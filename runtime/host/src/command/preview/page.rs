//! Rows and report as one HTML file: no script, no network, no other file; readable on paper, where trained tokens are underlined.

use std::fmt::Write as _;

use homeroom_engine::data::preview::Piece;
use homeroom_engine::data::report::{PLACES_NAMED, Report, Summary};

use super::rendered::Rendered;
use crate::data_report;
use crate::html::escaped;
use crate::progress::thousands;

const STYLE: &str = include_str!("style.css");

/// What the page is about.
pub struct Head<'a> {
    /// The file of rows.
    pub file: &'a str,
    /// The model.
    pub model: Option<&'a str>,
    /// Tokens that a row may have.
    pub limit: Option<usize>,
}

/// The page.
pub fn html(head: &Head<'_>, rows: &[Rendered], report: &Report) -> String {
    let file = escaped(head.file);
    let mut out = format!(
        "<!doctype html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n\
         <meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">\n\
         <meta name=\"referrer\" content=\"no-referrer\">\n\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n\
         <meta name=\"color-scheme\" content=\"light dark\">\n<title>{file} · Homeroom</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n\
         <header><p class=\"kind\">Preview of rows</p><h1>{file}</h1>"
    );
    if let Some(model) = head.model {
        let limit = head.limit.map(|limit| format!("; rows up to {} tokens", thousands(limit))).unwrap_or_default();
        let _ = write!(out, "<p>For the model <b>{}</b>{limit}.</p>", escaped(model));
    }
    let _ = writeln!(out, "<p>{}.</p></header>", words(&data_report::rows(report)));
    found(report, &mut out);
    lengths(report, &mut out);
    if !rows.is_empty() {
        out += "<section><h2>Rows as the model sees them</h2><p class=\"legend\"><span class=\"t\">Learned</span><span class=\"t\"> token</span><span class=\"t\"> by</span><span class=\"t\"> token</span> · read, not learned · <span class=\"c\">control token</span> · ↵ line break</p>\n";
        rows.iter().for_each(|row| of_row(row, &mut out));
        out += "</section>\n";
    }
    out += "</main>\n</body>\n</html>\n";
    out
}

/// A text with what stands in backticks as code.
fn words(text: &str) -> String {
    let mut out = String::new();
    for (number, part) in escaped(text).split('`').enumerate() {
        out += &if number % 2 == 1 { format!("<code>{part}</code>") } else { part.to_owned() };
    }
    out
}

fn found(report: &Report, out: &mut String) {
    out.push_str("<section><h2>What was found</h2>");
    if report.findings.is_empty() {
        out.push_str("<p>Nothing that is wrong. Names of persons are not looked for.</p>");
    }
    for (at, finding) in report.findings.iter().enumerate() {
        let level = data_report::word(finding.level);
        let _ = write!(
            out,
            "<div class=\"finding {level}\"><p><b>{}</b> <span class=\"level\">{level}</span></p>",
            words(&finding.what)
        );
        let rows: Vec<String> = finding
            .rows
            .iter()
            .take(PLACES_NAMED)
            .map(|row| {
                let like =
                    row.like.map(|like| format!(" like {}", data_report::place(report, like))).unwrap_or_default();
                let share = row.similarity.map(|share| format!(" ({:.0} %)", 100.0 * share)).unwrap_or_default();
                let detail = row.detail.as_ref().map(|detail| format!(": {detail}")).unwrap_or_default();
                escaped(&format!("{}{like}{share}{detail}", data_report::place(report, row.place)))
            })
            .collect();
        let more = finding.count - rows.len();
        let more = if more > 0 { format!(" and {} more", thousands(more)) } else { String::new() };
        // What to do about several things is said once, below them.
        let advice = match report.findings.get(at + 1).is_some_and(|next| next.advice == finding.advice) {
            true => String::new(),
            false => format!("<p>{}.</p>", words(&capital(finding.advice))),
        };
        let separator = if finding.rows.iter().any(|row| row.detail.is_some()) { "<br>" } else { ", " };
        let _ = writeln!(out, "<p class=\"where\">{}{more}</p>{advice}</div>", rows.join(separator));
    }
    out.push_str("</section>\n");
}

fn capital(text: &str) -> String {
    let mut letters = text.chars();
    letters.next().map_or_else(String::new, |first| first.to_uppercase().chain(letters).collect())
}

fn lengths(report: &Report, out: &mut String) {
    let (what, summary) = match (&report.tokens, &report.words) {
        (Some(tokens), _) => ("tokens", tokens),
        (None, Some(words)) => ("words", words),
        _ => return,
    };
    let Summary { histogram, .. } = summary;
    let most = histogram.iter().map(|bin| bin.count).max().unwrap_or(1);
    let _ = write!(
        out,
        "<section><h2>Lengths in {what}</h2><p>{}.</p><table class=\"bars\"><tbody>",
        escaped(&data_report::summary(summary))
    );
    for bin in histogram {
        let width = 100.0 * bin.count as f64 / most as f64;
        let _ = write!(
            out,
            "<tr><th scope=\"row\">{}–{}</th><td class=\"bar\"><span style=\"width:{width:.1}%\"></span></td><td>{}</td></tr>",
            thousands(bin.from),
            thousands(bin.to),
            thousands(bin.count)
        );
    }
    out.push_str("</tbody></table></section>\n");
}

fn of_row(row: &Rendered, out: &mut String) {
    for sequence in &row.sequences {
        let wrong = if sequence.is_wrong() { " wrong" } else { "" };
        let _ = write!(
            out,
            "<article><h3>{}</h3><p class=\"verdict{wrong}\">{}.</p><div class=\"text\">",
            escaped(&row.heading(sequence)).replace("   ", " · "),
            escaped(&capital(&sequence.verdict()))
        );
        sequence.pieces.iter().for_each(|piece| of_piece(piece, out));
        out.push_str("</div></article>\n");
    }
}

fn of_piece(piece: &Piece, out: &mut String) {
    let text = escaped(&piece.text).replace('\t', "→\t").replace('\n', "<i>↵</i>\n");
    let kinds = [(piece.trained, "t"), (piece.control, "c"), (piece.bytes, "b")];
    let kinds: Vec<&str> = kinds.into_iter().filter_map(|(is, kind)| is.then_some(kind)).collect();
    let _ = match kinds.is_empty() {
        true => write!(out, "<span>{text}</span>"),
        false => write!(out, "<span class=\"{}\">{text}</span>", kinds.join(" ")),
    };
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_that_a_row_says_is_markup() {
        let piece = |text: &str, trained: bool| Piece {
            ids: vec![3],
            text: text.to_owned(),
            trained,
            control: false,
            bytes: false,
        };
        let mut out = String::new();
        of_piece(&piece("<script>alert('x')</script>\u{202e}\n", true), &mut out);
        assert_eq!(out, "<span class=\"t\">&lt;script&gt;alert(&#39;x&#39;)&lt;/script&gt;\\u{202e}<i>↵</i>\n</span>");
        assert_eq!(words("a `b<` c"), "a <code>b&lt;</code> c");
    }
}
