"""Errors travel: from a rank's process to its driver's, and from there to the command's."""

from __future__ import annotations

import importlib
import pickle
import pkgutil
from collections.abc import Iterator

import pytest

import launch
import runtime
from runtime.errors import LockstepError, RankFailedError


def every_error(root: type[LockstepError] = LockstepError) -> Iterator[type[LockstepError]]:
    """`root` and all that derive from it, wherever they are defined."""
    yield root
    for one in root.__subclasses__():
        yield from every_error(one)


def import_everything() -> None:
    for package in (runtime, launch):
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            if not module.name.endswith(
                ("__main__", "usp")
            ):  # one runs the command, one needs a GPU's packages
                importlib.import_module(module.name)


def test_every_error_survives_pickling() -> None:
    import_everything()
    errors = list(every_error())
    assert RankFailedError in errors and len(errors) > 5
    for kind in errors:
        own = (3, "step 7", "its process died") if issubclass(kind, RankFailedError) else ("the reason",)
        error = kind(*own)
        again = pickle.loads(pickle.dumps(error))
        assert (type(again), str(again), vars(again)) == (kind, str(error), vars(error))


@pytest.mark.parametrize("rank", [None, 3])
def test_a_failed_rank_is_named_after_the_journey(rank: int | None) -> None:
    again = pickle.loads(pickle.dumps(RankFailedError(rank, "step 7", "its process died")))
    assert (again.rank, again.where, again.reason) == (rank, "step 7", "its process died")
