"""One step of the optimizer: forward, backward, clipping, update; nothing in it waits."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gsalign.engine.cuda_graphs import GraphedStep, rates_on_device

if TYPE_CHECKING:
    from accelerate import Accelerator


class TrainingStep:
    """Trains on a batch.

    Args:
        accelerator: of the run.
        model: as the accelerator prepared it.
        optimizer: as the accelerator prepared it.
        clip_norm: bound on the norm of all gradients together; 0 for none.
        graphs: whether the step runs as one CUDA graph, see :mod:`gsalign.engine.cuda_graphs`.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        model: torch.nn.Module,
        optimizer: Any,
        *,
        clip_norm: float,
        graphs: bool = False,
    ) -> None:
        self.accelerator = accelerator
        self.model = model
        self.optimizer = optimizer
        self.clip_norm = clip_norm
        self._names: tuple[str, ...] = ()
        self._graphed: GraphedStep | None = None
        if graphs:
            rates_on_device(optimizer, accelerator.device)
            self._graphed = GraphedStep(self._compute, self._forget)

    def __call__(
        self,
        images: Tensor,
        identities: Tensor,
        views: Tensor,
        part_labels: Tensor | None = None,
        *,
        lr: float,
        ltps_factor: float = 1.0,
        deformation_share: float | None = None,
    ) -> dict[str, Tensor]:
        """One step; returns the losses, on their device.

        Args:
            images: ``[B, 3, H, W]``, normalised, on the accelerator's device as all arguments.
            identities: ``[B]``.
            views: ``[B]``.
            part_labels: uint8 ``[B, H, W]``, see :meth:`GSAlign.losses`; in every step or in none.
            lr: learning rate of all groups.
            ltps_factor: on that of groups of LTPS, where it has a rate of its own.
            deformation_share: see :meth:`GSAlign.losses`; in every step or in none.
        """
        for group in self.optimizer.param_groups:
            rate = lr * ltps_factor if group.get("ltps") else lr
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate
        given = {"images": images, "identities": identities, "views": views}
        if part_labels is not None:
            given["part_labels"] = part_labels
        if deformation_share is not None:
            # Filled where it is read, so that nothing is copied there.
            given["deformation_share"] = torch.full((), deformation_share, device=images.device)
        self._names = tuple(given)
        if self._graphed is not None:
            return self._graphed(*given.values())
        losses = self._compute(*given.values())
        self._forget()
        return losses

    def _compute(self, *given: Tensor) -> dict[str, Tensor]:
        named = dict(zip(self._names, given, strict=True))
        losses: dict[str, Tensor] = self.model(**named)
        self.accelerator.backward(torch.stack(list(losses.values())).sum())
        if self.clip_norm:
            self.accelerator.clip_grad_norm_(self.model.parameters(), self.clip_norm)
        self.optimizer.step()
        return {name: loss.detach() for name, loss in losses.items()}

    def _forget(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
