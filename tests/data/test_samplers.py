from __future__ import annotations

from collections import Counter
from itertools import islice

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gsalign.data import IdentityBatchSampler, IterationBatchSampler, SequentialBatchSampler
from gsalign.data.samplers import _number_of_batches
from gsalign.errors import ConfigError


def labels_of(counts: list[int]) -> np.ndarray:
    """Labels with so many images each, mixed up."""
    labels = np.repeat(np.arange(len(counts)) * 7 + 3, counts)
    return np.random.default_rng(0).permutation(labels)


@settings(deadline=None, max_examples=60)
@given(
    counts=st.lists(st.integers(1, 30), min_size=4, max_size=25),
    p=st.integers(1, 4),
    k=st.integers(1, 5),
    seed=st.integers(0, 5),
)
def test_every_batch_is_p_identities_times_k_images(counts, p, k, seed):
    labels = labels_of(counts)
    sampler = IdentityBatchSampler(labels, identities_per_batch=p, images_per_identity=k, seed=seed)
    batches = list(sampler)
    assert len(batches) == len(sampler)
    groups = Counter()
    positions = []
    for batch in batches:
        identities = labels[[draw.image for draw in batch]].reshape(p, k)
        assert (identities == identities[:, :1]).all()
        assert len(set(identities[:, 0].tolist())) == p
        groups.update(identities[:, 0].tolist())
        positions += [draw.position for draw in batch]
    assert positions == list(range(len(batches) * p * k))
    # No image comes twice, unless its identity has fewer than K.
    times = Counter(draw.image for batch in batches for draw in batch)
    sizes = Counter(labels.tolist())
    assert all(count == 1 for image, count in times.items() if sizes[labels[image]] >= k)
    assert all(groups[label] <= max(1, size // k) for label, size in sizes.items())


@settings(deadline=None, max_examples=100)
@given(
    groups=st.lists(st.integers(1, 6), min_size=2, max_size=6),
    p=st.integers(1, 3),
)
def test_an_epoch_is_as_long_as_it_can_be(groups, p):
    p = min(p, len(groups))

    def longest(left: tuple[int, ...]) -> int:
        # Taking the largest first is optimal for filling batches of different identities.
        count = 0
        rest = sorted(left, reverse=True)
        while rest[p - 1] > 0:
            rest = sorted([*(value - 1 for value in rest[:p]), *rest[p:]], reverse=True)
            count += 1
        return count

    assert _number_of_batches(np.array(groups), p) == longest(tuple(groups))


def test_when_everything_divides_an_epoch_is_every_image_once():
    labels = labels_of([8, 4, 12, 8, 4, 12])
    sampler = IdentityBatchSampler(labels, identities_per_batch=3, images_per_identity=4)
    for epoch in range(3):
        sampler.set_epoch(epoch)
        images = sorted(draw.image for batch in sampler for draw in batch)
        assert images == list(range(48))


def test_rare_identities_are_drawn_with_replacement():
    labels = np.array([0] * 8 + [1] * 2)
    sampler = IdentityBatchSampler(labels, identities_per_batch=2, images_per_identity=4)
    seen = set()
    for epoch in range(12):
        sampler.set_epoch(epoch)
        (batch,) = sampler
        rare = [draw.image for draw in batch if labels[draw.image] == 1]
        assert len(rare) == 4
        seen.add(tuple(sorted(rare)))
    # Copies are drawn, not dealt: some batches are lopsided.
    assert len(seen) > 1


def test_the_order_depends_on_seed_and_epoch_alone():
    labels = labels_of([9] * 12)

    def batches(seed, epoch):
        sampler = IdentityBatchSampler(
            labels, identities_per_batch=4, images_per_identity=3, seed=seed
        )
        sampler.set_epoch(epoch)
        return list(sampler)

    assert batches(1, 2) == batches(1, 2)
    assert batches(1, 2) != batches(1, 3)
    assert batches(1, 2) != batches(2, 2)
    assert {draw.epoch for batch in batches(1, 2) for draw in batch} == {2}


def test_all_parts_of_an_epoch_look_alike():
    # One identity has half of the images; it must not all come at the end or at the start.
    labels = labels_of([400] + [20] * 20)
    sampler = IdentityBatchSampler(labels, identities_per_batch=4, images_per_identity=4)
    present = [any(labels[draw.image] == labels_of([1])[0] for draw in batch) for batch in sampler]
    half = len(present) // 2
    assert abs(sum(present[:half]) - sum(present[half:])) <= 0.35 * half


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_ranks_share_the_batches_of_one_process_without_overlap(world_size):
    labels = labels_of([3, 5, 8, 2, 9, 12, 4, 4, 7, 1])
    options = {"identities_per_batch": 4, "images_per_identity": 2, "seed": 5}
    whole = list(IdentityBatchSampler(labels, **options))
    parts = [
        list(IdentityBatchSampler(labels, **options, rank=rank, world_size=world_size))
        for rank in range(world_size)
    ]
    for number, batch in enumerate(whole):
        joined = [draw for part in parts for draw in part[number]]
        assert joined == batch
        assert {len(part[number]) for part in parts} == {8 // world_size}


def test_iterations_run_through_epochs_and_resume():
    labels = labels_of([6] * 8)
    sampler = IdentityBatchSampler(labels, identities_per_batch=4, images_per_identity=3, seed=2)
    assert len(sampler) == 4
    by_epoch = []
    for epoch in range(3):
        sampler.set_epoch(epoch)
        by_epoch += list(sampler)
    stretch = IterationBatchSampler(sampler, 0, 11)
    assert len(stretch) == 11
    assert list(stretch) == by_epoch[:11]
    assert list(IterationBatchSampler(sampler, 6, 11)) == by_epoch[6:11]
    assert list(IterationBatchSampler(sampler, 3, 3)) == []
    assert list(islice(sampler.between(5), 7)) == by_epoch[5:12]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"identities_per_batch": 5}, "there are only 4 identities"),
        ({"identities_per_batch": 3, "world_size": 2}, "use a multiple of 2"),
        ({"identities_per_batch": 0}, "identities_per_batch is 0"),
        ({"identities_per_batch": 2, "images_per_identity": 0}, "images_per_identity is 0"),
        ({"identities_per_batch": 2, "rank": 1}, "rank is 1"),
        ({"identities_per_batch": 2, "seed": -1}, "seed is -1"),
    ],
)
def test_settings_that_cannot_work_are_named(options, message):
    with pytest.raises(ConfigError, match=message):
        IdentityBatchSampler(labels_of([3, 3, 3, 3]), **options)


def test_wrong_epochs_and_iterations_are_named():
    sampler = IdentityBatchSampler(labels_of([3, 3]), identities_per_batch=2)
    with pytest.raises(ConfigError, match="epoch is -1"):
        sampler.set_epoch(-1)
    with pytest.raises(ConfigError, match=r"iterations 5\.\.4"):
        IterationBatchSampler(sampler, 5, 4)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_evaluation_sees_every_image_once(world_size):
    seen = []
    for rank in range(world_size):
        sampler = SequentialBatchSampler(10, 4, rank=rank, world_size=world_size)
        batches = list(sampler)
        assert len(batches) == len(sampler)
        assert all(len(batch) <= 4 for batch in batches)
        seen += [image for batch in batches for image in batch]
    assert seen == list(range(10))
    with pytest.raises(ConfigError, match="batch_size is 0"):
        SequentialBatchSampler(10, 0)
