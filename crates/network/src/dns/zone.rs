//! What a network's pods can resolve, and the answer to one query.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    net::{IpAddr, Ipv4Addr},
};

use hickory_proto::{
    op::{Edns, Message, MessageType, OpCode, Query, ResponseCode},
    rr::{
        DNSClass, Name, RData, Record, RecordType,
        rdata::{A, AAAA, CNAME, PTR, SOA, SRV},
    },
};
use ipnet::IpNet;

use crate::{NameData, NameRecord, NetworkServices};

/// Seconds for which pods may keep an answer: a pod's address may be another's soon.
const TTL: u32 = 5;
/// What fits into a UDP answer without fragments (DNS flag day 2020).
const MAX_UDP_PAYLOAD: u16 = 1232;
const MIN_UDP_PAYLOAD: u16 = 512;
/// Records in one answer.
const MAX_RECORDS: usize = 128;
/// How many names an alias may go through.
const MAX_ALIASES: usize = 8;

/// The names of one network.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Zone {
    domain: Name,
    /// Ranges of addresses that are this network's alone.
    own: Vec<IpNet>,
    records: HashMap<String, Entry>,
    names: BTreeMap<IpAddr, String>,
    /// What a name of `records` ends with.
    ancestors: HashSet<String>,
}

/// What a name stands for.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct Entry {
    addresses: Vec<IpAddr>,
    services: Vec<(u16, String)>,
    alias: Option<String>,
}

/// What becomes of a query.
#[derive(Debug)]
pub(crate) enum Decision {
    /// This is the answer.
    Answer(Box<Message>),
    /// An upstream server may know.
    Forward(Box<Message>),
    /// The answer so far ends in an alias; an upstream server may know what the query asks.
    Chase {
        /// The answer so far.
        answer: Box<Message>,
        /// The question for the alias' target.
        query: Box<Message>,
    },
    /// Not worth an answer.
    Ignore,
}

/// What a zone says to a question.
enum Lookup {
    /// These records, which may be none, and more that may help.
    Records(Vec<Record>, Vec<Record>),
    /// An alias, and records up to its target, which is elsewhere.
    Alias(Vec<Record>, Name),
    /// No.
    No(ResponseCode),
    /// This zone has no say in it.
    Elsewhere,
}

impl Zone {
    /// A zone; records with impossible names are left out.
    pub(crate) fn new(
        domain: &str,
        cidr: IpNet,
        pods: &[NameRecord],
        services: &NetworkServices,
    ) -> Self {
        let mut domain = Name::from_ascii(domain).unwrap_or_else(|_invalid| Name::root());
        domain.set_fqdn(true);
        let mut zone = Self {
            domain,
            own: [Some(cidr), services.range].into_iter().flatten().collect(),
            records: HashMap::new(),
            names: BTreeMap::new(),
            ancestors: HashSet::new(),
        };
        for name in &services.names {
            let entry = zone.entry(&name.name);
            match &name.data {
                NameData::Address { address, reverse } => {
                    if !entry.addresses.contains(address) {
                        entry.addresses.push(*address);
                    }
                    if *reverse {
                        let name = name.name.to_ascii_lowercase();
                        zone.names.entry(*address).or_insert(name);
                    }
                }
                NameData::Service { port, target } => entry.services.push((*port, target.clone())),
                NameData::Alias(target) => entry.alias = Some(target.clone()),
            }
        }
        for record in pods {
            let entry = zone.entry(&record.name);
            if !entry.addresses.contains(&record.address) {
                entry.addresses.push(record.address);
            }
            let name = record.name.to_ascii_lowercase();
            zone.names.entry(record.address).or_insert(name);
        }
        zone
    }

    fn entry(&mut self, name: &str) -> &mut Entry {
        let name = name.to_ascii_lowercase();
        let mut rest = name.as_str();
        while let Some((_label, parent)) = rest.split_once('.') {
            self.ancestors.insert(parent.to_owned());
            rest = parent;
        }
        self.records.entry(name).or_default()
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
        let mut message = reply(&query);
        message.metadata.authoritative = true;
        match self.lookup(question, usize::from(id)) {
            Lookup::Records(answers, more) => {
                if answers.is_empty() {
                    message.add_authorities(self.start_of_authority());
                }
                message.add_answers(answers);
                message.add_additionals(more);
                Decision::Answer(Box::new(message))
            }
            Lookup::Alias(answers, target) => {
                message.add_answers(answers);
                let mut asked = Message::query();
                asked.metadata.id = query.metadata.id;
                asked.metadata.recursion_desired = true;
                asked.add_query(Query::query(target, question.query_type));
                Decision::Chase {
                    answer: Box::new(message),
                    query: Box::new(asked),
                }
            }
            Lookup::No(code) => {
                message.metadata.response_code = code;
                message.metadata.authoritative = code == ResponseCode::NXDomain;
                if code == ResponseCode::NXDomain {
                    message.add_authorities(self.start_of_authority());
                }
                Decision::Answer(Box::new(message))
            }
            Lookup::Elsewhere => Decision::Forward(Box::new(query)),
        }
    }

    /// The record by which clients know how long a no is good (RFC 2308).
    fn start_of_authority(&self) -> Option<Record> {
        let at = |label: &str| {
            Name::from_ascii(label)
                .ok()?
                .append_domain(&self.domain)
                .ok()
        };
        let soa = SOA::new(at("ns.dns")?, at("hostmaster")?, 1, 7200, 1800, 86_400, TTL);
        Some(Record::from_rdata(
            self.domain.clone(),
            TTL,
            RData::SOA(soa),
        ))
    }

    fn lookup(&self, question: &Query, turn: usize) -> Lookup {
        // Zone transfers and the like are nobody's business.
        if matches!(
            question.query_type,
            RecordType::AXFR | RecordType::IXFR | RecordType::ANY
        ) {
            return Lookup::No(ResponseCode::Refused);
        }
        let kind = question.query_type;
        let mut name = question.name.to_lowercase();
        let mut found = Vec::new();
        for _step in 0..MAX_ALIASES {
            let text = name.to_ascii();
            let text = text.strip_suffix('.').unwrap_or(&text);
            if text == "localhost" || text.ends_with(".localhost") {
                found.extend(addresses(&name, kind, &[Ipv4Addr::LOCALHOST.into()], 0));
                return Lookup::Records(found, Vec::new());
            }
            let Some(entry) = self.records.get(text) else {
                return self.lookup_absent(name, kind, text, found);
            };
            if let Some(target) = entry.alias.as_deref().and_then(absolute) {
                found.push(Record::from_rdata(
                    name,
                    TTL,
                    RData::CNAME(CNAME(target.clone())),
                ));
                if kind == RecordType::CNAME {
                    return Lookup::Records(found, Vec::new());
                }
                name = target.to_lowercase();
                continue;
            }
            if kind == RecordType::SRV {
                let (records, more) = self.services(&name, entry);
                found.extend(records);
                return Lookup::Records(found, more);
            }
            found.extend(addresses(&name, kind, &entry.addresses, turn));
            return Lookup::Records(found, Vec::new());
        }
        Lookup::No(ResponseCode::ServFail)
    }

    /// What to say of a name without records, to which the aliases `found` have led.
    fn lookup_absent(
        &self,
        name: Name,
        kind: RecordType,
        text: &str,
        found: Vec<Record>,
    ) -> Lookup {
        if self.domain.zone_of(&name) {
            // A name above one that exists, exists, without records (RFC 8020).
            return if self.ancestors.contains(text) || !found.is_empty() {
                Lookup::Records(found, Vec::new())
            } else {
                Lookup::No(ResponseCode::NXDomain)
            };
        }
        if !found.is_empty() {
            return Lookup::Alias(found, name);
        }
        let Ok(reverse) = name.parse_arpa_name() else {
            return Lookup::Elsewhere;
        };
        let known = self.names.get(&reverse.addr());
        if let Some(known) = known.filter(|_name| is_host(&reverse)) {
            let record = (absolute(known).filter(|_target| kind == RecordType::PTR))
                .map(|target| Record::from_rdata(name, TTL, RData::PTR(PTR(target))));
            return Lookup::Records(record.into_iter().collect(), Vec::new());
        }
        if self.own.iter().any(|net| net.contains(&reverse.addr())) {
            Lookup::No(ResponseCode::NXDomain)
        } else {
            Lookup::Elsewhere
        }
    }

    /// The SRV records of a name, and the addresses of their targets.
    fn services(&self, name: &Name, entry: &Entry) -> (Vec<Record>, Vec<Record>) {
        let count = entry.services.len().clamp(1, MAX_RECORDS);
        let weight = u16::try_from(100 / count).unwrap_or(1).max(1);
        let (mut records, mut more, mut seen) = (Vec::new(), Vec::new(), HashSet::new());
        for (port, target) in entry.services.iter().take(MAX_RECORDS) {
            let Some(host) = absolute(target) else {
                continue;
            };
            let data = RData::SRV(SRV::new(0, weight, *port, host.clone()));
            records.push(Record::from_rdata(name.clone(), TTL, data));
            if seen.insert(target)
                && let Some(entry) = self.records.get(&target.to_ascii_lowercase())
            {
                for kind in [RecordType::A, RecordType::AAAA] {
                    more.extend(addresses(&host, kind, &entry.addresses, 0));
                }
            }
        }
        more.truncate(MAX_RECORDS);
        (records, more)
    }
}

fn absolute(text: &str) -> Option<Name> {
    let mut name = Name::from_ascii(text).ok()?;
    name.set_fqdn(true);
    Some(name)
}

/// The addresses as records; which comes first changes with `turn`.
fn addresses(name: &Name, kind: RecordType, addresses: &[IpAddr], turn: usize) -> Vec<Record> {
    let mut records: Vec<Record> = addresses
        .iter()
        .filter_map(|address| match (kind, address) {
            (RecordType::A, IpAddr::V4(address)) => Some(RData::A(A(*address))),
            (RecordType::AAAA, IpAddr::V6(address)) => Some(RData::AAAA(AAAA(*address))),
            _other => None,
        })
        .map(|data| Record::from_rdata(name.clone(), TTL, data))
        .collect();
    if !records.is_empty() {
        let first = turn % records.len();
        records.rotate_left(first);
    }
    records.truncate(MAX_RECORDS);
    records
}

/// The answer that ends in an alias, with what the upstream said of the alias' target.
pub(crate) fn chased(mut answer: Message, upstream: &[u8]) -> Message {
    match Message::from_vec(upstream) {
        Ok(said) => {
            answer.metadata.response_code = said.metadata.response_code;
            answer.add_answers(said.answers.into_iter().take(MAX_RECORDS));
        }
        Err(_invalid) => answer.metadata.response_code = ResponseCode::ServFail,
    }
    answer
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

/// What is sent instead of an answer that does not fit into UDP: ask again over TCP. What only
/// helps is left out first.
pub(crate) fn truncated(answer: &[u8], limit: usize) -> Option<Vec<u8>> {
    let mut full = Message::from_vec(answer).ok()?;
    if !full.additionals.is_empty() {
        full.additionals.clear();
        let bytes = full.to_vec().ok()?;
        if bytes.len() <= limit {
            return Some(bytes);
        }
    }
    let mut message = reply(&full);
    message.metadata.truncation = true;
    message.to_vec().ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ServiceName;

    fn services() -> NetworkServices {
        let name = |name: &str, data| ServiceName {
            name: format!("{name}.acme.svc.cluster.local"),
            data,
        };
        let at = |text: &str, reverse| NameData::Address {
            address: text.parse().unwrap(),
            reverse,
        };
        let port = |target: &str| NameData::Service {
            port: 80,
            target: format!("{target}.acme.svc.cluster.local"),
        };
        let alias = |target: &str| NameData::Alias(target.to_owned());
        NetworkServices {
            range: Some("10.96.0.0/16".parse().unwrap()),
            ports: Vec::new(),
            names: vec![
                name("api", at("10.96.0.7", true)),
                name("_http._tcp.api", port("api")),
                name("shop", at("10.0.0.5", false)),
                name("shop", at("10.0.0.6", false)),
                name("a.shop", at("10.0.0.5", false)),
                name("b.shop", at("10.0.0.6", false)),
                name("_http._tcp.shop", port("a.shop")),
                name("_http._tcp.shop", port("b.shop")),
                name("out", alias("debian.org")),
                name("in", alias("api.acme.svc.cluster.local")),
                name("loop", alias("loop.acme.svc.cluster.local")),
                name("lost", alias("api.globex.svc.cluster.local")),
            ],
        }
    }

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
            &services(),
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
        let mut data = data;
        data.sort();
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
    fn services_have_ports_addresses_and_names() {
        let name = "api.acme.svc.cluster.local.";
        assert_eq!(answer(name, RecordType::A).1, ["10.96.0.7"]);
        assert_eq!(answer("7.0.96.10.in-addr.arpa.", RecordType::PTR).1, [name]);
        let (code, _) = answer("8.0.96.10.in-addr.arpa.", RecordType::PTR);
        assert_eq!(code, ResponseCode::NXDomain);
        let (_, data) = answer("_http._tcp.api.acme.svc.cluster.local.", RecordType::SRV);
        assert_eq!(data, [format!("0 100 80 {name}")]);
        let Decision::Answer(message) =
            ask("_http._tcp.shop.acme.svc.cluster.local.", RecordType::SRV)
        else {
            panic!("no answer");
        };
        assert_eq!((message.answers.len(), message.additionals.len()), (2, 2));
        let first = &message.answers[0].data.to_string();
        assert_eq!(first, "0 50 80 a.shop.acme.svc.cluster.local.");
        let (code, data) = answer("_tcp.api.acme.svc.cluster.local.", RecordType::SRV);
        assert_eq!((code, data), (ResponseCode::NoError, vec![]));
    }

    #[test]
    fn aliases_are_followed_here_and_asked_for_elsewhere() {
        let api = "api.acme.svc.cluster.local.";
        let (_, data) = answer("in.acme.svc.cluster.local.", RecordType::A);
        assert_eq!(data, [api, "10.96.0.7"]);
        let (code, _) = answer("loop.acme.svc.cluster.local.", RecordType::A);
        assert_eq!(code, ResponseCode::ServFail);
        // A name of the domain that is not here is nowhere, by an alias too.
        let (_, data) = answer("lost.acme.svc.cluster.local.", RecordType::A);
        assert_eq!(data, ["api.globex.svc.cluster.local."]);
        match ask("out.acme.svc.cluster.local.", RecordType::A) {
            Decision::Chase {
                answer: so_far,
                query,
            } => {
                assert_eq!(query.queries[0].name.to_ascii(), "debian.org.");
                let mut said = Message::response(query.metadata.id, OpCode::Query);
                said.add_answers(addresses(
                    &query.queries[0].name,
                    RecordType::A,
                    &["192.0.2.1".parse().unwrap()],
                    0,
                ));
                let full = chased(*so_far, &said.to_vec().unwrap());
                assert_eq!(full.answers.len(), 2);
            }
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_no_says_how_long_it_is_good() {
        for name in ["x.cluster.local.", "acme.svc.cluster.local."] {
            match ask(name, RecordType::A) {
                Decision::Answer(message) => {
                    assert_eq!(message.authorities[0].record_type(), RecordType::SOA);
                }
                other => panic!("{other:?}"),
            }
        }
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
        let short = Message::from_vec(&truncated(&message.to_vec().unwrap(), 20).unwrap()).unwrap();
        assert!(short.metadata.truncation);
        assert_eq!(short.answers, []);
        assert_eq!(short.queries, message.queries);
    }

    proptest::proptest! {
        #[test]
        fn no_query_makes_it_panic(bytes in proptest::collection::vec(proptest::num::u8::ANY, 0..600)) {
            match zone().decide(&bytes) {
                Decision::Answer(message) => drop(message.to_vec()),
                Decision::Forward(_) | Decision::Chase { .. } | Decision::Ignore => {}
            }
        }
    }
}
