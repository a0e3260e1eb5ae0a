//! A strategy's options: declared once with type, default and a line of doc, then read.

use std::collections::BTreeMap;

use homeroom_abi::describe::{OptionKind, OptionSpec, option_problems};
use serde_json::{Map, Value};

use crate::{Error, Result, Targets};

/// The declaration of a strategy's options, in the order in which users see them.
#[derive(Default)]
pub struct Options {
    specs: Vec<OptionSpec>,
}

impl Options {
    /// A whole number, zero or more. A default of `None` means that the strategy derives it.
    pub fn int(&mut self, name: &str, default: impl Into<Option<u64>>, doc: &str) -> &mut Self {
        self.push(name, OptionKind::Int, default.into().map(Value::from), doc)
    }

    /// A number.
    pub fn float(&mut self, name: &str, default: impl Into<Option<f64>>, doc: &str) -> &mut Self {
        self.push(name, OptionKind::Float, default.into().map(Value::from), doc)
    }

    /// True or false.
    pub fn bool(&mut self, name: &str, default: bool, doc: &str) -> &mut Self {
        self.push(name, OptionKind::Bool, Some(default.into()), doc)
    }

    /// A text.
    pub fn string(&mut self, name: &str, default: &str, doc: &str) -> &mut Self {
        self.push(name, OptionKind::String, Some(default.into()), doc)
    }

    /// Module names as PEFT takes them: a list of name endings, a regular expression, or `all-linear`.
    pub fn targets(&mut self, name: &str, default: &str, doc: &str) -> &mut Self {
        self.push(name, OptionKind::StringOrList, Some(default.into()), doc)
    }

    /// A table from module name patterns to numbers, empty by default.
    pub fn map(&mut self, name: &str, doc: &str) -> &mut Self {
        self.push(name, OptionKind::Map, Some(Value::Object(Map::new())), doc)
    }

    fn push(&mut self, name: &str, kind: OptionKind, default: Option<Value>, doc: &str) -> &mut Self {
        let default = default.unwrap_or(Value::Null);
        self.specs.push(OptionSpec { name: name.to_owned(), kind, default, doc: doc.to_owned() });
        self
    }

    pub(crate) fn into_specs(self) -> Vec<OptionSpec> {
        self.specs
    }
}

/// The options of one run: what the user gave, else the defaults.
pub struct Values {
    values: Map<String, Value>,
}

impl Values {
    /// Checks `given` against the declaration.
    ///
    /// # Errors
    /// All unknown names and wrong types together, each with the nearest known name or the wanted type.
    pub(crate) fn check(specs: &[OptionSpec], given: &Map<String, Value>) -> Result<Self> {
        let problems = option_problems(specs, given);
        if !problems.is_empty() {
            return Err(Error(homeroom_abi::describe::PluginError { message: problems.join("; "), at: None }));
        }
        let values = specs.iter().map(|spec| {
            let given = given.get(&spec.name).filter(|value| !value.is_null());
            (spec.name.clone(), given.unwrap_or(&spec.default).clone())
        });
        Ok(Self { values: values.collect() })
    }

    /// A whole number; an error when it has no value.
    #[track_caller]
    pub fn int(&self, name: &str) -> Result<usize> {
        let value = self.value(name)?.as_u64().and_then(|value| usize::try_from(value).ok());
        value.ok_or_else(|| Error::new(format!("`{name}` needs a whole number")))
    }

    /// A number; an error when it has no value.
    #[track_caller]
    pub fn float(&self, name: &str) -> Result<f64> {
        let value = self.value(name)?.as_f64();
        value.ok_or_else(|| Error::new(format!("`{name}` needs a number")))
    }

    /// A number, or `default` when none was given.
    #[track_caller]
    pub fn float_or(&self, name: &str, default: f64) -> Result<f64> {
        if self.value(name)?.is_null() { Ok(default) } else { self.float(name) }
    }

    /// True or false.
    #[track_caller]
    pub fn bool(&self, name: &str) -> Result<bool> {
        let value = self.value(name)?.as_bool();
        value.ok_or_else(|| Error::new(format!("`{name}` needs true or false")))
    }

    /// A text.
    #[track_caller]
    pub fn string(&self, name: &str) -> Result<String> {
        let value = self.value(name)?.as_str().map(str::to_owned);
        value.ok_or_else(|| Error::new(format!("`{name}` needs a text")))
    }

    /// Module names as PEFT takes them.
    #[track_caller]
    pub fn targets(&self, name: &str) -> Result<Targets> {
        Targets::from_value(self.value(name)?)
            .ok_or_else(|| Error::new(format!("`{name}` needs a text or a list of texts")))
    }

    /// A table from text to number.
    #[track_caller]
    pub fn map(&self, name: &str) -> Result<BTreeMap<String, f64>> {
        let value = self.value(name)?;
        let wrong = || Error::new(format!("`{name}` needs a table from text to number"));
        if value.is_null() {
            return Ok(BTreeMap::new());
        }
        let entries = value.as_object().ok_or_else(wrong)?.iter();
        entries.map(|(key, value)| Ok((key.clone(), value.as_f64().ok_or_else(wrong)?))).collect()
    }

    /// All values by their names, as the fields of a PEFT configuration.
    pub fn peft_fields(&self) -> Value {
        Value::Object(self.values.clone())
    }

    /// The value as it stands.
    #[track_caller]
    pub fn value(&self, name: &str) -> Result<&Value> {
        self.values.get(name).ok_or_else(|| Error::new(format!("option `{name}` is not declared")))
    }
}

/// A number as JSON writes it: without a fraction when it has none, as PEFT writes `lora_alpha`.
pub fn number(value: f64) -> Value {
    if value.fract() == 0.0 && value.abs() < 2_f64.powi(53) { Value::from(value as i64) } else { Value::from(value) }
}
