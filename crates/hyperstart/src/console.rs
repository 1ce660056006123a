//! The guest's console: lines with a prefix, for whoever reads the VMM's log.

/// Writes a line to the console. Standard error is the console; there is no other log.
macro_rules! log {
    ($($arg:tt)*) => {
        $crate::console::line(format_args!($($arg)*))
    };
}
pub(crate) use log;

pub(crate) fn line(text: std::fmt::Arguments<'_>) {
    use std::io::Write;
    // A console that cannot be written leaves nobody to tell.
    drop(writeln!(std::io::stderr(), "hyperstart: {text}"));
}
