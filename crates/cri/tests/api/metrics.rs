//! Metrics: of pods for a kubelet, of the node for Prometheus.

use std::collections::BTreeMap;

use hypernetes_cri::v1;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};

use crate::bed::Bed;

#[tokio::test]
async fn a_pod_has_values_for_what_is_described() {
    let mut bed = Bed::new().await;
    let sandbox = bed.run(bed.pod("a")).await.unwrap();
    let mut config = Bed::container("c");
    config.linux = Some(v1::LinuxContainerConfig {
        resources: Some(v1::LinuxContainerResources {
            cpu_quota: 20_000,
            cpu_period: 100_000,
            cpu_shares: 1024,
            memory_limit_in_bytes: 64 << 20,
            memory_swap_limit_in_bytes: 64 << 20,
            ..Default::default()
        }),
        security_context: None,
    });
    config.linux.as_mut().unwrap().security_context = Some(v1::LinuxContainerSecurityContext {
        namespace_options: Some(v1::NamespaceOption {
            pid: v1::NamespaceMode::Container.into(),
            ..Default::default()
        }),
        ..Default::default()
    });
    let container = bed.create(&sandbox, config).await.unwrap();
    bed.start(&container).await.unwrap();
    let request = v1::ListMetricDescriptorsRequest {};
    let described = bed.client.list_metric_descriptors(request).await.unwrap();
    let keys: BTreeMap<String, Vec<String>> = described
        .into_inner()
        .descriptors
        .into_iter()
        .map(|descriptor| (descriptor.name, descriptor.label_keys))
        .collect();
    let request = v1::ListPodSandboxMetricsRequest {};
    let pods = bed.client.list_pod_sandbox_metrics(request).await.unwrap();
    let pods = pods.into_inner().pod_metrics;
    assert_eq!(pods.len(), 1);
    assert_eq!(pods[0].pod_sandbox_id, sandbox);
    assert_eq!(pods[0].container_metrics[0].container_id, container);
    let of_container = &pods[0].container_metrics[0].metrics;
    let mut valued = BTreeMap::new();
    for metric in pods[0].metrics.iter().chain(of_container) {
        assert_eq!(
            metric.label_values.len(),
            keys[&metric.name].len(),
            "{}",
            metric.name
        );
        valued.insert(metric.name.as_str(), metric.value.unwrap().value);
    }
    for name in keys
        .keys()
        .filter(|name| *name != "container_hugetlb_max_usage_bytes")
    {
        assert!(valued.contains_key(name.as_str()), "{name} has no value");
    }
    for (name, value) in [
        ("container_cpu_usage_seconds_total", 1),
        ("container_memory_usage_bytes", 1 << 20),
        ("container_network_transmit_bytes_total", 200),
        ("container_fs_usage_bytes", 12_288),
        ("container_spec_cpu_quota", 20_000),
        ("container_spec_memory_limit_bytes", 64 << 20),
    ] {
        assert_eq!(valued[name], value, "{name}");
    }
    let labels = |metrics: &[v1::Metric], name: &str| -> Vec<String> {
        let found = metrics.iter().find(|metric| metric.name == name).unwrap();
        found.label_values.clone()
    };
    let of = labels(of_container, "container_memory_rss");
    assert_eq!((of[0].as_str(), of[3].as_str()), ("c", container.as_str()));
    assert_eq!((of[4].as_str(), of[5].as_str()), ("acme", "a"));
    let of = labels(&pods[0].metrics, "container_network_receive_bytes_total");
    assert_eq!((of[0].as_str(), of[6].as_str()), ("", "eth0"));
    assert_eq!(
        labels(of_container, "container_fs_limit_bytes")[6],
        "/dev/sda"
    );

    let request = v1::StreamPodSandboxMetricsRequest {};
    let stream = bed
        .client
        .stream_pod_sandbox_metrics(request)
        .await
        .unwrap();
    let page = stream.into_inner().message().await.unwrap().unwrap();
    assert_eq!(page.pod_sandbox_metrics.len(), 1);
}

async fn get(bed: &Bed, request: &str) -> String {
    let mut stream = TcpStream::connect(bed.metrics).await.unwrap();
    let request = format!("{request} HTTP/1.1\r\nhost: x\r\n\r\n");
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    answer
}

#[tokio::test]
async fn the_node_has_metrics_of_its_own() {
    let mut bed = Bed::new().await;
    let (first, _) = bed.running("a").await;
    bed.run(bed.pod("b")).await.unwrap();
    bed.status("none").await.unwrap_err();
    let answer = get(&bed, "GET /metrics").await;
    for line in [
        "HTTP/1.1 200 OK",
        "hypernetes_node_sandboxes{state=\"ready\"} 2",
        "hypernetes_node_containers{state=\"running\"} 1",
        &format!(
            "hypernetes_node_sandbox_host_memory_bytes{{namespace=\"acme\",pod=\"a\",sandbox=\"{first}\"}} 67108864"
        ),
        "hypernetes_node_vm_starts_total{origin=\"template\"} 2",
        "hypernetes_node_calls_total{method=\"RunPodSandbox\",code=\"Ok\"} 2",
        "hypernetes_node_calls_total{method=\"ContainerStatus\",code=\"NotFound\"} 1",
        "hypernetes_node_call_duration_seconds_count{method=\"StartContainer\"} 1",
        "# EOF",
    ] {
        assert!(answer.contains(line), "{line}\n{answer}");
    }
    let request = v1::StopPodSandboxRequest {
        pod_sandbox_id: first.clone(),
    };
    bed.client.stop_pod_sandbox(request).await.unwrap();
    let answer = get(&bed, "GET /metrics").await;
    assert!(!answer.contains(&first), "{answer}");
    assert!(get(&bed, "POST /metrics").await.contains("405"));
    assert!(get(&bed, "GET /").await.contains("404"));
}
