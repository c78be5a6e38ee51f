"""Remembers the matrices of :func:`gsalign_kernels.tps_basis` by the values they were made from.

A basis is made in float64 and takes far longer than its use, while control points rarely change.
Bounded in number and in bytes; the least recently used goes first. What is kept never leaves this
module: callers get copies, so editing one in place reaches nobody else.

Nothing is remembered where a tensor is no plain tensor with values of its own: while compiling,
exporting or tracing, inside ``torch.func`` transforms and dispatch modes (fake tensors), for
subclasses, on devices other than CPU and CUDA, and while a CUDA graph is captured (its replays
would read memory that the cache may have freed).
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

MAXIMUM_ENTRIES = 64
MAXIMUM_BYTES = 64 * 2**20
"""Of all entries together, on all devices; a larger basis is made anew each time."""


class BasisCacheInfo(NamedTuple):
    """What :func:`tps_basis_cache_info` tells, since the start or the last clearing.

    Attributes:
        hits: calls served by a copy.
        misses: calls for which a basis was made and kept, or would have been but for its size.
        entries: bases kept now.
        bytes: their size together.
    """

    hits: int
    misses: int
    entries: int
    bytes: int


@dataclass(frozen=True)
class _Entry:
    basis: Tensor
    stream: Any  # on CUDA the stream that made the basis,
    ready: Any  # and the event after which others may read it


class _BasisCache:
    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._entries: OrderedDict[Hashable, _Entry] = OrderedDict()
        # Reading the values of a CUDA tensor waits for the device, so they are remembered for as
        # long as the same tensor object lives and nothing was written to it.
        self._read: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
        self._hits = self._misses = self._bytes = 0

    def find(self, key: Hashable) -> _Entry | None:
        with self._lock:
            entry = self._entries.get(key)
            if entry is None:
                self._misses += 1
                return None
            self._hits += 1
            self._entries.move_to_end(key)
            return entry

    def keep(self, key: Hashable, entry: _Entry) -> None:
        with self._lock:
            replaced = self._entries.pop(key, None)  # another thread made it too
            if replaced is not None:
                self._bytes -= replaced.basis.nbytes
            self._entries[key] = entry
            self._bytes += entry.basis.nbytes
            while len(self._entries) > MAXIMUM_ENTRIES or self._bytes > MAXIMUM_BYTES:
                _, oldest = self._entries.popitem(last=False)
                self._bytes -= oldest.basis.nbytes

    def values(self, points: Tensor) -> bytes:
        """The float64 bytes of the values: keys agree exactly where all coordinates do."""
        if points.device.type == "cpu" or points.is_inference():
            # Inference tensors count no writes.
            return _read(points)
        # An address alone would not do: freed memory is handed out again.
        state = (points._version, points.data_ptr(), points.dtype, points.shape, points.stride())
        with self._lock:
            known = self._read.get(points)
        if known is not None and known[0] == state:
            return known[1]
        values = _read(points)
        with self._lock:
            self._read[points] = (state, values)
        return values

    def info(self) -> BasisCacheInfo:
        with self._lock:
            return BasisCacheInfo(self._hits, self._misses, len(self._entries), self._bytes)


def _read(points: Tensor) -> bytes:
    return points.detach().double().cpu().contiguous().numpy().tobytes()


_cache = _BasisCache()


def tps_basis_cache_clear() -> None:
    """Forget every basis that :func:`gsalign_kernels.tps_basis` keeps, and the counts."""
    global _cache
    _cache = _BasisCache()


def tps_basis_cache_info() -> BasisCacheInfo:
    """How often :func:`gsalign_kernels.tps_basis` found a basis, and what it keeps.

    Returns:
        A :class:`BasisCacheInfo`.
    """
    return _cache.info()


# A child gets no lock that another thread of its parent held, and no memory of the parent's GPU.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=tps_basis_cache_clear)


def passes_by(control_points: Tensor) -> bool:
    """Whether a basis of these control points must be neither looked up nor kept."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return True
    if type(control_points) is not Tensor and type(control_points) is not torch.nn.Parameter:
        return True
    if torch._C._len_torch_dispatch_stack() > 0:
        return True
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return True
    if torch._C._functorch.is_functorch_wrapped_tensor(control_points):
        return True
    if control_points.is_cuda:
        return torch.cuda.is_current_stream_capturing()
    return control_points.device.type != "cpu"


def fetch(
    control_points: Tensor, settings: tuple[Hashable, ...], make: Callable[[], Tensor]
) -> Tensor:
    """A copy of the basis made earlier of equal control points and settings, or a new one.

    Args:
        control_points: what the basis is made of, beside the settings.
        settings: everything else that it depends on.
        make: makes it; whatever it raises passes through, and nothing is kept.
    """
    cache = _cache
    key = (
        cache.values(control_points),
        control_points.dtype,
        control_points.device,
        settings,
    )
    entry = cache.find(key)
    if entry is None:
        # A tensor made in inference mode could never be used in training.
        with torch.inference_mode(False):
            basis = make()
            if basis.nbytes > MAXIMUM_BYTES:
                return basis
            entry = _Entry(basis, *_made_now(basis))
        cache.keep(key, entry)
    return _copy(entry)


def _made_now(basis: Tensor) -> tuple[Any, Any]:
    if not basis.is_cuda:
        return None, None
    stream = torch.cuda.current_stream(basis.device)
    return stream, stream.record_event()


def _copy(entry: _Entry) -> Tensor:
    if entry.stream is None:
        return entry.basis.clone()
    stream = torch.cuda.current_stream(entry.basis.device)
    if stream != entry.stream:
        stream.wait_event(entry.ready)
        # Forgotten meanwhile, its memory must outlast this stream's reading.
        entry.basis.record_stream(stream)
    return entry.basis.clone()
