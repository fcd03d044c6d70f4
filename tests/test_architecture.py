"""The house's rules: imports run one way, and only the right package knows Ray and torch.distributed."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FORBIDDEN = {
    "spectrum": ("runtime", "launch", "ray", "torch.distributed", "diffusers", "transformers"),
    "runtime": ("launch", "ray"),
    "launch": ("torch.distributed",),
}


def imported(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("package", FORBIDDEN)
def test_imports_run_one_way(package: str) -> None:
    files = list((ROOT / package).rglob("*.py"))
    assert files
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in files
        for name in imported(path)
        for banned in FORBIDDEN[package]
        if name == banned or name.startswith(banned + ".")
    ]
    assert not wrong


def test_no_file_is_two_nouns() -> None:
    long = [
        path
        for package in FORBIDDEN
        for path in (ROOT / package).rglob("*.py")
        if path.read_text().count("\n") > 400
    ]
    assert not long


def test_test_files_have_names_of_their_own() -> None:
    """Without packages pytest imports them by their bare names, and refuses a second of one name."""
    names = [path.name for path in (ROOT / "tests").rglob("test_*.py")]
    assert sorted(set(names)) == sorted(names)
