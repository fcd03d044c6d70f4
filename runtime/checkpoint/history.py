"""The history of a generation: the values that its forecasts are made from."""

from __future__ import annotations

import torch

History = dict[str, dict[int, torch.Tensor]]
"""What is forecast (a branch, or `guided`) → step → remembered value."""
