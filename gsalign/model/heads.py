"""A batch-norm neck and a linear classifier: one head for identities, one for views."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from gsalign.model.precision import without_autocast


class ClassifierHead(nn.Module):
    """BN neck whose bias stays at 0, then a linear classifier without bias.

    Computes in the type of its own parameters: float32 under autocast, where the matrix product is
    too small to be worth the lost digits.

    Args:
        width: channels of a feature.
        num_classes: rows of the classifier.
    """

    def __init__(self, width: int, num_classes: int) -> None:
        super().__init__()
        self.neck = nn.BatchNorm1d(width)
        self.neck.bias.requires_grad_(False)
        self.classifier = nn.Linear(width, num_classes, bias=False)
        nn.init.normal_(self.classifier.weight, std=0.01)

    def embed(self, feature: Tensor) -> Tensor:
        """``[B, C] -> [B, C]`` under the running statistics, whatever the module's mode."""
        neck = self.neck
        with without_autocast(feature):
            return functional.batch_norm(
                feature.to(neck.weight.dtype),
                neck.running_mean,
                neck.running_var,
                neck.weight,
                neck.bias,
                training=False,
                eps=neck.eps,
            )

    def forward(self, feature: Tensor) -> Tensor:
        """Logits ``[B, C] -> [B, num_classes]`` under the statistics of the batch.

        In training mode the running statistics move towards those of the batch; in evaluation mode
        they stay, so a loss can be looked at without a trace.
        """
        neck = self.neck
        with without_autocast(feature):
            feature = feature.to(neck.weight.dtype)
            if self.training:
                normalised = neck(feature)
            else:
                normalised = functional.batch_norm(
                    feature, None, None, neck.weight, neck.bias, training=True, eps=neck.eps
                )
            return self.classifier(normalised)

    @torch.no_grad()
    def observe(self, feature: Tensor) -> None:
        """In training mode, move the running statistics towards this batch; nothing else."""
        if self.training:
            with without_autocast(feature):
                self.neck(feature.to(self.neck.weight.dtype))
