//! What is said of a TOML file with a mistake in it, word for word: line, caret, and what to do.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use homeroom::handler::config::Config;
use homeroom::pipeline::config::PipelineConfig;

use crate::support::{Place, fixture};

/// One case of the fixture: `=== kind: what is wrong`, the file, `---`, and all that is said of it.
struct Case<'a> {
    title: &'a str,
    file: &'a str,
}

fn cases(text: &str) -> Result<Vec<Case<'_>>> {
    let cases = text.split("=== ").skip(1).map(|case| {
        let (title, rest) = case.split_once('\n').context("a case has a title")?;
        let (file, _) = rest.split_once("\n---\n").with_context(|| format!("{title}: there is no line `---`"))?;
        Ok(Case { title, file })
    });
    cases.collect()
}

/// What is said of a file; its directory stands as `DIR`.
fn said(place: &Place, case: &Case) -> Result<String> {
    let (kind, _) = case.title.split_once(':').context("a title begins with its kind")?;
    let path = place.write(&format!("{kind}.toml"), case.file)?;
    let error = match kind {
        "pipeline" => PipelineConfig::read(&path, &[]).err(),
        "handlers" => Config::read(&path).err(),
        _ => anyhow::bail!("{kind}: no such kind of file"),
    };
    let error = error.with_context(|| format!("{}: nothing is wrong with it", case.title))?;
    let dir = path.parent().map(Path::display).context("a file has a directory")?;
    Ok(format!("{error:#}").replace(&dir.to_string(), "DIR"))
}

/// Where messages are to change, the file that is named becomes the fixture, once it is read.
#[test]
fn each_mistake_in_a_toml_file_is_told_at_its_place_and_in_these_words() -> Result<()> {
    let place = Place::new()?;
    place.write("s.lua", "return nil\n")?;
    let path = fixture("toml/errors.txt");
    let text = fs::read_to_string(&path)?;
    let cases = cases(&text)?;
    ensure!(cases.len() >= 20, "{} cases", cases.len());
    let mut now = text.split("=== ").next().unwrap_or_default().to_owned();
    for case in &cases {
        now += &format!("=== {}\n{}\n---\n{}\n\n", case.title, case.file, said(&place, case)?);
    }
    if now != text {
        let other = Path::new(env!("CARGO_TARGET_TMPDIR")).join("errors.txt");
        fs::write(&other, now)?;
        anyhow::bail!("{} and {} differ", path.display(), other.display());
    }
    Ok(())
}
