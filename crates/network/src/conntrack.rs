//! Forgets flows of the kernel's connection table.
//!
//! A UDP flow has no end that the kernel could see: while its client sends, it goes on to where it
//! went, be it that nobody is there any more.

use std::{io, os::fd::AsRawFd, time::Duration};

use nix::sys::{
    socket::{
        AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, recv, sendto,
        setsockopt, socket, sockopt::ReceiveTimeout,
    },
    time::TimeVal,
};

use crate::netns::Namespace;

/// `NFNL_SUBSYS_CTNETLINK << 8 | IPCTNL_MSG_CT_DELETE`, linux/netfilter/nfnetlink*.h.
const DELETE: u16 = (1 << 8) | 2;
/// `NLM_F_REQUEST | NLM_F_ACK`.
const FLAGS: u16 = 0x1 | 0x4;
const CTA_MARK: u16 = 8;
const CTA_MARK_MASK: u16 = 21;
const NLMSG_ERROR: u16 = 2;
const PATIENCE: Duration = Duration::from_secs(5);

/// Forgets the IPv4 flows of `namespace` that carry one of `marks`.
pub(crate) fn forget(namespace: &Namespace, marks: &[u32]) -> io::Result<()> {
    if marks.is_empty() {
        return Ok(());
    }
    namespace.run(|| {
        let socket = socket(
            AddressFamily::Netlink,
            SockType::Raw,
            SockFlag::SOCK_CLOEXEC,
            SockProtocol::NetlinkNetFilter,
        )?;
        let seconds = i64::try_from(PATIENCE.as_secs()).map_err(io::Error::other)?;
        setsockopt(&socket, ReceiveTimeout, &TimeVal::new(seconds, 0))?;
        for mark in marks {
            let kernel = NetlinkAddr::new(0, 0);
            sendto(
                socket.as_raw_fd(),
                &request(*mark),
                &kernel,
                MsgFlags::empty(),
            )?;
            let mut answer = [0; 1024];
            let length = recv(socket.as_raw_fd(), &mut answer, MsgFlags::empty())?;
            acknowledged(&answer[..length])?;
        }
        Ok(())
    })
}

/// `nlmsghdr`, `nfgenmsg`, and the mark with its mask, both in network order.
fn request(mark: u32) -> Vec<u8> {
    let mut body = vec![2, 0, 0, 0];
    for (kind, value) in [(CTA_MARK, mark), (CTA_MARK_MASK, u32::MAX)] {
        body.extend_from_slice(&8_u16.to_ne_bytes());
        body.extend_from_slice(&kind.to_ne_bytes());
        body.extend_from_slice(&value.to_be_bytes());
    }
    let length = u32::try_from(16 + body.len()).unwrap_or(u32::MAX);
    let mut message = length.to_ne_bytes().to_vec();
    message.extend_from_slice(&DELETE.to_ne_bytes());
    message.extend_from_slice(&FLAGS.to_ne_bytes());
    // Sequence number, and the kernel fills in who we are.
    message.extend_from_slice(&[0; 8]);
    message.extend_from_slice(&body);
    message
}

fn acknowledged(answer: &[u8]) -> io::Result<()> {
    let number = |at: usize| -> Option<[u8; 4]> { answer.get(at..at + 4)?.try_into().ok() };
    let kind = answer
        .get(4..6)
        .map(|kind| u16::from_ne_bytes([kind[0], kind[1]]));
    match (kind, number(16).map(i32::from_ne_bytes)) {
        // Nothing was there to forget.
        (Some(NLMSG_ERROR), Some(0)) => Ok(()),
        (Some(NLMSG_ERROR), Some(code)) if code == -(nix::errno::Errno::ENOENT as i32) => Ok(()),
        (Some(NLMSG_ERROR), Some(code)) => Err(io::Error::from_raw_os_error(-code)),
        _ => Err(io::Error::new(
            io::ErrorKind::InvalidData,
            "the kernel's answer is not an acknowledgement",
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernels_answers() {
        assert_eq!(request(7).len(), 36);
        let answer = |kind: u16, code: i32| {
            let mut bytes = 36_u32.to_ne_bytes().to_vec();
            bytes.extend_from_slice(&kind.to_ne_bytes());
            bytes.extend_from_slice(&[0; 10]);
            bytes.extend_from_slice(&code.to_ne_bytes());
            acknowledged(&bytes)
        };
        assert!(answer(NLMSG_ERROR, 0).is_ok());
        assert!(answer(NLMSG_ERROR, -2).is_ok());
        assert_eq!(answer(NLMSG_ERROR, -1).unwrap_err().raw_os_error(), Some(1));
        assert!(answer(3, 0).is_err());
        assert!(acknowledged(&[]).is_err());
    }
}
