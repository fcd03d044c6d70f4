"""The Ray cluster that a driver works on: the one it is given, or its own."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import ray
from ray.job_config import JobConfig

log = logging.getLogger(__name__)


@contextmanager
def cluster(cpus: int, about: Mapping[str, str]) -> Iterator[None]:
    """Use the cluster of RAY_ADDRESS, or a local one that ends with the block.

    Args:
        cpus: at least so many on a local one.
        about: what the driver does, for `ray list jobs` and `ray job list`.
    """
    metadata = {f"lockstep_{key}": value for key, value in about.items()}
    shared: dict[str, Any] = {
        "job_config": JobConfig(metadata=metadata),
        "logging_level": logging.ERROR,
        "log_to_driver": False,
    }
    if "RAY_ADDRESS" in os.environ:
        ray.init(address="auto", **shared)
        _tell_submission(metadata)
    else:
        ray.init(address="local", num_cpus=max(cpus, os.cpu_count() or 1), include_dashboard=False, **shared)
    try:
        yield
    finally:
        ray.shutdown()


def _tell_submission(metadata: Mapping[str, str]) -> None:
    """Add `metadata` to what `ray job list` shows of the submission that this driver is of, if it is of one.

    Ray takes it from `ray job submit --metadata-json` alone and has no call for it, so this writes where Ray
    keeps it; what the user gave there stays. Nothing depends on it.
    """
    injected = os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    submission = json.loads(injected).get("metadata", {}).get("job_submission_id")
    if submission is None:
        return
    try:
        from ray.dashboard.modules.job.common import JobInfoStorageClient
        from ray.experimental.internal_kv import _internal_kv_get, _internal_kv_put

        key = JobInfoStorageClient.JOB_DATA_KEY.format(job_id=submission).encode()
        info = json.loads(_internal_kv_get(key, namespace="job"))
        info["metadata"] = {**metadata, **(info.get("metadata") or {})}
        _internal_kv_put(key, json.dumps(info).encode(), overwrite=True, namespace="job")
    except Exception as error:
        log.info("ray job list will not show what this job is: %s", error)
