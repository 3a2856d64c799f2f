"""Writers that are killed while they write to an index, and what must be there afterwards.

Each writer says in a log what it is about to do and what has returned. After a kill the index
must hold exactly what returned, with or without the whole of what was under way.
"""

import json
import multiprocessing
import os
import random
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch

from union_igrot.evaluation.exact import exact_topk
from union_igrot.gallery.engines.base import Rows
from union_igrot.gallery.engines.factory import open_index

DIM = 8
NAMES = 300
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["torch", "union_igrot.gallery.engines.base"])


def vector(name: str, stamp: int) -> list[float]:
    """What was written for a row by one operation: small whole numbers, so that products are exact."""
    draw = random.Random(f"{name} {stamp}")
    return [float(draw.randint(-3, 3)) for _ in range(DIM)]


def plan(seed: int, step: int) -> dict:
    """An operation, the same for whoever asks."""
    draw = random.Random(f"{seed} {step}")
    names = [f"photo {n}.jpg" for n in draw.sample(range(NAMES), draw.randint(1, 40))]
    return {"do": draw.choices(["upsert", "delete", "optimize"], [6, 3, 1])[0], "names": names, "stamp": step}


def write(uri: str, log: str, seed: int) -> None:
    """Work until killed."""
    index = open_index(uri, dim=DIM, create=True)
    said = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    step = 0
    while True:
        job = plan(seed, step) | {"stamp": seed * 100_000 + step}
        os.write(said, json.dumps({"begin": job}).encode() + b"\n")
        if job["do"] == "upsert":
            vectors = torch.tensor([vector(name, job["stamp"]) for name in job["names"]])
            columns = {"stamp": [job["stamp"]] * len(job["names"])}
            if step % 5 == 4:
                columns[f"column {seed % 7}"] = [f"{name}" for name in job["names"]]
            index.upsert(Rows(job["names"], vectors, columns))
        elif job["do"] == "delete":
            index.delete(job["names"])
        else:
            index.optimize()
        os.write(said, b'{"done": true}\n')
        step += 1


@dataclass
class Model:
    """What an index should hold: stamps by name, in the order of first writing."""

    rows: dict[str, int] = field(default_factory=dict)

    def after(self, job: dict) -> "Model":
        rows = dict(self.rows)
        for name in job["names"]:
            if job["do"] == "upsert":
                rows[name] = job["stamp"]
            elif job["do"] == "delete":
                rows.pop(name, None)
        return Model(rows)


@dataclass
class Tally:
    """How often what was killed.

    Attributes:
        kills: By what was under way.
        kept: How often what was under way was there afterwards, by what it was.
        acknowledged: Operations that had returned.
    """

    kills: dict[str, int] = field(default_factory=dict)
    kept: dict[str, int] = field(default_factory=dict)
    acknowledged: int = 0


def read(uri: str) -> Model:
    """What the index holds, everything about it checked."""
    with open_index(uri) as index:
        found: list[tuple[str, int]] = []
        for batch in index.scan(["id", "stamp"]):
            found += zip(batch["id"], batch["stamp"], strict=True)
        model = Model(dict(found))
        assert len(model.rows) == len(found) == len(index), "a row is there twice"
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
    process = FORKS.Process(target=write, args=(uri, str(log), seed))
    process.start()
    end = time.monotonic() + 60
    while not log.exists() or not log.stat().st_size:
        assert process.is_alive(), f"the writer ended with code {process.exitcode}"
        assert time.monotonic() < end, "the writer never began"
        time.sleep(0.005)
    time.sleep(random.Random(seed).uniform(0, 0.5))
    process.kill()
    process.join()
    assert process.exitcode == -9, f"the writer ended by itself with code {process.exitcode}"

    known, under_way = before, None
    for line in log.read_text().splitlines():
        said = json.loads(line)
        if "begin" in said:
            under_way = said["begin"]
        else:
            known, under_way = known.after(under_way), None
            tally.acknowledged += 1
    found = read(uri)
    allowed = [known] if under_way is None else [known, known.after(under_way)]
    assert [list(found.rows.items())] in [[list(one.rows.items())] for one in allowed], describe(found, allowed)
    what = "nothing" if under_way is None else under_way["do"]
    tally.kills[what] = tally.kills.get(what, 0) + 1
    if under_way is not None and found == allowed[1] != allowed[0]:
        tally.kept[what] = tally.kept.get(what, 0) + 1
    return found


def describe(found: Model, allowed: list[Model]) -> str:
    lost = {name for name in allowed[0].rows if name not in found.rows}
    more = {name for name in found.rows if name not in allowed[-1].rows}
    return f"lost {sorted(lost)[:5]}, unexpected {sorted(more)[:5]}, or another order or embedding"


def kill_many(uri: str, log: Path, kills: int, first_seed: int = 0) -> Tally:
    """Kill writers one after the other, each going on where the last was stopped."""
    tally, model = Tally(), Model()
    for kill in range(kills):
        model = kill_once(uri, log, first_seed + kill, model, tally)
    return tally
