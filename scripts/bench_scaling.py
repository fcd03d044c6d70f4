"""Scaling over ranks: bytes against theory, times against one rank, and rehearsals of larger machines.

One run measures everything: in every round each topology runs once, including a single rank.

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
from dataclasses import dataclass
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import UniPCMultistepScheduler, WanTransformer3DModel

from runtime.files.atomic import whole_file
from runtime.models.wan.adapter import WanAdapter
from runtime.models.wan.attention import SelfAttention
from runtime.parallel.attention import attend
from runtime.parallel.kernels import find_kernel
from runtime.parallel.meeting import Rendezvous
from runtime.parallel.ranks import Ranks, join
from runtime.parallel.topology import Degrees, Topology
from runtime.rehearsal.account import seconds
from runtime.rehearsal.machine import load_gpu
from runtime.rehearsal.rehearse import Scenario, rehearse
from runtime.request.config import load_config
from runtime.sampling.coordinator import RECORD_BYTES, Coordinator
from runtime.sampling.denoise import Denoising, denoise
from runtime.sampling.network import Branch, Network
from runtime.sampling.streams import FeatureStream
from runtime.versions import versions
from spectrum import ChebyshevRidge, FixedSchedule, StepKind

GOAL = 0.65  # of one rank's denoising time on two
HEADS, HEAD_DIM, LAYERS, FFN, TEXT = 8, 64, 4, 2048, 64
LATENTS = (16, 4, 32, 32)  # C, F, H, W
TOKENS, PATCH = 1024, 64  # patches of 1 × 2 × 2, and values of one
PUBLISHED = 9.77
STEPS, COMPUTED = 8, (0, 1, 2, 5)
PAIRS = [Topology(cfg=2), Topology(ulysses=2), Topology(ring=2)]
FOURS = [Topology(ulysses=4), Topology(ring=4), Topology(ring=2, ulysses=2), Topology(cfg=2, ulysses=2)]
ALONE = Topology()


@dataclass(frozen=True, slots=True)
class Measured:
    """Measurements of one topology over all rounds: least seconds of a step, bytes sent by all ranks."""

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
    steps = list(denoise(Denoising(noise, sampler, stream, coordinator), ranks))
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
    """Run every topology once per round; a single rank works while the others wait."""
    results: dict[Topology, list[Measured]] = {topology: [] for topology in topologies}
    for _ in range(rounds):
        for topology in topologies:
            ranks.control.all_gather_object("ready")
            if topology.world == ranks.size:
                results[topology].append(run_once(ranks, topology))
            elif ranks.is_leader:
                results[topology].append(run_once(Ranks.alone(ranks.device), topology))
    return results


def on_ranks(world: int, task: Any, *arguments: Any) -> list[Any]:
    """Run `task(ranks, *arguments)` in `world` processes of one thread; return results in rank order."""
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
    """Combine all ranks and rounds: least times of the slowest rank, and the sum of all bytes."""
    of_ranks = [result[topology] for result in results if result[topology]]
    rounds = list(zip(*of_ranks, strict=True))
    return Measured(
        computed=min(max(m.computed for m in one) for one in rounds),
        forecast=min(max(m.forecast for m in one) for one in rounds),
        denoise=min(max(m.denoise for m in one) for one in rounds),
        computed_bytes=sum(m.computed_bytes for m in rounds[0]),
        forecast_bytes=sum(m.forecast_bytes for m in rounds[0]),
    )


def theory(topology: Topology) -> tuple[int, int]:
    """Least bytes that all ranks together must send, at a computed and at a forecast step."""
    value, branches = 4, 2
    feature, whole = TOKENS * HEADS * HEAD_DIM * value, TOKENS * PATCH * value
    ulysses = 4 * feature * (topology.ulysses - 1) // topology.ulysses
    ring = 2 * feature * (topology.ring - 1)
    output = whole * topology.cfg * (topology.sequence - 1) + (2 * whole if topology.cfg == 2 else 0)
    return branches * LAYERS * (ulysses + ring) + output, output


def report(rounds: int) -> None:
    """Print everything as Markdown."""
    command = f"python scripts/bench_scaling.py --rounds {rounds}"
    installed = ", ".join(f"{name} {number}" for name, number in versions().items())
    print("# Scaling over ranks\n")
    print(f"Made by `{command}` on {date.today()}, {platform.machine()}, {os.cpu_count()} cores, one thread")
    print(f"per rank, gloo; {installed}.\n")
    print(f"A random Wan transformer: {LAYERS} blocks, {HEADS} heads of {HEAD_DIM} channels, {TOKENS}")
    print(f"tokens, float32, with guidance, {len(COMPUTED)} of {STEPS} steps computed. Times are the")
    print(f"shortest of {rounds} alternating rounds, because other work on the machine can only add time.\n")
    pairs = on_ranks(2, run_rounds, [ALONE, *PAIRS], rounds)
    fours = on_ranks(4, run_rounds, FOURS, 1)
    report_bytes({t: summed(pairs, t) for t in PAIRS} | {t: summed(fours, t) for t in FOURS})
    report_times(pairs, summed(pairs, ALONE))
    report_formulas()
    report_rehearsals()


def report_bytes(measured: dict[Topology, Measured]) -> None:
    print("## Bytes\n")
    print("Bytes that all ranks together send, counted at every transfer, and the theoretical minimum.\n")
    row("cfg × ring × ulysses", "computed step", "theory", "forecast step", "theory", head=True)
    for topology, found in measured.items():
        least = theory(topology)
        assert (found.computed_bytes, found.forecast_bytes) == least, (topology, found, least)
        row(name(topology), *(f"{x:,}" for x in (found.computed_bytes, least[0])),
            *(f"{x:,}" for x in (found.forecast_bytes, least[1])))  # fmt: skip
    print("\nIn addition, every pair of ranks exchanges one message at each step, with the digest of all")
    print(f"decisions, commands and the time left: {RECORD_BYTES} bytes.\n")


def report_times(pairs: list[Any], alone: Measured) -> None:
    print("## Times on two ranks\n")
    row("cfg × ring × ulysses", "computed, ms", "forecast, ms", "forecast / computed",
        "denoising / one rank's", head=True)  # fmt: skip
    shares: dict[Topology, float] = {}
    for topology in [ALONE, *PAIRS]:
        found = summed(pairs, topology)
        shares[topology] = found.denoise / alone.denoise
        row(
            name(topology),
            f"{1000 * found.computed:.0f}",
            f"{1000 * found.forecast:.1f}",
            f"{100 * found.forecast / found.computed:.1f} %",
            f"{shares[topology]:.2f}",
        )
    reached = {topology: shares[topology] <= GOAL for topology in PAIRS}
    print(f"\nGoal: two ranks need at most {GOAL} of one rank's time. Reached by", end=" ")
    print(", ".join(name(t) for t, ok in reached.items() if ok) or "none", end="")
    missed = ", ".join(name(t) for t, ok in reached.items() if not ok)
    print(f"; missed by {missed}.\n" if missed else ".\n")


def report_formulas() -> None:
    print("## Formulas\n")
    print(
        "For L tokens, n blocks of width D, feed-forward width F and T text tokens; axes c × r × u, s = r u;"
    )
    print("e bytes per value; P = 64 L e bytes of output:\n")
    row("", "", head=True)
    row("operations of a block and branch", "12 L D² + 4 T D² + 4 L D F, and in attention 4 L² D + 4 L T D")
    row("Ulysses, all ranks, block and branch", "4 L D e (u − 1) / u bytes in two exchanges")
    row("ring, all ranks, block and branch", "2 L D e (r − 1) bytes in r − 1 passes")
    row("output, all ranks, every step", "c (s − 1) P, and 2 P more to join the branches if c = 2")
    print(
        "\n`tests/runtime/rehearsal` compares `lockstep rehearse` with these formulas and with real runs.\n"
    )


def report_rehearsals() -> None:
    """Print rehearsals of many GPUs."""
    print("## Rehearsals of larger machines\n")
    print(
        "From `lockstep rehearse --config CONFIG --ranks N --gpu h100`, for the preset `paper`: 50 steps, of"
    )
    print("which 14 are computed. Memory and bytes sent by the first rank are **counted**. Seconds are")
    print("**estimated** from shares of speed that one H100 reached: [rehearse.md](rehearse.md).\n")
    row("config", "GPUs", "cfg × ring × ulysses", "peak, GiB", "sent per computed step, GB",
        "computed, s", "forecast, s", "denoising, s", "speed-up", head=True)  # fmt: skip
    for config_name in ("wan2.1-t2v-1.3b-480p", "wan2.1-t2v-14b-480p", "wan2.1-t2v-14b-720p"):
        config, alone = load_config(config_name), 0.0
        for world in (1, 2, 4, 8, 16, 32, 64):
            scenario = Scenario(config, config.request("rehearsed"), Degrees(), world, load_gpu("h100"))
            found = rehearse(scenario, [0])
            took, sent = seconds(found), sum(found.ranks[0].steps.last.sent.values())
            alone = alone or took["denoise"]
            row(config_name, world, name(found.topology), f"{found.peak / 2**30:.1f}", f"{sent / 1e9:.2f}",
                f"{took['computed_step']:.3f}", f"{took['forecast_step']:.4f}", f"{took['denoise']:.1f}",
                f"{alone / took['denoise']:.1f} ×")  # fmt: skip
    print("\n`wan2.1-t2v-1.3b` has 12 heads. With guidance each branch gets half of the ranks. Ulysses gets")
    print("the largest degree that divides 12 and fits into a node; the ring gets the rest. For comparison:")
    print(f"LightX2V published {PUBLISHED} s for a step with guidance of I2V 14B at 480p on one H100 with")
    print("diffusers.")


def name(topology: Topology) -> str:
    return f"{topology.cfg} × {topology.ring} × {topology.ulysses}"


def row(*cells: object, head: bool = False) -> None:
    """Print a row of a Markdown table."""
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
