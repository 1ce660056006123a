"""A small operator: keeps a ConfigMap for each Greeting, and takes it away when the Greeting goes.

Built on kopf: finalizer, watch with resumption, patches of the status.
"""

import os

import kopf
import kubernetes

GROUP, VERSION, PLURAL = "clients.example.org", "v1", "greetings"


def api():
    configuration = kubernetes.client.Configuration()
    kubernetes.config.load_kube_config(
        config_file=os.environ["KUBECONFIG"], client_configuration=configuration
    )
    return kubernetes.client.CoreV1Api(kubernetes.client.ApiClient(configuration))


@kopf.on.startup()
def settle(settings: kopf.OperatorSettings, **_):
    # The server is killed under it: it may ask again soon, and for as long as it takes.
    settings.networking.error_backoffs = [0.2] * 150
    settings.watching.reconnect_backoff = 0.2
    settings.watching.server_timeout = 60
    settings.persistence.finalizer = f"{GROUP}/operator"
    settings.posting.enabled = False


@kopf.on.create(GROUP, VERSION, PLURAL)
@kopf.on.update(GROUP, VERSION, PLURAL, field="spec")
@kopf.on.resume(GROUP, VERSION, PLURAL)
def greet(spec, name, namespace, meta, patch, **_):
    text = f"hello {spec['whom']}"
    body = {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        # Not owned: the operator itself must take it away.
        "metadata": {"name": f"greeting-{name}", "namespace": namespace},
        "data": {"text": text},
    }
    try:
        api().create_namespaced_config_map(namespace, body)
    except kubernetes.client.ApiException as error:
        if error.status != 409:
            raise
        api().patch_namespaced_config_map(f"greeting-{name}", namespace, body)
    patch.status["text"] = text
    patch.status["observedGeneration"] = meta["generation"]


@kopf.on.delete(GROUP, VERSION, PLURAL)
def part(name, namespace, **_):
    try:
        api().delete_namespaced_config_map(f"greeting-{name}", namespace)
    except kubernetes.client.ApiException as error:
        if error.status != 404:
            raise
