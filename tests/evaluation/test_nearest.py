from __future__ import annotations

import numpy as np
import pytest
import torch

from gsalign.evaluation import nearest


@pytest.mark.parametrize("values", [1, 2, 7, 10_000])
@pytest.mark.parametrize("k", [1, 5, 39, 40, 100])
def test_the_nearest_are_the_first_of_a_stable_sort(values, k):
    random = np.random.default_rng(values)
    distances = (random.integers(0, values, (30, 40)) / 8.0).astype(np.float32)
    found, places = nearest(torch.from_numpy(distances), k)
    order = np.argsort(distances, axis=1, kind="stable")[:, :k]
    np.testing.assert_array_equal(places.numpy(), order)
    np.testing.assert_array_equal(found.numpy(), np.take_along_axis(distances, order, axis=1))


def test_nothing_to_find():
    for shape, k in (((3, 0), 5), ((0, 4), 2), ((3, 4), 0)):
        found, places = nearest(torch.zeros(shape), k)
        assert found.shape == places.shape == (shape[0], min(k, shape[1]))
        assert places.dtype == torch.int64
