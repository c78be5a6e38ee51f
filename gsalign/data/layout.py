"""What the readers of all data sets share: the layout of a set, and the checks on what was read."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from gsalign.data.records import (
    AERIAL,
    GROUND,
    VIEW_PROTOCOLS,
    ImageRecord,
    ReIDDataset,
    Split,
)
from gsalign.errors import DataError

logger = logging.getLogger(__name__)

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png")
SPLITS = ("train", "query", "gallery")
_NAMED_AT_MOST = 5

Singletons = Literal["drop", "keep", "error"]


@dataclass(frozen=True)
class Published:
    """Counts that the makers of a data set published, to compare a copy with.

    Attributes:
        subset: ``train``, ``query``, ``gallery``, ``test`` (the last two) or ``all``.
        images: number of images; None if it is not published.
        identities: number of identities; None likewise.
        view: only images of this view; None: all.
        known: other numbers of images that copies are known to have, and why.
    """

    subset: str
    images: int | None = None
    identities: int | None = None
    view: int | None = None
    known: Mapping[int, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Layout:
    """How a data set lies on disk.

    Attributes:
        name: of the set in configurations and tables.
        title: of the set in prose.
        folders: those that must be there.
        picture: the layout as text, for error messages and documents.
        example: a file name.
        hint: how to come by such a folder; may have ``{root}`` in it.
        protocols: names of those it is evaluated by.
        published: counts to compare a copy with.
    """

    name: str
    title: str
    folders: tuple[str, ...]
    picture: str
    example: str
    hint: str = ""
    protocols: tuple[str, ...] = VIEW_PROTOCOLS
    published: tuple[Published, ...] = ()

    def fits(self, root: Path) -> bool:
        """Whether all folders of the layout are there."""
        return all((root / name).is_dir() for name in self.folders)

    def require(self, root: Path) -> None:
        """Make sure that all folders of the layout are there.

        Raises:
            DataError: the root or some folders are missing; the message shows what is expected.
        """
        missing = [name for name in self.folders if not (root / name).is_dir()]
        if not missing:
            return
        what = (
            f"data root {str(root)!r} does not exist"
            if not root.exists()
            else f"data root {str(root)!r} has no folder {', '.join(missing)}"
        )
        hint = f"\n{self.hint.format(root=root)}" if self.hint else ""
        raise DataError(f"{what}. Expected\n{self.picture}{hint}")


Parser = Callable[[Path], "ImageRecord | None"]


def image_names(folder: Path) -> list[str]:
    """Names of the image files in a folder, sorted; hidden and other files are passed over."""
    with os.scandir(folder) as entries:
        names = [entry.name for entry in entries if is_image_name(entry.name) and entry.is_file()]
    return sorted(names)


def folder_names(folder: Path) -> list[str]:
    """Names of the folders in a folder, sorted, hidden ones passed over."""
    with os.scandir(folder) as entries:
        return sorted(e.name for e in entries if not e.name.startswith(".") and e.is_dir())


def is_image_name(name: str) -> bool:
    """Whether a file of this name is taken for an image."""
    return not name.startswith(".") and name.lower().endswith(IMAGE_SUFFIXES)


def parsed(
    paths: Sequence[Path], parse: Parser, root: Path, bad: list[str]
) -> Iterator[ImageRecord]:
    """Yield the records of files.

    Args:
        paths: the files.
        parse: makes the record of a file; None leaves it out without a word, ``ValueError`` with.
        root: names in ``bad`` are told from here.
        bad: gets a line for every name that does not parse.
    """
    for path in paths:
        try:
            record = parse(path)
        except ValueError as error:
            bad.append(f"{path.relative_to(root).as_posix()} ({error})")
            continue
        if record is not None:
            yield record


def assemble(
    layout: Layout,
    root: Path,
    splits: Mapping[str, Split],
    *,
    bad: Sequence[str] = (),
    max_bad_names: int = 10,
    singletons: Singletons = "drop",
    notes: Sequence[str] = (),
    protocols: tuple[str, ...] | None = None,
    ignored: Mapping[str, int] | None = None,
) -> ReIDDataset:
    """Check what was read and make the data set of it; what there is to say is logged, too.

    Args:
        layout: of the set.
        root: the folder it was read from.
        splits: the images, by ``train``, ``query`` and ``gallery``.
        bad: a line for every image left out because of its name.
        max_bad_names: so many of them are allowed.
        singletons: what to do with identities that have one training image, see ``load_cargo``.
        notes: what the reader has to say itself.
        protocols: those of the layout if None.
        ignored: see :class:`ReIDDataset`.

    Raises:
        DataError: too many names do not parse, a split is empty, or see ``treat_singletons``.
    """
    told: list[str] = []
    if bad:
        summary = f"{len(bad)} image name(s) in {root} could not be used: {some_of(bad)}"
        if len(bad) > max_bad_names:
            raise DataError(
                f"{summary}; at most {max_bad_names} are allowed (max_bad_names). "
                f"Expected names such as {layout.example}"
            )
        told.append(f"{summary}; left out")
    told.extend(notes)
    for name, split in splits.items():
        if not split.records:
            place = root / name if (root / name).is_dir() else f"split {name} of {root}"
            raise DataError(f"no images in {place}. Expected\n{layout.picture}")
    train, note = treat_singletons(splits["train"], singletons)
    if note:
        told.append(note)
    shared = set(train.identities.tolist()) & set(splits["query"].identities.tolist())
    if shared:
        names = {record.identity: record.identity_name for record in train.records}
        some = some_of([names[identity] for identity in sorted(shared)])
        told.append(
            f"{len(shared)} identities of the query are in the training set too ({some}): "
            "results on this data set do not measure unseen people"
        )
    for note in told:
        logger.warning(note)
    return ReIDDataset(
        name=layout.name,
        root=root,
        train=train,
        query=splits["query"],
        gallery=splits["gallery"],
        notes=tuple(told),
        protocols=layout.protocols if protocols is None else protocols,
        ignored=dict(ignored or {}),
        bad_names=len(bad),
    )


def treat_singletons(train: Split, policy: Singletons) -> tuple[Split, str]:
    """Leave out the identities with one training image, or not.

    Returns:
        The images to train on, and what there is to say about the others; empty if nothing.

    Raises:
        DataError: the policy is unknown, is ``"error"`` and there are some, or nothing is left.
    """
    if policy not in ("drop", "keep", "error"):
        raise DataError(f"singletons is {policy!r}; it must be 'drop', 'keep' or 'error'")
    counts = Counter(train.identities.tolist())
    single = {identity for identity, count in counts.items() if count == 1}
    if not single or policy == "keep":
        return train, ""
    names = [
        r.identity_name
        for r in sorted(train.records, key=lambda r: r.identity)
        if r.identity in single
    ]
    what = (
        f"{len(single)} training identities have only one image and form no pair ({some_of(names)})"
    )
    if policy == "error":
        raise DataError(f"{what}; add images, or set singletons to 'drop' or 'keep'")
    if len(single) == len(counts):
        raise DataError(f"{what}: nothing is left to train on; add images, or keep them")
    kept = train.select(lambda record: record.identity not in single)
    return kept, f"{what}; left out (singletons: 'keep' trains on them)"


def protocols_of(query: Split, gallery: Split) -> tuple[str, ...]:
    """The protocols by view where the test has both views, else only ``all``."""
    views = {*query.views.tolist(), *gallery.views.tolist()}
    return VIEW_PROTOCOLS if views == {AERIAL, GROUND} else ("all",)


def some_of(names: Sequence[str]) -> str:
    """The first few of some names, sorted, and how many more there are."""
    listed = ", ".join(sorted(names)[:_NAMED_AT_MOST])
    more = len(names) - _NAMED_AT_MOST
    return f"{listed} and {more} more" if more > 0 else listed
