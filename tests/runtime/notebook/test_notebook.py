"""What `runtime` names for notebooks: models, arrays, pictures, files, steps, comparisons, plans."""

from __future__ import annotations

import base64
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import runtime
from launch import cli
from runtime import BadRequestError, CancelledError, Step, Video, VideoModel, load, plan
from runtime.forecasting.calibration import load_calibration
from runtime.forecasting.presets import load_preset
from runtime.media.frames import read_frames
from runtime.request.config import EMBEDDED_MODELS, Config
from spectrum import StepKind
from tests.places import ROOT
from tests.stopping import generate

PROMPT = "a red circle moving left on a black background"
SMALL = {"width": 64, "height": 48, "frames": 5, "steps": 6, "max_sequence_length": 32}


@pytest.fixture(scope="module")
def model() -> VideoModel:
    return load("wan-tiny")


@pytest.fixture(scope="module")
def video(model: VideoModel) -> Video:
    return model.generate(PROMPT, **SMALL, seed=7, spectrum="paper")


def test_importing_runtime_is_cheap() -> None:
    look = "import runtime, sys; print({'torch', 'diffusers', 'numpy', 'pydantic'} & {*sys.modules})"
    told = subprocess.run([sys.executable, "-c", look], cwd=ROOT, capture_output=True, text=True, check=True)
    assert told.stdout == "set()\n"
    assert {*runtime.__all__} <= {*dir(runtime)}
    assert all(hasattr(runtime, name) for name in runtime.__all__)
    assert not hasattr(runtime, "lode")


def test_frames_are_those_of_the_engine_and_of_the_file(
    video: Video, engine: object, small: Callable[..., object], tmp_path: Path
) -> None:
    result, frames = generate(engine, small(seed=7, spectrum="paper"))
    assert video.frames.dtype == np.uint8 and video.frames.shape == (5, 48, 64, 3)
    assert np.array_equal(video.frames, frames)
    assert (video.nfe, video.steps, video.computed) == (result.nfe, 6, result.computed["cond"])
    assert video.seconds > 0 and video.psnr is None
    images = video.images()
    assert [image.size for image in images] == [(64, 48)] * 5
    assert np.array_equal(np.asarray(images[3]), frames[3])
    path = video.save(tmp_path / "a.mp4")
    assert np.abs(read_frames(path).astype(int) - frames).mean() < 3
    with pytest.raises(BadRequestError, match="exists"):
        video.save(path)
    [shown] = re.findall(r'src="data:video/mp4;base64,([\w+/=]+)"', video._repr_html_())
    assert base64.b64decode(shown) == path.read_bytes()


def test_a_request_is_used_again_and_changed(model: VideoModel, video: Video) -> None:
    assert np.array_equal(model.generate(video.request).frames, video.frames)
    other = model.request(video.request, seed=8, spectrum="off")
    assert other == model.request(PROMPT, **SMALL, seed=8, spectrum="off")


def test_every_step_is_told(model: VideoModel, video: Video) -> None:
    steps: list[Step] = []
    model.generate(video.request, on_step=steps.append)
    assert [step.number for step in steps] == [1, 2, 3, 4, 5, 6]
    assert [step.progress for step in steps] == pytest.approx([number / 6 for number in range(1, 7)])
    computed = [step.number - 1 for step in steps if step.kind is StepKind.COMPUTE]
    assert computed == video.computed and len(computed) < 6


def test_a_run_is_stopped_and_leaves_nothing_behind(model: VideoModel, video: Video, tmp_path: Path) -> None:
    def stop(step: Step) -> None:
        told.append(step.number)
        if step.number == 2:
            step.stop()

    def fail(step: Step) -> None:
        raise ZeroDivisionError("the caller's")

    told: list[int] = []
    with pytest.raises(CancelledError):
        model.generate(video.request, on_step=stop)
    assert told == [1, 2, 3]
    with pytest.raises(ZeroDivisionError, match="the caller's"):
        model.generate(video.request, on_step=fail)
    out = tmp_path / "a.mp4"
    with pytest.raises(CancelledError):
        model.write(video.request, out, on_step=stop, checkpoint_every=1)
    assert [path.name for path in tmp_path.iterdir()] == ["a.checkpoints"]
    report = model.write(video.request, out, resume=True)
    assert report.resumed_at == 4 and report.videos == [str(out)]
    assert {path.name for path in tmp_path.iterdir()} == {"a.mp4", "a.json", "a.png"}
    assert model.write(video.request, tmp_path / "b.mp4").frames_sha256 == report.frames_sha256


def test_loras_are_switched(model: VideoModel, video: Video, tmp_path: Path) -> None:
    file, name = tmp_path / "style.safetensors", "transformer.blocks.2.attn1.to_v.lora_"
    save_file({f"{name}A.weight": torch.ones(4, 192), f"{name}B.weight": torch.ones(192, 4)}, file)
    short = model.request(video.request, steps=2, spectrum="off")
    plain = model.generate(short).frames
    model.switch({"file": str(file), "scale": 0.1})
    assert [lora.scale for lora in model.config.lora] == [0.1]
    assert not np.array_equal(model.generate(short).frames, plain)
    with pytest.raises(BadRequestError, match="lora"):
        model.switch(tmp_path / "nope.safetensors")
    model.switch([])
    assert model.config.lora == () and np.array_equal(model.generate(short).frames, plain)


def test_a_comparison_measures_and_writes_when_asked(model: VideoModel, tmp_path: Path) -> None:
    steps: list[Step] = []
    found = model.compare(PROMPT, ["paper"], **SMALL, on_step=steps.append)
    assert [row["preset"] for row in found.rows()] == ["off", "paper"]
    assert 10 < found.rows()[1]["psnr"] < 100 and len(found.results) == 2
    assert len(steps) == 12 and steps[-1].progress == pytest.approx(1.0)
    out = tmp_path / "side.mp4"
    model.compare([PROMPT], ["paper"], seeds=[1], out=out, **SMALL | {"steps": 2})
    assert len(json.loads(out.with_suffix(".json").read_text())["results"]) == 2
    assert read_frames(out).shape == (5, 64, 128, 3)


def test_a_calibration_is_planned_and_run(model: VideoModel, tmp_path: Path) -> None:
    out, small, steps = tmp_path / "mine.json", SMALL | {"width": 32, "height": 32}, list[Step]()
    made = model.calibrate(out, prompts=["a red circle", "a star"], on_step=steps.append, **small)
    assert load_calibration(str(out)) == made and made.seeds == [1000, 1001]
    assert steps[-1].progress == 1.0 and "video 1 of 2" in {step.label for step in steps}
    best = plan(out, nfe=4)
    assert (best.nfe, best.steps, len(best.computed)) == (4, 6, 4) and best.seconds > 0
    preset = best.save(tmp_path / "mine.yaml")
    assert load_preset(str(preset)).calibration == str(out)
    video = model.generate("a red star", spectrum=preset, **small)
    assert video.computed == [*best.computed]


def test_a_plan_equals_the_commands(capfd: pytest.CaptureFixture[str]) -> None:
    best = plan("wan-tiny", nfe=10)
    assert cli.run(["plan", "wan-tiny", "--nfe", "10"]) == 0
    said = capfd.readouterr().out
    assert f"{best.nfe} of {best.steps} steps, {best.method}" in " ".join(said.split())
    rows = re.findall(r"^\W*(\d+)\W+computed", said, re.MULTILINE)
    assert [int(number) for number in rows] == [*best.computed]
    assert best.psnr is not None and f"{best.psnr:.1f} ±" in said


def test_models_are_loaded_by_any_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[str] = []

    def unloaded(config: Config) -> SimpleNamespace:
        loaded.append(str(config.model))
        return SimpleNamespace(config=config)

    monkeypatch.setattr("runtime.notebook.model.Engine", unloaded)
    monkeypatch.chdir(tmp_path)
    folder = EMBEDDED_MODELS / "wan-tiny"
    (tmp_path / "linked").symlink_to(folder)
    (tmp_path / "mine.yaml").write_text("model: wan-tiny\ndefaults: {steps: 12}\n")
    assert load(tmp_path / "mine.yaml").config.defaults.steps == 12
    for name in ("wan-tiny", "wan2.2-tiny", folder, "linked", "./linked"):
        load(name)
    assert loaded == ["wan-tiny", "wan-tiny", "wan2.2-tiny", str(folder), "linked", "./linked"]
    assert load("wan2.1-t2v-14b-480p", performance="fast", device="cpu").config.performance == "fast"


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda model: load("wan-tny"), r"no such config.*did you mean wan-tiny\?"),
        (lambda model: load("./nope"), "there is no folder"),
        (lambda model: load("wan-tiny", devise="cpu"), r"devise: unknown; .*did you mean device\?"),
        (lambda model: model.generate("a", framse=5), r"framse: unknown; .*did you mean frames\?"),
        (lambda model: model.generate("a", frames=6), "frames: 6 given"),
        (lambda model: model.generate("a", videos=2), "videos: 2 given"),
        (lambda model: model.write("a", "a.gif"), r"must end in \.mp4"),
        (lambda model: model.write("a", "a.mp4", ranks=2), "ranks: unknown"),
        (lambda model: model.compare([]), "prompts: none given"),
        (lambda model: model.calibrate("a.json", prompts=["one"]), "needs at least 2"),
        (lambda model: plan("wan-tiny"), "give exactly one of"),
    ],
)
def test_what_is_wrong_is_refused(
    model: VideoModel,
    call: Callable[[VideoModel], object],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BadRequestError, match=said):
        call(model)
    assert not [*tmp_path.iterdir()]
