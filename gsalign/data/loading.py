"""From records to batches: training and evaluation loaders."""

from __future__ import annotations

import logging
import multiprocessing
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from gsalign.data.augmentation import Augmentation
from gsalign.data.config import DataConfig
from gsalign.data.images import ImageStore, OnBroken
from gsalign.data.records import ReIDDataset, Split, contiguous_labels
from gsalign.data.registry import get_dataset_entry
from gsalign.data.samplers import (
    Draw,
    IdentityBatchSampler,
    IterationBatchSampler,
    SequentialBatchSampler,
)
from gsalign.data.synthetic.part_labels import PartLabelStore, has_part_labels
from gsalign.data.transforms import TrainTransform, normalize
from gsalign.errors import DataError

logger = logging.getLogger(__name__)


@dataclass
class Batch:
    """Images with what is known of them.

    Attributes:
        images: float32 ``[B, 3, H, W]`` in [-1, 1]; or uint8, where the rest is left to the device.
        identities: int64 ``[B]``; labels 0 .. N-1 from a training loader, raw identities from an
            evaluation loader.
        views: int64 ``[B]``, 0 ground and 1 aerial.
        cameras: int64 ``[B]``.
        indices: int64 ``[B]``, the place of each image in its split.
        paths: the file of each image.
        broken: one line per image that could not be read and is not in the batch.
        augmentation: what was drawn for images that are still to be augmented, or None.
        part_labels: uint8 ``[B, H, W]``, which body part every pixel shows: 0 the background, 1 ..
            P the parts, 255 unknown; still to be moved where the images are still to be augmented.
            None where nobody asked or there are no label maps.
    """

    images: Tensor
    identities: Tensor
    views: Tensor
    cameras: Tensor
    indices: Tensor
    paths: tuple[str, ...]
    broken: tuple[str, ...] = ()
    augmentation: Augmentation | None = None
    part_labels: Tensor | None = None

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.paths)

    def pixels(self) -> Tensor:
        """The network's input: the images, augmented and normalised if they are not yet."""
        if self.images.dtype != torch.uint8:
            return self.images
        if self.augmentation is None:
            return normalize(self.images)
        return self.augmentation(self.images)

    def label_maps(self) -> Tensor | None:
        """The label maps of :meth:`pixels`: moved as the images, if they are not yet."""
        if self.part_labels is None or self.augmentation is None:
            return self.part_labels
        return self.augmentation.label_maps(self.part_labels)

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Batch:
        """Return the batch with its tensors on ``device``."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Batch:
        """Return the batch with its tensors in page-locked memory; the loader calls this."""
        return self._map(Tensor.pin_memory)

    def _map(self, function: Any) -> Batch:
        return Batch(
            images=function(self.images),
            identities=function(self.identities),
            views=function(self.views),
            cameras=function(self.cameras),
            indices=function(self.indices),
            paths=self.paths,
            broken=self.broken,
            augmentation=None if self.augmentation is None else self.augmentation.map(function),
            part_labels=None if self.part_labels is None else function(self.part_labels),
        )


@dataclass
class _Failure:
    """A DataError on its way out of a worker; raising it there would bury it in a traceback."""

    message: str


class _BatchDataset(Dataset[Any]):
    """Whole batches for the DataLoader, which asks for them through ``__getitems__``."""

    def __init__(
        self,
        split: Split,
        labels: NDArray[np.int64],
        store: ImageStore,
        *,
        transform: TrainTransform | None,
        on_broken: OnBroken,
        as_bytes: bool,
        part_labels: PartLabelStore | None = None,
    ) -> None:
        self.split = split
        self.labels = labels
        self.store = store
        self.transform = transform
        self.on_broken = on_broken
        self.as_bytes = as_bytes
        self.part_labels = part_labels
        self.members: dict[int, list[int]] = {}
        if transform is not None:
            for index, label in enumerate(labels.tolist()):
                self.members.setdefault(label, []).append(index)

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, draw: Draw | int) -> Batch | _Failure:
        return self.__getitems__([draw])

    def __getitems__(self, draws: Sequence[Draw | int]) -> Batch | _Failure:
        images: list[Tensor] = []
        maps: list[Tensor] = []
        indices: list[int] = []
        used: list[Draw] = []
        missing: list[Draw] = []
        broken: list[str] = []
        for number, draw in enumerate(draws):
            wanted = draw.image if isinstance(draw, Draw) else int(draw)
            for index in self._candidates(wanted):
                try:
                    image = self.store[index]
                    if self.part_labels is not None:
                        maps.append(self.part_labels[index])
                    images.append(image)
                except DataError as error:
                    if self.on_broken == "error":
                        return _Failure(f"{error} (on_broken: 'skip' goes on without it)")
                    broken.append(str(error))
                    continue
                indices.append(index)
                used.append(draw if isinstance(draw, Draw) else Draw(index, 0, number))
                break
            else:
                missing.append(draw if isinstance(draw, Draw) else Draw(wanted, 0, number))
        if self.transform is not None and images:
            # Nobody of a person could be read: others stand in, since all batches, and those of all
            # processes, must be as large.
            for number in range(len(draws) - len(images)):
                images.append(images[number])
                maps.extend(maps[number : number + 1])
                indices.append(indices[number])
                used.append(missing[number])
        if images:
            stacked = torch.stack(images)
        else:
            stacked = torch.empty(0, 3, *self.store.size, dtype=torch.uint8)
        part_labels = torch.stack(maps) if maps else None
        pixels, augmentation = stacked, None
        if self.transform is None:
            pixels = stacked if self.as_bytes else normalize(stacked)
        elif self.as_bytes:
            augmentation = self.transform.plan(used, self.store.size)
        else:
            pixels = self.transform(stacked, used)
            if part_labels is not None:
                part_labels = self.transform.label_maps(part_labels, used)
        return Batch(
            images=pixels,
            augmentation=augmentation,
            part_labels=part_labels,
            identities=torch.from_numpy(self.labels[indices]),
            views=torch.from_numpy(self.split.views[indices]),
            cameras=torch.from_numpy(self.split.cameras[indices]),
            indices=torch.tensor(indices, dtype=torch.int64),
            paths=tuple(str(self.split.records[index].path) for index in indices),
            broken=tuple(dict.fromkeys(broken)),
        )

    def _candidates(self, index: int) -> Iterable[int]:
        """Yield the image and, in training, the others of its identity, to stand in for it."""
        yield index
        if self.transform is None or self.on_broken == "error":
            return
        members = self.members[int(self.labels[index])]
        place = members.index(index)
        yield from members[place + 1 :]
        yield from members[:place]


class BatchLoader:
    """Iterates over the batches of a split; made by ``train_loader`` and ``evaluation_loader``.

    Attributes:
        split: the images.
        classes: raw identity of every label, int64 ``[N]``; the identities of a training batch
            are places in this array.
        broken: the broken images met so far, one line each (``on_broken: "skip"``).
    """

    def __init__(
        self, dataset: _BatchDataset, sampler: Any, classes: NDArray[np.int64], **options: Any
    ) -> None:
        self.split = dataset.split
        self.classes = classes
        self.broken: dict[str, None] = {}
        self._sampler = sampler
        workers = options["num_workers"]
        if workers and dataset.store.cache == "memory" and sys.platform.startswith("linux"):
            # Only forked workers share the cache.
            options["multiprocessing_context"] = multiprocessing.get_context("fork")
        self._loader: DataLoader[Any] = DataLoader(
            dataset,
            batch_sampler=sampler,
            collate_fn=_as_it_is,
            persistent_workers=workers > 0,
            **options,
        )

    @property
    def num_identities(self) -> int:
        """Number of different identities in the split."""
        return len(self.classes)

    def __len__(self) -> int:
        """Return the number of batches of one iteration over the loader."""
        return len(self._sampler)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that the next iteration over a training loader gives."""
        if not isinstance(self._sampler, IdentityBatchSampler):
            raise TypeError("only a training loader without a range of iterations has epochs")
        self._sampler.set_epoch(epoch)

    def __iter__(self) -> Iterator[Batch]:
        """Yield the batches.

        Raises:
            DataError: an image is broken and ``on_broken`` is ``"error"``, or a batch came out
                empty in training because all images of its identities are broken.
        """
        for item in self._loader:
            if isinstance(item, _Failure):
                raise DataError(item.message)
            for line in item.broken:
                if line not in self.broken:
                    self.broken[line] = None
                    logger.warning("left out, %d so far: %s", len(self.broken), line)
            if not len(item):
                if isinstance(self._sampler, SequentialBatchSampler):
                    continue
                raise DataError(f"no image of a batch could be read: {item.broken[0]}")
            yield item


def _as_it_is(batch: Any) -> Any:
    return batch


def load_dataset(config: DataConfig) -> ReIDDataset:
    """Read the data set that a configuration names.

    Raises:
        DataError: the folder or table is missing or not laid out as the data set is.
    """
    load = get_dataset_entry(config.name).load
    return load(config.root, singletons=config.singletons, max_bad_names=config.max_bad_names)


def train_loader(
    split: Split,
    config: DataConfig,
    *,
    seed: int = 0,
    rank: int = 0,
    world_size: int = 1,
    iterations: tuple[int, int] | None = None,
    pin_memory: bool | None = None,
    part_groups: int = 0,
) -> BatchLoader:
    """Make the loader of augmented P x K training batches.

    What it yields depends on the seed, the epoch and the iteration, not on the number of workers.
    With ``config.augment_on_device`` batches hold bytes, and ``Batch.pixels`` augments them where
    they then are.

    Args:
        split: the training images.
        config: image size, augmentation, P, K, workers, cache.
        seed: of the order and of the augmentation.
        rank: of this process.
        world_size: number of processes; together they see the batches that one would.
        iterations: ``None``: each iteration over the loader is one epoch, chosen by
            ``set_epoch``. ``(start, stop)``: it is these iterations, counted from 0 over all
            epochs, without a pause between epochs; start from where a resumed run left off.
        pin_memory: page-locked batches; ``None`` is yes where CUDA is there.
        part_groups: into how many groups the body parts of label maps are put, which then come
            with the batches where the set has any; 0 leaves them out.

    Raises:
        ConfigError: see ``IdentityBatchSampler``; or there are no such groups.
        DataError: the memory cache does not fit.
    """
    labels, classes = contiguous_labels(split.identities)
    sampler: Any = IdentityBatchSampler(
        labels,
        identities_per_batch=config.identities_per_batch,
        images_per_identity=config.images_per_identity,
        seed=seed,
        rank=rank,
        world_size=world_size,
    )
    if iterations is not None:
        sampler = IterationBatchSampler(sampler, *iterations)
    dataset = _BatchDataset(
        split,
        labels,
        _image_store(split, config),
        transform=TrainTransform(config.augmentation, seed=seed),
        on_broken=config.on_broken,
        as_bytes=config.augment_on_device,
        part_labels=PartLabelStore(config.folder, split.paths, config.image_size, part_groups)
        if part_groups and has_part_labels(config.folder)
        else None,
    )
    return BatchLoader(dataset, sampler, classes, **_loader_options(config, pin_memory))


def evaluation_loader(
    split: Split,
    config: DataConfig,
    *,
    rank: int = 0,
    world_size: int = 1,
    as_bytes: bool = False,
    pin_memory: bool | None = None,
) -> BatchLoader:
    """Make the loader of a split in its order, resized and normalised, with raw identities.

    With ``on_broken: "skip"`` broken images are missing from the batches; ``Batch.indices`` says
    which ones are there.

    Args:
        split: the images.
        config: image size, batch size, workers, cache.
        rank: of this process.
        world_size: number of processes; each gets a contiguous stretch.
        as_bytes: hand out uint8 images, to be normalised where they are used.
        pin_memory: page-locked batches; ``None`` is yes where CUDA is there.

    Raises:
        DataError: the memory cache does not fit.
    """
    sampler = SequentialBatchSampler(
        len(split), config.eval_batch_size, rank=rank, world_size=world_size
    )
    dataset = _BatchDataset(
        split,
        np.array(split.identities),
        _image_store(split, config),
        transform=None,
        on_broken=config.on_broken,
        as_bytes=as_bytes,
    )
    classes = np.unique(split.identities)
    return BatchLoader(dataset, sampler, classes, **_loader_options(config, pin_memory))


def _image_store(split: Split, config: DataConfig) -> ImageStore:
    return ImageStore(
        split.paths,
        config.image_size,
        cache=config.cache,
        folder=config.packed_folder,
        name=split.name,
    )


def _loader_options(config: DataConfig, pin_memory: bool | None) -> dict[str, Any]:
    # The loader draws a seed for its workers; ours do not use it, and the global generator is not
    # ours to advance.
    return {
        "num_workers": config.num_workers,
        "pin_memory": torch.cuda.is_available() if pin_memory is None else pin_memory,
        "generator": torch.Generator().manual_seed(0),
    }
