"""Other caching methods on the same model, sampler, prompt and noise: diffusers' hooks, and cache-dit.

Evaluations are counted by work: the multiplications of the linear layers in the transformer's blocks, divided
by those of a completely computed step. A method that computes half of the blocks has half an evaluation.

cache-dit is used where it is installed (`pip install --no-deps cache-dit`); Lockstep does not depend on it.
"""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers import (
    FasterCacheConfig,
    FirstBlockCacheConfig,
    MagCacheConfig,
    SeaCacheConfig,
    TaylorSeerCacheConfig,
    WanPipeline,
)

from runtime.media.mp4 import Frames
from runtime.models.folder import find_model
from runtime.models.sampler import load_sampler
from runtime.request.config import EMBEDDED_MODELS, Config
from runtime.request.video_request import VideoRequest

try:
    import cache_dit
except ImportError:
    cache_dit = None


@dataclass(slots=True)
class Work:
    """Multiplications of linear layers in the transformer's blocks."""

    done: float = 0.0

    def watch(self, blocks: torch.nn.Module) -> None:
        """Start counting in blocks."""
        for layer in blocks.modules():
            if isinstance(layer, torch.nn.Linear):
                layer.register_forward_hook(self._add)

    def _add(self, layer: torch.nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        self.done += float(output.numel()) * inputs[0].shape[-1]


def pipeline_frames(pipe: WanPipeline, request: VideoRequest) -> Frames:
    """Make a request's video by diffusers' pipeline, `[T, H, W, 3]`, uint8."""
    video = pipe(
        prompt=request.prompt,
        negative_prompt=request.negative,
        width=request.width,
        height=request.height,
        num_frames=request.frames,
        num_inference_steps=request.steps,
        guidance_scale=request.guidance,
        max_sequence_length=request.max_sequence_length,
        generator=torch.Generator().manual_seed(request.seed),
    ).frames[0]
    return np.rint(video * np.float32(255)).astype(np.uint8)


class PeerPipeline:
    """diffusers' `WanPipeline` on an embedded model, as the engine runs it; each expert has its own cache."""

    def __init__(self, config: Config):
        self._config = config
        self._folder = EMBEDDED_MODELS / config.model
        self._ratios: dict[tuple[int, float], list[float]] = {}
        self.load()

    def load(self) -> None:
        """Load a fresh pipeline, as not every method cleans up after itself."""
        self.pipe = WanPipeline.from_pretrained(self._folder, dtype=torch.float32)
        self.pipe.text_encoder.float()  # transformers keeps the file's float16
        self.pipe.scheduler = load_sampler(find_model(self._config), self._config.scheduler)
        self.pipe.set_progress_bar_config(disable=True)
        self._work = Work()
        for transformer in self.transformers:
            self._work.watch(transformer.blocks)
        self._whole_step = 0.0

    @property
    def transformers(self) -> list[Any]:
        """Its transformer, or its two experts."""
        return [one for one in (self.pipe.transformer, self.pipe.transformer_2) if one is not None]

    def frames(self, request: VideoRequest) -> tuple[Frames, float]:
        """Make a video; return it with its number of evaluations."""
        if not self._whole_step:
            before = self._work.done
            self._run(request.model_copy(update={"steps": 1}))
            self._whole_step = self._work.done - before
        before = self._work.done
        frames = self._run(request)
        return frames, (self._work.done - before) / self._whole_step

    def _run(self, request: VideoRequest) -> Frames:
        return pipeline_frames(self.pipe, request)

    def magnitude_ratios(self, request: VideoRequest) -> list[float]:
        """Ratios that MagCache needs of the model, from one full run, as its own calibration prints them."""
        key = request.steps, request.guidance
        if key not in self._ratios:
            said = io.StringIO()
            config = MagCacheConfig(num_inference_steps=request.steps, calibrate=True)
            with contextlib.redirect_stdout(said), enabled(self.transformers, config):
                self._run(request)
            found = re.search(r"\[([\d.,\se+-]+)\]", said.getvalue().split("mag_ratios=...", 1)[1])
            assert found is not None
            self._ratios[key] = [float(value) for value in found[1].split(",")]
        return self._ratios[key]


@contextmanager
def enabled(transformers: Sequence[Any], config: Any) -> Iterator[None]:
    """Enable one of diffusers' caches within the context, with a state of its own for each transformer."""
    for transformer in transformers:
        transformer.enable_cache(copy(config))
    try:
        yield
    finally:
        for transformer in transformers:
            transformer.disable_cache()


Method = Callable[[PeerPipeline, VideoRequest], tuple[Frames, float]]


def _hook(make: Callable[[PeerPipeline, VideoRequest], Any]) -> Method:
    """A method of diffusers."""

    def run(peer: PeerPipeline, request: VideoRequest) -> tuple[Frames, float]:
        config = make(peer, request)
        if not peer._whole_step:
            peer.frames(request.model_copy(update={"steps": 2}))
        with enabled(peer.transformers, config):
            return peer.frames(request)

    return run


def taylorseer(interval: int, warmup: int) -> Method:
    """TaylorSeer, first order, in the mode that keeps only the last block's output."""
    return _hook(lambda peer, request: taylorseer_config(interval, warmup))


def taylorseer_config(interval: int, warmup: int) -> TaylorSeerCacheConfig:
    return TaylorSeerCacheConfig(
        cache_interval=interval,
        disable_cache_before_step=warmup,
        max_order=1,
        taylor_factors_dtype=torch.float32,
        use_lite_mode=True,
    )


def seacache(threshold: float, consecutive: int) -> Method:
    """SeaCache, which by default never skips more than two steps in a row."""
    return _hook(
        lambda peer, request: SeaCacheConfig(threshold=threshold, max_consecutive_cached=consecutive)
    )


def magcache(threshold: float, consecutive: int, retention: float) -> Method:
    """MagCache, with ratios from a full run on the same prompt: better than it would be in practice."""
    return _hook(
        lambda peer, request: MagCacheConfig(
            threshold=threshold,
            max_skip_steps=consecutive,
            retention_ratio=retention,
            num_inference_steps=request.steps,
            mag_ratios=peer.magnitude_ratios(request),
        )
    )


def firstblock(threshold: float) -> Method:
    """FirstBlockCache."""
    return _hook(lambda peer, request: FirstBlockCacheConfig(threshold=threshold))


def fastercache(interval: int, first: int) -> Method:
    """FasterCache's attention cache. Its other half needs both branches in one batch; Wan runs two."""
    return _hook(
        lambda peer, request: FasterCacheConfig(
            spatial_attention_block_skip_range=interval,
            spatial_attention_timestep_skip_range=(-1, first),
            spatial_attention_block_identifiers=("^blocks.*attn1",),
            current_timestep_callback=lambda: int(peer.pipe.current_timestep),
            attention_weight_callback=lambda _: 0.3,
            is_guidance_distilled=True,
            tensor_format="BCFHW",
        )
    )


def dbcache(threshold: float, warmup: int, calibrator: str = "") -> Method:
    """cache-dit's DBCache, alone or with one of its calibrators."""

    def run(peer: PeerPipeline, request: VideoRequest) -> tuple[Frames, float]:
        assert cache_dit is not None
        peer.frames(request.model_copy(update={"steps": 2}))
        settings = cache_dit.DBCacheConfig(
            Fn_compute_blocks=1,
            Bn_compute_blocks=0,
            residual_diff_threshold=threshold,
            max_warmup_steps=warmup,
            num_inference_steps=request.steps,
        )
        kinds = {
            "taylorseer": cache_dit.TaylorSeerCalibratorConfig,
            "foca": cache_dit.FoCaCalibratorConfig,
            "dmd": cache_dit.DMDCalibratorConfig,
        }
        chosen = kinds[calibrator]() if calibrator else None
        try:
            cache_dit.enable_cache(peer.pipe, cache_config=settings, calibrator_config=chosen)
            return peer.frames(request)
        finally:
            peer.load()

    return run


def methods(*, few: bool = False) -> dict[str, Method]:
    """All peers that can run here, with settings that give comparable numbers of evaluations.

    Args:
        few: whether to take those of diffusers that need no calibration, with fewer settings.
    """
    found: dict[str, Method] = {}
    if few:
        found = {f"TaylorSeer, every {n} after {w}": taylorseer(n, w) for n, w in ((8, 3), (5, 4), (4, 5))}
        found |= {f"SeaCache {t:g}, at most {n}": seacache(t, n) for t, n in ((0.6, 4), (2.5, 4), (10.0, 8))}
        return found | {f"FirstBlockCache {threshold:g}": firstblock(threshold) for threshold in (0.1, 0.2)}
    for interval, warmup in ((8, 3), (6, 3), (5, 4), (4, 5), (3, 5)):
        found[f"TaylorSeer, every {interval} after {warmup}"] = taylorseer(interval, warmup)
    for threshold, consecutive in ((0.25, 2), (0.6, 2), (0.6, 4), (1.2, 4), (2.5, 4), (5.0, 5), (10.0, 8)):
        found[f"SeaCache {threshold:g}, at most {consecutive}"] = seacache(threshold, consecutive)
    for threshold, consecutive, retention in (
        (0.06, 3, 0.2),
        (0.1, 4, 0.1),
        (0.2, 6, 0.1),
        (0.3, 6, 0.1),
        (1.0, 8, 0.06),
    ):
        found[f"MagCache {threshold:g}, at most {consecutive}"] = magcache(threshold, consecutive, retention)
    for threshold in (0.1, 0.2, 0.4):
        found[f"FirstBlockCache {threshold:g}"] = firstblock(threshold)
    found["FasterCache, every 6"] = fastercache(6, 901)
    if cache_dit is not None:
        for threshold, calibrators in (
            (0.12, ("", "taylorseer", "foca")),
            (0.3, ("",)),
        ):
            for calibrator in calibrators:
                name = f"DBCache {threshold:g}" + (f" + {calibrator}" if calibrator else "")
                found[name] = dbcache(threshold, 4, calibrator)
    return found
