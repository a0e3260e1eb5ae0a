//! `homeroom serve`.

use std::sync::Arc;

use anyhow::{Context, Result, ensure};

use super::reference;
use crate::cli::{Done, Serve};
use crate::handler::Handler;
use crate::handler::config::{Config, Handlers};
use crate::handler::local::Local;
use crate::interrupt;
use crate::models::Loaded;
use crate::serve::{Models, bind, start};

/// Serves until it is interrupted.
pub fn run(arguments: &Serve) -> Result<Done> {
    // The port first: loading takes longer than finding out that it is taken.
    let listener = bind(&arguments.host, arguments.port)?;
    let models = match (&arguments.model, &arguments.config) {
        (Some(model), _) => {
            let name = model.model_dir.file_name().map_or_else(|| "model".into(), |name| name.to_string_lossy());
            let name = name.strip_suffix(".gguf").unwrap_or(&name).to_owned();
            let handler: Arc<dyn Handler> = Arc::new(Local::new(&name, Loaded::load(&reference(model))?));
            Models::from([(name, handler)])
        }
        (None, config) => {
            let handlers =
                Handlers::new(Config::read(config.as_deref().context("--config or --model-dir is needed")?)?);
            let config = handlers.config();
            ensure!(
                !config.routes.is_empty(),
                "{}: it has no route, so there is nothing that clients could name\nhint: add [routes.NAME] with handlers = [\"…\"]",
                config.path.display()
            );
            config.routes.keys().map(|name| Ok((name.clone(), handlers.get(name)?))).collect::<Result<_>>()?
        }
    };
    for name in models.keys() {
        eprintln!("model    {name}");
    }
    let server = start(models, listener)?;
    let stop = server.stopper();
    let mut pressed = false;
    interrupt::on_press(move || {
        if std::mem::replace(&mut pressed, true) {
            std::process::exit(i32::from(interrupt::EXIT_CODE));
        }
        eprintln!("\nending: answers under way are finished first; again to end at once");
        stop();
    })?;
    eprintln!("serving  {}   Ctrl-C ends", server.url());
    server.wait()?;
    Ok(Done::Whole)
}
