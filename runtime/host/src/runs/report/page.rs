//! The page: plain data in, one HTML file out, which needs no script, no network and no other file.

use std::fmt::Write;

use super::chart::{Chart, Line, number, svg};
use super::{Licence, ReportData};
use crate::html::escaped;
use crate::progress::thousands;
use crate::runs::Status;
use crate::runs::history::{Eval, Moment, Sample, Step, Training};

/// Longest text of a sample or a setting, in characters.
const TEXT_MAX: usize = 4000;
/// Most rows of the table beside a curve.
const ROWS_MAX: usize = 12;
/// Most lines of a list of events.
const MOMENTS_MAX: usize = 200;
/// Most samples.
const SAMPLES_MAX: usize = 50;

const STYLE: &str = include_str!("style.css");

/// As [`escaped`], no longer than a reader looks at.
fn brief(text: &str) -> String {
    match text.char_indices().nth(TEXT_MAX) {
        Some((at, _)) => format!("{}…", escaped(&text[..at])),
        None => escaped(text),
    }
}

/// The page of a run.
pub fn html(data: &ReportData) -> String {
    let mut out = format!(
        "<!doctype html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n\
         <meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">\n\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n\
         <meta name=\"color-scheme\" content=\"light dark\">\n<title>{}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n",
        escaped(&format!("{} · Homeroom", data.id))
    );
    head(data, &mut out);
    for training in &data.trainings {
        of_training(training, data.trainings.len() > 1, &mut out);
    }
    pairs("How to use it", "Each line is a command for a terminal.", &data.next, true, &mut out);
    pairs("What it learned from", "", &data.data, false, &mut out);
    licences(&data.licences, &mut out);
    pairs("Settings", "All numbers of the run, so that it can be repeated.", &data.settings, false, &mut out);
    pairs("Fingerprints", FINGERPRINTS, &data.digests, false, &mut out);
    pairs("Program and machine", "", &data.machine, false, &mut out);
    if let Some(script) = &data.script {
        let _ = writeln!(out, "<section><h2>Script</h2><pre>{}</pre></section>", escaped(script));
    }
    out += "</main>\n</body>\n</html>\n";
    out
}

const FINGERPRINTS: &str = "A fingerprint (digest) is computed from a file's content: if two are equal, the files are. They show later what exactly was used.";

fn head(data: &ReportData, out: &mut String) {
    let word = data.status.word();
    let _ = write!(
        out,
        "<header><p class=\"kind\">{} <span class=\"status {word}\">{word}</span></p><h1>{}</h1>",
        escaped(&data.kind),
        escaped(&data.title)
    );
    for sentence in &data.summary {
        let _ = write!(out, "<p>{}</p>", escaped(sentence));
    }
    if let Some(error) = &data.error {
        let _ = write!(out, "<div class=\"error\"><p>It ended with this message:</p><pre>{}</pre></div>", brief(error));
    }
    if data.status == Status::Running {
        out.push_str("<p>The run goes on: this page shows how it stood when it was written.</p>");
    }
    out.push_str("</header>\n");
}

fn of_training(training: &Training, of_several: bool, out: &mut String) {
    if of_several {
        let _ = writeln!(out, "<h2 class=\"part\">Training {}</h2>", training.number);
    }
    let id = |what: &str| format!("t{}-{what}", training.number);
    let moments = moments(&training.moments);
    let marks: Vec<(f64, usize)> = moments
        .iter()
        .enumerate()
        .filter(|(_, (_, _, _, is_marked))| *is_marked)
        .filter_map(|(at, (step, ..))| Some(((*step)? as f64, at + 1)))
        .take(12)
        .collect();
    loss(training, marks, &id("loss"), out);
    accuracy(training, &id("accuracy"), out);
    rewards(training, &id("rewards"), out);
    samples(&training.samples, out);
    small(training, &id, out);
    events(&moments, out);
}

/// A chart with the sentences below it and the table beside it.
fn figure(heading: &str, chart: &Chart<'_>, id: &str, words: &[String], table: &str, out: &mut String) {
    let picture = svg(chart, id);
    if picture.is_empty() {
        return;
    }
    let words: String = words.iter().map(|words| format!("<p>{}</p>", escaped(words))).collect();
    let _ = writeln!(
        out,
        "<section><h2>{}</h2><div class=\"beside\"><figure>{picture}<figcaption>{words}</figcaption></figure>{table}</div></section>",
        escaped(heading)
    );
}

fn values(steps: &[Step], of: impl Fn(&Step) -> Option<f64>) -> Vec<(f64, f64)> {
    // A loss that was no number is null in JSON; it leaves a gap.
    steps.iter().map(|step| (step.step as f64, of(step).unwrap_or(f64::NAN))).collect()
}

fn eval_values(evals: &[Eval], of: impl Fn(&Eval) -> Option<f64>) -> Vec<(f64, f64)> {
    evals.iter().filter_map(|eval| Some((eval.step as f64, of(eval)?))).collect()
}

/// From the first number to the last, in words.
fn from_to(points: &[(f64, f64)]) -> Option<(f64, f64)> {
    let mut finite = points.iter().map(|(_, value)| *value).filter(|value| value.is_finite());
    let first = finite.next()?;
    Some((first, finite.next_back().unwrap_or(first)))
}

fn loss(training: &Training, marks: Vec<(f64, usize)>, id: &str, out: &mut String) {
    let (train, held_out) =
        (values(&training.steps, |step| step.loss), eval_values(&training.evals, |eval| eval.eval_loss));
    let what = match training.is_of_surprise() {
        true => {
            "The loss says how much the right answers surprise the model: 0 would be no surprise at all, so lower is better."
        }
        false if training.is_of_ratings() => {
            "The loss says how far the model is from telling the good answers of the rows from the bad ones: lower is better."
        }
        false => {
            "The loss says how far the model is from preferring the answers that the rows prefer: lower is better."
        }
    };
    let mut words = vec![what.to_owned()];
    if let Some((first, last)) = from_to(&train).filter(|_| train.len() > 1) {
        words.push(format!("On the rows that it learns from, it went from {} to {}.", number(first), number(last)));
    }
    words.extend(of_held_out(training, &held_out));
    if !marks.is_empty() {
        words.push("A dashed line with a number is an event of the list below.".to_owned());
    }
    let description = words.join(" ");
    let table = loss_table(training);
    let mut lines = vec![Line { name: "rows that it learns from", colour: 'a', points: train, smooth: true }];
    if !held_out.is_empty() {
        lines.push(Line { name: "rows held out", colour: 'b', points: held_out, smooth: false });
    }
    let chart = Chart { title: "Loss by step", description, lines, marks, range: None, small: false };
    figure("Loss", &chart, id, &words, &table, out);
}

/// What the loss on held-out rows says, in words for who never saw such a curve.
fn of_held_out(training: &Training, points: &[(f64, f64)]) -> Vec<String> {
    let Some((first, last)) = from_to(points) else {
        return vec![
            "No rows were held out, so the curve does not tell whether it understands or only remembers: hold some out with --eval-fraction 0.1."
                .to_owned(),
        ];
    };
    if points.len() < 2 {
        return vec![format!("On rows that it never learns from, it is {}.", number(first))];
    }
    let mut words = vec![format!(
        "Held-out rows are never learned from; on them it went from {} to {}, which shows what it can do with questions that are new to it.",
        number(first),
        number(last)
    )];
    let best = training.best().and_then(|best| Some((best.step, best.eval_loss?)));
    match best {
        _ if last > first => {
            words.push(format!("That is worse than {}: more steps of this kind would harm.", first_time(&training.evals)))
        }
        Some((step, best)) if last > best * 1.02 => words.push(format!(
            "It was lowest, {}, at step {}, and has risen since: from there on the model rather learned its rows by heart.",
            number(best),
            thousands(step as usize)
        )),
        _ => {}
    }
    words
}

/// When the first evaluation was.
fn first_time(evals: &[Eval]) -> String {
    match evals.first().map_or(0, |eval| eval.step) {
        0 => "before the training".to_owned(),
        step => format!("after step {}", thousands(step as usize)),
    }
}

/// At most [`ROWS_MAX`] of some things, evenly, the first and the last among them.
fn some<T>(all: &[T]) -> Vec<&T> {
    let last = all.len().saturating_sub(1);
    match all.len() {
        0..=ROWS_MAX => all.iter().collect(),
        _ => (0..ROWS_MAX).map(|at| &all[at * last / (ROWS_MAX - 1)]).collect(),
    }
}

fn table(caption: &str, head: &[&str], rows: &[Vec<String>]) -> String {
    let cells = |tag: &str, cells: &[String]| {
        cells.iter().map(|cell| format!("<{tag}>{}</{tag}>", escaped(cell))).collect::<String>()
    };
    let head = head.iter().map(|name| format!("<th scope=\"col\">{}</th>", escaped(name))).collect::<String>();
    let rows: String = rows.iter().map(|row| format!("<tr>{}</tr>", cells("td", row))).collect();
    format!(
        "<div class=\"numbers\"><table><caption>{}</caption><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>",
        escaped(caption)
    )
}

/// A number of a table: three digits behind the point, so that those of a column stand below each other.
fn cell(value: Option<f64>) -> String {
    let fixed = |value: f64| if (1e-3..1e4).contains(&value.abs()) { format!("{value:.3}") } else { number(value) };
    value.map(fixed).unwrap_or_default()
}

fn loss_table(training: &Training) -> String {
    // The steps of evaluations, and as many others as there is room for.
    let held_out = |at: u64| training.evals.iter().find(|eval| eval.step == at).and_then(|eval| eval.eval_loss);
    let mut steps: Vec<u64> = some(&training.steps).iter().map(|step| step.step).collect();
    let evals: Vec<u64> = some(&training.evals).iter().map(|eval| eval.step).collect();
    if steps.len() + evals.len() > ROWS_MAX && !evals.is_empty() {
        let keep = ROWS_MAX.saturating_sub(evals.len()).max(2);
        let last = steps.len() - 1;
        steps = (0..keep.min(steps.len())).map(|at| steps[at * last / (keep - 1).max(1)]).collect();
    }
    steps.extend(evals);
    steps.sort_unstable();
    steps.dedup();
    let rows = steps.iter().map(|at| {
        let loss = training.steps.iter().find(|step| step.step == *at).and_then(|step| step.loss);
        vec![thousands(*at as usize).to_string(), cell(loss), cell(held_out(*at))]
    });
    table("Loss in numbers", &["step", "learned rows", "held out"], &rows.collect::<Vec<_>>())
}

fn accuracy(training: &Training, id: &str, out: &mut String) {
    let points = eval_values(&training.evals, |eval| eval.token_accuracy);
    let Some((first, last)) = from_to(&points).filter(|_| points.len() > 1) else { return };
    let words = vec![format!(
        "Of 100 pieces of words (tokens) in the right answers to held-out rows, the model would have chosen {:.0} itself {}, and {:.0} at the end.",
        100.0 * first,
        first_time(&training.evals),
        100.0 * last
    )];
    let row = |eval: &&Eval| {
        vec![thousands(eval.step as usize).to_string(), cell(eval.token_accuracy), cell(eval.perplexity)]
    };
    let rows: Vec<_> = some(&training.evals).iter().map(row).collect();
    let table = table("Held-out rows in numbers", &["step", "token accuracy", "perplexity"], &rows);
    let line = Line { name: "token accuracy on held-out rows", colour: 'b', points, smooth: false };
    let chart = Chart {
        title: "Token accuracy by step",
        description: words.join(" "),
        lines: vec![line],
        marks: vec![],
        range: None,
        small: false,
    };
    figure("Words it would have chosen itself", &chart, id, &words, &table, out);
}

fn rewards(training: &Training, id: &str, out: &mut String) {
    let of = |at: usize| values(&training.steps, move |step| step.rewards?[at]);
    let (chosen, rejected, accuracy, margin) = (of(0), of(1), of(2), of(3));
    if from_to(&margin).is_none() && from_to(&chosen).is_none() {
        return;
    }
    let of_ratings = training.is_of_ratings();
    let shown = if of_ratings {
        "The model saw single answers that people rated as good or as bad."
    } else {
        "Of each question the model saw an answer that people prefer and one that they do not."
    };
    let mut words = vec![format!(
        "{shown} A reward says how much likelier it finds an answer than it did before the training: the two lines should move apart."
    )];
    let names = match of_ratings {
        true => ["good", "bad", "good answers", "bad answers"],
        false => ["preferred", "rejected", "preferred answers", "rejected answers"],
    };
    if let Some((first, last)) = from_to(&margin).filter(|_| margin.len() > 1) {
        words.push(format!("The distance between them went from {} to {}.", number(first), number(last)));
    }
    let row = |step: &&Step| {
        let rewards = step.rewards.unwrap_or_default();
        [vec![thousands(step.step as usize).to_string()], rewards.map(cell).to_vec()].concat()
    };
    let rows: Vec<_> = some(&training.steps).iter().map(row).collect();
    let numbers = table("Rewards in numbers", &["step", names[0], names[1], "right", "distance"], &rows);
    let chart = Chart {
        title: "Rewards by step",
        description: words.join(" "),
        lines: vec![
            Line { name: names[2], colour: 'a', points: chosen, smooth: true },
            Line { name: names[3], colour: 'b', points: rejected, smooth: true },
            Line { name: "distance (margin)", colour: 'c', points: margin, smooth: true },
        ],
        marks: vec![],
        range: None,
        small: false,
    };
    figure("Rewards", &chart, id, &words, &numbers, out);
    if let Some((first, last)) = from_to(&accuracy).filter(|_| accuracy.len() > 1) {
        let share = match of_ratings {
            true => {
                "The share of answers that are judged right, a good one by a reward above the usual and a bad one by none"
            }
            false => "The share of pairs in which the preferred answer has the higher reward",
        };
        // How many of the answers are good is the rows' own: a coin says nothing of them.
        let coin = if of_ratings { "" } else { "; tossing a coin gives 0.5" };
        let words = vec![format!("{share}, from {} to {}{coin}.", number(first), number(last))];
        let (heading, name) = match of_ratings {
            true => ("Answers judged right", "share of answers that it judges right"),
            false => ("Pairs ranked right", "share of pairs that it ranks right"),
        };
        let line = Line { name, colour: 'a', points: accuracy, smooth: true };
        let chart = Chart {
            title: "Reward accuracy by step",
            description: words.join(" "),
            lines: vec![line],
            marks: vec![],
            range: Some((0.0, 1.0)),
            small: false,
        };
        figure(heading, &chart, &format!("{id}-accuracy"), &words, "", out);
    }
}

fn samples(samples: &[Sample], out: &mut String) {
    if samples.is_empty() {
        return;
    }
    out.push_str(
        "<section><h2>Answers before and after</h2><p>Questions that were held out, with the answer of the rows and the model's own. Read them: numbers do not tell whether an answer is good.</p>",
    );
    for sample in samples.iter().take(SAMPLES_MAX) {
        let _ = write!(
            out,
            "<article class=\"sample\"><p class=\"prompt\" dir=\"auto\">{}</p><div class=\"answers\">",
            brief(&sample.prompt)
        );
        for (name, text) in
            [("Before", &sample.before), ("After", &sample.after), ("The row's answer", &sample.expected)]
        {
            let text = if text.trim().is_empty() { "<i>nothing</i>".to_owned() } else { brief(text) };
            let _ = write!(out, "<div><h3>{name}</h3><p dir=\"auto\">{text}</p></div>");
        }
        out.push_str("</div></article>");
    }
    out.push_str("</section>\n");
}

/// The curves that say how the training went rather than what it learned.
fn small(training: &Training, id: &dyn Fn(&str) -> String, out: &mut String) {
    let charts = [
        (
            "Learning rate",
            "rate",
            'c',
            values(&training.steps, |step| step.learning_rate),
            "How large the corrections of each step are. It rises at the start and falls towards the end, so that the last steps only polish.",
        ),
        (
            "Gradient norm",
            "norm",
            'a',
            values(&training.steps, |step| step.grad_norm),
            "How strongly the rows of each step pull at the model. Single peaks are usual; if it keeps rising, the learning rate is too high.",
        ),
    ];
    let mut pictures = String::new();
    for (title, key, colour, points, words) in charts {
        if points.len() < 2 {
            continue;
        }
        let ends = from_to(&points).map(|(first, last)| format!(" From {} to {}.", number(first), number(last)));
        // A rate that falls to nothing is shown as it falls, not by decades.
        let highest = points.iter().map(|(_, value)| *value).filter(|value| value.is_finite()).fold(0.0, f64::max);
        let range = (key == "rate" && highest > 0.0).then_some((0.0, 1.06 * highest));
        let line = Line { name: title, colour, points, smooth: key == "norm" };
        let description = format!("{words}{}", ends.unwrap_or_default());
        let chart = Chart { title, description, lines: vec![line], marks: vec![], range, small: true };
        let picture = svg(&chart, &id(key));
        if !picture.is_empty() {
            let _ = write!(
                pictures,
                "<figure><h3>{title}</h3>{picture}<figcaption><p>{}</p></figcaption></figure>",
                escaped(words)
            );
        }
    }
    if !pictures.is_empty() {
        let _ = writeln!(out, "<section><h2>How the training went</h2><div class=\"pair\">{pictures}</div></section>");
    }
}

/// Events as lines: step, time, words, and whether a chart marks it. Checkpoints in a row are one line.
fn moments(moments: &[Moment]) -> Vec<(Option<u64>, String, String, bool)> {
    let mut out: Vec<(Option<u64>, String, String, bool)> = Vec::new();
    let mut at = 0;
    while at < moments.len() && out.len() < MOMENTS_MAX {
        let first = &moments[at];
        let same = moments[at..].iter().take_while(|moment| moment.event == "checkpoint").count();
        if same > 1 {
            let last = &moments[at + same - 1];
            let steps =
                |moment: &Moment| moment.step.map(|step| thousands(step as usize).to_string()).unwrap_or_default();
            let words = format!("{same} checkpoints saved, of steps {} to {}", steps(first), steps(last));
            out.push((last.step, last.time.clone(), words, false));
            at += same;
            continue;
        }
        out.push((first.step, first.time.clone(), first.words(), first.event != "checkpoint"));
        at += 1;
    }
    out
}

fn events(moments: &[(Option<u64>, String, String, bool)], out: &mut String) {
    if moments.is_empty() {
        return;
    }
    out.push_str("<section><h2>What happened</h2><ol class=\"events\">");
    for (step, time, words, _) in moments {
        let step = step.map(|step| format!("step {}", thousands(step as usize)));
        let time = time.get(..16).unwrap_or(time).replace('T', " ");
        let when: Vec<String> = step.into_iter().chain(Some(time).filter(|time| !time.is_empty())).collect();
        let _ = write!(out, "<li>{} <span class=\"when\">{}</span></li>", brief(words), escaped(&when.join(", ")));
    }
    out.push_str("</ol></section>\n");
}

/// A list of names and values; commands stand in the letters of a terminal.
fn pairs(heading: &str, words: &str, pairs: &[(String, String)], are_commands: bool, out: &mut String) {
    if pairs.is_empty() {
        return;
    }
    let words = if words.is_empty() { String::new() } else { format!("<p>{}</p>", escaped(words)) };
    let _ = write!(
        out,
        "<section><h2>{}</h2>{words}<dl{}>",
        escaped(heading),
        if are_commands { " class=\"commands\"" } else { "" }
    );
    for (name, value) in pairs {
        let value = brief(value);
        let value = if are_commands { format!("<code>{value}</code>") } else { value };
        let _ = write!(out, "<dt>{}</dt><dd>{value}</dd>", brief(name));
    }
    out.push_str("</dl></section>\n");
}

fn licences(licences: &[Licence], out: &mut String) {
    if licences.is_empty() {
        return;
    }
    out.push_str("<section><h2>Licence of the base model</h2><p>What was trained is built on this model, and its licence holds for the result, too.</p><dl>");
    for Licence { model, licence, source } in licences {
        let licence = licence.as_deref().map_or_else(|| "<i>not found</i>".to_owned(), brief);
        let _ =
            write!(out, "<dt>{}</dt><dd>{licence} <span class=\"when\">{}</span></dd>", brief(model), brief(source));
    }
    out.push_str("</dl></section>\n");
}
