//! Packages for other machines: another processor, another C library, or an older glibc than the
//! one of this machine. The Zig compiler, which pip installs, links for all of them.

use std::path::{Path, PathBuf};
use std::process::Command;

use crate::{cargo_program, python, quiet, root, run};

/// The oldest glibc that the packages run with: that of Debian 10, RHEL 8 and Ubuntu 20.04.
const GLIBC: &str = "2.28";

/// The machines that there are packages for.
const TARGETS: &[&str] = &[
    "x86_64-unknown-linux-gnu",
    "aarch64-unknown-linux-gnu",
    "x86_64-unknown-linux-musl",
    "aarch64-unknown-linux-musl",
];

/// A machine that packages are built for, and the tools for that.
pub(crate) struct Target {
    triple: &'static str,
    tools: PathBuf,
}

impl Target {
    /// The machine of this name, as rustc calls it. Installs what building for it needs.
    pub(crate) fn new(name: &str) -> Result<Target, String> {
        let known = TARGETS.iter().find(|triple| **triple == name);
        let triple = known.ok_or_else(|| format!("the targets are {}", TARGETS.join(", ")))?;
        let python = python::environment_of("cross", &root().join("sdk/cross-requirements.txt"))?;
        quiet(Command::new("rustup").args(["target", "add", triple]))?;
        let tools = python.parent().ok_or("Python lies in a directory")?;
        Ok(Target {
            triple,
            tools: tools.to_owned(),
        })
    }

    pub(crate) fn triple(&self) -> &str {
        self.triple
    }

    pub(crate) fn python(&self) -> PathBuf {
        self.tools.join("python")
    }

    fn is_musl(&self) -> bool {
        self.triple.ends_with("musl")
    }

    /// What wheels for it are called.
    pub(crate) fn wheel_tag(&self) -> String {
        match self.is_musl() {
            true => "musllinux_1_2".into(),
            false => format!("manylinux_{}", GLIBC.replace('.', "_")),
        }
    }

    /// Processor and C library, as Node calls them.
    pub(crate) fn node_names(&self) -> (&str, &str) {
        let cpu = match self.triple.starts_with("x86_64") {
            true => "x64",
            false => "arm64",
        };
        (cpu, if self.is_musl() { "musl" } else { "gnu" })
    }

    /// Sets up a command that finds the tools.
    pub(crate) fn with_tools<'a>(&self, command: &'a mut Command) -> &'a mut Command {
        let path = std::env::var("PATH").unwrap_or_default();
        command.env("PATH", format!("{}:{path}", self.tools.display()))
    }

    /// Builds a package of the workspace in `folder`, optimized; where cargo then puts files.
    pub(crate) fn build(
        &self,
        folder: &Path,
        package: &str,
        into: &Path,
    ) -> Result<PathBuf, String> {
        let target = match self.is_musl() {
            true => self.triple.to_owned(),
            false => format!("{}.{GLIBC}", self.triple),
        };
        let args = [
            "zigbuild",
            "--release",
            "--locked",
            "--package",
            package,
            "--target",
            &target,
        ];
        println!("$ cargo {}, in {}", args.join(" "), folder.display());
        let mut build = Command::new(cargo_program());
        build
            .args(args)
            .env("CARGO_TARGET_DIR", into)
            .current_dir(folder);
        if self.is_musl() && package != "latzero-cli" {
            // A library that is loaded into a program uses the program's C library.
            build.env("RUSTFLAGS", "-C target-feature=-crt-static");
        }
        run(self.with_tools(&mut build))?;
        Ok(into.join(self.triple).join("release"))
    }

    /// Builds the program `latzero`; its path.
    pub(crate) fn program(&self) -> Result<PathBuf, String> {
        let built = self.build(&root(), "latzero-cli", &root().join("target"))?;
        Ok(built.join("latzero"))
    }

    /// The machine that the arguments of a command name; none is this one.
    pub(crate) fn of_args(args: &[&str]) -> Result<Option<Target>, String> {
        match args {
            [] => Ok(None),
            ["--target", name] => Target::new(name).map(Some),
            _ => Err("usage: --target NAME".into()),
        }
    }
}
