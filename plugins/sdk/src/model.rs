//! A model as a strategy sees it, and PEFT's rules for naming the modules that are adapted.

use homeroom_abi::describe::nearest;
use homeroom_abi::plan::{ModelInfo, ModuleInfo, ModuleKind};
use regex_lite::Regex;
use serde_json::Value;

use crate::{Error, Result};

/// Which modules are adapted, by PEFT's rules (`peft.tuners.tuners_utils.check_target_module_exists`).
#[derive(Clone, Debug, PartialEq)]
pub enum Targets {
    /// `all-linear`: every linear module but the one that yields the logits.
    AllLinear,
    /// A module is meant when its path is one of these or ends in `.` and one of these.
    Endings(Vec<String>),
    /// A regular expression that must match a whole path.
    Regex(String),
}

impl Targets {
    /// Reads an option's value; a text that is no list is a regular expression.
    pub fn from_value(value: &Value) -> Option<Self> {
        match value {
            Value::String(text) if text == "all-linear" => Some(Self::AllLinear),
            Value::String(text) => Some(Self::Regex(text.clone())),
            Value::Array(list) => {
                let names = list.iter().map(|name| name.as_str().map(str::to_owned));
                let names: Vec<String> = names.collect::<Option<_>>()?;
                Some(if names == ["all-linear"] { Self::AllLinear } else { Self::Endings(names) })
            }
            _ => None,
        }
    }
}

/// A model: its modules, with names and shapes.
pub struct Model {
    info: ModelInfo,
}

impl Model {
    /// Wraps what the host sent.
    pub fn new(info: ModelInfo) -> Self {
        Self { info }
    }

    /// `model_type` of `config.json`.
    pub fn model_type(&self) -> &str {
        &self.info.model_type
    }

    /// All modules in the order of the forward pass.
    pub fn modules(&self) -> &[ModuleInfo] {
        &self.info.modules
    }

    /// The modules that `targets` means.
    ///
    /// # Errors
    /// When it means none, one of several names means none, or a regular expression cannot be read.
    #[track_caller]
    pub fn matching(&self, targets: &Targets) -> Result<Vec<&ModuleInfo>> {
        let regex = match targets {
            Targets::Regex(pattern) => Some(full_match(pattern)?),
            _ => None,
        };
        let meant = |module: &&ModuleInfo| match targets {
            Targets::AllLinear => module.kind == ModuleKind::Linear && !module.output_embedding,
            Targets::Endings(names) => names.iter().any(|name| ends_in(&module.path, name)),
            Targets::Regex(_) => regex.as_ref().is_some_and(|regex| regex.is_match(&module.path)),
        };
        let found: Vec<&ModuleInfo> = self.info.modules.iter().filter(meant).collect();
        // PEFT trains what the other names mean. A name that means nothing is a slip, and the training would be another.
        let lost: Vec<&String> = match targets {
            Targets::Endings(names) => names.iter().filter(|name| !self.has(name)).collect(),
            _ => Vec::new(),
        };
        if found.is_empty() || !lost.is_empty() {
            let mut roles: Vec<&str> = self.info.modules.iter().map(|module| role(&module.path)).collect();
            roles.sort_unstable();
            roles.dedup();
            let wanted = match targets {
                Targets::AllLinear => "all-linear".to_owned(),
                Targets::Endings(_) if lost.is_empty() => "an empty list".to_owned(),
                Targets::Endings(_) => {
                    let lost = lost.iter().map(|name| match self.nearest(name) {
                        Some(near) => format!("`{name}` (did you mean `{near}`?)"),
                        None => format!("`{name}`"),
                    });
                    lost.collect::<Vec<_>>().join(", ")
                }
                Targets::Regex(pattern) => format!("the regular expression `{pattern}`"),
            };
            return Err(Error::new(format!("{wanted} matches no module; this model has {}", roles.join(", "))));
        }
        Ok(found)
    }

    fn has(&self, name: &str) -> bool {
        self.info.modules.iter().any(|module| ends_in(&module.path, name))
    }

    /// The end of a module's path, of as many parts as `name` has, that is nearest to it.
    fn nearest(&self, name: &str) -> Option<&str> {
        let parts = name.split('.').count();
        let ends = self.info.modules.iter().map(|module| {
            let cut = module.path.rmatch_indices('.').nth(parts - 1);
            cut.map_or(module.path.as_str(), |(dot, _)| &module.path[dot + 1..])
        });
        nearest(name, ends)
    }

    /// Refuses a key of a table of patterns, see [`pattern_value`], that no module's path matches.
    ///
    /// # Errors
    /// When there is one, or it is not a regular expression.
    #[track_caller]
    pub fn check_patterns<'a>(&self, option: &str, keys: impl IntoIterator<Item = &'a String>) -> Result<()> {
        for key in keys {
            let regex = full_match(&format!(r"(?:.*\.)?(?:{key})"))?;
            if !self.info.modules.iter().any(|module| regex.is_match(&module.path)) {
                let near = self.nearest(key).map(|near| format!(", did you mean `{near}`?")).unwrap_or_default();
                return Err(Error::new(format!("{option}: `{key}` matches no module{near}")));
            }
        }
        Ok(())
    }
}

/// The value for a module in a table of patterns such as PEFT's `rank_pattern`: a key matches when the regular expression
/// `(.*\.)?(key)$` does. The first key in alphabetical order that matches wins.
///
/// # Errors
/// When a key is not a regular expression.
#[track_caller]
pub fn pattern_value<'a>(patterns: impl IntoIterator<Item = (&'a String, &'a f64)>, path: &str) -> Result<Option<f64>> {
    for (key, value) in patterns {
        if full_match(&format!(r"(?:.*\.)?(?:{key})"))?.is_match(path) {
            return Ok(Some(*value));
        }
    }
    Ok(None)
}

#[track_caller]
fn full_match(pattern: &str) -> Result<Regex> {
    Regex::new(&format!("^(?:{pattern})$"))
        .map_err(|error| Error::new(format!("`{pattern}` is not a regular expression: {error}")))
}

fn ends_in(path: &str, name: &str) -> bool {
    path == name || path.strip_suffix(name).is_some_and(|front| front.ends_with('.'))
}

/// Last part of a path, e.g. `q_proj`.
fn role(path: &str) -> &str {
    path.rsplit('.').next().unwrap_or(path)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing;

    fn paths(targets: &Targets) -> Vec<String> {
        let model = Model::new(testing::request("{}").model);
        let found = model.matching(targets).unwrap();
        found.into_iter().map(|module| module.path.clone()).collect()
    }

    #[test]
    fn all_linear_leaves_out_the_head_the_embedding_and_the_norms() {
        let found = paths(&Targets::AllLinear);
        assert_eq!(found.len(), 14);
        assert!(found.iter().all(|path| path.ends_with("_proj")));
    }

    #[test]
    fn an_ending_matches_whole_parts_of_a_path_only() {
        assert_eq!(paths(&Targets::Endings(vec!["layers.1.mlp.up_proj".into()])).len(), 1);
        assert_eq!(paths(&Targets::Endings(vec!["q_proj".into(), "lm_head".into()])).len(), 3);
        let model = Model::new(testing::request("{}").model);
        let error = model.matching(&Targets::Endings(vec!["_proj".into()])).unwrap_err();
        assert!(error.to_string().contains("this model has"), "{error}");
    }

    /// A slip beside a name that is right would leave out modules in silence.
    #[test]
    fn each_name_that_means_no_module_is_refused_with_the_nearest() {
        let model = Model::new(testing::request("{}").model);
        for (names, words) in [
            (&["q_prj", "v_proj"][..], "`q_prj` (did you mean `q_proj`?) matches no module; this model has "),
            (
                &["v_proj", "layers.1.mlp.donw_proj", "größe"],
                "`layers.1.mlp.donw_proj` (did you mean `layers.1.mlp.down_proj`?), `größe` matches no module",
            ),
            (&["all-linear", "lm_head"], "`all-linear` matches no module"),
            (&["layers.2.mlp.up_proj", "", "up_proj"], "`layers.2.mlp.up_proj` (did you mean `layers."),
        ] {
            let names = names.iter().map(|name| (*name).to_owned()).collect();
            let error = model.matching(&Targets::Endings(names)).unwrap_err().to_string();
            assert!(error.contains(words), "{words}: {error}");
        }
        assert!(model.check_patterns("rank_pattern", [&"layers.1.*_proj".to_owned(), &"up_proj".to_owned()]).is_ok());
        let error = model.check_patterns("rank_pattern", [&"dwn_proj".to_owned()]).unwrap_err().to_string();
        assert!(error.contains("rank_pattern: `dwn_proj` matches no module, did you mean `down_proj`?"), "{error}");
    }

    #[test]
    fn a_regex_must_match_the_whole_path() {
        assert_eq!(paths(&Targets::Regex(r".*\.(q|v)_proj".into())).len(), 4);
        let model = Model::new(testing::request("{}").model);
        assert!(model.matching(&Targets::Regex("q_proj".into())).is_err());
        assert!(model.matching(&Targets::Regex("(".into())).is_err());
    }

    #[test]
    fn a_pattern_key_matches_the_end_of_a_path() {
        let patterns = [("layers.1.mlp.down_proj".to_owned(), 2.0)];
        let value = |path| pattern_value(patterns.iter().map(|(k, v)| (k, v)), path).unwrap();
        assert_eq!(value("model.layers.1.mlp.down_proj"), Some(2.0));
        assert_eq!(value("model.layers.11.mlp.down_proj"), None);
    }
}
