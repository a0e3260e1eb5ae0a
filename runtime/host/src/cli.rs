//! The command line: which command is run, and the exit code. stdout is the result, stderr the story.

use std::any::TypeId;
use std::ffi::OsString;
use std::process::ExitCode;

use clap::error::{Error, ErrorKind};
use clap::{CommandFactory, FromArgMatches, Parser, Subcommand};
use homeroom_engine::files::keep_private;
use homeroom_engine::memory;
use homeroom_kernels::Isa;

use crate::command::{
    Done, bench, chat, compare, cp, doctor, eval, export_model, feedback, fine_tune, handlers, import, keys, licenses,
    list_models, new, plan, plugins, preview, pull, resume, rm, run, runs, serve, show,
};
use crate::plugin::probe;
use crate::{hub, interrupt, progress, registry, stdout, terminal, tips, troubles};

/// Fine-tunes open-weight language models on your own machine.
///
/// Exit codes: 0 done, 1 failed (the message says where, what and what next), 2 wrong command line, 130 interrupted.
#[derive(Parser)]
#[command(name = "homeroom", version, max_term_width = 100)]
struct Cli {
    /// Download nothing: models of the Hugging Face hub are taken from its cache; HF_HUB_OFFLINE=1 does the same
    #[arg(long, global = true)]
    offline: bool,
    #[command(subcommand)]
    command: Command,
}

/// The commands.
#[derive(Subcommand)]
pub enum Command {
    /// Trains a model on rows of text or conversations, and saves an adapter
    FineTune(Box<fine_tune::Arguments>),
    /// Estimates memory and time of a training before it is begun; downloads and loads no weights
    Plan(Box<plan::Arguments>),
    /// Shows rows as a model sees them, and what is wrong with a file before it is learned; takes personal data out
    Preview(Box<preview::Arguments>),
    /// Runs a pipeline: a Lua script that a TOML file declares
    Run(run::Arguments),
    /// Writes a pipeline to start from: script, TOML, sample rows and types for editors
    New(new::Arguments),
    /// Goes on with a run that was killed, interrupted or failed
    Resume(resume::Arguments),
    /// Lists, shows and removes runs: what each training and pipeline did
    #[command(subcommand)]
    Runs(runs::Runs),
    /// Measures loss, perplexity and token accuracy on a file of rows
    Eval(eval::Arguments),
    /// Measures two models on the same rows, and says whether the difference is more than chance
    Compare(compare::Arguments),
    /// Talks to a model, or answers one prompt; stdout gets the reply alone
    Chat(chat::Arguments),
    /// Downloads a model of the Hugging Face hub; stdout gets its directory
    Pull(pull::Arguments),
    /// Lists the models that were trained here, and the bases that are on this machine
    ListModels(list_models::Arguments),
    /// Shows all that is known of a model
    Show(show::Arguments),
    /// Removes models, and says what needs them
    Rm(rm::Arguments),
    /// Copies a model to another name
    Cp(cp::Arguments),
    /// Takes in a model from elsewhere: a directory, a .gguf file, an adapter, or a model of a cache
    Import(import::Arguments),
    /// Writes a trained model in a format that other programs load
    ExportModel(export_model::Arguments),
    /// Serves models to programs that speak OpenAI's API or Ollama's: on this machine, and to others with keys
    Serve(serve::Arguments),
    /// Makes, lists and removes the keys with which other machines may use `serve`
    #[command(subcommand)]
    Keys(keys::Keys),
    /// Checks a file of handlers
    #[command(subcommand)]
    Handlers(handlers::What),
    /// Writes what people thought of answers as rows to learn from; hands out and deletes one person's data; checks the log
    #[command(subcommand)]
    Feedback(feedback::Feedback),
    /// Lists, writes, builds, checks, installs and locks training strategies
    #[command(subcommand)]
    Plugins(plugins::Plugins),
    /// Looks at this machine, the home and the network settings for what is wrong, or explains why a run ended; exit code 1 if there is a problem
    Doctor(doctor::Arguments),
    /// Measures speed and memory
    #[command(subcommand)]
    Bench(bench::Bench),
    /// Prints the licences of this program, and of what others wrote that is in it
    #[command(visible_alias = "licences")]
    Licenses,
}

/// The command line's definition.
pub fn command() -> clap::Command {
    // These can do without: a file of handlers names models, too.
    let without_model = |command: clap::Command| command.mut_arg("model_dir", |model| model.required(false));
    let command = Cli::command().mut_subcommand("chat", without_model).mut_subcommand("serve", without_model);
    with_negative_numbers(command)
}

/// Lets `-1` behind an option be its value, so that the message is about the number.
fn with_negative_numbers(command: clap::Command) -> clap::Command {
    let numbers = [
        TypeId::of::<f64>(),
        TypeId::of::<i64>(),
        TypeId::of::<u64>(),
        TypeId::of::<u32>(),
        TypeId::of::<u16>(),
        TypeId::of::<usize>(),
    ];
    let command = command.mut_args(|argument| {
        let kind = argument.get_value_parser().type_id();
        let number = argument.get_long().is_some() && numbers.iter().any(|number| kind == *number);
        if number { argument.allow_hyphen_values(true) } else { argument }
    });
    command.mut_subcommands(with_negative_numbers)
}

fn parse(arguments: &[OsString]) -> Result<Cli, Error> {
    let mut command = command();
    let parsed = command.try_get_matches_from_mut(arguments).and_then(|matches| Cli::from_arg_matches(&matches));
    parsed.map_err(|error| {
        let mut error = error.format(&mut command);
        tips::add(&mut error, &command, arguments);
        error
    })
}

/// The command of a command line that was typed before, if it is one.
pub fn command_of(arguments: &[OsString]) -> Option<Command> {
    parse(arguments).ok().map(|cli| cli.command)
}

/// The command line, or the exit code of one that is wrong or asks for help.
fn parsed(arguments: &[OsString]) -> Result<Cli, ExitCode> {
    let error = match parse(arguments) {
        Ok(cli) => return Ok(cli),
        Err(error) => error,
    };
    // Names of files, which the shell puts in the place of `*`, may hold what a terminal obeys. What is wrong is the same without it.
    let plain = arguments.iter().map(|argument| terminal::shown(&argument.to_string_lossy()).into_owned().into());
    match parse(&plain.collect::<Vec<_>>()) {
        Err(shown) => drop(shown.print()),
        Ok(_) => progress::prompt(error.render()),
    }
    if error.kind() == ErrorKind::DisplayHelp {
        run::help(arguments);
    }
    Err(ExitCode::from(error.exit_code() as u8))
}

/// Runs the program.
pub fn main() -> ExitCode {
    let cli = match parsed(&std::env::args_os().collect::<Vec<_>>()) {
        Ok(cli) => cli,
        Err(code) => return code,
    };
    if cli.offline {
        hub::set_offline("--offline");
    }
    // What `plugins watch` starts, the compiler, writes as the user's shell would have it.
    if !matches!(cli.command, Command::Plugins(plugins::Plugins::Watch { .. })) {
        keep_private(registry::data_directory(), |note| progress::line(note));
    }
    // `doctor` says what is wrong with it.
    let allowed = Isa::allowed().map(drop).and_then(|()| memory::allowed().map(drop));
    if let Some(problem) = allowed.err().filter(|_| !matches!(cli.command, Command::Doctor(_))) {
        progress::line(format_args!("error: {problem}"));
        return ExitCode::FAILURE;
    }
    if let Err(problem) = stdout::set_apart() {
        progress::line(format_args!("error: cannot set stdout apart: {problem}"));
        return ExitCode::FAILURE;
    }
    probe::this_is_the_program();
    let done = match &cli.command {
        Command::Plan(arguments) => plan::run(arguments),
        Command::FineTune(arguments) => fine_tune::run(arguments),
        Command::Preview(arguments) => preview::run(arguments),
        Command::Run(arguments) => run::run(arguments),
        Command::New(arguments) => new::run(arguments),
        Command::Resume(arguments) => resume::run(arguments),
        Command::Runs(what) => runs::run(what),
        Command::Eval(arguments) => eval::run(arguments),
        Command::Compare(arguments) => compare::run(arguments),
        Command::Chat(arguments) => chat::run(arguments),
        Command::Pull(arguments) => pull::run(arguments),
        Command::ListModels(arguments) => list_models::run(arguments),
        Command::Show(arguments) => show::run(arguments),
        Command::Rm(arguments) => rm::run(arguments),
        Command::Cp(arguments) => cp::run(arguments),
        Command::Import(arguments) => import::run(arguments),
        Command::ExportModel(arguments) => export_model::run(arguments),
        Command::Serve(arguments) => serve::run(arguments),
        Command::Keys(what) => keys::run(what),
        Command::Handlers(what) => handlers::run(what),
        Command::Feedback(what) => feedback::run(what),
        Command::Plugins(what) => plugins::run(what),
        Command::Doctor(arguments) => doctor::run(arguments),
        Command::Bench(what) => bench::run(what),
        Command::Licenses => licenses::run(),
    };
    interrupt::await_end();
    match done {
        Ok(Done::Whole) => ExitCode::SUCCESS,
        Ok(Done::Interrupted) => ExitCode::from(interrupt::EXIT_CODE),
        Ok(Done::Unwell) => ExitCode::FAILURE,
        Err(error) => {
            progress::line(format_args!("error: {error:#}"));
            let is_a_run = matches!(cli.command, Command::FineTune(_) | Command::Run(_) | Command::Resume(_));
            // One that says by itself what to do says it more exactly.
            let says = format!("{error:#}");
            let is_told = error.is::<interrupt::Interrupted>() || says.contains("hint: ") || says.contains("to fit: ");
            if let Some(trouble) = troubles::of(&error).filter(|_| is_a_run && !is_told) {
                progress::line(trouble);
            }
            if error.is::<interrupt::Interrupted>() { ExitCode::from(interrupt::EXIT_CODE) } else { ExitCode::FAILURE }
        }
    }
}
