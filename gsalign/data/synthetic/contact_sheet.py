"""A picture of a generated set: one row per identity, one column per camera."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from gsalign.data.synthetic.truth import TruthRow, read_truth
from gsalign.errors import DataError
from gsalign.files import atomic_write

_GAP = 4


def contact_sheet(
    root: str | Path, path: str | Path, identities: int = 10, *, cameras: int = 12
) -> None:
    """Write a PNG of people seen by the cameras of a generated set.

    Rows are identities, columns are cameras 1, 2, ...: aerial first. Where a camera has no image
    of a person, another image of the same view stands in, and the cell stays white if none is
    left. Test identities come first, since train and test look alike.

    Args:
        root: folder of the set.
        path: PNG to write.
        identities: rows.
        cameras: columns, at most 13.

    Raises:
        DataError: ``root`` is not a generated set or has no image.
    """
    rows = read_truth(root)
    if not rows:
        raise DataError(f"root {root} lists no image in its truth table; generate the set again")
    by_identity: dict[int, list[TruthRow]] = {}
    for row in sorted(rows, key=lambda r: r.path.startswith("train/")):
        by_identity.setdefault(row.identity, []).append(row)
    chosen = list(by_identity)[:identities]
    with Image.open(Path(root) / rows[0].path) as first:
        width, height = first.size
    sheet = Image.new(
        "RGB",
        (cameras * (width + _GAP) - _GAP, len(chosen) * (height + _GAP) - _GAP),
        (255, 255, 255),
    )
    for line, identity in enumerate(chosen):
        left = list(by_identity[identity])
        for column in range(cameras):
            camera = column + 1
            view = int(camera <= 5)
            candidates = [r for r in left if r.camera == camera] or [
                r for r in left if r.view == view
            ]
            if not candidates:
                continue
            left.remove(candidates[0])
            with Image.open(Path(root) / candidates[0].path) as picture:
                cell = (column * (width + _GAP), line * (height + _GAP))
                sheet.paste(picture.convert("RGB"), cell)
    with atomic_write(Path(path)) as temporary:
        sheet.save(temporary, format="PNG")
