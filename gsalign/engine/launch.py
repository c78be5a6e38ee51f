"""Starting one process per GPU of this machine, for ``--num-gpus``."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from types import FrameType

import torch

from gsalign.errors import ConfigError


def is_launched() -> bool:
    """Whether this is already one of several processes (torchrun, accelerate, or ours)."""
    return "LOCAL_RANK" in os.environ


def require_gpus(count: int) -> None:
    """Make sure that so many GPUs are there.

    Raises:
        ConfigError: there are fewer.
    """
    there = torch.cuda.device_count()
    if count > there:
        raise ConfigError(f"--num-gpus is {count}, but PyTorch sees {there} on this machine")


def launch(arguments: Sequence[str], *, processes: int) -> int:
    """Run ``gsalign`` with these arguments in several processes that know of each other.

    They get the environment that torchrun gives. When one fails the others are ended. SIGINT and
    SIGTERM are theirs to handle.

    Args:
        arguments: of the command line.
        processes: how many.

    Returns:
        0, or the exit code of the first process that failed.
    """
    environment = {
        **os.environ,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(_free_port()),
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
    }
    environment.setdefault("OMP_NUM_THREADS", "1")
    command = [sys.executable, "-m", "gsalign.cli", *arguments]
    started = [
        subprocess.Popen(command, env={**environment, "RANK": str(r), "LOCAL_RANK": str(r)})
        for r in range(processes)
    ]

    def pass_on(number: int, frame: FrameType | None) -> None:
        for process in started:
            if process.poll() is None:
                process.send_signal(number)

    # The terminal sends Ctrl-C to all of them; SIGTERM comes to this process alone.
    before = {
        signal.SIGINT: signal.signal(signal.SIGINT, signal.SIG_IGN),
        signal.SIGTERM: signal.signal(signal.SIGTERM, pass_on),
    }
    try:
        return _wait(started)
    finally:
        for process in started:
            if process.poll() is None:
                process.kill()
        for number, handler in before.items():
            signal.signal(number, handler)


def _wait(started: Sequence[subprocess.Popen[bytes]]) -> int:
    running = list(started)
    while running:
        for process in list(running):
            code = process.poll()
            if code is None:
                continue
            running.remove(process)
            if code:
                # Others may be about to end the same way; what waits for the dead is ended.
                deadline = time.monotonic() + 10
                while time.monotonic() < deadline and any(p.poll() is None for p in running):
                    time.sleep(0.1)
                for other in running:
                    other.terminate()
                return code if code > 0 else 128 - code
        time.sleep(0.1)
    return 0


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
