"""Progress: kinds, evaluations, and an honest time left."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from launch.shell.progress import StepProgress, TimeLeft
from runtime.sampling.denoise import StepRecord
from spectrum import StepKind

C, F = StepKind.COMPUTE, StepKind.FORECAST


def record(index: int, kind: StepKind) -> StepRecord:
    return StepRecord(index, kind, 0.0, {C: 10.0, F: 1.0}[kind], None)


def test_time_left_counts_each_kind_by_itself() -> None:
    left = TimeLeft([C, C, F, F, C, F])
    left.add(record(0, C))
    assert left.seconds == 50.0  # forecasts are not known yet: the worst is assumed
    left.add(record(1, C))
    left.add(record(2, F))
    assert left.seconds == pytest.approx(1 + 10 + 1)


@pytest.mark.parametrize("terminal", [True, False])
def test_every_run_ends_with_its_last_step(terminal: bool) -> None:
    out = io.StringIO()
    kinds = [C, F] * 10
    with StepProgress(Console(file=out, force_terminal=terminal, width=100), "paper", kinds) as progress:
        for index, kind in enumerate(kinds):
            progress(record(index, kind))
    assert "20/20" in out.getvalue()
    assert "NFE 10" in out.getvalue()
