"""Blocks that live in host memory: what is on the device, what is copied when, and the same bits."""

from __future__ import annotations

import weakref
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from runtime.parallel.offloading import Offload, Visitor

CPU = torch.device("cpu")
BLOCK = 512 + 512  # bytes: a weight of 8 × 8 and a bias of 8 in float32, both aligned


def blocks_of(seed: int, count: int = 5) -> list[nn.Linear]:
    torch.manual_seed(seed)
    return [nn.Linear(8, 8).requires_grad_(False) for _ in range(count)]


def offloaded(
    places: int | None, *seeds: int
) -> tuple[Offload, list[list[nn.Linear]], list[list[torch.Tensor]]]:
    """Transformers in host memory, and copies of their weights."""
    every = [blocks_of(seed) for seed in seeds]
    copies = [[weight.clone() for block in blocks for weight in block.parameters()] for blocks in every]
    offload = Offload(CPU, places)
    for blocks in every:
        for position, block in enumerate(blocks):
            offload.add(block, position)
    offload.open()
    return offload, every, copies


def storages(block: nn.Linear) -> set[int]:
    return {weight.untyped_storage().data_ptr() for weight in block.parameters()}


def run(offload: Offload, blocks: list[nn.Linear]) -> torch.Tensor:
    value = torch.ones(2, 8)
    for block in offload.visit(blocks):
        value = block(value)
    return value


def same(blocks: list[nn.Linear], copies: list[torch.Tensor]) -> bool:
    weights = [weight for block in blocks for weight in block.parameters()]
    return all(torch.equal(one, other) for one, other in zip(weights, copies, strict=True))


def test_two_blocks_are_on_the_device_and_each_is_copied_once_in_a_visit() -> None:
    offload, (blocks,), _ = offloaded(2, 1)
    assert offload.held == offload.peak == 2 * BLOCK
    offload.expect(blocks)
    assert offload.moved == 2 * BLOCK
    for visit in range(1, 4):
        for number, block in enumerate(offload.visit(blocks)):
            assert offload.held == 2 * BLOCK, number
            assert len(storages(block)) == 1
        assert offload.moved == (2 + 5 * visit) * BLOCK  # the first two are there when the next one begins
    assert offload.peak == 2 * BLOCK


def test_the_next_block_comes_before_a_block_runs() -> None:
    """Its weights are in the other place while a block is visited, not copied when it is its turn."""
    offload, (blocks,), _ = offloaded(2, 1)
    places = [one.memory for one in offload._places]
    for number, block in enumerate(offload.visit(blocks)):
        own, other = (places[(number + by) % 2] for by in (0, 1))
        assert own is not None and other is not None
        assert storages(block) == {own.untyped_storage().data_ptr()}
        if number + 1 < len(blocks):
            arrived = other.narrow(0, 0, 256).view(torch.float32).view(8, 8)
            assert torch.equal(arrived, blocks[number + 1].weight)


@pytest.mark.parametrize("places", [1, 2, 3, None])
def test_weights_are_the_same_bits_whoever_is_visited(places: int | None) -> None:
    offload, both, copies = offloaded(places, 1, 2)
    whole = [blocks_of(seed) for seed in (1, 2)]
    for number in (0, 1, 0, 1, 1):
        expected = torch.ones(2, 8)
        for block in whole[number]:
            expected = block(expected)
        assert torch.equal(run(offload, both[number]), expected)
        assert all(same(blocks, copied) for blocks, copied in zip(both, copies, strict=True))
        assert all(offload.holds(weight) for block in both[number] for weight in block.parameters())
    assert not offload.holds(nn.Parameter(torch.zeros(8)))


def test_transformers_take_turns_and_one_that_stays_is_not_copied_again() -> None:
    offload, both, _ = offloaded(None, 1, 2)
    assert offload.held == 5 * BLOCK
    for number, copied in ((0, 5), (0, 5), (1, 10), (1, 10), (0, 15)):
        run(offload, both[number])
        assert offload.moved == copied * BLOCK
    assert offload.peak == 5 * BLOCK


def test_one_that_is_expected_is_there_before_it_is_visited() -> None:
    offload, both, _ = offloaded(None, 1, 2)
    run(offload, both[0])
    offload.expect(both[1])
    assert offload.moved == 10 * BLOCK
    run(offload, both[1])
    assert offload.moved == 10 * BLOCK


def test_blocks_of_several_sizes_share_places() -> None:
    torch.manual_seed(1)
    blocks = [nn.Linear(8, 8), nn.Linear(8, 40), nn.Linear(40, 8), nn.Linear(8, 8)]
    expected = torch.ones(2, 8)
    for block in blocks:
        expected = block(expected)
    offload = Offload(CPU, 2)
    for position, block in enumerate(blocks):
        offload.add(block, position)
    assert torch.equal(run(offload, blocks), expected)
    assert offload.held == (1536 + 512) + (1536 + 512)


def test_buffers_and_other_dtypes_come_along() -> None:
    block = nn.Sequential(nn.Linear(3, 3, dtype=torch.bfloat16), nn.BatchNorm1d(3)).eval()
    kept = {name: tensor.clone() for name, tensor in block.state_dict().items()}
    offload = Offload(CPU, 2)
    offload.add(block, 0)
    for visited in offload.visit([block]):
        there = visited.state_dict()
        assert there.keys() == kept.keys()
        for name, one in kept.items():
            assert torch.equal(there[name], one) and there[name].dtype == one.dtype, name
        assert {one.untyped_storage().data_ptr() for one in there.values()} == {
            offload._places[0].memory.untyped_storage().data_ptr()  # type: ignore[union-attr]
        }


@pytest.mark.parametrize("places", [2, None])
def test_a_visit_that_ends_early_leaves_each_block_whole(places: int | None) -> None:
    offload, both, copies = offloaded(places, 1, 2)
    expected = [run(offload, blocks) for blocks in both]
    for number, last in ((0, 2), (1, 3)):
        for block in offload.visit(both[number]):
            if block is both[number][last]:
                break
        assert all(same(blocks, copied) for blocks, copied in zip(both, copies, strict=True))
        assert torch.equal(run(offload, both[1 - number]), expected[1 - number])


def test_memory_that_runs_out_spoils_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    offload, both, copies = offloaded(2, 1, 2)
    expected = run(offload, both[0])
    copy, calls = torch.Tensor.copy_, []

    def fails(*given: object, **named: object) -> torch.Tensor:
        calls.append(given)
        if len(calls) == 3:
            raise torch.OutOfMemoryError("out of memory")
        return copy(*given, **named)  # type: ignore[arg-type]

    with monkeypatch.context() as patch, pytest.raises(torch.OutOfMemoryError):
        patch.setattr(torch.Tensor, "copy_", fails)
        run(offload, both[1])
    assert len(calls) == 3
    assert all(same(blocks, copied) for blocks, copied in zip(both, copies, strict=True))
    assert torch.equal(run(offload, both[0]), expected)


@pytest.mark.parametrize("places", [2, None])
def test_what_is_written_is_what_runs(places: int | None) -> None:
    """Also of a block whose weights are on the device, or on their way."""
    offload, (blocks,), _ = offloaded(places, 1)
    run(offload, blocks)
    for number in (0, 1, 4):
        offload.write(blocks[number], {"weight": torch.full((8, 8), 0.1), "bias": torch.zeros(8)})
    whole = blocks_of(1)
    for number in (0, 1, 4):
        whole[number].weight.fill_(0.1)
        whole[number].bias.zero_()
    expected = torch.ones(2, 8)
    for block in whole:
        expected = block(expected)
    assert torch.equal(run(offload, blocks), expected)


class Lane:
    """A stream that notes what it is told to do."""

    def __init__(self, log: list[str], name: str):
        self._log, self._name = log, name

    def __enter__(self) -> None: ...
    def __exit__(self, *_: object) -> None: ...
    def wait_stream(self, other: Lane) -> None:
        self._log.append(f"{self._name} waits for all of {other._name}")

    def wait_event(self, event: Mark) -> None:
        self._log.append(f"{self._name} waits for {event.name}")

    def mark(self, name: str) -> None:
        self._log.append(f"{self._name} has {name}")


class Mark:
    """An event that notes where it is recorded."""

    def __init__(self, name: str):
        self.name = name

    def record(self, lane: Lane) -> None:
        lane.mark(self.name)


def test_copies_and_blocks_wait_for_each_other_and_for_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy waits until the block in its place has run, and a block for its weights; when a block runs, the
    copy of the one after it has been queued."""
    log: list[str] = []
    names = iter(["arrived at 0", "left 0", "arrived at 1", "left 1"])
    module = SimpleNamespace(
        Stream=lambda: Lane(log, "copying"),
        current_stream=lambda _: Lane(log, "computing"),
        Event=lambda: Mark(next(names)),
        stream=lambda lane: lane,
    )
    monkeypatch.setattr(torch, "get_device_module", lambda _: module)
    offload, (blocks,), _ = offloaded(2, 1)
    log.clear()
    for number, _ in enumerate(offload.visit(blocks[:3])):
        log.append(f"block {number}")

    def copy_to(place: int) -> list[str]:
        return [f"copying waits for left {place}", f"copying has arrived at {place}"]

    def run_in(place: int, block: int) -> list[str]:
        return [f"computing waits for arrived at {place}", f"block {block}", f"computing has left {place}"]

    assert log == [
        "copying waits for all of computing",
        *copy_to(0),
        *copy_to(1),
        *run_in(0, block=0),
        *copy_to(0),  # of block 2, while block 1 runs
        *run_in(1, block=1),
        *run_in(0, block=2),
        *copy_to(0),  # of block 0, for the next visit; block 1 is still there
    ]


class Tied(nn.Module):
    """A module of which two share a weight, as a text encoder's embeddings do."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.embedding, self.output = nn.Embedding(8, 8), nn.Linear(8, 8, bias=False)
        self.output.weight = self.embedding.weight
        self.register_buffer("shift", torch.randn(8, dtype=torch.bfloat16))
        self.requires_grad_(False)

    def forward(self) -> torch.Tensor:
        found: torch.Tensor = self.output(self.embedding(torch.arange(8))) + self.shift
        return found


def test_a_visitor_has_the_same_bits_wherever_it_is() -> None:
    module = Tied()
    visitor = Visitor(module, CPU)
    copies = {name: tensor.clone() for name, tensor in module.state_dict().items()}

    def whole() -> set[int]:
        """Storages of all weights, which are the module's own."""
        assert all(torch.equal(one, copies[name]) for name, one in module.state_dict().items())
        return {one.untyped_storage().data_ptr() for one in module.state_dict().values()}

    visitor.come()  # it has never left
    first = module()
    visitor.leave()
    (home,) = whole()
    assert len(module.state_dict()["shift"].untyped_storage()) == BLOCK  # the shared weight has one room
    for _ in range(2):
        visitor.come()
        (there,) = whole()
        assert there != home and torch.equal(module(), first)
        visitor.come()
        assert whole() == {there}  # it was there
        visitor.leave()
        assert whole() == {home} and torch.equal(module(), first)


def test_a_visitor_lets_go_of_the_devices_memory() -> None:
    module = Tied()
    visitor = Visitor(module, CPU)
    before = weakref.ref(module.embedding.weight)
    visitor.leave()
    visitor.come()
    there = weakref.ref(module.embedding.weight)
    assert before() is None and there() is not None
    visitor.leave()
    assert there() is None
