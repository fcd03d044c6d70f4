"""Cost of a forecast: against the reference's formula, and end to end on wan-tiny.

    python scripts/bench_forecast.py --out docs/forecast.md

The reference (SPECTRUM: fit, then evaluate) fits a P×F coefficient matrix C = (ΦᵀΦ + λI)⁻¹ ΦᵀH to the K
remembered features at every refit, in their dtype, and forecasts φ(τ*)ᵀC from it until the next computed
step. Lockstep computes every forecast as one weighted sum of the K features. Both are timed alternately in
this process on the same data; peak memory is measured in a separate process for each.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from datetime import date
from pathlib import Path

import numpy as np
import torch

from runtime.engine import Engine
from runtime.files.atomic import whole_file
from runtime.media.mp4 import FrameBuffer
from runtime.request.config import load_config
from runtime.versions import versions
from spectrum import ChebyshevRidge, chebyshev_basis, paper_schedule
from spectrum.weighted import weighted_sum

HORIZON, DEGREE, RIDGE = 50, 4, 0.1
PREDICTOR = ChebyshevRidge(horizon=HORIZON, degree=DEGREE, ridge=RIDGE)
STEPS = list(paper_schedule(HORIZON).computed)
SIZES = (100_000, 1_000_000, 8_000_000)
HISTORIES = (5, 8, 11, 14)
GOAL_FORECAST, GOAL_SPEEDUP = 10.0, 0.9


def design(steps: list[int], dtype: torch.dtype) -> torch.Tensor:
    """Design matrix Φ of these steps, `[K, P]`."""
    return torch.from_numpy(chebyshev_basis(2.0 * np.asarray(steps) / HORIZON - 1.0, DEGREE)).to(dtype)


def reference_fit(steps: list[int], history_KF: torch.Tensor) -> torch.Tensor:
    """Fit the coefficients C, `[P, F]`, by normal equations with a right-hand side of the features' size."""
    phi = design(steps, history_KF.dtype)
    gram = (phi.T @ phi).float() + RIDGE * torch.eye(DEGREE + 1)
    right = phi.T @ history_KF
    return torch.cholesky_solve(right.float(), torch.linalg.cholesky(gram)).to(history_KF.dtype)


def reference_forecast(target: int, coefficients_PF: torch.Tensor) -> torch.Tensor:
    return (design([target], coefficients_PF.dtype) @ coefficients_PF)[0]


def our_forecast(steps: list[int], target: int, history: list[torch.Tensor]) -> torch.Tensor:
    return weighted_sum(PREDICTOR.weights(steps, target).tolist(), history)


def median_seconds(sides: list[Callable[[], object]], rounds: int) -> list[float]:
    """Median time of each function over alternating rounds, after a warm-up round."""
    times: list[list[float]] = [[] for _ in sides]
    for round_ in range(rounds + 1):
        for side, own in zip(sides, times, strict=True):
            started = time.perf_counter()
            side()
            if round_:
                own.append(time.perf_counter() - started)
    return [statistics.median(own) for own in times]


def time_forecast(dtype: torch.dtype, count: int, size: int, rounds: int) -> list[float]:
    """Seconds of the reference's refit and evaluation, of its evaluation alone, and of our forecast."""
    steps, target = STEPS[:count], STEPS[count - 1] + 1
    history_KF = torch.randn(count, size, generator=torch.Generator().manual_seed(0)).to(dtype)
    history = list(history_KF.unbind(0))
    coefficients_PF = reference_fit(steps, history_KF)
    return median_seconds(
        [
            lambda: reference_forecast(target, reference_fit(steps, history_KF)),
            lambda: reference_forecast(target, coefficients_PF),
            lambda: our_forecast(steps, target, history),
        ],
        rounds,
    )


def time_whole_run(dtype: torch.dtype, size: int) -> tuple[float, float]:
    """Seconds of all forecasts of a 50-step run on the paper's schedule: the reference's, and ours."""
    history_KF = torch.randn(len(STEPS), size, generator=torch.Generator().manual_seed(0)).to(dtype)
    history = list(history_KF.unbind(0))
    reference = ours = 0.0
    for count, (step, following) in enumerate(zip(STEPS, [*STEPS[1:], HORIZON], strict=True), start=1):
        targets = range(step + 1, following)
        if not targets:
            continue
        started = time.perf_counter()
        coefficients_PF = reference_fit(STEPS[:count], history_KF[:count])
        for target in targets:
            reference_forecast(target, coefficients_PF)
        between = time.perf_counter()
        for target in targets:
            our_forecast(STEPS[:count], target, history[:count])
        reference, ours = reference + between - started, ours + time.perf_counter() - between
    return reference, ours


def peak_memory(side: str) -> None:
    """Print the bytes that one forecast needs beyond its history; runs in a child process."""
    size, count = SIZES[-1], HISTORIES[-1]
    history_KF = torch.ones(count, size, dtype=torch.bfloat16)
    reference_fit([0, 1], torch.ones(2, 10))  # loads the linear algebra library before the measurement
    before = resident_bytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # Linux: forget the peak so far
    if side == "reference":
        reference_forecast(49, reference_fit(STEPS, history_KF))
    else:
        our_forecast(STEPS, 49, list(history_KF.unbind(0)))
    print(resident_bytes("VmHWM") - before)


def resident_bytes(field: str) -> int:
    """Read a memory field of this process: VmRSS is the current size, VmHWM the peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def peak_memories() -> dict[str, int]:
    """Measure the bytes beyond the history, for both methods."""
    command = [sys.executable, __file__, "--peak-memory"]
    return {
        side: int(subprocess.run([*command, side], capture_output=True, text=True, check=True).stdout)
        for side in ("reference", "ours")
    }


def end_to_end(rounds: int) -> dict[str, tuple[int, list[float]]]:
    """Measure NFE and denoising seconds of each preset, in alternating rounds."""
    engine = Engine(load_config("wan-tiny"))
    prompt = "a red circle moving left on a black background"
    requests = {name: engine.config.request(prompt, spectrum=name) for name in ("off", "paper", "paper-fast")}
    engine.warm_up(engine.plan(requests["off"].full))
    results: dict[str, tuple[int, list[float]]] = {}
    for _ in range(rounds):
        for name, request in requests.items():
            result = engine.generate(request, [FrameBuffer()])
            _, seconds = results.setdefault(name, (result.nfe, []))
            seconds.append(result.seconds.denoise)
    return results


def report(rounds: int, runs: int) -> None:
    """Print everything as Markdown."""
    torch.set_num_threads(1)
    command = f"python scripts/bench_forecast.py --rounds {rounds} --runs {runs}"
    installed = ", ".join(f"{name} {number}" for name, number in versions().items())
    print("# Cost of a forecast\n")
    print(f"Made by `{command}` on {date.today()}, {platform.machine()}, one thread; {installed}.\n")
    report_forecasts(rounds)
    report_memory()
    report_end_to_end(runs)


def report_forecasts(rounds: int) -> None:
    print("## One forecast against the reference's formula\n")
    print("Times are medians in ms; K features of F values are remembered. The reference (Spectrum's code)")
    print("fits once after each computed step. *Refit* is its fit and first forecast; *reuse* is each later")
    print("forecast with the same fit. *Ours* is Lockstep's forecast, with the same work every time.\n")
    print_row("dtype", "K", "F", "refit", "reuse", "ours", "refit / ours", head=True)
    ratios: dict[tuple[str, int, int], float] = {}
    for dtype in (torch.bfloat16, torch.float32):
        name = str(dtype).removeprefix("torch.")
        for size in SIZES:
            for count in HISTORIES:
                refit, reuse, ours = (1000 * s for s in time_forecast(dtype, count, size, rounds))
                ratios[name, count, size] = refit / ours
                times = (f"{milliseconds:.2f}" for milliseconds in (refit, reuse, ours))
                print_row(name, count, f"{size:,}", *times, f"{refit / ours:.1f} ×")
    large = ("bfloat16", SIZES[-1])
    at_scale = min(ratio for (name, _, size), ratio in ratios.items() if (name, size) == large)
    name, count, size = min(ratios, key=lambda case: ratios[case])
    least, reached = ratios[name, count, size], verdict(at_scale >= GOAL_FORECAST)
    print(f"\nGoal: at least {GOAL_FORECAST:g} ×. The rows with bfloat16 and {SIZES[-1]:,} values are the")
    print(f"nearest to Wan2.1's 50 to 390 million values; their minimum is {at_scale:.1f} × ({reached}). The")
    print(f"minimum of all rows is {least:.1f} × ({name}, K = {count}, F = {size:,}), because fixed costs")
    print("matter more there.\n")
    reference, ours = time_whole_run(torch.bfloat16, SIZES[-1])
    print(
        f"All {HORIZON - len(STEPS)} forecasts of a run on the paper's schedule, F = {SIZES[-1]:,}, bfloat16:"
    )
    print(f"reference {reference:.2f} s, ours {ours:.2f} s, ratio {reference / ours:.1f} ×.\n")


def report_memory() -> None:
    memory = peak_memories()
    print("## Memory of one forecast beyond the history\n")
    print(f"K = {HISTORIES[-1]}, F = {SIZES[-1]:,}, bfloat16; each is the peak resident size of a process.\n")
    print_row("", "MB", head=True)
    for side, size in memory.items():
        print_row(side, f"{size / 1e6:.0f}")
    print(f"\nRatio {memory['reference'] / memory['ours']:.1f} ×.\n")


def report_end_to_end(runs: int) -> None:
    print("## End to end on wan-tiny\n")
    print(f"50 steps, guidance 5, 17 frames of 96×96; denoising only, {runs} alternating runs. Other work on")
    print("the machine can only add time, so the speed-up is computed from each preset's fastest run. NFE is")
    print("the number of computed steps, n the number of steps, and *share* is speed-up / ideal.\n")
    print_row("preset", "NFE", "fastest, s", "median, s", "speed-up", "ideal n / NFE", "share", head=True)
    results = end_to_end(runs)
    full_nfe, full_seconds = results["off"][0], min(results["off"][1])
    shares = []
    for name, (nfe, seconds) in results.items():
        least, ideal = min(seconds), full_nfe / nfe
        share = full_seconds / least / ideal
        if name != "off":
            shares.append(share)
        times = f"{least:.2f}", f"{statistics.median(seconds):.2f}"
        print_row(
            name, nfe, *times, f"{full_seconds / least:.2f} ×", f"{ideal:.2f} ×", f"{100 * share:.0f} %"
        )
    print(
        f"\nGoal: at least {100 * GOAL_SPEEDUP:.0f} % of the ideal. Minimum: {100 * min(shares):.0f} %",
        end=" ",
    )
    print(f"({verdict(min(shares) >= GOAL_SPEEDUP)}).")


def print_row(*cells: object, head: bool = False) -> None:
    """Print a row of a Markdown table."""
    print("|", " | ".join(map(str, cells)), "|")
    if head:
        print("|", " | ".join("---" for _ in cells), "|")


def verdict(reached: bool) -> str:
    return "reached" if reached else "missed"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="write the Markdown here instead of stdout")
    parser.add_argument("--rounds", type=int, default=7, help="alternating rounds per forecast")
    parser.add_argument("--runs", type=int, default=8, help="alternating runs end to end")
    parser.add_argument("--peak-memory", choices=["reference", "ours"], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.peak_memory:
        peak_memory(arguments.peak_memory)
    elif arguments.out is None:
        report(arguments.rounds, arguments.runs)
    else:
        with whole_file(arguments.out) as temporary, temporary.open("w") as file, redirect_stdout(file):
            report(arguments.rounds, arguments.runs)
        print(arguments.out.read_text())


if __name__ == "__main__":
    main()
