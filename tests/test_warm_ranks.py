"""Ranks that run one task after another are met once, and not used again after a failure."""

from __future__ import annotations

import os

import pytest

from tests.ranks import Ranks, WarmRanks, die


def told(ranks: Ranks, word: str) -> tuple[int, list[str]]:
    return os.getpid(), ranks.control.all_gather_object(f"{word} {ranks.rank}")


def failing(ranks: Ranks, how: str) -> None:
    if ranks.rank == 1:
        raise ValueError("no") if how == "raises" else SystemExit(die())
    ranks.control.all_gather_object("and waits for the other")


def test_ranks_are_used_again_until_one_fails() -> None:
    warm = WarmRanks()
    first = warm.run(2, told, "a")
    assert [words for _, words in first] == [["a 0", "a 1"]] * 2
    assert warm.run(2, told, "a") == first
    for how, said in (("raises", "'ValueError', None, '', 'no'"), ("dies", "it died")):
        before = {process for process, _ in warm.run(2, told, "b")}
        with pytest.raises(AssertionError, match=said):
            warm.run(2, failing, how)
        assert not before & {process for process, _ in warm.run(2, told, "b")}
    alive = [process for process, _ in warm.run(2, told, "c")]
    warm.close()
    for process in alive:
        with pytest.raises(ProcessLookupError):
            os.kill(process, 0)
