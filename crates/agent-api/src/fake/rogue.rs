//! Streams of guests that do not speak the protocol. All need a runtime.

use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex};

use crate::sync::guest_sync;

/// Reads and never answers.
pub fn silent() -> DuplexStream {
    let (node, mut guest) = duplex(64 * 1024);
    tokio::spawn(async move {
        let mut sink = vec![0; 64 * 1024];
        while guest.read(&mut sink).await.is_ok_and(|count| count > 0) {}
    });
    node
}

/// Never reads and never answers.
pub fn stuck() -> (DuplexStream, DuplexStream) {
    duplex(1)
}

/// Sends garbage for ever, from the first byte.
pub fn flood() -> DuplexStream {
    let (node, mut guest) = duplex(64 * 1024);
    tokio::spawn(async move {
        let junk = vec![b'x'; 64 * 1024];
        while guest.write_all(&junk).await.is_ok() {}
    });
    node
}

/// Answers the preamble, then sends garbage for ever in place of frames.
pub fn garbage() -> DuplexStream {
    after_preamble(&[0xa5; 4096])
}

/// Answers the preamble, then sends data of the first call in frames that claim 16 MiB each.
pub fn oversized_frames() -> DuplexStream {
    after_preamble(&[2, 0xff, 0xff, 0xff, 0, 0, 0, 1])
}

/// Answers the preamble and accepts the first call, then nothing.
pub fn mute() -> DuplexStream {
    let (node, guest) = duplex(64 * 1024);
    tokio::spawn(async move {
        let Ok(mut guest) = guest_sync(guest).await else {
            return;
        };
        if guest.write_all(&[6, 0, 0, 0, 0, 0, 0, 1]).await.is_err() {
            return;
        }
        let mut sink = vec![0; 64 * 1024];
        while guest.read(&mut sink).await.is_ok_and(|count| count > 0) {}
    });
    node
}

fn after_preamble(junk: &'static [u8]) -> DuplexStream {
    let (node, guest) = duplex(64 * 1024);
    tokio::spawn(async move {
        let Ok(mut guest) = guest_sync(guest).await else {
            return;
        };
        while guest.write_all(junk).await.is_ok() {}
    });
    node
}
