//! Prints how fast rows become tokens, beside the `tokenizers` crate alone over the same texts:
//! `rows_speed MODEL ROWS.jsonl [ROUNDS]`, where MODEL is a directory or a GGUF file. The two take turns.
//!
//! Ours reads the file, checks each row, renders it by the chat template, tokenises it and lays the result by. The crate's share is
//! `encode_batch` over the rendered texts, which lie in memory, by as many threads. Texts are counted, so the ratio is one of times.

use std::path::Path;
use std::time::Instant;

use anyhow::{Context, Result, anyhow, ensure};
use homeroom_engine::data::{Encoder, OnLongRow, Reading, Row, RowKind, Source, check_row, load_groups};
use homeroom_engine::files::gguf::Gguf;
use homeroom_engine::text::template::ChatTemplate;
use homeroom_engine::text::tokenizer::Tokenizer;
use serde_json::json;

// The program's; both sides take and give back much memory.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Texts that the crate is given at once.
const BATCH: usize = 1024;

fn main() -> Result<()> {
    let mut arguments = std::env::args_os().skip(1);
    let usage = "usage: rows_speed MODEL ROWS.jsonl [ROUNDS]";
    let (model, rows) = (arguments.next().context(usage)?, arguments.next().context(usage)?);
    let rounds = arguments.next().map_or(Ok(3), |rounds| rounds.to_string_lossy().parse::<usize>())?;
    let (model, rows) = (Path::new(&model), Path::new(&rows));
    let tokenizer =
        if model.is_dir() { Tokenizer::from_dir(model)? } else { Tokenizer::from_gguf(&Gguf::open(model)?)? };
    let source = tokenizer.chat_template.clone().context("the model has no chat template")?;
    let template = ChatTemplate::new(&source, tokenizer.bos_token.as_deref(), tokenizer.eos_token.as_deref())?;
    let alone: tokenizers::Tokenizer = tokenizer.to_json()?.parse().map_err(|error| anyhow!("{error}"))?;
    let texts = rendered(rows, &template, &tokenizer)?;
    let bytes: usize = texts.iter().map(String::len).sum();
    let encoder = Encoder {
        tokenizer: &tokenizer,
        template: Some(&template),
        embeddings: usize::MAX,
        max_seq_len: usize::MAX,
        on_long_row: OnLongRow::Refuse,
    };
    println!("{}", processor());
    println!("{} texts, {:.1} MB, {} threads", texts.len(), bytes as f64 / 1e6, rayon::current_num_threads());
    let (mut ours, mut theirs) = (Vec::new(), Vec::new());
    for round in 1..=rounds {
        let start = Instant::now();
        let files = [Source::file(rows)];
        let data = load_groups(&files, &Reading::default(), encoder, RowKind::Demonstration, "sft", |_| ())?;
        ours.push(start.elapsed().as_secs_f64());
        let tokens: usize = data.examples.iter().flat_map(|group| &group.sequences).map(|row| row.ids.len()).sum();
        drop(data);
        let start = Instant::now();
        let mut count = 0;
        for batch in texts.chunks(BATCH) {
            let batch: Vec<&str> = batch.iter().map(String::as_str).collect();
            let encoded = alone.encode_batch(batch, false).map_err(|error| anyhow!("{error}"))?;
            count += encoded.iter().map(|encoding| encoding.get_ids().len()).sum::<usize>();
        }
        theirs.push(start.elapsed().as_secs_f64());
        ensure!(count.abs_diff(tokens) * 1000 < count, "{tokens} tokens, alone {count}");
        let (a, b) = (ours[round - 1], theirs[round - 1]);
        println!(
            "round {round}   rows {:.2} MB/s   tokenizers alone {:.2} MB/s   ratio {:.3}",
            bytes as f64 / a / 1e6,
            bytes as f64 / b / 1e6,
            b / a
        );
    }
    let sum = |times: &[f64]| times.iter().sum::<f64>();
    println!("all       ratio {:.3}", sum(&theirs) / sum(&ours));
    Ok(())
}

/// The texts that the rows of a file are rendered to.
fn rendered(rows: &Path, template: &ChatTemplate, tokenizer: &Tokenizer) -> Result<Vec<String>> {
    let mut texts = Vec::new();
    for (i, line) in std::fs::read_to_string(rows)?.lines().enumerate() {
        let row = check_row(line).map_err(|problem| anyhow!("line {}: {problem}", i + 1))?;
        let messages = match row {
            Row::Messages { messages, .. } => messages,
            Row::PromptCompletion { prompt, completion, .. } => {
                vec![json!({"role": "user", "content": prompt}), json!({"role": "assistant", "content": completion})]
            }
            _ => anyhow::bail!("line {}: rows are `messages`, or `prompt` and `completion`", i + 1),
        };
        let control = tokenizer.control_tokens();
        texts.extend(template.render_for_training(&messages, None, control)?.into_iter().map(|text| text.text));
    }
    Ok(texts)
}

/// The processor by its name.
fn processor() -> String {
    let about = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let name = about
        .lines()
        .find_map(|line| line.strip_prefix("model name"))
        .map(|name| name.trim_start_matches(['\t', ' ', ':']));
    name.unwrap_or(std::env::consts::ARCH).to_owned()
}
