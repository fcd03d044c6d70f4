"""docs/diffusers.md is true: its scripts call what there is, and its table lists what was tried."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
from typing import Any

import pytest

from spectrum.diffusers import enable
from spectrum.diffusers.blocks import FAMILIES as KNOWN
from spectrum.diffusers.conditions import TRANSFORMERS
from tests.pipelines import FAMILIES
from tests.places import ROOT

PAGE = (ROOT / "docs" / "diffusers.md").read_text(encoding="utf-8")
SCRIPTS = dict(re.findall(r"^```python\n# (\S+)\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL))


@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts_call_what_there_is(name: str) -> None:
    tree = ast.parse(SCRIPTS[name])
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            module = importlib.import_module(node.module)
            assert all(hasattr(module, alias.name) for alias in node.names), node.module
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "enable":
            given = {keyword.arg: keyword.value for keyword in node.keywords}
            inspect.signature(enable).bind(*node.args, **given)


def test_the_preset_of_the_page_is_one() -> None:
    names: dict[str, Any] = {}
    exec(SCRIPTS["preset.py"], names)
    preset = names["PRESET"]
    assert preset.schedule(12).computed == (0, 1, 2, 4, 7, 10)
    assert len(preset.predictor(12).weights([0, 1, 2], 3)) == 3


def test_the_table_lists_what_was_tried() -> None:
    rows = re.findall(r"^\| `(\w+Pipeline)` \| `(\w+)` \| feature, velocity \|", PAGE, re.MULTILINE)
    pipelines = [make().pipe for make in FAMILIES.values()]
    tried = {type(pipe).__name__: type(pipe.transformer).__name__ for pipe in pipelines}
    assert dict(rows) == tried
    assert {*tried.values(), "HunyuanVideo15Transformer3DModel"} == set(KNOWN)
    assert all(f"`{name}`" in PAGE for name in TRANSFORMERS)
