"""Phases of a job on one rank, each rehearsed with as few steps, blocks and frames as determine the whole.

Tensor legend: B batch, C latent channels, F latent frames, H, W latent height and width.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from diffusers import AutoencoderKLWan, SchedulerMixin

from runtime.files.text import read_json
from runtime.models.wan.folder import ModelKind
from runtime.models.wan.parts import HALO, on_every_rank
from runtime.models.wan.shared_encoder import encode_strips
from runtime.models.wan.vae import decode_frames
from runtime.rehearsal.engine import RehearsedEngine
from runtime.rehearsal.fake import DEVICE
from runtime.rehearsal.ledger import Memory, Work
from runtime.rehearsal.repeats import RepeatedLayers
from runtime.sampling.finite import size_of
from runtime.sampling.plan import Plan
from runtime.sampling.run import Run
from runtime.sampling.streams import Stream
from spectrum import StepKind

_DECODED = 3  # latent frames: the first, the second, and one that is like all after it


@dataclass(frozen=True, slots=True)
class Phase:
    """Work and memory of one rank in a phase, or in one step of it.

    Attributes:
        work, memory: operators, and peak memory.
        sent: axis → bytes that this rank sends.
    """

    work: Work
    memory: Memory
    sent: dict[str, int] = field(default_factory=dict)

    def times(self, count: int) -> Phase:
        """Repeat this phase `count` times."""
        sent = {axis: count * size for axis, size in self.sent.items()}
        return replace(self, work=Work().plus(self.work, count), sent=sent)

    def then(self, other: Phase) -> Phase:
        """Join this phase and the one that follows it."""
        axes = {**self.sent, **other.sent}
        sent = {axis: self.sent.get(axis, 0) + other.sent.get(axis, 0) for axis in axes}
        memory = max((self.memory, other.memory), key=lambda memory: memory.peak)
        return Phase(self.work.plus(other.work), memory, sent)


@dataclass(frozen=True, slots=True)
class Steps:
    """Denoising steps of one rank.

    Attributes:
        first, last: first computed step, and the last one that has the longest history.
        forecast: last forecast step that has the longest history; None if nothing is forecast.
        history: bytes of the history after the last of these computed steps.
        kept: number of values in it.
    """

    first: Phase
    last: Phase
    forecast: Phase | None
    history: int
    kept: int

    @property
    def memory(self) -> Memory:
        """Peak memory of all steps."""
        steps = [self.first, self.last, *([self.forecast] if self.forecast else [])]
        return max((step.memory for step in steps), key=lambda memory: memory.peak)


class Rehearser:
    """Rehearsal of a job on one rank; call its methods in the order of the phases.

    Args:
        engine: engine of the rank.
        plan: plan of the job.
    """

    def __init__(self, engine: RehearsedEngine, plan: Plan):
        self._engine, self._plan, self._fake = engine, plan, engine.fake

    def load(self) -> Phase:
        """Rehearse loading: the weights that stay on the device."""
        ledger = self._fake.ledger
        ledger.start()
        self._kept_text = self._text_encoder() if self._keeps_text else None
        work, memory = ledger.finish()
        return Phase(work, memory, {"node": self._engine.ranks.node.traffic.sent})  # type: ignore[attr-defined]

    def encode(self) -> Phase:
        """Rehearse encoding of prompts and other conditioning on the first rank, which broadcasts it.

        Frames may be encoded in strips on all ranks; only what is sent for these is counted.
        """
        engine, ledger = self._engine, self._fake.ledger
        before = engine.ranks.traffic.sent
        ledger.start()
        if engine.ranks.is_leader:
            encoder: Any = self._kept_text if self._keeps_text else self._text_encoder()
            with self._fake.running():
                shape = (1, self._plan.request.max_sequence_length)
                ids = torch.ones(shape, dtype=torch.long, device=DEVICE)
                encoder(ids, torch.ones_like(ids)).last_hidden_state.to(engine.adapter_dtype)
                one = ledger.work.copy()
                for _ in range(len(self._plan.request.travel) + self._plan.request.guided):
                    ledger.add(one)  # all texts have the same length
                del ids
            del encoder
        self._encode_condition()
        work, memory = ledger.finish()
        sent = engine.ranks.traffic.sent - before
        return Phase(work, memory, {"everyone": sent} if sent else {})

    def denoise(self) -> tuple[Run, Steps]:
        """Rehearse the first computed step, and those of each kind with the longest history."""
        plan = self._plan
        kinds = plan.kinds[: plan.steps]
        computed = [step for step, kind in enumerate(kinds) if kind is StepKind.COMPUTE]
        forecast = [step for step, kind in enumerate(kinds) if kind is StepKind.FORECAST]
        sampler = plan.fresh_sampler()  # its tables are real tensors
        with self._fake.running():
            run = self._engine.prepare_fake(plan)
            segment = run.segment(0, None)
            loop = _Loop(self._engine, run, segment.stream, sampler, segment.noise_BCFHW)
            first = loop.step(StepKind.COMPUTE, computed[0])
            loop.warm_up()
            last, of_forecast = first, None
            if len(computed) > 1:
                index = max(computed, key=lambda step: (len(self._history(computed, step)), step))
                loop.remember(self._history(computed, index))
                last = loop.step(StepKind.COMPUTE, index)
            history, kept = segment.stream.bytes, segment.stream.kept
            if forecast and plan.preset.forecasts:
                index = max(self._usual(forecast), key=lambda s: (len(self._history(computed, s)), s))
                loop.remember(self._history(computed, index))
                of_forecast = loop.step(StepKind.FORECAST, index)
            return run, Steps(first, last, of_forecast, history, kept)

    def _usual(self, forecast: list[int]) -> list[int]:
        """Forecast steps that are like most: where they are fused, the last step alone makes latents."""
        kept = forecast if self._plan.fused is None else [s for s in forecast if s != self._plan.steps - 1]
        return kept or forecast

    def _history(self, computed: list[int], step: int) -> list[int]:
        """Computed steps that are remembered before `step`."""
        since = max((one for one in self._plan.fresh if one <= step), default=0)
        return [one for one in computed if since <= one < step]

    def decode(self, run: Run) -> Phase:
        """Rehearse decoding of all frames.

        Args:
            run: result of `denoise`, whose tensors are held meanwhile.
        """
        engine, ledger = self._engine, self._fake.ledger
        frames = run.noise_BCFHW.shape[2]
        with engine.vae_at_work() as vae, self._fake.running():
            latents_BCFHW = torch.empty_like(run.noise_BCFHW)
            parts = list(_decoded(engine, vae, latents_BCFHW, min(_DECODED, frames)))
            ledger.start()
            del latents_BCFHW
        whole = parts[0]
        for part in parts[1:-1]:
            whole = whole.then(part)
        return whole.then(parts[-1].times(frames - len(parts) + 1)) if len(parts) > 1 else whole

    @property
    def _keeps_text(self) -> bool:
        return self._engine.ranks.is_leader and self._engine.config.memory.text_encoder == "keep"

    def _text_encoder(self) -> Any:
        from transformers import UMT5Config, UMT5EncoderModel

        folder, dtype = self._engine.model.path, self._engine.config.dtype.of("text_encoder")
        settings = UMT5Config.from_dict(read_json(folder / "text_encoder" / "config.json"))
        encoder = self._fake.module(
            lambda: UMT5EncoderModel(settings), lambda _, one: dtype if one.is_floating_point() else one.dtype
        )
        if not self._engine.whole:
            layers = encoder.encoder.block
            encoder.encoder.block = RepeatedLayers(layers, self._fake.ledger, self._engine.ranks)
        return encoder

    def _encode_condition(self) -> None:
        """Rehearse the image encoder and the VAE's encoder, with an image or with empty frames."""
        engine, request = self._engine, self._engine.config.windowed(self._plan.request)
        known = engine.knows_frames
        if request.image is None if known else engine.kind is ModelKind.TEXT:
            return
        leads, together = engine.ranks.is_leader, on_every_rank(engine.config, engine.ranks.size)
        if leads and engine.sees_image_tokens:
            self._encode_image()
        times = 2 if engine.kind is ModelKind.VACE else 1  # known and editable regions
        shape = (1, 3, 1 if known else request.frames, request.height, request.width)
        with engine.vae_at_work() as vae, self._fake.running():
            if vae is None or not (leads or together):
                return
            peers = engine.ranks.leading(request.height // vae.spatial_compression_ratio)
            for _ in range(times):
                pixels = torch.empty(shape, dtype=vae.dtype, device=DEVICE) if leads else None
                if not together:
                    vae.encode(pixels)
                elif peers is not None:
                    encode_strips(vae, pixels, shape, peers)

    def _encode_image(self) -> None:
        from transformers import CLIPVisionConfig, CLIPVisionModel

        folder, dtype = self._engine.model.path, self._engine.config.dtype.of("image_encoder")
        settings = CLIPVisionConfig.from_dict(read_json(folder / "image_encoder" / "config.json"))
        encoder = self._fake.module(
            lambda: CLIPVisionModel(settings), lambda _, one: dtype if one.is_floating_point() else one.dtype
        )
        with self._fake.running():
            size = settings.image_size
            encoder(torch.empty((1, 3, size, size), dtype=dtype, device=DEVICE), output_hidden_states=True)


class _Loop:
    """Body of the denoising loop, run at chosen steps."""

    def __init__(
        self,
        engine: RehearsedEngine,
        run: Run,
        stream: Stream,
        sampler: SchedulerMixin,
        noise_BCFHW: torch.Tensor,
    ):
        self._engine, self._plan, self._network, self._stream = engine, run.plan, run.network, stream
        self._sampler, self._latents_BCFHW = sampler, noise_BCFHW

    def step(self, kind: StepKind, index: int) -> Phase:
        """Run one step of `runtime.sampling.denoise.denoise`, except for what reads numbers back."""
        engine, stream, ledger = self._engine, self._stream, self._engine.fake.ledger
        kinds = dict.fromkeys(self._plan.request.branches, kind)
        timestep_B = torch.empty(self._latents_BCFHW.shape[0], dtype=torch.float32, device=DEVICE)
        sent, held = engine.ranks.sent(self._plan.topology), stream.bytes
        self._network.at(index).expect()  # a switch of experts is part of no step
        ledger.start()
        output = stream.advance(index, kinds, self._latents_BCFHW, timestep_B)
        if output.moved is None:
            self._take(output.velocity_BCFHW)
        else:
            self._latents_BCFHW = output.moved.after_BCFHW
        if output.moved is None or output.moved.made_BCFHW is not None:
            size_of(self._latents_BCFHW)
        del output
        work, memory = ledger.finish(held if engine.config.memory.history == "keep" else 0)
        now = engine.ranks.sent(self._plan.topology)
        return Phase(work, memory, {axis: now[axis] - sent[axis] for axis in now if now[axis] > sent[axis]})

    def warm_up(self) -> None:
        """Step the sampler until it holds as many tensors as in the middle of a run, if it is used."""
        if self._plan.fused is not None or self._plan.preset.fitted is not None:
            return
        for _ in range(min(2, self._plan.steps - 4)):
            self._take(torch.empty_like(self._latents_BCFHW))

    def remember(self, steps: list[int]) -> None:
        """Fill the stream's history with fake values of these computed steps."""
        preset = self._plan.preset
        all_are_kept = self._plan.fused is not None or preset.fitted is not None
        memory = None if all_are_kept else preset.build_predictor(self._plan.steps).memory
        kept = steps if memory is None else steps[-memory:]

        def filled(history: dict[str, dict[int, torch.Tensor]]) -> dict[str, dict[int, torch.Tensor]]:
            return {
                name: {step: torch.empty_like(next(iter(values.values()))) for step in kept}
                for name, values in history.items()
            }

        if preset.forecasts:
            history, whole = filled(self._stream.history()), filled(self._stream.whole())
            self._stream.restore(history, whole, sharded=True)

    def _take(self, velocity_BCFHW: torch.Tensor) -> None:
        timestep = torch.empty((), dtype=torch.float32)
        step = self._sampler.step(velocity_BCFHW, timestep, self._latents_BCFHW, return_dict=False)
        self._latents_BCFHW = step[0]


class _EnoughError(Exception):
    """Ends decoding on a rank that only decodes tiles or strips for the first."""


def _decoded(
    engine: RehearsedEngine, vae: AutoencoderKLWan | None, latents_BCFHW: torch.Tensor, frames: int
) -> Iterator[Phase]:
    """Yield the decoding of the first latent frames, one by one."""
    ledger, parts = engine.fake.ledger, engine.parts(vae, latents_BCFHW)
    peers = engine.ranks.leading(latents_BCFHW.shape[3]) if parts == HALO else engine.ranks.everyone
    done: list[Phase] = []
    sent = 0

    def finish() -> None:
        nonlocal sent
        work, memory = ledger.finish()
        now = engine.ranks.traffic.sent
        done.append(Phase(work, memory, {"everyone": now - sent} if now > sent else {}))
        sent = now
        ledger.start()

    def at(*, busy: bool) -> None:
        if busy and not engine.ranks.is_leader:
            finish()
            if len(done) == frames:
                raise _EnoughError

    sent = engine.ranks.traffic.sent
    ledger.start()
    try:
        chunks = iter(()) if peers is None else decode_frames(vae, latents_BCFHW, parts, peers, at)
        for chunk in chunks:
            chunk.mul(255).round().to(torch.uint8)  # as `to_uint8`
            del chunk
            finish()
            if len(done) == frames:
                break
    except _EnoughError:
        pass
    if not done:
        finish()
    yield from done
