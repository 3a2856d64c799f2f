"""Terminal output on which file names are harmless, and progress bars."""

from collections.abc import Iterable
from typing import Any, final

from rich.console import Console, ConsoleOptions, RenderableType
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.segment import Segment
from rich.text import Text

from union_igrot.errors import escape_controls


@final
class TerminalConsole(Console):
    """A console that escapes control characters in what it prints, and raises BrokenPipeError if nobody reads it."""

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Render as rich does; only styles may send control sequences to the terminal."""
        for text, style, control in super().render(renderable, options):
            yield Segment(text if control else escape_controls(text), style, control)

    def on_broken_pipe(self) -> None:
        """Leave the exit code to the command."""
        raise BrokenPipeError


def print_line(text: str, *, stderr: bool = False, **options: Any) -> None:
    """Print a line as it is: unwrapped, without markup and highlighting."""
    TerminalConsole(stderr=stderr).print(text, highlight=False, markup=False, soft_wrap=True, **options)


class _Rate(ProgressColumn):
    """Items per second since the start."""

    def render(self, task: Task) -> Text:
        """Return the rate, or nothing before the first item."""
        return Text("" if not task.speed else f"{task.speed:,.0f}/s", style="progress.data.speed")


def progress_bar(*, shown: bool = True) -> Progress:
    """Return a bar with counts, rate, elapsed and remaining time on standard error; use it as a context manager.

    Args:
        shown: False prints nothing. A file or a pipe gets nothing either.
    """
    console = TerminalConsole(stderr=True)
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        _Rate(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
        redirect_stdout=False,  # it would send what a command writes into a pipe to standard error
        disable=not shown or not (console.is_terminal or console.is_jupyter),
    )
