"""Frames in strips: each rank has consecutive rows of every frame, and gets those of its neighbours.

Tensor legend: H rows of a strip, W columns; any axes before them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from runtime.parallel.collectives import Peers
from runtime.parallel.sequence import Split


class Strips:
    """Strips of a frame, from top to bottom in rank order, at every resolution that halves or doubles them.

    Args:
        rows: rows of a frame at the lowest resolution, at least one for each rank.
        peers: the ranks that share the frame.
    """

    def __init__(self, rows: int, peers: Peers):
        self._split, self._peers = Split.even(rows, peers.size), peers

    @property
    def is_first(self) -> bool:
        """Whether this rank has the top of the frame, and receives what is collected."""
        return self._peers.rank == 0

    def own(self, frame: torch.Tensor) -> torch.Tensor:
        """Take this rank's rows of a frame `[…, H of all, W]` that it has whole."""
        start, length = self._place(self._peers.rank, frame.shape[-2] // self._split.total)
        return frame.narrow(-2, start, length)

    def around(self, strip: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Get the row above a strip `[…, H, W]` and the row below it; zeros at the edges of the frame."""
        return self._exchange(strip, above=True)

    def below(self, strip: torch.Tensor) -> torch.Tensor:
        """Get the row below a strip `[…, H, W]`; zeros at the edge of the frame."""
        return self._exchange(strip, above=False)[1]

    def gather(self, strip: torch.Tensor, axis: int) -> torch.Tensor:
        """Gather every rank's strip on every rank.

        Args:
            strip: this rank's; along `axis` it has its rows, or as many times the number of its rows.
            axis: axis along which strips are joined.
        """
        return torch.cat(self._peers.gather(strip, self._shapes(strip, axis)), dim=axis)

    def collect(self, strip: torch.Tensor) -> torch.Tensor | None:
        """Collect the strips `[…, H, W]` as a frame on the first rank; None on the others."""
        nothing = strip.new_empty(0)
        pieces = [strip if rank == 0 else nothing for rank in range(self._peers.size)]
        shapes = self._shapes(strip, -2) if self.is_first else [(0,)] * self._peers.size
        arrived = self._peers.all_to_all(pieces, shapes)
        return torch.cat(arrived, dim=-2) if self.is_first else None

    def deal(self, frame: torch.Tensor | None, shape: Sequence[int], like: torch.Tensor) -> torch.Tensor:
        """Send each rank its rows of a frame that only the first has.

        Args:
            frame: the frame `[…, H of all, W]` on the first rank; not used on the others.
            shape: its shape.
            like: any tensor of its dtype and device.
        """
        (*lead, _, width), factor = shape, shape[-2] // self._split.total
        nothing = like.new_empty(0)
        pieces = [nothing] * self._peers.size
        if self.is_first:
            assert frame is not None
            pieces = [frame.narrow(-2, *self._place(rank, factor)) for rank in range(self._peers.size)]
        shapes: list[tuple[int, ...]] = [(0,)] * self._peers.size
        shapes[0] = (*lead, self._place(self._peers.rank, factor)[1], width)
        return self._peers.all_to_all(pieces, shapes)[0]

    def _exchange(self, strip: torch.Tensor, *, above: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """Send the first row to the rank before, and for rows `above` the last one to the rank after."""
        row: tuple[int, ...] = (*strip.shape[:-2], 1, strip.shape[-1])
        rank, last = self._peers.rank, self._peers.size - 1
        nothing: tuple[int, ...] = (0,)
        pieces, shapes = [strip.new_empty(0)] * (last + 1), [nothing] * (last + 1)
        if rank > 0:
            pieces[rank - 1] = strip[..., :1, :]
            shapes[rank - 1] = row if above else nothing
        if rank < last:
            pieces[rank + 1] = strip[..., -1:, :] if above else pieces[rank + 1]
            shapes[rank + 1] = row
        arrived, edge = self._peers.all_to_all(pieces, shapes), strip.new_zeros(row)
        before = arrived[rank - 1] if rank > 0 else edge
        return before, arrived[rank + 1] if rank < last else edge

    def _place(self, rank: int, factor: int) -> tuple[int, int]:
        """First row and number of rows of a rank, at a resolution of `factor` times the lowest."""
        part = self._split.slice(rank)
        return factor * part.start, factor * (part.stop - part.start)

    def _shapes(self, strip: torch.Tensor, axis: int) -> list[tuple[int, ...]]:
        """Shapes of all ranks' strips."""
        own, found = self._split.sizes[self._peers.rank], []
        for size in self._split.sizes:
            shape = list(strip.shape)
            shape[axis] = shape[axis] // own * size
            found.append(tuple(shape))
        return found
