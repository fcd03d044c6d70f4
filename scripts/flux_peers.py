"""Other ways of computing fewer steps on FLUX.1's architecture: diffusers' hooks, and cache-dit's.

Evaluations are the steps in which the last block was computed. What others compute of the first block at
every step is not counted: it is an eighth of flux-tiny's blocks, but only a 57th of FLUX.1's. cache-dit is
used where it is installed (`pip install --no-deps cache-dit`).
"""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    FirstBlockCacheConfig,
    FluxPipeline,
    MagCacheConfig,
    SeaCacheConfig,
)
from peers import Work, cache_dit, enabled, taylorseer_config

MODEL = Path(__file__).parent.parent / "tests" / "models" / "flux-tiny"
CALL: Mapping[str, Any] = {"height": 64, "width": 64, "max_sequence_length": 16, "guidance_scale": 3.5}


def load(folder: Path = MODEL) -> FluxPipeline:
    """Load flux-tiny in float32."""
    pipe = FluxPipeline.from_pretrained(folder, dtype=torch.float32)
    for encoder in (pipe.text_encoder, pipe.text_encoder_2):
        encoder.float()  # transformers keeps the file's float16
    pipe.set_progress_bar_config(disable=True)
    return pipe


class FluxPeer:
    """flux-tiny's pipeline with one cache at a time.

    Args:
        folder: the model.
        calibration: prompt from which MagCache takes its ratios.
    """

    def __init__(self, folder: Path, calibration: str):
        self._folder, self._calibration = folder, calibration
        self._ratios: dict[int, list[float]] = {}
        self.pipe, self._work = load(folder), Work()
        self._work.watch(self.pipe.transformer.single_transformer_blocks[-1])
        self._whole_step = 0.0

    def picture(self, prompt: str, seed: int, steps: int) -> tuple[torch.Tensor, float]:
        """Make one picture, `[1, 3, H, W]` in [0, 1], and count its evaluations."""
        whole = self.whole_step(prompt, seed)
        before = self._work.done
        picture = self._run(prompt, seed, steps)
        return picture, (self._work.done - before) / whole

    def whole_step(self, prompt: str, seed: int) -> float:
        """Work of a completely computed step; measured while no cache is enabled."""
        if not self._whole_step:
            before = self._work.done
            self._run(prompt, seed, 1)
            self._whole_step = self._work.done - before
        return self._whole_step

    def _run(self, prompt: str, seed: int, steps: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        arguments = {"num_inference_steps": steps, "generator": generator, "output_type": "pt"}
        picture: torch.Tensor = self.pipe(prompt, **arguments, **CALL).images
        return picture.float()

    @cached_property
    def for_cache_dit(self) -> FluxPeer:
        """Another pipeline: once cache-dit was enabled on one, diffusers' hooks no longer work on it."""
        return FluxPeer(self._folder, self._calibration)

    def magnitude_ratios(self, steps: int) -> list[float]:
        """Ratios that MagCache needs of the model, from a full run, as its own calibration prints them."""
        if steps not in self._ratios:
            said = io.StringIO()
            config = MagCacheConfig(num_inference_steps=steps, calibrate=True)
            with contextlib.redirect_stdout(said), enabled([self.pipe.transformer], config):
                self._run(self._calibration, 0, steps)
            told = re.search(r"\[([\d.,\se+-]+)\]", said.getvalue().split("mag_ratios=...", 1)[1])
            assert told is not None
            self._ratios[steps] = [float(value) for value in told[1].split(",")]
        return self._ratios[steps]


Method = Callable[[FluxPeer, str, int, int], tuple[torch.Tensor, float]]
"""Makes a picture of a prompt with a seed and a number of steps, and counts its evaluations."""


def _hook(make: Callable[[FluxPeer, int], Any]) -> Method:
    """A method of diffusers."""

    def run(peer: FluxPeer, prompt: str, seed: int, steps: int) -> tuple[torch.Tensor, float]:
        config = make(peer, steps)
        peer.whole_step(prompt, seed)
        with enabled([peer.pipe.transformer], config):
            return peer.picture(prompt, seed, steps)

    return run


def taylorseer(interval: int, warmup: int) -> Method:
    """TaylorSeer, first order, in the mode that keeps only the last block's output."""
    return _hook(lambda _peer, _steps: taylorseer_config(interval, warmup))


def seacache(threshold: float, consecutive: int) -> Method:
    """SeaCache, with an adapter that it lacks for FLUX, and with what `FluxPipeline` does not tell it."""

    def latents(_module: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[torch.Tensor]:
        tokens = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        side = int(tokens.shape[1] ** 0.5)
        return [one.T.reshape(-1, 1, side, side) for one in tokens]

    cached = _hook(
        lambda _peer, _steps: SeaCacheConfig(
            threshold=threshold, max_consecutive_cached=consecutive, raw_vision_callback=latents
        )
    )

    def run(peer: FluxPeer, prompt: str, seed: int, steps: int) -> tuple[torch.Tensor, float]:
        transformer, scheduler = peer.pipe.transformer, peer.pipe.scheduler
        original = transformer.cache_context

        def context(name: str) -> Any:
            index = scheduler.step_index or 0
            sigma = float(scheduler.sigmas[index])
            return original(name, step_index=index, sigma=sigma, num_inference_steps=len(scheduler.timesteps))

        transformer.cache_context = context
        try:
            return cached(peer, prompt, seed, steps)
        finally:
            del transformer.cache_context

    return run


def magcache(threshold: float, consecutive: int, retention: float) -> Method:
    """MagCache, with ratios from a full run of another prompt."""
    return _hook(
        lambda peer, steps: MagCacheConfig(
            threshold=threshold,
            max_skip_steps=consecutive,
            retention_ratio=retention,
            num_inference_steps=steps,
            mag_ratios=peer.magnitude_ratios(steps),
        )
    )


def firstblock(threshold: float) -> Method:
    """FirstBlockCache."""
    return _hook(lambda _peer, _steps: FirstBlockCacheConfig(threshold=threshold))


def dbcache(calibrator: str, *, threshold: float = 0.0, computed: tuple[int, ...] = ()) -> Method:
    """cache-dit's DBCache, alone or with a calibrator: by a threshold, or with given computed steps."""

    def run(peer: FluxPeer, prompt: str, seed: int, steps: int) -> tuple[torch.Tensor, float]:
        assert cache_dit is not None
        peer = peer.for_cache_dit
        peer.whole_step(prompt, seed)
        fixed: dict[str, Any] = {}
        if computed:
            mask = [int(step in computed) for step in range(steps)]
            fixed = {"steps_computation_mask": mask, "steps_computation_policy": "static"}
        settings = cache_dit.DBCacheConfig(
            Fn_compute_blocks=1,
            Bn_compute_blocks=0,
            residual_diff_threshold=threshold or 0.1,
            max_warmup_steps=4,
            num_inference_steps=steps,
            **fixed,
        )
        kinds = {
            "TaylorSeer": cache_dit.TaylorSeerCalibratorConfig,
            "FoCa": cache_dit.FoCaCalibratorConfig,
            "DMD": cache_dit.DMDCalibratorConfig,
        }
        chosen = kinds[calibrator]() if calibrator else None
        cache_dit.enable_cache(peer.pipe, cache_config=settings, calibrator_config=chosen)
        try:
            return peer.picture(prompt, seed, steps)
        finally:
            cache_dit.disable_cache(peer.pipe)

    return run


def _intervals(steps: int, budget: int) -> tuple[int, int]:
    """Interval and leading steps with which TaylorSeer computes `budget` steps, as nearly as possible."""
    warmup = min(5, budget // 2)
    return min(
        ((interval, lead) for interval in range(2, steps) for lead in (warmup - 1, warmup)),
        key=lambda one: abs(one[1] + -(-(steps - one[1]) // one[0]) - budget),
    )


def methods(steps: int, paper: Mapping[int, tuple[int, ...]]) -> dict[str, Method]:
    """All peers that can run here, with settings that give comparable numbers of evaluations.

    Args:
        steps: number of steps of the sampler.
        paper: number of computed steps → the steps that Spectrum's published rule computes.
    """
    found: dict[str, Method] = {}
    for budget in paper:
        interval, warmup = _intervals(steps, budget)
        found[f"TaylorSeer, every {interval} after {warmup}"] = taylorseer(interval, warmup)
    for threshold, consecutive in ((0.6, 4), (1.2, 4), (2.5, 6)):
        found[f"SeaCache {threshold:g}, at most {consecutive}"] = seacache(threshold, consecutive)
    for threshold, consecutive, retention in ((0.1, 4, 0.1), (0.2, 6, 0.1)):
        found[f"MagCache {threshold:g}, at most {consecutive}"] = magcache(threshold, consecutive, retention)
    for threshold in (0.15, 0.25):
        found[f"FirstBlockCache {threshold:g}"] = firstblock(threshold)
    if cache_dit is not None:
        found["DBCache 0.25 + TaylorSeer"] = dbcache("TaylorSeer", threshold=0.25)
        for budget, computed in paper.items():
            for calibrator in ("", "TaylorSeer", "DMD", "FoCa"):
                name = f"DBCache, {budget} steps" + (f" + {calibrator}" if calibrator else "")
                found[name] = dbcache(calibrator, computed=computed)
    return found
