"""Tables and the page of the results of `scripts/chaos.py`."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

NOTES = Path(__file__).with_name("chaos_notes.md")
PROBLEMS = ("hang", "bits", "leftover", "foreign file", "exit code", "words", "resume")
_RAY = ("raylet", "gcs", "agent", "worker")
_ROLES = {"driver": "command", "terminal": "command", "rank": "rank", "ffmpeg": "ffmpeg", "helper": "helper"}
_KINDS = {"disk": "full disk", "limit": "file size limit", "clock": "clock"}

_Record = dict[str, Any]


def befell(record: _Record) -> str:
    """Name what was hit, for a row of a table."""
    fault = record["fault"]
    if fault["kind"] != "signal":
        return _KINDS[fault["kind"]]
    target: str = fault["target"]
    return "Ray" if target in _RAY else _ROLES[target]


def by_job(records: Sequence[_Record]) -> str:
    """Make a table with a row for each job and what was hit."""
    return _table("job | hit", records, lambda record: f"{record['job']} | {befell(record)}")


def by_signal(records: Sequence[_Record]) -> str:
    """Make a table with a row for each role and signal."""
    signals = [record for record in records if record["fault"]["kind"] == "signal"]
    return _table("hit | by", signals, lambda r: f"{r['fault']['target']} | {r['fault']['how']}")


def _table(head: str, records: Sequence[_Record], row_of: Callable[[_Record], str]) -> str:
    columns = ["faults", "done", "failed", "cancelled", "refused", "killed", "seconds", *PROBLEMS]
    lines = [f"| {head} | {' | '.join(columns)} |", "| --- | --- |" + " ---: |" * len(columns)]
    rows: dict[str, list[_Record]] = {}
    for record in records:
        rows.setdefault(row_of(record), []).append(record)
    lines += [f"| {name} | {_cells(rows[name])} |" for name in sorted(rows)]
    return "\n".join([*lines, f"| **all** | | {_cells(records)} |"])


def _cells(records: Sequence[_Record]) -> str:
    codes = [record["code"] for record in records]
    seconds = [record["seconds"] for record in records if record["struck"]]
    took = f"{statistics.median(seconds):.1f}, {max(seconds):.1f}" if seconds else "–"
    ends = [codes.count(code) for code in (0, 3, 130, 2)]
    killed = sum(code is not None and code < 0 for code in codes)
    wrong = [sum(_has(record, problem) for record in records) for problem in PROBLEMS]
    return " | ".join(str(cell) for cell in (len(records), *ends, killed, took, *wrong))


def _has(record: _Record, problem: str) -> bool:
    return any(kind == problem for kind, _ in record["problems"])


def _found(records: Iterable[_Record]) -> str:
    """List all problems, one line each; empty if there are none."""
    lines = [
        f"* seed {record['seed']}, number {record['number']}, {record['job']}: {kind}: {what}"
        for record in records
        for kind, what in record["problems"]
    ]
    return "\n".join(["", "### Problems", "", *lines]) if lines else ""


def write_page(records: Sequence[_Record], out: Path, made: str) -> None:
    """Write the page of these records.

    Args:
        records: the records.
        out: the page.
        made: sentence on the command and the date.
    """
    struck = [record for record in records if record["struck"]]
    late = len(records) - len(struck)
    tables = [by_job(struck), "By role and signal:", by_signal(struck)]
    if late:
        tables.append(
            f"{late} more came after the job or the process to hit had ended; they are left out above."
        )
    text = NOTES.read_text(encoding="utf-8")
    text = text.replace("{made}", f"{len(records)} faults so far. {made}")
    told = text.replace("{tables}", "\n\n".join(tables) + _found(struck))
    out.write_text(told.rstrip() + "\n", encoding="utf-8")
