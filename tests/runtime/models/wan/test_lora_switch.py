"""LoRAs that are switched on a loaded engine: its weights are those of a fresh load, to the bit."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch._dynamo.utils import counters

from runtime.engine import Engine
from runtime.errors import BadRequestError
from runtime.media.mp4 import FrameBuffer
from runtime.models.folder import ModelFolder, find_model
from runtime.models.loading import open_offload
from runtime.models.loras import fit_on_all
from runtime.models.wan.adapter import Transformer
from runtime.models.wan.loading import load_transformer
from runtime.models.wan.lora_switch import WanLoras, loras_of, open_loras
from runtime.parallel.ranks import Ranks
from runtime.parallel.sharding import own_share, whole_of
from runtime.request.config import Config, Dtypes, Lora
from runtime.request.memory import Memory
from runtime.request.video_request import VideoRequest
from tests.conditioned import CHANNELS, HEADS, config_of, write_two_experts, write_vace
from tests.newer import DEFAULT_BACKEND
from tests.ranks import WarmRanks, run_ranks

WIDTH, FFN = HEADS * CHANNELS, 96
State = dict[str, torch.Tensor]
Loras = Sequence[Lora]


def write(path: Path, seed: int, *, pairs: Sequence[str], size: float = 0.3) -> str:
    """A LoRA for projections of the tiny models, with differences of weights in blocks and elsewhere."""
    generator = torch.Generator().manual_seed(seed)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator) * size

    shapes = {"ffn.0": (WIDTH, FFN), "ffn.2": (FFN, WIDTH)}
    weights = {
        "blocks.0.diff_m": drawn(1, 6, WIDTH),
        f"blocks.{seed % 2}.norm3.diff": drawn(WIDTH),
        "blocks.1.norm3.diff_b": drawn(WIDTH),
        "head.diff_m": drawn(1, 2, WIDTH),
        "time_projection.1.diff_b": drawn(6 * WIDTH),
    }
    for name in pairs:
        inputs, outputs = shapes.get(name.split(".", 2)[-1], (WIDTH, WIDTH))
        weights |= {f"{name}.lora_down.weight": drawn(3, inputs), f"{name}.lora_up.weight": drawn(outputs, 3)}
        weights[f"{name}.diff_b"] = drawn(outputs)
        if name.startswith("blocks."):  # diffusers reads no others
            weights[f"{name}.alpha"] = torch.tensor(2.0)
    save_file({f"diffusion_model.{name}": one for name, one in weights.items()}, path)
    return str(path)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """Two LoRAs, which share some of their weights."""
    folder = tmp_path_factory.mktemp("loras")
    one = ["blocks.0.self_attn.q", "blocks.1.ffn.2", "blocks.1.cross_attn.v", "text_embedding.2"]
    two = ["blocks.0.self_attn.q", "blocks.1.self_attn.o", "blocks.0.ffn.0"]
    return write(folder / "one", 1, pairs=one), write(folder / "two", 2, pairs=two)


@pytest.fixture(scope="module")
def experts(config: Config, tmp_path_factory: pytest.TempPathFactory) -> Config:
    return config_of(config, write_two_experts("WanPipeline", tmp_path_factory.mktemp("two")))


@pytest.fixture(scope="module")
def vace(config: Config, tmp_path_factory: pytest.TempPathFactory) -> Config:
    return config_of(config, write_vace(tmp_path_factory.mktemp("vace")))


@dataclass(frozen=True)
class Loaded:
    """Transformers of a model as the engine loads them, without its other parts."""

    folder: ModelFolder
    ranks: Ranks
    experts: dict[str, Transformer]
    loras: WanLoras

    @classmethod
    def of(cls, config: Config, ranks: Ranks, folder: ModelFolder) -> Loaded:
        parts = folder.family.experts(folder)
        offload = open_offload(config.memory, len(parts), ranks.device)
        opened, loras, experts = open_loras(folder, ranks), WanLoras(ranks, folder), {}
        for settings in parts:
            name, own = settings.name, loras_of(settings.name, opened)
            experts[name], weights, read = load_transformer(folder, config, ranks, name, offload, own)
            loras.add(name, experts[name], weights, read)
        return cls(folder, ranks, experts, loras)

    def switch(self, loras: Loras) -> None:
        self.loras.switch(fit_on_all(self.folder, loras, self.ranks))

    @property
    def state(self) -> State:
        """Whole weights of all transformers."""
        return {
            f"{expert} {name}": whole_of(weight, self.ranks.everyone).detach().clone()
            for expert, module in self.experts.items()
            for name, weight in module.named_parameters()
        }

    @property
    def places(self) -> list[int]:
        modules = self.experts.values()
        return [own_share(weight).data_ptr() for module in modules for weight in module.parameters()]


def equal(one: State, other: State) -> bool:
    """Whether two states are the same bits; nothing is compared in float8."""
    return one.keys() == other.keys() and all(
        one[name].dtype == other[name].dtype
        and torch.equal(one[name].view(torch.uint8), other[name].view(torch.uint8))
        for name in one
    )


def alone() -> Ranks:
    return Ranks.alone(torch.device("cpu"))


def walk(ranks: Ranks, config: Config, way: Sequence[Loras]) -> list[tuple[bool, bool, bool]]:
    """After each switch of a loaded model: whether its weights are those of a fresh load with these LoRAs;
    those that it had at first; and whether they are at the same place in memory."""
    folder = find_model(config)
    loaded = Loaded.of(config, ranks, folder)
    first, places = loaded.state, loaded.places
    found = []
    for loras in way:
        loaded.switch(loras)
        now, fresh = loaded.state, Loaded.of(config, ranks, folder.with_loras(loras)).state
        found.append((equal(now, fresh), equal(now, first), loaded.places == places))
    return found


def way_of(one: str, two: str) -> list[Loras]:
    """None → A → B at two scales → A and B → none."""
    a, b = Lora(file=one), Lora(file=two, scale=-0.6)
    return [[a], [b], [b.model_copy(update={"scale": 1.7})], [a, b], [b, a], []]


def dtypes(transformer: str, compute: str | None = None) -> Dtypes:
    return Dtypes(transformer=transformer, compute=compute, text_encoder="float32", vae="float32")


MADE = [(True, False, True)] * 5 + [(True, True, True)]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"memory": Memory(experts="swap")},
        {"dtype": dtypes("bfloat16")},
        {"dtype": dtypes("bfloat16", "float32")},
        {"dtype": dtypes("float32", "bfloat16")},
        {"fuse_projections": True, "memory": Memory(experts="swap")},
        {"quantization": "int8", "memory": Memory(transformer="offload")},
        {"quantization": "fp8", "fuse_projections": True, "dtype": dtypes("bfloat16")},
    ],
    ids=["float32", "swap", "bfloat16", "widened", "rounded", "fused", "int8", "fp8"],
)
def test_a_switch_makes_the_weights_of_a_fresh_load(
    experts: Config, files: tuple[str, str], changes: dict[str, object]
) -> None:
    """Both experts, with pairs of matrices and differences. Original weights of which the device has not all
    bits are read from the files again."""
    config = experts.model_copy(update=changes)
    assert walk(alone(), config, way_of(*files)) == MADE


def test_experts_have_loras_of_their_own(experts: Config, files: tuple[str, str]) -> None:
    one, two = files
    high, low = Lora(file=one, expert="high"), Lora(file=two, scale=0.5, expert="low")
    way: list[Loras] = [[high, low], [low], [Lora(file=one), low], [high], []]
    assert walk(alone(), experts, way) == [*MADE[:4], MADE[-1]]


def test_vace_has_them_in_its_blocks_alone(vace: Config, files: tuple[str, str], tmp_path: Path) -> None:
    own = tmp_path / "own"
    shape = {"A": (2, WIDTH), "B": (WIDTH, 2)}
    name = "transformer.vace_blocks.1.attn1.to_k.lora_"
    save_file({f"{name}{part}.weight": torch.full(shape[part], 0.1) for part in shape}, own)
    way: list[Loras] = [[Lora(file=str(own))], [Lora(file=files[0])], []]
    assert walk(alone(), vace, way) == [*MADE[:2], MADE[-1]]


@pytest.mark.parametrize(
    ("world", "changes"),
    [
        (2, {}),
        (2, {"memory": Memory(transformer="shard"), "dtype": dtypes("bfloat16")}),
        (3, {"memory": Memory(transformer="shard")}),
        (2, {"memory": Memory(transformer="shard"), "quantization": "int8", "fuse_projections": True}),
    ],
    ids=["whole", "shard", "uneven", "quantised"],
)
@pytest.mark.timeout(240)
def test_every_rank_switches(
    experts: Config, files: tuple[str, str], warm: WarmRanks, world: int, changes: dict[str, object]
) -> None:
    config = experts.model_copy(update=changes)
    way = way_of(*files)[-3:]
    assert warm.run(world, walk, config, way) == [MADE[-3:]] * world


def test_a_model_that_was_loaded_with_a_lora_can_lose_it(experts: Config, files: tuple[str, str]) -> None:
    folder, (a, b) = find_model(experts), (Lora(file=file) for file in files)
    loaded, plain = (Loaded.of(experts, alone(), one) for one in (folder.with_loras([a]), folder))
    for loras in ([b], [], [a]):
        loaded.switch(loras)
        plain.switch(loras)
        assert equal(loaded.state, plain.state)


def test_original_weights_are_not_read_from_files_that_have_changed(
    experts: Config, files: tuple[str, str], tmp_path: Path
) -> None:
    model = tmp_path / "model"
    shutil.copytree(str(experts.model), model)
    config = experts.model_copy(update={"model": str(model)})
    loaded = Loaded.of(config, alone(), find_model(config).with_loras([Lora(file=files[0])]))
    before = loaded.state
    shutil.copy(model / "transformer/config.json", model / "transformer/other.json")
    with pytest.raises(BadRequestError, match="its files have changed"):
        loaded.switch([])
    assert equal(loaded.state, before)


def test_only_what_a_lora_changes_is_kept_aside(experts: Config, files: tuple[str, str]) -> None:
    loaded = Loaded.of(experts, alone(), find_model(experts))
    before = loaded.state
    assert loaded.loras.host_bytes == 0
    loaded.switch([Lora(file=files[0], expert="low")])
    changed = [name for name, one in loaded.state.items() if not torch.equal(one, before[name])]
    assert {name.split()[0] for name in changed} == {"transformer_2"}
    assert loaded.loras.host_bytes == sum(before[name].nbytes for name in changed)


def ask(config: Config) -> VideoRequest:
    size = {"width": 64, "height": 48, "frames": 5, "max_sequence_length": 32}
    return config.request("a red circle", **size, steps=3, spectrum="off", seed=3)


def with_loras(config: Config, loras: Loras) -> Config:
    return config.model_copy(update={"lora": tuple(loras)})


def generated(engine: Engine) -> list[str]:
    return engine.generate(ask(engine.config), [FrameBuffer()]).frames_sha256


@pytest.mark.parametrize("memory", [Memory(), Memory(experts="swap")], ids=["keep", "swap"])
def test_frames_are_those_of_a_fresh_engine(experts: Config, files: tuple[str, str], memory: Memory) -> None:
    """Blocks that are on the device when they change come to it anew."""
    experts = experts.model_copy(update={"memory": memory})
    engine, (a, b) = Engine(experts), (Lora(file=file, scale=0.5) for file in files)
    plain = generated(engine)
    engine.switch([a])
    engine.switch([a, b])  # of what is not used nothing is merged
    fresh = Engine(with_loras(experts, [a, b]))
    assert engine.model.revision == fresh.model.revision
    assert generated(engine) == generated(fresh) != plain
    engine.switch([])
    assert generated(engine) == plain


def broken(path: Path) -> str:
    """A LoRA whose metadata says that another rank was trained: seen when it is merged, not before."""
    name = "transformer.blocks.0.attn1.to_q.lora_"
    weights = {f"{name}A.weight": torch.ones(2, WIDTH), f"{name}B.weight": torch.ones(WIDTH, 2)}
    told = '{"transformer.r": 5, "transformer.lora_alpha": 5}'
    save_file(weights, path, metadata={"lora_adapter_metadata": told})
    return str(path)


def refuse(ranks: Ranks, config: Config, good: str, bad: Loras, said: str) -> list[bool]:
    """Weights before and after a switch that is refused, on each rank, and after one that is not."""
    loaded = Loaded.of(config, ranks, find_model(config))
    loaded.switch([Lora(file=good)])
    before = loaded.state
    with pytest.raises(BadRequestError, match=said):
        loaded.switch(bad)
    unchanged = equal(before, loaded.state)
    loaded.switch([Lora(file=good)])
    return [unchanged, equal(before, loaded.state)]


@pytest.mark.timeout(240)
def test_what_cannot_be_merged_is_refused_before_any_weight_changes(
    experts: Config, files: tuple[str, str], tmp_path: Path, warm: WarmRanks
) -> None:
    """Each is found later than the one before: no file; names of another model; while merging the second of
    two files, for the second expert; a weight that overflows."""
    good, other = files
    half = experts.model_copy(update={"dtype": dtypes("float16", "float32")})
    strange = tmp_path / "strange"
    save_file({f"blocks.9.attn1.to_q.lora_{part}.weight": torch.ones(2, 2) for part in "AB"}, strange)
    cases: list[tuple[Config, Loras, str]] = [
        (experts, [Lora(file=str(tmp_path / "none"))], "No such file"),
        (experts, [Lora(file=str(strange))], "which has no blocks.9.attn1.to_q"),
        (experts, [Lora(file=other), Lora(file=broken(tmp_path / "bad"), expert="low")], "does not fit"),
        (half, [Lora(file=other, scale=1000.0), Lora(file=other, scale=1000.0)], "or overflow float16"),
    ]
    large = write(tmp_path / "large", 3, pairs=["blocks.0.self_attn.k"], size=100.0)
    cases[-1] = (half, [Lora(file=large, scale=1000.0)], "would not be finite, or overflow float16")
    for config, bad, said in cases:
        assert refuse(alone(), config, good, bad, said) == [True, True]
    assert warm.run(2, refuse, experts, good, cases[2][1], cases[2][2]) == [[True, True]] * 2


def test_a_file_that_changed_after_it_was_checked_is_refused(
    experts: Config, files: tuple[str, str], tmp_path: Path
) -> None:
    folder, path = find_model(experts), tmp_path / "it"
    loaded = Loaded.of(experts, alone(), folder)
    before = loaded.state
    path.write_bytes(Path(files[0]).read_bytes())
    checked = folder.with_loras([Lora(file=str(path))])
    path.write_bytes(Path(files[1]).read_bytes())
    with pytest.raises(BadRequestError, match="it' given; the file has changed since it was checked"):
        loaded.loras.switch(checked)
    assert equal(loaded.state, before)


def test_files_are_read_once_for_both_experts(
    experts: Config, files: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once when they are checked, unless they were, and once when they are merged."""
    read: list[Path] = []
    whole: Callable[[Path], bytes] = Path.read_bytes

    def counted(path: Path) -> bytes:
        read.append(path)
        return whole(path)

    monkeypatch.setattr(Path, "read_bytes", counted)
    loaded = Loaded.of(experts, alone(), find_model(experts))
    loras = [Lora(file=file) for file in files]
    loaded.switch(loras)
    loaded.switch([])
    read.clear()
    loaded.switch(loras)
    assert sorted(str(path) for path in read if str(path) in files) == sorted(files)


def compiled(ranks: Ranks, config: Config, loras: Loras) -> list[int]:
    """Graphs that were compiled after each generation, before and after two switches."""
    torch.compiler.set_default_backend("eager")
    engine, graphs = Engine(config, ranks), []
    for each in ([], loras, []):
        engine.switch(each)
        engine.generate(ask(config), [FrameBuffer()] if ranks.is_leader else [])
        graphs.append(counters["stats"]["unique_graphs"])
    return graphs


@DEFAULT_BACKEND
@pytest.mark.timeout(240)
def test_compiled_blocks_are_not_compiled_again(experts: Config, files: tuple[str, str]) -> None:
    config = experts.model_copy(update={"compile": True})
    [graphs] = run_ranks(1, compiled, config, [Lora(file=files[0])])
    assert 0 < graphs[0] == graphs[1] == graphs[2]
