//! What makes a VM a particular pod: the message that configures it.

use std::{fmt::Write, net::IpAddr};

use hypernetes_agent_api::v1;
use hypernetes_network::{Lease, PodName, PodNetworkRequest};

use crate::{
    api::{IdMapping, SandboxConfig, SandboxMetadata, UserNamespace},
    error::RuntimeError,
    logs::format::now_nanos,
    records::storage,
};

/// SCSI slot of the scratch disk.
pub(crate) const SCRATCH_SLOT: u32 = 1;
const MAX_ENTRIES: usize = 64;

fn invalid(field: &str, rule: &str) -> RuntimeError {
    RuntimeError::Invalid {
        field: field.to_owned(),
        rule: rule.to_owned(),
    }
}

fn is_host_name(text: &str) -> bool {
    (1..=253).contains(&text.len())
        && text
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'.' | b'_'))
}

/// Refuses what cannot become a pod, before anything is done.
pub(crate) fn check(config: &SandboxConfig) -> Result<(), RuntimeError> {
    if config.host.is_some() {
        return Err(invalid("host", "is not for a pod in a VM"));
    }
    check_sandbox(config)
}

/// Refuses what cannot become a pod of any kind.
///
/// # Errors
/// With the field and what it must be.
pub fn check_sandbox(config: &SandboxConfig) -> Result<(), RuntimeError> {
    let host_name_rule = "must be made of letters, digits, '-', '_' and '.'";
    if !is_host_name(&config.hostname) || config.hostname.len() > 64 {
        return Err(invalid(
            "hostname",
            "must be 1 to 64 letters, digits, '-', '_' and '.'",
        ));
    }
    if config.vcpus > 64 {
        return Err(invalid("vcpus", "must be at most 64"));
    }
    if config.memory_mib != 0 && config.memory_mib < 64 {
        return Err(invalid("memory_mib", "must be at least 64"));
    }
    crate::scratch::ScratchDisks::check(config.scratch_mib)?;
    if !config.log_directory.is_absolute() {
        return Err(invalid("log_directory", "must be absolute"));
    }
    let dns = &config.dns;
    if dns.servers.len() + dns.searches.len() + dns.options.len() + config.hosts.len()
        > MAX_ENTRIES * 4
    {
        return Err(invalid("dns", "must have fewer entries"));
    }
    if !dns
        .servers
        .iter()
        .all(|server| server.parse::<IpAddr>().is_ok())
    {
        return Err(invalid("dns.servers", "must be IP addresses"));
    }
    // A line break here would be a line of the tenant's own choice in resolv.conf.
    if !dns.searches.iter().all(|search| is_host_name(search)) {
        return Err(invalid("dns.searches", host_name_rule));
    }
    let word = |text: &String| !text.is_empty() && text.bytes().all(|b| b.is_ascii_graphic());
    if !dns.options.iter().all(word) {
        return Err(invalid("dns.options", "must be words"));
    }
    for alias in &config.hosts {
        if alias.names.is_empty() || !alias.names.iter().all(|name| is_host_name(name)) {
            return Err(invalid("hosts", host_name_rule));
        }
    }
    if let Some(users) = &config.user_namespace {
        for ids in [users.uids, users.gids] {
            if ids.count == 0 || ids.first.checked_add(ids.count).is_none() {
                return Err(invalid("user_namespace", "must have ids below 2^32"));
            }
        }
    }
    for name in config.sysctls.keys() {
        let plain = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-' | b'/');
        if name.is_empty() || !name.bytes().all(plain) || name.contains("..") {
            return Err(invalid("sysctls", "must be names of kernel parameters"));
        }
    }
    Ok(())
}

/// Bytes that nobody can guess.
pub(crate) fn random<const COUNT: usize>() -> Result<[u8; COUNT], RuntimeError> {
    const { assert!(COUNT <= 256) };
    let mut bytes = [0; COUNT];
    // Requests of up to 256 bytes are answered whole or not at all (getrandom(2)).
    rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty())
        .map_err(|error| storage("get random bytes", std::io::Error::from(error)))?;
    Ok(bytes)
}

/// The configuration message for a sandbox with this lease, whose NIC has `device_mac` if that is
/// not the lease's yet.
pub(crate) fn configure_request(
    config: &SandboxConfig,
    lease: Option<&Lease>,
    device_mac: Option<&str>,
) -> Result<v1::ConfigureSandboxRequest, RuntimeError> {
    Ok(v1::ConfigureSandboxRequest {
        hostname: config.hostname.clone(),
        unix_nanos: now_nanos(),
        seed: seed()?,
        interfaces: lease
            .map(|lease| interface(lease, device_mac))
            .into_iter()
            .collect(),
        sysctls: config.sysctls.clone().into_iter().collect(),
        scratch_slot: if config.scratch_mib == 0 {
            0
        } else {
            SCRATCH_SLOT
        },
        shm_size: 0,
        share_process_namespace: config.share_process_namespace,
        user_namespace: config.user_namespace.as_ref().map(user_namespace),
        files: vec![
            file("/etc/hosts", hosts(config, lease)),
            file("/etc/resolv.conf", resolv_conf(config, lease)),
            file("/etc/hostname", format!("{}\n", config.hostname)),
        ],
        rehearsal: false,
    })
}

/// 32 bytes that nobody else gets.
fn seed() -> Result<Vec<u8>, RuntimeError> {
    let seed: [u8; 32] = random()?;
    Ok(seed.to_vec())
}

/// The configuration message for what is nobody's pod and will be forgotten.
pub(crate) fn rehearsal_request() -> Result<v1::ConfigureSandboxRequest, RuntimeError> {
    Ok(v1::ConfigureSandboxRequest {
        hostname: "rehearsal".to_owned(),
        unix_nanos: now_nanos(),
        seed: seed()?,
        scratch_slot: SCRATCH_SLOT,
        files: vec![
            file("/etc/hosts", "127.0.0.1 localhost\n".to_owned()),
            file("/etc/resolv.conf", String::new()),
            file("/etc/hostname", "rehearsal\n".to_owned()),
        ],
        rehearsal: true,
        ..v1::ConfigureSandboxRequest::default()
    })
}

fn user_namespace(config: &UserNamespace) -> v1::UserNamespace {
    let ids = |ids: &IdMapping| {
        Some(v1::IdMapping {
            first: ids.first,
            count: ids.count,
        })
    };
    v1::UserNamespace {
        uids: ids(&config.uids),
        gids: ids(&config.gids),
    }
}

fn file(path: &str, content: String) -> v1::File {
    v1::File {
        path: path.to_owned(),
        content: content.into_bytes(),
        mode: 0o644,
        uid: 0,
    }
}

fn interface(lease: &Lease, device_mac: Option<&str>) -> v1::Interface {
    let device_mac = device_mac.unwrap_or_default().to_owned();
    if !lease.prefixes.is_empty() {
        return v1::Interface {
            mac: lease.mac.clone(),
            name: "eth0".into(),
            addresses: lease.prefixes.iter().map(ToString::to_string).collect(),
            routes: lease
                .routes
                .iter()
                .map(|route| v1::Route {
                    destination: route.destination.to_string(),
                    gateway: route.gateway.map(|to| to.to_string()).unwrap_or_default(),
                })
                .collect(),
            mtu: lease.mtu,
            device_mac,
        };
    }
    // Point to point: no neighbour is on link but the gateway.
    let (bits, everywhere) = if lease.address.is_ipv4() {
        (32, "0.0.0.0/0")
    } else {
        (128, "::/0")
    };
    let gateway = lease.gateway.to_string();
    v1::Interface {
        mac: lease.mac.clone(),
        name: "eth0".into(),
        addresses: vec![format!("{}/{bits}", lease.address)],
        routes: vec![
            v1::Route {
                destination: format!("{gateway}/{bits}"),
                gateway: String::new(),
            },
            v1::Route {
                destination: everywhere.into(),
                gateway,
            },
        ],
        mtu: lease.mtu,
        device_mac,
    }
}

/// What a sandbox asks of its network.
pub fn network_request(config: &SandboxConfig) -> PodNetworkRequest {
    let SandboxMetadata {
        namespace,
        name,
        uid,
        ..
    } = &config.metadata;
    PodNetworkRequest {
        address: config.requested_address,
        pod: PodName {
            namespace: namespace.clone(),
            name: name.clone(),
            uid: uid.clone(),
        },
        host_ports: config.host_ports.clone(),
        bandwidth: config.bandwidth,
    }
}

fn hosts(config: &SandboxConfig, lease: Option<&Lease>) -> String {
    let mut text = String::from(
        "127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n\
         fe00::0\tip6-localnet\nff00::0\tip6-mcastprefix\nff02::1\tip6-allnodes\nff02::2\tip6-allrouters\n",
    );
    let own = lease.map_or_else(|| "127.0.1.1".to_owned(), |lease| lease.address.to_string());
    let mut line = |address: &str, names: &str| {
        writeln!(text, "{address}\t{names}").expect("writing to a string cannot fail");
    };
    line(&own, &config.hostname);
    for alias in &config.hosts {
        line(&alias.address.to_string(), &alias.names.join(" "));
    }
    text
}

fn resolv_conf(config: &SandboxConfig, lease: Option<&Lease>) -> String {
    let dns = &config.dns;
    let mut servers = dns.servers.clone();
    let mut searches = dns.searches.clone();
    if let Some(lease) = lease {
        if servers.is_empty() {
            servers = lease.dns.iter().map(ToString::to_string).collect();
        }
        if searches.is_empty() {
            searches.clone_from(&lease.search);
        }
    }
    let mut text = String::new();
    let mut line = |key: &str, values: &[String]| {
        if !values.is_empty() {
            writeln!(text, "{key} {}", values.join(" ")).expect("writing to a string cannot fail");
        }
    };
    line("search", &searches);
    for server in servers {
        line("nameserver", &[server]);
    }
    line("options", &dns.options);
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        api::HostAlias,
        testing::{lease, sandbox_config},
    };

    #[test]
    fn files_say_who_the_pod_is() {
        let mut config = sandbox_config("web");
        let alias = HostAlias {
            address: [10, 0, 0, 9].into(),
            names: vec!["db".into(), "db.local".into()],
        };
        config.hosts.push(alias);
        config.dns.options.push("ndots:5".into());
        let lease = lease();
        let request = configure_request(&config, Some(&lease), None).unwrap();
        let text = |index: usize| String::from_utf8(request.files[index].content.clone()).unwrap();
        assert!(
            text(0).contains("\n10.1.0.5\tweb\n10.0.0.9\tdb db.local\n"),
            "{}",
            text(0)
        );
        assert_eq!(
            text(1),
            "search cluster.local\nnameserver 10.1.0.1\noptions ndots:5\n"
        );
        assert_eq!(text(2), "web\n");
        let interface = &request.interfaces[0];
        assert_eq!(interface.addresses, ["10.1.0.5/32"]);
        assert_eq!(interface.routes[0].destination, "10.1.0.1/32");
        assert_eq!(interface.routes[1].gateway, "10.1.0.1");
        assert_eq!(request.seed.len(), 32);
        let other = configure_request(&config, None, None).unwrap();
        assert_ne!(request.seed, other.seed);
    }

    #[test]
    fn lines_cannot_be_smuggled_in() {
        type Break = fn(&mut SandboxConfig);
        let cases: [(&str, Break); 7] = [
            ("hostname", |c| c.hostname = "a\nb".into()),
            ("dns.searches", |c| {
                c.dns.searches = vec!["x\nnameserver 6.6.6.6".into()];
            }),
            ("dns.servers", |c| {
                c.dns.servers = vec!["1.1.1.1 2.2.2.2".into()];
            }),
            ("dns.options", |c| c.dns.options = vec!["a b".into()]),
            ("hosts", |c| {
                c.hosts = vec![HostAlias {
                    address: [1, 1, 1, 1].into(),
                    names: vec!["a\nb".into()],
                }];
            }),
            ("sysctls", |c| {
                drop(c.sysctls.insert("../../x".into(), "1".into()));
            }),
            ("log_directory", |c| c.log_directory = "relative".into()),
        ];
        for (name, change) in cases {
            let mut config = sandbox_config("a");
            check(&config).unwrap();
            change(&mut config);
            let error = check(&config).unwrap_err();
            assert!(
                matches!(&error, RuntimeError::Invalid { field, .. } if field == name),
                "{error:?}"
            );
        }
    }
}
