"""Regression of a tensor on others of its shape, over several videos: how one row of a solver is found.

For each video, the Gram matrix of the regressors and their products with the target suffice. Each video also
gets the row that is fitted to all others, so that what is said of errors is said of videos never fitted to.

Legend: m regressors; M videos.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from spectrum.solver.multistep import Row

_CHUNK = 2**18  # numbers per regressor that are multiplied at a time, in float64


class Moments(NamedTuple):
    """Inner products of one video.

    Attributes:
        gram: of the regressors with each other, `[m, m]`.
        cross: of the regressors with the target, `[m]`.
        target: of the target with itself.
    """

    gram: NDArray[np.float64]
    cross: NDArray[np.float64]
    target: float

    def error(self, row: Row) -> float:
        """Relative error of the target's estimate with these coefficients."""
        square = self.target - 2.0 * row @ self.cross + row @ self.gram @ row
        return float(np.sqrt(max(float(square), 0.0) / max(self.target, 1e-300)))


def moments_of(regressors: Sequence[torch.Tensor], target: torch.Tensor) -> Moments:
    """Inner products of tensors of one shape, in float64, read a piece at a time."""
    flat = [value.reshape(-1) for value in (*regressors, target)]
    gram = np.zeros((len(flat), len(flat)))
    for start in range(0, target.numel(), _CHUNK):
        part = torch.stack([value[start : start + _CHUNK].to("cpu", torch.float64) for value in flat])
        gram += (part @ part.T).numpy()
    return Moments(gram[:-1, :-1], gram[:-1, -1], float(gram[-1, -1]))


@dataclass(frozen=True, slots=True, eq=False)
class Regression:
    """Coefficients of one regression.

    Attributes:
        row: fitted to all videos, `[m]`.
        held_out: for each video, fitted to all others.
        errors: for each video, the relative error of its `held_out` row.
    """

    row: Row
    held_out: tuple[Row, ...]
    errors: tuple[float, ...]


def regress(
    moments: Sequence[Moments], prior: Row, ridge: float, weights: Sequence[float] | None = None
) -> Regression:
    """Minimise Σ_b w_b ‖target_b − Σ_i c_i z_bi‖² + ridge · Σ_i E_i (c_i − prior_i)², E_i = Σ_b w_b ‖z_bi‖².

    Args:
        moments: one for each of at least two videos.
        prior: coefficients `[m]` that the ridge pulls towards.
        ridge: strength of the pull, > 0, relative to each regressor's energy.
        weights: weight of each video; all alike by default.

    Raises:
        ValueError: there are fewer than two videos, or the ridge is not above 0.
    """
    if len(moments) < 2 or not ridge > 0.0:
        raise ValueError(f"need at least two videos and ridge > 0, got {len(moments)} and {ridge}")
    shares = np.ones(len(moments)) if weights is None else np.asarray(weights, dtype=np.float64)
    grams = [share * one.gram for share, one in zip(shares, moments, strict=True)]
    crosses = [share * one.cross for share, one in zip(shares, moments, strict=True)]
    gram, cross = np.sum(grams, axis=0), np.sum(crosses, axis=0)
    held_out = tuple(
        _solve(gram - own, cross - its, prior, ridge) for own, its in zip(grams, crosses, strict=True)
    )
    errors = tuple(one.error(row) for one, row in zip(moments, held_out, strict=True))
    return Regression(_solve(gram, cross, prior, ridge), held_out, errors)


def _solve(gram: NDArray[np.float64], cross: NDArray[np.float64], prior: Row, ridge: float) -> Row:
    damped = gram + ridge * np.diag(np.maximum(gram.diagonal(), 1e-300))
    return prior + np.linalg.solve(damped, cross - gram @ prior)
