"""Usual configs of Wan's models: the shipped one for models of the same kind, nearest in size."""

from __future__ import annotations

import math
from pathlib import Path

from runtime.models.wan.experts import read_transformer
from runtime.models.wan.folder import ModelKind, knows_frames
from runtime.models.wan.settings import WanIndex
from runtime.request.config import Config, load_config

# Kind, and whether it has two experts → channels of its tokens → its config.
_CONFIGS = {
    (ModelKind.TEXT, False): {
        192: "wan-tiny",
        1536: "wan2.1-t2v-1.3b-480p",
        5120: "wan2.1-t2v-14b-480p",
    },
    (ModelKind.TEXT, True): {192: "wan2.2-tiny", 5120: "wan2.2-t2v-14b-480p"},
    (ModelKind.IMAGE, False): {5120: "wan2.1-i2v-14b-480p"},
    (ModelKind.IMAGE, True): {5120: "wan2.2-i2v-14b-480p"},
    (ModelKind.VACE, False): {1536: "wan2.1-vace-1.3b-480p", 5120: "wan2.1-vace-14b-480p"},
    (ModelKind.VACE, True): {5120: "wan2.1-vace-14b-480p"},
}

_BY_FRAMES = {  # whose frames can be known
    3072: "wan2.2-ti2v-5b-720p",
}


def usual_config(path: Path, kind: ModelKind) -> Config:
    """Usual config of the model in `path`, with its own architecture.

    Raises:
        OSError, ValueError: its settings are missing or not valid.
    """
    two = WanIndex.read(path / "model_index.json").boundary_ratio is not None
    architecture = read_transformer(path).architecture
    channels = architecture.heads * architecture.head_dim
    known = _BY_FRAMES if knows_frames(path) else _CONFIGS[kind, two]
    name = known[min(known, key=lambda size: abs(math.log(size / channels)))]
    return load_config(name).model_copy(update={"architecture": architecture})
