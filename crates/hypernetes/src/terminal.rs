//! What the operator sees on standard output.
#![allow(clippy::print_stdout, reason = "this is the command line's output")]

use std::io::Write;

use comfy_table::{Table, presets};

/// One line. A reader that has gone away (`| head`) is no error.
pub(crate) fn line(text: &str) {
    raw(&format!("{text}\n"));
}

/// One line beside the result: progress, advice.
pub(crate) fn note(text: &str) {
    let mut error = std::io::stderr().lock();
    if writeln!(error, "{text}").is_err() {
        tracing::debug!("standard error is closed");
    }
}

/// Text as it is.
pub(crate) fn raw(text: &str) {
    let mut out = std::io::stdout().lock();
    if out
        .write_all(text.as_bytes())
        .and_then(|()| out.flush())
        .is_err()
    {
        tracing::debug!("standard output is closed");
    }
}

/// Columns without borders, as kubectl and docker print them.
pub(crate) fn table(header: &[&str], rows: impl IntoIterator<Item = Vec<String>>) {
    let mut table = Table::new();
    table.load_style(presets::NOTHING);
    table.set_header(header.to_vec());
    for row in rows {
        table.add_row(row);
    }
    for column in table.column_iter_mut() {
        column.set_padding((0, 3));
    }
    for text in table.to_string().lines() {
        line(text.trim_end());
    }
}

/// Bytes for people, as docker prints them.
pub(crate) fn human_bytes(bytes: u64) -> String {
    const UNITS: [&str; 5] = ["B", "kB", "MB", "GB", "TB"];
    let mut scaled = u128::from(bytes) * 100;
    let mut unit = 0;
    while scaled >= 100_000 && unit < UNITS.len() - 1 {
        scaled /= 1000;
        unit += 1;
    }
    if unit == 0 {
        return format!("{bytes}B");
    }
    let (whole, hundredths) = (scaled / 100, scaled % 100);
    match whole {
        100.. => format!("{whole}{}", UNITS[unit]),
        10.. => format!("{whole}.{}{}", hundredths / 10, UNITS[unit]),
        _ => format!("{whole}.{hundredths:02}{}", UNITS[unit]),
    }
}

#[cfg(test)]
mod tests {
    use super::human_bytes;

    #[test]
    fn bytes_have_three_digits() {
        assert_eq!(human_bytes(999), "999B");
        assert_eq!(human_bytes(1_230), "1.23kB");
        assert_eq!(human_bytes(21_293_480), "21.2MB");
        assert_eq!(human_bytes(193_000_000), "193MB");
    }
}
