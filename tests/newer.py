"""Marks for tests that themselves use what the oldest version of torch that we support does not have."""

from __future__ import annotations

import pytest
import torch
from packaging.version import Version

DEFAULT_BACKEND = pytest.mark.skipif(
    not hasattr(torch.compiler, "set_default_backend"),
    reason="this torch always compiles with inductor unless each call says otherwise",
)
SCALED_ROWS_ON_CPU = pytest.mark.skipif(
    Version(torch.__version__) < Version("2.12"), reason="this torch scales fp8 by rows on GPUs only"
)
