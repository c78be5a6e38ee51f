"""``metrics.json`` of a run: one JSON object per line, in the order of the iterations.

Every line has ``kind`` (``"train"`` or ``"evaluation"``), ``iteration`` (iterations done) and
``epoch`` (epochs done, a fraction). A ``train`` line has the means since the line before it:
``total_loss``, ``losses`` (name to weighted loss), ``lr``, ``time`` and ``data_time`` (seconds per
iteration), ``max_mem`` (MB), ``angles`` (layer to mean and spread of the LTPS angle in the last
batch, radians, and what :class:`gsalign.engine.angles.AngleStatistics` has besides). An
``evaluation`` line has ``split`` (``"test"`` or ``"validation"``) and
``protocols``: name to ``Rank-1``, ``Rank-5``, ``Rank-10``, ``mAP``, ``mINP``, ``metric`` (percent,
null where no query is valid) and the counts ``queries``, ``valid_queries``, ``gallery``. That of
the test has ``threshold`` where there is a validation split: the cosine ``distance`` up to which
two images are taken for one person, calibrated on the validation for a false accept rate of
``target_false_accept`` percent, and its ``false_accept`` and ``false_reject`` rates (percent) and
numbers of pairs on ``validation`` and, by protocol, on ``test``; null if no threshold keeps to it.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from gsalign.errors import DataError
from gsalign.files import atomic_write

Record = dict[str, Any]


def read_metrics(path: str | os.PathLike[str]) -> list[Record]:
    """The records of a run, in order; a last line that was cut off in writing is passed over.

    Raises:
        FileNotFoundError: there is no such file.
        DataError: another line than the last is not a JSON object.
    """
    lines = Path(path).read_text(encoding="utf-8").splitlines()
    records: list[Record] = []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
        except ValueError:
            if number == len(lines):
                break
            raise DataError(f"{path}, line {number}: not JSON: {line[:60]!r}") from None
        if not isinstance(record, dict):
            raise DataError(f"{path}, line {number}: wanted a JSON object, got {line[:60]!r}")
        records.append(record)
    return records


class MetricsFile:
    """Appends records to a run's ``metrics.json``.

    Args:
        path: the file; made if it is missing.
        iteration: records of later iterations are dropped, as a resumed run writes them again.
    """

    def __init__(self, path: Path, *, iteration: int = 0) -> None:
        self.path = path
        kept = read_metrics(path) if path.exists() else []
        kept = [record for record in kept if record["iteration"] <= iteration]
        with atomic_write(path) as temporary:
            temporary.write_text("".join(map(_line, kept)), encoding="utf-8")

    def append(self, record: Record) -> None:
        """Write one record; it is on disk when this returns."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(_line(record))


def _line(record: Record) -> str:
    return json.dumps(record, allow_nan=False) + "\n"
