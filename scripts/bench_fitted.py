"""Fitted solvers against planned forecasts, on prompts and seeds that no calibration and no table has seen.

    python scripts/bench_fitted.py --results out/fitted.jsonl                    # the shipped calibration
    python scripts/bench_fitted.py --calibration mine.json --results mine.jsonl  # another one of wan-tiny

Every video is made by the full sampler, and by each method for each number of computed steps that the
calibration has a solver for. Each result is a line of JSON; stopped at any time, the script resumes after the
existing ones. `--minutes` ends it by itself. The table is printed whenever it ends.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
import yaml
from wan_tiny_prompts import of_fits

from runtime.engine import Engine
from runtime.forecasting.calibration import is_file_name, load_calibration
from runtime.forecasting.methods import Choice, Methods
from runtime.media.mp4 import FrameBuffer, Frames
from runtime.media.quality import psnr
from runtime.request.config import load_config
from runtime.request.video_request import VideoRequest

_Result = TypeVar("_Result")
FIRST_SEED = 30_000


@dataclass(frozen=True, slots=True)
class Result:
    """One video by one method; `expected` and `deviation` are what its report would say."""

    number: int
    prompt: str
    seed: int
    method: str
    nfe: int
    psnr: float
    expected: float | None
    deviation: float | None


class Bench:
    """Makes and measures videos.

    Args:
        name: name or file of the calibration.
        folder: where presets are written.
    """

    def __init__(self, name: str, folder: Path):
        self.calibration, self._folder = load_calibration(name), folder
        self._name = str(Path(name).absolute()) if is_file_name(name) else name
        self._methods = Methods(self.calibration)
        self._engine = Engine(load_config("wan-tiny"))

    def videos(self, count: int) -> list[VideoRequest]:
        conditions = self.calibration.conditions
        return [
            self._engine.config.request(
                prompt,
                seed=FIRST_SEED + number,
                steps=conditions.steps,
                guidance=conditions.guidance,
                width=conditions.width,
                height=conditions.height,
                frames=conditions.frames,
                spectrum="off",
            )
            for number, prompt in enumerate(of_fits(self.calibration.prompts)[:count])
        ]

    def choices(self) -> list[Choice]:
        """Every method for every number of computed steps with a solver."""
        return [one for fit in self.calibration.fits for one in self._methods.all(fit.nfe)]

    def run(self, number: int, request: VideoRequest, done: set[tuple[str, int]]) -> Iterator[Result]:
        """Make one video by every method that is not `done`."""
        left = [one for one in self.choices() if (one.method, one.plan.nfe) not in done]
        if not left:
            return
        truth = self._made(request)[0]
        for one in left:
            preset = one.preset | {"calibration": self._name}
            if one.method == "planned":
                preset["schedule"] = {"kind": "planned", "nfe": one.plan.nfe, "guard": None}
            path = self._folder / f"{one.method}-{one.plan.nfe}.yaml"
            path.write_text(yaml.safe_dump(preset))
            frames, expected, deviation = self._made(request.model_copy(update={"spectrum": str(path)}))
            quality = psnr(frames, truth)
            yield Result(
                number, request.prompt, request.seed, one.method, one.plan.nfe, quality, expected, deviation
            )

    def _made(self, request: VideoRequest) -> tuple[Frames, float | None, float | None]:
        sink = FrameBuffer()
        known = self._engine.generate(request, [sink]).expectation
        return sink.frames, known.psnr, known.deviation


def table(results: list[Result]) -> str:
    """Mean and tail of each method, the paired difference to planned, and whether expectations held."""
    found: dict[tuple[int, str], dict[int, Result]] = defaultdict(dict)
    for one in results:
        found[one.nfe, one.method][one.number] = one
    heads = ("NFE", "method", "videos", "mean", "10th percentile", "worst", "against planned", "better")
    heads += ("expected − measured", "within 2 deviations")
    rows = [heads, ("---",) * len(heads)]
    for (nfe, method), videos in sorted(found.items()):
        psnrs = np.array([one.psnr for one in videos.values()])
        both = sorted(videos.keys() & found[nfe, "planned"].keys())
        gains = np.array([videos[n].psnr - found[nfe, "planned"][n].psnr for n in both])
        against = better = ""
        if method != "planned" and len(gains) > 1:
            against = f"{gains.mean():+.1f} ± {gains.std(ddof=1) / math.sqrt(len(gains)):.1f}"
            better = f"{int((gains > 0).sum())} of {len(gains)}"
        graded = (f"{psnrs.mean():.1f}", f"{np.percentile(psnrs, 10):.1f}", f"{psnrs.min():.1f}")
        rows.append((str(nfe), method, str(len(psnrs)), *graded, against, better, *_kept_word(videos)))
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _kept_word(videos: dict[int, Result]) -> tuple[str, str]:
    """How far what was expected was from what was measured, and how often within two deviations."""
    told = [
        (one.expected - one.psnr, one.deviation)
        for one in videos.values()
        if one.expected is not None and one.deviation is not None
    ]
    if not told:
        return "", ""
    held = [abs(off) <= 2 * deviation for off, deviation in told]
    return f"{np.mean([off for off, _ in told]):+.1f}", f"{100 * np.mean(held):.0f} %"


def results_in(path: Path, kind: Callable[..., _Result]) -> list[_Result]:
    """Read the results so far, a line of JSON each; the file is made if there is none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    return [kind(**json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--calibration", default="wan-tiny")
    parser.add_argument("--results", type=Path, default=Path("out/fitted.jsonl"))
    parser.add_argument("--videos", type=int, default=32)
    parser.add_argument("--minutes", type=float, default=math.inf, help="End after so many minutes.")
    given = parser.parse_args()
    logging.disable(logging.INFO)
    torch.set_num_threads(1)
    results = results_in(given.results, Result)
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder, given.results.open("a", encoding="utf-8") as log:
        bench = Bench(given.calibration, Path(folder))
        for number, request in enumerate(bench.videos(given.videos)):
            if time.monotonic() - began > 60 * given.minutes:
                break
            done = {(one.method, one.nfe) for one in results if one.number == number}
            for result in bench.run(number, request, done):
                results.append(result)
                log.write(json.dumps(asdict(result), ensure_ascii=False) + "\n")
                log.flush()
            spent = time.monotonic() - began
            print(f"video {number + 1} of {given.videos}, {spent:.0f} s", file=sys.stderr, flush=True)
    print(table(results))


if __name__ == "__main__":
    main()
