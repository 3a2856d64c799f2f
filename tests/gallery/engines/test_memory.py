"""What is particular to the index in memory: it grows and shrinks with the rows."""

import random

import torch

from union_igrot.gallery.engines.base import Rows
from union_igrot.gallery.engines.memory import MemoryIndex


def test_memory_grows_by_doubling_and_is_released():
    index, sizes = MemoryIndex(2), set()
    for i in range(2000):
        index.upsert(Rows([str(i)], torch.ones(1, 2), {"n": [i]}))
        sizes.add(len(index._vectors))
    assert len(sizes) <= 12
    index.delete([str(i) for i in range(1990)])
    assert index.search(torch.ones(1, 2), 1)[0].ids == ["1990"]
    assert len(index._vectors) == 10
    assert index.fetch(["1995"]).columns == {"n": [1995]}


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
