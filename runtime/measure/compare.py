"""Comparing presets with the full sampler on the same prompts and seeds.

Tensor legend: T frames, H, W height and width in pixels.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from runtime.engine import Engine
from runtime.files.atomic import whole_files
from runtime.files.checks import check_apart, check_suffix, check_writable
from runtime.files.kinds import COMPARISON, VIDEO
from runtime.forecasting.presets import Preset, load_preset
from runtime.jobs.job import inputs_of
from runtime.jobs.run import Progress, generate_shown
from runtime.media.mp4 import ColourWatch, Frames, FrameSink, Tee, mp4_encoder
from runtime.media.quality import Quality, RawVideo, compare_videos
from runtime.media.raw import check_room, raw_videos
from runtime.request.config import Config, is_path
from runtime.request.images import check_image
from runtime.request.video_request import VideoRequest
from runtime.sampling.plan import Plan
from runtime.sampling.result import Result
from runtime.versions import versions

FULL = "off"
_LABEL_HEIGHT = 16  # pixels above each video


@dataclass(frozen=True, slots=True)
class Compared:
    """One preset on one prompt and seed.

    Attributes:
        quality: against the full sampler; None for the full sampler itself.
        predicted, deviation: PSNR that the calibration predicts, and its standard deviation, dB.
    """

    prompt: str
    seed: int
    preset: str
    nfe: int
    steps: int
    denoise_seconds: float
    quality: Quality | None
    predicted: float | None = None
    deviation: float | None = None


@dataclass(slots=True)
class Comparison:
    """A comparison of presets over prompts and seeds: for each prompt, each seed, all presets.

    Attributes:
        presets: presets by name, the full sampler first; see `against_full`.
        requests: requests of the same size, without forecasts.
        out: the side-by-side mp4; the numbers are written beside it as JSON. None writes no files.
        results: what was measured, in the order in which it was made.
        warnings: sentences about what may have unintended effects.
    """

    config: Config
    presets: dict[str, Preset]
    requests: list[VideoRequest]
    out: Path | None = None
    overwrite: bool = False
    results: list[Compared] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    _engine: Engine | None = None

    def check(self, inputs: Mapping[Path, str]) -> None:
        """Check everything that can be checked before the model is loaded.

        Args:
            inputs: files to read, which must not be replaced → the option that names each.

        Raises:
            BadRequestError: a request, a preset or an output file is not acceptable.
        """
        first = self.requests[0]
        check_image(first.image)
        check_room(first, len(self.presets))
        for preset in self.presets.values():
            preset.check_request(self.config.windowed(first))
        if self.out is None:
            return
        check_suffix(self.out, ".mp4", field="out")
        read = inputs_of(self.config, first, self.presets[FULL]) | dict(inputs)
        read |= {Path(name): "preset" for name in self.presets if is_path(name)}
        read |= {file: "calibration" for one in self.presets.values() if (file := one.calibration_file)}
        check_apart(dict.fromkeys((self._numbers, self.out), "out"), read)
        for path, kind in ((self.out, VIDEO), (self._numbers, COMPARISON)):
            check_writable(path, overwrite=self.overwrite, kind=kind)

    def load(self) -> list[list[Plan]]:
        """Load the model and plan every video; see `plan`."""
        return self.plan(Engine(self.config))

    def plan(self, engine: Engine) -> list[list[Plan]]:
        """Plan every video on a loaded model: for each request, one plan of each preset.

        Raises:
            BadRequestError: the model is incomplete, or a request does not fit it.
        """
        self._engine = engine
        return [
            [
                engine.plan(request.model_copy(update={"spectrum": name}), preset)
                for name, preset in self.presets.items()
            ]
            for request in self.requests
        ]

    def run(self, plans: list[list[Plan]], progress: Progress) -> None:
        """Generate, measure, and write the side-by-side mp4 and the JSON.

        Args:
            plans: from `load` or `plan`.
        """
        if self._engine is None:
            raise RuntimeError("load() first")
        self._engine.warm_up(plans[0][0])
        with self._side_by_side() as sink:
            for of_request in plans:
                self._run_one(of_request, sink, progress)

    @property
    def _numbers(self) -> Path:
        """File of the numbers."""
        assert self.out is not None
        return self.out.with_suffix(".json")

    @contextmanager
    def _side_by_side(self) -> Iterator[FrameSink]:
        """Open the mp4, and write the numbers at the end; without one, frames are only measured."""
        if self.out is None:
            yield Tee()
            return
        width, height = self.requests[0].width * len(self.presets), self.requests[0].height + _LABEL_HEIGHT
        with whole_files([self._numbers, self.out], overwrite=self.overwrite) as (summary, video):
            with mp4_encoder(video, width=width, height=height, fps=self.config.fps) as sink:
                yield sink
            summary.write_text(json.dumps(self.summary(), indent=2) + "\n", encoding="utf-8")

    def _run_one(self, plans: Sequence[Plan], sink: FrameSink, progress: Progress) -> None:
        """Make all columns of one prompt and seed, compare them with the first, write them side by side."""
        assert self._engine is not None
        with raw_videos(plans[0].request, count=len(plans)) as raw:
            for plan, video, file in zip(plans, raw.videos, raw.files, strict=True):
                watch, request = ColourWatch(), plan.request
                result = generate_shown(self._engine, plan, [Tee(file, watch)], progress)
                raw.flush()
                name = f"{request.spectrum!r} of {request.prompt!r}, seed {request.seed},"
                self.warnings += [*result.warnings, *watch.warning(name)]
                quality = None if request.spectrum == FULL else compare_videos(video, raw.videos[0])
                self.results.append(_compared(result, quality))
            sink.write(side_by_side(raw.videos, list(self.presets)))

    def rows(self) -> list[dict[str, Any]]:
        """Return one row per preset, with means over prompts and seeds."""
        full_seconds = _mean(r.denoise_seconds for r in self.results if r.preset == FULL)
        rows = []
        for preset in self.presets:
            own = [r for r in self.results if r.preset == preset]
            qualities = [r.quality for r in own if r.quality is not None]
            seconds = _mean(r.denoise_seconds for r in own)
            rows.append(
                {
                    "preset": preset,
                    "nfe": _mean(r.nfe for r in own),
                    "steps": own[0].steps,
                    "denoise_seconds": seconds,
                    "speedup": full_seconds / seconds,
                    "predicted": _mean_of_known([r.predicted for r in own]),
                    "psnr": _mean(q.psnr for q in qualities) if qualities else None,
                    "ssim": _mean(q.ssim for q in qualities) if qualities else None,
                    "vmaf": _mean(q.vmaf or 0.0 for q in qualities) if _have_vmaf(qualities) else None,
                }
            )
        return rows

    def summary(self) -> dict[str, Any]:
        """Return everything that was measured, as the JSON file has it."""
        assert self._engine is not None
        return {
            "schema": 1,
            "model": {"name": self._engine.model.name, "revision": self._engine.model.revision},
            "rows": self.rows(),
            "results": [asdict(result) for result in self.results],
            "warnings": self.warnings,
            "versions": versions(),
        }


def against_full(presets: Sequence[str]) -> dict[str, Preset]:
    """Load presets by name, the full sampler first.

    Raises:
        BadRequestError: there is no such preset, or it is not valid.
    """
    return {name: load_preset(name) for name in (FULL, *presets)}


def side_by_side(videos: Sequence[RawVideo], labels: Sequence[str]) -> Frames:
    """Join videos side by side under their labels: `[T, H + label, W · columns, 3]`, uint8."""
    body = np.concatenate([video.frames() for video in videos], axis=2)
    strip = np.concatenate(
        [_label(text, video.width) for text, video in zip(labels, videos, strict=True)], axis=1
    )
    header = np.broadcast_to(strip, (body.shape[0], *strip.shape))
    return np.concatenate([header, body], axis=1)


def _label(text: str, width: int) -> Frames:
    image = Image.new("RGB", (width, _LABEL_HEIGHT), "white")
    name = "full sampler" if text == FULL else Path(text).stem
    ImageDraw.Draw(image).text((3, 2), name, fill="black", font=ImageFont.load_default(10))
    return np.asarray(image)


def _compared(result: Result, quality: Quality | None) -> Compared:
    request = result.plan.request
    return Compared(
        prompt=request.prompt,
        seed=request.seed,
        preset=request.spectrum,
        nfe=result.nfe,
        steps=len(result.steps),
        denoise_seconds=result.seconds.denoise,
        quality=quality,
        predicted=result.expectation.psnr,
        deviation=result.expectation.deviation,
    )


def _have_vmaf(qualities: Sequence[Quality]) -> bool:
    return bool(qualities) and all(q.vmaf is not None for q in qualities)


def _mean_of_known(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return _mean(known) if known else None


def _mean(values: Iterable[float]) -> float:
    return statistics.fmean(values)
