//! Results of a measurement: figures with their expected values, as a table and as JSON.

use crate::machine::{self, Machine};
use serde_json::{Value, json};
use std::fmt::{self, Write};

/// One benchmark's results in both forms.
pub(crate) struct Results {
    pub(crate) table: String,
    pub(crate) json: Value,
}

impl Results {
    pub(crate) fn print(&self, as_json: bool) {
        if as_json {
            println!("{:#}", self.json);
        } else {
            print!("{}", self.table);
        }
    }
}

/// The unit of a figure.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Unit {
    Bytes,
    Mebibytes,
    Megabytes,
    Micros,
    Millis,
    /// A multiple of another figure of the same run.
    Ratio,
    /// A number per second.
    PerSecond,
    /// Gigabytes (10^9) a second.
    GigabytesPerSecond,
}

impl Unit {
    fn name(self) -> &'static str {
        match self {
            Self::Bytes => "B",
            Self::Mebibytes => "MiB",
            Self::Megabytes => "MB",
            Self::Micros => "µs",
            Self::Millis => "ms",
            Self::Ratio => "×",
            Self::PerSecond => "/s",
            Self::GigabytesPerSecond => "GB/s",
        }
    }

    fn digits(self) -> usize {
        match self {
            Self::Bytes | Self::PerSecond => 0,
            Self::Mebibytes | Self::Micros | Self::Millis => 1,
            Self::Megabytes | Self::Ratio | Self::GigabytesPerSecond => 2,
        }
    }

    fn show(self, value: f64) -> String {
        let digits = self.digits();
        format!("{value:.digits$} {}", self.name())
    }
}

/// One figure.
#[derive(Clone, Debug)]
pub(crate) struct Finding {
    name: String,
    value: f64,
    unit: Unit,
    at_most: Option<f64>,
    at_least: Option<f64>,
}

impl Finding {
    pub(crate) fn new(name: impl Into<String>, value: f64, unit: Unit) -> Self {
        Self {
            name: name.into(),
            value,
            unit,
            at_most: None,
            at_least: None,
        }
    }

    /// Sets the smallest expected value.
    pub(crate) fn expect_at_least(self, bound: f64) -> Self {
        Self {
            at_least: Some(bound),
            ..self
        }
    }

    /// Sets the largest expected value.
    pub(crate) fn expect_at_most(self, bound: f64) -> Self {
        Self {
            at_most: Some(bound),
            ..self
        }
    }

    fn is_met(&self) -> Option<bool> {
        let most = self.at_most.map(|bound| self.value <= bound);
        most.or(self.at_least.map(|bound| self.value >= bound))
    }

    fn to_json(&self) -> Value {
        json!({
            "name": self.name,
            "value": self.value,
            "unit": self.unit.name(),
            "at_most": self.at_most,
            "at_least": self.at_least,
            "met": self.is_met(),
        })
    }
}

/// Figures that are being collected for [`Results`].
pub(crate) struct Sheet {
    /// The benchmark's name on the command line.
    pub(crate) bench: &'static str,
    /// What was measured, in a line or two.
    pub(crate) about: String,
    pub(crate) quick: bool,
    pub(crate) machine: Machine,
    pub(crate) findings: Vec<Finding>,
    /// Every round, only for the JSON.
    pub(crate) rounds: Value,
}

impl Sheet {
    pub(crate) fn to_results(&self) -> Results {
        let mut table = String::new();
        let load_after = machine::load();
        self.write_table(&mut table, &load_after)
            .expect("writing to a String does not fail");
        let findings = self.findings.iter().map(Finding::to_json);
        let json = json!({
            "bench": self.bench,
            "quick": self.quick,
            "machine": self.machine,
            "load_after": load_after,
            "findings": findings.collect::<Vec<_>>(),
            "rounds": self.rounds,
        });
        Results { table, json }
    }

    fn write_table(&self, text: &mut String, load_after: &str) -> fmt::Result {
        writeln!(text, "{}: {}", self.bench, self.about)?;
        writeln!(text, "{}; load after: {load_after}", self.machine)?;
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
        let width = |finding: &Finding| finding.name.chars().count();
        let widest = self.findings.iter().map(width).max().unwrap_or_default();
        writeln!(text, "\n{:<widest$}{:>14}{:>14}", "", "found", "bound")?;
        for finding in &self.findings {
            let Finding {
                name, value, unit, ..
            } = finding;
            write!(text, "{name:<widest$}{:>14}", unit.show(*value))?;
            let bound = finding.at_most.or(finding.at_least);
            if let Some(bound) = bound {
                let verdict = if finding.is_met() == Some(true) {
                    "met"
                } else {
                    "MISSED"
                };
                let sign = if finding.at_most.is_some() {
                    "≤"
                } else {
                    "≥"
                };
                let shown = format!("{sign} {}", unit.show(bound));
                write!(text, "{shown:>14}  {verdict}")?;
            }
            writeln!(text)?;
        }
        writeln!(text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_finding_reports_whether_it_was_expected() {
        let finding = Finding::new("start", 50.0, Unit::Millis);
        assert_eq!(finding.is_met(), None);
        for (bound, met) in [(50.0, true), (49.9, false)] {
            assert_eq!(finding.clone().expect_at_most(bound).is_met(), Some(met));
        }
    }

    #[test]
    fn the_table_lists_missed_expectations() {
        let sheet = Sheet {
            bench: "start",
            about: "a test".to_owned(),
            quick: false,
            machine: Machine::observe(),
            findings: vec![Finding::new("a time", 50.25, Unit::Millis).expect_at_most(50.0)],
            rounds: Value::Null,
        };
        let Results { table, json } = sheet.to_results();
        assert!(
            table.contains("a time       50.2 ms     ≤ 50.0 ms  MISSED\n"),
            "{table}"
        );
        assert_eq!(json["findings"][0]["met"], false);
    }
}
