"""Embedding batches and whole loaders, with or without a flip test."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from gsalign.data.loading import Batch
from gsalign.data.transforms import normalize as normalize_pixels
from gsalign.errors import ConfigError, DataError
from gsalign.evaluation.features import Features
from gsalign.model import GSAlign, PartEmbeddings
from gsalign.model.linear import keeping_weights

FlipTest = Literal["off", "mean", "published"]


def embed_batch(
    embed: Callable[[Tensor], Tensor], images: Tensor, flip_test: FlipTest = "off"
) -> Tensor:
    """Embed a batch, with the flip test if asked; the result is not L2-normalised.

    Args:
        embed: images ``[B, 3, H, W]`` to embeddings ``[B, D]``.
        images: normalised, float ``[B, 3, H, W]``; not changed.
        flip_test: ``"off"``; ``"mean"``: the mean of the embeddings of the image and its mirror
            image, as the network gives them, to be L2-normalised once, afterwards; or
            ``"published"``: what the published code computes. There the pixels of the mirror image
            are normalised twice, which leaves hardly anything of the image in them, so that almost
            the same vector is added to every embedding. For comparison with published figures only.

    Returns:
        float32 ``[B, D]``.

    Raises:
        ConfigError: ``flip_test`` is something else.
    """
    mirrored = _mirror_image(images, flip_test)
    embeddings = embed(images).float()
    return embeddings if mirrored is None else (embeddings + embed(mirrored).float()) / 2


def embed_parts_batch(
    embed_parts: Callable[[Tensor], PartEmbeddings], images: Tensor, flip_test: FlipTest = "off"
) -> PartEmbeddings:
    """The same for a network with parts; the flip test takes the mean of the visibilities too.

    Args:
        embed_parts: images ``[B, 3, H, W]`` to embeddings of the whole images and their parts.
        images: as in :func:`embed_batch`.
        flip_test: likewise.

    Returns:
        float32 vectors and visibilities.

    Raises:
        ConfigError: ``flip_test`` is something else.
    """
    mirrored = _mirror_image(images, flip_test)
    seen = [embed_parts(pixels) for pixels in (images, mirrored) if pixels is not None]
    return PartEmbeddings(
        vectors=torch.stack([part.vectors.float() for part in seen]).mean(dim=0),
        visibility=torch.stack([part.visibility.float() for part in seen]).mean(dim=0),
    )


def _mirror_image(images: Tensor, flip_test: FlipTest) -> Tensor | None:
    """What the flip test embeds besides the images; None without one."""
    if flip_test not in ("off", "mean", "published"):
        raise ConfigError(f"flip_test is {flip_test!r}; it must be 'off', 'mean' or 'published'")
    if flip_test == "off":
        return None
    mirrored = images.flip(-1)
    return normalize_pixels(mirrored) if flip_test == "published" else mirrored


def extract_features(
    model: nn.Module | Callable[[Tensor], Tensor],
    loader: Iterable[Batch],
    *,
    device: torch.device | str | None = None,
    flip_test: FlipTest = "off",
    normalize: bool = True,
    autocast: torch.dtype | None = None,
    progress: Callable[[int], None] | None = None,
) -> Features:
    """Embed every image of a loader; labels are carried along, never used.

    A module is put into evaluation mode and back into the mode it was in. Its ``embed`` is called
    if it has one, else the module itself; a network of ours that has parts is asked for these too.

    Args:
        model: a network, or any function from images to embeddings.
        loader: an evaluation loader, or any iterable of batches.
        device: where to compute; ``None`` is where the module's parameters are, or the CPU.
        flip_test: see ``embed_batch``.
        normalize: make every embedding, and every part's, of length 1, once, at the end.
        autocast: compute in this type (``torch.bfloat16``, ``torch.float16``); ``None`` does not.
        progress: called after every batch with the number of images done.

    Returns:
        The embeddings in the order of the loader.

    Raises:
        DataError: the loader gave nothing, or an embedding is not finite; the image is named.
        ConfigError: ``flip_test`` is unknown.
    """
    embed = getattr(model, "embed", model)
    parted = model if isinstance(model, GSAlign) and model.parts is not None else None
    where = _device_of(model) if device is None else torch.device(device)
    was_training = isinstance(model, nn.Module) and model.training
    rows: list[Tensor] = []
    visibilities: list[Tensor] = []
    batches: list[Batch] = []
    done = 0
    if isinstance(model, nn.Module):
        model.eval()
    try:
        with torch.inference_mode(), keeping_weights():
            for batch in loader:
                images = batch.images.to(where, non_blocking=True)
                context = (
                    nullcontext() if autocast is None else torch.autocast(where.type, autocast)
                )
                with context:
                    if parted is not None:
                        parts = embed_parts_batch(parted.embed_parts, images, flip_test)
                        embeddings = parts.vectors
                        visibilities.append(parts.visibility.cpu())
                    else:
                        embeddings = embed_batch(embed, images, flip_test)
                if normalize:
                    embeddings = F.normalize(embeddings, dim=-1)
                embeddings = embeddings.cpu()
                finite = embeddings.isfinite().flatten(1).all(1)
                if not finite.all():
                    path = batch.paths[int((~finite).nonzero()[0])]
                    raise DataError(
                        f"the embedding of {path} is not finite; the weights of the network "
                        "probably are not"
                    )
                rows.append(embeddings)
                # Only the labels are kept, not the images.
                batches.append(_without_images(batch))
                done += len(batch)
                if progress is not None:
                    progress(done)
    finally:
        if isinstance(model, nn.Module):
            model.train(was_training)
    if not rows:
        raise DataError("no images to embed: the loader is empty")

    def column(name: str) -> NDArray[np.int64]:
        array: NDArray[np.int64] = torch.cat([getattr(batch, name) for batch in batches]).numpy()
        return array

    return Features(
        # A copy made here is an ordinary tensor; those made in inference mode are not.
        embeddings=torch.cat(rows),
        identities=column("identities"),
        cameras=column("cameras"),
        views=column("views"),
        indices=column("indices"),
        paths=tuple(path for batch in batches for path in batch.paths),
        visibility=torch.cat(visibilities) if visibilities else None,
    )


def _device_of(model: object) -> torch.device:
    if isinstance(model, nn.Module):
        for parameter in model.parameters():
            return parameter.device
    return torch.device("cpu")


def _without_images(batch: Batch) -> Batch:
    return Batch(
        images=batch.images.new_empty(0),
        # Copies: a worker's batch lives in shared memory, which is scarce.
        identities=batch.identities.clone(),
        views=batch.views.clone(),
        cameras=batch.cameras.clone(),
        indices=batch.indices.clone(),
        paths=batch.paths,
    )
