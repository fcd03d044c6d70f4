"""Chebyshev ridge regression over denoising time, as one weight per remembered feature.

The fit C = (ΦᵀΦ + λI)⁻¹ ΦᵀH followed by the evaluation φ(τ*)ᵀC is linear in the features H, so the forecast
is the weighted sum Σ a_k H_k with a = Φ (ΦᵀΦ + λI)⁻¹ φ(τ*): K numbers, solved in float64, regardless of the
size of a feature.

Legend: K remembered steps, P = degree + 1 basis functions.
Source: Spectrum (arXiv 2603.01623), section 3.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray


def chebyshev_basis(tau: ArrayLike, degree: int) -> NDArray[np.float64]:
    """Chebyshev polynomials of the first kind, T_0 … T_degree, by recurrence.

    Args:
        tau: points, any shape; the polynomials are bounded by 1 on [-1, 1] only.
        degree: highest degree, ≥ 0.

    Returns:
        float64 array of shape `[*tau.shape, degree + 1]`.

    Raises:
        ValueError: `degree` is negative.
    """
    if degree < 0:
        raise ValueError(f"degree must be at least 0, got {degree}")
    tau = np.asarray(tau, dtype=np.float64)
    columns = [np.ones_like(tau), tau]
    while len(columns) <= degree:
        columns.append(2.0 * tau * columns[-1] - columns[-2])
    return np.stack(columns[: degree + 1], axis=-1)


def ridge_weights(
    history: Sequence[int], target: int, *, degree: int, ridge: float, horizon: float
) -> NDArray[np.float64]:
    """Weights that forecast step `target` from the features of `history` by ridge regression.

    The regularised problem is solved as the least-squares problem of the stacked matrix [Φ; √λ I] by QR,
    which keeps the full accuracy of float64 for small λ; forming ΦᵀΦ would square the condition number.

    Args:
        history: K distinct step indices, K ≥ 1.
        target: step index to forecast; it may lie between or beyond the steps of `history`.
        degree: highest degree M of the basis.
        ridge: λ ≥ 0. With λ = 0 and fewer points than basis functions the minimum-norm fit is used.
        horizon: H > 0; step t stands at τ = 2t/H − 1.

    Returns:
        float64 array `[K]`.

    Raises:
        ValueError: an argument is out of its range.
    """
    if len(history) == 0 or len(set(history)) != len(history):
        raise ValueError(f"history must hold at least one step, each once, got {list(history)}")
    if ridge < 0 or not np.isfinite(ridge):
        raise ValueError(f"ridge must be finite and at least 0, got {ridge}")
    if horizon <= 0 or not np.isfinite(horizon):
        raise ValueError(f"horizon must be finite and above 0, got {horizon}")
    steps = np.asarray([*history, target], dtype=np.float64)
    basis = chebyshev_basis(2.0 * steps / horizon - 1.0, degree)
    design_KP, target_P = basis[:-1], basis[-1]
    if ridge == 0.0:
        minimum_norm_K: NDArray[np.float64] = np.linalg.pinv(design_KP.T) @ target_P
        return minimum_norm_K
    damping_PP = np.sqrt(ridge) * np.eye(degree + 1)
    q, r = np.linalg.qr(np.concatenate([design_KP, damping_PP]))
    weights_K: NDArray[np.float64] = q[: len(history)] @ np.linalg.solve(r.T, target_P)
    return weights_K
