"""Drawing several runs beside one another."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from gsalign.engine.pictures.names import OF_SEVERAL_RUNS
from gsalign.engine.pictures.run import DrawnRun
from gsalign.visualize import cmc_curves, compared_curves

logger = logging.getLogger(__name__)


def draw_comparison(
    runs: Sequence[DrawnRun], out: Path, names: Sequence[str] = OF_SEVERAL_RUNS
) -> Iterator[Path]:
    """Draw runs beside one another; yields each picture's path when it is written.

    Runs of different data sets are drawn too; picture and log then say that their figures are of
    different images.

    Args:
        runs: the runs, in the order of the legends.
        out: folder to write to.
        names: of the pictures, of ``OF_SEVERAL_RUNS``.

    Raises:
        CheckpointError: a run has no weights yet, or they are damaged.
        DataError: a data set is missing, or its images cannot be read.
    """
    labels = run_labels(runs)
    note = _note(runs)
    if note:
        logger.warning("%s", note)
    if "training_curves" in names:
        if any(run.has_trained for run in runs):
            path = out / "training_curves.png"
            records = {label: run.records for label, run in zip(labels, runs, strict=True)}
            compared_curves(records, path, note=note, title="Training")
            yield path
        else:
            logger.info("no training_curves: no run has a line of training")
    if "cmc_curves" in names:
        path = out / "cmc_curves.png"
        results = {label: run.results for label, run in zip(labels, runs, strict=True)}
        cmc_curves(results, path, note=note, title="Queries answered within so many images")
        yield path


def run_labels(runs: Sequence[DrawnRun]) -> list[str]:
    """Names of runs; of those that share theirs the folders too."""
    counts = Counter(run.config.name for run in runs)
    return [
        run.config.name
        if counts[run.config.name] == 1
        else f"{run.config.name} ({run.folder.root})"
        for run in runs
    ]


def _note(runs: Sequence[DrawnRun]) -> str:
    """What to say where the runs' data sets differ."""
    sets = [(run.config.data.name, run.config.data.root.resolve()) for run in runs]
    if len(set(sets)) == 1:
        return ""
    told = ", ".join(
        f"{label}: {run.config.data.name} in {run.config.data.root}"
        for label, run in zip(run_labels(runs), runs, strict=True)
    )
    return f"the runs are of different data sets, so their figures do not compare ({told})"
