//! The formats in which models of different families write calls of tools, as data. A model's chat template tells which one is its.

/// What stands between the marks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Form {
    /// A JSON object with the name and the arguments, or a list of them.
    Json,
    /// The name, and a JSON object of the arguments behind it.
    Named,
}

/// How a family writes calls.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Format {
    /// What a template of the family holds; nothing: any template.
    pub sign: &'static str,
    /// What a call begins with.
    pub opens: &'static [&'static str],
    /// What it ends with, if not with the answer.
    pub closes: Option<&'static str>,
    /// What stands between these.
    pub form: Form,
    /// An answer that is JSON from its beginning is a call without a mark.
    pub bare: bool,
    /// What is written for a model that must call a tool, before the call as a JSON object.
    pub prefix: &'static str,
    /// The name of the arguments in that object.
    pub arguments: &'static str,
}

/// The first whose sign a template holds is its format.
///
/// Sources: the chat templates of the families, `tests/fixtures/templates/published`.
const FORMATS: [Format; 5] = [
    // Mistral, Ministral, Devstral.
    Format {
        sign: "[TOOL_CALLS]",
        opens: &["[TOOL_CALLS]"],
        closes: None,
        form: Form::Named,
        bare: false,
        prefix: "[TOOL_CALLS] [",
        arguments: "arguments",
    },
    // Granite 3, Phi-4-mini.
    Format {
        sign: "<|tool_call|>",
        opens: &["<|tool_call|>", "<tool_call>"],
        closes: None,
        form: Form::Json,
        bare: false,
        prefix: "<|tool_call|>[",
        arguments: "arguments",
    },
    // Qwen 2.5 and 3, Hermes, Granite 4, SmolLM3; Qwen 3.5 and Qwen-Coder write XML in it.
    Format {
        sign: "<tool_call>",
        opens: &["<tool_call>"],
        closes: Some("</tool_call>"),
        form: Form::Json,
        bare: false,
        prefix: "<tool_call>\n",
        arguments: "arguments",
    },
    // Llama 3.1 to 3.3.
    Format {
        sign: "\"parameters\": dictionary",
        opens: &["<|python_tag|>"],
        closes: None,
        form: Form::Json,
        bare: true,
        prefix: "",
        arguments: "parameters",
    },
    // What a model without a format of its own is told to write.
    Format {
        sign: "",
        opens: &["<tool_call>"],
        closes: Some("</tool_call>"),
        form: Form::Json,
        bare: true,
        prefix: "<tool_call>\n",
        arguments: "arguments",
    },
];

/// Returns the format of a chat template's source.
pub(super) fn of_source(source: &str) -> &'static Format {
    let own = FORMATS.iter().find(|format| source.contains(format.sign));
    own.unwrap_or(&FORMATS[FORMATS.len() - 1])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn templates_of_families_have_their_formats() {
        let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures/templates/published");
        for (name, sign) in [
            ("qwen2_5", "<tool_call>"),
            ("qwen3", "<tool_call>"),
            ("qwen3_5_think", "<tool_call>"),
            ("llama3_1", "\"parameters\": dictionary"),
            ("llama3_2", "\"parameters\": dictionary"),
            ("mistral_v3_tekken", "[TOOL_CALLS]"),
            ("mistral_v2v3", "[TOOL_CALLS]"),
            ("mistral_v7_tekken", ""),
            ("chatml", ""),
            ("gemma", ""),
        ] {
            let source = std::fs::read_to_string(folder.join(name).with_extension("jinja")).expect("a fixture");
            assert_eq!(of_source(&source).sign, sign, "{name}");
        }
    }
}
