"""Metrics for Prometheus, which Ray exports from every node with the prefix `ray_`.

The dashboard `configs/grafana/lockstep.json` shows them.
"""

from __future__ import annotations

from ray.util.metrics import Counter, Gauge, Histogram

from runtime.sampling.denoise import StepRecord

STEP_SECONDS = [0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0]  # upper bounds of the histogram


class RankMetrics:
    """Metrics of one rank.

    Args:
        rank: number of the rank in its group.
        model: name of the loaded model.
    """

    def __init__(self, rank: int, model: str):
        tags = {"rank": str(rank), "model": model}
        keys = ("rank", "model", "kind")
        self._steps = Counter("lockstep_steps", "Sampler steps done.", keys).set_default_tags(tags)
        self._seconds = Histogram(
            "lockstep_step_seconds", "Seconds of a sampler step.", STEP_SECONDS, keys
        ).set_default_tags(tags)
        self._kept = Counter(
            "lockstep_checkpoint_bytes", "Bytes of checkpoints written by finished generations.", keys[:2]
        ).set_default_tags(tags)

    def step(self, record: StepRecord) -> None:
        """Record a finished step."""
        kind = {"kind": str(record.kind)}
        self._steps.inc(1, kind)
        self._seconds.observe(record.seconds, kind)

    def kept(self, count: int) -> None:
        """Record the bytes of checkpoints that a finished generation wrote."""
        if count:
            self._kept.inc(count)


class DriverMetrics:
    """Metrics of a driver of rank groups."""

    def __init__(self) -> None:
        self._restarts = Counter("lockstep_group_restarts", "Rank groups that had to be replaced.")
        self._requests = Counter("lockstep_requests", "Requests that have ended.", ("state",))
        self._queue = Gauge("lockstep_queue_requests", "Requests that have not ended.", ("state",))
        keys = ("replica",)  # a request's name would be a new series with every request
        self._step = Gauge("lockstep_request_step", "Finished steps of a replica's current request.", keys)
        self._left = Gauge(
            "lockstep_request_seconds_left",
            "Expected seconds until the last step of a replica's current request.",
            keys,
        )

    def restarted(self) -> None:
        """Count a rank group that is replaced."""
        self._restarts.inc(1)

    def ended(self, state: str) -> None:
        """Count a request that has ended."""
        self._requests.inc(1, {"state": state})

    def queue(self, waiting: int, running: int) -> None:
        """Set the numbers of waiting and running requests."""
        self._queue.set(waiting, {"state": "waiting"})
        self._queue.set(running, {"state": "running"})

    def progress(self, replica: int, step: int, seconds_left: float) -> None:
        """Set the progress of a replica's request."""
        tags = {"replica": str(replica)}
        self._step.set(step, tags)
        self._left.set(seconds_left, tags)
