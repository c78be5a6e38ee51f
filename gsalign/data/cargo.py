"""Reading a data set laid out like CARGO: ``{train,query,gallery}/Cam*/Cam2_day_2519_320.jpg``."""

from __future__ import annotations

import logging
import os
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Literal

from gsalign.data.records import AERIAL, GROUND, ImageRecord, ReIDDataset, Split
from gsalign.errors import DataError

logger = logging.getLogger(__name__)

SPLITS = ("train", "query", "gallery")
NUM_CAMERAS = 13
LAST_AERIAL_CAMERA = 5
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png")

Singletons = Literal["drop", "keep", "error"]

_FOLDER = re.compile(r"Cam(\d+)", re.ASCII)
_NAME = re.compile(r"Cam(\d+)_([A-Za-z]+)_(\d+)_(\d+)\.[A-Za-z]+", re.ASCII)
_NAMED_AT_MOST = 5

LAYOUT = """\
<root>/
  train/   Cam1/ ... Cam13/   *.jpg
  query/   Cam1/ ... Cam13/   *.jpg
  gallery/ Cam1/ ... Cam13/   *.jpg
names such as Cam2_day_2519_320.jpg: camera (1-5 are aerial), day or night, identity, index"""


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
    _check_layout(folder)
    notes: list[str] = []
    bad: list[str] = []
    splits = {name: _read_split(folder, name, bad) for name in SPLITS}
    if bad:
        summary = f"{len(bad)} image name(s) in {folder} could not be used: {_some(bad)}"
        if len(bad) > max_bad_names:
            raise DataError(
                f"{summary}; at most {max_bad_names} are allowed (max_bad_names). "
                f"Expected names such as Cam2_day_2519_320.jpg"
            )
        notes.append(f"{summary}; left out")
    for name, split in splits.items():
        if not split.records:
            raise DataError(f"no images in {folder / name}. Expected\n{LAYOUT}")
    splits["train"], note = _treat_singletons(splits["train"], singletons)
    if note:
        notes.append(note)
    shared = set(splits["train"].identities.tolist()) & set(splits["query"].identities.tolist())
    if shared:
        some = _some([str(identity) for identity in sorted(shared)])
        notes.append(
            f"{len(shared)} identities of the query are in the training set too ({some}): "
            "results on this data set do not measure unseen people"
        )
    for note in notes:
        logger.warning(note)
    return ReIDDataset(
        name="cargo",
        root=folder,
        train=splits["train"],
        query=splits["query"],
        gallery=splits["gallery"],
        notes=tuple(notes),
    )


def _check_layout(root: Path) -> None:
    missing = [name for name in SPLITS if not (root / name).is_dir()]
    if not missing:
        return
    what = (
        f"data root {str(root)!r} does not exist"
        if not root.exists()
        else f"data root {str(root)!r} has no folder {', '.join(missing)}"
    )
    raise DataError(
        f"{what}. Expected\n{LAYOUT}\n"
        f"To make a generated set of this layout: gsalign data generate --out {root}"
    )


def _read_split(root: Path, name: str, bad: list[str]) -> Split:
    records: list[ImageRecord] = []
    with os.scandir(root / name) as entries:
        folders = [entry.name for entry in entries if entry.is_dir() and entry.name[0] != "."]
    for folder in folders:
        match = _FOLDER.fullmatch(folder)
        with os.scandir(root / name / folder) as entries:
            files = [entry.name for entry in entries if entry.is_file()]
        for file in files:
            if file.startswith(".") or not file.lower().endswith(IMAGE_SUFFIXES):
                continue
            relative = f"{name}/{folder}/{file}"
            try:
                record = parse_name(file)
            except ValueError as error:
                bad.append(f"{relative} ({error})")
                continue
            if match is None or int(match[1]) != record.camera:
                bad.append(f"{relative} (camera {record.camera} in folder {folder})")
                continue
            records.append(replace(record, path=root / name / folder / file))
    records.sort(key=lambda record: (record.camera, record.path.name))
    return Split(name, tuple(records))


def _treat_singletons(train: Split, policy: Singletons) -> tuple[Split, str]:
    if policy not in ("drop", "keep", "error"):
        raise DataError(f"singletons is {policy!r}; it must be 'drop', 'keep' or 'error'")
    counts = Counter(train.identities.tolist())
    single = sorted(identity for identity, count in counts.items() if count == 1)
    if not single or policy == "keep":
        return train, ""
    some = _some([str(identity) for identity in single])
    what = f"{len(single)} training identities have only one image and form no pair ({some})"
    if policy == "error":
        raise DataError(f"{what}; add images, or set singletons to 'drop' or 'keep'")
    if len(single) == len(counts):
        raise DataError(f"{what}: nothing is left to train on; add images, or keep them")
    dropped = set(single)
    kept = train.select(lambda record: record.identity not in dropped)
    return kept, f"{what}; left out (singletons: 'keep' trains on them)"


def _some(names: list[str]) -> str:
    listed = ", ".join(sorted(names)[:_NAMED_AT_MOST])
    more = len(names) - _NAMED_AT_MOST
    return f"{listed} and {more} more" if more > 0 else listed
