"""Embedder: a network with its preprocessing, from images to embeddings ready to compare."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import nullcontext
from functools import cached_property
from itertools import islice
from typing import Literal, Union

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn import functional

from gsalign.data import normalize, read_image, resize
from gsalign.data.decoding import image_pixels
from gsalign.errors import ConfigError, DataError
from gsalign.evaluation.embedding import FlipTest, embed_parts_batch
from gsalign.model import GSAlign, load_model
from gsalign.search.fingerprint import Fingerprint, fingerprint

AnImage = Union[str, "os.PathLike[str]", Image.Image, "NDArray[np.uint8]", Tensor]
Precision = Literal["no", "fp16", "bf16"]

_AUTOCAST = {"no": None, "fp16": torch.float16, "bf16": torch.bfloat16}


class Embedder:
    """Images to unit vectors whose dot product is their cosine similarity.

    Does to an image what training and evaluation do: RGB, bicubic resize to the network's size,
    ``(x - 127.5) / 127.5``. With a network that has parts a vector is the concatenation of the
    image's and the parts' vectors, each as long as the root of its visibility, made a unit vector;
    :class:`gsalign.search.SearchIndex` compares these by the part distance.

    Args:
        network: put into evaluation mode and moved to ``device``.
        device: where to compute; None is where the network is.
        precision: ``"bf16"`` or ``"fp16"`` compute under autocast; ``"no"`` does not.
        flip_test: ``"mean"`` embeds the mirror image too and takes the mean; see
            :func:`gsalign.evaluation.embed_batch`.
        batch_size: images that go through the network at a time.
        checkpoint: where the network came from, for the records.

    Raises:
        ConfigError: a setting is unknown.
    """

    def __init__(
        self,
        network: GSAlign,
        *,
        device: torch.device | str | None = None,
        precision: Precision = "no",
        flip_test: FlipTest = "off",
        batch_size: int = 64,
        checkpoint: str = "",
    ) -> None:
        if precision not in _AUTOCAST:
            raise ConfigError(f"precision is {precision!r}; it must be 'no', 'fp16' or 'bf16'")
        if flip_test not in ("off", "mean", "published"):
            raise ConfigError(
                f"flip_test is {flip_test!r}; it must be 'off', 'mean' or 'published'"
            )
        if batch_size < 1:
            raise ConfigError(f"batch_size is {batch_size}; wanted 1 or more")
        self.network = network.eval() if device is None else network.to(device).eval()
        self.precision: Precision = precision
        self.flip_test: FlipTest = flip_test
        self.batch_size = batch_size
        self.checkpoint = checkpoint

    @classmethod
    def load(
        cls,
        checkpoint: str | os.PathLike[str],
        *,
        device: torch.device | str | None = None,
        precision: Precision = "no",
        flip_test: FlipTest = "off",
        batch_size: int = 64,
    ) -> Embedder:
        """An embedder with the network of a ``.safetensors`` that training wrote.

        Raises:
            CheckpointError: the file is missing, damaged or not one of ours. For a checkpoint of
                the published code give ``Embedder`` what
                :func:`gsalign.model.load_published` returns.
        """
        return cls(
            load_model(checkpoint),
            device=device,
            precision=precision,
            flip_test=flip_test,
            batch_size=batch_size,
            checkpoint=os.path.abspath(checkpoint),
        )

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width) that images are resized to."""
        return self.network.config.image_size

    @property
    def slots(self) -> int:
        """How many vectors an embedding is made of, 1 or 1 + parts."""
        return 1 + self.network.config.parts

    @property
    def dimension(self) -> int:
        """Length of an embedding."""
        return self.network.config.embedding_size

    @property
    def device(self) -> torch.device:
        """Where the network computes."""
        return next(self.network.parameters()).device

    @cached_property
    def fingerprint(self) -> Fingerprint:
        """Of network and preprocessing; made once, so change no weights afterwards."""
        return fingerprint(self.network, flip_test=self.flip_test)

    def __call__(self, images: AnImage | Sequence[AnImage]) -> NDArray[np.float32]:
        """Embed images.

        Args:
            images: one or several, each a path, an image of Pillow, or RGB pixels uint8: an array
                ``[H, W, 3]`` or a tensor ``[3, H, W]``, of any size.

        Returns:
            float32 ``[N, D]``, unit vectors; N is 1 for one image.

        Raises:
            DataError: an image cannot be read, or its embedding is not finite.
            TypeError: an image is something else, or its pixels are not uint8.
            ValueError: pixels have another shape.
        """
        single = isinstance(images, str | os.PathLike | Image.Image | np.ndarray | Tensor)
        several: Sequence[AnImage] = [images] if single else images  # type: ignore[list-item,assignment]
        numbered = enumerate(several)
        rows = [np.empty((0, self.dimension), np.float32)]
        while batch := list(islice(numbered, self.batch_size)):
            pixels = torch.stack([resize(_pixels(image), self.image_size) for _, image in batch])
            embedded = self.embed(normalize(pixels))
            bad = np.flatnonzero(~np.isfinite(embedded).all(axis=1))
            if bad.size:
                raise not_finite(f"image {batch[int(bad[0])][0]}")
            rows.append(embedded)
        return np.concatenate(rows)

    def embed(self, images: Tensor) -> NDArray[np.float32]:
        """Embed one batch of network input.

        Args:
            images: normalised, ``[B, 3, H, W]`` of the network's size, on any device.

        Returns:
            float32 ``[B, D]``, unit vectors; not checked for numbers that are not finite.
        """
        dtype = _AUTOCAST[self.precision]
        device = self.device
        context = nullcontext() if dtype is None else torch.autocast(device.type, dtype)
        with torch.inference_mode(), context:
            on_device = images.to(device, non_blocking=True)
            parts = embed_parts_batch(self.network.embed_parts, on_device, self.flip_test)
        with torch.inference_mode():
            embeddings: NDArray[np.float32] = (
                functional.normalize(parts.flat(), dim=1).cpu().numpy()
            )
        return embeddings


def not_finite(what: str) -> DataError:
    """The error for an embedding that holds NaN or infinity."""
    return DataError(
        f"the embedding of {what} is not finite; the weights of the network probably are not"
    )


def _pixels(image: AnImage) -> Tensor:
    """RGB pixels uint8 ``[3, H, W]`` of whatever stands for an image."""
    if isinstance(image, str | os.PathLike):
        return read_image(image)
    if isinstance(image, Image.Image):
        try:
            return image_pixels(image)
        except (ValueError, OSError) as error:
            raise DataError(f"an image of Pillow cannot be read: {error}") from None
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8:
            raise TypeError(f"an image is an array of {image.dtype}; wanted uint8, 0 to 255")
        if image.ndim != 3 or image.shape[2] != 3:
            raise ValueError(f"an image is an array {list(image.shape)}; wanted [H, W, 3], RGB")
        return torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1).contiguous()
    if isinstance(image, Tensor):
        if image.dtype != torch.uint8:
            raise TypeError(f"an image is a tensor of {image.dtype}; wanted uint8, 0 to 255")
        if image.ndim != 3 or image.shape[0] != 3:
            raise ValueError(f"an image is a tensor {list(image.shape)}; wanted [3, H, W], RGB")
        return image
    raise TypeError(
        f"an image is {type(image).__name__}; wanted a path, an image of Pillow, an array or a "
        "tensor"
    )
