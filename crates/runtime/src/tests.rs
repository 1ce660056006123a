//! The runtime as a whole, on a node without a host.

mod attached;
mod clone;
mod cpus;
mod crashes;
mod hostile;
mod lifecycle;
mod pause;
mod pool;
mod room;
mod schedules;
mod snapshots;
mod streams;
mod suspend;
mod templates;
mod upgrade;
mod upkeep;
mod volumes;
