//! `--publish`.

use crate::{
    error::{Failure, Result},
    model::PublishedPort,
};

/// `[ADDRESS:][HOST:]CONTAINER[/PROTOCOL]`, each port one or a range.
pub(crate) fn parse(flags: &[String]) -> Result<Vec<PublishedPort>> {
    let mut ports = Vec::new();
    for flag in flags {
        one(flag, &mut ports)?;
    }
    Ok(ports)
}

fn one(flag: &str, ports: &mut Vec<PublishedPort>) -> Result<()> {
    let invalid =
        |what: String| Failure::usage(format_args!("invalid publish format '{flag}': {what}"));
    let (rest, protocol) = flag.rsplit_once('/').unwrap_or((flag, "tcp"));
    let protocol = protocol.to_ascii_lowercase();
    if !matches!(protocol.as_str(), "tcp" | "udp") {
        return Err(invalid(format!("invalid proto: {protocol}")));
    }
    let (rest, container) = rest
        .rsplit_once(':')
        .map_or(("", rest), |(rest, container)| (rest, container));
    let (address, host) = rest.rsplit_once(':').unwrap_or(("", rest));
    let address = address.trim_start_matches('[').trim_end_matches(']');
    if !address.is_empty() && address.parse::<std::net::IpAddr>().is_err() {
        return Err(invalid(format!("invalid IP address: {address}")));
    }
    let range = |text: &str, what: &str| -> Result<(u16, u16)> {
        let (first, last) = text.split_once('-').unwrap_or((text, text));
        let number = |text: &str| text.parse::<u16>().ok().filter(|port| *port > 0);
        match (number(first), number(last)) {
            (Some(first), Some(last)) if first <= last => Ok((first, last)),
            _ => Err(invalid(format!("invalid {what}: {text}"))),
        }
    };
    let (first, last) = range(container, "containerPort")?;
    let host = match host {
        "" => None,
        text => Some(range(text, "hostPort")?),
    };
    if let Some((from, to)) = host
        && to - from != last - first
    {
        return Err(invalid("the ranges have different lengths".to_owned()));
    }
    for offset in 0..=last - first {
        ports.push(PublishedPort {
            host: host.map_or(0, |(from, _)| from + offset),
            container: first + offset,
            protocol: protocol.clone(),
            address: address.to_owned(),
        });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ports_in_all_forms() {
        let text = |flag: &str| {
            parse(&[flag.to_owned()]).map(|ports| {
                let texts: Vec<String> = ports
                    .iter()
                    .map(|p| format!("{}:{}:{}/{}", p.address, p.host, p.container, p.protocol))
                    .collect();
                texts.join(" ")
            })
        };
        for (flag, ports) in [
            ("80", ":0:80/tcp"),
            ("8080:80", ":8080:80/tcp"),
            ("53:53/udp", ":53:53/udp"),
            ("127.0.0.1:8080:80", "127.0.0.1:8080:80/tcp"),
            ("127.0.0.1::80", "127.0.0.1:0:80/tcp"),
            ("8000-8001:80-81", ":8000:80/tcp :8001:81/tcp"),
            ("[::1]:8080:80", "::1:8080:80/tcp"),
        ] {
            assert_eq!(text(flag).unwrap(), ports, "{flag}");
        }
        for bad in [
            "",
            "x",
            "0:80",
            "80:0",
            "70000:80",
            "80:80/sctp",
            "8000-8002:80-81",
            "nowhere:1:2",
        ] {
            assert_eq!(text(bad).unwrap_err().code, 125, "{bad}");
        }
    }
}
