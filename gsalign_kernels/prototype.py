"""Masked prototype alignment: the loss of GSAlign's dynamic alignment module (DAM)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gsalign_kernels import backends, checks, registration
from gsalign_kernels.reference import prototype as reference


def masked_prototype_loss(
    features: Tensor,
    masks: Tensor,
    labels: Tensor,
    *,
    implementation: str | None = None,
) -> tuple[Tensor, Tensor]:
    """How far samples are from their class's masked prototype, and how undecided the masks are.

    With ``g`` the L2-normalised features, ``c`` the L2-normalised mean of a sample's class in the
    batch (mean of the features as given) and ``m`` its channel mask, the prototype is
    ``c * m`` L2-normalised; alignment is the mean of ``(g - prototype)^2`` over batch and
    channels, entropy the mean of ``-m log max(m, 1e-6)``. Any label values, classes of one sample
    and batches of one class are served; there is no loop over labels and no host synchronisation.
    Computed in float32 (float64 for float64 arguments). Gradients flow to features and masks.

    Args:
        features: ``[B, D]``.
        masks: ``[B, D]``, channel masks in [0, 1].
        labels: ``[B]``, integers.
        implementation: ``"reference"``, ``"cpp"``, ``"cuda"``, ``"triton"``, or None for the
            choice in force.

    Returns:
        ``(alignment, entropy)``, two scalars; both 0 for an empty batch.

    Raises:
        TypeError: features or masks are no floating-point tensors, or labels no integers.
        ValueError: a shape or device disagrees.
        KernelUnavailableError: the named implementation cannot run.
    """
    checks.check_tensor("features", features, ("B", "D"))
    checks.check_tensor("masks", masks, ("B", "D"))
    if masks.shape != features.shape:
        raise ValueError(
            f"masks: wanted the shape of features {checks.shape_text(features.shape)}, "
            f"got {checks.shape_text(masks.shape)}"
        )
    if not isinstance(labels, Tensor) or labels.is_floating_point() or labels.is_complex():
        came = labels.dtype if isinstance(labels, Tensor) else type(labels).__name__
        raise TypeError(f"labels: wanted an integer tensor, got {came}")
    checks.check_shape("labels", labels, ("B",))
    if labels.shape[0] != features.shape[0]:
        raise ValueError(
            f"labels: wanted one per row of features, {features.shape[0]}, got {labels.shape[0]}"
        )
    checks.check_same_device(features=features, masks=masks, labels=labels)
    dtype = reference.computation_dtype(features, masks)
    features, masks = checks.converted(dtype, features, masks)
    labels = labels.long()
    chosen = backends.select("masked_prototype_loss", features.device, implementation, dtype)
    if chosen == "reference":
        return reference.masked_prototype_loss(features, masks, labels)
    alignment, entropy, *_ = registration.call(
        "masked_prototype_loss", chosen, features, masks, labels
    )
    return alignment, entropy


def _fake(features: Tensor, masks: Tensor, labels: Tensor) -> Any:
    return (
        features.new_empty(()),
        features.new_empty(()),
        torch.empty_like(features, memory_format=torch.contiguous_format),
        features.new_empty(features.shape[0], 4),
    )


def _backward_fake(
    grad_alignment: Tensor,
    grad_entropy: Tensor,
    features: Tensor,
    masks: Tensor,
    labels: Tensor,
    means: Tensor,
    norms: Tensor,
) -> Any:
    return (
        torch.empty_like(features, memory_format=torch.contiguous_format),
        torch.empty_like(masks, memory_format=torch.contiguous_format),
    )


def _setup(ctx: Any, inputs: Any, output: Any) -> None:
    kept = output[2:]
    ctx.mark_non_differentiable(*kept)
    ctx.save_for_backward(*inputs, *kept)


def _backward(call: Any, ctx: Any, grad_alignment: Tensor, grad_entropy: Tensor, *_: Any) -> Any:
    return *call(grad_alignment, grad_entropy, *ctx.saved_tensors), None


registration.define_triton("prototype")

backends.declare(
    "masked_prototype_loss", "cpp", "cuda", "triton", without_float64=("cuda", "triton")
)
registration.register(
    "masked_prototype_loss",
    fake=_fake,
    fake_backward=_backward_fake,
    setup_context=_setup,
    backward=_backward,
    float32_arguments=(0, 1),
)
