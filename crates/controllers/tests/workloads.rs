//! Controllers of workloads against a server in the same process and a node that is none.
#![allow(
    clippy::tests_outside_test_module,
    clippy::unwrap_used,
    clippy::panic,
    reason = "test code: an integration test is one module, and failures panic"
)]

mod common;

use common::{Cluster, name, names};
use hypernetes_apimachinery::usage::{PodUsage, Usage};
use serde_json::{Value, json};

const APPS: &str = "/apis/apps/v1/namespaces/default";
const BATCH: &str = "/apis/batch/v1/namespaces/default";
const CORE: &str = "/api/v1/namespaces/default";

fn template(image: &str) -> Value {
    json!({"metadata": {"labels": {"app": "x"}},
        "spec": {"containers": [{"name": "a", "image": image}]}})
}

fn deployment(name: &str, replicas: i64) -> Value {
    json!({"metadata": {"name": name}, "spec": {"replicas": replicas,
        "selector": {"matchLabels": {"app": "x"}}, "template": template("i:1")}})
}

fn pods() -> String {
    format!("{CORE}/pods")
}

fn is_rolled_out(object: &Value, replicas: i64) -> bool {
    let status = &object["status"];
    status["observedGeneration"] == object["metadata"]["generation"]
        && ["updatedReplicas", "availableReplicas", "replicas"]
            .iter()
            .all(|field| status[*field] == replicas)
}

fn condition<'a>(object: &'a Value, kind: &str) -> &'a Value {
    object["status"]["conditions"]
        .as_array()
        .into_iter()
        .flatten()
        .find(|condition| condition["type"] == kind)
        .unwrap_or(&Value::Null)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_deployment_rolls_out_scales_and_goes_back() {
    let cluster = Cluster::start().await;
    let path = format!("{APPS}/deployments/d");
    cluster
        .create(&format!("{APPS}/deployments"), &deployment("d", 3))
        .await;
    let done = cluster.wait(&path, |d| is_rolled_out(d, 3)).await;
    assert_eq!(condition(&done, "Available")["status"], "True");
    assert_eq!(
        condition(&done, "Progressing")["reason"],
        "NewReplicaSetAvailable"
    );
    assert_eq!(
        done["metadata"]["annotations"]["deployment.kubernetes.io/revision"],
        "1"
    );
    let own = cluster.list(&pods()).await;
    assert!(own.iter().all(|pod| name(pod).starts_with("d-")));

    let image = |image: &str| json!({"spec": {"template": template(image)}});
    cluster.patch(&path, &image("i:2")).await;
    cluster.restart().await;
    let done = cluster.wait(&path, |d| is_rolled_out(d, 3)).await;
    assert_eq!(
        done["metadata"]["annotations"]["deployment.kubernetes.io/revision"],
        "2"
    );
    for pod in cluster.wait_count(&pods(), 3).await {
        assert_eq!(pod["spec"]["containers"][0]["image"], "i:2");
    }
    let sets = cluster.list(&format!("{APPS}/replicasets")).await;
    assert_eq!(sets.len(), 2, "{:?}", names(&sets));

    // Back to the first template: its set is used again, as revision 3.
    cluster.patch(&path, &image("i:1")).await;
    let done = cluster
        .wait(&path, |d| {
            is_rolled_out(d, 3)
                && d["metadata"]["annotations"]["deployment.kubernetes.io/revision"] == "3"
        })
        .await;
    assert_eq!(cluster.list(&format!("{APPS}/replicasets")).await.len(), 2);

    let scale = json!({"spec": {"replicas": 1}});
    let scaled = cluster.patch(&format!("{path}/scale"), &scale).await;
    assert_eq!(scaled["kind"], "Scale");
    assert_eq!(scaled["status"]["selector"], "app=x");
    cluster.wait(&path, |d| is_rolled_out(d, 1)).await;
    cluster.wait_count(&pods(), 1).await;
    let terminating = |d: &Value| d["status"]["terminatingReplicas"].as_i64().unwrap_or(0);
    cluster.wait(&path, |d| terminating(d) == 0).await;

    // Nothing is written where nothing is to be done.
    let before = cluster.get(&path).await["metadata"]["resourceVersion"].clone();
    cluster.restart().await;
    cluster
        .create(&format!("{APPS}/deployments"), &deployment_of("other"))
        .await;
    cluster
        .wait(&format!("{APPS}/deployments/other"), |d| {
            is_rolled_out(d, 1)
        })
        .await;
    assert_eq!(
        cluster.get(&path).await["metadata"]["resourceVersion"],
        before
    );
    assert_ne!(done["metadata"]["resourceVersion"], before);
}

fn deployment_of(name: &str) -> Value {
    let mut other = deployment(name, 1);
    other["spec"]["selector"]["matchLabels"] = json!({"app": name});
    other["spec"]["template"]["metadata"]["labels"] = json!({"app": name});
    other
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_deployment_stands_still_and_recreates() {
    let cluster = Cluster::start().await;
    let path = format!("{APPS}/deployments/d");
    let mut object = deployment("d", 2);
    object["spec"]["strategy"] = json!({"type": "Recreate"});
    cluster
        .create(&format!("{APPS}/deployments"), &object)
        .await;
    cluster.wait(&path, |d| is_rolled_out(d, 2)).await;
    cluster
        .patch(&path, &json!({"spec": {"paused": true}}))
        .await;
    cluster
        .patch(&path, &json!({"spec": {"template": template("i:2")}}))
        .await;
    cluster
        .wait(&path, |d| {
            condition(d, "Progressing")["reason"] == "DeploymentPaused"
        })
        .await;
    for pod in cluster.list(&pods()).await {
        assert_eq!(pod["spec"]["containers"][0]["image"], "i:1");
    }
    cluster
        .patch(&path, &json!({"spec": {"paused": false}}))
        .await;
    cluster.wait(&path, |d| is_rolled_out(d, 2)).await;
    for pod in cluster.wait_count(&pods(), 2).await {
        assert_eq!(pod["spec"]["containers"][0]["image"], "i:2");
    }
    // One that never becomes ready is said to be late.
    let mut stuck = template("i:3");
    stuck["metadata"]["annotations"] = json!({"test/phase": "Pending"});
    let change = json!({"spec": {"progressDeadlineSeconds": 1, "template": stuck}});
    cluster.patch(&path, &change).await;
    let late = cluster
        .wait(&path, |d| {
            condition(d, "Progressing")["reason"] == "ProgressDeadlineExceeded"
        })
        .await;
    assert_eq!(condition(&late, "Progressing")["status"], "False");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn dependents_go_before_after_or_not_at_all() {
    let cluster = Cluster::start().await;
    let collection = format!("{APPS}/deployments");
    let sets = format!("{APPS}/replicasets");
    let path = format!("{collection}/d");
    for policy in ["Background", "Foreground"] {
        cluster.create(&collection, &deployment("d", 2)).await;
        cluster.wait(&path, |d| is_rolled_out(d, 2)).await;
        cluster
            .delete(&format!("{path}?propagationPolicy={policy}"))
            .await;
        cluster.wait(&path, Value::is_null).await;
        if policy == "Foreground" {
            assert!(cluster.list(&sets).await.is_empty(), "they go first");
        }
        cluster.wait_count(&sets, 0).await;
        cluster.wait_count(&pods(), 0).await;
    }
    cluster.create(&collection, &deployment("d", 2)).await;
    cluster.wait(&path, |d| is_rolled_out(d, 2)).await;
    cluster
        .delete(&format!("{path}?propagationPolicy=Orphan"))
        .await;
    cluster.wait(&path, Value::is_null).await;
    let left = cluster.list(&sets).await;
    assert_eq!(left.len(), 1);
    assert!(
        left[0]["metadata"]["ownerReferences"]
            .as_array()
            .is_none_or(Vec::is_empty)
    );
    // A new deployment takes them over as they are.
    let before = cluster.list(&pods()).await;
    cluster.create(&collection, &deployment("d", 2)).await;
    cluster.wait(&path, |d| is_rolled_out(d, 2)).await;
    let after = cluster.list(&pods()).await;
    assert_eq!(names(&before), names(&after));
    let adopted = cluster.list(&sets).await;
    assert_eq!(names(&left), names(&adopted));
    assert_eq!(adopted[0]["metadata"]["ownerReferences"][0]["name"], "d");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_has_several_owners_stays_with_the_last() {
    let cluster = Cluster::start().await;
    let maps = format!("{CORE}/configmaps");
    let map = |name: &str, owners: Vec<&Value>| {
        let references: Vec<Value> = owners
            .into_iter()
            .map(|owner| {
                json!({"apiVersion": "v1", "kind": "ConfigMap",
                "name": owner["metadata"]["name"], "uid": owner["metadata"]["uid"]})
            })
            .collect();
        json!({"metadata": {"name": name, "ownerReferences": references}})
    };
    let a = cluster.create(&maps, &map("a", vec![])).await;
    let b = cluster.create(&maps, &map("b", vec![])).await;
    cluster.create(&maps, &map("child", vec![&a, &b])).await;
    let child = format!("{maps}/child");
    cluster.delete(&format!("{maps}/a")).await;
    cluster
        .wait(&child, |child| {
            child["metadata"]["ownerReferences"]
                .as_array()
                .map_or(0, Vec::len)
                == 1
        })
        .await;
    cluster.delete(&format!("{maps}/b")).await;
    cluster.wait(&child, Value::is_null).await;
    // One whose owner has never been there is nobody's either.
    let mut ghost = a.clone();
    ghost["metadata"]["uid"] = "00000000-0000-0000-0000-000000000000".into();
    cluster.create(&maps, &map("lost", vec![&ghost])).await;
    cluster.wait(&format!("{maps}/lost"), Value::is_null).await;
}

fn job(name: &str, phase: &str, spec: &Value) -> Value {
    let mut object = json!({"metadata": {"name": name}, "spec": spec});
    object["spec"]["template"] = json!({
        "metadata": {"annotations": {"test/phase": phase}},
        "spec": {"restartPolicy": "Never", "containers": [{"name": "a", "image": "i"}]}});
    object
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn jobs_end_as_they_should() {
    let cluster = Cluster::start().await;
    let collection = format!("{BATCH}/jobs");
    let at = |name: &str| format!("{collection}/{name}");
    let many = json!({"completions": 3, "parallelism": 2});
    cluster
        .create(&collection, &job("many", "Succeeded", &many))
        .await;
    cluster.restart().await;
    let done = cluster
        .wait(&at("many"), |job| {
            condition(job, "Complete")["status"] == "True"
        })
        .await;
    assert_eq!(done["status"]["succeeded"], 3);
    assert!(done["status"]["completionTime"].is_string());
    let own = cluster.list(&pods()).await;
    assert_eq!(own.len(), 3);

    let indexed = json!({"completions": 3, "parallelism": 3, "completionMode": "Indexed"});
    cluster
        .create(&collection, &job("indexed", "Succeeded", &indexed))
        .await;
    let done = cluster
        .wait(&at("indexed"), |job| {
            condition(job, "Complete")["status"] == "True"
        })
        .await;
    assert_eq!(done["status"]["completedIndexes"], "0-2");

    let once = json!({"backoffLimit": 0});
    cluster
        .create(&collection, &job("bad", "Failed", &once))
        .await;
    let failed = cluster
        .wait(&at("bad"), |job| {
            condition(job, "Failed")["status"] == "True"
        })
        .await;
    assert_eq!(
        condition(&failed, "Failed")["reason"],
        "BackoffLimitExceeded"
    );
    assert_eq!(failed["status"]["failed"], 1);

    let late = json!({"activeDeadlineSeconds": 1});
    cluster
        .create(&collection, &job("late", "Running", &late))
        .await;
    let failed = cluster
        .wait(&at("late"), |job| {
            condition(job, "Failed")["status"] == "True"
        })
        .await;
    assert_eq!(condition(&failed, "Failed")["reason"], "DeadlineExceeded");

    let held = json!({"suspend": true, "ttlSecondsAfterFinished": 0});
    cluster
        .create(&collection, &job("held", "Succeeded", &held))
        .await;
    cluster
        .wait(&at("held"), |job| {
            condition(job, "Suspended")["status"] == "True"
        })
        .await;
    cluster
        .patch(&at("held"), &json!({"spec": {"suspend": false}}))
        .await;
    cluster.wait(&at("held"), Value::is_null).await;

    // Nothing holds the pods of a job that goes.
    cluster
        .delete(&format!("{}?propagationPolicy=Background", at("many")))
        .await;
    cluster
        .wait(
            &format!("{}?labelSelector=job-name%3Dmany", pods()),
            |list| list["items"].as_array().is_some_and(Vec::is_empty),
        )
        .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cron_job_makes_jobs_and_forgets_them() {
    let cluster = Cluster::start().await;
    let template = job("x", "Succeeded", &json!({}))["spec"].take();
    let object = json!({"metadata": {"name": "c"}, "spec": {
        "schedule": "* * * * *", "successfulJobsHistoryLimit": 1, "jobTemplate": {"spec": template}}});
    cluster.create(&format!("{BATCH}/cronjobs"), &object).await;
    // As if it had been there for some minutes.
    let past = json!({"status": {"lastScheduleTime": "2026-01-01T00:00:00Z"}});
    let path = format!("{BATCH}/cronjobs/c");
    cluster.patch(&format!("{path}/status"), &past).await;
    let jobs = format!("{BATCH}/jobs");
    let made = cluster.wait_count(&jobs, 1).await;
    assert!(name(&made[0]).starts_with("c-"));
    assert_eq!(made[0]["metadata"]["ownerReferences"][0]["kind"], "CronJob");
    let served = cluster
        .wait(&path, |cron| {
            cron["status"]["lastSuccessfulTime"].is_string()
        })
        .await;
    assert_ne!(served["status"]["lastScheduleTime"], "2026-01-01T00:00:00Z");
    let suspended = json!({"spec": {"suspend": true}});
    cluster.patch(&path, &suspended).await;
    cluster.delete(&path).await;
    cluster.wait_count(&jobs, 0).await;
}

fn stateful_set(replicas: i64) -> Value {
    json!({"metadata": {"name": "web"}, "spec": {"replicas": replicas, "serviceName": "web",
        "selector": {"matchLabels": {"app": "x"}}, "template": template("i:1")}})
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stateful_set_keeps_names_and_order() {
    let cluster = Cluster::start().await;
    let path = format!("{APPS}/statefulsets/web");
    cluster
        .create(&format!("{APPS}/statefulsets"), &stateful_set(3))
        .await;
    cluster
        .wait(&path, |set| set["status"]["availableReplicas"] == 3)
        .await;
    let all = cluster.list(&pods()).await;
    assert_eq!(names(&all), ["web-0", "web-1", "web-2"]);
    assert_eq!(all[1]["spec"]["hostname"], "web-1");
    let created = |pod: &Value| {
        let version = pod["metadata"]["uid"].as_str().unwrap().to_owned();
        (name(pod).to_owned(), version)
    };
    let before: Vec<_> = all.iter().map(created).collect();

    // Those below the partition keep what they have.
    let change = json!({"spec": {"template": template("i:2"),
        "updateStrategy": {"type": "RollingUpdate", "rollingUpdate": {"partition": 1}}}});
    cluster.patch(&path, &change).await;
    cluster.restart().await;
    cluster
        .wait(&path, |set| {
            set["status"]["updatedReplicas"] == 2 && set["status"]["availableReplicas"] == 3
        })
        .await;
    let all = cluster.list(&pods()).await;
    assert_eq!(created(&all[0]), before[0]);
    assert_eq!(all[0]["spec"]["containers"][0]["image"], "i:1");
    assert_eq!(all[2]["spec"]["containers"][0]["image"], "i:2");
    // One of them that goes comes back as it was.
    cluster.delete(&format!("{}/web-0", pods())).await;
    let back = cluster
        .wait(&format!("{}/web-0", pods()), |pod| {
            pod.is_object() && created(pod) != before[0]
        })
        .await;
    assert_eq!(back["spec"]["containers"][0]["image"], "i:1");

    let all = json!({"spec": {"updateStrategy": {"rollingUpdate": {"partition": 0}}}});
    cluster.patch(&path, &all).await;
    let done = cluster
        .wait(&path, |set| {
            set["status"]["updatedReplicas"] == 3
                && set["status"]["currentRevision"] == set["status"]["updateRevision"]
        })
        .await;
    assert_eq!(done["status"]["currentReplicas"], 3);
    cluster
        .patch(&path, &json!({"spec": {"replicas": 1}}))
        .await;
    let left = cluster.wait_count(&pods(), 1).await;
    assert_eq!(names(&left), ["web-0"]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_daemon_set_has_a_pod_on_each_node() {
    let cluster = Cluster::start().await;
    let object = json!({"metadata": {"name": "ds"}, "spec": {
        "selector": {"matchLabels": {"app": "x"}}, "template": template("i:1")}});
    cluster.create(&format!("{APPS}/daemonsets"), &object).await;
    let path = format!("{APPS}/daemonsets/ds");
    let done = cluster
        .wait(&path, |set| set["status"]["numberAvailable"] == 1)
        .await;
    assert_eq!(done["status"]["desiredNumberScheduled"], 1);
    cluster
        .patch(&path, &json!({"spec": {"template": template("i:2")}}))
        .await;
    cluster
        .wait(&path, |set| {
            set["status"]["observedGeneration"] == set["metadata"]["generation"]
                && set["status"]["updatedNumberScheduled"] == 1
                && set["status"]["numberAvailable"] == 1
        })
        .await;
    let own = cluster.wait_count(&pods(), 1).await;
    assert_eq!(own[0]["spec"]["containers"][0]["image"], "i:2");
    let revisions = cluster.list(&format!("{APPS}/controllerrevisions")).await;
    assert_eq!(revisions.len(), 2);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_budget_holds_back_evictions() {
    let cluster = Cluster::start().await;
    cluster
        .create(&format!("{APPS}/deployments"), &deployment("d", 2))
        .await;
    let budgets = "/apis/policy/v1/namespaces/default/poddisruptionbudgets";
    let budget = json!({"metadata": {"name": "b"}, "spec": {"maxUnavailable": 1,
        "selector": {"matchLabels": {"app": "x"}}}});
    cluster.create(budgets, &budget).await;
    let path = format!("{budgets}/b");
    let ready = cluster
        .wait(&path, |b| b["status"]["disruptionsAllowed"] == 1)
        .await;
    assert_eq!(ready["status"]["expectedPods"], 2);
    // Those that come next never become ready.
    let mut stuck = template("i:1");
    stuck["metadata"]["annotations"] = json!({"test/phase": "Pending"});
    let set = cluster.list(&format!("{APPS}/replicasets")).await.remove(0);
    let set = format!("{APPS}/replicasets/{}", name(&set));
    cluster
        .patch(
            &format!("{APPS}/deployments/d"),
            &json!({"spec": {"paused": true}}),
        )
        .await;
    let hold =
        json!({"spec": {"template": {"metadata": {"annotations": {"test/phase": "Pending"}}}}});
    cluster.patch(&set, &hold).await;
    let all = cluster.list(&pods()).await;
    let evict = async |pod: &Value| {
        let eviction = json!({"apiVersion": "policy/v1", "kind": "Eviction",
            "metadata": {"name": name(pod), "namespace": "default"}});
        cluster
            .try_create(&format!("{}/{}/eviction", pods(), name(pod)), &eviction)
            .await
    };
    evict(&all[0]).await.unwrap();
    let refused = evict(&all[1]).await.unwrap_err();
    let kube::Error::Api(status) = refused else {
        panic!("{refused}");
    };
    assert_eq!(status.code, 429);
    assert_eq!(
        status.message,
        "Cannot evict pod as it would violate the pod's disruption budget."
    );
    cluster
        .wait(&path, |b| {
            b["status"]["currentHealthy"] == 1 && b["status"]["disruptionsAllowed"] == 0
        })
        .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_quota_is_charged_and_given_back() {
    let cluster = Cluster::start().await;
    let quotas = format!("{CORE}/resourcequotas");
    let quota = json!({"metadata": {"name": "q"}, "spec": {"hard": {"pods": "2", "count/configmaps": "9"}}});
    cluster.create(&quotas, &quota).await;
    let path = format!("{quotas}/q");
    cluster
        .wait(&path, |q| q["status"]["used"]["pods"] == "0")
        .await;
    cluster
        .create(&format!("{APPS}/deployments"), &deployment("d", 3))
        .await;
    let failed = cluster
        .wait(&format!("{APPS}/deployments/d"), |d| {
            condition(d, "ReplicaFailure")["status"] == "True"
                && d["status"]["availableReplicas"] == 2
        })
        .await;
    let message = condition(&failed, "ReplicaFailure")["message"]
        .as_str()
        .unwrap();
    assert!(
        message.ends_with(
            "is forbidden: exceeded quota: q, requested: pods=1, used: pods=2, limited: pods=2"
        ),
        "{message}"
    );
    let scale = json!({"spec": {"replicas": 1}});
    cluster
        .patch(&format!("{APPS}/deployments/d/scale"), &scale)
        .await;
    cluster
        .wait(&path, |q| q["status"]["used"]["pods"] == "1")
        .await;
    assert_eq!(cluster.list(&pods()).await.len(), 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_autoscaler_follows_the_use() {
    let cluster = Cluster::start().await;
    let mut object = deployment("d", 1);
    object["spec"]["template"]["spec"]["containers"][0]["resources"] =
        json!({"requests": {"cpu": "100m"}});
    cluster
        .create(&format!("{APPS}/deployments"), &object)
        .await;
    let path = format!("{APPS}/deployments/d");
    cluster.wait(&path, |d| is_rolled_out(d, 1)).await;
    let scalers = "/apis/autoscaling/v2/namespaces/default/horizontalpodautoscalers";
    let metric = json!({"type": "Resource", "resource": {"name": "cpu",
        "target": {"type": "Utilization", "averageUtilization": 30}}});
    let scaler = |name: &str, target: &str| {
        json!({"metadata": {"name": name}, "spec": {"maxReplicas": 5, "metrics": [metric],
            "scaleTargetRef": {"apiVersion": "apps/v1", "kind": "Deployment", "name": target}}})
    };
    cluster.create(scalers, &scaler("blind", "d")).await;
    let blind = cluster
        .wait(&format!("{scalers}/blind"), |scaler| {
            condition(scaler, "ScalingActive")["status"] == "False"
        })
        .await;
    assert_eq!(
        condition(&blind, "ScalingActive")["reason"],
        "FailedGetResourceMetric"
    );
    cluster.delete(&format!("{scalers}/blind")).await;

    let pod = cluster.list(&pods()).await.remove(0);
    let text = |field: &str| pod["metadata"][field].as_str().unwrap().to_owned();
    let used = Usage {
        cpu_nano_cores: 90_000_000,
        memory_bytes: 1 << 20,
    };
    cluster.usage.set(
        Vec::new(),
        vec![PodUsage {
            namespace: "default".into(),
            name: text("name"),
            uid: text("uid"),
            at: jiff::Timestamp::now(),
            window: std::time::Duration::from_secs(10),
            containers: [("a".to_owned(), used)].into(),
        }],
    );
    cluster.create(scalers, &scaler("s", "d")).await;
    cluster.wait(&path, |d| is_rolled_out(d, 3)).await;
    let is = cluster
        .wait(&format!("{scalers}/s"), |scaler| {
            scaler["status"]["desiredReplicas"] == 3
        })
        .await;
    let current = &is["status"]["currentMetrics"][0]["resource"]["current"];
    assert_eq!(current["averageUtilization"], 90);
    assert_eq!(condition(&is, "AbleToScale")["status"], "True");
    cluster.create(scalers, &scaler("lost", "nothing")).await;
    cluster
        .wait(&format!("{scalers}/lost"), |scaler| {
            condition(scaler, "AbleToScale")["reason"] == "FailedGetScale"
        })
        .await;
}

/// What a tenant's own pod could not be, a pod of its template is not either.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_template_gets_no_more_than_a_pod() {
    let cluster = Cluster::start().await;
    let labels = json!({"hypernetes.io/tenant": "acme"});
    let namespace = json!({"metadata": {"name": "acme", "labels": labels}});
    cluster.create("/api/v1/namespaces", &namespace).await;
    let collection = "/apis/apps/v1/namespaces/acme/deployments";
    let mut host = deployment_of("host");
    host["spec"]["template"]["spec"]["hostNetwork"] = true.into();
    let mut reserved = deployment_of("reserved");
    reserved["spec"]["template"]["metadata"]["annotations"] =
        json!({"hypernetes.io/allowed-kernels": "*"});
    for (object, field) in [
        (host, "spec.hostNetwork"),
        (
            reserved,
            "metadata.annotations[hypernetes.io/allowed-kernels]",
        ),
    ] {
        cluster.create(collection, &object).await;
        let path = format!("{collection}/{}", name(&object));
        let failed = cluster
            .wait(&path, |d| {
                condition(d, "ReplicaFailure")["status"] == "True"
            })
            .await;
        let message = condition(&failed, "ReplicaFailure")["message"]
            .as_str()
            .unwrap();
        assert!(
            message.contains("forbidden") && message.contains(field),
            "{message}"
        );
    }
    assert!(
        cluster
            .list("/api/v1/namespaces/acme/pods")
            .await
            .is_empty()
    );
    // The namespace goes with all that is in it, though its controllers go on.
    cluster.delete("/api/v1/namespaces/acme").await;
    cluster
        .wait("/api/v1/namespaces/acme", Value::is_null)
        .await;
}
