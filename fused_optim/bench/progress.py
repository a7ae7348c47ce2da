"""What the user sees while the benchmark runs: the row, what happens in it, the round and the time left."""

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)


class Watch:
    """Shows in two lines what it is told: the rows with the time left, and what happens in the current one.

    Args:
        progress: where; None: nowhere.
    """

    def __init__(self, progress: Progress | None = None, n_rows: int = 1) -> None:
        self._progress = progress or Progress(disable=True)
        self._rows = self._progress.add_task("", total=n_rows, stage="")
        self._done = 0

    def row(self, done: int, title: str) -> None:
        """A row begins, after so many."""
        self._done = done
        self._progress.update(self._rows, completed=done, description=escape(title), stage="")
        if not self._progress.console.is_terminal:
            print_line = self._progress.console.print
            print_line(f"row {done + 1}: {title}", markup=False, highlight=False)

    def stage(self, text: str) -> None:
        """Something else begins."""
        self._progress.update(self._rows, stage=escape(text), refresh=True)

    def round(self, part: float, n_rounds: int) -> None:
        """So many rounds are done, which is so much of the row, from 0 to 1."""
        stage = f"{n_rounds} round{'s' * (n_rounds > 1)} measured"
        self._progress.update(self._rows, completed=self._done + part, stage=stage)


@contextmanager
def live(n_rows: int) -> Iterator[Watch]:
    """Progress on stderr: a display on a terminal, elsewhere a line for each row."""
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TextColumn("[dim]{task.fields[stage]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal
    ) as progress:
        yield Watch(progress, n_rows)
