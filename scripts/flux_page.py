"""docs/flux.md, from the results of `bench_flux.py`."""

from __future__ import annotations

import re
import statistics
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

Result = Mapping[str, Any]
_BUDGETS = (8, 10, 14)
_OURS = (
    "fewer steps",
    "Spectrum as published, w = 1",
    "Spectrum as published, w = 0.5",
    "planned",
)
_PEERS = ("TaylorSeer", "SeaCache", "MagCache", "FirstBlockCache", "DBCache")
_FEW, _USUAL = (2, 4, 6, 8), 6
PUBLISHED = 4.79 / 5.0  # the paper's speed-up on FLUX.1 with 10 of 50 steps, of the ideal one


def write_page(results: Sequence[Result], out: Path) -> None:
    """Write the page."""
    quality = [one for one in results if "method" in one]
    speeds = [one for one in results if "speed" in one]
    parts = [_head(quality)]
    for steps in sorted({one["steps"] for one in quality}, reverse=True):
        parts += [
            f"## Against all {steps} steps",
            *_setting([one for one in quality if one["steps"] == steps]),
        ]
    parts += [*_few(quality), *_speed(speeds)]
    out.write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def _head(results: Sequence[Result]) -> str:
    notes = Path(__file__).with_name("flux_notes.md").read_text(encoding="utf-8").strip()
    return notes.replace("PICTURES", str(len({one["number"] for one in results})))


def _setting(results: Sequence[Result]) -> Iterator[str]:
    by_method = _grouped(results)
    rows = []
    for name in _OURS:
        cells = [_cell(by_method.get(f"{name}, {budget}", [])) for budget in _BUDGETS]
        if any(cells[0]):
            rows.append([name, *(cell for three in cells for cell in three)])
    columns = [f"{what} {budget}" for budget in _BUDGETS for what in ("PSNR at", "SSIM", "deep")]
    yield _table(["method", *columns], rows)
    ours = {_nfe(own): own for name, own in by_method.items() if re.fullmatch(r"planned, \d+", name)}
    rows, beaten, told = [], 0, 0
    for name, own in by_method.items():
        if not name.startswith(_PEERS):
            continue
        nfe, numbers = _nfe(own), {one["number"] for one in own}
        equal = max((budget for budget in ours if budget <= nfe + 1e-6), default=None)
        if equal is None:
            continue
        plan = [one for one in ours[equal] if one["number"] in numbers]
        beaten, told = beaten + _is_better(plan, own), told + 1
        rows.append([name, str(len(own)), f"{nfe:.1f}", *_cell(own), f"{equal:.0f}", _cell(plan)[0]])
    yield "Other caches, and the plan with no more evaluations than each, on the same pictures:"
    yield _table(["method", "pictures", "NFE", "PSNR", "SSIM", "deep", "planned at", "its PSNR"], rows)
    yield (
        "The plan has a better PSNR, in the mean and in the 10th percentile, "
        f"than {beaten} of these {told} methods."
    )


def _few(results: Sequence[Result]) -> Iterator[str]:
    by_method = _grouped([one for one in results if one["steps"] == 50])
    if not any(name.startswith("planned from") for name in by_method):
        return
    rows = []
    for prompts in _FEW:
        planned = "planned" if prompts == _USUAL else f"planned from {prompts} prompts"
        found = [by_method.get(f"{planned}, {budget}", []) for budget in _BUDGETS]
        rows.append([str(prompts), *(_cell(one)[0] for one in found)])
    yield "## How few prompts a calibration needs"
    yield "PSNR against all 50 steps, by the number of prompts that the plan was made from:"
    yield _table(["prompts", *(f"NFE {budget}" for budget in _BUDGETS)], rows)


def _speed(speeds: Sequence[Result]) -> Iterator[str]:
    if not speeds:
        return
    yield "## Speed"
    seconds: dict[str, list[float]] = defaultdict(list)
    for one in speeds:
        seconds[one["speed"]].append(one["seconds"])
    nfes = {one["speed"]: one["nfe"] for one in speeds}
    full = min(seconds["full"])
    rows = []
    for name, taken in seconds.items():
        ratio, ideal = full / min(taken), 50 / nfes[name]
        rows.append([name, str(nfes[name]), f"{min(taken):.1f}", f"{ratio:.2f}", f"{ratio / ideal:.1%}"])
    yield (
        "CPU time of a whole call without text and VAE, 50 steps, one thread. The model has random weights, "
        "and its blocks take most of the time (8 double and 16 single ones of width 512, 128 + 32 tokens). "
        "This was one run on a busy machine; times are accurate to about 5 %. "
        f"The paper's 4.79× on FLUX.1 with 10 of 50 steps is {PUBLISHED:.1%} of the ideal 5×:"
    )
    yield _table(["preset", "NFE", "seconds", "speed-up", "of the ideal 50 / NFE"], rows)


def _grouped(results: Iterable[Result]) -> dict[str, list[Result]]:
    """Method → its results, if it has enough of them; plans have most."""
    found: dict[str, list[Result]] = defaultdict(list)
    for one in results:
        found[one["method"]].append(one)
    most = max((len(own) for own in found.values()), default=0)
    return {name: own for name, own in found.items() if 2 * len(own) >= most}


def _is_better(ours: Sequence[Result], theirs: Sequence[Result]) -> bool:
    return all(one > other for one, other in zip(_psnr(ours), _psnr(theirs), strict=True))


def _psnr(results: Sequence[Result]) -> tuple[float, float]:
    """Mean and 10th percentile."""
    values = [one["psnr"] for one in results]
    return statistics.fmean(values), float(np.percentile(values, 10))


def _nfe(results: Sequence[Result]) -> float:
    return statistics.fmean(one["nfe"] for one in results)


def _cell(results: Sequence[Result]) -> list[str]:
    """PSNR, SSIM and deep distance as text."""
    if not results:
        return ["", "", ""]
    mean, low = _psnr(results)
    ssim, deep = (statistics.fmean(one[name] for one in results) for name in ("ssim", "deep"))
    return [f"{mean:.1f} ({low:.1f})", f"{ssim:.4f}", f"{1000 * deep:.2f}"]


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
