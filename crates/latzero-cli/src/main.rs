//! The program latzero.

fn main() {}
