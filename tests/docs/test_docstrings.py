"""Examples in docstrings run in their module, with what they import themselves, and print what they say."""

from __future__ import annotations

import doctest
from importlib import import_module
from pathlib import Path

import pytest

from tests.docs.left_out import SLOW_DOCSTRINGS
from tests.places import ROOT

MODULES = [
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for package in ("spectrum", "runtime", "launch")
    for path in sorted(ROOT.glob(f"{package}/**/*.py"))
    if ">>> " in path.read_text(encoding="utf-8")
]


def examples(module: str) -> list[doctest.DocTest]:
    """Docstrings of a module that have examples."""
    found = doctest.DocTestFinder().find(import_module(module), module)
    return [one for one in found if one.examples]


def run(test: doctest.DocTest, capfd: pytest.CaptureFixture[str]) -> None:
    failed = doctest.DocTestRunner(verbose=False).run(test).failed
    assert not failed, capfd.readouterr().out


@pytest.mark.parametrize("module", MODULES)
def test_examples_are_true(
    module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    found = examples(module)
    assert found
    for one in found:
        if one.name not in SLOW_DOCSTRINGS:
            run(one, capfd)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(SLOW_DOCSTRINGS))
def test_long_examples_are_true(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    [module] = [module for module in MODULES if name.startswith(f"{module}.")]
    [one] = [one for one in examples(module) if one.name == name]
    run(one, capfd)
