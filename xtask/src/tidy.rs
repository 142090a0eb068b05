//! Rules of the house that no compiler checks: which crate may know which, and what must not stand in a file.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use crate::{Done, read, root};

/// Which crates of this workspace a crate may depend on. A new edge is rare, and discussed.
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
        ],
    ),
    ("latzero-crypto", &[]),
    ("latzero-shm", &[]),
    ("latzero-store", &[]),
    (
        "latzero",
        &["latzero-crypto", "latzero-protocol", "latzero-shm"],
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
        ],
    ),
];

/// Crates that are functions of their inputs.
const PURE: &[&str] = &["crates/latzero-fabric/src/", "crates/latzero-crypto/src/"];

/// What they must not use: they decide, drivers act.
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

/// What stands in no file.
const BANNED: &[&str] = &[
    "TODO",
    "FIXME",
    "XXX",
    "#[ignore",
    "todo!(",
    "unimplemented!(",
    "dbg!(",
];

/// Checks all of it.
pub(crate) fn check() -> Done {
    let mut faults = Vec::new();
    edges(&mut faults)?;
    for path in sources(&root())? {
        let text = read(&path)?;
        let shown = path
            .strip_prefix(root())
            .unwrap_or(&path)
            .display()
            .to_string();
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
        if !text.starts_with("//!") {
            faults.push(format!("{shown}: a file opens with its idea (`//!`)"));
        }
        let may_be_unsafe = shown.starts_with("crates/latzero-shm/");
        if !may_be_unsafe
            && text
                .lines()
                .any(|line| line.trim_start().starts_with("unsafe ") || line.contains("unsafe {"))
        {
            faults.push(format!("{shown}: `unsafe` belongs into latzero-shm alone"));
        }
    }
    if faults.is_empty() {
        Ok(())
    } else {
        Err(format!("untidy:\n  {}", faults.join("\n  ")))
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
        // Tests may look further than what they test.
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

/// The Rust files of the repository.
fn sources(dir: &Path) -> Result<Vec<PathBuf>, String> {
    let mut found = Vec::new();
    let entries = std::fs::read_dir(dir).map_err(|error| format!("{}: {error}", dir.display()))?;
    for path in entries.filter_map(Result::ok).map(|entry| entry.path()) {
        let name = path
            .file_name()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned();
        if path.is_dir() {
            if !name.starts_with('.') && name != "target" {
                found.extend(sources(&path)?);
            }
        } else if name.ends_with(".rs") {
            found.push(path);
        }
    }
    found.sort();
    Ok(found)
}
