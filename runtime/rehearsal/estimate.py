"""How long things might take on a GPU: arithmetic with assumed speeds, no measurement.

Each operator takes as long as its operations at the speed that its kind is assumed to reach, or as its bytes
at that of the memory, whichever is longer (a roofline); or all of them together as long as their launches.
Ring transfers hide behind all but one part of the attention; nothing else is assumed to overlap.
"""

from __future__ import annotations

from dataclasses import dataclass

from runtime.parallel.topology import Topology
from runtime.rehearsal.ledger import Operator, Work
from runtime.rehearsal.machine import Gpu
from runtime.rehearsal.phases import Phase

REACHED = {"attention": 0.4, "linear": 0.63, "convolution": 0.5, "other": 1.0}
"""Kind → share of the makers' operations per second that is assumed to be reached."""
REACHED_BYTES = 0.78  # the same of bytes per second of the memory
REACHED_LINK = 0.67  # and of links
LAUNCH = 5e-6  # seconds that a launch takes the host, assumed
LATENCY = 20e-6  # and that a transfer takes at least


@dataclass(frozen=True, slots=True)
class Estimate:
    """Seconds of one phase or step on one rank, estimated.

    Attributes:
        attention, linear, convolution, other: of the operators of each kind.
        launches: that all of them take to launch; it counts where it is more than they take.
        exposed: of transfers that nothing hides.
    """

    attention: float
    linear: float
    convolution: float
    other: float
    launches: float
    exposed: float

    @property
    def total(self) -> float:
        return max(self.attention + self.linear + self.convolution + self.other, self.launches) + self.exposed


def estimate(phase: Phase, topology: Topology, gpu: Gpu) -> Estimate:
    """What a phase or step of one rank might take."""
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
    """Of the operators of each kind."""
    found = dict.fromkeys(REACHED, 0.0)
    for operator, times in work.operators.items():
        found[operator.kind] += times * _of_one(operator, gpu)
    return found


def _of_one(operator: Operator, gpu: Gpu) -> float:
    wide = gpu.tf32_tflops if operator.kind == "convolution" else gpu.float32_tflops
    speed = 1e12 * (gpu.bfloat16_tflops if operator.itemsize <= 2 else wide) * REACHED[operator.kind]
    return max(operator.flops / speed, operator.moved / (1e9 * gpu.memory_gbps * REACHED_BYTES))


def _transfer(sent: int, span: int, gpu: Gpu) -> float:
    """Of what a rank sends at once to `span` neighbouring ranks, itself among them."""
    if not sent:
        return 0.0
    speed = gpu.link_gbps if span <= gpu.per_node else gpu.network_gbps
    return LATENCY + sent / (1e9 * speed * REACHED_LINK)
