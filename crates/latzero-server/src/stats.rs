//! Statistics, and the reply to `stats`.
//!
//! Each loop counts separately and adds its counters once per batch, so that counting a message
//! involves no shared state.

use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering::Relaxed};

use hdrhistogram::Histogram;
use latzero_fabric::effects::Counters;
use latzero_fabric::{Count, Time};
use latzero_protocol::Code;
use serde_json::{Map, Value, json};

use crate::machine_limits::MachineLimits;

/// Seconds over which a rate is an average.
const RATE_SECONDS: u64 = 10;

/// Bytes and frames of one batch.
#[derive(Debug, Default)]
pub(crate) struct Traffic {
    pub(crate) frames_in: u64,
    pub(crate) bytes_in: u64,
    pub(crate) bytes_out: u64,
}

struct Totals {
    counts: [u64; Count::KINDS],
    codes: Vec<u64>,
    ended: u64,
    failed: u64,
    frames_in: u64,
    bytes_in: u64,
    bytes_out: u64,
    response_times: Histogram<u64>,
    /// Calls that ended in each of the last seconds, by the second's number.
    per_second: [(u64, u64); RATE_SECONDS as usize + 1],
}

/// The server's counts.
pub(crate) struct Stats {
    totals: Mutex<Totals>,
    pub(crate) calls_in_flight: AtomicU64,
    pub(crate) connections: AtomicUsize,
    pub(crate) connections_tcp: AtomicUsize,
    pub(crate) connections_unix: AtomicUsize,
    pub(crate) connections_accepted: AtomicU64,
    pub(crate) connections_refused: AtomicU64,
    pub(crate) connections_stalled: AtomicU64,
    pub(crate) connections_silent: AtomicU64,
    pub(crate) messages_lost: AtomicU64,
    /// Connections whose sockets do not accept the data that waits for them.
    pub(crate) slow_readers: AtomicUsize,
}

impl Stats {
    pub(crate) fn new() -> Self {
        // One microsecond to a day at two significant digits; longer times count as a day.
        let response_times =
            Histogram::new_with_bounds(1, 86_400_000_000, 2).expect("the bounds are in order");
        Stats {
            totals: Mutex::new(Totals {
                counts: [0; Count::KINDS],
                codes: vec![0; Code::ALL.len()],
                ended: 0,
                failed: 0,
                frames_in: 0,
                bytes_in: 0,
                bytes_out: 0,
                response_times,
                per_second: Default::default(),
            }),
            calls_in_flight: AtomicU64::new(0),
            connections: AtomicUsize::new(0),
            connections_tcp: AtomicUsize::new(0),
            connections_unix: AtomicUsize::new(0),
            connections_accepted: AtomicU64::new(0),
            connections_refused: AtomicU64::new(0),
            connections_stalled: AtomicU64::new(0),
            connections_silent: AtomicU64::new(0),
            messages_lost: AtomicU64::new(0),
            slow_readers: AtomicUsize::new(0),
        }
    }

    /// Counts calls that started, before their handlers get them: a server that drains ends when no
    /// call is in flight.
    pub(crate) fn add_started(&self, tally: &mut Counters) {
        let started = std::mem::take(&mut tally.started);
        if started > 0 {
            self.calls_in_flight.fetch_add(started, Relaxed);
        }
    }

    /// Adds the counters of a loop.
    pub(crate) fn add(&self, now: Time, tally: &mut Counters, traffic: &mut Traffic) {
        let is_empty = traffic.frames_in == 0 && traffic.bytes_out == 0;
        if is_empty && tally.ended.is_empty() && tally.refused.is_empty() && tally.started == 0 {
            return;
        }
        let mut totals = self
            .totals
            .lock()
            .expect("no panic happens under the statistics' lock");
        for (total, count) in totals.counts.iter_mut().zip(&mut tally.counts) {
            *total += std::mem::take(count);
        }
        let second = now.0 / 1_000_000;
        let slot = &mut totals.per_second[(second % (RATE_SECONDS + 1)) as usize];
        if slot.0 != second {
            *slot = (second, 0);
        }
        let ended = tally.ended.len() as u64;
        slot.1 += ended;
        totals.ended += ended;
        self.add_started(tally);
        self.calls_in_flight.fetch_sub(ended, Relaxed);
        for end in tally.ended.drain(..) {
            totals.failed += u64::from(end.failed);
            match end.code {
                Some(code) => totals.codes[code as usize] += 1,
                None => {
                    let us = end.ended.since(end.started).as_micros() as u64;
                    totals.response_times.saturating_record(us.max(1));
                }
            }
        }
        for code in tally.refused.drain(..) {
            totals.codes[code as usize] += 1;
        }
        totals.frames_in += std::mem::take(&mut traffic.frames_in);
        totals.bytes_in += std::mem::take(&mut traffic.bytes_in);
        totals.bytes_out += std::mem::take(&mut traffic.bytes_out);
    }

    /// The parts `transport` and `triggers`, and `errors`, as JSON.
    pub(crate) fn to_json(&self, now: Time) -> Value {
        let totals = self
            .totals
            .lock()
            .expect("no panic happens under the statistics' lock");
        let second = now.0 / 1_000_000;
        // The running second is not over; the ones before it count.
        let window = RATE_SECONDS.min(second).max(1);
        let recent = totals
            .per_second
            .iter()
            .filter(|(s, _)| *s < second && *s + window >= second);
        let rate = recent.map(|(_, n)| *n).sum::<u64>() as f64 / window as f64;
        let times = &totals.response_times;
        let errors: Map<String, Value> = Code::ALL
            .iter()
            .zip(&totals.codes)
            .filter(|(_, n)| **n > 0)
            .map(|(code, n)| (code.as_str().to_owned(), json!(n)))
            .collect();
        let count = |what: Count| totals.counts[what as usize];
        json!({
            "transport": {
                "connections": self.connections.load(Relaxed),
                "connections_tcp": self.connections_tcp.load(Relaxed),
                "connections_unix": self.connections_unix.load(Relaxed),
                "connections_accepted": self.connections_accepted.load(Relaxed),
                "connections_refused": self.connections_refused.load(Relaxed),
                "connections_closed_stalled": self.connections_stalled.load(Relaxed),
                "connections_closed_silent": self.connections_silent.load(Relaxed),
                "frames_in": totals.frames_in,
                "bytes_in": totals.bytes_in,
                "bytes_out": totals.bytes_out,
                "slow_readers": self.slow_readers.load(Relaxed),
                "messages_lost": self.messages_lost.load(Relaxed),
            },
            "triggers": {
                "calls": totals.ended + self.calls_in_flight.load(Relaxed),
                "calls_in_flight": self.calls_in_flight.load(Relaxed),
                "calls_per_second": (rate * 10.0).round() / 10.0,
                "handler_errors": totals.failed,
                "emits": count(Count::Emit),
                "emits_delivered": count(Count::Delivered),
                "partials": count(Count::Partial),
                "late_responses": count(Count::LateResponse),
                "foreign_responses": count(Count::ForeignResponse),
                "stray_references": count(Count::StrayReference),
                "response_time_us": {
                    "count": times.len(),
                    "mean": (times.mean() * 10.0).round() / 10.0,
                    "p50": times.value_at_quantile(0.5),
                    "p90": times.value_at_quantile(0.9),
                    "p99": times.value_at_quantile(0.99),
                    "p999": times.value_at_quantile(0.999),
                    "max": times.max(),
                },
            },
            "errors": errors,
        })
    }
}

/// The resources that this process uses, from proc(5), and those that it may use; absent if the
/// system has no such files.
pub(crate) fn resources(machine: &MachineLimits) -> Value {
    let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
    let status = read("/proc/self/status");
    let field = |name: &str| {
        let line = status
            .lines()
            .find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
        line.split_whitespace().next()?.parse::<u64>().ok()
    };
    let descriptors = std::fs::read_dir("/proc/self/fd")
        .map(|dir| dir.count().saturating_sub(1))
        .ok();
    // Fields 14 and 15, counted after the command's closing parenthesis, are user and system time
    // in ticks.
    let stat = read("/proc/self/stat");
    let after = stat.rsplit_once(") ").map_or("", |(_, rest)| rest);
    let ticks: Vec<u64> = after
        .split(' ')
        .skip(11)
        .take(2)
        .filter_map(|n| n.parse().ok())
        .collect();
    let per_second = rustix::param::clock_ticks_per_second().max(1);
    json!({
        "memory_bytes": field("VmRSS").map(|kib| kib * 1024),
        "memory_bytes_max": machine.memory.max,
        "memory_max_from": machine.memory.from,
        "threads": field("Threads"),
        "descriptors": descriptors,
        "cpu_seconds": (ticks.len() == 2).then(|| (ticks[0] + ticks[1]) as f64 / per_second as f64),
    })
}
