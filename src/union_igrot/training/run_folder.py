"""The folder of a run: locked while the run works in it, and found again by the hash of its settings to resume it."""

import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, final

from union_igrot.errors import UnionError
from union_igrot.storage.files import remove_temporary, write_atomic
from union_igrot.storage.locks import acquire_exclusive

_STATE = "run.json"
_LOCK = ".lock"


def settings_hash(settings: Mapping[str, Any]) -> str:
    """Hash the settings that decide a run's results."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()[:16]


@final
class RunFolder:
    """An open run folder, locked until `close` or the end of the process.

    Args:
        path: The folder, created if absent.
        identity: Hash of the settings.

    Attributes:
        path: The folder.
        stage: How far the run got: `started`, `trained` or `done`.
        resumed: Whether an earlier run of the same settings was interrupted here.

    Raises:
        UnionError: If another run works in the folder, or it contains a run of other settings.
    """

    def __init__(self, path: Path, identity: str) -> None:
        self.path = path
        self._new_folders = [folder for folder in (path, *path.parents) if not folder.exists()]
        try:
            path.mkdir(parents=True, exist_ok=True)
            lock = acquire_exclusive(path / _LOCK)
        except OSError as error:
            raise UnionError(f"cannot write output_dir {path} ({error.strerror}); choose another") from None
        if lock is None:
            raise UnionError(f"another run works in {path}; wait for it or choose another output_dir")
        self._lock = lock
        state = _read_state(path)
        if state and state["identity"] != identity:
            lock.release()
            raise UnionError(f"{path} contains a run of other settings; choose another output_dir, or remove it")
        self.resumed = bool(state) and state["stage"] != "done"
        self._identity = identity
        if state:  # what a killed run was writing; a checkpoint may be large
            for folder in (path, path / "checkpoints", path / "model"):
                remove_temporary(folder, all_of_them=True)
        if state and not self.resumed:
            # A finished run is repeated: its model and results stay until the new ones replace them.
            shutil.rmtree(path / "checkpoints", ignore_errors=True)
            shutil.rmtree(path / "logs", ignore_errors=True)
        self.set_stage(state["stage"] if self.resumed else "started")

    def set_stage(self, stage: str) -> None:
        """Record how far the run got."""
        self.stage = stage
        write_atomic(self.path / _STATE, json.dumps({"identity": self._identity, "stage": stage}) + "\n")

    @contextmanager
    def discarded_on(self, mistake: type[Exception]) -> Iterator[None]:
        """Remove the folder, if it was created for this run, when an error occurs before the first checkpoint."""
        try:
            yield
        except mistake:
            if self._new_folders and not (self.path / "checkpoints").exists():
                self.close()
                shutil.rmtree(self.path / "logs", ignore_errors=True)
                with suppress(OSError):
                    for name in (_STATE, _LOCK, "config.yaml"):
                        (self.path / name).unlink(missing_ok=True)
                    for folder in self._new_folders:
                        folder.rmdir()
            raise

    def close(self) -> None:
        """Release the lock."""
        self._lock.release()

    def __enter__(self) -> "RunFolder":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _read_state(path: Path) -> dict[str, str]:
    try:
        state = json.loads((path / _STATE).read_text())
        return {"identity": str(state["identity"]), "stage": str(state["stage"])}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def open_run(chosen: Path | None, fresh: Path, identity: str) -> RunFolder:
    """Open the folder of a run.

    Args:
        chosen: The folder that the user named, or None.
        fresh: A new folder `<runs>/<date>/<time>`, used if none is named and no unfinished run of the same settings
            is next to it.
        identity: Hash of the settings.

    Raises:
        UnionError: If the named folder is in use, or contains a run of other settings.
    """
    if chosen is not None:
        return RunFolder(chosen, identity)
    for path in sorted(fresh.parent.parent.glob(f"*/*/{_STATE}"), reverse=True):
        state = _read_state(path.parent)
        if state.get("identity") == identity and state["stage"] != "done":
            try:
                return RunFolder(path.parent, identity)
            except UnionError:
                continue  # another process works in it
    return RunFolder(fresh, identity)
