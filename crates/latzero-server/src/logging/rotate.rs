//! A log file that is rotated when it is full.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

/// `server.log`, and the rotated files `server.log.1` (newest) to `server.log.N`.
#[derive(Debug)]
pub(super) struct RotatingFile {
    path: PathBuf,
    /// `None` after a rotation that could not open the new file; the next line tries again.
    file: Option<File>,
    bytes: u64,
    bytes_max: u64,
    files_max: usize,
}

impl RotatingFile {
    /// Opens the file for appending.
    pub(super) fn open(path: &Path, bytes_max: u64, files_max: usize) -> io::Result<RotatingFile> {
        let mut rotating = RotatingFile {
            path: path.to_owned(),
            file: None,
            bytes: 0,
            bytes_max,
            files_max,
        };
        rotating.reopen()?;
        rotating.remove_beyond();
        Ok(rotating)
    }

    /// Changes the bounds from the next line on.
    pub(super) fn set_bounds(&mut self, bytes_max: u64, files_max: usize) {
        (self.bytes_max, self.files_max) = (bytes_max, files_max);
        self.remove_beyond();
    }

    /// Appends one line. A line is never split over two files, and an empty file accepts a line of
    /// any length.
    ///
    /// # Errors
    /// If the line was not written; the file never grows past its bound because of that.
    pub(super) fn write_line(&mut self, line: &[u8]) -> io::Result<()> {
        if self.bytes > 0 && self.bytes + line.len() as u64 > self.bytes_max {
            self.rotate()?;
        }
        if self.file.is_none() {
            self.reopen()?;
        }
        let Some(file) = &mut self.file else {
            return Err(io::ErrorKind::NotFound.into());
        };
        file.write_all(line)?;
        self.bytes += line.len() as u64;
        Ok(())
    }

    fn reopen(&mut self) -> io::Result<()> {
        // Opening a pipe would block.
        if fs::metadata(&self.path).is_ok_and(|found| !found.is_file()) {
            return Err(io::Error::other("it is not a regular file; move it away"));
        }
        let file = OpenOptions::new()
            .append(true)
            .create(true)
            .mode(0o600)
            .open(&self.path)?;
        self.bytes = file.metadata()?.len();
        self.file = Some(file);
        Ok(())
    }

    /// Moves every file one place back; the oldest is overwritten.
    fn rotate(&mut self) -> io::Result<()> {
        if self.files_max == 1 {
            // Only the current file is kept, and it is truncated.
            File::create(&self.path)?;
        }
        for place in (1..self.files_max).rev() {
            match fs::rename(self.aside(place - 1), self.aside(place)) {
                Err(cause) if cause.kind() != io::ErrorKind::NotFound => return Err(cause),
                _ => {}
            }
        }
        self.file = None;
        self.reopen()
    }

    /// Removes files beyond the bound after it was lowered. They are numbered without gaps, so the
    /// first missing one ends the search.
    fn remove_beyond(&self) {
        let mut place = self.files_max;
        while fs::remove_file(self.aside(place)).is_ok() {
            place += 1;
        }
    }

    fn aside(&self, place: usize) -> PathBuf {
        if place == 0 {
            return self.path.clone();
        }
        let mut name = self.path.clone().into_os_string();
        name.push(format!(".{place}"));
        PathBuf::from(name)
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use super::*;

    fn read(dir: &Path) -> Vec<(String, String)> {
        let mut files: Vec<(String, String)> = fs::read_dir(dir)
            .unwrap()
            .map(|entry| {
                let entry = entry.unwrap();
                let name = entry.file_name().into_string().unwrap();
                (name, fs::read_to_string(entry.path()).unwrap())
            })
            .collect();
        files.sort();
        files
    }

    fn check(dir: &Path, expected: &[(&str, &str)]) {
        let expected: Vec<(String, String)> = expected
            .iter()
            .map(|(a, b)| ((*a).to_owned(), (*b).to_owned()))
            .collect();
        assert_eq!(read(dir), expected);
    }

    #[test]
    fn full_files_are_put_aside_and_the_oldest_goes() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("server.log");
        let mut log = RotatingFile::open(&path, 4, 3).unwrap();
        for line in ["a\n", "b\n", "c\n", "d\n", "e\n"] {
            log.write_line(line.as_bytes()).unwrap();
        }
        check(
            dir.path(),
            &[
                ("server.log", "e\n"),
                ("server.log.1", "c\nd\n"),
                ("server.log.2", "a\nb\n"),
            ],
        );
        // A new start continues where the last one stopped.
        let mut log = RotatingFile::open(&path, 4, 3).unwrap();
        for line in ["f\n", "longer than the file may be\n", "g\n"] {
            log.write_line(line.as_bytes()).unwrap();
        }
        check(
            dir.path(),
            &[
                ("server.log", "g\n"),
                ("server.log.1", "longer than the file may be\n"),
                ("server.log.2", "e\nf\n"),
            ],
        );
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o777, 0o600);
    }

    #[test]
    fn bounds_change_while_it_runs() {
        let dir = tempfile::tempdir().unwrap();
        let mut log = RotatingFile::open(&dir.path().join("l"), 2, 4).unwrap();
        for line in ["a\n", "b\n", "c\n", "d\n"] {
            log.write_line(line.as_bytes()).unwrap();
        }
        log.set_bounds(100, 2);
        check(dir.path(), &[("l", "d\n"), ("l.1", "c\n")]);
        log.write_line(b"e\n").unwrap();
        log.set_bounds(2, 1);
        log.write_line(b"f\n").unwrap();
        check(dir.path(), &[("l", "f\n")]);
    }

    #[test]
    fn a_file_that_cannot_be_put_aside_does_not_grow() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("l");
        let mut log = RotatingFile::open(&path, 2, 2).unwrap();
        log.write_line(b"a\n").unwrap();
        // A directory in the way, which no file can be renamed onto.
        fs::create_dir(dir.path().join("l.1")).unwrap();
        log.write_line(b"b\n").unwrap_err();
        log.write_line(b"c\n").unwrap_err();
        assert_eq!(fs::read(&path).unwrap(), b"a\n");
        fs::remove_dir(dir.path().join("l.1")).unwrap();
        log.write_line(b"d\n").unwrap();
        check(dir.path(), &[("l", "d\n"), ("l.1", "a\n")]);
    }
}
