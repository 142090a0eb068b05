//! Replays the corpus of every fuzz target.

use std::path::Path;

fn replay(target: &str, run: fn(&[u8])) {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../../fuzz/corpus")
        .join(target);
    let files = std::fs::read_dir(&folder).unwrap_or_else(|e| panic!("{}: {e}", folder.display()));
    let mut replayed = 0;
    for file in files {
        let path = file.expect("the folder can be read").path();
        // Shown only if the run fails.
        println!("replaying {}", path.display());
        run(&std::fs::read(&path).expect("the file can be read"));
        replayed += 1;
    }
    assert!(replayed > 0, "the corpus of '{target}' is empty");
}

#[test]
fn frame() {
    replay("frame", latzero_fuzz::frame);
}

#[test]
fn message() {
    replay("message", latzero_fuzz::message);
}

#[test]
fn session() {
    replay("session", latzero_fuzz::session);
}

#[test]
fn config() {
    replay("config", latzero_fuzz::config);
}

#[test]
fn header() {
    replay("header", latzero_fuzz::header);
}

#[test]
fn rows() {
    replay("rows", latzero_fuzz::rows);
}

#[test]
fn backup() {
    replay("backup", latzero_fuzz::backup);
}

#[test]
fn tokens() {
    replay("tokens", latzero_fuzz::tokens);
}

#[test]
fn descriptor() {
    replay("descriptor", latzero_fuzz::descriptor);
}

#[test]
fn manifest() {
    replay("manifest", latzero_fuzz::manifest);
}

#[test]
fn envelope() {
    replay("envelope", latzero_fuzz::envelope);
}

#[test]
fn proof() {
    replay("proof", latzero_fuzz::proof);
}
