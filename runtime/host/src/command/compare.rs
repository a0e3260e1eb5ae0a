//! `homeroom compare`: two models on the same held-out rows.
//!
//! The models are measured one after the other, so that one at a time is in memory; float weights of a base that both are on are mapped,
//! and so shared.

use std::collections::{BTreeMap, HashSet};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use clap::Args;
use homeroom_engine::data::{Example, RowKind, Source, check_rows};
use homeroom_engine::inference::Tokens;
use homeroom_engine::inference::generate::Sampling;
use homeroom_engine::run::compute::Compute;
use homeroom_engine::train::{Evaluation, evaluate_each};
use homeroom_kernels::Stream;
use serde_json::{Value, json};

use super::arguments::{COMPUTE, COUNT_MAX, RowArgs, one_of, whole};
use super::rows::{named, tell, to_measure_on};
use super::{Done, print};
use crate::job::question;
use crate::models::{Answerer, Loaded, ModelRef, Network, is_here, load_measured, locate};
use crate::progress::{self, line, thousands};
use crate::stdout::Stdout;
use crate::table::{Column, lines};
use crate::terminal::cell;

/// Arguments of `compare`.
#[derive(Args)]
pub struct Arguments {
    /// Adapter, model directory, .gguf file, a name from `homeroom list-models`, or one on the Hugging Face hub as `owner/name`
    #[arg(value_name = "A")]
    a: PathBuf,
    /// The other one
    #[arg(value_name = "B")]
    b: PathBuf,
    /// File of rows that neither learned from (JSONL, JSON, CSV, TSV, also as .gz), a folder, whose held-out rows are taken, or `-` for the standard input; may be repeated
    #[arg(long, required = true, value_name = "FILE")]
    file: Vec<PathBuf>,
    /// Base model of an adapter, if it has moved since the training
    #[arg(long, value_name = "MODEL")]
    base_model: Option<PathBuf>,
    /// Accept a base model with other weights than an adapter was trained on, if its shapes fit
    #[arg(long)]
    any_base: bool,
    #[command(flatten)]
    rows: RowArgs,
    /// Number format of the products
    #[arg(long, default_value = "f32", value_name = "FORMAT", value_parser = one_of::<Compute>(&COMPUTE))]
    compute: Compute,
    /// Rows whose questions both answer, side by side; 0: none
    #[arg(long, default_value = "3", value_name = "N", value_parser = whole::<usize>(0..=1000))]
    samples: usize,
    /// Most tokens of an answer
    #[arg(long, default_value = "128", value_name = "TOKENS", value_parser = whole::<usize>(1..=COUNT_MAX))]
    max_tokens: usize,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

/// Rows of each kind that are told by their lines.
const ROWS_TOLD: usize = 3;
/// Characters of a question beside a line's number.
const QUESTION_MAX: usize = 60;
/// A difference that chance makes less often than this is taken for one.
const LEVEL: f64 = 0.05;

/// What one row came to.
#[derive(Clone, Debug, Default)]
struct Row {
    /// Where it is, in words.
    place: String,
    /// Cross-entropy of its trained tokens together, in nats.
    nats: f64,
    tokens: usize,
    /// What is asked, and what is answered.
    question: String,
    expected: String,
}

/// What one model came to.
struct Measured {
    evaluation: Evaluation,
    /// By line of the file.
    rows: BTreeMap<usize, Row>,
    tokenizer: String,
    /// Answers to the questions of some rows, by line.
    answers: Vec<(usize, String)>,
}

/// Measures both, and says which is better.
pub fn run(arguments: &Arguments) -> Result<Done> {
    let files = to_measure_on(&arguments.file, Source::standard_input)?;
    let references = [&arguments.a, &arguments.b].map(|name| reference(name, arguments));
    // Both are there before the first is measured.
    if !references.iter().all(|reference| is_here(reference).unwrap_or(false)) {
        check_rows(&files, &arguments.rows.read.reading(), RowKind::Demonstration, "compare")?;
    }
    for reference in &references {
        locate(&reference.name, Network::Allowed)?;
    }
    let [a, b] = &references;
    let a = measure(a, &files, arguments, None)?;
    let lines: Vec<usize> = a.answers.iter().map(|(line, _)| *line).collect();
    let b = measure(b, &files, arguments, Some(&lines))?;
    let apart = a.rows.keys().filter(|line| !b.rows.contains_key(line));
    let apart: Vec<usize> = apart.chain(b.rows.keys().filter(|line| !a.rows.contains_key(line))).copied().collect();
    if !apart.is_empty() {
        let place =
            |line: &usize| a.rows.get(line).or(b.rows.get(line)).map(|row| row.place.clone()).unwrap_or_default();
        let lines = apart.iter().take(10).map(place).collect::<Vec<_>>().join(", ");
        bail!(
            "{}: {} rows are too long for one of the models ({lines}{}), so these were not measured on the same rows\nhint: leave them out of the file, or give a --max-seq-len that both take",
            named(&arguments.file),
            apart.len(),
            if apart.len() > 10 { ", …" } else { "" }
        );
    }
    let comparison = Comparison::of(&a, &b);
    if arguments.json {
        print(&as_json(arguments, &a, &b, &comparison).to_string())?;
    } else {
        print(&in_words(arguments, &a, &b, &comparison).join("\n"))?;
    }
    Ok(Done::Whole)
}

fn reference(name: &Path, arguments: &Arguments) -> ModelRef {
    // A base is none of an adapter.
    let is_adapter = crate::models::here(name).ok().flatten();
    let is_adapter = is_adapter.is_none_or(|located| homeroom_engine::adapt::adapter::is_adapter(&located.path));
    let base_model = arguments.base_model.clone().filter(|_| is_adapter);
    ModelRef { name: name.to_owned(), base_model, any_base: arguments.any_base }
}

/// Measures a model, and has it answer the questions of some lines; `None`: of lines that it chooses.
fn measure(reference: &ModelRef, files: &[Source], arguments: &Arguments, lines: Option<&[usize]>) -> Result<Measured> {
    let loaded = Loaded::load(reference, Network::Allowed)?;
    let model = loaded.model.clone();
    let (max_seq_len, on_long_row) = (arguments.rows.max_seq_len, arguments.rows.on_long_row);
    let data = load_measured(files, &arguments.rows.read.reading(), &model, max_seq_len, on_long_row, "compare")?;
    if lines.is_none() {
        tell(&data);
    }
    let examples: Vec<&Example> = data.examples.iter().flat_map(|group| &group.sequences).collect();
    let bar = progress::counting("rows", examples.len());
    let adaptation = loaded.adaptation.as_deref();
    let (evaluation, each) = evaluate_each(&model, adaptation, &examples, arguments.compute, |done| {
        bar.set_position(done as u64);
    })?;
    bar.finish_and_clear();
    let text = |ids: &[u32]| model.tokenizer.decode(ids, true).map(|text| text.trim().to_owned());
    let mut rows: BTreeMap<usize, Row> = BTreeMap::new();
    for (example, nats) in examples.iter().zip(each) {
        let row = rows.entry(example.line()).or_default();
        row.place = data.place(example.line());
        row.nats += nats;
        row.tokens += example.trained.iter().filter(|trained| **trained).count();
        if let Some((start, end)) = answer(example).filter(|_| row.expected.is_empty()) {
            (row.question, row.expected) = (question(&model, &example.ids[..start])?, text(&example.ids[start..end])?);
        }
    }
    let asked: Vec<&Example> = match lines {
        Some(lines) => {
            let of_line = |line: &usize| {
                examples.iter().find(|example| example.line() == *line && answer(example).is_some()).copied()
            };
            lines.iter().filter_map(of_line).collect()
        }
        None => {
            let mut with_question: Vec<&Example> =
                examples.iter().filter(|example| answer(example).is_some()).copied().collect();
            // One of each question: an answer to the same again shows nothing.
            let mut seen = HashSet::new();
            with_question.dedup_by_key(|example| example.line());
            with_question.retain(|example| rows.get(&example.line()).is_none_or(|row| seen.insert(&row.question)));
            let count = arguments.samples.min(with_question.len());
            // Spread over the file.
            (0..count).map(|number| with_question[number * with_question.len() / count]).collect()
        }
    };
    let answers = if asked.is_empty() { Vec::new() } else { ask(loaded, &asked, arguments.max_tokens)? };
    let tokenizer = model.tokenizer.digest().to_owned();
    Ok(Measured { evaluation, rows, tokenizer, answers })
}

/// Where the first answer of an example begins and ends, if a question is before it.
fn answer(example: &Example) -> Option<(usize, usize)> {
    let start = example.trained.iter().position(|trained| *trained).filter(|start| *start > 1)?;
    let length = example.trained[start..].iter().position(|trained| !trained);
    Some((start, length.map_or(example.ids.len(), |length| start + length)))
}

/// The likeliest answers to the questions of some examples, all at once.
fn ask(loaded: Loaded, examples: &[&Example], max_tokens: usize) -> Result<Vec<(usize, String)>> {
    let answerer = Answerer::of(loaded, Compute::Auto)?;
    let sampling = Sampling { max_tokens, temperature: 0.0, ..Sampling::default() };
    let asked = examples.iter().map(|example| {
        let (start, _) = answer(example).context("only such with an answer are asked")?;
        Ok((example.line(), answerer.ask(&example.ids[..start], sampling)?))
    });
    let told = |(line, tokens): (usize, Tokens)| {
        let ids = tokens.collect::<Result<Vec<u32>>>()?;
        Ok((line, answerer.model().tokenizer.decode(&ids, true)?.trim().to_owned()))
    };
    asked.collect::<Result<Vec<_>>>()?.into_iter().map(told).collect()
}

/// How two models differ.
struct Comparison {
    /// Whether they cut the rows into the same tokens: a loss a token is then one of the same things.
    same_tokens: bool,
    test: Paired,
    better: usize,
    worse: usize,
    /// Line, loss of A and of B, and their difference: nats a token, or a row where tokens are not the same. The largest fall is first.
    rows: Vec<(usize, f64, f64, f64)>,
}

impl Comparison {
    fn of(a: &Measured, b: &Measured) -> Self {
        let pairs: Vec<(usize, &Row, &Row)> =
            a.rows.iter().filter_map(|(line, a)| Some((*line, a, b.rows.get(line)?))).collect();
        let same_tokens = a.tokenizer == b.tokenizer && pairs.iter().all(|(_, a, b)| a.tokens == b.tokens);
        let weight = |row: &Row| if same_tokens { row.tokens.max(1) as f64 } else { 1.0 };
        let differences: Vec<(f64, f64)> = pairs.iter().map(|(_, a, b)| (b.nats - a.nats, weight(a))).collect();
        let mut rows: Vec<_> = pairs
            .iter()
            .map(|(line, a, b)| {
                let (before, after) = (a.nats / weight(a), b.nats / weight(b));
                (*line, before, after, after - before)
            })
            .collect();
        rows.sort_by(|x, y| x.3.total_cmp(&y.3).then(x.0.cmp(&y.0)));
        let count = |is: fn(f64) -> bool| differences.iter().filter(|(difference, _)| is(*difference)).count();
        let (better, worse) = (count(|difference| difference < 0.0), count(|difference| difference > 0.0));
        Self { same_tokens, test: Paired::of(&differences), better, worse, rows }
    }

    /// What the losses are of.
    fn unit(&self) -> &'static str {
        if self.same_tokens { "token" } else { "row" }
    }

    fn verdict(&self, names: [&str; 2]) -> String {
        let rows = self.rows.len();
        let Paired { difference, p, .. } = self.test;
        let p_words = if p < 0.001 { "p < 0.001".to_owned() } else { format!("p = {p:.3}") };
        if p >= LEVEL {
            // Of n signs all are alike by chance once in 2^(n - 1).
            let few = if rows < 6 { ", and so few could not show one" } else { "" };
            return format!("these {rows} rows show no difference beyond chance ({p_words}){few}");
        }
        let better = if difference < 0.0 { names[1] } else { names[0] };
        format!("{better} is better on such rows, by more than chance ({p_words})")
    }
}

/// A difference of pairs, and how far chance could make it.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Paired {
    /// Sum of the differences over the sum of the weights.
    difference: f64,
    /// Between these it lies in 95 of 100 samples of as many rows.
    low: f64,
    high: f64,
    /// How often a difference as large comes if each row's sign is left to chance.
    p: f64,
}

/// Samples that are drawn, unless the rows are so many that fewer do.
const DRAWS: usize = 10_000;
/// Up to so many rows all signs are tried.
const ROWS_EXACT: usize = 12;

impl Paired {
    /// Of a difference and a weight a row. The interval is a paired bootstrap over rows (Efron 1979; for language: Koehn 2004,
    /// <https://aclanthology.org/W04-3250>), `p` a two-sided paired permutation test (Fisher 1935), which is exact for few rows.
    fn of(rows: &[(f64, f64)]) -> Self {
        let weight: f64 = rows.iter().map(|(_, weight)| weight).sum();
        let sum: f64 = rows.iter().map(|(difference, _)| difference).sum();
        let size: f64 = rows.iter().map(|(difference, _)| difference.abs()).sum();
        if rows.is_empty() || size == 0.0 {
            return Self { difference: 0.0, low: 0.0, high: 0.0, p: 1.0 };
        }
        let draws = (20_000_000 / rows.len()).clamp(1000, DRAWS);
        let mut random = Stream::new(42, 0);
        let mut means: Vec<f64> = (0..draws)
            .map(|_| {
                let drawn = (0..rows.len()).map(|_| rows[random.below(rows.len())]);
                let (difference, weight) = drawn.fold((0.0, 0.0), |(a, b), (c, d)| (a + c, b + d));
                difference / weight
            })
            .collect();
        means.sort_by(f64::total_cmp);
        let at = |share: f64| means[((draws - 1) as f64 * share).round() as usize];
        // Sums of the same numbers in another order differ by rounding.
        let is_as_large = |other: f64| other.abs() >= sum.abs() - 1e-12 * size;
        let p = if rows.len() <= ROWS_EXACT {
            let signs = 0..1usize << rows.len();
            let flipped = |signs: &usize| {
                let sum = rows.iter().enumerate().map(|(at, (d, _))| if signs >> at & 1 == 1 { -d } else { *d }).sum();
                is_as_large(sum)
            };
            signs.clone().filter(flipped).count() as f64 / signs.len() as f64
        } else {
            let mut flip = || {
                let mut bits = 0;
                let sum = rows.iter().enumerate().map(|(at, (difference, _))| {
                    if at.is_multiple_of(64) {
                        bits = random.next_u64();
                    }
                    if bits >> (at % 64) & 1 == 1 { -difference } else { *difference }
                });
                is_as_large(sum.sum())
            };
            // The rows as they are count as one of the draws.
            (1 + (0..draws).filter(|_| flip()).count()) as f64 / (1 + draws) as f64
        };
        Self { difference: sum / weight, low: at(0.025), high: at(0.975), p }
    }
}

fn in_words(arguments: &Arguments, a: &Measured, b: &Measured, comparison: &Comparison) -> Vec<String> {
    let names = names(arguments);
    let row = |name: &str, of: &dyn Fn(&Evaluation) -> String| {
        vec![name.to_owned(), of(&a.evaluation), of(&b.evaluation), String::new()]
    };
    let head = vec![String::new(), names[0].clone(), names[1].clone(), String::new()];
    let numbers = [
        head,
        row("loss", &|evaluation| format!("{:.4}", evaluation.loss)),
        row("perplexity", &|evaluation| format!("{:.2}", evaluation.perplexity)),
        row("token accuracy", &|evaluation| format!("{:.3}", evaluation.token_accuracy)),
        row("tokens", &|evaluation| thousands(evaluation.trained_tokens).to_string()),
    ];
    let width = Stdout.width();
    let right = Column { right: true, spare: 0 };
    let left = Column { right: false, spare: 0 };
    let mut out = lines(&[left, right, right, left], &numbers, width);
    let Paired { difference, low, high, .. } = comparison.test;
    let (unit, rows) = (comparison.unit(), comparison.rows.len());
    if !comparison.same_tokens {
        line(
            "note: the models cut text into other tokens, so that their losses a token are not of the same things; rows are compared whole",
        );
    }
    out.push(format!(
        "\ndifference  {difference:+.4} nats a {unit}, 95 % of samples of {rows} rows between {low:+.4} and {high:+.4}"
    ));
    let equal = rows - comparison.better - comparison.worse;
    let equal = if equal > 0 { format!(", the same on {equal}") } else { String::new() };
    out.push(format!(
        "rows        {} is better on {}, worse on {}{equal}",
        names[1], comparison.better, comparison.worse
    ));
    out.push(format!("verdict     {}", comparison.verdict([&names[0], &names[1]])));
    let told = |(line, before, after, difference): &(usize, f64, f64, f64)| {
        let row = a.rows.get(line).cloned().unwrap_or_default();
        let (place, question) = (row.place, brief(&row.question));
        vec![format!("  {place}"), format!("{before:.3} → {after:.3}"), format!("{difference:+.3}"), question]
    };
    let better = comparison.rows.iter().filter(|row| row.3 < 0.0).take(ROWS_TOLD);
    let worse = comparison.rows.iter().rev().filter(|row| row.3 > 0.0).take(ROWS_TOLD);
    for (head, rows) in
        [("better by most", better.map(told).collect::<Vec<_>>()), ("worse by most", worse.map(told).collect())]
    {
        if !rows.is_empty() {
            out.push(format!("\n{head}, in nats a {unit}"));
            out.extend(lines(&[left, right, right, left], &rows, width));
        }
    }
    for (line, question, expected, answers) in samples(a, b) {
        let place = a.rows.get(&line).map(|row| row.place.as_str()).unwrap_or_default();
        out.push(format!("\n{place}"));
        let wide = names.iter().map(|name| name.chars().count()).max().unwrap_or(0).clamp(8, 30);
        for (who, text) in
            [("question", question), ("expected", expected), (&names[0], answers[0]), (&names[1], answers[1])]
        {
            out.push(format!("  {who:wide$}  {}", cell(&text.split_whitespace().collect::<Vec<_>>().join(" "))));
        }
    }
    out
}

/// What the models are called: as they were typed, or the last parts of paths that differ in these.
fn names(arguments: &Arguments) -> [String; 2] {
    let typed = [&arguments.a, &arguments.b].map(|name| cell(&name.display().to_string()));
    let short = [&arguments.a, &arguments.b].map(|name| match name.is_absolute() {
        true => name.file_name().map_or_else(String::new, |name| cell(&name.to_string_lossy())),
        false => cell(&name.display().to_string()),
    });
    if short[0] == short[1] || short.iter().any(String::is_empty) { typed } else { short }
}

/// The end of a question, in one line.
fn brief(question: &str) -> String {
    let text = question.split_whitespace().collect::<Vec<_>>().join(" ");
    let count = text.chars().count();
    match count.checked_sub(QUESTION_MAX) {
        None | Some(0) => cell(&text),
        Some(more) => format!("…{}", cell(&text.chars().skip(more + 1).collect::<String>())),
    }
}

/// Line, question, what the row answers, and what each model does.
fn samples<'a>(a: &'a Measured, b: &'a Measured) -> impl Iterator<Item = (usize, &'a str, &'a str, [&'a str; 2])> {
    a.answers.iter().filter_map(|(line, answer)| {
        let (_, other) = b.answers.iter().find(|(other, _)| other == line)?;
        let row = a.rows.get(line)?;
        Some((*line, row.question.as_str(), row.expected.as_str(), [answer.as_str(), other.as_str()]))
    })
}

fn as_json(arguments: &Arguments, a: &Measured, b: &Measured, comparison: &Comparison) -> Value {
    let model = |name: &Path, Measured { evaluation, .. }: &Measured| {
        json!({
            "model": name.to_string_lossy(),
            "loss": evaluation.loss,
            "perplexity": evaluation.perplexity,
            "token_accuracy": evaluation.token_accuracy,
            "trained_tokens": evaluation.trained_tokens,
        })
    };
    let Paired { difference, low, high, p } = comparison.test;
    let rows = comparison
        .rows
        .iter()
        .map(|(line, a, b, difference)| json!({"line": line, "a": a, "b": b, "difference": difference}));
    let samples = samples(a, b).map(|(line, prompt, expected, [a, b])| {
        json!({"line": line, "prompt": prompt, "expected": expected, "a": a, "b": b})
    });
    json!({
        "a": model(&arguments.a, a),
        "b": model(&arguments.b, b),
        "rows": comparison.rows.len(),
        "same_tokens": comparison.same_tokens,
        "difference": {
            "per": comparison.unit(),
            "nats": difference,
            "low": low,
            "high": high,
            "p": p,
            "more_than_chance": p < LEVEL,
            "better": comparison.better,
            "worse": comparison.worse,
        },
        "by_row": rows.collect::<Value>(),
        "samples": samples.collect::<Value>(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn paired(differences: &[f64]) -> Paired {
        Paired::of(&differences.iter().map(|difference| (*difference, 1.0)).collect::<Vec<_>>())
    }

    #[test]
    fn few_rows_show_what_their_signs_can_show() {
        // All signs alike come twice in 2^n.
        for count in 1..=12 {
            assert_eq!(paired(&vec![-0.5; count]).p, 2.0 / f64::from(1 << count), "{count} rows");
        }
        // |sum| of 3 2 1 with signs: 6, 4, 2, 0 each twice; at least 4 are four of eight.
        assert_eq!(paired(&[3.0, 2.0, -1.0]).p, 0.5);
        assert_eq!(paired(&[0.0, 0.0]), Paired { difference: 0.0, low: 0.0, high: 0.0, p: 1.0 });
        assert_eq!(paired(&[]).p, 1.0);
    }

    #[test]
    fn what_chance_makes_is_rarely_taken_for_a_difference_and_a_difference_is_found() {
        let mut random = Stream::new(7, 0);
        let mut draw = |shift: f64| {
            let rows: Vec<(f64, f64)> = (0..80).map(|_| (shift + random.normal(), 1.0)).collect();
            Paired::of(&rows)
        };
        let (mut taken, mut outside) = (0, 0);
        for _ in 0..100 {
            let chance = draw(0.0);
            taken += u32::from(chance.p < LEVEL);
            outside += u32::from(chance.low > 0.0 || chance.high < 0.0);
        }
        // Five of a hundred are expected; 13 or more would come once in a thousand.
        assert!(taken < 13 && outside < 14, "{taken} {outside}");
        // Half a standard deviation, 4.5 standard errors of the mean.
        let found = (0..20).map(|_| draw(-0.5)).filter(|test| test.p < LEVEL && test.high < 0.0).count();
        assert!(found >= 19, "{found}");
    }

    #[test]
    fn the_difference_is_a_mean_over_tokens_and_its_interval_is_around_it() {
        let rows: Vec<(f64, f64)> = (1..=30).map(|n| (-0.1 * f64::from(n), f64::from(n))).collect();
        let test = Paired::of(&rows);
        // Each token is better by 0.1 nats, in every row and so in every sample.
        assert!([test.difference, test.low, test.high].iter().all(|value| (value + 0.1).abs() < 1e-12), "{test:?}");
        assert!(test.p < 0.001);
    }
}
