//! Persistent blocks of an earlier run: complete ones are loaded, incomplete ones are deleted, and
//! unreadable ones are moved to `memory/.orphans/`, from where the server never deletes them.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::io;
use std::os::fd::AsFd;

use latzero_shm::Custodian;
use rustix::fs::{AtFlags, Mode, RenameFlags, mkdirat, renameat, renameat_with, statat};
use rustix::io::Errno;
use serde_json::Value;

use super::{Files, Names};

/// The directory for files that cannot be used.
const ORPHANS: &str = ".orphans";

/// How many files of one name are moved aside; further ones are left where they are.
const SAME_NAME_MAX: u32 = 10_000;

/// A block that an earlier run left.
pub(in crate::blocks) struct LoadedBlock {
    pub(in crate::blocks) names: Names,
    pub(in crate::blocks) record: String,
    pub(in crate::blocks) open: Result<Custodian, String>,
}

impl LoadedBlock {
    fn created_unix_ns(&self) -> u64 {
        let custodian = self.open.as_ref();
        custodian.map_or(0, |custodian| custodian.description().created_unix_ns)
    }
}

impl Files {
    /// [`Files::scan_with`], if nothing but the files is known about the blocks.
    pub(in crate::blocks) fn scan(&self) -> Vec<LoadedBlock> {
        self.scan_with(&HashMap::new(), &mut |_, _| ()).0
    }

    /// The blocks of an earlier run, the newest first; incomplete files are deleted. `rows` are the
    /// records in the database, by the id of their files. `lost` is called with what is affected
    /// and what happened.
    pub(in crate::blocks) fn scan_with(
        &self,
        rows: &HashMap<String, String>,
        lost: &mut dyn FnMut(String, String),
    ) -> (Vec<LoadedBlock>, HashSet<String>) {
        let entries = match std::fs::read_dir(&self.path) {
            Ok(entries) => entries,
            Err(error) => {
                let directory = format!("directory {}", self.path.display());
                lost(directory, format!("it can't be read: {error}"));
                return (Vec::new(), HashSet::new());
            }
        };
        let names = entries
            .flatten()
            .filter_map(|entry| entry.file_name().into_string().ok());
        let mut bytes: BTreeMap<String, BTreeSet<u64>> = BTreeMap::new();
        let mut records = Vec::new();
        let mut removed = HashSet::new();
        for name in names {
            if name.ends_with(".new") {
                self.unlink(&name);
            } else if let Some(id) = name.strip_suffix(".gone") {
                removed.insert(id.to_owned());
            } else if let Some(id) = name.strip_suffix(".json") {
                records.push(id.to_owned());
            } else if let Some((id, generation)) = generation(&name) {
                bytes.entry(id.to_owned()).or_default().insert(generation);
            } else if name.ends_with(".lzb") {
                self.orphan(&name);
            }
        }
        // The server ended while it removed these.
        bytes.retain(|id, generations| {
            let is_removed = removed.contains(id) && !records.contains(id);
            for &generation in generations.iter().filter(|_| is_removed) {
                let id = id.clone();
                self.unlink(&Names { id, generation }.bytes());
            }
            !is_removed
        });
        let mut kept = Vec::new();
        let unrecorded = bytes.keys().filter(|id| !records.contains(id));
        let unrecorded: Vec<String> = unrecorded.cloned().collect();
        let records = records.into_iter().map(|id| (id, true));
        let unrecorded = unrecorded.into_iter().map(|id| (id, false));
        for (id, is_recorded) in records.chain(unrecorded) {
            let read = self.read_record(&id);
            let error = match (read, rows.get(&id)) {
                (Ok((names, record)), row) if row.is_none_or(|row| is_same(row, &record)) => {
                    let generations = bytes.remove(&id).unwrap_or_default();
                    kept.push(self.load(names, record, &generations, lost));
                    continue;
                }
                (Ok(_), _) => "it differs from the one in the database".to_owned(),
                (Err(error), _) => error.to_string(),
            };
            let generations = bytes.remove(&id).unwrap_or_default();
            self.orphan(&format!("{id}.json"));
            match rows.get(&id) {
                Some(row) => {
                    let happened = format!(
                        "its record was lost or damaged ({error}); it was recreated from the \
                         database"
                    );
                    lost(name_of(row), happened);
                    kept.push(self.load_by_row(id, row, &generations, lost));
                }
                None => {
                    for generation in generations {
                        let id = id.clone();
                        self.orphan(&Names { id, generation }.bytes());
                    }
                    if !is_recorded {
                        // A server that is killed between writing a block's bytes and its record
                        // leaves these. No client knows the block.
                        tracing::warn!(file = id, "moving aside a block without a record");
                        continue;
                    }
                    let happened = format!(
                        "its record cannot be read ({error}) and the database does not have it; \
                         its files were moved to memory/{ORPHANS}"
                    );
                    lost(format!("memory/{id}"), happened);
                }
            }
        }
        if let Err(error) = self.sync() {
            tracing::warn!(directory = %self.path.display(), %error, "cannot flush the directory \
                of persistent blocks");
        }
        // If two have the same name, the newer one was in use.
        kept.sort_by_key(|kept| std::cmp::Reverse(kept.created_unix_ns()));
        (kept, removed)
    }

    /// Loads a block whose record file is lost, with the record from the database. The header of
    /// its bytes says the sizes.
    fn load_by_row(
        &self,
        id: String,
        row: &str,
        generations: &BTreeSet<u64>,
        lost: &mut dyn FnMut(String, String),
    ) -> LoadedBlock {
        let value: Value = serde_json::from_str(row).unwrap_or_default();
        let named = value["generation"].as_u64().unwrap_or(0);
        let generation = match generations.contains(&named) {
            true => named,
            false => generations.last().copied().unwrap_or(named),
        };
        let names = Names { id, generation };
        let mut record = row.to_owned();
        if let Ok(custodian) = self.open_bytes(&names, None) {
            record = record_of(&record, &custodian);
            let written = self
                .write_new_record(&names, &record)
                .and_then(|()| self.commit(&names));
            if let Err(error) = written {
                tracing::warn!(file = %names, %error, "cannot repair the record of a persistent \
                    block");
            }
        }
        self.load(names, record, generations, lost)
    }

    /// Opens the generation that the record names. If that is impossible, opens the newest
    /// generation that can be opened, and corrects the record.
    fn load(
        &self,
        names: Names,
        record: String,
        generations: &BTreeSet<u64>,
        lost: &mut dyn FnMut(String, String),
    ) -> LoadedBlock {
        let named = names.generation;
        let others = generations.iter().rev().filter(|g| **g != named);
        let others = others.map(|&generation| Names {
            id: names.id.clone(),
            generation,
        });
        let error = match self.open_bytes(&names, Some(&record)) {
            Ok(custodian) => {
                // Older ones were superseded, and no client knows a newer one.
                others.for_each(|other| self.unlink(&other.bytes()));
                return LoadedBlock {
                    names,
                    record,
                    open: Ok(custodian),
                };
            }
            Err(error) => error,
        };
        let mut found: Option<(Names, Custodian)> = None;
        for other in others {
            match found {
                None => match self.open_bytes(&other, None) {
                    Ok(custodian) => found = Some((other, custodian)),
                    Err(error) => {
                        tracing::error!(file = %other, error, "cannot open a generation of a \
                            persistent block; moving it aside");
                        self.orphan(&other.bytes());
                    }
                },
                Some(_) => self.orphan(&other.bytes()),
            }
        }
        let Some((other, custodian)) = found else {
            return LoadedBlock {
                names,
                record,
                open: Err(error),
            };
        };
        let happened = format!(
            "its newest generation {names} cannot be opened ({error}) and was moved to \
             memory/{ORPHANS}; the older one, {other}, is used"
        );
        lost(name_of(&record), happened);
        // First, because a start deletes files of generations other than the record's.
        self.orphan(&names.bytes());
        let record = record_of(&record, &custodian);
        let written = self
            .write_new_record(&other, &record)
            .and_then(|()| self.commit(&other));
        if let Err(error) = written {
            tracing::warn!(file = %other, %error, "cannot repair the record of a persistent block");
        }
        LoadedBlock {
            names: other,
            record,
            open: Ok(custodian),
        }
    }

    /// Opens the bytes of a generation, which must agree with their name and their record.
    fn open_bytes(&self, names: &Names, record: Option<&str>) -> Result<Custodian, String> {
        let custodian = Custodian::open_persistent(self.directory.as_fd(), &names.bytes())
            .map_err(|error| error.to_string())?;
        let description = custodian.description();
        if Names::of(description) != *names {
            return Err(format!(
                "its header is that of {}",
                Names::of(description).bytes()
            ));
        }
        if let Some(record) = record
            && record_of(record, &custodian) != normal(record)
        {
            return Err("its header has another size than its record".into());
        }
        Ok(custodian)
    }

    fn read_record(&self, id: &str) -> io::Result<(Names, String)> {
        let mut names = Names {
            id: id.to_owned(),
            generation: 0,
        };
        let record = self.record(&names)?;
        let record = record.ok_or_else(|| io::Error::other("it was removed"))?;
        let value: Value = serde_json::from_str(&record)?;
        names.generation = value["generation"]
            .as_u64()
            .ok_or_else(|| io::Error::other("it names no generation"))?;
        Ok((names, record))
    }

    /// Moves an unusable block aside, so that it is not lost.
    pub(in crate::blocks) fn set_aside(&self, names: &Names) {
        self.orphan(&names.bytes());
        self.orphan(&names.record());
    }

    /// How many files were moved aside, by this run and all before it, and their bytes.
    pub(in crate::blocks) fn orphans(&self) -> (usize, u64) {
        let Ok(entries) = std::fs::read_dir(self.path.join(ORPHANS)) else {
            return (0, 0);
        };
        let sizes = entries.flatten().filter_map(|entry| entry.metadata().ok());
        sizes.fold((0, 0), |(files, bytes), file| {
            (files + 1, bytes + file.len())
        })
    }

    fn orphan(&self, name: &str) {
        match self.move_aside(name) {
            Ok(()) | Err(Errno::NOENT) => {}
            Err(error) => tracing::warn!(file = name, %error, "cannot move a file aside"),
        }
    }

    /// Moves a file to an unused name.
    fn move_aside(&self, name: &str) -> Result<(), Errno> {
        match mkdirat(&self.directory, ORPHANS, Mode::from(0o700)) {
            Ok(()) | Err(Errno::EXIST) => {}
            Err(error) => return Err(error),
        }
        let directory = &self.directory;
        for n in 0..SAME_NAME_MAX {
            let target = match n {
                0 => format!("{ORPHANS}/{name}"),
                n => format!("{ORPHANS}/{name}.{n}"),
            };
            let flags = RenameFlags::NOREPLACE;
            match renameat_with(directory, name, directory, &target, flags) {
                Err(Errno::EXIST) => {}
                // Not every file system supports the flag (rename(2)). No other process moves files
                // here.
                Err(Errno::INVAL | Errno::NOSYS) => {
                    match statat(directory, &target, AtFlags::SYMLINK_NOFOLLOW) {
                        Ok(_) => {}
                        Err(Errno::NOENT) => return renameat(directory, name, directory, &target),
                        Err(error) => return Err(error),
                    }
                }
                other => return other,
            }
        }
        Err(Errno::EXIST)
    }
}

/// The id and the generation in the name of a file of bytes.
fn generation(name: &str) -> Option<(&str, u64)> {
    let (id, generation) = name.strip_suffix(".lzb")?.rsplit_once('.')?;
    let number = generation.parse().ok()?;
    // Escaped reversibly, so that the name can be recovered.
    (generation == u64::to_string(&number)).then_some((id, number))
}

/// The record, with the sizes and the generation from the header.
fn record_of(record: &str, custodian: &Custodian) -> String {
    let mut value: Value = serde_json::from_str(record).unwrap_or_default();
    let description = custodian.description();
    if let Some(record) = value.as_object_mut() {
        record.insert("generation".into(), description.generation.into());
        record.insert("size".into(), description.geometry.size.into());
        record.insert("slots".into(), description.geometry.slots.into());
        match description.geometry.spares {
            0 => record.remove("spares"),
            spares => record.insert("spares".into(), spares.into()),
        };
    }
    value.to_string()
}

/// Whether a record agrees with the database about the same generation. A record of another
/// generation was written when the server ended, and is valid.
fn is_same(row: &str, record: &str) -> bool {
    let parse = |text: &str| serde_json::from_str::<Value>(text).unwrap_or_default();
    let (row, record) = (parse(row), parse(record));
    let fields = [
        "pool",
        "block_id",
        "owner",
        "permissions",
        "layout",
        "sealed",
    ];
    row["generation"] != record["generation"]
        || fields.into_iter().all(|field| row[field] == record[field])
}

/// The name of a block, from its record.
fn name_of(record: &str) -> String {
    let record: Value = serde_json::from_str(record).unwrap_or_default();
    let text = |field: &str| record[field].as_str().unwrap_or("?").to_owned();
    format!("block '{}' of pool '{}'", text("block_id"), text("pool"))
}

/// The record in the form that [`record_of`] writes.
fn normal(record: &str) -> String {
    serde_json::from_str::<Value>(record)
        .unwrap_or_default()
        .to_string()
}
