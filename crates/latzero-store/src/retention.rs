//! Which backups stay: the newest of each recent day and week, and the last ones before a migration.
//!
//! The newest good backup always stays, whatever the rules and the free space say.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use crate::BACKUPS;
use crate::backup::open_backup;
use crate::calendar::{day_of, parse_stamp, week_of};
use crate::faults::Faults;
use crate::files;

/// How many backups stay.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Policy {
    /// Days of which the newest backup stays, counted back from today.
    pub daily: i64,
    /// Weeks (from Monday, UTC) of which the newest backup stays, counted back from this one.
    pub weekly: i64,
    /// Backups before a migration that stay.
    pub pre_migration: usize,
    /// Bytes that should be free on the disk; below it the oldest go, all but the newest good one.
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
    /// What stays, oldest first.
    pub kept: Vec<PathBuf>,
}

/// A backup by its name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Found {
    pub(crate) path: PathBuf,
    /// Unix seconds.
    pub(crate) at: i64,
    n: u64,
    is_pre_migration: bool,
}

/// Removes the backups of `data_dir` that `policy` does not keep; `now` in unix ms. Other files are left alone.
pub fn prune(data_dir: &Path, now: i64, policy: &Policy) -> io::Result<Pruned> {
    let dir = data_dir.join(BACKUPS);
    let found = list(&dir);
    let is_good = |found: &&Found| {
        open_backup(&found.path).is_ok_and(|backup| backup.verify_quickly().is_ok())
    };
    let Some(newest_good) = found.iter().rev().find(is_good) else {
        // Nothing here is known to be good, so nothing here is known to be useless.
        let kept = found.into_iter().map(|found| found.path).collect();
        return Ok(Pruned {
            kept,
            ..Pruned::default()
        });
    };
    let stays = choose(&found, now, policy);
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
    found.sort_by_key(|found| (found.at, found.is_pre_migration, found.n));
    found
}

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
    let at = parse_stamp(rest.get(..15)?)?;
    let n = match &rest[15..] {
        "" => 0,
        n => n.strip_prefix('-')?.parse().ok()?,
    };
    Some(Found {
        path: path.to_owned(),
        at,
        n,
        is_pre_migration,
    })
}

/// For each backup, oldest first, whether the rules keep it.
fn choose(found: &[Found], now: i64, policy: &Policy) -> Vec<bool> {
    let today = day_of(now.div_euclid(1_000));
    let this_week = week_of(now.div_euclid(1_000));
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
            let (day, week) = (day_of(found.at), week_of(found.at));
            // A backup of the future (the clock was set back) counts as one of its own day.
            let of_day = days.insert(day) && day > today - policy.daily;
            let of_week = weeks.insert(week) && week > this_week - policy.weekly;
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

    /// At `now`, of `names` (oldest first), those with a `+` stay.
    fn check(now: &str, names: &[&str]) {
        let now = parse_stamp(now).unwrap() * 1_000;
        let all: Vec<_> = names.iter().map(|name| found(&name[1..])).collect();
        let stays = choose(&all, now, &Policy::default());
        for (name, stays) in names.iter().zip(stays) {
            assert_eq!(name.starts_with('+'), stays, "{name}");
        }
    }

    #[test]
    fn the_newest_of_a_day_stays() {
        check(
            "20240110-120000",
            &[
                " latzero-20240109-000000.db",
                "+latzero-20240109-230000.db",
                " latzero-20240110-080000.db",
                " latzero-20240110-090000.db",
                "+latzero-20240110-090000-1.db",
            ],
        );
    }

    /// 2024-01-10 is a Wednesday.
    #[test]
    fn older_days_leave_the_newest_of_their_week() {
        check(
            "20240110-120000",
            &[
                " latzero-20231210-000000.db",
                " latzero-20231217-235959.db",
                " latzero-20231218-000000.db",
                "+latzero-20231224-000000.db",
                " latzero-20231226-000000.db",
                "+latzero-20231230-000000.db",
                " latzero-20240101-000000.db",
                " latzero-20240103-000000.db",
                "+latzero-20240104-000000.db",
                "+latzero-20240105-000000.db",
                "+latzero-20240108-000000.db",
                "+latzero-20240110-000000.db",
            ],
        );
    }

    #[test]
    fn three_from_before_migrations_stay_whatever_their_age() {
        check(
            "20240110-120000",
            &[
                " pre-migration-1-20200101-000000.db",
                "+pre-migration-2-20210101-000000.db",
                "+pre-migration-3-20220101-000000.db",
                "+pre-migration-3-20220101-000000-1.db",
                "+latzero-20240110-000000.db",
            ],
        );
    }

    #[test]
    fn a_clock_that_was_set_back_removes_nothing_newer() {
        check("20240110-120000", &["+latzero-20250101-000000.db"]);
    }

    #[test]
    fn other_names_are_not_backups() {
        for name in [
            "data.db",
            "latzero-20240110.db",
            "latzero-20240110-000000",
            "latzero-20240110-000000-x.db",
            "latzero-20240110-0000001.db",
            "pre-migration-x-20240110-000000.db",
            "pre-migration-20240110-000000.db",
            ".tmp-1-1.db",
            "mine.db",
        ] {
            assert_eq!(parse(Path::new(name)), None, "{name}");
        }
    }
}
