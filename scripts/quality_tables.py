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
OLDER = "videos of older tables"
# Goals of fitted solvers against plans: computed steps → gain in the mean and in the 10th percentile, dB.
_GAINS = {8: (2.5, 2.0), 10: (4.5, 3.5), 14: (3.0, 4.0)}
_LEAST = {6: (37.0, 32.0)}  # the same, of the PSNR itself
_OVER_PAPER = 7.0  # of 10 steps over Spectrum's 14
_ONCE = """\
- *Fewer steps* need nothing, and neither does a universal plan, which was measured on other prompts:
  [calibration.md](calibration.md#without-a-calibration).
- *Plans* need one calibration of the model and its sampler, made once (`lockstep calibrate`). From it,
  `lockstep plan` makes a plan for any number of steps, for a number of seconds, or for a PSNR.
- *Fitted solvers* are part of the calibration, one for each number of computed steps (`--budgets 8,10,14`).
  More can be added later with `--add-solvers`. `lockstep plan` shows both side by side, and takes the better
  one by expected mean and 10th percentile.
- Clients of a server give the number, a PSNR or a time in the request: [serve.md](serve.md)."""
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
    plot, of = out.with_suffix(".png"), defaultdict[str, list[Result]](list)
    for result in results:
        of[result["setting"]].append(result)
    draw(of[settings[0]], plot)
    parts = [_head(results, plot), *_answer(of[settings[0]])]
    alone = of[next((name for name in settings if name.endswith(OLDER)), settings[0])]
    for setting in settings:
        parts += [f"## {setting}", *_setting(of[setting], alone)]
        if setting == settings[0]:
            parts += _aims(of[setting])
    parts += [notes.read_text(encoding="utf-8").strip()]
    parts = [part for part in parts if part]
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

*I can afford N evaluations of the model: what do I get, and what must I do once?* The first table answers
this for wan-tiny; the others compare with other methods. Everything on this page is made by

    python scripts/bench_quality.py --out docs/quality.md

on wan-tiny, and on wan2.2-tiny with its two experts, in a few hours on two cores. Every single result
is in [quality.jsonl](quality.jsonl). The settings below have {count} videos, in this order; their prompts
and seeds were not used for any calibration. Those of the first three settings occur in no earlier table, and
nothing was chosen by them; those of the others were seen while the methods were made. Every method makes each
video from the same noise. Frames are compared with those of the full sampler, which computes every step,
before any lossy encoding.

NFE is the number of evaluations of the transformer; the two guidance branches together count as one. For
other caching methods, `scripts/peers.py` converts their work to evaluations. Numbers are means over the
videos, with the 10th percentile of the PSNR in brackets. w is the weight of Chebyshev regression in the
forecast; the rest is linear extrapolation (the preset `paper` has w = 1). *velocity* and *guided* are the
stream that is forecast ([presets.md](presets.md)). *planned* are plans without a guard
([calibration.md](calibration.md#how-plans-are-made)); *watched* are the shipped presets `planned-14` and
`planned-10`, which have one. The model is small, so the results only indicate what to expect for 14B.

Versions: {used}.

![Mean PSNR against evaluations]({plot.name})"""


def _answer(results: list[Result]) -> Iterable[str]:
    """Write what each number of evaluations gives, and what it takes once."""
    budgets = sorted({r["budget"] for r in _of_method(results, FITTED)} & {*_budgets(results, BEST)})
    if not budgets:
        return
    steps, rows = 50, list[list[str]]()
    for budget in budgets:
        graded = [_graded(_of(results, name, budget)) for name in ("fewer steps", BEST, FITTED)]
        rows.append([str(budget), f"{steps / budget:.1f}×", *graded])
    yield "## What N evaluations give"
    yield "PSNR in dB against all 50 steps: mean (10th percentile; worst of the videos)."
    heads = ["computed of 50", "at most faster", "fewer steps of the sampler", "plan", "fitted solver"]
    yield _table(heads, rows)
    yield _ONCE


def _aims(results: list[Result]) -> Iterable[str]:
    """Write what was aimed at with fitted solvers, and whether it was reached."""
    lines = []
    for budget, gains in _GAINS.items():
        fitted, planned = _of(results, FITTED, budget), _of(results, BEST, budget)
        if not fitted or not planned:
            continue
        for (name, value), aim in zip(_GRADES.items(), gains, strict=True):
            gain = value(fitted) - value(planned)
            said = f"- at {budget}, fitted at least {aim:g} dB above planned, {name}"
            lines.append(f"{said}: {gain:+.1f} dB: {_verdict(gain >= aim)}")
    for budget, least in _LEAST.items():
        for (name, value), aim in zip(_GRADES.items(), least, strict=True):
            if fitted := _of(results, FITTED, budget):
                found = value(fitted)
                said = f"- at {budget}, fitted at least {aim:g} dB, {name}"
                lines.append(f"{said}: {found:.1f} dB: {_verdict(found >= aim)}")
    paper, ten = _of(results, PAPER, 14), _of(results, FITTED, 10)
    for name, value in _GRADES.items() if paper and ten else ():
        gain = value(ten) - value(paper)
        said = f"- fitted at 10 at least {_OVER_PAPER:g} dB above Spectrum (w = 0.5) at 14, {name}"
        lines.append(f"{said}: {gain:+.1f} dB: {_verdict(gain >= _OVER_PAPER)}")
    if lines:
        yield "Aims of fitted solvers:\n\n" + "\n".join(lines)


def _setting(results: list[Result], first: list[Result]) -> Iterable[str]:
    budgets = sorted({r["budget"] for r in results if r["budget"]})
    rows = [name for name in _OURS if any(r["method"] == name for r in results)]
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
    yield from (_promises(results, name, method) for name, method in (("planned", BEST), ("fitted", FITTED)))


def _goals(results: list[Result], first: list[Result]) -> str:
    """Write the goals, and whether they were reached; `first` are results of wan-tiny on the same videos."""
    paper, ten, best = _of(results, PAPER, 14), _of(results, BEST, 10), _of(results, BEST, 14)
    lines = []
    for name, value in _GRADES.items() if paper else ():
        gain = value(ten) - value(paper)
        lines.append(
            f"- planned at 10 NFE at least as good as Spectrum (w = 0.5) at 14, {name}: {value(ten):.1f} "
            f"against {value(paper):.1f} dB, {gain:+.1f}: {_verdict(gain >= 0)}"
        )
    if paper:
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
    return "Goals:\n\n" + "\n".join(lines) if lines else ""


def _against_peers(results: list[Result], method: str) -> str:
    """Say which caches are better than `method` at its largest budget that does not exceed their NFE."""
    below = []
    for name, own in _by_method([r for r in results if not r["budget"]]).items():
        fitting = [budget for budget in _budgets(results, method) if budget <= _mean(own, "nfe") + 0.5]
        if fitting:
            behind = _behind(own, _of(results, method, fitting[-1]))
            below += [f"{name} ({_mean(own, 'nfe'):.1f} NFE){one}" for one in behind]
    return f"worse than {'; '.join(below)}: missed" if below else "reached"


def _against_rows(results: list[Result]) -> str:
    """Say which of the other methods are better than fitted solvers with as many computed steps."""
    budgets, better = _budgets(results, FITTED), []
    for name, budget in dict.fromkeys((r["method"], r["budget"]) for r in results if r["method"] != FITTED):
        if budget in budgets:
            behind = _behind(_of(results, name, budget), _of(results, FITTED, budget))
            better += [f"{name} at {budget}{one}" for one in behind]
    told = ", ".join(map(str, budgets))
    said = f"- fitted solvers at {told} NFE better than every other row of the first table"
    return f"{said}: {'worse than ' + '; '.join(better) + ': missed' if better else 'reached'}"


def _behind(other: list[Result], own: list[Result]) -> list[str]:
    """Say in which grade, and by how much, `own` is worse than `other`."""
    lost = {name: value(other) - value(own) for name, value in _GRADES.items()}
    return [
        f" by {gain:.1f} dB" + ("" if name == "mean" else f" in the {name}")
        for name, gain in lost.items()
        if gain > 0
    ]


def _promises(results: list[Result], name: str, method: str) -> str:
    """Write how well the reports' predictions of a method held."""
    told = [r for r in results if r["method"] == method and r["predicted"] is not None]
    if not told:
        return ""
    misses = [r["psnr"] - r["predicted"] for r in told]
    within = statistics.fmean(abs(m) <= 2 * r["deviation"] for m, r in zip(misses, told, strict=True))
    correlation = float(np.corrcoef([r["predicted"] for r in told], [r["psnr"] for r in told])[0, 1])
    return (
        f"Predicted PSNR of {len(told)} {name} videos: measured − predicted is "
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


def _budgets(results: list[Result], method: str) -> list[int]:
    return sorted({r["budget"] for r in _of_method(results, method)})


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


_GRADES = {"mean": _mean_psnr, "10th percentile": _tenth}


def _graded(results: list[Result]) -> str:
    worst = min((r["psnr"] for r in results), default=float("nan"))
    return f"{_mean_psnr(results):.1f} ({_tenth(results):.1f}; {worst:.1f})" if results else ""


def _psnr(results: list[Result]) -> str:
    return f"{_mean_psnr(results):.1f} ({_tenth(results):.1f})" if results else ""


def _others(results: list[Result]) -> str:
    return f"{_mean(results, 'ssim'):.4f} · {_mean(results, 'vmaf'):.1f}" if results else ""


def _verdict(reached: bool) -> str:
    return "reached" if reached else "missed"


def _table(columns: list[str], rows: list[list[str]]) -> str:
    rule = ["---", *["---:"] * (len(columns) - 1)]
    return "\n".join("| " + " | ".join(row) + " |" for row in [columns, rule, *rows])
