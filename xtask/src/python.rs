//! The Python package under `sdk/python`: its wheel, its lints and its tests.
//!
//! Tools are installed into a virtual environment under the target directory. If there is no Python
//! that can create one, the tests are skipped with a message; in continuous integration (`CI` is
//! set) that is a failure.

use std::path::{Path, PathBuf};
use std::process::Command;

use crate::cross::Target;
use crate::{Done, cargo, cargo_program, quiet, read, root, run};

fn folder() -> PathBuf {
    root().join("sdk/python")
}

fn target() -> PathBuf {
    root().join("target/python")
}

/// Newer Pythons than the oldest that the package runs on, the newest first.
const NEWER: [&str; 3] = ["3.14", "3.13", "3.12"];

/// Builds the wheel, installs it and runs its tests.
pub(crate) fn test() -> Done {
    match environment() {
        Ok(python) => test_wheel(&python).and_then(|()| test_newest()),
        Err(why) if std::env::var_os("CI").is_some() => Err(format!(
            "the tests of the Python package must run here: {why}"
        )),
        // On a developer's machine, the tools are optional.
        Err(why) => {
            println!("LEFT OUT: the tests of the Python package: {why}");
            Ok(())
        }
    }
}

/// The interpreter of the environment that the wheel was installed into.
pub(crate) fn installed() -> Result<PathBuf, String> {
    let python = environment()?;
    install(&python)?;
    Ok(python)
}

/// Builds the wheel for tests, and installs it.
pub(crate) fn install(python: &Path) -> Done {
    install_as(python, "debug")
}

fn install_as(python: &Path, profile: &str) -> Done {
    let mut build = vec!["build", "--package", "latzero-cli"];
    build.extend((profile == "release").then_some("--release"));
    cargo(&build)?;
    let wheel = wheel_of(&environment()?, profile)?;
    let install = ["install", "--quiet", "--no-index", "--no-deps"];
    run(pip(python)
        .args(install)
        .arg("--force-reinstall")
        .arg(wheel))
}

/// Tests the wheel as an installation would have it, with the program inside it.
fn test_wheel(python: &Path) -> Done {
    install(python)?;
    println!("$ mypy, pyright and pytest, in sdk/python");
    let tool = |name: &str| {
        let mut command = Command::new(python);
        command.args(["-m", name]).current_dir(folder());
        command.env_remove("LATZERO_BIN");
        command
    };
    run(tool("mypy").args(["--package", "latzero"]))?;
    // The stub of the binding must match the binding.
    let stubs = ["--ignore-disjoint-bases", "latzero._latzero"];
    run(tool("mypy.stubtest").args(stubs))?;
    let pyright = || {
        let mut pyright = tool("pyright");
        // It finds the installed packages by the interpreter on the path, and would warn of newer
        // versions of itself.
        let bin = python.parent().unwrap_or(python).to_path_buf();
        let path = std::env::var_os("PATH").unwrap_or_default();
        let path = std::env::join_paths(std::iter::once(bin).chain(std::env::split_paths(&path)));
        pyright.env("PATH", path.unwrap_or_default());
        pyright.env("PYRIGHT_PYTHON_IGNORE_WARNINGS", "1");
        pyright
    };
    // It is a program for Node, which its package installs with npm when it first runs.
    match quiet(pyright().arg("--version")) {
        Ok(_) => {
            run(&mut pyright())?;
            // The types of all public names are declared.
            run(pyright().args(["--ignoreexternal", "--verifytypes", "latzero"]))?;
        }
        Err(why) if std::env::var_os("CI").is_some() => {
            return Err(format!("pyright must run here: {why}"));
        }
        Err(why) => println!("LEFT OUT: the checks by pyright: {why}"),
    }
    run(&mut tool("pytest"))
}

/// Runs the tests on the newest Python of this machine too, with the optimized wheel: the same for
/// all, but not always the same behaviour as the one that is not optimized.
fn test_newest() -> Done {
    let what = "the tests of the Python package on a Python after 3.11";
    let Some(version) = newest() else {
        println!("LEFT OUT: {what}: there is none");
        return Ok(());
    };
    let requirements = folder().join("requirements.txt");
    let python = match environment_with(|| interpreter(version), version, &requirements) {
        Ok(python) => python,
        Err(why) => {
            println!("LEFT OUT: {what}: {why}");
            return Ok(());
        }
    };
    install_as(&python, "release")?;
    println!("$ pytest with Python {version} and the optimized wheel, in sdk/python");
    let mut pytest = Command::new(python);
    pytest.args(["-m", "pytest"]).current_dir(folder());
    run(pytest.env_remove("LATZERO_BIN"))
}

/// The version of the newest Python of this machine, if it is newer than the oldest that the
/// package runs on.
pub(crate) fn newest() -> Option<&'static str> {
    let runs = |version: &str| quiet(interpreter(version).arg("--version")).is_ok();
    NEWER.into_iter().find(|version| runs(version))
}

/// The interpreter of a version, also where pyenv chooses among several.
pub(crate) fn interpreter(version: &str) -> Command {
    let mut python = Command::new(format!("python{version}"));
    python.env("PYENV_VERSION", version);
    python
}

/// Builds the wheel, optimized: for machines like this one, or for another.
pub(crate) fn wheel(target: Option<&Target>) -> Done {
    let wheel = match target {
        None => {
            let python = environment()?;
            cargo(&["build", "--release", "--package", "latzero-cli"])?;
            wheel_of(&python, "release")?
        }
        Some(target) => {
            let program = target.program()?;
            let tag = target.wheel_tag();
            let mut maturin = maturin(&target.python());
            maturin.args(["--release", "--zig", "--target", target.triple()]);
            maturin.args(["--compatibility", &tag]);
            finish(target.with_tools(&mut maturin), &program, target.triple())?
        }
    };
    println!("{}", wheel.display());
    Ok(())
}

/// Builds the wheel for this machine with the program of this profile; returns its path.
pub(crate) fn wheel_of(python: &Path, profile: &str) -> Result<PathBuf, String> {
    let program = root().join("target").join(profile).join("latzero");
    let mut maturin = maturin(python);
    maturin.arg("--interpreter").arg(python);
    if profile == "release" {
        maturin.arg("--release");
    }
    finish(&mut maturin, &program, profile)
}

fn maturin(python: &Path) -> Command {
    let mut maturin = Command::new(python);
    maturin
        .args(["-m", "maturin", "build", "--quiet", "--target-dir"])
        .arg(target())
        .current_dir(folder());
    maturin
}

/// Builds the wheel with this program in it, into a directory of this name; returns its path.
fn finish(maturin: &mut Command, program: &Path, name: &str) -> Result<PathBuf, String> {
    let io = |error: std::io::Error| format!("the wheel: {error}");
    let scripts = folder().join("latzero.data/scripts");
    std::fs::create_dir_all(&scripts).map_err(io)?;
    std::fs::copy(program, scripts.join("latzero")).map_err(io)?;
    let wheels = target().join("wheels").join(name);
    if wheels.exists() {
        std::fs::remove_dir_all(&wheels).map_err(io)?;
    }
    println!("$ maturin build, in sdk/python");
    run(maturin.arg("--out").arg(&wheels))?;
    let built = std::fs::read_dir(&wheels).map_err(io)?.next();
    let built = built.ok_or("maturin made no wheel")?.map_err(io)?;
    Ok(built.path())
}

/// Lints of the binding, which is a workspace of its own. They need no Python.
pub(crate) fn lint() -> Done {
    cargo_in_package(&["fmt", "--check"])?;
    cargo_in_package(&["clippy", "--all-targets", "--", "-D", "warnings"])
}

/// Fixes what the format and lint checks can fix.
pub(crate) fn lint_fix() -> Done {
    let fix = ["--fix", "--allow-dirty", "--allow-staged"];
    cargo_in_package(&[&["clippy", "--all-targets"], &fix[..]].concat())?;
    cargo_in_package(&["fmt"])
}

fn cargo_in_package(args: &[&str]) -> Done {
    println!("$ cargo {}, in sdk/python", args.join(" "));
    // A separate target directory: the dependencies are built differently with and without an
    // interpreter.
    run(Command::new(cargo_program())
        .args(args)
        .env("PYO3_NO_PYTHON", "1")
        .env("PYO3_BUILD_EXTENSION_MODULE", "1")
        .env("CARGO_TARGET_DIR", target().join("lint"))
        .current_dir(folder()))
}

pub(crate) fn pip(python: &Path) -> Command {
    let mut pip = Command::new(python);
    pip.args(["-m", "pip", "--disable-pip-version-check"]);
    pip
}

/// The interpreter of a virtual environment with the tools, created once for each content of
/// `requirements.txt`.
pub(crate) fn environment() -> Result<PathBuf, String> {
    environment_of("tools", &folder().join("requirements.txt"))
}

/// The interpreter of a virtual environment of this name with the packages that `file` lists,
/// created once for each content of that file.
pub(crate) fn environment_of(name: &str, file: &Path) -> Result<PathBuf, String> {
    environment_with(|| Command::new("python3"), name, file)
}

/// Likewise, from an interpreter of choice.
fn environment_with(
    from: impl Fn() -> Command,
    name: &str,
    file: &Path,
) -> Result<PathBuf, String> {
    let dir = target().join(name);
    let python = dir.join("bin/python");
    let wanted = read(file)?;
    let stamp = dir.join("made-of");
    if std::fs::read_to_string(&stamp).is_ok_and(|made| made == wanted) {
        return Ok(python);
    }
    let suits = "import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))";
    quiet(from().args(["-c", suits]))
        .map_err(|_| "it takes Python 3.11 or newer with the module `venv`".to_owned())?;
    println!("$ python -m venv {}", dir.display());
    quiet(from().args(["-m", "venv", "--clear"]).arg(&dir))?;
    let install = ["install", "--quiet", "--requirement"];
    quiet(pip(&python).args(install).arg(file))?;
    std::fs::write(&stamp, wanted).map_err(|error| error.to_string())?;
    Ok(python)
}
