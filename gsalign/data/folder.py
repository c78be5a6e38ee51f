"""Reading one's own images from folders: ``<split>/<identity>/*.jpg``, or any folder of images."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from gsalign.data.labels import number_names, text_of, unknown_camera
from gsalign.data.layout import (
    SPLITS,
    Layout,
    Singletons,
    assemble,
    folder_names,
    image_names,
    is_image_name,
    protocols_of,
)
from gsalign.data.records import AERIAL, GROUND, ImageRecord, ReIDDataset, Split
from gsalign.data.table import is_table, read_table
from gsalign.errors import DataError

# Words of a file name: what stands between underscores, hyphens, blanks and dots.
_WORDS = re.compile(r"[_\-\s.]+")
_CAMERA = re.compile(r"(?:c|cam|camera)(\d{1,9})(?:s\d+)?", re.ASCII | re.IGNORECASE)
_AERIAL_WORDS = frozenset({"aerial", "drone", "uav"})

FOLDER = Layout(
    name="folder",
    title="a folder of your own",
    folders=SPLITS,
    picture="""\
<root>/
  train/   <identity>/   *.jpg
  query/   <identity>/   *.jpg
  gallery/ <identity>/   *.jpg
identities may be any names. A word of the file name such as c3, cam3 or camera3 is the camera; a
word aerial, drone or uav makes the image an aerial one. Words are separated by _ - . or blanks""",
    example="<identity>/cam3_drone_000017.jpg",
)


def read_images(source: str | os.PathLike[str], *, name: str = "images") -> Split:
    """Read the records of one's own images, to search or to describe: a folder or a table.

    A folder is searched with all folders in it. The name of the first folder below ``source`` is
    the identity of the images in it; images that lie in ``source`` itself are of nobody known
    (identity -1). Camera and view are taken from the file name, see ``camera_and_view``.
    A table is read as :func:`gsalign.data.read_table` says; all its rows, whatever their
    split. No image is opened.

    Args:
        source: a folder, or a ``.csv`` or ``.tsv`` file.
        name: of the split that is returned.

    Returns:
        The records, those of a folder in the order of their paths, those of a table as its rows.

    Raises:
        DataError: there is no such folder or table, it holds no image, or a row is wrong.
    """
    path = Path(source)
    if is_table(path):
        return Split(name, tuple(row.record for row in read_table(path)))
    if not path.is_dir():
        raise DataError(
            f"{str(path)!r} is no folder and no .csv or .tsv table; give one of them"
            if path.exists()
            else f"{str(path)!r} does not exist; give a folder of images, or a .csv or .tsv table"
        )
    files = _images_below(path)
    if not files:
        raise DataError(f"no images (.jpg, .jpeg, .png) in {path} or the folders in it")
    return Split(name, tuple(_records(path, files)))


def load_folder(
    root: str | os.PathLike[str], *, singletons: Singletons = "drop", max_bad_names: int = 10
) -> ReIDDataset:
    """Read ``<root>/{train,query,gallery}/<identity>/*.jpg``.

    Identities may have any names; the same name is the same person in every split. For cameras
    and views see ``camera_and_view``. With aerial and ground images in the test the protocols
    are those by view, else only ``all``.

    Args:
        root: the folder.
        singletons: see :func:`gsalign.data.load_cargo`.
        max_bad_names: so many images may lie in a split but in no folder of an identity; they are
            left out, counted and named.

    Raises:
        DataError: a folder is missing or empty, or see :func:`gsalign.data.load_cargo`.
    """
    folder = Path(root)
    FOLDER.require(folder)
    bad: list[str] = []
    files: dict[str, list[Path]] = {}
    for split in SPLITS:
        loose = image_names(folder / split)
        bad += [f"{split}/{name} (in no folder of an identity)" for name in loose]
        files[split] = [
            path
            for identity in folder_names(folder / split)
            for path in _images_below(folder / split / identity)
        ]
    people = number_names(
        path.relative_to(folder / split).parts[0]
        for split, paths in files.items()
        for path in paths
    )
    splits: dict[str, Split] = {}
    for split, paths in files.items():
        before = sum(map(len, splits.values()))
        splits[split] = Split(split, tuple(_records(folder / split, paths, people, before)))
    return assemble(
        FOLDER,
        folder,
        splits,
        bad=bad,
        max_bad_names=max_bad_names,
        singletons=singletons,
        protocols=protocols_of(splits["query"], splits["gallery"]),
    )


def camera_and_view(name: str) -> tuple[int | None, int]:
    """Read camera and view from the words of a file name.

    Args:
        name: as ``cam3_drone_000017.jpg``; words are separated by ``_ - .`` and blanks.

    Returns:
        The number of the first word such as ``c3``, ``cam3``, ``camera3`` or Market's ``c3s1``,
        None if there is no such word; and AERIAL if a word is ``aerial``, ``drone`` or ``uav`` in
        any case of letters, else GROUND.
    """
    words = _WORDS.split(name)
    found = (_CAMERA.fullmatch(word) for word in words)
    camera = next((int(match[1]) for match in found if match), None)
    aerial = any(word.lower() in _AERIAL_WORDS for word in words)
    return camera, AERIAL if aerial else GROUND


def _images_below(folder: Path) -> list[Path]:
    """All images in a folder and the folders in it, hidden ones passed over, by path."""
    found = []
    for parent, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [Path(parent, name) for name in files if is_image_name(name)]
    return sorted(found)


def _records(
    root: Path, paths: Sequence[Path], people: Mapping[str, int] | None = None, start: int = 0
) -> list[ImageRecord]:
    """Records of files by the folders they are in; ``start`` is the number of the first file."""
    places = [path.relative_to(root) for path in paths]
    names = ["" if len(place.parts) == 1 else place.parts[0] for place in places]
    numbers = number_names(filter(None, names)) if people is None else people
    records = []
    for number, (path, name) in enumerate(zip(paths, names, strict=True), start):
        camera, view = camera_and_view(path.name)
        identity = numbers[name] if name else -1
        records.append(
            ImageRecord(
                path=path,
                identity=identity,
                camera=unknown_camera(number) if camera is None else camera,
                view=view,
                identity_text=text_of(name, identity) if name else "",
            )
        )
    return records
