//! `latzero service`, with a systemctl that only records how it was called.

#![allow(clippy::unwrap_used, reason = "helpers of tests fail as tests do")]

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::PathBuf;

use serde_json::json;

use crate::program::{Ran, latzero, run};

/// A home directory, and a directory with the systemctl that is found first.
struct Home {
    directory: tempfile::TempDir,
}

impl Home {
    /// `systemctl` records its arguments, and then runs this line of shell.
    fn new(systemctl: &str) -> Home {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("systemctl");
        let calls = directory.path().join("calls");
        let script = format!(
            "#!/bin/sh\necho \"$*\" >> '{}'\n{systemctl}\n",
            calls.display()
        );
        fs::write(&path, script).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
        Home { directory }
    }

    fn service(&self, args: &[&str]) -> Ran {
        let path = format!("{}:/usr/bin:/bin", self.directory.path().display());
        run(latzero(self.directory.path(), &[&["service"], args].concat()).env("PATH", path))
    }

    fn unit(&self) -> PathBuf {
        self.directory
            .path()
            .join(".config/systemd/user/latzero.service")
    }

    fn calls(&self) -> Vec<String> {
        let calls = fs::read_to_string(self.directory.path().join("calls")).unwrap_or_default();
        calls.lines().map(str::to_owned).collect()
    }
}

#[test]
fn the_service_is_installed_and_removed() {
    let home = Home::new("");
    let installed = home.service(&["install", "--port", "45228"]).ended_with(0);
    assert_eq!(
        home.calls(),
        [
            "--user daemon-reload",
            "--user enable latzero.service",
            "--user restart latzero.service"
        ]
    );
    assert_eq!(
        installed.out,
        format!(
            "wrote {}\nran systemctl --user daemon-reload\n\
             ran systemctl --user enable latzero.service\n\
             ran systemctl --user restart latzero.service\n",
            home.unit().display()
        )
    );
    let unit = fs::read_to_string(home.unit()).unwrap();
    assert!(unit.contains("start --set port=45228\n"), "{unit}");
    let shown = home.service(&["show", "--port", "45228"]).ended_with(0);
    assert_eq!(shown.out, unit);
    let removed = home.service(&["uninstall", "--json"]).ended_with(0).json();
    assert_eq!(
        removed["steps"],
        json!([
            "ran systemctl --user disable --now latzero.service",
            format!("removed {}", home.unit().display()),
            "ran systemctl --user daemon-reload"
        ])
    );
    assert!(!home.unit().exists());
}

#[test]
fn a_failed_step_is_reported_with_the_steps_before_it() {
    let home = Home::new("[ \"$2\" != enable ] || { echo 'no such bus' >&2; exit 1; }");
    let failed = home.service(&["install"]).ended_with(1);
    let failed = failed.said("`systemctl --user enable latzero.service` failed: no such bus");
    failed.said("ran systemctl --user daemon-reload");
}

#[test]
fn nothing_is_left_where_systemd_does_not_run() {
    let home = Home::new("exit 1");
    home.service(&["install"]).ended_with(1).said("removed ");
    assert!(!home.unit().exists());
    // A unit file that was there before stays.
    fs::write(home.unit(), "old").unwrap();
    home.service(&["install"]).ended_with(1);
    assert!(home.unit().exists());
}

#[test]
fn settings_that_start_refuses_are_not_installed() {
    let home = Home::new("");
    for wrong in [
        &["--port", "x"][..],
        &["--set", "nosuch=1"],
        &["--config", "none.toml"],
        &["--host", "0.0.0.0"],
        &["--host", "300.1.1.1"],
        &["--cluster"],
        &["--tls", "--tls-cert", "/nosuch"],
        &["--tls", "--tls-cert", "/nosuch", "--tls-key", "/nosuch"],
    ] {
        for command in ["install", "show"] {
            home.service(&[&[command], wrong].concat()).ended_with(2);
        }
    }
    assert_eq!(home.calls(), [""; 0]);
    assert!(!home.unit().exists());
}

#[test]
fn a_service_keeps_its_unit_if_it_cannot_be_stopped() {
    let home = Home::new("[ \"$2\" != disable ]");
    home.service(&["install"]).ended_with(0);
    home.service(&["uninstall"]).ended_with(1);
    assert!(home.unit().exists());
}
