//! Traffic control (tc): ingress queues, filters and limits of links.

use std::{io, net::Ipv4Addr};

use futures::StreamExt;
use nix::errno::Errno;
use rtnetlink::{
    packet_core::{
        DefaultNla, NLM_F_ACK, NLM_F_CREATE, NLM_F_REPLACE, NLM_F_REQUEST, NetlinkMessage,
        NetlinkPayload,
    },
    packet_route::{
        RouteNetlinkMessage,
        tc::{
            TcAction, TcActionAttribute, TcActionMirror, TcActionMirrorOption, TcActionOption,
            TcActionType, TcAttribute, TcFilterU32Option, TcHandle, TcMessage, TcMirror,
            TcMirrorActionType, TcOption, TcU32Key, TcU32Selector, TcU32SelectorFlags,
        },
    },
};

use crate::{
    links::{Links, errno, refused},
    plan::Bucket,
};

/// Handle of an ingress qdisc.
const INGRESS: u32 = 0xffff_0000;
/// Attributes of a token bucket filter (linux/pkt_sched.h).
const TCA_TBF_PARMS: u16 = 1;
const TCA_TBF_RATE64: u16 = 4;
const TCA_TBF_BURST: u16 = 6;

/// Protocols of Ethernet, as tc wants them: in network byte order.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Ethertype {
    All = 0x0003,
    V4 = 0x0800,
    Arp = 0x0806,
    V6 = 0x86dd,
}

pub(crate) fn key(off: i32, mask: u32, val: u32) -> TcU32Key {
    let mut key = TcU32Key::default();
    (key.off, key.mask, key.val) = (off, mask, val);
    key
}

pub(crate) fn word(bytes: &[u8]) -> u32 {
    bytes
        .iter()
        .chain([0, 0, 0, 0].iter())
        .take(4)
        .fold(0, |word, byte| word << 8 | u32::from(*byte))
}

/// A MAC address at that offset from the network header.
pub(crate) fn mac_at(off: i32, mac: [u8; 6]) -> [TcU32Key; 2] {
    [
        key(off, u32::MAX, word(&mac[..4])),
        key(off + 4, 0xffff_0000, word(&mac[4..])),
    ]
}

/// Sent by that MAC address: the Ethernet header ends with it and the type.
pub(crate) fn from_mac(mac: [u8; 6]) -> [TcU32Key; 2] {
    mac_at(-8, mac)
}

/// Sent by that IPv4 address.
pub(crate) fn from_v4(address: Ipv4Addr) -> TcU32Key {
    key(12, u32::MAX, word(&address.octets()))
}

/// `struct tc_tbf_qopt`, whose rate and burst have their own attributes: there they fit.
fn bucket_parameters(bucket: Bucket) -> Vec<u8> {
    let mut bytes = vec![0; 36];
    // tc_ratespec.linklayer: TC_LINKLAYER_ETHERNET, without which the kernel wants a table.
    bytes[1] = 1;
    let rate = u32::try_from(bucket.rate).unwrap_or(u32::MAX);
    bytes[8..12].copy_from_slice(&rate.to_ne_bytes());
    bytes[24..28].copy_from_slice(&bucket.queue.to_ne_bytes());
    bytes
}

impl Links {
    /// Lets out of the link what the bucket allows. Repeatable.
    pub(crate) async fn limit(&self, index: u32, bucket: Bucket) -> io::Result<()> {
        let mut message = TcMessage::with_index(i32::try_from(index).map_err(io::Error::other)?);
        message.header.parent = TcHandle::ROOT;
        let option = |kind, bytes| TcOption::Other(DefaultNla::new(kind, bytes));
        message.attributes = vec![
            TcAttribute::Kind("tbf".to_owned()),
            TcAttribute::Options(vec![
                option(TCA_TBF_PARMS, bucket_parameters(bucket)),
                option(TCA_TBF_RATE64, bucket.rate.to_ne_bytes().to_vec()),
                option(TCA_TBF_BURST, bucket.burst.to_ne_bytes().to_vec()),
            ]),
        ];
        let mut request = NetlinkMessage::from(RouteNetlinkMessage::NewQueueDiscipline(message));
        request.header.flags = NLM_F_REQUEST | NLM_F_ACK | NLM_F_CREATE | NLM_F_REPLACE;
        let refuse = || refused("limit a link (sch_tbf)".to_owned());
        let mut answers = self.0.clone().request(request).map_err(refuse())?;
        while let Some(answer) = answers.next().await {
            if let NetlinkPayload::Error(error) = answer.payload
                && error.code.is_some()
            {
                return Err(refuse()(rtnetlink::Error::NetlinkError(error)));
            }
        }
        Ok(())
    }

    /// Gives the link an ingress queue without filters.
    pub(crate) async fn renew_ingress(&self, index: u32) -> io::Result<()> {
        let index = i32::try_from(index).map_err(io::Error::other)?;
        let mut queues = self.0.qdisc();
        let mut old = queues.del(index);
        old.message_mut().header.parent = TcHandle::INGRESS;
        old.message_mut().header.handle = TcHandle::from(INGRESS);
        match old.execute().await {
            Ok(()) => {}
            // There was none.
            Err(error) if matches!(errno(&error), Some(Errno::ENOENT | Errno::EINVAL)) => {}
            Err(error) => return Err(refused("remove an ingress queue".to_owned())(error)),
        }
        queues
            .add(index)
            .ingress()
            .execute()
            .await
            .map_err(refused("add an ingress queue".to_owned()))
    }

    /// Sends what arrives at link `from` and has `keys` out of link `to`.
    pub(crate) async fn redirect(
        &self,
        from: u32,
        to: u32,
        priority: u16,
        protocol: Ethertype,
        keys: Vec<TcU32Key>,
    ) -> io::Result<()> {
        let from = i32::try_from(from).map_err(io::Error::other)?;
        let mut selector = TcU32Selector::default();
        selector.flags = TcU32SelectorFlags::Terminal;
        selector.nkeys = u8::try_from(keys.len()).map_err(io::Error::other)?;
        selector.keys = keys;
        let mut mirror = TcMirror::default();
        mirror.generic.action = TcActionType::Stolen;
        mirror.eaction = TcMirrorActionType::EgressRedir;
        mirror.ifindex = to;
        let mut action = TcAction::default();
        action.attributes = vec![
            TcActionAttribute::Kind(TcActionMirror::KIND.to_owned()),
            TcActionAttribute::Options(vec![TcActionOption::Mirror(TcActionMirrorOption::Parms(
                mirror,
            ))]),
        ];
        let options = [
            TcFilterU32Option::Selector(selector),
            TcFilterU32Option::Action(vec![action]),
        ];
        self.0
            .traffic_filter(from)
            .add()
            .parent(INGRESS)
            .priority(priority)
            .protocol((protocol as u16).to_be())
            .u32(&options)
            .map_err(refused("plan a redirection".to_owned()))?
            .execute()
            .await
            .map_err(refused("redirect packets (cls_u32, act_mirred)".to_owned()))
    }
}
