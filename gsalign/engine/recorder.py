"""Writing down what a run measures: the line people read, ``metrics.json``, TensorBoard."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import asdict
from datetime import timedelta
from typing import TYPE_CHECKING

from gsalign.engine.angles import IMAGE, AngleStatistics
from gsalign.engine.folder import RunFolder
from gsalign.engine.metrics import MetricsFile, Record
from gsalign.evaluation import EvaluationResult

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

logger = logging.getLogger(__name__)


def train_line(record: Record, *, total: int, epochs: float) -> str:
    """The line of a ``train`` record, in the order re-identification toolkits have made usual.

    Args:
        record: see ``gsalign.engine.metrics``.
        total: iterations of the run.
        epochs: epochs of the run.
    """
    eta = timedelta(seconds=round((total - record["iteration"]) * record["time"]))
    parts = [
        f"eta: {eta}",
        f"epoch: {record['epoch']:.2f}/{epochs:.4g}",
        f"iter: {record['iteration']}/{total}",
        f"total_loss: {record['total_loss']:.4g}",
        *(f"{name}: {value:.4g}" for name, value in record["losses"].items()),
        f"time: {record['time']:.4f}",
        f"data_time: {record['data_time']:.4f}",
        f"lr: {record['lr']:.3g}",
        f"max_mem: {record['max_mem']}M",
    ]
    return "  ".join(parts)


def angle_line(angles: Mapping[str, AngleStatistics]) -> str:
    """Mean and spread of the angle of every layer, in degrees, and of its warp, on one line."""
    degrees = 57.29577951308232
    told = (
        f"{layer}: {angle.mean * degrees:+.1f}±{angle.std * degrees:.1f}"
        + (f" ({_points_moved(angle)}, {angle.clamped:.0%})" if layer != IMAGE else "")
        for layer, angle in angles.items()
    )
    heading = "angle by layer (degrees, mean±std over the batch; control points moved, clamped)"
    return f"LTPS {heading}  {'  '.join(told)}"


def _points_moved(angle: AngleStatistics) -> str:
    """From the regular grid, with the spread over the images where each has points of its own."""
    spread = "" if angle.points_std is None else f"±{angle.points_std:.3f}"
    return f"{angle.moved:.3f}{spread}"


class Recorder:
    """Writes the records of a run; one process of it has one.

    Args:
        folder: of the run.
        iteration: where the run starts; what was recorded after it is dropped.
    """

    def __init__(self, folder: RunFolder, *, iteration: int = 0) -> None:
        self._metrics = MetricsFile(folder.metrics, iteration=iteration)
        self._events = self._open_events(folder, iteration)

    @staticmethod
    def _open_events(folder: RunFolder, iteration: int) -> SummaryWriter:
        from torch.utils.tensorboard import SummaryWriter

        purge = iteration + 1 if iteration else None
        return SummaryWriter(str(folder.events), purge_step=purge, flush_secs=30)

    def train(self, record: Record, angles: Mapping[str, AngleStatistics]) -> None:
        """Write a ``train`` record."""
        plain = {layer: asdict(angle) for layer, angle in angles.items()}
        self._metrics.append({"kind": "train", **record, "angles": plain})
        step = record["iteration"]
        scalars = {f"loss/{name}": value for name, value in record["losses"].items()}
        for name in ("total_loss", "lr", "time", "data_time", "max_mem"):
            scalars[f"train/{name}"] = record[name]
        for layer, angle in angles.items():
            scalars[f"angle_mean/layer{layer}"] = angle.mean
            scalars[f"angle_std/layer{layer}"] = angle.std
            scalars[f"points_moved/layer{layer}"] = angle.moved
            scalars[f"clamped/layer{layer}"] = angle.clamped
            if angle.points_std is not None:
                scalars[f"points_std/layer{layer}"] = angle.points_std
        for name, value in scalars.items():
            self._events.add_scalar(name, value, step)

    def evaluation(self, record: Record, results: Mapping[str, EvaluationResult]) -> None:
        """Write an ``evaluation`` record."""
        protocols = {name: result.as_dict() for name, result in results.items()}
        self._metrics.append({"kind": "evaluation", **record, "protocols": protocols})
        for name, figures in protocols.items():
            for figure, value in figures.items():
                if value is not None and not isinstance(value, int):
                    self._events.add_scalar(
                        f"{record['split']}_{name}/{figure}", value, record["iteration"]
                    )
        self._events.flush()

    def close(self) -> None:
        """Finish the TensorBoard file."""
        self._events.close()
