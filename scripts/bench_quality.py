"""Quality at equal evaluations: Lockstep's presets, fewer steps, Spectrum as published, and other caches.

    python scripts/bench_quality.py --results docs/quality.jsonl --out docs/quality.md

Prompts and seeds that no calibration has seen, each made by every method and measured against the frames of
the full sampler; settings of wan-tiny, and wan2.2-tiny with its two experts, each with a calibration of its
own. The prompts of the first three settings occur in no earlier table either; those of the others were seen
while the methods were made. Every result is one line of JSON. The script may be stopped at any time and
resumes after the existing results; `--part` measures some of the methods first. An evaluation covers both
branches.
"""

from __future__ import annotations

import argparse
import json
import logging
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
import yaml
from peers import PeerPipeline, methods
from quality_tables import BEST, EXPERTS, FITTED, PEERS, PLACED, write_document
from rich.console import Console
from wan_tiny_prompts import of_experts, of_quality

from launch.commands.calibrate import plan_calibration, run_calibration
from runtime.engine import Engine
from runtime.forecasting.calibration import load_calibration
from runtime.media.mp4 import FrameBuffer, Frames
from runtime.media.quality import Quality, RawVideo, compare_videos
from runtime.request.config import Config, load_config
from runtime.request.sampler import SamplerConfig
from runtime.request.video_request import VideoRequest
from spectrum import StepKind, paper_schedule

PROMPTS = 32
FEW_PROMPTS = 16  # of settings beside the first
SEEN = 24  # of prompts that occur in older tables
BUDGETS = (5, 6, 7, 8, 10, 12, 14, 18, 25)
FEW_BUDGETS = (8, 10, 14)
EXPERTS_BUDGETS = (7, 8, 10, 12, 14)
PEER_BUDGETS = (7, 12)  # what SeaCache comes to with two experts, for which fewer methods are measured
SAMPLER_BUDGETS = (8, 10, 14, 25)  # where other samplers with fewer steps are measured
SAMPLERS = {"Euler": "euler", "DPM++": "dpm++"}
ABLATED = (8, 10, 14)  # where parts of the method are measured alone, and the guard, on older videos
FIRST_SEED = 50_000
PARTS = ("ours", "others", "peers")
NOTES = Path(__file__).with_name("quality_notes.md")  # what was tried, and what the tables say
CALIBRATIONS = Path("out/quality-calibrations").resolve()  # presets would read it as relative to their file


@dataclass(frozen=True, slots=True)
class Setting:
    """A model and a sampler with its settings.

    Attributes:
        name: name in the document.
        peers: whether other caches are measured as well.
        prompts: number of videos.
        model: config of the model.
        shipped: whether its calibration is the shipped one of this model.
        seen: whether its prompts occur in older tables.
    """

    name: str
    steps: int
    guidance: float
    scheduler: SamplerConfig
    budgets: tuple[int, ...]
    peers: bool
    prompts: int = PROMPTS
    model: str = "wan-tiny"
    shipped: bool = False
    seen: bool = False

    def config(self) -> Config:
        return load_config(self.model).model_copy(update={"scheduler": self.scheduler})

    def request(self, number: int) -> VideoRequest:
        """Request with the prompt and seed of this number."""
        prompt, seed = of_quality()[number], FIRST_SEED + number
        if self.seen:
            prompt, seed = of_experts()[number], number
        return self.config().request(
            prompt, seed=seed, steps=self.steps, guidance=self.guidance, spectrum="off"
        )

    @property
    def calibration(self) -> str:
        """Name or path of its calibration."""
        return self.model if self.shipped else str(CALIBRATIONS / f"{self.name.replace(' ', '-')}.json")


SETTINGS = (
    Setting("50 UniPC steps, shift 3, guidance 5", 50, 5.0, SamplerConfig(), BUDGETS, True, shipped=True),
    Setting(
        "30 UniPC steps, shift 5, guidance 3",
        30,
        3.0,
        SamplerConfig(kind="unipc", shift=5.0),
        FEW_BUDGETS,
        False,
        FEW_PROMPTS,
    ),
    Setting(
        "50 Euler steps, shift 3, guidance 5",
        50,
        5.0,
        SamplerConfig(kind="euler", shift=3.0),
        FEW_BUDGETS,
        False,
        FEW_PROMPTS,
    ),
    Setting(
        "wan2.2-tiny, 50 UniPC steps, shift 12, guidance 5",
        50,
        5.0,
        SamplerConfig(),
        EXPERTS_BUDGETS,
        True,
        SEEN,
        model=EXPERTS,
        shipped=True,
        seen=True,
    ),
    Setting(
        "50 UniPC steps, shift 3, guidance 5, videos of older tables",
        50,
        5.0,
        SamplerConfig(),
        BUDGETS,
        True,
        SEEN,
        shipped=True,
        seen=True,
    ),
)
USUAL = (SETTINGS[0], SETTINGS[4])


@dataclass(frozen=True, slots=True)
class Result:
    """Result of one method on one prompt and seed; `predicted` is the PSNR that the report expected."""

    setting: str
    number: int
    method: str
    budget: int
    nfe: float
    psnr: float
    ssim: float | None = None
    vmaf: float | None = None
    predicted: float | None = None
    deviation: float | None = None
    bytes: int = 0


def presets(setting: Setting, budget: int) -> dict[str, dict[str, Any]]:
    """Make the presets for one budget, by the name of the method."""
    own = setting.calibration
    schedule = {"kind": "explicit", "computed": paper_steps(setting.steps, budget)}
    ridge, half = {"kind": "chebyshev"}, {"kind": "chebyshev", "blend": 0.5}
    guided = {"stream": "guided", "schedule": schedule, "predictor": half}
    calibrated = {"stream": "guided", "predictor": {"kind": "calibrated"}, "calibration": own}
    tolerance = {"tolerance": 0.05, "warmup": min(4, budget), "longest": 10, "budget": budget}
    planned = {"kind": "planned", "nfe": budget}
    found = {
        "Spectrum (paper), w = 1": {"stream": "feature", "schedule": schedule, "predictor": ridge},
        "Spectrum (paper), w = 0.5": {"stream": "feature", "schedule": schedule, "predictor": half},
        "guided, error-driven": guided | {"schedule": {"kind": "error"} | tolerance},
        BEST: calibrated | {"schedule": planned | {"guard": None}},
    }
    if setting.model == EXPERTS or (setting.seen and budget in ABLATED):
        found |= {
            "guided, w = 0.5": guided,
            "guided, calibrated weights": calibrated | {"schedule": schedule},
        }
    if setting.model == EXPERTS:
        carried, fresh = ({"switch": {"history": history}} for history in ("carried", "fresh"))
        found["guided, w = 0.5, carried"] = guided | carried
        found[f"{BEST}, fresh"] = found[BEST] | fresh
    if budget in {fit.nfe for fit in load_calibration(own).fits}:
        found[FITTED] = calibrated | {"schedule": {"kind": "fitted", "nfe": budget}}
    if setting in USUAL and setting.seen and budget in ABLATED:
        found[f"{BEST}, watched"] = calibrated | {"schedule": planned}
    return found


def measured(setting: Setting, budget: int) -> list[str]:
    """Name the presets that are measured for one budget."""
    few = setting.model == EXPERTS and budget in PEER_BUDGETS
    return [name for name in presets(setting, budget) if not few or name in (BEST, FITTED)]


def part_of(method: str) -> str:
    """Tell to which of the parts a method belongs."""
    if method.startswith(PEERS):
        return "peers"
    return "ours" if method in (BEST, FITTED, "fewer steps", PLACED) else "others"


def paper_steps(steps: int, budget: int) -> list[int]:
    """Steps of the paper's rule with the growth closest to `budget` computed steps, cut or filled to it."""
    warmup = 5 if budget >= 10 else 3
    found = min(
        (
            paper_schedule(steps, warmup=warmup, alpha=alpha).computed
            for alpha in (0.75, 3.0, *(number / 20 for number in range(200)))
        ),
        key=lambda computed: abs(len(computed) - budget),
    )
    return list(found)


Made = tuple[Frames, float, dict[str, Any]]
"""Frames, evaluations, and further fields of the result."""


class Worker:
    """Worker process that makes and measures videos."""

    def __init__(self, folder: Path):
        torch.set_num_threads(1)
        self._folder = folder
        self._peer: PeerPipeline | None = None
        self._engines: dict[str, Engine] = {}

    def _engine(self, setting: Setting) -> Engine:
        if setting.name not in self._engines:
            self._engines[setting.name] = Engine(setting.config())
        return self._engines[setting.name]

    def run(self, setting: Setting, number: int, part: str, done: set[str]) -> Iterator[Result]:
        """Run all methods, or those of `part`, that are not in `done` on one prompt and seed."""
        request = setting.request(number)
        todo = {
            key: make
            for key, make in self._methods(setting, request).items()
            if key not in done and part in ("", part_of(key.rpartition("@")[0]))
        }
        if not todo:
            return
        with self._reference(setting, request) as measure:
            for key, make in todo.items():
                method, _, budget = key.rpartition("@")
                try:
                    frames, nfe, more = make()
                except Exception as error:  # a method that fails is a result, too
                    print(f"{key}: failed: {error!r}", file=sys.stderr)
                    if self._peer is not None:
                        self._peer.load()
                    continue
                quality = measure(frames)
                yield Result(
                    setting.name,
                    number,
                    method,
                    int(budget),
                    nfe,
                    quality.psnr,
                    quality.ssim,
                    quality.vmaf,
                    **more,
                )

    def _methods(self, setting: Setting, request: VideoRequest) -> dict[str, Callable[[], Made]]:
        found: dict[str, Callable[[], Made]] = {}
        for budget in setting.budgets:
            for method in measured(setting, budget):
                found[f"{method}@{budget}"] = lambda m=method, b=budget: self._ours(
                    setting, request, self._preset(setting, request, m, b)
                )
            found[f"fewer steps@{budget}"] = lambda b=budget: self._fewer(setting, request, b)
            if setting in USUAL:
                found[f"{PLACED}@{budget}"] = lambda b=budget: self._placed(setting, request, b)
                for name, kind in SAMPLERS.items() if budget in SAMPLER_BUDGETS else ():
                    other = replace(setting, name=name, scheduler=SamplerConfig(kind=kind, shift=3.0))
                    found[f"fewer steps ({name})@{budget}"] = lambda o=other, b=budget: self._fewer(
                        o, request, b
                    )
        if setting.peers:
            for name, run in methods(few=setting.model == EXPERTS).items():
                found[f"{name}@0"] = lambda run=run: self._peers(setting, request, run)
        return found

    def _preset(self, setting: Setting, request: VideoRequest, method: str, budget: int) -> dict[str, Any]:
        """Make the preset of a method that computes `budget` steps, those after a switch included."""
        for number in range(budget, 1, -1):
            preset = presets(setting, number)[method]
            if preset["schedule"]["kind"] == "error":  # it decides while it runs
                return preset
            plan = self._engine(setting).plan(self._with(request, preset))
            if plan.kinds[: plan.steps].count(StepKind.COMPUTE) <= budget:
                return preset
        raise ValueError(f"{method} cannot compute {budget} steps")

    def _ours(self, setting: Setting, request: VideoRequest, preset: dict[str, Any]) -> Made:
        sink = FrameBuffer()
        made = self._engine(setting).generate(self._with(request, preset), [sink])
        known = made.expectation
        more = {"predicted": known.psnr, "deviation": known.deviation, "bytes": made.forecaster_bytes}
        return sink.frames, float(made.nfe), more

    def _with(self, request: VideoRequest, preset: dict[str, Any]) -> VideoRequest:
        """Write a preset's file, and name it in the request."""
        path = self._folder / f"preset-{os.getpid()}.yaml"
        path.write_text(yaml.safe_dump(preset))
        return request.model_copy(update={"spectrum": str(path)})

    def _fewer(self, setting: Setting, request: VideoRequest, budget: int) -> Made:
        sink = FrameBuffer()
        self._engine(setting).generate(request.model_copy(update={"steps": budget}), [sink])
        return sink.frames, float(budget), {}

    def _placed(self, setting: Setting, request: VideoRequest, budget: int) -> Made:
        """Run the sampler with its steps at the planned noise levels, and nothing forecast."""
        engine = self._engine(setting)
        planned = load_calibration(setting.calibration).planner("guided").plan(budget)
        profile = engine.profile
        fresh = profile.fresh_sampler

        def placed(asked: VideoRequest, device: torch.device | None = None) -> Any:
            sampler = fresh(asked.model_copy(update={"steps": setting.steps}), device)
            kept = list(planned.computed)
            sampler.sigmas = torch.cat([sampler.sigmas[kept], sampler.sigmas[-1:]])
            sampler.timesteps = sampler.timesteps[kept]
            sampler.num_inference_steps = len(kept)
            return sampler

        profile.fresh_sampler = placed  # type: ignore[method-assign]
        try:
            sink = FrameBuffer()
            engine.generate(request, [sink])
        finally:
            profile.fresh_sampler = fresh  # type: ignore[method-assign]
        return sink.frames, float(budget), {}

    def _peers(
        self, setting: Setting, request: VideoRequest, run: Callable[..., tuple[Frames, float]]
    ) -> Made:
        if self._peer is None:
            self._peer = PeerPipeline(setting.config())
        frames, nfe = run(self._peer, request)
        return frames, nfe, {}

    @contextmanager
    def _reference(self, setting: Setting, request: VideoRequest) -> Iterator[Callable[[Frames], Quality]]:
        """Frames of the full sampler, against which others are measured."""
        sink = FrameBuffer()
        self._engine(setting).generate(request, [sink])
        truth = RawVideo(self._folder / f"truth-{os.getpid()}.rgb", request.width, request.height)
        other = RawVideo(self._folder / f"other-{os.getpid()}.rgb", request.width, request.height)
        truth.path.write_bytes(sink.frames.tobytes())

        def measure(frames: Frames) -> Quality:
            other.path.write_bytes(frames.tobytes())
            return compare_videos(other, truth)

        yield measure


def settings_named(text: str) -> list[Setting]:
    """Find the setting of this name, or those whose names have this text."""
    return [setting for setting in SETTINGS if setting.name == text] or [
        setting for setting in SETTINGS if text in setting.name
    ]


def calibrate(settings: list[Setting]) -> None:
    """Make the calibrations that are missing."""
    for setting in settings:
        out = Path(setting.calibration)
        if setting.shipped or out.is_file():
            continue
        out.parent.mkdir(parents=True, exist_ok=True)
        job = plan_calibration(
            setting.model,
            prompts=None,
            seed=1000,
            out=out,
            overwrite=True,
            budgets=setting.budgets,
            steps=setting.steps,
            guidance=setting.guidance,
        )
        run_calibration(job, Console(stderr=True), engine=Engine(setting.config()))


def work(arguments: tuple[int, str, int, str, list[str], str]) -> list[dict[str, Any]]:
    """Run all methods on one prompt and seed of one setting, in a process of its own."""
    index, results, number, part, done, folder = arguments
    logging.disable(logging.INFO)
    worker = _worker(folder)
    found = []
    for result in worker.run(SETTINGS[index], number, part, set(done)):
        with Path(results).open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(result)) + "\n")
        found.append(asdict(result))
    return found


@cache
def _worker(folder: str) -> Worker:
    return Worker(Path(folder))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--results", type=Path, default=Path("docs/quality.jsonl"))
    parser.add_argument("--out", type=Path, default=Path("docs/quality.md"))
    parser.add_argument("--prompts", type=int, default=PROMPTS)
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument(
        "--setting", default="", help="Measure the setting of this name, or those whose names have it."
    )
    parser.add_argument("--part", choices=PARTS, default="", help="Measure only these methods.")
    parser.add_argument("--write-only", action="store_true", help="Write the document from what is there.")
    given = parser.parse_args()
    for folder in (given.results.parent, CALIBRATIONS):
        folder.mkdir(parents=True, exist_ok=True)
    if not given.write_only:
        settings = settings_named(given.setting)
        calibrate(settings)
        lines = given.results.read_text().splitlines() if given.results.is_file() else []
        known = [json.loads(line) for line in lines]
        tasks = []
        for setting in settings:
            for number in range(min(given.prompts, setting.prompts)):
                done = [
                    f"{r['method']}@{r['budget']}"
                    for r in known
                    if r["setting"] == setting.name and r["number"] == number
                ]
                tasks.append(
                    (SETTINGS.index(setting), str(given.results), number, given.part, done, str(CALIBRATIONS))
                )
        began = time.monotonic()
        with multiprocessing.get_context("spawn").Pool(given.processes) as pool:
            for count, made in enumerate(pool.imap_unordered(work, tasks), 1):
                seconds = time.monotonic() - began
                print(
                    f"{count} of {len(tasks)}: {len(made)} results, {seconds:.0f} s",
                    file=sys.stderr,
                    flush=True,
                )
    results = [asdict(Result(**json.loads(line))) for line in given.results.read_text().splitlines()]
    write_document(results, given.out, NOTES)


if __name__ == "__main__":
    main()
