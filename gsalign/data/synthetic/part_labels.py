"""Part label maps of a generated set: which body part every pixel of an image shows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path, PurePosixPath

import torch
from torch import Tensor
from torch.nn import functional
from torchvision.io import ImageReadMode, decode_image

from gsalign.data.synthetic.body import PARTS
from gsalign.data.synthetic.part_groups import UNKNOWN, group_labels, part_groups
from gsalign.errors import DataError

PARTS_FOLDER = "parts"


def part_label_path(path: PurePosixPath) -> PurePosixPath:
    """Where the label map of an image lies; both are below the root of the set."""
    return PARTS_FOLDER / path.with_suffix(".png")


def part_label_path_of(root: Path, image: Path) -> PurePosixPath:
    """Where the label map of an image lies, below the root, from where the image lies.

    Raises:
        DataError: the image is not below the root, as a table's may be, so a map has no place.
    """
    place = image.relative_to(root) if image.is_relative_to(root) else None
    if place is None or ".." in place.parts:
        raise DataError(
            f"image {image} is not below {root}: its label map has no place in "
            f"{root / PARTS_FOLDER}; move the image there"
        )
    return part_label_path(PurePosixPath(place.as_posix()))


def has_part_labels(root: Path) -> bool:
    """Whether a set has label maps: the truth (``write_parts``), or somebody's guess."""
    return (root / PARTS_FOLDER).is_dir()


def read_part_labels(root: Path, image: Path) -> Tensor:
    """The label map of an image.

    Args:
        root: folder of the set.
        image: the image's file, below ``root``.

    Returns:
        ``[H, W]`` uint8, indices into ``PARTS``, or ``UNKNOWN``.

    Raises:
        DataError: the map is missing, damaged, or has labels that are no parts; or the image is
            not below the root.
    """
    return _read(root / part_label_path_of(root, image))


def _read(path: Path) -> Tensor:
    try:
        labels = decode_image(str(path), mode=ImageReadMode.UNCHANGED)
    except (OSError, RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise DataError(
            f"{path} has no part labels: {reason}; write them with gsalign data label, or "
            "generate the set with write_parts=true"
        ) from error
    if labels.dtype != torch.uint8 or len(labels) != 1:
        raise DataError(
            f"{path} has {len(labels)} channels of {labels.dtype}; wanted one of 8 bits (grey), "
            "whose values are parts"
        )
    found = labels[0].numpy()
    if found.size and found.max() >= len(PARTS):
        wrong = found[(found >= len(PARTS)) & (found != UNKNOWN)]
        if wrong.size:
            raise DataError(
                f"{path} has label {wrong[0]}; wanted 0 to {len(PARTS) - 1} ({', '.join(PARTS)}), "
                f"or {UNKNOWN} where nothing is known"
            )
    return labels[0]


class PartLabelStore:
    """The label maps of a list of images at one size, in groups, read on demand.

    Args:
        root: folder of the set.
        images: the images' files, below ``root``.
        size: ``(height, width)`` of the maps handed out.
        groups: how many groups the parts are put into, see ``part_groups``.

    Raises:
        ConfigError: there are no such groups.
        DataError: an image is not below the root.
    """

    def __init__(
        self, root: Path, images: Sequence[Path], size: tuple[int, int], groups: int
    ) -> None:
        part_groups(groups)
        self.paths = tuple(root / part_label_path_of(root, image) for image in images)
        self.size = size
        self.groups = groups

    def __getitem__(self, index: int) -> Tensor:
        """Return map ``index``, uint8 ``[height, width]``: 0, 1 .. ``groups``, or ``UNKNOWN``.

        Raises:
            DataError: the map is missing, damaged, or has labels that are no parts.
        """
        labels = _read(self.paths[index])
        if tuple(labels.shape) != self.size:
            # Of labels there is no mean: the pixel in the middle speaks for all it stands for.
            resized = functional.interpolate(
                labels[None, None].float(), size=self.size, mode="nearest-exact"
            )
            labels = resized[0, 0].to(torch.uint8)
        return group_labels(labels, self.groups)
