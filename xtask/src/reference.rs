//! The reference of the public names in each language, made of what their sources say of them.
//!
//! It is written to `target/reference`. What a tool warns of is an error, also a public name of the
//! Node package that nothing is said of; for the crate, `missing_docs` sees to that.

use std::path::Path;
use std::process::Command;

use crate::{Done, cargo_program, node, python, root, run};

/// What pdoc takes `bytes` for in a class with a property of that name.
const NOT_A_FAULT: &str = "ignore:Error parsing type annotation bytes";

/// The tool for Python. It is installed beside the reference, so that the environment of the tests
/// stays as it is.
const PDOC: &str = "pdoc==16.0.0";

pub(crate) fn build() -> Done {
    let dir = root().join("target/reference");
    if dir.exists() {
        std::fs::remove_dir_all(&dir).map_err(|error| error.to_string())?;
    }
    std::fs::create_dir_all(&dir).map_err(|error| error.to_string())?;
    of_python(&dir.join("python"))?;
    node::reference(&dir.join("node"))?;
    rust(&dir.join("rust"))?;
    println!("{}", dir.display());
    Ok(())
}

fn rust(to: &Path) -> Done {
    println!("$ cargo doc --package latzero");
    let made = root().join("target/doc");
    // What other packages left there is no part of it.
    if made.exists() {
        std::fs::remove_dir_all(&made).map_err(|error| error.to_string())?;
    }
    run(Command::new(cargo_program())
        .args(["doc", "--quiet", "--no-deps", "--package", "latzero"])
        .env("RUSTDOCFLAGS", "--deny warnings")
        .current_dir(root()))?;
    std::fs::rename(&made, to).map_err(|error| error.to_string())
}

fn of_python(to: &Path) -> Done {
    let python = python::installed()?;
    println!("$ pdoc latzero");
    let tools = root().join("target/python/pdoc").join(PDOC);
    if !tools.exists() {
        let install = ["-m", "pip", "install", "--quiet", "--target"];
        run(Command::new(&python).args(install).arg(&tools).arg(PDOC))?;
    }
    run(Command::new(&python)
        .args([
            "-W",
            "error",
            "-W",
            NOT_A_FAULT,
            "-m",
            "pdoc",
            "--output-directory",
        ])
        .arg(to)
        // With all that it contains, such as `latzero.aio`.
        .arg("latzero")
        .env("PYTHONPATH", tools))
}
