"""Data sets, augmentation, samplers and loaders."""

from __future__ import annotations

from gsalign.data.augmentation import Augmentation
from gsalign.data.cargo import load_cargo
from gsalign.data.config import AugmentationConfig, DataConfig
from gsalign.data.decoding import read_image, resize
from gsalign.data.images import ImageCheck, ImageStore, check_images
from gsalign.data.loading import (
    Batch,
    BatchLoader,
    evaluation_loader,
    load_dataset,
    train_loader,
)
from gsalign.data.records import (
    AERIAL,
    GROUND,
    VIEW_NAMES,
    ImageRecord,
    ReIDDataset,
    Split,
    contiguous_labels,
)
from gsalign.data.samplers import (
    Draw,
    IdentityBatchSampler,
    IterationBatchSampler,
    SequentialBatchSampler,
)
from gsalign.data.statistics import (
    SplitStatistics,
    dataset_statistics,
    split_statistics,
    statistics_table,
)
from gsalign.data.transforms import TrainTransform, denormalize, normalize
from gsalign.data.validation import hold_out_identities

__all__ = [
    "AERIAL",
    "GROUND",
    "VIEW_NAMES",
    "Augmentation",
    "AugmentationConfig",
    "Batch",
    "BatchLoader",
    "DataConfig",
    "Draw",
    "IdentityBatchSampler",
    "ImageCheck",
    "ImageRecord",
    "ImageStore",
    "IterationBatchSampler",
    "ReIDDataset",
    "SequentialBatchSampler",
    "Split",
    "SplitStatistics",
    "TrainTransform",
    "check_images",
    "contiguous_labels",
    "dataset_statistics",
    "denormalize",
    "evaluation_loader",
    "hold_out_identities",
    "load_cargo",
    "load_dataset",
    "normalize",
    "read_image",
    "resize",
    "split_statistics",
    "statistics_table",
    "train_loader",
]
