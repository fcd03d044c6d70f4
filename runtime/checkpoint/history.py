"""History of a generation: the values from which its forecasts are made."""

from __future__ import annotations

import torch

History = dict[str, dict[int, torch.Tensor]]
"""Forecast stream (a branch, or `guided`) → step → remembered value."""
