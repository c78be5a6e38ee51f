"""Embedding and evaluating whole splits on one process, or shared among several."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import torch
from accelerate import Accelerator
from numpy.typing import NDArray

from gsalign.data import Batch, DataConfig, Split, evaluation_loader
from gsalign.engine.distributed import gather_rows
from gsalign.evaluation import (
    PROTOCOLS,
    EvaluationResult,
    Features,
    evaluate_features,
    extract_features,
)
from gsalign.evaluation.embedding import FlipTest
from gsalign.model import FeatureOutput, GSAlign

Report = Callable[[int, int], None]
"""Called with (images done, images in all) of this process."""

AUTOCAST = {"no": None, "fp16": torch.float16, "bf16": torch.bfloat16}


def embed_split(
    network: GSAlign,
    split: Split,
    config: DataConfig,
    accelerator: Accelerator,
    *,
    flip_test: FlipTest = "off",
    progress: Callable[[int], None] | None = None,
) -> Features:
    """Embed every image of a split; the processes share the work and all get all of the result.

    Args:
        network: unwrapped, on the accelerator's device; its mode stays.
        split: the images.
        config: image size, batch size, workers; ``on_broken`` decides about broken images.
        accelerator: of the run; its precision is used.
        flip_test: see ``gsalign.evaluation.embed_batch``.
        progress: called with the number of images this process has done.

    Raises:
        DataError: an image is broken and ``config.on_broken`` is ``"error"``, or an embedding is
            not finite.
    """
    rank, processes = accelerator.process_index, accelerator.num_processes
    device = accelerator.device
    as_bytes = device.type != "cpu"
    loader = evaluation_loader(split, config, rank=rank, world_size=processes, as_bytes=as_bytes)
    if len(loader) or processes == 1:
        mine = extract_features(
            network,
            _normalised(loader, device),
            device=device,
            flip_test=flip_test,
            autocast=AUTOCAST[accelerator.mixed_precision],
            progress=progress,
        )
        embeddings, indices = mine.embeddings, torch.from_numpy(mine.indices)
        visibility = mine.visibility
        if processes == 1:
            return replace(mine, lists=_lists(split, mine.indices))
    else:
        slots = (1 + network.config.parts,) if network.config.parts else ()
        embeddings = torch.empty(0, *slots, network.config.width)
        visibility = torch.empty(0, *slots) if slots else None
        indices = torch.empty(0, dtype=torch.int64)
    # Stretches are contiguous, so the rows of all processes, in order, are the split in order.
    embeddings = gather_rows(accelerator, embeddings)
    visibility = None if visibility is None else gather_rows(accelerator, visibility)
    places = gather_rows(accelerator, indices).numpy().astype(np.int64)
    return Features(
        embeddings=embeddings,
        identities=split.identities[places],
        cameras=split.cameras[places],
        views=split.views[places],
        indices=places,
        paths=tuple(str(split.records[place].path) for place in places.tolist()),
        visibility=visibility,
        lists=_lists(split, places),
    )


def _lists(split: Split, places: NDArray[np.int64]) -> dict[str, NDArray[np.bool_]]:
    return {name: listed[places] for name, listed in split.lists.items()}


def embed_splits(
    network: GSAlign,
    query: Split,
    gallery: Split,
    config: DataConfig,
    accelerator: Accelerator,
    *,
    flip_test: FlipTest = "off",
    report: Report | None = None,
) -> tuple[Features, Features]:
    """Features of a query and a gallery, on the accelerator's device, the same on every process.

    Args:
        network: unwrapped, on the accelerator's device; its mode stays.
        query: images that ask.
        gallery: images that are searched.
        config: how images are read.
        accelerator: of the run.
        flip_test: see ``gsalign.evaluation.embed_batch``.
        report: told of the progress over both splits.
    """
    shares = [-(-len(split) // accelerator.num_processes) for split in (query, gallery)]
    features = []
    for split, before in ((query, 0), (gallery, shares[0])):
        done = None if report is None else _offset(report, before, sum(shares))
        made = embed_split(network, split, config, accelerator, flip_test=flip_test, progress=done)
        features.append(made.to(accelerator.device))
    return features[0], features[1]


def _normalised(loader: Iterable[Batch], device: torch.device) -> Iterator[Batch]:
    """Batches on the device; bytes, a quarter of the way to there, are normalised there."""
    for batch in loader:
        there = replace(batch, images=batch.images.to(device, non_blocking=True))
        yield replace(there, images=there.pixels())


def evaluate_network(
    network: GSAlign,
    query: Split,
    gallery: Split,
    config: DataConfig,
    accelerator: Accelerator,
    *,
    protocols: tuple[str, ...] = tuple(PROTOCOLS),
    flip_test: FlipTest = "off",
    report: Report | None = None,
) -> dict[str, EvaluationResult]:
    """Results of a network by protocol name, the same on every process.

    Args:
        network: unwrapped, on the accelerator's device; its mode stays.
        query: images that ask.
        gallery: images that are searched.
        config: how images are read.
        accelerator: of the run.
        protocols: names, see ``gsalign.evaluation.KNOWN_PROTOCOLS``.
        flip_test: see ``gsalign.evaluation.embed_batch``.
        report: told of the progress over both splits.
    """
    features = embed_splits(
        network, query, gallery, config, accelerator, flip_test=flip_test, report=report
    )
    return evaluate_features(*features, protocols=protocols)


def _offset(report: Report, before: int, total: int) -> Callable[[int], None]:
    return lambda done: report(min(before + done, total), total)


@contextmanager
def looking(
    network: GSAlign, splits: Sequence[Split], config: DataConfig, accelerator: Accelerator
) -> Iterator[Iterator[tuple[Batch, FeatureOutput]]]:
    """A block in which a network, in evaluation mode, looks at every image of some splits.

    Gives the batches, each with what the network makes of it; every process sees all of them. No
    gradients are made in the block, and the network's mode is as before when it ends.

    Args:
        network: unwrapped, on the accelerator's device.
        splits: the images.
        config: how they are read.
        accelerator: of the run; its precision is used.
    """
    device = accelerator.device

    def look() -> Iterator[tuple[Batch, FeatureOutput]]:
        for split in splits:
            loader = evaluation_loader(split, config, as_bytes=device.type != "cpu")
            for batch in _normalised(loader, device):
                with accelerator.autocast():
                    seen = network.forward_features(batch.images)
                yield batch, seen

    was_training = network.training
    network.eval()
    try:
        with torch.inference_mode():
            yield look()
    finally:
        network.train(was_training)
