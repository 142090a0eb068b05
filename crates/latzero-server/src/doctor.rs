//! Diagnoses what keeps a server from starting or running well, with a command to fix each problem.
//!
//! [`look`] collects facts and changes nothing: it binds no port and takes no lock, so it does not
//! disturb a server that starts at the same time. [`diagnose`] is a pure function of those facts.

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use latzero_fabric::limits::{Limits, Unit};
use serde::Serialize;

use crate::address;
use crate::machine_limits::{Bound, MachineLimits, about};
use crate::settings::unknown_variables;
use crate::settings::{Environment, Resolved, Settings, SettingsErrors, SocketChoice};
use crate::startup;
use crate::startup::data_dir::{file_system_magic, refused_file_system};
use crate::startup::descriptors::Shares;
use crate::startup::lock::{self, Holder};
use crate::startup::sockets::{self, Listening};

/// Below this much free space, in bytes, metadata can no longer be relied upon to be written.
const FREE_BYTES_FAIL: u64 = 64 << 20;

/// Below this much free space, in bytes, it warns.
const FREE_BYTES_WARN: u64 = 1 << 30;

/// The status of a finding.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Status {
    /// No problem.
    Ok,
    /// A server would run, with a limitation.
    Warn,
    /// A server would not start, or would not run well.
    Fail,
}

/// The result of one check.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// What was checked: `data directory`, `port`, …
    pub name: &'static str,
    /// Its status.
    pub status: Status,
    /// What was found.
    pub what: String,
    /// A command that fixes the problem, if there is one.
    pub command: Option<String>,
}

impl Finding {
    fn ok(name: &'static str, what: impl Into<String>) -> Finding {
        Finding {
            name,
            status: Status::Ok,
            what: what.into(),
            command: None,
        }
    }

    fn warn(name: &'static str, what: impl Into<String>, command: impl Into<String>) -> Finding {
        Finding {
            name,
            status: Status::Warn,
            what: what.into(),
            command: Some(command.into()),
        }
    }

    fn fail(name: &'static str, what: impl Into<String>, command: impl Into<String>) -> Finding {
        Finding {
            name,
            status: Status::Fail,
            what: what.into(),
            command: Some(command.into()),
        }
    }
}

/// What exists at the path of the data directory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DirectoryState {
    /// Nothing: a start creates it.
    Missing,
    /// A directory.
    Directory {
        /// The user id of its owner.
        owner: u32,
        /// Its permission bits.
        mode: u32,
    },
    /// Not a directory.
    NotADirectory,
    /// It cannot be examined, for this reason.
    Hidden(String),
}

/// The input of [`diagnose`].
#[derive(Clone, Debug)]
pub struct Facts {
    /// The effective user id.
    pub uid: u32,
    /// The data directory; its canonical path if it exists.
    pub data_dir: PathBuf,
    /// What exists there.
    pub place: DirectoryState,
    /// Why a start would refuse, by its own checks, and the finding that it belongs to.
    pub refusal: Option<(&'static str, String)>,
    /// The magic number of its file system, or of that of the nearest existing parent.
    pub file_system: Option<u32>,
    /// Free space there for this user, in bytes.
    pub free_bytes: Option<u64>,
    /// The server that uses the directory.
    pub holder: Option<Holder>,
    /// The port as set.
    pub port: u16,
    /// Whether anything listens on that port.
    pub port_taken: bool,
    /// Whether the port speaks TLS.
    pub has_tls: bool,
    /// Whether it may be open to other machines in plain text.
    pub is_insecure: bool,
    /// The process that does, if it is visible.
    pub listener: Option<Listening>,
    /// The Unix socket that a server would bind; `None` if it is off.
    pub socket: Option<PathBuf>,
    /// The resources of the machine that a server may use.
    pub surroundings: MachineLimits,
    /// The limits as they are set.
    pub limits: Limits,
}

/// Collects the facts.
#[must_use]
pub fn collect(settings: &Settings, environment: &Environment) -> Facts {
    let uid = rustix::process::geteuid().as_raw();
    let set = std::path::absolute(&settings.data_dir).unwrap_or_else(|_| settings.data_dir.clone());
    let data_dir = set.canonicalize().unwrap_or(set);
    let place = match fs::metadata(&data_dir) {
        Ok(metadata) if metadata.is_dir() => DirectoryState::Directory {
            owner: metadata.uid(),
            mode: metadata.mode() & 0o7777,
        },
        Ok(_) => DirectoryState::NotADirectory,
        Err(cause) if cause.kind() == io::ErrorKind::NotFound => DirectoryState::Missing,
        Err(cause) if cause.kind() == io::ErrorKind::NotADirectory => DirectoryState::NotADirectory,
        Err(cause) => DirectoryState::Hidden(cause.to_string()),
    };
    let there = data_dir
        .ancestors()
        .find(|path| path.exists())
        .unwrap_or(Path::new("/"));
    let runtime_dir = environment.var("XDG_RUNTIME_DIR").map(Path::new);
    Facts {
        uid,
        file_system: file_system_magic(there).ok(),
        free_bytes: rustix::fs::statvfs(there)
            .ok()
            .map(|space| space.f_bavail.saturating_mul(space.f_frsize)),
        holder: lock::holder(&data_dir),
        port: settings.port,
        port_taken: settings.port != 0 && sockets::is_port_taken(settings.port),
        has_tls: settings.enable_tls,
        is_insecure: settings.insecure,
        listener: if settings.port == 0 {
            None
        } else {
            sockets::find_listener(settings.port)
        },
        socket: match &settings.socket {
            SocketChoice::Off => None,
            SocketChoice::Auto => Some(address::socket_path(&data_dir, runtime_dir, uid)),
            SocketChoice::Path(path) => Some(path.clone()),
        },
        surroundings: MachineLimits::of_process(),
        limits: settings.limits.clone(),
        refusal: startup::check(settings)
            .err()
            .map(|error| (error.part(), error.to_string())),
        place,
        data_dir,
    }
}

/// All checks: the settings, and with them the machine. If the settings are invalid, only that is
/// reported, because everything else depends on them.
#[must_use]
pub fn examine(
    resolved: &Result<Resolved, SettingsErrors>,
    environment: &Environment,
) -> Vec<Finding> {
    let mut findings = check_settings(resolved);
    let unknown = unknown_variables(environment).into_iter();
    findings.extend(unknown.map(|what| Finding::warn("settings", what, "latzero config show")));
    if let Ok(resolved) = resolved {
        findings.extend(diagnose(&collect(&resolved.settings, environment)));
    }
    findings
}

/// One finding for each error in the settings, or one that there is none.
#[must_use]
pub fn check_settings(resolved: &Result<Resolved, SettingsErrors>) -> Vec<Finding> {
    let unavailable = match resolved {
        Ok(resolved) => resolved.check_available().err(),
        Err(errors) => Some(errors.clone()),
    };
    match unavailable {
        None => vec![Finding::ok("settings", "all settings are valid")],
        Some(errors) => errors
            .errors()
            .iter()
            .map(|error| Finding::fail("settings", error.to_string(), "latzero config show"))
            .collect(),
    }
}

/// Evaluates the facts.
#[must_use]
pub fn diagnose(facts: &Facts) -> Vec<Finding> {
    let mut findings = vec![
        data_directory(facts),
        file_system(facts),
        free_space(facts),
        instance(facts),
        port(facts),
        tls(facts),
        socket(facts),
        memory(facts),
        descriptor_limit(facts),
        file_size(facts),
    ];
    // The other findings say more, so the refusal is shown only if none of them explains it. Such a
    // file system has no free space either.
    let is_explained = findings
        .iter()
        .any(|finding| finding.status == Status::Fail && finding.name != "free space");
    if let Some((part, refusal)) = facts.refusal.as_ref().filter(|_| !is_explained) {
        let command = match *part {
            "file system" => "latzero start --data-dir /var/tmp/latzero".to_owned(),
            "port" => "latzero start --host 127.0.0.1".to_owned(),
            "socket" => "LATZERO_SOCKET=auto latzero start".to_owned(),
            "tls" => "latzero config show".to_owned(),
            _ => format!("ls -ld {}", facts.data_dir.display()),
        };
        // It replaces a finding that this part has no problem.
        if let Some(finding) = findings.iter_mut().find(|finding| finding.name == *part) {
            *finding = Finding::fail(part, refusal, command);
        }
    }
    findings
}

fn data_directory(facts: &Facts) -> Finding {
    const NAME: &str = "data directory";
    let path = facts.data_dir.display();
    match &facts.place {
        DirectoryState::Missing => Finding::ok(
            NAME,
            format!(
                "{path} does not exist yet; the server \
            creates it at its start"
            ),
        ),
        DirectoryState::NotADirectory => Finding::fail(
            NAME,
            format!("{path} is not a directory"),
            format!("mv {path} {path}.old"),
        ),
        DirectoryState::Hidden(why) => Finding::fail(
            NAME,
            format!("cannot examine {path}: {why}"),
            format!("sudo ls -ld {path}"),
        ),
        DirectoryState::Directory { owner, .. } if *owner != facts.uid => Finding::fail(
            NAME,
            format!("{path} belongs to user {owner}, not to user {}", facts.uid),
            format!("sudo chown -R {} {path}", facts.uid),
        ),
        DirectoryState::Directory { mode, .. } if mode & 0o022 != 0 => Finding::fail(
            NAME,
            format!("other users can write to {path} (mode {mode:04o})"),
            format!("chmod 700 {path}"),
        ),
        DirectoryState::Directory { mode, .. } if mode & 0o700 != 0o700 => Finding::fail(
            NAME,
            format!("the owner of {path} cannot use it (mode {mode:04o})"),
            format!("chmod 700 {path}"),
        ),
        DirectoryState::Directory { mode, .. } if mode & 0o055 != 0 => Finding::warn(
            NAME,
            format!("other users can read {path} (mode {mode:04o})"),
            format!("chmod 700 {path}"),
        ),
        DirectoryState::Directory { .. } => Finding::ok(NAME, format!("{path} is private to you")),
    }
}

fn file_system(facts: &Facts) -> Finding {
    const NAME: &str = "file system";
    let path = facts.data_dir.display();
    match facts.file_system.map(refused_file_system) {
        Some(Some(kind)) => Finding::fail(
            NAME,
            format!("{path} is on {kind}, where file locks and memory mappings are unreliable"),
            "latzero start --data-dir /var/tmp/latzero",
        ),
        Some(None) => Finding::ok(NAME, format!("{path} is on a local file system")),
        None => Finding::warn(
            NAME,
            format!("cannot determine the file system of {path}"),
            format!("df {path}"),
        ),
    }
}

fn free_space(facts: &Facts) -> Finding {
    const NAME: &str = "free space";
    let command = format!("df -h {}", facts.data_dir.display());
    match facts.free_bytes {
        None => Finding::warn(NAME, "not known", command),
        Some(bytes) => {
            let what = format!("{} MiB", bytes >> 20);
            match bytes {
                0..FREE_BYTES_FAIL => Finding::fail(NAME, what, command),
                FREE_BYTES_FAIL..FREE_BYTES_WARN => Finding::warn(NAME, what, command),
                _ => Finding::ok(NAME, what),
            }
        }
    }
}

fn instance(facts: &Facts) -> Finding {
    const NAME: &str = "other instance";
    let path = facts.data_dir.display();
    match &facts.holder {
        None => Finding::ok(NAME, format!("no server is using {path}")),
        Some(holder) => {
            let pid = holder
                .pid
                .map_or_else(String::new, |pid| format!(", pid {pid}"));
            Finding::warn(
                NAME,
                format!("a server is already using {path}{pid}; a second one cannot start there"),
                format!("latzero stop --data-dir {path}"),
            )
        }
    }
}

fn port(facts: &Facts) -> Finding {
    const NAME: &str = "port";
    let port = facts.port;
    if port == 0 {
        return Finding::ok(NAME, "the system picks a free port");
    }
    if !facts.port_taken {
        return Finding::ok(NAME, format!("{port} is free"));
    }
    // The server of this directory on its own port is not a problem.
    let ours = facts.holder.as_ref().and_then(|holder| holder.pid);
    match &facts.listener {
        Some(listener) if Some(listener.pid) == ours => Finding::ok(
            NAME,
            format!("{port} is in use by the server of this data directory"),
        ),
        listener => {
            let by = listener
                .as_ref()
                .map_or("another program".to_owned(), ToString::to_string);
            let free = if port < u16::MAX { port + 1 } else { port - 1 };
            Finding::fail(
                NAME,
                format!("{port} is in use by {by}"),
                format!("latzero start --port {free}"),
            )
        }
    }
}

fn tls(facts: &Facts) -> Finding {
    const NAME: &str = "tls";
    match (facts.has_tls, facts.is_insecure) {
        (true, _) => Finding::ok(NAME, "on: the TCP port speaks only TLS"),
        (false, false) => Finding::ok(NAME, "off: the TCP port is plain, only for this machine"),
        (false, true) => Finding::warn(
            NAME,
            "off, and `insecure` allows other machines to connect in plain text",
            "latzero start --tls",
        ),
    }
}

fn socket(facts: &Facts) -> Finding {
    const NAME: &str = "socket";
    let Some(path) = &facts.socket else {
        return Finding::ok(NAME, "off");
    };
    let shown = path.display();
    if !address::fits(path) {
        return Finding::fail(
            NAME,
            format!(
                "{shown} is {} bytes long; the maximum is {}",
                path.as_os_str().len(),
                address::SOCKET_PATH_BYTES_MAX
            ),
            "LATZERO_SOCKET=auto latzero start",
        );
    }
    if path.parent() == Some(&facts.data_dir) {
        Finding::ok(NAME, shown.to_string())
    } else {
        Finding::ok(NAME, format!("{shown}, outside the data directory"))
    }
}

fn memory(facts: &Facts) -> Finding {
    const NAME: &str = "memory";
    let Bound { max, from } = &facts.surroundings.memory;
    let may = about(*max);
    let limits = facts.surroundings.in_force(&facts.limits).limits;
    for (setting, set) in [
        ("memory_max", limits.memory_max),
        ("memory_bytes_max", limits.memory_bytes_max),
    ] {
        if set > *max {
            let set = Unit::Bytes.show(set);
            return Finding::warn(
                NAME,
                format!("limits.{setting} is {set}, but a server may use only {may} ({from})"),
                format!("latzero start --set limits.{setting}=0"),
            );
        }
    }
    let (all, blocks) = (limits.memory_max, limits.memory_bytes_max);
    Finding::ok(
        NAME,
        format!(
            "a server may use {may} ({from}): {} for clients, {} of that for memory blocks",
            Unit::Bytes.show(all),
            Unit::Bytes.show(blocks)
        ),
    )
}

fn descriptor_limit(facts: &Facts) -> Finding {
    const NAME: &str = "descriptors";
    let Some(bound) = &facts.surroundings.descriptors else {
        return Finding::ok(NAME, "without a limit");
    };
    let (limits, shares) = (&facts.limits, facts.surroundings.shares(&facts.limits));
    let what = format!(
        "the limit is {bound}, enough for {} connections and {} memory blocks",
        shares.connections, shares.blocks
    );
    if shares.connections < limits.connections_max || shares.blocks < limits.blocks_max {
        let needed = Shares::needed(limits.connections_max, limits.blocks_max);
        Finding::warn(
            NAME,
            format!(
                "{what}; the settings allow {} and {}",
                limits.connections_max, limits.blocks_max
            ),
            format!("sudo prlimit --pid $$ --nofile={needed}:{needed}"),
        )
    } else {
        Finding::ok(NAME, what)
    }
}

fn file_size(facts: &Facts) -> Finding {
    const NAME: &str = "file size";
    match &facts.surroundings.file_size {
        None => Finding::ok(NAME, "without a limit"),
        Some(Bound { max, from }) => Finding::warn(
            NAME,
            format!(
                "files are limited to {} ({from}); larger blocks, or a larger database, fail \
                 with `storage`",
                about(*max)
            ),
            "ulimit -f unlimited",
        ),
    }
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use crate::machine_limits::Origin;
    use crate::settings::{Inputs, Override, resolve};
    use crate::startup::lock::InstanceLock;

    use super::*;

    fn healthy() -> Facts {
        Facts {
            uid: 1000,
            data_dir: PathBuf::from("/d"),
            place: DirectoryState::Directory {
                owner: 1000,
                mode: 0o700,
            },
            refusal: None,
            file_system: Some(0xef53),
            free_bytes: Some(10 << 30),
            holder: None,
            port: 45227,
            port_taken: false,
            has_tls: false,
            is_insecure: false,
            listener: None,
            socket: Some(PathBuf::from("/d/latzero.sock")),
            surroundings: MachineLimits {
                memory: bound(8 << 30, Origin::Machine),
                descriptors: Some(bound(1 << 20, Origin::Rlimit("RLIMIT_NOFILE"))),
                file_size: None,
            },
            limits: Resolved::defaults(&[("HOME", "/h")].into_iter().collect())
                .unwrap()
                .settings
                .limits,
        }
    }

    fn bound(max: u64, from: Origin) -> Bound {
        Bound { max, from }
    }

    /// Checks that exactly one thing is wrong with these facts.
    fn check(
        change: impl FnOnce(&mut Facts),
        name: &str,
        status: Status,
        what: &str,
        command: &str,
    ) {
        let mut facts = healthy();
        change(&mut facts);
        let bad: Vec<Finding> = diagnose(&facts)
            .into_iter()
            .filter(|finding| finding.status != Status::Ok)
            .collect();
        let [finding] = bad.as_slice() else {
            panic!("{bad:?}")
        };
        assert_eq!(
            (finding.name, finding.status),
            (name, status),
            "{finding:?}"
        );
        assert!(finding.what.contains(what), "{finding:?}");
        assert_eq!(finding.command.as_deref(), Some(command));
    }

    #[test]
    fn a_healthy_machine_has_no_findings() {
        for finding in diagnose(&healthy()) {
            assert_eq!(
                (finding.status, &finding.command),
                (Status::Ok, &None),
                "{finding:?}"
            );
        }
        let unlimited = Facts {
            surroundings: MachineLimits {
                descriptors: None,
                ..healthy().surroundings
            },
            place: DirectoryState::Missing,
            port: 0,
            ..healthy()
        };
        assert!(
            diagnose(&unlimited)
                .iter()
                .all(|finding| finding.status == Status::Ok)
        );
    }

    #[test]
    fn each_problem_has_its_finding() {
        use Status::{Fail, Warn};
        check(
            |f| f.is_insecure = true,
            "tls",
            Warn,
            "in plain text",
            "latzero start --tls",
        );
        let directory = |owner, mode| DirectoryState::Directory { owner, mode };
        check(
            |f| f.place = directory(0, 0o700),
            "data directory",
            Fail,
            "belongs to user 0, not to user 1000",
            "sudo chown -R 1000 /d",
        );
        check(
            |f| f.place = directory(1000, 0o770),
            "data directory",
            Fail,
            "mode 0770",
            "chmod 700 /d",
        );
        check(
            |f| f.place = directory(1000, 0o500),
            "data directory",
            Fail,
            "the owner of",
            "chmod 700 /d",
        );
        check(
            |f| f.place = directory(1000, 0o755),
            "data directory",
            Warn,
            "other users can read",
            "chmod 700 /d",
        );
        check(
            |f| f.place = DirectoryState::NotADirectory,
            "data directory",
            Fail,
            "is not a directory",
            "mv /d /d.old",
        );
        check(
            |f| f.place = DirectoryState::Hidden("why".into()),
            "data directory",
            Fail,
            "cannot examine /d: why",
            "sudo ls -ld /d",
        );
        check(
            |f| f.file_system = Some(0x6969),
            "file system",
            Fail,
            "is on NFS",
            "latzero start --data-dir /var/tmp/latzero",
        );
        check(
            |f| f.free_bytes = Some(1 << 20),
            "free space",
            Fail,
            "1 MiB",
            "df -h /d",
        );
        check(
            |f| f.free_bytes = Some(100 << 20),
            "free space",
            Warn,
            "100 MiB",
            "df -h /d",
        );
        check(
            |f| {
                f.holder = Some(Holder {
                    pid: Some(7),
                    record: None,
                });
            },
            "other instance",
            Warn,
            "pid 7",
            "latzero stop --data-dir /d",
        );
        check(
            |f| f.port_taken = true,
            "port",
            Fail,
            "45227 is in use by another program",
            "latzero start --port 45228",
        );
        check(
            |f| {
                f.port_taken = true;
                f.port = u16::MAX;
                f.listener = Some(Listening {
                    pid: 9,
                    command: "nginx".into(),
                });
            },
            "port",
            Fail,
            "in use by nginx (pid 9)",
            "latzero start --port 65534",
        );
        check(
            |f| f.socket = Some(PathBuf::from(format!("/{}", "x".repeat(107)))),
            "socket",
            Fail,
            "108 bytes long; the maximum is 107",
            "LATZERO_SOCKET=auto latzero start",
        );
        check(
            |f| {
                let limit = bound(1024, Origin::Rlimit("RLIMIT_NOFILE"));
                f.surroundings.descriptors = Some(limit);
            },
            "descriptors",
            Warn,
            "the limit is 1024 (rlimit RLIMIT_NOFILE), enough for 236 connections and 236 memory \
             blocks; the settings allow 4096 and 4096",
            "sudo prlimit --pid $$ --nofile=16464:16464",
        );
        check(
            |f| {
                f.surroundings.memory = bound(300 << 20, Origin::Cgroup("/g/memory.max".into()));
                f.limits.memory_max = 1 << 30;
            },
            "memory",
            Warn,
            "limits.memory_max is 1 GiB, but a server may use only 300 MiB (cgroup /g/memory.max)",
            "latzero start --set limits.memory_max=0",
        );
        check(
            |f| f.surroundings.file_size = Some(bound(8 << 20, Origin::Rlimit("RLIMIT_FSIZE"))),
            "file size",
            Warn,
            "files are limited to 8 MiB (rlimit RLIMIT_FSIZE)",
            "ulimit -f unlimited",
        );
    }

    #[test]
    fn our_own_server_on_its_port_is_not_a_problem() {
        let facts = Facts {
            holder: Some(Holder {
                pid: Some(7),
                record: None,
            }),
            port_taken: true,
            listener: Some(Listening {
                pid: 7,
                command: "latzero".into(),
            }),
            ..healthy()
        };
        let port = diagnose(&facts)
            .into_iter()
            .find(|f| f.name == "port")
            .unwrap();
        assert_eq!(port.status, Status::Ok);
    }

    #[test]
    fn this_machine_is_described() {
        let home = tempfile::tempdir().unwrap();
        let dir = home.path().join("data");
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let command_line = vec![
            Override::new("data_dir", dir.to_str().unwrap(), "--data-dir"),
            Override::new("port", port.to_string(), "--port"),
        ];
        let resolved = resolve(&Inputs {
            command_line,
            ..Inputs::default()
        })
        .unwrap();
        let environment = Environment::default();
        let facts = collect(&resolved.settings, &environment);
        assert_eq!(facts.place, DirectoryState::Missing);
        assert!(facts.port_taken);
        assert_eq!(facts.listener.as_ref().unwrap().pid, std::process::id());
        assert!(facts.free_bytes.is_some() && facts.file_system.is_some());
        assert!(!dir.exists(), "checking creates nothing");

        fs::create_dir(&dir).unwrap();
        let _lock = InstanceLock::acquire(&dir).unwrap();
        let findings = examine(&Ok(resolved), &environment);
        assert_eq!(
            findings[0],
            Finding::ok("settings", "all settings are valid")
        );
        let other = findings
            .iter()
            .find(|f| f.name == "other instance")
            .unwrap();
        assert!(
            other.what.contains(&format!("pid {}", std::process::id())),
            "{other:?}"
        );
        let json = serde_json::to_value(other).unwrap();
        assert_eq!(json["status"], "warn");
        let command = json["command"].as_str().unwrap();
        assert!(
            command.starts_with("latzero stop --data-dir /"),
            "{command}"
        );
    }

    #[test]
    fn wrong_settings_are_findings() {
        let flags = [("prot", "1"), ("port", "x"), ("data_dir", "/d")];
        let command_line = flags
            .map(|(name, value)| Override::new(name, value, "-o"))
            .to_vec();
        let resolved = resolve(&Inputs {
            command_line,
            ..Inputs::default()
        });
        let findings = examine(&resolved, &Environment::default());
        assert_eq!(findings.len(), 2);
        assert!(
            findings
                .iter()
                .all(|f| f.name == "settings" && f.status == Status::Fail)
        );
        assert!(
            findings[0].what.contains("the nearest is `port`"),
            "{findings:?}"
        );
    }
}
