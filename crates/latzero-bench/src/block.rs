//! Benchmarks of memory blocks, each compared with the same operation of the kernel and the
//! processor.
//! This process writes, and a child process reads. The time of a version is measured from before
//! its first byte is copied until the sleeping reader has seen it. A plain futex on a plain mapping
//! is measured alternately. If Redis is installed, it moves the same mebibyte with `SET` and `GET`
//! over its Unix socket, and the same futex announces it. With `--before`, the block operations of
//! two servers are compared instead.
//! what the servers do is compared instead.

mod before;

use crate::failure::{During, Failure};
use crate::machine::Machine;
use crate::placement::Placement;
use crate::process::{self, Process, READY_WAIT, end_with_parent};
use crate::report::median;
use crate::results::{Finding, Results, Sheet, Unit};
use crate::server::Running;
use crate::stream::Transport;
use latzero::blocking::{App, Block};
use latzero_shm::bare::Bare;
use serde::{Deserialize, Serialize};
use serde_json::json;
use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

const MIB: usize = 1 << 20;
const GIB: u64 = 1 << 30;
const WAKE_BYTES: usize = 64 * 1024;

/// The size of copies over TCP: one version that fits into a frame, for example a picture of 1080
/// by 1920 numbers.
const COPIED_BYTES: usize = 8 * MIB;

const WAIT: Duration = Duration::from_secs(20);

/// How long a reader has to fall asleep before it is woken.
const TO_SLEEP: Duration = Duration::from_micros(200);

const ATTACH_RATIO_MAX: f64 = 3.0;
const WAKE_RATIO_MAX: f64 = 1.25;
const READ_RATIO_MIN: f64 = 0.8;
const SMALL_WRITE_RATIO_MAX: f64 = 2.0;
const REDIS_RATIO_MIN: f64 = 10.0;
const COPY_GB_MIN: f64 = 1.0;

/// By how many MiB attachments may change the server's resident memory.
const GROWTH_MIB_MAX: f64 = 1.0;

#[derive(Debug, Default, clap::Args)]
pub(crate) struct BlockArgs {
    /// Few samples and small blocks: shows that it works, measures nothing
    #[arg(long)]
    pub(crate) quick: bool,
    /// Print the results as JSON
    #[arg(long)]
    pub(crate) json: bool,
    /// Samples of each kind [default: 2000]
    #[arg(long, value_parser = clap::value_parser!(u64).range(1..=1_000_000))]
    samples: Option<u64>,
    /// Compare only the server's block operations, with those of this other `latzero` program
    #[arg(long, value_name = "PROGRAM")]
    before: Option<PathBuf>,
}

#[derive(Debug, clap::Args)]
pub(crate) struct RoleArgs {
    /// The server's Unix socket
    #[arg(long)]
    socket: String,
    /// The directory of the bare files
    #[arg(long)]
    scratch: PathBuf,
    #[arg(long)]
    samples: u64,
    /// The socket of Redis
    #[arg(long)]
    redis: Option<PathBuf>,
}

/// Times measured by the child, in microseconds.
#[derive(Debug, Default, Serialize, Deserialize)]
struct Woken {
    bare: Vec<f64>,
    block: Vec<f64>,
}

/// The clock that all processes share, in nanoseconds (clock_gettime(2), CLOCK_MONOTONIC).
fn now_ns() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    u64::try_from(now.tv_sec).unwrap_or(0) * 1_000_000_000 + u64::try_from(now.tv_nsec).unwrap_or(0)
}

fn app(url: &str) -> Result<App, Failure> {
    App::connect(url).map_err(|error| Failure::said(format!("connect to {url}: {error}")))
}

fn did<T>(what: &str, result: Result<T, latzero::Error>) -> Result<T, Failure> {
    result.map_err(|error| Failure::said(format!("{what}: {error}")))
}

fn bare<T>(result: Result<T, latzero_shm::Fault>) -> Result<T, Failure> {
    result.map_err(|fault| Failure::said(format!("the bare mapping: {fault}")))
}

/// Creates a file for bare mappings, fully allocated.
fn bare_file(path: &Path, bytes: u64) -> Result<(), Failure> {
    let file = File::create(path).during(format!("make {}", path.display()))?;
    let flags = rustix::fs::FallocateFlags::empty();
    rustix::fs::fallocate(&file, flags, 0, bytes + 4096)
        .map_err(std::io::Error::from)
        .during(format!("allocate {}", path.display()))
}

/// A temporary directory, in memory if the system has one there.
fn scratch() -> Result<tempfile::TempDir, Failure> {
    let memory = Path::new("/dev/shm");
    let made = match memory.is_dir() {
        true => tempfile::tempdir_in(memory),
        false => tempfile::tempdir(),
    };
    made.during("make a directory")
}

/// Runs the benchmark.
pub(crate) fn run(args: &BlockArgs) -> Result<Results, Failure> {
    let machine = Machine::observe();
    machine.warn_of_debug_build(args.quick);
    if let Some(before) = &args.before {
        let sheet = Sheet {
            bench: "block",
            about: String::new(),
            quick: args.quick,
            machine,
            findings: Vec::new(),
            rounds: json!({}),
        };
        return before::run(args, before, sheet);
    }
    let samples = args.samples.unwrap_or(if args.quick { 20 } else { 2000 });
    let large = if args.quick { 16 * MIB as u64 } else { GIB };
    let server = Running::start(&[format!("limits.memory_bytes_max={}", 8 * GIB)])?;
    let url = |name: &str, via: Transport| match via {
        Transport::Unix => format!("latzero://{name}?socket={}", server.address(via)),
        Transport::Tcp => format!("latzero://{name}@{}", server.address(via)),
    };
    let app = app(&url("bench", Transport::Unix))?;
    let scratch = scratch()?;

    let mut findings = Vec::new();
    let mut rounds = serde_json::Map::new();

    eprintln!("attach");
    let placement = Placement::steadiest();
    let Attached {
        attach_us,
        bare_us,
        grown,
    } = placement.run(|| attach(large, samples.min(500)))?;
    findings.extend(pair(
        &format!(
            "attach {} and read a byte, {}",
            size(large),
            placement.describe_one()
        ),
        "open, mmap and read a byte",
        &attach_us,
        &bare_us,
        |ratio| ratio.expect_at_most(ATTACH_RATIO_MAX),
    ));
    findings.push(
        Finding::new(
            "the server's memory grew by",
            grown as f64 / MIB as f64,
            Unit::Mebibytes,
        )
        .expect_at_most(GROWTH_MIB_MAX),
    );
    rounds.insert(
        "attach_us".into(),
        json!({"bare": bare_us, "block": attach_us}),
    );

    eprintln!("small writes");
    let big = did("make a large block", app.block("big").create(large).send())?;
    let small = did("make a block", app.block("small").create(MIB as u64).send())?;
    let (mut large_us, mut small_us) = (Vec::new(), Vec::new());
    {
        let writers = [writer(&big)?, writer(&small)?];
        for round in 0..20u64 {
            for (writer, (times, size)) in writers
                .iter()
                .zip([(&mut large_us, large), (&mut small_us, MIB as u64)])
            {
                let writes = samples.min(1000);
                let begin = Instant::now();
                for n in 0..writes {
                    // The same offsets in every round, spread over the whole block.
                    let offset = n * 0x9e37_79b9 % (size - 100);
                    did("write", writer.write(offset, &[round as u8; 100]))?;
                }
                // In the first round, the kernel allocates each page when it is touched.
                if round > 1 {
                    times.push(us(begin) / writes as f64);
                }
            }
        }
    }
    findings.extend(pair(
        &format!("write 100 B into {}", size(large)),
        "write 100 B into 1 MiB",
        &large_us,
        &small_us,
        |ratio| ratio.expect_at_most(SMALL_WRITE_RATIO_MAX),
    ));
    rounds.insert(
        "small_write_us".into(),
        json!({"large": large_us, "small": small_us}),
    );
    drop(big);

    eprintln!("snapshot reads");
    did("fill a block", small.write_at(0, &vec![7; MIB]))?;
    let (mut read_us, mut memcpy_us) = (Vec::new(), Vec::new());
    let (source, mut target) = (vec![7u8; MIB], vec![0u8; MIB]);
    for _ in 0..samples {
        let begin = Instant::now();
        target.copy_from_slice(std::hint::black_box(&source));
        std::hint::black_box(&target);
        memcpy_us.push(us(begin));
        let begin = Instant::now();
        did("read", small.read_into(0, &mut target))?;
        std::hint::black_box(&target);
        read_us.push(us(begin));
    }
    let (read, memcpy) = (middle(&read_us), middle(&memcpy_us));
    let gb = |us: f64| MIB as f64 / us / 1e3;
    findings.push(Finding::new(
        "snapshot read of 1 MiB",
        gb(read),
        Unit::GigabytesPerSecond,
    ));
    findings.push(Finding::new(
        "memcpy of 1 MiB",
        gb(memcpy),
        Unit::GigabytesPerSecond,
    ));
    findings.push(
        Finding::new("… snapshot read ÷ memcpy", memcpy / read, Unit::Ratio)
            .expect_at_least(READ_RATIO_MIN),
    );
    rounds.insert(
        "read_us".into(),
        json!({"block": read_us, "memcpy": memcpy_us}),
    );

    eprintln!("wake-ups and transfers");
    let redis = Redis::start()?;
    let two = between_processes(&app, &server, scratch.path(), samples, redis.as_ref())?;
    findings.extend(pair(
        "publish 64 KiB until a sleeping reader sees it",
        "memcpy 64 KiB and wake by a bare futex",
        &two.woken.block,
        &two.woken.bare,
        |ratio| ratio.expect_at_most(WAKE_RATIO_MAX),
    ));
    findings.push(Finding::new(
        "1 MiB written here, read there: block",
        middle(&two.block_us),
        Unit::Micros,
    ));
    if !two.redis_us.is_empty() {
        let redis = middle(&two.redis_us);
        findings.push(Finding::new("… Redis SET and GET", redis, Unit::Micros));
        findings.push(
            Finding::new(
                "… Redis ÷ block",
                redis / middle(&two.block_us),
                Unit::Ratio,
            )
            .expect_at_least(REDIS_RATIO_MIN),
        );
    }
    rounds.insert("two_processes_us".into(), json!({
        "wake_bare": two.woken.bare, "wake_block": two.woken.block, "transfer_block": two.block_us,
        "transfer_redis": two.redis_us,
    }));

    eprintln!("copies over TCP");
    let tcp = self::app(&url("copies", Transport::Tcp))?;
    let bytes = vec![5u8; COPIED_BYTES];
    let copied = did(
        "make a block",
        tcp.block("copied").create(bytes.len() as u64).send(),
    )?;
    let (mut write_us, mut read_us) = (Vec::new(), Vec::new());
    for _ in 0..samples.min(100) {
        let begin = Instant::now();
        did("write by copies", copied.write_at(0, &bytes))?;
        write_us.push(us(begin));
        let begin = Instant::now();
        did("read by copies", copied.read())?;
        read_us.push(us(begin));
    }
    for (name, times) in [("write", &write_us), ("read", &read_us)] {
        let rate = bytes.len() as f64 / middle(times) / 1e3;
        findings.push(
            Finding::new(
                format!("copies over TCP, {}: {name}", size(bytes.len() as u64)),
                rate,
                Unit::GigabytesPerSecond,
            )
            .expect_at_least(COPY_GB_MIN),
        );
    }
    rounds.insert("tcp_us".into(), json!({"write": write_us, "read": read_us}));

    let about = match &redis {
        Some(_) => format!("memory blocks, {samples} samples of each kind; medians"),
        None => format!(
            "memory blocks, {samples} samples of each kind; medians; redis-server is not installed"
        ),
    };
    let sheet = Sheet {
        bench: "block",
        about,
        quick: args.quick,
        machine,
        findings,
        rounds: rounds.into(),
    };
    Ok(sheet.to_results())
}

fn us(begin: Instant) -> f64 {
    begin.elapsed().as_secs_f64() * 1e6
}

fn middle(times: &[f64]) -> f64 {
    median(times.to_vec()).expect("there is a sample")
}

fn size(bytes: u64) -> String {
    match bytes {
        GIB => "1 GiB".into(),
        _ => format!("{} MiB", bytes / MIB as u64),
    }
}

/// The cost of attaching.
struct Attached {
    attach_us: Vec<f64>,
    bare_us: Vec<f64>,
    /// Bytes by which the server's resident memory grew.
    grown: u64,
}

/// Attaches a block of `large` bytes repeatedly, alternating with bare mappings of such a file,
/// with a server of its own.
fn attach(large: u64, samples: u64) -> Result<Attached, Failure> {
    let server = Running::start(&[format!("limits.memory_bytes_max={}", 8 * GIB)])?;
    let address = server.address(Transport::Unix);
    let app = app(&format!("latzero://bench?socket={address}"))?;
    let scratch = scratch()?;
    let made = did("make a large block", app.block("big").create(large).send())?;
    let file = scratch.path().join("attach");
    bare_file(&file, large)?;
    let before = server.memory()?;
    let (mut bare_us, mut attach_us) = (Vec::new(), Vec::new());
    for _ in 0..samples {
        let begin = Instant::now();
        let mapped = Bare::open(&file, usize::try_from(large).unwrap_or(usize::MAX))
            .during("map a bare file")?;
        std::hint::black_box(mapped.byte(0));
        bare_us.push(us(begin));
        drop(mapped);
        let begin = Instant::now();
        let block = did("attach", app.block("big").attach())?;
        let mut byte = [0];
        did("read", block.read_into(0, &mut byte))?;
        attach_us.push(us(begin));
        // Detaching is not measured: it is done when this is answered.
        drop(block);
        did("ping", app.ping())?;
    }
    let grown = server.memory()?.since(before).resident;
    drop(made);
    Ok(Attached {
        attach_us,
        bare_us,
        grown,
    })
}

/// Reports two times and their ratio.
fn pair(
    name: &str,
    beside: &str,
    times: &[f64],
    others: &[f64],
    bound: impl FnOnce(Finding) -> Finding,
) -> [Finding; 3] {
    let (time, other) = (middle(times), middle(others));
    [
        Finding::new(name, time, Unit::Micros),
        Finding::new(beside, other, Unit::Micros),
        bound(Finding::new(
            format!("… {name} ÷ {beside}"),
            time / other,
            Unit::Ratio,
        )),
    ]
}

fn writer(block: &Block) -> Result<latzero::blocking::BlockWriter, Failure> {
    let mut writer = did("lock", block.writer(WAIT))?;
    writer.tell_server(false);
    Ok(writer)
}

struct Two {
    woken: Woken,
    block_us: Vec<f64>,
    redis_us: Vec<f64>,
}

/// Measures everything that needs a second process.
fn between_processes(
    app: &App,
    server: &Running,
    scratch: &Path,
    samples: u64,
    redis: Option<&Redis>,
) -> Result<Two, Failure> {
    let wake = did(
        "make a block",
        app.block("wake").create(WAKE_BYTES as u64).send(),
    )?;
    let move_ = did("make a block", app.block("move").create(MIB as u64).send())?;
    for (name, bytes) in [("bare", WAKE_BYTES), ("ack", 0), ("go", 0)] {
        bare_file(&scratch.join(name), bytes as u64)?;
    }
    let open = |name: &str, bytes| Bare::open(&scratch.join(name), bytes).during("map a bare file");
    let (plain, ack, go) = (open("bare", WAKE_BYTES)?, open("ack", 0)?, open("go", 0)?);
    let mut command = process::own_command()?;
    command
        .arg("block-role")
        .args(["--socket", server.address(Transport::Unix)])
        .arg("--scratch")
        .arg(scratch)
        .args(["--samples", &samples.to_string()]);
    if let Some(redis) = redis {
        command.arg("--redis").arg(&redis.socket);
    }
    let seen = bare(ack.word())?;
    let child = Process::spawn("the reader", &mut command, Placement::Free)?;
    let mut acknowledged = seen;
    let mut wait_for_ack = || -> Result<(), Failure> {
        bare(ack.wait(acknowledged))?;
        acknowledged = acknowledged.wrapping_add(1);
        Ok(())
    };
    let mut bytes = vec![1u8; WAKE_BYTES];
    let writers = [writer(&wake)?, writer(&move_)?];
    for _ in 0..samples {
        for is_bare in [true, false] {
            wait_for_ack()?;
            std::thread::sleep(TO_SLEEP);
            bytes[..8].copy_from_slice(&now_ns().to_le_bytes());
            if is_bare {
                bare(plain.publish(&bytes))?;
            } else {
                did("publish", writers[0].write(0, &bytes))?;
            }
        }
    }
    let mut mebibyte = vec![2u8; MIB];
    let mut client = redis.map(Redis::connect).transpose()?;
    let (mut block_us, mut redis_us) = (Vec::new(), Vec::new());
    for n in 0..samples {
        mebibyte[0] = n as u8;
        wait_for_ack()?;
        std::thread::sleep(TO_SLEEP);
        let begin = Instant::now();
        did("publish", writers[1].write(0, &mebibyte))?;
        wait_for_ack()?;
        block_us.push(us(begin));
        if let Some(client) = &mut client {
            bare(go.bump())?;
            wait_for_ack()?;
            std::thread::sleep(TO_SLEEP);
            let begin = Instant::now();
            client.set(&mebibyte)?;
            bare(go.bump())?;
            wait_for_ack()?;
            redis_us.push(us(begin));
        }
        // Lets the child start the next round.
        bare(go.bump())?;
    }
    let woken = child.wait_for(READY_WAIT, |line| serde_json::from_str(line).ok())?;
    Ok(Two {
        woken,
        block_us,
        redis_us,
    })
}

/// Runs the reader process.
pub(crate) fn play(args: &RoleArgs) -> Result<(), Failure> {
    end_with_parent()?;
    let app = app(&format!("latzero://reader?socket={}", args.socket))?;
    let wake = did("attach", app.block("wake").attach())?;
    let move_ = did("attach", app.block("move").attach())?;
    let open =
        |name: &str, bytes| Bare::open(&args.scratch.join(name), bytes).during("map a bare file");
    let (plain, ack, go) = (open("bare", WAKE_BYTES)?, open("ack", 0)?, open("go", 0)?);
    let mut woken = Woken::default();
    let since = |stamp: [u8; 8]| (now_ns() - u64::from_le_bytes(stamp)) as f64 / 1e3;
    for _ in 0..args.samples {
        let seen = bare(plain.word())?;
        bare(ack.bump())?;
        bare(plain.wait(seen))?;
        let mut stamp = [0; 8];
        for (n, byte) in stamp.iter_mut().enumerate() {
            *byte = plain.byte(n);
        }
        woken.bare.push(since(stamp));

        let seen = wake.version();
        bare(ack.bump())?;
        did("wait", wake.wait_for(seen, WAIT))?;
        did("read", wake.read_into(0, &mut stamp))?;
        woken.block.push(since(stamp));
    }
    let mut mebibyte = vec![0; MIB];
    let mut client = args.redis.as_deref().map(Redis::connect_to).transpose()?;
    for n in 0..args.samples {
        let seen = move_.version();
        let mut go_seen = bare(go.word())?;
        bare(ack.bump())?;
        did("wait", move_.wait_for(seen, WAIT))?;
        did("read", move_.read_into(0, &mut mebibyte))?;
        bare(ack.bump())?;
        if mebibyte[0] != n as u8 {
            return Err(Failure::said(
                "the block holds other bytes than were written",
            ));
        }
        if let Some(client) = &mut client {
            bare(go.wait(go_seen))?;
            go_seen = bare(go.word())?;
            bare(ack.bump())?;
            bare(go.wait(go_seen))?;
            go_seen = bare(go.word())?;
            client.get(&mut mebibyte)?;
            bare(ack.bump())?;
        }
        bare(go.wait(go_seen))?;
    }
    println!("{}", serde_json::to_string(&woken).expect("plain numbers"));
    Ok(())
}

/// A Redis server without persistence, on its own socket.
struct Redis {
    socket: PathBuf,
    _process: Process,
    _scratch: tempfile::TempDir,
}

/// A connection that speaks the necessary part of RESP.
struct Client(UnixStream);

impl Redis {
    /// Starts Redis; `None` if the program is not installed.
    fn start() -> Result<Option<Redis>, Failure> {
        let program = Path::new("redis-server");
        if Command::new(program).arg("--version").output().is_err() {
            return Ok(None);
        }
        let scratch = tempfile::tempdir().during("make a directory for Redis")?;
        let socket = scratch.path().join("redis.sock");
        let mut command = process::tied_command(program)?;
        command
            .args([
                "--port",
                "0",
                "--save",
                "",
                "--appendonly",
                "no",
                "--unixsocket",
            ])
            .arg(&socket)
            .arg("--dir")
            .arg(scratch.path());
        let process = Process::spawn("Redis", &mut command, Placement::Free)?;
        process.wait_for(READY_WAIT, |line| {
            line.to_lowercase()
                .contains("ready to accept")
                .then_some(())
        })?;
        Ok(Some(Redis {
            socket,
            _process: process,
            _scratch: scratch,
        }))
    }

    fn connect(&self) -> Result<Client, Failure> {
        Redis::connect_to(&self.socket)
    }

    fn connect_to(socket: &Path) -> Result<Client, Failure> {
        UnixStream::connect(socket)
            .map(Client)
            .during("connect to Redis")
    }
}

impl Client {
    fn set(&mut self, bytes: &[u8]) -> Result<(), Failure> {
        let mut request =
            format!("*3\r\n$3\r\nSET\r\n$1\r\nm\r\n${}\r\n", bytes.len()).into_bytes();
        request.extend_from_slice(bytes);
        request.extend_from_slice(b"\r\n");
        self.0.write_all(&request).during("write to Redis")?;
        let mut reply = [0; 5];
        self.0.read_exact(&mut reply).during("read from Redis")?;
        match &reply {
            b"+OK\r\n" => Ok(()),
            _ => Err(Failure::said("Redis refused a SET")),
        }
    }

    fn get(&mut self, bytes: &mut [u8]) -> Result<(), Failure> {
        self.0
            .write_all(b"*2\r\n$3\r\nGET\r\n$1\r\nm\r\n")
            .during("write to Redis")?;
        let mut head = vec![0; format!("${}\r\n", bytes.len()).len()];
        self.0.read_exact(&mut head).during("read from Redis")?;
        self.0.read_exact(bytes).during("read from Redis")?;
        self.0.read_exact(&mut [0; 2]).during("read from Redis")
    }
}
