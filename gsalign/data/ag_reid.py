"""Reading AG-ReID: flat folders of images such as ``P0006T02140A0C0F1831.jpg``."""

from __future__ import annotations

import os
import re
from pathlib import Path

from gsalign.data.layout import Layout, Published, Singletons, assemble, image_names, parsed
from gsalign.data.records import AERIAL, GROUND, ImageRecord, ReIDDataset, Split

# Of AG-ReID and AG-ReID.v2; the first has no wearable camera.
CAMERA_VIEWS = {0: AERIAL, 2: GROUND, 3: GROUND}

_NAME = re.compile(r"P(\d+)T(\d+)A(\d+)C(\d+)F(\d+)\.[A-Za-z]+", re.ASCII)
_DIGITS = 18  # of an identity, so that it fits into 64 bits

AG_REID = Layout(
    name="ag_reid",
    title="AG-ReID",
    folders=(
        "bounding_box_train",
        "query_all_c0",
        "bounding_box_test_all_c3",
        "query_all_c3",
        "bounding_box_test_all_c0",
    ),
    picture="""\
<root>/
  bounding_box_train/         *.jpg
  query_all_c0/               *.jpg   aerial queries ...
  bounding_box_test_all_c3/   *.jpg   ... and the ground gallery they ask
  query_all_c3/               *.jpg   ground queries ...
  bounding_box_test_all_c0/   *.jpg   ... and the aerial gallery they ask
names such as P0006T02140A0C0F1831.jpg: the digits of P, T and A together are the identity, C0 is
the aerial camera, C3 the ground camera, F the frame""",
    example="P0006T02140A0C0F1831.jpg",
    protocols=("aerial-to-ground", "ground-to-aerial"),
    published=(
        Published("train", identities=199),
        Published("test", identities=189),
        Published("query", images=1701, view=AERIAL),
        Published(
            "gallery",
            images=3331,
            view=GROUND,
            known={3225: "a later release of the set, as its users count it"},
        ),
        Published("query", images=962, view=GROUND),
        Published("gallery", images=7204, view=AERIAL),
    ),
)


def parse_name(path: Path) -> ImageRecord:
    """Read identity, camera and frame from a file name of AG-ReID or AG-ReID.v2.

    Args:
        path: the file, named as ``P0006T02140A0C0F1831.jpg``.

    Returns:
        The record; its identity are the digits of P, T and A together, ten of them, and
        ``identity_text`` has the leading zeros.

    Raises:
        ValueError: the name has another form, or the camera is none of 0, 2 and 3.
    """
    match = _NAME.fullmatch(path.name)
    if match is None:
        raise ValueError("not of the form P0006T02140A0C0F1831.jpg")
    digits = match[1] + match[2] + match[3]
    if len(digits) > _DIGITS:
        raise ValueError(f"identity {digits} has more than {_DIGITS} digits")
    camera = int(match[4])
    if camera not in CAMERA_VIEWS:
        raise ValueError(f"camera {camera} is none of {', '.join(map(str, CAMERA_VIEWS))}")
    return ImageRecord(
        path=path,
        identity=int(digits),
        camera=camera,
        view=CAMERA_VIEWS[camera],
        index=int(match[5]),
        identity_text=digits,
    )


def load_ag_reid(
    root: str | os.PathLike[str], *, singletons: Singletons = "drop", max_bad_names: int = 10
) -> ReIDDataset:
    """Read the records of AG-ReID (Nguyen et al., ICME 2023); no image is opened.

    The queries and the galleries of both directions are one query and one gallery here; the
    protocols ``aerial-to-ground`` and ``ground-to-aerial`` take them apart by view. The file of
    attributes is not needed.

    Args:
        root: the folder that holds ``bounding_box_train`` and the other four.
        singletons: see :func:`gsalign.data.load_cargo`.
        max_bad_names: likewise; an image in a folder of the other camera counts as one, too.

    Raises:
        DataError: see :func:`gsalign.data.load_cargo`.
    """
    folder = Path(root)
    AG_REID.require(folder)
    bad: list[str] = []

    def read(name: str) -> list[ImageRecord]:
        paths = [folder / name / file for file in image_names(folder / name)]
        wanted = int(name[-1]) if name[-2:] in ("c0", "c3") else None

        def parse(path: Path) -> ImageRecord:
            record = parse_name(path)
            if wanted is not None and record.camera != wanted:
                raise ValueError(f"camera {record.camera} in folder {name}")
            return record

        return list(parsed(paths, parse, folder, bad))

    splits = {
        "train": Split("train", tuple(read("bounding_box_train"))),
        "query": Split("query", (*read("query_all_c0"), *read("query_all_c3"))),
        "gallery": Split(
            "gallery", (*read("bounding_box_test_all_c0"), *read("bounding_box_test_all_c3"))
        ),
    }
    return assemble(
        AG_REID, folder, splits, bad=bad, max_bad_names=max_bad_names, singletons=singletons
    )
