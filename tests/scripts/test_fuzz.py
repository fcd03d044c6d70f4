"""A short selection of `make fuzz`: the same inputs each time; and that it would see what is wrong."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import fuzz
import pytest
from fuzz_targets import Target, targets

NAMES = "request config preset calibration storyboard manifest part identity report entry queue lora settings"
NAMES = f"{NAMES} autoencoder sampler weights pickled image"


@pytest.fixture(scope="module")
def known(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Target]:
    return {target.name: target for target in targets(tmp_path_factory.mktemp("fuzz"))}


@pytest.mark.parametrize("name", NAMES.split())
def test_what_comes_from_outside_is_taken_or_refused(
    name: str, known: dict[str, Target], tmp_path: Path
) -> None:
    assert set(known) == set(NAMES.split())
    for number, (suffix, content) in enumerate(known[name].valid):
        (tmp_path / str(number)).mkdir()
        path = tmp_path / str(number) / f"input{suffix}"
        path.write_bytes(content)
        known[name].load(path)
    tally = fuzz.Tally()
    fuzz.check(known[name], 1, tally, examples=max(known[name].examples // 8, 10))
    assert tally.inputs >= max(known[name].examples // 8, 10)


def writes(path: Path) -> None:
    (path.parent.parent / "lockstep-elsewhere").write_text("x")


def moves(path: Path) -> None:
    path.rename(path.parent.parent / "lockstep-elsewhere")


def starts(path: Path) -> None:
    with suppress(Exception):  # whatever the input's own reader does not let through
        subprocess.run([sys.executable, "-V"], check=True)


def lasts(path: Path) -> None:
    while True:
        with suppress(Exception):
            time.sleep(0.1)


def fails(path: Path) -> None:
    raise KeyError(os.fspath(path))


@pytest.mark.parametrize("load", [writes, moves, starts, lasts, fails])
def test_a_finding_is_one(load: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fuzz, "SECONDS", 1)
    with pytest.raises(KeyError if load is fails else fuzz.OutOfBoundsError) as raised:
        fuzz.check(Target("bad", [(".txt", b"x")], load), 1, fuzz.Tally(), examples=2)
    assert raised.value.failing[0] == ".txt"  # type: ignore[attr-defined]
