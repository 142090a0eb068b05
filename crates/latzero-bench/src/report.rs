//! Medians over the rounds, as multiples of the reference peers.

use crate::frame::{self, PAYLOAD};
use crate::machine::{self, Machine};
use crate::peers::nats;
use crate::placement::Placement;
use crate::plan::{Load, Outcome};
use crate::results::Results;
use crate::rpc::WINDOWS;
use crate::stream::Transport;
use serde::Serialize;
use serde_json::{Value, json};
use std::fmt::{self, Write};

/// One contestant under one load in one placement.
pub(crate) struct Cell {
    peer: &'static str,
    transport: Transport,
    placement: Placement,
    load: Load,
    /// One outcome per round.
    pub(crate) rounds: Vec<Outcome>,
}

/// A contestant that could not take part.
#[derive(Debug, Serialize)]
pub(crate) struct Skipped {
    pub(crate) peer: &'static str,
    pub(crate) reason: String,
}

/// A figure of a cell; the median over the rounds is reported.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Figure {
    P50,
    P99,
    Mean,
    Rate,
}

/// The reference for ratios: the relays over the same kind of socket, and NATS.
#[derive(Clone, Copy, Debug)]
enum Base {
    Relay,
    Json,
    Nats,
}

impl Base {
    const ALL: [Self; 3] = [Self::Relay, Self::Json, Self::Nats];

    fn name(self) -> &'static str {
        match self {
            Self::Relay => "relay",
            Self::Json => "json",
            Self::Nats => "nats",
        }
    }

    fn peer(self, transport: Transport) -> &'static str {
        match (self, transport) {
            (Self::Relay, Transport::Tcp) => "relay-tcp",
            (Self::Relay, Transport::Unix) => "relay-unix",
            (Self::Json, Transport::Tcp) => "json-tcp",
            (Self::Json, Transport::Unix) => "json-unix",
            (Self::Nats, _) => "nats",
        }
    }
}

impl fmt::Display for Load {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::OneAtATime => f.write_str("one call at a time"),
            Self::InFlight(window) => write!(f, "{window} in flight"),
        }
    }
}

impl Cell {
    pub(crate) fn new(
        peer: &'static str,
        transport: Transport,
        placement: Placement,
        load: Load,
    ) -> Self {
        Self {
            peer,
            transport,
            placement,
            load,
            rounds: Vec::new(),
        }
    }

    /// The median over the rounds: microseconds, or calls per second.
    fn median(&self, figure: Figure) -> Option<f64> {
        let value = |round: &Outcome| {
            let micros = |nanos: u64| nanos as f64 / 1000.0;
            match figure {
                Figure::P50 => round.latency.map(|it| micros(it.p50_ns)),
                Figure::P99 => round.latency.map(|it| micros(it.p99_ns)),
                Figure::Mean => round.latency.map(|it| it.mean_ns / 1000.0),
                Figure::Rate => Some(round.calls_per_second()),
            }
        };
        median(self.rounds.iter().filter_map(value).collect())
    }
}

/// The median of `values`, in any order.
pub(crate) fn median(mut values: Vec<f64>) -> Option<f64> {
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    match values.len() {
        0 => None,
        odd if odd % 2 == 1 => Some(values[middle]),
        _ => Some(f64::midpoint(values[middle - 1], values[middle])),
    }
}

/// All results of one run of the benchmark.
pub(crate) struct Report {
    quick: bool,
    machine: Machine,
    load_after: String,
    skipped: Vec<Skipped>,
    cells: Vec<Cell>,
}

impl Report {
    pub(crate) fn new(
        quick: bool,
        machine: Machine,
        skipped: Vec<Skipped>,
        cells: Vec<Cell>,
    ) -> Self {
        Self {
            quick,
            machine,
            load_after: machine::load(),
            skipped,
            cells,
        }
    }

    fn cell(&self, peer: &str, placement: Placement, load: Load) -> Option<&Cell> {
        self.cells
            .iter()
            .find(|cell| cell.peer == peer && cell.placement == placement && cell.load == load)
    }

    /// `figure` of `cell` as a multiple of the same figure of `base`; `None` if that did not run.
    fn ratio(&self, cell: &Cell, figure: Figure, base: Base) -> Option<f64> {
        let base = self.cell(base.peer(cell.transport), cell.placement, cell.load)?;
        Some(cell.median(figure)? / base.median(figure)?)
    }

    pub(crate) fn to_results(&self) -> Results {
        Results {
            table: self.to_table(),
            json: self.to_json(),
        }
    }

    fn to_json(&self) -> Value {
        json!({
            "bench": "rpc",
            "quick": self.quick,
            "payload_bytes": PAYLOAD.len(),
            "call_frame_bytes": frame_bytes(|out| frame::append_call(out, frame::FIRST_ID)),
            "machine": self.machine,
            "load_after": self.load_after,
            "nats_server": nats::server_version(),
            "skipped": self.skipped,
            "results": self.cells.iter().map(|cell| self.cell_json(cell)).collect::<Vec<_>>(),
        })
    }

    fn cell_json(&self, cell: &Cell) -> Value {
        let (in_flight, figures): (u64, &[(&str, Figure)]) = match cell.load {
            Load::OneAtATime => (
                1,
                &[
                    ("p50_us", Figure::P50),
                    ("p99_us", Figure::P99),
                    ("mean_us", Figure::Mean),
                ],
            ),
            Load::InFlight(window) => (window, &[("calls_per_second", Figure::Rate)]),
        };
        let over = |value: &dyn Fn(Figure) -> Option<f64>| -> Value {
            figures
                .iter()
                .map(|(name, figure)| ((*name).to_owned(), json!(value(*figure))))
                .collect()
        };
        let ratios: Value = Base::ALL
            .iter()
            .map(|base| {
                let ratios = over(&|figure| self.ratio(cell, figure, *base));
                (base.name().to_owned(), ratios)
            })
            .collect();
        json!({
            "peer": cell.peer,
            "placement": cell.placement,
            "one_at_a_time": cell.load == Load::OneAtATime,
            "in_flight": in_flight,
            "median": over(&|figure| cell.median(figure)),
            "ratio_to": ratios,
            "rounds": cell.rounds,
        })
    }

    fn to_table(&self) -> String {
        let mut text = String::new();
        self.write_table(&mut text)
            .expect("writing to a String does not fail");
        text
    }

    fn write_table(&self, text: &mut String) -> fmt::Result {
        let payload = PAYLOAD.len();
        writeln!(
            text,
            "rpc: caller, server, handler in three processes; {payload}-byte payload"
        )?;
        writeln!(text, "{}; load after: {}", self.machine, self.load_after)?;
        writeln!(
            text,
            "Medians over the rounds. ÷ X: as a multiple of X, over the same socket."
        )?;
        if self.quick {
            writeln!(
                text,
                "QUICK: this shows that it works; the figures mean nothing."
            )?;
        }
        if self.machine.was_busy() {
            writeln!(
                text,
                "BUSY: the machine was not idle before this run; ratios suffer too."
            )?;
        }
        for Skipped { peer, reason } in &self.skipped {
            writeln!(text, "Without {peer}: {reason}.")?;
        }
        for placement in Placement::ALL {
            self.write_latency(text, placement)?;
            self.write_rates(text, placement)?;
        }
        Ok(())
    }

    fn write_latency(&self, text: &mut String, placement: Placement) -> fmt::Result {
        let of_it = |cell: &&Cell| cell.placement == placement && cell.load == Load::OneAtATime;
        let cells: Vec<_> = self.cells.iter().filter(of_it).collect();
        let Some(first) = cells.first() else {
            return Ok(());
        };
        let (calls, rounds) = (first.rounds[0].measured, first.rounds.len());
        writeln!(
            text,
            "\nOne call at a time, {}; µs ({rounds} × {calls})",
            placement.describe()
        )?;
        write!(text, "{:<14}{:>9}{:>9}{:>9}", "", "p50", "p99", "mean")?;
        writeln!(
            text,
            " {:>9}{:>9}{:>9}{:>13}",
            "÷ relay", "÷ json", "÷ nats", "p99 ÷ relay"
        )?;
        for cell in cells {
            write!(text, "{:<14}", cell.peer)?;
            for figure in [Figure::P50, Figure::P99, Figure::Mean] {
                write!(text, "{:>9}", show(cell.median(figure), 1))?;
            }
            write!(text, " ")?;
            for base in Base::ALL {
                write!(text, "{:>9}", show(self.ratio(cell, Figure::P50, base), 2))?;
            }
            writeln!(
                text,
                "{:>13}",
                show(self.ratio(cell, Figure::P99, Base::Relay), 2)
            )?;
        }
        Ok(())
    }

    fn write_rates(&self, text: &mut String, placement: Placement) -> fmt::Result {
        let of_it =
            |cell: &&Cell| cell.placement == placement && cell.load == Load::InFlight(WINDOWS[0]);
        let cells: Vec<_> = self.cells.iter().filter(of_it).collect();
        let Some(first) = cells.first() else {
            return Ok(());
        };
        let (calls, rounds) = (first.rounds[0].measured, first.rounds.len());
        writeln!(
            text,
            "\nThousand calls per second, {} ({rounds} × {calls})",
            placement.describe()
        )?;
        write!(text, "{:<14}", "in flight:")?;
        for window in WINDOWS {
            write!(text, "{window:>9}")?;
        }
        for base in Base::ALL {
            write!(text, "{:>24}", format!("÷ {}: 64, 256, 1024", base.name()))?;
        }
        writeln!(text)?;
        for cell in cells {
            write!(text, "{:<14}", cell.peer)?;
            let of_window = |window| self.cell(cell.peer, placement, Load::InFlight(window));
            let in_windows = WINDOWS.map(of_window);
            for cell in in_windows {
                let rate = cell.and_then(|cell| cell.median(Figure::Rate));
                write!(text, "{:>9}", show(rate.map(|rate| rate / 1000.0), 0))?;
            }
            for base in Base::ALL {
                write!(text, "   ")?;
                for cell in in_windows {
                    let ratio = cell.and_then(|cell| self.ratio(cell, Figure::Rate, base));
                    write!(text, "{:>7}", show(ratio, 2))?;
                }
            }
            writeln!(text)?;
        }
        Ok(())
    }
}

fn show(value: Option<f64>, digits: usize) -> String {
    value.map_or_else(|| "-".to_owned(), |value| format!("{value:.digits$}"))
}

fn frame_bytes(append: impl FnOnce(&mut Vec<u8>)) -> usize {
    let mut frame = Vec::new();
    append(&mut frame);
    frame.len()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians() {
        for (values, expected) in [
            (vec![], None),
            (vec![3.0], Some(3.0)),
            (vec![9.0, 1.0, 2.0], Some(2.0)),
            (vec![4.0, 1.0, 3.0, 2.0], Some(2.5)),
        ] {
            assert_eq!(median(values), expected);
        }
    }

    #[test]
    fn a_ratio_needs_its_base_with_the_same_placement_and_load() {
        let cell = |peer, placement, elapsed_ns| {
            let mut cell = Cell::new(peer, Transport::Tcp, placement, Load::InFlight(64));
            let (asked, answered, measured) = (1000, 1000, 1000);
            cell.rounds.push(Outcome {
                asked,
                answered,
                measured,
                elapsed_ns,
                latency: None,
            });
            cell
        };
        let cells = vec![
            cell("relay-tcp", Placement::OneCpu, 1_000),
            cell("json-tcp", Placement::OneCpu, 2_000),
            cell("json-tcp", Placement::Free, 2_000),
        ];
        let report = Report::new(true, Machine::observe(), Vec::new(), cells);
        let ratio = |cell: usize, base| report.ratio(&report.cells[cell], Figure::Rate, base);
        assert_eq!(ratio(1, Base::Relay), Some(0.5));
        assert_eq!(ratio(2, Base::Relay), None);
        assert_eq!(ratio(1, Base::Nats), None);
    }
}
