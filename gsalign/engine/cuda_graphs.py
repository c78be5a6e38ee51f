"""CUDA graphs: a training step or an embedding launched as one piece, without the host's part.

After PyTorch's recipe for capturing a whole network: some runs on a side stream first, so that
kernels are compiled and libraries set up; then a capture, which records and computes nothing; then
replays, which read and write the memory of the capture. Figures go in by copies into that memory.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from gsalign.errors import ConfigError

if TYPE_CHECKING:
    from gsalign.engine.config import TrainingConfig
    from gsalign.model import GSAlign

Result = TypeVar("Result")
Recorder = Callable[[Callable[[], Any]], tuple[Callable[[], None], Any]]
"""From a function to its replay and to its result, which every replay writes anew."""

WARMUP = 3
"""Runs before a capture."""

KEPT_SIZES = 8
"""Batch sizes for which :class:`GraphedEmbedding` holds a graph."""


def require_graphs(training: TrainingConfig, device: torch.device, processes: int) -> None:
    """Make sure that ``training.cuda_graphs`` can be carried out.

    Raises:
        ConfigError: not on this device, with these processes or with these settings; says why.
    """
    reason = None
    if device.type != "cuda":
        reason = f"needs a GPU, and this run is on {device.type}: set it to false"
    elif processes > 1:
        reason = (
            f"serves one process, and this run has {processes}: the buckets of "
            "DistributedDataParallel are no part of a graph; set it to false"
        )
    elif training.precision == "fp16":
        reason = (
            "cannot hold the loss scaler of training.precision fp16, which skips steps: set "
            "training.precision=bf16"
        )
    elif training.recompute == "layers":
        reason = (
            "cannot hold training.recompute=layers, which reads the random generator in the "
            "backward pass: set training.recompute=cheap"
        )
    if reason is not None:
        raise ConfigError(f"training.cuda_graphs {reason}")


def record(function: Callable[[], Result]) -> tuple[Callable[[], None], Result]:
    """Capture a function that has run :data:`WARMUP` times on a side stream.

    Args:
        function: launches work on the current stream and never waits for it.

    Returns:
        The replay, and the function's result, which holds figures after every replay.
    """
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = function()
    return graph.replay, result


def beside(device: torch.device, function: Callable[[], Result]) -> Result:
    """Run a function on a side stream, in order with what comes before and after."""
    if device.type != "cuda":
        return function()
    current = torch.cuda.current_stream(device)
    side = torch.cuda.Stream(device)
    side.wait_stream(current)
    with torch.cuda.stream(side):
        result = function()
    current.wait_stream(side)
    return result


class GraphedStep:
    """A training step as one CUDA graph.

    The first :data:`WARMUP` calls compute as usual, so that nothing is trained that would not have
    been; the next one captures, and every call from then on replays.

    Args:
        step: forward, backward, clipping and the optimizer's step, from images ``[B, 3, H, W]``
            and what belongs to them, ``[B, ...]``, all on one device; leaves its gradients behind.
            Its learning rates are tensors (:func:`rates_on_device`).
        forget: drops the gradients, so that the capture makes them in its own memory.
        recorder: captures; None: ``record``.
    """

    def __init__(
        self,
        step: Callable[..., dict[str, Tensor]],
        forget: Callable[[], None],
        *,
        recorder: Recorder | None = None,
    ) -> None:
        self._step = step
        self._forget = forget
        self._record = recorder or record
        self._calls = 0
        self._inputs: tuple[Tensor, ...] = ()
        self._replay: Callable[[], None] | None = None
        self._losses: dict[str, Tensor] = {}

    def __call__(self, images: Tensor, *others: Tensor) -> dict[str, Tensor]:
        """One step; the losses are overwritten by the next.

        Raises:
            ValueError: the batch has another size than the captured one.
        """
        given = (images, *others)
        if self._calls < WARMUP:
            self._calls += 1
            losses = beside(images.device, lambda: self._step(*given))
            self._forget()
            return losses
        if self._replay is None:
            self._inputs = tuple(tensor.clone() for tensor in given)
            self._replay, self._losses = self._record(lambda: self._step(*self._inputs))
        for kept, tensor in zip(self._inputs, given, strict=True):
            if kept.shape != tensor.shape:
                raise ValueError(
                    f"batch: the captured step has images {list(self._inputs[0].shape)}, got "
                    f"{list(images.shape)}; set training.cuda_graphs=false for batches that differ"
                )
            kept.copy_(tensor, non_blocking=True)
        self._replay()
        return self._losses


def rates_on_device(optimizer: torch.optim.Optimizer, device: torch.device) -> None:
    """Make learning rates and counters of a fused optimizer tensors that a graph reads anew."""
    for group in optimizer.param_groups:
        group["lr"] = torch.tensor(float(group["lr"]), device=device)
        if "capturable" in group:
            group["capturable"] = True


class GraphedEmbedding:
    """A network's ``embed`` as CUDA graphs, one for each size of a batch, for small batches.

    Captured at the first batch of a size, in the precision and with the kernels in force then. The
    weights are read where they are: loading others into the same tensors is seen by the graphs.

    Args:
        network: in evaluation mode, on a GPU.
        dtype: of autocast; None for none.
        recorder: captures; None: ``record``.

    Raises:
        ConfigError: the network is not on a GPU.
    """

    def __init__(
        self,
        network: GSAlign,
        *,
        dtype: torch.dtype | None = None,
        recorder: Recorder | None = None,
    ) -> None:
        device = next(network.parameters()).device
        if device.type != "cuda" and recorder is None:
            raise ConfigError(
                f"CUDA graphs need a GPU, and the network is on {device}: call embed itself"
            )
        self.network = network
        self._dtype = dtype
        self._record = recorder or record
        self._graphs: OrderedDict[tuple[Any, ...], tuple[Tensor, Callable[[], None], Tensor]]
        self._graphs = OrderedDict()

    def __call__(self, images: Tensor) -> Tensor:
        """Embeddings of images ``[B, 3, H, W]``, as :meth:`GSAlign.embed`; a tensor of its own."""
        key = (images.shape, images.dtype, images.stride())
        if key not in self._graphs:
            if len(self._graphs) >= KEPT_SIZES:
                self._graphs.popitem(last=False)
            self._graphs[key] = self._captured(images)
        self._graphs.move_to_end(key)
        kept, replay, embeddings = self._graphs[key]
        kept.copy_(images, non_blocking=True)
        replay()
        return embeddings.clone()

    @torch.no_grad()
    def _captured(self, images: Tensor) -> tuple[Tensor, Callable[[], None], Tensor]:
        kept = images.detach().clone()

        def embed() -> Tensor:
            # Casts of weights that autocast remembers would be of the first capture's memory.
            half = (
                nullcontext()
                if self._dtype is None
                else torch.autocast(kept.device.type, self._dtype, cache_enabled=False)
            )
            with torch.no_grad(), half:
                return self.network.embed(kept)

        for _ in range(WARMUP):
            beside(kept.device, embed)
        return kept, *self._record(embed)
