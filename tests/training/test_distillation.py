"""The target head after distillation: near to the mixture, and nothing else changed."""

import copy
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from small_world import extractor, trainable, triplets
from union_igrot.training.distillation import can_distill, distill_target

WEIGHT = 0.5


@pytest.fixture(scope="module")
def trained():
    model = trainable("transagg", "residual").eval()
    with torch.no_grad():  # as after a training: queries are no plain image embeddings
        for weight in model.fusion.parameters():
            weight.add_(0.2 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)))
    return model


def distilled(model, folder, weight=WEIGHT, samples=None, seed=0):
    found = copy.deepcopy(model)
    distill_target(found, samples or triplets(), extractor(folder, found.backbone), weight, seed)
    return found


def mixtures(model, samples):
    """Return images of a gallery and, one by one, the embeddings that distillation aims at."""
    images = [one.target if one.task == "sbir" else one.image for one in samples.triplets]
    wanted = []
    for image in images:
        fused, plain = model.encode_queries([image])[0], model.encode_gallery([image])[0]
        mixed = [g + WEIGHT * f for g, f in zip(plain.tolist(), fused.tolist(), strict=True)]
        length = sum(x * x for x in mixed) ** 0.5
        wanted.append([x / length for x in mixed])
    return images, torch.tensor(wanted)


@pytest.mark.slow
def test_the_target_head_learns_the_mixture_and_keeps_everything_else(trained, tmp_path):
    samples = triplets()
    images, wanted = mixtures(trained, samples)
    found = distilled(trained, tmp_path)
    before, after = (F.cosine_similarity(one.encode_gallery(images), wanted).mean() for one in (trained, found))
    assert 1 - after < 0.2 * (1 - before)
    kept = {name: x for name, x in trained.state_dict().items() if not name.startswith("target.")}
    assert all(torch.equal(found.state_dict()[name], x) for name, x in kept.items())
    assert all(weight.grad is None for weight in found.parameters())
    assert not found.training


@pytest.mark.slow
def test_it_follows_from_the_seed(trained, tmp_path):
    first, again, other = (distilled(trained, tmp_path, seed=seed).target.state_dict() for seed in (3, 3, 4))
    assert all(torch.equal(x, again[name]) for name, x in first.items())
    assert not all(torch.equal(x, other[name]) for name, x in first.items())


@pytest.mark.slow
@pytest.mark.parametrize("task", ["cir", "sbir"])
def test_one_task_is_enough(trained, tmp_path, task):
    samples = triplets()
    alone = replace(samples, triplets=tuple(one for one in samples.triplets if one.task == task))
    images, wanted = mixtures(trained, alone)
    found = distilled(trained, tmp_path, samples=alone)
    before, after = (F.cosine_similarity(one.encode_gallery(images), wanted).mean() for one in (trained, found))
    assert after > before


@pytest.mark.parametrize(
    ("fusion", "target", "able"),
    [
        ("transagg", "residual", True),
        ("sum", "residual", False),
        ("transagg", "frozen", False),
        ("transagg", "union", False),
    ],
)
def test_which_models_can(fusion, target, able):
    assert can_distill(trainable(fusion, target)) is able
