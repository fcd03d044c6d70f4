"""The measurements of the server: what they say of what was measured, and one short run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from bench_serve import Answers, Bench, Waits, _events, _until, main, table


def test_the_tables_have_rates_percentiles_and_longest_waits() -> None:
    bench = Bench(clients=2, seed=0)
    bench.answers.append(Answers("create", [0.001 * number for number in range(1, 101)], wall=5.0))
    bench.waits.append(Waits("DELETE", [3.0, 1.0, 2.0]))
    told = table(bench, "2 cores")
    assert "| create | 100 | 20 | 50.5 | 99.0 |" in told
    assert "| DELETE | 3 | 2.00 | 3.00 |" in told and told.endswith("\n2 cores\n")


def test_events_are_waited_for_by_their_kind() -> None:
    lines = iter(
        [
            "retry: 2000",
            "",
            "event: begun",
            'data: {"at": 1.5}',
            ":",
            "event: step",
            'data: {"at": 2.5}',
            "event: state",
            'data: {"at": 3.5}',
        ]
    )
    events = _events(lines)
    assert _until(events, "step") == 2.5
    with pytest.raises(RuntimeError, match="ended before its event 'step'"):
        _until(events, "step")


@pytest.mark.slow
@pytest.mark.alone
@pytest.mark.timeout(1200)
def test_a_short_run_measures_everything(tmp_path: Path) -> None:
    out = tmp_path / "serve.md"
    assert (
        main(["--queued", "8", "--clients", "2", "--seconds", "1", "--repeats", "1", "--out", str(out)]) == 0
    )
    found = json.loads(out.with_suffix(".json").read_text())
    assert len(found) == 9 and all(seconds and min(seconds) > 0 for seconds in found.values())
    assert len(found["create"]) == 6 and all(name in out.read_text() for name in found)
