"""Everything that only a GPU can tell, checked and measured in half an hour; writes docs/gpu.md.

    python scripts/gpu_check.py --results out/gpu.jsonl --out docs/gpu.md
    python scripts/gpu_check.py --only ceilings,attention,pipeline                  # some of the checks
    python scripts/gpu_check.py --results out/gpu.jsonl --out docs/gpu.md --page    # no checks: the page

Models have the published shapes and random weights, which are written into `--work` (45 GB for 14B; a memory
disk such as /dev/shm is best), by default a temporary folder. Every check is a line of JSON in `--results`;
stopped at any time, the script resumes after the existing ones, as long as device, library versions and code
are the same. A check that fails is a line, too, and the others go on. On a CPU models of two blocks stand for
the real ones, so that the script itself can be tested.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import date
from pathlib import Path

import gpu_exact
import gpu_kernels
import gpu_large
import torch
from gpu_bench import Bench, Found
from gpu_page import write_page

from runtime.parallel.devices import pick_device
from runtime.parallel.kernels import card_of
from runtime.versions import versions

CHECKS: dict[str, Callable[[Bench], Found]] = {**gpu_kernels.CHECKS, **gpu_exact.CHECKS, **gpu_large.CHECKS}


def machine(bench: Bench) -> Found:
    """Identity of the device and the libraries, under which results are comparable."""
    found: Found = {"versions": versions(), "count": bench.count, "small": bench.small}
    if not bench.on_gpu:
        return found | {"device": "CPU"}
    card = card_of(bench.device)
    return found | {
        "device": torch.cuda.get_device_name(bench.device),
        "memory": torch.cuda.get_device_properties(bench.device).total_memory,
        "cuda": torch.version.cuda,
        "cudnn": None if card is None else card.cudnn,
    }


def run(bench: Bench, names: list[str], results: Path, deadline: float) -> list[Found]:
    """Run the checks that have no result yet; return all results.

    Args:
        names: the checks, in order.
        results: file of results.
        deadline: monotonic time after which no check begins.
    """
    where = machine(bench)
    known = read(results)
    done = {one["check"] for one in known if one["machine"] == where and "failed" not in one}
    for name in names:
        if name in done:
            continue
        if time.monotonic() > deadline:
            print(f"{name}: no time left", flush=True)
            continue
        started = time.perf_counter()
        line: Found = {"check": name, "date": date.today().isoformat(), "machine": where}
        try:
            line["found"] = CHECKS[name](bench)
        except Exception as error:
            traceback.print_exc()
            line["failed"] = f"{type(error).__name__}: {error}"[:2000]
        line["seconds"] = time.perf_counter() - started
        with results.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        said = "failed" if "failed" in line else "done"
        print(f"{name}: {said} in {line['seconds']:.1f} s", flush=True)
    return read(results)


def read(results: Path) -> list[Found]:
    """Read results that earlier runs have written."""
    if not results.exists():
        return []
    return [json.loads(line) for line in results.read_text(encoding="utf-8").splitlines()]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--results", type=Path, default=Path("out/gpu.jsonl"), help="lines of JSON")
    parser.add_argument("--out", type=Path, help="the page to write")
    parser.add_argument("--page", action="store_true", help="run nothing; write the page from the results")
    parser.add_argument("--only", help="names of checks, separated by commas")
    parser.add_argument("--minutes", type=float, default=30.0, help="begin no check after so many minutes")
    parser.add_argument("--work", type=Path, help="folder for random weights; by default a temporary one")
    parser.add_argument("--device", default="auto")
    arguments = parser.parse_args()
    names = list(CHECKS) if arguments.only is None else arguments.only.split(",")
    unknown = [name for name in names if name not in CHECKS]
    if unknown:
        parser.error(f"--only: no check is called {unknown[0]!r}; there are {', '.join(CHECKS)}")
    arguments.results.parent.mkdir(parents=True, exist_ok=True)
    lines = read(arguments.results)
    if not arguments.page:
        device = pick_device(arguments.device)
        count = torch.cuda.device_count() if device.type == "cuda" else 0
        with tempfile.TemporaryDirectory(prefix="gpu-check-") as temporary:
            work = arguments.work or Path(temporary)
            work.mkdir(parents=True, exist_ok=True)
            bench = Bench(device, count, work, small=device.type == "cpu")
            lines = run(bench, names, arguments.results, time.monotonic() + 60 * arguments.minutes)
    if arguments.out is not None:
        write_page(lines, arguments.out)
    if any("failed" in line for line in lines):
        sys.exit(1)


if __name__ == "__main__":
    main()
