from __future__ import annotations

from dataclasses import replace

from gsalign.data import GROUND, compare_with_published, load_cargo
from gsalign.data.cargo import CARGO
from gsalign.data.layout import Published


def check(cargo, *published, ignored=None):
    dataset = replace(load_cargo(cargo), ignored=ignored or {})
    return compare_with_published(dataset, replace(CARGO, published=published))


def test_equal_counts_are_only_counted(cargo):
    found = check(
        cargo,
        Published("train", images=40, identities=8),
        Published("gallery", images=9, identities=3, view=GROUND),
        Published("test", images=21, identities=3),
        Published("all", identities=11),
    )
    assert (found.compared, found.differences, found.known) == (7, (), ())


def test_differences_are_named_by_subset(cargo):
    found = check(
        cargo,
        Published("query", images=1234, identities=3),
        Published("gallery", images=8, identities=2, view=GROUND),
    )
    assert found.differences == (
        "query: 6 images, published 1,234 (-1,228)",
        "gallery (ground): 9 images, published 8 (+1); 3 identities, published 2 (+1)",
    )


def test_known_differences_are_excused(cargo):
    found = check(cargo, Published("query", images=7, known={6: "a later release"}))
    assert found.differences == ()
    assert found.known == ("query: 6 images, published 7 (-1): a later release",)
    # Only the known number is; and not when the identities differ as well.
    assert check(cargo, Published("query", images=7, known={5: "?"})).differences
    assert check(cargo, Published("query", 7, 9, known={6: "a later release"})).differences


def test_ignored_images_count_where_no_view_is_asked(cargo):
    ignored = {"gallery": 5}
    assert not check(cargo, Published("gallery", images=20), ignored=ignored).differences
    assert not check(cargo, Published("all", images=66), ignored=ignored).differences
    assert not check(
        cargo, Published("gallery", images=9, view=GROUND), ignored=ignored
    ).differences
