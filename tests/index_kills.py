"""`union-index` killed at random moments, again and again, and its rows held against the folder.

Before each start the folder changes: images are added, replaced, renamed, copied, touched and removed. The
command is killed with SIGKILL (its decoding workers are left to themselves) at a random time, or just after a
random number of writes to the index. While it runs, the index is opened and searched without a pause. Every few
kills it is left to its end; then each image has one row with its hash and its own embedding, and there is no
other row. Knows files, processes and rows.
"""

import hashlib
import io
import multiprocessing
import os
import random
import shutil
import time
from collections import Counter
from multiprocessing.process import BaseProcess
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from union_igrot.cli.index import main as union_index
from union_igrot.errors import ConfigError
from union_igrot.gallery.engines.base import VectorIndex
from union_igrot.gallery.engines.factory import open_index
from union_igrot.gallery.ingest import rows

ROWS = 32
"""Images of one write to the index, so that there are many moments between two."""
EVERY = 5
"""Kills between two runs that are left to their end."""
PATIENCE = 120.0
WORKER_SECONDS = 30.0
"""Within which decoding workers end after their command was killed, also on a busy machine."""


def indexing(settings: list[str]) -> None:
    """Run the command, with many small writes."""
    rows.BATCH_ROWS = ROWS  # type: ignore[misc]
    union_index(settings)


class Folder:
    """Images that change."""

    def __init__(self, root: Path, seed: int) -> None:
        self.root, self.random, self.made = root, random.Random(seed), 0
        root.mkdir()

    def add(self, count: int) -> None:
        """Write new images, one in twenty broken."""
        for _ in range(count):
            self.made += 1
            (self.root / f"{self.made:05d}.jpg").write_bytes(self._content())

    def change(self, share: float) -> None:
        """Add, replace, rename, copy, touch and remove."""
        count = int(share * len(self.files()))
        self.add(count)
        files = self.random.sample(self.files(), min(5 * count, len(self.files())))
        for number, path in enumerate(files):
            kind = number % 5
            if kind == 0:
                path.write_bytes(self._content())
            elif kind == 1:
                self.made += 1
                path.rename(self.root / f"moved {self.made:05d}.jpg")
            elif kind == 2:
                self.made += 1
                shutil.copy(path, self.root / f"copy {self.made:05d}.jpg")
            elif kind == 3:
                os.utime(path)
            else:
                path.unlink()

    def files(self) -> list[Path]:
        """Name the images."""
        return sorted(self.root.iterdir())

    def _content(self) -> bytes:
        if self.random.random() < 0.05:
            return self.random.randbytes(100)
        pixels = np.frombuffer(self.random.randbytes(8 * 8 * 3), dtype=np.uint8).reshape(8, 8, 3)
        file = io.BytesIO()
        Image.fromarray(pixels).resize((96, 64)).save(file, "JPEG")
        return file.getvalue()


class Trial:
    """One folder, one index, many kills."""

    def __init__(self, place: Path, seed: int, workers: int) -> None:
        self.place = place
        self.folder = Folder(place / "pictures", seed)
        self.random = random.Random(seed + 1)
        self.uri = str(place / "photos.lance")
        self.settings = [
            f"images={self.folder.root}",
            f"index={self.uri}",
            f"cache_dir={place / 'cache'}",
            "checkpoint=tiny",
            f"workers={workers}",
            "batch_size=16",
            "strategy=cpu",
            "progress=false",
        ]
        # Forked from one that has imported everything: a start costs no imports.
        self.forks = multiprocessing.get_context("forkserver")
        self.forks.set_forkserver_preload(
            ["union_igrot.gallery.ingest.pipeline", "union_igrot.gallery.metadata", "lance"]
        )
        self.vectors: dict[str, torch.Tensor] = {}
        self.seconds = 3.0
        self.seen: Counter[str] = Counter()

    def start(self) -> BaseProcess:
        """Start the command."""
        process = self.forks.Process(target=indexing, args=(self.settings,))
        process.start()
        return process

    def kill_once(self) -> bool:
        """Start the command and kill it; tell whether it was still at work."""
        before = self._state()
        process, start = self.start(), time.monotonic()
        by_time = self.random.random() < 0.5
        moment = self.random.uniform(0.0, 1.1 * self.seconds)
        writes = self.random.randint(1, 8)
        while process.is_alive() and (time.monotonic() - start < moment if by_time else self._writes(before) < writes):
            self._look()
        workers = _children(process.pid)
        process.kill()
        process.join()
        self._wait_for_end(workers)
        now = self._state()
        if process.exitcode == -9:
            self.seen["before the first write" if now == before else "after writes"] += 1
        elif process.exitcode != 0:
            raise AssertionError(f"ended by itself with code {process.exitcode}")
        return process.exitcode == -9

    def finish(self) -> None:
        """Let the command come to its end, and hold the rows against the folder."""
        process, start = self.start(), time.monotonic()
        while process.is_alive() and time.monotonic() - start < PATIENCE:
            self._look()
        process.join(1)
        if process.exitcode != 0:
            raise AssertionError(f"a run that was left alone ended with code {process.exitcode}")
        self.seconds = time.monotonic() - start
        self.check()

    def check(self) -> None:
        """Compare every row with its file."""
        sound = {}
        for path in self.folder.files():
            data = path.read_bytes()
            if data[:2] == b"\xff\xd8":
                sound[str(path)] = hashlib.sha256(data).hexdigest()[:32]
        with open_index(self.uri) as index:
            rows = _rows(index)
            doubled = [name for name, times in Counter(name for name, _ in rows).items() if times > 1]
            if doubled or dict(rows) != sound:
                lost, more = sound.keys() - dict(rows).keys(), dict(rows).keys() - sound.keys()
                raise AssertionError(f"doubled {doubled[:3]}, lost {sorted(lost)[:3]}, too many {sorted(more)[:3]}")
            vectors = index.fetch([name for name, _ in rows]).vectors
        for (_, digest), vector in zip(rows, vectors, strict=True):
            torch.testing.assert_close(vector, self.vectors.setdefault(digest, vector), atol=1e-4, rtol=0)

    def _look(self) -> None:
        """Read and search the index, as somebody does meanwhile."""
        try:
            with open_index(self.uri) as index:
                rows = _rows(index)
                if len({name for name, _ in rows}) != len(rows):
                    raise AssertionError("a reader saw a row twice")
                if rows:
                    index.search(torch.randn(1, index.dim), 5, columns=["hash"])
        except ConfigError:  # not made yet
            time.sleep(0.01)

    def _wait_for_end(self, workers: list[int]) -> None:
        end = time.monotonic() + WORKER_SECONDS
        while alive := [pid for pid in workers if Path(f"/proc/{pid}").exists()]:
            assert time.monotonic() < end, f"decoding workers outlive the command: {alive}"
            time.sleep(0.05)
        self.seen["workers ended"] += len(workers)

    def _state(self) -> frozenset[str]:
        return frozenset(path.name for path in Path(self.uri).glob("_versions/*"))

    def _writes(self, before: frozenset[str]) -> int:
        return len(self._state() - before)


def _children(pid: int | None) -> list[int]:
    try:
        return [int(one) for one in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except FileNotFoundError:  # ended by itself
        return []


def _rows(index: VectorIndex) -> list[tuple[str, str]]:
    return [pair for batch in index.scan(["id", "hash"]) for pair in zip(batch["id"], batch["hash"], strict=True)]  # type: ignore[misc]


def kill_many(
    place: Path, kills: int, *, images: int = 300, seed: int = 0, workers: int = 1
) -> tuple[Counter[str], int]:
    """Kill, go on, check.

    Args:
        place: An empty folder.
        kills: How often the command is killed while it is at work.
        images: Images at the beginning.
        seed: Decides what changes, and when the command is killed.
        workers: Its decoding processes.

    Returns:
        How many kills came before and after its first write and how many workers ended after them, and how often it
        was started to be killed.

    Raises:
        AssertionError: At the first difference between rows and images.
    """
    trial = Trial(place, seed, workers)
    trial.folder.add(images)
    done, runs = 0, 0
    while done < kills:
        done += trial.kill_once()
        runs += 1
        if runs % EVERY == 0:
            trial.finish()
            trial.folder.change(0.15)
        elif runs % EVERY == 2:
            trial.folder.change(0.03)  # also in the midst of unfinished work
    trial.finish()
    return trial.seen, runs
