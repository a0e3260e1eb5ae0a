//! Files that are no text: what they are, by how they begin, and what to do with them.

use std::path::Path;

use anyhow::{Result, bail};

/// How a file of a kind begins, what it is, and what to do with it.
struct Kind(&'static [u8], &'static str, &'static str);

const CSV: &str = "open it in a spreadsheet program and save the sheet as CSV in UTF-8";
const TEXT: &str = "rows are text: write the questions and answers as a table, and save that as CSV in UTF-8";
const UNPACK: &str = "unpack it, or pack it with gzip";
const MODEL: &str = "that is a model; rows are text, such as a CSV or JSONL file";

const KINDS: [Kind; 23] = [
    Kind(
        b"PAR1",
        "a Parquet file, which is not read",
        "`duckdb -c \"COPY 'FILE' TO 'rows.jsonl'\"` converts it, and so does Python: `pandas.read_parquet('FILE').to_json('rows.jsonl', orient='records', lines=True)`",
    ),
    Kind(
        b"ARROW1",
        "an Arrow file, which is not read",
        "Python converts it: `datasets.load_from_disk('FOLDER').to_json('rows.jsonl')`, of the folder that the file is in",
    ),
    Kind(b"%PDF", "a PDF file", TEXT),
    Kind(b"\xd0\xcf\x11\xe0", "a workbook or document of an old office program", CSV),
    Kind(b"{\\rtf", "a document in RTF", TEXT),
    Kind(b"BZh", "compressed by bzip2", UNPACK),
    Kind(b"\xfd7zXZ\0", "compressed by xz", UNPACK),
    Kind(b"\x28\xb5\x2f\xfd", "compressed by zstd", UNPACK),
    Kind(b"7z\xbc\xaf\x27\x1c", "a 7-Zip archive", UNPACK),
    Kind(b"Rar!", "a RAR archive", UNPACK),
    Kind(b"GGUF", "a GGUF file", MODEL),
    Kind(b"SQLite format 3\0", "an SQLite database", "export the table as CSV, with a header"),
    Kind(
        b"version https://git-lfs.github.com/spec",
        "a pointer of Git LFS and not the file itself",
        "`git lfs pull` fetches the file",
    ),
    Kind(b"\x89PNG", "an image", TEXT),
    Kind(b"\xff\xd8\xff", "an image", TEXT),
    Kind(b"GIF8", "an image", TEXT),
    Kind(
        b"<!doctype html",
        "a web page",
        "the address may lead to a page that asks for something; download the file itself",
    ),
    Kind(b"<html", "a web page", "the address may lead to a page that asks for something; download the file itself"),
    Kind(b"<?xml", "an XML file", "write the rows as CSV or JSONL"),
    Kind(b"ID3", "a sound file", TEXT),
    Kind(b"OggS", "a sound file", TEXT),
    Kind(b"\x93NUMPY", "a NumPy array", "rows are text, such as a CSV or JSONL file"),
    Kind(b"\x7fELF", "a program", "rows are text, such as a CSV or JSONL file"),
];

/// What a zip file is by a text in it.
const ZIPPED: [(&str, &str, &str); 7] = [
    ("xl/", "an Excel workbook", "open it in a spreadsheet program and save the sheet as “CSV UTF-8”"),
    ("word/", "a Word document", TEXT),
    ("ppt/", "a PowerPoint file", TEXT),
    ("opendocument.spreadsheet", "an OpenDocument spreadsheet", "save the sheet as CSV in UTF-8"),
    ("opendocument.text", "an OpenDocument text", TEXT),
    ("Index/Document.iwa", "a document of Pages, Numbers or Keynote", "export it as CSV in UTF-8"),
    ("epub", "an EPUB book", TEXT),
];

/// Whether a file that begins so is gzip.
pub(super) fn is_gzip(head: &[u8]) -> bool {
    head.starts_with(b"\x1f\x8b")
}

/// Refuses what is no text, or no text with rows.
///
/// # Errors
/// With what it is and what to do.
pub(super) fn refuse_other(name: &Path, head: &[u8]) -> Result<()> {
    let refuse = |what: &str, hint: &str| {
        let file = name.file_name().unwrap_or(name.as_os_str()).to_string_lossy();
        bail!("{}: {what}\nhint: {}", name.display(), hint.replace("FILE", &file))
    };
    let has = |part: &[u8]| head.windows(part.len()).any(|window| window == part);
    if head.starts_with(b"PK\x03\x04") {
        let of = name.extension().unwrap_or_default().to_string_lossy().to_lowercase();
        let by_name = match &*of {
            "xlsx" | "xlsm" => Some(0),
            "docx" => Some(1),
            "pptx" => Some(2),
            "ods" => Some(3),
            "odt" => Some(4),
            "numbers" | "pages" | "key" => Some(5),
            "epub" => Some(6),
            _ => None,
        };
        let found = by_name.or_else(|| ZIPPED.iter().position(|(part, ..)| has(part.as_bytes())));
        let (what, hint) = found.map_or(("a zip archive", UNPACK), |at| (ZIPPED[at].1, ZIPPED[at].2));
        return refuse(what, hint);
    }
    let trimmed = head.trim_ascii_start();
    let begins = |start: &[u8]| trimmed.get(..start.len()).is_some_and(|begin| begin.eq_ignore_ascii_case(start));
    if let Some(Kind(_, what, hint)) = KINDS.iter().find(|Kind(start, ..)| begins(start)) {
        return refuse(what, hint);
    }
    if head.get(257..262) == Some(b"ustar") {
        return refuse("a tar archive", UNPACK);
    }
    // Files of safetensors begin with the length of a JSON object.
    if head.get(8) == Some(&b'{') && has(b"\"dtype\"") && head.contains(&0) {
        return refuse("a file of tensors", MODEL);
    }
    // No text in UTF-8 has such bytes on its first line, and UTF-16 has them everywhere.
    let line = head.split(|byte| *byte == b'\n').next().unwrap_or_default();
    let of_utf16 = head.len() > 3 && head.chunks_exact(2).take(32).all(|pair| (pair[0] == 0) != (pair[1] == 0));
    if of_utf16 {
        return refuse("text in UTF-16 without a byte-order mark", "save it as UTF-8");
    }
    if line.contains(&0) {
        return refuse("not text in UTF-8", "rows are text: JSONL, JSON, CSV or TSV, which may be packed with gzip");
    }
    Ok(())
}
