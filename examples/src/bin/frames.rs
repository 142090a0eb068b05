//! 1080p frames of floats in one piece of memory that three languages use.
//!
//! This program is the camera: it writes noisy frames into a block. For each frame it calls
//! `denoise`, which `frames/denoise.py` serves with numpy, in place, and then `describe`, which
//! `frames/describe.mjs` serves with typed arrays. No frame goes through a socket: the calls carry
//! the block itself, which every program has mapped.

use std::error::Error;
use std::time::{Duration, Instant};

use latzero::blocking::App;
use serde::Deserialize;

const WIDTH: usize = 1920;
const HEIGHT: usize = 1080;

/// What `describe` answers.
#[derive(Debug, Deserialize)]
struct Description {
    mean: f64,
    noise: f64,
}

fn main() -> Result<(), Box<dyn Error>> {
    let count: u32 = std::env::args().nth(1).map_or(Ok(5), |n| n.parse())?;
    let app = App::connect("latzero://camera?pool=frames")?;
    let frame = app
        .block("frame")
        .layout("<f4", &[HEIGHT as u64, WIDTH as u64])
        .create((WIDTH * HEIGHT * 4) as u64)
        .or_attach()
        .send()?;
    let describe = || {
        app.call("describe", &frame.reference())
            .block(&frame)
            .send::<Description>()
    };
    for n in 1..=count {
        let started = Instant::now();
        let mut draft = frame.write(Duration::from_secs(1))?;
        draft.write(0, &photograph(n))?;
        draft.commit()?;
        let before = describe()?;
        app.call("denoise", &frame.reference())
            .block_writable(&frame)
            .send::<()>()?;
        let after = describe()?;
        println!(
            "frame {n}: mean {:.3}, noise {:.3} -> {:.3}, {:.0} ms",
            after.mean,
            before.noise,
            after.noise,
            started.elapsed().as_secs_f64() * 1000.0
        );
    }
    Ok(())
}

/// A smooth picture that moves, with noise on every pixel.
fn photograph(n: u32) -> Vec<u8> {
    let mut random = n;
    let mut bytes = Vec::with_capacity(WIDTH * HEIGHT * 4);
    for y in 0..HEIGHT {
        for x in 0..WIDTH {
            // Xorshift: fast, and random enough to look like a sensor.
            random ^= random << 13;
            random ^= random >> 17;
            random ^= random << 5;
            let noise = (random >> 8) as f32 / 16_777_216.0 - 0.5;
            let light = ((x + y) as f32 / 300.0 + n as f32 / 10.0).sin() / 4.0 + 0.5;
            bytes.extend_from_slice(&(light + noise * 0.2).to_le_bytes());
        }
    }
    bytes
}
