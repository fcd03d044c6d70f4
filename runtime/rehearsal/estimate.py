"""Estimates of times on a GPU: arithmetic with assumed speeds.

An operator takes the time of its operations at the speed assumed for its kind, or of its bytes at that of the
memory, whichever is longer (a roofline). A phase takes the time of all its operators, of their launches, or
of its copies between device and host, whichever is longest. Ring transfers overlap with all but one part of
the attention; nothing else overlaps.
"""

from __future__ import annotations

from dataclasses import dataclass

from runtime.parallel.topology import Topology
from runtime.rehearsal.ledger import KINDS, Operator, Work
from runtime.rehearsal.machine import Gpu
from runtime.rehearsal.phases import Phase

REACHED = {"attention": 0.58, "linear": 0.8, "convolution": 0.5, "other": 1.0}
"""Kind of operator → assumed efficiency: share of the makers' operations per second that it reaches.

Attention and matrix products as in a step of 14B on one H100; convolutions are assumed.
"""
REACHED_BYTES = 0.86  # the same for bytes per second of the memory, as an H100 copies
REACHED_LINK = 0.67  # the same for links
REACHED_BUS = 0.8  # the same for the bus to the host
LAUNCH = 20e-6  # seconds of the host for a launch, assumed
LATENCY = 20e-6  # least seconds of a transfer, assumed


@dataclass(frozen=True, slots=True)
class Estimate:
    """Estimated seconds of one phase or step on one rank.

    Attributes:
        attention, linear, convolution, other: seconds of the operators of each kind.
        launches: seconds of all launches; they count where they exceed those of the operators.
        bus: seconds of copies between device and host, which run beside the operators.
        exposed: seconds of transfers that overlap with nothing.
    """

    attention: float
    linear: float
    convolution: float
    other: float
    launches: float
    bus: float
    exposed: float

    @property
    def total(self) -> float:
        """Seconds of the whole phase or step."""
        computing = self.attention + self.linear + self.convolution + self.other
        return max(computing, self.launches, self.bus) + self.exposed


def estimate(phase: Phase, topology: Topology, gpu: Gpu) -> Estimate:
    """Estimate the time of a phase or step of one rank."""
    seconds = _seconds(phase.work, gpu)
    ring = _transfer(phase.sent.get("ring", 0), topology.sequence, gpu)
    hidden = seconds["attention"] * (topology.ring - 1) / topology.ring
    exposed = max(0.0, ring - hidden)
    spans = {
        "ulysses": topology.ulysses,
        "sequence": topology.sequence,
        "cfg": topology.world,
        "everyone": topology.world,
        "node": min(topology.world, gpu.per_node),
    }
    exposed += sum(_transfer(phase.sent.get(axis, 0), span, gpu) for axis, span in spans.items())
    return Estimate(**seconds, launches=phase.work.launches * LAUNCH, exposed=exposed)


def _seconds(work: Work, gpu: Gpu) -> dict[str, float]:
    """Estimate the seconds of the operators of each kind."""
    found = dict.fromkeys(KINDS, 0.0)
    for operator, times in work.operators.items():
        found[operator.kind] += times * _of_one(operator, gpu)
    return found


def _of_one(operator: Operator, gpu: Gpu) -> float:
    if operator.kind == "bus":
        return operator.moved / (1e9 * gpu.host_gbps * REACHED_BUS)
    speed = 1e12 * _tflops(operator, gpu) * REACHED[operator.kind]
    return max(operator.flops / speed, operator.moved / (1e9 * gpu.memory_gbps * REACHED_BYTES))


def _tflops(operator: Operator, gpu: Gpu) -> float:
    """The maker's 10¹² operations per second for an operator's number format."""
    if operator.itemsize == 1 and gpu.fp8_tflops is not None:
        return gpu.fp8_tflops
    if operator.itemsize <= 2:
        return gpu.bfloat16_tflops
    return gpu.tf32_tflops if operator.kind == "convolution" else gpu.float32_tflops


def _transfer(sent: int, span: int, gpu: Gpu) -> float:
    """Estimate the seconds of a transfer.

    Args:
        sent: bytes that a rank sends at once.
        span: number of neighbouring ranks that take part, itself among them.
        gpu: the GPU.
    """
    if not sent:
        return 0.0
    speed = gpu.link_gbps if span <= gpu.per_node else gpu.network_gbps
    return LATENCY + sent / (1e9 * speed * REACHED_LINK)
