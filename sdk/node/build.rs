//! Tells the linker what Node provides itself.

fn main() {
    napi_build::setup();
}
