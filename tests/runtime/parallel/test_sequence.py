"""Splits cover everything once, whatever divides."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.parallel.sequence import Split


@given(st.integers(1, 500), st.integers(1, 16))
def test_parts_cover_the_whole_in_order(total: int, parts: int) -> None:
    if total < parts:
        with pytest.raises(ValueError, match="cannot be split"):
            Split.even(total, parts)
        return
    split = Split.even(total, parts)
    covered = [i for part in range(parts) for i in range(total)[split.slice(part)]]
    assert covered == list(range(total))
    assert max(split.sizes) - min(split.sizes) <= 1
    assert split.total == total


def test_neighbours_merge() -> None:
    assert Split((3, 3, 2, 2)).merge(2).sizes == (6, 4)
