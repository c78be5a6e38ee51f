"""True body parts put together into as many groups as a network has parts."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from types import MappingProxyType

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gsalign.data.synthetic.body import PARTS
from gsalign.errors import ConfigError

UNKNOWN = 255
"""Label of a pixel of which nobody says what it shows."""

_UPPER = ("torso", "arms", "bag")

PART_GROUPS: Mapping[int, Mapping[str, tuple[str, ...]]] = MappingProxyType(
    {
        1: {"person": ("head", *_UPPER, "legs", "feet")},
        2: {"upper body": ("head", *_UPPER), "lower body": ("legs", "feet")},
        3: {"head": ("head",), "torso": _UPPER, "legs": ("legs", "feet")},
        4: {"head": ("head",), "torso": _UPPER, "legs": ("legs",), "feet": ("feet",)},
        5: {
            "head": ("head",),
            "torso": ("torso", "bag"),
            "arms": ("arms",),
            "legs": ("legs",),
            "feet": ("feet",),
        },
        6: {part: (part,) for part in PARTS[1:-1]},
    }
)
"""Number of groups -> name of a group -> the true parts in it, in the order of their labels.

Small parts join the larger one they are seen on. No group has the occluder: it is background.
"""


def part_groups(count: int) -> dict[str, tuple[str, ...]]:
    """The groups for a network of ``count`` parts.

    Raises:
        ConfigError: there are no such groups; the message names the numbers there are.
    """
    if count not in PART_GROUPS:
        raise ConfigError(
            f"model.parts {count}: label maps can be put into {min(PART_GROUPS)} to "
            f"{max(PART_GROUPS)} groups; choose one of these, or set model.losses.part_labels to 0"
        )
    return dict(PART_GROUPS[count])


def group_labels(labels: Tensor, count: int) -> Tensor:
    """Labels of true parts as labels of groups.

    Args:
        labels: uint8 on the CPU, any shape: indices into ``PARTS``, or ``UNKNOWN``, which stays.
        count: number of groups.

    Returns:
        uint8 of the same shape, 0 background and occluders, 1 .. ``count`` the groups in their
        order.

    Raises:
        ConfigError: see :func:`part_groups`.
    """
    # NumPy indexes by bytes as they are.
    return torch.from_numpy(_table(count)[labels.numpy()])


@cache
def _table(count: int) -> NDArray[np.uint8]:
    """Group of every label, ``[256]``."""
    table = np.full(256, UNKNOWN, dtype=np.uint8)
    table[: len(PARTS)] = 0
    for label, members in enumerate(part_groups(count).values(), start=1):
        for member in members:
            table[PARTS.index(member)] = label
    return table
