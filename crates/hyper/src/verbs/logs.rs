//! `logs`.

use jiff::Timestamp;

use crate::{
    cli::Logs,
    cluster::Cluster,
    error::{Failure, Result},
    logs::{self, Query},
    units,
};

/// The number of lines of `--tail`; `None` is all.
pub(crate) fn tail(text: &str) -> Option<i64> {
    // docker takes what is no number for all.
    text.parse::<i64>().ok().filter(|count| *count >= 0)
}

/// `logs`.
pub(crate) async fn run(cluster: &Cluster, options: &Logs) -> Result<()> {
    let now = Timestamp::now();
    let time = |text: &Option<String>| {
        text.as_deref()
            .map(|text| units::parse_time(text, now))
            .transpose()
    };
    let query = Query {
        follow: options.follow,
        since: time(&options.since)?,
        until: time(&options.until)?,
        tail: tail(&options.tail),
        timestamps: options.timestamps,
        split: cluster.is_hypernetes().await?,
        prefix: String::new(),
    };
    let container = cluster.find(&options.container).await?;
    of_container(cluster, &container, query).await
}

/// Prints the log of all runs of a container.
pub(crate) async fn of_container(
    cluster: &Cluster,
    container: &crate::model::Container,
    query: Query,
) -> Result<()> {
    let name = container.spec().name;
    if query.tail.is_none() {
        for pod in &container.earlier {
            let earlier = Query {
                follow: false,
                ..query.clone()
            };
            let pod = pod.metadata.name.as_deref().unwrap_or_default();
            tolerate(logs::print(cluster, pod, &name, &earlier).await)?;
        }
        let restarts = container.status().map_or(0, |status| status.restart_count);
        if restarts > 0 {
            previous(cluster, container, &query).await?;
        }
    }
    tolerate(logs::print(cluster, container.pod_name(), &name, &query).await)
}

/// The run before a restart in place.
async fn previous(
    cluster: &Cluster,
    container: &crate::model::Container,
    query: &Query,
) -> Result<()> {
    let params = kube::api::LogParams {
        container: Some(container.spec().name),
        previous: true,
        since_time: query.since,
        timestamps: query.timestamps,
        ..kube::api::LogParams::default()
    };
    match cluster.pods().logs(container.pod_name(), &params).await {
        Ok(text) => {
            crate::terminal::out(&text);
            Ok(())
        }
        // It is kept as long as the node keeps it.
        Err(kube::Error::Api(status)) if matches!(status.code, 400 | 404) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

/// A container that has not run has an empty log.
fn tolerate(result: Result<()>) -> Result<()> {
    match result {
        Err(Failure { message, .. })
            if message.contains("is waiting to start") || message.contains("is not there") =>
        {
            Ok(())
        }
        other => other,
    }
}
