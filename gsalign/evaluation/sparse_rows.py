"""Sparse matrices of whole numbers, and the sums over them that re-ranking needs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# Weights are whole numbers, parts of 2**40: sums are then exact and the same in any order, so that
# a GPU, whose threads add in no order, gives what a CPU gives. A sum has 2**22 of them to go.
ONE = 2**40

# Pairs of entries that are worked on at a time; each takes some 40 bytes.
_PAIRS_AT_A_TIME = 2**21


@dataclass(frozen=True)
class SparseRows:
    """A matrix in compressed rows.

    Attributes:
        starts: first entry of every row, int64 ``[R + 1]``.
        columns: of every entry, int64 ``[E]``.
        values: of every entry, int64 ``[E]``, in parts of ``ONE``.
        width: number of columns.
    """

    starts: Tensor
    columns: Tensor
    values: Tensor
    width: int

    @classmethod
    def of(cls, rows: Tensor, columns: Tensor, values: Tensor, size: int) -> SparseRows:
        """Make a square matrix of entries in the order of their rows."""
        return cls(_starts(rows, size), columns, values, size)

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.starts) - 1

    def rows(self, first: int, stop: int) -> SparseRows:
        """Return some consecutive rows."""
        begin, end = int(self.starts[first]), int(self.starts[stop])
        return SparseRows(
            self.starts[first : stop + 1] - begin,
            self.columns[begin:end],
            self.values[begin:end],
            self.width,
        )

    def transposed(self) -> SparseRows:
        """Return the transposed matrix."""
        order = self.columns.argsort(stable=True)
        return SparseRows(
            _starts(self.columns[order], self.width),
            self._row_of_entries()[order],
            self.values[order],
            len(self),
        )

    def sum_of(self, members: Tensor) -> SparseRows:
        """Return the matrix whose row i is the sum of the rows ``members[i]``.

        Args:
            members: int64 ``[R, k]``.
        """
        lengths = self.starts.diff()
        parts = []
        before = 0
        for some in _by_budget(members, lengths[members].sum(1)):
            picked, entry = self._entries_of(some.flatten())
            row = picked.div(some.shape[1], rounding_mode="floor")
            key, place = (row * self.width + self.columns[entry]).unique(return_inverse=True)
            total = torch.zeros(len(key), dtype=torch.int64, device=key.device)
            total.index_add_(0, place, self.values[entry])
            parts.append((before + key // self.width, key % self.width, total))
            before += len(some)
        rows, columns, values = (torch.cat(column) for column in zip(*parts, strict=True))
        return SparseRows(_starts(rows, len(members)), columns, values, self.width)

    def overlap(self, other: SparseRows) -> Tensor:
        """Return the sum over j of min(a[i, j], b[k, j]) of every row i of this and k of another.

        Args:
            other: the transposed b: its rows are the columns j, its columns the rows k.

        Returns:
            int64 ``[R, K]``, in parts of ``ONE``.
        """
        result = torch.zeros(len(self), other.width, dtype=torch.int64, device=self.values.device)
        flat = result.view(-1)
        base = self._row_of_entries() * other.width
        entries = torch.arange(len(self.columns), device=base.device)
        for some in _by_budget(entries, other.starts.diff()[self.columns]):
            picked, entry = other._entries_of(self.columns[some])
            mine = some[picked]
            least = torch.minimum(self.values[mine], other.values[entry])
            flat.index_add_(0, base[mine] + other.columns[entry], least)
        return result

    def _row_of_entries(self) -> Tensor:
        counts = self.starts.diff()
        return torch.arange(len(self), device=counts.device).repeat_interleave(counts)

    def _entries_of(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """The entries of rows, one row after the other: the place in ``rows``, and the entry."""
        counts = self.starts.diff()[rows]
        picked = torch.arange(len(rows), device=rows.device).repeat_interleave(counts)
        ahead = counts.cumsum(0) - counts
        within = torch.arange(len(picked), device=rows.device) - ahead[picked]
        return picked, self.starts[rows[picked]] + within


def _starts(rows: Tensor, count: int) -> Tensor:
    """Where the entries of each row begin, from the ascending rows of the entries."""
    starts = torch.zeros(count + 1, dtype=torch.int64, device=rows.device)
    starts[1:] = torch.bincount(rows, minlength=count).cumsum(0)
    return starts


def _by_budget(items: Tensor, costs: Tensor) -> list[Tensor]:
    """Cut items into stretches that cost _PAIRS_AT_A_TIME or little more; one item at least."""
    if not len(items):
        return [items]
    stretch = (costs.cumsum(0) - costs).div(_PAIRS_AT_A_TIME, rounding_mode="floor")
    lengths = torch.unique_consecutive(stretch, return_counts=True)[1]
    return list(items.split(lengths.tolist()))
