"""From arguments to exit code: parsing, dispatch, and failures as one line on stderr."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from gsalign import __version__
from gsalign.cli import (
    data,
    evaluation,
    export,
    extract,
    index,
    info,
    search,
    study,
    train,
    visualize,
)
from gsalign.cli.exit_codes import INTERRUPTED, USER_FAILURE
from gsalign.errors import GSAlignError

# Each has add_parser(subparsers): it adds one command and sets its `run`, which takes the parsed
# arguments and returns an exit code. They import what is heavy inside run, so that --help is quick.
COMMANDS = (info, data, train, evaluation, study, extract, index, search, export, visualize)


class _Parser(argparse.ArgumentParser):
    """Says what is wrong on one line, without the usage around it."""

    def error(self, message: str) -> NoReturn:
        self.exit(USER_FAILURE, f"{self.prog}: error: {message} ({self.prog} --help)\n")


def build_parser() -> argparse.ArgumentParser:
    """The parser of the whole command line."""
    parser = _Parser(
        prog="gsalign",
        description="Aerial-ground person re-identification: train, evaluate, look.",
    )
    parser.add_argument("--version", action="version", version=f"gsalign {__version__}")
    subparsers = parser.add_subparsers(dest="command", metavar="command", required=True)
    for command in COMMANDS:
        command.add_parser(subparsers)
    return parser


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse arguments; ``key=value`` overrides may stand anywhere after the command."""
    parser = build_parser()
    parsed, rest = parser.parse_known_args(arguments)
    # argparse takes one unbroken run of trailing arguments; others are left over.
    stray = [text for text in rest if text.startswith("-") or "=" not in text]
    if rest and (stray or not hasattr(parsed, "overrides")):
        parser.error(f"unrecognized arguments: {' '.join(stray or rest)}")
    if rest:
        parsed.overrides = [*parsed.overrides, *rest]
    return parsed


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        arguments: without the program's name; ``sys.argv`` when None.

    Returns:
        0; 2 when the failure is the user's to mend, told on one line of stderr; 130 when
        interrupted.
    """
    try:
        parsed = parse(arguments)
        code: int = parsed.run(parsed)
        return code
    except SystemExit as exit_:
        return exit_.code if isinstance(exit_.code, int) else USER_FAILURE
    except KeyboardInterrupt as stopped:
        return _tell(str(stopped) or "interrupted", INTERRUPTED)
    except BrokenPipeError:
        # Whoever read our output has gone. Python would stumble over it again while flushing.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if not is_user_failure(error):
            raise
        return _tell(f"error: {error}", USER_FAILURE)


def is_user_failure(error: Exception) -> bool:
    """Whether a failure is one that the user can mend, so that a traceback would not help."""
    if isinstance(error, (GSAlignError, OSError)):
        return True
    kinds = {f"{kind.__module__}.{kind.__name__}" for kind in type(error).__mro__}
    return not kinds.isdisjoint(
        {
            "gsalign_kernels.errors.KernelUnavailableError",
            # A full disk; what safetensors cannot read is told as a CheckpointError.
            "safetensors_rust.SafetensorError",
            "safetensors._safetensors_rust.SafetensorError",
            "torch.OutOfMemoryError",
        }
    )


def _tell(message: str, code: int) -> int:
    rank = os.environ.get("RANK", "0")
    where = "gsalign" if rank == "0" else f"gsalign (process {rank})"
    print(f"{where}: {' '.join(message.split())}", file=sys.stderr, flush=True)
    return code
