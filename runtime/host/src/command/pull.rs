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
    /// Name on the hub: owner/name, with @revision for a branch, tag or commit, and :QUANT for a GGUF file
    #[arg(value_name = "NAME")]
    name: String,
    /// Print one JSON object at the end
    #[arg(long)]
    json: bool,
}

/// Downloads a model, and the base of an adapter.
pub fn run(arguments: &Arguments) -> Result<Done> {
    let typed = &arguments.name;
    let name = HubName::parse(typed).ok_or_else(|| {
        anyhow!("{typed}: not a name on the hub\nhint: names are like Qwen/Qwen2.5-0.5B-Instruct, with @revision or :QUANT behind")
    })?;
    let pulled = told(&name)?;
    // The base as it is named by the adapter: a revision of the adapter says nothing of the base's.
    let base = pulled.base.as_ref().map(told).transpose()?;
    let path = utf8(&pulled.found.path)?;
    if arguments.json {
        let base = base.as_ref().map(|base| json!({"path": base.found.path, "commit": base.found.commit}));
        let Pulled { found, bytes, license, .. } = &pulled;
        let report = json!({
            "repo": name.repo, "commit": found.commit, "path": path, "bytes_downloaded": bytes, "license": license, "base": base,
        });
        print(&report.to_string())?;
    } else {
        print(path)?;
    }
    Ok(Done::Whole)
}

/// Downloads a model and says how that ended.
fn told(name: &HubName) -> Result<Pulled> {
    let pulled = hub::pull(name)?;
    let path = pulled.found.path.display();
    match pulled.bytes {
        0 => line(format_args!("here      {path}   all of it was here")),
        bytes => {
            let rate = size((bytes as f64 / pulled.time.as_secs_f64().max(1e-3)) as u64);
            line(format_args!("saved     {path}   {} in {}, {rate}/s", size(bytes), HumanDuration(pulled.time)));
        }
    }
    Ok(pulled)
}
