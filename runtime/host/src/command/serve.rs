//! `homeroom serve`.

use std::path::Path;
use std::sync::Arc;
use std::thread;

use anyhow::{Context, Result};

use super::reference;
use crate::cli::{Done, Serve};
use crate::handler::Handler;
use crate::handler::config::{Config, Handlers, LOCAL_LIMITS};
use crate::handler::limit::Limited;
use crate::handler::local::Local;
use crate::interrupt;
use crate::progress::line;
use crate::serve::{Models, bind, start};
use crate::watch::Watch;

/// Serves until it is interrupted.
pub fn run(arguments: &Serve) -> Result<Done> {
    // The port first: loading takes longer than finding out that it is taken.
    let listener = bind(&arguments.host, arguments.port)?;
    let mut watched = None;
    let models = match (&arguments.model, &arguments.config) {
        (Some(model), _) => {
            let name = model.model_dir.file_name().map_or_else(|| "model".into(), |name| name.to_string_lossy());
            let name = name.strip_suffix(".gguf").unwrap_or(&name).to_owned();
            let local = Local::load(&name, reference(model), arguments.compute.into())?;
            let handler: Arc<dyn Handler> = Arc::new(Limited::new(Arc::new(local), LOCAL_LIMITS));
            Models::from([(name, handler)])
        }
        (None, config) => {
            let path = config.as_deref().context("--config or --model-dir is needed")?;
            // Before it is read: an edit in between is a change.
            let file = Watch::new(path);
            let handlers = Handlers::new(Config::read(path)?);
            let routes = handlers.routes()?;
            watched = Some((path.to_owned(), file, handlers));
            routes
        }
    };
    for name in models.keys() {
        eprintln!("model    {name}");
    }
    let server = start(models, listener)?;
    if let Some((path, file, handlers)) = watched {
        let replace = server.replacer();
        thread::spawn(move || watch(&path, file, handlers, replace));
    }
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

/// Serves what an edited file says; a bad edit changes nothing, and why is told once.
fn watch(path: &Path, (mut file, problem): (Watch, Option<String>), mut handlers: Handlers, replace: impl Fn(Models)) {
    if let Some(problem) = problem {
        line(format_args!("note: {}: changes are looked for every 2 s only: {problem}", path.display()));
    }
    // What was read last, good or bad: much is reported that changes nothing, such as a log that grows beside the file.
    let mut read = None;
    loop {
        // Editors remove a file before they write it.
        if !file.wait() || !path.exists() {
            continue;
        }
        let now = (file.identity(), std::fs::read(path).ok());
        if read.as_ref() == Some(&now) {
            continue;
        }
        read = Some(now);
        let edited = Config::read(path).and_then(|config| {
            if config == *handlers.config() {
                return Ok(None);
            }
            let next = handlers.succeed(config);
            let routes = next.routes()?;
            Ok(Some((next, routes)))
        });
        match edited {
            Ok(None) => {}
            Ok(Some((next, routes))) => {
                let names: Vec<String> = routes.keys().cloned().collect();
                replace(routes);
                handlers = next;
                line(format_args!("reload   {}: {}", path.display(), names.join(", ")));
            }
            Err(error) => {
                line(format_args!("reload   refused: {error:#}\n         what was served is served on"));
            }
        }
    }
}
