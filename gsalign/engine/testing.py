"""Embedding and evaluating whole splits on one process, or shared among several."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from accelerate import Accelerator

from gsalign.data import DataConfig, Split, evaluation_loader
from gsalign.engine.distributed import gather_rows
from gsalign.evaluation import PROTOCOLS, EvaluationResult
from gsalign.evaluation.features import (
    Features,
    FlipTest,
    evaluate_features,
    extract_features,
)
from gsalign.model import GSAlign

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
        flip_test: see ``gsalign.evaluation.features.embed_batch``.
        progress: called with the number of images this process has done.

    Raises:
        DataError: an image is broken and ``config.on_broken`` is ``"error"``, or an embedding is
            not finite.
    """
    rank, processes = accelerator.process_index, accelerator.num_processes
    loader = evaluation_loader(split, config, rank=rank, world_size=processes)
    if len(loader) or processes == 1:
        mine = extract_features(
            network,
            loader,
            device=accelerator.device,
            flip_test=flip_test,
            autocast=AUTOCAST[accelerator.mixed_precision],
            progress=progress,
        )
        embeddings, indices = mine.embeddings, torch.from_numpy(mine.indices)
        if processes == 1:
            return mine
    else:
        embeddings = torch.empty(0, network.config.width)
        indices = torch.empty(0, dtype=torch.int64)
    # Stretches are contiguous, so the rows of all processes, in order, are the split in order.
    embeddings = gather_rows(accelerator, embeddings)
    places = gather_rows(accelerator, indices).numpy().astype(np.int64)
    return Features(
        embeddings=embeddings,
        identities=split.identities[places],
        cameras=split.cameras[places],
        views=split.views[places],
        indices=places,
        paths=tuple(str(split.records[place].path) for place in places.tolist()),
    )


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
        protocols: names, see ``gsalign.evaluation.PROTOCOLS``.
        flip_test: see ``gsalign.evaluation.features.embed_batch``.
        report: told of the progress over both splits.
    """
    shares = [-(-len(split) // accelerator.num_processes) for split in (query, gallery)]
    features = []
    for split, before in ((query, 0), (gallery, shares[0])):
        done = None if report is None else _offset(report, before, sum(shares))
        features.append(
            embed_split(network, split, config, accelerator, flip_test=flip_test, progress=done)
        )
    return evaluate_features(*features, protocols=protocols)


def _offset(report: Report, before: int, total: int) -> Callable[[int], None]:
    return lambda done: report(min(before + done, total), total)
