"""Truth values are no numbers, wherever a number is wanted, though Python takes true for 1."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from runtime.errors import BadRequestError
from runtime.film.storyboard import Storyboard, load_storyboard
from runtime.forecasting.calibration import Calibration
from runtime.forecasting.presets import Preset, load_preset
from runtime.request.config import Config, load_config
from runtime.request.video_request import VideoRequest


def lax(schema: Any, place: str = "") -> Iterator[str]:
    """Places of a model's schema where true is taken for 1."""
    if isinstance(schema, list | tuple):
        for one in schema:
            yield from lax(one, place)
    elif isinstance(schema, dict):
        kind = schema.get("type")
        if kind in ("int", "float") and not schema.get("strict"):
            yield place
        if kind == "function-before" and schema["function"]["function"].__name__ == "_no_truth_value":
            return
        for name, value in schema.items():
            if name not in ("metadata", "serialization", "default"):
                inner = schema.get("model_name", place) if name == "schema" else name
                yield from lax(
                    value, f"{place}.{inner}" if kind in ("model", "model-fields") else place or name
                )


@pytest.mark.parametrize("model", [VideoRequest, Config, Preset, Storyboard, Calibration])
def test_no_field_takes_true_for_one(model: type[BaseModel]) -> None:
    assert list(lax(model.__pydantic_core_schema__)) == []


def test_a_schema_that_takes_it_is_found() -> None:
    class Loose(BaseModel):
        places: list[float]

    assert list(lax(Loose.__pydantic_core_schema__))


def test_the_refusal_names_the_field(tmp_path: Path) -> None:
    said = r"frames: True given; must be a number"
    with pytest.raises(BadRequestError, match=said):
        VideoRequest.parse(prompt="x", width=64, height=48, frames=True, steps=4, guidance=1.0)
    board = "title: T\nshots:\n  - {id: a, prompt: x, frames: true}\n"
    config = "model: wan-tiny\ndefaults: {width: 64, height: 48, frames: true, steps: 4, guidance: 1}\n"
    preset = "schedule: {kind: paper, warmup: true}\npredictor: {kind: chebyshev}\n"
    loads = {"frames: True": (board, load_storyboard), "defaults.frames: True": (config, load_config)}
    loads["warmup: True"] = preset, load_preset
    for number, (said, (text, load)) in enumerate(loads.items()):
        path = tmp_path / f"{number}.yaml"
        path.write_text(text)
        with pytest.raises(BadRequestError, match=rf"{said} given; must be a number"):
            load(path if load is load_storyboard else str(path))  # type: ignore[operator]
