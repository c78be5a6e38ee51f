"""Numbers for identities and cameras that their owner names by texts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

_LARGEST = 2**63 - 1


def number_names(names: Iterable[str]) -> Mapping[str, int]:
    """Give every name a number, the same for the same set of names.

    Args:
        names: identities or cameras; repetitions do no harm.

    Returns:
        Each name's own number where all of them are whole numbers from 0 that fit into 64 bits,
        written without leading zeros; otherwise 0, 1, 2 ... in the order of the sorted names.
    """
    different = sorted(set(names))
    if all(map(_is_number, different)):
        return {name: int(name) for name in different}
    return {name: number for number, name in enumerate(different)}


def text_of(name: str, number: int) -> str:
    """The name, for a record, where it says more than its number; else an empty text."""
    return "" if name == str(number) else name


def unknown_camera(number: int) -> int:
    """The camera of an image whose camera is not known: one that no other image of the set has.

    So an image is never left out of a ranking for having been taken by the query's camera, unless
    it is the query itself.

    Args:
        number: of the image in the whole set, from 0.
    """
    return -1 - number


def _is_number(name: str) -> bool:
    return name.isascii() and name.isdigit() and str(int(name)) == name and int(name) <= _LARGEST
