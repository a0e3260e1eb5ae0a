//! `chat` and `serve`, as the program runs them.

use super::*;

#[test]
fn the_shipped_handlers_are_a_file_that_can_be_read() -> Result<()> {
    let path = root().join("configs/handlers.toml");
    let config = Config::read(&path)?;
    assert!(!config.routes.is_empty() && !config.handlers.is_empty());
    // What is commented out is right too.
    let text = std::fs::read_to_string(&path)?;
    let all: Vec<&str> = text.lines().map(|line| line.strip_prefix("#: ").unwrap_or(line)).collect();
    assert!(all.len() > 10 && all.join("\n") != text.trim_end());
    let config = Config::parse(&path, &all.join("\n"))?;
    assert!(config.routes.values().any(|chain| chain.len() > 1));
    Ok(())
}

fn handlers_file(directory: &Path, base_url: &str) -> Result<std::path::PathBuf> {
    let path = directory.join("handlers.toml");
    let model = fixture("models/llama");
    std::fs::write(
        &path,
        format!(
            "[handlers.near]\nkind = \"local\"\nmodel = {:?}\n[handlers.far]\nkind = \"openai\"\nbase_url = {base_url:?}\nmodel = \"m\"\n[routes.both]\nhandlers = [\"far\", \"near\"]\n",
            model
        ),
    )?;
    Ok(path)
}

#[test]
fn a_conversation_goes_on_with_another_handler() -> Result<()> {
    let server = serve(Models::from([("m".into(), local()?)]))?;
    let directory = tempfile::tempdir()?;
    let config = handlers_file(directory.path(), &server.url())?;
    let talk = |handler: &str, lines: &str| -> Result<(String, String)> {
        let mut child = homeroom()
            .args(["chat", "--handler", handler, "--max-tokens", "8", "--temperature", "0", "--config"])
            .arg(&config)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()?;
        child.stdin.take().context("a pipe")?.write_all(lines.as_bytes())?;
        let output = child.wait_with_output()?;
        let stderr = String::from_utf8(output.stderr)?;
        assert!(output.status.success(), "{stderr}");
        Ok((String::from_utf8(output.stdout)?, stderr))
    };
    let (near, _) = talk("near", "one\ntwo\n/clear\none\n")?;
    let (switched, story) = talk("far", "one\n\n/handler near\ntwo\n/clear\n/handler both\none\n/exit\nnever\n")?;
    assert_eq!(near, switched);
    assert!(story.contains("near answers from now on"), "{story}");
    let (with_system, _) = talk("near", "/system other words\none\n/system\n/clear\none\n")?;
    assert_ne!(with_system, near);
    server.stop();
    server.wait()
}

#[test]
fn a_conversation_leaves_this_machine_only_on_the_users_word() -> Result<()> {
    let directory = tempfile::tempdir()?;
    let config = directory.path().join("é.toml");
    let far = "[handlers.far]\nkind = \"openai\"\nbase_url = \"https://nobody.invalid/v1\"\nmodel = \"m\"\n";
    let near = format!(
        "[handlers.near]\nkind = \"local\"\nmodel = {:?}\n[routes.safe]\nhandlers = [\"near\"]\n",
        fixture("models/llama")
    );
    let chat = |text: &str, arguments: &[&str], lines: &str| -> Result<(bool, String)> {
        std::fs::write(&config, text)?;
        let mut child = homeroom()
            .args(["chat", "--config"])
            .arg(&config)
            .args(arguments)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()?;
        child.stdin.take().context("a pipe")?.write_all(lines.as_bytes())?;
        let output = child.wait_with_output()?;
        Ok((output.status.success(), String::from_utf8(output.stderr)?))
    };
    let (done, story) = chat(far, &["--prompt", "hi"], "")?;
    assert!(
        !done && story.contains("`far` sends conversations to nobody.invalid, and no route allows that"),
        "{story}"
    );
    assert!(story.contains("--handler far"), "{story}");
    let (done, story) = chat(far, &["--prompt", "hi", "--handler", "far"], "")?;
    let first = story.lines().next().unwrap_or_default();
    assert!(
        !done && first == "note: `far` is not on this machine: what is said here goes to nobody.invalid",
        "{story}"
    );
    assert!(story.contains("the host was not found"), "{story}");
    let (done, story) = chat(&format!("{far}{near}"), &[], "/handler far\n/handler near\n/exit\n")?;
    let words = "far answers from now on; it is not on this machine: what is said, with the conversation so far, goes to nobody.invalid\nnear answers from now on\n";
    assert!(done && story == words, "{story}");
    Ok(())
}

/// A server that ends with the test.
pub struct Served(pub std::process::Child);

impl Drop for Served {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn a_file_that_is_deleted_while_it_is_served_is_told_once() -> Result<()> {
    let directory = tempfile::tempdir()?;
    let config = directory.path().join("h.toml");
    let text = format!("[handlers.near]\nkind = \"local\"\nmodel = {:?}\n", fixture("models/llama"));
    std::fs::write(&config, &text)?;
    let command = homeroom().args(["serve", "--port", "0", "--config"]).arg(&config).stderr(Stdio::piped()).spawn()?;
    let mut served = Served(command);
    let mut story = BufReader::new(served.0.stderr.take().context("a pipe")?).lines();
    let mut until = |words: &str| -> Result<Vec<String>> {
        let mut lines = Vec::new();
        while !lines.last().is_some_and(|line: &String| line.contains(words)) {
            lines.push(story.next().with_context(|| format!("it ended: {lines:?}"))??);
        }
        Ok(lines)
    };
    let serving = until("serving")?.pop().context("a line")?;
    std::fs::remove_file(&config)?;
    until("h.toml is gone; what was served is served on")?;
    let url = serving.split_whitespace().nth(1).context("an address")?;
    assert_eq!(
        endpoint(url, "near")?.complete(&asked("hello", 2), &Context::default())?.usage.completion_tokens,
        Some(2)
    );
    // Another look or two, and then it is there again.
    std::thread::sleep(Duration::from_secs(5));
    std::fs::write(&config, text.replace("near", "é2").replace("é", "e"))?;
    let lines = until("reload")?;
    assert!(lines.last().is_some_and(|line| line.ends_with(": e2")), "{lines:?}");
    assert!(!lines.iter().any(|line| line.contains("gone")), "{lines:?}");
    Ok(())
}

#[test]
fn a_prompt_is_answered_alone_on_stdout() -> Result<()> {
    let run = |more: &[&str]| -> Result<(bool, String, String)> {
        let output = homeroom().arg("chat").args(more).stdin(Stdio::null()).output()?;
        Ok((output.status.success(), String::from_utf8(output.stdout)?, String::from_utf8(output.stderr)?))
    };
    let model = fixture("models/llama").display().to_string();
    let (done, text, story) =
        run(&["--model-dir", &model, "--prompt", "hello there", "--max-tokens", "12", "--temperature", "0"])?;
    assert!(done && story.contains("--max-tokens allows more"), "{story}");
    let want = local()?.complete(&asked("hello there", 12), &Context::default())?;
    assert_eq!(text, want.text().to_owned() + "\n");
    let (done, _, story) = run(&["--handler", "x", "--config", "no-such-file.toml"])?;
    assert!(!done && story.contains("no-such-file.toml"), "{story}");
    assert!(!run(&["--prompt", "x"])?.0 && !run(&["--handler", "x"])?.0);
    Ok(())
}

#[test]
fn the_program_serves_and_ends_when_asked() -> Result<()> {
    let model = fixture("models/llama");
    let mut child =
        homeroom().args(["serve", "--port", "0", "--model-dir"]).arg(&model).stderr(Stdio::piped()).spawn()?;
    let mut story = BufReader::new(child.stderr.take().context("a pipe")?);
    let mut lines = BTreeMap::new();
    while !lines.contains_key("serving") {
        let mut line = String::new();
        anyhow::ensure!(story.read_line(&mut line)? > 0, "it ended before it served: {lines:?}");
        let (key, rest) = line.trim().split_once(' ').context("two columns")?;
        lines.insert(key.to_owned(), rest.trim().to_owned());
    }
    assert_eq!(lines["model"], "llama");
    let url = lines["serving"].split(' ').next().context("an address")?;
    let whole = endpoint(url, "llama")?.complete(&asked("hello there", 4), &Context::default())?;
    assert_eq!(whole.usage.completion_tokens, Some(4));
    #[cfg(unix)]
    {
        let stopped = std::process::Command::new("kill").args(["-INT", &child.id().to_string()]).status()?;
        assert!(stopped.success() && child.wait()?.success());
    }
    #[cfg(not(unix))]
    child.kill()?;
    Ok(())
}

#[test]
fn a_file_without_routes_serves_its_handlers_under_their_own_names() -> Result<()> {
    let near = format!("[handlers.near]\nkind = \"local\"\nmodel = {:?}\n", fixture("models/llama"));
    let beside = "[handlers.beside]\nkind = \"openai\"\nbase_url = \"http://localhost:1/v1\"\nmodel = \"m\"\n";
    let far = "[handlers.far]\nkind = \"openai\"\nbase_url = \"https://api.example.com/v1\"\nmodel = \"m\"\n";
    let served = |text: &str| -> Result<Vec<String>> {
        let served = Handlers::new(Config::parse(Path::new("h.toml"), text)?).served()?;
        Ok(served.into_keys().collect())
    };
    assert_eq!(served(&near)?, ["near"]);
    // Nothing leaves this machine unless a route says so.
    assert_eq!(served(&format!("{near}{far}{beside}"))?, ["beside", "near"]);
    let refused = served(far).expect_err("no route allows it").to_string();
    let words =
        "h.toml: `far` sends conversations to api.example.com, and no route allows that\nhint: add [routes.NAME]";
    assert!(refused.contains(words) && refused.contains("egress = \"allow\""), "{refused}");
    let route = "[routes.tutor]\nhandlers = [\"far\"]\negress = \"allow\"\n";
    assert_eq!(served(&format!("{near}{far}{route}"))?, ["tutor"]);
    for empty in ["", "# nothing yet\n", "[handlers]\n", "[routes]\n"] {
        let refused = served(empty).expect_err("there is nothing").to_string();
        assert!(refused.contains("h.toml: it has no handler\nhint: add [handlers.NAME]"), "{empty}: {refused}");
    }
    Ok(())
}

#[test]
fn handlers_that_share_a_base_are_told_with_it() -> Result<()> {
    let handler = |name: &str, model: &str| {
        format!("[handlers.{name}]\nkind = \"local\"\nmodel = {:?}\ncompute = \"f32\"\n", fixture("models").join(model))
    };
    let text = ["a", "b", "c"].map(|name| handler(name, if name == "c" { "qwen2" } else { "llama" })).concat();
    let handlers = Handlers::new(Config::parse(Path::new("h.toml"), &text)?);
    assert!(handlers.shared().is_empty(), "nothing is loaded yet");
    handlers.served()?;
    let shared = handlers.shared();
    let [(base, names)] = &shared[..] else { anyhow::bail!("{} bases are shared", shared.len()) };
    assert_eq!(names, &["a", "b"]);
    let weights = std::fs::metadata(fixture("models/llama/model.safetensors"))?.len();
    let bytes = base.stored_bytes() as u64;
    assert!(bytes <= weights && bytes + 16_384 > weights, "{bytes} of a file of {weights}");

    let directory = tempfile::tempdir()?;
    let config = directory.path().join("h.toml");
    std::fs::write(&config, text)?;
    let mut served =
        Served(homeroom().args(["serve", "--port", "0", "--config"]).arg(&config).stderr(Stdio::piped()).spawn()?);
    let story = BufReader::new(served.0.stderr.take().context("a pipe")?).lines();
    let story: Vec<String> = story.map_while(|line| line.ok().filter(|line| !line.starts_with("serving"))).collect();
    let path = fixture("models/llama").canonicalize()?;
    let told = format!("shared   a, b   one base, {}, ", path.display());
    assert_eq!(story.iter().filter(|line| line.starts_with("shared")).count(), 1, "{story:?}");
    assert!(story.iter().any(|line| line.starts_with(&told)), "{story:?}");
    Ok(())
}

#[test]
fn a_route_without_leave_for_the_cloud_is_refused_by_the_program() -> Result<()> {
    let directory = tempfile::tempdir()?;
    let config = handlers_file(directory.path(), "https://api.example.com/v1")?;
    let output = homeroom().args(["serve", "--port", "0", "--config"]).arg(&config).output()?;
    let story = String::from_utf8(output.stderr)?;
    assert!(!output.status.success() && story.contains("egress is \"deny\"") && story.contains("^^^"), "{story}");
    assert!(
        Handlers::new(Config::parse(
            &config,
            &std::fs::read_to_string(&config)?.replace("[\"far\", \"near\"]", "[\"near\"]")
        )?)
        .get("both")
        .is_ok()
    );
    Ok(())
}
