"""What a step costs on many ranks, from first principles: floating-point operations, bytes and latencies.

The formulas are in docs/scaling.md; `bench_scaling.py` holds them against measurements.
"""

from __future__ import annotations

from dataclasses import dataclass

from runtime.parallel.topology import Topology


@dataclass(frozen=True, slots=True)
class Shape:
    """One generation's transformer work.

    Attributes:
        tokens: L, of the whole sequence.
        layers, width, heads, ffn: n, D, H and F of the transformer.
        text: text tokens T.
        branches: 2 with guidance.
        patch: values of one token's output.
        element: bytes of a value.
    """

    tokens: int
    layers: int
    width: int
    heads: int
    ffn: int
    text: int = 512
    branches: int = 2
    patch: int = 64
    element: int = 2

    @property
    def layer_flops(self) -> float:
        """Of one block and branch, over the whole sequence; attention apart."""
        L, D = self.tokens, self.width
        return 12 * L * D**2 + 4 * self.text * D**2 + 4 * L * self.text * D + 4 * L * D * self.ffn

    @property
    def attention_flops(self) -> float:
        """Of one block's self-attention and branch."""
        return 4.0 * self.tokens**2 * self.width


@dataclass(frozen=True, slots=True)
class Machine:
    """What the ranks run on.

    Attributes:
        flops: floating-point operations per second that a rank reaches.
        memory: bytes per second that a rank reads.
        link: bytes per second that a rank sends to ranks of its node.
        network: the same to other nodes.
        latency: seconds that a transfer takes at least.
        per_node: ranks on one node.
        overhead: seconds of a forecast step that do not depend on any size.
    """

    flops: float
    memory: float
    link: float
    network: float
    latency: float
    per_node: int
    overhead: float


def ulysses_bytes(shape: Shape, topology: Topology) -> float:
    """Sent by all ranks for one layer and branch: query, key, value and output, but for what stays."""
    u = topology.ulysses
    return 4 * shape.tokens * shape.width * shape.element * (u - 1) / u


def ring_bytes(shape: Shape, topology: Topology) -> float:
    """Sent by all ranks for one layer and branch: keys and values, once past every other position."""
    return 2 * shape.tokens * shape.width * shape.element * (topology.ring - 1)


def output_bytes(shape: Shape, topology: Topology) -> float:
    """Sent by all ranks at every step: every rank gets every patch; the branches are joined first."""
    whole = shape.tokens * shape.patch * shape.element
    joined = 2 * whole if topology.cfg == 2 else 0.0
    gathered = whole * topology.cfg * (topology.sequence - 1)
    return joined + gathered


def computed_bytes(shape: Shape, topology: Topology) -> float:
    """Sent by all ranks at one computed step."""
    attention = ulysses_bytes(shape, topology) + ring_bytes(shape, topology)
    return shape.branches * shape.layers * attention + output_bytes(shape, topology)


def computed_seconds(shape: Shape, topology: Topology, machine: Machine) -> float:
    """One computed step. Ring transfers hide behind attention as far as it lasts."""
    s, ranks = topology.sequence, topology.world
    dense = shape.layer_flops / s / machine.flops
    attention = shape.attention_flops / s / machine.flops
    branch_ranks = ranks / topology.cfg
    exchange = ulysses_bytes(shape, topology) / branch_ranks / _speed(topology.ulysses, machine)
    exchange += 2 * machine.latency if topology.ulysses > 1 else 0.0
    passing = ring_bytes(shape, topology) / branch_ranks / _speed(s, machine)
    passing += (topology.ring - 1) * machine.latency
    hidden = attention * (topology.ring - 1) / topology.ring
    layer = dense + attention + exchange + max(0.0, passing - hidden)
    local = shape.branches / topology.cfg
    return local * shape.layers * layer + _output_seconds(shape, topology, machine)


def forecast_seconds(shape: Shape, topology: Topology, machine: Machine, remembered: int) -> float:
    """One forecast step: reads the remembered features once, projects, and exchanges the output."""
    feature = shape.tokens / topology.sequence * shape.width * shape.element
    local = shape.branches / topology.cfg
    head = 2 * shape.tokens / topology.sequence * shape.width * shape.patch / machine.flops
    reading = (remembered + 4) * feature / machine.memory  # and the norm's passes over the sum
    return machine.overhead + local * (reading + head) + _output_seconds(shape, topology, machine)


def _output_seconds(shape: Shape, topology: Topology, machine: Machine) -> float:
    if topology.world == 1:
        return 0.0
    transfers = (topology.cfg > 1) + (topology.sequence > 1)
    per_rank = output_bytes(shape, topology) / topology.world
    return per_rank / _speed(topology.world, machine) + transfers * machine.latency


def _speed(span: int, machine: Machine) -> float:
    """Bytes per second between `span` neighbouring ranks: the slowest link decides."""
    return machine.link if span <= machine.per_node else machine.network
