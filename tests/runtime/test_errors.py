"""Errors travel: from a rank's process to its driver's, and from there to the command's."""

from __future__ import annotations

import ast
import importlib
import pickle
import pkgutil
import re
from collections.abc import Iterator

import pytest
from torch.distributed import HashStore  # type: ignore[attr-defined]

import launch
import runtime
from runtime.errors import (
    BadRequestError,
    LockstepError,
    RankFailedError,
    in_words,
    named,
    reason,
    with_files,
)
from runtime.parallel.heartbeats import ending
from runtime.parallel.watch import Watch
from tests.places import ROOT


def every_error(root: type[LockstepError] = LockstepError) -> Iterator[type[LockstepError]]:
    """`root` and all that derive from it, wherever they are defined."""
    yield root
    for one in root.__subclasses__():
        yield from every_error(one)


def import_everything() -> None:
    for package in (runtime, launch):
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            # One runs the command, one needs a GPU's packages.
            if not module.name.endswith(("__main__", "usp")):
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


@pytest.mark.parametrize(
    ("error", "said", "with_name"),
    [
        (PermissionError(13, "Permission denied", "a.mp4"), "Permission denied", "PermissionError: "),
        (FileNotFoundError("a.json is missing"), "a.json is missing", "FileNotFoundError: "),
        (RuntimeError("\n  out of memory\nat c10"), "out of memory", "RuntimeError: "),
        (TimeoutError(), "TimeoutError", ""),
        (OSError(28, None), "[Errno 28] None", "OSError: "),
    ],
)
def test_an_error_is_one_line_whatever_it_says(error: Exception, said: str, with_name: str) -> None:
    assert (reason(error), named(error)) == (said, with_name + said)


def test_errors_of_ones_own_are_told_as_they_are() -> None:
    assert in_words(BadRequestError("steps: 0 given\nframes: 2 given")) == "steps: 0 given\nframes: 2 given"
    assert in_words(KeyError("seed")) == "KeyError: 'seed'"


def test_a_system_error_is_told_with_its_files() -> None:
    moved = OSError(18, "Invalid cross-device link", "a", None, b"b")
    assert with_files(moved) == "'b': 'a': Invalid cross-device link"
    assert with_files(PermissionError(13, "Permission denied", 7)) == "Permission denied"


def test_an_error_that_says_nothing_is_told_by_its_class() -> None:
    """Where only its first line is wanted, there is one."""
    assert ending(RuntimeError(), 0)["reason"] == "RuntimeError"
    watch = Watch(HashStore(), 0, 1, timeout=0.1)
    with pytest.raises(RankFailedError, match="a transfer between ranks broke: RuntimeError"):
        watch.blame(RuntimeError())


def test_errors_are_put_in_words_in_one_place() -> None:
    own = re.compile(r"\berror\.strerror|str\(error\).*\[0\]")
    files = [path for room in ("launch", "runtime", "spectrum") for path in (ROOT / room).rglob("*.py")]
    found = [str(path.relative_to(ROOT)) for path in files if own.search(path.read_text())]
    assert found == ["runtime/errors.py"]


def test_an_option_in_a_message_is_told_to_a_notebook_as_well() -> None:
    """What `runtime` and `spectrum` raise reaches programs, which have keywords instead of options."""
    option = re.compile(r"(?<![\w-])--(?!verbose)[a-z]")
    others = re.compile(r"\(in Python: |torchrun")  # only a command starts ranks with torchrun
    found = []
    for path in [path for room in ("runtime", "spectrum") for path in (ROOT / room).rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Raise):
                texts = [one.value for one in ast.walk(node) if isinstance(one, ast.Constant)]
                said = "…".join(text for text in texts if isinstance(text, str))
                if option.search(said) and not others.search(said) and "lockstep " not in said:
                    found.append(f"{path.relative_to(ROOT)}:{node.lineno}")
    assert not found
