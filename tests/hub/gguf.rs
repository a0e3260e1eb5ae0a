//! Repositories of GGUF files, of which a name means one.

use super::*;

fn repo(files: &[&str]) -> Repo {
    let repo = Repo { commit: "c3".repeat(20), gated: json!(false), ..Repo::default() };
    let repo = files.iter().fold(repo, |repo, file| repo.with(file, file.repeat(2_000)));
    repo.with("config.json", "{}").with("mmproj-m-F16.gguf", "an image's")
}

#[test]
fn the_only_gguf_file_is_taken_without_its_quantization() -> Result<()> {
    let place = Place::new()?;
    let server = Server::of("a/b", repo(&["m-Q4_K_M.gguf"]))?;
    let ran = succeeds(&mut program(&server, &place, &["pull", "a/b/"]))?;
    assert!(ran.stdout.trim().ends_with("/m-Q4_K_M.gguf"), "{}", ran.stdout);
    assert!(ran.stderr.contains("note: a/b: m-Q4_K_M.gguf is taken"), "{}", ran.stderr);
    let offline = succeeds(&mut program(&server, &place, &["--offline", "pull", "a/b"]))?;
    assert_eq!(offline.stdout, ran.stdout);
    let named = succeeds(&mut program(&server, &place, &["--offline", "pull", "a/b:m-q4_k_m.gguf"]))?;
    assert_eq!(named.stdout, ran.stdout);
    let other = HubName { quantization: Some("Q8_0".to_owned()), ..name("a/b") };
    refused(&mut program(&server, &place, &["--offline", "pull", &other.to_string()]), &["here is a/b:Q4_K_M"])?;
    Ok(())
}

#[test]
fn of_several_gguf_files_that_are_here_the_names_are_told() -> Result<()> {
    let place = Place::new()?;
    let server = Server::of("a/b", repo(&["m-Q4_K_M.gguf", "m-UD-Q4_K_M.gguf", "m-Q8_0.gguf"]))?;
    refused(&mut program(&server, &place, &["pull", "a/b"]), &["it has GGUF files; which one is not said"])?;
    let pulled = succeeds(&mut program(&server, &place, &["pull", "a/b:m-Q4_K_M.gguf", "a/b:Q8_0"]))?;
    let paths: Vec<&str> = pulled.stdout.lines().collect();
    assert!(paths[0].ends_with("/m-Q4_K_M.gguf") && paths[1].ends_with("/m-Q8_0.gguf"), "{}", pulled.stdout);
    refused(
        &mut program(&server, &place, &["--offline", "pull", "a/b"]),
        &["several GGUF files of it are here", "`a/b:Q4_K_M`", "`a/b:Q8_0`"],
    )?;
    succeeds(&mut program(&server, &place, &["pull", "a/b:m-UD-Q4_K_M"]))?;
    refused(&mut program(&server, &place, &["--offline", "pull", "a/b"]), &["`a/b:m-Q4_K_M`", "`a/b:m-UD-Q4_K_M`"])?;
    Ok(())
}
