"""Presets, and what `enable` refuses."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
import yaml
from torch import nn

from spectrum import StepKind
from spectrum.diffusers import Preset, enable, report
from spectrum.diffusers.presets import PRESETS
from tests.pipelines import flux
from tests.places import ROOT


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_those_of_the_command_line(name: str) -> None:
    file = ROOT / "configs" / "spectrum" / f"{name}.yaml"
    assert yaml.safe_load(file.read_text()) == PRESETS[name]
    one, another = Preset.load(name), Preset.load(file)
    for steps in (4, 28, 50):
        assert one.schedule(steps) == another.schedule(steps)
        assert one.predictor(steps) == another.predictor(steps)


def nfe(name: str) -> int:
    schedule = Preset.load(name).schedule(50)
    return sum(schedule.kind(step) is StepKind.COMPUTE for step in range(50))


def test_the_published_settings_compute_what_was_published() -> None:
    assert [nfe(name) for name in ("off", "paper", "paper-fast")] == [50, 14, 10]


@pytest.mark.parametrize(
    ("preset", "message"),
    [
        ("papr", "'papr' given; it must be one of off, paper, paper-fast, universal, "),
        ({}, "schedule is missing"),
        ({"schedule": {"kind": "planned", "nfe": 8}}, "kind 'planned' given; it must be one of full, paper"),
        ({"schedule": {"kind": "paper", "beta": 1}}, "beta given; paper takes warmup, window, alpha"),
        ({"schedule": {"kind": "explicit"}}, "no settings given; explicit takes computed"),
        ({"schedule": "paper"}, "kind 'paper' given"),
        ({"schedule": {"kind": "full"}, "calibration": "x"}, "calibration cannot be used here"),
        ({"schedule": {"kind": "full"}, "stream": "guided"}, "stream: 'guided' given"),
        ({"schedule": {"kind": "full"}, "predictor": {"kind": "calibrated"}}, "kind 'calibrated' given"),
    ],
)
def test_presets_that_are_not_valid_are_refused(preset: Any, message: str) -> None:
    tiny = flux()
    with pytest.raises(ValueError, match=message):
        enable(tiny.pipe, preset)
    with pytest.raises(ValueError, match="Spectrum is not enabled; call enable"):
        report(tiny.pipe)


def test_files_that_are_no_presets_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    with pytest.raises(ValueError, match=r"mine.yaml cannot be read: .*No such file"):
        Preset.load(file)
    file.write_text("schedule: {kind: paper")
    with pytest.raises(ValueError, match=r"mine.yaml cannot be read: while parsing"):
        Preset.load(str(file))
    file.write_text("- paper")
    with pytest.raises(ValueError, match=r"preset mine.yaml: schedule is missing"):
        Preset.load(file)


def test_a_preset_that_does_not_fit_is_refused_when_the_number_of_steps_is_known() -> None:
    tiny = flux()
    enable(tiny.pipe, {"schedule": {"kind": "explicit", "computed": [0, 1, 30]}})
    with pytest.raises(ValueError, match="preset preset does not fit 12 steps: computed step 30 is beyond"):
        tiny.run()
    assert torch.isfinite(tiny.run(40)).all()


def test_arguments_that_make_no_sense_are_refused() -> None:
    tiny = flux()
    with pytest.raises(ValueError, match="the scheduler of FluxPipeline determines their number"):
        enable(tiny.pipe, steps=50)
    for steps in (None, 0):
        with pytest.raises(ValueError, match="a transformer alone needs the number of steps"):
            enable(tiny.pipe.transformer, steps=steps)
    with pytest.raises(ValueError, match="FlowMatchEulerDiscreteScheduler has none of transformer"):
        enable(tiny.pipe.scheduler)
    with pytest.raises(ValueError, match=r"blocks of Linear are not known.*stream='velocity'"):
        enable(nn.Linear(1, 1), steps=5)


def test_other_caches_are_not_mixed_with() -> None:
    tiny = flux()
    tiny.pipe.transformer.enable_cache(diffusers.FirstBlockCacheConfig())
    with pytest.raises(ValueError, match=r"another cache is enabled; call transformer.disable_cache\(\)"):
        enable(tiny.pipe)
    tiny.pipe.transformer.disable_cache()
    enable(tiny.pipe)
    tiny.pipe.transformer.enable_cache(diffusers.FirstBlockCacheConfig())
    with pytest.raises(RuntimeError, match=r"enable_cache\(\) was called while Spectrum is enabled"):
        tiny.run()


def test_enabling_again_replaces_the_preset() -> None:
    tiny = flux()
    enable(tiny.pipe, "paper-fast")
    enable(tiny.pipe, "paper", stream="velocity")
    tiny.run()
    told = report(tiny.pipe)["transformer"]
    assert (told.preset, told.stream, told.nfe) == ("paper", "velocity", 8)


def test_spectrum_needs_torch_and_numpy_and_here_diffusers() -> None:
    code = """
import re, sys, tomllib
from importlib.machinery import PathFinder
dependencies = tomllib.load(open("pyproject.toml", "rb"))["project"]["dependencies"]
names = {re.match(r"[\\w-]+", one)[0].lower().replace("-", "_") for one in dependencies}
names |= {"runtime", "launch", "google"}
come_with_diffusers = {"safetensors", "pyyaml", "pillow", "click", "rich"}
missing = names - {"torch", "numpy"}
find = PathFinder.find_spec
def find_spec(name, *others):
    return None if name.partition(".")[0] in missing else find(name, *others)
PathFinder.find_spec = find_spec
import spectrum, spectrum.calibration
assert "yaml" not in sys.modules and "PIL" not in sys.modules
assert len(missing) > 12 and "transformers" in missing
missing -= come_with_diffusers | {"diffusers"}
import spectrum.diffusers
assert not {name.partition(".")[0] for name in sys.modules} & missing
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
