"""The pictures by name; imports nothing heavy, for the command line's help."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from gsalign.errors import ConfigError

PICTURES = {
    "training_curves": "losses, retrieval, LTPS angles, learning rate over the iterations",
    "cmc_curves": "share of queries answered within 1 to 20 images, by protocol; mAP",
    "rank_lists": "first answers to some queries, right and wrong marked",
    "embedding_map": "embeddings in two dimensions, by view and by identity",
    "alignment": "images before and after they are turned and cut out",
    "attention": "roll-out of the attention of class and view token over images",
    "ltps_grids": "where each layer's warp reads, and the images read like that",
    "part_masks": "what each part covers, how visible it is",
    "contact_sheet": "images of a generated data set",
}
"""Name of a picture, and of its file without ``.png``, to what it shows."""

OF_SEVERAL_RUNS = ("training_curves", "cmc_curves")
OF_OWN_IMAGES = ("alignment", "attention", "ltps_grids", "part_masks")
MOST_IMAGES = 24
"""More columns than these nobody can look at."""


def choose_pictures(
    only: Sequence[str], *, several: bool = False, own_images: bool = False
) -> tuple[str, ...]:
    """The names of the pictures to draw, in the order of :data:`PICTURES`.

    Args:
        only: the names asked for; all that can be drawn if empty.
        several: of several runs beside one another.
        own_images: of images that belong to no data set.

    Raises:
        ConfigError: a name is unknown, or that picture is not drawn of these.
    """
    possible: Collection[str] = PICTURES
    what = ""
    if several:
        possible, what = OF_SEVERAL_RUNS, "of several runs "
    elif own_images:
        possible, what = OF_OWN_IMAGES, "of --images "
    for name in only:
        if name not in PICTURES:
            raise ConfigError(f"--only is {name!r}; there are {', '.join(PICTURES)}")
        if name not in possible:
            raise ConfigError(
                f"--only is {name!r}, which is not drawn {what}but of one run and its data set; "
                f"{what}there are {', '.join(possible)}"
            )
    return tuple(name for name in PICTURES if name in (only or possible))
