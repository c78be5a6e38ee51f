"""How a run shows itself while it goes: a progress bar on a terminal, nothing elsewhere."""

from __future__ import annotations

import io

from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from gsalign.engine.metrics import Record


class Display:
    """Shows nothing; the lines of the log are enough for a file or a pipe.

    The base of displays that show more.
    """

    def start(self, done: int, total: int) -> None:
        """Begin to show a run of ``total`` iterations, ``done`` of them done."""

    def advance(self, iteration: int) -> None:
        """So many iterations are done."""

    def losses(self, record: Record) -> None:
        """A ``train`` record was written."""

    def testing(self, done: int, total: int) -> None:
        """So many images of an evaluation are embedded."""

    def stop(self) -> None:
        """Clear what is shown."""

    @staticmethod
    def as_text(renderable: RenderableType, width: int = 100) -> str:
        """A table of rich as plain lines, for the log."""
        buffer = io.StringIO()
        Console(file=buffer, width=width, color_system=None).print(renderable)
        return "\n" + "\n".join(line.rstrip() for line in buffer.getvalue().splitlines())


class TerminalDisplay(Display):
    """A progress bar below the log, with time left, total loss and learning rate.

    Args:
        console: the one the log is printed on, so that they do not write over each other.
    """

    def __init__(self, console: Console) -> None:
        self._bar = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=None),
            TextColumn("{task.completed}/{task.total}"),
            TimeElapsedColumn(),
            TextColumn("{task.fields[note]}"),
            console=console,
            transient=True,
        )
        self._training: TaskID | None = None
        self._testing: TaskID | None = None

    def start(self, done: int, total: int) -> None:
        """Show the bar."""
        self._bar.start()
        self._training = self._bar.add_task("training", total=total, completed=done, note="")

    def advance(self, iteration: int) -> None:
        """Move the bar."""
        if self._training is not None:
            self._bar.update(self._training, completed=iteration)

    def losses(self, record: Record) -> None:
        """Show loss and learning rate behind the bar."""
        if self._training is not None:
            note = f"loss {record['total_loss']:.3f}  lr {record['lr']:.2g}"
            self._bar.update(self._training, note=note)

    def testing(self, done: int, total: int) -> None:
        """Show a second bar until the evaluation is through."""
        if self._testing is None:
            self._testing = self._bar.add_task("evaluation", total=total, note="images")
        self._bar.update(self._testing, completed=done, total=total)
        if done >= total:
            self._bar.remove_task(self._testing)
            self._testing = None

    def stop(self) -> None:
        """Take the bars away."""
        self._bar.stop()
