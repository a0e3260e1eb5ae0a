//! `homeroom pull`.

use anyhow::{Result, anyhow};
use clap::Args;
use homeroom_engine::files::utf8;
use indicatif::HumanDuration;
use serde_json::json;

use super::{Done, print};
use crate::hub::{self, HubName, Pulled};
use crate::progress::{line, size};

/// Arguments of `pull`.
#[derive(Args)]
pub struct Arguments {
    /// Names on the hub: owner/name, with @revision for a branch, tag or commit, and :QUANT for a GGUF file
    #[arg(value_name = "NAME", required = true)]
    names: Vec<String>,
    /// Print one JSON object at the end, or one a line of several names
    #[arg(long)]
    json: bool,
}

/// Downloads models, and the bases of adapters.
pub fn run(arguments: &Arguments) -> Result<Done> {
    let parse = |typed: &String| {
        HubName::parse(typed.trim_end_matches('/')).ok_or_else(|| {
            anyhow!("{typed}: not a name on the hub\nhint: names are like Qwen/Qwen2.5-0.5B-Instruct, with @revision or :QUANT behind")
        })
    };
    // A name that is wrong is told before the first is downloaded.
    let names: Vec<HubName> = arguments.names.iter().map(parse).collect::<Result<_>>()?;
    names.iter().try_for_each(|name| pull(name, arguments.json))?;
    Ok(Done::Whole)
}

fn pull(name: &HubName, json: bool) -> Result<()> {
    let pulled = told(name)?;
    // The base as it is named by the adapter: a revision of the adapter says nothing of the base's.
    let base = pulled.base.as_ref().map(told).transpose()?;
    let path = utf8(&pulled.found.path)?;
    if json {
        let base = base.as_ref().map(|base| json!({"path": base.found.path, "commit": base.found.commit}));
        let Pulled { found, bytes, license, .. } = &pulled;
        let report = json!({
            "repo": name.repo, "commit": found.commit, "path": path, "bytes_downloaded": bytes, "license": license, "base": base,
        });
        print(&report.to_string())?;
    } else {
        print(path)?;
    }
    Ok(())
}

/// Downloads a model and says how that ended.
fn told(name: &HubName) -> Result<Pulled> {
    let pulled = hub::pull(name)?;
    let path = pulled.found.path.display();
    match pulled.bytes {
        0 => line(format_args!("here      {path}   all of it was here")),
        bytes => {
            let rate = size((bytes as f64 / pulled.time.as_secs_f64().max(1e-3)) as u64);
            let time = match pulled.time.as_secs() {
                0 => String::new(),
                _ => format!(" in {}, {rate}/s", HumanDuration(pulled.time)),
            };
            line(format_args!("saved     {path}   {}{time}", size(bytes)));
        }
    }
    Ok(pulled)
}
