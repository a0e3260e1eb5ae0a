//! The page at `/`: what runs here and how to call it. HTML for browsers, text for everybody else.
//!
//! It has no script, and nothing in it is loaded from anywhere.

use std::fmt::Write;
use std::sync::{Arc, OnceLock};

use axum::extract::{Request, State};
use axum::http::{HeaderMap, HeaderValue, header};
use axum::response::{IntoResponse, Response};
use base64::prelude::*;
use sha2::{Digest as _, Sha256};

use super::App;
use super::admit::Access;
use super::apart::apart;
use super::gate::accepts_html;
use super::reply::Refusal;
use crate::handler::Gives;
use crate::html::escaped;
use crate::terminal::shown;

const STYLE: &str = include_str!("page.css");

/// What the page says.
struct Said<'a> {
    host: &'a str,
    scheme: &'a str,
    models: Vec<(String, Gives)>,
    keyed: bool,
}

/// Answers people who open the address in a browser, and programs that check whether a server is there.
pub(super) async fn page(State(app): State<Arc<App>>, request: Request) -> Result<Response, Refusal> {
    let (parts, _) = request.into_parts();
    apart(move || Ok(answer(&app, &parts.headers, parts.extensions.get::<Access>()))).await
}

fn answer(app: &App, headers: &HeaderMap, access: Option<&Access>) -> Response {
    let host = headers.get(header::HOST).and_then(|host| host.to_str().ok()).unwrap_or("127.0.0.1");
    let keyed = access.is_some_and(|access| access.0.is_some());
    let models = app.models();
    let may_use = |name: &str| access.is_none_or(|access| access.may_use(&models, name));
    let listed = models.iter().filter(|(name, _)| may_use(name)).map(|(name, handler)| (name.clone(), handler.gives()));
    let said = Said { host, scheme: scheme(headers), models: listed.collect(), keyed };
    if !accepts_html(headers) {
        return shown(&said.text()).into_owned().into_response();
    }
    let headers = [
        (header::CONTENT_TYPE, HeaderValue::from_static("text/html; charset=utf-8")),
        (header::CONTENT_SECURITY_POLICY, policy()),
        (header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff")),
        (header::REFERRER_POLICY, HeaderValue::from_static("no-referrer")),
        (header::CACHE_CONTROL, HeaderValue::from_static("no-store")),
    ];
    (headers, said.html()).into_response()
}

/// The scheme of the address as the client sees it: a proxy in front says whether that is https.
fn scheme(headers: &HeaderMap) -> &'static str {
    let forwarded = headers.get("x-forwarded-proto").and_then(|proto| proto.to_str().ok());
    if forwarded == Some("https") { "https" } else { "http" }
}

/// Nothing is loaded but the page's own style, which is known by its digest.
fn policy() -> HeaderValue {
    static POLICY: OnceLock<HeaderValue> = OnceLock::new();
    let make = || {
        let style = BASE64_STANDARD.encode(Sha256::digest(STYLE));
        let policy = format!(
            "default-src 'none'; style-src 'sha256-{style}'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
        );
        HeaderValue::try_from(policy).expect("base64 is ASCII")
    };
    POLICY.get_or_init(make).clone()
}

impl Said<'_> {
    fn text(&self) -> String {
        let names: Vec<&str> = self.models.iter().map(|(name, _)| name.as_str()).collect();
        let key = if self.keyed { "with your API key" } else { "any API key will do: none is checked" };
        format!(
            "homeroom answers OpenAI's API here, and Ollama's\nbase URL  {}://{}/v1   {key}\nmodels    {}\n",
            self.scheme,
            self.host,
            names.join(", ")
        )
    }

    fn html(&self) -> String {
        let address = escaped(&format!("{}://{}", self.scheme, self.host));
        let mut rows = String::new();
        for (name, gives) in &self.models {
            let gives = match gives {
                Gives::Answers => "answers",
                Gives::Vectors => "embeddings",
                Gives::Either => "answers or embeddings",
            };
            write!(rows, "<tr><td><code>{}</code></td><td>{gives}</td></tr>", escaped(name))
                .expect("a string takes it");
        }
        let first = self.models.iter().find(|(_, gives)| *gives != Gives::Vectors).or(self.models.first());
        let model = first.map_or_else(|| "MODEL".to_owned(), |(name, _)| escaped(name));
        let (header, python, says) = match self.keyed {
            true => (
                "\n  -H \"authorization: Bearer $HOMEROOM_KEY\" \\",
                "os.environ[\"HOMEROOM_KEY\"]",
                "A key is wanted: send it as <code>Authorization: Bearer KEY</code>. Whoever runs this server makes keys with <code>homeroom keys add NAME</code>.",
            ),
            false => ("", "\"none\"", "No key is wanted: this server answers its own machine alone."),
        };
        let import = if self.keyed { "import os\n" } else { "" };
        format!(
            r#"<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>homeroom</title>
<style>{STYLE}</style>
<h1>homeroom</h1>
<p>Language models answer here, by OpenAI's API and by Ollama's. What is written to them is read by a machine, and answered by one.</p>
<table>
<tr><th>base URL for OpenAI's clients</th><td><code>{address}/v1</code></td></tr>
<tr><th>for Ollama's clients</th><td><code>{address}</code></td></tr>
</table>
<p>{says}</p>
<h2>Models</h2>
<table><tr><th>name</th><th>gives</th></tr>{rows}</table>
<h2>Call it</h2>
<pre>curl {address}/v1/chat/completions \{header}
  -H "content-type: application/json" \
  -d '{{"model": "{model}",
       "messages": [{{"role": "user", "content": "What is a prime?"}}]}}'</pre>
<pre>{import}from openai import OpenAI

client = OpenAI(
    base_url="{address}/v1",
    api_key={python},
)
answer = client.chat.completions.create(
    model="{model}",
    messages=[{{"role": "user", "content": "What is a prime?"}}],
)
print(answer.choices[0].message.content)</pre>
</html>
"#
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_shown_is_text_and_never_markup() {
        let models = vec![("<b>\"tutor\"</b>".to_owned(), Gives::Answers)];
        let page = Said { host: "a'><script>", scheme: "http", models, keyed: true }.html();
        assert!(page.contains("<code>&lt;b&gt;&quot;tutor&quot;&lt;/b&gt;</code>"), "{page}");
        assert!(!page.contains("<script") && !page.contains("<b>"), "{page}");
        assert!(page.contains("$HOMEROOM_KEY") && page.contains("import os\n"), "{page}");
        let open = Said { host: "localhost:8080", scheme: "http", models: Vec::new(), keyed: false };
        assert!(open.html().contains("No key is wanted") && open.text().contains("http://localhost:8080/v1"));
    }
}
