"""An evaluation in plain Python loops, written from the definitions, to compare others with."""

from __future__ import annotations


def score_query(distances, identity, camera, gallery_identities, gallery_cameras):
    """Return (positives, first rank, AP, INP) of one query; (0, 0, None, None) without positives.

    Every rank is found by counting, image by image, what comes before.
    """
    kept = [
        (distance, place)
        for place, distance in enumerate(distances)
        if not (gallery_identities[place] == identity and gallery_cameras[place] == camera)
    ]
    ranks = []
    for distance, place in kept:
        if gallery_identities[place] != identity:
            continue
        before = 0
        for other_distance, other_place in kept:
            if other_distance < distance:
                before += 1
            elif other_distance == distance and other_place < place:
                before += 1
        ranks.append(before + 1)
    if not ranks:
        return 0, 0, None, None
    ranks.sort()
    precision = 0.0
    for hits, rank in enumerate(ranks, start=1):
        precision += hits / rank
    return len(ranks), ranks[0], precision / len(ranks), len(ranks) / ranks[-1]
