"""Embeddings of many image files, a batch after the other, read by worker processes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from gsalign.data import DataConfig, ImageRecord, Split, evaluation_loader
from gsalign.errors import ConfigError
from gsalign.search.embedder import Embedder, not_finite
from gsalign.search.table import ImageTable


class EmbeddingStream:
    """Iterates over the embeddings of a table's images, in batches and in order.

    Images that cannot be read are logged and left out.

    Attributes:
        done: how many images of the table are behind the last batch, those left out included.

    Args:
        embedder: makes the embeddings.
        images: which images.
        start: the first image.
        workers: processes that decode images; 0: this one.

    Raises:
        ConfigError: ``workers`` is negative.
    """

    def __init__(
        self, embedder: Embedder, images: ImageTable, *, start: int = 0, workers: int = 0
    ) -> None:
        if workers < 0:
            raise ConfigError(f"workers is {workers}; wanted 0 (this process) or a number")
        self._embedder = embedder
        self._images = images
        self._start = start
        self.done = start
        config = DataConfig(
            image_size=embedder.image_size,
            eval_batch_size=embedder.batch_size,
            num_workers=workers,
            on_broken="skip",
        )
        # The loader carries numbers for labels; ours are texts and stay in the table.
        records = (ImageRecord(Path(path), -1, -1, 0) for path in images.paths[start:])
        self._loader = evaluation_loader(Split("images", tuple(records)), config)

    @property
    def skipped(self) -> tuple[str, ...]:
        """A line about every image that could not be read so far."""
        return tuple(self._loader.broken)

    def __iter__(self) -> Iterator[tuple[NDArray[np.int64], NDArray[np.float32]]]:
        """Yield places in the table ``[B]`` and embeddings ``[B, D]``.

        Raises:
            DataError: an embedding is not finite.
        """
        for batch in self._loader:
            vectors = self._embedder.embed(batch.images)
            bad = np.flatnonzero(~np.isfinite(vectors).all(axis=1))
            if bad.size:
                raise not_finite(batch.paths[int(bad[0])])
            places = batch.indices.numpy() + self._start
            size = self._embedder.batch_size
            number = int(batch.indices[0]) // size
            self.done = min(len(self._images), self._start + (number + 1) * size)
            yield places, vectors


def embed_images(
    embedder: Embedder, images: ImageTable, *, workers: int = 0
) -> tuple[ImageTable, NDArray[np.float32]]:
    """Embed images at once, without a folder.

    Returns:
        The images that could be read, and their embeddings ``[N, D]``.

    Raises:
        DataError: an embedding is not finite.
    """
    stream = EmbeddingStream(embedder, images, workers=workers)
    done = list(stream)
    places = np.concatenate([np.empty(0, np.int64), *(places for places, _ in done)])
    nothing = np.empty((0, embedder.dimension), np.float32)
    return images.select(places), np.concatenate([nothing, *(vectors for _, vectors in done)])
