"""Universal plans on models that they were not made from, against the paper's schedule and fewer steps.

    python scripts/bench_universal.py --results docs/universal.jsonl
    python scripts/bench_universal.py --results docs/universal.jsonl --table

The table of each model is made from the calibrations of the other two alone. Prompts and seeds occur in no
calibration and in no other table. Every result is a line of JSON; stopped at any time, the script resumes.
flux-tiny's calibration is made first if it is missing. The tables are printed whenever it ends.
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import math
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from bench_fitted import results_in
from bench_flux import USUAL, calibration
from bench_quality import paper_steps
from flux_peers import CALL, MODEL, load
from flux_tiny_data import HELD_OUT
from flux_tiny_measure import Distances
from wan_tiny_prompts import of_universal

from runtime.engine import Engine
from runtime.forecasting.calibration import load_calibration
from runtime.media.mp4 import FrameBuffer, Frames
from runtime.media.quality import psnr
from runtime.request.config import load_config
from runtime.request.sampler import SamplerConfig
from runtime.request.video_request import VideoRequest
from spectrum import ChebyshevRidge, FixedSchedule, LinearExtrapolation, StepKind
from spectrum.calibration import to_triangle
from spectrum.diffusers import Preset, disable, enable, plan
from spectrum.diffusers.plans import planned_preset
from spectrum.universal import Universal, examples

BUDGETS = (8, 10, 14)
FIRST_SEED = 40_000
PICTURED = 16  # captions of docs/flux.md
PAPER, FEWER, OWN = "paper", "fewer steps", "own plan"
CARRIED = "own calibration, of another sampler"
UNIVERSAL, WEIGHTS, NODES = "universal", "universal weights, paper's steps", "universal steps, straight line"
METHODS = (PAPER, FEWER, NODES, WEIGHTS, UNIVERSAL, CARRIED, OWN)
ROUNDS = ((PAPER, FEWER, UNIVERSAL, CARRIED), (WEIGHTS, OWN, NODES))  # what is measured first, on all prompts
Make = Callable[[], float]
"""Makes a video or picture by one method, and measures its PSNR."""


@dataclass(frozen=True, slots=True)
class Setting:
    """A model with a sampler; `own` says whether the model's calibration is for it."""

    name: str
    model: str
    steps: int
    guidance: float = 5.0
    shift: float | None = None
    own: bool = True


SETTINGS = (
    Setting("wan-tiny, 50 UniPC steps, shift 3", "wan-tiny", 50),
    Setting("wan2.2-tiny, two experts, 50 UniPC steps, shift 12", "wan2.2-tiny", 50),
    Setting("flux-tiny, 50 Euler steps", "flux-tiny", 50),
    Setting("wan-tiny, 30 UniPC steps, shift 5, guidance 3", "wan-tiny", 30, 3.0, 5.0, False),
    Setting("wan-tiny, 50 UniPC steps, shift 8, guidance 7", "wan-tiny", 50, 7.0, 8.0, False),
    Setting("flux-tiny, 28 Euler steps", "flux-tiny", 28, own=False),
)


@dataclass(frozen=True, slots=True)
class Result:
    """One video or picture by one method."""

    setting: str
    number: int
    method: str
    nfe: int
    psnr: float


def left_out(model: str) -> Universal:
    """Make a table from all models but one."""
    return Universal(tuple(one for name, one in examples().items() if name != model))


class Videos:
    """Makes and measures videos of one setting.

    Args:
        universal: the table.
        folder: where presets are written.
    """

    def __init__(self, setting: Setting, universal: Universal, folder: Path):
        self._setting, self._universal, self._folder = setting, universal, folder
        config = load_config(setting.model)
        if setting.shift is not None:
            scheduler = SamplerConfig(kind="unipc", shift=setting.shift)
            config = config.model_copy(update={"scheduler": scheduler})
        self._engine = Engine(config)
        self._truths: dict[int, Frames] = {}

    def methods(self, number: int) -> Iterator[tuple[str, int, Make]]:
        """Yield the methods for one prompt and seed: name, number of computed steps, and what makes it."""
        setting = self._setting
        request = self._engine.config.request(
            of_universal()[number],
            seed=FIRST_SEED + number,
            steps=setting.steps,
            guidance=setting.guidance,
            spectrum="off",
        )

        def measured(other: VideoRequest) -> float:
            if number not in self._truths:
                self._truths[number] = self._frames(request)
            return psnr(self._frames(other), self._truths[number])

        for budget in BUDGETS:
            fewer = request.model_copy(update={"steps": budget})
            yield FEWER, budget, lambda fewer=fewer: measured(fewer)  # type: ignore[misc]
            for name, make in self._presets(request, budget).items():
                path = self._folder / f"{name}-{budget}.yaml".replace(" ", "-")
                yield name, budget, lambda path=path, make=make: measured(self._with(request, path, make))

    def _presets(self, request: VideoRequest, budget: int) -> dict[str, Callable[[int], dict[str, Any]]]:
        """What makes each method's preset, given a number of steps that the schedule is to compute."""
        own = {"calibration": self._setting.model}
        calibrated = {
            "predictor": {"kind": "calibrated"},
            "calibration": self._forged(request, self._universal),
        }
        planned = {"kind": "planned", "nfe": budget, "guard": None}
        line = {"predictor": {"kind": "linear"}, "switch": {"history": "carried"}}
        sampler = self._engine.profile.fresh_sampler(request)
        steps = self._universal.planner(sampler.sigmas.tolist()).plan(budget).computed

        def paper(count: int) -> dict[str, Any]:
            return {"kind": "explicit", "computed": paper_steps(self._setting.steps, count)}

        made: dict[str, Callable[[int], dict[str, Any]]] = {
            PAPER: lambda count: {"stream": "feature", "schedule": paper(count)},
            NODES: lambda _: {"stream": "guided", "schedule": {"kind": "explicit", "computed": steps}} | line,
            WEIGHTS: lambda count: {"stream": "guided", "schedule": paper(count)} | calibrated,
            UNIVERSAL: lambda _: {"stream": "guided", "schedule": planned} | calibrated,
        }
        if self._setting.own:
            made[OWN] = lambda _: made[UNIVERSAL](budget) | own
        else:
            itself = Universal((examples()[self._setting.model],))
            carried = self._forged(request, itself)
            made[CARRIED] = lambda _: made[UNIVERSAL](budget) | {"calibration": carried}
        return made

    def _forged(self, request: VideoRequest, table: Universal) -> str:
        """Write a table as if it were a calibration of this model."""
        path = self._folder / f"{request.steps}-{len(table.examples)}.json"
        if not path.exists():
            profile = self._engine.profile
            sampler = profile.fresh_sampler(request)
            levels, steps = sampler.sigmas.tolist(), request.steps
            sensitivity = np.mean([one.at(levels)[1] for one in table.examples], axis=0).tolist()
            size = (steps + 1) * (steps + 2) // 2
            changed = {
                "conditions": profile.conditions(request, sampler),
                "noise_levels": levels,
                "grams": {"guided": to_triangle(table.predictor(levels).gram)},
                "sensitivity": sensitivity,
                "response": [1.0] * steps,
                "trajectory": [1.0] * size,
                "trials": [],
                "fits": [],
            }
            load_calibration(self._setting.model).model_copy(update=changed).write(path)
        return str(path)

    def _with(self, request: VideoRequest, path: Path, make: Callable[[int], dict[str, Any]]) -> VideoRequest:
        """Write the preset that computes most steps within the budget, those after a switch included."""
        budget = int(path.stem.rpartition("-")[2])
        request = request.model_copy(update={"spectrum": str(path)})
        for count in range(budget, 1, -1):
            path.write_text(yaml.safe_dump(json.loads(json.dumps(make(count)))))
            if self._engine.plan(request).kinds.count(StepKind.COMPUTE) <= budget:
                return request
        raise ValueError(f"{path.stem} computes more than {budget} steps")

    def _frames(self, request: VideoRequest) -> Frames:
        sink = FrameBuffer()
        self._engine.generate(request, [sink])
        return sink.frames


class Pictures:
    """Makes and measures pictures of flux-tiny.

    Args:
        universal: the table.
        model, own: the model's folder, and its calibration.
    """

    def __init__(self, setting: Setting, universal: Universal, model: Path, own: Path):
        self._setting, self._universal, self._own = setting, universal, own
        self._pipe = load(model)
        self._distances = Distances(self._pipe.vae)
        self._truths: dict[int, torch.Tensor] = {}

    def methods(self, number: int) -> Iterator[tuple[str, int, Make]]:
        """As of `Videos`."""

        def measured(preset: Preset | None, steps: int = self._setting.steps) -> float:
            if number not in self._truths:
                self._truths[number] = self._picture(number, self._setting.steps)
            if preset is not None:
                enable(self._pipe, preset)
            try:
                return self._distances.measure(self._picture(number, steps), self._truths[number]).psnr
            finally:
                if preset is not None:
                    disable(self._pipe)

        for budget in BUDGETS:
            yield FEWER, budget, lambda budget=budget: measured(None, budget)  # type: ignore[misc]
            for name, preset in self._presets(budget).items():
                yield name, budget, lambda preset=preset: measured(preset)  # type: ignore[misc]

    def _presets(self, budget: int) -> dict[str, Preset]:
        steps, levels = self._setting.steps, self._levels()
        planned, predictor = self._universal.planner(levels).plan(budget), self._universal.predictor(levels)
        paper = FixedSchedule.explicit(steps, paper_steps(steps, budget))
        universal = FixedSchedule.explicit(steps, planned.computed)
        made = {
            PAPER: Preset("published", lambda _: paper, lambda steps: ChebyshevRidge(horizon=steps)),
            NODES: Preset("line", lambda _: universal, lambda _: LinearExtrapolation(), "velocity"),
            WEIGHTS: Preset("weights", lambda _: paper, lambda _: predictor, "velocity"),
            UNIVERSAL: planned_preset("universal", planned, predictor),
        }
        if self._setting.own:
            made[OWN] = plan(self._own, nfe=budget)
        return made

    def _levels(self) -> list[float]:
        self._picture(0, self._setting.steps, "latent")
        levels: list[float] = self._pipe.scheduler.sigmas.tolist()
        return levels

    def _picture(self, number: int, steps: int, output: str = "pt") -> torch.Tensor:
        generator = torch.Generator().manual_seed(FIRST_SEED + number)
        arguments = {"num_inference_steps": steps, "generator": generator, "output_type": output}
        picture: torch.Tensor = self._pipe(HELD_OUT[PICTURED + number].caption, **arguments, **CALL).images
        return picture.float()


def table(results: Iterable[Result]) -> str:
    """Mean, 10th percentile and worst of each method, and how often it is better than the paper's.

    A second table has the methods that were measured on fewer prompts, and all others on these prompts.
    """
    found: dict[str, list[Result]] = defaultdict(list)
    for one in results:
        found[one.setting].append(one)
    parts: list[str] = []
    for setting in (one.name for one in SETTINGS if one.name in found):
        known = found[setting]
        first = [one for one in known if one.method in ROUNDS[0]]
        fewer = {one.number for one in known if one.method == WEIGHTS}
        if fewer != {one.number for one in first}:
            parts += _rows(setting, first)
        if fewer:
            parts += _rows(f"{setting}, all methods", [one for one in known if one.number in fewer])
    return "\n\n".join(parts)


def _rows(title: str, results: Iterable[Result]) -> tuple[str, str]:
    """Make a heading and a table, of prompts with all of their methods."""
    methods: dict[str, dict[int, dict[int, float]]] = defaultdict(lambda: defaultdict(dict))
    for one in results:
        methods[one.method][one.nfe][one.number] = one.psnr
    whole = set.intersection(*(set(of) for known in methods.values() for of in known.values()))
    heads = ["method"]
    for nfe in BUDGETS:
        heads += [f"mean (10th percentile; worst) at {nfe}", f"better at {nfe}"]
    rows = [heads, ["---"] * len(heads)]
    for name in (one for one in METHODS if one in methods):
        cells = [_cells(methods[name][nfe], methods[PAPER][nfe], whole) for nfe in BUDGETS]
        rows.append([name, *(cell for pair in cells for cell in pair)])
    return f"**{title}**, {len(whole)} prompts and seeds:", "\n".join(
        f"| {' | '.join(row)} |" for row in rows
    )


def _cells(own: Mapping[int, float], paper: Mapping[int, float], numbers: set[int]) -> tuple[str, str]:
    psnrs = np.array([own[number] for number in numbers])
    graded = f"{psnrs.mean():.1f} ({np.percentile(psnrs, 10):.1f}; {psnrs.min():.1f})"
    if own is paper:
        return graded, ""
    return graded, f"{sum(own[number] > paper[number] for number in numbers)} of {len(numbers)}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--results", type=Path, default=Path("out/universal.jsonl"))
    parser.add_argument("--videos", type=int, default=12)
    parser.add_argument("--flux", type=Path, default=MODEL, help="flux-tiny's folder")
    parser.add_argument("--work", type=Path, default=Path("out/bench-flux"), help="flux-tiny's calibrations")
    parser.add_argument("--setting", default="", help="Measure settings whose names have this text.")
    parser.add_argument("--minutes", type=float, default=math.inf, help="End after so many minutes.")
    parser.add_argument("--table", action="store_true", help="Print the tables, and measure nothing.")
    given = parser.parse_args()
    logging.disable(logging.INFO)
    torch.set_num_threads(1)
    results = results_in(given.results, Result)
    if not given.table:
        with tempfile.TemporaryDirectory() as folder, given.results.open("a", encoding="utf-8") as log:
            for result in _measured(given, results, Path(folder)):
                results.append(result)
                log.write(json.dumps(asdict(result)) + "\n")
                log.flush()
    print(table(results))


def _measured(given: argparse.Namespace, known: list[Result], folder: Path) -> Iterator[Result]:
    done, began = {(one.setting, one.number, one.method, one.nfe) for one in known}, time.monotonic()
    chosen = [one for one in SETTINGS if given.setting in one.name]
    benches = [_bench(one, given, folder) for one in chosen]
    for methods, number in itertools.product(ROUNDS, range(given.videos)):
        for setting, bench in zip(chosen, benches, strict=True):
            for method, nfe, make in bench.methods(number):
                if method not in methods or (setting.name, number, method, nfe) in done:
                    continue
                if time.monotonic() - began > 60 * given.minutes:
                    return
                yield Result(setting.name, number, method, nfe, round(make(), 3))
            print(f"{setting.name}: {number + 1} of {given.videos}", file=sys.stderr, flush=True)


def _bench(setting: Setting, given: argparse.Namespace, folder: Path) -> Videos | Pictures:
    universal = left_out(setting.model)
    if setting.model == "flux-tiny":
        given.work.mkdir(parents=True, exist_ok=True)
        return Pictures(setting, universal, given.flux, calibration(given.work, given.flux, 50, USUAL))
    own = folder / setting.name.replace(" ", "-")
    own.mkdir()
    return Videos(setting, universal, own)


if __name__ == "__main__":
    main()
