"""Writers that are killed while they write to an index, and what must be there afterwards.

Each writer logs every operation before it starts and after it returned. After a kill the index must hold exactly the
operations that returned, with or without the whole of the one that was running.
"""

import json
import multiprocessing
import os
import random
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch

from union_igrot.evaluation.ranking import exact_topk
from union_igrot.gallery.engines.base import Rows
from union_igrot.gallery.engines.factory import open_index

DIM = 8
NAMES = 300
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["torch", "union_igrot.gallery.engines.base"])


def vector(name: str, stamp: int) -> list[float]:
    """Return the vector that an operation writes for a row: small integers, so that products are exact."""
    rng = random.Random(f"{name} {stamp}")
    return [float(rng.randint(-3, 3)) for _ in range(DIM)]


def plan(seed: int, step: int) -> dict:
    """Return the operation of a step."""
    rng = random.Random(f"{seed} {step}")
    names = [f"photo {n}.jpg" for n in rng.sample(range(NAMES), rng.randint(1, 40))]
    return {"do": rng.choices(["upsert", "delete", "optimize"], [6, 3, 1])[0], "names": names, "stamp": step}


def write_forever(uri: str, log: str, seed: int) -> None:
    """Run operations until killed."""
    index = open_index(uri, dim=DIM, create=True)
    entry = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    step = 0
    while True:
        operation = plan(seed, step) | {"stamp": seed * 100_000 + step}
        os.write(entry, json.dumps({"begin": operation}).encode() + b"\n")
        if operation["do"] == "upsert":
            vectors = torch.tensor([vector(name, operation["stamp"]) for name in operation["names"]])
            columns = {"stamp": [operation["stamp"]] * len(operation["names"])}
            if step % 5 == 4:
                columns[f"column {seed % 7}"] = [f"{name}" for name in operation["names"]]
            index.upsert(Rows(operation["names"], vectors, columns))
        elif operation["do"] == "delete":
            index.delete(operation["names"])
        else:
            index.optimize()
        os.write(entry, b'{"done": true}\n')
        step += 1


@dataclass
class Model:
    """Expected content of an index: stamps by name, in the order of first write."""

    rows: dict[str, int] = field(default_factory=dict)

    def after(self, operation: dict) -> "Model":
        rows = dict(self.rows)
        for name in operation["names"]:
            if operation["do"] == "upsert":
                rows[name] = operation["stamp"]
            elif operation["do"] == "delete":
                rows.pop(name, None)
        return Model(rows)


@dataclass
class Tally:
    """Counts of kills.

    Attributes:
        kills: Kills by the operation that was running.
        kept: Kills after which the running operation was complete, by operation.
        acknowledged: Operations that returned.
    """

    kills: dict[str, int] = field(default_factory=dict)
    kept: dict[str, int] = field(default_factory=dict)
    acknowledged: int = 0


def check_index(uri: str) -> Model:
    """Read the index and check that it is consistent."""
    with open_index(uri) as index:
        found: list[tuple[str, int]] = []
        for batch in index.scan(["id", "stamp"]):
            found += zip(batch["id"], batch["stamp"], strict=True)
        model = Model(dict(found))
        assert len(model.rows) == len(found) == len(index), "a row is repeated"
        if found:
            expected = torch.tensor([vector(name, stamp) for name, stamp in found])
            assert torch.equal(index.fetch([name for name, _ in found]).vectors, expected), "a vector is not its row's"
            query = torch.ones(1, DIM)
            best = exact_topk(query, expected, min(10, len(found)))
            (hits,) = index.search(query, 10, mode="exact")
            assert hits.ids == [found[i][0] for i in best.positions[0]]
    return model


def kill_once(uri: str, log: Path, seed: int, before: Model, tally: Tally) -> Model:
    """Start a writer, kill it at a random moment, and check what it left."""
    log.unlink(missing_ok=True)
    process = FORKS.Process(target=write_forever, args=(uri, str(log), seed), daemon=True)
    process.start()
    end = time.monotonic() + 180
    while not log.exists() or not log.stat().st_size:
        assert process.is_alive(), f"the writer ended with code {process.exitcode}"
        assert time.monotonic() < end, "the writer did not start"
        time.sleep(0.005)
    time.sleep(random.Random(seed).uniform(0, 0.5))
    process.kill()
    process.join()
    assert process.exitcode == -9, f"the writer ended by itself with code {process.exitcode}"

    known, running = before, None
    for line in log.read_text().splitlines():
        entry = json.loads(line)
        if "begin" in entry:
            running = entry["begin"]
        else:
            known, running = known.after(running), None
            tally.acknowledged += 1
    found = check_index(uri)
    allowed = [known] if running is None else [known, known.after(running)]
    assert [list(found.rows.items())] in [[list(one.rows.items())] for one in allowed], describe(found, allowed)
    what = "nothing" if running is None else running["do"]
    tally.kills[what] = tally.kills.get(what, 0) + 1
    if running is not None and found == allowed[1] != allowed[0]:
        tally.kept[what] = tally.kept.get(what, 0) + 1
    return found


def describe(found: Model, allowed: list[Model]) -> str:
    lost = {name for name in allowed[0].rows if name not in found.rows}
    extra = {name for name in found.rows if name not in allowed[-1].rows}
    return f"lost {sorted(lost)[:5]}, unexpected {sorted(extra)[:5]}, or another order or embedding"


def kill_many(uri: str, log: Path, kills: int, first_seed: int = 0) -> Tally:
    """Kill writers one after the other; each continues with the index of the last."""
    tally, model = Tally(), Model()
    for kill in range(kills):
        model = kill_once(uri, log, first_seed + kill, model, tally)
    return tally
