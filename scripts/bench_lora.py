"""Seconds of a switch of LoRAs on a loaded engine, beside those of loading the model with them, and the bytes
that a switch moves for Wan2.1 14B.

    python scripts/bench_lora.py

Seconds are those of one thread of the CPU, whatever else the machine does; medians of several rounds.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate import init_empty_weights
from diffusers import WanTransformer3DModel
from safetensors.torch import save_file
from torch import nn

from runtime.engine import Engine
from runtime.models.folder import find_model
from runtime.models.wan.loading import load_transformer
from runtime.models.wan.lora_switch import open_loras
from runtime.parallel.ranks import Ranks
from runtime.request.config import Lora, load_config

_RANK, _ROUNDS, _BF16 = 16, 5, 2
_14B = {"num_attention_heads": 40, "attention_head_dim": 128, "ffn_dim": 13824, "num_layers": 40}


def main() -> None:
    """Measure, and print a line for each number."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    config = load_config("wan-tiny")
    engine = Engine(config)
    with tempfile.TemporaryDirectory() as folder:
        loras = [Lora(file=_write(Path(folder) / f"{name}", engine)) for name in "ab"]
        merged = config.model_copy(update={"lora": (loras[0],)})
        alone = Ranks.alone(torch.device("cpu"))

        def load() -> None:
            found = find_model(merged)
            load_transformer(found, merged, alone, loras=open_loras(found, alone))

        _show("a new engine with it", lambda: Engine(merged))
        _show("its transformer alone", load)
        _show("first switch, which keeps the original weights aside", lambda: _switch(engine, loras[:1]), 1)
        both = (lora for _ in range(_ROUNDS) for lora in loras)
        _show("switch to another", lambda: _switch(engine, [next(both)]))
        seconds = []
        for lora in loras[:1] * _ROUNDS:
            _switch(engine, [lora])
            started = time.process_time()
            _switch(engine, [])
            seconds.append(time.process_time() - started)
        print(f"{statistics.median(seconds):7.3f} s  removal")
    size = sum(one.numel() for one in _projections(_large())) * _BF16 / 1e9
    print(f"{size:7.1f} GB of Wan2.1 14B in bfloat16 are in projections of blocks, which LoRAs change")


def _switch(engine: Engine, loras: list[Lora]) -> None:
    engine.switch(loras)
    engine._merge()


def _show(name: str, measured: Callable[[], object], rounds: int = _ROUNDS) -> None:
    seconds = []
    for _ in range(rounds):
        started = time.process_time()
        measured()
        seconds.append(time.process_time() - started)
    print(f"{statistics.median(seconds):7.3f} s  {name}")


def _projections(model: nn.Module) -> list[nn.Parameter]:
    linear = (one for one in model.get_submodule("blocks").modules() if isinstance(one, nn.Linear))
    return [one.weight for one in linear]


def _write(path: Path, engine: Engine) -> str:
    """Write a random LoRA for every projection of the blocks."""
    model = engine.loaded.experts[0].module
    weights = {}
    for name, module in model.named_modules():
        if name.startswith("blocks.") and isinstance(module, nn.Linear):
            up, down = module.weight.shape
            weights[f"transformer.{name}.lora_A.weight"] = torch.randn(_RANK, down) * 0.01
            weights[f"transformer.{name}.lora_B.weight"] = torch.randn(up, _RANK) * 0.01
    save_file(weights, path)
    return str(path)


def _large() -> WanTransformer3DModel:
    with init_empty_weights():
        return WanTransformer3DModel(**_14B)


if __name__ == "__main__":
    main()
