"""`lockstep doctor`: shows what this machine has and can run. Imports torch only where there is a GPU."""

from __future__ import annotations

import importlib
import os
import platform
import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import imageio_ffmpeg
from rich.box import SIMPLE_HEAD
from rich.table import Table

from runtime.errors import named, reason
from runtime.files.extensions import announced
from runtime.media.quality import has_filter
from runtime.models.folder import is_local
from runtime.request.config import available, load_config

WORLDS = (1, 2, 4, 8)
DRIVERS = [Path("/dev") / name for name in ("nvidiactl", "kfd", "dxg")]  # of NVIDIA, AMD, and in WSL
_PATIENCE = 30.0  # seconds for ffmpeg to tell its version
_FILTERS = ("psnr", "ssim", "libvmaf", "xfade", "concat")


def examine() -> Iterator[Table]:
    """Yield tables of findings, the cheapest first."""
    yield _machine()
    yield _models()


def to_json() -> dict[str, Any]:
    """Return the findings as JSON has them."""
    return {"machine": dict(_findings()), "configs": [one.to_json() for one in configs()]}


def _machine() -> Table:
    table = Table(title="This machine", show_header=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, finding in _findings():
        table.add_row(name, finding)
    return table


def _findings() -> Iterator[tuple[str, str]]:
    yield "python", platform.python_version()
    yield "torch", f"{_version_of('torch')}, cores: {os.cpu_count()}"
    yield "GPUs", _accelerators()
    yield "xfuser", _importable("xfuser")
    yield "diffusers", _version_of("diffusers")
    yield "ray", _version_of("ray")
    yield "ffmpeg", _ffmpeg()
    yield "presets", ", ".join(available("spectrum"))
    yield "calibrations", ", ".join(available("calibrations", "json"))
    yield "extensions", ", ".join(announced()) or "none"


def _accelerators() -> str:
    """Describe the GPUs that torch sees; it is not asked where the system has no driver of any."""
    if not any(path.exists() for path in DRIVERS):
        return "none (this machine has no driver of a GPU); the CPU is used"
    import torch

    if not torch.cuda.is_available():
        return "none (torch sees no CUDA device); the CPU is used"
    devices = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return ", ".join(f"{d.name} with {d.total_memory / 2**30:.0f} GiB" for d in devices)


def _importable(package: str) -> str:
    """Return a package's version, or why it cannot be used; only importing it can tell."""
    try:
        found = version(package)
    except PackageNotFoundError:
        return "not installed; on a machine with CUDA, install Lockstep with its extra: pip install '.[gpu]'"
    try:
        importlib.import_module(package)
    except Exception as error:  # a CUDA package may raise anything on a machine without CUDA
        return f"{found} is installed but cannot be imported: {named(error)}"
    return found


def _version_of(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _ffmpeg() -> str:
    """Version, path and filters of ffmpeg, or why it cannot be used."""
    try:
        executable = imageio_ffmpeg.get_ffmpeg_exe()
        said = subprocess.run(
            [executable, "-version"], capture_output=True, text=True, check=True, timeout=_PATIENCE
        ).stdout
        filters = ", ".join(f"{name} {'yes' if has_filter(name) else 'no'}" for name in _FILTERS)
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:  # RuntimeError: there is none
        return f"cannot be used: {reason(error)}"
    found = re.match(r"ffmpeg version (\S+)", said)
    return f"{found[1] if found else 'unknown version'} ({executable}); filters: {filters}"


@dataclass(frozen=True, slots=True)
class ConfigFindings:
    """What is known of a shipped config.

    Attributes:
        name: its name.
        heads: number of attention heads; None if the config does not say.
        present: whether its weights are on this machine.
        splits: ranks → even splits, as pairs of the degrees Ulysses and ring.
    """

    name: str
    heads: int | None
    present: bool
    splits: dict[int, list[tuple[int, int]]]

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON has it."""
        splits = {
            str(world): [{"ulysses": ulysses, "ring": ring} for ulysses, ring in pairs]
            for world, pairs in self.splits.items()
        }
        return {"name": self.name, "heads": self.heads, "weights_present": self.present, "splits": splits}


def configs() -> Iterator[ConfigFindings]:
    """Yield what is known of each shipped config."""
    for name in available("."):
        config = load_config(name)
        heads = config.architecture.heads if config.architecture else None
        splits = {world: [] if heads is None else _splits(heads, world) for world in WORLDS}
        yield ConfigFindings(name, heads, is_local(config), splits)


def _models() -> Table:
    table = Table(
        title="Configs, and how 1, 2, 4 and 8 ranks can split heads and tokens: ulysses × ring",
        box=SIMPLE_HEAD,
        pad_edge=False,
    )
    for column in ("config", "heads", "weights"):
        table.add_column(column, no_wrap=True)
    for world in WORLDS:
        table.add_column(str(world))
    for one in configs():
        splits = [", ".join(f"{u}×{ring}" for u, ring in one.splits[world]) or "?" for world in WORLDS]
        weights = "present" if one.present else "to download"
        table.add_row(one.name, str(one.heads or "?"), weights, *splits)
    table.caption = (
        "With guidance, twice the ranks can be used (cfg = 2). Other splits work as well, less evenly."
    )
    return table


def _splits(heads: int, world: int) -> list[tuple[int, int]]:
    """Even splits: Ulysses degrees that divide ranks and heads, the ring taking the rest."""
    degrees = range(world, 0, -1)
    return [(u, world // u) for u in degrees if world % u == 0 and heads % u == 0]
