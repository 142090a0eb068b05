//! Rules that no compiler checks: which crate may depend on which, forbidden words, and the length
//! of lines.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use crate::{Done, read, root};

/// The workspace crates that each crate may depend on. A new edge is rare, and needs a discussion.
const EDGES: &[(&str, &[&str])] = &[
    ("latzero-protocol", &[]),
    ("latzero-fabric", &["latzero-crypto", "latzero-protocol"]),
    (
        "latzero-server",
        &[
            "latzero-crypto",
            "latzero-fabric",
            "latzero-protocol",
            "latzero-shm",
            "latzero-store",
            "latzero-tls",
        ],
    ),
    ("latzero-crypto", &[]),
    ("latzero-tls", &["latzero-crypto"]),
    ("latzero-shm", &[]),
    ("latzero-store", &[]),
    (
        "latzero",
        &[
            "latzero-crypto",
            "latzero-protocol",
            "latzero-shm",
            "latzero-tls",
        ],
    ),
    (
        "latzero-cli",
        &["latzero", "latzero-crypto", "latzero-server"],
    ),
    (
        "latzero-sim",
        &["latzero-crypto", "latzero-fabric", "latzero-protocol"],
    ),
    (
        "latzero-bench",
        &[
            "latzero",
            "latzero-crypto",
            "latzero-protocol",
            "latzero-shm",
            "latzero-store",
            "latzero-tls",
        ],
    ),
    (
        "latzero-fuzz",
        &[
            "latzero-crypto",
            "latzero-fabric",
            "latzero-protocol",
            "latzero-server",
            "latzero-shm",
            "latzero-sim",
            "latzero-store",
        ],
    ),
    (
        "latzero-tests",
        &[
            "latzero",
            "latzero-crypto",
            "latzero-protocol",
            "latzero-shm",
            "latzero-store",
            "latzero-tls",
        ],
    ),
];

/// Crates that are functions of their inputs.
const PURE: &[&str] = &["crates/latzero-fabric/src/", "crates/latzero-crypto/src/"];

/// What they must not use, because they only decide and perform no IO.
const NOT_IN_PURE_CRATES: &[&str] = &[
    "std::net",
    "std::fs",
    "std::io",
    "std::thread",
    "std::sync::Mutex",
    "Instant",
    "SystemTime",
    "tokio",
    "mio::",
    "rustix",
    "println!",
    "eprintln!",
];

/// The layers of the client, and what the files of each must not use. Files beside them are the
/// base of all; only the crate's root shows what the layers offer.
const LAYERS: &[(&str, &[&str])] = &[
    (
        "crates/latzero/src/wire",
        &["crate::drive", "crate::face", "crate::App"],
    ),
    ("crates/latzero/src/drive", &["crate::face", "crate::App"]),
    ("crates/latzero/src/face", &[]),
    (
        "crates/latzero/src/",
        &["crate::wire", "crate::drive", "crate::face"],
    ),
];

/// Where `unsafe` is allowed: memory that other processes change is accessed through pointers
/// there, and Python and Node are called.
const UNSAFE: &[&str] = &[
    "crates/latzero-shm/",
    "sdk/node/src/memory.rs",
    "sdk/node/src/uv.rs",
    "sdk/python/src/buffer.rs",
    "sdk/python/src/gil.rs",
];

/// Words that no file may contain.
const BANNED: &[&str] = &[
    "TODO",
    "FIXME",
    "XXX",
    "#[ignore",
    "todo!(",
    "unimplemented!(",
    "dbg!(",
];

/// The most columns of a line, in code, comments and documents.
const COLUMNS_MAX: usize = 100;

/// The endings of files whose lines are checked.
const CHECKED_ENDINGS: &[&str] = &[".rs", ".md", ".toml", ".py", ".cjs", ".mjs", ".cts", ".mts"];

/// Files that are generated, or that hold data.
const UNCHECKED: &[&str] = &["docs/errors.md", "fuzz/corpus/", "conformance/vectors/"];

/// Performs all checks.
pub(crate) fn check() -> Done {
    let mut faults = Vec::new();
    edges(&mut faults)?;
    lengths(&mut faults)?;
    for path in files(&root(), &[".rs"])? {
        let text = read(&path)?;
        let shown = shown(&path);
        if shown == "xtask/src/tidy.rs" {
            continue;
        }
        for (i, line) in text.lines().enumerate() {
            for word in BANNED.iter().filter(|word| line.contains(**word)) {
                faults.push(format!("{shown}:{}: '{word}'", i + 1));
            }
            let is_pure = PURE.iter().any(|dir| shown.starts_with(dir));
            for word in NOT_IN_PURE_CRATES
                .iter()
                .filter(|word| is_pure && line.contains(**word))
            {
                faults.push(format!(
                    "{shown}:{}: a pure crate must not use '{word}'",
                    i + 1
                ));
            }
        }
        layers(&shown, &text, &mut faults);
        if !text.starts_with("//!") {
            faults.push(format!("{shown}: a file opens with its idea (`//!`)"));
        }
        let may_be_unsafe = UNSAFE.iter().any(|place| shown.starts_with(place));
        if !may_be_unsafe
            && text
                .lines()
                .any(|line| line.trim_start().starts_with("unsafe ") || line.contains("unsafe {"))
        {
            faults.push(format!(
                "{shown}: `unsafe` belongs only in {}",
                UNSAFE.join(" and ")
            ));
        }
    }
    if faults.is_empty() {
        Ok(())
    } else {
        Err(format!("untidy:\n  {}", faults.join("\n  ")))
    }
}

/// Checks that a file of the client uses nothing of a layer above its own. Documentation may link
/// there.
fn layers(shown: &str, text: &str, faults: &mut Vec<String>) {
    let Some((_, not)) = LAYERS.iter().find(|(layer, _)| shown.starts_with(layer)) else {
        return;
    };
    let code = text.lines().enumerate();
    for (i, line) in code.filter(|(_, line)| !line.trim_start().starts_with("//")) {
        for above in not.iter().filter(|above| line.contains(**above)) {
            faults.push(format!("{shown}:{}: '{above}' is a layer above", i + 1));
        }
    }
}

fn edges(faults: &mut Vec<String>) -> Done {
    let allowed: BTreeMap<_, _> = EDGES.iter().copied().collect();
    let crates = std::fs::read_dir(root().join("crates")).map_err(|error| error.to_string())?;
    for dir in crates.filter_map(Result::ok).map(|entry| entry.path()) {
        let name = dir
            .file_name()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned();
        let manifest = read(&dir.join("Cargo.toml"))?;
        // Tests may depend on more crates than the code that they test.
        let dependencies = manifest
            .split("[dev-dependencies]")
            .next()
            .unwrap_or_default();
        let Some(may) = allowed.get(name.as_str()) else {
            faults.push(format!(
                "crate {name} has no line in the table of edges (xtask/src/tidy.rs)"
            ));
            continue;
        };
        for other in allowed
            .keys()
            .filter(|other| dependencies.contains(&format!("\n{other}.workspace")))
        {
            if !may.contains(other) {
                faults.push(format!("crate {name} may not depend on {other}"));
            }
        }
    }
    Ok(())
}

/// Reports lines that are too long.
fn lengths(faults: &mut Vec<String>) -> Done {
    for path in files(&root(), CHECKED_ENDINGS)? {
        let shown = shown(&path);
        if UNCHECKED.iter().any(|start| shown.starts_with(start)) {
            continue;
        }
        let text = read(&path)?;
        let lines = too_long(&text, shown.ends_with(".md"));
        faults.extend(lines.iter().map(|(line, columns)| {
            format!("{shown}:{line}: {columns} columns, more than {COLUMNS_MAX}")
        }));
    }
    Ok(())
}

/// The numbers and lengths of the lines that are too long. A line with a URL may be longer; in
/// Markdown also a table row, a message of a conformance block, and the output in a console block.
fn too_long(text: &str, is_markdown: bool) -> Vec<(usize, usize)> {
    let mut found = Vec::new();
    let mut language = None;
    for (number, line) in text.lines().enumerate() {
        let columns = line.chars().count();
        let fence = line.trim_start().strip_prefix("```");
        if let Some(name) = fence.filter(|_| is_markdown) {
            let word = name.split(' ').next().unwrap_or_default();
            language = language.is_none().then(|| word.to_owned());
        }
        let is_excepted = line.contains("://")
            || (!is_markdown && line.contains("r#\""))
            || is_markdown
                && match language.as_deref() {
                    None => line.starts_with('|'),
                    Some("conformance") => true,
                    Some("console") => !line.starts_with("$ "),
                    Some(_) => false,
                };
        if columns > COLUMNS_MAX && !is_excepted {
            found.push((number + 1, columns));
        }
    }
    found
}

/// A path for messages, relative to the repository.
fn shown(path: &Path) -> String {
    let inside = path.strip_prefix(root()).unwrap_or(path);
    inside.display().to_string()
}

/// The files of the repository with one of these endings.
fn files(dir: &Path, endings: &[&str]) -> Result<Vec<PathBuf>, String> {
    let mut found = Vec::new();
    let entries = std::fs::read_dir(dir).map_err(|error| format!("{}: {error}", dir.display()))?;
    for path in entries.filter_map(Result::ok).map(|entry| entry.path()) {
        let name = path
            .file_name()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned();
        if path.is_dir() {
            if !name.starts_with('.') && name != "target" && name != "node_modules" {
                found.extend(files(&path, endings)?);
            }
        } else if endings.iter().any(|ending| name.ends_with(ending)) {
            found.push(path);
        }
    }
    found.sort();
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layers_use_only_what_is_below() {
        let check = |file: &str, line: &str, expected: usize| {
            let mut faults = Vec::new();
            layers(&format!("crates/latzero/src/{file}"), line, &mut faults);
            assert_eq!(faults.len(), expected, "{file}: {line}");
        };
        check("wire/link.rs", "use crate::drive::core::Core;", 1);
        check("wire.rs", "use crate::wire::link::Link;", 0);
        check("drive/core.rs", "    crate::face::app::close();", 1);
        check("drive/core.rs", "/// See [`App`](crate::App).", 0);
        check("face/app.rs", "use crate::drive::core::Core;", 0);
        check("error.rs", "use crate::wire::link::Link;", 1);
    }

    #[test]
    fn long_lines_are_found() {
        let long = "x".repeat(COLUMNS_MAX + 1);
        let check = |text: &str, is_markdown: bool, expected: &[(usize, usize)]| {
            assert_eq!(too_long(text, is_markdown), expected, "{text}");
        };
        check(&"é".repeat(COLUMNS_MAX), false, &[]);
        check(&format!("a\n{long}"), false, &[(2, 101)]);
        check(&format!("| {long} |"), false, &[(1, 105)]);
        check(&format!("| {long} |"), true, &[]);
        check(&format!("https://{long}"), true, &[]);
        check(&format!("```conformance a\n{long}\n```"), true, &[]);
        check(
            &format!("```console\n$ {long}\n{long}\n```"),
            true,
            &[(2, 103)],
        );
        check(
            &format!("```rust\n{long}\n```\n{long}"),
            true,
            &[(2, 101), (4, 101)],
        );
    }
}
