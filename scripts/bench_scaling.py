"""What many ranks cost and gain: bytes against theory, times against one rank, and a cost model for more.

One run measures all sides: in every round each topology runs once, one rank alone among them.

    python scripts/bench_scaling.py --out docs/scaling.md
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import os
import pickle
import platform
import socket
import sys
import tempfile
import time
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import torch
from cost_model import (
    Machine,
    Shape,
    computed_bytes,
    computed_seconds,
    forecast_seconds,
    output_bytes,
)
from diffusers import UniPCMultistepScheduler, WanTransformer3DModel

from runtime.files.atomic import whole_file
from runtime.models.wan.adapter import WanAdapter
from runtime.models.wan.attention import SelfAttention
from runtime.parallel.attention import attend
from runtime.parallel.kernels import find_kernel
from runtime.parallel.meeting import Rendezvous
from runtime.parallel.ranks import Ranks, join
from runtime.parallel.topology import Topology
from runtime.request.config import load_config
from runtime.sampling.coordinator import RECORD_BYTES, Coordinator
from runtime.sampling.denoise import Denoising, denoise
from runtime.sampling.streams import Branch, FeatureStream, Network
from runtime.versions import versions
from spectrum import ChebyshevRidge, FixedSchedule, StepKind

GOAL = 0.65  # of one rank's denoising time on two
HEADS, HEAD_DIM, LAYERS, FFN, TEXT = 8, 64, 4, 2048, 64
LATENTS = (16, 4, 32, 32)  # C, F, H, W: 1024 tokens
STEPS, COMPUTED = 8, (0, 1, 2, 5)
PAIRS = [Topology(cfg=2), Topology(ulysses=2), Topology(ring=2)]
FOURS = [Topology(ulysses=4), Topology(ring=4), Topology(ring=2, ulysses=2), Topology(cfg=2, ulysses=2)]
ALONE = Topology()


@dataclass(frozen=True, slots=True)
class Measured:
    """One topology, over all rounds: the least seconds of a step, and bytes sent by all ranks."""

    computed: float
    forecast: float
    denoise: float
    computed_bytes: int
    forecast_bytes: int


@torch.no_grad()
def run_once(ranks: Ranks, topology: Topology) -> Measured:
    """Denoise a random model's video once as one rank of `topology`."""
    torch.manual_seed(0)
    model = WanTransformer3DModel(
        num_attention_heads=HEADS,
        attention_head_dim=HEAD_DIM,
        num_layers=LAYERS,
        ffn_dim=FFN,
        text_dim=64,
        freq_dim=64,
    ).eval()
    noise, texts = torch.randn(1, *LATENTS), torch.randn(2, 1, TEXT, 64)
    group, adapter = ranks.group(topology), WanAdapter(model)
    geometry = adapter.geometry(noise)
    tokens = geometry.grid.tokens
    if topology.sequence > 1:
        place = group.attention(tokens, HEADS)
        SelfAttention(model).split(partial(attend, group=place, kernel=find_kernel("flash")))
    both = Branch("cond", adapter.text(texts[0])), Branch("uncond", adapter.text(texts[1]))
    network = Network(adapter, geometry, group.branches(both), group.guidance(5.0), group.sequence(tokens))
    sampler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    sampler.set_timesteps(STEPS)
    schedule = FixedSchedule(STEPS, COMPUTED)
    coordinator = Coordinator({"cond": schedule, "uncond": schedule}, "", ranks)
    stream = FeatureStream(network, ChebyshevRidge(horizon=STEPS))
    started = time.perf_counter()
    steps = list(denoise(Denoising(noise), sampler, stream, coordinator, ranks))
    seconds = time.perf_counter() - started
    of_kind = {kind: [step for step in steps if step.kind is kind] for kind in StepKind}
    computed, forecast = of_kind[StepKind.COMPUTE], of_kind[StepKind.FORECAST]
    return Measured(
        computed=min(step.seconds for step in computed),
        forecast=min(step.seconds for step in forecast),
        denoise=seconds,
        computed_bytes=computed[-1].sent,
        forecast_bytes=forecast[-1].sent,
    )


def run_rounds(ranks: Ranks, topologies: list[Topology], rounds: int) -> dict[Topology, list[Measured]]:
    """Every topology once per round; a rank alone works while the others wait."""
    results: dict[Topology, list[Measured]] = {topology: [] for topology in topologies}
    for _ in range(rounds):
        for topology in topologies:
            ranks.control.all_gather_object("ready")
            if topology.world == ranks.size:
                results[topology].append(run_once(ranks, topology))
            elif ranks.is_leader:
                results[topology].append(run_once(Ranks.alone(ranks.device), topology))
    return results


def time_transfers(ranks: Ranks, rounds: int = 40) -> tuple[float, float]:
    """Latency in seconds and bytes per second of an exchange between the ranks."""
    seconds: list[float] = []
    sizes = (16, 1_000_000)
    for size in sizes:
        piece = torch.zeros(size)
        times = []
        for _ in range(rounds):
            started = time.perf_counter()
            ranks.everyone.gather(piece, [(size,)] * ranks.size)
            times.append(time.perf_counter() - started)
        seconds.append(min(times))
    sent = 4 * sizes[1] * (ranks.size - 1)
    return seconds[0], sent / (seconds[1] - seconds[0])


def on_ranks(world: int, task: Any, *arguments: Any) -> list[Any]:
    """Run `task(ranks, *arguments)` in `world` processes of one thread each; their results in rank order."""
    processes = multiprocessing.get_context("spawn")
    with contextlib.closing(socket.socket()) as probe, tempfile.TemporaryDirectory() as folder:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        probe.close()
        started = [
            processes.Process(target=_work, args=(rank, world, port, folder, task, arguments))
            for rank in range(world)
        ]
        for process in started:
            process.start()
        for process in started:
            process.join()
        if any(process.exitcode for process in started):
            sys.exit("a rank failed; see above")
        return [pickle.loads((Path(folder) / str(rank)).read_bytes()) for rank in range(world)]


def _work(rank: int, world: int, port: int, folder: str, task: Any, arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    rendezvous = Rendezvous.at("127.0.0.1", port, rank=rank, world=world)
    with join(rendezvous, torch.device("cpu"), timeout=120) as ranks:
        result = task(ranks, *arguments)
    (Path(folder) / str(rank)).write_bytes(pickle.dumps(result))


def summed(results: list[dict[Topology, list[Measured]]], topology: Topology) -> Measured:
    """Of all ranks and rounds: least times of the slowest rank, bytes added up."""
    of_ranks = [result[topology] for result in results if result[topology]]
    rounds = list(zip(*of_ranks, strict=True))
    return Measured(
        computed=min(max(m.computed for m in one) for one in rounds),
        forecast=min(max(m.forecast for m in one) for one in rounds),
        denoise=min(max(m.denoise for m in one) for one in rounds),
        computed_bytes=sum(m.computed_bytes for m in rounds[0]),
        forecast_bytes=sum(m.forecast_bytes for m in rounds[0]),
    )


def bench_shape() -> Shape:
    tokens = LATENTS[1] * LATENTS[2] * LATENTS[3] // 4
    return Shape(tokens, LAYERS, HEADS * HEAD_DIM, HEADS, FFN, text=TEXT, element=4)


def report(rounds: int) -> None:
    """Print everything as Markdown."""
    command = f"python scripts/bench_scaling.py --rounds {rounds}"
    installed = ", ".join(f"{name} {number}" for name, number in versions().items())
    print("# How it scales\n")
    print(f"Made by `{command}` on {date.today()}, {platform.machine()}, {os.cpu_count()} cores, one thread")
    print(f"per rank, gloo; {installed}.\n")
    print(f"A random Wan transformer: {LAYERS} blocks, {HEADS} heads of {HEAD_DIM}, {bench_shape().tokens}")
    print(f"tokens, float32, guidance on, {len(COMPUTED)} of {STEPS} steps computed. Times are the least of")
    print(f"{rounds} alternating rounds: other work on the machine can only add to them.\n")
    pairs = on_ranks(2, run_rounds, [ALONE, *PAIRS], rounds)
    fours = on_ranks(4, run_rounds, FOURS, 1)
    latency, link = on_ranks(2, time_transfers)[0]
    alone = summed(pairs, ALONE)
    machine = fit(alone, latency, link)
    report_bytes({t: summed(pairs, t) for t in PAIRS} | {t: summed(fours, t) for t in FOURS})
    report_times(pairs, alone, machine)
    report_model()
    report_predictions()


def report_bytes(measured: dict[Topology, Measured]) -> None:
    print("## Bytes\n")
    print("Sent by all ranks together, counted at every transfer, and what theory says is the least.\n")
    row("cfg × ring × ulysses", "computed step", "theory", "forecast step", "theory", head=True)
    shape = bench_shape()
    for topology, found in measured.items():
        theory = computed_bytes(shape, topology), output_bytes(shape, topology)
        assert (found.computed_bytes, found.forecast_bytes) == theory, (topology, found, theory)
        row(name(topology), *(f"{x:,.0f}" for x in (found.computed_bytes, theory[0])),
            *(f"{x:,.0f}" for x in (found.forecast_bytes, theory[1])))  # fmt: skip
    print("\nNothing else is sent but, at each step, a message between every two ranks: the digest of all")
    print(f"decisions, commands, and what is known of the time, {RECORD_BYTES} bytes.\n")


def report_times(pairs: list[Any], alone: Measured, machine: Machine) -> None:
    print("## Times on two ranks\n")
    row("cfg × ring × ulysses", "computed, ms", "model, ms", "forecast, ms", "model, ms",
        "forecast / computed", "denoising against one rank", head=True)  # fmt: skip
    shares: dict[Topology, float] = {}
    for topology in [ALONE, *PAIRS]:
        found = summed(pairs, topology)
        shares[topology] = found.denoise / alone.denoise
        predicted = (
            computed_seconds(bench_shape(), topology, machine),
            forecast_seconds(bench_shape(), topology, machine, remembered=len(COMPUTED)),
        )
        row(
            name(topology),
            f"{1000 * found.computed:.0f}",
            f"{1000 * predicted[0]:.0f}",
            f"{1000 * found.forecast:.1f}",
            f"{1000 * predicted[1]:.1f}",
            f"{100 * found.forecast / found.computed:.1f} %",
            f"{shares[topology]:.2f}",
        )
    reached = {topology: shares[topology] <= GOAL for topology in PAIRS}
    print(f"\nGoal: two ranks need at most {GOAL} of one rank's time. Reached by", end=" ")
    print(", ".join(name(t) for t, ok in reached.items() if ok) or "none", end="")
    missed = ", ".join(name(t) for t, ok in reached.items() if not ok)
    print(f"; missed by {missed}." if missed else ".")
    print(
        f"\nThe model's machine is fitted to one rank's row ({machine.flops / 1e9:.0f} GFLOP/s) and to\n"
        f"bare transfers ({1e6 * machine.latency:.0f} µs, {machine.link / 1e9:.1f} GB/s); "
        "the other rows are predictions.\n"
    )


def fit(alone: Measured, latency: float, link: float) -> Machine:
    """This machine, from one rank's steps and from bare transfers."""
    free = Machine(1.0, 1e30, 1e30, 1e30, 0.0, 1024, 0.0)
    flops = computed_seconds(bench_shape(), ALONE, free) / alone.computed
    measured = replace(free, flops=flops, latency=latency, link=link, network=link)
    reading = alone.forecast - forecast_seconds(bench_shape(), ALONE, measured, len(COMPUTED))
    per_speed = forecast_seconds(bench_shape(), ALONE, replace(free, flops=1e30, memory=1.0), len(COMPUTED))
    return replace(measured, memory=per_speed / reading)


def report_model() -> None:
    print("## The model\n")
    print(
        "For L tokens, n blocks of width D, feed-forward width F and T text tokens; axes c × r × u, s = r u;"
    )
    print("e bytes a value; P = 64 L e bytes of output:\n")
    row("", "", head=True)
    row(
        "operations of a block and branch",
        "12 L D² + 4 T D² + 4 L T D + 4 L D F, and 4 L² D for self-attention",
    )
    row("Ulysses, all ranks, block and branch", "4 L D e (u − 1) / u bytes in two exchanges")
    row("ring, all ranks, block and branch", "2 L D e (r − 1) bytes in r − 1 passes")
    row("output, all ranks, every step", "c (s − 1) P, and 2 P more to join the branches if c = 2")
    row("computed step", "2 / c branches × n blocks × (operations / s / speed + transfers) + output")
    row("forecast step", "2 / c × ((K + 4) L D e / s bytes read + 128 L D / s operations) + output")
    print(
        "\nRing transfers hide behind (r − 1) / r of the attention; what does not fit there is waited for. A"
    )
    print("transfer takes a latency, and its bytes over the link's speed; between nodes, the network's. The")
    print("formulas are `scripts/cost_model.py`.\n")


# Assumed, not measured here: see the text that is printed with it.
H100 = Machine(
    flops=0.35 * 989e12,
    memory=0.7 * 3.35e12,
    link=0.7 * 450e9,
    network=0.7 * 50e9,
    latency=20e-6,
    per_node=8,
    overhead=2e-3,
)
PUBLISHED = 9.77  # seconds of a step with guidance: one H100, Wan2.1 I2V 14B, 480p, 81 frames, diffusers
REMEMBERED = 10  # features, in the middle of a run


def report_predictions() -> None:
    print("## What the model says of large machines\n")
    print(
        "**Predictions, not measurements: no GPU was at hand.** Assumed: H100s at 35 % of 989 TFLOP/s, 70 %"
    )
    print(
        "of 3.35 TB/s memory, of 450 GB/s NVLink and of 50 GB/s network per GPU; 20 µs per transfer, 8 GPUs"
    )
    print(
        "a node, 2 ms for a forecast step's launches. The 35 % fits one published figure, LightX2V's table:"
    )
    one = computed_seconds(shape_of("wan2.1-t2v-14b-480p"), ALONE, H100)
    print(f"{PUBLISHED} s a step for 14B at 480p on one H100 with diffusers; the model says {one:.2f}.")
    print("Denoising is 50 steps, of which 14 are computed.\n")
    row("model", "GPUs", "cfg × ring × ulysses", "computed, s", "forecast, s", "denoising, s",
        "against one GPU", "50 computed, s", head=True)  # fmt: skip
    for config in ("wan2.1-t2v-1.3b-480p", "wan2.1-t2v-14b-480p", "wan2.1-t2v-14b-720p"):
        shape = shape_of(config)
        base = denoising(shape, ALONE)
        for world in (1, 2, 4, 8, 16, 32, 64):
            topology = Topology.choose(world, heads=shape.heads, guided=True, per_node=min(world, 8))
            computed = computed_seconds(shape, topology, H100)
            forecast = forecast_seconds(shape, topology, H100, REMEMBERED)
            total = denoising(shape, topology)
            row(config, world, name(topology), f"{computed:.3f}", f"{forecast:.4f}", f"{total:.1f}",
                f"{base / total:.1f} ×", f"{50 * computed:.1f}")  # fmt: skip
    print(
        "\n`wan2.1-t2v-1.3b` has 12 heads: with guidance its branches go to two halves, and Ulysses takes the"
    )
    print("largest degree that divides 12 and fits a node; the ring takes the rest.")


def denoising(shape: Shape, topology: Topology) -> float:
    computed = computed_seconds(shape, topology, H100)
    return 14 * computed + 36 * forecast_seconds(shape, topology, H100, REMEMBERED)


def shape_of(config_name: str) -> Shape:
    config = load_config(config_name)
    architecture, defaults = config.architecture, config.defaults
    assert architecture is not None
    tokens = ((defaults.frames - 1) // 4 + 1) * (defaults.height // 16) * (defaults.width // 16)
    width = architecture.heads * architecture.head_dim
    return Shape(tokens, architecture.layers, width, architecture.heads, architecture.ffn_dim)


def name(topology: Topology) -> str:
    return f"{topology.cfg} × {topology.ring} × {topology.ulysses}"


def row(*cells: object, head: bool = False) -> None:
    """A row of a Markdown table."""
    print("|", " | ".join(map(str, cells)), "|")
    if head:
        print("|", " | ".join("---" for _ in cells), "|")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="write the Markdown here instead of stdout")
    parser.add_argument("--rounds", type=int, default=6, help="alternating rounds")
    arguments = parser.parse_args()
    if arguments.out is None:
        report(arguments.rounds)
        return
    with whole_file(arguments.out) as temporary, temporary.open("w") as file, redirect_stdout(file):
        report(arguments.rounds)
    print(arguments.out.read_text())


if __name__ == "__main__":
    main()
