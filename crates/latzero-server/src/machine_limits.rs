//! Resources of the machine that the server may use: memory, descriptors, file sizes.
//!
//! These are the limits of the process and its control groups, not of the machine: a server in a
//! container that relies on the memory of the machine is killed before it reaches any of its own
//! limits. Each limit says where it comes from. Reading is thin; pure functions interpret the
//! result.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::{fmt, io};

use latzero_fabric::limits::{LIMITS, Limits, Unit};
use rustix::process::{Resource, Rlimit, getrlimit};
use serde::Serialize;
use signal_hook::consts::SIGXFSZ;

use crate::startup::descriptors::Shares;

/// How many directories are checked between the server's control group and the root.
const CGROUP_DEPTH_MAX: usize = 64;

/// Where a limit comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Origin {
    /// The machine itself.
    Machine,
    /// This file of a control group.
    Cgroup(PathBuf),
    /// A resource limit of the process (getrlimit(2)), by the name of its constant.
    Rlimit(&'static str),
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Origin::Machine => f.write_str("machine"),
            Origin::Cgroup(path) => write!(f, "cgroup {}", path.display()),
            Origin::Rlimit(name) => write!(f, "rlimit {name}"),
        }
    }
}

impl Serialize for Origin {
    fn serialize<S: serde::Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        s.collect_str(self)
    }
}

/// A bound that this machine sets.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Bound {
    /// Bytes or descriptors.
    pub max: u64,
    /// Where it comes from.
    pub from: Origin,
}

impl fmt::Display for Bound {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({})", self.max, self.from)
    }
}

/// The resources that the server may use.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct MachineLimits {
    /// Bytes of memory.
    pub memory: Bound,
    /// Open descriptors; `None` if there is no limit.
    pub descriptors: Option<Bound>,
    /// Bytes of one file; `None` if there is no limit.
    pub file_size: Option<Bound>,
}

impl MachineLimits {
    /// Reads the limits of this process. The descriptor limit is the hard one, which a
    /// start makes the one in force.
    #[must_use]
    pub fn of_process() -> MachineLimits {
        let rlimit = |resource, name, pick: fn(Rlimit) -> Option<u64>| {
            pick(getrlimit(resource)).map(|max| Bound {
                max,
                from: Origin::Rlimit(name),
            })
        };
        let candidates = [
            Some(Bound {
                max: machine_memory(),
                from: Origin::Machine,
            }),
            rlimit(Resource::As, "RLIMIT_AS", |limit| limit.current),
            rlimit(Resource::Data, "RLIMIT_DATA", |limit| limit.current),
        ];
        let memory = candidates
            .into_iter()
            .flatten()
            .chain(cgroup_memory())
            .min_by_key(|bound| bound.max)
            .expect("the machine's entry is listed");
        MachineLimits {
            memory,
            descriptors: rlimit(Resource::Nofile, "RLIMIT_NOFILE", |limit| limit.maximum),
            file_size: rlimit(Resource::Fsize, "RLIMIT_FSIZE", |limit| limit.current),
        }
    }
}

/// Makes a write beyond the file size limit (`RLIMIT_FSIZE`) fail, where otherwise the signal
/// `SIGXFSZ` ends the process (setrlimit(2)): the request that needs the space is refused, and the
/// server continues.
///
/// # Errors
/// If the signal handler cannot be set.
pub fn survive_file_size_limit() -> io::Result<()> {
    signal_hook::flag::register(SIGXFSZ, Arc::default()).map(drop)
}

/// A limit whose value in force differs from the setting.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Derived {
    /// The setting: `limits.memory_max`.
    pub setting: &'static str,
    /// The value in force.
    pub value: u64,
    /// The value as people read it.
    pub text: String,
    /// Where it comes from.
    pub from: String,
}

/// The limits in force, and which of them follow from this machine rather than from a setting.
#[derive(Debug, Clone)]
pub struct InForce {
    /// The limits.
    pub limits: Limits,
    /// The derived limits, and those that this machine has no room for.
    pub derived: Vec<Derived>,
}

impl MachineLimits {
    /// The limits in force on this machine for the limits that were `set`.
    #[must_use]
    pub fn in_force(&self, set: &Limits) -> InForce {
        let mut limits = set.clone().within(self.memory.max);
        let shares = self.shares(set);
        limits.connections_max = shares.connections;
        limits.blocks_max = shares.blocks;
        let values = LIMITS.iter().zip(set.values().zip(limits.values()));
        let derived = values
            .filter(|(_, (set, in_force))| set != in_force)
            .map(|(limit, (_, value))| Derived {
                setting: limit.setting,
                value,
                text: limit.unit.show(value),
                from: self.reason(limit.setting, set),
            })
            .collect();
        InForce { limits, derived }
    }

    /// How many connections and blocks there are descriptors for, at most as many as were `set`.
    #[must_use]
    pub fn shares(&self, set: &Limits) -> Shares {
        let descriptors = self
            .descriptors
            .as_ref()
            .map_or(u64::MAX, |bound| bound.max);
        Shares::of(descriptors, set.connections_max, set.blocks_max)
    }

    /// Why a limit differs from its setting.
    fn reason(&self, setting: &str, set: &Limits) -> String {
        match (setting, &self.descriptors) {
            ("limits.connections_max" | "limits.blocks_max", Some(descriptors)) => {
                descriptors.to_string()
            }
            ("limits.memory_bytes_per_pool_max" | "limits.memory_bytes_per_app_max", _)
                if set.memory_bytes_max > 0 =>
            {
                "limits.memory_bytes_max".to_owned()
            }
            _ if set.memory_max > 0 => "limits.memory_max".to_owned(),
            _ => format!(
                "{} of memory ({})",
                about(self.memory.max),
                self.memory.from
            ),
        }
    }

    /// Each bound with where it comes from, for people.
    #[must_use]
    pub fn facts(&self) -> Vec<(&'static str, String)> {
        let bytes = |bound: &Bound| format!("{} ({})", about(bound.max), bound.from);
        let unlimited = || "no limit".to_owned();
        vec![
            ("memory", bytes(&self.memory)),
            (
                "descriptors",
                self.descriptors
                    .as_ref()
                    .map_or_else(unlimited, Bound::to_string),
            ),
            (
                "file_size",
                self.file_size.as_ref().map_or_else(unlimited, bytes),
            ),
        ]
    }
}

/// Bytes for people, large numbers in whole MiB.
#[must_use]
pub fn about(bytes: u64) -> String {
    const MIB: u64 = 1 << 20;
    let whole = if bytes > 64 * MIB {
        bytes / MIB * MIB
    } else {
        bytes
    };
    Unit::Bytes.show(whole)
}

/// The machine's memory in bytes.
#[cfg(target_os = "linux")]
#[allow(
    clippy::useless_conversion,
    reason = "the field is 32 bits wide on 32-bit systems"
)]
fn machine_memory() -> u64 {
    let info = rustix::system::sysinfo();
    u64::from(info.totalram).saturating_mul(u64::from(info.mem_unit))
}

/// A guess, if there is no portable way to ask.
#[cfg(not(target_os = "linux"))]
fn machine_memory() -> u64 {
    4 << 30
}

/// The smallest memory limit on the way up from the control groups of this process.
fn cgroup_memory() -> Option<Bound> {
    let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
    let (groups, mounts) = (read("/proc/self/cgroup"), read("/proc/self/mountinfo"));
    let files = memory_files(&groups, &mounts);
    smallest(files.into_iter().filter_map(|path| {
        let text = std::fs::read_to_string(&path).ok()?;
        Some((path, text))
    }))
}

/// The smallest limit in the files of control groups.
fn smallest(files: impl Iterator<Item = (PathBuf, String)>) -> Option<Bound> {
    files
        .filter_map(|(path, text)| {
            Some(Bound {
                max: parse_limit(&text)?,
                from: Origin::Cgroup(path),
            })
        })
        .min_by_key(|bound| bound.max)
}

/// The number in `memory.max` or `memory.high` (version 2) or `memory.limit_in_bytes` (version 1);
/// `None` if there is no limit, which is `max` in the one and a number about as large as there are
/// in the other.
fn parse_limit(text: &str) -> Option<u64> {
    let limit = text.trim().parse().ok()?;
    (limit < u64::MAX >> 2).then_some(limit)
}

/// The files that may limit the memory of a process with these texts in `/proc/self/cgroup`
/// (cgroups(7)) and `/proc/self/mountinfo` (proc(5)), its own group first and the mounted root
/// last.
fn memory_files(groups: &str, mounts: &str) -> Vec<PathBuf> {
    let mut files = Vec::new();
    for line in groups.lines() {
        // `0::/a/b` in version 2, `4:memory,cpu:/a/b` in version 1.
        let mut parts = line.splitn(3, ':');
        let (Some(_), Some(controllers), Some(group)) = (parts.next(), parts.next(), parts.next())
        else {
            continue;
        };
        let is_v2 = controllers.is_empty();
        if !is_v2 && !controllers.split(',').any(|name| name == "memory") {
            continue;
        }
        // Above `memory.high` the kernel does not kill the process, but makes it very slow.
        let names: &[&str] = if is_v2 {
            &["memory.max", "memory.high"]
        } else {
            &["memory.limit_in_bytes"]
        };
        for mount in mounts.lines().filter_map(Mount::parse) {
            if !mount.is_for(is_v2) {
                continue;
            }
            let top = Path::new(&mount.point);
            // In a container the group may be outside of what is mounted; then the mount's root is
            // what there is.
            let below = Path::new(group).strip_prefix(&mount.root);
            let below = below.unwrap_or(Path::new(""));
            // A group that is named from outside of its namespace begins with `..`.
            let is_inside = !below.components().any(|part| part.as_os_str() == "..");
            let own = if is_inside {
                top.join(below)
            } else {
                top.to_owned()
            };
            let dirs = own.ancestors().take_while(|dir| dir.starts_with(top));
            for dir in dirs.take(CGROUP_DEPTH_MAX) {
                files.extend(names.iter().map(|name| dir.join(name)));
            }
        }
    }
    files
}

/// A mounted hierarchy of control groups.
struct Mount {
    root: String,
    point: String,
    kind: String,
    options: String,
}

impl Mount {
    /// Reads a line of `/proc/self/mountinfo`: `36 35 98:0 /root /point rw,noatime master:1 - type
    /// source options`.
    fn parse(line: &str) -> Option<Mount> {
        let (before, after) = line.split_once(" - ")?;
        let mut before = before.split(' ').skip(3);
        let (root, point) = (unescape(before.next()?), unescape(before.next()?));
        let mut after = after.split(' ');
        let (kind, _source) = (after.next()?.to_owned(), after.next()?);
        let options = after.next().unwrap_or_default().to_owned();
        kind.starts_with("cgroup").then_some(Mount {
            root,
            point,
            kind,
            options,
        })
    }

    fn is_for(&self, is_v2: bool) -> bool {
        match self.kind.as_str() {
            "cgroup2" => is_v2,
            "cgroup" => !is_v2 && self.options.split(',').any(|name| name == "memory"),
            _ => false,
        }
    }
}

/// Decodes the escapes of proc(5): `\040` is a space.
fn unescape(text: &str) -> String {
    let mut out = String::new();
    let mut rest = text;
    while let Some((before, after)) = rest.split_once('\\') {
        out.push_str(before);
        let code = after
            .get(..3)
            .and_then(|digits| u8::from_str_radix(digits, 8).ok());
        match code {
            Some(code) => {
                out.push(char::from(code));
                rest = &after[3..];
            }
            None => {
                out.push('\\');
                rest = after;
            }
        }
    }
    out.push_str(rest);
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    const V2: &str = "29 22 0:26 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw,nsdelegate";
    const V1: &str = "\
30 22 0:27 / /sys/fs/cgroup ro - tmpfs tmpfs ro,mode=755
31 30 0:28 / /sys/fs/cgroup/cpu,cpuacct rw shared:10 - cgroup cgroup rw,cpu,cpuacct
32 30 0:29 / /sys/fs/cgroup/memory rw shared:11 - cgroup cgroup rw,memory";

    fn check(groups: &str, mounts: &str, expected: &[&str]) {
        let expected: Vec<&Path> = expected.iter().map(Path::new).collect();
        assert_eq!(memory_files(groups, mounts), expected, "{groups}");
    }

    #[test]
    fn the_files_of_version_2_up_to_the_root() {
        check(
            "0::/system.slice/latzero.service\n",
            V2,
            &[
                "/sys/fs/cgroup/system.slice/latzero.service/memory.max",
                "/sys/fs/cgroup/system.slice/latzero.service/memory.high",
                "/sys/fs/cgroup/system.slice/memory.max",
                "/sys/fs/cgroup/system.slice/memory.high",
                "/sys/fs/cgroup/memory.max",
                "/sys/fs/cgroup/memory.high",
            ],
        );
        // In its own namespace, a container sees its group as the root.
        let root = ["/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.high"];
        check("0::/\n", V2, &root);
        check("0::/../other\n", V2, &root);
    }

    #[test]
    fn the_files_of_version_1() {
        check(
            "5:cpu,cpuacct:/x\n4:memory:/docker/abc\n0::/x\n",
            V1,
            &[
                "/sys/fs/cgroup/memory/docker/abc/memory.limit_in_bytes",
                "/sys/fs/cgroup/memory/docker/memory.limit_in_bytes",
                "/sys/fs/cgroup/memory/memory.limit_in_bytes",
            ],
        );
        // A container without its own namespace: the mount shows its group as the root.
        let mount = V1.replace("0:29 / ", "0:29 /docker/abc ");
        let own = "/sys/fs/cgroup/memory/memory.limit_in_bytes";
        check("4:memory:/docker/abc\n", &mount, &[own]);
        check("4:memory:/docker/other\n", &mount, &[own]);
    }

    #[test]
    fn both_versions_of_cgroups() {
        let mounts = format!(
            "{V1}\n{}",
            V2.replace("/sys/fs/cgroup ", "/sys/fs/cgroup/unified ")
        );
        check(
            "4:memory:/a\n0::/a\n",
            &mounts,
            &[
                "/sys/fs/cgroup/memory/a/memory.limit_in_bytes",
                "/sys/fs/cgroup/memory/memory.limit_in_bytes",
                "/sys/fs/cgroup/unified/a/memory.max",
                "/sys/fs/cgroup/unified/a/memory.high",
                "/sys/fs/cgroup/unified/memory.max",
                "/sys/fs/cgroup/unified/memory.high",
            ],
        );
    }

    #[test]
    fn invalid_texts_set_no_limit() {
        check("", "", &[]);
        check("0::/a", "", &[]);
        check("nonsense\n1:memory\n", V1, &[]);
        check("0::/a", "1 2 3 - cgroup2\nx - \n", &[]);
        let escaped = r"1 2 0:1 / /my\040groups\x rw - cgroup2 none rw";
        check(
            "0::/",
            escaped,
            &[r"/my groups\x/memory.max", r"/my groups\x/memory.high"],
        );
    }

    #[test]
    fn the_smallest_limit_counts() {
        let files = |texts: &[(&str, &str)]| {
            let files: Vec<_> = texts
                .iter()
                .map(|(path, text)| (PathBuf::from(path), (*text).to_owned()))
                .collect();
            smallest(files.into_iter()).map(|bound| (bound.max, bound.from.to_string()))
        };
        assert_eq!(files(&[]), None);
        assert_eq!(
            files(&[("/a", "max\n"), ("/b", "9223372036854771712\n")]),
            None
        );
        assert_eq!(
            files(&[
                ("/a/b", "max\n"),
                ("/a", "314572800\n"),
                ("/", "1073741824\n")
            ]),
            Some((314_572_800, "cgroup /a".into()))
        );
        assert_eq!(files(&[("/a", "nonsense"), ("/b", "-1")]), None);
    }

    #[test]
    fn limits_come_from_the_environment() {
        let machine = MachineLimits {
            memory: Bound {
                max: 300 << 20,
                from: Origin::Cgroup("/sys/fs/cgroup/memory.max".into()),
            },
            descriptors: Some(Bound {
                max: 256,
                from: Origin::Rlimit("RLIMIT_NOFILE"),
            }),
            file_size: None,
        };
        let set = || Limits::from_values(LIMITS.iter().map(|limit| limit.default));
        let check = |set: &Limits, expected: &[(&str, &str, &str)]| {
            let derived = machine.in_force(set).derived;
            let got: Vec<_> = derived
                .iter()
                .map(|d| (d.setting, d.text.as_str(), d.from.as_str()))
                .collect();
            assert_eq!(got, expected);
        };
        let memory = "300 MiB of memory (cgroup /sys/fs/cgroup/memory.max)";
        let descriptors = "256 (rlimit RLIMIT_NOFILE)";
        check(
            &set(),
            &[
                ("limits.memory_max", "150 MiB", memory),
                ("limits.connections_max", "44", descriptors),
                ("limits.outbox_total_bytes_max", "15 MiB", memory),
                ("limits.blocks_max", "44", descriptors),
                ("limits.memory_bytes_max", "75 MiB", memory),
                ("limits.memory_bytes_per_pool_max", "75 MiB", memory),
                ("limits.memory_bytes_per_app_max", "75 MiB", memory),
            ],
        );
        let mut small = set();
        (small.memory_max, small.memory_bytes_max) = (64 << 20, 1 << 20);
        (small.connections_max, small.blocks_max) = (20, 10);
        check(
            &small,
            &[
                (
                    "limits.outbox_total_bytes_max",
                    "6 MiB",
                    "limits.memory_max",
                ),
                (
                    "limits.memory_bytes_per_pool_max",
                    "1 MiB",
                    "limits.memory_bytes_max",
                ),
                (
                    "limits.memory_bytes_per_app_max",
                    "1 MiB",
                    "limits.memory_bytes_max",
                ),
            ],
        );
    }

    #[test]
    fn this_process_has_limits() {
        let found = MachineLimits::of_process();
        assert!(found.memory.max > 0);
        assert_eq!(found.facts().len(), 3);
    }
}
