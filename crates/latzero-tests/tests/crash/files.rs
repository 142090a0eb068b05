//! The files of a data directory that no server is using.

use std::path::Path;

/// Checks that the directory holds only what `docs/operations.md` names, and one file for each of
/// `blocks` persistent blocks.
pub(crate) fn check(data: &Path, blocks: usize) {
    let mut bytes = 0;
    let mut records = 0;
    for file in files(data, "") {
        let is_known = match file.split_once('/') {
            None => matches!(
                file.as_str(),
                "lock" | "admin.token" | "data.db" | "data.db.mark"
            ),
            Some(("logs", name)) => ["server.log", "audit.log", "security.log"]
                .iter()
                .any(|log| name.starts_with(log)),
            // The first start may have died between two migrations.
            Some(("backups", name)) => {
                let mut starts = ["latzero-", "pre-migration-1-"].into_iter();
                starts.any(|start| name.starts_with(start)) && name.ends_with(".db")
            }
            // A kill between writing a block's bytes and its record leaves bytes without an owner;
            // they are moved aside.
            Some(("memory", name)) if name.starts_with(".orphans/") => name.contains(".lzb"),
            Some(("memory", name)) => {
                bytes += usize::from(name.ends_with(".lzb"));
                records += usize::from(name.ends_with(".json"));
                // A removed block has a mark until its row is deleted.
                [".lzb", ".json", ".gone"]
                    .iter()
                    .any(|end| name.ends_with(end))
            }
            Some(_) => false,
        };
        // A damaged database is kept, and so is one whose replacement by a backup was interrupted.
        let is_set_aside = file.starts_with("corrupt-") || file.starts_with("replaced-");
        assert!(is_known || is_set_aside, "{file} is left");
    }
    assert_eq!(
        (bytes, records),
        (blocks, blocks),
        "files of {blocks} blocks"
    );
}

fn files(directory: &Path, prefix: &str) -> Vec<String> {
    let mut found = Vec::new();
    let entries = std::fs::read_dir(directory).unwrap_or_else(|error| panic!("{prefix}: {error}"));
    for entry in entries.flatten() {
        let name = format!("{prefix}{}", entry.file_name().to_string_lossy());
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            found.extend(files(&entry.path(), &format!("{name}/")));
        } else {
            found.push(name);
        }
    }
    found
}
