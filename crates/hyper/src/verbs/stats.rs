//! `stats`: the metrics API, where the cluster serves it.

use std::{collections::BTreeMap, time::Duration};

use serde_json::Value;

use crate::{
    cli::Stats,
    cluster::{self, Cluster},
    error::{Failure, Result},
    format::{Row, Rows},
    model::Container,
    terminal, units,
};

const ROWS: Rows<'_> = Rows {
    default: &[
        "ID", "Name", "CPUPerc", "MemUsage", "MemPerc", "NetIO", "BlockIO", "PIDs",
    ],
    headers: &[
        ("Container", "CONTAINER"),
        ("ID", "CONTAINER ID"),
        ("Name", "NAME"),
        ("CPUPerc", "CPU %"),
        ("MemUsage", "MEM USAGE / LIMIT"),
        ("MemPerc", "MEM %"),
        ("NetIO", "NET I/O"),
        ("BlockIO", "BLOCK I/O"),
        ("PIDs", "PIDS"),
    ],
    quiet: "ID",
};

/// Billionths of a CPU of a quantity such as `12m`, `5000000n`, `1`.
fn nano_cpus(text: &str) -> Option<u64> {
    let (number, factor) = match text.char_indices().next_back()? {
        (at, 'n') => (&text[..at], 1),
        (at, 'u') => (&text[..at], 1_000),
        (at, 'm') => (&text[..at], 1_000_000),
        _ => (text, 1_000_000_000),
    };
    number.parse::<u64>().ok()?.checked_mul(factor)
}

/// Bytes of a quantity such as `1234Ki`.
fn bytes(text: &str) -> Option<u64> {
    units::parse_bytes(text)
        .ok()
        .and_then(|bytes| u64::try_from(bytes).ok())
}

/// Hundredths as a percentage.
fn percent(part: u64, whole: u64) -> String {
    if whole == 0 {
        return "--".to_owned();
    }
    let hundredths = u128::from(part) * 10_000 / u128::from(whole);
    format!("{}.{:02}%", hundredths / 100, hundredths % 100)
}

fn row(container: &Container, usage: Option<&Value>, whole: bool) -> Row {
    let text = |key: &str| usage.and_then(|usage| usage[key].as_str());
    let cpu = text("cpu").and_then(nano_cpus);
    let memory = text("memory").and_then(bytes);
    let limits = container
        .spec()
        .resources
        .and_then(|resources| resources.limits)
        .unwrap_or_default();
    let limit = limits.get("memory").and_then(|limit| bytes(&limit.0));
    let none = || "--".to_owned();
    Row::from([
        ("Container", container.name.clone()),
        (
            "ID",
            if whole {
                container.id.clone()
            } else {
                container.short_id().to_owned()
            },
        ),
        ("Name", container.name.clone()),
        (
            "CPUPerc",
            cpu.map_or_else(none, |nano| percent(nano, 1_000_000_000)),
        ),
        (
            "MemUsage",
            format!(
                "{} / {}",
                memory.map_or_else(none, units::binary_bytes),
                limit.map_or_else(none, units::binary_bytes)
            ),
        ),
        (
            "MemPerc",
            memory
                .zip(limit)
                .map_or_else(none, |(used, limit)| percent(used, limit)),
        ),
        ("NetIO", none()),
        ("BlockIO", none()),
        ("PIDs", none()),
    ])
}

async fn usage(cluster: &Cluster) -> Result<BTreeMap<(String, String), Value>> {
    let path = format!(
        "/apis/metrics.k8s.io/v1beta1/namespaces/{}/pods",
        cluster.namespace
    );
    let request = http::Request::get(path)
        .body(Vec::new())
        .map_err(Failure::plain)?;
    let list: Value = match cluster.client.request(request).await {
        Ok(list) => list,
        Err(kube::Error::Api(status)) if status.code == 404 => {
            return Err(Failure::refused(
                "stats",
                "this cluster serves no metrics (metrics.k8s.io); `hyper top` lists processes",
            ));
        }
        Err(error) => return Err(error.into()),
    };
    let mut found = BTreeMap::new();
    for pod in list["items"].as_array().into_iter().flatten() {
        let name = pod["metadata"]["name"].as_str().unwrap_or_default();
        for container in pod["containers"].as_array().into_iter().flatten() {
            let key = (
                name.to_owned(),
                container["name"].as_str().unwrap_or_default().to_owned(),
            );
            found.insert(key, container["usage"].clone());
        }
    }
    Ok(found)
}

async fn once(cluster: &Cluster, options: &Stats) -> Result<String> {
    let usage = usage(cluster).await?;
    let all = cluster.containers().await?;
    let mut wanted = Vec::new();
    for name in &options.containers {
        wanted.push(cluster::find(all.clone(), name)?);
    }
    if options.containers.is_empty() {
        wanted = all
            .into_iter()
            .filter(|container| options.all || container.state().is_up())
            .collect();
    }
    let rows: Vec<Row> = wanted
        .iter()
        .map(|container| {
            row(
                container,
                usage.get(&(container.pod_name().to_owned(), container.spec().name)),
                options.no_trunc,
            )
        })
        .collect();
    ROWS.print(&rows, options.format.as_deref(), false)
}

/// `stats`.
pub(crate) async fn run(cluster: &Cluster, options: &Stats) -> Result<()> {
    loop {
        let text = once(cluster, options).await?;
        if options.no_stream {
            terminal::out(&text);
            return Ok(());
        }
        // Home and clear, as docker does.
        let clear = if terminal::stdout_is_terminal() {
            "\x1b[H\x1b[2J"
        } else {
            ""
        };
        terminal::out(&format!("{clear}{text}"));
        tokio::select! {
            () = tokio::time::sleep(Duration::from_secs(1)) => {}
            _ = tokio::signal::ctrl_c() => return Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::model::{
        self,
        tests::{pod, status},
    };

    #[test]
    fn usage_in_dockers_columns() {
        let mut web = pod("web", 'a', status("Running", json!({"running": {}})));
        web.spec.as_mut().unwrap().containers[0].resources =
            serde_json::from_value(json!({"limits": {"memory": "67108864"}})).unwrap();
        let container = model::containers(vec![web]).remove(0);
        let row = row(
            &container,
            Some(&json!({"cpu": "12345678n", "memory": "2048Ki"})),
            false,
        );
        assert_eq!(
            (
                row["CPUPerc"].as_str(),
                row["MemUsage"].as_str(),
                row["MemPerc"].as_str()
            ),
            ("1.23%", "2MiB / 64MiB", "3.12%")
        );
        let unknown = super::row(&container, None, false);
        assert_eq!(
            (unknown["CPUPerc"].as_str(), unknown["MemUsage"].as_str()),
            ("--", "-- / 64MiB")
        );
    }

    #[test]
    fn quantities() {
        for (text, nano) in [
            ("12m", 12_000_000),
            ("5n", 5),
            ("2", 2_000_000_000),
            ("7u", 7_000),
        ] {
            assert_eq!(nano_cpus(text), Some(nano), "{text}");
        }
        assert_eq!(bytes("1Ki"), Some(1024));
    }
}
