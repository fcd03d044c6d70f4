"""LoRA weights for one of two experts: added to its transformer, and to no other."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from runtime.errors import BadRequestError
from runtime.models.folder import find_model
from runtime.models.wan.loading import load_transformer
from runtime.models.wan.lora_switch import loras_of, open_loras
from runtime.parallel.ranks import Ranks
from runtime.request.config import Config, Lora
from tests.conditioned import CHANNELS, EXPERTS, HEADS, config_of, write_two_experts

TARGET, WIDTH = "blocks.1.attn1.to_v", HEADS * CHANNELS
State = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_two_experts("WanPipeline", tmp_path_factory.mktemp("two"))


def write(path: Path, seed: int) -> str:
    torch.manual_seed(seed)
    weights = {f"blocks.1.self_attn.v.lora_{part}.weight": torch.randn(3, WIDTH) for part in ("A", "B")}
    weights["blocks.1.self_attn.v.lora_B.weight"] = torch.randn(WIDTH, 3)
    save_file(weights | {"blocks.0.diff_m": torch.randn(1, 6, WIDTH)}, path)
    return str(path)


def transformers_of(config: Config) -> dict[str, State]:
    alone, found = Ranks.alone(torch.device("cpu")), find_model(config)
    loras = open_loras(found, alone)
    return {
        name: load_transformer(found, config, alone, name, loras=loras_of(name, loras)).model.state_dict()
        for name in EXPERTS
    }


def with_loras(config: Config, *loras: Lora) -> Config:
    return config.model_copy(update={"lora": loras})


def changed(before: State, after: State) -> set[str]:
    return {name for name, value in before.items() if not torch.equal(value, after[name])}


def test_each_expert_has_its_own(config: Config, folder: Path, tmp_path: Path) -> None:
    own = config_of(config, folder)
    one, two = write(tmp_path / "one", 1), write(tmp_path / "two", 2)
    plain = transformers_of(own)
    high, low = Lora(file=one, expert="high"), Lora(file=two, scale=0.5, expert="low")
    both = transformers_of(with_loras(own, high, low))
    merged = {f"{TARGET}.weight", "blocks.0.scale_shift_table"}
    assert [changed(plain[name], both[name]) for name in EXPERTS] == [merged, merged]
    for number, lora in enumerate((high, low)):
        alone = transformers_of(with_loras(own, lora))
        mine, other = EXPERTS[number], EXPERTS[1 - number]
        assert changed(both[mine], alone[mine]) == set() == changed(plain[other], alone[other])
        whole = transformers_of(with_loras(own, lora.model_copy(update={"expert": None})))
        assert changed(both[mine], whole[mine]) == set()
        assert changed(plain[other], whole[other]) == merged


def test_the_expert_is_part_of_the_revision(config: Config, folder: Path, tmp_path: Path) -> None:
    own, file = config_of(config, folder), write(tmp_path / "one", 1)
    given = [Lora(file=file), Lora(file=file, expert="high"), Lora(file=file, expert="low")]
    assert len({find_model(with_loras(own, lora)).revision for lora in given}) == 3


def test_a_model_of_one_transformer_has_none_for_one_expert(config: Config, tmp_path: Path) -> None:
    lora = Lora(file=write(tmp_path / "one", 1), expert="low")
    with pytest.raises(
        BadRequestError, match="it is for the expert for low noise; the model has one transformer"
    ):
        find_model(with_loras(config, lora))
