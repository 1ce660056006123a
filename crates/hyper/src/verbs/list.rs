//! `ps` and `port`.

use jiff::Timestamp;
use regex::Regex;

use super::publish;
use crate::{
    cli::{Port, Ps},
    cluster::Cluster,
    error::{Failure, Result},
    format::{Filters, Row, Rows},
    model::{Container, State},
    terminal, units,
};

const FILTERS: [&str; 14] = [
    "ancestor", "before", "exited", "expose", "health", "id", "label", "name", "network",
    "publish", "since", "status", "volume", "is-task",
];

/// The list of containers as docker prints it.
pub(crate) const ROWS: Rows<'_> = Rows {
    default: &[
        "ID",
        "Image",
        "Command",
        "RunningFor",
        "Status",
        "Ports",
        "Names",
    ],
    headers: &[
        ("ID", "CONTAINER ID"),
        ("Image", "IMAGE"),
        ("Command", "COMMAND"),
        ("CreatedAt", "CREATED AT"),
        ("RunningFor", "CREATED"),
        ("Ports", "PORTS"),
        ("State", "STATE"),
        ("Status", "STATUS"),
        ("Size", "SIZE"),
        ("Names", "NAMES"),
        ("Labels", "LABELS"),
        ("LocalVolumes", "LOCAL VOLUMES"),
        ("Mounts", "MOUNTS"),
        ("Networks", "NETWORKS"),
        ("Platform", "PLATFORM"),
    ],
    quiet: "ID",
};

/// Text of at most so many characters.
pub(crate) fn ellipsis(text: &str, length: usize) -> String {
    if text.chars().count() <= length {
        return text.to_owned();
    }
    text.chars()
        .take(length.saturating_sub(1))
        .chain(std::iter::once('…'))
        .collect()
}

/// Mounted volumes by name.
pub(crate) fn mounts(container: &Container) -> Vec<String> {
    let volumes = container
        .pod
        .spec
        .iter()
        .flat_map(|spec| spec.volumes.iter().flatten());
    volumes
        .map(|volume| match &volume.persistent_volume_claim {
            Some(claim) => claim.claim_name.clone(),
            None => volume.name.clone(),
        })
        .collect()
}

/// Program and arguments, those with blanks in quotes, as docker lists them.
fn command_line(command: &[String]) -> String {
    let quoted = command.iter().enumerate().map(|(at, word)| {
        if at > 0 && word.contains(' ') {
            format!("'{word}'")
        } else {
            word.clone()
        }
    });
    quoted.collect::<Vec<_>>().join(" ")
}

/// One line.
pub(crate) fn row(container: &Container, whole: bool, now: Timestamp) -> Row {
    let command = command_line(&container.command());
    let command = if whole {
        command
    } else {
        ellipsis(&command, 20)
    };
    let labels: Vec<String> = container
        .labels()
        .into_iter()
        .map(|(key, value)| format!("{key}={value}"))
        .collect();
    let volumes = mounts(container);
    Row::from([
        (
            "ID",
            if whole {
                container.id.clone()
            } else {
                container.short_id().to_owned()
            },
        ),
        ("Image", container.image()),
        (
            "Command",
            format!(
                "\"{}\"",
                command.escape_debug().to_string().replace("\\'", "'")
            ),
        ),
        ("CreatedAt", units::created_at(container.created())),
        ("RunningFor", units::human_ago(container.created(), now)),
        ("Ports", container.ports_text()),
        ("State", container.state().as_str().to_owned()),
        ("Status", container.status_text(now)),
        ("Size", "N/A".to_owned()),
        ("Names", container.name.clone()),
        ("Labels", labels.join(",")),
        ("LocalVolumes", volumes.len().to_string()),
        ("Mounts", volumes.join(",")),
        ("Networks", container.network().to_owned()),
        ("Platform", "linux/amd64".to_owned()),
    ])
}

/// `ps`.
pub(crate) async fn ps(cluster: &Cluster, options: &Ps) -> Result<()> {
    let filters = Filters::parse(&options.filter, &FILTERS)?;
    let containers = select(cluster.containers().await?, options, &filters)?;
    let now = Timestamp::now();
    let rows: Vec<Row> = containers
        .iter()
        .map(|container| row(container, options.no_trunc, now))
        .collect();
    let with_size = Rows {
        default: &[
            "ID",
            "Image",
            "Command",
            "RunningFor",
            "Status",
            "Ports",
            "Names",
            "Size",
        ],
        ..ROWS
    };
    let list = if options.size { &with_size } else { &ROWS };
    let format = options.format.as_deref();
    if options.quiet && format.is_some() {
        terminal::note(
            "WARNING: Ignoring custom format, because both --format and --quiet are set.",
        );
    }
    terminal::out(&list.print(&rows, format.filter(|_| !options.quiet), options.quiet)?);
    Ok(())
}

/// The containers that are asked for.
fn select(all: Vec<Container>, options: &Ps, filters: &Filters) -> Result<Vec<Container>> {
    for status in filters.values("status") {
        if ![
            "created",
            "running",
            "paused",
            "suspended",
            "restarting",
            "removing",
            "exited",
            "dead",
        ]
        .contains(&status.as_str())
        {
            return Err(Failure::daemon(format_args!(
                "invalid filter 'status={status}'"
            )));
        }
    }
    let created = |key: &str| -> Result<Option<Timestamp>> {
        match filters.values(key).first() {
            None => Ok(None),
            Some(name) => {
                crate::cluster::find(all.clone(), name).map(|container| Some(container.created()))
            }
        }
    };
    let (before, since) = (created("before")?, created("since")?);
    let mut names = Vec::new();
    for text in filters.values("name") {
        names.push(Regex::new(text).map_err(|error| {
            Failure::daemon(format_args!("invalid filter 'name={text}': {error}"))
        })?);
    }
    // docker's -1 is no bound at all.
    let last = match options.last {
        _ if options.latest => Some(1),
        Some(count) => usize::try_from(count).ok(),
        None => None,
    };
    let every = options.all
        || last.is_some()
        || filters.has("status")
        || filters.has("exited")
        || before.is_some()
        || since.is_some();
    let mut kept: Vec<Container> = all
        .into_iter()
        .filter(|container| {
            every || container.state().is_up() || container.state() == State::Restarting
        })
        .filter(|container| {
            let state = container.state();
            before.is_none_or(|time| container.created() < time)
                && since.is_none_or(|time| container.created() > time)
                && (names.is_empty()
                    || names.iter().any(|name| {
                        name.is_match(&container.name)
                            || name.is_match(&format!("/{}", container.name))
                    }))
                && filters.any("id", |id| container.id.starts_with(id))
                && filters.any("status", |status| state.as_str() == status)
                && filters.any("exited", |code| {
                    state == State::Exited && code == container.exit_code().to_string()
                })
                && filters.any("ancestor", |image| is_ancestor(&container.image(), image))
                && filters.any("network", |network| container.network() == network)
                && filters.any("volume", |volume| {
                    mounts(container).iter().any(|name| name == volume)
                        || container
                            .spec()
                            .volume_mounts
                            .iter()
                            .flatten()
                            .any(|mount| mount.mount_path == volume)
                })
                && filters.any("publish", |port| {
                    container
                        .ports()
                        .iter()
                        .any(|p| matches_port(port, p.host, &p.protocol))
                })
                && filters.any("expose", |port| {
                    container.spec().ports.iter().flatten().any(|p| {
                        let protocol = p.protocol.as_deref().unwrap_or("TCP").to_ascii_lowercase();
                        matches_port(
                            port,
                            u16::try_from(p.container_port).unwrap_or(0),
                            &protocol,
                        )
                    })
                })
                && filters.any("health", |health| {
                    container.health().unwrap_or("none") == health
                })
                && filters.any("is-task", |value| value == "false")
                && filters.labels("label", &container.labels())
        })
        .collect();
    if let Some(count) = last {
        kept.truncate(count);
    }
    Ok(kept)
}

/// The image of a name with or without its tag.
fn is_ancestor(image: &str, wanted: &str) -> bool {
    let repository = match image.rsplit_once(':') {
        Some((repository, tag)) if !tag.contains('/') => repository,
        _ => image,
    };
    image == wanted
        || repository == wanted
        || image.strip_suffix(":latest") == Some(wanted)
        || wanted.strip_suffix(":latest") == Some(image)
}

/// `80`, `80/tcp`, `80-90`.
fn matches_port(wanted: &str, port: u16, protocol: &str) -> bool {
    let (range, wanted_protocol) = wanted.split_once('/').unwrap_or((wanted, "tcp"));
    let (first, last) = range.split_once('-').unwrap_or((range, range));
    let (Ok(first), Ok(last)) = (first.parse::<u16>(), last.parse::<u16>()) else {
        return false;
    };
    wanted_protocol == protocol && (first..=last).contains(&port)
}

/// `port`.
pub(crate) async fn port(cluster: &Cluster, options: &Port) -> Result<()> {
    let container = cluster.find(&options.container).await?;
    let addresses = publish::addresses(cluster, &container).await?;
    let wanted = match &options.port {
        None => None,
        Some(text) => {
            let (number, protocol) = text.split_once('/').unwrap_or((text, "tcp"));
            let number: u16 = number.parse().map_err(|_bad| {
                Failure::plain(format_args!(
                    "Error: invalid port ({text}): strconv.ParseUint: parsing \"{number}\": invalid syntax"
                ))
            })?;
            Some((number, protocol.to_owned()))
        }
    };
    let mut found = false;
    for port in container.ports() {
        if wanted.as_ref().is_some_and(|(number, protocol)| {
            port.container != *number || port.protocol != *protocol
        }) {
            continue;
        }
        found = true;
        let host = if port.host == 0 {
            port.container
        } else {
            port.host
        };
        let all = ["0.0.0.0".to_owned()];
        let own = [port.address.clone()];
        let addresses = if !port.address.is_empty() {
            &own[..]
        } else if addresses.is_empty() {
            &all[..]
        } else {
            &addresses
        };
        for address in addresses {
            match &wanted {
                Some(_) => terminal::line(&format!("{address}:{host}")),
                None => terminal::line(&format!(
                    "{}/{} -> {address}:{host}",
                    port.container, port.protocol
                )),
            }
        }
    }
    match wanted {
        Some(_) if !found => Err(Failure::plain(format_args!(
            "Error: No public port '{}' published for {}",
            options.port.as_deref().unwrap_or_default(),
            options.container
        ))),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser as _;
    use serde_json::json;

    use super::*;
    use crate::{
        cli::{Cli, Command, ContainerCommand},
        model::{
            self,
            tests::{pod, status},
        },
    };

    fn options(args: &[&str]) -> Ps {
        let cli = Cli::try_parse_from(["hyper", "ps"].iter().chain(args)).unwrap();
        let Command::Container(command) = cli.command else {
            panic!("ps")
        };
        let ContainerCommand::Ps(ps) = *command else {
            panic!("ps")
        };
        ps
    }

    fn world() -> Vec<Container> {
        let mut web = pod(
            "web",
            'a',
            status(
                "Running",
                json!({"running": {"startedAt": "2026-01-02T03:00:00Z"}}),
            ),
        );
        web.metadata
            .labels
            .as_mut()
            .unwrap()
            .insert("app".into(), "shop".into());
        web.metadata
            .annotations
            .as_mut()
            .unwrap()
            .insert(crate::meta::CREATED.into(), "2026-01-02T03:00:00Z".into());
        let mut job = pod(
            "job",
            'b',
            status(
                "Failed",
                json!({"terminated": {"exitCode": 3, "finishedAt": "2026-01-02T03:04:57Z"}}),
            ),
        );
        job.metadata
            .annotations
            .as_mut()
            .unwrap()
            .insert(crate::meta::CREATED.into(), "2026-01-02T03:01:00Z".into());
        model::containers(vec![web, job])
    }

    fn names(args: &[&str]) -> Result<Vec<String>> {
        let options = options(args);
        let filters = Filters::parse(&options.filter, &FILTERS)?;
        Ok(select(world(), &options, &filters)?
            .into_iter()
            .map(|container| container.name)
            .collect())
    }

    #[test]
    fn who_is_listed() {
        for (args, expected) in [
            (&[][..], &["web"][..]),
            (&["-a"], &["job", "web"]),
            (&["-l"], &["job"]),
            (&["-n", "1"], &["job"]),
            (&["-f", "status=exited"], &["job"]),
            (&["-f", "exited=3"], &["job"]),
            (&["-f", "exited=0"], &[]),
            (&["-a", "-f", "name=^we"], &["web"]),
            (&["-a", "-f", "label=app"], &["web"]),
            (&["-a", "-f", "label=app=shop"], &["web"]),
            (&["-a", "-f", "label=app=x"], &[]),
            (&["-a", "-f", "ancestor=busybox"], &["job", "web"]),
            (&["-a", "-f", "ancestor=nginx"], &[]),
            (&["-a", "-f", "before=job"], &["web"]),
            (&["-a", "-f", "since=web"], &["job"]),
            (&["-a", "-f", "id=aaa"], &["web"]),
            (&["-a", "-f", "network=default"], &["job", "web"]),
        ] {
            assert_eq!(names(args).unwrap(), expected, "{args:?}");
        }
        assert_eq!(
            names(&["-f", "status=asleep"]).unwrap_err().message,
            "Error response from daemon: invalid filter 'status=asleep'"
        );
        assert_eq!(
            names(&["-f", "colour=red"]).unwrap_err().message,
            "Error response from daemon: invalid filter 'colour'"
        );
    }

    #[test]
    fn a_line_is_dockers() {
        let now = "2026-01-02T03:05:00Z".parse().unwrap();
        let rows: Vec<Row> = world()
            .iter()
            .map(|container| row(container, false, now))
            .collect();
        assert_eq!(
            ROWS.print(&rows, None, false).unwrap(),
            "CONTAINER ID   IMAGE       COMMAND     CREATED         STATUS                     PORTS     NAMES\n\
             bbbbbbbbbbbb   busybox:1   \"sh -c x\"   4 minutes ago   Exited (3) 3 seconds ago             job\n\
             aaaaaaaaaaaa   busybox:1   \"sh -c x\"   5 minutes ago   Up 5 minutes                         web\n"
        );
        assert_eq!(
            ROWS.print(&rows, Some("{{.Names}}\t{{.Status}}"), false)
                .unwrap(),
            "job\tExited (3) 3 seconds ago\nweb\tUp 5 minutes\n"
        );
    }

    #[test]
    fn long_commands_are_cut() {
        assert_eq!(
            ellipsis("0123456789012345678901", 20),
            "0123456789012345678…"
        );
        assert_eq!(ellipsis("short", 20), "short");
    }
}
