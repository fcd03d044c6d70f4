"""docs/diffusers.md is true: its scripts call what there is, and its table lists what was tried."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch

from runtime.request.config import EMBEDDED_MODELS
from spectrum.diffusers import enable
from spectrum.diffusers.blocks import FAMILIES as KNOWN
from spectrum.diffusers.conditions import TRANSFORMERS
from tests.flux import flux_random
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


def small(pipe: Any, **call: Any) -> Any:
    """The same pipeline, whatever the device and size that are asked for."""

    class Small(type(pipe)):  # type: ignore[misc]
        def __call__(self, *args: Any, **given: Any) -> Any:
            return super().__call__(*args, **given | call)

        def to(self, *_: Any, **__: Any) -> Any:
            return self

    pipe.__class__ = Small
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_the_script_for_flux_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pipe = small(flux_random(), height=64, width=64, max_sequence_length=16)
    monkeypatch.setattr(diffusers.FluxPipeline, "from_pretrained", lambda *_, **__: pipe)
    monkeypatch.chdir(tmp_path)
    exec(SCRIPTS["flux.py"], {})
    assert capsys.readouterr().out.startswith("computed 14 of 50 steps")
    assert (tmp_path / "fox.png").exists()


def test_the_script_for_wan_runs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    made = diffusers.WanPipeline.from_pretrained(EMBEDDED_MODELS / "wan-tiny", dtype=torch.float32)
    pipe, films = small(made, height=32, width=32, num_frames=5, max_sequence_length=16), []
    monkeypatch.setattr(diffusers.WanPipeline, "from_pretrained", lambda *_, **__: pipe)
    monkeypatch.setattr(diffusers.AutoencoderKLWan, "from_pretrained", lambda *_, **__: pipe.vae)
    # it needs a package that diffusers does not bring
    monkeypatch.setattr(diffusers.utils, "export_to_video", lambda *given, fps: films.append((given, fps)))
    exec(SCRIPTS["wan.py"], {})
    (((frames, name), fps),) = films
    assert frames.shape == (5, 32, 32, 3) and (name, fps) == ("fox.mp4", 16)
    assert "transformer (0, 1, 2, 3, 4, 6," in capsys.readouterr().out


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
