//! A client process for tests to kill: sends each line of its input as a message to the Unix socket
//! in its first argument, and prints each received message as a line.

use std::io::{BufRead, Read, Write};
use std::os::unix::net::UnixStream;

use latzero_protocol::frame::{self, Accept};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let socket = std::env::args()
        .nth(1)
        .ok_or("the first argument is a socket")?;
    let Ok(mut stream) = UnixStream::connect(socket) else {
        // The server was killed just before.
        return Ok(());
    };
    let reading = stream.try_clone()?;
    std::thread::spawn(move || {
        // The process is no longer needed once the server closes the connection or the output is
        // closed.
        let _ = print_messages(reading);
        std::process::exit(0);
    });
    for line in std::io::stdin().lock().lines() {
        let line = line?;
        let mut out = Vec::new();
        frame::append(&mut out, |out| out.extend_from_slice(line.as_bytes()));
        if stream.write_all(&out).is_err() {
            // The other thread still prints what the server sent.
            std::thread::park();
        }
    }
    Ok(())
}

fn print_messages(mut stream: UnixStream) -> std::io::Result<()> {
    let accept = Accept {
        max_frame: 1 << 30,
        attachments: true,
    };
    let (mut received, mut buf) = (Vec::new(), [0; 65536]);
    let mut out = std::io::stdout();
    loop {
        while let Some((frame, used)) =
            frame::decode(&received, accept).map_err(std::io::Error::other)?
        {
            out.write_all(frame.json)?;
            out.write_all(b"\n")?;
            out.flush()?;
            received.drain(..used);
        }
        match stream.read(&mut buf)? {
            0 => return Ok(()),
            n => received.extend_from_slice(&buf[..n]),
        }
    }
}
