"""The Ray cluster that a driver works on: a given one, or a local one of its own."""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any, TypeVar

import psutil
import ray
from rich.console import Console

from launch.cluster.address import VARIABLE, cluster_address
from launch.cluster.driver import Driver, drive
from launch.cluster.job_config import OwnModules
from launch.shell.family import heed_no_signals
from runtime.errors import BadRequestError, JobFailedError, named
from runtime.parallel.devices import check_room

log = logging.getLogger(__name__)

_JOINING = 60.0  # seconds for an existing cluster to accept a driver
_STARTING = 180.0  # seconds for a local cluster to start; it took 4 here
_LOOK = 0.5  # seconds between two checks of a local cluster's processes
_STOPPED = 10.0  # seconds for which one of them may stay stopped
_LONGEST = 39  # bytes of a folder's name below which Ray's sockets find room; the system's limit is 107

_Result = TypeVar("_Result")


def on_cluster(
    cpus: int,
    about: Mapping[str, str],
    work: Callable[[Driver], _Result],
    console: Console,
    made: Callable[[], _Result | None] = lambda: None,
) -> _Result:
    """Run `work` in a driver on the cluster of RAY_ADDRESS, or on a local one that ends with it.

    If a local cluster is lost, the work is repeated in a new driver on a new cluster, with `Driver.again` set
    so that it resumes. Nothing of a local cluster is left behind, even if this process is killed.

    Args:
        cpus: minimum number of CPUs of a local cluster.
        about: description of the work, for `ray list jobs` and `ray job list`.
        made: returns the result if it is there although the driver was lost.

    Raises:
        BadRequestError: there is no cluster at RAY_ADDRESS; or it is unset and this machine is far too small.
        CancelledError: a signal came.
        JobFailedError: the cluster was lost.
        Exception: whatever `work` raised.
    """
    address = cluster_address()
    crowded = check_room(cpus, "cpu") if address is None else ""  # each takes a core; Ray itself counts GPUs
    if crowded:
        log.warning(crowded)
    task: Callable[[Driver], None] = partial(_drive, address, cpus, about, work)
    return drive(task, console, own=address is None, made=made)  # type: ignore[no-any-return]


def _drive(
    address: str | None,
    cpus: int,
    about: Mapping[str, str],
    work: Callable[[Driver], object],
    driver: Driver,
) -> None:
    """Body of the driver process: connect to the cluster, do the work, report the result."""
    with cluster(address, cpus, about, driver) as guard:
        driver.look = guard.look_again
        try:
            value = work(driver)
        except JobFailedError:
            guard.look_again()
            raise
        driver.done(value)


@contextmanager
def cluster(
    address: str | None, cpus: int, about: Mapping[str, str], driver: Driver
) -> Iterator[Guard | Unguarded]:
    """Connect to the cluster at `address`, or start a local one that ends with the block."""
    metadata = {f"lockstep_{key}": value for key, value in about.items()}
    shared: dict[str, Any] = {
        "job_config": OwnModules(metadata=metadata),
        "logging_level": logging.ERROR,
        "log_to_driver": False,
    }
    guard: Guard | Unguarded = Unguarded()
    if address is not None:
        with driver.pulse.within(_JOINING, f"connecting to {VARIABLE}={address}"):
            _join(address, shared)
            _tell_submission(metadata)
    else:
        os.environ.pop(VARIABLE, None)  # it may be empty
        with driver.pulse.within(_STARTING, "starting a local cluster"):
            _start(max(cpus, os.cpu_count() or 1), shared)
        guard = Guard(driver.lost)
    heed_no_signals()  # Ray ends a driver on SIGTERM, which `ray job stop` sends to all processes
    try:
        yield guard
    finally:
        guard.end()
        with driver.pulse.within(_JOINING, "disconnecting"):
            ray.shutdown()


def _start(cpus: int, options: Mapping[str, Any]) -> None:
    """Start a cluster on this machine alone, whose ranks have the priority of this process: by Ray's default,
    they would wait for everything else that runs here.

    Raises:
        JobFailedError: it cannot be started.
    """
    os.environ.setdefault("RAY_worker_niceness", "0")
    try:
        ray.init(address="local", num_cpus=cpus, include_dashboard=False, **options, **short_place())
    except Exception as error:  # Ray has no class of its own for this
        said = " ".join(str(error).split())
        raise JobFailedError(
            f"Ray could not be started on this machine: {type(error).__name__}: {said[:300]}"
        ) from error


def short_place() -> dict[str, str]:
    """Option of ray.init for where its sockets are, if the name of the folder TMPDIR is too long for them."""
    given = os.environ.get("TMPDIR", "")
    if "RAY_TMPDIR" in os.environ or len(os.fsencode(given)) <= _LONGEST:
        return {}
    log.warning("TMPDIR: %r has too long a name for Ray's sockets; Ray's own files are in '/tmp/ray'", given)
    return {"_temp_dir": "/tmp/ray"}


def _join(address: str, options: Mapping[str, Any]) -> None:
    """Connect to the cluster at `address`.

    Raises:
        BadRequestError: it rejects this driver: its version of Ray or Python differs, or this machine is not
            one of its nodes.
    """
    try:
        ray.init(address=address, **options)
    except (ConnectionError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        said, given = " ".join(str(error).split()), os.environ.get(VARIABLE)
        raise BadRequestError(
            f"{VARIABLE}: {given!r} given; Ray cannot connect to it: {said[:300]}; give HOST:PORT "
            f"of a cluster to which this machine belongs, or unset {VARIABLE} to start a local Ray"
        ) from error


class Guard:
    """Watches the processes of a local cluster: those that it cannot live without, and new workers.

    A worker that was stopped before it became a rank is killed, and Ray starts another: Ray itself would wait
    for it, and nobody else knows of it yet.

    Args:
        lost: called with a message about the first process that died or stopped without which there is no
            cluster.
    """

    def __init__(self, lost: Callable[[str], None]):
        self._tell, self._gone, self._over = lost, threading.Event(), threading.Event()
        self._known: dict[int, tuple[psutil.Process, str]] = {}
        self._stopped: dict[int, float] = {}
        self._find()
        self._thread = threading.Thread(target=self._watch, name="ray-guard", daemon=True)
        self._thread.start()

    def end(self) -> None:
        """Stop watching: the processes may end now."""
        self._over.set()
        self._thread.join()

    def look_again(self) -> None:
        """Check whether a failure comes from a lost process of the cluster. Does not return in that case, as
        this process is ended."""
        for _ in range(3):
            self._over.wait(_LOOK)
            self._look()
        if self._gone.is_set():
            self._over.wait(_JOINING)

    def _lost(self, reason: str) -> None:
        self._tell(reason)
        self._gone.set()

    def _watch(self) -> None:
        try:
            while not self._over.wait(_LOOK):
                self._find()
                self._look()
        except Exception as error:  # otherwise a driver could wait for a dead cluster for ever
            log.exception("the watch over Ray's processes failed")
            self._lost(f"Ray's processes cannot be watched: {named(error)}")

    def _find(self) -> None:
        """Find the processes; the raylet's agents start a little later."""
        if len(self._known) < len(_ROLES):
            with suppress(psutil.Error):
                for process in psutil.Process().children(recursive=True):
                    role = _role(process)
                    if role:
                        self._known.setdefault(process.pid, (process, role))

    def _look(self) -> None:
        for process, role in list(self._known.values()):  # the other thread may add to it
            try:
                status = process.status() if process.is_running() else psutil.STATUS_ZOMBIE
            except psutil.Error:
                status = psutil.STATUS_ZOMBIE
            if status == psutil.STATUS_ZOMBIE:
                self._lost(f"{role} (process {process.pid}) died")
            if self._long_stopped(process, status):
                self._lost(f"{role} (process {process.pid}) was stopped")
            if role == _RAYLET:
                self._look_at_workers(process)

    def _look_at_workers(self, raylet: psutil.Process) -> None:
        with suppress(psutil.Error):
            for worker in raylet.children():
                with suppress(psutil.Error):
                    if self._long_stopped(worker, worker.status()) and _is_new(worker):
                        log.warning("a worker of Ray (process %d) was stopped; it is replaced", worker.pid)
                        worker.kill()
                        self._stopped.pop(worker.pid, None)

    def _long_stopped(self, process: psutil.Process, status: str) -> bool:
        """Note whether a process is stopped now; return whether it has been for too long."""
        if status != psutil.STATUS_STOPPED:
            self._stopped.pop(process.pid, None)
            return False
        return time.monotonic() - self._stopped.setdefault(process.pid, time.monotonic()) > _STOPPED


class Unguarded:
    """Stands in for `Guard` on a cluster that this command did not start."""

    def end(self) -> None:
        """Do nothing."""

    def look_again(self) -> None:
        """Do nothing: the processes of such a cluster are not watched."""


_RAYLET = "Ray's raylet"
_ROLES = {
    "gcs_server": "Ray's GCS server",
    "raylet": _RAYLET,
    "DashboardAgent": "Ray's dashboard agent",
    "RuntimeEnvAgent": "Ray's runtime environment agent",
}


def _role(process: psutil.Process) -> str:
    """Role of a process in Ray; empty for those that it can lose."""
    try:
        name, title = process.name(), " ".join(process.cmdline()[:1])
    except psutil.Error:
        return ""
    return _ROLES.get(name) or _ROLES.get(title.removeprefix("ray::").strip(), "")


def _is_new(worker: psutil.Process) -> bool:
    """Return whether a child of the raylet is a worker that is no rank yet."""
    title = " ".join(worker.cmdline())
    return title.strip() == "ray::IDLE" or "default_worker.py" in title or title.startswith(_BECOMING)


_BECOMING = ("ray::RankActor.__init__", "ray::RankActor.place")


def _tell_submission(metadata: Mapping[str, str]) -> None:
    """Add `metadata` to what `ray job list` shows of the submission that started this driver, if one did.

    Ray accepts it from `ray job submit --metadata-json` only and has no call for it, so this writes to the
    place where Ray keeps it; what the user gave is kept. Nothing depends on it.
    """
    injected = os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR")
    if injected is None:
        return
    try:
        submission = json.loads(injected)["metadata"]["job_submission_id"]
        from ray.dashboard.modules.job.common import JobInfoStorageClient
        from ray.experimental.internal_kv import _internal_kv_get, _internal_kv_put

        key = JobInfoStorageClient.JOB_DATA_KEY.format(job_id=submission).encode()
        info = json.loads(_internal_kv_get(key, namespace="job"))
        info["metadata"] = {**metadata, **(info.get("metadata") or {})}
        _internal_kv_put(key, json.dumps(info).encode(), overwrite=True, namespace="job")
    except Exception as error:
        log.info("`ray job list` will not describe this job: %s", error)
