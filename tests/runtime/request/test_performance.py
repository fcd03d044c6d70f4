"""Profiles say what makes steps faster, and every part of one can be overridden."""

from __future__ import annotations

from typing import Any

import pytest

from runtime.errors import BadRequestError
from runtime.files.yaml import YamlFile
from runtime.request.config import Config, load_config
from runtime.request.performance import PROFILES, Performance

FAST = {
    "compile": True,
    "fuse_projections": True,
    "fuse_forecasts": True,
    "batch_guidance": "auto",
    "fastest_attention": True,
}
NAMED = "compiled blocks, fused projections, fused forecasts, guidance in one batch: auto"


@pytest.mark.parametrize(
    ("given", "performs", "text"),
    [
        ({}, Performance(), "exact"),
        ({"performance": "fast"}, Performance("fast", **FAST), f"fast ({NAMED})"),  # type: ignore[arg-type]
        (
            {"performance": "fastest"},
            Performance("fastest", quantization="fp8", **FAST),  # type: ignore[arg-type]
            f"fastest ({NAMED}, fp8 linears)",
        ),
        (
            {"performance": "fastest", "quantization": "none", "compile": False, "fuse_forecasts": False}
            | {"batch_guidance": "never"},
            Performance("fastest", fuse_projections=True, fastest_attention=True),
            "fastest (fused projections)",
        ),
        ({"fuse_forecasts": True}, Performance(fuse_forecasts=True), "exact (fused forecasts)"),
        (
            {"batch_guidance": "always"},
            Performance(batch_guidance="always"),
            "exact (guidance in one batch: always)",
        ),
        ({"quantization": "int8"}, Performance(quantization="int8"), "exact (int8 linears)"),
        ({"compile": True, "fuse_projections": True}, Performance(compile=True, fuse_projections=True), None),
    ],
)
def test_a_profile_holds_where_a_config_says_nothing_else(
    given: dict[str, Any], performs: Performance, text: str | None
) -> None:
    config = load_config("wan-tiny").model_copy(update=given)
    assert config.performs == performs
    assert text is None or config.performs.text == text


def test_every_profile_names_itself() -> None:
    assert {name: one.profile for name, one in PROFILES.items()} == {name: name for name in PROFILES}


def test_others_are_refused(tmp_path: Any) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("model: wan-tiny\nquantization: fp4\ndefaults: {width: 64, height: 48, frames: 5}\n")
    with pytest.raises(BadRequestError, match="quantization: 'fp4' given"):
        YamlFile.read(path, "config").parse(Config)
