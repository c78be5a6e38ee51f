"""Argument checks whose messages name the argument, what came and what was wanted."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

FLOATING = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def shape_text(shape: Sequence[str | int]) -> str:
    """``(2, 3)`` as ``[2, 3]``, ``("B", 2)`` as ``[B, 2]``."""
    return "[" + ", ".join(str(length) for length in shape) + "]"


def check_tensor(name: str, value: object, axes: Sequence[str | int]) -> Tensor:
    """Require a floating-point tensor whose rank, and every axis given as a number, agree.

    Args:
        name: the argument's name, for the message.
        value: what the caller passed.
        axes: one entry per axis; a number is the length wanted, a word only names the axis.

    Returns:
        ``value``, known to be a tensor.

    Raises:
        TypeError: not a tensor, or not of a floating-point type.
        ValueError: another rank, or another length along a numbered axis.
    """
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: wanted a tensor, got {type(value).__name__}")
    if value.dtype not in FLOATING:
        raise TypeError(
            f"{name}: wanted float32, float16, bfloat16 or float64, got {value.dtype}; "
            f"convert it with .float()"
        )
    return check_shape(name, value, axes)


def check_shape(name: str, value: Tensor, axes: Sequence[str | int]) -> Tensor:
    """The rank and length half of :func:`check_tensor`, for tensors of any type."""
    # The texts are made only when raising: under torch.compile a length may be a symbol, which has
    # no text.
    if value.dim() != len(axes):
        raise ValueError(
            f"{name}: wanted {len(axes)} dimensions {shape_text(axes)}, "
            f"got {value.dim()} with shape {shape_text(value.shape)}"
        )
    for axis, length in zip(axes, value.shape, strict=True):
        if not isinstance(axis, str) and axis != length:
            raise ValueError(
                f"{name}: wanted shape {shape_text(axes)}, got {shape_text(value.shape)}"
            )
    return value


def check_same_device(**tensors: Tensor) -> None:
    """Require all tensors on the device of the first.

    Raises:
        ValueError: two arguments lie on different devices; both are named.
    """
    first_name, device = "", None
    for name, value in tensors.items():
        if device is None:
            first_name, device = name, value.device
        elif value.device != device:
            raise ValueError(
                f"{name}: is on {value.device} but {first_name} is on {device}; move one with .to()"
            )


def check_size(name: str, size: object) -> tuple[int, int]:
    """Require ``(height, width)``, both positive.

    Raises:
        TypeError: not a pair of integers.
        ValueError: a length below 1.
    """
    if isinstance(size, torch.Size):
        size = tuple(size)
    if not isinstance(size, tuple | list) or len(size) != 2:
        raise TypeError(f"{name}: wanted (height, width), got {size!r}")
    height, width = size
    for length in (height, width):
        if isinstance(length, bool) or not isinstance(length, int | torch.SymInt):
            raise TypeError(f"{name}: wanted two integers (height, width), got {size!r}")
    if height < 1 or width < 1:
        raise ValueError(f"{name}: wanted a height and width of at least 1, got {size!r}")
    return height, width


def check_choice(name: str, value: object, choices: Sequence[object]) -> None:
    """Require one of the listed values.

    Raises:
        ValueError: another value; the message lists what can be given.
    """
    if value not in choices:
        listed = ", ".join(repr(choice) for choice in choices)
        raise ValueError(f"{name}: wanted one of {listed}, got {value!r}")


def converted(dtype: torch.dtype, *tensors: Tensor) -> list[Tensor]:
    """The tensors in a type. Asks first: ``Tensor.to`` is slow at doing nothing."""
    return [tensor if tensor.dtype == dtype else tensor.to(dtype) for tensor in tensors]


def coordinates_dtype(features: Tensor) -> torch.dtype:
    """The type coordinates are computed in: float64 beside float64 features, else float32.

    A half-precision coordinate misplaces a sample by up to a tenth of a pixel, so coordinates
    stay float32 whatever the features are stored in.
    """
    return torch.float64 if features.dtype == torch.float64 else torch.float32
