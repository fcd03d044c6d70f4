"""The memory of a film is a window's, not the film's."""

from __future__ import annotations

import pytest
from bench_windows import in_process

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def test_ten_windows_take_the_memory_of_one() -> None:
    common = ["--size", "128", "--steps", "2", "--frames"]
    one, ten = (in_process([*common, frames]) for frames in ("17", "125"))
    assert (one["windows"], ten["windows"]) == (1, 10)
    assert ten["megabytes"] < 1.2 * one["megabytes"]
