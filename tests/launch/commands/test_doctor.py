"""`lockstep doctor` says what is here and why something is not."""

from __future__ import annotations

import re
from io import StringIO

import pytest
import torch

from launch import cli
from launch.commands.doctor import _importable, _splits
from launch.commands.doctor_models import fits_table, rehearsed
from launch.shell.terminal import Terminal
from runtime.rehearsal.machine import load_gpu


def test_doctor_names_everything_that_matters(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    assert cli.run(["doctor"]) == 0
    stdout = capfd.readouterr().out
    for word in (torch.__version__, "xfuser", "ray", "libvmaf yes", "wan2.1-t2v-14b-720p", "wan-tiny"):
        assert word in stdout
    shown = dict(re.findall(r"│ (\w+) +│ (.*?) *│", stdout))
    assert {"off", "paper", "best-10"} <= {*shown["presets"].split(", ")}
    assert shown["calibrations"] == "wan-tiny, wan2.2-tiny"


def test_a_package_that_cannot_be_imported_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> None:
        raise RuntimeError("no accelerator")

    assert _importable("no-such-package").startswith("not installed")
    monkeypatch.setattr("launch.commands.doctor.importlib.import_module", broken)
    assert _importable("numpy").endswith("cannot be imported: RuntimeError: no accelerator")


def test_an_ffmpeg_that_does_not_run_is_a_finding(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.setattr("imageio_ffmpeg.get_ffmpeg_exe", lambda: "/bin/false")
    assert cli.run(["doctor"]) == 0
    stdout, stderr = capfd.readouterr()
    assert "cannot be used: Command '['/bin/false', '-version']'" in stdout and stderr == ""


@pytest.mark.parametrize(
    ("heads", "world", "splits"),
    [(12, 8, "4×2, 2×4, 1×8"), (40, 8, "8×1, 4×2, 2×4, 1×8"), (6, 1, "1×1")],
)
def test_splits_divide_heads_and_ranks(heads: int, world: int, splits: str) -> None:
    assert ", ".join(f"{ulysses}×{ring}" for ulysses, ring in _splits(heads, world)) == splits


def test_what_fits_is_rehearsed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "launch.commands.doctor_models.available", lambda _: ["wan-tiny", "wan2.1-t2v-14b-480p"]
    )
    gpu = load_gpu("4090")
    found = rehearsed(gpu)  # as `doctor --gpu 4090` does
    gib = {name: [(fit.peak or 0) / 2**30 for fit in fits.values()] for name, fits in found.items()}
    assert len(gib["wan-tiny"]) == 4 and all(0 < peak < 1 for peak in gib["wan-tiny"])
    large = found["wan2.1-t2v-14b-480p"]
    assert all(5 < gib["wan2.1-t2v-14b-480p"][place] < 23.5 for place in (0, 3))
    assert large[1].changes == {"memory.transformer": "offload"}  # 27 GB of weights
    assert large[8].changes == {"memory.transformer": "shard"}
    shown = Terminal(width=80, file=StringIO())
    shown.print(fits_table(gpu, found))
    assert "shard" in shown.file.getvalue()  # type: ignore[attr-defined]
