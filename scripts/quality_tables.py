"""Tables, goals and the plot of docs/quality.md, from the results of `bench_quality.py`."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from runtime.versions import versions

Result = dict[str, Any]
BEST = "guided, calibrated, planned"
PAPER = "Spectrum (paper), w = 0.5"
FITTED = "guided, fitted"
PLACED = "UniPC at the planned times"
EXPERTS = "wan2.2-tiny"
PEERS = ("TaylorSeer", "SeaCache", "MagCache", "FirstBlockCache", "FasterCache", "DBCache")
_OURS = {
    "fewer steps": "#999999",
    "fewer steps (Euler)": "#cccccc",
    "fewer steps (DPM++)": "#b5b5b5",
    PLACED: "#666666",
    "Spectrum (paper), w = 1": "#d9a441",
    "Spectrum (paper), w = 0.5": "#f0a030",
    "guided, w = 0.5": "#4f9f4f",
    "guided, w = 0.5, carried": "#7fbf7f",
    "guided, error-driven": "#2f7f6f",
    "guided, calibrated weights": "#5f8fcf",
    "guided, calibrated, planned": "#1f4e79",
    "guided, calibrated, planned, fresh": "#3f6e99",
    "guided, calibrated, planned, watched": "#7f9fbf",
    FITTED: "#7030a0",
}
_PEER_COLOURS = dict(
    zip(PEERS, ("#b04a8c", "#c0392b", "#8e44ad", "#d98880", "#bb8fce", "#7b241c"), strict=True)
)


def write_document(results: list[Result], out: Path, notes: Path) -> None:
    """Write `out` and, beside it, the plot; `notes` is the text after the tables."""
    results = complete(results)
    settings = list(dict.fromkeys(result["setting"] for result in results))
    plot = out.with_suffix(".png")
    draw([r for r in results if r["setting"] == settings[0]], plot)
    parts = [_head(results, plot)]
    for setting in settings:
        own = [result for result in results if result["setting"] == setting]
        parts += [f"## {setting}", *_setting(own, [r for r in results if r["setting"] == settings[0]])]
    parts += [notes.read_text(encoding="utf-8").strip()]
    out.write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def complete(results: list[Result]) -> list[Result]:
    """Drop methods that were not measured on all videos of their setting, as their means do not compare."""
    groups: dict[tuple[str, str, int], list[Result]] = defaultdict(list)
    for result in results:
        groups[result["setting"], result["method"], result["budget"]].append(result)
    most: dict[str, int] = defaultdict(int)
    for (setting, _, _), own in groups.items():
        most[setting] = max(most[setting], len(own))
    return [one for (setting, _, _), own in groups.items() if len(own) == most[setting] for one in own]


def _head(results: list[Result], plot: Path) -> str:
    used = ", ".join(f"{name} {number}" for name, number in versions().items())
    videos = {result["setting"]: set[int]() for result in results}
    for result in results:
        videos[result["setting"]].add(result["number"])
    count = ", ".join(str(len(numbers)) for numbers in videos.values())
    return f"""# Quality at equal evaluations

Everything on this page is made by

    python scripts/bench_quality.py --out docs/quality.md

on wan-tiny, and on wan2.2-tiny with its two experts, in more than an hour on two cores. Every single result
is in [quality.jsonl](quality.jsonl). The settings below have {count} videos, in this order; their prompts
and seeds were not used for any calibration. Every method makes each video from the same noise. Frames are
compared with those of the full sampler, which computes every step, before any lossy encoding.

NFE is the number of evaluations of the transformer; the two guidance branches together count as one. For
other caching methods, `scripts/peers.py` converts their work to evaluations. Numbers are means over the
videos, with the 10th percentile of the PSNR in brackets. w is the weight of Chebyshev regression in the
forecast; the rest is linear extrapolation (the preset `paper` has w = 1). *velocity* and *guided* are the
stream that is forecast ([presets.md](presets.md)). *planned* are plans without a guard
([calibration.md](calibration.md#how-plans-are-made)); *watched* are the shipped presets `planned-14` and
`planned-10`, which have one. The model is small, so the results only indicate what to expect for 14B.

Versions: {used}.

![Mean PSNR against evaluations]({plot.name})"""


def _setting(results: list[Result], first: list[Result]) -> Iterable[str]:
    budgets = sorted({r["budget"] for r in results if r["budget"]})
    ours = [name for name in _OURS if any(r["method"] == name for r in results)]
    wrong = [r["method"] for r in results if "wrong" in r["method"]]
    rows = [*ours, *dict.fromkeys(wrong)]
    yield "PSNR in dB, mean (10th percentile):"
    yield _table(
        ["method", *(f"NFE {budget}" for budget in budgets)],
        [[name, *(_psnr(_of(results, name, budget)) for budget in budgets)] for name in rows],
    )
    yield "SSIM and VMAF, means:"
    yield _table(
        ["method", *(f"NFE {budget}" for budget in budgets)],
        [[name, *(_others(_of(results, name, budget)) for budget in budgets)] for name in rows],
    )
    peers = _by_method([r for r in results if not r["budget"]])
    if peers:
        yield "Other caching methods, and for each the best plan and fitted solver with no more evaluations:"
        yield _table(
            ["method", "NFE", "PSNR", "SSIM", "VMAF", "planned at", "fitted at"],
            [
                [
                    name,
                    f"{_mean(own, 'nfe'):.1f}",
                    _psnr(own),
                    f"{_mean(own, 'ssim'):.4f}",
                    f"{_mean(own, 'vmaf'):.1f}",
                    _rival(results, own, BEST),
                    _rival(results, own, FITTED),
                ]
                for name, own in sorted(peers.items(), key=lambda item: _mean(item[1], "nfe"))
            ],
        )
    yield _bytes(results)
    yield _goals(results, first)
    yield _promises(results)


def _goals(results: list[Result], first: list[Result]) -> str:
    """Write the goals, and whether they were reached; `first` are those of the first setting."""
    paper, ten, best = _of(results, PAPER, 14), _of(results, BEST, 10), _of(results, BEST, 14)
    lines = []
    for name, value in (("mean", _mean_psnr), ("10th percentile", _tenth)):
        gain = value(ten) - value(paper)
        lines.append(
            f"- planned at 10 NFE at least as good as Spectrum (w = 0.5) at 14, {name}: {value(ten):.1f} "
            f"against {value(paper):.1f} dB, {gain:+.1f}: {_verdict(gain >= 0)}"
        )
    gain = _mean_psnr(best) - _mean_psnr(paper)
    lines.append(
        f"- planned at 14 NFE at least 7 dB better than Spectrum (w = 0.5) at 14, mean: {gain:+.1f} dB: "
        f"{_verdict(gain >= 7)}"
    )
    if results[0]["setting"].startswith(EXPERTS):
        for name, method in (("planned", BEST), ("fitted", FITTED)):
            alone, own = _of(first, method, 14), _of(results, method, 14)
            if alone and own:
                lost = _mean_psnr(own) - _mean_psnr(alone)
                said = f"- {name} at 14 NFE at most 1 dB below wan-tiny's {_mean_psnr(alone):.1f} dB"
                lines.append(f"{said}: {lost:+.1f}: {_verdict(lost >= -1)}")
    peers = any(not r["budget"] for r in results)
    if peers:
        said = "- planned, at the same or a lower NFE, never worse than another cache"
        lines.append(f"{said}: {_against_peers(results, BEST)}")
    if peers and _of_method(results, FITTED):
        said = "- fitted solvers, at the same or a lower NFE, never worse than another cache"
        lines.append(f"{said}: {_against_peers(results, FITTED)}")
    if _of_method(results, FITTED):
        lines.append(_against_rows(results))
    return "Goals:\n\n" + "\n".join(lines)


def _against_peers(results: list[Result], method: str) -> str:
    """Say which caches are better than `method` at its largest budget that does not exceed their NFE."""
    budgets = sorted({r["budget"] for r in _of_method(results, method)})
    below = []
    for name, own in _by_method([r for r in results if not r["budget"]]).items():
        fitting = [budget for budget in budgets if budget <= _mean(own, "nfe") + 0.5]
        behind = _mean_psnr(own) - _mean_psnr(_of(results, method, fitting[-1])) if fitting else 0.0
        if behind > 0:
            below.append(f"{name} ({_mean(own, 'nfe'):.1f} NFE) by {behind:.1f} dB")
    return f"worse than {'; '.join(below)}: missed" if below else "reached"


def _against_rows(results: list[Result]) -> str:
    """Say which of the other methods are better than fitted solvers with as many computed steps."""
    budgets = sorted({r["budget"] for r in _of_method(results, FITTED)})
    better = []
    for name, budget in dict.fromkeys((r["method"], r["budget"]) for r in results if r["method"] != FITTED):
        gain = _mean_psnr(_of(results, name, budget)) - _mean_psnr(_of(results, FITTED, budget))
        if budget in budgets and gain > 0:
            better.append(f"{name} at {budget} by {gain:.1f} dB")
    told = ", ".join(map(str, budgets))
    said = f"- fitted solvers at {told} NFE better than every other row of the first table"
    return f"{said}: {'worse than ' + '; '.join(better) + ': missed' if better else 'reached'}"


def _promises(results: list[Result]) -> str:
    """Write how well the reports' predictions held."""
    told = [r for r in results if r["method"] == BEST and r["predicted"] is not None]
    if not told:
        return ""
    misses = [r["psnr"] - r["predicted"] for r in told]
    within = statistics.fmean(abs(m) <= 2 * r["deviation"] for m, r in zip(misses, told, strict=True))
    correlation = float(np.corrcoef([r["predicted"] for r in told], [r["psnr"] for r in told])[0, 1])
    return (
        f"Predicted PSNR of {len(told)} planned videos: measured − predicted is "
        f"{statistics.fmean(misses):+.1f} dB in the mean, with a standard deviation of "
        f"{statistics.pstdev(misses):.1f} dB. {100 * within:.0f} % are within two of the standard deviations "
        f"that the reports gave. The correlation of predicted and measured PSNR is {correlation:.2f}."
    )


def _bytes(results: list[Result]) -> str:
    """Write the memory of the streams."""
    rows = []
    for name in ("Spectrum (paper), w = 0.5", "velocity, w = 0.5", "guided, w = 0.5", BEST):
        own = _of(results, name, 14)
        if own:
            rows.append([name, f"{max(r['bytes'] for r in own) / 1024:.0f} kB"])
    return "Memory for the history at 14 NFE, on one rank:\n\n" + _table(["method", "memory"], rows)


def _rival(results: list[Result], own: list[Result], method: str) -> str:
    budgets = sorted({r["budget"] for r in _of_method(results, method)})
    fitting = [budget for budget in budgets if budget <= _mean(own, "nfe") + 0.5]
    if not fitting:
        return ""
    return f"{fitting[-1]}: {_psnr(_of(results, method, fitting[-1]))}"


def draw(results: list[Result], path: Path) -> None:
    """Draw mean PSNR against evaluations."""
    figure = Figure(figsize=(9, 6), layout="constrained", dpi=130)
    axes = figure.subplots()
    for name, colour in _OURS.items():
        points = [
            (_mean(own, "nfe"), _mean_psnr(own))
            for budget in sorted({r["budget"] for r in results if r["budget"]})
            if (own := _of(results, name, budget))
        ]
        if points:
            width = 2.5 if name == BEST else 1.2
            axes.plot(*zip(*points, strict=True), "o-", color=colour, lw=width, ms=4, label=name)
    for family, colour in _PEER_COLOURS.items():
        own = _by_method([r for r in results if r["method"].startswith(family)])
        points = sorted((_mean(values, "nfe"), _mean_psnr(values)) for values in own.values())
        points = [point for point in points if point[0] <= 26]
        if points:
            axes.plot(*zip(*points, strict=True), "x", color=colour, ms=6, label=family)
    axes.set_xlabel("evaluations of both branches")
    axes.set_ylabel("mean PSNR against the full sampler, dB")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8, frameon=False, ncols=2)
    figure.savefig(path)


def _of(results: list[Result], method: str, budget: int) -> list[Result]:
    return [r for r in results if r["method"] == method and r["budget"] == budget]


def _of_method(results: list[Result], method: str) -> list[Result]:
    return [r for r in results if r["method"] == method]


def _by_method(results: list[Result]) -> dict[str, list[Result]]:
    found: dict[str, list[Result]] = defaultdict(list)
    for result in results:
        found[result["method"]].append(result)
    return found


def _mean(results: list[Result], field: str) -> float:
    values = [r[field] for r in results if r[field] is not None]
    return statistics.fmean(values) if values else float("nan")


def _mean_psnr(results: list[Result]) -> float:
    return _mean(results, "psnr")


def _tenth(results: list[Result]) -> float:
    return float(np.percentile([r["psnr"] for r in results], 10))


def _psnr(results: list[Result]) -> str:
    return f"{_mean_psnr(results):.1f} ({_tenth(results):.1f})" if results else ""


def _others(results: list[Result]) -> str:
    return f"{_mean(results, 'ssim'):.4f} · {_mean(results, 'vmaf'):.1f}" if results else ""


def _verdict(reached: bool) -> str:
    return "reached" if reached else "missed"


def _table(columns: list[str], rows: list[list[str]]) -> str:
    rule = ["---", *["---:"] * (len(columns) - 1)]
    return "\n".join("| " + " | ".join(row) + " |" for row in [columns, rule, *rows])
