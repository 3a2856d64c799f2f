"""Progress bars with rates, on standard error.

Knows rich. Does not know what is being counted.
"""

from rich.console import Console
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
from rich.text import Text


class _Rate(ProgressColumn):
    """Items a second since the start."""

    def render(self, task: Task) -> Text:
        """Return the rate, or nothing before the first item."""
        return Text("" if not task.speed else f"{task.speed:,.0f}/s", style="progress.data.speed")


def progress_bar(*, shown: bool = True) -> Progress:
    """Return a bar with counts, rate, time passed and time left; use it as a context manager.

    Args:
        shown: False keeps silent; so does it where nobody looks, in a file or a pipe.
    """
    console = Console(stderr=True)
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        _Rate(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
        redirect_stdout=False,  # it would send what a command writes into a pipe to standard error
        disable=not shown or not (console.is_terminal or console.is_jupyter),  # into a file it would leave bits of bars
    )
