"""Kinds of jobs: which ones the same rank group can run, and which need no other LoRAs."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict

from launch.serve.tables import GROUP
from runtime.jobs.job import Job


def kind_of(job: Job) -> str:
    """Return a key that is equal for jobs that need the same weights: the rank group's, and the LoRAs'."""
    return group_of(job) + _digest([one.model_dump(mode="json") for one in job.config.lora])


def group_of(job: Job) -> str:
    """Return a key that is equal for jobs that the same rank group can run; it switches LoRAs."""
    config = job.config.model_dump(mode="json", exclude={"lora"})
    return _digest([config, job.world, asdict(job.degrees), job.timeout])


def _digest(content: object) -> str:
    text = json.dumps(content, sort_keys=True).encode()
    return hashlib.sha256(text).hexdigest()[:GROUP]
