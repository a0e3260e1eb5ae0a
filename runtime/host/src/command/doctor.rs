//! `homeroom doctor`: what of this machine, this home and its surroundings matters to a training or an answer, and what is wrong with
//! it; or why a run ended as it did. It opens no socket unless `--network` asks for it, and changes nothing.

use std::path::{Path, PathBuf};

use anyhow::Result;
use clap::Args;
use homeroom_engine::files::free_bytes;
use homeroom_engine::memory;
use homeroom_kernels::{Isa, isa, threads};
use serde::Serialize;
use serde_json::json;

use super::arguments::PluginArgs;
use super::runs::{next, what};
use super::{Done, handlers_of_home, print};
use crate::handler::config::Config;
use crate::hub::{self, stores};
use crate::job::STALL_VARIABLE;
use crate::plugin::Standing;
use crate::progress::size;
use crate::registry::{self, data_directory};
use crate::runs::{self, Entry, Status};
use crate::terminal::cell;
use crate::troubles::{self, CUDA, DISK, Explained, MEMORY, STRATEGY};

/// Arguments of `doctor`.
#[derive(Args)]
pub struct Arguments {
    /// Explain this run, as `homeroom runs list` names it, and look at nothing else
    #[arg(value_name = "RUN")]
    run: Option<String>,
    /// Ask the hub for an answer, too; else no socket is opened
    #[arg(long, conflicts_with = "run")]
    network: bool,
    #[command(flatten)]
    plugins: PluginArgs,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

/// How it stands with something.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
enum Health {
    Ok,
    Note,
    Problem,
}

impl Health {
    fn word(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Note => "note",
            Self::Problem => "problem",
        }
    }
}

/// What was found.
#[derive(Debug, Serialize)]
struct Finding {
    about: &'static str,
    standing: Health,
    what: String,
    /// What to do.
    #[serde(skip_serializing_if = "Option::is_none")]
    remedy: Option<String>,
}

/// Below this a disk is as good as full, in bytes;
const DISK_FULL: u64 = 512 << 20;
/// below this a model of some size has no room.
const DISK_LITTLE: u64 = 8 << 30;
/// Less free memory trains no more than the smallest models.
const MEMORY_LITTLE: u64 = 2 << 30;
/// Runs that failed last and are explained.
const RUNS_TOLD: usize = 3;

/// Looks.
pub fn run(arguments: &Arguments) -> Result<Done> {
    if let Some(id) = &arguments.run {
        return explain(id, arguments.json);
    }
    let mut found = Findings::default();
    found.processor();
    found.graphics();
    found.memory();
    found.home();
    found.plugins(arguments);
    found.configs();
    found.hub(arguments.network);
    found.variables();
    found.runs();
    let Findings(found) = found;
    let problems = found.iter().filter(|finding| finding.standing == Health::Problem).count();
    if arguments.json {
        print(&json!({"problems": problems, "findings": found}).to_string())?;
    } else {
        let mut lines = Vec::new();
        for finding in &found {
            let Finding { about, standing, what, remedy } = finding;
            lines.push(format!("{:<8} {about:<12} {}", standing.word(), cell(what)));
            lines.extend(remedy.iter().map(|remedy| format!("{:<21} {}", "", cell(remedy))));
        }
        lines.push(match problems {
            0 => "no problem was found".to_owned(),
            1 => "1 problem was found".to_owned(),
            many => format!("{many} problems were found"),
        });
        print(&lines.join("\n"))?;
    }
    Ok(if problems == 0 { Done::Whole } else { Done::Unwell })
}

/// Explains a run.
fn explain(id: &str, as_json: bool) -> Result<Done> {
    let run = runs::find(id)?;
    let explained = troubles::of_run(&run);
    if as_json {
        let remedy = explained.as_ref().map(|explained| explained.remedy(&run));
        let error = run.record.as_ref().and_then(|record| record.error.clone());
        let mut json =
            json!({"run": id, "status": run.status.word(), "trouble": explained, "error": error, "next": next(&run)});
        if let Some(remedy) = remedy {
            json["trouble"]["remedy"] = remedy.into();
        }
        return print(&json.to_string()).map(|()| Done::Whole);
    }
    let mut lines = vec![format!("run      {id}   {}   {}", run.status.word(), cell(&what(&run)))];
    match (&explained, run.status) {
        (Some(explained), _) => lines.extend(explained_lines(explained, &run)),
        (None, Status::Failed) => {
            let error = run.record.as_ref().and_then(|record| record.error.clone()).unwrap_or_default();
            lines.extend(
                error
                    .lines()
                    .enumerate()
                    .map(|(at, text)| format!("{:<8} {}", if at == 0 { "error" } else { "" }, cell(text))),
            );
        }
        (None, Status::Finished) => lines.push("it did all that it was asked for".to_owned()),
        (None, Status::Running) => lines.push("a process works on it".to_owned()),
        (None, _) if run.record.is_none() => {
            let problem = run.problem.as_deref().unwrap_or("it cannot be read");
            lines.push(format!("its record is damaged, so nothing is known of it: {}", cell(problem)));
        }
        (None, _) => lines.push("the user ended it; nothing is wrong with it".to_owned()),
    }
    let next = next(&run);
    if !next.is_empty() {
        lines.push(format!("next     {next}"));
    }
    print(&lines.join("\n"))?;
    Ok(Done::Whole)
}

fn explained_lines(explained: &Explained, run: &Entry) -> Vec<String> {
    vec![
        format!("because  {}", cell(&explained.because)),
        format!("cause    {}", explained.trouble.cause),
        format!("remedy   {}", explained.remedy(run)),
    ]
}

#[derive(Default)]
struct Findings(Vec<Finding>);

impl Findings {
    fn ok(&mut self, about: &'static str, what: impl Into<String>) {
        self.0.push(Finding { about, standing: Health::Ok, what: what.into(), remedy: None });
    }

    fn note(&mut self, about: &'static str, what: impl Into<String>, remedy: impl Into<String>) {
        let remedy = Some(remedy.into()).filter(|remedy| !remedy.is_empty());
        self.0.push(Finding { about, standing: Health::Note, what: what.into(), remedy });
    }

    fn problem(&mut self, about: &'static str, what: impl Into<String>, remedy: impl Into<String>) {
        let remedy = Some(remedy.into()).filter(|remedy| !remedy.is_empty());
        self.0.push(Finding { about, standing: Health::Problem, what: what.into(), remedy });
    }

    fn processor(&mut self) {
        let faster = if isa().prefers_bf16() { "bf16" } else { "f32" };
        let count = threads();
        let words = format!(
            "{}: {}; trainings compute in {faster} unless their strategy or --compute says otherwise; {count} {}",
            isa().name(),
            isa().units(),
            if count == 1 { "thread" } else { "threads" }
        );
        self.ok("processor", words);
        let detected = Isa::detected();
        if isa() != detected {
            self.note(
                "processor",
                format!("HOMEROOM_CPU keeps it from {}", detected.name()),
                "unset HOMEROOM_CPU for all of it",
            );
        }
        if Isa::amx_is_refused() {
            self.note(
                "processor",
                "it has AMX, which the system refuses",
                "a newer kernel, or the machine's host, allows it",
            );
        }
        let cores = std::thread::available_parallelism().map_or(count, usize::from);
        if count < cores {
            let words = format!("{count} of {cores} processors are used");
            self.note("processor", words, "unset RAYON_NUM_THREADS for all of them");
        }
    }

    /// What whoever has a card should know.
    fn graphics(&mut self) {
        let named = troubles::visible_devices();
        let has_driver = Path::new("/proc/driver/nvidia").exists();
        if let Some(name) = named {
            self.note("graphics", format!("{name} is set; {}", CUDA.cause), CUDA.remedy);
        } else if has_driver {
            self.note("graphics", format!("there is a graphics card; {}", CUDA.cause), "");
        }
    }

    fn memory(&mut self) {
        let (Some(all), Some(left)) = (memory::limit(), memory::obtainable()) else {
            return self.note(
                "memory",
                "this system does not say how much there is",
                "`homeroom plan --memory 12GB` plans for what you know",
            );
        };
        let words = format!("{} can be had of {}", size(left), size(all));
        match memory::room() {
            Some(room) if room.is_short() => self.problem("memory", words, MEMORY.remedy),
            _ if left < MEMORY_LITTLE => self.note("memory", words, MEMORY.remedy),
            _ => self.ok("memory", words),
        }
        if let Some(container) = memory::of_container() {
            let words = format!("its container may use {}, {} are left", size(container.all), size(container.left));
            self.note("memory", words, "");
        }
        if let Some(ended) = memory::ended_in_container().filter(|ended| *ended > 0) {
            let words = format!("the system has ended {ended} processes of this container as memory was used up");
            self.note(
                "memory",
                words,
                "`homeroom runs list` shows runs that were killed, `homeroom doctor RUN` explains one",
            );
        }
    }

    fn home(&mut self) {
        let Some(home) = data_directory() else {
            return self.problem("home", "there is no data directory", "set HOMEROOM_HOME to a directory of your own");
        };
        let shown = home.display();
        if !home.exists() && home.symlink_metadata().is_ok() {
            return self.problem(
                "home",
                format!("{shown}: a link that leads nowhere"),
                "set HOMEROOM_HOME to a directory of your own",
            );
        } else if !home.exists() {
            self.ok("home", format!("{shown}   it is made when something is kept"));
        } else if !home.is_dir() {
            return self.problem(
                "home",
                format!("{shown}: not a directory"),
                "set HOMEROOM_HOME to a directory of your own",
            );
        } else if !may_write(&home) {
            self.problem("home", format!("{shown}: it cannot be written"), troubles::READ_ONLY.remedy);
        } else if let Some(mode) = open_to_others(&home).filter(|mode| mode & 0o002 != 0) {
            let words = format!("{shown}: everybody may write it (mode {mode:03o})");
            self.problem("home", words, format!("`chmod 700 {shown}`: nothing is trained before"));
        } else if let Some(mode) = open_to_others(&home) {
            let words = format!("{shown}: others may look into it (mode {mode:03o})");
            self.note("home", words, format!("`chmod 700 {shown}` keeps models, rows and runs yours"));
        } else {
            self.ok("home", format!("{shown}   yours alone"));
        }
        self.disk("home", &home);
    }

    /// The room at a place.
    fn disk(&mut self, about: &'static str, place: &Path) {
        let Some(free) = free_bytes(place) else { return };
        let words = format!("{} free on the disk of {}", size(free), place.display());
        match free {
            ..DISK_FULL => self.problem(about, words, DISK.remedy),
            DISK_FULL..DISK_LITTLE => {
                self.note(about, words, "a model of 7 B parameters in bf16 wants 15 GB, in 4 bits 4 to 5 GB")
            }
            _ => self.ok(about, words),
        }
    }

    fn plugins(&mut self, arguments: &Arguments) {
        let search = match arguments.plugins.search() {
            Ok(search) => search,
            Err(error) => return self.problem("strategies", format!("{error:#}"), STRATEGY.remedy),
        };
        let files = search.list();
        if files.is_empty() {
            self.problem("strategies", "none is found", crate::plugin::find::NONE_HINT);
        }
        for file in files {
            let path = file.path.display();
            match search.read(&file) {
                Ok((read, Standing::Refused(why))) => {
                    let words = format!("{}   {path}: {}", file.name, why.lines().next().unwrap_or_default());
                    self.problem("strategies", words, format!("sha256 {}; {}", &read.sha256[..16], STRATEGY.remedy));
                }
                Ok((read, standing)) => {
                    let words = format!("{}   {path}   sha256 {}   {}", file.name, &read.sha256[..16], standing.word());
                    self.ok("strategies", words);
                }
                Err(error) => self.problem("strategies", format!("{}   {path}: {error:#}", file.name), STRATEGY.remedy),
            }
        }
    }

    fn configs(&mut self) {
        if let Some(path) = handlers_of_home() {
            match Config::read(&path) {
                Ok(_) => self.ok("handlers", path.display().to_string()),
                Err(error) => {
                    let error = format!("{error:#}");
                    let mut lines = error.lines();
                    let first = lines.next().unwrap_or_default().to_owned();
                    self.problem("handlers", first, lines.map(str::trim).collect::<Vec<_>>().join("; "));
                }
            }
        }
        if let Err(error) = hub::policy::check("owner/name")
            && !format!("{error:#}").contains("owner/name")
        {
            self.problem("bases", format!("{error:#}"), "mend or remove allowed-bases.txt");
        }
    }

    fn hub(&mut self, network: bool) {
        match hub::directory() {
            Some(cache) => {
                let bases = registry::bases().map_or(0, |bases| bases.len());
                let words = format!("{}   {bases} models of the hub are here", cache.display());
                if cache.exists() && !may_write(&cache) {
                    let remedy = "what is in it is used; HF_HUB_CACHE names a place of your own for what is downloaded";
                    self.note("hub cache", format!("{words}; it cannot be written"), remedy);
                } else {
                    self.ok("hub cache", words);
                }
                self.disk("hub cache", &cache);
            }
            None => self.problem("hub cache", "it has no place", "set HF_HOME or HF_HUB_CACHE"),
        }
        for store in stores::shared().iter().filter(|store| !store.is_dir()) {
            self.problem(
                "hub cache",
                format!("HOMEROOM_BASES: {} is not there", store.display()),
                "mount it, or correct the variable",
            );
        }
        match (hub::offline(), hub::Endpoint::from_environment(), network) {
            (_, Err(error), _) => self.problem("hub", format!("{error:#}").replace('\n', "; "), ""),
            (Some(why), ..) => self.note("hub", format!("nothing is downloaded, as {why} says so"), ""),
            (None, Ok(_), false) => self.ok("hub", "it may be asked; `homeroom doctor --network` does so now"),
            (None, Ok(_), true) => match hub::reach() {
                Ok(words) => self.ok("hub", words),
                Err(error) => self.problem(
                    "hub",
                    format!("{error:#}").replace('\n', "; "),
                    "what is here works without it: --offline, or HF_HUB_OFFLINE=1; a proxy is named by HTTPS_PROXY",
                ),
            },
        }
        if let Err(error) = hub::Token::from_environment() {
            self.problem("hub", format!("{error:#}").replace('\n', "; "), "");
        }
    }

    fn variables(&mut self) {
        for (name, does) in VARIABLES {
            let Some(value) = std::env::var_os(name).filter(|value| !value.is_empty()) else { continue };
            let value = value.to_string_lossy();
            let shown = shown(name, &value);
            match wrong(name, &value) {
                Some(why) => self.problem("variables", format!("{name}={shown}   {does}"), why),
                None => self.ok("variables", format!("{name}={shown}   {does}")),
            }
        }
        let known = |name: &str| VARIABLES.iter().any(|(known, _)| *known == name);
        for (name, _) in std::env::vars_os() {
            let name = name.to_string_lossy();
            if name.starts_with("HOMEROOM_") && !known(&name) {
                self.note("variables", format!("{name} is set, and means nothing to this version"), "");
            }
        }
    }

    /// The last runs that failed or were killed.
    fn runs(&mut self) {
        let all = runs::list().unwrap_or_default();
        if let Some(home) =
            registry::data_directory().map(|home| home.join("runs")).filter(|runs| runs.exists() && !runs.is_dir())
        {
            self.problem("runs", format!("{}: not a directory, so no run is recorded", home.display()), "move it away");
        }
        let failed = |run: &&Entry| matches!(run.status, Status::Failed | Status::Killed);
        for run in all.iter().rev().filter(failed).take(RUNS_TOLD) {
            let head = format!("{} {}", run.id, run.status.word());
            match troubles::of_run(run) {
                Some(explained) => {
                    self.note(
                        "runs",
                        format!("{head}: {}; {}", explained.because, explained.trouble.cause),
                        explained.remedy(run),
                    );
                }
                None => {
                    let error = run.record.as_ref().and_then(|record| record.error.clone()).or(run.problem.clone());
                    let error = error.unwrap_or_default().lines().next().unwrap_or_default().to_owned();
                    self.note(
                        "runs",
                        format!("{head}: {error}"),
                        format!("`homeroom runs show {}` has all of it", run.id),
                    );
                }
            }
        }
    }
}

/// Variables that this program goes by, and what each does.
const VARIABLES: [(&str, &str); 38] = [
    ("HOMEROOM_HOME", "where models, runs and settings are"),
    ("HOMEROOM_BASES", "further stores of models, which are only read"),
    ("HOMEROOM_PLUGINS", "further directories of strategies"),
    ("HOMEROOM_PLUGIN_POLICY", "which strategies may be loaded: locked or dev"),
    ("HOMEROOM_ENCODED", "off: what qlora and int8 make of a base is not kept"),
    ("HOMEROOM_CPU", "the instructions that may be used"),
    (memory::VARIABLE, "the memory that this program may take"),
    (STALL_VARIABLE, "seconds after which a run that stands still says so"),
    ("RAYON_NUM_THREADS", "threads that compute"),
    ("CUDA_VISIBLE_DEVICES", "means nothing to this build, which computes on the processor"),
    ("HIP_VISIBLE_DEVICES", "means nothing to this build, which computes on the processor"),
    ("HF_HOME", "where the hub's cache and token are"),
    ("HF_HUB_CACHE", "where models of the hub are"),
    ("HUGGINGFACE_HUB_CACHE", "as HF_HUB_CACHE"),
    ("XDG_CACHE_HOME", "where caches are, that of the hub among them"),
    ("XDG_DATA_HOME", "where data of programs is, the home among it"),
    ("HF_ENDPOINT", "the hub's address, as of a mirror"),
    ("HF_HUB_OFFLINE", "1: nothing is downloaded"),
    ("TRANSFORMERS_OFFLINE", "1: nothing is downloaded"),
    ("HF_TOKEN", "opens gated and private models of the hub"),
    ("HUGGING_FACE_HUB_TOKEN", "as HF_TOKEN"),
    ("HF_TOKEN_PATH", "the file of the hub's token"),
    ("HF_HUB_DISABLE_IMPLICIT_TOKEN", "1: no token is sent"),
    ("HTTPS_PROXY", "the proxy that the hub is asked through"),
    ("https_proxy", "the proxy that the hub is asked through"),
    ("ALL_PROXY", "the proxy that the hub is asked through"),
    ("all_proxy", "the proxy that the hub is asked through"),
    ("HTTP_PROXY", "the proxy that the hub is asked through"),
    ("http_proxy", "the proxy that the hub is asked through"),
    ("NO_PROXY", "hosts that are asked without a proxy"),
    ("no_proxy", "hosts that are asked without a proxy"),
    ("SSL_CERT_FILE", "certificates to trust"),
    ("REQUESTS_CA_BUNDLE", "certificates to trust"),
    ("CURL_CA_BUNDLE", "certificates to trust"),
    ("OPENAI_API_KEY", "a handler of another machine may name it as its key"),
    ("ANTHROPIC_API_KEY", "a handler of another machine may name it as its key"),
    ("CARGO", "the cargo that `plugins` builds with"),
    ("NO_COLOR", "no colours"),
];

/// Whether the value of a variable is nobody's business.
fn is_secret(name: &str) -> bool {
    let is_path = name.ends_with("_PATH") || name.starts_with("HF_HUB_DISABLE");
    ["TOKEN", "KEY", "SECRET", "PASSWORD"].iter().any(|word| name.contains(word)) && !is_path
}

/// The value of a variable that may be shown.
fn shown(name: &str, value: &str) -> String {
    let upper = name.to_ascii_uppercase();
    if is_secret(name) {
        return "(set, not shown)".to_owned();
    }
    if !upper.contains("PROXY") && !upper.contains("ENDPOINT") {
        return value.to_owned();
    }
    let address = without_password(value);
    // What stands behind a question mark may be a token, and what a colon parts and is no port a password.
    let address = address.split_once('?').map_or(address.clone(), |(address, _)| format!("{address}?…"));
    let is_port = |port: &str| port.trim_end_matches('/').parse::<u16>().is_ok();
    let is_pair = !address.contains(['@', ',', '[']) && !address.contains("://");
    let hides = is_pair && address.split_once(':').is_some_and(|(_, rest)| !is_port(rest));
    if hides { "(set, not shown)".to_owned() } else { address }
}

/// An address without the user and the password in it.
fn without_password(value: &str) -> String {
    match value.split_once("://").and_then(|(scheme, rest)| Some((scheme, rest.rsplit_once('@')?.1))) {
        Some((scheme, rest)) => format!("{scheme}://…@{rest}"),
        None => match value.rsplit_once('@') {
            Some((_, host)) => format!("…@{host}"),
            None => value.to_owned(),
        },
    }
}

/// What is wrong with the value of a variable.
fn wrong(name: &str, value: &str) -> Option<String> {
    match name {
        memory::VARIABLE => memory::allowed().err(),
        "HOMEROOM_CPU" => Isa::allowed().err(),
        "RAYON_NUM_THREADS" => {
            (value.trim().parse::<usize>().is_err()).then(|| "it should be a number of threads".to_owned())
        }
        "HOMEROOM_PLUGINS" => std::env::split_paths(value)
            .find(|path| !path.is_dir())
            .map(|path| format!("{} is not a directory", path.display())),
        "SSL_CERT_FILE" | "REQUESTS_CA_BUNDLE" | "CURL_CA_BUNDLE" | "HF_TOKEN_PATH" => {
            (!PathBuf::from(value).is_file()).then(|| "there is no such file".to_owned())
        }
        name if name == STALL_VARIABLE => value
            .trim()
            .parse::<f64>()
            .map_or(true, |seconds| seconds <= 0.0)
            .then(|| "it should be seconds above 0".to_owned()),
        _ => None,
    }
}

/// Whether this user may write a directory.
#[cfg(unix)]
fn may_write(path: &Path) -> bool {
    use std::os::unix::ffi::OsStrExt;
    let Ok(name) = std::ffi::CString::new(path.as_os_str().as_bytes()) else { return false };
    // SAFETY: the name ends with a zero byte and outlives the call, which keeps nothing.
    unsafe { libc::access(name.as_ptr(), libc::W_OK | libc::X_OK) == 0 }
}

#[cfg(not(unix))]
fn may_write(path: &Path) -> bool {
    std::fs::metadata(path).is_ok_and(|about| !about.permissions().readonly())
}

/// The permission bits of a directory into which others may look.
#[cfg(unix)]
fn open_to_others(path: &Path) -> Option<u32> {
    use std::os::unix::fs::MetadataExt;
    let mode = std::fs::metadata(path).ok()?.mode() & 0o777;
    (mode & 0o077 != 0).then_some(mode)
}

#[cfg(not(unix))]
fn open_to_others(_: &Path) -> Option<u32> {
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn neither_a_token_nor_a_password_is_shown() {
        for name in ["HF_TOKEN", "OPENAI_API_KEY", "HUGGING_FACE_HUB_TOKEN"] {
            assert!(is_secret(name), "{name}");
        }
        for name in ["HF_TOKEN_PATH", "HF_HUB_DISABLE_IMPLICIT_TOKEN", "HOMEROOM_HOME"] {
            assert!(!is_secret(name), "{name}");
        }
        assert_eq!(without_password("http://ann:se@cret@proxy.school:3128"), "http://…@proxy.school:3128");
        assert_eq!(without_password("ann:secret@proxy:3128"), "…@proxy:3128");
        assert_eq!(without_password("http://proxy:3128"), "http://proxy:3128");
        assert_eq!(shown("HF_ENDPOINT", "https://hub/?token=secret"), "https://hub/?…");
        assert_eq!(shown("HTTPS_PROXY", "ann:secret"), "(set, not shown)");
        assert_eq!(shown("https_proxy", "proxy:3128"), "proxy:3128");
        assert_eq!(shown("HOMEROOM_PLUGINS", "/a@b:/b"), "/a@b:/b");
    }

    #[test]
    fn each_variable_is_named_once() {
        let mut names: Vec<&str> = VARIABLES.iter().map(|(name, _)| *name).collect();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), VARIABLES.len());
    }
}
