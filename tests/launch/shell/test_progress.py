"""Progress: kinds, evaluations, and the time left."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from launch.shell.progress import StepProgress
from runtime.sampling.denoise import StepRecord
from spectrum import StepKind

C, F = StepKind.COMPUTE, StepKind.FORECAST


def record(index: int, kind: StepKind) -> StepRecord:
    return StepRecord(index, kind, 0.0, {C: 10.0, F: 1.0}[kind], None)


@pytest.mark.parametrize("terminal", [True, False])
def test_every_run_ends_with_its_last_step(terminal: bool) -> None:
    out = io.StringIO()
    kinds = [C, F] * 10
    with StepProgress(Console(file=out, force_terminal=terminal, width=100), "paper", kinds) as progress:
        for index, kind in enumerate(kinds):
            progress(record(index, kind))
    assert "20/20" in out.getvalue()
    assert "NFE 10" in out.getvalue()
