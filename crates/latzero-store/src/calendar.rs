//! Dates for file names and retention, in UTC, from Unix milliseconds.
//!
//! Days are counted as in Howard Hinnant's "chrono-Compatible Low-Level Date Algorithms".

use std::time::{SystemTime, UNIX_EPOCH};

const DAY_S: i64 = 86_400;

/// Now, in unix ms.
pub(crate) fn now_ms() -> i64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |since| {
            i64::try_from(since.as_millis()).unwrap_or(i64::MAX)
        })
}

/// `20260102-030405` for a time in unix ms.
pub(crate) fn stamp(unix_ms: i64) -> String {
    let seconds = unix_ms.div_euclid(1_000);
    let (day, second) = (seconds.div_euclid(DAY_S), seconds.rem_euclid(DAY_S));
    let (year, month, day) = civil(day);
    let (hour, minute, second) = (second / 3_600, second / 60 % 60, second % 60);
    format!("{year:04}{month:02}{day:02}-{hour:02}{minute:02}{second:02}")
}

/// The unix second that a stamp names.
pub(crate) fn parse_stamp(stamp: &str) -> Option<i64> {
    let bytes = stamp.as_bytes();
    if bytes.len() != 15 || bytes[8] != b'-' {
        return None;
    }
    let number = |from: usize, to: usize| -> Option<i64> {
        let part = stamp.get(from..to)?;
        let is_number = part.bytes().all(|byte| byte.is_ascii_digit());
        is_number.then(|| part.parse().ok())?
    };
    let (year, month, day) = (number(0, 4)?, number(4, 6)?, number(6, 8)?);
    let (hour, minute, second) = (number(9, 11)?, number(11, 13)?, number(13, 15)?);
    let days = days(year, month, day);
    let is_date = (1..=12).contains(&month) && civil(days) == (year, month, day);
    let is_time = hour < 24 && minute < 60 && second < 60;
    (is_date && is_time).then_some(days * DAY_S + hour * 3_600 + minute * 60 + second)
}

/// The day of a unix second, counted from 1970-01-01.
pub(crate) fn day_of(second: i64) -> i64 {
    second.div_euclid(DAY_S)
}

/// The week of a unix second, from Monday to Sunday, counted from the one of 1970-01-01 (a
/// Thursday).
pub(crate) fn week_of(second: i64) -> i64 {
    (day_of(second) + 3).div_euclid(7)
}

fn civil(days: i64) -> (i64, i64, i64) {
    let shifted = days + 719_468;
    let era = shifted.div_euclid(146_097);
    let day_of_era = shifted.rem_euclid(146_097);
    let year_of_era =
        (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted_month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * shifted_month + 2) / 5 + 1;
    let month = if shifted_month < 10 {
        shifted_month + 3
    } else {
        shifted_month - 9
    };
    let year = year_of_era + era * 400 + i64::from(month <= 2);
    (year, month, day)
}

fn days(year: i64, month: i64, day: i64) -> i64 {
    let year = year - i64::from(month <= 2);
    let era = year.div_euclid(400);
    let year_of_era = year.rem_euclid(400);
    let day_of_year = (153 * ((month + 9) % 12) + 2) / 5 + day - 1;
    let day_of_era = year_of_era * 365 + year_of_era / 4 - year_of_era / 100 + day_of_year;
    era * 146_097 + day_of_era - 719_468
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn timestamps_have_seconds() {
        for (unix_s, expected) in [
            (0, "19700101-000000"),
            (951_782_400, "20000229-000000"),
            (1_735_689_599, "20241231-235959"),
            (1_709_210_096, "20240229-123456"),
        ] {
            assert_eq!(stamp(unix_s * 1_000 + 999), expected);
            assert_eq!(parse_stamp(expected), Some(unix_s));
        }
    }

    #[test]
    fn every_day_round_trips() {
        for day in (-200_000..200_000).step_by(7) {
            let (year, month, of_month) = civil(day);
            assert_eq!(days(year, month, of_month), day);
        }
    }

    #[test]
    fn invalid_dates_are_refused() {
        for text in [
            "",
            "20230229-000000",
            "20241301-000000",
            "20240001-000000",
            "20240101-240000",
            "20240101-006000",
            "2024010+-000000",
            "20240101_000000",
            "2024010é000000",
        ] {
            assert_eq!(parse_stamp(text), None, "{text}");
        }
    }
}
