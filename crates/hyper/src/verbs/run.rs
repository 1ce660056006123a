//! `run`, `create` and `attach`.

use std::time::Duration;

use kube::api::AttachParams;
use tokio::{
    signal::unix::{SignalKind, signal},
    sync::oneshot,
    time::Instant,
};

use super::{
    events::PodEvent,
    launch::{self, Launch},
    lifecycle, publish,
    watch::{self, Started},
};
use crate::{
    cli::{Attach, Create, Run},
    cluster::Cluster,
    error::{Failure, OWN, Result, exit_code},
    logs::{self, Query},
    meta,
    model::{Container, State},
    streams::{self, End, Streams},
    terminal,
};

/// Times a user may press Ctrl-C before hyper leaves.
const PATIENCE: u32 = 3;

/// How long the node may take to write its events down.
const PATIENCE_FOR_EVENTS: Duration = Duration::from_secs(3);

/// How long a container that runs may turn out to be none.
const MOMENT: Duration = Duration::from_millis(250);

/// `create`.
pub(crate) async fn create(cluster: &Cluster, options: &Create) -> Result<()> {
    let launch = Launch {
        gated: true,
        ..Launch::default()
    };
    let container = launch::create(cluster, options, &launch).await?;
    terminal::line(&container.id);
    Ok(())
}

/// `run`.
pub(crate) async fn run(cluster: &Cluster, options: &Run) -> Result<()> {
    let create = &options.create;
    if create.tty && create.interactive && !options.detach && !terminal::stdin_is_terminal() {
        return Err(Failure::plain("the input device is not a TTY"));
    }
    if options.detach && !create.attach.is_empty() {
        return Err(Failure::plain(
            "conflicting options: cannot specify both --attach and --detach",
        ));
    }
    let keys = streams::detach_keys(&options.detach_keys)?;
    let begun = Instant::now();
    // Nodes of other clusters would not know it.
    let measured = options.timing && cluster.is_hypernetes().await?;
    let launch = Launch {
        detached: options.detach,
        annotations: measured
            .then(|| (meta::TIMING, "true".to_owned()))
            .into_iter()
            .collect(),
        ..Launch::default()
    };
    let container = launch::create(cluster, create, &launch).await?;
    let accepted = begun.elapsed();
    let container = match start(cluster, &container, create.quiet).await? {
        Ok(container) => container,
        Err(failure) => {
            publish::withdraw(cluster, &container).await?;
            cluster.remove(&container, Some(0)).await?;
            return Err(failure);
        }
    };
    if options.detach
        && let Some(failure) = late_failure(cluster, &container, MOMENT).await?
    {
        publish::withdraw(cluster, &container).await?;
        cluster.remove(&container, Some(0)).await?;
        return Err(failure);
    }
    if options.timing {
        timing(cluster, &container, accepted, begun.elapsed(), measured).await?;
    }
    if options.detach {
        terminal::line(&container.id);
        return Ok(());
    }
    let foreground = Foreground {
        stdin: create.interactive,
        tty: create.tty,
        keys,
        sig_proxy: options.sig_proxy,
        from_start: true,
    };
    match Box::pin(foreground.follow(cluster, &container)).await? {
        Some(code) => {
            let failure = match code {
                126 | 127 => late_failure(cluster, &container, Duration::ZERO).await?,
                _ => None,
            };
            if create.rm {
                publish::withdraw(cluster, &container).await?;
                cluster.remove(&container, Some(0)).await?;
            }
            failure.map_or_else(|| finish(code), Err)
        }
        None => Ok(()),
    }
}

/// Success, or the container's own exit code.
pub(crate) fn finish(code: i32) -> Result<()> {
    match exit_code(code) {
        0 => Ok(()),
        code => Err(Failure::exit(code)),
    }
}

/// Waits for the start; the inner error says why there is none. Ctrl-C ends the waiting.
pub(crate) async fn start(
    cluster: &Cluster,
    container: &Container,
    quiet: bool,
) -> Result<Result<Container>> {
    let mut interrupt = signal(SignalKind::interrupt())?;
    let pulling = !quiet
        && terminal::stdin_is_terminal()
        && std::io::IsTerminal::is_terminal(&std::io::stderr());
    let spinner = pulling.then(|| {
        let spinner = indicatif::ProgressBar::new_spinner()
            .with_message(format!("starting {}", container.name));
        spinner.enable_steady_tick(Duration::from_millis(100));
        spinner
    });
    let started = tokio::select! {
        started = watch::started(cluster, container) => started?,
        _ = interrupt.recv() => return Ok(Err(Failure::exit(130))),
    };
    if let Some(spinner) = spinner {
        spinner.finish_and_clear();
    }
    Ok(match started {
        Started::Yes(container) => match start_error(&container) {
            Some(failure) => Err(failure),
            None => Ok(*container),
        },
        Started::No(reason, message) => Err(not_started(container, &reason, &message)),
    })
}

/// A program that is not there is known a moment after the start.
async fn late_failure(
    cluster: &Cluster,
    container: &Container,
    moment: Duration,
) -> Result<Option<Failure>> {
    if moment.is_zero() {
        let pod = cluster.pods().get_opt(container.pod_name()).await?;
        let now = pod.map(|pod| Container {
            pod,
            ..container.clone()
        });
        return Ok(now.as_ref().and_then(start_error));
    }
    let found = watch::until(cluster, container, |now| now.and_then(start_error));
    match tokio::time::timeout(moment, found).await {
        Ok(failure) => failure.map(Some),
        Err(_elapsed) => Ok(None),
    }
}

/// Kubelets say of a program that could not be started that it has ended.
fn start_error(container: &Container) -> Option<Failure> {
    let ended = container.ended()?;
    let reason = ended.reason.as_deref().unwrap_or_default();
    matches!(reason, "StartError" | "ContainerCannotRun")
        .then(|| run_failure(ended.message.as_deref().unwrap_or(reason)))
}

fn run_failure(message: &str) -> Failure {
    let failure = streams::start_failure(message);
    Failure {
        message: format!("hyper: {}", failure.message),
        ..failure
    }
}

fn not_started(container: &Container, reason: &str, message: &str) -> Failure {
    match reason {
        "RunContainerError" | "CreateContainerError" | "StartError" => run_failure(message),
        _ => {
            let image = container.image();
            let detail = match (reason, message) {
                ("ErrImageNeverPull", _) => format!("No such image: {image}"),
                ("InvalidImageName", _) => "invalid reference format".to_owned(),
                (reason, "") => reason.to_owned(),
                (_, message) => message.to_owned(),
            };
            Failure::daemon(detail).with_code(OWN)
        }
    }
}

/// What the start took: what hyper saw, and what the cluster says in events.
async fn timing(
    cluster: &Cluster,
    container: &Container,
    accepted: Duration,
    running: Duration,
    measured: bool,
) -> Result<()> {
    terminal::note(&format!(
        "{:>7} ms  accepted by the API server",
        accepted.as_millis()
    ));
    let told = async {
        loop {
            let events = super::events::of_pod(cluster, container).await?;
            let started = |event: &PodEvent| {
                event.reason == "Timing" && event.message.starts_with("container ")
            };
            if !measured || events.iter().any(started) {
                return Ok::<_, Failure>(events);
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    // Events are written in the background, and may be dropped.
    let events = match tokio::time::timeout(PATIENCE_FOR_EVENTS, told).await {
        Ok(events) => events?,
        Err(_elapsed) => super::events::of_pod(cluster, container).await?,
    };
    let first = events.first().map(|event| event.time);
    for event in events {
        let since = first.map_or(0, |first| {
            event.time.as_millisecond() - first.as_millisecond()
        });
        terminal::note(&format!(
            "{since:>7} ms  {}: {}",
            event.reason, event.message
        ));
    }
    terminal::note(&format!("{:>7} ms  seen running", running.as_millis()));
    Ok(())
}

/// A container whose streams are this terminal's.
#[derive(Debug, Clone)]
pub(crate) struct Foreground {
    pub(crate) stdin: bool,
    pub(crate) tty: bool,
    pub(crate) keys: Vec<u8>,
    pub(crate) sig_proxy: bool,
    /// Output from the container's first line on, not only from now on.
    pub(crate) from_start: bool,
}

impl Foreground {
    /// Stays until the container ends. `None`: the user left it running.
    pub(crate) async fn follow(
        &self,
        cluster: &Cluster,
        container: &Container,
    ) -> Result<Option<i32>> {
        let mut proxy = Proxy::new()?;
        let session = async {
            if self.tty {
                self.terminal(cluster, container).await
            } else {
                self.plain(cluster, container).await
            }
        };
        tokio::pin!(session);
        let end = loop {
            tokio::select! {
                end = &mut session => break end?,
                name = proxy.next() => {
                    if !self.sig_proxy || proxy.interrupts >= PATIENCE {
                        terminal::note("got 3 SIGTERM/SIGINTs, forcefully exiting");
                        return Err(Failure::exit(1));
                    }
                    if lifecycle::signal(cluster, container, name).await.is_err() && matches!(name, "SIGINT" | "SIGTERM") {
                        // The image has no `kill`: a stop is what is meant.
                        lifecycle::begin_stop(cluster, container, None).await?;
                    }
                }
            }
        };
        if end == End::Detached {
            return Ok(None);
        }
        // A stop that is asked for now still counts.
        tokio::select! {
            code = watch::ended(cluster, container) => code.map(|code| Some(code.unwrap_or(137))),
            _ = async { loop { let name = proxy.next().await; if lifecycle::signal(cluster, container, name).await.is_err() || proxy.interrupts >= PATIENCE { break } } } => Err(Failure::exit(1)),
        }
    }

    /// Output from the log, so that nothing of it is lost; input by attaching.
    async fn plain(&self, cluster: &Cluster, container: &Container) -> Result<End> {
        let (done, finished) = oneshot::channel();
        let input = async {
            if !self.stdin {
                return Ok(End::Ended(None));
            }
            let params = AttachParams {
                stdout: false,
                stderr: false,
                ..AttachParams::default()
            }
            .stdin(true)
            .container(container.spec().name);
            match cluster.pods().attach(container.pod_name(), &params).await {
                Ok(process) => {
                    let joined = Streams {
                        stdin: true,
                        input_only: true,
                        detach_keys: Vec::new(),
                        ..Streams::default()
                    };
                    streams::join(process, joined, Some(finished)).await
                }
                // It has ended already.
                Err(_) => Ok(End::Ended(None)),
            }
        };
        let split = cluster.is_hypernetes().await?;
        let output = async {
            let since = (!self.from_start).then(jiff::Timestamp::now);
            let mut followed = run_of(container);
            loop {
                let query = Query {
                    follow: true,
                    split,
                    since,
                    ..Query::default()
                };
                let printed = logs::print(
                    cluster,
                    container.pod_name(),
                    &container.spec().name,
                    &query,
                )
                .await;
                // With a restart policy the container comes back, and its output with it. The log
                // ends before the status says so: only another run is followed again.
                let next = watch::until(cluster, container, |now| {
                    let run = now.and_then(run_of);
                    match now.map(Container::state) {
                        None | Some(State::Exited | State::Dead | State::Removing) => Some(None),
                        Some(State::Running) if run != followed => Some(Some(run)),
                        Some(
                            State::Running
                            | State::Paused
                            | State::Suspended
                            | State::Created
                            | State::Restarting,
                        ) => None,
                    }
                })
                .await?;
                match next {
                    Some(run) => followed = run,
                    None => {
                        drop(done);
                        return printed;
                    }
                }
            }
        };
        let (_, printed) = tokio::join!(input, output);
        printed.map(|()| End::Ended(None))
    }

    async fn terminal(&self, cluster: &Cluster, container: &Container) -> Result<End> {
        let params = AttachParams::default()
            .stdin(self.stdin)
            .stdout(true)
            .stderr(false)
            .tty(true)
            .container(container.spec().name);
        let name = container.spec().name;
        // A node of ours keeps for the first client what a terminal has said before; with others
        // it is in the log only.
        let from_log = self.from_start && !cluster.is_hypernetes().await?;
        if from_log {
            let until_now = Query::default();
            match logs::print(cluster, container.pod_name(), &name, &until_now).await {
                Ok(()) => {}
                // It has said nothing yet.
                Err(_) => terminal::out(""),
            }
        }
        match cluster.pods().attach(container.pod_name(), &params).await {
            Ok(process) => {
                let joined = Streams {
                    stdin: self.stdin,
                    tty: true,
                    detach_keys: self.keys.clone(),
                    redraw: true,
                    ..Streams::default()
                };
                streams::join(process, joined, None).await
            }
            // It has ended already: what it said is in its log.
            Err(_) => {
                if !from_log {
                    logs::print(cluster, container.pod_name(), &name, &Query::default()).await?;
                }
                Ok(End::Ended(None))
            }
        }
    }
}

/// Which run of the container's program it is.
fn run_of(container: &Container) -> Option<String> {
    container.status()?.container_id.clone()
}

/// Signals to pass on.
struct Proxy {
    signals: Vec<(&'static str, tokio::signal::unix::Signal)>,
    interrupts: u32,
}

impl Proxy {
    fn new() -> Result<Self> {
        let kinds = [
            ("SIGINT", SignalKind::interrupt()),
            ("SIGTERM", SignalKind::terminate()),
            ("SIGHUP", SignalKind::hangup()),
            ("SIGQUIT", SignalKind::quit()),
            ("SIGUSR1", SignalKind::user_defined1()),
            ("SIGUSR2", SignalKind::user_defined2()),
        ];
        let mut signals = Vec::new();
        for (name, kind) in kinds {
            signals.push((name, signal(kind)?));
        }
        Ok(Self {
            signals,
            interrupts: 0,
        })
    }

    async fn next(&mut self) -> &'static str {
        let waits = self.signals.iter_mut().map(|(name, signal)| {
            Box::pin(async move {
                if signal.recv().await.is_none() {
                    std::future::pending::<()>().await;
                }
                *name
            })
        });
        let (name, _, _) = futures::future::select_all(waits).await;
        if matches!(name, "SIGINT" | "SIGTERM") {
            self.interrupts += 1;
        }
        name
    }
}

/// `attach`.
pub(crate) async fn attach(cluster: &Cluster, options: &Attach) -> Result<()> {
    let container = cluster.find(&options.container).await?;
    match container.state() {
        State::Running => {}
        State::Paused => {
            return Err(Failure::plain(
                "You cannot attach to a paused container, unpause it first",
            ));
        }
        State::Suspended => {
            return Err(Failure::plain(
                "You cannot attach to a suspended container, resume it first",
            ));
        }
        State::Restarting => {
            return Err(Failure::plain(
                "You cannot attach to a restarting container, wait until it is running",
            ));
        }
        _ => {
            return Err(Failure::plain(
                "You cannot attach to a stopped container, start it first",
            ));
        }
    }
    let spec = container.spec();
    let foreground = Foreground {
        stdin: !options.no_stdin && spec.stdin.unwrap_or(false),
        tty: spec.tty.unwrap_or(false),
        keys: streams::detach_keys(&options.detach_keys)?,
        sig_proxy: options.sig_proxy,
        from_start: false,
    };
    match Box::pin(foreground.follow(cluster, &container)).await? {
        Some(code) => finish(code),
        None => Ok(()),
    }
}
