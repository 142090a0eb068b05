//! The data directory: private to this user, on a local disk.

use std::fs::{self, DirBuilder};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};

use super::StartupError;

/// The subdirectories of a data directory.
pub const SUBDIRECTORIES: [&str; 4] = ["config", "logs", "memory", "backups"];

/// The permission bits by which others may write.
const OTHERS_WRITE: u32 = 0o022;

/// File systems whose locks or mappings are not those of one machine, by the magic number of
/// `statfs(2)`.
const REFUSED_FILE_SYSTEMS: [(u32, &str); 8] = [
    (0x0000_6969, "NFS"),
    (0x0000_517b, "SMB"),
    (0xff53_4d42, "CIFS"),
    (0xfe53_4d42, "SMB2"),
    (0x6573_5546, "FUSE"),
    (0x5346_414f, "AFS"),
    (0x6b41_4653, "AFS"),
    (0x00c3_6400, "Ceph"),
];

/// Virtual file systems of the kernel, in which no files can be created.
const KERNEL_FILE_SYSTEMS: [u32; 5] = [
    0x0000_9fa0, // proc
    0x6265_6572, // sysfs
    0x6367_7270, // cgroup2
    0x0027_e0eb, // cgroup
    0x6462_6720, // debugfs
];

/// A data directory that was checked.
#[derive(Clone, Debug)]
pub struct DataDir {
    path: PathBuf,
}

impl DataDir {
    /// Creates the directory with mode 0700 if it is missing, checks it, and creates what
    /// belongs inside.
    ///
    /// # Errors
    /// If it cannot be created or read, belongs to another user, can be written by others, or is
    /// on a network file system.
    pub fn prepare(path: &Path) -> Result<DataDir, StartupError> {
        check(path)?;
        create(path)?;
        let path = path
            .canonicalize()
            .map_err(|cause| StartupError::of_io("resolving", path, cause))?;
        for name in SUBDIRECTORIES {
            create(&path.join(name))?;
        }
        // Checked again, because some of it was created only now.
        check(&path)?;
        Ok(DataDir { path })
    }

    /// Its canonical path: absolute, without symbolic links.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The directory of the log files.
    #[must_use]
    pub fn logs(&self) -> PathBuf {
        self.path.join("logs")
    }
}

/// Why a directory cannot be a data directory, found without changing anything: the checks of a
/// start, also for `doctor`.
///
/// # Errors
/// As [`DataDir::prepare`].
pub fn check(path: &Path) -> Result<(), StartupError> {
    let shown = path;
    let path = std::path::absolute(path)
        .map_err(|cause| StartupError::of_io("resolving", shown, cause))?;
    for above in path.ancestors() {
        match above.symlink_metadata() {
            Ok(_) if above == path => return check_existing(above),
            Ok(_) => return check_parent(above),
            Err(cause)
                if matches!(
                    cause.kind(),
                    io::ErrorKind::NotFound | io::ErrorKind::NotADirectory
                ) => {}
            Err(cause) => return Err(StartupError::of_io("reading it", above, cause)),
        }
    }
    Ok(())
}

fn check_existing(path: &Path) -> Result<(), StartupError> {
    let path = path
        .canonicalize()
        .map_err(|cause| StartupError::of_io("resolving", path, cause))?;
    let uid = rustix::process::geteuid().as_raw();
    check_directory(&path, uid)?;
    check_file_system(&path)?;
    check_writable(&path)?;
    for name in SUBDIRECTORIES {
        let inner = path.join(name);
        if inner.symlink_metadata().is_ok() {
            check_directory(&inner, uid)?;
            check_writable(&inner)?;
        }
    }
    Ok(())
}

/// Whether a directory can be created in the nearest existing parent.
fn check_parent(path: &Path) -> Result<(), StartupError> {
    match fs::metadata(path) {
        Ok(metadata) if metadata.is_dir() => {
            check_file_system(path)?;
            check_writable(path)
        }
        Ok(_) => Err(StartupError::NotADirectory {
            path: path.to_owned(),
        }),
        Err(cause) => Err(StartupError::of_io("resolving", path, cause)),
    }
}

fn check_writable(path: &Path) -> Result<(), StartupError> {
    use rustix::fs::Access;
    rustix::fs::access(path, Access::WRITE_OK | Access::EXEC_OK)
        .map_err(|cause| StartupError::of_io("writing in", path, cause.into()))
}

fn create(path: &Path) -> Result<(), StartupError> {
    match DirBuilder::new().recursive(true).mode(0o700).create(path) {
        Ok(()) => Ok(()),
        Err(cause)
            if matches!(
                cause.kind(),
                io::ErrorKind::AlreadyExists | io::ErrorKind::NotADirectory
            ) =>
        {
            Err(StartupError::NotADirectory {
                path: path.to_owned(),
            })
        }
        Err(cause) => Err(StartupError::of_io("creating it", path, cause)),
    }
}

/// Refuses a directory that another user owns or may write in. The superuser is held to the same
/// rule: its server in another user's directory would leave files there that this user cannot read.
pub(super) fn check_directory(path: &Path, uid: u32) -> Result<(), StartupError> {
    let metadata =
        fs::metadata(path).map_err(|cause| StartupError::of_io("reading it", path, cause))?;
    let path = path.to_owned();
    if !metadata.is_dir() {
        return Err(StartupError::NotADirectory { path });
    }
    if metadata.uid() != uid {
        return Err(StartupError::OtherOwner {
            path,
            owner: metadata.uid(),
        });
    }
    let mode = metadata.mode() & 0o7777;
    if mode & OTHERS_WRITE != 0 {
        return Err(StartupError::OthersMayWrite { path, mode });
    }
    Ok(())
}

fn check_file_system(path: &Path) -> Result<(), StartupError> {
    let magic = file_system_magic(path)
        .map_err(|cause| StartupError::of_io("reading the file system of", path, cause))?;
    if KERNEL_FILE_SYSTEMS.contains(&magic) {
        return Err(StartupError::KernelFileSystem {
            path: path.to_owned(),
        });
    }
    match refused_file_system(magic) {
        Some(kind) => Err(StartupError::NetworkFileSystem {
            path: path.to_owned(),
            kind,
        }),
        None => Ok(()),
    }
}

/// The magic number of the file system that holds `path` (`statfs(2)`).
pub(crate) fn file_system_magic(path: &Path) -> io::Result<u32> {
    // The field's width differs between machines; the numbers have 32 bits.
    Ok(rustix::fs::statfs(path)?.f_type as u32)
}

/// The name of a file system that cannot hold a data directory; `None` for one that can.
#[must_use]
pub fn refused_file_system(magic: u32) -> Option<&'static str> {
    REFUSED_FILE_SYSTEMS
        .iter()
        .find(|(refused, _)| *refused == magic)
        .map(|(_, name)| *name)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn set_mode(path: &Path, mode: u32) {
        fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
    }

    fn mode(path: &Path) -> u32 {
        fs::metadata(path).unwrap().mode() & 0o7777
    }

    #[test]
    fn the_directory_is_private() {
        let home = tempfile::tempdir().unwrap();
        let path = home.path().join("a/b");
        let dir = DataDir::prepare(&path).unwrap();
        assert_eq!(mode(&path), 0o700);
        assert_eq!(mode(&home.path().join("a")), 0o700);
        for name in SUBDIRECTORIES {
            assert_eq!(mode(&path.join(name)), 0o700, "{name}");
        }
        assert_eq!(dir.path(), path.canonicalize().unwrap());
        assert_eq!(dir.logs(), dir.path().join("logs"));
        DataDir::prepare(&path).unwrap();
    }

    #[test]
    fn refused_where_others_may_write() {
        let home = tempfile::tempdir().unwrap();
        let path = home.path().join("d");
        DataDir::prepare(&path).unwrap();
        for bits in [0o720, 0o702, 0o777] {
            set_mode(&path, bits);
            let error = DataDir::prepare(&path).unwrap_err();
            assert!(matches!(error, StartupError::OthersMayWrite { mode, .. } if mode == bits));
        }
        // The owner decides who may read; secret files have their own mode.
        set_mode(&path, 0o755);
        DataDir::prepare(&path).unwrap();
        set_mode(&path.join("config"), 0o770);
        let error = DataDir::prepare(&path).unwrap_err().to_string();
        assert!(error.contains("chmod 700"), "{error}");
        assert!(error.contains("/config"), "{error}");
    }

    #[test]
    fn refused_where_another_owns_it() {
        let home = tempfile::tempdir().unwrap();
        let owner = fs::metadata(home.path()).unwrap().uid();
        check_directory(home.path(), owner).unwrap();
        let error = check_directory(home.path(), owner + 1).unwrap_err();
        assert!(matches!(error, StartupError::OtherOwner { owner: found, .. } if found == owner));
    }

    #[test]
    fn refused_where_something_else_is_there() {
        let home = tempfile::tempdir().unwrap();
        let file = home.path().join("f");
        fs::write(&file, "").unwrap();
        for path in [&file, &file.join("x")] {
            let error = DataDir::prepare(path).unwrap_err();
            assert!(
                matches!(error, StartupError::NotADirectory { .. }),
                "{error}"
            );
        }
    }

    #[test]
    fn permission_denied_names_the_path() {
        let home = tempfile::tempdir().unwrap();
        let closed = home.path().join("closed");
        fs::create_dir(&closed).unwrap();
        set_mode(&closed, 0o500);
        let path = closed.join("data");
        // The superuser passes these bits; for everyone else they are the whole test.
        if !rustix::process::geteuid().is_root() {
            let error = DataDir::prepare(&path).unwrap_err();
            assert_eq!(error.exit_code(), 77);
            let text = error.to_string();
            assert!(
                text.starts_with(&format!("permission denied: {}", path.display())),
                "{text}"
            );
        }
        set_mode(&closed, 0o700);
    }

    #[test]
    fn file_systems() {
        assert_eq!(refused_file_system(0x6969), Some("NFS"));
        assert_eq!(refused_file_system(0xff53_4d42), Some("CIFS"));
        assert_eq!(refused_file_system(0x6573_5546), Some("FUSE"));
        for local in [0xef53, 0x0102_1994, 0x9123_683e, 0x5846_5342, 0x794c_7630] {
            assert_eq!(refused_file_system(local), None, "{local:x}");
        }
    }
}
