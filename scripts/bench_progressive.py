"""Progressive resolution against skipping alone, at equal operations of the transformer.

    python scripts/bench_progressive.py --results docs/progressive.jsonl
    python scripts/bench_progressive.py --results docs/progressive.jsonl --table

The first steps of wan-tiny's sampler run at 48×48, from the lower band of the same noise. At the switch the
latents grow to 96×96, the solver and the history begin anew, and later steps follow a plan for what is left
of the budget. Skipping alone spends all of it at 96×96. A step at 48×48 costs what half the height and width
would cost 14B at 720p. "exact lower band" takes the full sampler's own latents at the switch, without their
upper band: no small model can do better. Frames are compared with those of the full sampler, and with the
caption. Prompts and seeds occur in no calibration and in no other table. Every result is a line of JSON;
stopped at any time, the script resumes.
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import math
import sys
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from bench_fitted import results_in
from progressive_resolution import grown, lower_level, ratio, shrunk_noise, upper_power, without_upper_band
from wan_tiny_data import SCENES, Scene
from wan_tiny_measure import measure
from wan_tiny_prompts import of_progressive

from runtime.engine import Engine
from runtime.forecasting.calibration import load_calibration
from runtime.media.mp4 import FrameBuffer, Frames
from runtime.media.quality import psnr
from runtime.request.config import load_config
from runtime.request.sampler import SamplerConfig
from runtime.request.video_request import BRANCHES
from runtime.sampling.plan import Plan
from runtime.sampling.result import Result as Generated
from runtime.sampling.streams import GuidedStream
from spectrum import CalibratedPredictor, StepKind

BUDGETS = (3, 4, 8, 14)
SWITCHES = (2, 4, 19)  # steps of the sampler: those before which planned-14 has computed 2, 4 and 9 steps
STEPS, SHIFT, SIZE, SMALL = 50, 3.0, 96, 48
SHARE = 0.119  # operations of a step of 14B at 640×368 to those at 1280×720, by `lockstep rehearse`
FIRST_SEED = 60_000
FULL, SKIPPING, UNIVERSAL, FITTED = "full", "skipping alone", "universal", "fitted"
BOUND, PROGRESSIVE = "exact lower band", "progressive"
BETTER = {
    "progressive, error / 4": 1 / 4,
    "progressive, error / 10": 1 / 10,
}  # of the small video at the switch
ORDER = (SKIPPING, UNIVERSAL, FITTED, BOUND, *BETTER, PROGRESSIVE)
PRESETS = {(UNIVERSAL, 8): "universal-8", (UNIVERSAL, 14): "universal"}
PRESETS |= {(FITTED, 8): "best-8", (FITTED, 14): "best-14"}


@dataclass(frozen=True, slots=True)
class Result:
    """One video by one method.

    Attributes:
        number: number of the prompt and seed.
        method: how it was made.
        budget: computed steps at 96×96 that skipping alone may take; 0 for the full sampler.
        switch: first step at 96×96.
        small, large: computed steps at 48×48, and at 96×96.
        psnr: dB against the full sampler; of the full sampler, its upper band's share of the latents' power.
        right: whether colour, background and motion are the caption's.
    """

    number: int
    method: str
    budget: int
    switch: int
    small: int
    large: int
    psnr: float
    right: bool

    @property
    def cost(self) -> float:
        """Steps at 96×96 that cost as much."""
        return self.large + self.small * SHARE


@dataclass(frozen=True, slots=True)
class Task:
    """What is to be made; the fields are those of `Result`."""

    method: str
    budget: int
    switch: int = 0


def tasks() -> list[Task]:
    """Everything that is measured of a prompt."""
    made = [Task(FULL, 0), *(Task(SKIPPING, budget) for budget in BUDGETS)]
    made += [Task(BOUND, budget, switch) for budget in BUDGETS for switch in SWITCHES]
    made += [Task(PROGRESSIVE, budget, switch) for budget in BUDGETS[:3] for switch in SWITCHES]
    made += [
        Task(name, budget, switch) for name in BETTER for budget in BUDGETS[1:3] for switch in SWITCHES[:2]
    ]
    return made + [Task(*one) for one in PRESETS]


def scenes() -> list[Scene]:
    """Scenes whose captions are in no calibration and no other table."""
    by_caption = {one.caption: one for one in SCENES}
    return [by_caption[caption] for caption in of_progressive()]


def large_steps(budget: int, switch: int) -> int:
    """Number of computed steps at 96×96 after a switch whose cost comes nearest to the budget."""
    return max(round(budget - switch * SHARE), 1)


class Models:
    """wan-tiny at both sizes, with the sampler of each, and plans of its own calibration."""

    def __init__(self) -> None:
        config = load_config("wan-tiny")
        small = SamplerConfig(kind="unipc", shift=SHIFT / ratio((SMALL, SMALL), (SIZE, SIZE)))
        changed = config.model_copy(update={"scheduler": small})
        self._engines = {SIZE: Engine(config), SMALL: Engine(changed)}
        self._calibration = load_calibration("wan-tiny")
        self.predictor = CalibratedPredictor(self._calibration.gram("guided"))

    def planned(self, budget: int, switch: int) -> set[int]:
        """Best computed steps at 96×96 of a generation that begins anew at `switch`."""
        fresh = {0: switch, switch: 1} if switch else {0: 1}
        plan = self._calibration.planner("guided", fresh).plan(budget + switch)
        return {step for step in plan.computed if step >= switch}

    def plan(self, caption: str, seed: int, size: int) -> tuple[Engine, Plan]:
        """Plan a video of `size`, with every step computed."""
        engine = self._engines[size]
        sizes = {"width": size, "height": size}
        request = engine.config.request(caption, seed=seed, steps=STEPS, spectrum="off", **sizes)
        return engine, engine.plan(request)


class Video:
    """One prompt and seed by all methods. Latents are `[B, C, F, H, W]`: legend of `progressive_resolution`.

    Args:
        models: the models.
        number: number of the prompt and seed.
        work: folder in which latents of the full sampler are kept.
    """

    def __init__(self, models: Models, number: int, work: Path):
        self._models, self._seed = models, FIRST_SEED + number
        self._file = work / f"{number}.pt"
        self._scene = scenes()[number]

    def make(self, task: Task) -> tuple[int, int, float, bool]:
        """Make and measure a video: computed steps at each size, PSNR, and whether it is right."""
        if task.method == FULL:
            return 0, STEPS, upper_power(self._full[STEPS], self._small), self._right(self._truth)
        if (task.method, task.budget) in PRESETS:
            return 0, task.budget, *self._graded(self._generated(PRESETS[task.method, task.budget]))
        if task.method == SKIPPING:
            ends = self._sampled(SIZE, self._noise, 0, STEPS, self._models.planned(task.budget, 0))
            return 0, task.budget, *self._graded(self._frames(ends[STEPS]))
        large = large_steps(task.budget, task.switch)
        start, computed = self._start(task), self._models.planned(large, task.switch)
        ends = self._sampled(SIZE, start, task.switch, STEPS, computed)
        return task.switch, large, *self._graded(self._frames(ends[STEPS]))

    def _start(self, task: Task) -> torch.Tensor:
        """Latents at 96×96 after the switch."""
        sigma = self._levels[task.switch]
        exact = without_upper_band(self._full[task.switch], self._noise, sigma, self._small)
        if task.method == BOUND:
            return exact
        made = grown(self._first[task.switch], self._noise, sigma)
        return exact.lerp(made, BETTER.get(task.method, 1.0))

    @cached_property
    def _planned(self) -> tuple[Engine, Plan]:
        return self._models.plan(self._scene.caption, self._seed, SIZE)

    @cached_property
    def _noise(self) -> torch.Tensor:
        engine, plan = self._planned
        return engine.prepare(plan).noise_BCFHW

    @cached_property
    def _levels(self) -> list[float]:
        levels: list[float] = self._planned[1].fresh_sampler().sigmas.tolist()
        return levels

    @property
    def _small(self) -> tuple[int, int]:
        height, width = self._noise.shape[-2:]
        return height * SMALL // SIZE, width * SMALL // SIZE

    @cached_property
    def _full(self) -> dict[int, torch.Tensor]:
        """Latents of the full sampler before each step, and at the end."""
        if not self._file.exists():
            temporary = self._file.with_suffix(".part")
            torch.save(self._sampled(SIZE, self._noise, 0, STEPS, set(range(STEPS))), temporary)
            temporary.replace(self._file)
        known: dict[int, torch.Tensor] = torch.load(self._file, weights_only=True)
        return known

    @cached_property
    def _first(self) -> dict[int, torch.Tensor]:
        """Latents at 48×48 before each step up to the last switch."""
        last = max(SWITCHES)
        return self._sampled(SMALL, shrunk_noise(self._noise, self._small), 0, last, set(range(last)))

    @cached_property
    def _truth(self) -> Frames:
        return self._frames(self._full[STEPS])

    @torch.no_grad()
    def _sampled(
        self, size: int, latents: torch.Tensor, start: int, end: int, computed: set[int]
    ) -> dict[int, torch.Tensor]:
        """Latents before steps `start` … `end`, from a solver and a history that begin at `start`."""
        engine, plan = self._models.plan(self._scene.caption, self._seed, size)
        stream = GuidedStream(engine.prepare(plan).network, self._models.predictor)
        sampler, seen = plan.fresh_sampler(), {start: latents}
        sampler.set_begin_index(start)
        for step in range(start, end):
            kind = StepKind.COMPUTE if step in computed else StepKind.FORECAST
            time = sampler.timesteps[step]
            output = stream.advance(step, dict.fromkeys(BRANCHES, kind), seen[step], time.expand(1))
            seen[step + 1] = sampler.step(output.velocity_BCFHW, time, seen[step], return_dict=False)[0]
        if size == SMALL:
            level = lower_level(self._levels[end], ratio((SMALL, SMALL), (SIZE, SIZE)))
            assert math.isclose(float(sampler.sigmas[end]), level, abs_tol=1e-4), "samplers do not fit"
        return seen

    def _frames(self, latents: torch.Tensor) -> Frames:
        (engine, plan), sink = self._planned, FrameBuffer()
        engine.decode(latents, [sink], Generated(plan, fps=8))
        return sink.frames

    def _generated(self, preset: str) -> Frames:
        (engine, plan), sink = self._planned, FrameBuffer()
        engine.generate(plan.request.model_copy(update={"spectrum": preset}), [sink])
        return sink.frames

    def _graded(self, frames: Frames) -> tuple[float, bool]:
        return psnr(frames, self._truth), self._right(frames)

    def _right(self, frames: Frames) -> bool:
        return all(measure(frames.astype(np.float32) / 255).agrees(self._scene).values())


def table(results: Iterable[Result]) -> str:
    """Mean and worst PSNR of each method, its cost, and how often videos are right; of complete prompts."""
    found: dict[tuple[int, str, int], dict[int, Result]] = defaultdict(dict)
    for one in results:
        found[one.budget, one.method, one.switch][one.number] = one
    needed = {(0, FULL, 0), *((budget, SKIPPING, 0) for budget, _, _ in found if budget)}
    if not needed <= found.keys():
        return "the full sampler or skipping alone is not measured yet"
    whole = sorted(set.intersection(*map(set, found.values())))
    heads = ("budget", "method", "switch at step", "steps at 48×48 + 96×96", "cost")
    rows = [(*heads, "PSNR, mean (worst)", "better than skipping", "right"), ("---",) * 8]
    for budget, name, switch in itertools.product(BUDGETS, ORDER, (0, *SWITCHES)):
        if (budget, name, switch) not in found:
            continue
        keys = (budget, name, switch), (budget, SKIPPING, 0)
        own, skipping = ([found[key][number] for number in whole] for key in keys)
        psnrs = [one.psnr for one in own]
        better = sum(one.psnr > other.psnr for one, other in zip(own, skipping, strict=True))
        rows.append(
            (
                str(budget),
                name,
                str(switch or ""),
                f"{own[0].small} + {own[0].large}",
                f"{own[0].cost:.2f}",
                f"{np.mean(psnrs):.1f} ({min(psnrs):.1f})",
                "" if name == SKIPPING else f"{better} of {len(own)}",
                f"{sum(one.right for one in own)} of {len(own)}",
            )
        )
    full = [found[0, FULL, 0][number] for number in whole]
    power = 100 * np.mean([one.psnr for one in full])
    told = f"The full sampler is right in {sum(one.right for one in full)} of {len(full)} videos. "
    told += f"Of the power of its latents, {power:.0f} % is in the upper band."
    return "\n".join([*(f"| {' | '.join(row)} |" for row in rows), "", told])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--results", type=Path, default=Path("out/progressive.jsonl"))
    parser.add_argument("--videos", type=int, default=8)
    parser.add_argument("--methods", default="", help="Measure methods whose names have this text.")
    parser.add_argument(
        "--work", type=Path, default=Path("out/progressive"), help="latents of the full sampler"
    )
    parser.add_argument("--minutes", type=float, default=math.inf, help="End after so many minutes.")
    parser.add_argument("--table", action="store_true", help="Print the table, and measure nothing.")
    given = parser.parse_args()
    logging.disable(logging.INFO)
    torch.set_num_threads(1)
    results = results_in(given.results, Result)
    if not given.table:
        with given.results.open("a", encoding="utf-8") as log:
            for result in _measured(given, results):
                results.append(result)
                log.write(json.dumps(asdict(result)) + "\n")
                log.flush()
    print(table(results))


def _measured(given: argparse.Namespace, known: list[Result]) -> Iterator[Result]:
    done, began = {(one.number, one.method, one.budget, one.switch) for one in known}, time.monotonic()
    methods = {one for one in {task.method for task in tasks()} if given.methods in one}
    models = Models()
    given.work.mkdir(parents=True, exist_ok=True)
    for number in range(given.videos):
        video = Video(models, number, given.work)
        for task in tasks():
            if task.method not in methods or (number, task.method, task.budget, task.switch) in done:
                continue
            if time.monotonic() - began > 60 * given.minutes:
                return
            small, large, quality, right = video.make(task)
            yield Result(
                number, **asdict(task), small=small, large=large, psnr=round(quality, 3), right=right
            )
        print(f"{number + 1} of {given.videos}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
