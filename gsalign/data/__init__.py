"""Data sets, augmentation, samplers and loaders."""

from __future__ import annotations

from gsalign.data.ag_reid import load_ag_reid
from gsalign.data.ag_reid_v2 import load_ag_reid_v2
from gsalign.data.augmentation import Augmentation
from gsalign.data.cargo import load_cargo
from gsalign.data.config import AugmentationConfig, DataConfig
from gsalign.data.decoding import read_image, resize
from gsalign.data.folder import load_folder, read_images
from gsalign.data.images import ImageCheck, ImageStore, check_images, oddity
from gsalign.data.layout import Layout
from gsalign.data.loading import (
    Batch,
    BatchLoader,
    evaluation_loader,
    load_dataset,
    train_loader,
)
from gsalign.data.market1501 import load_market1501
from gsalign.data.published import CountCheck, compare_with_published
from gsalign.data.records import (
    AERIAL,
    GROUND,
    VIEW_NAMES,
    VIEW_PROTOCOLS,
    ImageRecord,
    ReIDDataset,
    Split,
    contiguous_labels,
)
from gsalign.data.registry import DATASETS, DatasetEntry, get_dataset_entry, guess_dataset
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
from gsalign.data.table import TableRow, load_table, read_table
from gsalign.data.transforms import TrainTransform, denormalize, normalize
from gsalign.data.validation import hold_out_identities

__all__ = [
    "AERIAL",
    "DATASETS",
    "GROUND",
    "VIEW_NAMES",
    "VIEW_PROTOCOLS",
    "Augmentation",
    "AugmentationConfig",
    "Batch",
    "BatchLoader",
    "CountCheck",
    "DataConfig",
    "DatasetEntry",
    "Draw",
    "IdentityBatchSampler",
    "ImageCheck",
    "ImageRecord",
    "ImageStore",
    "IterationBatchSampler",
    "Layout",
    "ReIDDataset",
    "SequentialBatchSampler",
    "Split",
    "SplitStatistics",
    "TableRow",
    "TrainTransform",
    "check_images",
    "compare_with_published",
    "contiguous_labels",
    "dataset_statistics",
    "denormalize",
    "evaluation_loader",
    "get_dataset_entry",
    "guess_dataset",
    "hold_out_identities",
    "load_ag_reid",
    "load_ag_reid_v2",
    "load_cargo",
    "load_dataset",
    "load_folder",
    "load_market1501",
    "load_table",
    "normalize",
    "oddity",
    "read_image",
    "read_images",
    "read_table",
    "resize",
    "split_statistics",
    "statistics_table",
    "train_loader",
]
