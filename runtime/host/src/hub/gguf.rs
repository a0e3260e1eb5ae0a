//! A repository's GGUF files, and which of them a quantization means.

use std::collections::BTreeSet;

use homeroom_engine::files::gguf::ShardName;

/// The GGUF files among a repository's paths that are models. A projector for images (`mmproj`) and an importance matrix are none.
pub fn models<'a>(paths: impl IntoIterator<Item = &'a str>) -> Vec<&'a str> {
    let is_model = |path: &&str| {
        let name = file_name(path).to_ascii_lowercase();
        name.ends_with(".gguf") && !name.starts_with("mmproj") && !name.contains("imatrix")
    };
    paths.into_iter().filter(is_model).collect()
}

/// The models of which all files are among these: each that is one file, and of one in several files the first.
pub fn whole<'a>(paths: &[&'a str]) -> Vec<&'a str> {
    let is_whole = |path: &&&str| match ShardName::of(path) {
        Some(shard) => shard.number == 1 && files_of(path, paths).len() == shard.count,
        None => true,
    };
    paths.iter().filter(is_whole).copied().collect()
}

/// Those among some files that are of one model with this one, in order: it alone, unless it is one of several.
pub fn files_of<'a>(path: &'a str, paths: &[&'a str]) -> Vec<&'a str> {
    let Some(shard) = ShardName::of(path) else { return vec![path] };
    let is_beside = |other: &&str| ShardName::of(other).is_some_and(|other| other.is_beside(&shard));
    let mut files: Vec<&str> = paths.iter().copied().filter(is_beside).collect();
    files.sort_unstable();
    files.dedup_by_key(|path| ShardName::of(path).map(|shard| shard.number));
    files
}

/// The files that a quantization means: those whose names end in it. One that has no other name is meant alone, and so is one whose whole
/// name is said, `.gguf` and all.
pub fn matching<'a>(paths: &[&'a str], quantization: &str) -> Vec<&'a str> {
    let wanted = whole_stem(quantization).to_ascii_lowercase();
    let whole = |path: &&&str| whole_stem(path).to_ascii_lowercase() == wanted;
    let exact: Vec<&str> = paths.iter().filter(whole).copied().collect();
    if !exact.is_empty() {
        return exact;
    }
    let ends = |path: &&&str| {
        let stem = whole_stem(path).to_ascii_lowercase();
        stem.strip_suffix(&wanted).is_some_and(|before| before.ends_with(['-', '.', '_']))
    };
    paths.iter().filter(ends).copied().collect()
}

/// The quantizations that files are of, as their names end: `Q4_K_M`.
pub fn quantizations<'a>(paths: impl IntoIterator<Item = &'a str>) -> BTreeSet<String> {
    paths.into_iter().map(|path| quantization(path).to_owned()).collect()
}

/// What a file's name ends in, behind its last dash or dot.
pub fn quantization(path: &str) -> &str {
    let stem = whole_stem(path);
    stem.rsplit(['-', '.']).next().unwrap_or(stem)
}

/// A file's name without its ending, and without its number where it is one of several.
pub fn whole_stem(path: &str) -> &str {
    ShardName::of(path).map_or_else(|| stem(path), |shard| file_name(shard.before))
}

fn stem(path: &str) -> &str {
    let name = file_name(path);
    let at = name.len().saturating_sub(".gguf".len());
    name.get(at..).filter(|ending| ending.eq_ignore_ascii_case(".gguf")).map_or(name, |_| &name[..at])
}

fn file_name(path: &str) -> &str {
    path.rsplit('/').next().unwrap_or(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_quantization_means_the_files_whose_names_end_in_it() {
        let paths = [
            "m-Q4_K_M.gguf",
            "m-UD-Q4_K_M.gguf",
            "m.q8_0.gguf",
            "F16.gguf",
            "m-f16.gguf",
            "m-IQ4_XS.GGUF",
            "Q2_K/m-Q2_K-00001-of-00002.gguf",
            "Q2_K/m-Q2_K-00002-of-00002.gguf",
            "mmproj-m-Q8_0.gguf",
            "m-Q4_K_M.gguf.txt",
        ];
        let models = models(paths);
        for (quantization, files) in [
            ("UD-Q4_K_M", vec!["m-UD-Q4_K_M.gguf"]),
            ("Q4_K_M", vec!["m-Q4_K_M.gguf", "m-UD-Q4_K_M.gguf"]),
            ("m-q4_k_m", vec!["m-Q4_K_M.gguf"]),
            ("m-Q4_K_M.gguf", vec!["m-Q4_K_M.gguf"]),
            ("m.q8_0.GGUF", vec!["m.q8_0.gguf"]),
            ("Q8_0", vec!["m.q8_0.gguf"]),
            ("f16", vec!["F16.gguf"]),
            ("iq4_xs", vec!["m-IQ4_XS.GGUF"]),
            ("q2_k", vec!["Q2_K/m-Q2_K-00001-of-00002.gguf", "Q2_K/m-Q2_K-00002-of-00002.gguf"]),
            ("4_XS", vec![]),
            ("Q3_K", vec![]),
        ] {
            assert_eq!(matching(&models, quantization), files, "{quantization}");
        }
        let all: Vec<String> = quantizations(models.iter().copied()).into_iter().collect();
        assert_eq!(all, ["F16", "IQ4_XS", "Q2_K", "Q4_K_M", "f16", "q8_0"]);
    }

    #[test]
    fn a_model_in_several_files_is_one_when_all_of_them_are_there() {
        let all = ["a/m-00001-of-00002.gguf", "a/m-00002-of-00002.gguf"];
        let others = ["b/m-00001-of-00002.gguf", "a/m-00001-of-00003.gguf", "n.gguf"];
        let paths = [&others[..], &all[..]].concat();
        assert_eq!(whole(&paths), ["n.gguf", all[0]]);
        assert_eq!(files_of(all[1], &paths), all);
        assert_eq!(files_of("n.gguf", &paths), ["n.gguf"]);
        assert_eq!(whole(&["m-00001-of-00002.gguf", "m-00001-of-00002.GGUF"]), [""; 0]);
    }
}
