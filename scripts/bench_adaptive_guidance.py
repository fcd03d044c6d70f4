"""Skipping the unconditional branch alone, against skipping both branches, at equal numbers of evaluations.

    python scripts/bench_adaptive_guidance.py --results out/adaptive_guidance.jsonl

The guided velocity is c + (w − 1) g, with the gap g = c − u between the branches. Every method makes 2 K
evaluations of a branch:

- `planned`: both branches at the K steps of the preset planned-K, the guided velocity forecast between them;
- `apart`: the same steps, with c and g forecast apart;
- `planned uncond`: c at more steps than u, both chosen by a search. Where u is left out, g is forecast from
  its own history and from how far c has moved (LinearAG of Adaptive Guidance, Castillo et al., 2023, with the
  regression from a Gram matrix);
- `cut off`: u at the first of the steps of c alone, and v = c after them (AG of the same paper);
- `fitted`: the preset best-K, for comparison.

Gram matrices of c and g are measured on the calibration's own prompts and seeds. The videos are of prompts
that no calibration and no table has used. Results are lines of JSON; stopped at any time, the script resumes.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from bench_fitted import results_in
from numpy.typing import NDArray
from wan_tiny_prompts import of_guidance

from runtime.engine import Engine
from runtime.forecasting.calibration import Calibration, load_calibration
from runtime.forecasting.presets import load_preset
from runtime.media.mp4 import FrameBuffer, Frames
from runtime.media.quality import psnr
from runtime.request.config import load_config
from runtime.request.video_request import VideoRequest
from runtime.sampling.evaluator import Evaluator
from runtime.sampling.result import Result as Made
from runtime.sampling.run import Run
from spectrum.calibration.measured import make_planner

BUDGETS = (8, 10, 14)  # K: evaluations are 2 K
FIRST_SEED = 40_000
RIDGE = 1e-3
Vector = NDArray[np.float64]
Steps = tuple[list[int], list[int], bool]
"""Steps at which c and u are computed, and whether g is 0 after the last of u."""
Plans = dict[int, dict[str, Steps]]
"""Budget → method → steps."""


@dataclass(frozen=True, slots=True)
class Result:
    """One video by one method."""

    number: int
    prompt: str
    seed: int
    method: str
    budget: int
    cond: list[int]
    uncond: list[int]
    psnr: float
    latents: float  # relative error


class Law:
    """Forecasts of c and g, and what a choice of steps costs, from their joint Gram matrix.

    Args:
        gram: mean over videos, `[2 n, 2 n]`: of c_0 … c_{n−1}, g_0 … g_{n−1}.
        weights: effect on the result of an error of the guided velocity at each step, `[n]`.
        scale: guidance scale w.
    """

    def __init__(self, gram: Vector, weights: Vector, scale: float):
        self.gram, self.weights, self.scale = gram, weights, scale
        self.steps = len(weights)
        self._units = np.eye(2 * self.steps)
        self._known: dict[tuple[int | None, ...], Vector] = {}

    def _regressed(self, target: int, last: int, moves: Sequence[Vector]) -> Vector:
        """Coefficients of vector `target`: the one of `last`, plus a regression on some moves."""
        found = self._units[last].copy()
        if moves:
            rows = np.stack(moves)
            products = rows @ self.gram @ rows.T
            damped = products + RIDGE * np.diag(np.diag(products)) + 1e-12 * np.eye(len(rows))
            found += np.linalg.solve(damped, rows @ self.gram @ (self._units[target] - found)) @ rows
        return found

    def _row(self, step: int, last: int, before: int | None, offset: int, cond: int | None) -> Vector:
        """Forecast of c (offset 0) or g (offset n) from the last two known ones, and from how c has moved."""
        key = (step, last, before, offset, cond)
        if key not in self._known:
            units, moves = self._units, []
            if cond is not None:
                moves.append(units[cond] - units[last])
            if before is not None:
                moves.append(units[offset + last] - units[offset + before])
            self._known[key] = self._regressed(offset + step, offset + last, moves)
        return self._known[key]

    def rows(self, cond: Sequence[int], uncond: Sequence[int], cut: bool) -> Iterator[tuple[Vector, Vector]]:
        """Coefficients of c and g at every step, or of what takes their place."""
        n, c, g = self.steps, [-1, -1], [-1, -1]
        for step in range(n):
            in_cond, in_uncond = step in cond, step in uncond
            c, g = ([c[1], step] if in_cond else c), ([g[1], step] if in_uncond else g)
            first, second = (None if one[0] < 0 else one[0] for one in (c, g))
            of_c = self._units[step] if in_cond else self._row(step, c[1], first, 0, None)
            if in_uncond:
                of_g = self._units[n + step]
            elif cut and step > uncond[-1]:
                of_g = np.zeros(2 * n)
            else:
                of_g = self._row(step, g[1], second, n, step if in_cond else None)
            yield of_c, of_g

    def cost(self, cond: Sequence[int], uncond: Sequence[int], cut: bool = False) -> float:
        """Expected squared error of the result; errors add up within a gap of the unconditional branch."""
        n, total, error = self.steps, 0.0, np.zeros(2 * self.steps)
        for step, (of_c, of_g) in enumerate(self.rows(cond, uncond, cut)):
            if step in uncond:
                total, error = total + float(error @ self.gram @ error), np.zeros(2 * n)
                continue
            missing = self._units[step] - of_c + (self.scale - 1.0) * (self._units[n + step] - of_g)
            error = error + self.weights[step] * missing
        return total + float(error @ self.gram @ error)

    def plan(
        self, cond: Sequence[int], uncond: Sequence[int], cut: bool = False
    ) -> tuple[list[int], list[int]]:
        """Move one step at a time while that is cheaper."""
        best, found = self.cost(cond, uncond, cut), (list(cond), list(uncond))
        while True:
            moves = [(self.cost(*one, cut), one) for one in self._moves(*found, cut)]
            cost, nearest = min(moves, key=lambda one: one[0])
            if cost >= best * (1 - 1e-6):
                return found
            best, found = cost, nearest

    def _moves(self, cond: list[int], uncond: list[int], cut: bool) -> Iterator[tuple[list[int], list[int]]]:
        for old in cond[1:]:
            at = cond.index(old)
            least, most = cond[at - 1] + 1, cond[at + 1] if at + 1 < len(cond) else self.steps
            for new in range(max(least, old - 3), min(most, old + 4)):
                if new != old:
                    moved = sorted({*cond} - {old} | {new})
                    yield moved, moved[: len(uncond)] if cut else [new if u == old else u for u in uncond]
        if not cut:
            for old in uncond[1:]:
                for new in cond:
                    if new not in uncond:
                        yield cond, sorted({*uncond} - {old} | {new})


class Bench:
    """Makes and measures videos."""

    def __init__(self) -> None:
        self.calibration: Calibration = load_calibration("wan-tiny")
        self.engine = Engine(load_config("wan-tiny"))

    def request(self, prompt: str, seed: int) -> VideoRequest:
        c = self.calibration.conditions
        size = {"width": c.width, "height": c.height, "frames": c.frames}
        return self.engine.config.request(
            prompt, seed=seed, steps=c.steps, guidance=c.guidance, spectrum="off", **size
        )

    def videos(self, count: int) -> list[VideoRequest]:
        return [
            self.request(prompt, FIRST_SEED + number) for number, prompt in enumerate(of_guidance()[:count])
        ]

    @torch.no_grad()
    def walk(
        self, run: Run, velocity: Callable[[int, Callable[[], list[torch.Tensor]]], torch.Tensor]
    ) -> torch.Tensor:
        """Sample with a rule for the velocity of each step, which may ask for c and g there."""
        evaluator = Evaluator(run.networks, run.plan.windows, apart=True)
        sampler, latents = run.plan.fresh_sampler(), run.noise_BCFHW
        for step, timestep in enumerate(sampler.timesteps):

            def both(
                step: int = step, at: torch.Tensor = latents, t: torch.Tensor = timestep
            ) -> list[torch.Tensor]:
                uncond, gap = evaluator.evaluate(step, at, t.expand(len(at))).values_BCFHW
                return [uncond + gap, gap]

            latents = sampler.step(velocity(step, both), timestep, latents, return_dict=False)[0]
        return latents

    def law(self, path: Path) -> Law:
        """Measure the Gram matrix on the calibration's videos, or read it."""
        c = self.calibration
        if path.exists():
            gram = np.load(path)
        else:
            grams = []
            for number, (prompt, seed) in enumerate(zip(c.prompts, c.seeds, strict=True)):
                seen: list[torch.Tensor] = []

                def full(
                    step: int, both: Callable[[], list[torch.Tensor]], seen: list = seen
                ) -> torch.Tensor:
                    cond, gap = both()
                    seen.append(torch.stack([cond.flatten(), gap.flatten()]))
                    return cond + (c.conditions.guidance - 1.0) * gap

                self.walk(self.engine.prepare(self.engine.plan(self.request(prompt, seed))), full)
                values = torch.stack(seen, dim=1).flatten(0, 1).double()
                gram = (values @ values.T).numpy()
                n, w = len(seen), c.conditions.guidance - 1.0
                guided = gram[:n, :n] + w * (gram[:n, n:] + gram[n:, :n]) + w**2 * gram[n:, n:]
                grams.append(gram * n / np.trace(guided))
                print(f"calibration video {number + 1}", file=sys.stderr, flush=True)
            gram = np.mean(grams, axis=0)
            np.save(path, gram)
        planner = make_planner(c.predictor("guided"), c.noise_levels, c.sensitivity, c.scale)
        return Law(gram, planner._weights, c.conditions.guidance)

    @torch.no_grad()
    def made(self, law: Law, run: Run, cond: list[int], uncond: list[int], cut: bool) -> torch.Tensor:
        """Sample with c and g computed at these steps."""
        n, known = law.steps, dict[int, torch.Tensor]()
        rows = [of_c + (law.scale - 1.0) * of_g for of_c, of_g in law.rows(cond, uncond, cut)]

        def velocity(step: int, both: Callable[[], list[torch.Tensor]]) -> torch.Tensor:
            if step in cond:
                known[step], gap = both()
                if step in uncond:
                    known[n + step] = gap
            row = rows[step]
            return torch.stack([float(row[at]) * known[at] for at in np.flatnonzero(row)]).sum(0)

        return self.walk(run, velocity)

    def frames(self, run: Run, latents: torch.Tensor) -> Frames:
        sink = FrameBuffer()
        self.engine.decode(latents, [sink], Made(run.plan, fps=self.engine.config.fps))
        return sink.frames

    def results(self, number: int, request: VideoRequest, law: Law, plans: Plans) -> list[Result]:
        """Make one video by every method for every budget."""
        run = self.engine.prepare(self.engine.plan(request))

        def guided(step: int, both: Callable[[], list[torch.Tensor]]) -> torch.Tensor:
            cond, gap = both()
            return cond + (law.scale - 1.0) * gap

        full = self.walk(run, guided)
        truth = self.frames(run, full)

        def measured(method: str, budget: int, cond: list[int], uncond: list[int], x: torch.Tensor) -> Result:
            quality, error = psnr(self.frames(run, x), truth), float((x - full).norm() / full.norm())
            return Result(number, request.prompt, request.seed, method, budget, cond, uncond, quality, error)

        found = []
        for budget, methods in plans.items():
            for method, name in (("planned", f"planned-{budget}"), ("fitted", f"best-{budget}")):
                latents, steps = self._preset(request, name)
                found.append(measured(method, budget, steps, steps, latents))
            for method, (cond, uncond, cut) in methods.items():
                found.append(measured(method, budget, cond, uncond, self.made(law, run, cond, uncond, cut)))
        return found

    def _preset(self, request: VideoRequest, name: str) -> tuple[torch.Tensor, list[int]]:
        """Latents by a preset without its guard, and its computed steps."""
        preset = load_preset(name)
        preset = preset.model_copy(update={"schedule": preset.schedule.model_copy(update={"guard": None})})
        kept: list[torch.Tensor] = []
        plan = self.engine.plan(request.model_copy(update={"spectrum": name}), preset)
        made = self.engine.run(plan, [FrameBuffer()], on_latents=kept.append)
        return kept[0], made.computed["cond"]


def choices(law: Law, budget: int) -> dict[str, Steps]:
    """Steps of c and of u for each method, by the law alone."""
    calibration = load_calibration("wan-tiny")
    plan = calibration.planner("guided").plan
    joint = [*plan(budget).computed]
    found: dict[str, Steps] = {"apart": (joint, joint, False)}
    for name, cut in (("planned uncond", False), ("cut off", True)):
        tried = []
        for left_out in (one for one in (1, 2, 3, 4, 6) if one < budget - 3):
            cond, less = [*plan(budget + left_out).computed], budget - left_out
            near = sorted({min(cond, key=lambda c: (abs(c - step), c)) for step in plan(less).computed})
            starts = [cond[:less]] if cut or len(near) < less else [cond[:less], near]
            tried += [law.plan(cond, one, cut) for one in starts]
        found[name] = (*min(tried, key=lambda one: law.cost(*one, cut)), cut)
    return found


def planned(law: Law, budget: int, path: Path) -> dict[str, Steps]:
    """Steps of each method as `choices` has found them, now or before."""
    if not path.exists():
        path.write_text(json.dumps(choices(law, budget)))
    found: dict[str, Steps] = json.loads(path.read_text())
    for name, (cond, uncond, cut) in found.items():
        error = law.cost(cond, uncond, cut) ** 0.5
        print(
            f"{2 * budget} evaluations, {name}: expected {error:.4f}; c at {cond}, u at {uncond}",
            file=sys.stderr,
        )
    return found


def table(results: list[Result]) -> str:
    """Mean of each method, and its paired difference to planned with the standard error."""
    head = [
        "evaluations",
        "method",
        "of c + of u",
        "PSNR, dB",
        "relative error of the latents",
        "against planned, dB",
    ]
    lines = [f"| {' | '.join(head)} |", "| ---: | --- | --- | ---: | ---: | ---: |"]
    for budget in BUDGETS:
        usual = {one.number: one.psnr for one in results if (one.budget, one.method) == (budget, "planned")}
        for method in ("planned", "apart", "planned uncond", "cut off", "fitted"):
            own = [one for one in results if (one.budget, one.method) == (budget, method)]
            off = [one.psnr - usual[one.number] for one in own]
            error = np.std(off, ddof=1) / np.sqrt(len(off))
            cells = [
                str(2 * budget),
                method,
                f"{len(own[0].cond)} + {len(own[0].uncond)}",
                f"{np.mean([one.psnr for one in own]):.1f}",
                f"{np.mean([one.latents for one in own]):.4f}",
                "" if method == "planned" else f"{np.mean(off):+.1f} ± {error:.1f}",
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--results", type=Path, default=Path("out/adaptive_guidance.jsonl"))
    parser.add_argument("--videos", type=int, default=8)
    given = parser.parse_args()
    logging.disable(logging.INFO)
    torch.set_num_threads(1)
    results = results_in(given.results, Result)
    bench, began = Bench(), time.monotonic()
    law = bench.law(given.results.with_suffix(".npy"))
    plans = {budget: planned(law, budget, given.results.with_suffix(f".{budget}.json")) for budget in BUDGETS}
    with given.results.open("a", encoding="utf-8") as log:
        for number, request in enumerate(bench.videos(given.videos)):
            if any(one.number == number for one in results):
                continue
            found = bench.results(number, request, law, plans)
            log.writelines(json.dumps(asdict(one), ensure_ascii=False) + "\n" for one in found)
            log.flush()
            results += found
            print(f"video {number + 1}, {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
    print(table(results))


if __name__ == "__main__":
    main()
