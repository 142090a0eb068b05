//! Untrusted backup files: opened, checked, restored.

use std::io::Read;
use std::path::Path;
use std::sync::OnceLock;

use latzero_store::{Options, RowChange, open_backup, restore};

/// A backup with changed bytes, or any bytes. If the first byte is `!`, the rest is the file;
/// otherwise the input is pairs of an offset (two bytes) and a byte to write there, in a valid
/// backup.
///
/// # Panics
/// If something panics, or a backup that passes the check can't be restored.
pub fn backup(data: &[u8]) {
    let bytes = match data.split_first() {
        Some((b'!', bytes)) => bytes.to_vec(),
        _ => {
            let mut bytes = good().to_vec();
            for edit in data.chunks_exact(3).take(64) {
                let at = usize::from(u16::from_be_bytes([edit[0], edit[1]])) * 2
                    + usize::from(edit[2] & 1);
                let at = at % bytes.len();
                bytes[at] = edit[2];
            }
            bytes
        }
    };
    let dir = tempfile::tempdir().expect("there is room for a file");
    let path = dir.path().join("fuzzed.db");
    std::fs::write(&path, &bytes).expect("there is room for a file");
    let is_whole = bytes == good();
    let checked = open_backup(&path).and_then(|backup| {
        let _ = backup.summary();
        backup.verify()
    });
    assert!(
        checked.is_ok() || !is_whole,
        "an unchanged part is damaged: {checked:?}"
    );
    let data_dir = dir.path().join("data");
    std::fs::create_dir(&data_dir).expect("there is room for a directory");
    let restored = restore(&path, &data_dir, |_, bytes: &mut dyn Read| {
        std::io::copy(bytes, &mut std::io::sink()).map(drop)
    });
    assert_eq!(
        restored.is_ok(),
        checked.is_ok(),
        "{restored:?}, though {checked:?}"
    );
    if restored.is_ok() {
        check(&data_dir);
    }
}

/// Checks that the restored database opens.
fn check(data_dir: &Path) {
    let opened = latzero_store::open(data_dir, Options::default());
    opened
        .expect("a restored database opens")
        .store
        .close()
        .expect("and closes");
}

/// A valid backup with a row.
fn good() -> &'static [u8] {
    static GOOD: OnceLock<Vec<u8>> = OnceLock::new();
    GOOD.get_or_init(|| {
        let dir = tempfile::tempdir().expect("there is room for a file");
        let opened = latzero_store::open(dir.path(), Options::default()).expect("a new one opens");
        let change = RowChange::PutSetting {
            key: "k".into(),
            value: "v".into(),
        };
        opened.store.commit(vec![change]).expect("there is room");
        let made = opened.store.backup(None).expect("there is room");
        let bytes = std::fs::read(made.path()).expect("it was just made");
        opened.store.close().expect("nothing conflicts");
        bytes
    })
}
