"""A file that is given or replaced for one of another kind is named as what it is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from launch.http.keys import read_keys
from runtime.errors import BadRequestError
from runtime.files.checks import check_writable
from runtime.files.kinds import (
    CALIBRATION,
    COMPARISON,
    LATENTS,
    PICTURE,
    PRESET,
    PREVIEW,
    REPORT,
    VIDEO,
    kind_of,
)
from runtime.film.storyboard import load_storyboard
from runtime.forecasting.calibration import load_calibration
from runtime.forecasting.presets import load_preset
from runtime.measure.plans import step_seconds
from runtime.models.configs import open_config
from runtime.rehearsal.machine import load_gpu
from runtime.request.config import shipped

REPORTED = {"schema": 1, "request": {"prompt": "a"}, "decision_digest": ["x"], "model": {"name": "wan-tiny"}}
COMPARED = {"schema": 1, "model": {"name": "wan-tiny"}, "rows": [], "results": []}
FILES = {  # name → its content and what it is
    "report.json": (json.dumps(REPORTED), "a report of `lockstep generate`"),
    "compared.json": (json.dumps(COMPARED), "a comparison by `lockstep compare`"),
    "calibration.json": (shipped("calibrations", "wan-tiny.json").read_text(), "a calibration"),
    "config.yaml": (shipped("wan-tiny.yaml").read_text(), "a config"),
    "preset.yaml": (shipped("spectrum", "paper.yaml").read_text(), "a forecasting preset"),
    "film.yaml": (shipped("storyboards", "shapes.yaml").read_text(), "a storyboard"),
    "gpu.yaml": (shipped("gpus", "h100.yaml").read_text(), "the description of a GPU"),
    "keys.yaml": ("keys: []\n", "a file of API keys"),
}
READERS: dict[str, tuple[Any, str]] = {  # what reads a kind → the file that it is for
    "config": (open_config, "config.yaml"),
    "spectrum": (load_preset, "preset.yaml"),
    "calibration": (load_calibration, "calibration.json"),
    "storyboard": (lambda name: load_storyboard(Path(name)), "film.yaml"),
    "gpu": (load_gpu, "gpu.yaml"),
    "keys": (lambda name: read_keys(Path(name)), "keys.yaml"),
    "report": (lambda name: step_seconds(Path(name)), "report.json"),
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name, (content, _) in FILES.items():
        (tmp_path / name).write_text(content)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", FILES)
def test_each_kind_is_told_by_its_content(name: str) -> None:
    content, kind = FILES[name]
    assert kind_of(yaml.safe_load(content)) == kind


@pytest.mark.parametrize("field", READERS)
@pytest.mark.parametrize("name", FILES)
def test_another_kind_of_file_is_named_as_what_it_is(folder: Path, field: str, name: str) -> None:
    read, own = READERS[field]
    if name == own:
        return
    if field == "report" and name.endswith(".yaml"):
        return  # which is no JSON at all
    for given in (name, f"./{name}"):
        with pytest.raises(BadRequestError) as caught:
            read(given)
        said, shown = str(caught.value), str(Path(given)) if field != "spectrum" else name
        assert f"{field}: {shown!r} given; it is {FILES[name][1]}, not {FILES[own][1]}" in said, said


HEADS = {
    VIDEO: b"\0\0\0\x20ftypisom and more",
    PICTURE: b"\x89PNG\r\n\x1a\n and more",
    PREVIEW: b"RIFF\x10\0\0\0WEBPVP8X",
    LATENTS: b"\x10\0\0\0\0\0\0\0{}",
    REPORT: json.dumps(REPORTED).encode(),
    COMPARISON: json.dumps(COMPARED).encode(),
    CALIBRATION: FILES["calibration.json"][0].encode(),
    PRESET: FILES["preset.yaml"][0].encode(),
}


@pytest.mark.parametrize("kind", HEADS)
def test_only_a_file_of_the_kind_that_is_written_is_replaced(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "mine"
    check_writable(path, overwrite=True, kind=kind)
    for other, content in {**HEADS, "": b"my notes", " ": b'{"my": "notes"}'}.items():
        path.write_bytes(content)
        check_writable(path, overwrite=True)
        if other == kind:
            check_writable(path, overwrite=True, kind=kind)
            continue
        with pytest.raises(BadRequestError) as caught:
            check_writable(path, overwrite=True, kind=kind, field="report")
        known = other if other in (REPORT, COMPARISON, CALIBRATION) else "some other file"
        assert str(caught.value) == (
            f"report: {str(path)!r} is {known}, not {kind}, and `overwrite` does not replace files of "
            "another kind: give another name"
        )
        assert path.read_bytes() == content
    path.write_bytes(b"")
    check_writable(path, overwrite=True, kind=kind)


def test_a_calibration_is_not_replaced_by_a_report(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    from launch import cli

    (folder / "calibration.mp4").write_bytes(HEADS[VIDEO])
    assert cli.run(["generate", "a red circle", "--out", "calibration.mp4", "--overwrite"]) == 2
    assert "out: 'calibration.json' is a calibration, not a report" in capfd.readouterr().err
    assert load_calibration("calibration.json").conditions.steps == 50


@pytest.mark.parametrize(
    ("read", "given", "said"),
    [
        (load_preset, "papr", "did you mean paper?"),
        (open_config, "wan-tinny", "did you mean wan-tiny?"),
        (open_config, "Wan2.1-T2V-14B-480P", "did you mean wan2.1-t2v-14b-480p?"),
        (load_calibration, "wan-tin", "did you mean wan-tiny?"),
        (load_gpu, "h10", "did you mean h100?"),
        (
            load_preset,
            "schedule: {kind: papper}",
            "it must be one of full, paper, explicit, error,",
        ),
        (load_preset, "schedule: {kind: papper}", "did you mean paper?"),
        (load_preset, "schedule: {kind: paper, wndow: 2}", "wndow: unknown field; did you mean window?"),
        (open_config, "model: wan-tiny\nscheduler: {kind: unipcc}", "did you mean unipc?"),
        (open_config, "model: wan-tiny\nmemory: {vae: offlod}", "did you mean offload?"),
        (open_config, "model: wan-tiny\ndefaults: {step: 3}", "step: unknown field; did you mean steps?"),
        (
            READERS["storyboard"][0],
            "title: a\nshots: [{id: a, prompt: b, framse: 5}]",
            "did you mean frames?",
        ),
        (READERS["storyboard"][0], "title: a\nshot: [{id: a, prompt: b}]", "did you mean shots?"),
    ],
)
def test_the_nearest_name_is_suggested(folder: Path, read: Any, given: str, said: str) -> None:
    if ":" in given:
        (folder / "mine.yaml").write_text(given)
        given = "mine.yaml"
    with pytest.raises(BadRequestError) as caught:
        read(given)
    assert said in str(caught.value)
