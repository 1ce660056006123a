//! HyperStart: PID 1 and agent of every microVM.
//!
//! It is the only program of the guest that is not the tenant's. It boots the machine, serves the
//! protocol of `hypernetes-agent-api` on one virtio-serial port for ever, and re-executes itself as
//! the child of `hypernetes-container` for every process that it starts. Containers and their
//! buffered output outlive any connection.

mod boot;
mod console;
mod container;
mod disks;
mod error;
mod exec;
mod filesystem;
mod forward;
mod hugepages;
#[cfg(target_feature = "crt-static")]
mod libc;
mod net;
mod netlink;
mod output;
mod ownership;
mod pause;
mod pod;
mod port;
mod profile;
mod reaper;
mod rehearsal;
mod request;
mod resize;
mod ring;
mod sandbox;
mod service;
mod stats;
mod streams;
mod users;
mod volume;

use std::process::ExitCode;

use console::log;

fn main() -> ExitCode {
    if std::env::args_os()
        .next()
        .is_some_and(|name| name == hypernetes_container::CHILD_NAME)
    {
        return hypernetes_container::child::main();
    }
    if let Some(code) = rehearsal::main() {
        return code;
    }
    if rustix::process::getpid() != rustix::process::Pid::INIT {
        log!("this is the init of a microVM; it runs nowhere else");
        return ExitCode::from(64);
    }
    match run() {
        Ok(never) => match never {},
        Err(error) => {
            log!("{}", error::chain(&error));
            // The last words must reach the console before the VMM exits.
            sandbox::power_off();
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<std::convert::Infallible, error::GuestError> {
    boot::prepare()?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|source| error::GuestError::Boot {
            step: "start the event loop",
            source,
        })?;
    runtime.block_on(async {
        net::loopback_up()?;
        let reaper = reaper::Reaper::default();
        tokio::spawn(reaper.clone().run()?);
        let pod = pod::Pod::new(reaper);
        log!("ready");
        port::serve_for_ever(pod).await
    })
}
