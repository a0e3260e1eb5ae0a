use std::cell::RefCell;
use std::process::{Command, Stdio};
use std::time::Duration;

use homeroom_abi::plan::ModuleKind;

use super::*;
use crate::adapt::requantize::{StoredAs, store_as};
use crate::models::Module;

thread_local!(static TOLD: RefCell<Vec<String>> = const { RefCell::new(Vec::new()) });

fn tell(text: &str) {
    TOLD.with_borrow_mut(|told| told.push(text.to_owned()));
}

/// What was told since this was asked last.
fn told() -> String {
    TOLD.take().join("\n")
}

/// A copy of a small base and a place for encodings of it.
struct Place(tempfile::TempDir);

impl Place {
    fn new() -> Result<Self> {
        let place = Self(tempfile::tempdir()?);
        place.copy("base")?;
        Ok(place)
    }

    fn at(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// The base once more, as if it were old.
    fn copy(&self, name: &str) -> Result<()> {
        let from = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures/models/llama");
        fs::create_dir(self.at(name))?;
        for entry in fs::read_dir(from)? {
            let entry = entry?;
            fs::copy(entry.path(), self.at(name).join(entry.file_name()))?;
        }
        age(&self.at(name).join("model.safetensors"), 3600)
    }

    fn kept(&self) -> EncodedBases {
        EncodedBases::new(self.at("encoded"), Some(self.at("digests.json")), tell).of_any_size()
    }

    fn files(&self) -> Vec<PathBuf> {
        let entries = fs::read_dir(self.at("encoded")).into_iter().flatten().flatten();
        let mut files: Vec<PathBuf> = entries.map(|entry| entry.path()).collect();
        files.sort();
        files
    }

    /// Loads a base and stores it by a codec: the base, and whether anything was encoded.
    fn load(&self, name: &str, codec: &Codec) -> Result<(BaseModel, bool)> {
        load(&self.at(name), codec, Some(&self.kept()))
    }
}

fn load(path: &Path, codec: &Codec, kept: Option<&EncodedBases>) -> Result<(BaseModel, bool)> {
    let mut encoded = false;
    let model = store_as(&BaseModel::load(path)?, &StoredAs::Codec(codec.clone()), kept, |_, _| encoded = true)?;
    Ok((model, encoded))
}

/// Says of a file that it was written so many seconds ago.
fn age(path: &Path, seconds: u64) -> Result<()> {
    let time = SystemTime::now() - Duration::from_secs(seconds);
    Ok(File::options().write(true).open(path)?.set_modified(time)?)
}

/// NF4, the same without double quantisation, integers by rows, and odd blocks of a short code book with a tail.
fn codecs() -> [Codec; 4] {
    let nf4 = Codec::nf4();
    let plain = Codec { scales: ScaleStorage::F32, ..nf4.clone() };
    let ScaleStorage::Nested { code: nested, .. } = &nf4.scales else { panic!("NF4 nests its scales") };
    let odd = Codec {
        name: "odd".to_owned(),
        bits: 4,
        block: CodecBlock::Flat(37),
        code: vec![-1.0, -0.2, 0.1, 0.5, 1.0],
        scales: ScaleStorage::Nested { block: 3, code: nested.clone() },
    };
    [nf4, plain, Codec::int8(), odd]
}

/// All that is stored of a model's weights, bit by bit.
fn bits(model: &BaseModel) -> Vec<(String, Vec<u8>, Vec<u32>)> {
    let of = |module: &crate::models::Module| {
        let weight = &module.weight;
        let (own, floats) = match weight.encoding() {
            None => (Vec::new(), weight.decode(0..weight.rows())),
            Some((_, codes, Scales::F32(scales))) => (codes.to_vec(), scales.to_vec()),
            Some((_, codes, Scales::Nested { codes: nested, absmax, offset })) => {
                ([codes, nested].concat(), [absmax, &[offset]].concat())
            }
        };
        let mut floats: Vec<u32> = floats.iter().map(|value| value.to_bits()).collect();
        floats.extend(weight.decode(0..weight.rows()).iter().map(|value| value.to_bits()));
        (weight.storage_name(), own, floats)
    };
    model.modules.iter().map(of).collect()
}

#[test]
fn what_was_encoded_is_mapped_the_next_time_with_the_same_bits() -> Result<()> {
    let place = Place::new()?;
    for (number, codec) in codecs().iter().enumerate() {
        let fresh = load(&place.at("base"), codec, None)?.0;
        let (first, encoded) = place.load("base", codec)?;
        assert!(encoded, "{}", codec.name);
        let line = told();
        assert!(line.starts_with("note: encoded base kept for the next time, 0.0 GB, in "), "{line}");
        let (mut second, encoded) = place.load("base", codec)?;
        assert!(!encoded && told().is_empty(), "{}", codec.name);
        assert_eq!(place.files().len(), number + 1, "each codec has its own");
        for model in [&first, &second] {
            assert!(bits(model) == bits(&fresh), "{}", codec.name);
            assert_eq!(model.digest(), fresh.digest());
            // Norms are copied, so that they keep nothing around them in memory.
            let in_files =
                |module: &Module| module.weight.mapped_bytes().is_some() || module.info.kind == ModuleKind::Norm;
            assert!(model.modules.iter().all(in_files), "{}: all matrices lie in files", codec.name);
            // Pages that are given back are read again.
            model.release();
            assert!(bits(model) == bits(&fresh), "{}", codec.name);
        }
        // Nor does it matter where they are answered from.
        if second.make_resident() {
            assert!(second.modules.iter().all(|module| module.weight.mapped_bytes().is_none()), "{}", codec.name);
        }
        assert!(bits(&second) == bits(&fresh), "{}", codec.name);
    }
    Ok(())
}

#[test]
#[cfg(unix)]
fn a_file_is_its_owners_alone() -> Result<()> {
    use std::os::unix::fs::PermissionsExt;
    let place = Place::new()?;
    place.load("base", &Codec::nf4())?;
    let [file] = &place.files()[..] else { panic!("{:?}", place.files()) };
    let mode = |path: &Path| Ok::<_, std::io::Error>(fs::metadata(path)?.permissions().mode() & 0o777);
    assert_eq!(mode(file)?, 0o600);
    // One that others could have written is not believed.
    fs::set_permissions(file, fs::Permissions::from_mode(0o622))?;
    assert!(place.load("base", &Codec::nf4())?.1 && told().contains("not a file of this user alone"));
    assert!(mode(file)? == 0o600 && !place.load("base", &Codec::nf4())?.1);
    Ok(())
}

/// Whatever becomes of the file: it is seen, the base is encoded anew, and what is kept then is believed again.
#[test]
fn a_file_that_was_cut_or_changed_or_is_another_is_made_anew() -> Result<()> {
    let place = Place::new()?;
    let [codec, _, other, _] = codecs();
    let fresh = bits(&load(&place.at("base"), &codec, None)?.0);
    place.load("base", &other)?;
    let foreign = place.files();
    place.load("base", &codec)?;
    let file = place.files().into_iter().find(|file| !foreign.contains(file)).context("a second file")?;
    let whole = fs::read(&file)?;
    let header_at = |bytes: &[u8]| 16..16 + u64::from_le_bytes(bytes[8..16].try_into().expect("eight")) as usize;
    // As `seal` writes it: a header that was changed by one who knows how.
    let resealed = |change: &dyn Fn(&str) -> String| {
        let text = String::from_utf8(whole[header_at(&whole)].to_vec()).expect("a header is text");
        let text = change(&text).into_bytes();
        let start = [&b"homeroom"[..], &(text.len() as u64).to_le_bytes(), &text, &Sha256::digest(&text)].concat();
        [&start[..], &whole[start.len()..]].concat()
    };
    let at = header_at(&whole);
    let flipped = |place: usize| {
        let mut bytes = whole.clone();
        bytes[place] ^= 1;
        bytes
    };
    let key = file.file_stem().and_then(|stem| stem.to_str()).context("a name")?;
    let cases: [(&str, Vec<u8>, &str); 12] = [
        ("cut", whole[..whole.len() - 1].to_vec(), "bytes and should have"),
        ("cut in the header", whole[..20].to_vec(), "bytes and should have"),
        ("empty", Vec::new(), "bytes and should have"),
        ("longer", [&whole[..], &[0]].concat(), "bytes and should have"),
        ("of another kind", flipped(0), "it is no encoded base"),
        ("with an endless header", flipped(15), "it is no encoded base"),
        ("with a header that is damaged", flipped(at.start + 3), "its header is damaged"),
        ("with a digest that is damaged", flipped(at.end), "its header is damaged"),
        ("of another version", resealed(&|text| text.replacen('{', "{\"newer\":1,", 1)), "of another version"),
        (
            "of another codec",
            resealed(&|text| text.replace(key, &key.replace(['0', '1'], "2"))),
            "it is of something else",
        ),
        (
            "of another length",
            resealed(&|text| text.replace("\"bytes\":", "\"bytes\":1")),
            "its header is of another file",
        ),
        ("written since", flipped(whole.len() - 5000), "it was written since it was made"),
    ];
    let made: Header = serde_json::from_slice(&whole[at.clone()])?;
    let time = SystemTime::UNIX_EPOCH + Duration::from_secs(made.made);
    for (what, bytes, why) in cases {
        fs::write(&file, bytes)?;
        if why != "it was written since it was made" {
            File::options().write(true).open(&file)?.set_modified(time)?;
        }
        told();
        let (model, encoded) = place.load("base", &codec)?;
        let line = told();
        assert!(encoded && line.contains("made anew") && line.contains(why), "{what}: {line}");
        assert!(bits(&model) == fresh, "{what}");
        let (model, encoded) = place.load("base", &codec)?;
        assert!(!encoded && told().is_empty() && bits(&model) == fresh, "{what}");
    }
    // Values that are not those of the base, by one who knows how to hide it: some rows of each weight are compared.
    let mut bytes = fs::read(&file)?;
    let made: Header = serde_json::from_slice(&bytes[header_at(&bytes)])?;
    bytes[(2 << 20)..].iter_mut().for_each(|byte| *byte ^= 1);
    fs::write(&file, bytes)?;
    File::options().write(true).open(&file)?.set_modified(SystemTime::UNIX_EPOCH + Duration::from_secs(made.made))?;
    let (model, encoded) = place.load("base", &codec)?;
    assert!(encoded && told().contains("it holds other values") && bits(&model) == fresh);
    // The file of another codec under this one's name is of another length, and one that is no file is not read.
    fs::copy(&foreign[0], &file)?;
    assert!(place.load("base", &codec)?.1);
    fs::remove_file(&file)?;
    fs::create_dir(&file)?;
    let (model, encoded) = place.load("base", &codec)?;
    assert!(encoded && told().contains("warning: the encoded base is not kept") && bits(&model) == fresh);
    Ok(())
}

/// Of a row that the digest of a base does not look at, and with the time that the file had before.
#[test]
fn a_base_that_changed_is_encoded_anew() -> Result<()> {
    let (place, codec) = (Place::new()?, Codec::int8());
    let file = place.at("base/model.safetensors");
    let before = place.load("base", &codec)?.0;
    let (digest, before) = (before.digest(), bits(&before));
    let time = fs::metadata(&file)?.modified()?;
    let mut bytes = fs::read(&file)?;
    // The last rows of the last tensor: every sixteenth at most is looked at.
    let last = bytes.len() - 6;
    bytes[last] ^= 0x41;
    // In place, so that the file stays the same one.
    fs::write(&file, bytes)?;
    File::options().write(true).open(&file)?.set_modified(time)?;
    let fresh = load(&place.at("base"), &codec, None)?.0;
    told();
    let (model, encoded) = place.load("base", &codec)?;
    assert!(encoded && bits(&model) == bits(&fresh) && bits(&model) != before);
    if model.digest() == digest {
        assert!(told().contains("the files of the base were written since"));
    }
    Ok(())
}

#[test]
fn what_was_written_just_now_is_not_kept() -> Result<()> {
    let (place, codec) = (Place::new()?, Codec::nf4());
    age(&place.at("base/model.safetensors"), 0)?;
    assert!(place.load("base", &codec)?.1 && place.load("base", &codec)?.1 && place.files().is_empty());
    Ok(())
}

/// Where the digests of both are known. Without them a copy is another base, of which the file is made anew.
#[test]
fn a_copy_of_a_base_has_its_encoding_if_the_digests_are_known_to_be_the_same() -> Result<()> {
    let (place, codec) = (Place::new()?, Codec::nf4());
    place.copy("copy")?;
    let files = ["base", "copy"].map(|name| place.at(name).join("model.safetensors"));
    assert!(place.load("base", &codec)?.1);
    digest::of_files(&files[..1], Some(&place.at("digests.json")))?;
    assert!(place.load("copy", &codec)?.1, "of one the digest is not known");
    assert!(place.load("base", &codec)?.1);
    digest::of_files(&files[1..], Some(&place.at("digests.json")))?;
    assert!(!place.load("copy", &codec)?.1 && !place.load("base", &codec)?.1);
    assert_eq!(place.files().len(), 1);
    Ok(())
}

#[test]
fn a_place_that_cannot_be_written_or_is_full_is_said_and_nothing_else() -> Result<()> {
    let (place, codec) = (Place::new()?, Codec::nf4());
    let full = EncodedBases { spare: u64::MAX, ..place.kept() };
    let (model, encoded) = load(&place.at("base"), &codec, Some(&full))?;
    let line = told();
    if free_bytes(&place.at("base")).is_some() {
        assert!(line.contains("is not kept for the next time") && line.contains("GB are free"), "{line}");
    }
    assert!(encoded && place.files().is_empty(), "{:?}", place.files());
    let fresh = bits(&load(&place.at("base"), &codec, None)?.0);
    assert!(bits(&model) == fresh);
    fs::remove_dir_all(place.at("encoded"))?;
    fs::write(place.at("encoded"), "a file")?;
    let (model, encoded) = place.load("base", &codec)?;
    assert!(encoded && bits(&model) == fresh && told().contains("is not kept for the next time"));
    Ok(())
}

#[test]
fn a_small_base_is_encoded_each_time() -> Result<()> {
    let place = Place::new()?;
    let kept = EncodedBases::new(place.at("encoded"), None, tell);
    for _ in 0..2 {
        assert!(load(&place.at("base"), &Codec::nf4(), Some(&kept))?.1);
    }
    assert!(told().is_empty() && place.files().is_empty());
    Ok(())
}

#[test]
fn the_files_that_were_used_last_stay() -> Result<()> {
    let place = Place::new()?;
    let mut codecs = codecs().to_vec();
    for len in [32, 48] {
        codecs.push(Codec { block: CodecBlock::Flat(len), ..Codec::nf4() });
    }
    for (number, codec) in codecs[..4].iter().enumerate() {
        let before = place.files();
        place.load("base", codec)?;
        let file = place.files().into_iter().find(|file| !before.contains(file)).context("a new file")?;
        let used = SystemTime::now() - Duration::from_secs(1000 - 10 * number as u64);
        File::options().write(true).open(file)?.set_times(FileTimes::new().set_accessed(used))?;
    }
    // The oldest is used again, so that the two after it go.
    assert!(!place.load("base", &codecs[0])?.1);
    told();
    place.load("base", &codecs[4])?;
    place.load("base", &codecs[5])?;
    assert_eq!((place.files().len(), told().matches("that was long not used is removed").count()), (FILES_MAX, 2));
    for number in [0, 3, 4, 5] {
        assert!(!place.load("base", &codecs[number])?.1, "{number}");
    }
    Ok(())
}

/// The name of the variable that says to a child of a test where it is to work.
const PLACE: &str = "HOMEROOM_TEST_PLACE";

fn child(name: &str, place: &Place) -> Result<Command> {
    let mut command = Command::new(std::env::current_exe()?);
    command.args([&format!("adapt::encoded::tests::{name}"), "--exact", "--ignored"]).stdout(Stdio::null());
    command.stderr(Stdio::null()).env(PLACE, place.0.path());
    Ok(command)
}

fn in_child() -> PathBuf {
    PathBuf::from(std::env::var_os(PLACE).expect("a test starts this one"))
}

#[test]
#[ignore = "another test starts it"]
fn dies_before_the_file_has_its_name() {
    let place = in_child();
    let run = || -> Result<()> {
        let (model, codec) = (BaseModel::load(&place.join("base"))?, Codec::nf4());
        let linear = &model.modules[model.layers[0].down].weight;
        let wanted = [(&**linear, &codec)];
        let places = Places::new(wanted.iter().map(|(weight, codec)| (*codec, weight.rows(), weight.cols())));
        let kept = EncodedBases::new(place.join("encoded"), None, tell).of_any_size();
        let header = places.header("key".to_owned(), Vec::new());
        let writer = kept.begin(&Kept { path: place.join("encoded/key.encoded"), header }, &places)?;
        writer.parts.send((0, linear.encoded(&codec)?))?;
        let _file = writer.end()?;
        std::process::abort()
    };
    panic!("{:?}", run());
}

#[test]
fn what_a_killed_process_wrote_is_removed_and_made_again() -> Result<()> {
    let place = Place::new()?;
    assert!(!child("dies_before_the_file_has_its_name", &place)?.status()?.success());
    let litter = place.files();
    assert!(litter.len() == 1 && litter[0].extension().is_none(), "{litter:?}");
    assert!(fs::metadata(&litter[0])?.len() > 1 << 21, "all of it was written");
    assert!(place.load("base", &Codec::nf4())?.1);
    let files = place.files();
    assert!(files.len() == 1 && files != litter, "{files:?}");
    assert!(!place.load("base", &Codec::nf4())?.1);
    // One that is being written is left alone.
    let part = ClaimedFile::new(&place.at("encoded"))?;
    assert!(place.load("base", &Codec::int8())?.1 && part.file().metadata()?.is_file());
    assert_eq!(place.files().len(), 3);
    Ok(())
}

#[test]
#[ignore = "another test starts it"]
fn loads_in_a_process() {
    let place = in_child();
    let kept = EncodedBases::new(place.join("encoded"), None, tell).of_any_size();
    for codec in [Codec::nf4(), Codec::int8()] {
        let fresh = load(&place.join("base"), &codec, None).expect("it can be loaded").0;
        for _ in 0..3 {
            let model = load(&place.join("base"), &codec, Some(&kept)).expect("it can be loaded").0;
            assert!(bits(&model) == bits(&fresh), "{}", codec.name);
        }
    }
}

#[test]
fn processes_and_threads_at_once_get_the_same_values_and_leave_one_file_each() -> Result<()> {
    let place = Place::new()?;
    let children = (0..4).map(|_| Ok(child("loads_in_a_process", &place)?.spawn()?)).collect::<Result<Vec<_>>>()?;
    let fresh = bits(&load(&place.at("base"), &Codec::nf4(), None)?.0);
    thread::scope(|scope| {
        for _ in 0..3 {
            scope.spawn(|| {
                let model = place.load("base", &Codec::nf4()).expect("it can be loaded").0;
                assert!(bits(&model) == fresh);
            });
        }
    });
    for mut child in children {
        ensure!(child.wait()?.success());
    }
    let files = place.files();
    assert!(files.len() == 2 && files.iter().all(|file| file.extension().is_some()), "{files:?}");
    assert!(!place.load("base", &Codec::nf4())?.1 && !place.load("base", &Codec::int8())?.1);
    Ok(())
}
