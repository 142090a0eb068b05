//! The npm package under `sdk/node`: its addon, its tarballs, its lints and its tests.
//!
//! Tools are installed under the target directory. Where there is no Node that can run the package,
//! the tests are left out, and a line says so; in continuous integration (`CI` is set) that is a
//! failure.

use std::path::{Path, PathBuf};
use std::process::Command;

use crate::cross::Target;
use crate::{Done, cargo, cargo_program, leave_out, quiet, read, root, run};

/// The newest Node: the package must run on it, as on the oldest.
const NEWEST: &str = "26.12.1";

fn folder() -> PathBuf {
    root().join("sdk/node")
}

fn target() -> PathBuf {
    root().join("target/node")
}

/// Builds the package and runs its tests, also those of its tarballs.
pub(crate) fn test() -> Done {
    match tools() {
        Ok(tools) => test_with(&tools),
        // A person may do without the tools.
        Err(why) => leave_out("the tests of the Node package", &why),
    }
}

/// Builds the package for tests, where it is found in a checkout.
pub(crate) fn build_for_tests() -> Done {
    cargo(&["build", "--package", "latzero-cli"])?;
    build("debug")
}

/// The directory of the tarballs, for tests.
pub(crate) fn packages() -> Result<PathBuf, String> {
    suits()?;
    build_for_tests()?;
    pack_as("debug")
}

fn test_with(tools: &Path) -> Done {
    let packages = packages()?;
    println!("$ tsc and node --test, in sdk/node");
    run(Command::new("node")
        .arg(tools.join("typescript/bin/tsc"))
        .args(["--project", "test/types", "--typeRoots"])
        .arg(tools.join("@types"))
        .current_dir(folder()))?;
    run_tests("node".as_ref(), &packages)?;
    // The addon is the same for all.
    match newest() {
        Ok(node) => {
            println!("$ node --test with Node {NEWEST}, in sdk/node");
            run_tests(&node, &packages)
        }
        Err(why) => {
            let what = format!("the tests of the Node package on Node {NEWEST}");
            leave_out(&what, &why)
        }
    }
}

fn run_tests(node: &Path, packages: &Path) -> Done {
    run(Command::new(node)
        .arg("--test")
        .args(tests()?)
        .env_remove("LATZERO_BIN")
        .env("NODE_PACKAGES", packages)
        .current_dir(folder()))
}

/// The newest Node, which a package of npm has for each kind of machine.
fn newest() -> Result<PathBuf, String> {
    let dir = target().join("newest").join(NEWEST);
    let cpu = match std::env::consts::ARCH {
        "aarch64" => "arm64",
        _ => "x64",
    };
    let name = format!("node-linux-{cpu}");
    let node = dir.join("node_modules").join(&name).join("bin/node");
    let mut runs = Command::new(&node);
    runs.arg("--version");
    if quiet(&mut runs).is_err() {
        println!("$ npm install {name}@{NEWEST}, in {}", dir.display());
        std::fs::create_dir_all(&dir).map_err(|error| io(&error))?;
        std::fs::write(dir.join("package.json"), "{}").map_err(|error| io(&error))?;
        quiet(
            Command::new("npm")
                .args(["install", "--silent", "--ignore-scripts", "--no-audit"])
                .arg(format!("{name}@{NEWEST}"))
                .current_dir(&dir),
        )?;
        quiet(&mut runs)?;
    }
    Ok(node)
}

/// Makes the reference of the package. What has no documentation is an error.
pub(crate) fn reference(to: &Path) -> Done {
    let tools = tools()?;
    println!("$ typedoc, in sdk/node");
    run(Command::new("node")
        .arg(tools.join("typedoc/bin/typedoc"))
        .args(["--options", "tools/typedoc.json", "--out"])
        .arg(to)
        .current_dir(folder()))
}

fn tests() -> Result<Vec<PathBuf>, String> {
    let entries = std::fs::read_dir(folder().join("test")).map_err(|error| error.to_string())?;
    let paths = entries.filter_map(Result::ok).map(|entry| entry.path());
    let mut tests: Vec<_> = paths
        .filter(|path| path.to_string_lossy().ends_with(".test.mjs"))
        .collect();
    tests.sort();
    Ok(tests)
}

/// Makes the tarballs, optimized: for platforms like this one, or for another.
pub(crate) fn pack(to: Option<&Target>) -> Done {
    suits()?;
    let dir = match to {
        None => {
            cargo(&["build", "--release", "--package", "latzero-cli"])?;
            build("release")?;
            pack_as("release")?
        }
        Some(to) => {
            let program = to.program()?;
            let built = to.build(&folder(), "latzero-node", &target())?;
            let (cpu, libc) = to.node_names();
            let of = format!("{{ cpu: '{cpu}', libc: '{libc}' }}");
            let files = [built.join("liblatzero_node.so"), program];
            pack_files(to.triple(), &of, &files)?
        }
    };
    println!("{}", dir.display());
    Ok(())
}

/// Builds the addon, and puts it and the program where the package finds them in a checkout.
pub(crate) fn build(profile: &str) -> Done {
    println!("$ cargo build, in sdk/node ({profile})");
    let mut build = cargo_in_package(&["build", "--quiet", "--locked"]);
    if profile == "release" {
        build.arg("--release");
    }
    run(&mut build)?;
    let native = folder().join("native");
    std::fs::create_dir_all(&native).map_err(|error| io(&error))?;
    let addon = target().join(profile).join("liblatzero_node.so");
    let program = root().join("target").join(profile).join("latzero");
    for (from, name) in [(addon, "latzero.node"), (program, "latzero")] {
        let to = native.join(name);
        // A running program can't be written over.
        if to.exists() {
            std::fs::remove_file(&to).map_err(|error| io(&error))?;
        }
        std::fs::copy(from, to).map_err(|error| io(&error))?;
    }
    Ok(())
}

fn io(error: &std::io::Error) -> String {
    format!("the npm packages: {error}")
}

/// Makes the tarballs for this platform; the directory where they lie.
fn pack_as(profile: &str) -> Result<PathBuf, String> {
    let native = folder().join("native");
    let files = [native.join("latzero.node"), native.join("latzero")];
    pack_files(profile, "", &files)
}

/// Makes the tarballs of the package and of one platform's, in a directory of this name: its path.
/// `of` is the platform, as `manifest` in `lib/addon.cjs` takes it, and `files` are its addon and
/// its program.
fn pack_files(name: &str, of: &str, files: &[PathBuf; 2]) -> Result<PathBuf, String> {
    println!("$ npm pack, in sdk/node");
    let dir = target().join("packages").join(name);
    if dir.exists() {
        std::fs::remove_dir_all(&dir).map_err(|error| io(&error))?;
    }
    let staged = dir.join("latzero");
    for part in ["lib", "bin"] {
        let to = staged.join(part);
        std::fs::create_dir_all(&to).map_err(|error| io(&error))?;
        for entry in std::fs::read_dir(folder().join(part)).map_err(|error| io(&error))? {
            let from = entry.map_err(|error| io(&error))?.path();
            std::fs::copy(&from, to.join(from.file_name().unwrap_or_default()))
                .map_err(|error| io(&error))?;
        }
    }
    for name in ["package.json", "README.md"] {
        std::fs::copy(folder().join(name), staged.join(name)).map_err(|error| io(&error))?;
    }
    let script = format!(
        "const {{ manifest }} = require('./lib/addon.cjs'); \
        console.log(JSON.stringify(manifest({of}), null, 2))"
    );
    let manifest = output(
        Command::new("node")
            .args(["-e", &script])
            .current_dir(folder()),
    )?;
    let platform = dir.join("platform");
    std::fs::create_dir_all(&platform).map_err(|error| io(&error))?;
    std::fs::write(platform.join("package.json"), manifest).map_err(|error| io(&error))?;
    for (file, name) in files.iter().zip(["latzero.node", "latzero"]) {
        std::fs::copy(file, platform.join(name)).map_err(|error| io(&error))?;
    }
    for package in [&staged, &platform] {
        std::fs::copy(root().join("LICENSE"), package.join("LICENSE"))
            .map_err(|error| io(&error))?;
        quiet(
            Command::new("npm")
                .args(["pack", "--silent", "--pack-destination"])
                .arg(&dir)
                .current_dir(package),
        )?;
    }
    Ok(dir)
}

/// Lints of the binding, which is a workspace of its own. They need no Node.
pub(crate) fn lint() -> Done {
    for args in [
        &["fmt", "--check"][..],
        // It has no tests of its own: those of the package are in `test/`.
        &["clippy", "--", "-D", "warnings"],
    ] {
        println!("$ cargo {}, in sdk/node", args.join(" "));
        run(&mut cargo_in_package(args))?;
    }
    Ok(())
}

/// Fixes what the format and lint checks can fix.
pub(crate) fn lint_fix() -> Done {
    let fix = ["--fix", "--allow-dirty", "--allow-staged"];
    let clippy = [&["clippy"], &fix[..]].concat();
    run(&mut cargo_in_package(&clippy))?;
    run(&mut cargo_in_package(&["fmt"]))
}

fn cargo_in_package(args: &[&str]) -> Command {
    let mut command = Command::new(cargo_program());
    command
        .args(args)
        .env("CARGO_TARGET_DIR", target())
        .current_dir(folder());
    command
}

/// Whether there is a Node that runs the package.
pub(crate) fn suits() -> Done {
    let suits = "process.exit(parseInt(process.versions.node) < 20 ? 1 : 0)";
    let node = quiet(Command::new("node").args(["-e", suits]));
    let npm = quiet(Command::new("npm").arg("--version"));
    node.and(npm)
        .map_err(|_| "it takes Node 20 or newer and npm".to_owned())
}

/// The modules of the tools, installed once for each content of their lock file.
fn tools() -> Result<PathBuf, String> {
    suits()?;
    let dir = target().join("tools");
    let modules = dir.join("node_modules");
    let lock = folder().join("tools/package-lock.json");
    let wanted = read(&lock)?;
    let stamp = dir.join("made-of");
    if std::fs::read_to_string(&stamp).is_ok_and(|made| made == wanted) {
        return Ok(modules);
    }
    println!("$ npm ci, in {}", dir.display());
    std::fs::create_dir_all(&dir).map_err(|error| io(&error))?;
    for name in ["package.json", "package-lock.json"] {
        std::fs::copy(folder().join("tools").join(name), dir.join(name))
            .map_err(|error| io(&error))?;
    }
    let install = [
        "ci",
        "--silent",
        "--ignore-scripts",
        "--no-audit",
        "--no-fund",
    ];
    quiet(Command::new("npm").args(install).current_dir(&dir))?;
    std::fs::write(&stamp, wanted).map_err(|error| io(&error))?;
    Ok(modules)
}

fn output(command: &mut Command) -> Result<Vec<u8>, String> {
    let output = command.output().map_err(|error| io(&error))?;
    match output.status.success() {
        true => Ok(output.stdout),
        false => Err(format!(
            "{command:?}: {}",
            String::from_utf8_lossy(&output.stderr)
        )),
    }
}
