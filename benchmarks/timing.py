"""Clocks, interleaving and percentiles: what turns calls into milliseconds."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch

Call = Callable[[], Any]


@dataclass(frozen=True)
class Settings:
    """How long is measured.

    Attributes:
        seconds: time for one case and pass, all providers together.
        least_rounds: rounds measured however long they take.
        most_rounds: rounds at most.
    """

    seconds: float = 1.5
    least_rounds: int = 5
    most_rounds: int = 400

    @classmethod
    def quick(cls) -> Settings:
        """Enough to see that everything runs, not enough to quote."""
        return cls(seconds=0.05, least_rounds=3, most_rounds=20)

    @classmethod
    def for_device(cls, device: torch.device, *, quick: bool = False) -> Settings:
        """A GPU is timed for a shorter while: its times spread less, and it is often lent."""
        if quick:
            return cls.quick()
        return cls(seconds=0.3) if device.type == "cuda" else cls()


def percentile(samples: Sequence[float], fraction: float) -> float:
    """The value below which a fraction of the samples lies, linear between neighbours.

    Raises:
        ValueError: no samples, or a fraction outside [0, 1].
    """
    if not samples:
        raise ValueError("samples: wanted at least one, got none")
    if not 0.0 <= fraction <= 1.0:
        raise ValueError(f"fraction: wanted 0 to 1, got {fraction}")
    ordered = sorted(samples)
    position = fraction * (len(ordered) - 1)
    below = int(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (position - below) * (ordered[above] - ordered[below])


class Clock(Protocol):
    """Runs one provider's turn and returns the milliseconds of each of its calls."""

    def turn(self, calls: Sequence[Call]) -> list[float]:
        """Run every call once, in order."""
        ...


class WallClock:
    """``perf_counter`` around each call, for work that is done when the call returns.

    A call that returns a float has timed itself, in seconds (the copy that counts no thread start).
    """

    def turn(self, calls: Sequence[Call]) -> list[float]:
        """Run every call once; results are dropped after the clock is read."""
        samples = []
        for call in calls:
            begin = time.perf_counter()
            result = call()
            elapsed = time.perf_counter() - begin
            samples.append(1e3 * (result if isinstance(result, float) else elapsed))
            del result
        return samples


class EventClock:
    """Device events around each call, for work that a CUDA device does later.

    The calls of a turn are queued back to back behind one that is not timed, so the device is busy
    when the first event is reached; where the host queues more slowly than the device works, the
    device waits and that waiting is counted, as it would be in use.
    """

    def turn(self, calls: Sequence[Call]) -> list[float]:
        """Run every call once, then wait for the device."""
        calls[-1]()
        pairs = []
        for call in calls:
            begin = torch.cuda.Event(enable_timing=True)
            end = torch.cuda.Event(enable_timing=True)
            begin.record()
            call()
            end.record()
            pairs.append((begin, end))
        torch.cuda.synchronize()
        return [begin.elapsed_time(end) for begin, end in pairs]


class NoGraphError(RuntimeError):
    """Calls that cannot be captured into a CUDA graph, with the reason."""


class Replay:
    """The calls of a turn as one CUDA graph: what the device does, without the host's part.

    Every call's results stay where they are for as long as the graph lives, so that no call finds
    the memory that it writes in a cache because the call before it wrote there too.

    Args:
        calls: the calls, each run once before, on the current stream, which must not be the
            default one (:func:`own_stream`).

    Raises:
        NoGraphError: one of them waits for the device or does something else no graph can hold.
    """

    def __init__(self, calls: Sequence[Call]) -> None:
        _refuse_waiting(calls[0])
        self.count = len(calls)
        self._graph = torch.cuda.CUDAGraph()
        self._kept: list[Any] = []
        try:
            with torch.cuda.graph(self._graph, stream=torch.cuda.current_stream()):
                for call in calls:
                    self._kept.append(call())
        except RuntimeError as error:
            self._kept.clear()
            raise NoGraphError(str(error).splitlines()[0]) from error

    def __call__(self) -> None:
        """Run all calls once."""
        self._graph.replay()


def _refuse_waiting(call: Call) -> None:
    # Found before a capture is begun: one that fails leaves the allocator in a state of its own.
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    except RuntimeError as error:
        raise NoGraphError(str(error).splitlines()[0]) from error
    finally:
        torch.cuda.set_sync_debug_mode(before)
    torch.cuda.synchronize()


@contextmanager
def own_stream(device: torch.device) -> Iterator[None]:
    """On CUDA, makes a stream other than the default one current: graphs need one."""
    if device.type != "cuda":
        yield
        return
    with torch.cuda.stream(torch.cuda.Stream(device)):
        yield


def clock_for(device: torch.device) -> Clock:
    """Device events for CUDA, the wall clock for everything else."""
    return EventClock() if device.type == "cuda" else WallClock()


def interleave(
    subjects: Mapping[str, Sequence[Call]], clock: Clock, settings: Settings
) -> dict[str, list[float]]:
    """Milliseconds of every subject's calls, measured in rounds: A B C, B C A, C A B, ...

    What slows the machine for a while then slows all of them, and none always runs behind the same
    neighbour. The first round warms up and is not counted.

    Args:
        subjects: per name the calls of one turn (the same work on rotated inputs).
        clock: how a turn is timed.
        settings: for how long.
    """
    names = list(subjects)
    samples: dict[str, list[float]] = {name: [] for name in names}
    for name in names:
        clock.turn(subjects[name])
    deadline = time.perf_counter() + settings.seconds
    for turn in range(settings.most_rounds):
        if turn >= settings.least_rounds and time.perf_counter() >= deadline:
            break
        start = turn % len(names) if names else 0
        for name in names[start:] + names[:start]:
            samples[name] += clock.turn(subjects[name])
    return samples
