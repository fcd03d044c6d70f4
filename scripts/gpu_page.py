"""The page of the results of `gpu_check.py`: docs/gpu.md, with rehearsed beside measured numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from gpu_bench import Found
from gpu_large import PRESET_FILE

from runtime.files.atomic import whole_file
from runtime.parallel.topology import Degrees
from runtime.rehearsal.account import seconds
from runtime.rehearsal.machine import load_gpu
from runtime.rehearsal.rehearse import Rehearsal, Scenario, rehearse
from runtime.request.config import load_config

NOTES = Path(__file__).with_name("gpu_notes.md")  # what the numbers in docs/ mean
_GIB = 2**30
_GPUS = {"H100": "h100", "H200": "h200", "B200": "b200", "4090": "4090"}
_HEADS = {
    "equal": "bit-equal",
    "psnr": "PSNR, dB",
    "named": "the message names the rank",
    "left": "processes left",
    "said": "message",
    "computed_step_seconds": "computed step, s",
}
INTRODUCTION = """\
# Measured on a GPU

Made by `python scripts/gpu_check.py --results docs/gpu.jsonl --out docs/gpu.md`. Models have the published
shapes and random weights. Every number is from a single run. *Rehearsed* numbers are those of
`lockstep rehearse`: [rehearse.md](rehearse.md).
"""


def write_page(lines: Sequence[Found], out: Path) -> None:
    """Write the page from all results; of several of one check, the last one counts.

    Args:
        lines: results, as `gpu_check.py` writes them.
        out: the page.
    """
    latest = {line["check"]: line for line in lines}
    with whole_file(out) as temporary:
        temporary.write_text("\n".join(_page(list(latest.values()))).rstrip() + "\n", encoding="utf-8")


def _page(lines: Sequence[Found]) -> Iterator[str]:
    yield INTRODUCTION
    for machine, names in _machines(lines):
        yield f"- {machine}: {names}"
    yield ""
    for line in lines:
        title, section = _section_of(line["check"])
        yield f"## {title}\n"
        if "failed" in line:
            yield f"Failed: `{line['failed'].splitlines()[0]}`\n"
        else:
            yield from section(line)
            yield ""
    if all(line["machine"]["count"] for line in lines):
        yield NOTES.read_text(encoding="utf-8")


def _machines(lines: Sequence[Found]) -> Iterator[tuple[str, str]]:
    """Yield each machine with the checks that it ran."""
    found: dict[str, list[str]] = {}
    for line in lines:
        where, versions = line["machine"], line["machine"]["versions"]
        parts = [line["date"], f"{where['count']} × {where['device']}" if where["count"] else where["device"]]
        parts += [f"{name} {where[name]}" for name in ("cuda", "cudnn") if where.get(name)]
        parts += [f"{name} {version}" for name, version in versions.items()]
        found.setdefault(", ".join(parts), []).append(line["check"])
    for machine, names in found.items():
        yield machine, ", ".join(names)


def table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Make a table; numbers are written with three digits, what is missing stays empty."""
    written = [[_written(cell) for cell in row] for row in rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in [list(head), ["---"] * len(head), *written])


def _written(cell: Any) -> str:
    if cell is None:
        return ""
    if isinstance(cell, bool):
        return "yes" if cell else "no"
    if isinstance(cell, float):
        return f"{cell:,.0f}" if abs(cell) >= 1000 else f"{cell:.3g}"
    return str(cell)


def _gib(size: float | None) -> str:
    return "" if size is None else f"{size / _GIB:.2f}"


def _ceilings(line: Found) -> Iterator[str]:
    said = {
        "copy_gbps": "copy within the device, read and written, GB/s",
        "from_host_gbps": "from pinned host memory, GB/s",
        "to_host_gbps": "to pinned host memory, GB/s",
        "bfloat16_tflops": "bfloat16 product of 8192 × 8192 matrices, TFLOP/s",
        "float8_rowwise_tflops": "float8 product with a scale for each row, TFLOP/s",
    }
    yield table(["", "measured"], [[said[name], value] for name, value in line["found"].items()])


def _attention(line: Found) -> Iterator[str]:
    found = line["found"]
    dtype = found["dtype"].removeprefix("torch.")
    yield (
        f"Self-attention of one rank in {dtype}, with heads of 128 channels. Errors are against float64, for "
        f"64 queries of two heads. `auto` chooses {found['auto']['1']}, and {found['auto']['2']} in a ring. "
        f"The last column is the kernel that ran.\n"
    )
    head = ["shape", "kernel", "ms", "TFLOP/s", "relative error", "largest error of log-sum-exp", "ran"]
    keys = ("shape", "kernel", "ms", "tflops", "error", "log_sum_error", "ran")
    yield table(
        head,
        [
            [one.get(key, one.get("failed") if key == "ran" else None) for key in keys]
            for one in found["kernels"]
        ],
    )
    yield ""
    for name, reason in found["refused"].items():
        yield f"- {name}: {reason}"


def _pipeline(line: Found) -> Iterator[str]:
    found = line["found"]
    yield "wan-tiny, every step computed, compared with diffusers' `WanPipeline` on the same device:\n"
    rows = [[one["dtype"], one["equal"], one["psnr"]] for one in found["against diffusers"]]
    yield table(["dtype", "bit-equal", "PSNR, dB"], rows)
    others = {name: value for name, value in found.items() if name != "against diffusers"}
    yield ""
    for name, value in others.items():
        yield f"- {name}: {'equal' if value is None else _written(value)}"


def _options(line: Found) -> Iterator[str]:
    for title, rows in line["found"].items():
        yield f"{title.capitalize()}:\n"
        head = ["option", "bit-equal", "PSNR, dB"]
        yield table(
            head, [[one["option"], one.get("equal", one.get("refused")), one.get("psnr")] for one in rows]
        )
        yield ""


def _rows(key: str) -> Callable[[Found], Iterator[str]]:
    def section(line: Found) -> Iterator[str]:
        found = line["found"]
        yield f"Through {found['backend']}:\n"
        head = list(found[key][0])
        cells = [[", ".join(x) if isinstance(x, list) else x for x in one.values()] for one in found[key]]
        yield table([_HEADS.get(name, name.replace("_", " ")) for name in head], cells)

    return section


def _model(line: Found) -> Iterator[str]:
    found, rehearsed = line["found"], _rehearsed(line)
    peaks, request = found["peaks"], found["request"]
    yield (
        f"{request['width']}×{request['height']}, {request['frames']} frames, both branches, attention "
        f"{found['attention']}. Loading took {_written(found['load_seconds'])} s, from random weights that "
        f"had just been written. Forecast steps forecast features.\n"
    )
    measured = {"load": found["load_peak"], **peaks}
    own = {} if rehearsed is None else rehearsed.ranks[0].peaks
    rows: list[list[Any]] = [
        [f"peak, {phase}, GiB", _gib(measured[phase]), _gib(own[phase].peak) if own else None]
        for phase in measured
    ]
    told = {} if rehearsed is None else seconds(rehearsed)
    for name, key, estimate in (
        ("encoding, s", "encode_seconds", "encode"),
        ("first computed step, s", "first_step_seconds", ""),
        ("computed step, s", "computed_step_seconds", "computed_step"),
        ("forecast step, s", "forecast_step_seconds", "forecast_step"),
        ("decoding in tiles, s", "decode_seconds", "decode"),
    ):
        rows.append([name, found[key], told.get(estimate)])
    whole = found["whole decoding"]
    rows.append(["decoding whole frames, s", whole.get("seconds", whole.get("failed")), None])
    rows.append(["its peak in addition to the weights, GiB", _gib(whole.get("peak")), None])
    yield table(["", "measured", "rehearsed"], rows)
    if found["kernels"]:
        yield "\nKernels of one branch's computed step, the longest first:\n"
        yield table(
            ["kernel", "ms", "calls"],
            [[f"`{one['kernel']}`", one["ms"], one["calls"]] for one in found["kernels"]],
        )


def _rehearsed(line: Found) -> Rehearsal | None:
    """Rehearse what was measured; None if it was a small model or another GPU than those known."""
    where = line["machine"]
    gpu = next((file for name, file in _GPUS.items() if name in where["device"]), None)
    if where["small"] or gpu is None:
        return None
    config, request = load_config(line["found"]["config"]), line["found"]["request"]
    config = config.model_copy(update={"decode": "tiles"})  # as `gpu_large` measures
    with_preset = config.request("rehearsed", **request, spectrum=str(PRESET_FILE))
    return rehearse(Scenario(config, with_preset, Degrees(), 1, load_gpu(gpu)))


def _evaluations(line: Found) -> Iterator[str]:
    found = line["found"]
    first = found["lines"][0]["computed_step_seconds"]
    yield "One branch's computed step, and the relative difference from exact latents after three steps:\n"
    rows = [
        [
            one["line"],
            one.get("computed_step_seconds", one.get("failed")),
            first / one["computed_step_seconds"] if "computed_step_seconds" in one else None,
            one.get("first_step_seconds"),
            _gib(one.get("peak")),
            one.get("error"),
        ]
        for one in found["lines"]
    ]
    head = ["", "seconds", "times as fast as diffusers", "first step, s", "peak, GiB", "difference"]
    yield table(head, rows)


def _places(line: Found) -> Iterator[str]:
    yield "Weights that are copied to the device when they are needed, against weights that stay there:\n"
    head = ["", "bit-equal", "computed step, s", "peak while loading, GiB", "peak of all, GiB"]
    rows = [
        [
            one["line"],
            one.get("equal", one.get("failed")),
            one.get("computed_step_seconds"),
            _gib(one.get("load_peak")),
            _gib(one.get("peak")),
        ]
        for one in line["found"]["lines"]
    ]
    yield table(head, rows)


_SECTIONS: dict[str, tuple[str, Callable[[Found], Iterator[str]]]] = {
    "ceilings": ("Speeds of the device", _ceilings),
    "attention": ("Attention kernels", _attention),
    "pipeline": ("Exactness", _pipeline),
    "options": ("Options", _options),
    "places": ("Offloaded weights", _places),
    "ranks": ("Ranks", _rows("ranks")),
    "failures": ("Failures", _rows("failures")),
}


def _section_of(check: str) -> tuple[str, Callable[[Found], Iterator[str]]]:
    """Title of a check, and what writes its section."""
    if check in _SECTIONS:
        return _SECTIONS[check]
    kind, _, name = check.partition(" ")
    return (f"{name}: one step", _evaluations) if kind == "evaluations" else (name, _model)
