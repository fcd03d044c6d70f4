"""The memory of a film is a window's, not the film's."""

from __future__ import annotations

import pytest
from bench_windows import in_process

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def test_ten_windows_take_the_memory_of_one_and_the_whole_takes_more() -> None:
    common = ["--size", "192", "--steps", "2", "--frames"]
    one, ten, whole = (in_process([*common, *more]) for more in (["17"], ["125"], ["125", "--whole"]))
    assert (one["windows"], ten["windows"], whole["windows"]) == (1, 10, 1)
    assert ten["megabytes"] < 1.2 * one["megabytes"] + ten["remembered"]
    assert whole["megabytes"] > 1.2 * ten["megabytes"]
