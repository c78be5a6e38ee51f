"""Showing images to a network, for the pictures that draw what it makes of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gsalign.data import ImageRecord, denormalize, normalize, read_image, resize
from gsalign.model import FeatureOutput, GSAlign


def look_at(network: GSAlign, records: Sequence[ImageRecord]) -> tuple[Tensor, FeatureOutput]:
    """Read images in the network's size and run it on them, in evaluation mode.

    Args:
        network: its device and mode are kept.
        records: the images.

    Returns:
        Pixels uint8 ``[B, H, W, 3]`` on the CPU, turned as the network turns them, and what it
        sees, on its device.

    Raises:
        DataError: an image cannot be read.
    """
    size = network.config.image_size
    images = torch.stack([normalize(resize(read_image(r.path), size)) for r in records])
    device = next(network.parameters()).device
    was_training = network.training
    network.eval()
    with torch.no_grad():
        output = network.forward_features(images.to(device))
        if network.uprighting is not None and output.direction is not None:
            images = network.uprighting.turn(images, output.direction.cpu())
    network.train(was_training)
    return denormalize(images).permute(0, 2, 3, 1), output
