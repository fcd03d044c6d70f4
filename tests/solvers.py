"""Presets with solvers whose coefficients are known: UniPC's, which a fit begins with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from runtime.forecasting.calibration import Calibration
from runtime.request.config import shipped
from spectrum.solver import Multistep, unipc

STEPS = 50
NODES = (0, 3, 7, 20, 40)
EXPECTED = 0.3


def shipped_content() -> dict[str, Any]:
    """Content of the calibration shipped for wan-tiny, without solvers."""
    content: dict[str, Any] = json.loads(shipped("calibrations", "wan-tiny.json").read_text())
    return content | {"fits": []}


def solver_of(scale: float, nodes: tuple[int, ...] = NODES) -> Multistep:
    """UniPC at the nodes, with branches apart if there is guidance."""
    levels = shipped_content()["noise_levels"]
    joint = unipc([*(levels[node] for node in nodes), 0.0], nodes)
    return joint if scale == 1.0 else joint.apart([scale] * len(nodes))


def fit_of(solver: Multistep) -> dict[str, Any]:
    """A fit as in a file, which forecasts each velocity as the first value of the node before."""
    forecasts = [np.zeros(1 + solver.width * k) for k in range(1, solver.nfe)]
    for row in forecasts:
        row[-solver.width] = 1.0
    trials = [
        {
            "video": video,
            "nfe": solver.nfe,
            "expected": 0.1,
            "surprise": 0.02 * video,
            "measured": 0.1,
            "psnr": 30.0 - video,
        }
        for video in range(8)
    ]
    return {
        "nodes": list(solver.nodes),
        "rows": [row.tolist() for row in solver.rows[1:]],
        "forecasts": [row.tolist() for row in forecasts],
        "expected": [EXPECTED] * (solver.nfe - 1),
        "power": 1.0,
        "passes": 1,
        "trials": trials,
    }


def write_calibration(path: Path, solver: Multistep, scale: float, **size: int) -> Calibration:
    """Write wan-tiny's calibration with a solver, as for another guidance and size."""
    content = shipped_content()
    content["conditions"] |= {"guidance": scale} | size
    content["fits"] = [fit_of(solver)]
    path.write_text(json.dumps(content))
    return Calibration.model_validate(content)


def write_preset(
    folder: Path, *, scale: float = 5.0, joint: bool = False, frames: int = 5, more: str = ""
) -> str:
    """Write a preset of this solver for videos of 64×48, with its calibration; returns its name."""
    solver = solver_of(1.0 if joint else scale)
    write_calibration(folder / "solver.json", solver, scale, width=64, height=48, frames=frames)
    path = folder / "fitted.yaml"
    path.write_text(
        f"stream: guided\nschedule: {{kind: fitted, nfe: {solver.nfe}{more}}}\n"
        "predictor: {kind: calibrated}\ncalibration: solver.json\n"
    )
    return str(path)
