//! What the phases of a pod's start took, in words.

use std::time::Duration;

use hypernetes_runtime::Timing;

/// Of the VM, up to a sandbox that is ready; network, scratch disk and kernel overlap.
pub(crate) fn of_sandbox(timing: &Timing) -> String {
    let origin = match (timing.from_pool, timing.from_template) {
        (true, _) => "from the pool",
        (false, true) => "from a template",
        (false, false) => "booted",
    };
    let mut text = format!("VM {origin}, ready after {}", millis(timing.total));
    phases(&mut text, &timing.phases);
    text
}

/// Of a container, up to its first process.
pub(crate) fn of_container(name: &str, parts: &[(&'static str, Duration)]) -> String {
    let total = parts.iter().map(|(_name, took)| *took).sum();
    let mut text = format!("container {name}, started after {}", millis(total));
    phases(&mut text, parts);
    text
}

fn phases(text: &mut String, parts: &[(&'static str, Duration)]) {
    for (index, (name, took)) in parts.iter().enumerate() {
        let before = if index == 0 { ": " } else { ", " };
        text.push_str(&format!("{before}{name} {}", millis(*took)));
    }
}

fn millis(took: Duration) -> String {
    format!("{:.1} ms", took.as_secs_f64() * 1000.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn phases_are_told_in_their_order() {
        let timing = Timing {
            phases: vec![
                ("request", Duration::from_micros(1500)),
                ("boot", Duration::from_millis(90)),
            ],
            from_template: true,
            from_pool: false,
            total: Duration::from_millis(100),
        };
        assert_eq!(
            of_sandbox(&timing),
            "VM from a template, ready after 100.0 ms: request 1.5 ms, boot 90.0 ms"
        );
        let timing = Timing {
            from_pool: true,
            total: Duration::from_millis(40),
            ..Timing::default()
        };
        let text = "VM from the pool, ready after 40.0 ms";
        assert_eq!(of_sandbox(&timing), text);
        let parts = [
            ("image", Duration::ZERO),
            ("create", Duration::from_millis(7)),
        ];
        assert_eq!(
            of_container("web", &parts),
            "container web, started after 7.0 ms: image 0.0 ms, create 7.0 ms"
        );
    }
}
