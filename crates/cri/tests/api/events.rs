//! The stream of events, and what a failed start leaves.

use std::collections::BTreeMap;

use hypernetes_cri::v1::{self, ContainerEventType as Kind};
use hypernetes_runtime::{RuntimeError, RuntimeEvent};
use tonic::{Code, Streaming};

use crate::bed::{Bed, refused};

const CREATED: Kind = Kind::ContainerCreatedEvent;
const STARTED: Kind = Kind::ContainerStartedEvent;
const STOPPED: Kind = Kind::ContainerStoppedEvent;
const DELETED: Kind = Kind::ContainerDeletedEvent;

async fn subscribe(bed: &mut Bed) -> Streaming<v1::ContainerEventResponse> {
    let stream = bed.client.get_container_events(v1::GetEventsRequest {});
    stream.await.unwrap().into_inner()
}

async fn next(events: &mut Streaming<v1::ContainerEventResponse>) -> v1::ContainerEventResponse {
    events.message().await.unwrap().expect("the stream goes on")
}

#[tokio::test]
async fn what_happens_is_told_in_order_with_all_that_is_known() {
    let mut bed = Bed::new().await;
    let (early, _) = bed.running("early").await;
    let mut events = subscribe(&mut bed).await;
    let sandbox = bed.run(bed.pod("a")).await.unwrap();
    for kind in [CREATED, STARTED] {
        let event = next(&mut events).await;
        // What was there before is no event.
        assert_ne!(event.container_id, early);
        assert_eq!(
            (event.container_id.as_str(), event.container_event_type()),
            (sandbox.as_str(), kind)
        );
        let status = event.pod_sandbox_status.unwrap();
        assert_eq!(status.metadata.unwrap().uid, "uid-a");
        assert!(event.created_at > 0 && event.containers_statuses.is_empty());
    }
    let id = bed.create(&sandbox, Bed::container("c")).await.unwrap();
    let event = next(&mut events).await;
    assert_eq!(
        (event.container_id.as_str(), event.container_event_type()),
        (id.as_str(), CREATED)
    );
    assert_eq!(event.containers_statuses[0].id, id);
    bed.start(&id).await.unwrap();
    assert_eq!(next(&mut events).await.container_event_type(), STARTED);
    bed.runtime.end(&id.parse().unwrap(), 3, "Error", "");
    let event = next(&mut events).await;
    assert_eq!(event.container_event_type(), STOPPED);
    let status = &event.containers_statuses[0];
    assert_eq!(
        (status.exit_code, status.state()),
        (3, v1::ContainerState::ContainerExited)
    );

    let second = bed.create(&sandbox, Bed::container("d")).await.unwrap();
    assert_eq!(next(&mut events).await.container_id, second);
    let request = v1::RemoveContainerRequest {
        container_id: id.clone(),
    };
    bed.client.remove_container(request).await.unwrap();
    let event = next(&mut events).await;
    assert_eq!(
        (event.container_id.as_str(), event.container_event_type()),
        (id.as_str(), DELETED)
    );
    let request = v1::RemovePodSandboxRequest {
        pod_sandbox_id: sandbox.clone(),
    };
    bed.client.remove_pod_sandbox(request).await.unwrap();
    let mut rest = Vec::new();
    while rest.len() < 4 {
        let event = next(&mut events).await;
        let status = event.pod_sandbox_status.as_ref().unwrap();
        assert_eq!(status.id, sandbox);
        rest.push((event.container_id.clone(), event.container_event_type()));
    }
    rest.sort_by_key(|(id, _)| *id != second);
    let of = |id: &String, kind| (id.clone(), kind);
    assert_eq!(
        rest,
        [
            // It never started.
            of(&second, STOPPED),
            of(&second, DELETED),
            of(&sandbox, STOPPED),
            of(&sandbox, DELETED)
        ]
    );
}

#[tokio::test]
async fn a_slow_reader_misses_nothing() {
    const PODS: usize = 700;
    let mut bed = Bed::new().await;
    let mut changes = hypernetes_runtime::PodRuntime::events(&bed.runtime);
    let mut events = subscribe(&mut bed).await;
    let mut ids = Vec::new();
    for pod in 0..PODS {
        ids.push(bed.run(bed.pod(&format!("p{pod}"))).await.unwrap());
    }
    for id in &ids {
        let request = v1::StopPodSandboxRequest {
            pod_sandbox_id: id.clone(),
        };
        bed.client.stop_pod_sandbox(request).await.unwrap();
    }
    // More than the runtime keeps for a reader: who did not read has lost some.
    let lost = changes.recv().await;
    assert!(!matches!(lost, Ok(RuntimeEvent::Sandbox(_))), "{lost:?}");
    let mut told: BTreeMap<String, Vec<Kind>> = BTreeMap::new();
    for _ in 0..3 * PODS {
        let event = next(&mut events).await;
        let kinds = told.entry(event.container_id.clone()).or_default();
        kinds.push(event.container_event_type());
    }
    assert_eq!(told.len(), PODS);
    for kinds in told.values() {
        assert_eq!(kinds, &[CREATED, STARTED, STOPPED]);
    }
}

#[tokio::test]
async fn readers_are_counted_and_end_with_the_server() {
    let mut bed = Bed::new().await;
    let mut readers = Vec::new();
    for _ in 0..16 {
        readers.push(subscribe(&mut bed).await);
    }
    let one_more = bed
        .client
        .get_container_events(v1::GetEventsRequest {})
        .await;
    refused(one_more.map(drop), Code::ResourceExhausted, "16 readers");
    bed.restart_after(|| {}).await;
    for mut reader in readers {
        assert!(!matches!(reader.message().await, Ok(Some(_))));
    }
    subscribe(&mut bed).await;
}

#[tokio::test]
async fn a_sandbox_that_did_not_come_up_is_not_there() {
    let mut bed = Bed::new().await;
    let mut events = subscribe(&mut bed).await;
    let failure = || RuntimeError::Invalid {
        field: "kernel".into(),
        rule: "must boot".into(),
    };
    bed.runtime.fail_next("run_sandbox", failure());
    refused(
        bed.run(bed.pod("a")).await,
        Code::InvalidArgument,
        "must boot",
    );
    let all = bed
        .client
        .list_pod_sandbox(v1::ListPodSandboxRequest::default())
        .await;
    assert!(all.unwrap().into_inner().items.is_empty());

    // One that cannot be removed is seen, as not ready.
    bed.runtime.fail_next("run_sandbox", failure());
    bed.runtime.fail_next("remove_sandbox", failure());
    bed.run(bed.pod("a")).await.unwrap_err();
    let all = bed
        .client
        .list_pod_sandbox(v1::ListPodSandboxRequest::default())
        .await;
    let items = all.unwrap().into_inner().items;
    assert_eq!(items[0].state(), v1::PodSandboxState::SandboxNotready);

    let id = bed.run(bed.pod("a")).await.unwrap();
    let status = v1::PodSandboxStatusRequest {
        pod_sandbox_id: id.clone(),
        verbose: false,
    };
    let status = bed
        .client
        .pod_sandbox_status(status)
        .await
        .unwrap()
        .into_inner();
    assert!(status.timestamp >= status.status.unwrap().created_at);
    // The first that is told of is the one that came up.
    assert_eq!(next(&mut events).await.container_id, id);
}
