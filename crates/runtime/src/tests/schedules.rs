//! Random schedules of what callers ask, what guests do and what goes wrong, on a node without a host.
//!
//! A schedule is a row of lives of one runtime. In each, callers of several pods ask at the same time
//! while trouble comes in at chosen effects; it ends in good order, by a kill at any effect or moment,
//! or by a power failure. A [`model`] knows what callers were told; whatever the runtime that comes next
//! shows, and whatever is on the node, must agree with it. At the end all pods are removed and nothing may
//! be left.

mod check;
mod client;
mod life;
mod model;
mod plan;

use std::time::Duration;

use hypernetes_testkit::Seeded;

#[test]
fn whatever_happens_what_callers_were_told_stays_true_and_nothing_is_left() {
    life::watch_for_panics();
    let seeded = Seeded {
        name: "schedules of the runtime",
        least: 60,
        most: Duration::from_secs(20),
        threads: 8,
        shrink: Duration::from_secs(40),
    };
    seeded.check(plan::schedule, |lives| life::run(lives));
    // Schedules in which nothing succeeds, or nothing fails, would prove nothing.
    let tally = client::tally();
    eprintln!("asked and done: {tally:?}");
    if std::env::var_os(hypernetes_testkit::seeded::SEED).is_none() {
        for (what, [asked, done]) in tally {
            assert!(
                done > 0 && done <= asked,
                "{what}: asked {asked}, done {done}"
            );
        }
    }
}
