"""The document of the quality bench, from results that are made up."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from quality_tables import BEST, FITTED, PAPER, write_document


def results(best_at_10: float) -> list[dict[str, Any]]:
    means = {(PAPER, 14): 38.0, (BEST, 14): 46.0, (BEST, 10): best_at_10, (PAPER, 10): 30.0}
    noise = np.random.default_rng(0).normal(size=24)
    found = [
        {
            "method": method,
            "budget": budget,
            "nfe": float(budget),
            "psnr": mean + noise[number],
            "number": number,
        }
        for (method, budget), mean in means.items()
        for number in range(24)
    ]
    found += [
        {"method": "SeaCache 1", "budget": 0, "nfe": 12.0, "psnr": 43.0 + noise[n], "number": n}
        for n in range(24)
    ]
    found.append({"method": "half done", "budget": 0, "nfe": 9.0, "psnr": 40.0, "number": 0})
    more = {
        "setting": "fifty steps",
        "ssim": 0.99,
        "vmaf": None,
        "predicted": 45.0,
        "deviation": 2.0,
        "bytes": 2048,
    }
    return [more | one for one in found]


@pytest.mark.parametrize(("best_at_10", "verdict"), [(40.0, "reached"), (36.0, "missed")])
def test_goals_are_judged_by_the_numbers(tmp_path: Path, best_at_10: float, verdict: str) -> None:
    out, notes = tmp_path / "quality.md", tmp_path / "notes.md"
    notes.write_text("## What was tried\n")
    write_document(results(best_at_10), out, notes)
    text = out.read_text()
    assert "half done" not in text
    lines = text.splitlines()
    assert sum(f": {verdict}" in line for line in lines if line.startswith("- planned at 10")) == 2
    assert any("planned at 14" in line and line.endswith("reached") for line in lines)
    below = next(line for line in lines if line.startswith("- planned, at the same"))
    assert "SeaCache 1 (12.0 NFE) by" in below and below.endswith(
        "missed"
    )  # 43 at 12 against at most 40 at 10
    assert "| SeaCache 1 | 12.0 |" in text and "2 kB" in text and text.endswith("## What was tried\n")
    assert (tmp_path / "quality.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize(("lost", "verdict"), [(0.9, "reached"), (1.1, "missed")])
def test_two_experts_are_held_against_one_transformer(tmp_path: Path, lost: float, verdict: str) -> None:
    out, notes = tmp_path / "quality.md", tmp_path / "notes.md"
    notes.write_text("")
    alone = results(40.0)
    two = [one | {"setting": "wan2.2-tiny, fifty steps", "psnr": one["psnr"] - lost} for one in alone]
    write_document(alone + two, out, notes)
    (line,) = (line for line in out.read_text().splitlines() if "below wan-tiny's" in line)
    assert line.endswith(f"-{lost}: {verdict}")


@pytest.mark.parametrize(
    ("fitted_at_14", "of_rows", "of_caches"),
    [
        (47.0, "reached", "reached"),
        (
            45.0,
            f"worse than {BEST} at 14 by 1.0 dB; {BEST} at 14 by 1.0 dB in the 10th percentile: missed",
            "reached",
        ),
        (
            42.0,
            f"worse than {BEST} at 14 by 4.0 dB; {BEST} at 14 by 4.0 dB in the 10th percentile: missed",
            "worse than SeaCache 1 (14.0 NFE) by 1.0 dB; "
            "SeaCache 1 (14.0 NFE) by 1.0 dB in the 10th percentile: missed",
        ),
    ],
)
def test_fitted_solvers_are_held_against_everything_else(
    tmp_path: Path, fitted_at_14: float, of_rows: str, of_caches: str
) -> None:
    out, notes = tmp_path / "quality.md", tmp_path / "notes.md"
    notes.write_text("")
    found = [one | {"nfe": 14.0} if one["method"] == "SeaCache 1" else one for one in results(40.0)]
    planned = [one for one in found if one["method"] == BEST and one["budget"] == 14]
    made = [one | {"method": FITTED, "psnr": one["psnr"] - 46.0 + fitted_at_14} for one in planned]
    write_document(found + made, out, notes)
    lines = [line for line in out.read_text().splitlines() if line.startswith("- fitted solvers")]
    assert [line.partition(": ")[2] for line in lines] == [of_caches, of_rows]


def test_each_number_of_evaluations_has_its_answer(tmp_path: Path) -> None:
    """Mean, tail and worst of fewer steps, plan and solver, and whether the solver gains what it should."""
    out, notes = tmp_path / "quality.md", tmp_path / "notes.md"
    notes.write_text("")
    found = results(40.0)
    planned = [one for one in found if one["method"] == BEST and one["budget"] == 10]
    worst = min(one["psnr"] for one in planned)
    better = [one | {"method": FITTED, "psnr": one["psnr"] + 4.0} for one in planned]
    fewer = [one | {"method": "fewer steps", "psnr": one["psnr"] - 9.0} for one in planned]
    write_document(found + better + fewer, out, notes)
    lines = out.read_text().splitlines()
    (row,) = (line for line in lines if line.startswith("| 10 | 5.0× |"))
    cells = [cell.strip() for cell in row.split("|")[3:-1]]
    assert all(cell.endswith(f"; {worst + more:.1f})") for cell, more in zip(cells, (-9, 0, 4), strict=True))
    assert "- at 10, fitted at least 4.5 dB above planned, mean: +4.0 dB: missed" in lines
    assert "- at 10, fitted at least 3.5 dB above planned, 10th percentile: +4.0 dB: reached" in lines
    assert not any(line.startswith("- at 14, fitted") for line in lines)
