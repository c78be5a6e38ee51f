"""Reading Market-1501: flat folders of images such as ``0002_c1s1_000451_03.jpg``."""

from __future__ import annotations

import os
import re
from pathlib import Path

from gsalign.data.layout import Layout, Published, Singletons, assemble, image_names, parsed
from gsalign.data.records import GROUND, ImageRecord, ReIDDataset, Split

NUM_CAMERAS = 6
JUNK = -1

_NAME = re.compile(r"(-1|\d{4})_c(\d)s(\d)_(\d+)_(\d+)\.[A-Za-z.]+", re.ASCII)
_FOLDERS = {"train": "bounding_box_train", "query": "query", "gallery": "bounding_box_test"}

MARKET_1501 = Layout(
    name="market1501",
    title="Market-1501",
    folders=tuple(_FOLDERS.values()),
    picture="""\
<root>/ (Market-1501-v15.09.15)
  bounding_box_train/  *.jpg
  query/               *.jpg
  bounding_box_test/   *.jpg
names such as 0002_c1s1_000451_03.jpg: identity, camera (1-6) and sequence, frame, number of the
box; identity 0000 are distractors, -1 is junk that no ranking counts""",
    example="0002_c1s1_000451_03.jpg",
    protocols=("all",),
    published=(
        Published("train", images=12_936, identities=751),
        Published("query", images=3368, identities=750),
        # Of them 3,819 junk; the distractors count as one more identity.
        Published("gallery", images=19_732, identities=751),
    ),
)


def parse_name(path: Path) -> ImageRecord:
    """Read identity, camera and frame from a file name of Market-1501.

    Args:
        path: the file, named as ``0002_c1s1_000451_03.jpg``.

    Returns:
        The record; junk has identity -1, distractors 0.

    Raises:
        ValueError: the name has another form, or a camera outside 1 .. 6.
    """
    match = _NAME.fullmatch(path.name)
    if match is None:
        raise ValueError("not of the form 0002_c1s1_000451_03.jpg")
    camera = int(match[2])
    if not 1 <= camera <= NUM_CAMERAS:
        raise ValueError(f"camera {camera} is not in 1..{NUM_CAMERAS}")
    identity = int(match[1])
    return ImageRecord(
        path=path,
        identity=identity,
        camera=camera,
        view=GROUND,
        index=int(match[4]),
        identity_text="" if identity == JUNK else match[1],
    )


def load_market1501(
    root: str | os.PathLike[str], *, singletons: Singletons = "drop", max_bad_names: int = 10
) -> ReIDDataset:
    """Read the records of Market-1501 (Zheng et al., ICCV 2015); no image is opened.

    Junk (identity -1) of the gallery is left out and counted as ignored; distractors (identity 0)
    stay. Every image is a ground one and the only protocol is ``all``.

    Args:
        root: the folder that holds ``bounding_box_train``, ``query`` and ``bounding_box_test``.
        singletons: see :func:`gsalign.data.load_cargo`.
        max_bad_names: likewise; junk and distractors outside the gallery count as such, too.

    Raises:
        DataError: see :func:`gsalign.data.load_cargo`.
    """
    folder = Path(root)
    MARKET_1501.require(folder)
    bad: list[str] = []
    junk = 0

    def in_gallery(path: Path) -> ImageRecord | None:
        nonlocal junk
        record = parse_name(path)
        junk += record.identity == JUNK
        return None if record.identity == JUNK else record

    def elsewhere(path: Path) -> ImageRecord:
        record = parse_name(path)
        if record.identity < 1:
            raise ValueError("junk or a distractor outside bounding_box_test")
        return record

    splits: dict[str, Split] = {}
    for split, place in _FOLDERS.items():
        paths = [folder / place / file for file in image_names(folder / place)]
        parse = in_gallery if split == "gallery" else elsewhere
        splits[split] = Split(split, tuple(parsed(paths, parse, folder, bad)))
    return assemble(
        MARKET_1501,
        folder,
        splits,
        bad=bad,
        max_bad_names=max_bad_names,
        singletons=singletons,
        ignored={"gallery": junk} if junk else {},
    )
