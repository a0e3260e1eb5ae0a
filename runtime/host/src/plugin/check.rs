//! The conformance run behind `homeroom plugins check`: what a strategy says and plans, each answer asked for in a child process,
//! and what its plans compute on tiny models.

use std::path::Path;

use anyhow::{Context, Result, anyhow, ensure};
use homeroom_abi::describe::{Description, OptionKind, OptionSpec};
use homeroom_abi::plan::{Plan, PlanRequest};
use homeroom_engine::adapt::adapter::StrategyRecord;
use homeroom_engine::adapt::conformance::{self, TinyModel, tiny_models};
use serde::Serialize;
use serde_json::{Map, Value, json};

use super::find::strategy_name;
use super::probe::Failure;
use super::stage::Staged;
use super::{PluginFile, Probe, peft};

/// What came of one check.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    /// As it should be.
    Ok,
    /// Allowed, and worth knowing.
    Note,
    /// Wrong.
    Failed,
}

/// One line of the report.
#[derive(Clone, Debug, Serialize)]
pub struct Line {
    /// What was checked.
    pub check: String,
    /// What came of it.
    pub verdict: Verdict,
    /// What was found, or why it failed.
    pub why: String,
}

/// All lines, in the order in which they were checked. A strategy that does not load has one.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Report {
    /// The lines.
    pub checks: Vec<Line>,
}

impl Report {
    /// How many checks failed.
    pub fn failed(&self) -> usize {
        self.checks.iter().filter(|line| line.verdict == Verdict::Failed).count()
    }

    fn add(&mut self, check: &str, outcome: Result<(Verdict, String)>) {
        let (verdict, why) = outcome.unwrap_or_else(|error| (Verdict::Failed, format!("{error:#}")));
        self.checks.push(Line { check: check.to_owned(), verdict, why });
    }
}

fn fine(why: impl Into<String>) -> Result<(Verdict, String)> {
    Ok((Verdict::Ok, why.into()))
}

/// Checks a strategy's file.
///
/// # Errors
/// When the check itself cannot be run. What is wrong with the strategy is in the report.
pub fn check(file: &Path, probe: &Probe) -> Result<Report> {
    let models = tiny_models()?;
    let mut report = Report::default();
    let load = || -> Result<_> {
        let staged = PluginFile::read(file)?.stage()?;
        let loaded = probe.ask(&staged, &[])?;
        Ok((staged, loaded))
    };
    let (staged, loaded) = match load() {
        Ok(loaded) => loaded,
        Err(error) => {
            report.add("load", Err(error));
            return Ok(report);
        }
    };
    let about = &loaded.description;
    report.add("load", fine(format!("{} {}, ABI fits, panics unwind", about.name, about.version)));
    report.add("describe", described(file, about));
    let strategy =
        StrategyRecord { name: about.name.clone(), version: about.version.clone(), sha256: staged.sha256.clone() };
    let asked = Asked { probe, staged: &staged };
    let mut planned = Vec::new();
    for tiny in &models {
        let check = format!("plan: {}", tiny.words);
        match asked.plan(tiny, &Map::new())? {
            Ok(plan) => match conformance::adapt(&tiny.model, &plan) {
                Ok(_) => {
                    report.add(&check, fine(plan_words(&plan)));
                    planned.push((tiny, plan));
                }
                Err(error) => report.add(&check, Err(error)),
            },
            Err(failure) => {
                report.add(&check, Err(anyhow!(failure.reason)));
                // Each further question would take as long.
                if failure.late {
                    return Ok(report);
                }
            }
        }
    }
    report.add("unknown option", unknown_option(&asked, &models[0], about));
    report.add("wrong type", wrong_types(&asked, &models[0], about));
    // The rest is the same code for each model; one that plans is needed.
    let Some((tiny, _)) = planned.first() else {
        report.add("extreme values", Ok((Verdict::Note, "not tried: it plans for none of the models".to_owned())));
        return Ok(report);
    };
    report.add("extreme values", extremes(&asked, tiny, about));
    report.add("plan twice", same_twice(&asked, &planned));
    report.add("gradients", of_all(&planned, |tiny, plan| conformance::gradients(&tiny.model, plan)).and_then(fine));
    report.add("fresh adapter", fresh(&planned));
    report.add("merge", merging(&planned));
    let files = of_all(&planned, |tiny, plan| conformance::files(&tiny.model, plan, &strategy));
    let no_mapping = planned.iter().any(|(tiny, plan)| {
        plan.peft.is_none()
            && conformance::adapt(&tiny.model, plan).is_ok_and(|adaptation| !adaptation.is_whole_model())
    });
    report.add("files", files.map(|why| (if no_mapping { Verdict::Note } else { Verdict::Ok }, why)));
    if let Some(outcome) = of_peft(&planned) {
        report.add("PEFT", outcome);
    }
    if let Some(outcome) = codecs(&planned) {
        report.add("codec", outcome);
    }
    Ok(report)
}

/// What is asked, and by whom.
struct Asked<'a> {
    probe: &'a Probe,
    staged: &'a Staged,
}

impl Asked<'_> {
    /// Plans, all from one child.
    fn plans(&self, requests: &[PlanRequest]) -> Result<Vec<Result<Plan, Failure>>> {
        Ok(self.probe.ask(self.staged, requests)?.plans)
    }

    /// One plan, from a child of its own.
    fn plan(&self, tiny: &TinyModel, options: &Map<String, Value>) -> Result<Result<Plan, Failure>> {
        let request = PlanRequest { options: options.clone(), model: tiny.model.info() };
        // A child that does not load or end well this time has not planned.
        let ended = |error| Failure { reason: format!("{error:#}"), ended: true, ..Failure::default() };
        match self.plans(&[request]) {
            Ok(mut plans) => plans.pop().context("one request has one answer"),
            Err(error) => Ok(Err(ended(error))),
        }
    }
}

fn plan_words(plan: &Plan) -> String {
    let params: usize = plan.params.len() + plan.modules.iter().map(|module| module.params.len()).sum::<usize>();
    format!("{} modules, {params} parameters, {} recipes", plan.modules.len(), plan.recipes.len())
}

fn described(file: &Path, about: &Description) -> Result<(Verdict, String)> {
    let mut problems = Vec::new();
    let snake = |name: &str| {
        let body = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_';
        name.starts_with(|c: char| c.is_ascii_lowercase()) && name.chars().all(body)
    };
    let named = strategy_name(file).unwrap_or_default();
    if named != about.name {
        problems.push(format!("it calls itself `{}`, its file says `{named}`; rename one", about.name));
    }
    if !snake(&about.name) {
        problems.push(format!("the name `{}` is not small letters, digits and underscores", about.name));
    }
    if about.version.is_empty() {
        problems.push("it has no version".to_owned());
    }
    if about.doc.trim().is_empty() {
        problems.push("it has no line of doc".to_owned());
    }
    for (index, OptionSpec { name, kind, default, doc }) in about.options.iter().enumerate() {
        if !snake(name) {
            problems.push(format!("the option `{name}` is not small letters, digits and underscores"));
        }
        if about.options[..index].iter().any(|other| other.name == *name) {
            problems.push(format!("the option `{name}` is there twice"));
        }
        if !kind.admits(default) {
            problems.push(format!("the default of `{name}` is {default}, the option takes {}", kind.words()));
        }
        if doc.trim().is_empty() {
            problems.push(format!("the option `{name}` has no line of doc"));
        }
    }
    ensure!(problems.is_empty(), "{}", problems.join("; "));
    fine(format!("{} options, each with doc and a default that it admits", about.options.len()))
}

fn unknown_option(asked: &Asked<'_>, tiny: &TinyModel, about: &Description) -> Result<(Verdict, String)> {
    let near = about.options.iter().map(|option| option.name.as_str()).max_by_key(|name| name.len());
    let wrong = near.map_or("no_such_option".to_owned(), |name| format!("{name}x"));
    let options = Map::from_iter([(wrong.clone(), json!(1))]);
    let error = match asked.plan(tiny, &options)? {
        Ok(_) => anyhow::bail!("`{wrong}` is planned as if it were an option"),
        Err(failure) => failure.reason,
    };
    ensure!(error.contains(&format!("`{wrong}`")), "the error does not name `{wrong}`: {error}");
    if let Some(near) = near {
        ensure!(error.contains(&format!("`{near}`")), "the error for `{wrong}` does not point to `{near}`: {error}");
    }
    fine("is named, with the nearest that there is")
}

fn wrong_types(asked: &Asked<'_>, tiny: &TinyModel, about: &Description) -> Result<(Verdict, String)> {
    let requests = about.options.iter().map(|option| {
        let wrong = if option.kind == OptionKind::Bool { json!("yes") } else { json!(true) };
        PlanRequest { options: Map::from_iter([(option.name.clone(), wrong)]), model: tiny.model.info() }
    });
    let answers = asked.plans(&requests.collect::<Vec<_>>())?;
    for (option, answer) in about.options.iter().zip(answers) {
        let name = &option.name;
        match answer {
            Ok(_) => anyhow::bail!("`{name}` takes {}, and is planned with a value that is not", option.kind.words()),
            Err(Failure { reason, .. }) => {
                ensure!(reason.contains(&format!("`{name}`")), "the error does not name `{name}`: {reason}");
            }
        }
    }
    fine("is named, for every option")
}

/// Values of the right type that few strategies can use: they are planned or refused, with no panic.
fn extremes(asked: &Asked<'_>, tiny: &TinyModel, about: &Description) -> Result<(Verdict, String)> {
    let values = |kind| match kind {
        OptionKind::Int => vec![json!(0), json!(1_u64 << 53)],
        OptionKind::Float => vec![json!(-1), json!(0), json!(1e300)],
        OptionKind::Bool => vec![json!(false), json!(true)],
        OptionKind::String => vec![json!("")],
        OptionKind::StringOrList => vec![json!(""), json!("("), json!([])],
        OptionKind::Map => vec![json!({"(": 1}), json!({"q_proj": -1.5})],
    };
    let tried =
        about.options.iter().flat_map(|option| values(option.kind).into_iter().map(|value| (&option.name, value)));
    let (mut planned, mut refused) = (0, 0);
    for (name, value) in tried {
        match asked.plan(tiny, &Map::from_iter([(name.clone(), value.clone())]))? {
            Ok(_) => planned += 1,
            Err(Failure { reason, ended, .. }) => {
                ensure!(!ended && !reason.contains("panicked"), "`{name}` = {value}: {reason}");
                refused += 1;
            }
        }
    }
    if about.options.is_empty() {
        return fine("it has no options");
    }
    fine(format!("{planned} planned, {refused} refused in words"))
}

fn same_twice(asked: &Asked<'_>, planned: &[(&TinyModel, Plan)]) -> Result<(Verdict, String)> {
    for (tiny, first) in planned {
        let request = PlanRequest { options: Map::new(), model: tiny.model.info() };
        for again in asked.plans(&[request.clone(), request])? {
            let again = again.map_err(|failure| anyhow!("{}: {}", tiny.words, failure.reason))?;
            ensure!(
                serde_json::to_value(&again)? == serde_json::to_value(first)?,
                "{}: it is not the same plan",
                tiny.words
            );
        }
    }
    fine("the same in two processes, and twice in one")
}

/// Runs a check on each model, and gives what it said of the last.
fn of_all(planned: &[(&TinyModel, Plan)], check: impl Fn(&TinyModel, &Plan) -> Result<String>) -> Result<String> {
    let mut said = String::new();
    for (tiny, plan) in planned {
        said = check(tiny, plan).with_context(|| tiny.words)?;
    }
    Ok(said)
}

fn fresh(planned: &[(&TinyModel, Plan)]) -> Result<(Verdict, String)> {
    let mut most = 0_f64;
    for (tiny, plan) in planned {
        most = most.max(conformance::fresh_difference(&tiny.model, plan).with_context(|| tiny.words)?);
    }
    if most < 1e-5 {
        return fine("answers as the base does");
    }
    Ok((Verdict::Note, format!("its logits differ from the base's by {:.1} % before any training", 100.0 * most)))
}

fn merging(planned: &[(&TinyModel, Plan)]) -> Result<(Verdict, String)> {
    let mut most = 0_f64;
    for (tiny, plan) in planned {
        match conformance::merging(&tiny.model, plan).with_context(|| tiny.words)? {
            Some(apart) => most = most.max(apart),
            None => return Ok((Verdict::Note, "no `merged`, so that its models cannot be exported merged".to_owned())),
        }
    }
    fine(format!("merged and not, outputs agree to {most:.0e} of the largest"))
}

/// `None`: no plan names a type of PEFT's.
fn of_peft(planned: &[(&TinyModel, Plan)]) -> Option<Result<(Verdict, String)>> {
    let said: Result<Vec<_>> = planned.iter().map(|(tiny, plan)| peft::check(plan).context(tiny.words)).collect();
    match said {
        Ok(said) => said.into_iter().flatten().next_back().map(fine),
        Err(error) => Some(Err(error)),
    }
}

/// `None`: no module has a codec.
fn codecs(planned: &[(&TinyModel, Plan)]) -> Option<Result<(Verdict, String)>> {
    let mut found: Vec<&homeroom_abi::codec::Codec> = Vec::new();
    for codec in planned.iter().flat_map(|(_, plan)| &plan.codecs) {
        if !found.contains(&codec) {
            found.push(codec);
        }
    }
    let said: Result<Vec<String>> = found
        .iter()
        .map(|codec| Ok(format!("{}: values come back to {:.1} %", codec.name, 100.0 * conformance::codec(codec)?)))
        .collect();
    (!found.is_empty()).then(|| said.and_then(|said| fine(said.join(", "))))
}
