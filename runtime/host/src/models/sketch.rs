//! What is known of a base without its weights: a model that is here, a directory with a `config.json` alone, or that file of a model
//! on the hub.

use std::path::Path;

use anyhow::{Context, Result, bail};
use homeroom_engine::estimate::Sketch;
use homeroom_engine::files::tensors::has_safetensors;
use homeroom_engine::models::{Architecture, BaseModel};

use super::missing::{not_here, not_there};
use super::{Network, Use, here, load_base, refuse_other, shown};
use crate::hub::{self, HubName};

/// A base by its shapes.
pub struct Sketched {
    /// Its shapes, stored as its files have it.
    pub sketch: Sketch,
    /// The model, if it is here.
    pub model: Option<BaseModel>,
    /// What to call it.
    pub shown: String,
}

impl Sketched {
    /// Finds a base by its name as [`super::locate`] does, and downloads no weights: of a model that is not on this machine `config.json`
    /// is read, if `network` allows it.
    ///
    /// # Errors
    /// When there is no such model, it is no base, or its configuration is none that can be run.
    pub fn find(name: &Path, network: Network) -> Result<Self> {
        let Some(located) = here(name)? else { return Self::on_hub(name, network) };
        refuse_other(name, &located.path, Use::Planning)?;
        let config = located.path.join("config.json");
        let is_gguf = |path: &Path| path.extension().is_some_and(|ending| ending.eq_ignore_ascii_case("gguf"));
        let has_gguf = || {
            let entries = std::fs::read_dir(&located.path).into_iter().flatten().flatten();
            entries.into_iter().any(|entry| is_gguf(&entry.path()))
        };
        if config.is_file() && !has_safetensors(&located.path) && !has_gguf() {
            let sketch = Sketch::of_architecture(Architecture::from_json(&config)?);
            return Ok(Self { sketch, model: None, shown: name.display().to_string() });
        }
        let model = load_base(&located)?;
        let (sketch, shown) = (Sketch::of_model(&model), shown(&model, name));
        // What was looked at is no part of the program.
        model.release();
        Ok(Self { sketch, model: Some(model), shown })
    }

    fn on_hub(name: &Path, network: Network) -> Result<Self> {
        let Some(hub_name) = HubName::typed(name) else { bail!(not_there(name, "")) };
        if let Some(why) = network.refusal() {
            bail!(not_here(&hub_name, &why));
        }
        let text = hub::config(&hub_name)?;
        let architecture = Architecture::from_text(&text).with_context(|| format!("{hub_name}: config.json"))?;
        Ok(Self { sketch: Sketch::of_architecture(architecture), model: None, shown: hub_name.to_string() })
    }
}
