"""Showing images to a network, for the pictures that draw what it makes of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from gsalign.data import VIEW_NAMES, ImageRecord, denormalize, normalize, read_image, resize
from gsalign.model import FeatureOutput, GSAlign

_LINE = 14
"""Letters that fit above an image."""


@contextmanager
def evaluating(network: GSAlign) -> Iterator[None]:
    """A block in which a network is in evaluation mode and nothing is differentiated."""
    was_training = network.training
    network.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        network.train(was_training)


def look_at(network: GSAlign, records: Sequence[ImageRecord]) -> tuple[Tensor, FeatureOutput]:
    """Read images in the network's size and run it on them, in evaluation mode.

    Args:
        network: its device and mode are kept.
        records: the images.

    Returns:
        Pixels uint8 ``[B, H, W, 3]`` on the CPU, aligned as the network aligns them, and what it
        sees, on its device.

    Raises:
        DataError: an image cannot be read.
    """
    size = network.config.image_size
    images = torch.stack([normalize(resize(read_image(r.path), size)) for r in records])
    images = images.to(next(network.parameters()).device)
    with evaluating(network):
        output = network.forward_features(images)
        if network.uprighting is not None:
            images = network.uprighting(images).images
    return denormalize(images).permute(0, 2, 3, 1).cpu(), output


def image_label(record: ImageRecord) -> str:
    """What to write beside an image: view and identity, or its file where nobody knows these."""
    if record.identity_name:
        return f"{VIEW_NAMES[record.view]}\nid {record.identity_name}"
    name = record.path.name
    if len(name) <= _LINE:
        return name
    # Between words where there are some. Running numbers are at the end, so what is too long for
    # two lines loses its middle.
    cut = 1 + max(name.rfind(mark, 0, _LINE) for mark in "_- .") or _LINE
    rest = name[cut:]
    return f"{name[:cut]}\n{rest if len(rest) <= _LINE else '…' + rest[1 - _LINE :]}"


def aligned_note(network: GSAlign) -> str:
    """What to say below images that the network has aligned; empty where it aligns none."""
    return "" if network.uprighting is None else "images are shown as the network aligned them"
