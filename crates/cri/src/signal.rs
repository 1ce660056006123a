//! Signals: the API's enumeration and Linux' numbers on x86-64.

use crate::{status::CriError, v1};

/// Names in the order of their numbers, from 1.
const NAMES: [&str; 31] = [
    "SIGHUP",
    "SIGINT",
    "SIGQUIT",
    "SIGILL",
    "SIGTRAP",
    "SIGABRT",
    "SIGBUS",
    "SIGFPE",
    "SIGKILL",
    "SIGUSR1",
    "SIGSEGV",
    "SIGUSR2",
    "SIGPIPE",
    "SIGALRM",
    "SIGTERM",
    "SIGSTKFLT",
    "SIGCHLD",
    "SIGCONT",
    "SIGSTOP",
    "SIGTSTP",
    "SIGTTIN",
    "SIGTTOU",
    "SIGURG",
    "SIGXCPU",
    "SIGXFSZ",
    "SIGVTALRM",
    "SIGPROF",
    "SIGWINCH",
    "SIGIO",
    "SIGPWR",
    "SIGSYS",
];
const RTMIN: u32 = 34;
const RTMAX: u32 = 64;

/// The number of a signal; `None` leaves it to the image.
pub(crate) fn number(signal: i32) -> Result<Option<u32>, CriError> {
    let unknown = || CriError::invalid("config.stop_signal", format!("{signal} is no signal"));
    let known = v1::Signal::try_from(signal).map_err(|_unknown| unknown())?;
    if known == v1::Signal::RuntimeDefault {
        return Ok(None);
    }
    let name = match known.as_str_name() {
        "SIGCLD" => "SIGCHLD",
        "SIGIOT" => "SIGABRT",
        "SIGPOLL" => "SIGIO",
        name => name,
    };
    let offset = |text: &str| text.parse::<u32>().ok();
    let number = if let Some(index) = NAMES.iter().position(|other| *other == name) {
        u32::try_from(index + 1).ok()
    } else if let Some(rest) = name.strip_prefix("SIGRTMINPLUS") {
        offset(rest).map(|offset| RTMIN + offset)
    } else if let Some(rest) = name.strip_prefix("SIGRTMAXMINUS") {
        offset(rest).and_then(|offset| RTMAX.checked_sub(offset))
    } else {
        match name {
            "SIGRTMIN" => Some(RTMIN),
            "SIGRTMAX" => Some(RTMAX),
            _ => None,
        }
    };
    number.map(Some).ok_or_else(unknown)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_signal_of_the_api_has_a_number() {
        for signal in 1..=65 {
            let number = number(signal).unwrap().unwrap();
            assert!((1..=64).contains(&number), "{signal}: {number}");
        }
        assert_eq!(number(0).unwrap(), None);
        assert!(number(66).is_err());
        let of = |signal: v1::Signal| number(signal.into()).unwrap().unwrap();
        assert_eq!(of(v1::Signal::Sigterm), 15);
        assert_eq!(of(v1::Signal::Sigkill), 9);
        assert_eq!(of(v1::Signal::Sigquit), 3);
        assert_eq!(of(v1::Signal::Sigrtminplus1), 35);
        assert_eq!(of(v1::Signal::Sigrtmaxminus1), 63);
        assert_eq!(of(v1::Signal::Sigiot), 6);
    }
}
