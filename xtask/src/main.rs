//! Checks, simulation, benchmarks and generated files: `cargo xtask help`.

fn main() {}
