"""The truth table beside the images: one row per image of ``truth.csv``."""

from __future__ import annotations

import csv
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from gsalign.data.synthetic.body import PARTS
from gsalign.errors import DataError
from gsalign.files import atomic_write

TRUTH_FILE = "truth.csv"
# Parts a person has, in the order of their labels in the maps (1 is the first).
BODY_PARTS = PARTS[1:-1]


@dataclass(frozen=True)
class TruthRow:
    """What the renderer knows about one image. Angles are in degrees.

    Attributes:
        path: below the root, forward slashes.
        identity: raw identity of the file name.
        camera: 1..13.
        view: 0 = ground, 1 = aerial.
        time: ``day`` or ``night``.
        elevation: how far the camera looks down; 90 is straight down.
        heading: where the person walks, 0..360: 0 towards the camera, 90 to the right of the
            image before it is rolled, 180 away.
        roll: in-plane turn of the camera, -180..180: the image of "up" is turned clockwise by it.
        body_angle: direction from the feet to the head in the image, -180..180, clockwise from
            straight up; it includes perspective and the crop's stretch.
        phase: of the walk cycle, 0..1; 0 is the right heel's strike.
        lighting: ``sun``, ``overcast``, ``sodium`` or ``led``.
        occluded_share: share of the person's visible pixels that something else hides, 0..1.
        visible: for every body part, the share of its silhouette that is seen: hidden neither by
            other parts of the person nor by an occluder nor by the image's border. A part that the
            person does not have (a bag) has -1.
    """

    path: str
    identity: int
    camera: int
    view: int
    time: str
    elevation: float
    heading: float
    roll: float
    body_angle: float
    phase: float
    lighting: str
    occluded_share: float
    visible: dict[str, float]


_PLAIN = (
    "path", "identity", "camera", "view", "time", "elevation", "heading", "roll", "body_angle",
    "phase", "lighting", "occluded_share",
)  # fmt: skip
COLUMNS = _PLAIN + tuple(f"visible_{part}" for part in BODY_PARTS)


def write_truth(root: Path, rows: Iterable[TruthRow]) -> None:
    """Write ``truth.csv`` into a folder."""
    with atomic_write(root / TRUTH_FILE) as temporary:
        with open(temporary, "w", newline="", encoding="utf-8") as stream:
            writer = csv.writer(stream, lineterminator="\n")
            writer.writerow(COLUMNS)
            for row in rows:
                values: list[object] = []
                for name in _PLAIN:
                    value = getattr(row, name)
                    values.append(f"{value:.4f}" if isinstance(value, float) else value)
                values += [f"{row.visible[part]:.4f}" for part in BODY_PARTS]
                writer.writerow(values)


def read_truth(root: str | Path) -> list[TruthRow]:
    """Read the truth table of a generated set.

    Args:
        root: folder of the set.

    Raises:
        DataError: there is no such table, or it is not one of this renderer's.
    """
    path = Path(root) / TRUTH_FILE
    if not path.is_file():
        raise DataError(f"root {root} has no {TRUTH_FILE}; only generated sets have one")
    with open(path, newline="", encoding="utf-8") as stream:
        reader = csv.DictReader(stream)
        if tuple(reader.fieldnames or ()) != COLUMNS:
            raise DataError(
                f"{path} has columns {reader.fieldnames}, wanted {list(COLUMNS)}; "
                "generate the set again"
            )
        rows = []
        for number, line in enumerate(reader, start=2):
            try:
                rows.append(
                    TruthRow(
                        path=line["path"],
                        identity=int(line["identity"]),
                        camera=int(line["camera"]),
                        view=int(line["view"]),
                        time=line["time"],
                        elevation=float(line["elevation"]),
                        heading=float(line["heading"]),
                        roll=float(line["roll"]),
                        body_angle=float(line["body_angle"]),
                        phase=float(line["phase"]),
                        lighting=line["lighting"],
                        occluded_share=float(line["occluded_share"]),
                        visible={p: float(line[f"visible_{p}"]) for p in BODY_PARTS},
                    )
                )
            except (TypeError, ValueError) as error:
                raise DataError(f"{path} line {number} cannot be read: {error}") from error
    return rows
