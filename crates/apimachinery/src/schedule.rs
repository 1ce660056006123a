//! Schedules of cron jobs: the five fields of crontab or `@daily` and the like, in a time zone.

use croner::{
    Cron,
    parser::{CronParser, Seconds, Year},
};
use jiff::{Timestamp, Zoned, tz::TimeZone};

/// Why a schedule cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ScheduleError {
    /// The text.
    #[error("{0}")]
    Syntax(String),
    /// The time zone.
    #[error("unknown time zone {0}")]
    TimeZone(String),
}

/// When something happens again and again.
#[derive(Debug, Clone)]
pub struct Schedule {
    cron: Cron,
    zone: TimeZone,
}

impl Schedule {
    /// Reads a schedule; without a time zone it is in UTC.
    ///
    /// # Errors
    /// [`ScheduleError`].
    pub fn parse(text: &str, zone: Option<&str>) -> Result<Self, ScheduleError> {
        let fields = text.split_whitespace().count();
        if fields != 5 && !text.starts_with('@') {
            return Err(ScheduleError::Syntax(format!(
                "expected exactly 5 fields, found {fields}: [{text}]"
            )));
        }
        let parser = CronParser::builder()
            .seconds(Seconds::Disallowed)
            .year(Year::Disallowed)
            .build();
        let cron = parser
            .parse(text)
            .map_err(|error| ScheduleError::Syntax(error.to_string()))?;
        let zone = match zone {
            None => TimeZone::UTC,
            Some(name) => time_zone(name)?,
        };
        Ok(Self { cron, zone })
    }

    /// The first time after that one; `None` if there is none.
    pub fn next_after(&self, time: Timestamp) -> Option<Timestamp> {
        let from: Zoned = time.to_zoned(self.zone.clone());
        let next = self.cron.find_next_occurrence(&from, false).ok()?;
        Some(next.timestamp())
    }
}

/// A time zone of the IANA database. Upstream does not take `Local`, which is another one on every
/// machine.
///
/// # Errors
/// [`ScheduleError::TimeZone`].
pub fn time_zone(name: &str) -> Result<TimeZone, ScheduleError> {
    let unknown = || ScheduleError::TimeZone(name.to_owned());
    if name.is_empty() || name.eq_ignore_ascii_case("local") {
        return Err(unknown());
    }
    TimeZone::get(name).map_err(|_error| unknown())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn next(text: &str, zone: Option<&str>, after: &str) -> String {
        let schedule = Schedule::parse(text, zone).unwrap();
        schedule
            .next_after(after.parse().unwrap())
            .unwrap()
            .to_string()
    }

    #[test]
    fn times_follow_each_other() {
        let at = "2026-03-01T10:07:30Z";
        for (text, expected) in [
            ("*/5 * * * *", "2026-03-01T10:10:00Z"),
            ("0 0 * * *", "2026-03-02T00:00:00Z"),
            ("@hourly", "2026-03-01T11:00:00Z"),
            ("30 4 1,15 * 5", "2026-03-06T04:30:00Z"),
            ("0 9 * * mon", "2026-03-02T09:00:00Z"),
        ] {
            assert_eq!(next(text, None, at), expected, "{text}");
        }
        // The time itself is past.
        assert_eq!(
            next("*/5 * * * *", None, "2026-03-01T10:10:00Z"),
            "2026-03-01T10:15:00Z"
        );
    }

    #[test]
    fn what_is_no_schedule_is_refused() {
        for text in [
            "",
            "* * * *",
            "61 * * * *",
            "* * * * * *",
            "@sometimes",
            "x * * * *",
        ] {
            assert!(Schedule::parse(text, None).is_err(), "{text}");
        }
        for zone in ["", "Local", "Mars/Olympus"] {
            assert!(Schedule::parse("* * * * *", Some(zone)).is_err(), "{zone}");
        }
    }
}
