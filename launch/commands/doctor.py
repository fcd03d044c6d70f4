"""`lockstep doctor`: shows what this machine has and can run. Imports torch only where there is a GPU."""

from __future__ import annotations

import importlib
import os
import platform
import re
import subprocess
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import imageio_ffmpeg
from rich.table import Table

from runtime.errors import named, reason
from runtime.files.extensions import announced
from runtime.media.quality import has_filter
from runtime.models.folder import is_local
from runtime.request.config import Config, available, load_config

WORLDS = (1, 2, 4, 8)
DRIVERS = [Path("/dev") / name for name in ("nvidiactl", "kfd", "dxg")]  # of NVIDIA, AMD, and in WSL
_PATIENCE = 30.0  # seconds for ffmpeg to tell its version
_FILTERS = ("psnr", "ssim", "libvmaf", "xfade", "concat")


def examine() -> Iterator[Table]:
    """Yield tables of findings, the cheapest first."""
    yield _machine()
    yield _models()


def _machine() -> Table:
    table = Table(title="This machine", show_header=False)
    table.add_column(style="bold")
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


def _models() -> Table:
    table = Table(title="Configs, and how 1, 2, 4 and 8 ranks can split heads and tokens: ulysses × ring")
    table.add_column("config", no_wrap=True)
    table.add_column("heads")
    table.add_column("weights", no_wrap=True)
    for world in WORLDS:
        table.add_column(str(world))
    for name in available("."):
        config = load_config(name)
        heads = config.architecture.heads if config.architecture else None
        splits = [_splits(heads, world) for world in WORLDS]
        table.add_row(name, str(heads or "?"), _weights(config), *splits)
    table.caption = (
        "With guidance, twice the ranks can be used (cfg = 2). Other splits work as well, less evenly."
    )
    return table


def _splits(heads: int | None, world: int) -> str:
    """Format the even splits: Ulysses degrees that divide ranks and heads, the ring taking the rest."""
    if heads is None:
        return "?"
    return ", ".join(f"{u}×{world // u}" for u in range(world, 0, -1) if world % u == 0 and heads % u == 0)


def _weights(config: Config) -> str:
    return "present" if is_local(config) else "to download"
