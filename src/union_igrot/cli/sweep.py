"""The table of a sweep (`-m`): what each job found, gathered in the sweep's folder as soon as it is done.

`sweep.json` there says how each job ended and where its results lie; `results.csv` and `results.md` are
written anew from it after each job, so that a failed job or a killed sweep loses no other. Jobs may
run side by side. Knows Hydra and files. Does not know what a job does.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, final

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode

from union_igrot.errors import UnionError

_STATE, _RESULTS, _LOCK = "sweep.json", "results.json", ".lock"
_WAIT_SECONDS = 60


def in_sweep() -> bool:
    """Tell whether the running job belongs to a sweep."""
    return HydraConfig.get().mode == RunMode.MULTIRUN


@final
class Sweep:
    """The jobs of one sweep, as far as they run in this process.

    Args:
        command: Name of the command, `train` or `eval`.
        mistake: Exit code for a mistake the user can mend.

    Attributes:
        code: Exit code of the first job that failed; 0 where none did.
    """

    def __init__(self, command: str, mistake: int) -> None:
        self._command, self._mistake = command, mistake
        self._folder: Path | None = None
        self.code = 0

    def job(self, work: Callable[[], Path | None], fresh: Path) -> None:
        """Run a job, and note how it ended; a mistake is one line and does not end the sweep.

        Args:
            work: Gives the folder of its results, or None for `fresh`.
            fresh: The job's own folder.
        """
        hydra = HydraConfig.get()
        self._folder = Path(hydra.sweep.dir).absolute()
        entry = {"job": hydra.job.num, "overrides": list(hydra.overrides.task)}
        try:
            folder = work()
        except UnionError as error:
            print(f"union-{self._command}: {error}", file=sys.stderr)  # noqa: T201 - the command's voice
            self._fail(self._mistake, entry, str(error))
        except SystemExit as ended:
            code = ended.code if isinstance(ended.code, int) else 1
            self._fail(code, entry, f"ended with code {code}")
        except Exception as error:
            self._fail(1, entry, f"{type(error).__name__}: {error}")
            raise
        else:
            _note(self._folder, self._command, entry | {"run": _shown(folder or fresh, self._folder), "error": ""})

    def _fail(self, code: int, entry: dict[str, Any], error: str) -> None:
        self.code = self.code or code
        assert self._folder is not None  # set by `job`
        _note(self._folder, self._command, entry | {"run": "", "error": error})

    def show(self) -> None:
        """Print the table, where any job of this process found something."""
        if self._folder is not None and (self._folder / "results.md").is_file():
            from union_igrot.reporting.sweep_report import print_sweep

            print_sweep(_jobs(self._folder), self._command, self._folder)


def _shown(folder: Path, sweep: Path) -> str:
    """Name a job's folder: below the sweep's by its own name, else in full (a run that was gone on with)."""
    whole = folder.absolute()
    return str(whole.relative_to(sweep)) if whole.is_relative_to(sweep) else str(whole)


def _note(folder: Path, command: str, entry: dict[str, Any]) -> None:
    from union_igrot.reporting.sweep_report import write_sweep
    from union_igrot.storage.atomic import write_atomic
    from union_igrot.storage.locks import acquire_exclusive

    folder.mkdir(parents=True, exist_ok=True)
    held = acquire_exclusive(folder / _LOCK, wait=_WAIT_SECONDS)
    if held is None:
        raise UnionError(f"{folder / _LOCK} is locked by another process for {_WAIT_SECONDS} s; end that process")
    with held:
        others = [one for one in _entries(folder) if one["job"] != entry["job"]]
        entries = sorted([*others, entry], key=lambda one: int(one["job"]))
        write_atomic(folder / _STATE, json.dumps({"command": command, "jobs": entries}, indent=2) + "\n")
        jobs = _jobs(folder)
        if any(job.rows for job in jobs):
            write_sweep(folder, jobs, command)


def _entries(folder: Path) -> list[dict[str, Any]]:
    if not (folder / _STATE).is_file():
        return []
    entries: list[dict[str, Any]] = json.loads((folder / _STATE).read_text(encoding="utf-8"))["jobs"]
    return entries


def _jobs(folder: Path) -> list[Any]:
    from union_igrot.reporting.sweeps import Job

    jobs = []
    for one in _entries(folder):
        results = folder / one["run"] / _RESULTS
        rows = json.loads(results.read_text(encoding="utf-8")) if one["run"] and results.is_file() else []
        jobs.append(Job(one["job"], one["run"], tuple(one["overrides"]), rows, one["error"]))
    return jobs
