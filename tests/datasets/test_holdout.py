"""What is held out of a training set is never trained on."""

import pytest

from union_igrot.datasets.loading import hold_out
from union_igrot.errors import DataError
from union_igrot.synthetic.shapes import shapes_training
from union_igrot.types import TrainingSet


@pytest.mark.parametrize(("triplets", "pairs", "task"), [(200, 0, "cir"), (0, 200, "sbir")])
def test_groups_are_split(triplets, pairs, task):
    whole = shapes_training(triplets, pairs)
    rest, held = hold_out(whole, 0.2)
    kept = {triplet.group for triplet in rest.triplets}
    out = {item.label for item in held.gallery} - {None}
    assert not kept & out
    assert len(rest.triplets) + len(held.queries) == 200
    assert 0.2 * 200 <= len(held.queries) <= 0.5 * 200
    assert held.task == task
    assert set(rest.classes) == {name for name in whole.classes if name not in out}
    for query in held.queries:
        labels = {item.id: item.label for item in held.gallery}
        assert {labels[name] for name in query.targets} == {labels[query.targets[0]]}
        assert len(query.targets) == sum(label == labels[query.targets[0]] for label in labels.values())
        assert (query.text is None) == (task == "sbir")
        assert len(query.exclude) == (1 if task == "cir" else 0)


def test_one_group_cannot_be_split():
    whole = shapes_training(0, 40)
    one = TrainingSet("one", [t for t in whole.triplets if t.group == whole.triplets[0].group])
    with pytest.raises(DataError, match="cannot be split"):
        hold_out(one)
