"""Drawing the pictures of one run, each if there is something to draw."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from gsalign.engine.pictures.lists import ANSWERS, make_rank_lists
from gsalign.engine.pictures.names import PICTURES
from gsalign.engine.pictures.run import DrawnRun
from gsalign.errors import ConfigError, DataError, GSAlignError
from gsalign.visualize import (
    alignment,
    attention_maps,
    cmc_curves,
    embedding_map,
    ltps_grids,
    part_masks,
    rank_lists,
    training_curves,
)
from gsalign.visualize.projection import Method
from gsalign.visualize.rollout import Heads

logger = logging.getLogger(__name__)


class NothingToDrawError(GSAlignError):
    """A picture does not apply to a run; the message says why."""


@dataclass(frozen=True)
class Choices:
    """What a picture can be drawn by.

    Attributes:
        heads: of the attention, see :func:`gsalign.visualize.attention_maps`.
        method: of the embedding map, see :func:`gsalign.visualize.projection.project`.
    """

    heads: Heads = "mean"
    method: Method | None = None


def draw_run(
    run: DrawnRun,
    out: Path,
    names: Sequence[str] = tuple(PICTURES),
    *,
    choices: Choices | None = None,
    insist: bool = False,
) -> Iterator[Path]:
    """Draw a run; yields each picture's path when it is written.

    Args:
        run: the run.
        out: folder to write to.
        names: of the pictures, see ``gsalign.engine.pictures.names``.
        choices: how to draw; the defaults if None.
        insist: whether it is an error if a picture does not apply, raised when the others are
            drawn; else the log says so.

    Raises:
        CheckpointError: the run has no weights yet, or they are damaged.
        DataError: the data set is missing, or its images cannot be read.
        ConfigError: a picture that was insisted on does not apply.
        MissingExtraError: t-SNE was asked for by name and scikit-learn is not installed.
    """
    missing = []
    for name in names:
        path = out / f"{name}.png"
        try:
            _DRAW[name](run, path, choices or Choices())
        except NothingToDrawError as error:
            missing.append(f"no {name}: {error}")
            if not insist:
                logger.info("%s", missing[-1])
            continue
        yield path
    if missing and insist:
        raise ConfigError("; ".join(missing))


def _title(run: DrawnRun, text: str) -> str:
    return f"{run.config.name}: {text}"


def _training_curves(run: DrawnRun, path: Path, _: Choices) -> None:
    if not run.has_trained:
        raise NothingToDrawError(f"{run.folder.metrics} has no line of training")
    training_curves(run.records, path, title=_title(run, "training"))


def _cmc_curves(run: DrawnRun, path: Path, _: Choices) -> None:
    _require_answers(run)
    title = _title(run, "queries answered within so many images")
    cmc_curves({run.config.name: run.results}, path, title=title)


def _rank_lists(run: DrawnRun, path: Path, _: Choices) -> None:
    _require_answers(run)
    lists = make_rank_lists(run.query, run.gallery, run.dataset)
    if not lists:
        raise NothingToDrawError("no query has another image of its person in the gallery")
    title = _title(run, f"first {ANSWERS} answers, queries from best to worst AP")
    rank_lists(lists, path, image_size=run.data.image_size, title=title)


def _embedding_map(run: DrawnRun, path: Path, choices: Choices) -> None:
    records = (*run.dataset.query.records, *run.dataset.gallery.records)
    if len(run.query) + len(run.gallery) < 3:
        raise NothingToDrawError("the data set has fewer than 3 test images")
    embedding_map(
        run.query,
        run.gallery,
        path,
        method=choices.method,
        names={record.identity: record.identity_name for record in records},
        title=_title(run, "embeddings of the test images"),
    )


def _alignment(run: DrawnRun, path: Path, _: Choices) -> None:
    if run.network.uprighting is None:
        raise NothingToDrawError("the network aligns no images")
    alignment(run.network, run.examples(), path, title=_title(run, "how images are aligned"))


def _attention(run: DrawnRun, path: Path, choices: Choices) -> None:
    title = _title(run, "attention of class and view token, rolled out over the layers")
    attention_maps(run.network, run.examples(), path, heads=choices.heads, title=title)


def _ltps_grids(run: DrawnRun, path: Path, _: Choices) -> None:
    if not run.network.config.ltps_layers:
        raise NothingToDrawError("the network has no LTPS")
    title = _title(run, "what LTPS does to an image")
    ltps_grids(run.network, run.examples(), path, title=title)


def _part_masks(run: DrawnRun, path: Path, _: Choices) -> None:
    if run.network.parts is None:
        raise NothingToDrawError("the network has no parts")
    title = _title(run, "what the part masks cover")
    part_masks(run.network, run.examples(5), path, title=title)


def _contact_sheet(run: DrawnRun, path: Path, _: Choices) -> None:
    from gsalign.data.synthetic import contact_sheet

    try:
        contact_sheet(run.config.data.root, path)
    except DataError as error:
        raise NothingToDrawError(str(error)) from None


def _require_answers(run: DrawnRun) -> None:
    if not any(result.num_valid_queries for result in run.results.values()):
        raise NothingToDrawError("no query has another image of its person in the gallery")


_DRAW: dict[str, Callable[[DrawnRun, Path, Choices], None]] = {
    "training_curves": _training_curves,
    "cmc_curves": _cmc_curves,
    "rank_lists": _rank_lists,
    "embedding_map": _embedding_map,
    "alignment": _alignment,
    "attention": _attention,
    "ltps_grids": _ltps_grids,
    "part_masks": _part_masks,
    "contact_sheet": _contact_sheet,
}
