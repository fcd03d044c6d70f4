"""`lockstep rehearse`: what it prints, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from launch.cli import cli, run

TINY = ["rehearse", "--size", "48x48", "--frames", "5", "--steps", "8"]


def printed(*arguments: str) -> str:
    result = CliRunner().invoke(cli, [*TINY, *arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def test_it_says_what_is_counted_and_what_is_estimated() -> None:
    said = printed("--ranks", "2")
    for words in ("it fits in 79.1 GiB", "launches", "counted:", "estimated, not measured", "unmeasured:"):
        assert words in said


def test_json_is_one_object() -> None:
    told = json.loads(printed("--ranks", "3", "--ring", "3", "--rank", "2", "--json", "--spectrum", "off"))
    assert told["topology"] == {"world": 3, "cfg": 1, "ring": 3, "ulysses": 1}
    assert told["steps"] == {"computed": 8, "forecast": 0}
    (rank,) = told["ranks"]
    assert rank["rank"] == 2 and rank["forecast_step"] is None
    assert set(rank["computed_step"]["sent"]) == {"ring", "sequence"}
    assert told["fits"] is True and told["options"] == []


def test_topologies_are_compared() -> None:
    compared = json.loads(printed("--ranks", "4", "--topologies", "--json"))["topologies"]
    found = [tuple(one["topology"][axis] for axis in ("cfg", "ring", "ulysses")) for one in compared]
    assert sorted(found) == [(1, 1, 4), (1, 2, 2), (1, 4, 1), (2, 1, 2), (2, 2, 1)]
    estimates = [one["estimated_seconds"]["denoise"] for one in compared]
    assert estimates == sorted(estimates) and all(one["fits"] for one in compared)
    some = printed("--ranks", "4", "--cfg", "2", "--topologies")
    assert "2 × 1 × 2" in some and "2 × 2 × 1" in some and "1 × 2 × 2" not in some


def test_a_gpu_of_ones_own(tmp_path: Path) -> None:
    path = tmp_path / "small.yaml"
    path.write_text(
        "name: Small\nmemory_gib: 1.0\nbfloat16_tflops: 10\ntf32_tflops: 5\nfloat32_tflops: 5\n"
        "memory_gbps: 100\nlink_gbps: 10\nnetwork_gbps: 1\n"
    )
    told = json.loads(printed("--gpu", str(path), "--json"))
    assert told["gpu"]["name"] == "Small"
    assert told["fits"] is False and told["options"] == []  # 2 GiB are assumed to be lost


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--gpu", "h10"], "4090, b200, h100, h200"),
        (["--rank", "2", "--ranks", "2"], "from 0 to 1"),
        (["--ranks", "64"], "would share 18 tokens"),
        (["--attention", "xfuser"], "attention: 'xfuser' given"),
        (["--spectrum", "none"], "spectrum: 'none' given"),
    ],
)
def test_what_cannot_be_is_refused(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run([*TINY, *arguments]) == 2
    assert said in " ".join(capsys.readouterr().err.split())
