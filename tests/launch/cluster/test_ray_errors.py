"""Whatever Ray raises is told in one line, as the failure of what was being done."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
from ray import exceptions
from ray.exceptions import RayError

from launch.cluster.group import End, Ended, StartError, _Ends, _error_of, _explained
from runtime.errors import BadRequestError, JobFailedError, RankFailedError

OF_RAY = [
    exceptions.ActorDiedError(),
    exceptions.ActorUnavailableError("a rank is out of reach", b"0" * 16),
    exceptions.ActorUnschedulableError("no node has 9 GPUs"),
    exceptions.GetTimeoutError("it took too long"),
    exceptions.LocalRayletDiedError(),
    exceptions.NodeDiedError("the node was preempted"),
    exceptions.ObjectLostError("00", "", ""),
    exceptions.OutOfMemoryError("the node had no memory left\nand a table of processes"),
    exceptions.RaySystemError("System error: unserializable exception"),
    exceptions.WorkerCrashedError(),
]


def of_a_task(cause: Exception) -> RayError:
    error = exceptions.RayTaskError("start", "a traceback", cause)
    return pickle.loads(pickle.dumps(error))


@pytest.mark.parametrize("error", OF_RAY, ids=lambda error: type(error).__name__)
def test_every_error_of_ray_is_the_failure_of_a_job(error: RayError) -> None:
    with pytest.raises(JobFailedError) as caught, _explained("placing the ranks"):
        raise error
    said = str(caught.value)
    assert said.startswith("placing the ranks: ") and len(said.splitlines()) == 1


@pytest.mark.parametrize("error", OF_RAY, ids=lambda error: type(error).__name__)
def test_a_rank_that_ray_has_lost_has_ended(error: RayError, monkeypatch: pytest.MonkeyPatch) -> None:
    def get(reference: Any) -> Ended:
        if reference == "lost":
            raise error
        return Ended(End.DONE, report="{}")

    monkeypatch.setattr("launch.cluster.group.ray.get", get)
    ends = _Ends(2)
    ends.note(["done", "lost"], ["done", "lost"])
    assert ends.bad and ends.over(0.0)
    ended = ends.told()
    assert ended.end is End.FAILED and ended.reason.startswith("rank 1 ")
    assert len(ended.reason.splitlines()) == 1
    assert _error_of("lost") is error


@pytest.mark.parametrize(
    ("cause", "kind", "said"),
    [
        (RankFailedError(1, "step 3", "it died"), StartError, "loading: rank 1 failed at step 3: it died"),
        (ValueError("no such weight"), StartError, "loading: ValueError: no such weight"),
    ],
)
def test_what_a_rank_raised_is_told_as_it_told_it(
    cause: Exception, kind: type[JobFailedError], said: str
) -> None:
    with pytest.raises(kind, match=said), _explained("loading", StartError):
        raise of_a_task(cause)


def test_what_a_rank_refuses_is_a_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    def get(reference: str) -> None:
        raise of_a_task(BadRequestError("attention: 'x' given"))

    monkeypatch.setattr("launch.cluster.group.ray.get", get)
    assert isinstance(_error_of("refused"), BadRequestError)
