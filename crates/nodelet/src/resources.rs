//! Amounts: limits and requests of containers, the size of the pod's VM, the QoS class.

use std::collections::BTreeMap;

use hypernetes_runtime::ResourceConfig;
use hypernetes_types::{PageSize, Quantity};
use k8s_openapi::{
    api::core::v1::{Container, PodSpec},
    apimachinery::pkg::api::resource::Quantity as ApiQuantity,
};

use crate::{
    config::NodeletConfig,
    roles::{self, Role},
};

const MIB: i64 = 1 << 20;

/// What the node has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Capacity {
    pub(crate) cpus: u32,
    pub(crate) memory_bytes: i64,
    pub(crate) storage_bytes: i64,
}

/// Size of a pod's VM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct VmSize {
    pub(crate) vcpus: u32,
    pub(crate) memory_mib: u32,
}

type List = Option<BTreeMap<String, ApiQuantity>>;

fn amount(list: Option<&List>, name: &str) -> Option<Quantity> {
    list?.as_ref()?.get(name)?.0.parse().ok()
}

fn limits(container: &Container) -> Option<&List> {
    container
        .resources
        .as_ref()
        .map(|resources| &resources.limits)
}

fn requests(container: &Container) -> Option<&List> {
    container
        .resources
        .as_ref()
        .map(|resources| &resources.requests)
}

/// Limit of a resource, if the container has one.
pub(crate) fn limit(container: &Container, name: &str) -> Option<Quantity> {
    amount(limits(container), name)
}

/// Request of a resource; a limit alone is also the request, as Kubernetes defaults it.
pub(crate) fn request(container: &Container, name: &str) -> Option<Quantity> {
    amount(requests(container), name).or_else(|| limit(container, name))
}

/// Bytes of huge pages that the container is promised, by size.
pub(crate) fn huge_pages(container: &Container) -> BTreeMap<PageSize, u64> {
    let names = limits(container).into_iter().flatten().flatten();
    let page = |(name, amount): (&String, &ApiQuantity)| {
        let size = PageSize::from_quantity(name.strip_prefix("hugepages-")?).ok()?;
        let bytes = u64::try_from(amount.0.parse::<Quantity>().ok()?.value()).ok()?;
        (bytes > 0).then_some((size, bytes))
    };
    names.filter_map(page).collect()
}

/// Bytes of all its huge pages.
pub(crate) fn huge_page_bytes(container: &Container) -> i64 {
    let sum = huge_pages(container)
        .values()
        .fold(0, |sum: u64, bytes| sum.saturating_add(*bytes));
    i64::try_from(sum).unwrap_or(i64::MAX)
}

/// Limit of the whole pod, if it has one.
pub(crate) fn pod_limit(spec: Option<&PodSpec>, name: &str) -> Option<Quantity> {
    let resources = spec?.resources.as_ref()?;
    amount(Some(&resources.limits), name)
}

/// Request of the whole pod, if it has one.
pub(crate) fn pod_request(spec: Option<&PodSpec>, name: &str) -> Option<Quantity> {
    let resources = spec?.resources.as_ref()?;
    amount(Some(&resources.requests), name)
}

/// Limits that hold inside the VM: the container's own, else the whole pod's, which the VM around it holds.
pub(crate) fn container_resources(container: &Container, spec: Option<&PodSpec>) -> ResourceConfig {
    let limit = |name| limit(container, name).or_else(|| pod_limit(spec, name));
    ResourceConfig {
        memory_limit: limit("memory").map_or(0, Quantity::value),
        cpu_limit_milli: limit("cpu").map_or(0, Quantity::milli_value),
        cpu_request_milli: request(container, "cpu").map_or(0, Quantity::milli_value),
        huge_pages: huge_pages(container)
            .into_iter()
            .map(|(size, bytes)| (size.to_string(), bytes))
            .collect(),
        ..ResourceConfig::default()
    }
}

/// The VM that holds all containers at once, or the largest init container before them with the
/// sidecars that run beside it. A container without a cpu limit may use all of one vCPU.
pub(crate) fn vm_needs(spec: &PodSpec, config: &NodeletConfig) -> VmSize {
    let default = i64::from(config.default_memory_mib) * MIB;
    let memory = |container: &Container| {
        limit(container, "memory")
            .or_else(|| request(container, "memory"))
            .map_or(default, Quantity::value)
            .max(0)
    };
    let cpu = |container: &Container| limit(container, "cpu").map_or(0, Quantity::milli_value);
    let sum = |of: &dyn Fn(&Container) -> i64| {
        let (mut sidecars, mut most) = (0i64, 0i64);
        for container in spec.init_containers.iter().flatten() {
            let own = of(container);
            match roles::of_init(container) {
                Role::Sidecar => {
                    sidecars = sidecars.saturating_add(own);
                    most = most.max(sidecars);
                }
                _ => most = most.max(sidecars.saturating_add(own)),
            }
        }
        let main = spec.containers.iter().map(of);
        main.fold(sidecars, i64::saturating_add).max(most)
    };
    // What the whole pod is given is more than any of its containers needs.
    let whole = |name: &str| pod_limit(Some(spec), name);
    let cpus = whole("cpu").map_or_else(|| sum(&cpu), Quantity::milli_value);
    let memory = whole("memory").map_or_else(|| sum(&memory), Quantity::value);
    // Huge pages come out of the VM's memory, beside the limits.
    let memory = memory.max(0).saturating_add(sum(&huge_page_bytes));
    let vcpus = u32::try_from(cpus.max(0).saturating_add(999) / 1000).unwrap_or(u32::MAX);
    let memory_mib = u32::try_from(memory.max(0).saturating_add(MIB - 1) / MIB).unwrap_or(u32::MAX);
    VmSize {
        vcpus: vcpus.max(1),
        memory_mib: memory_mib.saturating_add(config.overhead_mib),
    }
}

/// [`vm_needs`], as far as the node has it.
pub(crate) fn vm_size(spec: &PodSpec, config: &NodeletConfig, capacity: Capacity) -> VmSize {
    let most = u32::try_from(capacity.memory_bytes / MIB)
        .unwrap_or(u32::MAX)
        .max(1);
    let needs = vm_needs(spec, config);
    VmSize {
        vcpus: needs.vcpus.min(capacity.cpus.max(1)),
        memory_mib: needs.memory_mib.min(most),
    }
}

/// `Guaranteed`, `Burstable` or `BestEffort`.
pub(crate) fn qos_class(spec: &PodSpec) -> &'static str {
    let containers: Vec<&Container> = spec
        .containers
        .iter()
        .chain(spec.init_containers.iter().flatten())
        .collect();
    let positive = |amount: Option<Quantity>| amount.filter(|value| *value > Quantity::default());
    let mut any = false;
    let mut guaranteed = true;
    // What is said of the whole pod is what counts.
    let of_pod = |name| (pod_limit(Some(spec), name), pod_request(Some(spec), name));
    let pod = ["cpu", "memory"].map(of_pod);
    if pod
        .iter()
        .any(|(limit, request)| limit.is_some() || request.is_some())
    {
        let all = pod
            .iter()
            .all(|(limit, request)| limit.is_some() && (request.is_none() || limit == request));
        return if all { "Guaranteed" } else { "Burstable" };
    }
    for container in containers {
        for name in ["cpu", "memory"] {
            let (limit, request) = (
                positive(limit(container, name)),
                positive(request(container, name)),
            );
            any |= limit.is_some() || request.is_some();
            guaranteed &= limit.is_some() && limit == request;
        }
    }
    match (any, guaranteed) {
        (false, _) => "BestEffort",
        (true, true) => "Guaranteed",
        (true, false) => "Burstable",
    }
}

#[cfg(test)]
#[allow(clippy::needless_pass_by_value, reason = "json! makes values")]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn spec(containers: Value, init: Value) -> PodSpec {
        serde_json::from_value(json!({"containers": containers, "initContainers": init})).unwrap()
    }

    fn c(resources: Value) -> Value {
        json!({"name": "c", "resources": resources})
    }

    fn config() -> NodeletConfig {
        NodeletConfig::new(
            "n",
            "127.0.0.1".parse().unwrap(),
            "/s".into(),
            "10.0.0.0/8".parse().unwrap(),
        )
    }

    const NODE: Capacity = Capacity {
        cpus: 4,
        memory_bytes: 8 << 30,
        storage_bytes: 100 << 30,
    };

    #[test]
    fn vm_holds_the_sum_of_containers_or_the_largest_init_container() {
        let mem = |m: &str| c(json!({"limits": {"memory": m}}));
        for (containers, init, vcpus, memory_mib) in [
            (json!([c(json!({}))]), json!([]), 1, 128 + 64),
            (json!([mem("256Mi"), mem("100M")]), json!([]), 1, 352 + 64),
            (json!([mem("64Mi")]), json!([mem("512Mi")]), 1, 512 + 64),
            (
                json!([c(json!({"requests": {"memory": "1Gi"}}))]),
                json!([]),
                1,
                1024 + 64,
            ),
            (
                json!([c(json!({"limits": {"cpu": "1500m"}}))]),
                json!([]),
                2,
                128 + 64,
            ),
            (
                json!([c(json!({"limits": {"cpu": "64"}}))]),
                json!([]),
                4,
                128 + 64,
            ),
            (
                json!([mem("64Mi")]),
                json!([
                    {"name": "s", "restartPolicy": "Always", "resources": {"limits": {"memory": "100Mi"}}},
                    mem("200Mi")
                ]),
                1,
                300 + 64,
            ),
            (
                json!([mem("300Mi")]),
                json!([{"name": "s", "restartPolicy": "Always", "resources": {"limits": {"memory": "100Mi"}}}]),
                1,
                400 + 64,
            ),
            (json!([mem("900Gi")]), json!([]), 1, 8192),
            (json!([mem("-1")]), json!([]), 1, 64),
        ] {
            let size = vm_size(&spec(containers.clone(), init), &config(), NODE);
            assert_eq!(size, VmSize { vcpus, memory_mib }, "{containers}");
        }
        let mut whole = spec(json!([mem("64Mi"), c(json!({}))]), json!([]));
        whole.resources =
            serde_json::from_value(json!({"limits": {"cpu": "2", "memory": "1Gi"}})).ok();
        let size = vm_size(&whole, &config(), NODE);
        let expected = VmSize {
            vcpus: 2,
            memory_mib: 1024 + 64,
        };
        assert_eq!(size, expected, "the whole pod's");
        let free = container_resources(&whole.containers[1], Some(&whole));
        assert_eq!((free.memory_limit, free.cpu_limit_milli), (1 << 30, 2000));
        let own = container_resources(&whole.containers[0], Some(&whole));
        assert_eq!(own.memory_limit, 64 << 20);
        assert_eq!(qos_class(&whole), "Guaranteed");
    }

    #[test]
    fn huge_pages_are_memory_beside_the_limits() {
        let huge = |pages: &str| {
            c(json!({"limits": {"memory": "64Mi", "hugepages-2Mi": pages, "hugepages-1Gi": "0"}}))
        };
        let spec = spec(json!([huge("4Mi"), huge("2Mi")]), json!([huge("6Mi")]));
        assert_eq!(vm_size(&spec, &config(), NODE).memory_mib, 128 + 6 + 64);
        let own = container_resources(&spec.containers[0], Some(&spec));
        assert_eq!(own.huge_pages, [("2MB".to_owned(), 4 << 20)].into());
        assert_eq!(own.memory_limit, 64 << 20);
        let mut whole = spec;
        whole.resources = serde_json::from_value(json!({"limits": {"memory": "1Gi"}})).ok();
        let size = vm_size(&whole, &config(), NODE);
        assert_eq!(size.memory_mib, 1024 + 6 + 64);
    }

    #[test]
    fn qos_follows_upstream() {
        for (resources, class) in [
            (json!({}), "BestEffort"),
            (json!({"requests": {"cpu": "0"}}), "BestEffort"),
            (json!({"requests": {"cpu": "1"}}), "Burstable"),
            (json!({"limits": {"cpu": "1"}}), "Burstable"),
            (
                json!({"limits": {"cpu": "1", "memory": "1Gi"}}),
                "Guaranteed",
            ),
            (
                json!({"limits": {"cpu": "1", "memory": "1Gi"}, "requests": {"cpu": "500m"}}),
                "Burstable",
            ),
        ] {
            assert_eq!(
                qos_class(&spec(json!([c(resources.clone())]), json!([]))),
                class,
                "{resources}"
            );
        }
    }
}
