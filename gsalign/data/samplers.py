"""Which images make a training batch: P identities times K images, the same on every run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from torch.utils.data import Sampler

from gsalign.errors import ConfigError


class Draw(NamedTuple):
    """One image drawn for training.

    The epoch travels with the index, so that workers that outlive an epoch need not be told about
    the next one, and so does the position, so that an image drawn twice is augmented twice.

    Attributes:
        image: its place in the split.
        epoch: counted from 0.
        position: of the draw in the epoch, over all ranks, counted from 0.
    """

    image: int
    epoch: int
    position: int


class IdentityBatchSampler(Sampler[list[Draw]]):
    """Batches of P identities times K images each, one epoch per iteration.

    In every epoch the images of each identity are shuffled and cut into groups of K; what is left
    over waits for another epoch, and an identity with fewer than K images gives one group drawn
    with replacement. A batch takes the groups of P different identities, each identity with a
    chance proportional to the groups it still has; so all parts of an epoch look alike and its
    length is known beforehand. Views and cameras are not balanced. Published training uses
    32 x 4 over all GPUs.

    The order depends on the seed and the epoch only. With several ranks the identities of each
    batch are dealt out, so the ranks' batches do not overlap and together are the batch that one
    process would have seen.

    Args:
        labels: identity of every image, any integers ``[N]``.
        identities_per_batch: P, over all ranks together.
        images_per_identity: K.
        seed: of the order.
        rank: of this process, from 0.
        world_size: number of processes.

    Raises:
        ConfigError: a number is out of range, there are fewer than P identities, or P cannot be
            dealt out evenly to the ranks.
    """

    def __init__(
        self,
        labels: ArrayLike,
        *,
        identities_per_batch: int = 32,
        images_per_identity: int = 4,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        for name, value in (
            ("identities_per_batch", identities_per_batch),
            ("images_per_identity", images_per_identity),
            ("world_size", world_size),
        ):
            if value < 1:
                raise ConfigError(f"{name} is {value}; it must be at least 1")
        if not 0 <= rank < world_size:
            raise ConfigError(f"rank is {rank}; it must be in 0..{world_size - 1}")
        if seed < 0:
            raise ConfigError(f"seed is {seed}; it must not be negative")
        if identities_per_batch % world_size:
            raise ConfigError(
                f"identities_per_batch is {identities_per_batch}, which {world_size} processes "
                f"cannot share evenly; use a multiple of {world_size}"
            )
        array = np.asarray(labels)
        if array.ndim != 1:
            raise ConfigError(f"labels has shape {array.shape}; it must have one dimension")
        order = np.argsort(array, kind="stable")
        classes, starts = np.unique(array[order], return_index=True)
        if len(classes) < identities_per_batch:
            raise ConfigError(
                f"identities_per_batch is {identities_per_batch}, but there are only "
                f"{len(classes)} identities; use at most that many"
            )
        self._members = np.split(order, starts[1:])
        self.identities_per_batch = identities_per_batch
        self.images_per_identity = images_per_identity
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.epoch = 0
        counts = np.array([len(member) for member in self._members])
        self._groups = np.maximum(counts // images_per_identity, 1)
        self._length = _number_of_batches(self._groups, identities_per_batch)

    def __len__(self) -> int:
        """Return the number of batches of an epoch; it is the same in every epoch."""
        return self._length

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that the next iteration gives."""
        if epoch < 0:
            raise ConfigError(f"epoch is {epoch}; it must not be negative")
        self.epoch = epoch

    def __iter__(self) -> Iterator[list[Draw]]:
        """Yield the batches of the current epoch for this rank."""
        return self._batches(self.epoch)

    def between(self, start: int, stop: int | None = None) -> Iterator[list[Draw]]:
        """Yield the batches of iterations ``start`` to ``stop - 1``, epoch after epoch.

        Args:
            start: number of the first iteration, counted over all epochs from 0.
            stop: one past the last iteration; endless when ``None``.
        """
        iteration = start
        while stop is None or iteration < stop:
            epoch, skip = divmod(iteration, self._length)
            for number, batch in enumerate(self._batches(epoch)):
                if number < skip:
                    continue
                if stop is not None and iteration >= stop:
                    return
                yield batch
                iteration += 1

    def _batches(self, epoch: int) -> Iterator[list[Draw]]:
        size, share = self.images_per_identity, self.identities_per_batch // self.world_size
        random = np.random.default_rng([self.seed, epoch])
        queues = [
            random.choice(member, size) if len(member) < size else random.permutation(member)
            for member in self._members
        ]
        taken = np.zeros(len(queues), dtype=np.int64)
        schedule = _schedule(self._groups, self.identities_per_batch, self._length, random)
        for number, identities in enumerate(schedule):
            batch: list[Draw] = []
            for slot, identity in enumerate(identities.tolist()):
                first = int(taken[identity]) * size
                taken[identity] += 1
                if slot // share != self.rank:
                    continue
                position = (number * self.identities_per_batch + slot) * size
                group = queues[identity][first : first + size].tolist()
                batch.extend(Draw(index, epoch, position + k) for k, index in enumerate(group))
            yield batch


def _number_of_batches(groups: NDArray[np.int64], per_batch: int) -> int:
    """Return the most batches of ``per_batch`` different identities that the groups can fill.

    An identity can be in every batch but not twice in one, so T batches can be filled exactly when
    sum(min(groups, T)) >= per_batch * T.
    """
    low, high = 0, int(groups.sum()) // per_batch
    while low < high:
        middle = (low + high + 1) // 2
        if int(np.minimum(groups, middle).sum()) >= per_batch * middle:
            low = middle
        else:
            high = middle - 1
    return low


def _schedule(
    groups: NDArray[np.int64], per_batch: int, batches: int, random: np.random.Generator
) -> Iterator[NDArray[np.int64]]:
    """Yield the identities of every batch.

    Before each batch the condition of ``_number_of_batches`` holds for the batches that remain.
    It survives if the identities that have a group for every one of them go first.
    """
    left = np.minimum(groups, batches)
    for remaining in range(batches, 0, -1):
        # The largest of log(weight) + Gumbel noise are a weighted draw without replacement.
        noise = random.gumbel(size=len(left))
        with np.errstate(divide="ignore"):
            key = np.log(left.astype(np.float64)) + noise
        key[left == remaining] += 1e6
        chosen = np.argpartition(-key, per_batch - 1)[:per_batch]
        chosen = random.permutation(np.sort(chosen))
        left[chosen] -= 1
        np.minimum(left, remaining - 1, out=left)
        yield chosen


class IterationBatchSampler(Sampler[list[Draw]]):
    """A stretch of iterations of an identity sampler, running through its epochs.

    Training that counts iterations uses this: the loader's workers then run through epoch borders
    without a pause, and a run that is resumed at ``start`` sees what the uninterrupted one saw.

    Args:
        sampler: gives the batches of each epoch.
        start: number of the first iteration, from 0.
        stop: one past the last.

    Raises:
        ConfigError: ``start`` is negative or ``stop`` is before it.
    """

    def __init__(self, sampler: IdentityBatchSampler, start: int, stop: int) -> None:
        if start < 0 or stop < start:
            raise ConfigError(f"iterations {start}..{stop}: wanted 0 <= start <= stop")
        self.sampler = sampler
        self.start = start
        self.stop = stop

    def __len__(self) -> int:
        """Return the number of batches."""
        return self.stop - self.start

    def __iter__(self) -> Iterator[list[Draw]]:
        """Yield the batches of the stretch."""
        return self.sampler.between(self.start, self.stop)


class SequentialBatchSampler(Sampler[list[int]]):
    """All images once, in order, in batches; with several ranks each takes a contiguous stretch.

    Args:
        length: number of images.
        batch_size: images per batch; the last batch may be smaller.
        rank: of this process.
        world_size: number of processes.

    Raises:
        ConfigError: the batch size or the rank is out of range.
    """

    def __init__(self, length: int, batch_size: int, *, rank: int = 0, world_size: int = 1) -> None:
        if batch_size < 1:
            raise ConfigError(f"batch_size is {batch_size}; it must be at least 1")
        if world_size < 1 or not 0 <= rank < world_size:
            raise ConfigError(f"rank {rank} of {world_size} processes is out of range")
        self.start = length * rank // world_size
        self.stop = length * (rank + 1) // world_size
        self.batch_size = batch_size

    def __len__(self) -> int:
        """Return the number of batches."""
        return -(-(self.stop - self.start) // self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        """Yield lists of image numbers."""
        for first in range(self.start, self.stop, self.batch_size):
            yield list(range(first, min(first + self.batch_size, self.stop)))


def draws_of(indices: Sequence[int], epoch: int = 0) -> list[Draw]:
    """Number a list of images as the draws of an epoch, for use without a sampler."""
    return [Draw(int(index), epoch, position) for position, index in enumerate(indices)]
