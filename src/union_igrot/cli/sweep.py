"""Sweeps (`-m`): Hydra's grammar and launcher run the jobs, and one table at the end holds the results of all.

Every job notes in `jobs/` of the sweep's folder how it ended and where its results are, so a failed job loses no
other and jobs may run side by side.
"""

import json
import os
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from omegaconf import read_write

from union_igrot.cli.config import Arguments, as_config, conf_dir, parseable, resolve
from union_igrot.cli.settings import COMMANDS
from union_igrot.errors import ConfigError, one_line
from union_igrot.settings import show
from union_igrot.storage.files import write_atomic

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from union_igrot.cli.command import Task

_GOES_ON = (1, 2, 70)
"""Exit codes of a job after which the others still run; not those of interruptions."""


def run_sweep(name: str, task: "Task", arguments: Arguments, guard: Callable[[], AbstractContextManager[None]]) -> None:
    """Run the jobs of a sweep under `guard`, which reports their errors, and print a table of their results.

    Raises:
        SystemExit: With the code of the first job that failed.
    """
    overrides = check_sweep(name, arguments)
    folder: Path | None = None
    codes: list[int] = []

    def job(_: "DictConfig") -> None:
        nonlocal folder
        running = HydraConfig.get()
        folder, fresh = Path(running.sweep.dir).absolute(), Path(running.runtime.output_dir)
        plain = [(key, values[0]) for key, values in map(_read_override, running.overrides.task)]
        with read_write(running):  # type: ignore[arg-type] # a DictConfig, which its type hides
            running.overrides.task = [f"{key}={text}" for key, text in plain]
        code, error, found = 0, "", fresh
        try:
            with guard():
                found = task(as_config(resolve(name, Arguments(plain))[0]), fresh) or fresh
        except SystemExit as stopped:
            code = stopped.code if isinstance(stopped.code, int) else 1
            error = one_line(str(stopped.__cause__ or f"exit code {code}"))
        codes.append(code)
        _note(folder, found.absolute(), error)
        if code and code not in _GOES_ON:
            raise SystemExit(code)

    # Relative folders refer to the current folder; Hydra must not change it.
    before, here = sys.argv, Path.cwd()
    sys.argv = [f"union-{name}", *overrides, *arguments.hydra, "-m"]
    try:
        hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name=name)(job)()
    finally:
        sys.argv = before
        os.chdir(here)
        if folder is not None:
            _show(folder, name)
    if any(codes):
        raise SystemExit(next(filter(None, codes)))


def check_sweep(name: str, arguments: Arguments) -> list[str]:
    """Validate each value of a sweep once, before its first run.

    Returns:
        The settings in Hydra's grammar; a text that it cannot parse, such as a path with brackets, is quoted.

    Raises:
        ConfigError: As `resolve`, or if several runs would write to one folder, or if the command is not swept.
    """
    if not COMMANDS[name].hydra:
        swept = " and ".join(f"union-{one}" for one in COMMANDS if COMMANDS[one].hydra)
        raise ConfigError(f"-m is not supported: union-{name} runs once (expected {swept})")
    for key, text in arguments.settings:
        if "glob(" in text:
            raise ConfigError(f"{key}={text}: glob is not supported; list the values, or use a range")
    # `++` adds settings, which `conf/` does not contain.
    groups = COMMANDS[name].groups
    overrides = [parseable(key if key in groups else f"++{key}", text) for key, text in arguments.settings]
    values = [_read_override(override) for override in overrides]
    first = [(key, choices[0]) for key, choices in values]
    if any(len(choices) > 1 for _, choices in values) and any(key == "output_dir" for key, _ in first):
        raise ConfigError("output_dir is the folder of one run; leave it out, or use hydra.sweep.dir=FOLDER for all")
    resolve(name, Arguments(first, arguments.hydra, arguments.problems))
    for at, (key, choices) in enumerate(values):
        for choice in choices[1:]:
            resolve(name, Arguments([*first[:at], (key, choice), *first[at + 1 :]]))
    return overrides


def _parse(override: str) -> Override:
    return OverridesParser.create().parse_override(override)


def _read_override(override: str) -> tuple[str, list[str]]:
    """Return the key of a setting, and each of its values as it would be typed without a sweep."""
    parsed = _parse(override)
    key = parsed.get_key_element().lstrip("+")
    if not parsed.is_sweep_override():
        return key, [_typed(override)]
    return key, [_typed(f"{key}={text}") for text in parsed.sweep_string_iterator()]


def _typed(override: str) -> str:
    value = _parse(override).value()
    return override.partition("=")[2] if isinstance(value, list | dict) else show(getattr(value, "text", value))


def _note(folder: Path, run: Path, error: str) -> None:
    running = HydraConfig.get()
    place = "" if error else str(run.relative_to(folder) if run.is_relative_to(folder) else run)
    note = {"job": running.job.num, "overrides": list(running.overrides.task), "run": place, "error": error}
    (folder / "jobs").mkdir(parents=True, exist_ok=True)
    write_atomic(folder / "jobs" / f"{running.job.num}.json", json.dumps(note, indent=2) + "\n")


def _show(folder: Path, name: str) -> None:
    """Write and print the table of all jobs."""
    from union_igrot.evaluation.results import EvaluationResult
    from union_igrot.reporting.sweep_results import SweepJob, print_sweep, write_sweep

    jobs = []
    for path in (folder / "jobs").glob("*.json"):
        note = json.loads(path.read_text(encoding="utf-8"))
        results = folder / note["run"] / "results.json"
        result = EvaluationResult.load(results) if note["run"] and results.is_file() else EvaluationResult()
        jobs.append(SweepJob(note["job"], note["run"], tuple(note["overrides"]), result, note["error"]))
    jobs.sort(key=lambda job: job.number)
    if any(job.result.methods for job in jobs):
        write_sweep(folder, jobs, name)
        print_sweep(jobs, name, folder)
