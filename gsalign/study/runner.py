"""Carrying out the runs of a study, each in a process of its own.

A process per run: one that crashes, or is killed for its memory, takes nobody with it, and every
run is what ``gsalign train --output FOLDER`` makes of the configuration in its folder.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from gsalign.engine.interrupt import StopSignal
from gsalign.study.plan import StudyRun
from gsalign.study.state import RunState, begin, state_of

_POLL_SECONDS = 0.1
_PATIENCE_SECONDS = 30.0


@dataclass(frozen=True)
class Outcome:
    """How a run ended.

    Attributes:
        run: the run.
        code: exit code of its process, negative for the signal that killed it.
        seconds: that it took now.
        finished: whether it is complete.
        said: the last line it printed.
    """

    run: StudyRun
    code: int
    seconds: float
    finished: bool
    said: str


@dataclass
class _Running:
    run: StudyRun
    process: subprocess.Popen[bytes]
    slot: int
    since: float


def carry_out(
    runs: Iterable[StudyRun],
    *,
    jobs: int = 1,
    keep_open: Sequence[int] = (),
    on_start: Callable[[StudyRun, RunState], None],
    on_end: Callable[[Outcome], None],
) -> bool:
    """Carry runs out, some at a time; what is half finished goes on where it was.

    SIGINT or SIGTERM begins no more runs and passes SIGINT on, upon which the runs save their state
    between two iterations; a second one stops them where they are.

    Args:
        runs: in their order; none of them finished.
        jobs: how many at a time.
        keep_open: file descriptors that the processes inherit.
        on_start: told of every run that begins, and how far it was.
        on_end: told how a run ended.

    Returns:
        Whether all had their turn; False if a signal came.
    """
    waiting = deque(runs)
    running: list[_Running] = []
    told_to_stop = False
    with StopSignal() as stop:
        try:
            while waiting or running:
                while waiting and len(running) < jobs and not stop.received:
                    run = waiting.popleft()
                    state = state_of(run)
                    on_start(run, state)
                    taken = {one.slot for one in running}
                    slot = next(slot for slot in range(jobs) if slot not in taken)
                    environment = _environment(slot, jobs)
                    process = _start(run, state, environment, keep_open)
                    running.append(_Running(run, process, slot, time.monotonic()))
                if stop.received and not told_to_stop:
                    told_to_stop = True
                    _signal_all(running, signal.SIGINT)
                for one in [one for one in running if one.process.poll() is not None]:
                    running.remove(one)
                    on_end(_outcome(one))
                if stop.received and not running:
                    break
                time.sleep(_POLL_SECONDS)
        finally:
            _end(running)
    return not stop.received


def _start(
    run: StudyRun, state: RunState, environment: dict[str, str], keep_open: Sequence[int]
) -> subprocess.Popen[bytes]:
    begin(run)
    command = [sys.executable, "-m", "gsalign.cli", "train", "--output", str(run.folder.root)]
    if state is RunState.HALFWAY:
        command.append("--resume")
    elif state is RunState.BEGUN:
        command.append("--overwrite")
    return _spawn(command, _output(run), environment, keep_open)


def _environment(slot: int, jobs: int) -> dict[str, str]:
    """The environment of one of several runs at a time: its GPU, and its share of the cores."""
    environment = dict(os.environ)
    if jobs == 1:
        return environment
    environment.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // jobs)))
    count = torch.cuda.device_count()
    if count > 1:
        visible = environment.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(count)))
        environment["CUDA_VISIBLE_DEVICES"] = visible.split(",")[slot % count]
    return environment


def _spawn(
    command: Sequence[str], output: Path, environment: dict[str, str], keep_open: Sequence[int]
) -> subprocess.Popen[bytes]:
    with output.open("ab") as file:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            env=environment,
            pass_fds=tuple(keep_open),
            # A terminal's Ctrl-C reaches this process alone, which passes it on once.
            start_new_session=True,
        )


def _output(run: StudyRun) -> Path:
    """What a run printed, failures too that come before its log is opened."""
    return run.folder.root / "output.txt"


def _outcome(one: _Running) -> Outcome:
    lines = _output(one.run).read_text(encoding="utf-8", errors="replace").split("\n")
    said = next((line.strip() for line in reversed(lines) if line.strip()), "it printed nothing")
    return Outcome(
        run=one.run,
        code=one.process.returncode,
        seconds=time.monotonic() - one.since,
        finished=one.process.returncode == 0 and state_of(one.run) is RunState.FINISHED,
        said=said,
    )


def _signal_all(running: Iterable[_Running], number: signal.Signals) -> None:
    for one in running:
        if one.process.poll() is None:
            one.process.send_signal(number)


def _end(running: Sequence[_Running]) -> None:
    """Stop what still runs: at once if it listens, else by force."""
    _signal_all(running, signal.SIGINT)
    deadline = time.monotonic() + _PATIENCE_SECONDS
    for one in running:
        try:
            one.process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            one.process.kill()
            one.process.wait()
