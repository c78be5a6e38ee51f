"""What is measured between two lines of the log: losses on the device, seconds, memory."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Mapping

import torch
from torch import Tensor

from gsalign.errors import GSAlignError


class NonFiniteLossError(GSAlignError):
    """A loss became infinite or not a number; the message names the iteration and the losses."""


class LossMeter:
    """Keeps the losses of the last iterations on their device and reads them all at once.

    Reading a number from a GPU waits for it; one read per line of the log costs nothing, and the
    rows kept until then still tell in which iteration a loss went wrong.
    """

    def __init__(self) -> None:
        self.names: tuple[str, ...] = ()
        self._rows: list[Tensor] = []
        self._first = 0

    def add(self, iteration: int, losses: Mapping[str, Tensor]) -> None:
        """Keep the losses of one iteration (counted from 0)."""
        if not self._rows:
            self._first = iteration
        self.names = tuple(losses)
        self._rows.append(torch.stack([loss.detach().float() for loss in losses.values()]))

    def __len__(self) -> int:
        """Return the number of rows kept."""
        return len(self._rows)

    def rows(self) -> Tensor:
        """The kept rows ``[iterations, losses]``, on their device; there must be one."""
        return torch.stack(self._rows)

    def read(self, rows: Tensor | None = None) -> dict[str, float]:
        """Mean of every loss since the last call, and start anew.

        Args:
            rows: what to read instead of the kept rows, as their mean over processes.

        Raises:
            NonFiniteLossError: one was infinite or not a number.
        """
        values = (self.rows() if rows is None else rows).cpu()
        self.check(values)
        self._rows.clear()
        means = values.double().mean(dim=0).tolist()
        return dict(zip(self.names, means, strict=True))

    def check(self, rows: Tensor | None = None) -> None:
        """Look for losses that are not finite; nothing is forgotten.

        Args:
            rows: what to look at instead of the kept rows.

        Raises:
            NonFiniteLossError: there is one.
        """
        values = (self.rows() if rows is None else rows).cpu()
        bad = (~values.isfinite()).nonzero()
        if not len(bad):
            return
        place = int(bad[0, 0])
        told = ", ".join(
            f"{name} {value:g}"
            for name, value in zip(self.names, values[place].tolist(), strict=True)
        )
        raise NonFiniteLossError(
            f"a loss is not finite in iteration {self._first + place}: {told}. Lower "
            "optimizer.lr, lengthen schedule.warmup, or use training.precision bf16 or no; the "
            "last checkpoint is from before"
        )

    def check_last(self) -> None:
        """Like :meth:`check`, for the last row alone."""
        if self._rows and not bool(self._rows[-1].isfinite().all()):
            self.check()


class Stopwatch:
    """Seconds per iteration, and how many of them went into waiting for data."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """Forget what was measured; what happened since does not count."""
        self._since = time.perf_counter()
        self._data = 0.0
        self._count = 0

    def data_arrived(self, waited: float) -> None:
        """Count one iteration's wait, in seconds."""
        self._data += waited
        self._count += 1

    def read(self) -> tuple[float, float]:
        """Seconds per iteration, all of it and waiting for data, and start anew."""
        count = max(self._count, 1)
        result = (time.perf_counter() - self._since) / count, self._data / count
        self.restart()
        return result


def peak_memory(device: torch.device) -> int:
    """Most memory held so far in MB: of the GPU, or of this process where there is none."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) // 2**20
    # Linux counts in kB, macOS in bytes.
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // unit
