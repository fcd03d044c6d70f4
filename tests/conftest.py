"""What every test stands on: one thread, and wan-tiny loaded once."""

from __future__ import annotations

import atexit
import gc
import os
import signal
import sys
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import settings

from launch.shell.exits import end_now
from runtime.parallel.signals import ENDING
from tests.places import ROOT

if TYPE_CHECKING:  # torch is imported by tests: the process that hands these out to others has no use for it
    from runtime.engine import Engine
    from runtime.request.config import Config
    from runtime.request.video_request import VideoRequest
    from tests.ranks import WarmRanks

os.environ.setdefault("RAY_worker_niceness", "0")  # ranks would wait for the other tests that run meanwhile
sys.path.insert(0, str(ROOT / "scripts"))  # the scripts are run from there, too
settings.register_profile("lockstep", deadline=None, derandomize=True)  # a busy machine is no failure
settings.register_profile("search", deadline=None, max_examples=3000)  # pytest --hypothesis-profile=search
settings.load_profile("lockstep")


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Modules that are imported are no garbage."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()


@pytest.hookimpl(trylast=True)  # when tests that are not asked for are gone
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the files that take longest, so that no process is left with one of them in the end; what
    there is now is no garbage."""
    items.sort(key=lambda item: item.get_closest_marker("alone") is None)
    gc.collect()
    gc.freeze()


_ended: list[int] = []


def pytest_sessionfinish(exitstatus: int) -> None:
    _ended.append(int(exitstatus))


@atexit.register
def _end_as_the_command_line_does() -> None:
    """Tests use Ray in this process; see `launch.shell.exits.end_with`."""
    if _ended:
        end_now(_ended[-1])


@pytest.fixture(autouse=True)
def _signals_as_before() -> Iterator[None]:
    """Commands that run in this process change what signals do to it."""
    before = {number: signal.getsignal(number) for number in ENDING}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def _spare_processes() -> None:
    from tests.spare import install

    install(served=True)


@pytest.fixture(scope="session")
def cache_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where what was made once is kept for the session."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def cached(cache_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keeps what this test and its processes cache out of the user's folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache_folder))


@pytest.fixture(scope="session")
def config() -> Config:
    from runtime.request.config import load_config

    return load_config("wan-tiny")


@pytest.fixture(scope="session")
def engine(config: Config) -> Engine:
    from runtime.engine import Engine

    return Engine(config)


@pytest.fixture(scope="module")
def warm() -> Iterator[WarmRanks]:
    """Ranks that the tests of a module share; see there for what may run on them."""
    from tests.ranks import WarmRanks

    with closing(WarmRanks()) as ranks:
        yield ranks


@pytest.fixture(scope="session")
def small(config: Config) -> Callable[..., VideoRequest]:
    """A request that takes a second: 5 frames of 64×48, 6 steps."""

    def make(**fields: Any) -> VideoRequest:
        given = {"width": 64, "height": 48, "frames": 5, "steps": 6, "max_sequence_length": 32, "seed": 7}
        return config.request("a red circle moving left on a black background", **{**given, **fields})

    return make
