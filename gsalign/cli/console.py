"""What commands share in talking to people: the console, the log on it, a progress bar."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

_HANDLER = "gsalign command line"


def is_main_process() -> bool:
    """Whether this is the only process of a run, or the first."""
    return os.environ.get("RANK", "0") == "0"


def make_console(*, markup: bool = False) -> Console:
    """The console for standard output; other processes than the first have a silent one.

    Args:
        markup: read words in brackets as styles; names of files and people may have brackets.
    """
    return Console(quiet=not is_main_process(), highlight=False, soft_wrap=True, markup=markup)


class _ConsoleHandler(logging.Handler):
    """Prints through a console, so that a progress bar below moves on; warnings in yellow."""

    def __init__(self, console: Console) -> None:
        super().__init__()
        self._console = console

    def emit(self, record: logging.LogRecord) -> None:
        """Print a message as it is; brackets and numbers in it mean nothing to the console."""
        try:
            style = "yellow" if record.levelno >= logging.WARNING else ""
            self._console.print(Text(self.format(record), style=style), soft_wrap=True)
        except Exception:
            self.handleError(record)


def log_to(console: Console) -> None:
    """Print what ``gsalign`` logs: plainly, and through the console where that is a terminal."""
    logger = logging.getLogger("gsalign")
    for old in [handler for handler in logger.handlers if handler.get_name() == _HANDLER]:
        logger.removeHandler(old)
    handler: logging.Handler
    if console.is_terminal:
        handler = _ConsoleHandler(console)
    else:
        handler = logging.StreamHandler(console.file)
    handler.setFormatter(logging.Formatter("%(message)s"))
    handler.set_name(_HANDLER)
    logger.addHandler(handler)
    logger.setLevel(logging.INFO if is_main_process() else logging.ERROR)
    logger.propagate = False


@contextmanager
def progress(console: Console, title: str, unit: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar on a terminal, a line at every tenth elsewhere.

    Args:
        console: to show it on.
        title: what is going on.
        unit: what is counted.

    Yields:
        A function to call with (done, total).
    """
    if console.is_terminal:
        with Progress(
            TextColumn(f"[bold]{title}"),
            BarColumn(),
            TextColumn("{task.completed}/{task.total} " + unit),
            TimeRemainingColumn(),
            console=console,
            transient=True,
        ) as bar:
            task = bar.add_task(title, total=None)
            yield lambda done, total: bar.update(task, completed=done, total=total)
        return
    told = 0

    def tell(done: int, total: int) -> None:
        nonlocal told
        tenth = 10 * done // max(total, 1)
        if tenth > told:
            told = tenth
            console.print(f"{title}: {done}/{total} {unit}")

    yield tell
