//! Who is let in.

use super::*;

/// The key in the ways in which programs send it; `key` is the password of `me`.
fn ways(key: &str) -> [String; 4] {
    let basic = base64(&format!("me:{key}"));
    [
        format!("authorization: Bearer {key}"),
        format!("authorization: Basic {basic}"),
        format!("api-key: {key}"),
        format!("x-api-key: {key}"),
    ]
}

pub fn base64(text: &str) -> String {
    const LETTERS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    text.as_bytes().chunks(3).fold(String::new(), |mut out, three| {
        let bits = three.iter().enumerate().fold(0_u32, |bits, (at, byte)| bits | u32::from(*byte) << (16 - 8 * at));
        let letter = |at: usize| char::from(LETTERS[(bits >> (18 - 6 * at)) as usize & 63]);
        out.extend((0..4).map(|at| if at <= three.len() { letter(at) } else { '=' }));
        out
    })
}

#[test]
fn every_route_wants_a_key_and_a_name_of_the_server() -> Result<()> {
    let (key, text) = Key::make("class")?;
    let site = Site::new(models(&["m"])?, &[key], Settings::default())?;
    let mut seen = 0;
    let paths = routes().map(|(path, methods)| (path.replace("{*id}", "m").replace("{model}", "m"), methods));
    let unknown = ["/nothing", "/api/nothing", "/v1/models/", "//", "/api/pull"].map(|path| (path.to_owned(), "GET"));
    for (path, methods) in paths.chain(unknown) {
        let is_open = ["/health", "/healthz"].contains(&path.as_str());
        for method in ["GET", "POST", "DELETE", "PUT", "OPTIONS", "HEAD", "PATCH"] {
            for headers in ["", "authorization: Bearer sk-hr-wrong", "authorization: Bearer", "x-api-key: "] {
                let headers = format!("content-type: application/json\n{headers}");
                let (status, head, body) = site.ask(method, &path, headers.trim(), "{}")?;
                if is_open && ["GET", "HEAD"].contains(&method) {
                    let says = if method == "GET" { "{\"status\":\"ok\"}" } else { "" };
                    assert_eq!((status, body.as_str()), (200, says), "{path}");
                    continue;
                }
                seen += 1;
                assert_eq!(status, 401, "{method} {path} ({methods}) with {headers}: {body}");
                assert!(head.contains("www-authenticate: Bearer"), "{head}");
                if method == "HEAD" {
                    continue;
                }
                let error = &serde_json::from_str::<Value>(&body)?["error"];
                if path.starts_with("/api/") {
                    assert!(error.as_str().is_some_and(|error| error.contains("API key")), "{path}: {body}");
                } else {
                    assert_eq!(error["code"], "invalid_api_key", "{path}: {body}");
                    assert_eq!(error["type"], "authentication_error", "{path}: {body}");
                }
            }
            let rebound = format!("host: evil.example:8080\nauthorization: Bearer {text}");
            assert_eq!(site.ask(method, &path, &rebound, "")?.0, 403, "{method} {path}");
        }
    }
    assert!(seen > 400, "{seen} refusals");
    // What a route is for is not told without a key either.
    assert!(!site.ask("GET", "/", "", "")?.2.contains("/v1"));
    let (status, _, _) = site.ask("GET", "/v1/models", &format!("authorization: Bearer {text}"), "")?;
    assert_eq!(status, 200);
    site.end()
}

#[test]
fn a_key_comes_in_any_of_four_ways_and_two_must_agree() -> Result<()> {
    let ((key, text), (other, other_text)) = (Key::make("class")?, Key::make("other")?);
    let site = Site::new(models(&["m"])?, &[key, other], Settings::default())?;
    for way in ways(&text) {
        assert_eq!(site.ask("GET", "/v1/models", &way, "")?.0, 200, "{way}");
        for same in ways(&text) {
            assert_eq!(site.ask("GET", "/v1/models", &format!("{way}\n{same}"), "")?.0, 200, "{way} {same}");
        }
        for differs in ways(&other_text).into_iter().chain(["api-key: ".to_owned()]) {
            let (status, _, body) = site.ask("GET", "/v1/models", &format!("{way}\n{differs}"), "")?;
            assert!(status == 401 && body.contains("two keys that differ"), "{way} {differs}: {body}");
        }
    }
    for wrong in [text.to_uppercase(), text[..text.len() - 1].to_owned(), format!("{text}0"), String::from("none")] {
        for way in ways(&wrong) {
            let (status, _, body) = site.ask("GET", "/v1/models", &way, "")?;
            assert!(status == 401 && !body.contains(&wrong), "{way}: {body}");
        }
    }
    site.end()
}

#[test]
fn a_key_uses_its_routes_and_sees_no_other() -> Result<()> {
    let (mut key, text) = Key::make("class")?;
    key.routes = Some(vec!["tutor".into()]);
    let (all, all_text) = Key::make("staff")?;
    let site = Site::new(models(&["tutor", "exams"])?, &[key, all], Settings::default())?;
    let ids = |key: &str| -> Result<Vec<String>> {
        let (_, _, list) = site.get("/v1/models", key)?;
        let data = list["data"].as_array().context("a list")?.clone();
        Ok(data.iter().filter_map(|card| card["id"].as_str().map(str::to_owned)).collect())
    };
    assert_eq!(
        (ids(&text)?, ids(&all_text)?),
        (vec!["tutor".to_owned()], vec!["exams".to_owned(), "tutor".to_owned()])
    );
    assert_eq!(site.post("/v1/chat/completions", &text, &chat("tutor", &json!({})))?.0, 200);
    assert_eq!(site.post("/v1/chat/completions", &all_text, &chat("exams", &json!({})))?.0, 200);
    let (status, _, body) = site.post("/v1/chat/completions", &text, &chat("exams", &json!({})))?;
    assert!(status == 403 && body.contains("model_not_allowed") && body.contains("permission_error"), "{body}");
    assert!(body.contains("the key `class` may not use `exams`; it may use tutor"), "{body}");
    let (status, _, body) = site.post("/v1/chat/completions", &text, &chat("exam", &json!({})))?;
    assert!(status == 404 && !body.contains("exams"), "what it may not use is not told: {body}");
    assert_eq!(site.get("/v1/models/exams", &text)?.0, 404);
    let (status, _, body) = site.post("/api/generate", &text, &json!({"model": "exams", "prompt": "hi"}))?;
    assert!(status == 403 && serde_json::from_str::<Value>(&body)?["error"].is_string(), "{body}");
    let (_, _, tags) = site.get("/api/tags", &text)?;
    assert_eq!(tags["models"].as_array().map(Vec::len), Some(1));
    for page in ["text/plain", "text/html"] {
        let (_, _, page) = site.ask("GET", "/", &format!("authorization: Bearer {text}\naccept: {page}"), "")?;
        assert!(page.contains("tutor") && !page.contains("exams"), "{page}");
    }
    site.end()
}

/// From the next request on, also on a connection that is open.
#[test]
fn a_key_that_is_removed_is_none_at_once() -> Result<()> {
    let ((key, text), (stays, _)) = (Key::make("class")?, Key::make("staff")?);
    let site = Site::new(models(&["m"])?, &[key.clone(), stays.clone()], Settings::default())?;
    let mut client = BufReader::new(TcpStream::connect(site.at())?);
    client.get_ref().set_read_timeout(Some(GUARD))?;
    let mut status = || -> Result<u16> {
        write!(client.get_mut(), "GET /v1/models HTTP/1.1\r\nhost: localhost\r\nauthorization: Bearer {text}\r\n\r\n")?;
        let (mut head, mut length) = (String::new(), 0);
        while !head.ends_with("\r\n\r\n") {
            let from = head.len();
            client.read_line(&mut head)?;
            if let Some(value) = head[from..].strip_prefix("content-length: ") {
                length = value.trim().parse()?;
            }
        }
        client.read_exact(&mut vec![0; length])?;
        Ok(head.split(' ').nth(1).context("a status")?.parse()?)
    };
    assert_eq!(status()?, 200);
    site.set_keys(std::slice::from_ref(&stays))?;
    assert_eq!(status()?, 401);
    site.set_keys(&[stays.clone(), key])?;
    assert_eq!(status()?, 200);
    // A file that cannot be read lets nobody in, and the server goes on.
    std::fs::write(site.directory.path().join("keys.json"), "{")?;
    assert_eq!(status()?, 503);
    site.set_keys(&[])?;
    assert_eq!(status()?, 401, "without keys it lets nobody in, as it has wanted one");
    site.end()
}

#[test]
fn pages_use_the_server_if_their_origin_is_named() -> Result<()> {
    let (key, text) = Key::make("class")?;
    let named = "https://tutor.school.example";
    let settings = Settings { cors_origins: vec![named.into()], ..Settings::default() };
    let site = Site::new(models(&["m"])?, &[key], settings)?;
    let body = chat("m", &json!({})).to_string();
    let post = |origin: &str| {
        let headers = format!("origin: {origin}\ncontent-type: application/json\nauthorization: Bearer {text}");
        site.ask("POST", "/v1/chat/completions", &headers, &body)
    };
    let (status, head, _) = post(named)?;
    assert!(status == 200 && head.contains(&format!("access-control-allow-origin: {named}")), "{head}");
    assert!(head.contains("vary: origin"), "{head}");
    let preflight = |origin: &str| {
        let headers = format!("origin: {origin}\naccess-control-request-method: POST");
        site.ask("OPTIONS", "/v1/chat/completions", &headers, "")
    };
    let (status, head, _) = preflight(named)?;
    assert!(status == 204 && head.contains("access-control-allow-headers: authorization"), "{status} {head}");
    for foreign in ["https://evil.example", "null", "https://tutor.school.example.evil.example", "http://localhost:9"] {
        let (status, head, _) = post(foreign)?;
        assert!(status == 403 && !head.contains("access-control-allow-origin"), "{foreign}: {head}");
        let (status, head, _) = preflight(foreign)?;
        assert!(status == 401 && !head.contains("access-control-allow-origin"), "{foreign}: {head}");
        let headers = format!("origin: {foreign}\nauthorization: Bearer {text}");
        let (_, head, _) = site.ask("GET", "/v1/models", &headers, "")?;
        assert!(!head.contains("access-control-allow-origin"), "{foreign}: {head}");
    }
    assert_eq!(post("http://localhost")?.0, 200, "a page of this server is none elsewhere");
    site.end()
}

/// What a form elsewhere can send without a preflight is not done, also where no key is wanted.
#[test]
fn a_page_elsewhere_changes_nothing_where_no_key_is_wanted() -> Result<()> {
    let site = Site::new(models(&["m"])?, &[], Settings::default())?;
    let generate = json!({"model": "m", "prompt": "hi", "stream": false, "options": {"num_predict": 2}}).to_string();
    let status = |headers: &str| -> Result<u16> { Ok(site.ask("POST", "/api/generate", headers, &generate)?.0) };
    // As the examples in Ollama's documentation call it.
    assert_eq!(status("content-type: application/x-www-form-urlencoded")?, 200);
    assert_eq!(status("content-type: text/plain\norigin: https://evil.example")?, 403);
    assert_eq!(status("content-type: application/json\norigin: https://evil.example")?, 403);
    assert_eq!(status("content-type: text/plain\nsec-fetch-site: cross-site")?, 415);
    site.end()
}

#[test]
fn a_name_is_allowed_by_the_settings_and_an_address_with_a_key() -> Result<()> {
    let (key, text) = Key::make("class")?;
    let settings = Settings { allowed_hosts: vec!["tutor.school.example".into()], ..Settings::default() };
    let site = Site::new(models(&["m"])?, std::slice::from_ref(&key), settings.clone())?;
    let status = |site: &Site, host: &str| -> Result<u16> {
        Ok(site.ask("GET", "/v1/models", &format!("host: {host}\nauthorization: Bearer {text}"), "")?.0)
    };
    for good in ["tutor.school.example", "Tutor.School.Example:8080", "192.168.1.7:8080", "[2001:db8::7]:8080"] {
        assert_eq!(status(&site, good)?, 200, "{good}");
    }
    for bad in ["evil.example", "tutor.school.example.evil.example", "x.tutor.school.example", ""] {
        assert_eq!(status(&site, bad)?, 403, "{bad}");
    }
    site.end()?;
    let open = Site::new(models(&["m"])?, &[], settings)?;
    assert_eq!((status(&open, "tutor.school.example")?, status(&open, "192.168.1.7")?), (200, 403));
    open.set_keys(&[key])?;
    assert_eq!(status(&open, "192.168.1.7")?, 200, "there is a key now, and it is wanted");
    assert_eq!(open.ask("GET", "/v1/models", "", "")?.0, 401);
    open.end()
}
