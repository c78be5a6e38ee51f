"""A run to be drawn: its records, its network, its data set and what the network makes of that."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from accelerate import Accelerator

from gsalign.data import DataConfig, ImageRecord, ReIDDataset, Split, check_images, load_dataset
from gsalign.data.folder import camera_and_view
from gsalign.engine.distributed import build_accelerator, on_cpu
from gsalign.engine.folder import RunFolder
from gsalign.engine.loading import load_network
from gsalign.engine.metrics import Record, read_metrics
from gsalign.engine.testing import Report, embed_splits
from gsalign.errors import CheckpointError
from gsalign.evaluation import EvaluationResult, Features, evaluate_features
from gsalign.model import GSAlign

if TYPE_CHECKING:
    from gsalign.config import Config


Watch = Callable[[str], AbstractContextManager[Report | None]]


class DrawnRun:
    """A run of which each thing is read or computed when a picture asks for it, and only once.

    Args:
        folder: of the run.
        config: where the images are, and what to compute on.
        checkpoint: the weights; None for the run's best ones, or its last.
        images: files to look at in place of some of the data set's queries.
        watch: given a title, a block that gives what is told of the progress of embedding, or None.
    """

    def __init__(
        self,
        folder: RunFolder,
        config: Config,
        *,
        checkpoint: Path | None = None,
        images: Sequence[Path] = (),
        watch: Watch = lambda _: nullcontext(),
    ) -> None:
        self.folder = folder
        self.config = config
        self._checkpoint = checkpoint
        self._images = tuple(images)
        self._watch = watch

    @cached_property
    def records(self) -> list[Record]:
        """What the run has measured; nothing if it has no metrics."""
        return read_metrics(self.folder.metrics) if self.folder.metrics.exists() else []

    @cached_property
    def has_trained(self) -> bool:
        """Whether there is a line of training to draw."""
        return any(record["kind"] == "train" for record in self.records)

    @property
    def checkpoint(self) -> Path:
        """The file of the weights."""
        if self._checkpoint is not None:
            return self._checkpoint
        return self.folder.best if self.folder.best.exists() else self.folder.final

    @cached_property
    def network(self) -> GSAlign:
        """The network, on the device of the configuration.

        Raises:
            CheckpointError: there are no weights, or they are damaged.
        """
        if self._checkpoint is None and not self.checkpoint.exists():
            raise CheckpointError(
                f"{self.folder.root} has no weights yet: neither {self.folder.best.name} nor "
                f"{self.folder.final.name}; --only training_curves needs none"
            )
        network = load_network(self.checkpoint, self.config.model, compare=False)
        return network.to(self.accelerator.device)

    @cached_property
    def accelerator(self) -> Accelerator:
        """What it is computed on, on a CPU without fp16, which a GPU may have trained in."""
        device, precision = self.config.device, self.config.training.precision
        if precision == "fp16" and on_cpu(device):
            precision = "no"
        return build_accelerator(device=device, precision=precision)

    @cached_property
    def data(self) -> DataConfig:
        """How images are read: in the network's size."""
        return self.config.data.model_copy(update={"image_size": self.network.config.image_size})

    @cached_property
    def dataset(self) -> ReIDDataset:
        """The data set.

        Raises:
            DataError: it is missing.
        """
        return load_dataset(self.config.data)

    @property
    def query(self) -> Features:
        """Embeddings of the query split."""
        return self._features[0]

    @property
    def gallery(self) -> Features:
        """Embeddings of the gallery split."""
        return self._features[1]

    @cached_property
    def _features(self) -> tuple[Features, Features]:
        splits = self.dataset.query, self.dataset.gallery
        with self._watch(f"embedding {self.config.name}") as report:
            return embed_splits(self.network, *splits, self.data, self.accelerator, report=report)

    @cached_property
    def results(self) -> dict[str, EvaluationResult]:
        """What the protocols of the data set give, by name."""
        return evaluate_features(self.query, self.gallery, protocols=self.dataset.protocols)

    def examples(self, per_view: int = 3) -> list[ImageRecord]:
        """The images to look at: one's own, or some queries of each view."""
        if self._images:
            return [_own_image(path) for path in self._images]
        return some_of_each_view(self._readable, per_view)

    @cached_property
    def _readable(self) -> Split:
        query = self.dataset.query
        return check_images(query).split if self.data.on_broken == "skip" else query


def _own_image(path: Path) -> ImageRecord:
    """A record of an image that nobody knows anything of."""
    camera, view = camera_and_view(path.name)
    return ImageRecord(path, identity=-1, camera=-1 if camera is None else camera, view=view)


def some_of_each_view(split: Split, per_view: int) -> list[ImageRecord]:
    """Images of different people and, as far as there are some, cameras; aerial ones first."""
    chosen: list[ImageRecord] = []
    for view in (1, 0):
        left = [record for record in split.records if record.view == view]
        for _ in range(min(per_view, len(left))):
            people = {record.identity for record in chosen}
            cameras = {record.camera for record in chosen}
            # The first of the least repetitive, so that the choice is always the same.
            best = min(left, key=lambda r: (r.identity in people) + (r.camera in cameras))
            chosen.append(best)
            left.remove(best)
    return chosen
