//! Names of models on the hub: `owner/name[@revision][:quantization]`.

use std::fmt::{self, Display, Formatter};
use std::path::Path;

/// A model on the hub, as a user names it.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct HubName {
    /// `owner/name`.
    pub repo: String,
    /// A branch, a tag or a commit; the branch `main` if it is not said.
    pub revision: Option<String>,
    /// Which of the repository's GGUF files, by what its name ends in: `Q4_K_M`.
    pub quantization: Option<String>,
}

/// What people copy from a browser or from other programs, and may stand before a name.
const PREFIXES: [&str; 6] =
    ["https://huggingface.co/", "http://huggingface.co/", "https://hf.co/", "huggingface.co/", "hf.co/", "hf://"];

/// Digits of a commit that are told.
pub const COMMIT_TOLD: usize = 12;

/// Longest owner and longest name, as the hub has them.
const PART_BYTES_MAX: usize = 96;
/// Longest revision: no file name can be longer.
const REVISION_BYTES_MAX: usize = 255;

impl HubName {
    /// Reads a name, if a text has that form. `.gguf` and `.safetensors` at the end and `.` at the beginning are those of paths.
    pub fn parse(text: &str) -> Option<Self> {
        let (text, explicit) = match PREFIXES.iter().find_map(|prefix| text.strip_prefix(prefix)) {
            Some(rest) => (rest.trim_end_matches('/'), true),
            None => (text, false),
        };
        let (text, revision) = match text.split_once("/tree/").filter(|_| explicit) {
            Some((text, revision)) => (text, Some(revision)),
            None => (text, None),
        };
        let (text, quantization) = match text.rsplit_once(':') {
            Some((text, quantization)) => (text, Some(quantization)),
            None => (text, None),
        };
        let (repo, revision) = match text.split_once('@') {
            Some((repo, at)) => (repo, Some(at)),
            None => (text, revision),
        };
        let (owner, name) = repo.split_once('/')?;
        let is_right = is_part(owner)
            && is_part(name)
            && ![".gguf", ".safetensors"].iter().any(|ending| name.to_ascii_lowercase().ends_with(ending))
            && revision.is_none_or(is_revision)
            && quantization.is_none_or(is_part);
        is_right.then(|| Self {
            repo: repo.to_owned(),
            revision: revision.map(str::to_owned),
            quantization: quantization.map(str::to_owned),
        })
    }

    /// Reads what a user typed for a model: a name on the hub if it has that form and is no path here. Where its first part is a
    /// directory here, it is a path that is wrong.
    pub fn typed(text: &Path) -> Option<Self> {
        let name = Self::parse(text.to_str()?)?;
        let (owner, _) = name.repo.split_once('/')?;
        let is_path = text.starts_with(owner) && Path::new(owner).is_dir();
        (!is_path).then_some(name)
    }

    /// The revision, or `main`.
    pub fn revision(&self) -> &str {
        self.revision.as_deref().unwrap_or("main")
    }

    /// The same model at a commit.
    pub fn at(&self, commit: &str) -> Self {
        Self { revision: Some(commit.to_owned()), ..self.clone() }
    }

    /// Whether a text is a commit's hash.
    pub fn is_commit(text: &str) -> bool {
        text.len() == 40 && text.bytes().all(|c| c.is_ascii_digit() || (b'a'..=b'f').contains(&c))
    }
}

impl Display for HubName {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.repo)?;
        if let Some(revision) = &self.revision {
            write!(f, "@{revision}")?;
        }
        self.quantization.as_ref().map_or(Ok(()), |quantization| write!(f, ":{quantization}"))
    }
}

/// Whether a text can be an owner or a name: both become parts of paths.
fn is_part(text: &str) -> bool {
    let plain = text.chars().all(|c| c.is_ascii_alphanumeric() || "-_.".contains(c));
    let dotted =
        text.starts_with(['.', '-']) || text.ends_with(['.', '-']) || text.contains("..") || text.contains("--");
    plain && !dotted && (1..=PART_BYTES_MAX).contains(&text.len())
}

/// Whether a text can be a revision: each part of it between `/` becomes one of a path.
fn is_revision(text: &str) -> bool {
    let part = |part: &str| {
        let plain = part.chars().all(|c| c.is_ascii_alphanumeric() || "-_.+".contains(c));
        plain && !part.is_empty() && !part.starts_with('.') && !part.contains("..")
    };
    text.len() <= REVISION_BYTES_MAX && text.split('/').all(part)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_has_a_revision_and_a_quantization_where_they_are_said() {
        for (text, repo, revision, quantization) in [
            ("Qwen/Qwen2.5-0.5B-Instruct", "Qwen/Qwen2.5-0.5B-Instruct", None, None),
            ("a/b@refs/pr/7", "a/b", Some("refs/pr/7"), None),
            ("a/b@v1.0:Q4_K_M", "a/b", Some("v1.0"), Some("Q4_K_M")),
            ("a/b:IQ3_XS", "a/b", None, Some("IQ3_XS")),
            ("hf.co/a/b:Q8_0", "a/b", None, Some("Q8_0")),
            ("https://huggingface.co/a/b/tree/dev", "a/b", Some("dev"), None),
            ("https://huggingface.co/a/b/", "a/b", None, None),
        ] {
            let name = HubName::parse(text).unwrap_or_else(|| panic!("{text} is a name"));
            let parts = (name.repo.as_str(), name.revision.as_deref(), name.quantization.as_deref());
            assert_eq!(parts, (repo, revision, quantization), "{text}");
        }
    }

    #[test]
    fn what_could_lead_out_of_the_cache_is_no_name() {
        let long = format!("a/{}", "b".repeat(97));
        for bad in [
            "",
            "a",
            "/a/b",
            "a/b/c",
            "../b",
            "a/..",
            "a/b@",
            "a/b@../c",
            "a/b@a/../b",
            "a/b@/etc",
            "a/b:",
            "a/b:../c",
            "./a/b",
            "a//b",
            "a/b c",
            "a/b.gguf",
            "a/b.Safetensors",
            "a--b/c",
            "~/a",
            "a/b@x\ny",
            "ä/b",
            long.as_str(),
        ] {
            assert_eq!(HubName::parse(bad), None, "{bad:?}");
        }
    }

    #[test]
    fn a_name_is_written_as_it_is_read() {
        for text in ["a/b", "a/b@main", "a/b:Q4_0", "a/b@v1:Q4_0"] {
            assert_eq!(HubName::parse(text).expect("it is a name").to_string(), text);
        }
    }
}
