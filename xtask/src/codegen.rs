//! Generated files, and the check that they are current.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::PathBuf;

use latzero_fabric::limits::LIMITS;
use latzero_protocol::error::RaisedBy;
use latzero_protocol::{Code, Ran};

use crate::{Done, read, root, vectors};

/// Writes every generated file, and removes vectors that no document contains any more.
pub(crate) fn write() -> Done {
    let files = files()?;
    for (path, text) in &files {
        std::fs::write(root().join(path), text)
            .map_err(|error| format!("{}: {error}", path.display()))?;
    }
    for stray in strays(&files)? {
        std::fs::remove_file(&stray).map_err(|error| format!("{}: {error}", stray.display()))?;
    }
    Ok(())
}

/// Fails if a generated file is out of date.
pub(crate) fn check() -> Done {
    let files = files()?;
    let mut stale: Vec<String> = files
        .iter()
        .filter(|(path, text)| read(&root().join(path)).ok().as_ref() != Some(text))
        .map(|(path, _)| path.display().to_string())
        .collect();
    stale.extend(
        strays(&files)?
            .iter()
            .map(|path| path.display().to_string()),
    );
    if stale.is_empty() {
        println!("{} generated files are current", files.len());
        return Ok(());
    }
    Err(format!(
        "stale: {}; run `cargo xtask codegen`",
        stale.join(", ")
    ))
}

fn files() -> Result<BTreeMap<PathBuf, String>, String> {
    let operations = PathBuf::from("docs/operations.md");
    let with_limits = with_limits(&read(&root().join(&operations))?)?;
    let mut files = BTreeMap::from([
        (PathBuf::from("docs/errors.md"), errors_page()),
        (operations, with_limits),
    ]);
    for vector in vectors::of_document(&read(&root().join("docs/protocol.md"))?)? {
        let path = PathBuf::from(format!("conformance/vectors/{}.json", vector.file_name()));
        if files.insert(path, vector.to_json()).is_some() {
            return Err(format!(
                "two conformance blocks are named '{}'",
                vector.name
            ));
        }
    }
    Ok(files)
}

fn strays(files: &BTreeMap<PathBuf, String>) -> Result<Vec<PathBuf>, String> {
    let dir = root().join("conformance/vectors");
    let entries = std::fs::read_dir(&dir).map_err(|error| format!("{}: {error}", dir.display()))?;
    let is_stray = |path: &PathBuf| !files.contains_key(path.strip_prefix(root()).unwrap_or(path));
    Ok(entries
        .filter_map(Result::ok)
        .map(|entry| entry.path())
        .filter(is_stray)
        .collect())
}

/// The page with an updated table of limits.
fn with_limits(page: &str) -> Result<String, String> {
    const BEGIN: &str =
        "<!-- From crates/latzero-fabric/src/limits.rs by `cargo xtask codegen` -->\n";
    const END: &str = "<!-- End of the generated table -->\n";
    let parts = page
        .split_once(BEGIN)
        .and_then(|(before, rest)| Some((before, rest.split_once(END)?.1)));
    let (before, after) =
        parts.ok_or("docs/operations.md: the marks around the table of limits are gone")?;
    let mut table =
        String::from("| limit | default | bounds | at the limit |\n|---|---|---|---|\n");
    for limit in LIMITS {
        let (name, default) = (limit.setting, limit.unit.show(limit.default));
        let _ = writeln!(
            table,
            "| `{name}` | {default} | {} | {} |",
            limit.doc.trim(),
            limit.answer
        );
    }
    Ok(format!("{before}{BEGIN}{table}{END}{after}"))
}

fn errors_page() -> String {
    let mut page = String::from(
        "# Error codes\n\n\
         Generated from `crates/latzero-protocol/src/error.rs` by `cargo xtask codegen`. The\n\
         list is closed: a code never changes its meaning and is never reused. *Ran* says whether\n\
         the handler of a call that ended with the code may have run. After `no` it is safe to\n\
         repeat the call. The message of an error says what happened in the specific case. If an\n\
         error has its own `ran`, that one counts. Python and Node have a class of exceptions for\n\
         each *family*: `Block` is `BlockError` in both, and the others end in `Error` in Node.\n",
    );
    for (title, by) in [
        ("Sent by the server", RaisedBy::Server),
        ("Raised only by client libraries", RaisedBy::Client),
    ] {
        let _ = write!(
            page,
            "\n## {title}\n\n\
             | code | family | ran | meaning | what to do |\n|---|---|---|---|---|\n"
        );
        for code in Code::ALL.iter().filter(|code| code.raised_by() == by) {
            let ran = match code.ran() {
                Ran::No => "no",
                Ran::Unknown => "unknown",
            };
            let _ = writeln!(
                page,
                "| `{code}` | {} | {ran} | {} | {} |",
                code.family().as_str(),
                code.meaning(),
                code.remedy()
            );
        }
    }
    page
}
