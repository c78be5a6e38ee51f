"""Reading AG-ReID.v2: folders of identities, and a file of image names per experiment."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from gsalign.data.ag_reid import parse_name
from gsalign.data.layout import (
    Layout,
    Published,
    Singletons,
    assemble,
    folder_names,
    image_names,
    is_image_name,
    parsed,
    some_of,
)
from gsalign.data.records import ImageRecord, ReIDDataset, Split
from gsalign.errors import DataError

# The files of the experiments, by the names of the protocols they are here.
EXPERIMENTS = {
    "aerial-to-cctv": "exp1_aerial_to_cctv.txt",
    "aerial-to-wearable": "exp2_aerial_to_wearable.txt",
    "cctv-to-aerial": "exp4_cctv_to_aerial.txt",
    "wearable-to-aerial": "exp5_wearable_to_aerial.txt",
}

AG_REID_V2 = Layout(
    name="ag_reid_v2",
    title="AG-ReID.v2",
    folders=("train_all", "query", "gallery"),
    picture="""\
<root>/
  train_all/  <identity>/  *.jpg
  query/      <identity>/  *.jpg
  gallery/    <identity>/  *.jpg
  exp1_aerial_to_cctv.txt  exp2_aerial_to_wearable.txt
  exp4_cctv_to_aerial.txt  exp5_wearable_to_aerial.txt
the text files name the images of an experiment, one a line, as query/<identity>/<file> and
gallery/<identity>/<file>. Image names such as P0001T04271A0C0F0031.jpg: the digits of P, T and A
together are the identity; C0 is aerial, C2 wearable, C3 CCTV""",
    example="P0001T04271A0C0F0031.jpg",
    protocols=tuple(EXPERIMENTS),
    published=(
        Published("all", images=100_502),
        Published("train", identities=807),
        Published("test", identities=808),
    ),
)


def load_ag_reid_v2(
    root: str | os.PathLike[str], *, singletons: Singletons = "drop", max_bad_names: int = 10
) -> ReIDDataset:
    """Read the records of AG-ReID.v2 (Nguyen et al., TIFS 2024); no image is opened.

    Query and gallery are the images that any of the four experiments names; each experiment is a
    protocol that takes those on its list. Images on no list are counted as ignored.

    Args:
        root: the folder that holds ``train_all``, ``query``, ``gallery`` and the text files.
        singletons: see :func:`gsalign.data.load_cargo`.
        max_bad_names: likewise; a line that names an image that is not there counts as one, too.

    Raises:
        DataError: a text file is missing, or see :func:`gsalign.data.load_cargo`.
    """
    folder = Path(root)
    AG_REID_V2.require(folder)
    bad: list[str] = []
    lists: dict[str, list[str]] = {}
    for protocol, file in EXPERIMENTS.items():
        for name in _read_list(folder / file, bad):
            experiments = lists.setdefault(name, [])
            if protocol not in experiments:
                experiments.append(protocol)

    def parse(path: Path) -> ImageRecord | None:
        experiments = lists.pop(path.relative_to(folder).as_posix(), None)
        return None if experiments is None else replace(parse_name(path), lists=tuple(experiments))

    splits: dict[str, Split] = {}
    ignored: dict[str, int] = {}
    for split, place in (("train", "train_all"), ("query", "query"), ("gallery", "gallery")):
        paths = [
            folder / place / identity / file
            for identity in folder_names(folder / place)
            for file in image_names(folder / place / identity)
        ]
        before = len(bad)
        records = tuple(parsed(paths, parse_name if split == "train" else parse, folder, bad))
        splits[split] = Split(split, records)
        unlisted = len(paths) - len(records) - (len(bad) - before)
        if unlisted:
            ignored[split] = unlisted
    bad += [f"{name} (on a list, but not there)" for name in lists]
    notes = [
        f"{count} images of {split} are on the list of no experiment; left out"
        for split, count in ignored.items()
    ]
    return assemble(
        AG_REID_V2,
        folder,
        splits,
        bad=bad,
        max_bad_names=max_bad_names,
        singletons=singletons,
        notes=notes,
        ignored=ignored,
    )


def _read_list(path: Path, bad: list[str]) -> list[str]:
    """Names of the images of an experiment, relative to the root."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        raise DataError(
            f"data root {str(path.parent)!r} has no file {path.name}. Expected\n"
            f"{AG_REID_V2.picture}"
        ) from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is no text in UTF-8: {error}") from None
    names = []
    wrong = []
    for number, line in enumerate(lines, 1):
        name = line.strip().removeprefix("./").replace("\\", "/")
        parts = name.split("/")
        if not name:
            continue
        if parts[0] in ("query", "gallery") and ".." not in parts and is_image_name(parts[-1]):
            names.append(name)
        else:
            wrong.append(f"line {number} ({name[:60]})")
    if wrong and not names:
        raise DataError(
            f"{path} names no image: {some_of(wrong)}. Expected lines such as "
            "query/P0001T04271A0/P0001T04271A0C0F0031.jpg"
        )
    bad += [f"{path.name}, {fault}" for fault in wrong]
    return names
