"""Several LoRAs on the command line."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from launch import cli
from launch.jobs import Job
from runtime.configs import Lora
from tests.jobs import make_job

TARGET = "transformer.blocks.0.attn1.to_q.lora_"


def write(path: Path) -> str:
    save_file({f"{TARGET}A.weight": torch.ones(1, 192), f"{TARGET}B.weight": torch.ones(192, 1)}, path)
    return str(path)


def test_several_are_one_job_in_their_order(tmp_path: Path) -> None:
    one, two = write(tmp_path / "one.safetensors"), write(tmp_path / "two.safetensors")
    job = make_job(tmp_path / "a.mp4", lora=((two, 1.0), (one, -0.5)))
    assert job.config.lora == (Lora(file=two), Lora(file=one, scale=-0.5))
    assert Job.from_json(job.absolute().to_json()).config.lora == job.config.lora


def test_each_is_looked_at_before_anything_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good, out = write(tmp_path / "good.safetensors"), tmp_path / "a.mp4"
    bad = str(tmp_path / "none.safetensors")
    given = ["generate", "a", "--out", str(out), "--lora", good, "1", "--lora", bad, "0.5"]
    assert cli.run(given) == 2
    assert (
        capsys.readouterr().err
        == f"lockstep: lora: {bad!r} given; it cannot be read: No such file or directory\n"
    )
    assert not out.exists()
