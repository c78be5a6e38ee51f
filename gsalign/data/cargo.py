"""Reading a data set laid out like CARGO: ``{train,query,gallery}/Cam*/Cam2_day_2519_320.jpg``."""

from __future__ import annotations

import os
import re
from dataclasses import replace
from pathlib import Path

from gsalign.data.layout import (
    SPLITS,
    Layout,
    Published,
    Singletons,
    assemble,
    folder_names,
    image_names,
    parsed,
)
from gsalign.data.records import AERIAL, GROUND, ImageRecord, ReIDDataset, Split

NUM_CAMERAS = 13
LAST_AERIAL_CAMERA = 5

_FOLDER = re.compile(r"Cam(\d+)", re.ASCII)
_NAME = re.compile(r"Cam(\d+)_([A-Za-z]+)_(\d+)_(\d+)\.[A-Za-z]+", re.ASCII)

CARGO = Layout(
    name="cargo",
    title="CARGO",
    folders=SPLITS,
    picture="""\
<root>/
  train/   Cam1/ ... Cam13/   *.jpg
  query/   Cam1/ ... Cam13/   *.jpg
  gallery/ Cam1/ ... Cam13/   *.jpg
names such as Cam2_day_2519_320.jpg: camera (1-5 are aerial), day or night, identity, index""",
    example="Cam2_day_2519_320.jpg",
    hint="To make a generated set of this layout: gsalign data generate --out {root}",
    published=(
        Published("train", images=51_451, identities=2500),
        Published("test", images=51_024, identities=2500),
        Published("query", images=134, identities=60, view=GROUND),
        Published("gallery", images=18_444, identities=2404, view=GROUND),
        Published("query", images=178, identities=89, view=AERIAL),
        Published("gallery", images=32_268, identities=2447, view=AERIAL),
    ),
)


def is_camera_folder(name: str) -> bool:
    """Whether a folder of this name has a camera's images: ``Cam1``, ``Cam2``, ..."""
    return _FOLDER.fullmatch(name) is not None


def parse_name(name: str) -> ImageRecord:
    """Read camera, time of day, identity and index from a CARGO file name.

    Args:
        name: the file name without its folder, e.g. ``Cam2_day_2519_320.jpg``.

    Returns:
        A record whose path is ``name``.

    Raises:
        ValueError: the name has another form, or a camera outside 1 .. 13.
    """
    match = _NAME.fullmatch(name)
    if match is None:
        raise ValueError("not of the form Cam2_day_2519_320.jpg")
    camera = int(match[1])
    time = match[2].lower()
    if not 1 <= camera <= NUM_CAMERAS:
        raise ValueError(f"camera {camera} is not in 1..{NUM_CAMERAS}")
    if time not in ("day", "night"):
        raise ValueError(f"{match[2]!r} is neither day nor night")
    return ImageRecord(
        path=Path(name),
        identity=int(match[3]),
        camera=camera,
        view=AERIAL if camera <= LAST_AERIAL_CAMERA else GROUND,
        time=time,
        index=int(match[4]),
    )


def load_cargo(
    root: str | os.PathLike[str], *, singletons: Singletons = "drop", max_bad_names: int = 10
) -> ReIDDataset:
    """Read the records of a CARGO folder, or of a generated one, which has the same layout.

    Only names are read, no image is opened; ``gsalign.data.images.check_images`` does that. The
    records of a split are ordered by camera, then by file name, whatever order the file system
    lists them in. Hidden files and files that are not images are passed over.

    An identity with a single training image can form no positive pair, so the triplet loss learns
    nothing from it, and the identity head a class of one picture. By default such identities are
    left out of training, with one warning that counts them. ``"keep"`` is what the published code
    does: their image is then repeated, each time augmented differently.

    Args:
        root: the folder that holds ``train``, ``query`` and ``gallery``.
        singletons: ``"drop"``, ``"keep"`` or ``"error"``: identities with one training image.
        max_bad_names: so many images may have a name that does not parse (or that contradicts the
            folder they are in); they are left out, counted and named in a warning. One more is an
            error: the folder is then probably another data set. 0 allows none.

    Returns:
        The data set; its ``notes`` repeat the warnings.

    Raises:
        DataError: a folder is missing or empty, too many names do not parse, or ``singletons`` is
            ``"error"`` and there are some.
    """
    folder = Path(root)
    CARGO.require(folder)
    bad: list[str] = []
    splits = {name: _read_split(folder, name, bad) for name in SPLITS}
    return assemble(
        CARGO, folder, splits, bad=bad, max_bad_names=max_bad_names, singletons=singletons
    )


def _read_split(root: Path, name: str, bad: list[str]) -> Split:
    paths = [
        root / name / folder / file
        for folder in folder_names(root / name)
        for file in image_names(root / name / folder)
    ]
    records = sorted(
        parsed(paths, _record, root, bad), key=lambda record: (record.camera, record.path.name)
    )
    return Split(name, tuple(records))


def _record(path: Path) -> ImageRecord:
    record = parse_name(path.name)
    match = _FOLDER.fullmatch(path.parent.name)
    if match is None or int(match[1]) != record.camera:
        raise ValueError(f"camera {record.camera} in folder {path.parent.name}")
    return replace(record, path=path)
