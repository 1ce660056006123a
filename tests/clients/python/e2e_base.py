"""What the client's own tests take their cluster from (module kubernetes.e2e_test.base, which its wheel leaves out)."""

import os

from kubernetes import client, config


def get_e2e_configuration():
    configuration = client.Configuration()
    config.load_kube_config(
        config_file=os.environ["KUBECONFIG"], client_configuration=configuration
    )
    return configuration
