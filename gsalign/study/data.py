"""The data sets of a study: rendered when they are missing, checked when they are there."""

from __future__ import annotations

from collections.abc import Callable

from gsalign.data.synthetic import GenerationReport, generate
from gsalign.errors import DataError
from gsalign.study.config import StudyData


def prepare_data(
    name: str,
    data: StudyData,
    *,
    workers: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> GenerationReport | None:
    """Make sure that a data set is there and is the one the study means.

    Args:
        name: of the data set in the study.
        data: the data set.
        workers: processes to render with; 0: this one.
        progress: called with (images done, images in all).

    Returns:
        What was rendered or found; None for a set that is not generated.

    Raises:
        DataError: a set to be generated is there with other settings, or one that is not to be
            generated is missing.
    """
    if data.generate is None:
        if not data.root.exists():
            raise DataError(
                f"data.{name}.root {data.root} does not exist, and the study has no settings to "
                f"generate it with: put the set there, or add data.{name}.generate"
            )
        return None
    try:
        return generate(data.root, data.generate, workers=workers, progress=progress)
    except DataError as error:
        raise DataError(f"data.{name}: {error}") from None
