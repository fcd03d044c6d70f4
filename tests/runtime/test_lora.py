"""LoRA weights, against the sum worked out by hand."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from runtime.configs import Config, Lora, load_config
from runtime.engine import Engine
from runtime.errors import BadRequestError
from runtime.loading import load_transformer
from runtime.ranks import Ranks
from runtime.request import VideoRequest
from runtime.video import FrameBuffer, Frames
from runtime.weights import find_model
from tests.ranks import run_ranks

Make = Callable[..., VideoRequest]
TARGET = "blocks.0.attn1.to_q"
RANK, WIDTH = 4, 192


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A LoRA for one projection of wan-tiny."""
    generator = torch.Generator().manual_seed(1)
    path = tmp_path / "style.safetensors"
    down, up = (torch.randn(shape, generator=generator) * 0.3 for shape in ((RANK, WIDTH), (WIDTH, RANK)))
    save_file({f"transformer.{TARGET}.lora_A.weight": down, f"transformer.{TARGET}.lora_B.weight": up}, path)
    return path


def with_lora(config: Config, file: Path, scale: float = 1.0) -> Config:
    return config.model_copy(update={"lora": Lora(file=str(file), scale=scale)})


def weights_of(config: Config) -> dict[str, torch.Tensor]:
    return load_transformer(find_model(config), config, Ranks.alone(torch.device("cpu"))).model.state_dict()


def test_scale_times_the_product_is_added_to_its_weight_and_to_no_other(config: Config, file: Path) -> None:
    from safetensors.torch import load_file

    plain, merged = weights_of(config), weights_of(with_lora(config, file, 0.5))
    assert plain.keys() == merged.keys()
    down, up = load_file(file).values()
    changed = f"{TARGET}.weight"
    torch.testing.assert_close(merged[changed], plain[changed] + 0.5 * up @ down)
    assert [name for name in plain if not torch.equal(plain[name], merged[name])] == [changed]


def on_ranks(ranks: Ranks, file: str) -> Frames | None:
    config = with_lora(load_config("wan-tiny"), Path(file))
    engine = Engine(config, ranks)
    sink = FrameBuffer()
    request = config.request("a red circle", width=64, height=48, frames=5, steps=3, spectrum="off")
    engine.generate(request, [sink] if ranks.leads else [])
    return sink.frames if ranks.leads else None


@pytest.mark.timeout(120)
def test_every_rank_has_it(file: Path) -> None:
    alone = on_ranks(Ranks.alone(torch.device("cpu")), str(file))
    together = run_ranks(2, on_ranks, str(file))[0]
    assert alone is not None
    assert np.abs(alone.astype(int) - together).max() <= 1


def test_it_is_part_of_the_revision(config: Config, file: Path) -> None:
    revisions = {find_model(one).revision for one in (config, with_lora(config, file))}
    revisions.add(find_model(with_lora(config, file, 0.5)).revision)
    assert len(revisions) == 3


def test_a_calibration_of_the_model_without_it_is_refused(config: Config, file: Path, small: Make) -> None:
    engine = Engine(with_lora(config, file))
    with pytest.raises(BadRequestError, match="revision"):
        engine.plan(config.request("a red circle", spectrum="planned-14"))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "cannot be read"),
        ({"vae.weight": (2, 2)}, r"holds no LoRA weights, but vae\.weight"),
        ({"transformer.blocks.99.attn1.to_q.lora_A.weight": (4, 192)}, "does not fit the model: it has no"),
        (
            {
                f"transformer.{TARGET}.lora_A.weight": (4, 7),
                f"transformer.{TARGET}.lora_B.weight": (192, 4),
            },
            "does not fit the model",
        ),
    ],
)
def test_what_is_no_lora_for_this_model_is_refused(
    config: Config, tmp_path: Path, content: dict[str, tuple[int, int]] | None, said: str
) -> None:
    path = tmp_path / "it.safetensors"
    if content is not None:
        save_file({name: torch.ones(shape) for name, shape in content.items()}, path)
    with pytest.raises(BadRequestError, match=said):
        weights_of(with_lora(config, path))
