"""A short selection of `make fuzz`: the same inputs each time."""

from __future__ import annotations

from pathlib import Path

import fuzz
import pytest

NAMES = ["request", "config", "preset", "calibration", "storyboard", "manifest", "entry", "lora", "settings"]
NAMES += ["sampler", "image"]


@pytest.fixture(scope="module")
def targets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, fuzz.Target]:
    return {target.name: target for target in fuzz.targets(tmp_path_factory.mktemp("fuzz"))}


@pytest.mark.parametrize("name", NAMES)
def test_what_comes_from_outside_is_taken_or_refused(name: str, targets: dict[str, fuzz.Target]) -> None:
    assert set(targets) == set(NAMES)
    fuzz.check(targets[name], 1, examples=max(targets[name].examples // 8, 10))


@pytest.mark.parametrize("name", NAMES)
def test_what_is_valid_is_taken(name: str, targets: dict[str, fuzz.Target], tmp_path: Path) -> None:
    for number, (suffix, content) in enumerate(targets[name].valid):
        (tmp_path / str(number)).mkdir()
        path = tmp_path / str(number) / f"input{suffix}"
        path.write_bytes(content)
        targets[name].load(path)


def test_a_finding_is_one(tmp_path: Path) -> None:
    def writes(path: Path) -> None:
        (tmp_path / "elsewhere").write_text("x")

    def fails(path: Path) -> None:
        raise KeyError("x")

    for load, error in ((writes, fuzz.OutOfBoundsError), (fails, KeyError)):
        with pytest.raises(error):
            fuzz.check(fuzz.Target("bad", [(".txt", b"valid")], load), 1, examples=5)
    assert not (tmp_path / "elsewhere").exists()
