"""Embedding map: query and gallery in two dimensions, by view and by identity."""

from __future__ import annotations

import os
from collections.abc import Mapping

import numpy as np
import torch
from matplotlib.axes import Axes
from numpy.typing import NDArray

from gsalign.data.records import AERIAL, GROUND, VIEW_NAMES
from gsalign.evaluation import Features
from gsalign.model import PartEmbeddings
from gsalign.visualize.projection import Method, Projection, project
from gsalign.visualize.style import (
    FAINT,
    INK,
    QUIET,
    SERIES,
    house_style,
    new_figure,
    save_figure,
)

IMAGES = 1000
_VIEW_COLOURS = {GROUND: SERIES[0], AERIAL: SERIES[3]}
_MARKERS = {GROUND: "o", AERIAL: "^"}
# The last colour of the series is the grey of everybody else.
_PEOPLE_COLOURS = SERIES[:-1]


def embedding_map(
    query: Features,
    gallery: Features,
    path: str | os.PathLike[str],
    *,
    method: Method | None = None,
    images: int = IMAGES,
    seed: int = 0,
    names: Mapping[int, str] | None = None,
    title: str = "",
) -> None:
    """Draw embeddings as points, once coloured by view and once some of the identities.

    Of a network with parts the vectors of :meth:`gsalign.model.PartEmbeddings.flat` are drawn.

    Args:
        query: embeddings of the images that ask.
        gallery: embeddings of those that are searched.
        path: PNG to write.
        method: see :func:`gsalign.visualize.projection.project`.
        images: how many points at most; see :func:`choose_images`.
        seed: of the choice and of t-SNE.
        names: of identities, where they are not the numbers.
        title: above the picture.

    Raises:
        ValueError: there are fewer than 3 images, ``images`` is less, or the method is unknown.
        MissingExtraError: t-SNE was asked for by name and scikit-learn is not installed.
    """
    if images < 3:
        raise ValueError(f"images is {images}; wanted at least 3")
    identities = np.concatenate([query.identities, gallery.identities])
    views = np.concatenate([query.views, gallery.views])
    asks = np.arange(len(identities)) < len(query)
    vectors = torch.cat([_vectors(query), _vectors(gallery)])
    chosen = choose_images(identities, views, images, seed=seed)
    projection = project(vectors[torch.from_numpy(chosen)], method=method, seed=seed)
    identities, views, asks = identities[chosen], views[chosen], asks[chosen]
    told = f"{len(chosen):,} query and gallery images"
    if len(chosen) < len(vectors):
        told = f"{len(chosen):,} of {len(vectors):,} query and gallery images, spread over people"

    with house_style():
        figure = new_figure(12, 6.3 + 0.4 * bool(title))
        left, right = figure.subplots(1, 2)
        _by_view(left, projection, views, asks)
        _by_identity(right, projection, identities, views, names or {})
        for axes in (left, right):
            _bare(axes, projection)
        figure.supxlabel(f"{told}; {projection.name}", fontsize=8.5, color=QUIET)
        if title:
            figure.suptitle(title, x=0.012, ha="left", fontsize=13, fontweight="bold")
        save_figure(figure, path)


def choose_images(
    identities: NDArray[np.int64], views: NDArray[np.int64], count: int, *, seed: int = 0
) -> NDArray[np.int64]:
    """Places of at most ``count`` images, spread over the identities and both views of each.

    One image of every identity and view is taken, then a second of each, and so on; where not all
    of a round fit, whole identities are drawn by lot.

    Args:
        identities: ``[N]``.
        views: ``[N]``.
        count: how many.
        seed: of the lots; the same seed chooses the same.

    Returns:
        Ascending int64 ``[min(count, N)]``.
    """
    generator = np.random.default_rng(seed)
    shuffled = generator.permutation(len(identities))
    people, numbers = np.unique(identities, return_inverse=True)
    lots = generator.permutation(len(people))[numbers]
    # How many of the same person and view come before each image in the shuffled order.
    rounds = np.empty(len(identities), np.int64)
    seen: dict[tuple[int, int], int] = {}
    for place in shuffled.tolist():
        group = (int(identities[place]), int(views[place]))
        rounds[place] = seen.setdefault(group, 0)
        seen[group] += 1
    order = np.lexsort((views, lots, rounds))
    return np.sort(order[:count]).astype(np.int64)


def choose_people(identities: NDArray[np.int64], views: NDArray[np.int64], count: int) -> list[int]:
    """The identities to colour: those with the most images in the view they have fewer in.

    Args:
        identities: ``[N]``; negative ones, of whom nobody knows who they are, are not chosen.
        views: ``[N]``.
        count: how many at most.

    Returns:
        Identities in ascending order.
    """
    people, numbers = np.unique(identities, return_inverse=True)
    by_view = np.stack([np.bincount(numbers, views == view, len(people)) for view in _MARKERS])
    fewer, all_of_them = by_view.min(axis=0), by_view.sum(axis=0)
    order = np.lexsort((people, -all_of_them, -fewer))
    known = [int(person) for person in people[order] if person >= 0]
    return sorted(known[:count])


def _vectors(features: Features) -> torch.Tensor:
    if features.visibility is None:
        return features.embeddings.cpu()
    return PartEmbeddings(features.embeddings, features.visibility).flat().cpu()


def _by_view(
    axes: Axes, projection: Projection, views: NDArray[np.int64], asks: NDArray[np.bool_]
) -> None:
    axes.set_title("By view")
    for view in _MARKERS:
        for queries in (False, True):
            own = (views == view) & (asks == queries)
            if own.any():
                axes.scatter(
                    *_columns(projection.points[own]), s=22, marker=_MARKERS[view],
                    color=_VIEW_COLOURS[view], alpha=0.85, linewidth=0.8,
                    edgecolor=INK if queries else "white",
                    label=f"{VIEW_NAMES[view]} {'query' if queries else 'gallery'}",
                )  # fmt: skip
    _legend(axes)


def _by_identity(
    axes: Axes,
    projection: Projection,
    identities: NDArray[np.int64],
    views: NDArray[np.int64],
    names: Mapping[int, str],
) -> None:
    people = choose_people(identities, views, len(_PEOPLE_COLOURS))
    axes.set_title(f"By identity, {len(people)} of {len(np.unique(identities))}")
    others = ~np.isin(identities, people)
    for view, marker in _MARKERS.items():
        points = projection.points[others & (views == view)]
        axes.scatter(*_columns(points), s=14, marker=marker, color=FAINT, edgecolor="none")
    for person, colour in zip(people, _PEOPLE_COLOURS, strict=False):
        for view, marker in _MARKERS.items():
            points = projection.points[(identities == person) & (views == view)]
            axes.scatter(
                *_columns(points),
                s=30,
                marker=marker,
                color=colour,
                edgecolor="white",
                linewidth=0.6,
            )
        axes.scatter(
            [], [], s=30, marker="s", color=colour, label=f"id {names.get(person, person)}"
        )
    _legend(axes)


def _columns(points: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    return points[:, 0], points[:, 1]


def _legend(axes: Axes) -> None:
    # Below the panel: a map has no corner that is sure to be empty.
    axes.legend(
        loc="upper center", bbox_to_anchor=(0.5, -0.035), ncols=7, frameon=False, fontsize=8.5,
        handletextpad=0.2, columnspacing=1.2,
    )  # fmt: skip


def _bare(axes: Axes, projection: Projection) -> None:
    """Only components have directions that mean something; nothing here has a unit."""
    axes.set_xticks([])
    axes.set_yticks([])
    axes.grid(False)
    axes.set_aspect("equal", adjustable="datalim")
    axes.margins(0.05)
    for spine in axes.spines.values():
        spine.set_visible(True)
        spine.set_color(FAINT)
    if projection.axes:
        axes.set_xlabel(projection.axes[0], fontsize=8.5)
        axes.set_ylabel(projection.axes[1], fontsize=8.5)
