"""The cluster files that the docs name are what Ray and Kubernetes can read."""

from __future__ import annotations

import shlex

import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

from launch.commands.ray_job import job as ray_job
from tests.places import ROOT

CLUSTER = ROOT / "configs" / "cluster"


def test_ray_up_accepts_its_file() -> None:
    prepared = prepare_config(yaml.safe_load((CLUSTER / "ray-up.yaml").read_text()))
    validate_config(prepared)
    assert prepared["available_node_types"]["local.cluster.node"]["min_workers"] == 2


def test_the_kubernetes_job_starts_as_many_ranks_as_there_are_gpus() -> None:
    spec = yaml.safe_load((CLUSTER / "kuberay.yaml").read_text())["spec"]
    module, arguments = shlex.split(spec["entrypoint"])[:3], shlex.split(spec["entrypoint"])[3:]
    assert module == ["python", "-m", "launch.ray_job"]
    options = ray_job.make_context("job", arguments).params
    (workers,) = spec["rayClusterSpec"]["workerGroupSpecs"]
    (container,) = workers["template"]["spec"]["containers"]
    gpus = int(container["resources"]["limits"]["nvidia.com/gpu"])
    assert options["ranks"] == workers["replicas"] * gpus
    assert options["out"].is_relative_to(container["volumeMounts"][0]["mountPath"])
