"""Which code made a result."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from runtime.versions import code_version, source_digest, versions


@pytest.fixture
def package(tmp_path: Path) -> Path:
    folder = tmp_path / "package"
    (folder / "inner").mkdir(parents=True)
    (folder / "one.py").write_text("a = 1\n")
    (folder / "inner" / "two.py").write_text("b = 2\n")
    return folder


@pytest.mark.parametrize(
    "change",
    [
        lambda folder: (folder / "inner" / "two.py").write_text("b = 3\n"),
        lambda folder: (folder / "one.py").rename(folder / "three.py"),
        lambda folder: (folder / "inner" / "two.py").unlink(),
        lambda folder: (folder / "four.py").write_text(""),
    ],
    ids=["edited", "renamed", "removed", "added"],
)
def test_another_source_has_another_digest(package: Path, change: Callable[[Path], object]) -> None:
    before = source_digest([package])
    (package / "notes.txt").write_text("no code")
    assert source_digest([package]) == before
    change(package)
    assert source_digest([package]) != before


def test_the_digest_does_not_depend_on_where_the_code_lies(package: Path, tmp_path: Path) -> None:
    before = source_digest([package])
    (tmp_path / "elsewhere").mkdir()
    moved = package.rename(tmp_path / "elsewhere" / "package")
    assert source_digest([moved]) == before


def test_versions_tell_the_code_and_its_libraries() -> None:
    number, _, digest = code_version().partition("+")
    assert number.count(".") == 2 and len(digest) == 12
    assert versions()["lockstep"] == code_version()
    assert {"python", "torch", "diffusers", "transformers", "numpy"} <= versions().keys()
