"""Random numbers of one image: they depend on the set's seed and the image's id, nothing else."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

_IMAGE_STREAM = 3

# One column per decision. Appending keeps the earlier columns as they are.
NAMES = (
    "phase", "amplitude", "arm_mode", "arm_mode2", "head_yaw", "head_pitch", "lean", "yaw",
    "elevation", "roll", "distance", "aim", "focal", "margin_x", "margin_y", "shift_x", "shift_y",
    "squeeze", "flip", "sun_azimuth", "sun_elevation", "sun_strength", "haze", "exposure",
    "tint_r", "tint_b", "night_lamp", "ground_a", "ground_b", "ground_hue", "ground_value",
    "ground_angle", "ground_split", "ground_offset", "ground_u", "ground_v", "marking", "backdrop",
    "backdrop_distance", "backdrop_yaw", "backdrop_hue", "backdrop_value", "backdrop_u",
    "backdrop_v", "car", "car_x", "car_hue", "post", "post_x", "tree", "defocus", "motion",
    "motion_direction", "resolution", "noise", "noise_smooth", "contrast", "vignette", "occluded",
    "occluder", "occluder_x", "occluder_y", "occluder_size", "occluder_hue", "occluder_value",
    "wind", "fold_u", "fold_v", "window_lit", "aspect", "cloud", "spare",
)  # fmt: skip


class Draws:
    """Uniform numbers in [0, 1), one tensor ``[B]`` per name, and one noise field per image.

    Args:
        seed: seed of the set.
        image_ids: ids of the images of the batch.
        size: (height, width) of the noise fields.
        device: where the tensors are put; the numbers are always drawn on the CPU.
    """

    def __init__(
        self,
        seed: int,
        image_ids: Sequence[int],
        size: tuple[int, int],
        device: torch.device | str = "cpu",
    ) -> None:
        uniform = np.empty((len(image_ids), len(NAMES)), dtype=np.float32)
        noise = np.empty((len(image_ids), 3, *size), dtype=np.float32)
        for row, image_id in enumerate(image_ids):
            rng = np.random.default_rng([seed, _IMAGE_STREAM, image_id])
            uniform[row] = rng.random(len(NAMES), dtype=np.float32)
            rng.standard_normal(dtype=np.float32, out=noise[row])
        table = torch.from_numpy(uniform).to(device)
        self._columns = {name: table[:, i].contiguous() for i, name in enumerate(NAMES)}
        self.noise = torch.from_numpy(noise).to(device)

    def __getitem__(self, name: str) -> Tensor:
        return self._columns[name]

    def take(self, index: Tensor) -> Draws:
        """The draws of some images of the batch, ``index`` ``[N]`` int64."""
        part = object.__new__(Draws)
        part._columns = {name: column[index] for name, column in self._columns.items()}
        part.noise = self.noise[index]
        return part

    def between(self, name: str, low: float, high: float) -> Tensor:
        """The named column mapped to [low, high)."""
        return self._columns[name] * (high - low) + low

    def below(self, name: str, share: float) -> Tensor:
        """Float mask ``[B]``, 1 with probability ``share``."""
        return (self._columns[name] < share).float()
