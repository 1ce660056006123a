//! Taps: persistent, opened for a VMM as `TAP | NO_PI | VNET_HDR`.

use std::{
    io,
    os::fd::{AsFd, OwnedFd},
    time::Duration,
};

use nix::errno::Errno;
use tokio::time::Instant;
use tun_rs::{DeviceBuilder, Layer};

use crate::{
    Parked, ParkedPlace,
    links::with_links,
    netns::{self, Namespace},
};

/// The name of a tap that is nobody's yet.
const PARKED: &str = "park0";
/// How long a killed VMM may take to let go of its queue.
const RELEASE_WAIT: Duration = Duration::from_secs(2);

/// Opens the queue of the tap `name` in `namespace`, making the tap if it does not exist. A new tap
/// is down; it stays when the descriptor is closed.
///
/// A tap has one queue: while another VMM holds it this waits a little and then fails with
/// [`io::ErrorKind::ResourceBusy`].
pub(crate) fn open(namespace: &Namespace, name: &str) -> io::Result<OwnedFd> {
    namespace.run(|| {
        let deadline = Instant::now() + RELEASE_WAIT;
        loop {
            match open_here(name) {
                Err(error)
                    if error.raw_os_error() == Some(Errno::EBUSY as i32)
                        && Instant::now() < deadline =>
                {
                    // A plain thread without a runtime, and nothing to be notified by.
                    std::thread::park_timeout(Duration::from_millis(20));
                }
                other => return other,
            }
        }
    })
}

/// Opens a tap in a namespace without a name: both end when the last descriptor is closed, although
/// the tap is one that stays, as it may be moved to where it is to.
pub(crate) fn park() -> io::Result<Parked> {
    netns::in_new(|| {
        Ok(Parked {
            tap: open_here(PARKED)?,
            place: ParkedPlace(Namespace::current()?.into()),
        })
    })
}

/// Moves a parked tap, whose queue a VMM has, into `namespace`, where it is called `name`. It is down
/// there, like a new one.
pub(crate) fn unpark(place: ParkedPlace, namespace: &Namespace, name: &str) -> io::Result<()> {
    with_links(&Namespace::from(place.0), async |links| {
        links.hand_over(PARKED, namespace, name).await
    })
}

fn open_here(name: &str) -> io::Result<OwnedFd> {
    // With `offload` the descriptor carries virtio-net headers; without `inherit_enable_state` the
    // builder may set the link up, before its rules are there.
    let device = DeviceBuilder::new()
        .name(name)
        .layer(Layer::L2)
        .offload(true)
        .inherit_enable_state()
        .build_sync()?;
    device.persist()?;
    device.as_fd().try_clone_to_owned()
}
