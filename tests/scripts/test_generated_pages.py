"""Pages of docs/ that scripts make from a log are what the scripts make of it now."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from bench_adaptive_guidance import Result as GuidanceResult
from bench_adaptive_guidance import table as guidance_table
from bench_fitted import Result, table
from bench_progressive import Result as ProgressiveResult
from bench_progressive import table as progressive_table
from chaos_table import write_page
from flux_page import write_page as write_flux_page
from gpu_page import write_page as write_gpu_page
from quality_tables import write_document

from tests.places import ROOT

DOCS = ROOT / "docs"


def records(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (DOCS / name).read_text(encoding="utf-8").splitlines()]


def test_the_page_of_random_faults(tmp_path: Path) -> None:
    page = (DOCS / "reliability.md").read_text(encoding="utf-8")
    made = re.search(r"faults so far\. (.*)", page)
    assert made is not None
    write_page(records("reliability.jsonl"), tmp_path / "page.md", made[1])
    assert (tmp_path / "page.md").read_text(encoding="utf-8") == page


def test_the_page_of_quality(tmp_path: Path) -> None:
    write_document(records("quality.jsonl"), tmp_path / "quality.md", ROOT / "scripts" / "quality_notes.md")
    pages = [(folder / "quality.md").read_text(encoding="utf-8") for folder in (DOCS, tmp_path)]
    there, made = (re.sub(r"^Versions: .*", "", page, flags=re.MULTILINE) for page in pages)
    assert made == there


def test_the_table_of_fitted_solvers() -> None:
    measured = table([Result(**record) for record in records("fitted.jsonl")])
    assert measured in (DOCS / "calibration.md").read_text(encoding="utf-8")


def test_the_table_of_adaptive_guidance() -> None:
    measured = guidance_table([GuidanceResult(**record) for record in records("adaptive_guidance.jsonl")])
    assert measured in (DOCS / "quality.md").read_text(encoding="utf-8")


def test_the_table_of_progressive_resolution() -> None:
    measured = progressive_table([ProgressiveResult(**record) for record in records("progressive.jsonl")])
    assert measured in (DOCS / "progressive.md").read_text(encoding="utf-8")


def test_the_page_of_flux_tiny(tmp_path: Path) -> None:
    write_flux_page(records("flux.jsonl"), tmp_path / "page.md")
    assert (tmp_path / "page.md").read_text(encoding="utf-8") == (DOCS / "flux.md").read_text(
        encoding="utf-8"
    )


@pytest.mark.slow
def test_the_page_of_a_gpu(tmp_path: Path) -> None:
    write_gpu_page(records("gpu.jsonl"), tmp_path / "page.md")
    assert (tmp_path / "page.md").read_text(encoding="utf-8") == (DOCS / "gpu.md").read_text(encoding="utf-8")
