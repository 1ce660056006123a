//! Sizes, durations and times as docker's users write and read them.

use std::time::Duration;

use jiff::Timestamp;

use crate::error::{Failure, Result};

/// Bytes of `512m`, `1.5g`, `64MiB`, `100` (docker: powers of 1024).
pub(crate) fn parse_bytes(text: &str) -> Result<i64> {
    let invalid = || Failure::usage(format_args!("invalid size: '{text}'"));
    let lower = text.trim().to_ascii_lowercase();
    let end = lower
        .find(|c: char| !(c.is_ascii_digit() || c == '.'))
        .unwrap_or(lower.len());
    let (number, unit) = lower.split_at(end);
    let unit = unit.trim();
    let unit = unit
        .strip_suffix("ib")
        .or_else(|| unit.strip_suffix(['b', 'i']))
        .unwrap_or(unit);
    let shift = match unit {
        "" => 0_u32,
        "k" => 10,
        "m" => 20,
        "g" => 30,
        "t" => 40,
        "p" => 50,
        _ => return Err(invalid()),
    };
    let (whole, part) = number.split_once('.').unwrap_or((number, ""));
    if whole.is_empty() || part.len() > 9 || part.contains('.') {
        return Err(invalid());
    }
    let whole: i128 = whole.parse().map_err(|_bad| invalid())?;
    let scale = 10_i128.pow(u32::try_from(part.len()).map_err(|_long| invalid())?);
    let part: i128 = match part {
        "" => 0,
        digits => digits.parse().map_err(|_bad| invalid())?,
    };
    let bytes = ((whole * scale + part) << shift) / scale;
    i64::try_from(bytes).map_err(|_large| invalid())
}

/// Thousandths of a CPU of `1.5`.
pub(crate) fn parse_cpus(text: &str) -> Result<i64> {
    let invalid = || Failure::usage(format_args!("failed to parse {text} as a rational number"));
    let (whole, part) = text.split_once('.').unwrap_or((text, ""));
    let digits = |text: &str| text.chars().all(|c| c.is_ascii_digit());
    if (whole.is_empty() && part.is_empty()) || !digits(whole) || !digits(part) {
        return Err(invalid());
    }
    let mut milli = format!("{part}000");
    milli.truncate(3);
    let whole: i64 = if whole.is_empty() {
        0
    } else {
        whole.parse().map_err(|_bad| invalid())?
    };
    let part: i64 = milli.parse().map_err(|_bad| invalid())?;
    whole
        .checked_mul(1000)
        .and_then(|whole| whole.checked_add(part))
        .ok_or_else(invalid)
}

/// A Go duration: `10s`, `1m30s`, `1.5h`, `300ms`; a bare number is seconds.
pub(crate) fn parse_duration(text: &str) -> Result<Duration> {
    let invalid = || Failure::usage(format_args!("invalid duration \"{text}\""));
    if let Ok(seconds) = text.parse::<u64>() {
        return Ok(Duration::from_secs(seconds));
    }
    let mut rest = text;
    let mut total = Duration::ZERO;
    if rest.is_empty() {
        return Err(invalid());
    }
    while !rest.is_empty() {
        let end = rest
            .find(|c: char| !(c.is_ascii_digit() || c == '.'))
            .ok_or_else(invalid)?;
        let number: f64 = rest[..end].parse().map_err(|_bad| invalid())?;
        rest = &rest[end..];
        let (unit, seconds) = [
            ("ms", 0.001),
            ("us", 1e-6),
            ("ns", 1e-9),
            ("h", 3600.0),
            ("m", 60.0),
            ("s", 1.0),
        ]
        .into_iter()
        .find(|(unit, _)| rest.starts_with(unit))
        .ok_or_else(invalid)?;
        rest = &rest[unit.len()..];
        total += Duration::try_from_secs_f64(number * seconds).map_err(|_bad| invalid())?;
    }
    Ok(total)
}

/// A moment as `--since` and `--until` take it: RFC 3339 (with or without time and zone), Unix
/// seconds, or a duration before `now`.
pub(crate) fn parse_time(text: &str, now: Timestamp) -> Result<Timestamp> {
    let invalid = || {
        Failure::plain(format_args!(
            "invalid value for \"since\" or \"until\": failed to parse value as time or duration: \"{text}\""
        ))
    };
    if let Ok(time) = text.parse::<Timestamp>() {
        return Ok(time);
    }
    if let Ok(time) = text.parse::<jiff::civil::DateTime>() {
        return time
            .to_zoned(jiff::tz::TimeZone::system())
            .map(|zoned| zoned.timestamp())
            .map_err(|_bad| invalid());
    }
    if text.chars().all(|c| c.is_ascii_digit() || c == '.') && !text.is_empty() {
        let (whole, part) = text.split_once('.').unwrap_or((text, "0"));
        let seconds: i64 = whole.parse().map_err(|_bad| invalid())?;
        let mut nanos = format!("{part}000000000");
        nanos.truncate(9);
        let nanos: i32 = nanos.parse().map_err(|_bad| invalid())?;
        return Timestamp::new(seconds, nanos).map_err(|_bad| invalid());
    }
    let ago = parse_duration(text).map_err(|_bad| invalid())?;
    let ago = jiff::SignedDuration::try_from(ago).map_err(|_large| invalid())?;
    now.checked_sub(ago).map_err(|_large| invalid())
}

/// A span of time for people, in docker's words.
pub(crate) fn human_duration(seconds: i64) -> String {
    let minutes = seconds / 60;
    let hours = (seconds + 1800) / 3600;
    match seconds {
        ..1 => "Less than a second".to_owned(),
        1 => "1 second".to_owned(),
        2..60 => format!("{seconds} seconds"),
        60..120 => "About a minute".to_owned(),
        120..3600 => format!("{minutes} minutes"),
        _ => match hours {
            ..2 => "About an hour".to_owned(),
            2..48 => format!("{hours} hours"),
            48..336 => format!("{} days", hours / 24),
            336..1440 => format!("{} weeks", hours / 168),
            1440..17520 => format!("{} months", hours / 720),
            _ => format!("{} years", seconds / 3600 / 24 / 365),
        },
    }
}

/// `5 minutes ago`.
pub(crate) fn human_ago(time: Timestamp, now: Timestamp) -> String {
    format!("{} ago", human_duration(now.as_second() - time.as_second()))
}

/// A time as `docker ps` prints `CreatedAt`, in UTC.
pub(crate) fn created_at(time: Timestamp) -> String {
    time.strftime("%Y-%m-%d %H:%M:%S +0000 UTC").to_string()
}

/// Bytes in powers of 1024, as `docker stats`: `1.94MiB`.
pub(crate) fn binary_bytes(bytes: u64) -> String {
    const UNITS: [&str; 6] = ["B", "KiB", "MiB", "GiB", "TiB", "PiB"];
    scaled(bytes, 1024, &UNITS)
}

/// Bytes in powers of 1000, as `docker images`: `1.24MB`.
pub(crate) fn decimal_bytes(bytes: u64) -> String {
    const UNITS: [&str; 6] = ["B", "kB", "MB", "GB", "TB", "PB"];
    scaled(bytes, 1000, &UNITS)
}

/// Up to four significant digits, no trailing zeros (`%.4g`).
fn scaled(bytes: u64, base: u64, units: &[&str]) -> String {
    let mut divisor = 1_u128;
    let mut unit = 0;
    while u128::from(bytes) >= divisor * u128::from(base) && unit + 1 < units.len() {
        divisor *= u128::from(base);
        unit += 1;
    }
    let whole = u128::from(bytes) / divisor;
    let decimals = match whole {
        1000.. => 0,
        100.. => 1,
        10.. => 2,
        _ => 3,
    };
    let factor = 10_u128.pow(decimals);
    let rounded = (u128::from(bytes) * factor + divisor / 2) / divisor;
    let mut text = match decimals {
        0 => rounded.to_string(),
        _ => format!(
            "{}.{:0width$}",
            rounded / factor,
            rounded % factor,
            width = decimals as usize
        ),
    };
    if text.contains('.') {
        text.truncate(text.trim_end_matches('0').trim_end_matches('.').len());
    }
    format!("{text}{}", units[unit])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes() {
        for (text, bytes) in [
            ("100", 100),
            ("1k", 1024),
            ("64m", 64 << 20),
            ("1.5g", 3 << 29),
            ("64MiB", 64 << 20),
            ("2GB", 2 << 30),
        ] {
            assert_eq!(parse_bytes(text).unwrap(), bytes, "{text}");
        }
        for bad in ["", "m", "1x", "1.2.3m", "-1m"] {
            assert_eq!(parse_bytes(bad).unwrap_err().code, 125, "{bad}");
        }
    }

    #[test]
    fn cpus() {
        for (text, milli) in [("1", 1000), ("1.5", 1500), (".25", 250), ("0.001", 1)] {
            assert_eq!(parse_cpus(text).unwrap(), milli, "{text}");
        }
        assert!(parse_cpus("x").is_err() && parse_cpus("").is_err() && parse_cpus("-1").is_err());
    }

    #[test]
    fn durations() {
        for (text, millis) in [
            ("10", 10_000),
            ("10s", 10_000),
            ("1m30s", 90_000),
            ("1.5h", 5_400_000),
            ("300ms", 300),
        ] {
            assert_eq!(
                parse_duration(text).unwrap(),
                Duration::from_millis(millis),
                "{text}"
            );
        }
        assert!(parse_duration("x").is_err() && parse_duration("").is_err());
    }

    #[test]
    fn times() {
        let now: Timestamp = "2026-01-02T03:04:05Z".parse().unwrap();
        let at = |text: &str| parse_time(text, now).unwrap().to_string();
        assert_eq!(at("10m"), "2026-01-02T02:54:05Z");
        assert_eq!(at("1700000000"), "2023-11-14T22:13:20Z");
        assert_eq!(at("1700000000.5"), "2023-11-14T22:13:20.5Z");
        assert_eq!(at("2026-01-01T00:00:00Z"), "2026-01-01T00:00:00Z");
        assert!(parse_time("yesterday", now).is_err());
    }

    #[test]
    fn spans_for_people() {
        for (seconds, text) in [
            (0, "Less than a second"),
            (1, "1 second"),
            (59, "59 seconds"),
            (60, "About a minute"),
            (119, "About a minute"),
            (120, "2 minutes"),
            (3600, "About an hour"),
            (5400, "2 hours"),
            (47 * 3600, "47 hours"),
            (48 * 3600, "2 days"),
            (15 * 86400, "2 weeks"),
            (90 * 86400, "3 months"),
            (800 * 86400, "2 years"),
        ] {
            assert_eq!(human_duration(seconds), text, "{seconds}");
        }
    }

    #[test]
    fn bytes_for_people() {
        assert_eq!(binary_bytes(2_034_237), "1.94MiB");
        assert_eq!(binary_bytes(0), "0B");
        assert_eq!(binary_bytes(64 << 20), "64MiB");
        assert_eq!(decimal_bytes(1_240_000), "1.24MB");
    }
}
