"""InfoNCE against plain Python, and across processes against one."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch.nn import functional as F

from union_igrot.training.losses import InfoNCE, build_loss, info_nce

GOLDEN = Path(__file__).parents[2] / "../shared/golden/mini.npz"


def rows(count, dim, seed):
    x = torch.randn(count, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return F.normalize(x, dim=-1)


def slow(queries, targets, answers, query_groups, target_groups, scale):
    """Minus the log of the answer's share of the exponentials, the mean over queries."""
    total = 0.0
    for q, query in enumerate(queries.tolist()):
        logits = {}
        for t, target in enumerate(targets.tolist()):
            if t != answers[q] and query_groups is not None and query_groups[q] == target_groups[t]:
                continue
            logits[t] = scale * sum(a * b for a, b in zip(query, target, strict=True))
        top = max(logits.values())
        total += top + math.log(sum(math.exp(x - top) for x in logits.values())) - logits[answers[q]]
    return total / len(queries)


@pytest.mark.slow
@settings(max_examples=40, deadline=None)
@given(st.integers(1, 6), st.integers(0, 4), st.integers(0, 2**30), st.sampled_from([0.5, 30.0, 100.0]), st.data())
def test_equals_the_plain_sum(count, more, seed, scale, data):
    queries, targets = rows(count, 5, seed), rows(count + more, 5, seed + 1)
    answers = data.draw(st.lists(st.integers(0, count + more - 1), min_size=count, max_size=count))
    target_groups = data.draw(st.lists(st.integers(0, 2), min_size=count + more, max_size=count + more))
    query_groups = [target_groups[a] for a in answers]
    at = torch.tensor(answers)
    found = info_nce(queries, targets, at, None, None, scale)
    assert found.item() == pytest.approx(slow(queries, targets, answers, None, None, scale), rel=1e-10, abs=1e-12)
    found = info_nce(queries, targets, at, torch.tensor(query_groups), torch.tensor(target_groups), scale)
    wanted = slow(queries, targets, answers, query_groups, target_groups, scale)
    assert found.item() == pytest.approx(wanted, rel=1e-10, abs=1e-12)
    assert found.dtype == torch.float64
    assert found >= 0


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 6), st.integers(0, 2**30), st.booleans(), st.booleans(), st.data())
def test_module_equals_the_plain_sum(count, seed, symmetric, skip, data):
    queries, targets = rows(count, 4, seed), rows(count, 4, seed + 1)
    groups = data.draw(st.lists(st.integers(0, 3), min_size=count, max_size=count))
    given_groups = groups if skip else None
    answers = list(range(count))
    wanted = slow(queries, targets, answers, given_groups, given_groups, 20.0)
    if symmetric:
        wanted = (wanted + slow(targets, queries, answers, given_groups, given_groups, 20.0)) / 2
    loss = InfoNCE(20.0, symmetric=symmetric, skip_duplicates=skip)
    assert loss(queries, targets, torch.tensor(groups)).item() == pytest.approx(wanted, rel=1e-10, abs=1e-12)


@pytest.mark.parametrize("symmetric", [False, True])
def test_gradients(symmetric):
    queries, targets = rows(4, 3, 1).requires_grad_(), rows(4, 3, 2).requires_grad_()
    groups = torch.tensor([0, 1, 0, 2])
    loss = InfoNCE(5.0, symmetric=symmetric)
    assert torch.autograd.gradcheck(lambda q, t: loss(q, t, groups), (queries, targets))


def test_groups_of_one_side_alone_are_refused():
    x, answers = rows(2, 3, 0), torch.arange(2)
    for groups in ((answers, None), (None, answers)):
        with pytest.raises(ValueError, match="given together"):
            info_nce(x, x, answers, *groups)


@pytest.mark.skipif(not GOLDEN.is_file(), reason="the reference's golden values are not on this machine")
def test_losses_of_the_reference():
    golden = np.load(GOLDEN)
    null = F.normalize(torch.from_numpy(golden["text_pooled"][1:2]), dim=-1)
    image = F.normalize(torch.from_numpy(golden["image_pooled"]), dim=-1)
    targets = {"original": image, "sum": image + null, "union": torch.from_numpy(golden["union_target"])}
    query, answers = torch.from_numpy(golden["query"]), torch.arange(4)
    for name, target in targets.items():
        assert info_nce(query, target, answers).item() == pytest.approx(float(golden[f"loss_{name}"]), abs=2e-3)


def test_options_of_a_loss_are_in_its_repr():
    # By it, a run folder knows with which loss it was trained.
    built = [
        InfoNCE(),
        InfoNCE(10.0),
        InfoNCE(symmetric=True),
        *(build_loss("bank", distillation=x) for x in (0.0, 0.5)),
    ]
    assert len(set(map(repr, built))) == len(built)
