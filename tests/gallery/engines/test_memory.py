"""What is particular to the index in memory: its arrays grow and shrink with the rows."""

import random

import torch

from union_igrot.gallery.engines.base import Rows
from union_igrot.gallery.engines.memory import _ROOM, MemoryIndex


def test_room_grows_by_doubling_and_is_given_back(monkeypatch):
    index = MemoryIndex(2)
    moves = []
    move = MemoryIndex._move
    monkeypatch.setattr(MemoryIndex, "_move", lambda self, room: (moves.append(room), move(self, room))[1])
    for i in range(2000):
        index.upsert(Rows([str(i)], torch.ones(1, 2), {"n": [i]}))
    assert len(moves) <= 8  # 16 to 2048
    index.delete([str(i) for i in range(1990)])
    assert len(index._vectors) == _ROOM
    assert index.fetch(["1995"]).columns == {"n": [1995]}
    index.upsert(Rows([f"more {i}" for i in range(5000)], torch.ones(5000, 2), {}))
    assert len(index._vectors) == 5010


def test_any_course_of_writes_leaves_what_a_dict_would_hold():
    draw = random.Random(5)
    index, model = MemoryIndex(3), {}
    for step in range(300):
        names = [f"p{n}" for n in draw.sample(range(80), draw.randint(1, 30))]
        if draw.random() < 0.5:
            index.upsert(Rows(names, torch.full((len(names), 3), float(step)), {"step": [step] * len(names)}))
            model |= dict.fromkeys(names, step)
        else:
            assert index.delete(names) == sum(model.pop(name, None) is not None for name in names)
        if draw.random() < 0.1:
            index.optimize()
    (found,) = index.scan(["id", "step"])
    assert found == {"id": list(model), "step": list(model.values())}
    rows = index.fetch(list(model))
    assert rows.vectors[:, 0].tolist() == list(model.values())
