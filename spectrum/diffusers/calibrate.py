"""Calibration of a pipeline: full runs, nudged runs and trials, made through the pipeline's own call.

A pipeline can only be run from its beginning. A nudged run therefore returns what the full run's transformer
returned, up to the nudge: these steps cost nothing, and their latents are the same to the bit.

Legend: n steps.
"""

from __future__ import annotations

import hashlib
import json
import math
import platform
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.utils.logging import tqdm
from numpy.typing import NDArray

from spectrum.calibrated import surprise
from spectrum.calibration import (
    LEAST_STEPS,
    LEAST_VIDEOS,
    Findings,
    gram_of,
    norm,
    nudged_steps,
    sample,
    trial_budgets,
)
from spectrum.diffusers.conditions import (
    TRANSFORMERS,
    noise_levels,
    of_guidance,
    of_pipeline,
    transformers_of,
)
from spectrum.diffusers.kept import Kept, Runs, write_whole
from spectrum.diffusers.plans import planned_preset
from spectrum.diffusers.switch import disable, enable, is_enabled, report
from spectrum.diffusers.taps import Tap
from spectrum.planner import MAX_STEPS

_OURS = ("prompt", "generator", "output_type", "num_inference_steps", "return_dict", "num_images_per_prompt")
_LIBRARIES = ("torch", "diffusers", "transformers", "numpy")
_EQUAL = 100.0  # PSNR of equal images, dB


def calibrate(
    pipeline: Any,
    prompts: Sequence[str],
    out: str | PathLike[str],
    *,
    steps: int = 50,
    seed: int = 0,
    overwrite: bool = False,
    progress: bool = True,
    **call: Any,
) -> Path:
    """Measure a pipeline on some prompts, and write a calibration file for `plan`.

    Every finished prompt is kept in a file beside the result, named `….partial`: the same call resumes after
    an interruption.

    Args:
        pipeline: a pipeline of diffusers, on which Spectrum is not enabled. Of several transformers one
            after the other is to compute each step, as Wan2.2's two do.
        prompts: at least two, unlike each other; four to six are often enough.
        out: the file to write, JSON.
        steps: number of steps of the sampler.
        seed: seed of the first prompt's noise; each further prompt takes the next one.
        overwrite: whether `out`, and finished runs of another calibration, may be replaced.
        progress: whether to show a bar on stderr.
        call: further arguments of the pipeline, such as `guidance_scale`, `height` and `width`.

    Returns:
        The path of the file.

    Raises:
        ValueError: an argument is not valid, or another process makes the file; nothing was computed then. Or
            the first run shows steps or noise levels that cannot be calibrated.
        OSError: a file cannot be written; what was kept before stays, and the same call resumes.

    Example:
        >>> calibrate(pipe, PROMPTS, "flux.json", steps=50, guidance_scale=3.5)  # doctest: +SKIP
        >>> enable(pipe, plan("flux.json", nfe=12))  # doctest: +SKIP
    """
    path = Path(out)
    _check(pipeline, prompts, path, steps, call)
    calibrator = _Calibrator(pipeline, prompts, steps, seed, call)
    kept = Kept(path.with_name(path.name + ".partial"), calibrator.identity)
    with kept.alone():
        if path.exists() and not overwrite:
            raise ValueError(f"out: {str(path)!r} exists; give another name, or overwrite=True")
        calibrator.runs = kept.read(overwrite=overwrite) or calibrator.runs
        with _quiet(pipeline), tqdm(total=calibrator.evaluations, disable=not progress, unit="eval") as bar:
            calibrator.run(kept, bar)
        write_whole(path, (json.dumps(calibrator.content()) + "\n").encode())
        kept.remove()
    return path


class _Calibrator:
    """Makes the runs of one calibration that are left to do; `runs` are the finished ones."""

    def __init__(self, pipeline: Any, prompts: Sequence[str], steps: int, seed: int, call: Mapping[str, Any]):
        self._pipeline, self._prompts, self._steps = pipeline, list(prompts), steps
        self._seed, self._call = seed, call
        self._pipeline_conditions = of_pipeline(pipeline)
        self.runs = Runs(Findings(), [], {})

    @property
    def evaluations(self) -> int:
        """Number of evaluations of the runs that are left to do."""
        videos, budgets = range(len(self._prompts)), trial_budgets(self._steps)
        full = sum(
            self._steps + sum(self._steps - step - 1 for step in nudged_steps(video, self._steps))
            for video in videos[len(self.runs.found.grams) :]
        )
        return full + sum(budgets) * (len(videos) - len(self.runs.found.trials) // len(budgets))

    def run(self, kept: Kept, bar: Any) -> None:
        """Make the runs; each prompt's is kept when it is done."""
        for video in range(len(self.runs.found.grams), len(self._prompts)):
            self._full(video, bar)
            kept.write(self.runs)
        budgets = trial_budgets(self._steps)
        for video in range(len(self.runs.found.trials) // len(budgets), len(self._prompts)):
            self._try(video, bar)
            kept.write(self.runs)

    def content(self) -> dict[str, Any]:
        """Content of the calibration file."""
        conditions = self._pipeline_conditions | self.runs.told["conditions"]
        content = self.runs.found.content(conditions, self.runs.told["levels"], ranks=1)
        own = {"lockstep": _version("lockstep-video"), "python": platform.python_version()}
        return content | {
            "prompts": self._prompts,
            "seeds": [self._seed + video for video in range(len(self._prompts))],
            "versions": own | {name: _version(name) for name in _LIBRARIES},
        }

    def _full(self, video: int, bar: Any) -> None:
        """Make one full run, and its nudged runs."""
        name = f"prompt {video + 1} of {len(self._prompts)}"
        bar.set_description(name)
        tap = Tap(keeps_outputs=True)
        pictures = self._generate(video, tap, bar, self._steps)
        self._note(tap, pictures)
        levels = self.runs.told["levels"]
        for step in nudged_steps(video, self._steps):
            bar.set_description(f"{name}, nudged at {step}")
            other = Tap(replayed=tap.steps, nudged=step)
            self._generate(video, other, bar, self._steps - step - 1, output_type="latent")
            moved = abs(levels[step] - levels[step + 1]) * other.moved
            self.runs.found.add_gain(step, norm(other.final - tap.final), moved)
            if step + 1 < self._steps:
                after, before = other.steps[step + 1], tap.steps[step + 1]
                velocity = norm(after.velocity - before.velocity)
                self.runs.found.add_response(step + 1, velocity, norm(after.latents - before.latents))

    def _note(self, tap: Tap, pictures: NDArray[np.uint8]) -> None:
        """Note what a full run has shown.

        Raises:
            ValueError: the run is not of a kind that can be calibrated.
        """
        calls = {len(step.outputs) for step in tap.steps}
        levels = noise_levels(self._pipeline.scheduler)
        if len(tap.steps) != self._steps or len(levels) != self._steps + 1 or len(calls) != 1:
            raise ValueError(
                f"{type(self._pipeline).__name__}: {len(tap.steps)} steps with {sorted(calls)} calls of the "
                f"transformer and {len(levels)} noise levels; a calibration needs {self._steps} steps of "
                f"equally many calls, and a scheduler with a noise level for each"
            )
        guided = [sample(step.velocity) for step in tap.steps]
        branches = [[sample(step.outputs[call][0]) for step in tap.steps] for call in range(*calls)]
        grams = {
            "velocity": np.sum([gram_of(values) for values in branches], axis=0),
            "guided": gram_of(guided),
        }
        start = sample(tap.steps[0].latents).to(guided[0].dtype)
        self.runs.found.add_run(grams, gram_of([start, *guided]), norm(sample(tap.final)))
        self.runs.found.computed += [step.seconds for step in tap.steps]
        self.runs.found.latents.append(tap.final)
        self.runs.pictures.append(pictures)
        if not self.runs.told:
            height, width = pictures.shape[-3:-1]
            frames = pictures.shape[0] if pictures.ndim == 4 else 1
            size = {"width": width, "height": height, "frames": frames, "latents": tap.final.numel()}
            told = {"steps": self._steps} | of_guidance(self._pipeline) | size
            self.runs.told = {"conditions": told, "levels": levels}

    def _try(self, video: int, bar: Any) -> None:
        """Make one image with schedules for several budgets, planned from all the others."""
        bar.set_description(f"trials of prompt {video + 1} of {len(self._prompts)}")
        predictor, planner = self.runs.found.without(video, self.runs.told["levels"])
        final = self.runs.found.latents[video]
        done: list[dict[str, Any]] = []
        seconds: list[float] = []
        for nfe in trial_budgets(self._steps):
            planned = planner.plan(nfe)
            tap = Tap()
            enable(self._pipeline, planned_preset("trial", planned, predictor))
            try:
                pictures = self._generate(video, tap, bar, nfe)
                told, *_ = report(self._pipeline).values()  # experts have the same
            finally:
                disable(self._pipeline)
            seconds += [tap.steps[step].seconds for step in told.forecast]
            done.append(
                {
                    "video": video,
                    "nfe": nfe,
                    "expected": planned.error,
                    "surprise": surprise(told.errors, planned.expected),
                    "measured": norm(tap.final - final) / norm(final),
                    "psnr": _psnr(pictures, self.runs.pictures[video]),
                }
            )
        self.runs.found.trials += done
        self.runs.found.forecast += seconds

    def _generate(
        self, video: int, tap: Tap, bar: Any, evaluations: int, output_type: str = "np"
    ) -> NDArray[np.uint8]:
        """Make one image or video, `[…, height, width, 3]`; empty if it is not decoded."""
        with tap.on(self._pipeline), torch.no_grad():
            result = self._pipeline(
                prompt=self._prompts[video],
                generator=torch.Generator("cpu").manual_seed(self._seed + video),
                num_inference_steps=self._steps,
                output_type=output_type,
                return_dict=False,
                **self._call,
            )[0]
        bar.update(evaluations)
        if output_type == "latent":
            return np.empty(0, np.uint8)
        pictures: NDArray[np.uint8] = np.rint(np.clip(result[0], 0.0, 1.0) * 255.0).astype(np.uint8)
        return pictures

    @property
    def identity(self) -> str:
        """Digest of everything that the runs depend on."""
        call = {name: _told(value) for name, value in sorted(self._call.items())}
        parts = [self._pipeline_conditions, self._prompts, self._steps, self._seed, call]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _check(pipeline: Any, prompts: Sequence[str], path: Path, steps: int, call: Mapping[str, Any]) -> None:
    """Refuse what cannot be calibrated, before anything is computed."""
    name, transformers = type(pipeline).__name__, transformers_of(pipeline)
    if not transformers or getattr(pipeline, "scheduler", None) is None:
        said = "no scheduler" if transformers else f"none of {', '.join(TRANSFORMERS)}"
        raise ValueError(f"{name} has {said}; a calibration needs both")
    if getattr(pipeline, "vae", None) is None:
        raise ValueError(f"{name} has no VAE; the quality of forecasts is measured on pictures")
    if is_enabled(pipeline) or any(getattr(one, "is_cache_enabled", False) for one in transformers.values()):
        raise ValueError(f"{name}: a cache is enabled; call disable(...) or disable_cache() first")
    if isinstance(prompts, str) or len(prompts) < LEAST_VIDEOS:
        given = "one text" if isinstance(prompts, str) else len(prompts)
        raise ValueError(f"prompts: {given} given; a calibration needs a list of at least {LEAST_VIDEOS}")
    if not LEAST_STEPS <= steps <= MAX_STEPS:
        raise ValueError(f"steps: {steps} given; calibrations have {LEAST_STEPS} to {MAX_STEPS} steps")
    if ours := [one for one in _OURS if one in call]:
        raise ValueError(f"{', '.join(ours)}: calibrate(...) gives the pipeline these arguments itself")
    if path.suffix != ".json":
        raise ValueError(f"out: {str(path)!r} given; a calibration is a .json file")
    if path.is_dir():
        raise ValueError(f"out: {str(path)!r} is a folder; give the name of a file")
    if not path.parent.is_dir():
        raise ValueError(f"out: the folder {str(path.parent)!r} does not exist")


@contextmanager
def _quiet(pipeline: Any) -> Iterator[None]:
    """Hide the pipeline's own progress bar."""
    before = getattr(pipeline, "_progress_bar_config", None)
    pipeline.set_progress_bar_config(**{**(before or {}), "disable": True})
    try:
        yield
    finally:
        pipeline.set_progress_bar_config(**(before or {}))


def _version(name: str) -> str:
    """Version of a package; nothing to fail for after hours of runs if it is not installed."""
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def _psnr(pictures: NDArray[np.uint8], truth: NDArray[np.uint8]) -> float:
    error = float(np.square(pictures.astype(np.float64) - truth).mean())
    return _EQUAL if error == 0.0 else min(_EQUAL, 10.0 * math.log10(255.0**2 / error))


def _told(value: Any) -> str:
    """Text that tells two values of an argument apart."""
    if isinstance(value, torch.Tensor):
        return hashlib.sha256(value.detach().cpu().float().numpy().tobytes()).hexdigest()
    if hasattr(value, "tobytes"):  # an image or an array
        return hashlib.sha256(value.tobytes()).hexdigest()
    return value.__qualname__ if callable(value) and hasattr(value, "__qualname__") else repr(value)
