"""k-reciprocal re-ranking written from the paper with whole matrices, to compare others with."""

from __future__ import annotations

import numpy as np


def reciprocal(order, image, k):
    """The k-reciprocal neighbours of an image: its k nearest that have it among theirs."""
    near = order[image, : k + 1]
    return near[(order[near, : k + 1] == image).any(axis=1)]


def rerank_dense(query, gallery, k1, k2, weight):
    """Re-ranked distances ``[Q, G]`` in the embeddings' type, which are compared by 1 - cosine."""
    points = np.concatenate([query, gallery])
    points = points / np.linalg.norm(points, axis=1, keepdims=True)
    distances = 1 - points @ points.T
    distances /= distances.max(axis=1, keepdims=True)
    order = np.argsort(distances, axis=1, kind="stable")
    weights = np.zeros_like(distances)
    for i in range(len(points)):
        near = reciprocal(order, i, k1)
        members = near
        for j in near:
            theirs = reciprocal(order, j, round(k1 / 2))
            if len(np.intersect1d(theirs, near)) > 2 / 3 * len(theirs):
                members = np.union1d(members, theirs)
        closeness = np.exp(-distances[i, members])
        weights[i, members] = closeness / closeness.sum()
    if k2 > 1:
        weights = np.stack([weights[near].mean(axis=0) for near in order[:, :k2]])
    gallery_weights = weights[len(query) :]
    having = [np.flatnonzero(column) for column in gallery_weights.T]
    result = np.empty((len(query), len(gallery)), dtype=distances.dtype)
    for i in range(len(query)):
        common = np.zeros(len(gallery), dtype=distances.dtype)
        for j in np.flatnonzero(weights[i]):
            common[having[j]] += np.minimum(weights[i, j], gallery_weights[having[j], j])
        jaccard = 1 - common / (2 - common)
        result[i] = (1 - weight) * jaccard + weight * distances[i, len(query) :]
    return result
