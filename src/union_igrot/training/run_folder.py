"""The folder of one run: who works in it, how far it got, and whether to go on in it.

The same command, started again after an interruption, finds its unfinished folder by the
hash of its configuration and goes on there. Does not know what a run does.
"""

import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, final

from union_igrot.errors import UnionError
from union_igrot.storage.atomic import write_atomic
from union_igrot.storage.locks import acquire_exclusive

_STATE = "run.json"
_LOCK = ".lock"


def identity_of(settings: Mapping[str, Any]) -> str:
    """Hash the settings that decide a run's results."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()[:16]


@final
class RunFolder:
    """An open run folder, locked against a second run until the process ends.

    Attributes:
        path: The folder.
        resumed: Whether an earlier run of the same settings was interrupted here.
    """

    def __init__(self, path: Path, identity: str) -> None:
        """Open or make a folder.

        Args:
            path: The folder.
            identity: Hash of the settings.

        Raises:
            UnionError: Where another run is at work in it, or it holds a run of other settings.
        """
        self.path = path
        try:
            path.mkdir(parents=True, exist_ok=True)
            held = acquire_exclusive(path / _LOCK)
        except OSError as error:
            raise UnionError(f"output_dir {path} cannot be written: {error.strerror}; give another") from None
        if held is None:
            raise UnionError(f"another run is at work in {path}; wait for it or give another output_dir")
        self._lock = held
        state = _state(path)
        if state and state["identity"] != identity:
            held.release()
            raise UnionError(f"{path} holds a run of other settings; give another output_dir, or remove it")
        self.resumed = bool(state) and state["stage"] != "done"
        self._identity = identity
        self.stage = state["stage"] if self.resumed else "started"
        if state and not self.resumed:
            # The same run once more: its model and results stay until the new ones replace them.
            shutil.rmtree(path / "checkpoints", ignore_errors=True)
            shutil.rmtree(path / "logs", ignore_errors=True)
        self.reach(self.stage)

    def reach(self, stage: str) -> None:
        """Note how far the run got: `started`, `trained`, `done`."""
        self.stage = stage
        write_atomic(self.path / _STATE, json.dumps({"identity": self._identity, "stage": stage}) + "\n")

    def close(self) -> None:
        """Let another run in."""
        self._lock.release()

    def __enter__(self) -> "RunFolder":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _state(path: Path) -> dict[str, str]:
    try:
        state = json.loads((path / _STATE).read_text())
        return {"identity": str(state["identity"]), "stage": str(state["stage"])}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def open_run(chosen: Path | None, fresh: Path, identity: str) -> RunFolder:
    """Find the folder for a run.

    Args:
        chosen: The folder the user named, or None.
        fresh: A new folder `<runs>/<date>/<time>`, used where nothing was named and no run
            of the same settings stands unfinished beside it.
        identity: Hash of the settings.

    Returns:
        The folder, locked.

    Raises:
        UnionError: Where the named folder is taken.
    """
    if chosen is not None:
        return RunFolder(chosen, identity)
    runs = fresh.parent.parent
    for state in sorted(runs.glob(f"*/*/{_STATE}"), reverse=True):
        found = _state(state.parent)
        if found.get("identity") == identity and found["stage"] != "done":
            try:
                run = RunFolder(state.parent, identity)
            except UnionError:
                continue  # it is at work right now
            if fresh.is_dir() and not any(fresh.iterdir()):
                fresh.rmdir()
            return run
    return RunFolder(fresh, identity)
