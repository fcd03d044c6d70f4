"""Resources of a rank, and placement of ranks on a cluster's nodes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from runtime.errors import BadRequestError, JobFailedError
from runtime.request.config import Config


class NoRoomError(BadRequestError):
    """The cluster has too few resources, counting all its nodes."""


@dataclass(frozen=True, slots=True)
class Bundle:
    """Resources of one rank, and the placement strategy of its group."""

    resources: dict[str, float]
    strategy: str

    def __str__(self) -> str:
        return _in_words(self.resources)


def bundle_for(config: Config, world: int, nodes: list[dict[str, Any]]) -> Bundle:
    """Choose a CPU for each rank, and a GPU if the cluster has any; on a single node if all ranks fit there.

    Args:
        nodes: from `ray.nodes()`.

    Raises:
        NoRoomError: all nodes together are too small.
        JobFailedError: no node is alive.
    """
    alive = [node["Resources"] for node in nodes if node["Alive"]]
    if not alive:
        raise JobFailedError("no node of the Ray cluster is alive")
    gpus = config.device != "cpu" and any(node.get("GPU", 0) >= 1 for node in alive)
    resources = {"CPU": 1.0} | ({"GPU": 1.0} if gpus else {})
    fits = [
        math.floor(min(node.get(name, 0) / amount for name, amount in resources.items())) for node in alive
    ]
    if sum(fits) < world:
        raise NoRoomError(
            f"ranks: {world} given; each takes {_in_words(resources)}, and the cluster has room for "
            f"{sum(fits)}"
        )
    return Bundle(resources, "STRICT_PACK" if max(fits) >= world else "PACK")


def _in_words(resources: dict[str, float]) -> str:
    """Write resources as people do: `1 CPU and 1 GPU`."""
    return " and ".join(f"{amount:g} {name}" for name, amount in resources.items())
