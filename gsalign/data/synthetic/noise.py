"""Smooth tileable noise, made once and looked up everywhere."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

SIZE = 256
# Channels of the bank.
CLOUD, MIXED, GRAIN, CLOUD_2 = range(4)


@lru_cache(maxsize=4)
def noise_bank(device: str) -> Tensor:
    """Noise ``[1, 4, 257, 257]`` with mean 0 and deviation 1, its last row and column the first.

    Channel ``CLOUD`` (and ``CLOUD_2``) is broad, ``MIXED`` has every scale, ``GRAIN`` is fine.
    """
    rng = np.random.default_rng(20250)
    frequency = np.fft.fftfreq(SIZE)[:, None] ** 2 + np.fft.fftfreq(SIZE)[None, :] ** 2
    radius = np.sqrt(frequency) * SIZE
    radius[0, 0] = np.inf
    spectra = (
        radius**-1.9 * (radius > 1.5),
        radius**-1.15,
        np.exp(-(((radius - 60.0) / 30.0) ** 2)),
        radius**-1.9 * (radius > 1.5),
    )
    channels = []
    for spectrum in spectra:
        white = np.fft.fft2(rng.standard_normal((SIZE, SIZE)))
        field = np.real(np.fft.ifft2(white * spectrum))
        field = np.clip((field - field.mean()) / field.std(), -2.8, 2.8)
        channels.append(np.pad(field, ((0, 1), (0, 1)), mode="wrap"))
    bank = np.stack(channels)[None].astype(np.float32)
    return torch.from_numpy(bank).to(device)


def sample_noise(x: Tensor, y: Tensor) -> Tensor:
    """Look the bank up at periodic coordinates (one period = 1).

    Args:
        x: ``[B, H, W]`` or ``[N]``.
        y: same shape.

    Returns:
        ``[4, B, H, W]`` or ``[4, N]``, channels first.
    """
    bank = noise_bank(str(x.device))
    grid = torch.stack((x - torch.floor(x), y - torch.floor(y)), dim=-1) * 2.0 - 1.0
    flat = grid.reshape(1, 1, -1, 2)
    values = F.grid_sample(bank, flat, mode="bilinear", padding_mode="border", align_corners=True)
    return values.reshape(bank.shape[1], *x.shape)
