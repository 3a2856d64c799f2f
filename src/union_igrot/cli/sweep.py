"""Sweeps (`-m`): runs each job, and collects the results of all jobs in one table at the end.

Every job notes in `jobs/` of the sweep's folder how it ended and where its results are, so a failed job loses no
other and jobs may run side by side.
"""

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, final

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode

from union_igrot.errors import UnionError

if TYPE_CHECKING:
    from union_igrot.reporting.sweep_results import SweepJob


def in_sweep() -> bool:
    """Return whether the running job belongs to a sweep."""
    return HydraConfig.get().mode == RunMode.MULTIRUN


@final
class Sweep:
    """The jobs of one sweep that run in this process.

    Args:
        command: Name of the command, `train` or `eval`.
        usage_code: Exit code for a user's mistake.

    Attributes:
        code: Exit code of the first job that failed; 0 if none did.
    """

    def __init__(self, command: str, usage_code: int) -> None:
        self._command, self._usage_code = command, usage_code
        self._folder: Path | None = None
        self.code = 0

    def job(self, work: Callable[[], Path | None], fresh: Path) -> None:
        """Run a job and note how it ended; a user's mistake is one line and does not end the sweep.

        Args:
            work: Returns the folder of its results, or None for `fresh`.
            fresh: The job's own folder.
        """
        self._folder = Path(HydraConfig.get().sweep.dir).absolute()
        try:
            folder = (work() or fresh).absolute()
        except UnionError as error:
            print(f"union-{self._command}: {error}", file=sys.stderr)  # noqa: T201 - the command's output
            self._note("", str(error), self._usage_code)
        except SystemExit as ended:
            code = ended.code if isinstance(ended.code, int) else 1
            self._note("", f"ended with code {code}", code)
        except Exception as error:
            self._note("", f"{type(error).__name__}: {error}", 1)
            raise
        else:
            inside = folder.is_relative_to(self._folder)
            self._note(str(folder.relative_to(self._folder) if inside else folder), "", 0)

    def _note(self, run: str, error: str, code: int) -> None:
        from union_igrot.storage.atomic import write_atomic

        assert self._folder is not None  # set by `job`
        self.code = self.code or code
        hydra = HydraConfig.get()
        jobs = self._folder / "jobs"
        jobs.mkdir(parents=True, exist_ok=True)
        note = {"job": hydra.job.num, "overrides": list(hydra.overrides.task), "run": run, "error": error}
        write_atomic(jobs / f"{hydra.job.num}.json", json.dumps(note, indent=2) + "\n")

    def show(self) -> None:
        """Write and print the table of all jobs."""
        if self._folder is None:
            return
        from union_igrot.reporting.sweep_results import print_sweep, write_sweep

        jobs = sorted(_jobs(self._folder), key=lambda job: job.number)
        if any(job.result.methods for job in jobs):
            write_sweep(self._folder, jobs, self._command)
            print_sweep(jobs, self._command, self._folder)


def _jobs(folder: Path) -> "Iterator[SweepJob]":
    from union_igrot.evaluation.results import EvaluationResult
    from union_igrot.reporting.sweep_results import SweepJob

    for path in (folder / "jobs").glob("*.json"):
        note = json.loads(path.read_text(encoding="utf-8"))
        results = folder / note["run"] / "results.json"
        result = EvaluationResult.load(results) if note["run"] and results.is_file() else EvaluationResult()
        yield SweepJob(note["job"], note["run"], tuple(note["overrides"]), result, note["error"])
