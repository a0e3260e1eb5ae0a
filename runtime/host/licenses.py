"""Writes licenses.txt, the notice of third-party licences that `homeroom licenses` prints.

It names each crate that is linked into the program or into a strategy that ships beside it: the normal dependencies of the workspace's
default members on each of TARGETS, by `cargo metadata`. A crate that is only in the program for some systems stands there, too. C and C++
that a build script compiles is linked as well: NATIVE says in which package it lies. Build scripts, macros and what only tests use are not,
but for what the program holds as source, which `plugins new` writes: all that the SDK needs.

Of a choice of licences one is taken, MIT where it can be. Files of the licences that were not taken are left out; all others stay, those of
code that a crate took from elsewhere and NOTICE files among them. Equal texts are printed once, with what stands above each, the
copyright, at its crate. A crate without a file gets the text that most others have, and its authors.

The same Cargo.lock gives the same bytes. It ends with 1 where a licence is not permissive, or a file or text is missing.

Run: python3 runtime/host/licenses.py [--check]      (Python's standard library, cargo; `cargo fetch --locked` beforehand)
"""

import argparse
import json
import os
import re
import subprocess
import sys
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
NOTICE = HERE / "licenses.txt"
TARGETS = {
    "x86_64-unknown-linux-gnu": "Linux",
    "aarch64-unknown-linux-gnu": "Linux",
    "x86_64-apple-darwin": "macOS",
    "aarch64-apple-darwin": "macOS",
    "x86_64-pc-windows-msvc": "Windows",
}
# Permissive licences, those that are taken first in front.
PERMISSIVE = [
    "MIT", "MIT-0", "ISC", "BSD-2-Clause", "BSD-3-Clause", "Zlib", "Apache-2.0", "Apache-2.0 WITH LLVM-exception", "BSL-1.0",
    "Unicode-3.0", "0BSD", "CC0-1.0", "Unlicense", "CDLA-Permissive-2.0",
]
# Crates whose licence is not permissive, and why they may be linked all the same.
EXCEPTIONS = {
    "option-ext": ("MPL-2.0", "binds changes to its own files, and there are none; the notice says where its source is"),
}
# Crates whose build script compiles or names native code, and the build dependencies that hold the sources. The crate's own directory is
# always looked through.
NATIVE = {
    "libmimalloc-sys": [],
    "mlua-sys": ["luau0-src"],
    "ring": [],
    # Only a name, so that it is linked once.
    "rayon-core": [],
}
COMPILERS = {"cc", "cmake"}
SDK = "homeroom-sdk"
# What rustc links into every program. Source: share/doc/rust/COPYRIGHT-library.html of Rust 1.95.
STANDARD_LIBRARY = """
Copyright The Rust Project Developers (see https://thanks.rust-lang.org)
Copyright (c) 1991-2024 Unicode, Inc. (unicode_data.rs)
Copyright (c) 2014 Alex Crichton (backtrace, cfg-if, rustc-demangle)
Copyright (c) 2014-2020 The Rust Project Developers (libc)
Copyright (c) 2015 The Gimli Developers (object)
Copyright (c) 2015 The Rust Project Developers (gimli)
Copyright (c) 2016 Amanieu d'Antras (hashbrown)
Copyright (c) 2016-2018 The gimli Developers (addr2line)
Copyright (c) 2017 Frommi, 2017-2024 oyvindln (miniz_oxide)
Copyright (c) 2019 The Crossbeam Project Developers (mpmc)
Copyright (c) 2024 Orson Peters (foldhash)
Copyright (c) Jonas Schievink (adler2)
"""
# How each licence's text begins, as words; whether what stands before it is the copyright and no part of it.
KINDS = {
    "Unicode-3.0": ("unicode license v3", False),
    "BSL-1.0": ("permission is hereby granted free of charge to any person or organization obtaining", True),
    "MIT": ("permission is hereby granted free of charge to any person obtaining a copy of this software", True),
    "Apache-2.0": ("apache license version 2 0 january 2004", False),
    "BSD-3-Clause": ("redistribution and use in source and binary forms", True),
    "ISC": ("permission to use copy modify and or distribute this software", True),
    "Zlib": ("this software is provided as is without any express or implied warranty", True),
    "Unlicense": ("this is free and unencumbered software", False),
    "CC0-1.0": ("cc0 1 0 universal", False),
    "MPL-2.0": ("mozilla public license version 2 0", False),
    "CDLA-Permissive-2.0": ("community data license agreement permissive version 2 0", False),
}
FILE = re.compile(r"(un)?licen[sc]e|copying|copyright|notice|authors|patents|third.?party", re.I)
# Most lines above the terms that are taken for the copyright; with more, a file is printed as it is.
ABOVE_MAX = 6
NO_TEXT = {".rs", ".c", ".cc", ".cpp", ".h", ".py", ".sh", ".toml", ".json", ".yml", ".yaml", ".tmpl"}
NOT_LINKED = {"tests", "test", "benches", "examples", ".github"}
TITLE = re.compile(r"(the )?(mit|isc|zlib|bsd|boost software|2-clause bsd|3-clause bsd)?[ -]*licen[sc]e[^a-z]*(\((mit|isc)\))?\W*", re.I)
RULER = re.compile(r"[-=*_#]{3,}")


# --- crates that are linked -------------------------------------------------------------------


def cargo_metadata(target: str) -> dict:
    command = [os.environ.get("CARGO", "cargo"), "metadata", "--offline", "--locked", "--format-version=1", f"--filter-platform={target}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"error: cargo metadata for {target}: {done.stderr.strip()}\nhint: `cargo fetch --locked` downloads what is missing")
    return json.loads(done.stdout)


def needs(metadata: dict, *kinds: str | None) -> dict[str, list[str]]:
    """What each package needs as a dependency of these kinds; None is the normal one."""

    def of(node: dict) -> list[str]:
        return [need["pkg"] for need in node["deps"] if any(one["kind"] in kinds for one in need["dep_kinds"])]

    return {node["id"]: of(node) for node in metadata["resolve"]["nodes"]}


def held_as_source(metadata: dict) -> list[dict]:
    """Packages that the SDK needs, macros and what builds them included, none of the workspace's own."""
    packages = {package["id"]: package for package in metadata["packages"]}
    edges = needs(metadata, None, "build")
    seen, todo = set(), [node for node, package in packages.items() if package["name"] == SDK]
    while todo:
        node = todo.pop()
        if node not in seen:
            seen.add(node)
            todo += edges[node]
    return [packages[node] for node in seen if packages[node]["source"]]


def linked(metadata: dict, problems: set[str]) -> list[dict]:
    """Packages that the default members link, none of the workspace's own; holders of native sources among them."""
    packages = {package["id"]: package for package in metadata["packages"]}
    normal, build = needs(metadata, None), needs(metadata, "build")
    seen, todo = set(), list(metadata["workspace_default_members"])
    while todo:
        node = todo.pop()
        package = packages[node]
        if node in seen or any("proc-macro" in target["kind"] for target in package["targets"]):
            continue
        seen.add(node)
        todo += normal[node]
        built_from = {packages[need]["name"]: need for need in build[node]}
        if package["name"] in NATIVE:
            for source in NATIVE[package["name"]]:
                if source in built_from:
                    seen.add(built_from[source])
                else:
                    problems.add(f"{package['name']}: does not build {source}; NATIVE in {Path(__file__).name} says it does")
        elif package["links"] or COMPILERS & set(built_from):
            problems.add(f"{package['name']}: links native code; add it to NATIVE in {Path(__file__).name}, with where its sources are")
    return [packages[node] for node in seen if packages[node]["source"]]


# --- licence expressions ----------------------------------------------------------------------


def alternatives(expression: str) -> list[frozenset[str]]:
    """The sets of licences that an SPDX expression lets one choose from. Old manifests write `/` for OR."""
    tokens = re.findall(r"[()]|[^\s()]+", expression.replace("/", " OR "))

    def either() -> list[frozenset[str]]:
        out = both()
        while tokens and tokens[0] == "OR":
            tokens.pop(0)
            out += both()
        return out

    def both() -> list[frozenset[str]]:
        out = one()
        while tokens and tokens[0] == "AND":
            tokens.pop(0)
            right = one()
            out = [a | b for a in out for b in right]
        return out

    def one() -> list[frozenset[str]]:
        token = tokens.pop(0)
        if token == "(":
            out = either()
            tokens.pop(0)
            return out
        if tokens and tokens[0] == "WITH":
            tokens.pop(0)
            token += f" WITH {tokens.pop(0)}"
        return [frozenset([token])]

    return either()


# --- licence files ----------------------------------------------------------------------------


def words(text: str) -> str:
    return " ".join(re.findall(r"[^\W_]+", text.lower()))


@dataclass
class Text:
    """One licence file: which licence it is, what stands above the terms, and the terms."""

    file: str
    kind: str | None
    above: list[str]
    terms: str


def lines_of(text: str) -> list[str]:
    lines = (line.strip() for line in text.splitlines())
    return [line for line in lines if line and not TITLE.fullmatch(line) and not RULER.fullmatch(line)]


def read(path: Path, file: str) -> Text:
    text = path.read_text(encoding="utf-8", errors="replace")
    lines = [line.rstrip() for line in text.expandtabs().replace("\f", "\n").lstrip("\ufeff").splitlines()]
    if all(line.startswith("//") for line in lines):
        lines = [line.removeprefix("//").removeprefix(" ") for line in lines]
    text = "\n".join(lines).strip("\n")
    found = []
    for kind, (begins, is_below) in KINDS.items():
        pattern = r"\b" + r"[\W_]+".join(begins.split()).replace(r"and[\W_]+or", r"and(?:[\W_]+or)?")
        starts = [start.start() for start in re.finditer(pattern, text, re.I)]
        # Some name themselves again and again.
        found += [(kind, start) for start in starts] if is_below else [(kind, 0)] * bool(starts)
    if len(found) != 1:
        # None that is known, or several in one.
        return Text(file, None, [], text)
    [(kind, start)] = found
    above, terms = lines_of(text[:start]), text[start:]
    if len(above) > ABOVE_MAX:
        return Text(file, None, [], text)
    if kind == "MIT" and "the above copyright notice" not in words(terms):
        kind = "MIT-0"
    if kind == "BSD-3-Clause" and "neither the name" not in words(terms):
        kind = "BSD-2-Clause"
    if kind == "Apache-2.0":
        above, terms = without_appendix(terms)
    return Text(file, kind, above, terms)


def without_appendix(text: str) -> tuple[list[str], str]:
    """Apache's terms, and the copyright that somebody wrote into the model that follows them."""
    terms, end, rest = text.partition("END OF TERMS AND CONDITIONS")
    if rest.strip() and not words(rest).startswith("appendix how to apply"):
        return [], text
    holders = [line.strip() for line in rest.splitlines() if re.match(r"\s*Copyright\b(?!.*(\[yyyy\]|\{yyyy\}))", line)]
    return holders, terms + end


def texts_of(package: dict, problems: set[str]) -> list[Text]:
    """The licence files of a package, those of code that it took from elsewhere included."""
    place = Path(package["manifest_path"]).parent
    found = set()
    for folder, folders, files in os.walk(place):
        folders[:] = [name for name in folders if name not in NOT_LINKED]
        found |= {Path(folder, name) for name in files if FILE.search(name) and Path(name).suffix not in NO_TEXT}
    if package["license_file"]:
        found.add(place / package["license_file"])
    out = []
    for path in sorted(found):
        try:
            out.append(read(path, path.relative_to(place).as_posix()))
        except OSError as error:
            problems.add(f"{package['name']} {package['version']}: cannot read {path}: {error.strerror}")
    return out


# --- the notice -------------------------------------------------------------------------------


@dataclass
class Entry:
    name: str
    expression: str
    taken: frozenset[str]
    above: list[str]
    # Keys of its texts.
    keys: list[tuple[str, str]] = field(default_factory=list)
    # Licences that it has no file of.
    missing: list[str] = field(default_factory=list)
    # Systems whose program has it linked; none: it is there as source only.
    systems: set[str] = field(default_factory=lambda: {"Linux"})

    def lines(self, labels: dict[tuple[str, str], str]) -> list[str]:
        taken = " AND ".join(sorted(self.taken))
        out = [self.name, f"    {self.expression}" + (f", here under {taken}" if taken != self.expression else "")]
        if not self.systems:
            out.append("    only as source, which `homeroom plugins new` writes")
        elif "Linux" not in self.systems:
            out.append(f"    only in a program for {' or '.join(sorted(self.systems))}")
        out += [f"    {line}" for line in self.above]
        return [*out, f"    texts: {'; '.join(dict.fromkeys(labels[key] for key in self.keys))}"]


def entry(package: dict, systems: set[str], printed: dict, problems: set[str]) -> Entry | None:
    name = f"{package['name']} {package['version']}"
    expression = package["license"]
    if not expression:
        problems.add(f"{name}: its manifest has no licence expression")
        return None
    exception = EXCEPTIONS.get(package["name"], ("", ""))[0]
    choices = alternatives(expression)
    allowed = [choice for choice in choices if all(one in PERMISSIVE or one == exception for one in choice)]
    if not allowed:
        problems.add(f"{name}: {expression} is not permissive; leave it out, or add it to EXCEPTIONS with the reason")
        return None
    texts = texts_of(package, problems)
    # Files of a folder are of what the crate took from elsewhere, and say nothing of its own licence.
    own = {text.kind for text in texts if "/" not in text.file}

    def rank(choice: frozenset[str]) -> tuple:
        order = sorted(PERMISSIVE.index(one) if one in PERMISSIVE else len(PERMISSIVE) for one in choice)
        return len(choice - own), order

    taken = min(allowed, key=rank)
    left = frozenset.union(*choices) - taken
    # Apache's text is the same file with the exception and without it.
    left = {one.split(" WITH ")[0] for one in left} - {one.split(" WITH ")[0] for one in taken}
    out = Entry(name, expression, taken, [], missing=sorted(taken - {text.kind for text in texts}), systems=systems)
    for text in texts:
        if "/" not in text.file and text.kind in left:
            continue
        out.above += [line for line in text.above if line not in out.above]
        # A text that is in two crates is named for the one that comes first.
        key = (text.kind or f"{name}, {text.file}", words(text.terms))
        key = next((other for other in printed if text.kind is None and other[1] == key[1]), key)
        printed.setdefault(key, text.terms)
        out.keys.append(key)
    out.keys.sort(key=lambda key: key[0] not in taken)
    if out.missing:
        authors = ", ".join(re.sub(r"\s*<[^>]*>", "", author) for author in package["authors"])
        where = package["repository"] or f"https://crates.io/crates/{package['name']}"
        out.above.append(f"Copyright (c) {authors or 'its authors'} ({where})")
    return out


def ours() -> Entry:
    license = (ROOT / "LICENSE").read_text(encoding="utf-8")
    above = re.findall(r"^Copyright \(c\).*$", license, re.M)
    return Entry("Homeroom", "MIT OR Apache-2.0", frozenset(["MIT"]), above, missing=["MIT"])


def standard_library() -> Entry:
    taken = ["MIT", "Unicode-3.0", "Zlib"]
    above = STANDARD_LIBRARY.strip().splitlines()
    return Entry("The Rust standard library", "(MIT OR Apache-2.0) AND Unicode-3.0 AND Zlib", frozenset(taken), above, missing=taken)


def notice() -> str:
    problems, packages, systems = set(), {}, defaultdict(set)
    for target, system in TARGETS.items():
        metadata = cargo_metadata(target)
        for package in linked(metadata, problems):
            systems[package["name"], package["version"]].add(system)
            packages[package["name"], package["version"]] = package
        for package in held_as_source(metadata):
            packages[package["name"], package["version"]] = package
    printed: dict[tuple[str, str], str] = {}
    found = [entry(packages[key], systems[key], printed, problems) for key in sorted(packages)]
    entries = [ours(), standard_library(), *(one for one in found if one)]
    used = Counter(key for one in entries for key in one.keys)

    def standing(key: tuple[str, str]) -> tuple:
        return key[0], -used[key], key[1]

    order = sorted(printed, key=standing)
    labels, seen = {}, Counter()
    for key in order:
        seen[key[0]] += 1
        labels[key] = key[0] if seen[key[0]] == 1 else f"{key[0]} ({seen[key[0]]})"
    standard = {label: key for key, label in labels.items()}
    for one in entries:
        for kind in one.missing:
            if kind in standard:
                one.keys.append(standard[kind])
            else:
                problems.add(f"{one.name}: has no file of {kind}, and no other crate has one")
    if problems:
        sys.exit(f"error: {len(problems)} problems\n" + "\n".join(f"  {problem}" for problem in sorted(problems)))
    crates = "\n\n".join("\n".join(one.lines(labels)) for one in entries)
    texts = "\n\n".join(f"=== {labels[key]} ===\n\n{printed[key]}" for key in order)
    return f"""\
Licences of Homeroom and of what is in it and its strategies

Each entry names its licence, its copyright and the texts that apply, which stand below once each, between `===`. The source of a crate,
NAME VERSION, is at https://crates.io/crates/NAME/VERSION. Written by runtime/host/licenses.py.


{crates}


{texts}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; end with 1 where the notice is out of date")
    args = parser.parse_args()
    text = notice()
    if not args.check:
        NOTICE.write_text(text, encoding="utf-8")
        print(f"wrote {NOTICE.relative_to(ROOT)}: {len(text.encode()):,} bytes", file=sys.stderr)
    elif not NOTICE.exists() or NOTICE.read_text(encoding="utf-8") != text:
        sys.exit(f"error: {NOTICE.relative_to(ROOT)} is out of date; run python3 {Path(__file__).relative_to(ROOT)}")


if __name__ == "__main__":
    main()
