"""Devices by name."""

from __future__ import annotations

import pytest

from runtime.errors import BadRequestError
from runtime.parallel.devices import pick_device


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("tpu9000", "must be auto, cpu, or a device such as"),
        ("cuda:99", "this machine has"),
        ("xpu", "0 xpu devices"),
    ],
)
def test_a_device_that_is_not_there_is_refused(name: str, said: str) -> None:
    with pytest.raises(BadRequestError, match=f"device: {name!r} given") as caught:
        pick_device(name)
    assert said in str(caught.value)


def test_the_cpu_is_always_there() -> None:
    assert pick_device("cpu").type == "cpu"
    assert pick_device("auto").type in ("cpu", "cuda")
