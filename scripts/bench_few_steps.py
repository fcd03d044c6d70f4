"""What forecasting gains where a sampler has 8 to 12 steps, as distilled models have: plans and fewer steps.

    python scripts/bench_few_steps.py

wan-tiny under Euler's sampler with shift 5 and without guidance, as models of few steps are sampled, with a
calibration of its own for each number of steps. Prompts and seeds are ones that no calibration has seen. Each
method is measured against the frames of all steps. wan-tiny is not distilled: steps of a distilled model are
less alike than its, so these numbers are the best that can be hoped for.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from rich.console import Console
from wan_tiny_prompts import of_experts

from launch.commands.calibrate import plan_calibration, run_calibration
from runtime.engine import Engine
from runtime.media.mp4 import FrameBuffer, Frames
from runtime.media.quality import psnr
from runtime.request.config import load_config
from runtime.request.sampler import SamplerConfig
from runtime.request.video_request import VideoRequest

BUDGETS = {8: (6,), 10: (8, 6), 12: (8,)}  # steps → numbers of them that are computed
CALIBRATIONS = Path("out/few-steps")


def presets(steps: int, computed: int, calibration: Path) -> dict[str, dict[str, Any]]:
    """Presets that compute some of the steps, by the name of the method."""
    even = sorted({int(step) for step in np.linspace(0, steps - 1, computed).round()})
    of_outputs = {"stream": "guided", "predictor": {"kind": "calibrated"}, "calibration": str(calibration)}
    return {
        "even steps, straight line": {
            "stream": "guided",
            "schedule": {"kind": "explicit", "computed": even},
            "predictor": {"kind": "linear"},
        },
        "planned": {**of_outputs, "schedule": {"kind": "planned", "nfe": computed, "guard": None}},
        "fitted": {**of_outputs, "schedule": {"kind": "fitted", "nfe": computed}},
    }


class Bench:
    """wan-tiny with a sampler of few steps."""

    def __init__(self, folder: Path):
        self._folder = folder
        sampler = SamplerConfig(kind="euler", shift=5.0)
        self._config = load_config("wan-tiny").model_copy(update={"scheduler": sampler})
        self._engine = Engine(self._config)

    def calibration(self, steps: int) -> Path:
        """Calibration of a number of steps, which is made if it is missing."""
        out = CALIBRATIONS / f"{steps}.json"
        if not out.is_file():
            out.parent.mkdir(parents=True, exist_ok=True)
            given = {"steps": steps, "guidance": 1.0, "budgets": BUDGETS[steps]}
            job = plan_calibration("wan-tiny", prompts=None, seed=1000, out=out, overwrite=True, **given)
            run_calibration(job, Console(stderr=True), engine=self._engine)
        return out

    def request(self, number: int, steps: int) -> VideoRequest:
        """Request of an unseen prompt, with every step computed."""
        given = {"seed": number, "steps": steps, "guidance": 1.0, "spectrum": "off"}
        return self._config.request(of_experts()[number], **given)

    def measured(self, number: int, steps: int) -> Iterator[tuple[tuple[str, int], float]]:
        """PSNR of each method, by its name and number of computed steps, on one prompt and seed."""
        request, calibration = self.request(number, steps), self.calibration(steps)
        truth = self._made(request)
        for computed in BUDGETS[steps]:
            fewer = self._made(request.model_copy(update={"steps": computed}))
            yield ("fewer steps", computed), psnr(fewer, truth)
            for name, preset in presets(steps, computed, calibration.absolute()).items():
                path = self._folder / "preset.yaml"
                path.write_text(yaml.safe_dump(preset))
                made = self._made(request.model_copy(update={"spectrum": str(path)}))
                yield (name, computed), psnr(made, truth)

    def _made(self, request: VideoRequest) -> Frames:
        sink = FrameBuffer()
        self._engine.generate(request, [sink])
        return sink.frames


def main() -> None:
    """Measure, and print a table for Markdown."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--prompts", type=int, default=6, help="number of unseen prompts")
    given = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable(logging.INFO)
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder))
        names: list[str] = []
        for steps, budgets in BUDGETS.items():
            found: dict[tuple[str, int], list[float]] = {}
            for number in range(given.prompts):
                for key, value in bench.measured(number, steps):
                    found.setdefault(key, []).append(value)
            if not names:
                names = list(dict.fromkeys(name for name, _ in found))
                print("| steps | computed | " + " | ".join(names) + " |")
                print("| ---: | ---: |" + " ---: |" * len(names))
            for computed in budgets:
                values = (found[name, computed] for name in names)
                cells = (f"{statistics.fmean(one):.1f} ({min(one):.1f})" for one in values)
                print(f"| {steps} | {computed} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
