//! Curves as SVG that stands in the page: axes, round ticks, a legend, a title and a description for readers who do not see it.

use std::fmt::Write;

use crate::html::escaped;

/// A chart of lines over steps.
pub struct Chart<'a> {
    /// What it shows; the reader of a screen hears it.
    pub title: &'a str,
    /// What it shows, with its first and last numbers.
    pub description: String,
    /// Its lines.
    pub lines: Vec<Line<'a>>,
    /// Steps at which something happened, with its number in the list of events.
    pub marks: Vec<(f64, usize)>,
    /// The least and the most that the scale shows, where they are not the values' own, as of a share. It is not logarithmic then.
    pub range: Option<(f64, f64)>,
    /// Whether it stands in half the width.
    pub small: bool,
}

/// A line of a chart. Points that are no finite numbers leave a gap.
pub struct Line<'a> {
    /// Its name in the legend.
    pub name: &'a str,
    /// Which of the page's colours it has: `a`, `b` or `c`.
    pub colour: char,
    /// Step and value, by step.
    pub points: Vec<(f64, f64)>,
    /// Whether a line through means stands before the values where there are many.
    pub smooth: bool,
}

/// Width and height of a picture, and of a small one.
const SIZE: (f64, f64) = (720.0, 300.0);
const SMALL: (f64, f64) = (440.0, 220.0);
/// Room around the lines: above, to the right, below, to the left.
const ROOM: [f64; 4] = [34.0, 24.0, 40.0, 62.0];
/// More points than this are drawn as the lowest and the highest of each piece of the axis.
const POINTS_MAX: usize = 600;
/// So many points are marked one by one.
const DOTS_MAX: usize = 40;
/// From so many points on there is a line through their means.
const SMOOTH_MIN: usize = 60;
/// Where the largest value is so many times the smallest, the axis is logarithmic.
const LOG_RATIO: f64 = 20.0;

/// From numbers to places in the picture.
struct Axis {
    low: f64,
    high: f64,
    log: bool,
    /// Whether its numbers are whole, as steps are.
    whole: bool,
    from: f64,
    to: f64,
}

impl Axis {
    fn at(&self, value: f64) -> f64 {
        let scaled = |value: f64| if self.log { value.ln() } else { value };
        let (low, high) = (scaled(self.low), scaled(self.high));
        let share = (scaled(value) - low) / (high - low);
        self.from + share.clamp(-0.05, 1.05) * (self.to - self.from)
    }

    /// Round numbers in its range.
    fn ticks(&self) -> Vec<f64> {
        if self.log {
            let decades = self.low.log10().floor() as i32..=self.high.log10().ceil() as i32;
            let within = |tick: &f64| (self.low * 0.999..=self.high * 1.001).contains(tick);
            let of = |factors: &'static [f64]| {
                let ticks =
                    decades.clone().flat_map(|decade| factors.iter().map(move |factor| factor * 10f64.powi(decade)));
                ticks.filter(within).collect::<Vec<f64>>()
            };
            // As many as the axis has room for.
            let ticks = [&[1.0][..], &[1.0, 3.0], &[1.0, 2.0, 5.0]].map(of);
            let fits = |ticks: &&Vec<f64>| (3..=7).contains(&ticks.len());
            return ticks.iter().find(fits).cloned().unwrap_or_else(|| ticks[0].clone());
        }
        let rough = ((self.high - self.low) / 5.0).max(if self.whole { 1.0 } else { 0.0 });
        let decade = 10f64.powf(rough.log10().floor());
        let fits = |factor: &f64| factor * decade >= rough && !(self.whole && (factor * decade).fract() > 0.0);
        let step = decade * [1.0, 2.0, 2.5, 5.0, 10.0].into_iter().find(fits).unwrap_or(10.0);
        let (first, last) = ((self.low / step).ceil() as i64, (self.high / step + 1e-9).floor() as i64);
        (first..=last).take(20).map(|number| number as f64 * step).collect()
    }
}

/// A number of an axis or a table: four digits that count, and no more zeros than need be.
pub fn number(value: f64) -> String {
    let size = value.abs();
    let trimmed = |text: String| match text.contains('.') {
        true => text.trim_end_matches('0').trim_end_matches('.').to_owned(),
        false => text,
    };
    match size {
        _ if !value.is_finite() => "no number".to_owned(),
        0.0 => "0".to_owned(),
        _ if !(1e-3..1e6).contains(&size) => {
            let text = format!("{value:.2e}");
            let (digits, power) = text.split_once('e').unwrap_or((&text, "0"));
            format!("{}e{power}", trimmed(digits.to_owned()))
        }
        _ if size >= 1000.0 => grouped(value),
        _ if size >= 100.0 => trimmed(format!("{value:.1}")),
        _ if size >= 10.0 => trimmed(format!("{value:.2}")),
        _ => trimmed(format!("{value:.4}")),
    }
}

/// 12,345.
fn grouped(value: f64) -> String {
    let digits = format!("{:.0}", value.abs());
    let mut out = String::new();
    for (at, digit) in digits.chars().enumerate() {
        if at > 0 && (digits.len() - at).is_multiple_of(3) {
            out.push(',');
        }
        out.push(digit);
    }
    if value < 0.0 { format!("-{out}") } else { out }
}

fn finite<'a>(lines: &'a [Line<'_>]) -> impl Iterator<Item = (f64, f64)> + 'a {
    lines.iter().flat_map(|line| &line.points).copied().filter(|(_, value)| value.is_finite())
}

fn size(chart: &Chart<'_>) -> (f64, f64) {
    if chart.small { SMALL } else { SIZE }
}

fn axes(chart: &Chart<'_>) -> (Axis, Axis) {
    let span = |values: &mut dyn Iterator<Item = f64>| {
        values.fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), value| (low.min(value), high.max(value)))
    };
    let (mut left, mut right) = span(&mut finite(&chart.lines).map(|(step, _)| step));
    if left >= right {
        (left, right) = (left - 1.0, right + 1.0);
    }
    let (mut low, mut high) = span(&mut finite(&chart.lines).map(|(_, value)| value));
    let log = chart.range.is_none() && low > 0.0 && high / low >= LOG_RATIO;
    match (chart.range, log) {
        (Some(range), _) => (low, high) = range,
        (None, true) => (low, high) = (low / 1.15, high * 1.15),
        (None, false) => {
            let pad = if high > low { 0.06 * (high - low) } else { 0.1 * high.abs().max(1e-6) };
            // What is never below zero gets no room there.
            (low, high) = (if low >= 0.0 { (low - pad).max(0.0) } else { low - pad }, high + pad);
        }
    }
    let ([above, beside, below, before], (width, height)) = (ROOM, size(chart));
    let x = Axis { low: left, high: right, log: false, whole: true, from: before, to: width - beside };
    (x, Axis { low, high, log, whole: false, from: height - below, to: above })
}

/// The picture, or nothing where there is no number to show.
pub fn svg(chart: &Chart<'_>, id: &str) -> String {
    if finite(&chart.lines).next().is_none() {
        return String::new();
    }
    let (x, y) = axes(chart);
    let (width, height) = size(chart);
    let (title, description) = (escaped(chart.title), escaped(&chart.description));
    let mut out = format!(
        "<svg viewBox=\"0 0 {width} {height}\" role=\"img\" aria-labelledby=\"{id}-t {id}-d\">\
         <title id=\"{id}-t\">{title}</title><desc id=\"{id}-d\">{description}</desc>"
    );
    let (left, right, top, bottom) = (x.from, x.to, y.to, y.from);
    for tick in y.ticks() {
        let at = y.at(tick);
        let _ = write!(
            out,
            "<line class=\"grid\" x1=\"{left}\" x2=\"{right}\" y1=\"{at:.1}\" y2=\"{at:.1}\"/>\
             <text class=\"tick\" x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"end\">{}</text>",
            left - 8.0,
            at + 4.0,
            number(tick)
        );
    }
    for tick in x.ticks() {
        let at = x.at(tick);
        let _ = write!(
            out,
            "<line class=\"axis\" x1=\"{at:.1}\" x2=\"{at:.1}\" y1=\"{bottom}\" y2=\"{:.1}\"/>\
             <text class=\"tick\" x=\"{at:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{}</text>",
            bottom + 4.0,
            bottom + 18.0,
            number(tick)
        );
    }
    let _ = write!(
        out,
        "<line class=\"axis\" x1=\"{left}\" x2=\"{right}\" y1=\"{bottom}\" y2=\"{bottom}\"/>\
         <text class=\"tick\" x=\"{right}\" y=\"{:.1}\" text-anchor=\"end\">step{}</text>",
        height - 6.0,
        if y.log { "; the scale upwards is logarithmic" } else { "" }
    );
    for (step, mark) in &chart.marks {
        let at = x.at(*step);
        let _ = write!(
            out,
            "<line class=\"mark\" x1=\"{at:.1}\" x2=\"{at:.1}\" y1=\"{top}\" y2=\"{bottom}\"/>\
             <text class=\"tick\" x=\"{:.1}\" y=\"{:.1}\">{mark}</text>",
            at + 3.0,
            top + 10.0
        );
    }
    let mut legend = left;
    for line in &chart.lines {
        draw(line, &x, &y, &mut out);
        if line.name == chart.title {
            continue;
        }
        let name = escaped(line.name);
        let _ = write!(
            out,
            "<line class=\"line {}\" x1=\"{legend:.1}\" x2=\"{:.1}\" y1=\"14\" y2=\"14\"/>\
             <text class=\"legend\" x=\"{:.1}\" y=\"18\">{name}</text>",
            line.colour,
            legend + 22.0,
            legend + 28.0
        );
        // Letters of the legend are about seven units wide.
        legend += 48.0 + 7.0 * line.name.chars().count() as f64;
    }
    out + "</svg>"
}

fn draw(line: &Line<'_>, x: &Axis, y: &Axis, out: &mut String) {
    let count = line.points.iter().filter(|(_, value)| value.is_finite()).count();
    let is_smoothed = line.smooth && count >= SMOOTH_MIN;
    let class = if is_smoothed { "faint" } else { "line" };
    let _ = write!(out, "<path class=\"{class} {}\" d=\"{}\"/>", line.colour, path(&thinned(&line.points), x, y));
    if is_smoothed {
        let _ =
            write!(out, "<path class=\"line {}\" d=\"{}\"/>", line.colour, path(&thinned(&means(&line.points)), x, y));
    }
    if count <= DOTS_MAX {
        for (step, value) in line.points.iter().filter(|(_, value)| value.is_finite()) {
            let _ = write!(
                out,
                "<circle class=\"dot {}\" cx=\"{:.1}\" cy=\"{:.1}\" r=\"3.5\"/>",
                line.colour,
                x.at(*step),
                y.at(*value)
            );
        }
    }
}

fn path(points: &[(f64, f64)], x: &Axis, y: &Axis) -> String {
    let mut out = String::new();
    let mut is_drawing = false;
    for (step, value) in points {
        if value.is_finite() {
            let _ = write!(out, "{}{:.1} {:.1}", if is_drawing { "L" } else { "M" }, x.at(*step), y.at(*value));
        }
        is_drawing = value.is_finite();
    }
    out
}

/// At most [`POINTS_MAX`] points, among them the lowest and the highest of each piece, so that no peak is lost.
fn thinned(points: &[(f64, f64)]) -> Vec<(f64, f64)> {
    if points.len() <= POINTS_MAX {
        return points.to_vec();
    }
    let piece = points.len().div_ceil(POINTS_MAX / 2);
    let of_piece = |piece: &[(f64, f64)]| {
        let mut finite = piece.iter().filter(|(_, value)| value.is_finite());
        let Some(first) = finite.next() else { return vec![piece[0]] };
        let (low, high) = finite.fold((first, first), |(low, high), point| {
            (if point.1 < low.1 { point } else { low }, if point.1 > high.1 { point } else { high })
        });
        if low.0 == high.0 {
            vec![*low]
        } else if low.0 < high.0 {
            vec![*low, *high]
        } else {
            vec![*high, *low]
        }
    };
    points.chunks(piece).flat_map(of_piece).collect()
}

/// Each value's mean with those around it, a thirtieth of the line on either side where there are so many.
fn means(points: &[(f64, f64)]) -> Vec<(f64, f64)> {
    let finite: Vec<(f64, f64)> = points.iter().copied().filter(|(_, value)| value.is_finite()).collect();
    let reach = (finite.len() / 30).max(2);
    let mean = |at: usize| {
        let around = &finite[at.saturating_sub(reach)..(at + reach + 1).min(finite.len())];
        (finite[at].0, around.iter().map(|(_, value)| value).sum::<f64>() / around.len() as f64)
    };
    (0..finite.len()).map(mean).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chart(points: Vec<(f64, f64)>) -> Chart<'static> {
        let line = Line { name: "loss", colour: 'a', points, smooth: true };
        Chart { title: "Loss", description: String::new(), lines: vec![line], marks: vec![], range: None, small: false }
    }

    #[test]
    fn ticks_are_round_numbers_within_the_axis() {
        for (low, high, log, expected) in [
            (0.0, 10.0, false, vec!["0", "2", "4", "6", "8", "10"]),
            (1.0, 3.05, false, vec!["1", "1.5", "2", "2.5", "3"]),
            (0.0, 2e-4, false, vec!["0", "5e-5", "1e-4", "1.5e-4", "2e-4"]),
            (0.01, 100.0, true, vec!["0.01", "0.1", "1", "10", "100"]),
            (0.09, 2.5, true, vec!["0.1", "0.3", "1"]),
            (0.4, 1.55, false, vec!["0.5", "0.75", "1", "1.25", "1.5"]),
        ] {
            let ticks = Axis { low, high, log, whole: false, from: 0.0, to: 1.0 }.ticks();
            assert_eq!(ticks.iter().map(|tick| number(*tick)).collect::<Vec<_>>(), expected, "{low} to {high}");
        }
        for (low, high) in [(1.0, 3.0), (1.0, 12.0), (0.0, 30.0), (1.0, 3000.0), (7.0, 8.0), (999.0, 1000.0)] {
            let ticks = Axis { low, high, log: false, whole: true, from: 0.0, to: 1.0 }.ticks();
            assert!(!ticks.is_empty() && ticks.len() < 8, "{ticks:?}");
            assert!(ticks.iter().all(|tick| tick.fract() == 0.0), "{ticks:?}");
        }
    }

    #[test]
    fn a_fall_of_decades_has_a_logarithmic_axis_and_values_below_zero_none() {
        let is_log = |points: &[f64]| {
            let points = points.iter().enumerate().map(|(at, value)| (at as f64, *value)).collect();
            axes(&chart(points)).1.log
        };
        assert!(is_log(&[3.0, 0.2, 0.05]));
        assert!(!is_log(&[3.0, 1.0, 0.5]) && !is_log(&[3.0, 0.0]) && !is_log(&[100.0, -1.0]));
    }

    #[test]
    fn thousands_of_points_are_a_short_path_that_keeps_its_peaks() {
        let mut points: Vec<(f64, f64)> =
            (0..30_000).map(|step| (step as f64, 1.0 + (step % 7) as f64 * 0.01)).collect();
        points[12_345].1 = 9.0;
        points[20_000].1 = f64::NAN;
        let thin = thinned(&points);
        assert!(thin.len() <= POINTS_MAX && thin.contains(&(12_345.0, 9.0)));
        assert!(thin.windows(2).all(|pair| pair[0].0 < pair[1].0));
        let svg = svg(&chart(points), "x");
        assert!(svg.len() < 40_000 && !svg.contains("NaN") && !svg.contains("inf"), "{}", svg.len());
    }

    #[test]
    fn one_point_and_equal_points_and_no_point_are_no_trouble() {
        for points in
            [vec![(1.0, 0.0)], vec![(0.0, 2.5)], vec![(1.0, 3.0), (2.0, 3.0)], vec![(1.0, f64::INFINITY), (2.0, 1.0)]]
        {
            let svg = svg(&chart(points), "x");
            assert!(svg.contains("<circle") && !svg.contains("NaN") && !svg.contains("inf"), "{svg}");
        }
        assert_eq!(svg(&chart(vec![(1.0, f64::NAN)]), "x"), "");
        assert_eq!(svg(&chart(vec![]), "x"), "");
    }
}
