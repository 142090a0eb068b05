//! Which backups to keep: the newest of each of the last days and weeks that have any, and the last
//! ones before a migration.
//!
//! The number in its name determines which backup is newer; its date may come from a wrong clock.
//! The newest valid backup is always kept, regardless of the rules and the free space.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use crate::BACKUPS;
use crate::backup::open_backup;
use crate::calendar::{day_of, parse_stamp, week_of};
use crate::faults::Faults;
use crate::files;

/// Digits of a number in a name. A name with more digits is not a backup, so that every number has
/// a successor.
const NUMBER_DIGITS_MAX: usize = 15;

/// How many backups to keep.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Policy {
    /// Days of which the newest backup stays: the last ones that have any.
    pub daily: usize,
    /// Weeks (from Monday, UTC) of which the newest backup stays: the last ones that have any.
    pub weekly: usize,
    /// Backups before a migration that stay.
    pub pre_migration: usize,
    /// How many bytes should be free on the disk. Below that the oldest are removed, except the
    /// newest valid one.
    pub min_free_bytes: u64,
}

impl Default for Policy {
    fn default() -> Self {
        Self {
            daily: 7,
            weekly: 4,
            pre_migration: 3,
            min_free_bytes: 256 << 20,
        }
    }
}

/// What pruning did.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Pruned {
    /// What was removed, oldest first.
    pub removed: Vec<PathBuf>,
    /// What was kept, oldest first.
    pub kept: Vec<PathBuf>,
}

/// A backup by its name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Found {
    pub(crate) path: PathBuf,
    /// Its number, which counts up in the directory; 0 for names of earlier versions without one.
    number: u64,
    /// Its time in unix seconds, by the clock of that time.
    pub(crate) at: i64,
    /// A number after the date in names of earlier versions.
    n: u64,
    is_pre_migration: bool,
}

/// Removes the backups of `data_dir` that `policy` does not keep. Other files are not touched.
pub fn prune(data_dir: &Path, policy: &Policy) -> io::Result<Pruned> {
    let dir = data_dir.join(BACKUPS);
    let found = list(&dir);
    let stays = choose(&found, policy);
    if stays.iter().all(|stays| *stays) && free_bytes(&dir)? >= policy.min_free_bytes {
        let kept = found.into_iter().map(|found| found.path).collect();
        return Ok(Pruned {
            kept,
            ..Pruned::default()
        });
    }
    // Read completely, so that the last valid backup is never removed.
    let is_good =
        |found: &&Found| open_backup(&found.path).is_ok_and(|backup| backup.verify().is_ok());
    let Some(newest_good) = found.iter().rev().find(is_good) else {
        // No backup is known to be valid, so none is removed.
        let kept = found.into_iter().map(|found| found.path).collect();
        return Ok(Pruned {
            kept,
            ..Pruned::default()
        });
    };
    let mut pruned = Pruned::default();
    for (found, stays) in found.iter().zip(stays) {
        if stays || found == newest_good {
            pruned.kept.push(found.path.clone());
        } else {
            fs::remove_file(&found.path)?;
            pruned.removed.push(found.path.clone());
        }
    }
    while pruned.kept.len() > 1 && free_bytes(&dir)? < policy.min_free_bytes {
        let Some(at) = pruned
            .kept
            .iter()
            .position(|path| *path != newest_good.path)
        else {
            break;
        };
        let path = pruned.kept.remove(at);
        fs::remove_file(&path)?;
        pruned.removed.push(path);
    }
    if !pruned.removed.is_empty() {
        files::sync_dir(&dir, &Faults::none())?;
    }
    Ok(pruned)
}

/// The backups in `dir` by their names, oldest first. A directory that cannot be read has none.
pub(crate) fn list(dir: &Path) -> Vec<Found> {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    let mut found: Vec<_> = entries.filter_map(|entry| parse(&entry.path())).collect();
    found.sort_by_key(|found| (found.number, found.at, found.is_pre_migration, found.n));
    found
}

/// The number of the next backup in `dir`.
pub(crate) fn next_number(dir: &Path) -> u64 {
    let highest = list(dir).last().map_or(0, |found| found.number);
    highest.saturating_add(1)
}

/// The paths of the backups of `data_dir`, the newest first.
#[must_use]
pub fn backups(data_dir: &Path) -> Vec<PathBuf> {
    let found = list(&data_dir.join(BACKUPS)).into_iter().rev();
    found.map(|found| found.path).collect()
}

/// `latzero-NUMBER-STAMP.db` or `pre-migration-VERSION-NUMBER-STAMP.db`; of earlier versions
/// `latzero-STAMP[-n].db` or `pre-migration-VERSION-STAMP[-n].db`.
fn parse(path: &Path) -> Option<Found> {
    let name = path.file_name()?.to_str()?.strip_suffix(".db")?;
    let (rest, is_pre_migration) = match name.strip_prefix("latzero-") {
        Some(rest) => (rest, false),
        None => {
            let (version, rest) = name.strip_prefix("pre-migration-")?.split_once('-')?;
            version.parse::<u32>().ok()?;
            (rest, true)
        }
    };
    let path = path.to_owned();
    if let Some(at) = rest.get(..15).and_then(parse_stamp) {
        let n = match &rest[15..] {
            "" => 0,
            n => n.strip_prefix('-')?.parse().ok()?,
        };
        return Some(Found {
            path,
            number: 0,
            at,
            n,
            is_pre_migration,
        });
    }
    let (number, stamp) = rest.split_once('-')?;
    let is_number = (1..=NUMBER_DIGITS_MAX).contains(&number.len())
        && number.bytes().all(|digit| digit.is_ascii_digit());
    Some(Found {
        path,
        number: is_number.then(|| number.parse().ok())??,
        at: parse_stamp(stamp)?,
        n: 0,
        is_pre_migration,
    })
}

/// For each backup, oldest first, whether the rules keep it.
fn choose(found: &[Found], policy: &Policy) -> Vec<bool> {
    let mut days = BTreeSet::new();
    let mut weeks = BTreeSet::new();
    let mut before_migrations = 0;
    let mut stays: Vec<_> = found
        .iter()
        .rev()
        .map(|found| {
            if found.is_pre_migration {
                before_migrations += 1;
                return before_migrations <= policy.pre_migration;
            }
            // Counted by days that have backups, not from today: a clock that jumps makes none of
            // them old.
            let of_day = days.len() < policy.daily && days.insert(day_of(found.at));
            let of_week = weeks.len() < policy.weekly && weeks.insert(week_of(found.at));
            of_day || of_week
        })
        .collect();
    stays.reverse();
    stays
}

fn free_bytes(dir: &Path) -> io::Result<u64> {
    let stat = rustix::fs::statvfs(dir)?;
    Ok(stat.f_bavail.saturating_mul(stat.f_frsize))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(name: &str) -> Found {
        parse(Path::new(name)).expect(name)
    }

    /// Of `names` (oldest first), those with a `+` stay.
    fn check(names: &[&str]) {
        let all: Vec<_> = names.iter().map(|name| found(&name[1..])).collect();
        let mut sorted = all.clone();
        sorted.sort_by_key(|found| (found.number, found.at, found.is_pre_migration, found.n));
        assert_eq!(sorted, all);
        let stays = choose(&all, &Policy::default());
        for (name, stays) in names.iter().zip(stays) {
            assert_eq!(name.starts_with('+'), stays, "{name}");
        }
    }

    #[test]
    fn the_newest_of_a_day_stays() {
        check(&[
            " latzero-20240109-000000.db",
            "+latzero-20240109-230000.db",
            " latzero-20240110-080000.db",
            " latzero-20240110-090000.db",
            " latzero-20240110-090000-1.db",
            " latzero-000001-20240110-080000.db",
            "+latzero-000002-20240110-070000.db",
        ]);
    }

    /// 2024-01-10 is a Wednesday.
    #[test]
    fn older_days_leave_the_newest_of_their_week() {
        check(&[
            " latzero-000001-20231210-000000.db",
            " latzero-000002-20231217-235959.db",
            " latzero-000003-20231218-000000.db",
            "+latzero-000004-20231224-000000.db",
            " latzero-000005-20231226-000000.db",
            "+latzero-000006-20231230-000000.db",
            "+latzero-000007-20240101-000000.db",
            "+latzero-000008-20240103-000000.db",
            "+latzero-000009-20240104-000000.db",
            "+latzero-000010-20240105-000000.db",
            "+latzero-000011-20240108-000000.db",
            "+latzero-000012-20240110-000000.db",
        ]);
    }

    #[test]
    fn three_from_before_migrations_stay_whatever_their_age() {
        check(&[
            " pre-migration-1-20200101-000000.db",
            " pre-migration-2-20210101-000000.db",
            "+pre-migration-3-20220101-000000.db",
            "+pre-migration-3-20220101-000000-1.db",
            "+pre-migration-1-000001-20200101-000000.db",
            "+latzero-000002-20240110-000000.db",
        ]);
    }

    #[test]
    fn a_clock_that_jumps_makes_no_backup_old_or_new() {
        check(&[
            "+latzero-000001-20240104-000000.db",
            "+latzero-000002-20240105-000000.db",
            "+latzero-000003-20240106-000000.db",
            "+latzero-000004-20240107-000000.db",
            "+latzero-000005-20240108-000000.db",
            "+latzero-000006-20250101-000000.db",
            "+latzero-000007-20240109-000000.db",
        ]);
        // Of a version without numbers, and a year ahead: behind all that have one.
        check(&[
            "+latzero-20250101-000000.db",
            "+latzero-000001-20240109-000000.db",
        ]);
    }

    #[test]
    fn the_next_number_is_above_all_existing_ones() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(next_number(dir.path()), 1);
        for name in [
            "latzero-20250101-000000.db",
            "latzero-000041-20240110-000000.db",
            "pre-migration-1-000007-20240110-000000.db",
            "latzero-9999999999999999-20240110-000000.db",
        ] {
            fs::write(dir.path().join(name), "").unwrap();
        }
        assert_eq!(next_number(dir.path()), 42);
    }

    #[test]
    fn other_names_are_not_backups() {
        for name in [
            "data.db",
            "latzero-20240110.db",
            "latzero-20240110-000000",
            "latzero-20240110-000000-x.db",
            "latzero-20240110-0000001.db",
            "latzero-1-20240110.db",
            "latzero-+1-20240110-000000.db",
            "latzero--20240110-000000.db",
            "pre-migration-x-20240110-000000.db",
            "pre-migration-20240110-000000.db",
            ".tmp-1-1.db",
            "mine.db",
        ] {
            assert_eq!(parse(Path::new(name)), None, "{name}");
        }
    }
}
