//! What a network's pods can resolve, and the answer to one query.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    net::{IpAddr, Ipv4Addr},
};

use hickory_proto::{
    op::{Edns, Message, MessageType, OpCode, Query, ResponseCode},
    rr::{
        DNSClass, Name, RData, Record, RecordType,
        rdata::{A, AAAA, PTR},
    },
};
use ipnet::IpNet;

use crate::NameRecord;

/// Seconds for which pods may keep an answer: a pod's address may be another's soon.
const TTL: u32 = 5;
/// What fits into a UDP answer without fragments (DNS flag day 2020).
const MAX_UDP_PAYLOAD: u16 = 1232;
const MIN_UDP_PAYLOAD: u16 = 512;
/// Addresses in one answer.
const MAX_ADDRESSES: usize = 64;

/// The names of one network.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Zone {
    domain: Name,
    cidr: IpNet,
    addresses: HashMap<String, Vec<IpAddr>>,
    names: BTreeMap<IpAddr, String>,
    /// What a name of `addresses` ends with.
    ancestors: HashSet<String>,
}

/// What becomes of a query.
#[derive(Debug)]
pub(crate) enum Decision {
    /// This is the answer.
    Answer(Box<Message>),
    /// An upstream server may know.
    Forward(Box<Message>),
    /// Not worth an answer.
    Ignore,
}

impl Zone {
    /// A zone; records with impossible names are left out.
    pub(crate) fn new(domain: &str, cidr: IpNet, records: &[NameRecord]) -> Self {
        let mut addresses = HashMap::<String, Vec<IpAddr>>::new();
        let mut names = BTreeMap::new();
        let mut ancestors = HashSet::new();
        for record in records {
            let name = record.name.to_ascii_lowercase();
            let mut rest = name.as_str();
            while let Some((_label, parent)) = rest.split_once('.') {
                ancestors.insert(parent.to_owned());
                rest = parent;
            }
            names.entry(record.address).or_insert_with(|| name.clone());
            addresses.entry(name).or_default().push(record.address);
        }
        let mut domain = Name::from_ascii(domain).unwrap_or_else(|_invalid| Name::root());
        domain.set_fqdn(true);
        Self {
            domain,
            cidr,
            addresses,
            names,
            ancestors,
        }
    }

    /// Decides on a query as it came from a pod.
    pub(crate) fn decide(&self, bytes: &[u8]) -> Decision {
        // Answers to answers would let two servers talk for ever.
        if bytes.len() < 12 || bytes[2] & 0x80 != 0 {
            return Decision::Ignore;
        }
        let id = u16::from_be_bytes([bytes[0], bytes[1]]);
        let Ok(query) = Message::from_vec(bytes) else {
            return refuse(
                &Message::new(id, MessageType::Query, OpCode::Query),
                ResponseCode::FormErr,
            );
        };
        if query.metadata.op_code != OpCode::Query {
            return refuse(&query, ResponseCode::NotImp);
        }
        let [question] = query.queries.as_slice() else {
            return refuse(&query, ResponseCode::FormErr);
        };
        if question.query_class != DNSClass::IN {
            return refuse(&query, ResponseCode::Refused);
        }
        match self.lookup(question) {
            Some(Ok(answers)) => {
                let mut message = reply(&query);
                message.metadata.authoritative = true;
                message.add_answers(answers);
                Decision::Answer(Box::new(message))
            }
            Some(Err(code)) => {
                let Decision::Answer(mut message) = refuse(&query, code) else {
                    return Decision::Ignore;
                };
                message.metadata.authoritative = code == ResponseCode::NXDomain;
                Decision::Answer(message)
            }
            None => Decision::Forward(Box::new(query)),
        }
    }

    /// Records for the question; `None` if this zone has no say in it.
    fn lookup(&self, question: &Query) -> Option<Result<Vec<Record>, ResponseCode>> {
        // Zone transfers and the like are nobody's business.
        if matches!(
            question.query_type,
            RecordType::AXFR | RecordType::IXFR | RecordType::ANY
        ) {
            return Some(Err(ResponseCode::Refused));
        }
        let name = question.name.to_lowercase();
        let text = name.to_ascii();
        let text = text.strip_suffix('.').unwrap_or(&text);
        if text == "localhost" || text.ends_with(".localhost") {
            return Some(Ok(self.records(
                &name,
                question.query_type,
                &[Ipv4Addr::LOCALHOST.into()],
            )));
        }
        if let Some(addresses) = self.addresses.get(text) {
            return Some(Ok(self.records(&name, question.query_type, addresses)));
        }
        if self.domain.zone_of(&name) {
            // A name above one that exists, exists, without records (RFC 8020).
            return Some(if self.ancestors.contains(text) {
                Ok(Vec::new())
            } else {
                Err(ResponseCode::NXDomain)
            });
        }
        let reverse = name.parse_arpa_name().ok()?;
        if let Some(known) = self
            .names
            .get(&reverse.addr())
            .filter(|_name| is_host(&reverse))
        {
            if question.query_type != RecordType::PTR {
                return Some(Ok(Vec::new()));
            }
            let mut target = Name::from_ascii(known).ok()?;
            target.set_fqdn(true);
            return Some(Ok(vec![Record::from_rdata(
                name,
                TTL,
                RData::PTR(PTR(target)),
            )]));
        }
        self.cidr
            .contains(&reverse.addr())
            .then_some(Err(ResponseCode::NXDomain))
    }

    fn records(&self, name: &Name, kind: RecordType, addresses: &[IpAddr]) -> Vec<Record> {
        addresses
            .iter()
            .filter_map(|address| match (kind, address) {
                (RecordType::A, IpAddr::V4(address)) => Some(RData::A(A(*address))),
                (RecordType::AAAA, IpAddr::V6(address)) => Some(RData::AAAA(AAAA(*address))),
                _other => None,
            })
            .take(MAX_ADDRESSES)
            .map(|data| Record::from_rdata(name.clone(), TTL, data))
            .collect()
    }
}

fn is_host(net: &IpNet) -> bool {
    net.prefix_len() == net.max_prefix_len()
}

/// An empty answer to `query`.
fn reply(query: &Message) -> Message {
    let mut message = Message::response(query.metadata.id, query.metadata.op_code);
    message.metadata.recursion_desired = query.metadata.recursion_desired;
    message.metadata.recursion_available = true;
    if let Some(question) = query.queries.first() {
        message.add_query(question.clone());
    }
    if query.edns.is_some() {
        let mut edns = Edns::new();
        edns.set_max_payload(MAX_UDP_PAYLOAD);
        message.set_edns(edns);
    }
    message
}

/// An answer without records.
pub(crate) fn refuse(query: &Message, code: ResponseCode) -> Decision {
    let mut message = reply(query);
    message.metadata.response_code = code;
    Decision::Answer(Box::new(message))
}

/// The size of the answer that the asker takes over UDP.
pub(crate) fn udp_limit(query: &[u8]) -> usize {
    let offered = Message::from_vec(query)
        .ok()
        .and_then(|message| message.edns.map(|edns| edns.max_payload()))
        .unwrap_or(MIN_UDP_PAYLOAD);
    usize::from(offered.clamp(MIN_UDP_PAYLOAD, MAX_UDP_PAYLOAD))
}

/// What is sent instead of an answer that does not fit into UDP: ask again over TCP.
pub(crate) fn truncated(answer: &[u8]) -> Option<Vec<u8>> {
    let full = Message::from_vec(answer).ok()?;
    let mut message = reply(&full);
    message.metadata.truncation = true;
    message.to_vec().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn zone() -> Zone {
        let record = |name: &str, address: &str| NameRecord {
            name: name.to_owned(),
            address: address.parse().unwrap(),
        };
        Zone::new(
            "cluster.local",
            "10.0.0.0/24".parse().unwrap(),
            &[
                record("web.acme.svc.cluster.local", "10.0.0.5"),
                record("web.acme.svc.cluster.local", "10.0.0.6"),
                record("db.acme.svc.cluster.local", "10.0.0.7"),
            ],
        )
    }

    fn ask(name: &str, kind: RecordType) -> Decision {
        let mut message = Message::query();
        message.metadata.recursion_desired = true;
        message.add_query(Query::query(Name::from_ascii(name).unwrap(), kind));
        zone().decide(&message.to_vec().unwrap())
    }

    fn answer(name: &str, kind: RecordType) -> (ResponseCode, Vec<String>) {
        match ask(name, kind) {
            Decision::Answer(message) => (
                message.metadata.response_code,
                message
                    .answers
                    .iter()
                    .map(|record| record.data.to_string())
                    .collect(),
            ),
            other => panic!("{name} {kind}: {other:?}"),
        }
    }

    #[test]
    fn own_names_have_addresses() {
        let (code, data) = answer("WEB.acme.svc.cluster.local.", RecordType::A);
        assert_eq!(code, ResponseCode::NoError);
        assert_eq!(data, ["10.0.0.5", "10.0.0.6"]);
        assert_eq!(
            answer("web.acme.svc.cluster.local.", RecordType::AAAA),
            (ResponseCode::NoError, vec![])
        );
        assert_eq!(answer("localhost.", RecordType::A).1, ["127.0.0.1"]);
    }

    #[test]
    fn unknown_names_of_the_domain_do_not_exist_and_are_not_asked_for_elsewhere() {
        for name in ["www.globex.svc.cluster.local.", "x.cluster.local."] {
            assert_eq!(
                answer(name, RecordType::A),
                (ResponseCode::NXDomain, vec![]),
                "{name}"
            );
        }
        let (code, data) = answer("acme.svc.cluster.local.", RecordType::A);
        assert_eq!((code, data), (ResponseCode::NoError, vec![]));
    }

    #[test]
    fn addresses_have_names_and_others_of_the_network_have_none() {
        let (_, data) = answer("7.0.0.10.in-addr.arpa.", RecordType::PTR);
        assert_eq!(data, ["db.acme.svc.cluster.local."]);
        let (code, _) = answer("99.0.0.10.in-addr.arpa.", RecordType::PTR);
        assert_eq!(code, ResponseCode::NXDomain);
        assert!(matches!(
            ask("8.8.8.8.in-addr.arpa.", RecordType::PTR),
            Decision::Forward(_)
        ));
    }

    #[test]
    fn the_rest_is_forwarded() {
        assert!(matches!(
            ask("debian.org.", RecordType::A),
            Decision::Forward(_)
        ));
        assert!(matches!(
            ask("evilcluster.local.", RecordType::A),
            Decision::Forward(_)
        ));
    }

    #[test]
    fn garbage_gets_no_or_a_short_answer() {
        assert!(matches!(zone().decide(b""), Decision::Ignore));
        assert!(matches!(zone().decide(&[0; 11]), Decision::Ignore));
        let mut response = Message::response(7, OpCode::Query).to_vec().unwrap();
        assert!(matches!(zone().decide(&response), Decision::Ignore));
        response[2] &= 0x7f;
        response[5] = 200;
        match zone().decide(&response) {
            Decision::Answer(message) => {
                assert_eq!(message.metadata.response_code, ResponseCode::FormErr);
                assert_eq!(message.metadata.id, 7);
            }
            other => panic!("{other:?}"),
        }
        assert_eq!(
            answer("debian.org.", RecordType::AXFR).0,
            ResponseCode::Refused
        );
    }

    #[test]
    fn what_does_not_fit_is_truncated() {
        let Decision::Answer(message) = ask("web.acme.svc.cluster.local.", RecordType::A) else {
            panic!("no answer");
        };
        let short = Message::from_vec(&truncated(&message.to_vec().unwrap()).unwrap()).unwrap();
        assert!(short.metadata.truncation);
        assert_eq!(short.answers, []);
        assert_eq!(short.queries, message.queries);
    }

    proptest::proptest! {
        #[test]
        fn no_query_makes_it_panic(bytes in proptest::collection::vec(proptest::num::u8::ANY, 0..600)) {
            match zone().decide(&bytes) {
                Decision::Answer(message) => drop(message.to_vec()),
                Decision::Forward(_) | Decision::Ignore => {}
            }
        }
    }
}
