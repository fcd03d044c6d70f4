"""Quality at equal evaluations on flux-tiny, and the speed-up on a larger model; both make docs/flux.md.

    python scripts/bench_flux.py --results docs/flux.jsonl     # quality: every result is a line of the file
    python scripts/bench_flux.py --results docs/flux.jsonl --few
    python scripts/bench_flux.py --results docs/flux.jsonl --speed
    python scripts/bench_flux.py --results docs/flux.jsonl --page docs/flux.md

Captions and seeds of the measurement occur neither in training nor in a calibration. Results that the file
has already are not made again. Run it after `pip install --no-deps cache-dit` for the rows of cache-dit.
"""

from __future__ import annotations

import argparse
import json
import logging
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from bench_quality import paper_steps
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from diffusers.utils import logging as diffusers_logging
from flux_page import write_page
from flux_peers import CALL, MODEL, FluxPeer, load, methods
from flux_tiny_data import HELD_OUT, TRAINED
from flux_tiny_measure import Distances

from spectrum import Blend, ChebyshevRidge, FixedSchedule, LinearExtrapolation, Predictor
from spectrum.diffusers import Preset, calibrate, disable, enable, plan, report

STEPS = (50, 28)
BUDGETS = (8, 10, 14)
MATCHED = (5, 7, 9, 11, 13)  # further budgets, to compare with what others happen to compute
PICTURES = 16
CALIBRATED_WITH = (2, 4, 6, 8)
USUAL = 6  # prompts of the calibration that all tables use
CALIBRATING = tuple(TRAINED[scene] for scene in (3, 140, 301, 488, 77, 590, 222, 411))
"""Scenes of the calibrations, unlike each other."""

log = logging.getLogger("bench")
Picture = tuple[torch.Tensor, float]


def calibration(folder: Path, model: Path, steps: int, prompts: int) -> Path:
    """Make the calibration of so many prompts, unless it is there."""
    out = folder / f"flux-{steps}-{prompts}.json"
    if not out.exists():
        captions = [scene.caption for scene in CALIBRATING[:prompts]]
        log.info("calibrating %s", out)
        calibrate(load(model), captions, out, steps=steps, seed=1000, progress=False, **CALL)
    return out


class Bench:
    """Makes and measures pictures of one model."""

    def __init__(self, model: Path, folder: Path):
        self._model, self._folder = model, folder
        self._pipe = load(model)
        self._peer = FluxPeer(model, CALIBRATING[0].caption)
        self._distances = Distances(self._pipe.vae)

    def run(self, steps: int, number: int, done: set[str], only: str) -> Iterator[dict[str, Any]]:
        """Make one prompt's pictures with all methods that match `only` and are not in `done`."""
        made = self._methods(steps, HELD_OUT[number].caption, number)
        made = {name: make for name, make in made.items() if re.search(only, name)}
        yield from self._measured(steps, number, made, done)

    def _measured(
        self, steps: int, number: int, made: Mapping[str, Callable[[], Picture]], done: set[str]
    ) -> Iterator[dict[str, Any]]:
        """Make the pictures that are not done, and measure them against that of all steps."""
        todo = {name: make for name, make in made.items() if name not in done}
        if not todo:
            return
        truth, _ = self._picture(HELD_OUT[number].caption, number, steps)
        for name, make in todo.items():
            picture, nfe = make()
            distance = self._distances.measure(picture, truth)
            measured = {"psnr": distance.psnr, "ssim": distance.ssim, "deep": distance.deep}
            yield {"steps": steps, "number": number, "method": name, "nfe": round(nfe, 3), **measured}

    def _methods(self, steps: int, prompt: str, seed: int) -> dict[str, Callable[[], Picture]]:
        paper = {budget: tuple(paper_steps(steps, budget)) for budget in BUDGETS}
        made: dict[str, Callable[[], Picture]] = {}
        for budget in BUDGETS:
            for share in (1.0, 0.5):
                name = f"Spectrum as published, w = {share:g}, {budget}"
                made[name] = self._ours(prompt, seed, steps, _published(paper[budget], share))
            made[f"fewer steps, {budget}"] = lambda few=budget: self._picture(prompt, seed, few)  # type: ignore[misc]
        usual = self._calibration(steps, USUAL)
        for budget in sorted({*BUDGETS, *MATCHED}):
            made[f"planned, {budget}"] = self._ours(prompt, seed, steps, plan(usual, nfe=budget))
        for name, method in methods(steps, paper).items():
            made[name] = lambda method=method: method(self._peer, prompt, seed, steps)  # type: ignore[misc]
        return made

    def few(self, number: int, done: set[str]) -> Iterator[dict[str, Any]]:
        """Make one prompt's pictures with plans from calibrations of fewer or more prompts."""
        steps, prompt = STEPS[0], HELD_OUT[number].caption
        made = {
            f"planned from {prompts} prompts, {budget}": self._ours(
                prompt, number, steps, plan(self._calibration(steps, prompts), nfe=budget)
            )
            for prompts in CALIBRATED_WITH
            for budget in BUDGETS
            if prompts != USUAL
        }
        yield from self._measured(steps, number, made, done)

    def _ours(self, prompt: str, seed: int, steps: int, preset: Preset) -> Callable[[], Picture]:
        def make() -> Picture:
            enable(self._pipe, preset)
            try:
                picture, _ = self._picture(prompt, seed, steps)
                return picture, float(report(self._pipe)["transformer"].evaluations)
            finally:
                disable(self._pipe)

        return make

    def _calibration(self, steps: int, prompts: int) -> Path:
        return calibration(self._folder, self._model, steps, prompts)

    def _picture(self, prompt: str, seed: int, steps: int) -> Picture:
        generator = torch.Generator().manual_seed(seed)
        arguments = {"num_inference_steps": steps, "generator": generator, "output_type": "pt"}
        return self._pipe(prompt, **arguments, **CALL).images.float(), float(steps)


def _published(computed: tuple[int, ...], share: float) -> Preset:
    def predictor(steps: int) -> Predictor:
        spectral = ChebyshevRidge(horizon=steps)
        return spectral if share == 1.0 else Blend(spectral, LinearExtrapolation(), share)

    return Preset("published", lambda steps: FixedSchedule.explicit(steps, computed), predictor)


def speed(repeats: int) -> Iterator[dict[str, Any]]:
    """Denoising times of a model whose blocks dominate, with random weights.

    Its blocks are in FLUX.1's proportion, a double one to two single ones, at 128 + 32 tokens.
    """
    torch.manual_seed(0)
    transformer = FluxTransformer2DModel(
        in_channels=64, num_layers=8, num_single_layers=16, attention_head_dim=64, num_attention_heads=8,
        joint_attention_dim=64, pooled_projection_dim=64, guidance_embeds=True, axes_dims_rope=(16, 24, 24),
    )  # fmt: skip
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    pipe = FluxPipeline(scheduler, None, None, None, None, None, transformer)
    pipe.set_progress_bar_config(disable=True)
    inputs = {"prompt_embeds": torch.randn(1, 32, 64), "pooled_prompt_embeds": torch.randn(1, 64)}
    size = {"height": 256, "width": 128, "guidance_scale": 3.5}

    def seconds(steps: int = 50) -> float:
        generator, began = torch.Generator().manual_seed(0), time.process_time()
        pipe(**inputs, **size, num_inference_steps=steps, generator=generator, output_type="latent")
        return time.process_time() - began

    seconds(4)
    presets = {
        "full": None,
        "paper": "paper",
        "paper-fast": "paper-fast",
        "paper-fast, velocity": "paper-fast",
    }
    for repeat in range(repeats):
        for name, preset in presets.items():
            nfe = 50
            if preset is not None:
                enable(pipe, preset, stream="velocity" if "velocity" in name else None)
            taken = seconds()
            if preset is not None:
                nfe = report(pipe)["transformer"].evaluations
                disable(pipe)
            log.info("%s: %.2f s", name, taken)
            yield {"speed": name, "repeat": repeat, "nfe": nfe, "seconds": round(taken, 4)}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--results", type=Path, required=True, help="JSON lines; made or added to")
    parser.add_argument("--model", type=Path, default=MODEL, help="a diffusers folder")
    parser.add_argument("--work", type=Path, default=Path("out/bench-flux"), help="calibrations")
    parser.add_argument("--steps", type=int, choices=STEPS, action="append", help="by default both")
    parser.add_argument("--pictures", type=int, default=PICTURES)
    parser.add_argument("--only", default="", help="measure methods whose names match this pattern")
    parser.add_argument("--few", action="store_true", help="measure calibrations of fewer prompts instead")
    parser.add_argument("--speed", action="store_true", help="measure times instead of quality")
    parser.add_argument("--page", type=Path, help="write the page, and measure nothing")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    logging.getLogger("cache_dit").setLevel(logging.ERROR)
    diffusers_logging.disable_progress_bar()
    torch.set_num_threads(1)
    arguments.work.mkdir(parents=True, exist_ok=True)
    known = read(arguments.results) if arguments.results.exists() else []
    if arguments.page:
        write_page(known, arguments.page)
        return
    with arguments.results.open("a", encoding="utf-8") as file:
        for result in made(arguments, known):
            file.write(json.dumps(result) + "\n")
            file.flush()


def made(arguments: argparse.Namespace, known: list[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yield all results that are not known yet."""
    if arguments.speed:
        yield from speed(1)
        return
    bench = Bench(arguments.model, arguments.work)
    if arguments.few:
        for number in range(arguments.pictures):
            yield from bench.few(number, _done(known, STEPS[0], number))
        return
    for number in range(arguments.pictures):
        for steps in arguments.steps or STEPS:
            log.info("picture %d of %d steps", number, steps)
            yield from bench.run(steps, number, _done(known, steps, number), arguments.only)


def _done(known: list[Mapping[str, Any]], steps: int, number: int) -> set[str]:
    """Methods whose results are known."""
    return {one["method"] for one in known if one.get("steps") == steps and one["number"] == number}


def read(path: Path) -> list[Mapping[str, Any]]:
    """Read the results so far."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


if __name__ == "__main__":
    sys.exit(main())
