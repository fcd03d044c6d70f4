"""The checks for a GPU run to their end on a CPU, with small models, and resume where they were stopped."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from gpu_check import CHECKS
from gpu_weights import BEGUN, DONE, random_model

from tests.places import ROOT

ALIKE = 45.0  # dB between two mp4 files whose frames differ by rounding
SHORT = ["ceilings", "attention", "pipeline", "model wan2.1-t2v-14b-720p"]


def checked(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    script = [sys.executable, str(ROOT / "scripts" / "gpu_check.py"), "--device", "cpu"]
    files = ["--results", str(folder / "gpu.jsonl"), "--out", str(folder / "gpu.md")]
    return subprocess.run([*script, *files, *words], capture_output=True, text=True, check=False)


def assert_all_are_done(folder: Path, names: list[str]) -> None:
    lines = [json.loads(line) for line in (folder / "gpu.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [line["check"] for line in lines] == names
    found = {line["check"]: line["found"] for line in lines}
    assert [one["equal"] for one in found["pipeline"]["against diffusers"]] == [True, True]
    assert all(one["error"] < 1e-5 for one in found["attention"]["kernels"])
    page = (folder / "gpu.md").read_text(encoding="utf-8")
    assert page.count("\n## ") == len(names) and "Failed" not in page


def test_it_runs_to_its_end_and_resumes(tmp_path: Path) -> None:
    first = checked(tmp_path, "--only", ",".join(SHORT[:2]))
    assert first.returncode == 0, first.stderr
    rest = checked(tmp_path, "--only", ",".join(SHORT))
    assert rest.returncode == 0, rest.stderr
    assert "attention: done" in first.stdout and "attention" not in rest.stdout
    assert_all_are_done(tmp_path, SHORT)


def test_an_unknown_check_is_refused(tmp_path: Path) -> None:
    done = checked(tmp_path, "--only", "attentoin")
    assert done.returncode == 2 and "no check is called 'attentoin'" in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_check_runs(tmp_path: Path) -> None:
    done = checked(tmp_path)
    assert done.returncode == 0, done.stderr
    assert_all_are_done(tmp_path, list(CHECKS))
    lines = [json.loads(line) for line in (tmp_path / "gpu.jsonl").read_text(encoding="utf-8").splitlines()]
    found = {line["check"]: line["found"] for line in lines}
    assert all(one["equal"] for one in found["options"]["must be equal"])
    assert all(one["decisions agree"] for one in found["ranks"]["ranks"])
    halo = found["ranks"]["ranks"][-1]
    assert halo["topology"] == "cfg 2, decode: halo" and (halo["equal"] or halo["psnr"] > ALIKE)
    auto = [one["option"] for one in found["options"]["must be equal"] if one["option"].startswith("auto")]
    assert auto == ["auto: text_encoder keep, vae keep"]  # as always on a CPU
    timed = [one for one in found["options"]["may differ by rounding, bfloat16"] if " ms " in one["option"]]
    assert [one["option"].split(",")[0] for one in timed] == [
        "fuse_forecasts: true",
        "batch_guidance: always",
    ]
    assert all(one["equal"] or one["psnr"] > 20 for one in timed)
    failures = found["failures"]["failures"]
    assert [(one["exit code"], one["named"], one["left"]) for one in failures] == [(3, True, 0)] * 2


def test_random_weights_replace_no_folder_of_somebody_else(tmp_path: Path) -> None:
    repository = "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"
    folder = tmp_path / "weights"
    folder.mkdir()
    (folder / "mine.safetensors").touch()
    with pytest.raises(FileExistsError):
        random_model(repository, folder, torch.device("cpu"), small=True)
    assert [path.name for path in folder.iterdir()] == ["mine.safetensors"]
    begun = tmp_path / "begun"
    begun.mkdir()
    (begun / BEGUN).touch()
    random_model(repository, begun, torch.device("cpu"), small=True)
    assert (begun / DONE).exists()
