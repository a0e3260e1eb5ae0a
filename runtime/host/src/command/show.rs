//! `homeroom show`.

use std::path::{Path, PathBuf};

use anyhow::{Result, bail};
use clap::Args;
use homeroom_engine::files::{broken_link, is_named, utf8};
use serde_json::{Map, Value, json};

use super::{Done, print};
use crate::hub::{self, HubName, policy};
use crate::near::{LIST_HINT, did_you_mean, model};
use crate::progress::{millions, size, thousands};
use crate::registry::{self, Base, Details, Entry};
use crate::terminal::cell;

/// Arguments of `show`.
#[derive(Args)]
pub struct Arguments {
    /// Name from `homeroom list-models`, a base's name on the hub, or a path
    #[arg(value_name = "MODEL")]
    model: PathBuf,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

/// Shows what is known of a model.
pub fn run(arguments: &Arguments) -> Result<Done> {
    let (details, base) = look(&arguments.model)?;
    utf8(&details.entry.path)?;
    let next = next(&details, base.as_ref());
    if arguments.json {
        let mut all = serde_json::to_value(&details)?;
        if let Some(base) = &base {
            let about = json!({
                "kind": base.kind, "forms": base.forms, "usable": base.usable, "commits": base.commits, "shared": base.shared,
            });
            all.as_object_mut().into_iter().zip(about.as_object()).for_each(|(all, about)| all.extend(about.clone()));
        }
        all["next"] = json!(next);
        print(&all.to_string())?;
        return Ok(Done::Whole);
    }
    let mut lines = Vec::new();
    let mut add = |key: &str, text: String| {
        if !text.is_empty() {
            // Each keeps to its line, whatever another program wrote there.
            lines.push(format!("{key:9} {}", cell(&text)));
        }
    };
    about(&details, base.as_ref(), &mut add);
    trained(&details, &mut add);
    let Details { entry, files, .. } = &details;
    let files: Vec<String> = files.iter().map(|(name, bytes)| format!("{name} {}", size(*bytes))).collect();
    add("files", files.join(", "));
    add("size", size(entry.bytes));
    let date = entry.date.clone().unwrap_or_default();
    add("date", if base.is_some() && !date.is_empty() { format!("downloaded {date}") } else { date });
    add("problem", entry.problem.clone().unwrap_or_default());
    add("next", next);
    print(&lines.join("\n"))?;
    Ok(Done::Whole)
}

/// What a name or a path leads to; a base of the cache with what that knows of it.
fn look(name: &Path) -> Result<(Details, Option<Base>)> {
    let mut path = registry::resolve(name);
    // One that is missed, as a link that leads nowhere is, is shown as well.
    let registered = name.to_str().filter(|text| registry::is_name(text) && !path.exists());
    if let Some(place) = registered.and_then(|text| registry::place(text).ok()) {
        path = place;
    }
    if path.exists() || registered.is_some() && is_named(&path)? {
        // One that lies in the registry is shown by its name there, however it was named.
        let short = registry::short(&path);
        return Ok((Details::of(registry::entry(short, path)), None));
    }
    if let Some(link) = broken_link(&path) {
        bail!("{}: {link}", name.display());
    }
    let text = name.display();
    let Some(hub_name) = name.to_str().and_then(HubName::parse) else {
        bail!("{text}: no such model{}{LIST_HINT}", did_you_mean(model(name)));
    };
    let base = registry::bases()?.into_iter().find(|base| base.name == hub_name.repo);
    let Some(base) = base else {
        bail!("{text}: not on this machine{}\nhint: `homeroom pull {text}` fetches it", did_you_mean(model(name)));
    };
    let dated = |mut entry: Entry| {
        (entry.bytes, entry.date) = (base.bytes, base.date.clone().or(entry.date));
        entry
    };
    // What may not be used here may be looked at.
    let refused = policy::check(&hub_name.repo).err();
    let is_bare = hub_name.quantization.is_none() && hub_name.revision.is_none();
    let is_choice = refused.is_none() && is_bare && !base.usable.is_empty();
    let found = match hub::find(&hub_name) {
        _ if refused.is_some() => None,
        // Of several files each can be named.
        Err(_) if is_choice => None,
        found => found?,
    };
    if let Some(found) = found {
        let mut entry = dated(registry::entry(hub_name.to_string(), found.path));
        entry.base_revision = Some(found.commit);
        return Ok((Details::of(entry), Some(base)));
    }
    let mut entry = dated(registry::entry(hub_name.to_string(), base.path.clone()));
    entry.problem = Some(match refused {
        // Its first line is about this model.
        Some(error) => {
            error.to_string().lines().next().unwrap_or_default().replacen(&format!("{}: ", base.name), "", 1)
        }
        None if base.forms.is_empty() => {
            format!("not all of its files are here; `homeroom pull {hub_name}` fetches them")
        }
        None => format!("there is {}, and not what is named", base.forms.join(", ")),
    });
    let mut details = Details::of(entry);
    // It is several models, each by its name; nothing is wrong with that.
    if is_choice {
        details.entry.problem = base.problem.clone();
        details.files = base.usable.iter().map(|usable| (usable.name.clone(), usable.bytes)).collect();
    }
    Ok((details, Some(base)))
}

/// What it is, where it lies, and where it comes from.
fn about(details: &Details, base: Option<&Base>, add: &mut dyn FnMut(&str, String)) {
    let Entry { name, path, kind, strategy, .. } = &details.entry;
    add("name", name.clone());
    let version = details.strategy_version.as_ref().map(|version| format!(" {version}")).unwrap_or_default();
    let by = if strategy.is_empty() { String::new() } else { format!(", by {strategy}{version}") };
    add(
        "kind",
        match base {
            Some(base) => format!("base   {}", base.forms.join(" ")),
            None => format!("{kind}{by}"),
        },
    );
    add("path", path.display().to_string());
    if let Some(base) = base {
        let store = if base.shared { "a store that is shared" } else { "the cache, which Python's programs use, too" };
        add("", format!("in {store}"));
        add("commits", base.commits.join(", "));
        if base.usable.len() > 1 {
            add("names", base.usable.iter().map(|usable| usable.name.as_str()).collect::<Vec<_>>().join(", "));
        }
    }
    if let Some(model) = &details.model {
        add("model", format!("{}, {} parameters, {}", model.model_type, millions(model.parameters), model.storage));
        add(
            "",
            format!(
                "{} layers of width {}, {} tokens, context {}",
                model.layers,
                model.hidden_size,
                thousands(model.vocab_size),
                thousands(model.context)
            ),
        );
    }
    if let Some(vectors) = &details.vectors {
        let (kind, width, tokens) = (&vectors.model_type, vectors.dimensions, thousands(vectors.max_tokens));
        add("model", format!("{kind}, vectors of {width} numbers, of {tokens} tokens at most"));
    }
    let entry = &details.entry;
    if base.is_none() {
        let place = entry.base.display().to_string();
        let commit = entry.base_revision.as_ref().map(|commit| format!("@{}", beginning(commit))).unwrap_or_default();
        match entry.base_name.as_ref().filter(|name| **name != place) {
            Some(name) => {
                add("base", format!("{name}{commit}"));
                add("", format!("in {place}"));
            }
            None => add("base", place),
        }
        let stored = details.base_storage.clone().map(|storage| format!("stored as {storage}"));
        let digest = details.base_digest.as_deref().map(|digest| format!("values {}", beginning(digest)));
        add("", stored.into_iter().chain(digest).collect::<Vec<_>>().join(", "));
    }
    let parents = details.lineage.parents.iter().map(|parent| match parent.is_there {
        true => parent.name.clone(),
        false => format!("{} (not there any more)", parent.name),
    });
    add("parents", parents.collect::<Vec<_>>().join(", "));
    add("children", details.lineage.children.join(", "));
}

/// How it was trained, and what came of it.
fn trained(details: &Details, add: &mut dyn FnMut(&str, String)) {
    let entry = &details.entry;
    let shown = |value: &Value| value.as_str().map_or_else(|| value.to_string(), str::to_owned);
    let pair = |(key, value): (&String, &Value)| format!("{key} {}", shown(value));
    add("options", details.options.iter().map(pair).collect::<Vec<_>>().join(", "));
    let modules = match &details.target_modules {
        Value::Array(names) => names.iter().map(shown).collect::<Vec<_>>().join(", "),
        Value::Null => String::new(),
        other => shown(other),
    };
    let rank = details.r.map(|r| format!("rank {r}, ")).unwrap_or_default();
    add("modules", if modules.is_empty() { modules } else { format!("{rank}{modules}") });
    let rows = entry.rows.map(|rows| format!("{} trained on", thousands(rows as usize)));
    let held_out = entry.eval_rows.map(|rows| format!("{} held out", thousands(rows as usize)));
    let digest = details.data_digest.as_deref().map(|digest| format!("digest {}", beginning(digest)));
    add("rows", rows.into_iter().chain(held_out).chain(digest).collect::<Vec<_>>().join(", "));
    add("training", training(&details.config, details.steps, details.interrupted));
    let loss = |words: &str, loss: Option<f64>| {
        loss.map(|loss| match loss.abs() < 1e6 {
            true => format!("{words} {loss:.4}"),
            // Another program wrote it.
            false => format!("{words} {loss:.4e}"),
        })
    };
    let losses = [
        loss("held-out before", entry.eval_loss_before),
        loss("after", entry.eval_loss),
        loss("training", entry.train_loss),
    ];
    add("loss", losses.into_iter().flatten().collect::<Vec<_>>().join(", "));
    let of_model = details.model.as_ref().and_then(|model| model.template_digest.clone());
    let short = |digest: &Option<String>| digest.as_deref().map(beginning).unwrap_or_default().to_owned();
    add("template", short(&details.template_digest.clone().or(of_model)));
    add("tokenizer", short(&details.tokenizer_digest));
}

/// The first digits of a digest or a commit, which tell it from others; `--json` has all.
fn beginning(digest: &str) -> &str {
    const DIGITS: usize = 12;
    let digits = digest.split_once(':').map_or(digest, |(_, digits)| digits);
    digits.get(..DIGITS).unwrap_or(digits)
}

/// Epochs, steps and the numbers of the loop, in words.
fn training(config: &Map<String, Value>, steps: Option<u64>, interrupted: bool) -> String {
    let number = |key: &str| config.get(key).filter(|value| value.is_number()).map(Value::to_string);
    let parts = [
        steps.map(|steps| format!("{} steps", thousands(steps as usize))),
        number("epochs").map(|epochs| format!("epochs {epochs}")),
        number("batch_size").map(|rows| format!("batch size {rows}")),
        number("learning_rate").map(|rate| format!("learning rate {rate}")),
        number("seed").map(|seed| format!("seed {seed}")),
        interrupted.then(|| "stopped before its end".to_owned()),
    ];
    parts.into_iter().flatten().collect::<Vec<_>>().join(", ")
}

/// The command that goes on with it.
fn next(details: &Details, base: Option<&Base>) -> String {
    let Entry { name, kind, problem, .. } = &details.entry;
    match (problem, *kind) {
        (Some(problem), "adapter") if problem.starts_with("its base") => {
            format!("homeroom chat --model-dir {name} --base-model MODEL --prompt \"...\"")
        }
        (Some(_), _) => String::new(),
        (None, kind) => match base.filter(|base| base.name == *name) {
            Some(base) => of_base(base),
            None => command_of(name, kind, base.is_some()),
        },
    }
}

/// The command that goes on with a base: of several quantizations, with the first.
pub fn of_base(base: &Base) -> String {
    let form = base.forms.first().map(String::as_str);
    let kind = form.filter(|form| ["embedding", "adapter"].contains(form)).unwrap_or("model");
    command_of(base.usable.first().map_or(&base.name, |usable| &usable.name), kind, true)
}

/// The command that goes on with a model that is whole.
pub fn command_of(name: &str, kind: &str, is_base: bool) -> String {
    match kind {
        "embedding" => format!("homeroom serve --model-dir {name}"),
        "model" if is_base => format!("homeroom fine-tune --model-name {name} --training-file rows.jsonl"),
        _ => format!("homeroom chat --model-dir {name} --prompt \"...\""),
    }
}
